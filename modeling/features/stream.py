"""Rows of caches that are larger than memory: read block by block, ahead of whoever uses them, in an order that mixes.

A block is some thousand consecutive rows. An epoch takes the blocks in random order, mixes the rows of some blocks, a
window, and gives every row once; the order is a function of seed and epoch, and of nothing else.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from feats.errors import UsageError
from feats.memory import available_bytes
from feats.source import SIDES
from modeling.choices import SHARE, STREAMING
from modeling.features.cache_facts import float32_bytes
from modeling.features.inputs import Inputs, Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource
from modeling.features.loading import OpenFeatures
from modeling.features.normalizer import Normalizer
from modeling.heads.config import HeadConfig

BLOCK_BYTES = 1 << 24  # of one block's features in float32
MOST_BLOCK_ROWS = 1 << 15
WINDOW = 16  # blocks mixed at a time, and read ahead at most
PATIENCE = 0.05  # seconds until a reader looks whether it is still wanted

Item = TypeVar("Item")


def streams(choice: str, source: FeatureSource, split: str, device: torch.device) -> bool:
    """Whether caches are streamed: always, never, or (auto) where their features in float32 would take more than half
    of the memory that is available here, or on the GPU. Raises `UsageError` for another `choice`."""
    if choice not in STREAMING:
        raise UsageError(f"`stream` {choice}: expected {', '.join(STREAMING)}")
    if choice != "auto":
        return choice == "always"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    limits = [limit for limit in (available_bytes(), free) if limit is not None]
    return bool(limits) and float32_bytes(source, split) > SHARE * min(limits)


@dataclass
class Tally:
    """What passes over the rows took: `rows` and `seconds` of those that trained, `waited` of these seconds for blocks;
    and of all passes the rows that were read, and the seconds of reading alone."""

    rows: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    read_rows: int = 0
    read_seconds: float = 0.0

    def rates(self) -> dict[str, float]:
        """Rows per second of training and of reading alone, and which share of the training was waiting for blocks."""
        return {
            "rows_per_second": round(self.rows / max(self.seconds, 1e-9), 1),
            "reading_rows_per_second": round(self.read_rows / max(self.read_seconds, 1e-9), 1),
            "waiting": round(self.waited / max(self.seconds, 1e-9), 4),
        }


class Stream:
    """Open caches, read by blocks of `block_rows` consecutive rows; `window` of them are mixed. Use it as a context
    manager, or close it. Raises as `OpenFeatures`."""

    def __init__(
        self, source: FeatureSource, split: str, *, block_rows: int | None = None, window: int = WINDOW, seed: int = 0
    ):
        self.caches = OpenFeatures(source, split)
        self.window, self.seed, self.tally = window, seed, Tally()
        row_bytes = float32_bytes(source, split) // max(1, len(self.shell))
        self.block_rows = block_rows or max(1, min(MOST_BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes)))

    @property
    def shell(self) -> FeatureSet:
        """All but the values, see `OpenFeatures`."""
        return self.caches.shell

    def close(self) -> None:
        """Close the caches."""
        self.caches.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def blocks(self, rows: np.ndarray) -> list[np.ndarray]:
        """Ascending `rows`, repeated ones too, cut where one block ends and the next begins."""
        return np.split(rows, np.flatnonzero(np.diff(rows // self.block_rows)) + 1) if len(rows) else []

    def windows(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """The windows of an epoch over ascending `rows`: the rows of each block, and the order in which those of all
        of them come, as positions in their concatenation."""
        rng = np.random.default_rng([self.seed, epoch])
        blocks = self.blocks(rows)
        order = rng.permutation(len(blocks))
        for low in range(0, len(blocks), self.window):
            chosen = [blocks[number] for number in order[low : low + self.window]]
            yield chosen, rng.permutation(sum(map(len, chosen)))

    def order(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """`rows`, ascending, as an epoch's batches take them."""
        parts = [np.concatenate(chosen)[places] for chosen, places in self.windows(rows, epoch)]
        return np.concatenate(parts) if parts else rows

    def read(
        self,
        wanted: Sequence[np.ndarray],
        source: FeatureSource | None = None,
        *,
        views: bool = False,
        trains: bool = False,
    ) -> Generator[FeatureSet, None, None]:
        """The features of each of `wanted`, ascending rows of one block, in that order, read ahead. `trains`: whether
        the pass counts as training in `tally`. Close the iterator where it isn't used up, so that reading ends."""

        def block(rows: np.ndarray) -> FeatureSet:
            start = time.perf_counter()
            once, places = np.unique(rows, return_inverse=True)
            found = self.caches.read(once, source, views=views)
            self.tally.read_rows += len(once)
            self.tally.read_seconds += time.perf_counter() - start
            if len(once) == len(rows):
                return found
            at = torch.from_numpy(places)
            return found.with_tensors(lambda x: x[at], lambda x: x.take(at))

        began, waited, taken = time.perf_counter(), 0.0, 0
        try:
            with closing(ahead(map(block, wanted), self.window)) as items:
                for rows in wanted:
                    start = time.perf_counter()
                    item = next(items)
                    waited += time.perf_counter() - start
                    taken += len(rows)
                    yield item
        finally:
            if trains:
                self.tally.rows += taken
                self.tally.seconds += time.perf_counter() - began
                self.tally.waited += waited

    def preprocessing(self, rows: np.ndarray, norms: Any = "none", scales: Any = None) -> Preprocessing:
        """`Preprocessing.fit` of ascending training `rows`, in one pass over them where it takes statistics."""
        return Preprocessing.fit_blocks(self.shell, lambda: self.read(self.blocks(rows)), norms, scales)

    def over(self, rows: torch.Tensor, of: Callable[[FeatureSet], np.ndarray]) -> np.ndarray:
        """What `of` makes (R, ...) of the features of `rows` (R,) int64, in their order, block by block."""
        order = torch.argsort(rows.cpu(), stable=True)
        with closing(self.read(self.blocks(rows.cpu()[order].numpy()))) as blocks:
            found = np.concatenate([of(block) for block in blocks])
        result = np.empty_like(found)
        result[order.numpy()] = found
        return result


