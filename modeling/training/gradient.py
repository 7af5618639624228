"""Gradient descent for many heads at once on cached tensors: no DataLoader, batches are index slices of what lies on
the device.

The configurations of a stack (see `modeling.heads.layers`) share one forward and one backward pass, each with its own
learning rate, decay, class weights, batch order, dropout mask and seed. A configuration gives the same result in a
stack as alone, up to the rounding of differently blocked products.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from modeling.features.inputs import Inputs
from modeling.heads.base import Head
from modeling.heads.layers import Noise, attach_noise, set_product_dtype
from modeling.heads.registry import build_head
from modeling.training.config import PRECISIONS, TrainConfig, hyperparameters, is_better
from modeling.training.problem import (
    Epoch,
    Problem,
    Told,
    Trained,
    averages_of,
    class_weights,
    confusions,
    predict_stack,
    validation_figures,
)
from modeling.training.threads import StepThreads, threads_kept


@threads_kept()
def train_stack(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """Train configurations of one shape, see `modeling.training.fit.stacks`; `progress` is told epochs times models,
    `told` what each came to."""
    first, device, n_classes = configs[0], problem.inputs.device, len(problem.classes)
    inputs = problem.inputs.for_head(first.head)
    head = build_head(first.head, inputs.widths, n_classes, [c.seed for c in configs], device)
    set_product_dtype(head, PRECISIONS[first.precision])
    attach_noise(head, Noise([_stream(c.seed, "dropout") for c in configs], device))
    draws = _Draws(configs, problem, inputs)
    steps = math.ceil(len(problem.train) / first.bs)
    optimizer = _StackedAdam(head, configs, first.ep * steps)
    weights = smoothing = None
    if any(c.class_weights != "none" for c in configs):
        weights = torch.stack([class_weights(c.class_weights, problem) for c in configs])
    if any(c.label_smoothing for c in configs):
        smoothing = torch.tensor([c.label_smoothing for c in configs], device=device)
    best, threads = _Best(head, configs), StepThreads(device, steady=first.deterministic)
    history: list[list[dict[str, Any]]] = [[] for _ in configs]
    for epoch in range(1, first.ep + 1):
        head.train()
        rows, views = draws.epoch()
        # Made at once: small tensors kept from every batch would sit in the gaps that its activations leave, and memory
        # grow by those.
        losses = torch.empty(steps, len(configs), device=device)
        outputs = torch.empty(*rows.shape, n_classes, device=device)
        for step, low in enumerate(range(0, rows.shape[1], first.bs)):
            threads.begin_step()
            batch_rows = rows[:, low : low + first.bs]
            logits = head(inputs.batch(batch_rows, views))
            loss = cross_entropy(logits, problem.labels[batch_rows], weights, smoothing)
            loss.sum().backward()
            optimizer.step()
            losses[step] = loss.detach() * batch_rows.shape[1]
            outputs[:, low : low + first.bs] = logits.detach()
            threads.end_step()
        val_logits = predict_stack(head, inputs, problem.val)
        figures = {"train_loss": losses.sum(0).cpu().numpy() / rows.shape[1]}
        figures |= averages_of(confusions(outputs, problem.labels[rows]), "train_")
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
            sizes = torch.full((steps,), first.bs)
            sizes[-1] = rows.shape[1] - (steps - 1) * first.bs
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


def _stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: one seed for all would draw the batches from the weights' numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest(), "big")


class _Draws:
    """Which rows each model sees in an epoch, in which order and which views of their pictures."""

    def __init__(self, configs: Sequence[TrainConfig], problem: Problem, inputs: Inputs):
        seeds = [c.seed for c in configs]
        self.seeds = sorted(set(seeds))
        self.of_model = torch.tensor([self.seeds.index(seed) for seed in seeds])
        self.generators = [torch.Generator().manual_seed(_stream(seed, "order")) for seed in self.seeds]
        self.train, self.n_rows, self.device = problem.train, len(problem.labels), problem.inputs.device
        self.n_views = 0 if inputs.image_views is None else inputs.image_views.shape[1]
        self.probabilities = None
        if configs[0].balanced_sampler:
            labels = problem.labels[problem.train].cpu()
            self.probabilities = 1.0 / torch.bincount(labels, minlength=len(problem.classes))[labels]

    def epoch(self) -> tuple[Tensor, Tensor | None]:
        """Rows (M, n) and views (M, N), None without views."""
        orders, views = [], []
        for generator in self.generators:
            if self.probabilities is None:
                orders.append(torch.randperm(len(self.train), generator=generator))
            else:
                orders.append(torch.multinomial(self.probabilities, len(self.train), True, generator=generator))
            if self.n_views:
                views.append(torch.randint(self.n_views + 1, (self.n_rows,), generator=generator))
        rows = self.train[torch.stack(orders)[self.of_model].to(self.device)]
        return rows, torch.stack(views)[self.of_model].to(self.device) if views else None


@dataclass
class _Group:
    """Neighbouring models of a stack with the same hyperparameters: slices of each parameter, and their Adam state."""

    part: slice
    peak_lr: float
    weight_decay: float
    schedule: str
    parameters: list[Tensor]
    lr: float = 0.0

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

    @torch.no_grad()
    def step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if len(gradients) < len(self.parameters):
            raise RuntimeError("some parameters of the head take no part in its logits: they have no gradient")
        for group in self.groups:
            group.lr = group.peak_lr * lr_factor(group.schedule, self.taken, self.steps)
            adam(
                group.parameters,
                [gradient[group.part] for gradient in gradients],
                group.means,
                group.squares,
                [],
                group.taken,
                fused=True,
                amsgrad=False,
                beta1=beta1(group.schedule, self.taken, self.steps),
                beta2=0.999,
                lr=group.lr,
                weight_decay=group.weight_decay,
                eps=1e-8,
                maximize=False,
                decoupled_weight_decay=self.decoupled,
            )
        for parameter in self.parameters:
            parameter.grad = None  # the next backward pass hands over its own buffer instead of adding to this one
        self.taken += 1

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
