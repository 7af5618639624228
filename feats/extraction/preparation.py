"""What happens to a row before the encoder: reading, decoding, preprocessing, tokenising; in worker processes."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import current_process, get_all_start_methods
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from feats.encoders.base import Encoder, TextSide, Tokens
from feats.errors import RowError, UsageError
from feats.extraction.settings import ExtractionSettings
from feats.images import augment, hash64, read_image
from feats.interrupts import INTERRUPTS, held_back
from feats.leftovers import temporary_folder
from feats.orphans import end_with
from feats.records import Record, TarSlice
from feats.text import clean_with_key

Made = TypeVar("Made")

# A socket's path has 107 bytes on Linux and 103 elsewhere; "/feats-xxxxxxxx.tmp/listener-xxxxxxxx" takes 37 of them.
_LONGEST_TMPDIR = 66
_SHORT_TMPDIR = "/tmp"


class Texts(NamedTuple):
    """The texts of one block. `reasons` maps positions in the block to why a text can't be encoded."""

    tokens: list[Tokens]
    hashes: np.ndarray  # (R,) uint64
    keys: np.ndarray  # (R,) uint64
    reasons: dict[int, str]


class Images(NamedTuple):
    """One batch of pictures. `pixels` (B, 1 + K, H, W, 3) uint8: the picture, then its K augmented views."""

    pixels: torch.Tensor
    hashes: np.ndarray  # (B,) uint64
    sizes: np.ndarray  # (B,) int64, bytes
    reasons: dict[int, str]


class Job(NamedTuple):
    """Some rows to prepare: all texts of a block, or a batch of its pictures."""

    kind: str  # "texts" or "images"
    rows: np.ndarray


class Preparation(Dataset[Texts | Images]):
    """Turns `Job`s into `Texts` and `Images`, for an encoder and settings; `text_clean` is the cleaning level."""

    def __init__(
        self,
        encoder: Encoder,
        records: Sequence[Record],
        jobs: Sequence[Job],
        text_clean: str,
        settings: ExtractionSettings = ExtractionSettings(),
    ):
        self.encoder, self.records, self.jobs = encoder, records, jobs
        self.text_clean, self.settings = text_clean, settings
        self.blank = encoder.image.blank() if encoder.image else None

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Texts | Images:
        kind, rows = self.jobs[index]
        records = [self.records[row] for row in rows]
        if kind == "texts":
            return prepare_texts(self.encoder.text_side(), records, self.text_clean)
        return self._images(records)

    def _images(self, records: Sequence[Record]) -> Images:
        side, views, seed = self.encoder.image_side(), self.settings.views, self.settings.views_seed
        assert self.blank is not None
        pixels = torch.zeros(len(records), 1 + views, *self.blank.shape, dtype=torch.uint8)
        hashes, sizes = np.zeros(len(records), np.uint64), np.zeros(len(records), np.int64)
        reasons = {}
        for k, record in enumerate(records):
            try:
                image, hashes[k] = read_image(record.image_path)
                pixels[k, 0] = side.to_bytes(image)
                for view in range(views):
                    drawn = hash64(f"{seed}/{record.id}/{view}".encode())
                    pixels[k, 1 + view] = side.to_bytes(augment(image, drawn))
                sizes[k] = picture_bytes(record)
            except RowError as error:
                reasons[k] = str(error)
        return Images(pixels, hashes, sizes, reasons)


def prepare_texts(side: TextSide, records: Sequence[Record], text_clean: str) -> Texts:
    """The records' texts cleaned and tokenised. Each is cleaned once, for its tokens and its duplicate key."""
    cleaned = [clean_with_key(record.text or "", text_clean) for record in records]
    return Texts(
        tokens=side.tokenize([text for text, _ in cleaned]),
        hashes=np.array([hash_of_text(record) for record in records], np.uint64),
        keys=np.array([hash64(key.encode()) for _, key in cleaned], np.uint64),
        reasons={k: record.text_error for k, record in enumerate(records) if record.text is None},
    )


