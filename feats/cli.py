"""The command line of every encoder's script. Nothing heavy is imported before it is needed: `--help` is quick."""

from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feats.command_line.commands import extraction_script, offline_commands
from feats.command_line.exit_status import EXIT_DONE, EXIT_QUARANTINE
from feats.command_line.messages import guarded, refuse_without_weights, rows_bar
from feats.command_line.options import add_columns_option, amount, columns_from, data_place, positive
from feats.command_line.parser import ScriptParser
from feats.errors import NoWeightsError, UsageError
from feats.extraction.settings import ExtractionSettings
from feats.names import checked_name

if TYPE_CHECKING:
    from feats.extraction.job import Job
    from feats.extraction.shared import Share, Worker


def extraction_parser(name: str, description: str | None) -> ArgumentParser:
    """The arguments of the script that runs encoder `name`: the shared ones, and the encoder's own."""
    parser = ScriptParser(
        description,
        epilog="Exit status: 0 done; 2 unusable arguments or input; 3 done with rows in quarantine under --strict; "
        "130 interrupted (the cache is intact: run the same command to go on).",
        examples=(
            f"python feats/{name}_extract_feats.py --data data",
            f"python feats/{name}_extract_feats.py --data pairs.csv --splits test --out saved/feats",
        ),
    )
    _add_data_options(parser.add_argument_group("data"))
    _add_cache_options(parser.add_argument_group("cache"), name)
    _add_encoder_options(parser.add_argument_group("encoder"), name)
    _add_compute_options(parser.add_argument_group("compute"), name)
    _add_shared_options(parser.add_argument_group("several processes (torchrun, SLURM; each runs the same command)"))
    _add_ray_options(parser.add_argument_group("a Ray cluster (the extra ray)"))
    parser.fill_in(partial(_of_encoder, name))
    return parser


def _add_data_options(group: _ArgumentGroup) -> None:
    from feats.records import LAYOUTS

    group.add_argument(
        "--data", type=data_place, default=Path("data"), metavar="DIR|FILE|URL", help="the image-text pairs"
    )
    group.add_argument("--layout", choices=tuple(LAYOUTS), help="how they lie on disk (default: detected)")
    add_columns_option(group)
    group.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these splits (default: all there are)")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each split")
    group.add_argument(
        "--stream",
        action="store_true",
        help="read them piece by piece: a shard at a time, or some rows of a manifest (what a URL in --data implies)",
    )


def _add_cache_options(group: _ArgumentGroup, name: str) -> None:
    group.add_argument("--out", type=Path, default=Path("saved/feats"), metavar="DIR", help="the folder of caches")
    group.add_argument("--name", default=name, help="the cache's name: <name>_<split>.h5, --vtype/--ttype later")
    group.add_argument("--overwrite", action="store_true", help="replace a cache that something else made")
    group.add_argument("--strict", action="store_true", help="exit with status 3 when rows are in quarantine")


def _add_encoder_options(group: _ArgumentGroup, name: str) -> None:
    from feats.encoders.registry import ENCODERS
    from feats.text import CLEAN_LEVELS

    spec = ENCODERS[name]

    def if_of_use(useful: object, text: str) -> str:
        """Help of an option; an encoder that has no use for it refuses it, and shows none."""
        return text if useful else SUPPRESS

    model = f"{spec.model_help} (default: {spec.default_model})" if spec.default_model else spec.model_help
    group.add_argument("--model", help=if_of_use(spec.model_help, model))
    group.add_argument(
        "--weights",
        metavar="PATH",
        help=if_of_use(spec.takes_weights, "a local file or folder, or a finetuned run (default: see the README)"),
    )
    group.add_argument(
        "--tokens", action="store_true", help=if_of_use(spec.tokens, "also cache token and patch level features")
    )
    level = f"cleaning level of texts (default: {spec.text_clean}, or a finetuned encoder's own)"
    group.add_argument("--text-clean", choices=CLEAN_LEVELS, help=if_of_use("text" in spec.sides, level))
    group.add_argument(
        "--views",
        type=positive,
        metavar="K",
        help=if_of_use("image" in spec.sides, "also cache K augmented views of each picture"),
    )
    group.add_argument(
        "--views-seed",
        type=int,
        default=ExtractionSettings().views_seed,
        metavar="SEED",
        help=if_of_use("image" in spec.sides, "seed of the augmentation"),
    )
    for key, option in spec.options.items():
        group.add_argument(
            f"--{option.flag or key.replace('_', '-')}",
            dest=key,
            type=type(option.default),
            default=SUPPRESS,  # one that wasn't typed: a saved encoder has its own
            choices=option.choices or None,
            metavar=option.metavar,
            help=f"{option.help} (default: {option.default})",
        )


