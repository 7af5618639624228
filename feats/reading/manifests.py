"""Layout manifest: a CSV or JSONL with a row for each pair, read as a whole or from any row on."""

import csv
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feats.errors import UsageError
from feats.reading.rows import (
    MANIFEST_COLUMNS,
    MAX_TEXT_BYTES,
    Row,
    Rows,
    check_id,
    check_repeated,
    decoded,
    label_of,
    read_text_file,
    scalar,
    warnings_of_labels,
)

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LINE_ENDS = {".csv": "", ".jsonl": "\n"}  # as open's `newline`: a string of JSON may hold U+2028 or a bare "\r"
_MAX_LABELS = 10_000  # counted; more of them are no classes
_MAX_REPEATED = 1_000  # ids to look up where they are

Chunks = Callable[[int], Iterator[bytes]]  # the bytes of a file from a place on (`feats.reading.remote`)
_Values = dict[str, str | None]  # a row's cells by column


def read_manifest(path: Path) -> Rows:
    """A CSV or JSONL with `id`, `image` and/or `text`, and perhaps `label` and `split`."""
    file = manifest_file(path)
    return manifest_rows(file.read_bytes(), file.parent, file.name, _kind(file.name)), []


def manifest_rows(raw: bytes, folder: Path, name: str, kind: str) -> list[Row]:
    """The rows of a manifest's bytes, of `kind` ".csv" or ".jsonl"; messages call it `name`. Raises `UsageError`."""
    encoding = decoded(raw, name)[1]
    # From here on line by line: the whole as a string may need four times as much memory.
    with io.TextIOWrapper(io.BytesIO(raw), encoding, newline=_LINE_ENDS[kind]) as lines:
        cells = _csv_cells(name, lines, None, 0) if kind == ".csv" else _jsonl_cells(name, lines, 0)
        return [_whole_row(folder, values, name, line) for line, values in cells]


def manifest_file(path: Path) -> Path:
    """The one manifest that `path` is, or holds. Raises `OSError`, and `UsageError` for none and for several."""
    if path.is_file():
        return path
    for name in ("manifest.csv", "manifest.jsonl"):
        if (path / name).is_file():
            return path / name
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".csv", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise UsageError(f"{path} must hold one manifest (.csv or .jsonl); found {names}. Name the file with `data`")
    return found[0]


def _kind(name: str) -> str:
    return ".csv" if name.lower().endswith(".csv") else ".jsonl"


# -- cells -------------------------------------------------------------------------------------------------------


def _cells(name: str, lines: Iterable[str], header: list[str] | None, before: int) -> Iterator[tuple[int, _Values]]:
    """The number of the line that each row ends on, and its cells. `lines` come after `before` lines of the file, and
    in a CSV after its `header`, None: they begin with it."""
    return _csv_cells(name, lines, header, before) if _kind(name) == ".csv" else _jsonl_cells(name, lines, before)


