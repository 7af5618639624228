"""The command lines of stage 1, and what those of stage 2 share with them: exit status, help, argument types, messages.

The only module of this stage that knows argparse, stderr and the progress bar. It imports nothing heavy before it needs
it, so that `--help` is quick.
"""

import re
import signal
import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feats.errors import UsageError
from feats.extraction.settings import ExtractionSettings
from feats.interrupts import interruptible

if TYPE_CHECKING:
    from feats.records import DataSet

EXIT_DONE, EXIT_UNUSABLE, EXIT_QUARANTINE, EXIT_INTERRUPTED = 0, 2, 3, 130


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither None and False nor those that the text tells already."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, False, SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse shows it: "invalid positive integer value: '0'"


def as_typed(message: object, named: Mapping[str, str] = {}) -> str:
    """A library's message in the words of a command line: settings, which it names in backquotes, become options.

    "give a larger `val_ratio`" -> "give a larger --val-ratio". `named` maps settings to options of other names.
    """
    return re.sub(r"`(\w+)`", lambda match: "--" + named.get(match[1], match[1]).replace("_", "-"), str(message))


def show_warning(named: Mapping[str, str] = {}) -> Callable[..., None]:
    """What to set `warnings.showwarning` to: this project's warnings are lines of stderr, others stay as they are."""
    usual = warnings.showwarning
    home = Path(__file__).parents[1]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if category is UserWarning and Path(filename).parent.is_relative_to(home):
            print(f"warning: {as_typed(message, named)}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, *rest)

    return show


# -- extraction --------------------------------------------------------------------------------------------------


def extraction_parser(name: str, description: str | None) -> ArgumentParser:
    """The arguments of the script that runs encoder `name`: the shared ones, then the encoder's own."""
    from feats.encoders.registry import ENCODERS
    from feats.records import LAYOUTS
    from feats.text import CLEAN_LEVELS

    spec = ENCODERS[name]
    defaults = ExtractionSettings()
    parser = ArgumentParser(
        description=description,
        formatter_class=HelpFormatter,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 3 done with rows in quarantine under --strict; "
        "130 interrupted (the cache is intact: run the same command to go on).",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, default=Path("data"), metavar="DIR|FILE", help="the image-text pairs")
    data.add_argument("--layout", choices=tuple(LAYOUTS), help="how they lie on disk (default: detected)")
    data.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all there are)")
    data.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each split")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--out", type=Path, default=Path("saved/feats"), metavar="DIR", help="the folder of caches")
    cache.add_argument("--name", default=name, help="the cache's name: <name>_<split>.h5, --vtype/--ttype later")
    cache.add_argument("--overwrite", action="store_true", help="replace a cache that something else made")
    cache.add_argument("--strict", action="store_true", help="exit with status 3 when rows are in quarantine")
    encoder = parser.add_argument_group("encoder")
    shown = f"{spec.model_help} (default: {spec.default_model})" if spec.default_model else spec.model_help
    encoder.add_argument("--model", help=shown)
    encoder.add_argument(
        "--weights", metavar="PATH", help="a local file or folder, or a finetuned run (default: see the README)"
    )
    encoder.add_argument("--tokens", action="store_true", help="also cache token and patch level features")
    encoder.add_argument(
        "--text-clean",
        choices=CLEAN_LEVELS,
        help=f"cleaning level of texts (default: {spec.text_clean}, or a finetuned encoder's own)",
    )
    encoder.add_argument("--views", type=positive, metavar="K", help="also cache K augmented views of each picture")
    encoder.add_argument(
        "--views-seed", type=int, default=defaults.views_seed, metavar="SEED", help="seed of the augmentation"
    )
    for key, option in spec.options.items():
        encoder.add_argument(
            f"--{key.replace('_', '-')}",
            type=type(option.default),
            default=SUPPRESS,  # one that wasn't typed: a saved encoder has its own
            choices=option.choices or None,
            metavar=option.metavar,
            help=f"{option.help} (default: {option.default})",
        )
    compute = parser.add_argument_group("compute")
    compute.add_argument(
        "--batch-size",
        type=positive,
        metavar="B",
        help="(default: 256 on a GPU; on a CPU 64, or 16 for convolutional nets)",
    )
    compute.add_argument(
        "--workers", type=int, metavar="W", help="decoding processes (default: one per core, 16 at most)"
    )
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compute.add_argument(
        "--dtype",
        choices=("auto", "fp16", "bf16", "fp32"),
        default="auto",
        help=f"auto: {spec.auto_dtype or 'fp16 on a GPU, bf16 on a CPU that multiplies it in hardware, else fp32'}",
    )
    return parser


