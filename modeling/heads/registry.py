"""The heads: from a pair's cached features to class logits. A head holds M models of one shape at once (see
`modeling.heads.layers`); with M = 1 it is an ordinary module.

Which study a head comes from is said in its docstring: A (CLIP, light fusion), B (CLIP, six heads), C (ResNet + BERT on
token sequences), D (feature cache and linear probe), E (BERT + ResNet, three fusions).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.heads.layers import (
    BatchNorm,
    Dropout,
    LayerNorm,
    Linear,
    MultiheadAttention,
    TransformerEncoderLayer,
    attend,
    initialise,
)
from modeling.training.closed_form import kernel_logits

SIDES = {0: ("image", "text"), 1: ("text",), 2: ("image",)}  # by --ablation: both, no image, no text
ABLATIONS = {0: "both", 1: "text only", 2: "image only"}


@dataclass(frozen=True)
class HeadConfig:
    """What decides a head's shape. `dropout` None is the head's own; `ablation` 0 both sides, 1 text, 2 image only."""

    head: str = "fusion"
    D: int = 256  # width of the common space or hidden layer
    dropout: float | None = None
    ablation: int = 0
    image_positions: bool = False  # coattention: learnable positions of image tokens

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            close = get_close_matches(self.head, HEADS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown head {self.head!r}{hint} (there are {', '.join(HEADS)})")
        if self.D < 1:
            raise UsageError(f"D={self.D}: the width of a head must be 1 or more")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"dropout {self.dropout:g}: expected 0 <= dropout < 1")
        if self.ablation not in SIDES:
            raise UsageError(f"ablation {self.ablation}: expected 0 (both), 1 (text only) or 2 (image only)")

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES[self.ablation]

    def resolved(self) -> "HeadConfig":
        """With the head's own dropout filled in."""
        return self if self.dropout is not None else replace(self, dropout=HEADS[self.head].dropout)


@dataclass(frozen=True)
class Batch:
    """What a head reads, each None where it isn't there."""

    image: Tensor | None = None  # (M, B, Dv)
    text: Tensor | None = None  # (M, B, Dt)
    image_tokens: Tensor | None = None  # (M, B, P, Dv')
    text_tokens: Tensor | None = None  # (M, B, L, Dt'), zero behind a text's end
    text_mask: Tensor | None = None  # (M, B, L), which tokens are real

    def side(self, name: str) -> Tensor:
        return getattr(self, name)

    def expand(self, n_models: int) -> "Batch":
        """The same rows for every model of a stack, without copying them."""
        there = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Batch(**{name: x.expand(n_models, *x.shape[1:]) for name, x in there.items()})


class Head(nn.Module):
    """Base of all heads: `forward(batch) -> logits (M, B, C)`.

    `widths` gives the widths of what there is: image, text, image_tokens, image_positions (their number P) and
    text_tokens. A head must not touch a side that the ablation leaves out. Raises `UsageError` when the features lack
    what the head needs.
    """

    study = ""  # the reference study it comes from
    dropout = 0.0  # the study's own
    tokens: tuple[str, ...] = ()  # sides whose token features are needed
    optional_tokens: tuple[str, ...] = ()  # sides whose token features are used where cached
    solver = "sgd"

    def __init__(self, config: HeadConfig, widths: dict[str, int], n_classes: int, n_models: int):
        super().__init__()
        self.config, self.n_models = config, n_models
        self.sides = config.sides
        require(config, widths)
        self.build(config, widths, n_classes, n_models)

    def build(self, config: HeadConfig, widths: dict[str, int], n_classes: int, n_models: int) -> None:
        """Make the layers; every head defines its own."""
        raise NotImplementedError

    def joined(self, batch: Batch) -> Tensor:
        """The sides' vectors side by side, (M, B, Dv + Dt)."""
        return torch.cat([batch.side(side) for side in self.sides], -1)

    def scalars(self) -> dict[str, Tensor]:
        """Figures of each model (M,) worth following over training."""
        return {}


def n_heads(width: int, wanted: int) -> int:
    """The largest number of attention heads up to `wanted` that divides `width`."""
    return max(h for h in range(1, wanted + 1) if width % h == 0)


