"""Join caches that several processes made in parts, <name>_<split>.parts, into one file each, <name>_<split>.h5."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import guarded, rows_bar
from feats.command_line.parser import ScriptParser
from feats.errors import UsageError

FOLDER = Path("saved/feats")


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = ScriptParser(
        __doc__,
        epilog="Exit status: 0 done; 2 parts are missing or damaged, or something else lies there; 130 interrupted.",
        examples=(
            "python feats/merge_feats.py saved/feats/clip_train.h5",
            "python feats/merge_feats.py saved/feats/clip_train.h5 --keep-parts",
        ),
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help=f"a cache, e.g. {FOLDER}/clip_train.h5, or the folder of its parts (default: all in {FOLDER})",
    )
    parser.add_argument("--keep-parts", action="store_true", help="leave the parts where they are")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that something else made")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: join(args), "the parts are intact, run the same command to go on")


def join(args: Namespace) -> int:
    """Join what was asked for; returns the exit status."""
    from feats.extraction.merging import merge
    from feats.parts import joined_path, parts_folder

    paths = args.paths or sorted(FOLDER.glob("*.parts"))
    if not paths:
        raise UsageError(f"there are no parts of caches in {FOLDER}; name a cache or the folder of its parts")
    for path in dict.fromkeys(map(joined_path, paths)):
        in_parts = parts_folder(path).exists()
        with rows_bar(path.stem) as progress:
            summary = merge(path, keep_parts=args.keep_parts, overwrite=args.overwrite, progress=progress)
        what = f"{summary.done} rows done, {summary.quarantined} quarantined"
        joined = f"joined in {summary.seconds:.1f} s" if in_parts else "joined before"
        print(f"{path.stem}: {what}, {joined} -> {summary.path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
