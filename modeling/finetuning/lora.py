"""LoRA: low-rank adapters on a network's attention projections, through `peft`.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from feats.errors import UsageError

ADAPTER = "default"  # peft's name for a network's only adapter


def add_lora(network: nn.Module, rank: int, alpha: float | None = None, seed: int = 0) -> list[str]:
    """Put an adapter of `rank` on every attention projection of a network: query, key, value and output. Where a
    network stacks several of them in one Linear layer, they share an adapter; those of `nn.MultiheadAttention` don't.

    W x becomes W x + (alpha / rank) B A x with A (rank, n_in) and B (n_out, rank), both float32. B starts at zero, so
    the outputs don't change; A is drawn from `seed` as a Linear layer's weights are, and no global random state is
    used. `alpha` None is `rank`, a scale of 1: Hu et al.'s for RoBERTa base, and peft's default. Afterwards the
    adapters alone require gradients. Returns the adapted layers' names; `nn.MultiheadAttention` has become a module
    with the layers q_proj, k_proj, v_proj and out_proj until `merge_lora`.

    Raises `UsageError`, with the network as it was, if it has no attention layers or has adapters, for a `rank` below
    1 or above the narrowest projection's width, and for an `alpha` that isn't a finite number above 0.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import, and an optional package

    _check(network, rank, alpha)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            network.set_submodule(name, SplitAttention(module))
    projections = _projections(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft only divides it by r
        target_modules=list(projections),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in projections.values()),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws weights, too, from the global state
        inject_adapter_in_model(config, network, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(network).values():
        layer.lora_A.float()
        layer.lora_B.float()
        a = layer.lora_A[ADAPTER].weight
        drawn = nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator)
        a.data.copy_(drawn)
    return list(projections)


def has_attention(network: nn.Module) -> bool:
    """Whether there is anything that `add_lora` could adapt."""
    return bool(_projections(network))


def merge_lora(network: nn.Module) -> None:
    """Add a network's adapters to the weights they are on. It becomes plain: modules and state dict have the types and
    names from before `add_lora`, and no parameter requires gradients."""
    for name, layer in _adapted(network).items():
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    for name, module in list(network.named_modules()):
        if isinstance(module, SplitAttention):
            network.set_submodule(name, module.joined())
    vars(network).pop("peft_config", None)


@torch.no_grad()
def merged_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `merge_lora` would change, as it would leave them, by their names in the plain network's state
    dict; copies, the network stays as it is."""
    state = {}
    for name, layer in _adapted(network).items():
        weight = layer.get_base_layer().weight
        state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
    for name, module in network.named_modules():
        if isinstance(module, SplitAttention):
            parts = [state.pop(f"{name}.{part}_proj.weight") for part in "qkv"]
            state[f"{name}.in_proj_weight"] = torch.cat(parts)
    return state


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` of frozen weights with a Linear layer for each projection, which it calls.

    `nn.MultiheadAttention` itself reads the weights and calls no layer: an adapter on its `out_proj` gets no gradient.
    """

    def __init__(self, whole: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.dropout, self.batch_first = whole.num_heads, whole.dropout, whole.batch_first
        biases = (None,) * 3 if whole.in_proj_bias is None else whole.in_proj_bias.detach().chunk(3)
        layers = map(_linear, whole.in_proj_weight.detach().chunk(3), biases)
        self.q_proj, self.k_proj, self.v_proj = layers
        self.out_proj = whole.out_proj
        self.train(whole.training)

    def in_proj(self, x: torch.Tensor) -> torch.Tensor:
        """Query, key and value of x (B, L, width) side by side, (B, L, 3 * width)."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, need_weights: bool = False
    ) -> tuple[torch.Tensor, None]:
        """Attention without a mask, as torchvision's ViT calls it: (B, L, width), and no attention weights."""
        assert self.batch_first and not need_weights
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)  # each (B, heads, L, d)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def joined(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` of these layers."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        has_bias = self.q_proj.bias is not None
        whole = nn.MultiheadAttention(
            self.q_proj.in_features, self.num_heads, self.dropout, has_bias, batch_first=self.batch_first, device="meta"
        )
        whole.in_proj_weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if has_bias:
            whole.in_proj_bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
        whole.out_proj = self.out_proj
        return whole.train(self.training)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _projections(network: nn.Module) -> dict[str, Any]:
    """The Linear layers inside attention modules, by name. All libraries call these modules' classes ...Attention."""
    modules = dict(network.named_modules())
    attentions = tuple(f"{name}." for name, module in modules.items() if type(module).__name__.endswith("Attention"))
    linear = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    return {name: module for name, module in linear.items() if name.startswith(attentions)}


def _adapted(network: nn.Module) -> dict[str, Any]:
    """The layers with adapters, peft's `LoraLayer`, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def _check(network: nn.Module, rank: int, alpha: float | None) -> None:
    kind = type(network).__name__
    if _adapted(network):
        raise UsageError(f"this {kind} has LoRA adapters already, expected a plain network; merge them first")
    projections = _projections(network).values()
    if not projections:
        raise UsageError(
            f"LoRA goes on attention made of Linear layers and {kind} has none (CLIP's ResNets only pool by "
            "attention); train its own weights, or take a ViT or a text encoder such as BERT"
        )
    narrowest = min(min(layer.weight.shape) for layer in projections)
    if not 1 <= rank <= narrowest:
        raise UsageError(f"`rank` {rank} is out of range; expected 1 to {narrowest}, the width of {kind}'s attention")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"`alpha` {alpha} scales the adapters; expected a finite number above 0, as {rank}")