@interruptible(signal.SIGINT, signal.SIGTERM)
def run(name: str, parser: ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Extract every asked split with encoder `name`; returns the exit status. All of a script's output is here."""
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning()
        try:
            return _extract(name, args)
        except UsageError as error:
            print(f"error: {as_typed(error)}", file=sys.stderr)
            return EXIT_UNUSABLE
        except RuntimeError as error:
            said = _resources_spent(error)
            if said is None:
                raise
            print(f"error: {said} (what was done is kept)", file=sys.stderr)
            return EXIT_UNUSABLE
        except KeyboardInterrupt:
            print("interrupted: the cache is intact, run the same command to go on", file=sys.stderr)
            return EXIT_INTERRUPTED


def _extract(name: str, args: Namespace) -> int:
    from feats.acceleration import resolve_device
    from feats.encoders.registry import ENCODERS, load_encoder
    from feats.extraction.local import extract
    from feats.records import read_dataset

    if not args.name or Path(args.name).name != args.name:
        raise UsageError(f"`name` {args.name!r} can't be a file's name; give letters, digits, - and _")
    device = resolve_device(args.device)
    data = read_dataset(args.data, args.layout)
    for warning in data.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    splits = _chosen_splits(data, args.splits)
    encoder = load_encoder(
        name,
        args.model,
        args.weights,
        device=device,
        dtype=args.dtype,
        tokens=args.tokens,
        **{option: getattr(args, option) for option in ENCODERS[name].options if hasattr(args, option)},
    )
    settings = ExtractionSettings(
        batch_size=args.batch_size,
        workers=args.workers,
        text_clean=args.text_clean,
        views=args.views or 0,
        views_seed=args.views_seed,
    )
    quarantined = 0
    for split in splits:
        path = args.out / f"{args.name}_{split}.h5"
        with rows_bar(path.stem) as progress:
            summary = extract(
                encoder, data[split][: args.limit], path, settings, overwrite=args.overwrite, progress=progress
            )
        print(summary)
        quarantined += summary.quarantined
    return EXIT_QUARANTINE if args.strict and quarantined else EXIT_DONE


def _chosen_splits(data: "DataSet", wanted: Sequence[str] | None) -> list[str]:
    unknown = set(wanted or ()) - data.splits.keys()
    if unknown:
        raise UsageError(f"no split {', '.join(sorted(unknown))} in the data; it has {', '.join(data.splits)}")
    return [split for split in data.splits if not wanted or split in wanted]


@contextmanager
def rows_bar(title: str, *, passing: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A callback that shows rows done of rows to do as a bar, from when it is first called. A `passing` bar is for
    terminals only, and leaves nothing there."""
    from tqdm import tqdm

    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=title, unit="row", leave=not passing, disable=None if passing else False)
        bar.update(min(done, total) - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def _resources_spent(error: RuntimeError) -> str | None:
    """What to say where the machine is too small for the settings; None for an error of another kind."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; use a smaller --batch-size"
    if str(error).startswith("DataLoader worker"):
        return (
            "a decoding process died, for want of memory or shared memory as a rule; use fewer --workers or a smaller "
            "--batch-size"
        )
    return None