def take(texts: Texts, rows: np.ndarray) -> Texts:
    """The texts of some rows, of those of all."""
    return Texts(
        tokens=[texts.tokens[row] for row in rows],
        hashes=texts.hashes[rows],
        keys=texts.keys[rows],
        reasons={k: texts.reasons[row] for k, row in enumerate(rows.tolist()) if row in texts.reasons},
    )


def prepare(dataset: Dataset[Made], workers: int, pin_memory: bool) -> Iterator[Made]:
    """The items of a dataset in order, made ahead of time by `workers` processes (0: on demand, in this one)."""
    if "fork" not in get_all_start_methods():  # tokenisers and preprocessing are closures: they can't be sent
        workers = 0
    workers = min(workers, len(dataset))  # type: ignore[arg-type]  # torch's own base class promises no length
    own = ExitStack()
    folder = _place_of_sockets(own) if workers else None
    with held_back():
        items = iter(
            DataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_made,
                pin_memory=pin_memory,
                multiprocessing_context="fork" if workers else None,
                worker_init_fn=partial(_start_worker, folder, os.getpid()) if folder else None,
            )
        )
    return _all_of(items, own)


def _all_of(items: Iterator[Made], own: ExitStack) -> Iterator[Made]:
    with own:
        try:
            yield from items
        finally:
            # Its processes end before what is `own` goes; an interruption's traceback may keep `items` for longer.
            if isinstance(items, _MultiProcessingDataLoaderIter):
                items._shutdown_workers()


def _place_of_sockets(own: ExitStack) -> Path:
    """A temporary folder of a short name, which is `own`: a socket of a longer path can't be made, and a worker that
    can't hand over what it made waits for ever. Raises `UsageError` where there is no such place."""
    usual = tempfile.gettempdir()
    short = len(os.fsencode(usual)) <= _LONGEST_TMPDIR
    try:
        return own.enter_context(temporary_folder(Path(usual if short else _SHORT_TMPDIR)))
    except OSError as error:
        if short:
            raise
        raise UsageError(
            f"decoding processes need a folder of {_LONGEST_TMPDIR} bytes at most for their sockets; TMPDIR is "
            f"{len(os.fsencode(usual))} bytes long, and {_SHORT_TMPDIR} can't be written ({error.strerror}): set "
            "TMPDIR to a shorter one, or `workers` to 0"
        ) from None


def _as_made(prepared: Any) -> Any:
    """Torch's own default would turn arrays into tensors."""
    return prepared


def _start_worker(folder: Path, parent: int, worker: int) -> None:
    """Leave interruptions to the main process, and end with it however it ends: a worker that outlives a killed run
    would keep that run's file locks, which it inherits. Its temporary files (the sockets by which tensors are handed
    over) go into the main process's `folder`, which the next run removes if nobody could."""
    # Its own setting for such a place: one that multiprocessing makes it would also remove, and complain if it is gone.
    current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    sys.excepthook = _unless_hung_up


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread of multiprocessing's hands over what this worker has made. When the main process is interrupted while it
    takes something, it hangs up in the middle: nobody wants a traceback of that."""
    if not isinstance(error, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def hash_of_text(record: Record) -> int:
    """Of the text as it was decoded; that of an empty one where there is none."""
    return hash64((record.text or "").encode())


def picture_bytes(record: Record) -> int:
    """The picture file's size; -1 when there is none."""
    status = _picture_stat(record)
    if status is None:
        return -1
    return record.image_path.size if isinstance(record.image_path, TarSlice) else status.st_size


def picture_changed(record: Record, size: int, content: int, since: float) -> bool:
    """Whether a picture differs from one of `size` bytes with hash `content`. Read only if modified after `since`."""
    source, status = record.image_path, _picture_stat(record)
    if source is None or status is None or picture_bytes(record) != size:
        return True
    if status.st_mtime <= since:
        return False
    try:
        return hash64(source.read() if isinstance(source, TarSlice) else source.read_bytes()) != content
    except OSError:
        return True


def _picture_stat(record: Record) -> os.stat_result | None:
    source = record.image_path
    try:
        return os.stat(source.path if isinstance(source, TarSlice) else source) if source else None
    except (OSError, ValueError):
        return None