def _add_compute_options(group: _ArgumentGroup, name: str) -> None:
    from feats.encoders.registry import ENCODERS

    auto = ENCODERS[name].auto_dtype or "fp16 on a GPU, bf16 on a CPU that multiplies it in hardware, else fp32"
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="B",
        help="(default: 256 on a GPU; on a CPU 64, or 16 for convolutional nets)",
    )
    group.add_argument(
        "--workers", type=int, metavar="W", help="decoding processes (default: one per core, 16 at most)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help=f"auto: {auto}")


def _add_shared_options(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--parts", action="store_true", help="work by parts even if alone: others may join by the same command"
    )
    group.add_argument(
        "--piece-rows",
        type=positive,
        metavar="N",
        help="rows of a part, rounded up to whole blocks (default: 4 parts per process, 32768 rows at most)",
    )
    group.add_argument(
        "--lease-seconds",
        type=positive,
        default=60,
        metavar="S",
        help="whose lease on a part isn't renewed for so long counts as dead",
    )
    group.add_argument("--no-join", action="store_true", help="leave the parts as they are: merge_feats.py joins them")


def _add_ray_options(group: _ArgumentGroup) -> None:
    group.add_argument("--engine", choices=("ray",), help="have workers on a Ray cluster make the cache")
    group.add_argument("--address", help="the cluster's (default: RAY_ADDRESS, else one on this machine)")
    group.add_argument(
        "--ray-workers", type=positive, metavar="N", help="(default: as many as the cluster has room for now)"
    )
    group.add_argument("--gpus-per-worker", type=amount, default=0.0, metavar="G", help="0.5: two share one")
    group.add_argument(
        "--cpus-per-worker", type=amount, default=1.0, metavar="C", help="the thread of the encoder included"
    )


def _of_encoder(name: str, args: Namespace) -> dict[str, Any]:
    """An encoder's own settings, where none are given; one of `weights` may be a saved encoder, which has others."""
    from feats.encoders.registry import ENCODERS

    spec = ENCODERS[name]
    options = {key: option.default for key, option in spec.options.items()}
    return {} if args.weights else {"model": spec.default_model, "text_clean": spec.text_clean, **options}


def run(name: str, parser: ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Extract every asked split with encoder `name`; returns the exit status. All of a script's output is here."""
    args = parser.parse_args(argv)
    return guarded(lambda: _extracted(name, args), "the cache is intact, run the same command to go on")


def _extracted(name: str, args: Namespace) -> int:
    try:
        return _extract(name, args)
    except NoWeightsError as error:
        script, others = extraction_script(name), offline_commands(name, args.given)
        return refuse_without_weights(error, script, args.given, others)


def _extract(name: str, args: Namespace) -> int:
    from feats.extraction.shared import Worker

    worker = Worker.here()
    job = _job(name, args, worker)
    encoder = None if args.engine else job.load(worker)
    data = job.open(encoder)
    quarantined = 0
    for split in chosen_splits(data, args.splits):
        title = job.path(split).stem
        if worker.world > 1:
            title += f" ({worker.rank} of {worker.world})"
        with rows_bar(title) as progress:
            summary = (
                job.run(encoder, data[split], worker, progress)
                if encoder is not None
                else _on_ray(job, split, args, progress)
            )
        print(summary)
        quarantined += summary.quarantined
    return EXIT_QUARANTINE if args.strict and quarantined else EXIT_DONE


def _job(name: str, args: Namespace, worker: "Worker") -> "Job":
    from feats.encoders.registry import ENCODERS
    from feats.extraction.job import Job
    from feats.extraction.shared import time_in
    from feats.reading.shards import is_pattern

    for side, option in (("image", "views"), ("text", "text_clean")):
        if getattr(args, option) is not None and side not in ENCODERS[name].sides:
            raise UsageError(f"{name} encodes no {side}s; leave out `{option}`")
    options = {option: getattr(args, option) for option in ENCODERS[name].options if hasattr(args, option)}
    stream = args.stream or isinstance(args.data, str) or is_pattern(args.data)
    by_parts = bool(worker.world > 1 or args.parts or args.piece_rows or args.no_join or args.engine or stream)
    return Job(
        encoder={
            "name": name,
            "model": args.model,
            "weights": args.weights,
            "dtype": args.dtype,
            "tokens": args.tokens,
            **options,
        },
        data=args.data,
        folder=args.out,
        name=checked_name(args.name, "name"),
        layout=args.layout,
        columns=columns_from(args),
        limit=args.limit,
        stream=stream,
        device=args.device,
        settings=ExtractionSettings(
            batch_size=args.batch_size,
            workers=args.workers,
            text_clean=args.text_clean,
            views=args.views or 0,
            views_seed=args.views_seed,
        ),
        overwrite=args.overwrite,
        by_parts=by_parts,
        piece_rows=args.piece_rows,
        lease_seconds=args.lease_seconds,
        since=time_in(args.out) if by_parts and args.overwrite else None,
        join=not args.no_join,
    )


def _on_ray(job: "Job", split: str, args: Namespace, progress: Callable[[int, int], None]) -> "Share":
    from feats.extraction.ray_engine import RaySettings, work_on_ray

    cluster = RaySettings(args.address, args.ray_workers, args.gpus_per_worker, args.cpus_per_worker)
    return work_on_ray(partial(job.help, split), job.path(split), cluster, progress)


def chosen_splits(splits: Collection[str], wanted: Sequence[str] | None) -> list[str]:
    """Those of the splits that are wanted, all without. Raises `UsageError` for those there aren't."""
    unknown = set(wanted or ()).difference(splits)
    if unknown:
        raise UsageError(f"no split {', '.join(sorted(unknown))} in the data; it has {', '.join(splits)}")
    return [split for split in splits if not wanted or split in wanted]
