"""Write a run's report: one page that opens from disk, with every figure as SVG and PNG beside it. It reads the run's
folder and caches; pictures and texts come from the raw pairs, where they are still there."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.options import positive
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from modeling.choices import NEWEST
from modeling.command_line.messages import OPTION_OF, command_line, guarded
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_data_options,
    add_run_options,
    add_weights_option,
    chosen_runs,
    data_place,
    named_texts,
    new_parser,
)


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/make_report.py --run best",
        "python modeling/make_report.py --sweep saved/runs/sweep --explain 3",
    )
    parser.add_argument("--run", default=NEWEST, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="also compare the heads of a sweep's folder")
    add_caches_of_run_option(parser)
    add_data_options(parser, "the pairs, for texts and pictures (default: where the caches say)")
    parser.add_argument(
        "--learning-curve", action="store_true", help="also train on shares of the training rows, which takes minutes"
    )
    parser.add_argument("--explain", type=positive, metavar="N", help="also explain N validation pairs")
    add_weights_option(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="figures go beside it (default: report.html in the run's folder)"
    )
    add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args, command_line(argv)), "nothing was written")


def work(args: Namespace, command: str) -> int:
    """Find the run, write its report; returns the exit status."""
    from modeling.report.making import ReportSettings, make_report  # matplotlib, jinja2: slow to import
    from modeling.report.page import PAGE, check_page

    path = chosen_runs(args)[0].folder
    if args.out is not None and args.out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"`out` {args.out}: expected a name that ends in .html")
    check_page(args.out or path / PAGE)
    print(f"run {path}")
    settings = ReportSettings(
        feats=args.feats,
        data=data_place(args),
        sweep=args.sweep,
        learning_curve=args.learning_curve,
        explain=args.explain or 0,
        weights=named_texts(args.weights, "--weights"),
        device=args.device,
    )
    print(as_typed("\n".join(make_report(path, args.out, settings, command).lines()), OPTION_OF))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
