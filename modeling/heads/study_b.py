"""Study B: heads on CLIP's vectors, compared under one budget."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, HeadConfig, ToCommonWidth, n_heads
from modeling.heads.layers import Dropout, LayerNorm, Linear, TransformerEncoderLayer


def _mlp(n_models: int, n_in: int, D: int, dropout: float, n_classes: int) -> nn.Sequential:
    return nn.Sequential(Linear(n_models, n_in, D), nn.ReLU(), Dropout(dropout), Linear(n_models, D, n_classes))


class Early(Head):
    """Study B: concatenated, then an MLP with one hidden layer of D."""

    study = "B"
    recipe = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.mlp = _mlp(n_models, sum(widths[s] for s in self.sides), config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.joined(batch))


class Late(Head):
    """Study B: a classifier for each side, the mean of their logits."""

    study = "B"
    recipe = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.classifiers = nn.ModuleDict(
            {side: _mlp(n_models, widths[side], config.D, self.dropout, n_classes) for side in self.sides}
        )

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([self.classifiers[side](batch.of(side)) for side in self.sides]).mean(0)


class ClipMatch(Head):
    """Study B: the normalised vectors, their difference, product and cosine, then an MLP. One-sided: the normalised
    vector alone."""

    study = "B"
    recipe = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.mlp = _mlp(n_models, 4 * width + 1 if len(self.sides) == 2 else width, config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        vectors = [F.normalize(x, dim=-1) for x in self.common(batch)]
        if len(vectors) == 2:
            image, text = vectors
            product = image * text
            vectors = [text, image, text - image, product, product.sum(-1, keepdim=True)]
        return self.mlp(torch.cat(vectors, -1))


class GatedTransformer(Head):
    """Study B's improved attention: three TransformerEncoder layers over the two-token sequence, their mean, plus the
    text vector through a learned gate, LayerNorm, and a deep GELU MLP."""

    study = "B"
    recipe = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D = config.D
        self.project = nn.ModuleDict({side: Linear(n_models, widths[side], D) for side in self.sides})
        self.layers = nn.Sequential(
            *(TransformerEncoderLayer(n_models, D, n_heads(D, 8), self.dropout) for _ in range(3))
        )
        self.gate = Linear(n_models, 2 * D, D)
        self.norm = LayerNorm(n_models, D)
        self.mlp = nn.Sequential(
            *(Linear(n_models, D, 2 * D), nn.GELU(), Dropout(self.dropout)),
            *(Linear(n_models, 2 * D, D), nn.GELU(), Dropout(self.dropout)),
            Linear(n_models, D, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        tokens = [self.project[side](batch.of(side)) for side in self.sides]
        fused, residual = self.layers(torch.stack(tokens, 2)).mean(2), tokens[-1]  # the text's, where there is one
        gate = torch.sigmoid(self.gate(torch.cat([fused, residual], -1)))
        return self.mlp(self.norm(fused + gate * residual))
