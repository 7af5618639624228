"""Study B: heads on CLIP's vectors, on BERT's and ViT's, and on the tokens of encoders from scratch, compared under
one budget."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, ToCommonWidth, n_heads
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Dropout, LayerNorm, Linear, MultiheadAttention, TransformerEncoderLayer


def _mlp(n_models: int, n_in: int, D: int, dropout: float, n_classes: int) -> nn.Sequential:
    return nn.Sequential(Linear(n_models, n_in, D), nn.ReLU(), Dropout(dropout), Linear(n_models, D, n_classes))


def _unit(batch: Batch, sides: Sequence[str]) -> Batch:
    """The sides' vectors brought to length 1: what all of the study's heads on CLIP read."""
    return Batch(**{side: F.normalize(batch.of(side), dim=-1) for side in sides})


class Early(Head):
    """Study B: the normalised vectors concatenated, then Linear(D)-ReLU-Dropout-Linear (D was 512). One-sided: the same
    of one vector, the study's text only and image only."""

    study = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.mlp = _mlp(n_models, sum(widths[s] for s in self.sides), config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.joined(_unit(batch, self.sides)))


class Late(Head):
    """Study B: one linear layer on each side's normalised vector, the mean of their logits."""

    study = "B"
    reads = ()

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.classifiers = nn.ModuleDict({side: Linear(n_models, widths[side], n_classes) for side in self.sides})

    def forward(self, batch: Batch) -> Tensor:
        unit = _unit(batch, self.sides)
        return torch.stack([self.classifiers[side](unit.of(side)) for side in self.sides]).mean(0)


class ClipMatch(Head):
    """Study B: of the normalised vectors t and v, t, v, |t - v|, t v and their cosine, then
    Linear(D)-ReLU-Dropout-Linear (D was 512). One-sided: the normalised vector alone.

    CLIP's sides are of one width; those that aren't come to D by linear layers, and are normalised once more."""

    study = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.mlp = _mlp(n_models, 4 * width + 1 if len(self.sides) == 2 else width, config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        vectors = self.common(_unit(batch, self.sides))
        if self.common.project:
            vectors = [F.normalize(x, dim=-1) for x in vectors]
        if len(vectors) == 2:
            image, text = vectors
            product = image * text
            vectors = [text, image, (text - image).abs(), product, product.sum(-1, keepdim=True)]
        return self.mlp(torch.cat(vectors, -1))


class GatedTransformer(Head):
    """Study B's improved attention: the normalised text and image vectors t and v as a sequence of two through three
    Transformer encoder layers (8 heads, GELU), of which the text's output f goes on: f + tanh(Linear([f, t])) t,
    LayerNorm, Linear(D)-GELU-Dropout-Linear(D / 2)-GELU-Dropout-Linear (D was 512). `layers` of the encoder is an
    option. Sides that aren't of one width, as CLIP's are, come to D by linear layers. One-sided: a sequence of one.

    Each layer draws its own start, where `torch.nn.TransformerEncoder` copies one layer's into all."""

    study = "B"
    dropout = 0.1
    layers: int = 3
    reads = ("D", "dropout", "layers")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width, D, half = self.common.width, config.D, max(1, config.D // 2)
        self.encoder = nn.Sequential(
            *(TransformerEncoderLayer(n_models, width, n_heads(width, 8), self.dropout) for _ in range(self.layers))
        )
        self.gate = Linear(n_models, 2 * width, width)
        self.norm = LayerNorm(n_models, width)
        self.mlp = nn.Sequential(
            *(Linear(n_models, width, D), nn.GELU(), Dropout(self.dropout)),
            *(Linear(n_models, D, half), nn.GELU(), Dropout(self.dropout)),
            Linear(n_models, half, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        sequence = self.common(_unit(batch, self.sides))[::-1]
        first = sequence[0]  # the text's, where there is one
        fused = self.encoder(torch.stack(sequence, 2))[:, :, 0]
        gate = torch.tanh(self.gate(torch.cat([fused, first], -1)))
        return self.mlp(self.norm(fused + gate * first))


class Vilbert(Head):
    """Study B's ViLBERT-style fusion: the image's vector by a linear layer to the text's width, text and image as a
    sequence of two through two Transformer encoder layers (8 heads, ReLU), of which the text's output goes on:
    Linear(D)-ReLU-Dropout-Linear (D was 512). One-sided: a sequence of one, the image's at its own width.

    With BERT-base, ViT-B/16 and its pooler, and D = 512 the whole has the study's 211.033 M parameters. Each layer
    draws its own start, where `torch.nn.TransformerEncoder` copies one layer's into all."""

    study = "B"
    dropout = 0.1

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        width = widths[self.sides[-1]]  # the text's, where there is one
        if "image" in self.sides:
            self.to_text_width = Linear(n_models, widths["image"], width)
        self.encoder = nn.Sequential(
            *(TransformerEncoderLayer(n_models, width, n_heads(width, 8), self.dropout, nn.ReLU) for _ in range(2))
        )
        self.mlp = _mlp(n_models, width, config.D, self.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        sequence = [batch.of("text")] if "text" in self.sides else []
        if "image" in self.sides:
            sequence.append(self.to_text_width(batch.of("image")))
        return self.mlp(self.encoder(torch.stack(sequence, 2))[:, :, 0])


class CrossModal(Head):
    """Study B's fusion of two encoders from scratch: the text's tokens attend to the image's and the image's to the
    text's, each with residual and LayerNorm; the mean of either, side by side, into an MLP. One-sided: the tokens
    attend to one another.

    Told are cross-modal attention and an MLP; the study's code of it isn't published, and the rest is chosen."""

    study = "B"
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
