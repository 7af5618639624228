"""Study A: frozen CLIP, light fusions of an image and a text vector."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, ToCommonWidth, n_heads
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Dropout, LayerNorm, Linear, MultiheadAttention


def _classifier(n_models: int, n_in: int, D: int, dropout: float, n_classes: int) -> nn.Sequential:
    """Study A's: Linear-LayerNorm-GELU-Dropout-Linear."""
    return nn.Sequential(
        Linear(n_models, n_in, D),
        LayerNorm(n_models, D),
        nn.GELU(),
        Dropout(dropout),
        Linear(n_models, D, n_classes),
    )


class Concat(Head):
    """Study A: the two vectors concatenated, then Linear(D)-LayerNorm-GELU-Dropout-Linear (D was 256)."""

    study = "A"
    dropout = 0.5

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        width = sum(widths[side] for side in self.sides)
        self.classifier = _classifier(n_models, width, config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(self.joined(batch))


class WeightedSum(Head):
    """Study A: softmax(a) · (image, text) with two learnable scalars a, equal at first; then the classifier."""

    study = "A"
    dropout = 0.5

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        self.mix = nn.Parameter(torch.zeros(n_models, len(self.sides)))
        self.classifier = _classifier(n_models, self.common.width, config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        vectors = torch.stack(self.common(batch), 2)  # (M, B, sides, width)
        return self.classifier((vectors * self.mix.softmax(-1)[:, None, :, None]).sum(2))

    def scalars(self) -> dict[str, Tensor]:
        weights = self.mix.detach().softmax(-1)
        return {f"weight_{side}": weights[:, i] for i, side in enumerate(self.sides)}


class AttentionLinear(Head):
    """Study A: image and text as a sequence of two, 8-head self-attention, their mean, one linear layer."""

    study = "A"
    reads: tuple[str, ...] = ("D",)

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.attention = MultiheadAttention(n_models, width, n_heads(width, 8))
        self.classifier = self.build_classifier(config, width, n_classes, n_models)

    def build_classifier(self, config: HeadConfig, width: int, n_classes: int, n_models: int) -> nn.Module:
        """What makes logits of the fused vector."""
        return Linear(n_models, width, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(self.fused(batch)[0])

    def fused(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The fused vector (M, B, width) and the attention weights (M, B, heads, sides, sides), rows: queries."""
        sequence = torch.stack(self.common(batch), 2)
        mixed, weights = self.attention(sequence, sequence, sequence)
        return mixed.mean(2), weights


class Attention(AttentionLinear):
    """Study A: as `attention_linear`, with study A's classifier behind it."""

    dropout = 0.5
    reads = ("D", "dropout")

    def build_classifier(self, config: HeadConfig, width: int, n_classes: int, n_models: int) -> nn.Module:
        return _classifier(n_models, width, config.D, self.dropout, n_classes)
