"""Attention weights with gradients, of networks that compute them in a kernel which keeps none."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Meanwhile each attention's weights (B, heads, queries, keys) join the list, in the order of the network.

    OpenAI's CLIP as this project runs it, torchvision's `nn.MultiheadAttention` and transformers' models all call
    `F.scaled_dot_product_attention`, looked up at each call: it is replaced by the same formula written out, which
    gives the same values but for rounding, and the networks stay as they are. It is replaced for the whole process, so
    other threads shouldn't compute attention meanwhile.
    """
    recorded: list[Tensor] = []

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        products = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            products = products.masked_fill(~attn_mask, -torch.inf) if hidden else products + attn_mask
        weights = products.softmax(-1)
        recorded.append(weights)
        return F.dropout(weights, dropout_p) @ value

    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield recorded
    finally:
        F.scaled_dot_product_attention = usual
