"""The encoder that made a cache, loaded again as the cache's fingerprint says. Slow to import: encoders' libraries."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from feats.acceleration import DTYPES
from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.errors import NoWeightsError, UsageError
from feats.json_files import shape_problem
from modeling.runs.run import FREE_TO_DIFFER


def encoder_of(
    name: str,
    fingerprint: Mapping[str, Any],
    weights: str | None = None,
    *,
    device: torch.device,
    tokens: bool = False,
    trainable: bool = False,
    trained_by: str = "the run",
) -> Encoder:
    """The encoder of the cache `name`, in the dtype that it computed in then (on a CPU never float16); with `trainable`
    in float32 and with gradients. `weights`: a file or folder, where its weights aren't found by themselves.

    Raises `NoWeightsError` when its weights can't be had, `UsageError` when it can't be loaded, or isn't the one that
    `fingerprint` tells of.
    """
    wrong = shape_problem(fingerprint, {"encoder": str, "model": str, "dtype": str})
    if wrong or fingerprint["dtype"] not in DTYPES:
        raise UsageError(
            f"what {trained_by} says of the encoder of {name} {wrong or 'has an unknown dtype'}; train again"
        )
    spec = ENCODERS.get(fingerprint["encoder"])
    # A fingerprint says by what pictures were resized only where that isn't PIL.
    options = {option: fingerprint[option] for option in (spec.options if spec else ()) if option in fingerprint}
    remedy = f"name the weights {trained_by} was trained with: `weights` {name}=PATH"
    try:
        encoder = load_encoder(
            fingerprint["encoder"],
            fingerprint["model"],
            weights,
            device=device,
            dtype=DTYPES["fp32"] if trainable else dtype_of(fingerprint, device),
            tokens=tokens,
            trainable=trainable,
            expected_sha256=fingerprint.get("weights_sha256"),
            **options,
        )
    except NoWeightsError as error:
        raise error.named(name) from None
    except UsageError as error:
        raise UsageError(f"the encoder of {name} can't be loaded ({error}); {remedy}") from None
    identity = json.loads(json.dumps(encoder.identity))
    differing = [key for key, value in essence(identity).items() if fingerprint.get(key) != value]
    if differing:
        facts = "; ".join(
            f"{key} {json.dumps(identity[key])}, not {json.dumps(fingerprint.get(key))}" for key in differing
        )
        raise UsageError(f"the encoder loaded for {name} isn't the one of its fingerprint ({facts}); {remedy}")
    return encoder


def check_weights(weights: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise `UsageError` where `weights` are given for caches that aren't among those in use, `names`."""
    unknown = sorted(weights.keys() - set(names))
    if unknown:
        raise UsageError(f"`weights` names {', '.join(unknown)}; the encoders in use are {', '.join(names)}")


def dtype_of(fingerprint: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """What a cache's encoder computed in; a CPU does without float16."""
    return DTYPES["fp32" if fingerprint["dtype"] == "fp16" and device.type == "cpu" else fingerprint["dtype"]]


def essence(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What of a fingerprint must be the same for features to be of one kind."""
    return {key: value for key, value in fingerprint.items() if key not in FREE_TO_DIFFER}
