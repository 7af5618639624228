"""Make a feature cache of another program's features: Parquet, or NumPy matrices as clip-retrieval writes them."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from feats.command_line.exit_status import EXIT_DONE, EXIT_QUARANTINE
from feats.command_line.messages import guarded, rows_bar
from feats.command_line.parser import ScriptParser
from feats.errors import UsageError
from feats.names import cache_path, checked_name

if TYPE_CHECKING:
    from feats.exchange.foreign import Columns, Foreign


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = ScriptParser(
        __doc__,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 3 done with rows in quarantine under --strict; "
        "130 interrupted.",
        examples=(
            "python feats/import_feats.py mine.parquet --name mine --split train",
            "python feats/import_feats.py mine.parquet --name mine --split train --label category",
        ),
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="Parquet files, a folder of them, or one with img_emb/ ..."
    )
    parser.add_argument("--out", type=Path, default=Path("saved/feats"), metavar="DIR", help="the folder of caches")
    parser.add_argument("--name", default="imported", help="the cache's name: <name>_<split>.h5, --vtype/--ttype later")
    parser.add_argument("--split", default="train", help="which split the rows are")
    parser.add_argument("--id", metavar="COLUMN", help="the column of ids (default: id, uid, key or image_path)")
    parser.add_argument("--label", metavar="COLUMN", help="the column of labels (default: label, where there is one)")
    parser.add_argument("--image", metavar="COLUMN", help="Parquet: the column of pictures' features, lists of floats")
    parser.add_argument("--text", metavar="COLUMN", help="Parquet: the column of texts' features, lists of floats")
    parser.add_argument(
        "--model", help="what made the features, for the fingerprint (default: what the file says, else unknown)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there")
    parser.add_argument("--strict", action="store_true", help="exit with status 3 when rows are in quarantine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: bring_in_all(args), "no cache was made; run the same command again")


def bring_in_all(args: Namespace) -> int:
    """Make the cache; returns the exit status."""
    from feats.exchange.foreign import Columns, bring_in

    path = cache_path(args.out, checked_name(args.name, "name"), args.split)
    foreign = opened(args.paths, Columns(args.id, args.label, args.image, args.text))
    with rows_bar(path.stem) as progress:
        summary = bring_in(foreign, path, model=args.model, overwrite=args.overwrite, progress=progress)
    print(summary)
    return EXIT_QUARANTINE if args.strict and summary.quarantined else EXIT_DONE


def opened(paths: Sequence[Path], columns: "Columns") -> "Foreign":
    """What lies at `paths`. Raises `UsageError` when it is nothing of a known format."""
    from feats.exchange.npy_folders import is_npy_folder, read_npy
    from feats.exchange.parquet_files import read_parquet

    if len(paths) == 1 and is_npy_folder(paths[0]):
        if columns.image or columns.text:
            raise UsageError(f"{paths[0]} holds matrices; `image` and `text` name columns of Parquet files")
        return read_npy(paths[0], columns)
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            inside = [entry for entry in sorted(path.glob("*/")) if is_npy_folder(entry)]
            meant = f"; give {', or '.join(map(str, inside))}" if inside else ""
            raise UsageError(f"{path} is no Parquet file, nor a folder with some or with img_emb/ and text_emb/{meant}")
        files += found
    return read_parquet(files, columns)


if __name__ == "__main__":
    sys.exit(main())
