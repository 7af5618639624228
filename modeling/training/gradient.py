"""Gradient descent for many heads at once on cached tensors: no DataLoader, batches are index slices of what lies on
the device.

The configurations of a stack (see `modeling.heads.layers`) share one forward and one backward pass, each with its own
learning rate, decay, class weights, batch order, dropout mask and seed. A configuration gives the same result in a
stack as alone, up to the rounding of differently blocked products.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feats.acceleration import DTYPES
from modeling.heads.base import Head
from modeling.heads.layers import Noise, attach_noise, set_product_dtype
from modeling.heads.registry import build_head
from modeling.training.batches import InMemory, batches_of
from modeling.training.config import TrainConfig, is_better
from modeling.training.draws import stream_of
from modeling.training.graphs import Results, recorded, recorder_for
from modeling.training.problem import (
    Epoch,
    Problem,
    Told,
    Trained,
    averages_of,
    class_weights,
    confusions,
    validation_figures,
)
from modeling.training.stacked_adam import StackedAdam
from modeling.training.threads import StepThreads, threads_kept

COUNTED_ROWS = 1 << 18  # whose logits are kept until they are counted


@threads_kept()
def train_stack(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """Train configurations of one shape, see `modeling.training.fit.stacks`; `progress` is told epochs times models,
    `told` what each came to."""
    epochs = configs[0].ep
    stack = _Stack(configs, problem)
    step = stack.fastest_step()
    best = _Best(stack.head, configs)
    history: list[list[dict[str, Any]]] = [[] for _ in configs]
    for epoch in range(1, epochs + 1):
        losses, counts = stack.train_epoch(step)
        val_logits = stack.batches.validate(stack.head)
        figures = {"train_loss": losses.sum(0).cpu().numpy() / stack.batches.n_rows}
        figures |= averages_of(counts, "train_")
        figures |= validation_figures(val_logits, problem.labels[problem.val], problem.classes)
        figures |= {name: values.cpu().numpy() for name, values in stack.head.scalars().items()}
        for m in best.training():
            row = {name: values[m].item() for name, values in figures.items()}
            diverged = [row[kind] for kind in ("train_loss", "val_loss") if not math.isfinite(row[kind])]
            if diverged:
                best.fail(m, _divergence(configs[m], diverged[0], epoch))
            else:
                history[m].append({"epoch": epoch, "lr": stack.optimizer.last_lr(m), **row})
        trained = best.training()
        better = best.update(epoch, figures, stack.head, val_logits)
        if told is not None:
            of_batches = stack.batch_means(losses)
            for m in trained:
                told(Epoch(configs[m], history[m][-1], m in better, of_batches[:, m].tolist()))
        progress(len(configs))
        if not best.training():
            progress(len(configs) * (epochs - epoch))
            break
    return [
        Trained(c, *best.model(m, stack.widths, stack.n_classes), best.epoch[m], history[m], failure=best.failure[m])
        for m, c in enumerate(configs)
    ]


def _divergence(config: TrainConfig, loss: float, epoch: int) -> str:
    return (
        f"the loss of {config.head.head} became {loss} in epoch {epoch} (lr {config.lr:g}); use a smaller `lr`, or "
        "`norm` l2 or standard"
    )


class _Stack:
    """M models of one shape side by side: their `head`, `batches` and `optimizer`, and the step they take together."""

    def __init__(self, configs: Sequence[TrainConfig], problem: Problem):
        first, self.device = configs[0], problem.device
        inputs = problem.inputs.for_head(first.head)
        self.configs, self.widths, self.n_classes = configs, inputs.widths, len(problem.classes)
        self.head = build_head(first.head, inputs.widths, self.n_classes, [c.seed for c in configs], self.device)
        set_product_dtype(self.head, DTYPES[first.precision])
        self.noise = Noise([stream_of(c.seed, "dropout") for c in configs], self.device)
        attach_noise(self.head, self.noise)
        self.batches = batches_of(configs, problem, inputs)
        self.ragged = inputs.text_tokens is not None
        self.steps = first.ep * self.batches.steps
        self.optimizer = StackedAdam(self.head, configs, self.steps)
        self.class_weights = self.smoothing = None
        if any(c.class_weights != "none" for c in configs):
            self.class_weights = torch.stack([class_weights(c.class_weights, problem) for c in configs])
        if any(c.label_smoothing for c in configs):
            self.smoothing = torch.tensor([c.label_smoothing for c in configs], device=self.device)
        self.threads = StepThreads(self.device, steady=first.deterministic)

    def fastest_step(self) -> Callable[..., Results]:
        """The step, recorded where that pays and can be."""
        recorder = recorder_for(self.device, self.steps) if isinstance(self.batches, InMemory) else None
        # Batches of ragged tokens are of any length, and onecycle changes a number that a recording holds.
        if recorder is None or self.ragged or any(c.schedule == "onecycle" for c in self.configs):
            return self._step
        self.optimizer.hold_rates()
        return recorded(self._step, self.head, self.noise, recorder)

    def train_epoch(self, step: Callable[..., Results]) -> tuple[Tensor, np.ndarray]:
        """Every row once: the loss of each batch, summed over its rows (steps, M), and confusion matrices (M, C, C)."""
        self.head.train()
        bs, n_rows = self.configs[0].bs, self.batches.n_rows
        losses = torch.empty(self.batches.steps, len(self.configs), device=self.device)
        counted = _Counted(len(self.configs), self.n_classes, n_rows, bs, self.device)
        with closing(self.batches.epoch()) as batches:
            for number, drawn in enumerate(batches):
                self.threads.begin_step()
                self.optimizer.begin_step()
                loss, logits, labels = step(*drawn)
                losses[number] = loss * labels.shape[1]
                counted.add(logits, labels)
                self.threads.end_step()
        return losses, counted.confusions()

    def batch_means(self, losses: Tensor) -> Tensor:
        """Each batch's mean loss (steps, M) on the host, of what `train_epoch` gave: the last batch may be smaller."""
        steps, bs = self.batches.steps, self.configs[0].bs
        sizes = torch.full((steps,), bs)
        sizes[-1] = self.batches.n_rows - (steps - 1) * bs
        return losses.cpu() / sizes[:, None]

    def _step(self, *drawn: Any) -> Results:
        batch, labels = self.batches.gather(*drawn)
        logits = self.head(batch)
        loss = cross_entropy(logits, labels, self.class_weights, self.smoothing)
        loss.sum().backward()
        self.optimizer.apply()
        return loss.detach(), logits.detach(), labels


