"""Gradient descent for many heads at once on cached tensors: no DataLoader, batches are index slices of what lies on
the device.

The configurations of a stack (see `modeling.heads.layers`) share one forward and one backward pass, each with its own
learning rate, decay, class weights, batch order, dropout mask and seed. A configuration gives the same result in a
stack as alone, up to the rounding of differently blocked products.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from feats.acceleration import DTYPES
from modeling.heads.base import Head
from modeling.heads.layers import Noise, attach_noise, set_product_dtype
from modeling.heads.registry import build_head
from modeling.training.batches import InMemory, batches_of
from modeling.training.config import TrainConfig, hyperparameters, is_better
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
from modeling.training.threads import StepThreads, threads_kept

COUNTED_ROWS = 1 << 18  # whose logits are kept until they are counted


@threads_kept()
def train_stack(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """Train configurations of one shape, see `modeling.training.fit.stacks`; `progress` is told epochs times models,
    `told` what each came to."""
    first, device, n_classes = configs[0], problem.device, len(problem.classes)
    inputs = problem.inputs.for_head(first.head)
    head = build_head(first.head, inputs.widths, n_classes, [c.seed for c in configs], device)
    set_product_dtype(head, DTYPES[first.precision])
    noise = Noise([stream_of(c.seed, "dropout") for c in configs], device)
    attach_noise(head, noise)
    batches = batches_of(configs, problem, inputs)
    optimizer = _StackedAdam(head, configs, first.ep * batches.steps)
    weights = smoothing = None
    if any(c.class_weights != "none" for c in configs):
        weights = torch.stack([class_weights(c.class_weights, problem) for c in configs])
    if any(c.label_smoothing for c in configs):
        smoothing = torch.tensor([c.label_smoothing for c in configs], device=device)

    def computed(*drawn: Any) -> Results:
        batch, labels = batches.gather(*drawn)
        logits = head(batch)
        loss = cross_entropy(logits, labels, weights, smoothing)
        loss.sum().backward()
        optimizer.apply()
        return loss.detach(), logits.detach(), labels

    step: Callable[..., Results] = computed
    recorder = recorder_for(device, first.ep * batches.steps) if isinstance(batches, InMemory) else None
    # Batches of ragged tokens are of any length, and onecycle changes a number that a recording holds.
    if recorder is not None and inputs.text_tokens is None and all(c.schedule != "onecycle" for c in configs):
        optimizer.hold_rates()
        step = recorded(computed, head, noise, recorder)
    best, threads = _Best(head, configs), StepThreads(device, steady=first.deterministic)
    history: list[list[dict[str, Any]]] = [[] for _ in configs]
    for epoch in range(1, first.ep + 1):
        head.train()
        losses = torch.empty(batches.steps, len(configs), device=device)
        counted = _Counted(len(configs), n_classes, batches.n_rows, first.bs, device)
        with closing(batches.epoch()) as epoch_batches:
            for number, drawn in enumerate(epoch_batches):
                threads.begin_step()
                optimizer.begin_step()
                loss, logits, labels = step(*drawn)
                losses[number] = loss * labels.shape[1]
                counted.add(logits, labels)
                threads.end_step()
        val_logits = batches.validate(head)
        figures = {"train_loss": losses.sum(0).cpu().numpy() / batches.n_rows}
        figures |= averages_of(counted.confusions(), "train_")
        figures |= validation_figures(val_logits, problem.labels[problem.val], problem.classes)
        figures |= {name: values.cpu().numpy() for name, values in head.scalars().items()}
        for m, config in enumerate(configs):
            if best.stopped[m]:
                continue
            row = {name: values[m].item() for name, values in figures.items()}
            diverged = [row[kind] for kind in ("train_loss", "val_loss") if not math.isfinite(row[kind])]
            if diverged:
                best.fail(
                    m,
                    f"the loss of {config.head.head} became {diverged[0]} in epoch {epoch} (lr {config.lr:g}); use a "
                    "smaller `lr`, or `norm` l2 or standard",
                )
                continue
            history[m].append({"epoch": epoch, "lr": optimizer.last_lr(m), **row})
        training = [m for m in range(len(configs)) if not best.stopped[m]]
        better = best.update(epoch, figures, head, val_logits)
        if told is not None:
            sizes = torch.full((batches.steps,), first.bs)
            sizes[-1] = batches.n_rows - (batches.steps - 1) * first.bs
            of_batches = losses.cpu() / sizes[:, None]
            for m in training:
                told(Epoch(configs[m], history[m][-1], m in better, of_batches[:, m].tolist()))
        progress(len(configs))
        if all(best.stopped):
            progress(len(configs) * (first.ep - epoch))
            break
    return [
        Trained(c, *best.model(m, inputs.widths, n_classes), best.epoch[m], history[m], failure=best.failure[m])
        for m, c in enumerate(configs)
    ]


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


@dataclass
class _Group:
    """Neighbouring models of a stack with the same hyperparameters: slices of each parameter, and their Adam state."""

    part: slice
    peak_lr: float
    weight_decay: float
    schedule: str
    parameters: list[Tensor]
    lr: float = 0.0
    beta1: float = 0.9
    rate: Tensor | None = None  # holds `lr` on the device

    def __post_init__(self) -> None:
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.taken = [torch.zeros((), device=p.device) for p in self.parameters]


class _StackedAdam:
    """torch's fused Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019) on a stack, through its functional
    door: constructing a torch.optim.Optimizer imports the compiler, which takes a second."""

    def __init__(self, head: Head, configs: Sequence[TrainConfig], steps: int):
        self.parameters = list(head.parameters())
        self.decoupled = configs[0].optimizer == "adamw"
        self.groups = []
        for key, members in groupby(range(len(configs)), lambda m: hyperparameters(configs[m])):
            first, *rest = members
            part = slice(first, first + 1 + len(rest))
            self.groups.append(_Group(part, *key, [p.detach()[part] for p in self.parameters]))
        self.steps, self.taken = steps, 0

    def hold_rates(self) -> None:
        """Keep the learning rates on the device, for steps that are recorded: float32, as fused Adam takes them."""
        for group in self.groups:
            group.rate = torch.full((), group.lr, device=self.parameters[0].device)

    def begin_step(self) -> None:
        """Set the rates of the next step."""
        for group in self.groups:
            before = group.lr
            group.lr = group.peak_lr * lr_factor(group.schedule, self.taken, self.steps)
            group.beta1 = beta1(group.schedule, self.taken, self.steps)
            if group.rate is not None and group.lr != before:
                group.rate.fill_(group.lr)
        self.taken += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Move the parameters by their gradients, and drop these."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if len(gradients) < len(self.parameters):
            raise RuntimeError("some parameters of the head take no part in its logits: they have no gradient")
        for group in self.groups:
            adam(
                group.parameters,
                [gradient[group.part] for gradient in gradients],
                group.means,
                group.squares,
                [],
                group.taken,
                fused=True,
                amsgrad=False,
                beta1=group.beta1,
                beta2=0.999,
                lr=group.lr if group.rate is None else group.rate,
                weight_decay=group.weight_decay,
                eps=1e-8,
                maximize=False,
                decoupled_weight_decay=self.decoupled,
            )
        for parameter in self.parameters:
            parameter.grad = None  # the next backward pass hands over its own buffer instead of adding to this one

    def last_lr(self, model: int) -> float:
        return next(group.lr for group in self.groups if group.part.start <= model < group.part.stop)


def lr_factor(schedule: str, step: int, steps: int, warmup: float = 0.3) -> float:
    """The learning rate of step 0 <= `step` < `steps` as a share of its peak.

    cosine: half a wave from 1 to 0 (Loshchilov and Hutter 2017). onecycle: from 1/25 to 1 over the first `warmup` of
    the steps, then to 1/250000, both half waves, as torch's OneCycleLR (Smith and Topin 2018); see also `beta1`.
    """
    if schedule == "cosine":
        return _half_wave(1.0, 0.0, step / steps)
    if schedule == "onecycle":
        return _cycled(1 / 25, 1.0, 1 / 25e4, step, steps, warmup)
    return 1.0


def beta1(schedule: str, step: int, steps: int, warmup: float = 0.3) -> float:
    """Adam's decay of the mean gradient in step 0 <= `step` < `steps`: 0.9; under onecycle, while the rate rises, from
    0.95 down to 0.85, and back to 0.95 as it falls, as torch's OneCycleLR cycles it by default."""
    return _cycled(0.95, 0.85, 0.95, step, steps, warmup) if schedule == "onecycle" else 0.9


def _cycled(start: float, top: float, end: float, step: int, steps: int, warmup: float) -> float:
    """From `start` to `top` over the first `warmup` of the steps, then to `end`, both in half waves."""
    last = warmup * steps - 1  # step of the first phase
    if last > 0 and step <= last:
        return _half_wave(start, top, step / last)
    return _half_wave(top, end, (step - last) / max(1e-9, steps - 1 - last))


def _half_wave(start: float, end: float, share: float) -> float:
    """From `start` at share 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


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
        for m, config in enumerate(self.configs):
            if self.stopped[m]:
                continue
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

    def fail(self, m: int, reason: str) -> None:
        self.stopped[m], self.failure[m] = True, reason

    def model(self, m: int, widths: dict[str, int], n_classes: int) -> tuple[Head, dict[str, int], np.ndarray]:
        """Model m as a head of its own, its widths, and its validation logits."""
        if self.logits is None:
            raise RuntimeError("no epoch was trained: there is nothing to choose from")
        head = build_head(self.configs[m].head, widths, n_classes)
        head.load_state_dict({name: tensor[m : m + 1].cpu() for name, tensor in self.state.items()})
        return head.eval(), widths, self.logits[m].cpu().numpy()
