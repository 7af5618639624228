"""The models that the reference studies tuned end to end, and how: their encoders, heads and settings.

What a study doesn't tell of a setting is left out; what it doesn't tell of a model is chosen, and said so below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder of the registry (`feats.encoders.registry.ENCODERS`), not yet loaded; `model` None is its default.
    `untrained`: of the same kind, but begun from random weights (`modeling.finetuning.scratch`)."""

    name: str
    model: str | None = None
    options: Mapping[str, str | int] = field(default_factory=dict)
    untrained: bool = False


@dataclass(frozen=True)
class StudyModel:
    """A study's two encoders and the head on them, a name of `modeling.heads.registry.HEADS`. `tokens`: the head reads
    token features, so the encoders must give them."""

    study: str
    summary: str
    image: EncoderChoice
    text: EncoderChoice
    head: str
    tokens: bool = False


_BERT = EncoderChoice("roberta", "bert-base-uncased", {"pooling": "cls"})
_CHINESE_BERT = EncoderChoice("roberta", "bert-base-chinese", {"pooling": "cls"})  # chosen: the class token
_RESNET50 = EncoderChoice("resnet", "resnet50")
_CLIP = EncoderChoice("clip")  # ViT-B/32, but for given weights what they hold

MODELS: dict[str, StudyModel] = {
    "resnet_roberta": StudyModel(
        "D", "ResNet50 and RoBERTa, both projected", _RESNET50, EncoderChoice("roberta", "roberta-base"), "fusion"
    ),
    # B compared heads on it (early, late, gated_transformer, clip_match); the one here is our default.
    "clip": StudyModel("B", "CLIP ViT-B/32, both sides", _CLIP, _CLIP, "clip_match"),
    "bert_vit_scratch": StudyModel(
        "B",
        "BERT-style and ViT from random weights, cross-modal attention",
        EncoderChoice("vit", untrained=True),
        EncoderChoice("roberta", options={"pooling": "cls"}, untrained=True),
        "cross_modal",
        tokens=True,
    ),
    "vilbert_style": StudyModel(
        "B",
        "BERT's class token and ViT's vector through a two-token Transformer",
        EncoderChoice("vit", "google/vit-base-patch16-224-in21k"),
        _BERT,
        "vilbert",
    ),
    # C says ResNet and BERT: their usual sizes are chosen.
    "bert_resnet_coattention": StudyModel(
        "C", "BERT's and ResNet's tokens, co-attention", _RESNET50, _BERT, "coattention", tokens=True
    ),
    "bert_resnet_late": StudyModel("E", "BERT and ResNet50, each to 512", _RESNET50, _CHINESE_BERT, "late_512"),
    "bert_resnet_early": StudyModel(
        "E",
        "the text as a plane behind the picture, convolutions",
        EncoderChoice("pixels"),
        _CHINESE_BERT,
        "early_plane",
        tokens=True,
    ),
    "bert_resnet_cross": StudyModel(
        "E", "BERT as query over ResNet50's vector", _RESNET50, _CHINESE_BERT, "query_attention"
    ),
}

TUNING_RECIPES: dict[str, dict[str, Any]] = {
    # B's published defaults: the whole of CLIP at 1e-5; batch, epochs and the random tenth are the same for all models.
    "B": {
        "optimizer": "adamw",
        "lr": 1e-5,
        "weight_decay": 1e-4,
        "bs": 8,
        "ep": 10,
        "val_ratio": 0.1,
        "D": 512,  # its clip_match has 1.051 M parameters
    },
    # C brought the rate from 1e-4 down to 5e-6 for finetuning; the best of 10 epochs by accuracy; split 4:1.
    "C": {"lr": 5e-6, "ep": 10, "monitor": "accuracy", "val_ratio": 0.2},
    # D's table has its finetuned ResNet50 and RoBERTa at D 256 and 2e-5, its module a batch of 64. Adam, the dropout
    # and the split with its seed are those of its heads; the 100 epochs there belong to cached features.
    "D": {
        "optimizer": "adam",
        "lr": 2e-5,
        "bs": 64,
        "dropout": 0.3,
        "val_ratio": 0.1,
        "split_seed": 42,
        "D": 256,
    },
    # E's best of the grid lr {1e-5, 2e-5} x dropout {0.3, 0.5}, applied to all; early stop on macro F1; split 8:2.
    "E": {
        "optimizer": "adamw",
        "lr": 1e-5,
        "bs": 16,
        "ep": 6,
        "dropout": 0.5,
        "monitor": "macro_f1",
        "patience": 3,
        "min_gain": 0.001,
        "val_ratio": 0.2,
    },
}
