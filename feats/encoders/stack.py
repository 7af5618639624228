"""A network as a stack of blocks: its whole forward pass and its parts below and above a cut, from the same pieces."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import nn

from feats.encoders.base import Blocks, Features


def stacked(
    modules: Sequence[nn.Module],
    *,
    after: tuple[str, ...],
    begin: Callable[[Any], torch.Tensor],
    step: Callable[[int, torch.Tensor], torch.Tensor],
    end: Callable[[torch.Tensor, Any], Features],
    entering: Callable[[int], torch.dtype],
    read: Callable[[torch.Tensor, Any], Features] | None = None,
    maps: bool = False,
) -> tuple[Callable[[Any], Features], Blocks]:
    """A side's `forward` and its `blocks`.

    `begin` makes of the inputs what enters the first block, `step` (i, hidden) applies block i, `end` (hidden, inputs)
    makes the features of what leaves the last one. `entering` (k) is the dtype that block k takes. Where the features
    need less than all that leaves the last block, `read` (what enters it, inputs) makes them at less cost. With `maps`
    these are (B, C, H, W) between the pieces, and (B, H * W, C) where the network is cut; then maps are square.
    """
    count = len(modules)

    def through(hidden: torch.Tensor, low: int, high: int) -> torch.Tensor:
        for i in range(low, high):
            hidden = step(i, hidden)
        return hidden

    def from_block(k: int, hidden: torch.Tensor, inputs: Any) -> Features:
        if read is None or k == count:
            return end(through(hidden, k, count), inputs)
        return read(through(hidden, k, count - 1), inputs)

    def forward(inputs: Any) -> Features:
        return from_block(0, begin(inputs), inputs)

    def below(inputs: Any, k: int) -> torch.Tensor:
        hidden = through(begin(inputs), 0, k)
        return map_tokens(hidden) if maps else hidden

    def above(hidden: torch.Tensor, inputs: Any, k: int) -> Features:
        hidden = hidden.to(entering(k))
        return from_block(k, _square_map(hidden) if maps else hidden, inputs)

    return forward, Blocks(modules, after, below, above)


def products_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of products with `weight`: its own, or autocast's inside such a block."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def map_tokens(grid: torch.Tensor) -> torch.Tensor:
    """(B, D, H, W) -> (B, H * W, D), row by row."""
    return grid.flatten(2).transpose(1, 2)


def _square_map(tokens: torch.Tensor) -> torch.Tensor:
    """(B, S * S, D) -> (B, D, S, S), undoing `map_tokens`; in channels_last where the tokens are contiguous."""
    side = isqrt(tokens.shape[1])
    grid: torch.Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
    return grid
