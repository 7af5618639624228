"""Adam for a stack of models, each with its own rates, and the schedules of these."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.adam import adam

from modeling.heads.base import Head
from modeling.training.config import TrainConfig, hyperparameters


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


class StackedAdam:
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
        """The rate of a model's last step."""
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
