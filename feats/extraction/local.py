"""The one extraction loop, and the one set of command-line arguments, that all extraction scripts share.

A data set is cut into blocks of rows. Worker processes read, decode and tokenise ahead; the main process runs the
encoder; a writer thread puts finished blocks into the store. A block is the unit of everything: its texts are sorted
by length together, its rows are written together, and a run that was killed computes the block it was in anew, with
the same batches, so that it ends with the same bytes.
"""

import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import feats.threads  # noqa: F401

# isort: split

import numpy as np
import torch
from tqdm import tqdm

from feats import store as st
from feats.acceleration import DTYPES, compiled, compiling_pays, dtype_name, resolve_device, resolve_dtype
from feats.cli import EXIT_DONE, EXIT_INTERRUPTED, EXIT_QUARANTINE, EXIT_UNUSABLE, HelpFormatter, positive
from feats.encoders.registry import ENCODERS, Encoder, ImageSide, TextSide, load_encoder
from feats.errors import UsageError
from feats.extraction.preparation import (
    Images,
    Job,
    Preparation,
    Texts,
    blank_pixels,
    hash_of_text,
    picture_changed,
    prepare,
)
from feats.images import AUGMENTATION
from feats.interrupts import interruptible
from feats.records import LAYOUTS, DataSet, Record, read_dataset
from feats.store import DONE, QUARANTINED, CacheError, FeatureStore
from feats.text import CLEAN_LEVELS, clean

BLOCK_BATCHES = 8  # batches per block: sorting by length wants many texts, losing little on a kill wants few
VERSIONS = ("torch", "torchvision", "transformers", "clip-anytorch", "pillow", "ftfy", "h5py", "numpy")


# -- command line ----------------------------------------------------------------------------------------------


def extraction_parser(name: str, description: str | None) -> ArgumentParser:
    """The arguments of the script that runs encoder `name`: the shared ones, then the encoder's own."""
    spec = ENCODERS[name]
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
    encoder.add_argument("--model", help=_default_shown(spec.model_help, spec.default_model))
    encoder.add_argument("--weights", metavar="PATH", help="a local file or folder (default: see the README)")
    encoder.add_argument("--tokens", action="store_true", help="also cache token and patch level features")
    encoder.add_argument("--text-clean", choices=CLEAN_LEVELS, default=spec.text_clean, help="cleaning level of texts")
    encoder.add_argument("--views", type=positive, metavar="K", help="also cache K augmented views of each picture")
    encoder.add_argument("--views-seed", type=int, default=0, metavar="SEED", help="seed of the augmentation")
    for option, keywords in spec.options.items():
        encoder.add_argument(f"--{option}", **keywords)
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
        choices=("auto", *DTYPES),
        default="auto",
        help=f"auto: {spec.auto_dtype or 'fp16 on a GPU, bf16 on a CPU that multiplies it in hardware, else fp32'}",
    )
    return parser


def _default_shown(text: str, default: str | None) -> str:
    return f"{text} (default: {default})" if default else text


