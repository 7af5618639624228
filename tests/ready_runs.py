"""Run folders with predictions made up: one real training, then copies of it that say what a test wants."""

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from caches import CLASSES, make_cache

from modeling import train_head
from modeling.evaluation import metrics
from modeling.runs.folder import write_predictions
from modeling.runs.listing import newest_run

SHORT = ["--head", "concat", "--D", "4", "--ep", "1", "--bs", "32", "--val-ratio", "0.3"]


def template(root: Path) -> Path:
    """A trained run in `root`/template, of a cache in `root`/feats."""
    make_cache(root / "feats", "clip", 60)
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "template")]
    assert train_head.main([*folders, "--vtype", "clip", *SHORT]) == 0
    return newest_run(root / "template")


def labels_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, n)


def noisy(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Predictions of which about this share are those of the labels."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < share, labels, rng.integers(0, 3, len(labels)))


def ready_run(
    model: Path,
    path: Path,
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    classes: Sequence[str] = CLASSES,
    ids: Sequence[str] | None = None,
    hours: float = 1,
    head: str | None = None,
    caches: tuple[Sequence[str], Sequence[str]] | None = None,
    seed: int | None = None,
    split: Any = None,
    monitor: str | None = None,
    folds: int = 0,
) -> Path:
    """A copy of the run `model` that was saved so many `hours` ago and predicted these validation rows so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, path)
    config = json.loads((model / "config.json").read_text())
    config["classes"] = list(classes)
    config["training_rows"] = {name: 30 if k == 1 else 10 for k, name in enumerate(classes)}
    config["created"] = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    train = config["members"][0]["train"]
    train |= {name: value for name, value in (("seed", seed), ("monitor", monitor)) if value is not None}
    train["head"] |= {"head": head} if head else {}
    if caches is not None:
        config["features"] |= {"image": list(caches[0]), "text": list(caches[1])}
    if split is not None:
        config["split"] = split
    config["members"] = [{**config["members"][0], "fold": k + 1} for k in range(folds)] or config["members"]
    (path / "config.json").write_text(json.dumps(config))
    probabilities = np.full((len(labels), len(classes)), 0.1)
    probabilities[np.arange(len(labels)), predictions] = 1
    probabilities /= probabilities.sum(1, keepdims=True)
    ids = [f"r{k}" for k in range(len(labels))] if ids is None else ids
    write_predictions(path / "predictions_val.csv", ids, [classes[k] for k in labels], probabilities, classes)
    val = metrics.figures(labels, probabilities, classes, classes[1])
    members = {"count": max(folds, 1), "mean_std": metrics.mean_std([val]), "collapsed": []}
    if folds:
        parts = np.array_split(np.arange(len(labels)), folds)
        members["mean_std"] = metrics.mean_std([metrics.figures(labels[p], probabilities[p], classes) for p in parts])
    (path / "metrics.json").write_text(json.dumps({"val": val, "members": members, "protocol": "made up"}))
    return path
