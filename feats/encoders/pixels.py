"""The picture itself, for heads that begin at its pixels: nothing learned, offline."""

from dataclasses import replace

import torch
from torch import nn

from feats.encoders.base import Encoder, Features, ImageSide, Loading
from feats.encoders.convolutional import IMAGENET_MEAN, IMAGENET_STD, pool_map
from feats.encoders.stack import map_tokens
from feats.errors import UsageError
from feats.images import ResizeCrop

MAX_SIZE = 1024  # a row's tokens are then 6 MB in a cache


def load(model: str, weights: str | None, how: Loading, *, size: int) -> Encoder:
    """Make the encoder: the shorter side resized to `size` (bilinear), the centre cut out, scaled to [0, 1] and
    normalised with ImageNet's mean and standard deviation. Features are the mean colour (B, 3) float32; with `tokens`
    also every pixel's colour, row by row, (B, size * size, 3).

    Nothing is computed in `how.dtype`: the encoder's is float32. Raises `UsageError` for another model name, for
    weights (there are none) and for `size` outside 1 ... `MAX_SIZE`.
    """
    if model != "pixels":
        raise UsageError(f"unknown model {model!r}; there is pixels")
    if weights is not None or how.expected_sha256 is not None:
        raise UsageError(f"pixels take no weights, but got {weights or how.expected_sha256}; leave out `weights`")
    if not 1 <= size <= MAX_SIZE:
        raise UsageError(f"`size` {size}: expected a number of pixels from 1 to {MAX_SIZE}")
    preprocess = ResizeCrop(size, size, "bilinear")

    def forward(pixels: torch.Tensor) -> Features:
        feats = pool_map(pixels)
        return {"feats": feats, "tokens": map_tokens(pixels)} if how.tokens else {"feats": feats}

    return Encoder(
        identity={"model": "pixels", "size": size, "preprocess": preprocess.as_json(IMAGENET_MEAN, IMAGENET_STD)},
        loading=replace(how, dtype=torch.float32),
        image=ImageSide(
            preprocess=preprocess, mean=IMAGENET_MEAN, std=IMAGENET_STD, forward=forward, network=nn.Identity()
        ),
    )
