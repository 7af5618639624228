"""The rows of a finetuning; and its frozen trunk, run once: what lies below the blocks that are tuned gives every epoch
the same, so its outputs are cached in a store of stage 1 and epochs compute only what is above."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from feats.encoders.cut import lower_part
from feats.extraction.local import extract
from feats.extraction.plan import fingerprint_of
from feats.extraction.settings import ExtractionSettings
from modeling.features.stored_splits import PARTS
from modeling.finetuning.data import MEMORY_BYTES as PICTURE_BYTES, PairReader, TuneData
from modeling.finetuning.distributed import Team
from modeling.finetuning.hidden_states import Rows, hidden_states
from modeling.finetuning.parameters import first_tuned_block
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start, contents_of
from modeling.training.problem import Problem, class_weights

FOLDER = "trunks"  # beside the caches

Progress = Callable[[int, int], Any]  # rows encoded so far, rows to encode


def data_of(
    start: Start,
    settings: TuneSettings,
    folder: Path,
    team: Team = Team(),
    *,
    hard: Sequence[str] = (),
    cached: bool = True,
    progress: Progress = lambda done, total: None,
) -> TuneData:
    """The rows of a finetuning as `tune` reads them; `hard` are the ids of training rows that come once more,
    augmented. With `cached`, of a frozen trunk its outputs, which are kept in `folder`. Raises `UsageError` for rows
    that can't be encoded, and what `extract` raises."""
    split, records = start.split, start.records
    numbers = {record.id: k for k, record in enumerate(records)}
    rows = {part: [numbers[i] for i in getattr(split, part)] for part in PARTS}
    labels = torch.full((len(records),), -1)
    for part, ids in (("train", split.train), ("val", split.val)):
        labels[rows[part]] = torch.from_numpy(start.experiment.labels(ids))
    used = [*rows["train"], *rows["val"], *rows["test"]]
    hidden: dict[str, Rows] = {}
    frozen = settings.last_blocks is not None or settings.tune == "head"
    began = time.perf_counter()
    if frozen and cached and not settings.augment and not hard:
        hidden = _cached_trunks(start, settings, folder, team, used, progress)
    trunk_seconds = time.perf_counter() - began
    reader = PairReader(
        records,
        start.model.encoders,
        start.model.preprocessing.caches,
        start.cleaning,
        settings.text_augmentation,
        hidden,
        rows=used,
        memory_bytes=PICTURE_BYTES // team.size,
    )
    weights = None
    if settings.class_weights != "none":
        train, val = torch.tensor(rows["train"]), torch.tensor(rows["val"])
        of_all = Problem(None, labels, train, val, start.experiment.classes)  # type: ignore[arg-type]
        weights = class_weights(settings.class_weights, of_all)
    more = [numbers[i] for i in hard]
    classes = start.experiment.classes
    return TuneData(reader, labels, rows["train"], rows["val"], rows["test"], more, weights, classes, trunk_seconds)


def _cached_trunks(
    start: Start, settings: TuneSettings, folder: Path, team: Team, used: Sequence[int], progress: Progress
) -> dict[str, Rows]:
    """Of every part that has blocks, what enters the first that is tuned; the model is told to begin there."""
    hidden: dict[str, Rows] = {}
    for name, cuts in _cuts(start, settings).items():
        encoder = start.model.encoders[name]
        dtype = start.model.autocast.get(name, torch.float32)
        trunk = lower_part(encoder, cuts, autocast=None if dtype == torch.float32 else dtype)
        how = ExtractionSettings(text_clean=start.cleaning[name])
        made_by = {**fingerprint_of(trunk, start.records, how), "versions": None, "contents": contents_of(start)}
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
        path = folder / f"{name.replace('/', '-')}-{digest}_train.h5"
        if team.leads:
            folder.mkdir(parents=True, exist_ok=True)
            extract(trunk, start.records, path, how, progress=progress)
        team.gather(None)  # the others read it when it is whole
        rows_of = hidden_states(path, used)
        for side, cut in cuts.items():
            hidden[f"{side}/{name}"] = rows_of[side]
            start.model.cuts[f"{side}/{name}"] = cut
    return hidden


def _cuts(start: Start, settings: TuneSettings) -> dict[str, dict[str, int]]:
    """By cache and side, the block below which everything is frozen."""
    cuts: dict[str, dict[str, int]] = {}
    for part, side in start.model.sides.items():
        if side.blocks is not None:
            kind, _, name = part.partition("/")
            first = first_tuned_block(part, side, settings)
            deepest = first if side.blocks.deepest is None else side.blocks.deepest
            cuts.setdefault(name, {})[kind] = min(first, deepest)
    return cuts
