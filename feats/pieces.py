"""A split's pairs piece by piece: what several processes share out, and what needn't be in memory as a whole."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from feats.errors import UsageError
from feats.reading.columns import Columns
from feats.reading.manifests import Manifest, SplitIndex, check_one_manifest, manifest_in
from feats.reading.remote import Copy, RemoteFile, base_name, fetched, is_url, listing, public_url
from feats.reading.rows import EXPECTED, Row, check_ids
from feats.reading.shards import is_list, is_pattern, shard_places, shard_rows, split_of
from feats.records import (
    Pairs,
    check_layout,
    check_takes_columns,
    detect_layout,
    finished,
    read_dataset,
    readable,
    with_label,
)
from feats.source import SIDES, data_identity

URL_TABLES = (".csv", ".tsv", ".jsonl")  # Parquet begins at its end, and would be asked for in many small ranges


class Pieces(Protocol):
    """The pairs of one split, cut the same way by whoever cuts them. The pieces in order are the split."""

    @property
    def layout(self) -> str:
        """As `Pairs.layout`."""
        ...

    @property
    def split(self) -> str:
        """As `Pairs.split`."""
        ...

    def __len__(self) -> int:
        """How many pieces there are."""
        ...

    def describe(self, number: int) -> Mapping[str, Any]:
        """Which rows a piece holds and where they lie, as JSON values: equal for all who share the work."""
        ...

    def read(self, number: int) -> Pairs:
        """The pairs of a piece. Raises as `feats.records.read_dataset`."""
        ...


@dataclass(frozen=True)
class RowPieces:
    """Pieces of `rows` pairs each, of pairs that are in memory; the last may be shorter."""

    pairs: Pairs
    rows: int

    @property
    def layout(self) -> str:
        """As `Pairs.layout`."""
        return self.pairs.layout

    @property
    def split(self) -> str:
        """As `Pairs.split`."""
        return self.pairs.split

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.rows)

    def describe(self, number: int) -> Mapping[str, Any]:
        """The first row, how many, and which."""
        return {"first": number * self.rows, **data_identity(record.id for record in self.read(number))}

    def read(self, number: int) -> Pairs:
        """The pairs of a piece."""
        return self.pairs[number * self.rows : (number + 1) * self.rows]


@dataclass(frozen=True)
class ManifestPieces:
    """Pieces of `rows` pairs each, of a manifest; the last may be shorter. In memory are where they begin.

    Texts that are files of their own are decoded together within a piece: an ambiguous one follows the others of its
    piece, not of the set. `data` is what was given to `open_pieces`.
    """

    data: Path | str
    split: str
    manifest: Manifest
    index: SplitIndex
    rows: int
    layout: str = "manifest"

    def __len__(self) -> int:
        return len(self.index.starts)

    def describe(self, number: int) -> Mapping[str, Any]:
        """The first row, how many, and after how many bytes of the manifest they begin."""
        first = number * self.rows
        rows = min(self.rows, self.index.rows - first)
        return {"first": first, "rows": rows, "after_bytes": self.index.starts[number].place}

    def read(self, number: int) -> Pairs:
        """The pairs of a piece."""
        with readable(self.data):
            rows = self.manifest.rows(self.split, self.index.starts[number], self.describe(number)["rows"])
        return _pairs(rows, self)


@dataclass(frozen=True)
class ShardPieces:
    """Every tar shard is a piece. One at a URL is copied to a temporary file, which is deleted when the piece's pairs
    (and slices of them) are gone; a process that is killed leaves its copy there.

    Ids and encodings of texts are told within a shard: whoever joins the pieces finds ids that several shards have.
    """

    data: Path | str
    split: str
    shards: tuple[str, ...]
    layout: str = "shards"

    def __len__(self) -> int:
        return len(self.shards)

    def describe(self, number: int) -> Mapping[str, Any]:
        """The shard: its URL, or its path relative to the data."""
        shard = self.shards[number]
        if is_url(shard):
            return {"shard": public_url(shard)}
        folder = Path(self.data) if Path(self.data).is_dir() else Path(self.data).parent
        return {"shard": Path(os.path.relpath(shard, folder)).as_posix()}

    def read(self, number: int) -> Pairs:
        """The pairs of a shard. Raises `UsageError` for one that is damaged, compressed, empty or not to be had."""
        shard = self.shards[number]
        copy = fetched(shard) if is_url(shard) else None
        place = public_url(shard) if copy else shard
        with readable(shard):
            rows = shard_rows(copy.path if copy else Path(shard), self.split, place)
        if not rows:
            raise UsageError(f"{place} (layout shards) holds no pairs; expected at least one, remove the shard")
        return _pairs(rows, self, copy)


@dataclass(frozen=True)
class FirstPieces:
    """The first `count` of some pieces, and of the last of them the first `rows` pairs."""

    pieces: Pieces
    count: int
    rows: int

    @property
    def layout(self) -> str:
        """As `Pairs.layout`."""
        return self.pieces.layout

    @property
    def split(self) -> str:
        """As `Pairs.split`."""
        return self.pieces.split

    def __len__(self) -> int:
        return self.count

    def describe(self, number: int) -> Mapping[str, Any]:
        """As the pieces'; of the last also how many rows."""
        return {**self.pieces.describe(number), **({"rows": self.rows} if number == self.count - 1 else {})}

    def read(self, number: int) -> Pairs:
        """The pairs of a piece."""
        pairs = self.pieces.read(number)
        return pairs[: self.rows] if number == self.count - 1 else pairs


