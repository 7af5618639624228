"""Raw image-text pairs as caches of the kinds that runs were trained on. The only part of prediction that loads
encoders: each as its cache's fingerprint says, through the ordinary extraction loop."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from feats.encoders.base import Encoder
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.names import cache_path
from feats.records import Record, TarSlice, read_dataset
from modeling.features.cache_facts import are_complete
from modeling.features.target import RAW
from modeling.runs.encoders import encoder_of, essence
from modeling.runs.pairs import DataPlace, tuned_place
from modeling.runs.run import Run

SPLIT = RAW  # caches are <name>_raw.h5

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # title -> rows done, rows to do


def no_bar(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Shows nothing."""
    return nullcontext(lambda done, total: None)


def one_pair(image: Path | None, text: str | None, runs: Sequence[Run]) -> list[Record]:
    """The pair as a data set of one. Raises `UsageError` when a run reads a side that isn't given."""
    for run in runs:
        for side, given in (("image", image), ("text", text)):
            if run.source.of(side) and given is None:
                raise UsageError(f"{run.named} reads {', '.join(run.source.of(side))}; give `{side}`, too")
    return [Record("pair", image, text)]


def read_manifest(path: Path, columns: Mapping[str, str] = {}) -> tuple[list[Record], list[str]]:
    """Every row of a manifest (a table as `feats.records.read_dataset` takes it, with `columns`), split after split
    where it names any, and remarks. Raises `UsageError`."""
    data = read_dataset(path, "manifest", columns=columns)
    return [record for records in data.splits.values() for record in records], data.warnings


def check_pictures(runs: Sequence[Run], records: Sequence[Record]) -> None:
    """Raise `UsageError` when a run reads pictures and none of the rows has one: an encoder needn't be loaded to
    tell."""
    read = next((run for run in runs if run.source.image), None)
    if read is None or any(isinstance(r.image_path, TarSlice) or _is_there(r.image_path) for r in records):
        return
    first = records[0].image_path
    raise UsageError(
        f"{read.named} reads {', '.join(read.source.image)}, and no picture is there of "
        f"{'the one row' if len(records) == 1 else f'all {len(records)} rows'} "
        f"({'none is named' if first is None else f'{first}: no such file'}); name their files in the column image, "
        "or which column holds them with `columns` image=NAME, relative to the manifest"
    )


def _is_there(path: Path | None) -> bool:
    return path is not None and os.path.exists(path)


def encode(
    runs: Sequence[Run],
    records: Sequence[Record],
    folder: Path,
    *,
    weights: Mapping[str, str],
    device: torch.device,
    bar: Bar = no_bar,
) -> None:
    """Write the caches `runs` read as `<folder>/<name>_raw.h5`, from wherever an interrupted call left them; those of
    anything else are replaced. `weights` gives a cache's encoder a file or folder, `bar` (title) shows rows done of
    rows to do.

    Raises `UsageError` when an encoder can't be loaded as the fingerprint says, or runs want different ones under one
    name.
    """
    for name, run in wanted_caches(runs, weights).items():
        encoder = encoder_for(name, run, runs, weights.get(name), device)
        path, settings = cache_path(folder, name, SPLIT), as_trained(name, run, len(records))
        with bar(name) as progress:
            try:
                extract(encoder, records, path, settings, progress=progress)
            except UsageError:
                if not path.exists():
                    raise
                extract(encoder, records, path, settings, overwrite=True, progress=progress)


def wanted_caches(runs: Sequence[Run], weights: Mapping[str, str]) -> dict[str, Run]:
    """Each cache that any of `runs` reads, with the first run that does. Raises `UsageError` when runs want different
    ones under one name, and for `weights` of others."""
    wanted: dict[str, Run] = {}
    for run in runs:
        for name, fingerprint in run.source.fingerprints.items():
            first = wanted.setdefault(name, run)
            if essence(first.source.fingerprints[name]) != essence(fingerprint):
                raise UsageError(
                    f"{first.path} and {run.path} were trained on different caches {name}; predict with one at a time"
                )
    unknown = sorted(weights.keys() - wanted.keys())
    if unknown:
        raise UsageError(f"`weights` names {', '.join(unknown)}; the caches in use are {', '.join(wanted)}")
    return wanted


def encode_split(
    run: Run,
    split: str,
    place: DataPlace,
    *,
    device: torch.device,
    bar: Bar,
) -> None:
    """Bring a finetuned run's own caches of `split` up to date: its encoders made none while they were tuned. `place`
    is where its pairs lie, if not where they lay then; `bar` (title) shows rows done of rows to do.

    Raises `UsageError` as `read_dataset`, and when an encoder can't be loaded."""
    assert run.finetuned is not None
    folder = run.feature_folder()
    if are_complete(folder, split, run.source.names) and place.path is None:
        return
    records = place.over(tuned_place(run.finetuned)).read()[split]
    for name in run.source.names:
        encoder = encoder_for(name, run, [run], None, device)
        path = cache_path(folder, name, split)
        path.parent.mkdir(exist_ok=True)
        with bar(path.stem) as progress:
            extract(encoder, records, path, as_trained(name, run, len(records)), progress=progress)


def encoder_for(name: str, run: Run, runs: Sequence[Run], weights: str | None, device: torch.device) -> Encoder:
    """The encoder of the cache `name` of `run`, with the sides that any of `runs` reads. Raises `UsageError` when it
    can't be loaded as the cache's fingerprint says."""
    fingerprint = run.source.fingerprints[name]
    tokens = bool(fingerprint.get("tokens")) and any(r.source.tokens for r in runs)
    chosen = weights or run.encoder_weights(name)
    encoder = encoder_of(name, fingerprint, chosen, device=device, tokens=tokens, trained_by=str(run.path))
    if not any(name in r.source.image for r in runs):
        encoder = replace(encoder, image=None)
    if not any(name in r.source.text for r in runs):
        encoder = replace(encoder, text=None)
    return encoder


def as_trained(name: str, run: Run, rows: int) -> ExtractionSettings:
    """How the cache `name` of `run` was extracted, for so many rows."""
    text_clean = run.source.fingerprints[name]["text_clean"] or "none"
    return ExtractionSettings(workers=None if rows > 1 else 0, text_clean=text_clean)
