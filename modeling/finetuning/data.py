"""Pairs on disk -> batches for a `PairModel`: pictures decoded and preprocessed, texts cleaned and tokenised.

Which rows make up a step, in which order and how augmented, is a function of (seed, epoch, step) and of nothing else.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from feats.encoders.base import Encoder, ImageSide, TextSide
from feats.errors import RowError, UsageError
from feats.extraction.local import default_workers
from feats.extraction.preparation import prepare
from feats.images import augment, hash64, read_image
from feats.records import Record, TarSlice
from feats.source import SIDES
from feats.text import clean, clean_with_key
from modeling.features.joined import FeatureSet, FeatureSource, Rows
from modeling.finetuning.augment import TextAugmentation, augment_text
from modeling.finetuning.model import PairBatch

MEMORY_BYTES = 4 << 30  # preprocessed pictures up to this many bytes are kept, so that each is decoded once
FILL_ROWS = 64  # pictures that a worker decodes at a time


def stream(seed: int, purpose: str) -> int:
    """A seed of its own, 0 to 2^56 - 1, for each purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Sample:
    """A row as a training step sees it. `sides` are augmented, drawn from `seed`."""

    row: int
    sides: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """A batch, and of its rows that can't be read why, by id."""

    batch: PairBatch
    reasons: dict[str, str]


class PairReader(Dataset[Read]):
    """Reads `records` for `encoders`; `caches` says which of them have which side, `cleaning` (by cache) how texts are
    cleaned. `hidden` are the outputs of cached trunks, by part: their pictures aren't read. `rows` are those that are
    asked for (all without); their preprocessed pictures are kept where they take no more than `memory_bytes`."""

    def __init__(
        self,
        records: Sequence[Record],
        encoders: Mapping[str, Encoder],
        caches: Mapping[str, Sequence[str]],
        cleaning: Mapping[str, str],
        text_augmentation: TextAugmentation = TextAugmentation(),
        hidden: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {},
        *,
        rows: Sequence[int] | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ):
        self.records, self.cleaning, self.how, self.hidden = records, cleaning, text_augmentation, hidden
        self.image: dict[str, ImageSide] = {
            name: encoders[name].image_side() for name in caches["image"] if f"image/{name}" not in hidden
        }
        self.text: dict[str, TextSide] = {name: encoders[name].text_side() for name in caches["text"]}
        rows = range(len(records)) if rows is None else rows
        self.tokens = {
            name: dict(zip(rows, side.tokenize([self._cleaned(name, row) for row in rows]), strict=True))
            for name, side in self.text.items()
        }
        self.jobs: Sequence[Sequence[Sample]] = ()
        self.memory: dict[str, torch.Tensor] = {}
        self.in_memory = torch.zeros(len(records), dtype=torch.bool)
        sizes = {name: side.blank() for name, side in self.image.items()}
        if sum(blank.numel() for blank in sizes.values()) * len(rows) <= memory_bytes:
            self.memory = {name: blank.new_empty(len(records), *blank.shape) for name, blank in sizes.items()}

    def _cleaned(self, name: str, row: int) -> str:
        return clean(self.records[row].text or "", self.cleaning[name])

    def fill(self, rows: Sequence[int]) -> None:
        """Decode the pictures of `rows` once, where memory holds them. Raises `UsageError` naming those that can't be
        read."""
        missing = [row for row in rows if not self.in_memory[row]]
        if not self.image or not self.memory or not missing:
            return
        blocks = [missing[low : low + FILL_ROWS] for low in range(0, len(missing), FILL_ROWS)]
        filled = self.batches([[Sample(row) for row in block] for block in blocks])
        for block, batch in zip(blocks, filled, strict=True):
            for name, pixels in batch.pixels.items():
                self.memory[name][block] = pixels
            self.in_memory[block] = True

    def batches(self, jobs: Sequence[Sequence[Sample]]) -> Iterator[PairBatch]:
        """A batch for each job, read ahead by worker processes where pictures or augmented texts have to be made.

        Raises `UsageError` naming rows that can't be read."""
        made = any(not self._at_hand(sample) for job in jobs for sample in job)
        reader = copy(self)
        reader.jobs = jobs
        reads = (
            prepare(reader, default_workers(), pin_memory=False) if made else map(reader.__getitem__, range(len(jobs)))
        )
        for read in reads:
            if read.reasons:
                some = "; ".join(f"{i} ({why})" for i, why in list(read.reasons.items())[:5])
                raise UsageError(
                    f"{len(read.reasons)} rows can't be read: {some}; repair their files, or split without them"
                )
            yield read.batch

    def _at_hand(self, sample: Sample) -> bool:
        return not sample.sides and (not self.image or bool(self.in_memory[sample.row]))

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Read:
        samples = self.jobs[index]
        reasons: dict[str, str] = {}
        pixels = self._pixels(samples, reasons)
        rows = torch.tensor([sample.row for sample in samples])
        for sample in samples:
            record = self.records[sample.row]
            if self.text and record.text is None:
                reasons[record.id] = record.text_error
        return Read(
            PairBatch(pixels, self._ids(samples), {part: of(rows) for part, of in self.hidden.items()}), reasons
        )

    def _pixels(self, samples: Sequence[Sample], reasons: dict[str, str]) -> dict[str, torch.Tensor]:
        if not self.image:
            return {}
        if all("image" not in sample.sides and self.in_memory[sample.row] for sample in samples):
            rows = torch.tensor([sample.row for sample in samples])
            return {name: values[rows] for name, values in self.memory.items()}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.image}
        for sample in samples:
            if "image" not in sample.sides and self.in_memory[sample.row]:
                for name, values in self.memory.items():
                    found[name].append(values[sample.row])
                continue
            record = self.records[sample.row]
            try:
                picture = read_image(record.image_path)[0]
            except RowError as error:
                reasons[record.id] = str(error)
                picture = Image.new("RGB", (8, 8))
            if "image" in sample.sides:
                picture = augment(picture, stream(sample.seed, "image"))
            for name, side in self.image.items():
                found[name].append(side.to_bytes(picture))
        return {name: torch.stack(values) for name, values in found.items()}

    def _ids(self, samples: Sequence[Sample]) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for name, side in self.text.items():
            changed = {
                k: augment_text(self._cleaned(name, s.row), stream(s.seed, "text"), self.how)
                for k, s in enumerate(samples)
                if "text" in s.sides
            }
            anew = dict(zip(changed, side.tokenize(list(changed.values())), strict=True)) if changed else {}
            found[name] = [(anew.get(k) or self.tokens[name][s.row]).ids for k, s in enumerate(samples)]
        return found


