"""The reference studies' settings, literally: how each trained and split. What a study doesn't tell is left at the
default; what it tells without a figure is left out, and said so below.

Names are fields of `HeadConfig` (a `head` among them is the default where none is named), of `TrainConfig`, of the
split (`SPLIT_SETTINGS`), and `norm`, the normalisation of all caches. Two things stay ours: splits are stratified with
duplicates together, where B and D drew rows at random, and the best epoch is kept, where D kept the last.
"""

from typing import Any

# What heads on cached features take in place of settings that belong to encoders in training: by validation rows of
# MVSA-Single (MiniLM and EfficientNet-Lite0), among rates of 1e-5 to 1e-3. B's heads normalise what they read; C's and
# E's don't: standardised, features of any encoder ask for about the same rate.
_CACHED: dict[str, dict[str, Any]] = {
    "B": {"lr": 1e-4, "ep": 20},
    "C": {"lr": 1e-4, "bs": 64, "ep": 10, "norm": "standard"},  # C doesn't tell its batch
    "E": {"lr": 1e-4, "ep": 20, "norm": "standard"},
}
# By recipe and head, where one rate doesn't suit all of a study's heads: on unit vectors a single linear layer learns
# next to nothing at 1e-4, while three Transformer layers collapse above.
_OF_HEAD: dict[tuple[str, str], dict[str, Any]] = {("B-cached", "late"): {"lr": 1e-3}}

_STUDIES: dict[str, dict[str, Any]] = {
    # A also names label smoothing and "a small extra class weight for neutral", and gives no figure for either: none.
    "A": {
        "D": 256,  # classifier: Linear to 256
        "dropout": 0.5,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr": 1e-4,  # peak
        "schedule": "onecycle",  # torch's default, warm-up 0.3, cosine, cycled momentum
        "bs": 64,
        "ep": 10,  # at most
        "patience": 2,
        "monitor": "weighted_f1",
        "val_ratio": 0.125,  # 3500 training and 500 validation rows of the 4000 labelled
        "test_ratio": 0.0,  # the 1 of its 8:1:1 is the unlabelled list
    },
    # Its published defaults, for CLIP, the whole of which it tuned.
    "B": {
        "D": 512,  # its clip_match adds 1.051 M parameters
        "optimizer": "adamw",
        "weight_decay": 1e-4,
        "lr": 1e-5,
        "bs": 8,
        "ep": 10,
        "monitor": "accuracy",
        "val_ratio": 0.1,
        "split_seed": 42,
    },
    "C": {
        "lr": 5e-6,  # tuned end to end; it began at 1e-4
        "ep": 10,
        "monitor": "accuracy",
        "val_ratio": 0.2,  # 4:1
    },
    "D": {
        "D": 256,  # the best of 128 and 256
        "dropout": 0.3,
        "optimizer": "adam",
        "lr": 1e-4,
        "bs": 512,
        "ep": 100,
        "precision": "fp16",  # autocast and GradScaler, on a GPU
        "monitor": "accuracy",  # it reports the best epoch's
        "val_ratio": 0.1,
        "split_seed": 42,
    },
    # The best of its grid lr {1e-5, 2e-5} x dropout {0.3, 0.5}, applied to all its models.
    "E": {
        "dropout": 0.5,
        "optimizer": "adamw",
        "weight_decay": 0.01,  # AdamW's own default in torch
        "lr": 1e-5,
        "bs": 16,
        "ep": 6,
        "patience": 3,
        "min_gain": 0.001,
        "monitor": "macro_f1",
        "val_ratio": 0.2,  # 8:2
    },
    # Se-MLNN (Cheema et al. 2021): study D's layers on L2-normalised features, ten fixed folds as files.
    "cheema": {
        "head": "fusion",
        "norm": "l2",
        "D": 128,
        "dropout": 0.5,
        "optimizer": "adam",
        "lr": 2e-5,
        "bs": 32,
        "ep": 100,
        "monitor": "loss",
    },
}
END_TO_END = ("B", "C", "E")  # their rate and epochs are of encoders in training
OF_FIXED_FOLDS = ("cheema",)

RECIPES: dict[str, dict[str, Any]] = {
    **_STUDIES,
    **{f"{study}-cached": {**_STUDIES[study], **_CACHED[study]} for study in END_TO_END},
}
SPLIT_SETTINGS = ("val_ratio", "test_ratio", "split_seed")


def cached_recipe(study: str) -> str:
    """The recipe of a study's settings for heads on cached features: its own, where those aren't of encoders in
    training; '' where there is none."""
    name = f"{study}-cached" if study in END_TO_END else study
    return name if name in RECIPES else ""


def recipe_settings(recipe: str, head: str) -> dict[str, Any]:
    """A recipe's settings for a head; none for the name ''."""
    return {**RECIPES[recipe], **_OF_HEAD.get((recipe, head), {})} if recipe else {}
