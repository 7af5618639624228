"""Training many heads at once on cached tensors: no DataLoader, batches are index slices of what lies on the device.

Configurations of equal shape form a stack (see `modeling.heads.layers`): one forward and one backward pass for all of them,
each with its own learning rate, decay, class weights, batch order, dropout mask and seed. A configuration gives the
same result in a stack as alone, up to the rounding of differently blocked products.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from feats.errors import UsageError
from modeling.evaluation import metrics
from modeling.features.inputs import Inputs
from modeling.heads.base import Head, head_class
from modeling.heads.layers import Noise, attach_noise, set_product_dtype
from modeling.heads.registry import build_head
from modeling.training.closed_form import fit_kernel, fit_logistic
from modeling.training.config import PRECISIONS, ClassWeights, TrainConfig

LINEAR_CS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEARCH_TOLERANCE = 1e-4  # of the objective: far below what held-out losses differ by
EVAL_BYTES = 1 << 26  # of features times models in one evaluation step
# Parameters of one stack. A CPU's last-level cache should hold them with Adam's moments and the gradient; a GPU wants
# as much work per kernel launch as it can get.
STACK_PARAMETERS = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Problem:
    """Features, labels and one split of them. `train` and `val` are row numbers, int64; labels outside them may be -1.

    `folds` (len(train),) int64 numbers the training rows' inner folds, duplicates in one: what closed-form heads
    choose their hyperparameters by."""

    inputs: Inputs
    labels: Tensor  # (N,) int64
    train: Tensor
    val: Tensor
    classes: list[str]
    folds: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """One trained configuration: the head of its best epoch, or of its closed form (one model, on the CPU, in evaluation
    mode). `history` has a row for each epoch; of a closed form, which has none, one row of validation figures.

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


def fit(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any] = lambda epochs: None
) -> list[Trained]:
    """Train every configuration on one problem; results in the order of `configs`.

    `progress` is told epochs as they are done, `n_epochs(configs)` in all. A diverging training ends alone: see
    `Trained.failure`. Raises `UsageError` for features that lack what a head needs and unknown classes in class
    weights.
    """
    results: dict[int, Trained] = {}
    for members in stacks(configs, problem):
        solve = SOLVERS[head_class(configs[members[0]].head.head).solver]
        results |= zip(members, solve([configs[i] for i in members], problem, progress), strict=True)
    return [results[i] for i in range(len(configs))]


def n_epochs(configs: Sequence[TrainConfig]) -> int:
    """What `fit` reports in all; a head that isn't trained by gradient descent counts as one."""
    return sum(1 if head_class(c.head.head).closed_form() else c.ep for c in configs)


def work(configs: Sequence[TrainConfig], problem: Problem) -> float:
    """About how many floating-point operations `fit` takes: three products of two for each weight and row."""
    return sum(6.0 * _parameters(c, problem) * len(problem.train) * c.ep for c in configs)


def stacks(configs: Sequence[TrainConfig], problem: Problem) -> Iterator[list[int]]:
    """Numbers of the configurations that train together: equal in shape, batches and optimiser, as many as fit."""

    def shape(i: int) -> tuple:
        c = configs[i]
        return repr(c.head.resolved()), c.optimizer, c.ep, c.bs, c.balanced_sampler, c.precision

    limit = STACK_PARAMETERS.get(problem.inputs.device.type, STACK_PARAMETERS["cuda"])
    for _, alike in groupby(sorted(range(len(configs)), key=lambda i: (shape(i), hyperparameters(configs[i]))), shape):
        members = list(alike)
        size = _parameters(configs[members[0]], problem)
        count = max(1, math.ceil(len(members) * size / limit))
        each = math.ceil(len(members) / count)
        for low in range(0, len(members), each):
            yield members[low : low + each]


def hyperparameters(config: TrainConfig) -> tuple[float, float, str]:
    """What may differ between the models of a stack and concerns the optimiser."""
    return config.lr, config.weight_decay, config.schedule


def _parameters(config: TrainConfig, problem: Problem) -> int:
    cls = head_class(config.head.head)
    if cls.closed_form():
        return 0
    with torch.device("meta"):
        head = cls(config.head, problem.inputs.widths, len(problem.classes), 1)
    return sum(p.numel() for p in head.parameters())


# -- stochastic gradient descent --------------------------------------------------------------------------------


