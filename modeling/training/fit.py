"""Training many configurations on one problem: those of equal shape together, each by what its head is solved with."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from feats.acceleration import deterministic
from modeling.heads.registry import head_class
from modeling.training.config import Epochs, TrainConfig, hyperparameters
from modeling.training.exact import solve_kernel, solve_linear
from modeling.training.gradient import train_stack
from modeling.training.problem import Problem, Told, Trained

# Parameters of one stack. A CPU's last-level cache should hold them with Adam's moments and the gradient; a GPU wants
# as much work per kernel launch as it can get.
STACK_PARAMETERS = {"cpu": 1 << 22, "cuda": 1 << 28}
SOLVERS = {"gradient": train_stack, "logistic": solve_linear, "kernel": solve_kernel}  # by `Head.solver`


def fit(
    configs: Sequence[TrainConfig],
    problem: Problem,
    progress: Callable[[int], Any] = lambda epochs: None,
    told: Told | None = None,
) -> list[Trained]:
    """Train every configuration on one problem; results in the order of `configs`.

    `progress` is told epochs as they are done (as `Epochs`, which say whose), `n_epochs(configs)` in all, `told` what
    each came to, as it ends (None: that saves the trouble); heads in closed form have none. A diverging training ends
    alone: see `Trained.failure`. Raises `UsageError` for features that lack what a head needs and unknown classes in
    class weights.
    """
    results: dict[int, Trained] = {}
    for members in stacks(configs, problem):
        solve = SOLVERS[head_class(configs[members[0]].head.head).solver]
        first = configs[members[0]]
        with deterministic(first.deterministic):
            solved = solve([configs[i] for i in members], problem, partial(_tell, progress, first), told)
        results |= zip(members, solved, strict=True)
    return [results[i] for i in range(len(configs))]


def _tell(progress: Callable[[int], Any], config: TrainConfig, epochs: int) -> None:
    progress(Epochs.of(epochs, config))


def n_epochs(configs: Sequence[TrainConfig]) -> int:
    """What `fit` reports in all; a head that isn't trained by gradient descent counts as one."""
    return sum(1 if head_class(c.head.head).closed_form() else c.ep for c in configs)


def work(configs: Sequence[TrainConfig], problem: Problem) -> float:
    """About how many floating-point operations `fit` takes: three products of two for each weight and row."""
    return sum(6.0 * _parameters(c, problem) * len(problem.train) * c.ep for c in configs)


def epoch_seconds(config: TrainConfig, widths: Mapping[str, int], n_classes: int, rows: int) -> float:
    """About how long one of `n_epochs` takes on one core, for telling how much is left: products at some 10 GFLOP/s, a
    fixed cost of each step, and in closed form the many solutions that its choices by inner folds take."""
    cls = head_class(config.head.head)
    if not cls.closed_form():
        steps = math.ceil(rows / min(config.bs, max(rows, 1)))
        return steps * 1e-3 + 6.0 * _weights(config, widths, n_classes) * rows * 1e-10
    columns = sum(widths.get(side, 0) for side in config.head.sides)
    products = 500.0 * rows * columns * n_classes if cls.solver == "logistic" else 20.0 * rows**2 * (columns + rows / 3)
    return 1e-2 + products * 1e-10


def stacks(configs: Sequence[TrainConfig], problem: Problem) -> Iterator[list[int]]:
    """Numbers of the configurations that train together: equal in shape, batches and optimiser, as many as fit."""

    def shape(i: int) -> tuple[Any, ...]:
        c = configs[i]
        return repr(c.head.resolved()), c.optimizer, c.ep, c.bs, c.balanced_sampler, c.precision, c.deterministic

    limit = STACK_PARAMETERS.get(problem.device.type, STACK_PARAMETERS["cuda"])
    for _, alike in groupby(sorted(range(len(configs)), key=lambda i: (shape(i), hyperparameters(configs[i]))), shape):
        members = list(alike)
        size = _parameters(configs[members[0]], problem)
        count = max(1, math.ceil(len(members) * size / limit))
        each = math.ceil(len(members) / count)
        for low in range(0, len(members), each):
            yield members[low : low + each]


def _parameters(config: TrainConfig, problem: Problem) -> int:
    return _weights(config, problem.inputs.widths, len(problem.classes))


def _weights(config: TrainConfig, widths: Mapping[str, int], n_classes: int) -> int:
    cls = head_class(config.head.head)
    if cls.closed_form():
        return 0
    with torch.device("meta"):
        head = cls(config.head, widths, n_classes, 1)
    return sum(p.numel() for p in head.parameters())
