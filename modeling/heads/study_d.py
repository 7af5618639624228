"""Study D: feature cache and linear probe, the shape of this project."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, HeadConfig, n_heads
from modeling.heads.layers import BatchNorm, Dropout, Linear, attend


def _projection(n_models: int, n_in: int, D: int, dropout: float) -> nn.Sequential:
    # BatchNorm takes any bias away again: its gradient would be rounding noise, which Adam turns into full steps.
    linear = Linear(n_models, n_in, D, bias=False)
    return nn.Sequential(linear, BatchNorm(n_models, D), nn.ReLU(), Dropout(dropout))


class Fusion(Head):
    """Study D: per side Linear-BatchNorm-ReLU-Dropout to D, concatenated, linear."""

    study = "D"
    recipe = "D"
    dropout = 0.3

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], config.D, self.dropout) for side in self.sides}
        )
        self.out = Linear(n_models, config.D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(*(self.project[side](batch.of(side)) for side in self.sides))


class CrossAttention(Head):
    """Study D: both sides to D, each gives a query, key and value, 8-head attention over the two positions,
    flattened, linear."""

    study = "D"
    recipe = "D"
    dropout = 0.3

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D = config.D
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], D, self.dropout) for side in self.sides}
        )
        self.qkv = nn.ModuleDict({side: Linear(n_models, D, 3 * D) for side in self.sides})
        self.n_heads = n_heads(D, 8)
        self.out = Linear(n_models, D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        qkv = [self.qkv[side](self.project[side](batch.of(side))) for side in self.sides]
        q, k, v = torch.stack(qkv, 2).chunk(3, -1)  # each (M, B, sides, D)
        return self.out(attend(q, k, v, self.n_heads)[0].flatten(2))