class ToCommonWidth(nn.Module):
    """Each side as a vector of one width: as it is where all have the same, else by a linear layer to D."""

    def __init__(self, sides: Sequence[str], config: HeadConfig, widths: dict[str, int], n_models: int):
        super().__init__()
        distinct = {widths[side] for side in sides}
        self.width = distinct.pop() if len(distinct) == 1 else config.D
        project = any(widths[side] != self.width for side in sides)
        self.project = nn.ModuleDict(
            {side: Linear(n_models, widths[side], self.width) for side in sides} if project else {}
        )
        self.sides = sides

    def forward(self, batch: Batch) -> list[Tensor]:
        vectors = [batch.side(side) for side in self.sides]
        if self.project:
            vectors = [self.project[side](x) for side, x in zip(self.sides, vectors, strict=True)]
        return vectors


# -- study D ----------------------------------------------------------------------------------------------------


def _projection(n_models: int, n_in: int, D: int, dropout: float) -> nn.Sequential:
    # BatchNorm takes any bias away again: its gradient would be rounding noise, which Adam turns into full steps.
    linear = Linear(n_models, n_in, D, bias=False)
    return nn.Sequential(linear, BatchNorm(n_models, D), nn.ReLU(), Dropout(dropout))


class Fusion(Head):
    """Study D: per side Linear-BatchNorm-ReLU-Dropout to D, concatenated, linear."""

    study = "D"
    dropout = 0.3

    def build(self, config, widths, n_classes, n_models):
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], config.D, config.dropout) for side in self.sides}
        )
        self.out = Linear(n_models, config.D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(*(self.project[side](batch.side(side)) for side in self.sides))


class CrossAttention(Head):
    """Study D: both sides to D, each gives a query, key and value, 8-head attention over the two positions,
    flattened, linear."""

    study = "D"
    dropout = 0.3

    def build(self, config, widths, n_classes, n_models):
        D = config.D
        self.project = nn.ModuleDict(
            {side: _projection(n_models, widths[side], D, config.dropout) for side in self.sides}
        )
        self.qkv = nn.ModuleDict({side: Linear(n_models, D, 3 * D) for side in self.sides})
        self.n_heads = n_heads(D, 8)
        self.out = Linear(n_models, D * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        qkv = [self.qkv[side](self.project[side](batch.side(side))) for side in self.sides]
        q, k, v = torch.stack(qkv, 2).chunk(3, -1)  # each (M, B, sides, D)
        return self.out(attend(q, k, v, self.n_heads)[0].flatten(2))


# -- study A ----------------------------------------------------------------------------------------------------


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

    def build(self, config, widths, n_classes, n_models):
        width = sum(widths[side] for side in self.sides)
        self.classifier = _classifier(n_models, width, config.D, config.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(self.joined(batch))


class WeightedSum(Head):
    """Study A: softmax(a) · (image, text) with two learnable scalars a, equal at first; then the classifier."""

    study = "A"
    dropout = 0.5

    def build(self, config, widths, n_classes, n_models):
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        self.mix = nn.Parameter(torch.zeros(n_models, len(self.sides)))
        self.classifier = _classifier(n_models, self.common.width, config.D, config.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        vectors = torch.stack(self.common(batch), 2)  # (M, B, sides, width)
        return self.classifier((vectors * self.mix.softmax(-1)[:, None, :, None]).sum(2))

    def scalars(self) -> dict[str, Tensor]:
        weights = self.mix.detach().softmax(-1)
        return {f"weight_{side}": weights[:, i] for i, side in enumerate(self.sides)}


class AttentionLinear(Head):
    """Study A: image and text as a sequence of two, 8-head self-attention, their mean, one linear layer."""

    study = "A"

    def build(self, config, widths, n_classes, n_models):
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.attention = MultiheadAttention(n_models, width, n_heads(width, 8))
        self.classifier = self.build_classifier(config, width, n_classes, n_models)

    def build_classifier(self, config: HeadConfig, width: int, n_classes: int, n_models: int) -> nn.Module:
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

    def build_classifier(self, config, width, n_classes, n_models):
        return _classifier(n_models, width, config.D, config.dropout, n_classes)


# -- study B ----------------------------------------------------------------------------------------------------


def _mlp(n_models: int, n_in: int, D: int, dropout: float, n_classes: int) -> nn.Sequential:
    return nn.Sequential(Linear(n_models, n_in, D), nn.ReLU(), Dropout(dropout), Linear(n_models, D, n_classes))


class Early(Head):
    """Study B: concatenated, then an MLP with one hidden layer of D."""

    study = "B"
    dropout = 0.1

    def build(self, config, widths, n_classes, n_models):
        self.mlp = _mlp(n_models, sum(widths[s] for s in self.sides), config.D, config.dropout, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.joined(batch))


class Late(Head):
    """Study B: a classifier for each side, the mean of their logits."""

    study = "B"
    dropout = 0.1

    def build(self, config, widths, n_classes, n_models):
        self.classifiers = nn.ModuleDict(
            {side: _mlp(n_models, widths[side], config.D, config.dropout, n_classes) for side in self.sides}
        )

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([self.classifiers[side](batch.side(side)) for side in self.sides]).mean(0)


class ClipMatch(Head):
    """Study B: the normalised vectors, their difference, product and cosine, then an MLP. One-sided: the normalised
    vector alone."""

    study = "B"
    dropout = 0.1

    def build(self, config, widths, n_classes, n_models):
        self.common = ToCommonWidth(self.sides, config, widths, n_models)
        width = self.common.width
        self.mlp = _mlp(n_models, 4 * width + 1 if len(self.sides) == 2 else width, config.D, config.dropout, n_classes)

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
    dropout = 0.1

    def build(self, config, widths, n_classes, n_models):
        D = config.D
        self.project = nn.ModuleDict({side: Linear(n_models, widths[side], D) for side in self.sides})
        self.layers = nn.Sequential(
            *(TransformerEncoderLayer(n_models, D, n_heads(D, 8), config.dropout) for _ in range(3))
        )
        self.gate = Linear(n_models, 2 * D, D)
        self.norm = LayerNorm(n_models, D)
        self.mlp = nn.Sequential(
            *(Linear(n_models, D, 2 * D), nn.GELU(), Dropout(config.dropout)),
            *(Linear(n_models, 2 * D, D), nn.GELU(), Dropout(config.dropout)),
            Linear(n_models, D, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        tokens = [self.project[side](batch.side(side)) for side in self.sides]
        fused, residual = self.layers(torch.stack(tokens, 2)).mean(2), tokens[-1]  # the text's, where there is one
        gate = torch.sigmoid(self.gate(torch.cat([fused, residual], -1)))
        return self.mlp(self.norm(fused + gate * residual))


# -- study E ----------------------------------------------------------------------------------------------------


class Late512(Head):
    """Study E's late fusion: each side by Linear-ReLU-Dropout to 512, concatenated, linear. D isn't used."""

    study = "E"
    dropout = 0.5
    width = 512

    def build(self, config, widths, n_classes, n_models):
        self.project = nn.ModuleDict(
            {
                side: nn.Sequential(Linear(n_models, widths[side], self.width), nn.ReLU(), Dropout(config.dropout))
                for side in self.sides
            }
        )
        self.out = Linear(n_models, self.width * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(*(self.project[side](batch.side(side)) for side in self.sides))


class QueryAttention(Head):
    """Study E's cross-attention: the text as query, the image, brought to the text's width, as key and value, 2 heads,
    linear. Image tokens, where cached, take the place of the image vector. One-sided: the side attends to itself.

    Over a single key the weights are 1 whatever the query: without image tokens the text has no say, and the figures
    are the image's alone."""

    study = "E"
    dropout = 0.5
    optional_tokens = ("image",)

    def build(self, config, widths, n_classes, n_models):
        self.key_name = "image_tokens" if "image_tokens" in widths and "image" in self.sides else self.sides[0]
        query_side = self.sides[-1]
        width = widths[query_side]
        self.to_query_width = Linear(n_models, widths[self.key_name], width)
        self.attention = MultiheadAttention(n_models, width, n_heads(width, 2))
        self.drop = Dropout(config.dropout)
        self.out = Linear(n_models, width, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        query, keys = batch.side(self.sides[-1])[:, :, None], batch.side(self.key_name)
        keys = self.to_query_width(keys if keys.dim() == 4 else keys[:, :, None])
        mixed, _ = self.attention(query, keys, keys)
        return self.out(self.drop(mixed[:, :, 0]))


# -- study C ----------------------------------------------------------------------------------------------------


class CoAttention(Head):
    """Study C, on token sequences: image tokens through self-attention, text tokens raw, and in both directions
    cross-attention followed by self-attention. Each sequence is pooled (text at its last token, image by its mean),
    the four vectors are added, one linear layer. `image_positions` adds learnable positions to the image tokens.
    One-sided: that side's own route."""

    study = "C"
    dropout = 0.1
    tokens = ("image", "text")

    def build(self, config, widths, n_classes, n_models):
        D, heads = config.D, n_heads(config.D, 8)
        self.project = nn.ModuleDict({side: Linear(n_models, widths[f"{side}_tokens"], D) for side in self.sides})
        if "image" in self.sides:
            self.self_image = MultiheadAttention(n_models, D, heads)
            if config.image_positions:
                self.positions = nn.Parameter(torch.zeros(n_models, 1, widths["image_positions"], D))
        if len(self.sides) == 2:
            self.text_to_image, self.self_text_to_image, self.image_to_text, self.self_image_to_text = (
                MultiheadAttention(n_models, D, heads) for _ in range(4)
            )
        self.drop = Dropout(config.dropout)
        self.out = Linear(n_models, D, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        routes, mask = [], batch.text_mask
        if "text" in self.sides:
            text = self.project["text"](batch.text_tokens)
            routes.append(_last_token(text, mask))
        if "image" in self.sides:
            image = self.project["image"](batch.image_tokens)
            if self.config.image_positions:
                image = image + self.positions
            routes.append(self.self_image(image, image, image)[0].mean(2))
        if len(self.sides) == 2:
            read = self.text_to_image(text, image, image)[0]
            routes.append(_last_token(self.self_text_to_image(read, read, read, mask)[0], mask))
            seen = self.image_to_text(image, text, text, mask)[0]
            routes.append(self.self_image_to_text(seen, seen, seen)[0].mean(2))
        return self.out(self.drop(torch.stack(routes).sum(0)))


def _last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last real token of each text, (M, B, D) from (M, B, L, D) and (M, B, L)."""
    last = (mask.sum(-1) - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
    return tokens.gather(2, last)[:, :, 0]


# -- beyond the studies -----------------------------------------------------------------------------------------


class Mlp(Head):
    """Concatenated, Dropout-Linear(D)-GELU-Dropout-Linear: for ensembles over seeds."""

    dropout = 0.5

    def build(self, config, widths, n_classes, n_models):
        self.mlp = nn.Sequential(
            Dropout(config.dropout),
            Linear(n_models, sum(widths[s] for s in self.sides), config.D),
            nn.GELU(),
            Dropout(config.dropout),
            Linear(n_models, config.D, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.joined(batch))


class LinearHead(Head):
    """Multinomial logistic regression on the concatenated vectors, by full-batch L-BFGS."""

    solver = "logistic"

    def build(self, config, widths, n_classes, n_models):
        self.out = Linear(n_models, sum(widths[s] for s in self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(self.joined(batch))


class KernelHead(Head):
    """RBF kernel classifier on the concatenated vectors, in closed form (`modeling.training.closed_form.fit_kernel`): the
    training rows are its support. Their number is `widths["support"]`."""

    solver = "kernel"

    def build(self, config, widths, n_classes, n_models):
        n_support, width = widths["support"], sum(widths[s] for s in self.sides)
        self.register_buffer("support", torch.zeros(n_models, n_support, width))
        self.register_buffer("gamma", torch.zeros(n_models, dtype=torch.float64))
        self.dual = nn.Parameter(torch.zeros(n_models, n_support, n_classes, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(n_models, n_classes, dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        logits = [
            kernel_logits(x, support.double(), dual, bias, float(gamma))
            for x, support, dual, bias, gamma in zip(
                self.joined(batch), self.support, self.dual, self.bias, self.gamma, strict=True
            )
        ]
        return torch.stack(logits).float()


HEADS: dict[str, type[Head]] = {
    "fusion": Fusion,
    "cross_attention": CrossAttention,
    "concat": Concat,
    "weighted_sum": WeightedSum,
    "attention": Attention,
    "attention_linear": AttentionLinear,
    "early": Early,
    "late": Late,
    "clip_match": ClipMatch,
    "gated_transformer": GatedTransformer,
    "late_512": Late512,
    "query_attention": QueryAttention,
    "coattention": CoAttention,
    "mlp": Mlp,
    "linear": LinearHead,
    "kernel": KernelHead,
}


def require(config: HeadConfig, widths: dict[str, int]) -> None:
    """Raise `UsageError` when the features lack what the head needs."""
    for name in [f"{side}_tokens" for side in HEADS[config.head].tokens if side in config.sides] or config.sides:
        if name not in widths:
            what = name.replace("_", " ")
            raise UsageError(f"head {config.head} needs {what} features, and there are {', '.join(widths) or 'none'}")


def build_head(
    config: HeadConfig, widths: dict[str, int], n_classes: int, seeds: Sequence[int] = (0,), device: str = "cpu"
) -> Head:
    """A stack of len(seeds) models, model m initialised from seeds[m].

    Raises `UsageError` when the features lack what the head needs.
    """
    head = HEADS[config.head](config.resolved(), widths, n_classes, len(seeds))
    initialise(head, seeds)
    return head.to(device)


def n_parameters(head: Head) -> int:
    """Trainable numbers of one model of the stack."""
    return sum(p.numel() for p in head.parameters()) // head.n_models
