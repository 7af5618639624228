"""Raw image-text pairs as caches of the kinds that runs were trained on. The only part of prediction that loads
encoders: each as its cache's fingerprint says, through the ordinary extraction loop."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from feats.acceleration import DTYPES
from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.records import Record, read_dataset
from modeling.runs.run import FREE_TO_DIFFER, Run

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
            if _essence(first.source.fingerprints[name]) != _essence(fingerprint):
                raise UsageError(
                    f"{first.path} and {run.path} were trained on different caches {name}; predict with one at a time"
                )
    unknown = sorted(weights.keys() - wanted.keys())
    if unknown:
        raise UsageError(f"`weights` names {', '.join(unknown)}; the caches in use are {', '.join(wanted)}")
    for name, run in wanted.items():
        fingerprint = run.source.fingerprints[name]
        dtype = DTYPES["fp32" if fingerprint["dtype"] == "fp16" and device.type == "cpu" else fingerprint["dtype"]]
        tokens = fingerprint["tokens"] and any(r.source.tokens for r in runs)
        encoder = _load(name, run, weights.get(name), device, dtype, tokens)
        if not any(name in r.source.image for r in runs):
            encoder = replace(encoder, image=None)
        if not any(name in r.source.text for r in runs):
            encoder = replace(encoder, text=None)
        settings = ExtractionSettings(
            workers=None if len(records) > 1 else 0, text_clean=fingerprint["text_clean"] or "none"
        )
        extract(encoder, records, folder / f"{name}_{SPLIT}.h5", settings)


def _load(name: str, run: Run, weights: str | None, device: torch.device, dtype: torch.dtype, tokens: bool) -> Encoder:
    fingerprint = run.source.fingerprints[name]
    spec = ENCODERS.get(fingerprint["encoder"])
    options = {option: fingerprint[option] for option in (spec.options if spec else ())}
    remedy = f"name the weights {run.path} was trained with: `weights` {name}=PATH"
    try:
        encoder = load_encoder(
            fingerprint["encoder"],
            fingerprint["model"],
            weights,
            device=device,
            dtype=dtype,
            tokens=tokens,
            expected_sha256=fingerprint.get("weights_sha256"),
            **options,
        )
    except UsageError as error:
        raise UsageError(f"the encoder of {name} can't be loaded ({error}); {remedy}") from None
    identity = json.loads(json.dumps(encoder.identity))
    differing = [key for key, value in _essence(identity).items() if fingerprint.get(key) != value]
    if differing:
        facts = "; ".join(
            f"{key} {json.dumps(identity[key])}, not {json.dumps(fingerprint.get(key))}" for key in differing
        )
        raise UsageError(f"the encoder loaded for {name} isn't the one of its fingerprint ({facts}); {remedy}")
    return encoder


def _essence(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fingerprint.items() if key not in FREE_TO_DIFFER}
