"""List all runs, those inside sweeps and comparisons too: age, kind, head, caches, validation figure and folder."""

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
from feats.errors import UsageError
from modeling import choices
from modeling.command_line.messages import guarded
from modeling.command_line.options import new_parser


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(__doc__, "python modeling/list_runs.py", "python modeling/list_runs.py --sort score")
    parser.add_argument("--runs", type=Path, default=choices.RUNS, metavar="DIR", help="folder of runs")
    parser.add_argument(
        "--sort", choices=("age", "score"), default="age", help="newest first, or highest validation figure first"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "nothing was written", named={})


def work(args: Namespace) -> int:
    """Show the runs; returns the exit status."""
    from modeling.runs.entries import find_entries
    from modeling.runs.layouts import runs_table
    from modeling.runs.listing import warn_of

    entries, bad = find_entries(args.runs)
    warn_of(bad)
    if not entries:
        raise UsageError(f"no complete run in {args.runs}; train one with: python modeling/train_head.py")
    if args.sort == "score":
        entries.sort(key=lambda entry: -entry.score(entry.monitor))
    print(runs_table(entries, [str(entry.path.relative_to(args.runs)) for entry in entries]))
    print(f"\n{len(entries)} runs; on the same rows they are compared by compare_runs.py")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