def _train_stack(configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any]) -> list[Trained]:
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
    best = _Best(head, configs)
    history: list[list[dict[str, Any]]] = [[] for _ in configs]
    for epoch in range(1, first.ep + 1):
        head.train()
        rows, views = draws.epoch()
        losses = []
        for low in range(0, rows.shape[1], first.bs):
            batch_rows = rows[:, low : low + first.bs]
            logits = head(inputs.batch(batch_rows, views))
            loss = cross_entropy(logits, problem.labels[batch_rows], weights, smoothing)
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach() * batch_rows.shape[1])
        val_logits = predict_stack(head, inputs, problem.val)
        figures = _validation(val_logits, problem.labels[problem.val])
        figures = {"train_loss": torch.stack(losses).sum(0).cpu().numpy() / rows.shape[1], **figures}
        figures |= {name: values.cpu().numpy() for name, values in head.scalars().items()}
        for m, config in enumerate(configs):
            if best.stopped[m]:
                continue
            row = {name: float(values[m]) for name, values in figures.items()}
            diverged = [row[kind] for kind in ("train_loss", "val_loss") if not math.isfinite(row[kind])]
            if diverged:
                best.fail(
                    m,
                    f"the loss of {config.head.head} became {diverged[0]} in epoch {epoch} (lr {config.lr:g}); use a "
                    "smaller `lr`, or `norm` l2 or standard",
                )
                continue
            history[m].append({"epoch": epoch, "lr": optimizer.last_lr(m), **row})
        best.update(epoch, figures, head, val_logits)
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
    """Neighbouring models of a stack with the same hyperparameters: slices of each parameter, and Adam's state of them."""

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
        for group in self.groups:
            group.lr = group.peak_lr * lr_factor(group.schedule, self.taken, self.steps)
            adam(
                group.parameters,
                [p.grad[group.part] for p in self.parameters],
                group.means,
                group.squares,
                [],
                group.taken,
                fused=True,
                amsgrad=False,
                beta1=0.9,
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
    the steps, then to 1/250000, both half waves, as torch's OneCycleLR (Smith and Topin 2018) with its momentum
    fixed.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    if schedule == "onecycle":
        top = warmup * steps - 1
        start, end, share = (
            (1 / 25, 1.0, step / top)
            if 0 < top and step <= top
            else (1.0, 1 / 25e4, (step - top) / max(1e-9, steps - 1 - top))
        )
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    return 1.0


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

    def update(self, epoch: int, figures: dict[str, np.ndarray], head: Head, val_logits: Tensor) -> None:
        better = []
        for m, config in enumerate(self.configs):
            if self.stopped[m]:
                continue
            score = -figures["val_loss"][m] if config.monitor == "loss" else figures[config.monitor][m]
            if score > self.score[m]:
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

    def fail(self, m: int, reason: str) -> None:
        self.stopped[m], self.failure[m] = True, reason

    def model(self, m: int, widths: dict[str, int], n_classes: int) -> tuple[Head, dict[str, int], np.ndarray]:
        """Model m as a head of its own, its widths, and its validation logits."""
        head = build_head(self.configs[m].head, widths, n_classes)
        head.load_state_dict({name: tensor[m : m + 1].cpu() for name, tensor in self.state.items()})
        return head.eval(), widths, self.logits[m].cpu().numpy()


@torch.inference_mode()
def predict_stack(head: Head, inputs: Inputs, rows: Tensor | None = None) -> Tensor:
    """Logits (M, n, C) of every model, float32, for `rows` (n,) int64 or all."""
    head.eval()
    at_once = max(1, EVAL_BYTES * len(inputs) // max(1, inputs.n_bytes * head.n_models))
    if rows is None and len(inputs) <= at_once:
        return head(inputs.batch().expand(head.n_models))
    rows = torch.arange(len(inputs), device=inputs.device) if rows is None else rows
    return torch.cat([head(inputs.batch(block[None]).expand(head.n_models)) for block in rows.split(at_once)], 1)


def _validation(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Loss and averages of each model's validation logits (M, n, C), each (M,)."""
    n_models, n, n_classes = logits.shape
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n_models), reduction="none")
    cell = labels * n_classes + logits.argmax(-1)
    cell = cell + n_classes**2 * torch.arange(n_models, device=cell.device)[:, None]
    confusion = torch.bincount(cell.flatten(), minlength=n_models * n_classes**2)
    figures = metrics.scores(confusion.view(n_models, n_classes, n_classes).cpu().numpy())
    return {"val_loss": loss.view(n_models, n).mean(1).cpu().numpy()} | {n: figures[n] for n in metrics.AVERAGES}


# -- heads in closed form ---------------------------------------------------------------------------------------


def _solve_linear(configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any]) -> list[Trained]:
    """Logistic regression; the C of least held-out log-loss in the inner folds, unless it is given."""
    results = []
    for config in configs:
        inputs, x, targets = _training_matrix(config, problem)
        n_classes = len(problem.classes)
        weights = class_weights(config.class_weights, problem)[targets]
        C, held_out, search = _search_penalty(config.C, x, targets, weights, n_classes, problem.folds)
        found = fit_logistic(x, targets, n_classes, [C], weights)[0]
        head = build_head(config.head, inputs.widths, n_classes)
        head.load_state_dict({"out.weight": found.weight.T[None].float(), "out.bias": found.bias[None].float()})
        facts = {"C": C, "objective": found.objective, "search": search}
        results.append(_solved(config, head, inputs, inputs.widths, problem, facts, held_out))
        progress(1)
    return results


