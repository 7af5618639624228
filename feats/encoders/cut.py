"""The part of an encoder below a cut, as an encoder of its own: stage 1 runs it once and caches what it gives."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from feats.encoders.base import Encoder, Features, ImageSide, TextSide, masked_mean
from feats.errors import UsageError


def lower_part(encoder: Encoder, cuts: Mapping[str, int], *, autocast: torch.dtype | None = None) -> Encoder:
    """What lies below the cuts as an encoder: for each side named in `cuts` ("image", "text") its token vectors are
    what enters block k of the side's `blocks`, (B, L, width), and its features a placeholder, their mean, (B, width)
    float32. `extract` makes a cache of them: image_tokens (N, L, width), text_tokens ragged.

    It shares the encoder's weights and computes without gradients, in `autocast` where given (on the encoder's
    device), which its fingerprint then says. Sides that aren't cut are left out. Raises `UsageError` for a side that
    the encoder hasn't or that isn't in blocks, for a block that isn't there, and where nothing is cut.
    """
    if not cuts or cuts.keys() - {"image", "text"}:
        raise UsageError(f"cuts are of the sides {list(cuts)}; expected image, text or both")
    image = _below_image(encoder, cuts["image"], autocast) if "image" in cuts else None
    text = _below_text(encoder, cuts["text"], autocast) if "text" in cuts else None
    return replace(
        encoder,
        identity={**encoder.identity, "cut": dict(cuts)},
        loading=replace(encoder.loading, tokens=True, trainable=False, dtype=autocast or encoder.dtype),
        image=image,
        text=text,
    )


def _below_image(encoder: Encoder, k: int, autocast: torch.dtype | None) -> ImageSide:
    side = encoder.image_side()
    below = _below(encoder, "image", side, k, autocast)

    def forward(pixels: torch.Tensor) -> Features:
        hidden = below(pixels)
        return {"feats": hidden.float().mean(1), "tokens": hidden}

    return replace(side, forward=forward, network=None, blocks=None)


def _below_text(encoder: Encoder, k: int, autocast: torch.dtype | None) -> TextSide:
    side = encoder.text_side()
    below = _below(encoder, "text", side, k, autocast)

    def forward(ids: list[Any]) -> Features:
        hidden = below(ids)
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]  # (B, L)
        return {"feats": masked_mean(hidden.float(), mask.to(hidden.device)), "tokens": hidden}

    return replace(side, forward=forward, network=None, blocks=None)


def _below(
    encoder: Encoder, name: str, side: ImageSide | TextSide, k: int, autocast: torch.dtype | None
) -> Callable[[Any], torch.Tensor]:
    """The side's inputs -> what enters block k. Raises as `lower_part`."""
    blocks = side.blocks
    called = f"the {name} side of encoder {encoder.identity.get('encoder')}"
    if blocks is None:
        raise UsageError(f"{called} isn't made of blocks, so it can't be cut; leave it whole or choose another encoder")
    if not 0 <= k <= len(blocks.modules):
        raise UsageError(f"{called} has {len(blocks.modules)} blocks: it is cut at 0 to {len(blocks.modules)}, not {k}")

    def below(inputs: Any) -> torch.Tensor:
        # Extraction runs in inference mode, whose tensors can't be trained on: a network may keep some for later, as
        # autocast keeps weights that it has cast.
        casting = torch.autocast(encoder.device.type, autocast, cache_enabled=False) if autocast else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), casting:
            return blocks.below(inputs, k)

    return below
