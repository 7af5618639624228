"""The CSV files of both stages, written and read in one way: whatever strings go in come out again.

UTF-8, commas, lines ended by "\\n", cells in "..." where they must be.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from feats.writing import replacing

FORMULA = ("=", "+", "-", "@", "\t", "\r")
LONGEST_CELL = (1 << 31) - 1  # the csv module's own limit is 128 KB; this is the most that every platform takes


class Writable(Protocol):
    """What rows can be written to: an open text file."""

    def write(self, text: str, /) -> object:
        """Take some text."""
        ...


class _LineFeeds:
    """Takes lines that end with "\\r\\n" and writes them with "\\n".

    A csv writer puts a cell into quotes for the characters of its own line end only: with "\\n" a lone "\\r" stays
    bare, and is read back as the end of a row.
    """

    def __init__(self, file: Writable):
        self._file = file

    def write(self, line: str, /) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def write_rows(file: Writable, rows: Iterable[Iterable[object]], *, safe: bool = False) -> None:
    """Write rows to a text file opened with `newline=""`. Numbers are written as Python shows them, None as ''.

    `safe`: for a spreadsheet, which takes texts that begin like a formula for one, and runs it; they get a ' first, and
    so do those that look as if they had got one: `unquoted` takes it away."""
    if safe:
        rows = ([_no_formula(cell) for cell in row] for row in rows)
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(rows)


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip("'").startswith(FORMULA) else cell


def unquoted(cell: str) -> str:
    """The text that `write_rows` made this cell of, if it was `safe`; what it leaves alone as it is."""
    return cell.removeprefix("'") if cell.lstrip("'").startswith(FORMULA) else cell


def write_csv(path: Path, rows: Iterable[Iterable[object]], *, safe: bool = False) -> None:
    """Write rows, the header among them, as the file `path`; `safe` as in `write_rows`. Raises as
    `feats.writing.replacing`."""
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, rows, safe=safe)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], *, safe: bool = False) -> None:
    """Write one line for each mapping, with a column for every key of any; '' where a mapping lacks it. `safe` as in
    `write_rows`."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, [columns, *([row.get(name, "") for name in columns] for row in rows)], safe=safe)


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a file, the header among them; an empty line is an empty row. Raises `OSError`, and `ValueError` for
    what isn't UTF-8."""
    with path.open(encoding="utf-8", newline="") as file:
        return parse_csv(file.read())


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a file as mappings from its header, cells beyond the header left out. Raises as `read_csv`."""
    header, *rows = read_csv(path) or [[]]
    return [dict(zip(header, row, strict=False)) for row in rows if row]


def numbered_csv(text: str) -> list[tuple[int, list[str]]]:
    """As `parse_csv`, with the number of the line that each row ends on, as an editor counts them."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        rows = csv.reader(io.StringIO(text, newline=""))
        return [(rows.line_num, row) for row in rows]
    finally:
        csv.field_size_limit(limit)


def parse_csv(text: str) -> list[list[str]]:
    """As `read_csv`, of a text whose line ends are as they were in the file. A line that isn't in quotes ends with
    "\\n", "\\r\\n" or "\\r", and with no other of Unicode's line separators."""
    return [row for _, row in numbered_csv(text)]
