"""Strings of the data's - ids, labels, paths - as a terminal may show them. Files keep them as they are."""

import re
from collections.abc import Sequence

# Control characters (a terminal obeys them), Unicode's line separators, what reverses the direction of all that
# follows, and lone surrogates, which no stream takes.
_SHOWN_ESCAPED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OF_BARS = re.compile(r"(?:\n|\x1b\[A)+")  # how tqdm moves between several bars


def printable(text: str) -> str:
    r"""The text with such characters as Python writes them (\x1b, \u202e); line ends and tabs stay."""
    return _SHOWN_ESCAPED.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    r"""As `printable`, line ends and tabs, too: \n, \t."""
    return printable(text.replace("\n", r"\n").replace("\t", r"\t"))


def short_name(text: str, most: int = 80) -> str:
    """A name out of a foreign file as a message shows it: on one line, cut, without backquotes, which name our own
    settings."""
    shown = one_line(text)
    return (shown if len(shown) <= most else f"{shown[:most]}...").replace("`", "'")


def few(items: Sequence[object], most: int = 5) -> str:
    """The first of some items, and whether there are more: a, b, ..."""
    return f"{', '.join(map(str, items[:most]))}{', ...' if len(items) > most else ''}"


def of_terminal(text: str) -> str:
    """As `printable`, for what libraries write, too: a bar begins at the start of its line, and moves among others."""
    if _OF_BARS.fullmatch(text):
        return text
    start = "\r" if text.startswith("\r") else ""
    return start + printable(text[len(start) :])
