"""Stacked layers and torch's own that do the same."""

import torch
from torch import nn

from modeling.heads.layers import (
    BatchNorm,
    Conv2d,
    LayerNorm,
    Linear,
    MultiheadAttention,
    TransformerEncoderLayer,
)

LAYERS = (TransformerEncoderLayer, MultiheadAttention, Linear, LayerNorm, BatchNorm, Conv2d)


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
        if reference.bias is not None and layer.bias is not None:
            reference.bias.copy_(layer.bias[m])
        if isinstance(layer, BatchNorm):
            reference.running_mean.copy_(layer.running_mean[m])
            reference.running_var.copy_(layer.running_var[m])


@torch.no_grad()
def copy_weights(stack: nn.Module, m: int, reference: nn.Module) -> None:
    """Copy model m's parameters into a torch module whose layers bear the same names."""
    whole: tuple[str, ...] = ()
    for name, layer in stack.named_modules():
        if isinstance(layer, LAYERS) and not name.startswith(whole):
            give(layer, m, reference.get_submodule(name))
            whole = (*whole, f"{name}.")
    for name, parameter in stack.named_parameters(recurse=False):
        reference.get_parameter(name).copy_(parameter[m])
