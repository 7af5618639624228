"""Test-time ablation: a trained model of two sides scored with one of them absent. Study B calls it ablation eval.

The absent side's features are those of a black picture or of an empty text, or the mean of the training rows'.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feats.errors import UsageError
from feats.source import SIDES
from modeling.choices import ABSENT
from modeling.evaluation import metrics
from modeling.experiments.experiment import Experiment, class_numbers
from modeling.experiments.measuring import split_figures
from modeling.features.joined import FeatureSet, FeatureSource, Ragged, Rows
from modeling.heads.config import ABLATIONS, ablation_words
from modeling.runs.run import Run

KINDS = (*SIDES, *(f"{side}_tokens" for side in SIDES))

Absent = Mapping[str, Mapping[str, Tensor | Ragged]]  # one row, by kind of features and cache
AbsentOf = Callable[[Sequence[str]], Absent]  # ids of training rows -> what stands in for an absent side
Figures = dict[str, dict[str, Any]]  # by `ablation_words` of what is left


def absence(
    absent: str,
    features: FeatureSet,
    source: FeatureSource,
    weights: Mapping[str, str] = {},
    device: torch.device | str = "cpu",
) -> AbsentOf:
    """What stands in for an absent side: of `blank` the same for all training rows, see `blank.blank_pair`; of `mean`
    their mean in `features`. `source` has the fingerprints and the folder of the caches.

    Raises `UsageError` as `blank_pair`, for one side alone, and for weights that nothing is encoded with."""
    if not (source.image and source.text):
        alone = "image" if source.image else "text"
        raise UsageError(
            f"`ablation_eval` leaves one of two sides out, and there is the {alone} alone; train with both"
        )
    if absent not in ABSENT:
        raise UsageError(f"unknown `absent` {absent!r}; there are {', '.join(ABSENT)}")
    if absent == "mean":
        if weights:
            raise UsageError("`weights` with `absent` mean: nothing is encoded; leave one of them out")
        return lambda ids: mean_row(features, ids)
    from modeling.prediction.blank import blank_pair  # encoders' libraries: slow to import

    pair = blank_pair(source, weights, torch.device(device))
    return lambda ids: {kind: getattr(pair, kind) for kind in KINDS}


def mean_row(features: FeatureSet, ids: Sequence[str]) -> Absent:
    """The mean of some rows' features, float32: of each position of image tokens, and of all tokens of all texts, which
    are then one."""
    rows = features.positions(ids)

    def mean(x: Tensor | Ragged) -> Tensor | Ragged:
        if isinstance(x, Tensor):
            return x[rows.to(x.device)].float().mean(0, keepdim=True)
        values = x.take(rows).values.float().mean(0, keepdim=True)
        return Ragged(values, torch.tensor([0, 1], device=values.device))

    return {kind: {name: mean(x) for name, x in getattr(features, kind).items()} for kind in KINDS}


def without(features: FeatureSet, side: str, absent: Absent) -> FeatureSet:
    """The same rows, each with the one row of `absent` in place of a side's features."""

    def repeated(x: Tensor | Ragged) -> Tensor | Ragged:
        if isinstance(x, Ragged):
            return x.take(torch.zeros(len(features), dtype=torch.int64))
        return x.expand(len(features), *x.shape[1:])

    kinds = (side, f"{side}_tokens")
    changed: dict[str, Any] = {
        kind: {name: repeated(absent[kind][name]) for name in getattr(features, kind)} for kind in kinds
    }
    return replace(features, **changed, views={} if side == "image" else features.views)


# -- scoring ----------------------------------------------------------------------------------------------------


def ablation_eval(run: Run, experiment: Experiment, absent_of: AbsentOf) -> dict[str, Figures]:
    """Figures of a run with both sides, text only and image only: on the validation rows of its splits, "val", each
    predicted by the members that weren't trained on it, as in its report; and on its test part, "test", if it has one.

    Warns of an automatic search with folds, and gives none: its members saw all rows."""
    splits = experiment.splits
    if run.stacking is not None and len(splits) > 1:
        warnings.warn(f"{run.named} was searched for on all rows after its folds: none is unseen", stacklevel=2)
        return {}
    parts = ["val", *(["test"] if len(splits) == 1 and splits[0].test else [])]
    return {part: _on_part(run, experiment, part, absent_of) for part in parts}


def with_ablation_eval(run: Run, experiment: Experiment, absent_of: AbsentOf) -> Run:
    """The same run with what is left of a side's absence in its report: `ablation_eval` of the validation rows, and
    `ablation_eval_test` where there is a test part."""
    assert run.report is not None
    figures = dict(run.report.figures)
    for part, found in ablation_eval(run, experiment, absent_of).items():
        key = "ablation_eval" if part == "val" else f"ablation_eval_{part}"
        figures[key] = {left: of_left for left, of_left in found.items() if left != ablation_words(SIDES)}
    return replace(run, report=replace(run.report, figures=figures))


def ablation_of_rows(run: Run, features: FeatureSet, absent: Absent) -> Figures:
    """As `ablation_eval`, on the labelled rows of other caches, by the whole run. Raises `UsageError` for features that
    another encoder made, labels that are no class of the run, and when no row has a label."""
    run.check(features)
    ids, tags = features.labelled()
    rows, labels = _rows(features, ids), class_numbers(tags, run.classes)
    return {
        ablation_words(left): metrics.figures(
            labels, run.probabilities(_with_sides(rows, left, lambda: absent)), run.classes, run.majority
        )
        for left in ABLATIONS
    }


def _on_part(run: Run, experiment: Experiment, part: str, absent_of: AbsentOf) -> Figures:
    features, splits = experiment.features.to("cpu"), experiment.splits
    ids = [i for split in splits for i in getattr(split, part)]
    found = {}
    for left in ABLATIONS:
        raw, calibrated = [], []
        for k, split in enumerate(splits):
            own = replace(run, members=[m for m in run.members if m.fold in (None, k + 1)])
            rows = _with_sides(_rows(features, getattr(split, part)), left, partial(absent_of, split.train))
            calibrated.append(own.probabilities(rows))
            raw.append(_uncalibrated(own, rows, calibrated[-1]))
        found[ablation_words(left)] = split_figures(
            experiment, ids, np.concatenate(raw), np.concatenate(calibrated), experiment.majority(splits[0])
        )
    return found


def _with_sides(rows: FeatureSet, left: Sequence[str], absent: Callable[[], Absent]) -> FeatureSet:
    for side in SIDES:
        if side not in left:
            rows = without(rows, side, absent())
    return rows


def _uncalibrated(run: Run, rows: FeatureSet, final: np.ndarray) -> np.ndarray:
    if run.stacking is not None:  # what stacks the members also calibrates them
        return final
    return np.asarray(np.mean([metrics.softmax(m.logits(rows)) for m in run.members], axis=0))


def _rows(features: FeatureSet, ids: Sequence[str]) -> FeatureSet:
    """Some rows in the asked order, without augmented views."""
    at = features.positions(ids)
    taken = features.only({"views": ()}).with_tensors(lambda x: x[at.to(x.device)], lambda x: x.take(at))
    hashes = (values[at.numpy()] for values in (features.image_hash, features.text_key))
    return replace(taken, rows=Rows.of(ids, features.tags_of(ids), *hashes))
