"""Rank the labels of a run's data by how suspect they are: by what its head says of rows it hasn't seen, and by
duplicates whose labels conflict.

All labelled rows, those of validation and test marked: correct labels there for the figures' sake if you must, never
tune by them. Fill in the column `corrected` and train again with --corrections.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.options import positive
from feats.errors import UsageError
from modeling.choices import FOLDS
from modeling.command_line.messages import guarded, progress_bar
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_csv_option,
    add_data_options,
    add_run_options,
    chosen_runs,
    data_place,
    new_parser,
)
from modeling.runs.files import check_replaceable

if TYPE_CHECKING:
    from feats.records import Record
    from modeling.features.joined import FeatureSource
    from modeling.runs.pairs import DataPlace


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/audit_labels.py --run newest",
        "python modeling/audit_labels.py --folds 10 --out saved/label_audit.csv",
    )
    add_caches_of_run_option(parser)
    parser.add_argument("--run", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    parser.add_argument("--folds", type=positive, default=FOLDS, metavar="K", help="folds of the training rows")
    add_data_options(parser, "the pairs, for their texts (default: where the caches say)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: label_audit.csv in the run's folder)")
    add_run_options(parser)
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "nothing was written")


def work(args: Namespace) -> int:
    """Train on folds, rank the labels and write them; returns the exit status."""
    from modeling.auditing import suspects
    from modeling.evaluation.text_tables import format_table
    from modeling.experiments.experiment import experiment_of_run
    from modeling.experiments.fitting import total_epochs
    from modeling.runs.run import single_split

    [run] = chosen_runs(args)
    single_split(run)
    out = args.out or run.folder / "label_audit.csv"
    check_replaceable(out, suspects.HEADER)
    suspects.check_unedited(out)
    source = replace(run.source, folder=run.feature_folder(args.feats))
    print(f"caches {source.folder}")
    records = pairs(source, data_place(args))
    experiment = suspects.audit_experiment(run, experiment_of_run(run, source, args.device), args.folds)
    configs = {member.config for member in run.members}
    with progress_bar("train", total_epochs(list(configs), experiment), "epoch") as progress:
        queue = suspects.audit(run, experiment, progress)
    suspects.write_queue(out, queue, records, safe=args.csv_safe)
    print(format_table(suspects.summary_rows(queue), ["rows", "n", *suspects.WHYS]))
    print(f"fill in its column corrected, then: python modeling/train_head.py ... --corrections {out}")
    n = sum(bool(row.why) for row in queue)
    print(f"{len(queue)} labels ranked, {n} of them suspect, by {len(experiment.splits)}-fold predictions -> {out}")
    return EXIT_DONE


def pairs(source: FeatureSource, place: DataPlace) -> Sequence[Record]:
    """The raw pairs that the caches were made of; none, with a warning, when they don't lie where the caches say.
    Raises `UsageError` where `place` says anything, and they can't be read so."""
    from modeling.runs.pairs import DataPlace, records_of  # slow to import

    try:
        return records_of(source, place)
    except UsageError as error:
        if place != DataPlace():
            raise
        warnings.warn(f"no texts and pictures in the queue: {error}", stacklevel=2)
        return []


if __name__ == "__main__":
    sys.exit(main())
