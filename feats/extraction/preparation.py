"""What happens to a row before the encoder: reading, decoding, preprocessing, tokenising; in worker processes."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_all_start_methods
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from feats.encoders.registry import Encoder, ImageSide, Tokens
from feats.errors import RowError
from feats.images import augment, hash64, read_image
from feats.interrupts import INTERRUPTS, held_back
from feats.records import Record, TarSlice
from feats.text import clean, duplicate_key


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


class Preparation(Dataset):
    """Turns `Job`s into `Texts` and `Images`; `text_clean` is the cleaning level, `views` their number per picture."""

    def __init__(
        self,
        encoder: Encoder,
        records: Sequence[Record],
        jobs: Sequence[Job],
        text_clean: str,
        views: int,
        views_seed: int,
    ):
        self.image, self.text = encoder.image, encoder.text
        self.records, self.jobs = records, jobs
        self.text_clean, self.views, self.views_seed = text_clean, views, views_seed
        self.blank = blank_pixels(encoder.image) if encoder.image else None

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Texts | Images:
        kind, rows = self.jobs[index]
        records = [self.records[row] for row in rows]
        return self._texts(records) if kind == "texts" else self._images(records)

    def _texts(self, records: Sequence[Record]) -> Texts:
        texts = [record.text or "" for record in records]
        return Texts(
            tokens=self.text.tokenize([clean(text, self.text_clean) for text in texts]),
            hashes=np.array([hash_of_text(record) for record in records], np.uint64),
            keys=np.array([hash64(duplicate_key(text).encode()) for text in texts], np.uint64),
            reasons={k: record.text_error for k, record in enumerate(records) if record.text is None},
        )

    def _images(self, records: Sequence[Record]) -> Images:
        pixels = torch.zeros(len(records), 1 + self.views, *self.blank.shape, dtype=torch.uint8)
        hashes, sizes = np.zeros(len(records), np.uint64), np.zeros(len(records), np.int64)
        reasons = {}
        for k, record in enumerate(records):
            try:
                image, hashes[k] = read_image(record.image_path)
                pixels[k, 0] = to_array(self.image.preprocess(image))
                for view in range(self.views):
                    seed = hash64(f"{self.views_seed}/{record.id}/{view}".encode())
                    pixels[k, 1 + view] = to_array(self.image.preprocess(augment(image, seed)))
                sizes[k] = picture_bytes(record)
            except RowError as error:
                reasons[k] = str(error)
        return Images(pixels, hashes, sizes, reasons)


def prepare(dataset: Preparation, workers: int, pin_memory: bool) -> Iterator[Texts | Images]:
    """The jobs' results in order, made ahead of time by `workers` processes (0: on demand, in this one). Close it, or
    take all there are: else the processes end whenever the garbage collector gets there."""
    if "fork" not in get_all_start_methods():  # tokenisers and preprocessing are closures: they can't be sent
        workers = 0
    workers = min(workers, len(dataset))
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker,
    )
    with held_back():
        prepared = iter(loader)
    try:
        yield from prepared
    finally:
        if workers:
            with held_back():
                prepared._shutdown_workers()


def _start_worker(worker: int) -> None:
    """Leave interruptions to the main process, and end with it however it ends: a worker that outlives a killed run
    would keep that run's file locks, which it inherits."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    sys.excepthook = _unless_hung_up


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread of multiprocessing's hands over what this worker has made. When the main process is interrupted while it
    takes something, it hangs up in the middle: nobody wants a traceback of that."""
    if not isinstance(error, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def blank_pixels(side: ImageSide) -> torch.Tensor:
    """A black picture after preprocessing, (H, W, 3) uint8."""
    return to_array(side.preprocess(Image.new("RGB", (512, 512))))


def to_array(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))  # a copy: PIL's own buffer is read-only


def hash_of_text(record: Record) -> int:
    return hash64((record.text or "").encode())


def picture_bytes(record: Record) -> int:
    """The picture file's size; -1 when there is none."""
    status = _picture_stat(record)
    if status is None:
        return -1
    return record.image_path.size if isinstance(record.image_path, TarSlice) else status.st_size


def picture_changed(record: Record, size: int, content: int, since: float) -> bool:
    """Whether a picture differs from one of `size` bytes with hash `content`. Read only if modified after `since`."""
    status = _picture_stat(record)
    if status is None or picture_bytes(record) != size:
        return True
    if status.st_mtime <= since:
        return False
    try:
        source = record.image_path
        return hash64(source.read() if isinstance(source, TarSlice) else source.read_bytes()) != content
    except OSError:
        return True


def _picture_stat(record: Record) -> os.stat_result | None:
    source = record.image_path
    try:
        return os.stat(source.path if isinstance(source, TarSlice) else source) if source else None
    except (OSError, ValueError):
        return None