def _search_penalty(
    C: float | None, x: Tensor, targets: Tensor, weights: Tensor, n_classes: int, folds: Tensor
) -> tuple[float, Tensor, list[dict[str, float]]]:
    """The C of least held-out log-loss, tried from the strongest penalty up until it gets worse (weaker ones take
    longest), or the one given; the held-out logits (n, K) it gives; and what was tried."""
    search: list[dict[str, float]] = []
    best = None
    for tried in LINEAR_CS if C is None else (C,):
        logits = x.new_zeros(len(x), n_classes, dtype=torch.float64)
        for fold in folds.unique():
            rest, held = folds != fold, folds == fold
            found = fit_logistic(x[rest], targets[rest], n_classes, [tried], weights[rest], SEARCH_TOLERANCE)[0]
            logits[held] = x[held].double() @ found.weight + found.bias
        losses = F.cross_entropy(logits, targets, reduction="none")
        search.append({"C": tried, "loss": float(weights.double() @ losses / weights.sum())})
        if best is not None and search[-1]["loss"] > search[-2]["loss"]:
            break
        best = tried, logits
    return *best, search


def _solve_kernel(configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any]) -> list[Trained]:
    """RBF kernel; width and penalty of least held-out log-loss in the inner folds, unless they are given."""
    results = []
    for config in configs:
        inputs, x, targets = _training_matrix(config, problem)
        n_classes = len(problem.classes)
        weights = class_weights(config.class_weights, problem)[targets]
        given = {"gammas": config.gamma, "ridges": config.ridge}
        given = {name: [value] for name, value in given.items() if value is not None}
        found = fit_kernel(x, targets, n_classes, problem.folds, row_weights=weights, **given)
        widths = {**inputs.widths, "support": len(x)}
        head = build_head(config.head, widths, n_classes)
        state = {"support": x, "dual": found.dual, "bias": found.bias, "gamma": torch.tensor(found.gamma)}
        head.load_state_dict({name: tensor[None] for name, tensor in state.items()})
        facts = {"gamma": found.gamma, "ridge": found.ridge, "search": found.search}
        results.append(_solved(config, head, inputs, widths, problem, facts, found.held_out))
        progress(1)
    return results


def _training_matrix(config: TrainConfig, problem: Problem) -> tuple[Inputs, Tensor, Tensor]:
    """What the head reads, the training rows' joined vectors (n, D), and their labels (n,)."""
    inputs = problem.inputs.for_head(config.head)
    x = torch.cat([getattr(inputs, side)[problem.train] for side in config.head.sides], -1)
    return inputs, x, problem.labels[problem.train]


def _solved(
    config: TrainConfig,
    head: Head,
    inputs: Inputs,
    widths: dict[str, int],
    problem: Problem,
    facts: dict[str, Any],
    held_out: Tensor,
) -> Trained:
    logits = predict_stack(head.to(inputs.device), inputs, problem.val)
    figures = {name: float(values[0]) for name, values in _validation(logits, problem.labels[problem.val]).items()}
    return Trained(
        config,
        head.cpu().eval(),
        widths,
        logits[0].cpu().numpy(),
        None,
        [{"epoch": None, **figures}],
        facts,
        held_out.cpu().numpy(),
    )


SOLVERS = {"gradient": _train_stack, "logistic": _solve_linear, "kernel": _solve_kernel}
