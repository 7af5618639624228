"""What a run's folder holds, and what its config.json says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feats.errors import UsageError
from feats.json_files import read_json, shape_of, shape_problem
from feats.source import SIDES
from modeling.heads.config import HeadConfig
from modeling.training.config import TrainConfig

FORMAT_VERSION = 3
CONFIG, TENSORS, SPLIT, METRICS, HISTORY, PREDICTIONS = (
    "config.json",
    "head.safetensors",
    "split.json",
    "metrics.json",
    "history.csv",
    "predictions_val.csv",
)
TEST_PREDICTIONS = "predictions_test.csv"  # where the split has a test part
FOLD_PREDICTIONS = "predictions_test_{}.csv"  # where several splits have, by fold from 1
BATCHES = "history_batches.csv"  # where losses by batch were asked for
CORRECTIONS = "corrections.csv"  # where labels were corrected
TARGET = "labels.csv"  # where they are of another column than the caches'
PREDICTION_COLUMNS = ("id", "tag", "pred")
FILES = (CONFIG, TENSORS, SPLIT, METRICS, HISTORY, PREDICTIONS)  # what every run has
REMEDY = "train again"
# What config.json must hold, see `feats.json_files`. Later versions may write more.
_SIDES = {side: [str] for side in SIDES}
_MEMBER = {
    "train": {
        **shape_of(TrainConfig),
        "class_weights": (str, [[str | int | float]]),
        "head": {**shape_of(HeadConfig), "head": str, "sides?": [str]},
        "seed": int,
    },
    "preprocessing": {"caches": _SIDES, "scales": {str: float}, "kinds": {str: str}},
    "widths": {str: int},
    "temperature": float,
    "group": int,
    "best_epoch": int | None,
    "epochs?": int | None,
    "facts": dict,
    "fold": int | None,
}
SHAPE = {
    "created": str,
    "classes": [str],
    "training_rows": {str: int},
    "features": {
        **_SIDES,
        "folder": str,
        "tokens?": bool,
        "fingerprints?": {str: {"encoder?": str, "model?": str, "dtype?": str}},
        "contents?": {str: str},
        "parameters?": {str: {str: int}},
    },
    "features_from_run": str,
    "split": (dict, [dict]),
    "stacked": bool,
    "finetuned?": (None, {"encoders": {str: str}, "data": str, "layout": str, "facts": dict, "columns?": {str: str}}),
    "cost?": (None, dict),
    "corrections?": (None, {"sha256": str}),
    "target?": (None, {"column": str, "data": str, "sha256": str}),
    "members": [_MEMBER],
    "tensors_sha256": str,
}


def train_config(saved: Mapping[str, Any]) -> TrainConfig:
    """A member's settings as config.json holds them. Raises `KeyError`, `TypeError`, `ValueError` or `UsageError` for
    anything else."""
    train = dict(saved)
    if not isinstance(train["class_weights"], str):
        train["class_weights"] = dict(train["class_weights"])
    return TrainConfig(**{**train, "head": HeadConfig(**train["head"])})


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json. Raises `UsageError` when it isn't there or isn't that."""
    config: dict[str, Any] = read_json(path / CONFIG, REMEDY)
    if config.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{path / CONFIG} isn't of format version {FORMAT_VERSION}; train again with this version")
    wrong = shape_problem(config, SHAPE) or _contradiction(config)
    if wrong:
        raise UsageError(f"{path / CONFIG} {wrong}; {REMEDY}")
    return config


def _contradiction(config: Mapping[str, Any]) -> str:
    """What of a config doesn't fit the rest of it, '' for nothing."""
    classes = config["classes"]
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= config["training_rows"].keys():
        return "names no classes, one twice, or one without training rows"
    if not config["members"]:
        return "has no members"
    for member in config["members"]:
        if not member["temperature"] > 0:
            return f"holds a temperature of {member['temperature']:g}, expected one above 0"
        caches, kinds = member["preprocessing"]["caches"], member["preprocessing"]["kinds"]
        known = {f"{side}{of}/{name}" for side in SIDES for name in caches[side] for of in ("", "_tokens")}
        lacking = [name for side in SIDES for name in caches[side] if f"{side}/{name}" not in kinds]
        if lacking or not set(kinds) <= known:
            return "normalises other caches than it reads"
    return ""


def is_whole(path: Path) -> bool:
    """Whether there is a run with all its files; they aren't checked beyond the config's format version."""
    if not all((path / name).is_file() for name in FILES):
        return False
    try:
        read_config(path)
    except UsageError:
        return False
    return True


def read_metrics(path: Path) -> dict[str, Any]:
    """A run's metrics.json. Raises `UsageError` when it can't be read."""
    figures: dict[str, Any] = read_json(path / METRICS, REMEDY)
    return figures
