"""What all command lines of this project share: exit status, help, argument types."""

import re
import sys
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
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


def as_typed(message: object, named: Mapping[str, str] = {}) -> str:
    """A library's message in the words of a command line: settings, which it names in backquotes, become options.

    "give a larger `val_ratio`" -> "give a larger --val-ratio". `named` maps settings to options of other names.
    """
    return re.sub(r"`(\w+)`", lambda match: "--" + named.get(match[1], match[1]).replace("_", "-"), str(message))


def show_warning(named: Mapping[str, str] = {}) -> Callable[..., None]:
    """What to set `warnings.showwarning` to: this project's warnings become one line on stderr, others stay as they are."""
    usual = warnings.showwarning
    home = Path(__file__).parents[1]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if category is UserWarning and Path(filename).parent.is_relative_to(home):
            print(f"warning: {as_typed(message, named)}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, *rest)

    return show
