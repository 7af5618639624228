"""What a training is given and what it gives, whichever way a head is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feats.errors import UsageError
from modeling.evaluation import metrics
from modeling.features.inputs import Inputs
from modeling.features.stream import StreamedInputs
from modeling.heads.base import Head
from modeling.training.config import ClassWeights, TrainConfig

EVAL_BYTES = 1 << 26  # of features times models in one evaluation step


@dataclass(frozen=True)
class Problem:
    """Features, labels and one split of them. `train` and `val` are row numbers, int64; labels outside them may be -1.

    `folds` (len(train),) int64 numbers the training rows' inner folds, duplicates in one: what closed-form heads
    choose their hyperparameters by.

    `streamed` reads the features where they don't fit in memory; `inputs` then has their shapes only."""

    inputs: Inputs
    labels: Tensor  # (N,) int64
    train: Tensor
    val: Tensor
    classes: list[str]
    folds: Tensor | None = None
    streamed: StreamedInputs | None = None

    @property
    def device(self) -> torch.device:
        """Where training takes place."""
        return self.inputs.device if self.streamed is None else self.streamed.device


@dataclass(frozen=True)
class Trained:
    """One trained configuration: the head of its best epoch, or of its closed form (one model, on the CPU, in
    evaluation mode). `history` has a row for each epoch; of a closed form, which has none, one row of validation
    figures.

    `failure` says why a training ended early whose loss was no longer finite; such a head is of no use."""

    config: TrainConfig
    head: Head
    widths: dict[str, int]  # what `head` was built for
    val_logits: np.ndarray  # (len(val), C) float32
    best_epoch: int | None  # None: a closed form
    history: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)  # what a closed-form head chose
    held_out: np.ndarray | None = None  # (len(train), C): a closed-form head's logits of each inner fold without it
    failure: str | None = None


@dataclass(frozen=True)
class Epoch:
    """What there is to tell of a training as an epoch ends: a `row` as in `Trained.history`, whether its monitored
    figure is the `best` so far, and the mean loss of each batch."""

    config: TrainConfig
    row: Mapping[str, Any]
    best: bool
    batch_losses: Sequence[float]


Told = Callable[[Epoch], Any]  # hears of every epoch of every training


def class_weights(chosen: ClassWeights | Mapping[str, float], problem: Problem) -> Tensor:
    """Weights (C,): none; balanced, n / (C n_c) of the training rows; sqrt, its root; or those of named classes, 1 for
    the others. Raises `UsageError` for names that are no class."""
    counts = torch.bincount(problem.labels[problem.train], minlength=len(problem.classes)).float()
    weights = torch.ones_like(counts)
    if isinstance(chosen, str):
        if chosen == "none":
            return weights
        weights = counts.sum() / (len(counts) * counts.clamp(min=1))  # a class without rows isn't weighed infinite
        return weights.sqrt() if chosen == "sqrt" else weights
    for name, value in dict(chosen).items():
        if name not in problem.classes:
            raise UsageError(f"class weight of {name!r}: no such class; there are {', '.join(problem.classes)}")
        weights[problem.classes.index(name)] = value
    return weights


@torch.inference_mode()
def predict_stack(head: Head, inputs: Inputs, rows: Tensor | None = None) -> Tensor:
    """Logits (M, n, C) of every model, float32, for `rows` (n,) int64 or all."""
    head.eval()
    at_once = max(1, EVAL_BYTES * len(inputs) // max(1, inputs.n_bytes * head.n_models))
    if rows is None and len(inputs) <= at_once:
        return head(inputs.batch().expand(head.n_models))
    rows = torch.arange(len(inputs), device=inputs.device) if rows is None else rows
    return torch.cat([head(inputs.batch(block[None]).expand(head.n_models)) for block in rows.split(at_once)], 1)


def validation_figures(logits: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Loss and averages of each model's validation logits (M, n, C), each (M,); with the names of the `classes` also
    how many rows are predicted as each, "predicted_<class>"."""
    n_models, n, _ = logits.shape
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n_models), reduction="none")
    confusion = confusions(logits, labels)
    counts = {f"predicted_{name}": confusion[..., k].sum(-1) for k, name in enumerate(classes)}
    return {"val_loss": loss.view(n_models, n).mean(1).cpu().numpy()} | averages_of(confusion) | counts


def confusions(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Each model's confusion matrix (M, C, C), rows true, of logits (M, n, C) and labels (n,) or (M, n)."""
    n_models, _, n_classes = logits.shape
    cell = labels * n_classes + logits.argmax(-1)
    cell = cell + n_classes**2 * torch.arange(n_models, device=cell.device)[:, None]
    counts = torch.bincount(cell.flatten(), minlength=n_models * n_classes**2)
    matrices: np.ndarray = counts.view(n_models, n_classes, n_classes).cpu().numpy()
    return matrices


def averages_of(confusion: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
    """Accuracy and F1s of confusion matrices (..., C, C), their names behind `prefix`."""
    figures = metrics.scores(confusion)
    return {prefix + name: figures[name] for name in metrics.AVERAGES}