def absent_sides(pieces: Pieces) -> list[str]:
    """The sides that no row has, as far as the columns of a table tell."""
    whole = pieces.pieces if isinstance(pieces, FirstPieces) else pieces
    return [s for s in SIDES if s not in whole.manifest.columns.found] if isinstance(whole, ManifestPieces) else []


def first_rows(pieces: Pieces, limit: int) -> Pieces:
    """The pieces with the first `limit` rows of a split. Those that don't tell how many rows they have are read."""
    for number in range(len(pieces)):
        told = pieces.describe(number).get("rows")
        rows = len(pieces.read(number)) if told is None else told
        if limit <= rows:
            return FirstPieces(pieces, number + 1, limit)
        limit -= rows
    return pieces


def open_pieces(
    data: str | Path, layout: str | None = None, *, rows: int, columns: Mapping[str, str] | None = None
) -> dict[str, Pieces]:
    """The splits of the data set at `data`, each in pieces that are read one at a time, in the order they appear.

    `data` is what `feats.records.read_dataset` reads; a URL (string) of a folder of shards, a shard or a manifest; a
    pattern of shards, "train-{000..099}.tar"; or a text file that lists shards, line by line. A manifest is read in
    pieces of `rows` pairs after a first pass that checks and counts, shards one by one; the layouts of
    folders are read whole, then cut. `columns` as for `read_dataset`. Remarks are warnings. Raises as `read_dataset`,
    and `UsageError` for a manifest that isn't UTF-8 and for a URL that can't be read.
    """
    check_layout(layout)
    data = data if isinstance(data, str) and is_url(data) else Path(data)
    with readable(data):
        layout = layout or _layout_of(data)
        columns = with_label(columns, None)
        check_takes_columns(layout, columns)
        if layout == "shards":
            return _shard_pieces(data)
        if layout == "manifest":
            return _manifest_pieces(data, rows, columns)
    if isinstance(data, str):
        raise UsageError(f"layout {layout} can't be read from a URL; pack the pairs into tar shards, or copy them here")
    dataset = read_dataset(data, layout)
    _warn(dataset.warnings)
    return {split: RowPieces(pairs, rows) for split, pairs in dataset.splits.items()}


def _layout_of(data: Path | str) -> str:
    if is_pattern(data) or is_list(data):
        return "shards"
    if isinstance(data, Path):
        return detect_layout(data)
    name = base_name(data)
    if ".tar" in name:
        return "shards"
    if name.lower().endswith(URL_TABLES):
        return "manifest"
    names = listing(data)
    if any(name.endswith(".tar") for name in names):
        return "shards"
    if any(name.lower().endswith(URL_TABLES) for name in names):
        return "manifest"
    raise UsageError(
        f"{public_url(data)} holds neither shards nor a manifest; expected {EXPECTED['shards']}, or "
        f"{EXPECTED['manifest']}"
    )


def _shard_pieces(data: Path | str) -> dict[str, Pieces]:
    shards: dict[str, list[str]] = {}
    for place in shard_places(data):
        if not is_url(place):
            Path(place).stat()
        shards.setdefault(split_of(base_name(place)), []).append(place)
    shown = public_url(data) if isinstance(data, str) else data
    return {split: ShardPieces(shown, split, tuple(places)) for split, places in shards.items()}


def _manifest_pieces(data: Path | str, rows: int, columns: Mapping[str, str]) -> dict[str, Pieces]:
    manifest = _manifest_at(data, columns) if isinstance(data, str) else manifest_in(data, columns)
    splits, remarks = manifest.index(rows)
    shown = public_url(data) if isinstance(data, str) else data
    if not splits:
        raise UsageError(f"{shown} (layout manifest) holds no pairs; expected at least one row")
    _warn(remarks)
    return {split: ManifestPieces(shown, split, manifest, index, rows) for split, index in splits.items()}


def _manifest_at(url: str, columns: Mapping[str, str]) -> Manifest:
    if not base_name(url).lower().endswith(URL_TABLES):
        names = [name for name in listing(url) if name.lower().endswith(URL_TABLES)]
        check_one_manifest(public_url(url), names, URL_TABLES)
        url = f"{url.rstrip('/')}/{names[0]}"
    return Manifest(Columns(base_name(url), columns), None, RemoteFile(url))


def _pairs(rows: list[Row], pieces: ManifestPieces | ShardPieces, copy: Copy | None = None) -> Pairs:
    check_ids(rows)
    records = (record for _, record in finished(rows))
    columns = pieces.manifest.columns.asked if isinstance(pieces, ManifestPieces) else {}
    return Pairs(records, pieces.data, pieces.layout, pieces.split, copy, columns)


def _warn(remarks: list[str]) -> None:
    for remark in remarks:
        warnings.warn(remark, stacklevel=1)
