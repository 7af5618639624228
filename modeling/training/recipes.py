"""The reference studies' settings: how each trained and split. What a study doesn't tell is left at the default.

C has no recipe: it tuned its encoders. Names are fields of `HeadConfig`, `TrainConfig` and, `val_ratio`, `test_ratio`
and `split_seed`, of the split.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "A": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr": 1e-4,
        "schedule": "onecycle",
        "bs": 64,
        "ep": 10,
        "patience": 2,
        "monitor": "weighted_f1",
        "label_smoothing": 0.1,
        "class_weights": {"neutral": 1.2},  # where there is such a class
        "val_ratio": 0.1,
        "test_ratio": 0.1,
    },
    "B": {"optimizer": "adamw", "weight_decay": 0.01, "bs": 8, "ep": 10, "val_ratio": 0.1},
    "D": {"optimizer": "adam", "lr": 1e-4, "bs": 512, "ep": 100, "val_ratio": 0.1, "split_seed": 42},
    "E": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr": 1e-5,
        "bs": 16,
        "ep": 6,
        "dropout": 0.5,
        "patience": 3,
        "monitor": "macro_f1",
        "val_ratio": 0.2,
    },
}
SPLIT_SETTINGS = ("val_ratio", "test_ratio", "split_seed")
