"""The models that the reference studies tuned end to end, and how: their encoders, heads and settings.

What a study doesn't tell of a setting is left out; what it doesn't tell of a model is chosen, and said so below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling.training.recipes import RECIPES


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
    token features, so the encoders must give them. `settings`: what the study's recipe has otherwise for this model."""

    study: str
    summary: str
    image: EncoderChoice
    text: EncoderChoice
    head: str
    tokens: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


_BERT = EncoderChoice("roberta", "bert-base-uncased", {"pooling": "cls"})
_CHINESE_BERT = EncoderChoice("roberta", "bert-base-chinese", {"pooling": "cls"})  # chosen: the class token
_RESNET50 = EncoderChoice("resnet", "resnet50")
_NOT_CLIP = {"lr": 1e-4, "weight_decay": 0.01}  # B's other models; the decay is AdamW's own default in torch
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
        settings=_NOT_CLIP,
    ),
    "vilbert_style": StudyModel(
        "B",
        "BERT's class token and ViT's vector through a two-token Transformer",
        EncoderChoice("vit", "google/vit-base-patch16-224-in21k"),
        _BERT,
        "vilbert",
        settings=_NOT_CLIP,
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

# As published code of B and D trains: at a constant rate, gradients of any norm.
_PLAIN = {"schedule": "constant", "warmup": 0.0, "clip_grad": 0.0}
_OF_CACHED_FEATURES = ("ep", "precision")  # study D's 100 epochs of a head alone, and how it multiplied in them

TUNING_RECIPES: dict[str, dict[str, Any]] = {
    # The whole of CLIP; batch, epochs and the random tenth are the same for all models of B.
    "B": {**RECIPES["B"], **_PLAIN},
    "C": RECIPES["C"],
    # D's table has its finetuned ResNet50 and RoBERTa at D 256 and 2e-5, its module a batch of 64, 50 epochs, batch
    # norms in training and Adam with torch's own decay, none. The rest is that of its heads.
    "D": {
        **{name: value for name, value in RECIPES["D"].items() if name not in _OF_CACHED_FEATURES},
        "lr": 2e-5,
        "bs": 64,
        "ep": 50,
        "weight_decay": 0.0,
        "train_batch_norm": True,
        **_PLAIN,
    },
    "E": RECIPES["E"],
}


def tuning_recipe(study: str | None, model: str | None = None) -> dict[str, Any]:
    """A study's settings of end-to-end training, those of a model of its own among them; none without a study."""
    own = MODELS[model].settings if model and MODELS[model].study == study else {}
    return {**TUNING_RECIPES[study], **own} if study else {}


def with_one_rate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, where no rate of the head is among them with that of the encoders: each study had one
    rate for both."""
    return {"head_lr": values["lr"], **values}
