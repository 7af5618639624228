"""Export the training rows a run's head gets wrong when it hasn't seen them: out-of-fold predictions.

Only training rows: what is inspected, corrected or augmented must not come from validation or test rows, or their
figures stop being honest.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import feats.threads  # noqa: F401

# isort: split

import numpy as np

from feats.acceleration import resolve_device
from feats.arguments import EXIT_DONE, positive
from feats.errors import UsageError
from modeling import experiment as ex
from modeling import metrics, options
from modeling.runs import DEFAULT_FOLDER, load_run, newest_run, write_predictions
from modeling.splits import Split


def build_parser() -> ArgumentParser:
    parser = options.new_parser(__doc__)
    parser.add_argument("--feats", type=Path, help="folder of caches (default: the run's)")
    parser.add_argument("--runs", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="folder of runs")
    parser.add_argument("--run", type=Path, help="the run (default: the newest)")
    parser.add_argument("--folds", type=positive, default=5, metavar="K", help="folds of the training rows")
    parser.add_argument("--min-confidence", type=float, default=0.0, metavar="P", help="only rows as surely wrong")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: bad_cases.csv in the run's folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return options.guarded(lambda: export(args), "nothing was written")


def export(args: Namespace) -> int:
    run = load_run(args.run or newest_run(args.runs))
    if run.stacking is not None:
        raise UsageError(f"{run.path} is an ensemble of --auto; name a run of train_head.py or of a sweep with --run")
    train_ids = training_rows(run.split)
    experiment = ex.experiment_of_run(run, args.feats, resolve_device(args.device))
    folds = experiment.folds_of(train_ids, args.folds)
    experiment = replace(experiment, splits=folds)
    seen = dict.fromkeys(m.config for m in run.members)  # members of other folds have the same configuration
    found = {split_id: [] for split in folds for split_id in split.val}
    for _, outcomes in ex.train(list(seen), experiment):
        for outcome in outcomes:
            for name, row in zip(outcome.split.val, outcome.calibrated, strict=True):
                found[name].append(row)
    probabilities = np.array([np.mean(found[name], axis=0) for name in train_ids])
    labels, predicted = experiment.labels(train_ids), probabilities.argmax(1)
    wrong = np.flatnonzero((predicted != labels) & (probabilities.max(1) >= args.min_confidence))
    wrong = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]  # the surest first
    out = args.out or run.path / "bad_cases.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    ids = [train_ids[k] for k in wrong]
    write_predictions(out, ids, experiment.tags(ids), probabilities[wrong], run.classes)
    confusion = metrics.confusion_matrix(labels, predicted, len(run.classes))
    rows = [
        {"true \\ predicted": name, **dict(zip(run.classes, counts, strict=True))}
        for name, counts in zip(run.classes, confusion.tolist(), strict=True)
    ]
    print(metrics.format_table(rows, ["true \\ predicted", *run.classes]))
    print(
        f"{len(wrong)} of {len(train_ids)} training rows wrong in {len(folds)}-fold out-of-fold predictions, the surest "
        f"first -> {out}"
    )
    return EXIT_DONE


def training_rows(split: Split | list[Split]) -> list[str]:
    """The rows a run was trained on. Raises `UsageError` for a run of folds, whose every row is validation once."""
    if isinstance(split, list):
        raise UsageError(
            "this run is a cross-validation: each of its rows is validation in some fold; train one with --val-ratio"
        )
    return split.train


if __name__ == "__main__":
    sys.exit(main())
