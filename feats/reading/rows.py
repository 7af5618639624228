"""Rows of a data set in the making, and what all layouts share: texts from files, checks of ids and labels."""

import difflib
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feats.errors import UsageError
from feats.regular import check_regular
from feats.text import decode_texts

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # where an id has several, the first wins
MAX_TEXT_BYTES = 16 << 20
MAX_NAME_BYTES = 1024  # of an id and a label: each takes the room of the longest, in memory and in a cache
MANIFEST_COLUMNS = ("id", "image", "text", "label", "split")

# What stands for no label, in any case; a class of such a name needs another one.
UNKNOWN_LABELS = ("", "null", "none", "nan")
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)\.0+")  # 1.0, which is 1

_TYPO_MIN_ROWS = 100  # a label seen once among fewer rows is no sign of a typo
_TYPO_MAX_WARNINGS = 10
# What is compared takes the square of its length, each with each.
_TYPO_MAX_CLASSES = 200
_TYPO_MAX_LENGTH = 60

EXPECTED = {
    "course": "train.txt or test_without_label.txt (guid,tag) in a folder, pairs in data/, pics_texts_pair/ or beside",
    "mvsa": "labelResultAll.txt in a folder, pairs in data/",
    "manifest": f"one .csv, .tsv, .jsonl or .parquet with some of the columns {', '.join(MANIFEST_COLUMNS)}",
    "shards": "*.tar files, uncompressed, named <split>-<number>.tar",
    "folders": "pictures and/or .txt files in a folder for each class, or just in one, perhaps in train/, val/, test/",
}


