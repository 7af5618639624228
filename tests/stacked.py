"""Stacked layers and torch's own that do the same."""

import torch
from torch import nn

from modeling.heads.layers import MultiheadAttention, TransformerEncoderLayer


@torch.no_grad()
def give(layer: nn.Module, m: int, reference: nn.Module) -> None:
    """Copy model m's parameters into the torch module that does the same."""
    if isinstance(layer, TransformerEncoderLayer):
        pairs = [(layer.attention, reference.self_attn), (layer.mlp[0], reference.linear1)]
        pairs += [(layer.mlp[3], reference.linear2), (layer.norm1, reference.norm1), (layer.norm2, reference.norm2)]
        for ours, theirs in pairs:
            give(ours, m, theirs)
    elif isinstance(layer, MultiheadAttention):
        parts = layer.query, layer.key, layer.value
        reference.in_proj_weight.copy_(torch.cat([part.weight[m] for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias[m] for part in parts]))
        give(layer.out, m, reference.out_proj)
    else:
        reference.weight.copy_(layer.weight[m])
        if reference.bias is not None:
            reference.bias.copy_(layer.bias[m])