@dataclass(frozen=True)
class TuneData:
    """Rows of a reader, by number, and their labels; `hard`: training rows that come a second time, augmented."""

    reader: PairReader
    labels: torch.Tensor  # (N,) int64; of rows in no part -1
    train: Sequence[int]
    val: Sequence[int]
    test: Sequence[int] = ()
    hard: Sequence[int] = ()
    class_weights: torch.Tensor | None = None  # (C,)
    classes: Sequence[str] = ()  # their names; without, epochs don't count predictions
    trunk_seconds: float = 0.0  # what it took to cache frozen blocks, next to nothing where that was done before


def epoch_samples(
    rows: Sequence[int], hard: Sequence[int], seed: int, epoch: int, sides: tuple[str, ...]
) -> list[Sample]:
    """The training rows of one epoch in their order, each augmented anew on `sides`; and of the rows `hard` one more,
    augmented on all sides."""
    drawn = [(row, sides, "row") for row in rows] + [(row, SIDES, "copy") for row in hard]
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(stream(seed, f"order/{epoch}")))
    return [
        Sample(row, of_sides, stream(seed, f"augment/{epoch}/{kind}/{row}") if of_sides else 0)
        for row, of_sides, kind in (drawn[k] for k in order.tolist())
    ]


# -- rows without caches ----------------------------------------------------------------------------------------


def rows_as_features(records: Sequence[Record], source: FeatureSource, split: str) -> FeatureSet:
    """Records as a `FeatureSet` without features, for splitting: with the hashes that tell duplicates, as caches keep
    them. Rows whose picture or text can't be read are left out, as extraction would."""
    hashes, reasons = np.zeros(len(records), np.uint64), {}
    for k, record in enumerate(records):
        if source.image:
            try:
                place = record.image_path
                if place is None:
                    raise RowError("no picture file")
                hashes[k] = hash64(place.read() if isinstance(place, TarSlice) else place.read_bytes())
            except (OSError, ValueError, RowError) as error:
                reasons[record.id] = str(error)
        if source.text and record.text is None:
            reasons[record.id] = record.text_error
    keys = np.array([hash64(clean_with_key(record.text or "", "none")[1].encode()) for record in records], np.uint64)
    tags = [record.label or "" for record in records]
    dataset = Rows.of([record.id for record in records], tags, hashes, keys)
    kept = np.array([k for k, record in enumerate(records) if record.id not in reasons], np.int64)
    return FeatureSet(split, dataset.take(kept), {}, {}, {}, {}, {}, source, reasons, dataset)


def without(batch: PairBatch, side: str, reader: PairReader, hidden: Mapping[str, torch.Tensor]) -> PairBatch:
    """The batch with a black picture, or an empty text, in place of one side's. `hidden`: what that is to a cached
    trunk, (1, L, width) by part."""
    size = batch.size
    changed = {**batch.hidden, **{part: x.expand(size, *x.shape[1:]) for part, x in hidden.items()}}
    if side == "image":
        black = {name: s.blank().expand(size, *s.blank().shape) for name, s in reader.image.items()}
        return replace(batch, pixels=black, hidden=changed)
    return replace(
        batch, ids={name: [s.tokenize([""])[0].ids] * size for name, s in reader.text.items()}, hidden=changed
    )
