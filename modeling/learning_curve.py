"""How many more labels would help: train a run's head on ever larger parts of its training rows, and tell how it goes
on from there, as far as that can be told.
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
from modeling import choices
from modeling.choices import AVERAGES
from modeling.command_line.messages import guarded, progress_bar
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_csv_option,
    add_run_options,
    chosen_runs,
    new_parser,
)
from modeling.runs.files import check_replaceable

if TYPE_CHECKING:
    from modeling.runs.run import Run


SHOWN = ("head", "what", "share", "rows", "mean", "std", "low", "high", "gain_low", "gain_high")


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/learning_curve.py --run newest",
        "python modeling/learning_curve.py --shares 0.25 0.5 1 --draws 10",
    )
    add_caches_of_run_option(parser)
    parser.add_argument("--run", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    shares = " ".join(f"{share:g}" for share in choices.SHARES)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=list(choices.SHARES),
        metavar="SHARE",
        help=f"of the training rows, 1 always among them (default: {shares})",
    )
    parser.add_argument("--draws", type=positive, default=choices.DRAWS, metavar="N", help="of each share")
    parser.add_argument("--draw-seed", type=int, default=0, metavar="SEED", help="of the draws")
    parser.add_argument("--figure", choices=AVERAGES, default=AVERAGES[0], help="what is shown")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"(default: {choices.CURVE_FILE} in the run's folder)")
    add_run_options(parser)
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "nothing was written")


def work(args: Namespace) -> int:
    """Train, show and write the curve; returns the exit status."""
    from feats.acceleration import deterministic
    from modeling.runs.run import single_split

    [run] = chosen_runs(args)
    single_split(run)
    with deterministic(any(member.config.deterministic for member in run.members)):
        return work_of(run, args)


def work_of(run: Run, args: Namespace) -> int:
    """As `work`, of a run that was read."""
    from modeling.evaluation.text_tables import format_table
    from modeling.experiments.experiment import experiment_of_run
    from modeling.search import learning_curve as curves

    out = args.out or run.folder / curves.FILE
    check_replaceable(out, curves.HEADER)
    source = replace(run.source, folder=run.feature_folder(args.feats))
    print(f"caches {source.folder}")
    experiment, configs = experiment_of_run(run, source, args.device), curves.configs_of(run)
    how = (args.shares, args.draws, args.draw_seed)
    with progress_bar("train", curves.curve_epochs(configs, experiment, *how), "epoch") as progress:
        found = curves.learning_curve(experiment, configs, *how, progress)
    rows = curves.table(found, args.figure)
    curves.write_curve(out, rows, safe=args.csv_safe)
    print(format_table(rows, SHOWN))
    print(f"\n{curves.notes(rows)}")
    print("\n".join(curves.answers(rows)))
    print(f"{args.figure} at {len(found[0].shares)} shares, {args.draws} draws of each -> {out}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
