"""Print what is in feature caches: schema, counts, fingerprint, quarantined rows with reasons, of those in parts which
parts are missing; --verify reads all."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from feats.command_line.exit_status import EXIT_DONE, EXIT_UNUSABLE
from feats.command_line.messages import guarded
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import error_line
from feats.errors import UsageError
from feats.escapes import few

if TYPE_CHECKING:
    from feats.cache_reader import CacheReader
    from feats.parts import PartedStore


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = ScriptParser(
        __doc__,
        epilog="Exit status: 0 all well; 2 a file is no cache, is damaged, or (--verify) holds a damaged chunk.",
        examples=(
            "python feats/inspect_feats.py saved/feats/clip_train.h5",
            "python feats/inspect_feats.py saved/feats/clip_train.h5 --verify",
        ),
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="caches, e.g. saved/feats/clip_train.h5, or folders of parts",
    )
    parser.add_argument("--verify", action="store_true", help="read every chunk and check checksums and values")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: inspect_all(args), "nothing was changed")


def inspect_all(args: Namespace) -> int:
    """Print what is in each cache; returns the exit status."""
    from feats.parts import open_cache

    sound = True
    for path in args.files:
        try:
            with open_cache(path) as store:
                print(overview(store))
                if args.verify:
                    problems = store.verify()
                    for problem in problems:
                        print(error_line(f"{path}: {problem}"), file=sys.stderr)
                    print(f"  verify: {f'{len(problems)} problems' if problems else 'every chunk is sound'}")
                    sound &= not problems
        except UsageError as error:
            print(error_line(error), file=sys.stderr)
            sound = False
    return EXIT_DONE if sound else EXIT_UNUSABLE


def overview(store: CacheReader) -> str:
    """A few lines that say what the cache holds."""
    from feats.cache_reader import QUARANTINED, STATUS_NAMES
    from feats.parts import PartedStore

    parts = [parts_overview(store)] if isinstance(store, PartedStore) else []
    if isinstance(store, PartedStore) and store.missing:
        told = {"features": store.features, **store.plan, **store.shared.fingerprint}
        return "\n".join([*parts, "  plan:", *(f"    {key}: {value}" for key, value in told.items())])
    counts = Counter(store.status.tolist())
    states = ", ".join(f"{counts[status]} {name}" for status, name in STATUS_NAMES.items() if counts[status])
    labels = ", ".join(f"{tag or '(none)'} {n}" for tag, n in Counter(store.tags.tolist()).most_common())
    lines = [f"{store.path}: {len(store)} rows ({states}), {'complete' if store.complete else 'INCOMPLETE'}"]
    lines.append(f"  labels: {labels}")
    lines += [f"  {name:<12} {shape!s:<18} {dtype}" for name, (shape, dtype) in sorted(store.schema.items())]
    lines.append("  fingerprint:")
    lines += [f"    {key}: {value}" for key, value in store.fingerprint.items()]
    counted = store.parameters
    if counted is not None:
        lines.append(f"  encoder's parameters: {', '.join(f'{side} {n:,}' for side, n in counted.items())}")
    source = store.source
    if source is not None:
        lines.append(f"  source: {source.data} ({source.resolved}), layout {source.layout}, split {source.split}")
        for side, paths in (("picture", source.images), ("text", source.texts)):
            files = [path for path in paths if path]
            if files:
                lines.append(f"    {len(files)} {side} files, the first {files[0]}")
    if counts[QUARANTINED]:
        lines.append("  quarantine:")
        rows = store.ids[store.status == QUARANTINED]
        lines += [f"    {row}: {store.reasons.get(row, '(reason not recorded)')}" for row in rows]
    return "\n".join([*parts, *lines])


def parts_overview(store: PartedStore) -> str:
    """A line on a cache's parts: how many there are, which are missing, and which of those somebody makes."""
    from feats.parts import part_path

    parts = len(store.shared.pieces)
    line = f"{store.path}: in {parts} parts, split {store.shared.split}"
    if store.missing:
        held = [number for number in store.missing if part_path(store.path, number).with_suffix(".lease").is_file()]
        line += f", INCOMPLETE: {len(store.missing)} missing ({few(store.missing, 10)})"
        line += f", of which {len(held)} in work ({few(held, 10)})" if held else ", none of them in work"
    return line


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    sys.exit(main())
