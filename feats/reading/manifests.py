"""Layout manifest: a table with a row for each pair (CSV, TSV, JSONL, Parquet), read as a whole or from any row on."""

import csv
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feats.errors import UsageError
from feats.reading.columns import Columns, recognised
from feats.reading.remote import LocalFile
from feats.reading.rows import (
    MAX_TEXT_BYTES,
    Row,
    Rows,
    check_id,
    check_repeated,
    decoded,
    outside_words,
    read_text_file,
    warnings_of_labels,
)
from feats.regular import check_regular

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = ",;\t|"
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MAX_LABELS = 10_000  # counted; more of them are no classes
_MAX_REPEATED = 1_000  # ids to look up where they are

Chunks = Callable[[int], Iterator[bytes]]  # the bytes of a file from a place on (`feats.reading.remote`)
_Values = dict[str, str | None]  # a row's cells by our columns
_Cells = Iterator[tuple[int | str, Mapping[str, Any]]]  # the places of rows, and their values by the table's columns


def read_manifest(path: Path, columns: Mapping[str, str] = {}) -> Rows:
    """A table with `image` and/or `text`, and perhaps `id`, `label` and `split`, in the `columns` that say so."""
    file = manifest_file(path)
    found = Columns(file.name, columns)
    if _kind(file.name) == ".parquet":
        manifest = manifest_in(path, columns)
        rows, found = list(manifest.all_rows()), manifest.columns
    else:
        check_regular(file)
        rows = manifest_rows(file.read_bytes(), file.parent, found, _kind(file.name))
    note = found.note()
    return rows, [note] if note else []


def manifest_rows(raw: bytes, folder: Path, columns: Columns, kind: str) -> list[Row]:
    """The rows of a manifest's bytes, of `kind` ".csv", ".tsv" or ".jsonl". Raises `UsageError`."""
    return [_whole_row(folder, values, columns.name, *place) for place, values in _table(raw, columns, kind)]


