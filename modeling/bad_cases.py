"""Export the training rows a run's head gets wrong when it hasn't seen them: out-of-fold predictions.

Only training rows: what is inspected, corrected or augmented must not come from validation or test rows, or their
figures stop being honest.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import feats.threads  # noqa: F401

# isort: split


from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.options import positive
from feats.csv_files import write_rows
from feats.errors import UsageError
from modeling.choices import FOLDS
from modeling.command_line.messages import guarded, progress_bar
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_csv_option,
    add_run_options,
    chosen_runs,
    new_parser,
)
from modeling.runs.files import check_replaceable, user_file

if TYPE_CHECKING:
    from modeling.runs.run import Run


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/bad_cases.py --run newest",
        "python modeling/bad_cases.py --min-confidence 0.9 --out saved/bad_cases.csv",
    )
    add_caches_of_run_option(parser)
    parser.add_argument("--run", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    parser.add_argument("--folds", type=positive, default=FOLDS, metavar="K", help="folds of the training rows")
    parser.add_argument("--min-confidence", type=float, default=0.0, metavar="P", help="list rows as sure, 0 to 1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: bad_cases.csv in the run's folder)")
    add_run_options(parser)
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: export(args), "nothing was written")


def export(args: Namespace) -> int:
    """Train on folds of the training rows and write those predicted wrong; returns the exit status."""
    from feats.acceleration import deterministic

    if not 0 <= args.min_confidence <= 1:
        raise UsageError(f"--min-confidence {args.min_confidence:g}: expected a probability, 0 to 1")
    [run] = chosen_runs(args)
    with deterministic(any(member.config.deterministic for member in run.members)):
        return export_of(run, args)


def export_of(run: Run, args: Namespace) -> int:
    """As `export`, of a run that was read."""
    import numpy as np

    from modeling.evaluation.metrics import confusion_matrix
    from modeling.evaluation.text_tables import confusion_text
    from modeling.experiments.experiment import experiment_of_run
    from modeling.experiments.fitting import total_epochs
    from modeling.prediction.out_of_fold import labelled, out_of_fold, unseen_folds
    from modeling.runs.config import PREDICTION_COLUMNS
    from modeling.runs.folder import prediction_rows
    from modeling.runs.run import single_split

    split = single_split(run)
    out = args.out or run.folder / "bad_cases.csv"
    check_replaceable(out, PREDICTION_COLUMNS)
    source = replace(run.source, folder=run.feature_folder(args.feats))
    print(f"caches {source.folder}")
    experiment = experiment_of_run(run, source, args.device)
    train_ids = labelled(split.train, experiment, source.folder)
    folds = unseen_folds(train_ids, args.folds, experiment, len(split.val) / (len(split.train) + len(split.val)))
    experiment = replace(experiment, splits=folds)
    configs = list(dict.fromkeys(member.config for member in run.members))
    with progress_bar("train", total_epochs(configs, experiment), "epoch") as progress:
        probabilities = out_of_fold(run, experiment, train_ids, progress)
    labels, predicted = experiment.labels(train_ids), probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]  # the surest first
    listed = wrong[confidence[wrong] >= args.min_confidence]
    ids = [train_ids[k] for k in listed]
    tags = experiment.features.tags_of(ids)
    with user_file(out, PREDICTION_COLUMNS) as file:
        write_rows(file, prediction_rows(ids, tags, probabilities[listed], run.classes), safe=args.csv_safe)
    confusion = confusion_matrix(labels, predicted, len(run.classes))
    print(f"confusion, {len(train_ids)} training rows, each by a head that hasn't seen it")
    print(confusion_text(confusion.tolist(), run.classes))
    as_sure = f", {len(listed)} of them with confidence {args.min_confidence:g} or more" if args.min_confidence else ""
    print(
        f"{len(wrong)} of {len(train_ids)} training rows wrong in {len(folds)}-fold out-of-fold predictions{as_sure}, "
        f"the surest first -> {out}"
    )
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