@dataclass(frozen=True)
class StreamedInputs:
    """`Inputs` of a stream's rows, made on `device` as they are read."""

    stream: Stream
    preprocessing: Preprocessing
    device: torch.device

    @property
    def shapes(self) -> Inputs:
        """All rows on torch's meta device: widths and sizes, no values."""
        kept = {key: Normalizer("none") for key in self.preprocessing.normalizers}  # for arithmetic torch imports a lot
        return Preprocessing(self.preprocessing.caches, {}, kept).apply(self.stream.shell)

    def read(
        self, wanted: Sequence[np.ndarray], config: HeadConfig, *, views: bool = False, trains: bool = False
    ) -> Generator[Inputs, None, None]:
        """What a head reads of each of `wanted`, see `Stream.read`."""
        own = self.preprocessing.for_head(config).to(self.device)
        image, text = (tuple(own.caches[side]) for side in SIDES)
        tokens = any("_tokens/" in key for key in own.normalizers)
        source = replace(self.stream.caches.source, image=image, text=text, tokens=tokens)
        with closing(self.stream.read(wanted, source, views=views, trains=trains)) as blocks:
            for block in blocks:
                yield own.apply(block.to(self.device)).for_head(config)


def ahead(items: Iterable[Item], count: int) -> Generator[Item, None, None]:
    """`items`, made by a thread that is up to `count` of them ahead and ends with this iterator. What making them
    raises is raised here."""
    made: Queue[tuple[Item | None, BaseException | None]] = Queue(count)
    unwanted = Event()

    def hand_over(item: Item | None, error: BaseException | None) -> None:
        while not unwanted.is_set():
            try:
                made.put((item, error), timeout=PATIENCE)
            except Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                hand_over(item, None)
                if unwanted.is_set():
                    return
        except BaseException as error:  # whatever it is belongs to whoever waits for the item
            hand_over(None, error)
        else:
            hand_over(None, None)

    reader = Thread(target=work, name="reader", daemon=True)
    reader.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        unwanted.set()
        while reader.is_alive():  # it may wait for room in the queue
            try:
                made.get(timeout=PATIENCE)
            except Empty:
                continue
        reader.join()
