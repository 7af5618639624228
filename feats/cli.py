"""What all command lines of this project share: exit status, help, argument types."""

from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
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