@dataclass(frozen=True, slots=True)
class TarSlice:
    """A file inside an uncompressed tar: `size` bytes from `offset`."""

    path: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """The file's bytes; may raise `OSError`."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(slots=True)
class Row:
    """A record in the making: its text is still bytes, a string, or the reason why there is none."""

    split: str
    id: str
    file: str  # the name of the one that holds the row
    place: int | str  # in it: a line, or a key
    image: Path | TarSlice | None = None
    label: str | None = None
    raw: bytes | None = None
    text: str | None = None
    error: str = ""
    text_path: Path | TarSlice | None = None

    @property
    def source(self) -> str:
        """File and place, for messages."""
        return f"{self.file} line {self.place}" if isinstance(self.place, int) else f"{self.file} {self.place}"


Rows = tuple[list[Row], list[str]]  # rows and warnings


def read_text_file(path: Path, name: str) -> tuple[bytes | None, str]:
    """A text's bytes, or None and the reason."""
    try:
        # Asked before opening: a named pipe would block for ever.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return None, f"text {name} is a folder" if stat.S_ISDIR(mode) else f"text {name} is not a regular file"
        with path.open("rb") as file:
            return limited(file.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        return None, f"text {name} cannot be read: {error.strerror}"
    except ValueError:  # a NUL or a lone surrogate in the path
        return None, f"text {name!r} cannot be read: not a valid file name"


def limited(raw: bytes) -> tuple[bytes | None, str]:
    """A text's bytes, or None and the reason where there are too many (read one more than `MAX_TEXT_BYTES`)."""
    too_long = len(raw) > MAX_TEXT_BYTES
    return (None, f"text is longer than {MAX_TEXT_BYTES >> 20} MB") if too_long else (raw, "")


def decode_file(file: Path) -> str:
    """A whole file as a string. Raises `OSError`, and `UsageError` as `decode`."""
    check_regular(file)
    return decode(file.read_bytes(), str(file))


def decode(raw: bytes, source: str) -> str:
    """Bytes as a string. Raises `UsageError`, which names `source`, for those of no known encoding."""
    return decoded(raw, source)[0]


def decoded(raw: bytes, source: str) -> tuple[str, str]:
    """Bytes as a string, and their encoding. Raises as `decode`."""
    text, found = decode_texts([raw])[0]
    if text is None:
        raise UsageError(f"{source} cannot be decoded: {found}; save it as UTF-8")
    return text, found


def scalar(value: Any, where: str) -> str | None:
    """A value of JSON or Parquet as a cell; None for null and NaN. Raises `UsageError`, which names `where`, for lists,
    objects and bytes."""
    if isinstance(value, (dict, list)):
        raise UsageError(f"{where} is a JSON {type(value).__name__}; expected a string, a number or null")
    if isinstance(value, bytes):
        raise UsageError(f"{where} holds bytes; expected a string, a number or null")
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def label_of(value: Any, where: str = "a label") -> str | None:
    """A cell or value as a label: the same class in every layout and format. None for an unknown one: null, NaN, and
    the words of `UNKNOWN_LABELS`. 1, 1.0 and "1.0" are "1", JSON's true and false are "true" and "false"; other words
    stay as they are, without blanks around. Equal labels are one object. Raises `UsageError` as `scalar`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = (scalar(value, where) or "").strip()
    if text.lower() in UNKNOWN_LABELS:
        return None
    if isinstance(value, (str, float)) and _WHOLE.fullmatch(text):
        text = "0" if float(text) == 0 else text.partition(".")[0]
    return sys.intern(text)


def outside_note(rows: Iterable[Row], root: Path) -> str | None:
    """One line on how many files of the rows lie outside the folder `root`, or are links to such; None for none."""
    home, inside = os.path.realpath(root), dict[str, bool]()
    count, first = 0, ""
    for row in rows:
        for path in (row.image, row.text_path):
            if isinstance(path, Path) and _is_outside(path, home, inside):
                count, first = count + 1, first or f"{path} ({row.source})"
    return outside_words(count, first, root) if count else None


def outside_words(count: int, first: str, root: Path) -> str:
    """What a user hears of files outside."""
    return f"note: {count} file{'s' if count > 1 else ''} outside the data folder {root}, e.g. {first}"


def _is_outside(path: Path, home: str, inside: dict[str, bool]) -> bool:
    """Whether a file is outside `home`; `inside` remembers folders."""
    try:
        place = os.path.realpath(path) if path.is_symlink() else str(path)
        folder = os.path.dirname(place)
        if folder not in inside:
            inside[folder] = Path(os.path.realpath(folder)).is_relative_to(home)
        return not inside[folder]
    except (OSError, ValueError):  # no file name: reading it says so
        return False


def check_ids(rows: list[Row]) -> None:
    """Raise `UsageError` for ids that are empty, unstorable or repeated (across splits too)."""
    for row in rows:
        check_id(row)
    if len({row.id for row in rows}) < len(rows):
        check_repeated(rows)


def check_id(row: Row) -> None:
    """Raise `UsageError` for an id that is empty or unstorable."""
    if not row.id:
        raise UsageError(f"{row.source}: empty id; every row needs one of its own")
    for what, name in (("id", row.id), ("label", row.label or "")):
        if not name.isascii() and has_surrogates(name) or "\0" in name:
            shown = ascii(name[:60])
            raise UsageError(f"{row.source}: {what} {shown} holds a NUL or a lone surrogate; rename it")
        if len(name) > MAX_NAME_BYTES or (not name.isascii() and len(name.encode()) > MAX_NAME_BYTES):
            raise UsageError(
                f"{row.source}: {what} {ascii(name[:40])}... is longer than {MAX_NAME_BYTES} bytes; name a column of "
                f"short ones with `columns` {what}=..."
            )


def check_repeated(rows: Iterable[Row]) -> None:
    """Raise `UsageError` for ids that several of the rows have."""
    first: dict[str, Row] = {}
    repeated: dict[str, str] = {}
    for row in rows:
        if first.setdefault(row.id, row) is not row:
            repeated.setdefault(row.id, f"{row.id!r} ({first[row.id].source} and {row.source})")
    if repeated:
        shown = "; ".join(list(repeated.values())[:5]) + ("; ..." if len(repeated) > 5 else "")
        raise UsageError(
            f"{len(repeated)} repeated ids: {shown}. Expected unique ids across all splits; rename or remove them"
        )


def has_surrogates(text: str) -> bool:
    """Whether a string (from JSON's escapes) can't be written as UTF-8."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def label_warnings(rows: list[Row]) -> list[str]:
    """One warning for each label seen once among many rows: most likely a typo."""
    counts = Counter(row.label for row in rows if row.label is not None)
    single = {label for label, count in counts.items() if count == 1}
    return warnings_of_labels(counts, {row.label: row.source for row in rows if row.label in single})


def warnings_of_labels(counts: Counter[str], places: Mapping[str | None, str]) -> list[str]:
    """As `label_warnings`, of how often each label is there, and where the single ones are, in the rows' order."""
    labelled = counts.total()
    if labelled < _TYPO_MIN_ROWS:
        return []
    common = [label for label, count in counts.most_common() if count > 1]
    alike = [label for label in common[:_TYPO_MAX_CLASSES] if len(label) <= _TYPO_MAX_LENGTH]
    single = [(label, place) for label, place in places.items() if label is not None and counts[label] == 1]
    warnings = []
    for label, place in single[:_TYPO_MAX_WARNINGS]:
        close = difflib.get_close_matches(label, alike, 1) if len(label) <= _TYPO_MAX_LENGTH else []
        hint = f"; is it {close[0]!r}?" if close else ""
        warnings.append(f"label {label!r} is seen once among {labelled} rows ({place}){hint}")
    if len(single) > _TYPO_MAX_WARNINGS:
        warnings.append(f"{len(single) - _TYPO_MAX_WARNINGS} more labels are seen only once")
    return warnings