class _Counted:
    """Confusion matrices of an epoch's batches, of `rows` rows by `bs`: counted for many batches at a time, since each
    count costs as much as a small step.

    The logits' place is made once: small tensors kept from every batch would sit in the gaps that its activations
    leave, and memory grow by those."""

    def __init__(self, n_models: int, n_classes: int, rows: int, bs: int, device: torch.device):
        held = min(rows, max(1, COUNTED_ROWS // bs) * bs)
        self.logits = torch.empty(n_models, held, n_classes, device=device)
        self.labels = torch.empty(n_models, held, dtype=torch.int64, device=device)
        self.used, self.counts = 0, np.zeros((n_models, n_classes, n_classes), np.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch's logits (M, B, C) and labels (M, B)."""
        if self.used + labels.shape[1] > self.labels.shape[1]:
            self._count()
        place = slice(self.used, self.used + labels.shape[1])
        self.logits[:, place], self.labels[:, place] = logits, labels
        self.used = place.stop

    def confusions(self) -> np.ndarray:
        """Of all that was added, (M, C, C) int64, rows true."""
        self._count()
        return self.counts

    def _count(self) -> None:
        self.counts += confusions(self.logits[:, : self.used], self.labels[:, : self.used])
        self.used = 0


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: Tensor | None = None
) -> Tensor:
    """Each model's mean loss (M,) of logits (M, B, C) and labels (M, B), with class weights (M, C) and label smoothing
    (M,): as torch's cross_entropy with both, for every model its own."""
    log_p = logits.log_softmax(-1)
    of_true = log_p.gather(-1, labels[..., None])[..., 0]
    if weights is None and smoothing is None:
        return -of_true.mean(1)
    weights = torch.ones_like(logits[:, 0]) if weights is None else weights
    of_row = weights.gather(1, labels)
    loss = -(of_row * of_true).sum(1)
    if smoothing is not None:
        of_all = -(weights[:, None] * log_p).sum((1, 2)) / logits.shape[-1]
        loss = torch.lerp(loss, of_all, smoothing)
    return loss / of_row.sum(1)


class _Best:
    """Each model's weights, validation logits and epoch at its best monitored figure so far; when it stops."""

    def __init__(self, head: Head, configs: Sequence[TrainConfig]):
        self.configs = configs
        self.epoch = [0] * len(configs)
        self.score = [-math.inf] * len(configs)
        self.stopped = [False] * len(configs)
        self.failure: list[str | None] = [None] * len(configs)
        self.state = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
        self.logits: Tensor | None = None

    def update(self, epoch: int, figures: dict[str, np.ndarray], head: Head, val_logits: Tensor) -> list[int]:
        """Take an epoch in; returns the models whose best it is."""
        better = []
        for m in self.training():
            config = self.configs[m]
            score = -figures["val_loss"][m] if config.monitor == "loss" else figures[config.monitor][m]
            if is_better(score, self.score[m], config.min_gain):
                self.score[m], self.epoch[m] = float(score), epoch
                better.append(m)
            elif config.patience is not None and epoch - self.epoch[m] >= config.patience:
                self.stopped[m] = True
        if self.logits is None:
            self.logits = val_logits.clone()
        if better:
            for name, tensor in [*head.state_dict().items(), ("", val_logits)]:
                kept = self.logits if name == "" else self.state[name]
                for m in better:
                    kept[m].copy_(tensor[m])
        return better

    def training(self) -> list[int]:
        """The models that haven't stopped."""
        return [m for m, stopped in enumerate(self.stopped) if not stopped]

    def fail(self, m: int, reason: str) -> None:
        self.stopped[m], self.failure[m] = True, reason

    def model(self, m: int, widths: dict[str, int], n_classes: int) -> tuple[Head, dict[str, int], np.ndarray]:
        """Model m as a head of its own, its widths, and its validation logits."""
        if self.logits is None:
            raise RuntimeError("no epoch was trained: there is nothing to choose from")
        head = build_head(self.configs[m].head, widths, n_classes)
        head.load_state_dict({name: tensor[m : m + 1].cpu() for name, tensor in self.state.items()})
        return head.eval(), widths, self.logits[m].cpu().numpy()
