"""Reading every data layout into records. What is behind it (`feats.reading`) alone knows how data lie on disk."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex, overload

from feats.errors import UsageError
from feats.reading.columns import Columns, check_columns
from feats.reading.folders import looks_like_class_folders, read_class_folders, read_course, read_mvsa
from feats.reading.manifests import is_table, manifest_labels, manifest_rows, read_manifest
from feats.reading.remote import Copy, is_url
from feats.reading.rows import (
    EXPECTED,
    MANIFEST_COLUMNS,
    Row,
    Rows,
    TarSlice as TarSlice,
    check_ids,
    has_surrogates,
    label_warnings,
    outside_note,
)
from feats.reading.shards import read_shards
from feats.source import Source
from feats.text import decode_texts

MAX_PATH = 4096  # Linux' own limit

LAYOUTS: dict[str, Callable[[Path], Rows]] = {
    "course": read_course,
    "mvsa": read_mvsa,
    "manifest": read_manifest,
    "shards": read_shards,
    "folders": read_class_folders,
}


@dataclass(frozen=True, slots=True)
class Record:
    """One image-text pair, as it lies on disk."""

    id: str
    image_path: Path | TarSlice | None  # None: the pair has no picture file
    text: str | None  # decoded, not cleaned; None when it can't be read
    label: str | None = None
    encoding: str = ""  # of the text's bytes; "" for inline text
    text_error: str = ""  # why text is None
    text_path: Path | TarSlice | None = field(default=None, compare=False)  # None: the text isn't a file of its own


class Pairs(list[Record]):
    """The records of one split, and where they lie: `data` as it was given (a string: a URL), of which layout, in which
    `columns` where these were named. Slices know it, too. A `copy` of a shard, which records point into, lives as long
    as any of them."""

    def __init__(
        self,
        records: Iterable[Record],
        data: Path | str,
        layout: str,
        split: str,
        copy: Copy | None = None,
        columns: Mapping[str, str] = {},
    ):
        super().__init__(records)
        self.data, self.layout, self.split, self.copied, self.columns = data, layout, split, copy, dict(columns)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "Record | Pairs":
        if isinstance(index, slice):
            return Pairs(super().__getitem__(index), self.data, self.layout, self.split, self.copied, self.columns)
        return super().__getitem__(index)

    @property
    def source(self) -> Source:
        """Where the pairs lie, row by row, for a cache to keep."""
        if isinstance(self.data, str):
            resolved, folder = self.data, None
        else:
            resolved = str(self.data.resolve())
            folder = self.data if self.data.is_dir() else self.data.parent
        images = [self._named(record.image_path, folder) for record in self]
        texts = [self._named(record.text_path, folder) for record in self]
        return Source(str(self.data), resolved, self.layout, self.split, images, texts, self.columns)

    def _named(self, place: Path | TarSlice | None, folder: Path | None) -> str:
        """A file as `Source` names it."""
        if self.copied is not None and isinstance(place, TarSlice):
            return _storable(f"{self.copied.url}::{place.name}")
        return _relative(place, folder)


def _relative(place: Path | TarSlice | None, folder: Path | None) -> str:
    """A path relative to a folder; as it is, where there is none."""
    if place is None:
        return ""
    path = place.path if isinstance(place, TarSlice) else place
    name = Path(path if folder is None else os.path.relpath(path, folder)).as_posix()
    if isinstance(place, TarSlice):
        name += f"::{place.name}"
    return _storable(name)


def _storable(name: str) -> str:
    """A file's name for a cache, whose rows all take the room of the longest; "" for one that can't be written down, or
    that no file can have."""
    return "" if len(name) > MAX_PATH or has_surrogates(name) or "\0" in name else name


@dataclass
class DataSet:
    """A data set's splits, each in the order of its file, and what the user should hear about it."""

    layout: str
    splits: dict[str, Pairs]
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, split: str) -> Pairs:
        """The pairs of a split. Raises `UsageError` naming the splits there are."""
        if split not in self.splits:
            raise UsageError(f"no split {split} in the data; it has {', '.join(self.splits)}")
        return self.splits[split]


def read_dataset(
    path: Path | str,
    layout: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
) -> DataSet:
    """Read the data set at `path` (a folder, a manifest or a tar); `layout` is one of `LAYOUTS`, None: detected.

    `columns` says which columns of a manifest are ours, {"text": "title", "id": "sku"} ("": none is); those it doesn't
    name are guessed from usual names. `label` is short for that of the label. A pair whose picture or text is missing
    or unreadable is still a record. Raises `UsageError` for an unknown or undetectable layout, an unreadable or
    malformed file, an empty set, and empty or repeated ids.
    """
    if is_url(path):
        raise UsageError(f"{path} is a URL, whose data are read piece by piece only (`stream`)")
    path = Path(path)
    check_layout(layout)
    columns = with_label(columns, label)
    layout = detected_layout(path, layout)
    with readable(path):
        path.stat()
        check_takes_columns(layout, columns)
        rows, warnings = read_manifest(path, columns) if layout == "manifest" else LAYOUTS[layout](path)
    if not rows:
        raise UsageError(f"{path} (layout {layout}) holds no pairs; expected at least one row")
    check_ids(rows)
    outside = outside_note(rows, path if path.is_dir() else path.parent)
    warnings += [outside] if outside else []
    warnings += label_warnings(rows)
    splits: dict[str, Pairs] = {}
    for split, record in finished(rows):
        if split not in splits:
            splits[split] = Pairs([], path, layout, split, columns=columns)
        splits[split].append(record)
    return DataSet(layout, splits, warnings)