def manifest_labels(path: Path, columns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The labels alone that `read_manifest` would find, '' where unknown: by split, by id. Sides aren't needed."""
    manifest = manifest_in(path, columns, labels_only=True)
    found: dict[str, dict[str, str]] = {}
    rows = []
    for _, row in manifest.labels():
        check_id(row)
        rows.append(row)
        found.setdefault(row.split, {})[row.id] = row.label or ""
    if sum(map(len, found.values())) < len(rows) or len({row.id for row in rows}) < len(rows):
        check_repeated(rows)
    return found


def manifest_file(path: Path) -> Path:
    """The one manifest that `path` is, or holds. Raises `OSError`, and `UsageError` for none and for several."""
    if path.is_file():
        return path
    for name in (f"manifest{kind}" for kind in TABLES):
        if (path / name).is_file():
            return path / name
    found = sorted(entry for entry in path.iterdir() if is_table(entry.name))
    check_one_manifest(str(path), [entry.name for entry in found], TABLES)
    return found[0]


def check_one_manifest(place: str, names: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise `UsageError` unless the tables found at a place, files of these `kinds`, are one."""
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise UsageError(
            f"{place} must hold one manifest ({', '.join(kinds)}); found {found}. Name the file with `data`"
        )


def is_table(name: str) -> bool:
    """Whether a file's name is a manifest's."""
    return name.lower().endswith(TABLES)


def _kind(name: str) -> str:
    """One of `TABLES`; JSONL for any other name, as ever."""
    return next((kind for kind in TABLES if name.lower().endswith(kind)), ".jsonl")


# -- cells -------------------------------------------------------------------------------------------------------


def _table(raw: bytes, columns: Columns, kind: str) -> Iterator[tuple[tuple[int | str, int], _Values]]:
    """The place, number from 1, and cells of each row of a text table."""
    encoding = decoded(raw, columns.name)[1]
    # From here on line by line: the whole as a string may need four times as much memory. `newline` as open's: a string
    # of JSON may hold U+2028 or a bare "\r".
    with io.TextIOWrapper(io.BytesIO(raw), encoding, newline="\n" if kind == ".jsonl" else "") as lines:
        cells = _jsonl_cells(columns, lines, 0) if kind == ".jsonl" else _whole_csv(columns, lines, kind)
        for number, (place, values) in enumerate(cells, 1):
            yield (place, number), columns.cells(values, _where(columns.name, place))
    columns.check_asked()


def _where(name: str, place: int | str) -> str:
    return f"{name} line {place}" if isinstance(place, int) else f"{name} {place}"


def _whole_csv(columns: Columns, lines: Iterable[str], kind: str) -> _Cells:
    lines = iter(lines)
    first = next(lines, "")
    header = _Header(separator_of(kind, first, columns.asked))
    return _csv_cells(columns, chain([first], lines), header, 0)


@dataclass
class _Header:
    """How a CSV is written: its separator, and once it is read its columns."""

    separator: str
    columns: list[str] | None = None


def separator_of(kind: str, line: str, asked: Mapping[str, str] = {}) -> str:
    """What separates the cells of a CSV with this first line: what makes the most known columns of it, then the most
    columns. In a TSV, a tab."""
    if kind == ".tsv":
        return "\t"
    with _long_cells():
        parsed = {one: next(csv.reader([line.rstrip("\r\n")], delimiter=one), []) for one in SEPARATORS}
    return max(SEPARATORS, key=lambda one: (recognised(parsed[one], asked), len(parsed[one])))


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's own limit of a cell is 128 KB."""
    limit = csv.field_size_limit(max(MAX_TEXT_BYTES, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_cells(columns: Columns, lines: Iterable[str], header: _Header, before: int) -> _Cells:
    """Rows with the line that each ends on. `lines` come after `before` lines of the file, and after its header where
    that is known."""
    limit = csv.field_size_limit(MAX_TEXT_BYTES)  # the module's own limit is 128 KB
    name = columns.name
    try:
        reader = csv.reader(lines, strict=True, delimiter=header.separator)
        if header.columns is None:
            header.columns = _header(columns, next(reader, []))
        width = len(header.columns)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            line = before + reader.line_num
            if len(cells) != width:
                raise UsageError(
                    f"{name} line {line}: {len(cells)} cells, expected {width} as in the header; "
                    'quote a cell that holds a comma or a line break with "..."'
                )
            yield line, dict(zip(header.columns, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{name} line {before + reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _header(columns: Columns, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    columns.see(header)
    columns.check_asked()
    return header


def _jsonl_cells(columns: Columns, lines: Iterable[str], before: int) -> _Cells:
    name = columns.name
    for number, line in enumerate(lines, before + 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name} line {number}: not valid JSON ({error}); expected one object per line") from None
        if not isinstance(values, dict):
            raise UsageError(f"{name} line {number}: a JSON {type(values).__name__}; expected one object per line")
        columns.see(list(values), f" line {number}")
        yield number, values


# -- rows --------------------------------------------------------------------------------------------------------


def _row(values: _Values, name: str, place: int | str, number: int) -> Row:
    """A row with its id, split and label alone; the `number` from 1 is the id where the table has no ids."""
    split = (values.get("split") or "").strip() or "train"
    named = (values["id"] or "").strip() if "id" in values else str(number)
    row = Row(sys.intern(split), named, name, place, label=values.get("label"))
    if not _SPLIT_NAME.fullmatch(split):
        raise UsageError(f"{row.source}: split {split!r}; expected letters, digits, '-' and '_' only")
    return row


def _whole_row(folder: Path | None, values: _Values, name: str, place: int | str, number: int) -> Row:
    row = _row(values, name, place, number)
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
    """A file that a manifest in `folder` names; None: a manifest at a URL, which must not tell what is read here."""
    if folder is None:
        raise UsageError(
            f"{row.source}: the file {name!r} is named by a manifest at a URL, which may hold texts only; copy it here "
            "with its files, or pack the pairs into tar shards"
        )
    return folder / name


def _names_a_file(text: str, folder: Path | None) -> bool:
    """Whether a text is the path of one: ends in .txt, and is one word or there."""
    if not text.lower().endswith(".txt"):
        return False
    return len(text.split()) == 1 or (folder is not None and os.path.exists(folder / text))


# -- from any row on ---------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where a row begins: after how many bytes (of Parquet: rows) and lines of its file, and after how many rows."""

    place: int
    lines: int
    rows: int


class _Lines:
    """The lines of a UTF-8 file from a place on, as strings with their ends. `place` is where the next begins,
    `number` how many are before it."""

    def __init__(self, name: str, chunks: Chunks, start: Start = Start(0, 0, 0)):
        self.name, (self.place, self.number, _) = name, start
        lines = _split(chunks(start.place), _kind(name) != ".jsonl")
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
    rest: list[bytes] = []  # joined once a line ends, however many chunks that takes
    for chunk in chunks:
        half_ended = carriage_returns and (b"\r" in chunk or (rest and rest[-1].endswith(b"\r")))
        if b"\n" not in chunk and not half_ended:
            rest.append(chunk)
            continue
        data = b"".join([*rest, chunk])
        lines = data.splitlines(keepends=True) if carriage_returns else _line_feeds(data)
        # A "\r" at the end may be half of a "\r\n".
        rest = [lines.pop()] if lines and not lines[-1].endswith(b"\n") else []
        yield from lines
    if last := b"".join(rest):
        yield from last.splitlines(keepends=True) if carriage_returns else [last]


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
    """A manifest that is read in pieces: its `columns`, which know its name, the `folder` of what it names (None: it is
    at a URL), its bytes, and of a CSV how it is written. UTF-8 is all it can be: encodings are told from a whole."""

    columns: Columns
    folder: Path | None
    chunks: Chunks
    header: _Header | None = None

    @property
    def name(self) -> str:
        """The file's."""
        return self.columns.name

    def index(self, every: int) -> tuple[dict[str, SplitIndex], list[str]]:
        """Read it once: the splits, each with the starts of its rows 0, `every`, 2 `every`, ..., and remarks.

        Memory: 8 bytes a row while it reads, for telling repeated ids (equal hashes are looked up before they are an
        error), and a few numbers for each start. Raises `UsageError` as `feats.records.read_dataset`, but for what
        only whole rows show. Of files outside the folder, links aren't followed.
        """
        splits: dict[str, SplitIndex] = {}
        hashes = array("q")
        labels: Counter[str] = Counter()
        first: dict[str | None, str] = {}
        outside, example = 0, ""
        for start, values, row in self._light_rows():
            check_id(row)
            hashes.append(hash(row.id))
            split = splits.setdefault(row.split, SplitIndex())
            if split.rows % every == 0:
                split.starts.append(start)
            split.rows += 1
            if row.label is not None and len(labels) < _MAX_LABELS:
                labels[row.label] += 1
                first.setdefault(row.label, row.source)
            if here := self._outside(values):
                outside, example = outside + len(here), example or f"{here[0]} ({row.source})"
        self._check_repeated(np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64))
        remarks = [note] if (note := self.columns.note()) else []
        if outside and self.folder is not None:
            remarks.append(outside_words(outside, example, self.folder))
        return splits, remarks + (warnings_of_labels(labels, first) if len(labels) < _MAX_LABELS else [])

    def rows(self, split: str, start: Start, count: int) -> list[Row]:
        """`count` rows of a split, from one's start on. Raises `UsageError` for a file that has changed since."""
        rows = list(islice(self._of_split(split, start), count))
        if len(rows) < count:
            raise UsageError(f"{self.name} has fewer rows than when it was counted; leave it alone, and begin again")
        return rows

    def all_rows(self) -> Iterator[Row]:
        """Every row."""
        for start, place, values in self._walk(None):
            yield _whole_row(self.folder, values, self.name, place, start.rows + 1)

    def labels(self) -> Iterator[tuple[Start, Row]]:
        """Every row with its id, split and label alone."""
        return ((start, row) for start, _, row in self._light_rows())

    def _light_rows(self) -> Iterator[tuple[Start, _Values, Row]]:
        for start, place, values in self._walk(None):
            yield start, values, _row(values, self.name, place, start.rows + 1)

    def _of_split(self, split: str, first: Start) -> Iterator[Row]:
        for start, place, values in self._walk(first):
            if ((values.get("split") or "").strip() or "train") == split:
                yield _whole_row(self.folder, values, self.name, place, start.rows + 1)

    def _outside(self, values: _Values) -> list[str]:
        """The files of a row whose very names lead out of the folder."""
        if self.folder is None:
            return []
        home = os.path.abspath(self.folder)
        image, text = ((values.get(side) or "").strip() for side in ("image", "text"))
        named = [image] if image else []
        named += [text] if _names_a_file(text, None) else []
        return [name for name in named if _leads_out(name, home)]

    def _walk(self, start: Start | None) -> Iterator[tuple[Start, int | str, _Values]]:
        """Start, place and cells of the rows from one on; None: of all, and the columns are told on the way."""
        lines = _Lines(self.name, self.chunks, start or Start(0, 0, 0))
        cells = self._cells(lines, start is None)
        number = 0 if start is None else start.rows
        at = Start(lines.place, lines.number, number)
        for place, values in cells:
            yield at, place, self.columns.cells(values, _where(self.name, place))
            number += 1
            at = Start(lines.place, lines.number, number)
        if start is None:
            self.columns.check_asked()

    def _cells(self, lines: _Lines, begin: bool) -> _Cells:
        """The rows of `lines`; of a CSV that is to `begin` after the header, which is kept."""
        kind = _kind(self.name)
        if kind == ".jsonl":
            return _jsonl_cells(self.columns, lines, lines.number)
        if begin or self.header is None:
            first = next(lines, "")
            self.header = _Header(separator_of(kind, first, self.columns.asked))
            try:
                reader = csv.reader(chain([first], lines), strict=True, delimiter=self.header.separator)
                with _long_cells():
                    self.header.columns = _header(self.columns, next(reader, []))
            except csv.Error as error:
                raise UsageError(f"{self.name} line {lines.number}: not valid CSV ({error})") from None
        return _csv_cells(self.columns, lines, self.header, lines.number)

    def _check_repeated(self, hashes: np.ndarray) -> None:
        """Raise `UsageError` for ids that several rows have; `hashes` (N,) of the rows' ids are sorted in place."""
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:_MAX_REPEATED]
        if len(repeated):
            wanted = set(repeated.tolist())
            check_repeated(row for _, row in self.labels() if hash(row.id) in wanted)


def _leads_out(name: str, home: str) -> bool:
    """Whether a path that is relative to the folder `home` ends outside it, links aside."""
    if not os.path.isabs(name) and ".." not in name:
        return False
    place = os.path.normpath(os.path.join(home, name))
    return not place.startswith(home.rstrip(os.sep) + os.sep)


@dataclass
class ParquetManifest(Manifest):
    """As `Manifest`, of Parquet, which is read by row groups: only the columns that are needed."""

    file: Path | io.BytesIO = field(default_factory=io.BytesIO)

    def _walk(self, start: Start | None) -> Iterator[tuple[Start, int | str, _Values]]:
        from feats.reading.parquet_tables import column_names, table_rows  # needs pyarrow

        if start is None:
            self.columns.see(column_names(self.file, self.name))
            self.columns.check_asked()
        first = 0 if start is None else start.rows
        for number, values in enumerate(
            table_rows(self.file, self.name, sorted(set(self.columns.found.values())), first), first
        ):
            place = f"row {number + 1}"
            yield Start(number, number, number), place, self.columns.cells(values, _where(self.name, place))


def manifest_in(path: Path, columns: Mapping[str, str] = {}, *, labels_only: bool = False) -> Manifest:
    """The manifest that `path` is, or holds, for reading in pieces. Raises as `manifest_file`."""
    file = manifest_file(path)
    found = Columns(file.name, columns, labels_only)
    if _kind(file.name) == ".parquet":
        return ParquetManifest(found, file.parent, LocalFile(file), file=file)
    return Manifest(found, file.parent, LocalFile(file))
