"""What all command lines of this project share: exit status, help, argument types."""

import re
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Mapping
from typing import Any

EXIT_DONE, EXIT_UNUSABLE, EXIT_QUARANTINE, EXIT_INTERRUPTED = 0, 2, 3, 130


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither None and False nor those that the text tells already."""

    def _get_help_string(self, action: Any) -> str | None:
        if action.default in (None, False, SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse shows it: "invalid positive integer value: '0'"


def as_typed(message: object, parser: ArgumentParser, named: Mapping[str, str] = {}) -> str:
    """A library's message in the words of a command line: the settings that it names in backquotes become options.

    "give a larger `val_ratio`" -> "give a larger --val-ratio". `named` maps settings to the options of other names.
    What the parser has no option for stays as it is.
    """
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}

    def flag(match: re.Match[str]) -> str:
        setting = match[1]
        return flags.get(named.get(setting, setting), match[0])

    return re.sub(r"`(\w+)`", flag, str(message))