@interruptible(signal.SIGINT, signal.SIGTERM)
def run(name: str, args: Namespace) -> int:
    """Extract every asked split with encoder `name`; returns the exit status. All of a script's output is here."""
    try:
        return _extract(name, args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; use a smaller --batch-size (what was done is kept)", file=sys.stderr)
        return EXIT_UNUSABLE
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        print(
            "error: a decoding process died, for want of memory or shared memory as a rule; use fewer --workers or a "
            "smaller --batch-size (what was done is kept)",
            file=sys.stderr,
        )
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        print("interrupted: the cache is intact, run the same command to go on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _extract(name: str, args: Namespace) -> int:
    spec = ENCODERS[name]
    if not args.name or Path(args.name).name != args.name:
        raise UsageError(f"--name {args.name!r} can't be a file's name; give letters, digits, - and _")
    device = resolve_device(args.device)
    dtype = resolve_dtype(spec.auto_dtype if args.dtype == "auto" and spec.auto_dtype else args.dtype, device)
    data = read_dataset(args.data, args.layout)
    for warning in data.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    splits = _chosen_splits(data, args.splits)
    options = {option: getattr(args, option) for option in spec.options}
    encoder = load_encoder(name, args.model, args.weights, device=device, dtype=dtype, tokens=args.tokens, **options)
    settings = Settings(
        device=device,
        dtype=dtype,
        batch_size=args.batch_size,
        workers=default_workers() if args.workers is None else max(0, args.workers),
        text_clean=args.text_clean,
        tokens=args.tokens,
        views=args.views or 0,
        views_seed=args.views_seed,
    )
    quarantined = 0
    for split in splits:
        path = args.out / f"{args.name}_{split}.h5"
        records = data.splits[split][: args.limit]
        summary = extract(encoder, records, path, settings, overwrite=args.overwrite)
        print(summary)
        quarantined += summary.quarantined
    return EXIT_QUARANTINE if args.strict and quarantined else EXIT_DONE


def _chosen_splits(data: DataSet, wanted: Sequence[str] | None) -> list[str]:
    unknown = set(wanted or ()) - data.splits.keys()
    if unknown:
        raise UsageError(f"no split {', '.join(sorted(unknown))} in the data; it has {', '.join(data.splits)}")
    return [split for split in data.splits if not wanted or split in wanted]


def default_batch_size(device: torch.device, encoder: Encoder) -> int:
    """On a CPU, maps of convolutional nets stay in the cache in small batches: EfficientNet-Lite runs a fifth faster
    in 16s than in 64s; a transformer's products want the larger."""
    if device.type == "cuda":
        return 256
    return 16 if encoder.image and encoder.image.channels_last else 64


def default_workers() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# -- extraction ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to extract. `batch_size` None is the cache's own, or the default; `views` augmented views per image."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int | None = None
    workers: int = 2
    text_clean: str = "none"
    tokens: bool = False
    views: int = 0
    views_seed: int = 0


@dataclass
class Summary:
    """What one run did to one cache. `done` and `quarantined` count the cache's rows, the others this run's."""

    path: Path
    done: int = 0
    quarantined: int = 0
    encoded: int = 0
    truncated: int = 0
    relabelled: int = 0
    encodings: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.done} rows done", f"{self.quarantined} quarantined", f"{self.truncated} texts truncated"]
        if self.encodings:
            parts.append("text encodings " + ", ".join(f"{k} {n}" for k, n in self.encodings.most_common()))
        if self.relabelled:
            parts.append(f"{self.relabelled} labels brought up to date")
        rate = f", {self.encoded / self.seconds:.1f} rows/s" if self.encoded else ""
        parts.append(f"{self.encoded} encoded now in {self.seconds:.1f} s{rate}")
        lines = f"{self.path.stem}: {'; '.join(parts)} -> {self.path}"
        if self.quarantined:
            lines += f" (reasons: {st.quarantine_path(self.path)})"
        return lines


def extract(
    encoder: Encoder, records: Sequence[Record], path: Path, settings: Settings, *, overwrite: bool = False
) -> Summary:
    """Bring the cache at `path` to hold the features of `records`; what it already holds isn't computed again.

    Rows in quarantine are tried again. Raises `CacheError` when the cache there was made by anything else (the
    differing parts of both fingerprints are shown) or the rows' contents changed since.
    """
    start = time.perf_counter()
    with torch.inference_mode(), _open_store(encoder, records, path, settings, overwrite) as store:
        summary = Summary(path, relabelled=store.update_tags([r.label or "" for r in records]))
        if encoder.text:
            summary.encodings.update(r.encoding for r in records if r.encoding)
        blocks = _unfinished_blocks(store)
        settings = replace(settings, batch_size=_planned_batch_size(store, settings.batch_size))
        if store.plan["compiled"] and blocks:
            fast, why_not = compiled(encoder.image.forward, _blank_batch(encoder.image, settings))
            if fast is None:
                raise CacheError(f"{path} was begun with a compiled forward pass, which fails here ({why_not})")
            # In a copy: the next split decides for itself.
            encoder = replace(encoder, image=replace(encoder.image, forward=fast))
        before = int((store.status == DONE).sum())
        total = sum(len(rows) for rows in blocks)
        with (
            tqdm(total=total, desc=path.stem, unit="row", disable=not total) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            writing = None
            for result in _encode_blocks(encoder, records, store, blocks, settings, bar):
                if writing is not None:
                    writing.result()
                writing = writer.submit(store.write, result.rows, result.status, result.arrays, result.reasons)
            if writing is not None:
                writing.result()
        store.finish()
        summary.done = int((store.status == DONE).sum())
        summary.quarantined = int((store.status == QUARANTINED).sum())
        summary.encoded = max(0, summary.done - before)
        summary.truncated = int(store.facts("truncated").sum()) if encoder.text else 0
    summary.seconds = time.perf_counter() - start
    return summary


def _open_store(
    encoder: Encoder, records: Sequence[Record], path: Path, settings: Settings, overwrite: bool
) -> FeatureStore:
    fingerprint = _fingerprint(encoder, records, settings)
    if path.exists() and not overwrite:
        store = FeatureStore.append(path)
        try:
            _check_same(store, fingerprint, encoder, records)
        except BaseException:
            store.close()
            raise
        return store
    settings = replace(settings, batch_size=settings.batch_size or default_batch_size(settings.device, encoder))
    features, pays = _probe(encoder, settings, len(records))
    counts = None
    if "text_tokens" in features:
        texts = [clean(r.text or "", settings.text_clean) for r in records]
        counts = np.array([t.length for t in encoder.text.tokenize(texts)], np.int64)
    block_rows = 1 << (settings.batch_size * BLOCK_BATCHES - 1).bit_length()
    return FeatureStore.create(
        path,
        [r.id for r in records],
        [r.label or "" for r in records],
        fingerprint,
        features,
        block_rows=block_rows,
        token_counts=counts,
        plan={"batch_size": settings.batch_size, "compiled": pays},
        overwrite=overwrite,
    )


def _fingerprint(encoder: Encoder, records: Sequence[Record], settings: Settings) -> dict[str, Any]:
    """Everything that decides the features' values. Rows' contents are compared one by one instead: see `_check_same`."""
    views = {"count": settings.views, "seed": settings.views_seed, **AUGMENTATION}
    return {
        **encoder.identity,
        "text_clean": settings.text_clean if encoder.text else None,
        "tokens": settings.tokens,
        "views": views if encoder.image and settings.views else None,
        "dtype": dtype_name(settings.dtype),
        "data": {"rows": len(records), "ids_sha256": st.ids_digest([r.id for r in records])},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_same(store: FeatureStore, fingerprint: dict[str, Any], encoder: Encoder, records: Sequence[Record]) -> None:
    """Refuse a cache of anything else. Done rows must hold the same contents as then (pictures are read again only
    where they are newer than the cache); rows that aren't done may have changed: that is how a file is repaired."""
    difference = st.fingerprint_difference(store.fingerprint, json.loads(json.dumps(fingerprint)))
    if difference:
        raise CacheError(
            f"{store.path} was made by something else ({difference}); choose another --name, or replace it with "
            "--overwrite"
        )
    done = np.flatnonzero(store.status == DONE)
    changed: dict[str, str] = {}
    if encoder.text:
        hashes = store.facts("text_hash")
        changed |= {records[i].id: "text" for i in done if hash_of_text(records[i]) != hashes[i]}
    if encoder.image:
        hashes, sizes = store.facts("image_hash"), store.facts("image_bytes")
        since = store.path.stat().st_mtime
        changed |= {records[i].id: "picture" for i in done if picture_changed(records[i], sizes[i], hashes[i], since)}
    if changed:
        some = ", ".join(f"{i} ({what})" for i, what in list(changed.items())[:5])
        raise CacheError(
            f"{len(changed)} of {len(store)} rows hold other content than when {store.path} was made: {some}; "
            "choose another --name, or replace it with --overwrite"
        )


def _probe(encoder: Encoder, settings: Settings, rows: int) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shapes of one row's features, measured on a dummy row, and whether compiling the image side pays."""
    shapes: dict[str, tuple[int, ...]] = {}
    pays = False
    if encoder.image:
        pixels = to_pixels(blank_pixels(encoder.image)[None], encoder.image, settings)
        out = encoder.image.forward(pixels)
        shapes["image_feats"] = tuple(out["feats"].shape[1:])
        if settings.views:
            shapes["image_views"] = (settings.views, *shapes["image_feats"])
        if settings.tokens:
            shapes["image_tokens"] = tuple(out["tokens"].shape[1:])
        if compiling_pays(encoder.image.forward, pixels, rows * (1 + settings.views)):
            fast, why_not = compiled(encoder.image.forward, _blank_batch(encoder.image, settings))
            pays = fast is not None
            if why_not:
                print(f"warning: the forward pass isn't compiled, which costs some speed ({why_not})", file=sys.stderr)
    if encoder.text:
        out = encoder.text.forward([t.ids for t in encoder.text.tokenize(["a"])])
        shapes["text_feats"] = tuple(out["feats"].shape[1:])
        if settings.tokens:
            shapes["text_tokens"] = tuple(out["tokens"].shape[2:])
    return shapes, pays


def _blank_batch(side: ImageSide, settings: Settings) -> torch.Tensor:
    blank = blank_pixels(side)
    return to_pixels(blank.expand(settings.batch_size, *blank.shape), side, settings)


def _planned_batch_size(store: FeatureStore, asked: int | None) -> int:
    """The batch size the cache was begun with: another may round features differently."""
    planned = store.plan["batch_size"]
    if asked and asked != planned and not store.complete:
        print(
            f"warning: {store.path} was begun with batches of {planned}; with {asked} its features may differ in "
            "their last bit from those of an undisturbed run",
            file=sys.stderr,
        )
    return asked or planned


def _unfinished_blocks(store: FeatureStore) -> list[np.ndarray]:
    """Row numbers to work on, block by block: whole blocks where any row is pending, then the quarantined rest."""
    starts = range(0, len(store), store.block_rows)
    blocks = [np.arange(low, min(low + store.block_rows, len(store))) for low in starts]
    pending = [rows for rows in blocks if (store.status[rows] == st.PENDING).any()]
    visited = np.zeros(len(store), bool)
    for rows in pending:
        visited[rows] = True
    retried = np.flatnonzero((store.status == QUARANTINED) & ~visited)
    return pending + list(st.pieces(retried, store.block_rows))


@dataclass
class Block:
    """A finished block, as `FeatureStore.write` takes it."""

    rows: np.ndarray
    status: np.ndarray
    arrays: dict[str, np.ndarray]
    reasons: dict[str, str]


def _encode_blocks(
    encoder: Encoder,
    records: Sequence[Record],
    store: FeatureStore,
    blocks: list[np.ndarray],
    settings: Settings,
    bar: tqdm,
) -> Iterator[Block]:
    """Encode block by block, while workers prepare what comes next."""
    size = settings.batch_size
    jobs = []
    for rows in blocks:
        if encoder.text:
            jobs.append(Job("texts", rows))
        if encoder.image:
            jobs += [Job("images", rows[low : low + size]) for low in range(0, len(rows), size)]
    dataset = Preparation(encoder, records, jobs, settings.text_clean, settings.views, settings.views_seed)
    prepared = prepare(dataset, settings.workers, pin_memory=settings.device.type == "cuda")
    for rows in blocks:
        arrays: dict[str, np.ndarray] = {}
        reasons: dict[int, str] = {}
        if encoder.text:
            room = store.token_counts()[rows] if settings.tokens else None
            arrays |= _encode_texts(encoder.text, next(prepared), room, settings, reasons)
        if encoder.image:
            batches = islice(prepared, -(-len(rows) // size))
            arrays |= _encode_images(encoder.image, batches, store, settings, reasons, bar)
        else:
            bar.update(len(rows))
        for name, values in arrays.items():
            if values.dtype == np.float16 and name != "text_tokens":
                _note_overflow(~np.isfinite(values.reshape(len(rows), -1)).all(1), reasons, settings)
        status = np.full(len(rows), DONE, np.uint8)
        status[list(reasons)] = QUARANTINED
        yield Block(rows, status, arrays, {records[rows[k]].id: reason for k, reason in sorted(reasons.items())})
    prepared.close()  # here an interruption can be raised, in a finalizer it can't


def _encode_texts(
    side: TextSide, texts: Texts, room: np.ndarray | None, settings: Settings, reasons: dict[int, str]
) -> dict[str, np.ndarray]:
    """Features and facts of a block's texts, in its order. Batches are sorted by length, to pad little.

    `room` (R,): with `--tokens`, how many tokens the store has place for.
    """
    reasons |= texts.reasons
    lengths = np.array([t.length for t in texts.tokens], np.int32)
    order = np.argsort(lengths, kind="stable")
    feats: torch.Tensor | None = None
    tokens = [np.empty(0)] * len(order)
    for low in range(0, len(order), settings.batch_size):
        chosen = order[low : low + settings.batch_size]
        out = side.forward([texts.tokens[k].ids for k in chosen])
        if feats is None:
            feats = out["feats"].new_empty(len(order), *out["feats"].shape[1:], dtype=torch.float16)
        feats[torch.from_numpy(chosen)] = out["feats"].to(torch.float16)
        if room is not None:
            for k, states in zip(chosen, out["tokens"].to(torch.float16).cpu().numpy()):
                tokens[k] = states[: lengths[k]]
    arrays = {
        "text_feats": feats.cpu().numpy(),
        "n_tokens": lengths,
        "truncated": np.array([t.truncated for t in texts.tokens], np.uint8),
        "text_hash": texts.hashes,
        "text_key": texts.keys,
    }
    if room is not None:
        _note_overflow(np.array([not np.isfinite(t).all() for t in tokens]), reasons, settings)
        for k in np.flatnonzero(lengths != room):
            tokens[k] = np.full((room[k], *tokens[k].shape[1:]), np.nan, np.float16)
            reasons[int(k)] = f"{lengths[k]} tokens now, {room[k]} when the cache was made; use --overwrite"
        arrays["text_tokens"] = np.concatenate(tokens)
    return arrays


def _encode_images(
    side: ImageSide,
    batches: Iterator[Images],
    store: FeatureStore,
    settings: Settings,
    reasons: dict[int, str],
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Features and facts of a block's pictures. Results stay on the device until the block's end, so that the GPU
    never waits for the host. A compiled forward gets batches of full size only."""
    pad = store.plan["compiled"]
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in store.features if name.startswith("image_")}
    hashes, sizes = [], []
    start = 0
    for batch in batches:
        count, views = batch.pixels.shape[:2]
        for k, reason in batch.reasons.items():
            reasons[start + k] = "; ".join(filter(None, (reasons.get(start + k), reason)))
        if len(batch.reasons) < count:
            outs = []
            for view in range(views):
                pixels = batch.pixels[:, view]
                if pad and count < settings.batch_size:
                    pixels = torch.cat([pixels, pixels.new_zeros(settings.batch_size - count, *pixels.shape[1:])])
                out = side.forward(to_pixels(pixels, side, settings))
                outs.append({name: value[:count].to(torch.float16) for name, value in out.items()})
            kept["image_feats"].append(outs[0]["feats"])
            if settings.tokens:
                kept["image_tokens"].append(outs[0]["tokens"])
            if settings.views:
                kept["image_views"].append(torch.stack([out["feats"] for out in outs[1:]], 1))
        else:  # nothing to see
            for name, values in kept.items():
                shape = (count, *store.features[name])
                values.append(torch.full(shape, torch.nan, dtype=torch.float16, device=settings.device))
        hashes.append(batch.hashes)
        sizes.append(batch.sizes)
        start += count
        bar.update(count)
    return {
        **{name: torch.cat(values).cpu().numpy() for name, values in kept.items()},
        "image_hash": np.concatenate(hashes),
        "image_bytes": np.concatenate(sizes),
    }


def to_pixels(pixels: torch.Tensor, side: ImageSide, settings: Settings) -> torch.Tensor:
    """uint8 (B, H, W, 3) on the host -> normalised (B, 3, H, W) on the device, in the compute dtype.

    In fp32 the same operations as torchvision's ToTensor and Normalize.
    """
    x = pixels.to(settings.device, non_blocking=True).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last if side.channels_last else torch.contiguous_format)
    mean, std = (_per_channel(tuple(values), settings.device) for values in (side.mean, side.std))
    return x.to(torch.float32).div_(255).sub_(mean).div_(std).to(settings.dtype)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) on the device; made once, since each such copy would make the host wait for the GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _note_overflow(rows: np.ndarray, reasons: dict[int, str], settings: Settings) -> None:
    for k in np.flatnonzero(rows):
        reasons.setdefault(int(k), f"features beyond float16's range, computed in {dtype_name(settings.dtype)}")
