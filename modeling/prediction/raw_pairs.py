"""Raw image-text pairs as caches of the kinds that runs were trained on. The only part of prediction that loads
encoders: each as its cache's fingerprint says, through the ordinary extraction loop."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.records import Record, read_dataset
from modeling.runs.encoders import encoder_of, essence
from modeling.runs.run import Run

SPLIT = "raw"  # caches are <name>_raw.h5


def one_pair(image: Path | None, text: str | None, runs: Sequence[Run]) -> list[Record]:
    """The pair as a data set of one. Raises `UsageError` when a run reads a side that isn't given."""
    for run in runs:
        for side, given in (("image", image), ("text", text)):
            if run.source.of(side) and given is None:
                raise UsageError(f"{run.named} reads {', '.join(run.source.of(side))}; give `{side}`, too")
    return [Record("pair", image, text)]


def read_manifest(path: Path) -> list[Record]:
    """Every row of a manifest (CSV or JSONL), split after split where it names any. Raises `UsageError`."""
    return [record for records in read_dataset(path, "manifest").splits.values() for record in records]


def encode(
    runs: Sequence[Run],
    records: Sequence[Record],
    folder: Path,
    *,
    weights: Mapping[str, str],
    device: torch.device,
) -> None:
    """Write the caches `runs` read as `<folder>/<name>_raw.h5`. `weights` gives a cache's encoder a file or folder.

    Raises `UsageError` when an encoder can't be loaded as the fingerprint says, or runs want different ones under one
    name.
    """
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
    for name, run in wanted.items():
        fingerprint = run.source.fingerprints[name]
        tokens = fingerprint["tokens"] and any(r.source.tokens for r in runs)
        encoder = encoder_of(
            name, fingerprint, weights.get(name), device=device, tokens=tokens, trained_by=str(run.path)
        )
        if not any(name in r.source.image for r in runs):
            encoder = replace(encoder, image=None)
        if not any(name in r.source.text for r in runs):
            encoder = replace(encoder, text=None)
        settings = ExtractionSettings(
            workers=None if len(records) > 1 else 0, text_clean=fingerprint["text_clean"] or "none"
        )
        extract(encoder, records, folder / f"{name}_{SPLIT}.h5", settings)