def with_label(columns: Mapping[str, str] | None, label: str | None) -> dict[str, str]:
    """`columns`, checked, with the column of labels. Raises `UsageError`."""
    check_columns(columns or {})
    return {**(columns or {}), **({} if label is None else {"label": label})}


def check_takes_columns(layout: str, columns: Mapping[str, str]) -> None:
    """Raise `UsageError` for columns of a layout that is no table."""
    if columns and layout != "manifest":
        raise UsageError(f"`columns` is for tables, and the data are of layout {layout}; leave it out")


def read_labels(path: Path | str, label: str, *, columns: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """The labels in the column `label` of the manifest at `path`, '' where unknown: by split, by id. `columns` as for
    `read_dataset`; neither picture nor text need be there. Raises as `read_dataset`, and for data of other layouts,
    which have one label."""
    if is_url(path):
        raise UsageError(f"{path} is a URL; copy the table here, and name it with `data`")
    path = Path(path)
    with readable(path):
        path.stat()
        if (layout := detect_layout(path)) != "manifest":
            raise UsageError(f"{path} is of layout {layout}, without other columns; name a table with `data`")
        return manifest_labels(path, with_label(columns, label))


def check_layout(layout: str | None) -> None:
    """Raise `UsageError` for a layout that isn't known."""
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")


def detected_layout(path: Path, layout: str | None = None) -> str:
    """`layout`, or else that of the data at `path`. Raises `UsageError` as `detect_layout`, and for what can't be
    read."""
    with readable(path):
        return layout or detect_layout(path)


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """`OSError`s of reading the data at `path` become `UsageError`s."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename or path}: {error.strerror or error}; "
            "name the data set's folder or file with `data`"
        ) from None


def detect_layout(path: Path) -> str:
    """The one layout whose mark is at `path`. Raises `UsageError` for none and for several."""
    names = [path.name] if path.is_file() else sorted(entry.name for entry in os.scandir(path))
    if path.is_file():
        marks = {"manifest": is_table(path.name), "shards": ".tar" in path.name.lower()}
    else:
        marks = {
            "course": "train.txt" in names or "test_without_label.txt" in names,
            "mvsa": "labelResultAll.txt" in names,
            "manifest": any(is_table(name) and name.startswith("manifest.") for name in names),
            "shards": any(name.endswith(".tar") for name in names),
        }
    found = [layout for layout, is_there in marks.items() if is_there]
    # A .csv beside the marks of another layout may be anything; alone it is the manifest, whatever lies beside it.
    if not found and path.is_dir():
        tables = sum(map(is_table, names))
        found = ["manifest"] if tables == 1 else ["folders"] if not tables and looks_like_class_folders(path) else []
    if len(found) == 1:
        return found[0]
    problem = f"looks like {' and '.join(found)}" if found else "is none of the known layouts"
    listing = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    expected = "; ".join(f"{layout}: {what}" for layout, what in EXPECTED.items())
    raise UsageError(
        f"{path} {problem}. Found: {listing or 'an empty folder'}. Expected one of: {expected}. "
        "Name the folder with `data` and the layout with `layout`"
    )


def manifest_records(
    content: bytes, folder: Path, name: str, columns: Mapping[str, str] | None = None
) -> tuple[list[Record], list[str]]:
    """The rows of a manifest that is no file, CSV or JSONL, in their order, and remarks; its paths are relative to
    `folder`, and messages call it `name`. Raises `UsageError` as `read_dataset`."""
    kind = ".jsonl" if content.lstrip().startswith(b"{") else ".csv"
    found = Columns(name, with_label(columns, None))
    rows = manifest_rows(content, folder, found, kind)
    if not rows:
        raise UsageError(f"{name} holds no pairs; expected at least one row of {', '.join(MANIFEST_COLUMNS)}")
    check_ids(rows)
    note = found.note()
    return [record for _, record in finished(rows)], [note] if note else []


def finished(rows: list[Row]) -> Iterator[tuple[str, Record]]:
    """The finished records with their splits. All texts are decoded together: they tell each other's encoding. The
    list is used up, so that rows and records aren't in memory both."""
    decoded = iter(decode_texts([row.raw for row in rows if row.raw is not None]))
    rows.reverse()
    while rows:
        row = rows.pop()
        text, encoding, reason = row.text, "", row.error
        if row.raw is not None:
            text, outcome = next(decoded)
            encoding, reason = (outcome, "") if text is not None else ("", f"text cannot be decoded: {outcome}")
        elif text is not None and has_surrogates(text):
            text, reason = None, "text cannot be decoded: it holds a lone surrogate"
        yield row.split, Record(row.id, row.image, text, row.label, encoding, reason, row.text_path)
