"""Heads in closed form: their hyperparameters by inner folds of the training rows, then one exact fit on all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.features.inputs import Inputs
from modeling.heads.base import Head
from modeling.heads.registry import build_head
from modeling.training.closed_form import KERNEL_GAMMAS, KERNEL_RIDGES, fit_kernel, fit_logistic
from modeling.training.config import TrainConfig
from modeling.training.problem import Problem, Told, Trained, class_weights, predict_stack, validation_figures

LINEAR_CS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEARCH_TOLERANCE = 1e-4  # of the objective: far below what held-out losses differ by


def solve_linear(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """Logistic regression; the C of least held-out log-loss in the inner folds, unless it is given. `told` hears
    nothing: there are no epochs."""
    results = []
    for config in configs:
        inputs, x, targets = _training_matrix(config, problem)
        n_classes = len(problem.classes)
        weights = class_weights(config.class_weights, problem)[targets]
        C, held_out, search = _search_penalty(config.C, x, targets, weights, n_classes, _folds(problem))
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
    for tried in LINEAR_CS if C is None else (C,):
        logits = x.new_zeros(len(x), n_classes, dtype=torch.float64)
        for fold in folds.unique():
            rest, held = folds != fold, folds == fold
            found = fit_logistic(x[rest], targets[rest], n_classes, [tried], weights[rest], SEARCH_TOLERANCE)[0]
            logits[held] = x[held].double() @ found.weight + found.bias
        losses = F.cross_entropy(logits, targets, reduction="none")
        search.append({"C": tried, "loss": float(weights.double() @ losses / weights.sum())})
        if len(search) > 1 and search[-1]["loss"] > search[-2]["loss"]:
            break
        chosen, held_out = tried, logits
    return chosen, held_out, search


def solve_kernel(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """RBF kernel; width and penalty of least held-out log-loss in the inner folds, unless they are given. `told` hears
    nothing, as of `solve_linear`."""
    results = []
    for config in configs:
        inputs, x, targets = _training_matrix(config, problem)
        n_classes = len(problem.classes)
        weights = class_weights(config.class_weights, problem)[targets]
        gammas = KERNEL_GAMMAS if config.gamma is None else (config.gamma,)
        ridges = KERNEL_RIDGES if config.ridge is None else (config.ridge,)
        found = fit_kernel(x, targets, n_classes, _folds(problem), gammas, ridges, weights)
        widths = {**inputs.widths, "support": len(x)}
        head = build_head(config.head, widths, n_classes)
        state = {"support": x, "dual": found.dual, "bias": found.bias, "gamma": torch.tensor(found.gamma)}
        head.load_state_dict({name: tensor[None] for name, tensor in state.items()})
        facts = {"gamma": found.gamma, "ridge": found.ridge, "search": found.search}
        results.append(_solved(config, head, inputs, widths, problem, facts, found.held_out))
        progress(1)
    return results


def _folds(problem: Problem) -> Tensor:
    if problem.folds is None:
        raise ValueError("a closed form chooses by inner folds, and this problem has none; give it `folds`")
    return problem.folds


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
    found = validation_figures(logits, problem.labels[problem.val], problem.classes)
    figures = {name: values[0].item() for name, values in found.items()}
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
