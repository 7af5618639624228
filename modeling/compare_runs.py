"""A leaderboard of runs from their stored predictions on validation rows: heads, ensembles, finetuned runs, those
inside sweeps too, with intervals and paired tests. Only runs on the same rows with the same labels are compared."""

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
from modeling import choices
from modeling.choices import AVERAGES, LAYOUTS
from modeling.command_line.messages import guarded
from modeling.command_line.options import RUN_HELP, add_csv_option, new_parser
from modeling.runs.files import check_replaceable, user_file

SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv"}
A_LEADERBOARD = "a leaderboard of this format"


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/compare_runs.py --by macro_f1",
        "python modeling/compare_runs.py saved/runs/sweep --out runs.md",
    )
    shown = f"{RUN_HELP}; or a folder of runs, such as a sweep (default: all in --runs)"
    parser.add_argument("run", nargs="*", metavar="RUN", help=shown)
    parser.add_argument("--runs", type=Path, default=choices.RUNS, metavar="DIR", help="folder of runs")
    parser.add_argument("--by", choices=AVERAGES, help="what ranks (default: what chose all epochs, or accuracy)")
    parser.add_argument("--against", metavar="RUN", help="test against this run (default: the best on its rows)")
    parser.add_argument("--format", choices=tuple(LAYOUTS), help="(default: by --out, or terminal)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: on the screen)")
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "nothing was written", named={})


def work(args: Namespace) -> int:
    """Read the runs, compare them, show or write the leaderboard; returns the exit status."""
    from modeling.runs.choosing import run_path
    from modeling.runs.layouts import first_line_of
    from modeling.runs.leaderboard import compare_runs

    suffix = args.out.suffix.lower() if args.out else ""
    layout = args.format or SUFFIXES.get(suffix, "terminal")
    first = first_line_of(layout)
    if args.out:
        check_replaceable(args.out, [first], what=A_LEADERBOARD)
    runs = [run_path(args.runs, name) for name in args.run] or args.runs
    against = run_path(args.runs, args.against) if args.against else None
    board = compare_runs(runs, by=args.by, against=against)
    text = board.text(layout, csv_safe=args.csv_safe) + "\n"
    if not args.out:
        print(text, end="")
    else:
        with user_file(args.out, [first], what=A_LEADERBOARD) as file:
            file.write(text if text.startswith(first) else f"{first}\n\n{text}")
        n = sum(len(group.places) for group in board.groups)
        print(f"{n} runs on {len(board.groups)} sets of rows -> {args.out}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
