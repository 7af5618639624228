"""Study B: heads on CLIP's vectors, on BERT's and ViT's, and on the tokens of encoders from scratch, compared under
one budget."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, HeadConfig, ToCommonWidth, n_heads
from modeling.heads.layers import Dropout, LayerNorm, Linear, MultiheadAttention, TransformerEncoderLayer


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


class Vilbert(Head):
    """Study B's ViLBERT-style fusion: the text's and the image's vector as a sequence of two through a Transformer
    encoder, its two outputs side by side through two linear layers. One-sided: a sequence of one.

    Told are the two-token encoder, the two linear layers and 211.033 M parameters with BERT-base and ViT-B/16. Chosen
    are two layers of the encoder, ReLU and dropout between the linear ones, and 2 D between them: with D = 512 the head
    has 15.753 M and the whole, ViT without its pooler, 211.034 M."""

    study = "B"
    recipe = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.layers = nn.Sequential(
            *(TransformerEncoderLayer(n_models, width, n_heads(width, 8), self.dropout) for _ in range(2))
        )
        self.mlp = _mlp(n_models, len(self.sides) * width, 2 * config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.layers(torch.stack(self.common(batch), 2)).flatten(2))


class CrossModal(Head):
    """Study B's fusion of two encoders from scratch: the text's tokens attend to the image's and the image's to the
    text's, each with residual and LayerNorm; the mean of either, side by side, into an MLP. One-sided: the tokens
    attend to one another.

    Told are cross-modal attention and an MLP; the rest is chosen."""

    study = "B"
    recipe = "B"
    dropout = 0.1
    tokens = ("image", "text")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D, sides = config.D, self.sides
        self.project = nn.ModuleDict({side: Linear(n_models, widths[f"{side}_tokens"], D) for side in sides})
        self.attention = nn.ModuleDict({side: MultiheadAttention(n_models, D, n_heads(D, 8)) for side in sides})
        self.norm = nn.ModuleDict({side: LayerNorm(n_models, D) for side in sides})
        # No dropout on tokens: how many masks it draws would depend on the longest text among all models' batches.
        self.mlp = _mlp(n_models, len(sides) * D, D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        tokens = {side: self.project[side](batch.of(f"{side}_tokens")) for side in self.sides}
        masks = {"image": None, "text": batch.of("text_mask") if "text" in self.sides else None}
        pooled = []
        for side, other in zip(self.sides, reversed(self.sides), strict=True):
            read = self.attention[side](tokens[side], tokens[other], tokens[other], masks[other])[0]
            pooled.append(_mean(self.norm[side](tokens[side] + read), masks[side]))
        return self.mlp(torch.cat(pooled, -1))


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the real tokens, (M, B, D) from (M, B, L, D) and (M, B, L)."""
    if mask is None:
        return tokens.mean(2)
    return (tokens * mask[..., None]).sum(2) / mask.sum(2, keepdim=True).clamp(min=1)
