"""Write a data set's texts as UTF-8 files <id>.txt, decoded as extraction does it and cleaned at the asked level."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from feats.cli import chosen_splits
from feats.command_line.exit_status import EXIT_DONE, EXIT_QUARANTINE
from feats.command_line.messages import guarded, rows_bar
from feats.command_line.options import add_columns_option, columns_from
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import remark
from feats.errors import UsageError
from feats.escapes import one_line
from feats.records import LAYOUTS, Record, read_dataset
from feats.text import CLEAN_LEVELS, clean
from feats.writing import write_bytes

REMEDY = "make room there and use `overwrite`, or name another folder with `out`"
SHOWN = 50  # rows that can't be read named on stderr


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = ScriptParser(
        __doc__,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 3 done without rows that can't be read under "
        "--strict; 130 interrupted.",
        examples=(
            "python feats/export_texts.py --data data",
            "python feats/export_texts.py --data data --split test --text-clean tweet",
        ),
    )
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR|FILE", help="the image-text pairs")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="how they lie on disk (default: detected)")
    add_columns_option(parser)
    parser.add_argument(
        "--split", "--splits", nargs="+", dest="splits", metavar="SPLIT", help="only these (default: all there are)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of the texts; not the data's own")
    parser.add_argument("--text-clean", choices=CLEAN_LEVELS, default="none", help="cleaning level of the texts")
    parser.add_argument("--overwrite", action="store_true", help="replace texts that are there already")
    parser.add_argument("--strict", action="store_true", help="exit with status 3 when rows can't be read")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: export(args), "some texts are written; run the same command with --overwrite")


def export(args: Namespace) -> int:
    """Write the texts, name the rows that have none; returns the exit status."""
    if args.out is None:
        raise UsageError("no folder for the texts; name one with `out`")
    data = read_dataset(args.data, args.layout, columns=columns_from(args))
    for warning in data.warnings:
        print(remark(warning), file=sys.stderr)
    splits = chosen_splits(data.splits, args.splits)
    records = [record for split in splits for record in data[split]]
    check_not_the_data(args.out, args.data, records)
    texts, unread = texts_of(records)
    check_free(args.out, texts, args.overwrite)
    with rows_bar("texts") as progress:
        write_texts(args.out, texts, args.text_clean, progress)
    if unread:
        print(f"warning: {len(unread)} of {len(records)} rows can't be read:", file=sys.stderr)
        for name, reason in list(unread.items())[:SHOWN]:
            print(f"  {one_line(name)}: {one_line(reason)}", file=sys.stderr)
        if len(unread) > SHOWN:
            print(f"  ... and {len(unread) - SHOWN} more", file=sys.stderr)
    print(f"{len(texts)} texts of {', '.join(splits)}, UTF-8, cleaning {args.text_clean} -> {args.out}")
    return EXIT_QUARANTINE if args.strict and unread else EXIT_DONE


def texts_of(records: Iterable[Record]) -> tuple[dict[str, str], dict[str, str]]:
    """Texts by their file's name relative to the folder, and why rows have none, by id."""
    texts: dict[str, str] = {}
    unread: dict[str, str] = {}
    for record in records:
        name = f"{record.id}.txt"
        place = PurePosixPath(name)
        if record.text is None:
            unread[record.id] = record.text_error
        elif place.is_absolute() or ".." in place.parts or "\\" in name or str(place) != name:
            unread[record.id] = "its id can't be the name of a file in the folder"
        else:
            texts[name] = record.text
    return texts, unread


def check_not_the_data(out: Path, data: Path, records: Iterable[Record]) -> None:
    """Raise `UsageError` for the folder of the data or of its texts: what was read stays as it is."""
    sources = {data.resolve(), data.resolve().parent} if data.is_file() else {data.resolve()}
    sources |= {
        folder.resolve()
        for folder in {record.text_path.parent for record in records if isinstance(record.text_path, Path)}
    }
    if out.resolve() in sources:
        raise UsageError(f"{out} holds the data themselves, which are left as they are; name another folder with `out`")


def check_free(out: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise `UsageError` for texts that are there already, unless they may be replaced."""
    there = [] if overwrite else [name for name in names if os.path.lexists(out / name)]
    if there:
        raise UsageError(
            f"{len(there)} of the texts are in {out} already, {there[0]} first; name another folder with `out`, or "
            "replace them with `overwrite`"
        )


def write_texts(out: Path, texts: dict[str, str], level: str, progress: Callable[[int, int], None]) -> None:
    """Write each text cleaned, exactly: nothing is added at its end. A file appears when it is whole, and replaces a
    link rather than what that leads to."""
    for done, (name, text) in enumerate(texts.items(), 1):
        write_bytes(out / name, clean(text, level).encode(), REMEDY, follow=False, durable=False)
        progress(done, len(texts))


if __name__ == "__main__":
    sys.exit(main())
