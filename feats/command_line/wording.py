"""What libraries say, in the words of a command line."""

import re
from collections.abc import Mapping
from typing import Any

from feats.escapes import one_line


def remark(text: object) -> str:
    """A library's remark as a line of stderr: a warning, or the note it calls itself."""
    line = one_line(str(text))
    return line if line.startswith("note: ") else f"warning: {line}"


def error_line(error: object, named: Mapping[str, str] = {}) -> str:
    """What can't be done as a line of stderr, in the words of a command line: see `as_typed`."""
    return f"error: {one_line(as_typed(error, named))}"


def as_typed(message: object, named: Mapping[str, str] = {}) -> str:
    """A library's message in the words of a command line: settings, which it names in backquotes, become options.

    "give a larger `val_ratio`" -> "give a larger --val-ratio". `named` maps settings to options of other names.
    """
    return re.sub(r"`(\w+)`", lambda match: as_option(named.get(match[1], match[1])), str(message))


def as_option(setting: str) -> str:
    """How one types a setting: val_ratio -> --val-ratio."""
    return f"--{setting.replace('_', '-')}"


def as_texts(value: Any) -> list[str]:
    """One value or several, as one types each."""
    return [str(x) for x in (value if isinstance(value, list) else [value])]
