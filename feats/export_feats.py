"""Write feature caches as Parquet, or as NumPy matrices in the folders that clip-retrieval reads."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import guarded, rows_bar
from feats.command_line.options import positive
from feats.command_line.parser import ScriptParser
from feats.errors import UsageError

FILE_ROWS = 1_000_000


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = ScriptParser(
        __doc__,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 130 interrupted.",
        examples=(
            "python feats/export_feats.py saved/feats/clip_train.h5",
            "python feats/export_feats.py saved/feats/clip_train.h5 --format npy --out export",
        ),
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="caches, e.g. saved/feats/clip_train.h5")
    parser.add_argument(
        "--format",
        choices=("parquet", "npy"),
        default="parquet",
        help="parquet: <cache>.parquet with everything; npy: the folder <cache>/ with img_emb, text_emb and metadata",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of what is written")
    parser.add_argument(
        "--file-rows", type=positive, default=FILE_ROWS, metavar="N", help="npy: rows of one matrix at most"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was exported before")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: export(args), "nothing unfinished is left; run the same command again")


def export(args: Namespace) -> int:
    """Write each cache; returns the exit status."""
    from feats.exchange.npy_folders import write_npy
    from feats.exchange.parquet_files import write_parquet
    from feats.parts import joined_path, open_cache

    if args.out is None:
        raise UsageError("no folder for the features; name one with `out`")
    for file in args.files:
        name = joined_path(file).stem
        with open_cache(file) as store, rows_bar(name) as progress:
            if not store.complete:
                raise UsageError(f"{store.path} is incomplete; finish it with the command that made it")
            if args.format == "parquet":
                place = args.out / f"{name}.parquet"
                rows = write_parquet(store, place, overwrite=args.overwrite, progress=progress)
            else:
                place = args.out / name
                rows = write_npy(store, place, file_rows=args.file_rows, overwrite=args.overwrite, progress=progress)
            absent = len(store) - rows
        told = {"parquet": "there without features", "npy": "left out"}[args.format]
        print(f"{name}: {rows} rows{f', {absent} in quarantine {told}' if absent else ''} -> {place}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
