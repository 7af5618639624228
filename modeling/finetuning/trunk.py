"""The rows of a finetuning; and its frozen trunk, run once: what lies below the blocks that are tuned gives every epoch
the same, so its outputs are cached in a store of stage 1 and epochs compute only what is above."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from feats.encoders.cut import lower_part
from feats.extraction.local import extract
from feats.extraction.plan import fingerprint_of
from feats.extraction.settings import ExtractionSettings
from feats.source import SIDES
from modeling.features.joined import Ragged, load_features
from modeling.features.splits import duplicates_of
from modeling.finetuning.data import PairReader, TuneData
from modeling.finetuning.distributed import Team
from modeling.finetuning.hard_rows import hard_rows
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start
from modeling.training.problem import Problem, class_weights

FOLDER = "trunks"  # beside the caches

Rows = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[int, int], Any]  # rows encoded so far, rows to encode


def data_of(
    start: Start,
    settings: TuneSettings,
    folder: Path,
    team: Team = Team(),
    *,
    bad_cases: Path | None = None,
    cached: bool = True,
    progress: Progress = lambda done, total: None,
) -> TuneData:
    """The rows of a finetuning as `tune` reads them; with `cached`, of a frozen trunk its outputs, which are kept in
    `folder`. Raises `UsageError` for `bad_cases` that aren't training rows, and what `extract` raises."""
    split, records = start.split, start.records
    numbers = {record.id: k for k, record in enumerate(records)}
    rows = {part: [numbers[i] for i in getattr(split, part)] for part in ("train", "val", "test")}
    labels = torch.full((len(records),), -1)
    for part, ids in (("train", split.train), ("val", split.val)):
        labels[rows[part]] = torch.from_numpy(start.experiment.labels(ids))
    hard: list[str] = []
    if bad_cases is not None:  # duplicates matter here whether or not the split kept them together
        hard = hard_rows(bad_cases, split, duplicates_of(start.experiment.features))
    hidden: dict[str, Rows] = {}
    frozen = settings.last_blocks is not None or settings.tune == "head"
    if frozen and cached and not settings.augment and not hard:
        hidden = _cached_trunks(start, settings, folder, team, progress)
    reader = PairReader(
        records,
        start.model.encoders,
        start.model.preprocessing.caches,
        start.cleaning,
        settings.text_augmentation,
        hidden,
    )
    weights = None
    if settings.class_weights != "none":
        train, val = torch.tensor(rows["train"]), torch.tensor(rows["val"])
        of_all = Problem(None, labels, train, val, start.experiment.classes)  # type: ignore[arg-type]
        weights = class_weights(settings.class_weights, of_all)
    return TuneData(reader, labels, rows["train"], rows["val"], rows["test"], [numbers[i] for i in hard], weights)


def _cached_trunks(
    start: Start, settings: TuneSettings, folder: Path, team: Team, progress: Progress
) -> dict[str, Rows]:
    """Of every part that has blocks, what enters the first that is tuned; the model is told to begin there."""
    hidden: dict[str, Rows] = {}
    numbers = {record.id: k for k, record in enumerate(start.records)}
    for name, encoder in start.model.encoders.items():
        cuts = {}
        for part, side in start.model.sides.items():
            if part.partition("/")[2] == name and side.blocks is not None:
                kind = part.partition("/")[0]
                cuts[kind] = len(side.blocks.modules) - (settings.last_blocks or 0)
        if not cuts or min(cuts.values()) < 0:  # too few blocks: what is tuned says so
            continue
        dtype = start.model.autocast.get(name, torch.float32)
        trunk = lower_part(encoder, cuts, autocast=None if dtype == torch.float32 else dtype)
        how = ExtractionSettings(text_clean=start.cleaning[name])
        made_by = {**fingerprint_of(trunk, start.records, how), "versions": None, "data": None}
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
        cache = f"{name.replace('/', '-')}-{digest}"
        if team.leads:
            folder.mkdir(parents=True, exist_ok=True)
            extract(trunk, start.records, folder / f"{cache}_train.h5", how, progress=progress)
        team.gather(None)
        image, text = ([cache] if side in cuts else [] for side in SIDES)
        data = load_features(folder, "train", image, text, tokens=True)
        place = torch.full((len(numbers),), -1)
        place[[numbers[i] for i in data.ids]] = torch.arange(len(data))
        for kind, cut in cuts.items():
            hidden[f"{kind}/{name}"] = _rows_of(getattr(data, f"{kind}_tokens")[cache], place)
            start.model.cuts[f"{kind}/{name}"] = cut
    return hidden


def _rows_of(tokens: torch.Tensor | Ragged, place: torch.Tensor) -> Rows:
    """Rows by number -> (B, L, width), padded to the longest."""
    if isinstance(tokens, Ragged):
        return lambda rows: tokens.padded(place[rows])[0]
    return lambda rows: tokens[place[rows]]