def _csv_cells(name: str, lines: Iterable[str], header: list[str] | None, before: int) -> Iterator[tuple[int, _Values]]:
    limit = csv.field_size_limit(MAX_TEXT_BYTES)  # the module's own limit is 128 KB
    try:
        reader = csv.reader(lines, strict=True)
        if header is None:
            header = _header(name, next(reader, []))
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            line = before + reader.line_num
            if len(cells) != len(header):
                raise UsageError(
                    f"{name} line {line}: {len(cells)} cells, expected {len(header)} as in the header; "
                    'quote a cell that holds a comma or a line break with "..."'
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{name} line {before + reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _header(name: str, cells: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    _check_columns(name, header)
    return header


def _jsonl_cells(name: str, lines: Iterable[str], before: int) -> Iterator[tuple[int, _Values]]:
    for number, line in enumerate(lines, before + 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name} line {number}: not valid JSON ({error}); expected one object per line") from None
        if not isinstance(values, dict):
            raise UsageError(f"{name} line {number}: a JSON {type(values).__name__}; expected one object per line")
        _check_columns(name, list(values), f" line {number}")
        yield number, {column: scalar(value, f"{name} line {number}: {column}") for column, value in values.items()}


def _check_columns(name: str, columns: list[str], where: str = "") -> None:
    known = ", ".join(MANIFEST_COLUMNS)
    unknown = [column for column in columns if column not in MANIFEST_COLUMNS]
    if unknown:
        raise UsageError(f"{name}{where}: unknown column {', '.join(map(repr, unknown))}; known are {known}")
    if len(set(columns)) < len(columns):
        raise UsageError(f"{name}{where}: a column is named twice in {', '.join(columns)}")
    if "id" not in columns or not {"image", "text"} & set(columns):
        raise UsageError(
            f"{name}{where}: columns {', '.join(columns) or 'none'}; expected id and at least one of image, text "
            f"(known are {known})"
        )


# -- rows --------------------------------------------------------------------------------------------------------


def _row(values: _Values, name: str, line: int) -> Row:
    """A row with its id, split and label alone."""
    split = (values.get("split") or "").strip() or "train"
    row = Row(sys.intern(split), (values.get("id") or "").strip(), name, line, label=label_of(values.get("label")))
    if not _SPLIT_NAME.fullmatch(split):
        raise UsageError(f"{row.source}: split {split!r}; expected letters, digits, '-' and '_' only")
    return row


def _whole_row(folder: Path | None, values: _Values, name: str, line: int) -> Row:
    row = _row(values, name, line)
    image = (values.get("image") or "").strip()
    row.image = _in_folder(folder, image, row) if image else None
    text = values.get("text")
    if text is None:
        row.error = "the manifest gives no text"
    elif _names_a_file(text.strip(), folder):
        row.text_path = _in_folder(folder, text.strip(), row)
        row.raw, row.error = read_text_file(row.text_path, text.strip())
    else:
        row.text = text
    return row


def _in_folder(folder: Path | None, name: str, row: Row) -> Path:
    """A file that a manifest in `folder` names; None: a manifest at a URL."""
    if folder is None and not os.path.isabs(name):
        raise UsageError(
            f"{row.source}: the file {name!r} lies beside a manifest at a URL; give absolute paths, or pack the pairs "
            "into tar shards"
        )
    return (folder or Path()) / name


def _names_a_file(text: str, folder: Path | None) -> bool:
    """Whether a text is the path of one: ends in .txt, and is one word or there."""
    return text.lower().endswith(".txt") and (len(text.split()) == 1 or os.path.exists((folder or Path()) / text))


# -- from any row on ---------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where a row begins: after how many bytes and lines of its file."""

    place: int
    lines: int


class _Lines:
    """The lines of a UTF-8 file from a place on, as strings with their ends. `place` is where the next begins,
    `number` how many are before it."""

    def __init__(self, name: str, chunks: Chunks, start: Start = Start(0, 0)):
        self.name, (self.place, self.number) = name, start
        lines = _split(chunks(start.place), _kind(name) == ".csv")
        self._lines = self._after_mark(lines) if start.place == 0 else lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.place += len(line)
        self.number += 1
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(
                f"{self.name} line {self.number} isn't UTF-8; a manifest that is read piece by piece must be: save it "
                "as UTF-8"
            ) from None
        if "\0" in text:
            raise UsageError(f"{self.name} cannot be decoded: NUL bytes: a binary file; save it as UTF-8")
        return text

    def _after_mark(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        for first in lines:
            line = first.removeprefix(b"\xef\xbb\xbf")
            self.place = len(first) - len(line)
            yield line
            break
        yield from lines


def _split(chunks: Iterator[bytes], carriage_returns: bool) -> Iterator[bytes]:
    """Lines, which end with "\\n", or with "\\r", "\\n" or both."""
    rest = b""
    for chunk in chunks:
        data = rest + chunk
        lines = data.splitlines(keepends=True) if carriage_returns else _line_feeds(data)
        # A "\r" at the end may be half of a "\r\n".
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        yield from lines
    if rest:
        yield from rest.splitlines(keepends=True) if carriage_returns else [rest]


def _line_feeds(data: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


@dataclass
class SplitIndex:
    """A split's number of rows, and where every so many of them begin."""

    rows: int = 0
    starts: list[Start] = field(default_factory=list)


@dataclass
class Manifest:
    """A manifest that is read in pieces: `name` of the file, `folder` of what it names (None: it is at a URL), its
    bytes, and of a CSV the columns. UTF-8 is all it can be: encodings are told from a whole."""

    name: str
    folder: Path | None
    chunks: Chunks
    header: list[str] | None = None

    def index(self, every: int) -> tuple[dict[str, SplitIndex], list[str]]:
        """Read it once: the splits, each with the starts of its rows 0, `every`, 2 `every`, ..., and warnings.

        Memory: 8 bytes a row while it reads, for telling repeated ids (equal hashes are looked up before they are an
        error), and a few numbers for each start. Raises `UsageError` as `feats.records.read_dataset`, but for what
        only whole rows show.
        """
        splits: dict[str, SplitIndex] = {}
        hashes = array("q")
        labels: Counter[str] = Counter()
        first: dict[str | None, str] = {}
        lines, cells = self._begun()
        start = Start(lines.place, lines.number)
        for line, values in cells:
            row = _row(values, self.name, line)
            check_id(row)
            hashes.append(hash(row.id))
            split = splits.setdefault(row.split, SplitIndex())
            if split.rows % every == 0:
                split.starts.append(start)
            split.rows += 1
            if row.label is not None and len(labels) < _MAX_LABELS:
                labels[row.label] += 1
                first.setdefault(row.label, row.source)
            start = Start(lines.place, lines.number)
        self._check_repeated(np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64))
        return splits, warnings_of_labels(labels, first) if len(labels) < _MAX_LABELS else []

    def rows(self, split: str, start: Start, count: int) -> list[Row]:
        """`count` rows of a split, from one's start on. Raises `UsageError` for a file that has changed since."""
        cells = _cells(self.name, _Lines(self.name, self.chunks, start), self.header, start.lines)
        rows = list(islice(self._of_split(split, cells), count))
        if len(rows) < count:
            raise UsageError(f"{self.name} has fewer rows than when it was counted; leave it alone, and begin again")
        return rows

    def _of_split(self, split: str, cells: Iterable[tuple[int, _Values]]) -> Iterator[Row]:
        for line, values in cells:
            if ((values.get("split") or "").strip() or "train") == split:
                yield _whole_row(self.folder, values, self.name, line)

    def _begun(self) -> tuple[_Lines, Iterator[tuple[int, _Values]]]:
        """All lines and their cells; of a CSV after the header, which is kept."""
        lines = _Lines(self.name, self.chunks)
        if _kind(self.name) == ".csv":
            try:
                self.header = _header(self.name, next(csv.reader(lines, strict=True), []))
            except csv.Error as error:
                raise UsageError(f"{self.name} line {lines.number}: not valid CSV ({error})") from None
        return lines, _cells(self.name, lines, self.header, lines.number)

    def _check_repeated(self, hashes: np.ndarray) -> None:
        """Raise `UsageError` for ids that several rows have; `hashes` (N,) of the rows' ids are sorted in place."""
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:_MAX_REPEATED]
        if len(repeated):
            wanted = set(repeated.tolist())
            rows = (_row(values, self.name, line) for line, values in self._begun()[1])
            check_repeated(row for row in rows if hash(row.id) in wanted)
