"""Predictions of training rows by heads that haven't seen them: what may be inspected, corrected or augmented without
spoiling the figures on validation and test rows."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from feats.errors import UsageError
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import Progress, train_all
from modeling.features.dealing import deal_split
from modeling.features.stored_splits import Split
from modeling.runs.run import Run


def labelled(ids: Sequence[str], experiment: Experiment, folder: Path) -> list[str]:
    """The ids that have a label in the caches; a warning counts the others. Raises `UsageError` when there are none."""
    kept = [name for name, tag in zip(ids, experiment.features.tags_of(ids), strict=True) if tag]
    if not kept:
        raise UsageError(
            f"none of the run's {len(ids)} training rows has a label in the caches in {folder} any more; extract again "
            "from the labelled data, or name other caches with `feats`"
        )
    if len(kept) < len(ids):
        lost = len(ids) - len(kept)
        warnings.warn(f"{lost} of {len(ids)} training rows have no label any more: left out", stacklevel=2)
    return kept


def unseen_folds(ids: Sequence[str], k: int, experiment: Experiment, val_ratio: float) -> list[Split]:
    """k splits: each row in the test part of exactly one. The validation part, which chooses temperature and epoch, is
    `val_ratio` of the other rows (more where that can't hold every class): a fold that did the choosing would not be
    unseen. Raises `UsageError` for a class too rare to be in all three parts."""
    check_every_class_parts_in_three(ids, experiment)
    try:
        return [
            replace(inner_split(fold.train, experiment, val_ratio), test=fold.val)
            for fold in experiment.folds_of(ids, k)
        ]
    except UsageError:
        counts = experiment.features.tags_of(ids).counts()
        if len(counts) < 2:
            raise
        raise UsageError(
            f"with `folds` {k} some class isn't left both to learn from and to validate by, a fold's own rows "
            f"aside; give more `folds`, or leave the rarest class, {min(counts, key=counts.__getitem__)!r}, out and "
            "train again"
        ) from None


def inner_split(ids: Sequence[str], experiment: Experiment, val_ratio: float) -> Split:
    """A training and a validation part of `ids`: `val_ratio` of them, or more where that can't hold every class."""
    tags = experiment.features.tags_of(ids)
    ratio = max(val_ratio, len(tags.counts()) / len(tags))
    try:
        return deal_split(ids, tags, ratio, seed=0, groups=experiment.groups(ids))
    except UsageError:  # duplicates may all fall into the larger part; folds are of one size
        return experiment.folds_of(ids, round(1 / ratio))[0]


def check_every_class_parts_in_three(ids: Sequence[str], experiment: Experiment) -> None:
    """Raise `UsageError` for a class of fewer than three rows that are no duplicates."""
    tags, distinct = experiment.features.tags_of(ids), defaultdict(set)
    for name, tag in zip(ids, tags, strict=True):
        distinct[tag].add(name if experiment.group_of is None else experiment.group_of[name])
    rarest = min(distinct, key=lambda tag: (len(distinct[tag]), tag))
    if len(distinct) > 1 and len(distinct[rarest]) < 3:
        raise UsageError(
            f"class {rarest!r} has {tags.count(rarest)} training row{'s' if tags.count(rarest) > 1 else ''}, expected "
            "at least 3 that are no duplicates: one to predict, one to learn from, one to validate by; add rows of "
            "it, or leave it out, and train again"
        )


def out_of_fold(
    run: Run, experiment: Experiment, ids: Sequence[str], progress: Progress = lambda epochs: None
) -> np.ndarray:
    """Probabilities (len(ids), C) of `ids`, each by the run's configurations trained on the split that has it in its
    test part."""
    return of_folds(trained_folds(run, experiment, progress), experiment, ids)


def trained_folds(run: Run, experiment: Experiment, progress: Progress = lambda epochs: None) -> list[Run]:
    """The run's configurations trained on each split of the experiment."""
    configs = list(dict.fromkeys(member.config for member in run.members))
    trained = [outcomes for _, outcomes in train_all(configs, experiment, progress)]
    return [
        replace(run, members=[outcome.member for outcome in outcomes], split=split)
        for split, outcomes in zip(experiment.splits, zip(*trained, strict=True), strict=True)
    ]


def of_folds(runs: Sequence[Run], experiment: Experiment, ids: Sequence[str]) -> np.ndarray:
    """Probabilities (len(ids), C) of `ids`, each by that of `runs` which has it in the test part of its split."""
    row_of = {name: row for row, name in enumerate(ids)}
    probabilities = np.empty((len(ids), len(runs[0].classes)))
    for run in runs:
        [split] = run.splits
        rows = experiment.features.positions(split.test)
        probabilities[[row_of[name] for name in split.test]] = run.probabilities(experiment.features, rows)
    return probabilities


def of_held_out(runs: Sequence[Run], experiment: Experiment, ids: Sequence[str]) -> np.ndarray:
    """Probabilities (len(ids), C) of rows in no part of the splits of `runs`: their mean. A row with a duplicate among
    the rows of these splits is predicted by those only that have it in their test part."""
    groups: Mapping[str, int] = experiment.group_of or {}
    features = experiment.features
    mean = np.mean([run.probabilities(features, features.positions(ids)) for run in runs], axis=0)
    for run in runs:
        tested = {groups[name] for split in run.splits for name in split.test if name in groups}
        twins = [row for row, name in enumerate(ids) if groups.get(name) in tested]
        if twins:
            mean[twins] = run.probabilities(features, features.positions([ids[row] for row in twins]))
    return np.asarray(mean)
