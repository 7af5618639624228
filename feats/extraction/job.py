"""What an extraction script is asked for, as plain values that any process can take over."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from feats.acceleration import resolve_device
from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from feats.extraction.leases import LEASE_SECONDS
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.extraction.shared import MOST_ROWS, Share, Worker, row_pieces, whole_blocks, work
from feats.extraction.summary import Progress, Summary
from feats.names import cache_path
from feats.parts import parts_folder
from feats.pieces import Pieces, absent_sides, first_rows, open_pieces
from feats.records import Pairs, Record, read_dataset
from feats.source import SIDES

_A = {"image": "an image", "text": "a text"}


@dataclass(frozen=True)
class Job:
    """Caches `<folder>/<name>_<split>.h5` of `data`, read as `layout` (a table by its `columns`), `limit` rows of each
    split; what `encoder` holds goes to `load_encoder`. With `stream` the data are read piece by
    piece (`feats.pieces.open_pieces`).

    `by_parts`: others may do the same at the same time. `piece_rows`, `lease_seconds`, `since` and `join` are as for
    `feats.extraction.shared.work` and `row_pieces`.
    """

    encoder: Mapping[str, Any]
    data: Path | str
    folder: Path
    name: str
    layout: str | None = None
    limit: int | None = None
    stream: bool = False
    device: str = "auto"
    settings: ExtractionSettings = ExtractionSettings()
    overwrite: bool = False
    by_parts: bool = False
    piece_rows: int | None = None
    lease_seconds: float = LEASE_SECONDS
    since: float | None = None
    join: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)

    def path(self, split: str) -> Path:
        """Where the cache of a split lies. Raises `UsageError` for a split that can't be part of a file's name."""
        return cache_path(self.folder, self.name, split)

    def load(self, worker: Worker = Worker()) -> Encoder:
        """The encoder, on this process's device. Raises as `load_encoder` and `resolve_device`."""
        return load_encoder(**self.encoder, device=resolve_device(self.device, worker.local_rank))

    def open(self, encoder: Encoder | None) -> Mapping[str, Pairs | Pieces]:
        """The splits of the data; those that are streamed are cut to suit the encoder's blocks (without one, anyhow).
        Remarks are warnings. Raises as `read_dataset` and `open_pieces`."""
        if not self.stream:
            data = read_dataset(self.data, self.layout, columns=self.columns)
            for remark in data.warnings:
                warnings.warn(remark, stacklevel=1)
            return {split: pairs[: self.limit] for split, pairs in data.splits.items()}
        rows = self.piece_rows or MOST_ROWS
        if encoder is not None:
            rows = whole_blocks(encoder, self.settings, rows)
        pieces = open_pieces(self.data, self.layout, rows=rows, columns=self.columns)
        return {split: first_rows(p, self.limit) if self.limit else p for split, p in pieces.items()}

    def run(
        self,
        encoder: Encoder,
        data: Pairs | Pieces,
        worker: Worker,
        progress: Progress = lambda done, total: None,
    ) -> Summary:
        """Make the cache of a split, or help to. Raises as `extract`, `work` and `with_sides_of`."""
        path = self.path(data.split)
        encoder = with_sides_of(encoder, data)
        if isinstance(data, Pairs):
            if not self.by_parts and not parts_folder(path).exists():
                return extract(encoder, data, path, self.settings, overwrite=self.overwrite, progress=progress)
            data = row_pieces(
                encoder,
                data,
                path,
                self.settings,
                world=worker.world,
                piece_rows=self.piece_rows,
                overwrite=self.overwrite,
            )
        return work(
            encoder,
            data,
            path,
            self.settings,
            worker,
            lease_seconds=self.lease_seconds,
            overwrite=self.overwrite,
            since=self.since,
            join=self.join,
            progress=progress,
        )

    def help(self, split: str, worker: Worker) -> Share:
        """Do a worker's share of a split with nothing but what this holds."""
        encoder = self.load(worker)
        share = self.run(encoder, self.open(encoder)[split], worker)
        assert isinstance(share, Share)  # `by_parts`
        return share


def with_sides_of(encoder: Encoder, data: Pairs | Pieces) -> Encoder:
    """The encoder without a side that none of the pairs has (of pieces as far as the columns of a table tell); a
    warning says so. Raises `UsageError` where no side is left."""
    if isinstance(data, Pairs):
        lacking = [side for side in SIDES if not any(_has(record, side) for record in data)]
    else:
        lacking = absent_sides(data)
    absent = [side for side in lacking if getattr(encoder, side) is not None]
    if not absent:
        return encoder
    image, text = (None if side in absent else getattr(encoder, side) for side in SIDES)
    missing = f"none of the rows of {data.split} has {' or '.join(_A[side] for side in absent)}"
    if image is None and text is None:
        column = ", or name the column with `columns`" if data.layout == "manifest" else ""
        reads = " and ".join(f"{side}s" for side in absent)
        raise UsageError(f"this encoder reads {reads}, and {missing}; take an encoder of the other side{column}")
    warnings.warn(f"note: {missing}: only the other side is encoded", stacklevel=1)
    return replace(encoder, image=image, text=text)


def _has(record: Record, side: str) -> bool:
    if side == "image":
        return record.image_path is not None
    return record.text is not None or record.text_path is not None
