"""Export the training rows a run's head gets wrong when it hasn't seen them: out-of-fold predictions.

Only training rows: what is inspected, corrected or augmented must not come from validation or test rows, or their
figures stop being honest.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import feats.threads  # noqa: F401

# isort: split

import numpy as np

from feats.acceleration import resolve_device
from feats.cli import EXIT_DONE, positive
from feats.errors import UsageError
from modeling import cli as options
from modeling import experiment as ex
from modeling.evaluation import metrics
from modeling.evaluation.prediction import open_runs
from modeling.features.splits import Split, make_split
from modeling.runs.folder import Run, write_predictions


def build_parser() -> ArgumentParser:
    parser = options.new_parser(__doc__)
    parser.add_argument("--feats", type=Path, metavar="DIR", help="folder of caches (default: the run's)")
    parser.add_argument("--run", metavar="RUN", help="a path, or a name in --runs (default: the newest)")
    parser.add_argument("--folds", type=positive, default=5, metavar="K", help="folds of the training rows")
    parser.add_argument("--min-confidence", type=float, default=0.0, metavar="P", help="list rows as sure, 0 to 1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: bad_cases.csv in the run's folder)")
    options.add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return options.guarded(lambda: export(args), "nothing was written")


def export(args: Namespace) -> int:
    if not 0 <= args.min_confidence <= 1:
        raise UsageError(f"--min-confidence {args.min_confidence:g}: expected a probability, 0 to 1")
    [run] = open_runs(args.runs, [args.run] if args.run else None)
    split = single_split(run)
    experiment = ex.experiment_of_run(run, args.feats, resolve_device(args.device))
    train_ids = labelled(split.train, experiment, run.feature_folder(args.feats))
    folds = unseen_folds(train_ids, args.folds, experiment, len(split.val) / len(split.train + split.val))
    probabilities = out_of_fold(run, replace(experiment, splits=folds), train_ids)
    labels, predicted = experiment.labels(train_ids), probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]  # the surest first
    listed = wrong[confidence[wrong] >= args.min_confidence]
    out = args.out or run.path / "bad_cases.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    ids = [train_ids[k] for k in listed]
    write_predictions(out, ids, experiment.tags(ids), probabilities[listed], run.classes)
    confusion = metrics.confusion_matrix(labels, predicted, len(run.classes))
    rows = [
        {"true \\ predicted": name, **dict(zip(run.classes, counts, strict=True))}
        for name, counts in zip(run.classes, confusion.tolist(), strict=True)
    ]
    print(metrics.format_table(rows, ["true \\ predicted", *run.classes]))
    as_sure = f", {len(listed)} of them with confidence {args.min_confidence:g} or more" if args.min_confidence else ""
    print(
        f"{len(wrong)} of {len(train_ids)} training rows wrong in {len(folds)}-fold out-of-fold predictions{as_sure}, the "
        f"surest first -> {out}"
    )
    return EXIT_DONE


def single_split(run: Run) -> Split:
    """The run's split. Raises `UsageError` for a run whose parts aren't one configuration trained on one split."""
    remedy = "train with modeling/train_head.py, with --val-ratio, and name that run with --run"
    if run.stacking is not None:
        raise UsageError(
            f"{run.path} is an ensemble of --auto, whose parts were chosen on all of its training rows: none is unseen; "
            f"{remedy}"
        )
    if isinstance(run.split, list):
        raise UsageError(f"{run.path} is a cross-validation: each of its rows is validation in some fold; {remedy}")
    return run.split


def labelled(ids: Sequence[str], experiment: ex.Experiment, folder: Path) -> list[str]:
    """The ids that have a label in the caches; a warning counts the others. Raises `UsageError` when there are none."""
    kept = [name for name, tag in zip(ids, experiment.tags(ids), strict=True) if tag]
    if not kept:
        raise UsageError(
            f"none of the run's {len(ids)} training rows has a label in the caches in {folder} any more; extract again from "
            "the labelled data, or name other caches with --feats"
        )
    if len(kept) < len(ids):
        lost = len(ids) - len(kept)
        print(f"warning: {lost} of {len(ids)} training rows have no label any more: left out", file=sys.stderr)
    return kept


def unseen_folds(ids: Sequence[str], k: int, experiment: ex.Experiment, val_ratio: float) -> list[Split]:
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
        tags = experiment.tags(ids)
        if len(set(tags)) < 2:
            raise
        raise UsageError(
            f"with --folds {k} some class isn't left both to learn from and to validate by, a fold's own rows aside; "
            f"give more --folds, or leave the rarest class, {min(tags, key=tags.count)!r}, out and train again"
        ) from None


def inner_split(ids: Sequence[str], experiment: ex.Experiment, val_ratio: float) -> Split:
    tags = experiment.tags(ids)
    groups = None if experiment.group_of is None else [experiment.group_of[i] for i in ids]
    ratio = max(val_ratio, len(set(tags)) / len(tags))
    try:
        return make_split(ids, tags, ratio, seed=0, groups=groups)
    except UsageError:  # duplicates may all fall into the larger part; folds are of one size
        return experiment.folds_of(ids, round(1 / ratio))[0]


def check_every_class_parts_in_three(ids: Sequence[str], experiment: ex.Experiment) -> None:
    tags, distinct = experiment.tags(ids), defaultdict(set)
    for name, tag in zip(ids, tags, strict=True):
        distinct[tag].add(name if experiment.group_of is None else experiment.group_of[name])
    rarest = min(distinct, key=lambda tag: (len(distinct[tag]), tag))
    if len(distinct) > 1 and len(distinct[rarest]) < 3:
        raise UsageError(
            f"class {rarest!r} has {tags.count(rarest)} training row{'s' if tags.count(rarest) > 1 else ''}, expected at "
            "least 3 that are no duplicates: one to predict, one to learn from, one to validate by; add rows of it, "
            "or leave it out, and train again"
        )


def out_of_fold(run: Run, experiment: ex.Experiment, ids: Sequence[str]) -> np.ndarray:
    """Probabilities (len(ids), C) of `ids`, each by the run's configurations trained on the split that has it in its
    test part."""
    configs = list(dict.fromkeys(member.config for member in run.members))
    trained = [outcomes for _, outcomes in ex.train(configs, experiment)]
    row_of = {name: row for row, name in enumerate(ids)}
    probabilities = np.empty((len(ids), len(run.classes)))
    for split, outcomes in zip(experiment.splits, zip(*trained, strict=True), strict=True):
        of_fold = replace(run, members=[outcome.member for outcome in outcomes])
        rows = experiment.features.positions(split.test)
        probabilities[[row_of[name] for name in split.test]] = of_fold.probabilities(experiment.features, rows)
    return probabilities


if __name__ == "__main__":
    sys.exit(main())
