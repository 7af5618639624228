"""Study D: feature cache and linear probe, the shape of this project."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, n_heads
from modeling.heads.config import HeadConfig
from modeling.heads.layers import BatchNorm, Dropout, Linear, MultiheadAttention


def _projection(n_models: int, n_in: int, D: int, dropout: float) -> nn.Sequential:
    # BatchNorm takes any bias away again: its gradient would be rounding noise, which Adam turns into full steps.
    linear = Linear(n_models, n_in, D, bias=False)
    return nn.Sequential(linear, BatchNorm(n_models, D), nn.ReLU(), Dropout(dropout))


class Fusion(Head):
    """Study D: per side Linear-BatchNorm-ReLU-Dropout to D, concatenated, linear.

    One deviation is kept: the study's linear layers before BatchNorm have a bias, ours have none. BatchNorm takes it
    away again: the study's starts at random, gets no gradient and changes no logit."""

    study = "D"
    dropout = 0.3

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], config.D, self.dropout) for side in self.sides}
        )
        self.out = Linear(n_models, config.D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(*(self.project[side](batch.of(side)) for side in self.sides))


class CrossAttention(Head):
    """Study D: both sides to D as in `fusion` (which says what of its bias), of each a query, a key and a value by
    linear layers of its own, the text's before the image's; over the two positions 8-head attention, which has its own
    projections on top of those; flattened, linear. One-sided, as in the study: the projection and a linear layer,
    without attention."""

    study = "D"
    dropout = 0.3

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D = config.D
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], D, self.dropout) for side in self.sides}
        )
        if len(self.sides) == 2:
            self.query, self.key, self.value = (
                nn.ModuleDict({side: Linear(n_models, D, D) for side in reversed(self.sides)}) for _ in range(3)
            )
            self.attention = MultiheadAttention(n_models, D, n_heads(D, 8))
        self.out = Linear(n_models, D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        sides = {side: self.project[side](batch.of(side)) for side in self.sides}
        if len(sides) == 1:
            return self.out(*sides.values())
        query, key, value = (
            torch.stack([layer(sides[side]) for side, layer in of_side.items()], 2)  # (M, B, sides, D)
            for of_side in (self.query, self.key, self.value)
        )
        return self.out(self.attention(query, key, value)[0].flatten(2))
