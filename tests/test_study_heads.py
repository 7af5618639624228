"""Each head of a study against that study: its layers at the study's own widths, written out, and its forward pass
against a plain torch.nn writing of the study's description with the same weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stacked import copy_weights
from tensors import normal
from torch import Tensor, nn

from modeling.heads import layers
from modeling.heads.base import Batch, Head, n_parameters
from modeling.heads.config import HeadConfig
from modeling.heads.registry import HEADS, build_head

BOTH, TEXT, IMAGE = ("image", "text"), ("text",), ("image",)
STUDY_HEADS = [name for name, head in HEADS.items() if head.study]


# -- layers at the studies' widths ------------------------------------------------------------------------------

CLIP_L14 = {"image": 768, "text": 768}  # A: ViT-L/14@336px
CLIP_B32 = {"image": 512, "text": 512}  # B and D: ViT-B/32
BERT_VIT = {"image": 768, "text": 768}  # B: BERT-base and ViT-B/16
VIT_TOKENS = {"image_tokens": 768, "image_positions": 196, "text_tokens": 768}
RESNET_BERT = {"image": 2048, "text": 768}  # E: ResNet50 and BERT-base
RESNET_BERT_TOKENS = {"image_tokens": 2048, "image_positions": 49, "text_tokens": 768}  # C
PICTURE_BERT = {"image": 3, "text": 768, "image_tokens": 3, "image_positions": 224 * 224}  # E

# Head, settings, widths; each layer in order, with its widths; parameters for three classes.
LAYERS: list[tuple[str, dict[str, Any], dict[str, int], list[str], int]] = [
    (  # A: "concatenation. Classifier: Linear to 256, LayerNorm, GELU, Dropout 0.5, Linear to 3"
        "concat",
        {"D": 256},
        CLIP_L14,
        [
            "classifier.0 Linear 1536 256",
            "classifier.1 LayerNorm 256",
            "classifier.2 GELU",
            "classifier.3 Dropout 0.5",
            "classifier.4 Linear 256 3",
        ],
        394_755,
    ),
    (  # A: "learnable weighted sum (softmax over two scalars)", the same classifier
        "weighted_sum",
        {"D": 256},
        CLIP_L14,
        [
            "classifier.0 Linear 768 256",
            "classifier.1 LayerNorm 256",
            "classifier.2 GELU",
            "classifier.3 Dropout 0.5",
            "classifier.4 Linear 256 3",
        ],
        2 + 198_147,
    ),
    (  # A: "image and text as a sequence of two, multi-head self-attention, mean", the same classifier; heads not told
        "attention",
        {"D": 256},
        CLIP_L14,
        [
            "attention MultiheadAttention 768 heads 8 dropout 0.0",
            "classifier.0 Linear 768 256",
            "classifier.1 LayerNorm 256",
            "classifier.2 GELU",
            "classifier.3 Dropout 0.5",
            "classifier.4 Linear 256 3",
        ],
        2_362_368 + 198_147,
    ),
    (  # A: "a fourth model puts a single linear layer straight on the attention output"
        "attention_linear",
        {"D": 256},
        CLIP_L14,
        ["attention MultiheadAttention 768 heads 8 dropout 0.0", "classifier Linear 768 3"],
        2_362_368 + 2_307,
    ),
    (  # B, code: concatenated vectors, Linear(2E, 512)-ReLU-Dropout-Linear
        "early",
        {"D": 512},
        CLIP_B32,
        ["mlp.0 Linear 1024 512", "mlp.1 ReLU", "mlp.2 Dropout 0.1", "mlp.3 Linear 512 3"],
        526_339,
    ),
    (  # B, code: text only is the same of one vector; image only too
        "early",
        {"D": 512, "sides": TEXT},
        CLIP_B32,
        ["mlp.0 Linear 512 512", "mlp.1 ReLU", "mlp.2 Dropout 0.1", "mlp.3 Linear 512 3"],
        264_195,
    ),
    (  # B, code: one linear layer a side
        "late",
        {"D": 512},
        CLIP_B32,
        ["classifiers.image Linear 512 3", "classifiers.text Linear 512 3"],
        3_078,
    ),
    (  # B, code; 152.328 M with CLIP's 151.277 M
        "clip_match",
        {"D": 512},
        CLIP_B32,
        ["mlp.0 Linear 2049 512", "mlp.1 ReLU", "mlp.2 Dropout 0.1", "mlp.3 Linear 512 3"],
        1_051_139,
    ),
    (  # B, code: three TransformerEncoder layers, gate, LayerNorm, GELU MLP D -> 512 -> 256 -> 3
        "gated_transformer",
        {"D": 512},
        CLIP_B32,
        [
            "encoder.0 TransformerEncoderLayer 512 2048 GELU heads 8 dropout 0.1 0.1 0.1 0.1",
            "encoder.1 TransformerEncoderLayer 512 2048 GELU heads 8 dropout 0.1 0.1 0.1 0.1",
            "encoder.2 TransformerEncoderLayer 512 2048 GELU heads 8 dropout 0.1 0.1 0.1 0.1",
            "gate Linear 1024 512",
            "norm LayerNorm 512",
            "mlp.0 Linear 512 512",
            "mlp.1 GELU",
            "mlp.2 Dropout 0.1",
            "mlp.3 Linear 512 256",
            "mlp.4 GELU",
            "mlp.5 Dropout 0.1",
            "mlp.6 Linear 256 3",
        ],
        10_377_731,
    ),
    (  # B, code: an option leaves one of the layers
        "gated_transformer",
        {"D": 512, "layers": 1},
        CLIP_B32,
        [
            "encoder.0 TransformerEncoderLayer 512 2048 GELU heads 8 dropout 0.1 0.1 0.1 0.1",
            "gate Linear 1024 512",
            "norm LayerNorm 512",
            "mlp.0 Linear 512 512",
            "mlp.1 GELU",
            "mlp.2 Dropout 0.1",
            "mlp.3 Linear 512 256",
            "mlp.4 GELU",
            "mlp.5 Dropout 0.1",
            "mlp.6 Linear 256 3",
        ],
        10_377_731 - 2 * 3_152_384,
    ),
    (  # B, code; 211.033 M with BERT-base and ViT-B/16
        "vilbert",
        {"D": 512},
        BERT_VIT,
        [
            "to_text_width Linear 768 768",
            "encoder.0 TransformerEncoderLayer 768 3072 ReLU heads 8 dropout 0.1 0.1 0.1 0.1",
            "encoder.1 TransformerEncoderLayer 768 3072 ReLU heads 8 dropout 0.1 0.1 0.1 0.1",
            "mlp.0 Linear 768 512",
            "mlp.1 ReLU",
            "mlp.2 Dropout 0.1",
            "mlp.3 Linear 512 3",
        ],
        15_161_603,
    ),
    (  # B: "cross-modal attention + MLP"; the rest is chosen
        "cross_modal",
        {"D": 512},
        VIT_TOKENS,
        [
            "project.image Linear 768 512",
            "project.text Linear 768 512",
            "attention.image MultiheadAttention 512 heads 8 dropout 0.0",
            "attention.text MultiheadAttention 512 heads 8 dropout 0.0",
            "norm.image LayerNorm 512",
            "norm.text LayerNorm 512",
            "mlp.0 Linear 1024 512",
            "mlp.1 ReLU",
            "mlp.2 Dropout 0.1",
            "mlp.3 Linear 512 3",
        ],
        3_417_091,
    ),
    (  # C: four routes, self-attention with LayerNorm, one linear layer; D, heads and dropout are chosen
        "coattention",
        {"D": 256},
        RESNET_BERT_TOKENS,
        [
            "project.image Linear 2048 256",
            "project.text Linear 768 256",
            "self_image.attention MultiheadAttention 256 heads 8 dropout 0.0",
            "self_image.norm LayerNorm 256",
            "text_to_image MultiheadAttention 256 heads 8 dropout 0.0",
            "self_text_to_image.attention MultiheadAttention 256 heads 8 dropout 0.0",
            "self_text_to_image.norm LayerNorm 256",
            "image_to_text MultiheadAttention 256 heads 8 dropout 0.0",
            "self_image_to_text.attention MultiheadAttention 256 heads 8 dropout 0.0",
            "self_image_to_text.norm LayerNorm 256",
            "drop Dropout 0.1",
            "out Linear 256 3",
        ],
        2_039_555,
    ),
    (  # D: "per side Linear–BatchNorm–ReLU–Dropout 0.3 to D, concatenated, linear"
        "fusion",
        {"D": 256},
        CLIP_B32,
        [
            "project.image.0 Linear 512 256 without bias",
            "project.image.1 BatchNorm 256",
            "project.image.2 ReLU",
            "project.image.3 Dropout 0.3",
            "project.text.0 Linear 512 256 without bias",
            "project.text.1 BatchNorm 256",
            "project.text.2 ReLU",
            "project.text.3 Dropout 0.3",
            "out Linear 512 3",
        ],
        264_707,
    ),
    (  # D, code: own q/k/v layers a side, `nn.MultiheadAttention` on top of them
        "cross_attention",
        {"D": 256},
        CLIP_B32,
        [
            "project.image.0 Linear 512 256 without bias",
            "project.image.1 BatchNorm 256",
            "project.image.2 ReLU",
            "project.image.3 Dropout 0.3",
            "project.text.0 Linear 512 256 without bias",
            "project.text.1 BatchNorm 256",
            "project.text.2 ReLU",
            "project.text.3 Dropout 0.3",
            "query.text Linear 256 256",
            "query.image Linear 256 256",
            "key.text Linear 256 256",
            "key.image Linear 256 256",
            "value.text Linear 256 256",
            "value.image Linear 256 256",
            "attention MultiheadAttention 256 heads 8 dropout 0.0",
            "out Linear 512 3",
        ],
        922_627,
    ),
    (  # D, code: one side is the projection and a linear layer
        "cross_attention",
        {"D": 256, "sides": IMAGE},
        CLIP_B32,
        [
            "project.image.0 Linear 512 256 without bias",
            "project.image.1 BatchNorm 256",
            "project.image.2 ReLU",
            "project.image.3 Dropout 0.3",
            "out Linear 256 3",
        ],
        132_355,
    ),
    (  # E: "each side by a bare linear layer to 512, concatenated to 1024, then Linear to 512–ReLU–Dropout–Linear"
        "late_512",
        {},
        RESNET_BERT,
        [
            "project.image Linear 2048 512",
            "project.text Linear 768 512",
            "classifier.0 Linear 1024 512",
            "classifier.1 ReLU",
            "classifier.2 Dropout 0.5",
            "classifier.3 Linear 512 3",
        ],
        1_969_155,
    ),
    (  # E: "text (768) as query, image (2048 to 768) as key and value, 2 heads"; what is behind them is chosen
        "query_attention",
        {},
        RESNET_BERT,
        [
            "to_query_width Linear 2048 768",
            "attention MultiheadAttention 768 heads 2 dropout 0.0",
            "drop Dropout 0.5",
            "out Linear 768 3",
        ],
        3_938_307,
    ),
    (  # E: "text projected to a 1×224×224 plane, stacked on the picture to 4×224×224, convolutions", which are chosen
        "early_plane",
        {"D": 256},
        PICTURE_BERT,
        [
            "to_plane Linear 768 50176",
            "stages.0 Conv2d 4 64 3 stride 2",
            "stages.1 ReLU",
            "stages.2 MaxPool2d 2",
            "stages.3 Conv2d 64 128 3 stride 2",
            "stages.4 ReLU",
            "stages.5 MaxPool2d 2",
            "stages.6 Conv2d 128 256 3 stride 2",
            "stages.7 ReLU",
            "stages.8 MaxPool2d 2",
            "drop Dropout 0.5",
            "out Linear 4096 3",
        ],
        38_969_027,
    ),
]


def described(name: str, layer: nn.Module) -> str | None:
    """A layer in words; None for one that only holds others."""
    kind = type(layer).__name__
    if isinstance(layer, layers.TransformerEncoderLayer):
        drops = (layer.attention.drop, layer.dropout1, layer.mlp[2], layer.dropout2)
        inner, heads = layer.mlp[0].weight.shape, layer.attention.n_heads
        ps = " ".join(str(drop.p) for drop in drops)
        return f"{name} {kind} {inner[2]} {inner[1]} {type(layer.mlp[1]).__name__} heads {heads} dropout {ps}"
    if isinstance(layer, layers.MultiheadAttention):
        return f"{name} {kind} {layer.out.weight.shape[1]} heads {layer.n_heads} dropout {layer.drop.p}"
    if isinstance(layer, layers.Linear):
        _, n_out, n_in = layer.weight.shape
        return f"{name} {kind} {n_in} {n_out}{' without bias' if layer.bias is None else ''}"
    if isinstance(layer, layers.Conv2d):
        _, n_out, n_in, kernel, _ = layer.weight.shape
        return f"{name} {kind} {n_in} {n_out} {kernel} stride {layer.stride}"
    if isinstance(layer, layers.LayerNorm | layers.BatchNorm):
        return f"{name} {kind} {layer.weight.shape[1]}"
    if isinstance(layer, layers.Dropout):
        return f"{name} {kind} {layer.p}"
    if isinstance(layer, layers.MaxPool2d):
        return f"{name} {kind} {layer.size}"
    return f"{name} {kind}" if isinstance(layer, nn.ReLU | nn.GELU | nn.Identity) else None


def layer_list(head: Head) -> list[str]:
    found, whole = [], ()
    for name, layer in head.named_modules():
        if not name.startswith(whole) and (words := described(name, layer)):
            found.append(words)
            whole = (*whole, f"{name}.")
    return found


@pytest.mark.parametrize("name, settings, widths, expected, count", LAYERS, ids=[f"{x[0]} {x[1]}" for x in LAYERS])
def test_layers_and_parameters(
    name: str, settings: dict[str, Any], widths: dict[str, int], expected: list[str], count: int
):
    with torch.device("meta"):
        head = HEADS[name](HeadConfig(name, **settings), widths, 3, 1)
    assert layer_list(head) == expected
    assert n_parameters(head) == count


def test_every_head_of_a_study_is_written_out():
    assert {name for name, *_ in LAYERS} == set(STUDY_HEADS) == set(PLAIN)


def test_all_classifiers_of_study_b_at_once_have_its_size():
    """Its CLIP model held all of them: 163.764 M, of which CLIP ViT-B/32 has 151,277,313."""
    configs = [HeadConfig(name, D=512) for name in ("clip_match", "early", "late", "gated_transformer")]
    configs += [HeadConfig("early", D=512, sides=sides) for sides in (TEXT, IMAGE)]
    count = sum(n_parameters(build_head(config, CLIP_B32, 3)) for config in configs)
    assert count == 12_486_677 and round((151_277_313 + count) / 1e6, 3) == 163.764


@pytest.mark.parametrize(
    "option, extra",
    [
        ({"attention_norm": "batch"}, 0),
        ({"attention_norm": "none"}, -3 * 2 * 256),
        ({"image_positions": "learnable"}, 49 * 256),
        ({"image_positions": "absolute"}, 0),
        ({"image_pooling": "last"}, 0),
    ],
    ids=str,
)
def test_parameters_of_coattention_s_options(option: dict[str, str], extra: int):
    with torch.device("meta"):
        head = HEADS["coattention"](HeadConfig("coattention", **option), RESNET_BERT_TOKENS, 3, 1)
    assert n_parameters(head) == 2_039_555 + extra


# -- the studies' descriptions in plain torch.nn ----------------------------------------------------------------
# Layers bear the names that ours have, so that weights can be copied; what is done with them is written anew.


class Plain(nn.Module):
    """`w`: widths; `x`: features of B pairs by name, and `mask` (B, L), which text tokens are real."""

    superfluous = 0  # parameters that the study has and ours leaves out

    def __init__(self, sides: tuple[str, ...], w: dict[str, int], D: int, **options: Any):
        super().__init__()
        self.sides, self.options = sides, options
        self.build(w, D)

    def settle(self) -> None:
        """What superfluous parameters have come to in running statistics."""

    def vectors(self, x: dict[str, Tensor]) -> list[Tensor]:
        return [x[side] for side in self.sides]

    def unit(self, x: dict[str, Tensor]) -> list[Tensor]:
        return [x[side] / x[side].norm(dim=-1, keepdim=True) for side in self.sides]


def classifier_of_a(width: int, D: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, D), nn.LayerNorm(D), nn.GELU(), nn.Dropout(0.5), nn.Linear(D, 3))


def mlp(width: int, hidden: int, p: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, 3))


def attention(width: int, heads: int = 8) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(width, heads, batch_first=True)


def of_sides(sides: Sequence[str], layer: Callable[[str], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({side: layer(side) for side in sides})


class PlainConcat(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.classifier = classifier_of_a(sum(w[side] for side in self.sides), D)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.classifier(torch.cat(self.vectors(x), 1))


class PlainWeightedSum(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.mix = nn.Parameter(torch.zeros(len(self.sides)))
        self.classifier = classifier_of_a(w["text"], D)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.classifier(sum(a * v for a, v in zip(self.mix.softmax(0), self.vectors(x), strict=True)))


class PlainAttentionLinear(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.attention, self.classifier = attention(w["text"]), nn.Linear(w["text"], 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        pair = torch.stack(self.vectors(x), 1)
        return self.classifier(self.attention(pair, pair, pair)[0].mean(1))


class PlainAttention(PlainAttentionLinear):
    def build(self, w: dict[str, int], D: int) -> None:
        self.attention, self.classifier = attention(w["text"]), classifier_of_a(w["text"], D)


class PlainEarly(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.mlp = mlp(sum(w[side] for side in self.sides), D, 0.1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.mlp(torch.cat(self.unit(x), 1))


class PlainLate(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.classifiers = of_sides(self.sides, lambda side: nn.Linear(w[side], 3))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits = [self.classifiers[side](v) for side, v in zip(self.sides, self.unit(x), strict=True)]
        return sum(logits) / len(logits)


class PlainClipMatch(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.mlp = mlp(4 * w["text"] + 1 if self.sides == BOTH else w["text"], D, 0.1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        if self.sides != BOTH:
            return self.mlp(*self.unit(x))
        v, t = self.unit(x)
        return self.mlp(torch.cat([t, v, (t - v).abs(), t * v, F.cosine_similarity(t, v)[:, None]], 1))


def encoder(width: int, count: int, activation: str) -> nn.Sequential:
    of_layer = {"dim_feedforward": 4 * width, "dropout": 0.1, "activation": activation, "batch_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(width, 8, **of_layer) for _ in range(count)))


class PlainGatedTransformer(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        width = w["text"]
        self.encoder = encoder(width, self.options.get("layers", 3), "gelu")
        self.gate, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, D), nn.GELU(), nn.Dropout(0.1)),
            *(nn.Linear(D, D // 2), nn.GELU(), nn.Dropout(0.1)),
            nn.Linear(D // 2, 3),
        )

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        text_first = self.unit(x)[::-1]
        f, t = self.encoder(torch.stack(text_first, 1))[:, 0], text_first[0]
        return self.mlp(self.norm(f + self.gate(torch.cat([f, t], 1)).tanh() * t))


class PlainVilbert(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        width = w["text"] if "text" in self.sides else w["image"]
        if "image" in self.sides:
            self.to_text_width = nn.Linear(w["image"], width)
        self.encoder, self.mlp = encoder(width, 2, "relu"), mlp(width, D, 0.1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        sequence = [x["text"]] if "text" in self.sides else []
        if "image" in self.sides:
            sequence = [*sequence, self.to_text_width(x["image"])]
        return self.mlp(self.encoder(torch.stack(sequence, 1))[:, 0])


class PlainCrossModal(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.project = of_sides(self.sides, lambda side: nn.Linear(w[f"{side}_tokens"], D))
        self.attention = of_sides(self.sides, lambda side: attention(D))
        self.norm = of_sides(self.sides, lambda side: nn.LayerNorm(D))
        self.mlp = mlp(len(self.sides) * D, D, 0.1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        tokens = {side: self.project[side](x[f"{side}_tokens"]) for side in self.sides}
        padded = {"image": None, "text": ~x["mask"]}
        pooled = []
        for side in self.sides:
            [other] = set(self.sides) - {side} or {side}
            keys = tokens[other]
            y = self.norm[side](tokens[side] + self.attention[side](tokens[side], keys, keys, padded[other])[0])
            rows = zip(y, x["mask"], strict=True) if side == "text" else [(row, slice(None)) for row in y]
            pooled.append(torch.stack([row[real].mean(0) for row, real in rows]))
        return self.mlp(torch.cat(pooled, 1))


class PlainSelfAttention(nn.Module):
    def __init__(self, D: int, norm: str):
        super().__init__()
        self.attention = attention(D)
        self.norm = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}[norm](D)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        y = x + self.attention(x, x, x, None if real is None else ~real)[0]
        real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        normed = torch.zeros_like(y)
        normed[real] = self.norm(y[real])
        return normed


class PlainCoAttention(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        norm = self.options.get("attention_norm", "layer")
        self.project = of_sides(self.sides, lambda side: nn.Linear(w[f"{side}_tokens"], D))
        if "image" in self.sides:
            self.self_image = PlainSelfAttention(D, norm)
            if self.options.get("image_positions") == "learnable":
                self.positions = nn.Parameter(torch.zeros(1, w["image_positions"], D))
        if self.sides == BOTH:
            self.text_to_image, self.image_to_text = attention(D), attention(D)
            self.self_text_to_image, self.self_image_to_text = PlainSelfAttention(D, norm), PlainSelfAttention(D, norm)
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(D, 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        real, routes = x["mask"], []
        last = (torch.arange(len(real)), real.sum(1) - 1)
        if "text" in self.sides:
            text = self.project["text"](x["text_tokens"])
            routes.append(text[last])
        if "image" in self.sides:
            image = self.placed(self.project["image"](x["image_tokens"]))
            routes.append(self.pool(self.self_image(image)))
        if self.sides == BOTH:
            read = self.text_to_image(text, image, image)[0]
            routes.append(self.self_text_to_image(read, real)[last])
            seen = self.image_to_text(image, text, text, ~real)[0]
            routes.append(self.pool(self.self_image_to_text(seen)))
        return self.out(self.drop(sum(routes)))

    def placed(self, image: Tensor) -> Tensor:
        if self.options.get("image_positions") == "learnable":
            return image + self.positions
        if self.options.get("image_positions") == "absolute":
            count, D = image.shape[1:]
            waves = [
                [(math.sin, math.cos)[i % 2](p / 10000 ** ((i - i % 2) / D)) for i in range(D)] for p in range(count)
            ]
            return image + torch.tensor(waves)
        return image

    def pool(self, image: Tensor) -> Tensor:
        return image[:, -1] if self.options.get("image_pooling") == "last" else image.mean(1)


class PlainFusion(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.project = of_sides(
            self.sides,
            lambda side: nn.Sequential(nn.Linear(w[side], D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.3)),
        )
        self.out = nn.Linear(D * len(self.sides), 3)
        self.superfluous = D * len(self.sides)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.out(torch.cat([self.project[side](x[side]) for side in self.sides], 1))

    @torch.no_grad()
    def settle(self) -> None:
        for linear, norm, *_ in self.project.values():
            norm.running_mean += linear.bias


class PlainCrossAttention(PlainFusion):
    def build(self, w: dict[str, int], D: int) -> None:
        super().build(w, D)
        if self.sides == BOTH:
            self.query, self.key, self.value = (of_sides(BOTH, lambda side: nn.Linear(D, D)) for _ in range(3))
            self.attention = attention(D)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        if self.sides != BOTH:
            return super().forward(x)
        image, text = (self.project[side](x[side]) for side in BOTH)
        q, k, v = (torch.stack([of["text"](text), of["image"](image)], 1) for of in (self.query, self.key, self.value))
        return self.out(self.attention(q, k, v)[0].flatten(1))


class PlainLate512(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        self.project = of_sides(self.sides, lambda side: nn.Linear(w[side], 512))
        self.classifier = mlp(512 * len(self.sides), 512, 0.5)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.classifier(torch.cat([self.project[side](x[side]) for side in self.sides], 1))


class PlainQueryAttention(Plain):
    def build(self, w: dict[str, int], D: int) -> None:
        query, key = self.sides[-1], self.sides[0]
        self.key = "image_tokens" if key == "image" and "image_tokens" in w else key
        self.to_query_width = nn.Linear(w[self.key], w[query])
        self.attention = attention(w[query], 2)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(w[query], 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        keys = self.to_query_width(x[self.key] if self.key == "image_tokens" else x[self.key][:, None])
        return self.out(self.drop(self.attention(x[self.sides[-1]][:, None], keys, keys)[0][:, 0]))


class PlainEarlyPlane(Plain):
    """Of pictures of 20 x 20."""

    def build(self, w: dict[str, int], D: int) -> None:
        if "text" in self.sides:
            self.to_plane = nn.Linear(w["text"], 400)
        self.stages = nn.Sequential(
            *(nn.Conv2d(2 + len(self.sides), D // 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)),  # 20 to 10 and 5
            *(nn.Conv2d(D // 4, D // 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),  # to 3 and 2
            *(nn.Conv2d(D // 2, D, 3, 2, 1), nn.ReLU()),  # to 1
        )
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(D, 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        planes = [x["image_tokens"].transpose(1, 2).reshape(-1, 3, 20, 20)]  # pixels row by row
        planes += [self.to_plane(x["text"]).view(-1, 1, 20, 20)] if "text" in self.sides else []
        return self.out(self.drop(self.stages(torch.cat(planes, 1)).flatten(1)))


PLAIN: dict[str, type[Plain]] = {
    "concat": PlainConcat,
    "weighted_sum": PlainWeightedSum,
    "attention": PlainAttention,
    "attention_linear": PlainAttentionLinear,
    "early": PlainEarly,
    "late": PlainLate,
    "clip_match": PlainClipMatch,
    "gated_transformer": PlainGatedTransformer,
    "vilbert": PlainVilbert,
    "cross_modal": PlainCrossModal,
    "coattention": PlainCoAttention,
    "fusion": PlainFusion,
    "cross_attention": PlainCrossAttention,
    "late_512": PlainLate512,
    "query_attention": PlainQueryAttention,
    "early_plane": PlainEarlyPlane,
}


# -- ours against them ------------------------------------------------------------------------------------------

D, ROWS = 16, 17  # more rows than `early_plane` takes at a time
OF_CLIP = {"image": 24, "text": 24}  # study A's and B's heads on CLIP, whose sides are of one width
APART = {"image": 24, "text": 16}
TOKENS = {"image_tokens": 7, "image_positions": 4, "text_tokens": 5}
WITH_TOKENS = {**APART, **TOKENS}
PICTURES = {"image": 3, "text": 12, "image_tokens": 3, "image_positions": 400}
WIDTHS = {
    **dict.fromkeys(STUDY_HEADS, OF_CLIP),
    **dict.fromkeys(("vilbert", "fusion", "cross_attention", "late_512", "query_attention"), APART),
    **dict.fromkeys(("cross_modal", "coattention"), TOKENS),
    "early_plane": PICTURES,
}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    *((name, {}, WIDTHS[name]) for name in STUDY_HEADS),
    ("gated_transformer", {"layers": 1}, OF_CLIP),
    ("coattention", {"attention_norm": "batch"}, TOKENS),
    ("coattention", {"attention_norm": "none", "image_pooling": "last"}, TOKENS),
    ("coattention", {"image_positions": "learnable", "image_pooling": "last"}, TOKENS),
    ("coattention", {"image_positions": "absolute", "image_pooling": "last"}, TOKENS),
    ("query_attention", {}, WITH_TOKENS),
]
CASES = [
    pytest.param(name, options, w, sides, id=" ".join([name, *map(str, options.values()), *w, *sides]))
    for name, options, w in VARIANTS
    for sides in (BOTH, TEXT, IMAGE)
    if (name, sides) != ("early_plane", TEXT)  # its plane is of 224 x 224: tests/test_heads.py
]


def features(w: dict[str, int]) -> dict[str, Tensor]:
    """Of two models. Texts of 1 to 6 tokens."""
    lengths = torch.tensor([[(5 * row + m) % 6 + 1 for row in range(ROWS)] for m in range(2)])
    real = torch.arange(6) < lengths[..., None]
    x = {side: normal(2, ROWS, w[side], seed=k) for k, side in enumerate(BOTH) if side in w}
    if "image_tokens" in w:
        x["image_tokens"] = normal(2, ROWS, w["image_positions"], w["image_tokens"], seed=8)
    if "text_tokens" in w:
        x["text_tokens"] = normal(2, ROWS, 6, w["text_tokens"], seed=9) * real[..., None]
    return {name: values.requires_grad_() for name, values in x.items()} | {"mask": real}


def pair_of(name: str, options: dict[str, Any], w: dict[str, int], sides: tuple[str, ...]) -> tuple[Head, Plain]:
    """A stack of two models, every number of which is random, and the second of them in plain torch."""
    head = build_head(HeadConfig(name, D, sides=sides, **options), w, 3, [4, 1])
    statistics = [x for of, x in head.named_buffers() if "running" in of]
    with torch.no_grad():
        for i, values in enumerate([*head.parameters(), *statistics]):
            values += normal(*values.shape, seed=100 + i).abs() * 0.2
    plain = PLAIN[name](sides, w, D, **options)
    copy_weights(head, 1, plain)
    plain.settle()
    assert sum(p.numel() for p in plain.parameters()) == n_parameters(head) + plain.superfluous
    return head, plain


def assert_same(head: Head, plain: Plain, w: dict[str, int]) -> None:
    """Logits, and gradients by the features."""
    x = features(w)
    logits = head(Batch(**{"text_mask" if name == "mask" else name: values for name, values in x.items()}))[1]
    expected = plain({name: values[1] for name, values in x.items()})
    assert expected.std(0).min() > 1e-4
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    leaves = [values for name, values in x.items() if name != "mask"]
    of_ours, of_plain = (torch.autograd.grad((y**3).sum(), leaves, allow_unused=True) for y in (logits, expected))
    assert any(gradient is not None for gradient in of_plain)
    for ours, theirs in zip(of_ours, of_plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            largest = theirs[1].abs().max().item()
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("name, options, w, sides", CASES)
def test_logits_as_described(name: str, options: dict[str, Any], w: dict[str, int], sides: tuple[str, ...]):
    head, plain = pair_of(name, options, w, sides)
    assert_same(head.eval(), plain.eval(), w)


class Masks:
    """The k-th dropout of a forward pass has the k-th of these masks, in whichever writing; `met`: each one's p and
    size."""

    def __init__(self) -> None:
        self.met: list[tuple[float, int]] = []

    def drop(self, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
        kept = torch.rand(*shape, generator=torch.Generator().manual_seed(len(self.met))) >= p
        self.met.append((p, kept.numel()))
        return x * kept / (1 - p)


@pytest.mark.parametrize("name, options, w, sides", CASES)
def test_training_drops_out_where_the_study_does(
    name: str, options: dict[str, Any], w: dict[str, int], sides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """And normalises by the batch: everything of a training's forward and backward pass."""
    ours, theirs = Masks(), Masks()

    def plain_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return theirs.drop(x, p, x.shape) if training else x

    def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool) -> Tensor:
        assert mask is None and not causal
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return plain_dropout(weights, p) @ v

    monkeypatch.setattr(layers.Dropout, "forward", lambda self, x: ours.drop(x, self.p, x.shape[1:]) if self.p else x)
    monkeypatch.setattr(F, "dropout", plain_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    head, plain = pair_of(name, options, w, sides)
    assert_same(head.train(), plain.train(), w)
    assert ours.met == theirs.met
    assert bool(ours.met) == ("dropout" in HEADS[name].reads)
