"""Heads in closed form: their hyperparameters by inner folds of the training rows, then one exact fit on all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feats.strings import row_type
from modeling.features.inputs import Inputs
from modeling.features.stream import StreamedInputs
from modeling.heads.base import Head
from modeling.heads.registry import build_head
from modeling.training.batches import validation_logits
from modeling.training.closed_form import KERNEL_GAMMAS, KERNEL_RIDGES, LogisticFit, fit_kernel, fit_logistic
from modeling.training.config import TrainConfig
from modeling.training.logistic import Fit, RowData, fit_together, logits_left_out
from modeling.training.problem import Problem, Told, Trained, class_weights, validation_figures
from modeling.training.threads import StepThreads

LINEAR_CS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEARCH_TOLERANCE = 1e-4  # of the objective: far below what held-out losses differ by
ESTIMATE = 1e-2  # of it, by the estimate that ends fits in shared passes: that may be a tenth of the truth
LARGE = 1 << 24  # numbers in the training rows from which on all fits share passes over them
CS_AT_ONCE = 5  # of a search, in the same passes: it often ends before weak penalties, which take longest
ROWS_AT_ONCE = 1 << 14


def solve_linear(
    configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any], told: Told | None = None
) -> list[Trained]:
    """Logistic regression; the C of least held-out log-loss in the inner folds, unless it is given. `told` hears
    nothing: there are no epochs. Rows that are streamed, or many, are gone over in passes that serve all
    configurations."""
    if problem.streamed is not None or _values(configs[0], problem) >= LARGE:
        return _solve_together(configs, problem, progress)
    results = []
    for config in configs:
        inputs, x, targets = _training_matrix(config, problem)
        n_classes = len(problem.classes)
        weights = class_weights(config.class_weights, problem)[targets]
        threads = StepThreads(x.device, config.deterministic)
        C, held_out, search = _search_penalty(config.C, x, targets, weights, n_classes, _folds(problem), threads)
        found = fit_logistic(x, targets, n_classes, [C], weights, threads=threads)[0]
        head = build_head(config.head, inputs.widths, n_classes)
        head.load_state_dict({"out.weight": found.weight.T[None].float(), "out.bias": found.bias[None].float()})
        facts = {"C": C, "objective": found.objective, "search": search}
        results.append(_solved(config, head, inputs, inputs.widths, problem, facts, held_out))
        progress(1)
    return results


def _solve_together(configs: Sequence[TrainConfig], problem: Problem, progress: Callable[[int], Any]) -> list[Trained]:
    """As `solve_linear`: what differs in C only is fitted in the same passes."""
    results: dict[int, Trained] = {}
    alike: dict[Any, list[int]] = {}
    for i, config in enumerate(configs):
        alike.setdefault((config.head, config.class_weights), []).append(i)
    for members in alike.values():
        first = configs[members[0]]
        data, inputs = _row_data(first, problem), problem.inputs.for_head(first.head)
        folds = data.folds.unique().tolist()
        given = sorted({C for i in members if (C := configs[i].C) is not None})
        chosen, search, fits = 0.0, list[dict[str, float]](), dict[Fit, LogisticFit]()
        if any(configs[i].C is None for i in members):
            chosen, search, fits = _search_together(data, folds)
            given = sorted({*given, chosen})
        missing = [Fit(C, fold) for C in given for fold in folds if Fit(C, fold) not in fits]
        fits |= fit_together(data, missing, SEARCH_TOLERANCE * ESTIMATE, promised=False) if missing else {}
        held_out = torch.zeros(len(given), len(data.targets), data.n_classes, device=problem.device)
        losses = {row["C"]: row for row in _losses(data, fits, given, held_out)} | {row["C"]: row for row in search}
        found = fit_together(data, [Fit(C) for C in given])
        for i in members:
            C = chosen if (own := configs[i].C) is None else own
            place, best = given.index(C), found[Fit(C)]
            head = build_head(first.head, inputs.widths, data.n_classes)
            head.load_state_dict({"out.weight": best.weight.T[None].float(), "out.bias": best.bias[None].float()})
            tried = search if own is None else [losses[C]]
            facts = {"C": C, "objective": best.objective, "search": tried}
            results[i] = _solved(configs[i], head, inputs, inputs.widths, problem, facts, held_out[place])
            progress(1)
    return [results[i] for i in range(len(configs))]


def _search_together(
    data: RowData, folds: Sequence[int]
) -> tuple[float, list[dict[str, float]], dict[Fit, LogisticFit]]:
    """As `_search_penalty`, some C at a time: the C chosen, what was tried, and the fits without each fold."""
    search: list[dict[str, float]] = []
    fits: dict[Fit, LogisticFit] = {}
    for low in range(0, len(LINEAR_CS), CS_AT_ONCE):
        Cs = LINEAR_CS[low : low + CS_AT_ONCE]
        some = fit_together(data, [Fit(C, k) for C in Cs for k in folds], SEARCH_TOLERANCE * ESTIMATE, promised=False)
        fits |= some
        for row in _losses(data, some, Cs):
            search.append(row)
            if len(search) > 1 and row["loss"] > search[-2]["loss"]:
                return search[-2]["C"], search, fits
    return search[-1]["C"], search, fits


def _losses(
    data: RowData, fits: Mapping[Fit, LogisticFit], Cs: Sequence[float], kept: Tensor | None = None
) -> list[dict[str, float]]:
    """The log-loss of each of `Cs` on the rows that its `fits` left out, in one pass; their logits go into `kept`
    (len(Cs), N, K)."""
    losses = data.centre.new_zeros(len(Cs))
    for rows, logits in logits_left_out(data, fits, Cs):
        targets = data.targets[rows].long().expand(len(Cs), -1)
        of_rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(len(Cs), -1)
        losses += of_rows @ data.weights[rows].double()
        if kept is not None:
            kept[:, rows] = logits.float()
    return [{"C": C, "loss": loss} for C, loss in zip(Cs, (losses / data.weight).tolist(), strict=True)]


def _values(config: TrainConfig, problem: Problem) -> int:
    """How many numbers the training rows' joined vectors are."""
    widths = problem.inputs.for_head(config.head).widths
    return len(problem.train) * sum(widths[side] for side in config.head.sides)


def _row_data(config: TrainConfig, problem: Problem) -> RowData:
    """The training rows' joined vectors, in passes over memory or over the stream."""
    widths = problem.inputs.for_head(config.head).widths
    targets = problem.labels[problem.train].to(torch.int32)  # of many million rows each number counts
    weights = class_weights(config.class_weights, problem)[targets.long()]
    n_columns = sum(widths[side] for side in config.head.sides)
    passes = partial(_rows_in_memory, config, problem)
    if problem.streamed:
        train = problem.train.cpu().numpy()
        order = np.argsort(train).astype(row_type(len(train)))
        train = train[order].astype(row_type(len(problem.labels)))
        passes = partial(_streamed_rows, config, problem.streamed, train, order)
    return RowData(passes, n_columns, len(problem.classes), targets, weights, _folds(problem))


def _rows_in_memory(config: TrainConfig, problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = torch.arange(len(problem.train), device=problem.device)
    for rows in numbers.split(ROWS_AT_ONCE):
        of_rows = problem.train[rows]
        yield torch.cat([getattr(problem.inputs, side)[of_rows] for side in config.head.sides], -1), rows


def _streamed_rows(
    config: TrainConfig, source: StreamedInputs, train: np.ndarray, numbers: np.ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train` (N,) ascending training rows, and which of them each is, `numbers` (N,)."""
    wanted = source.stream.blocks(train)
    stops = np.cumsum([len(rows) for rows in wanted])
    with closing(source.read(wanted, config.head, trains=True)) as blocks:
        for inputs, stop in zip(blocks, stops.tolist(), strict=True):
            rows = torch.from_numpy(numbers[stop - len(inputs) : stop].astype(np.int64)).to(source.device)
            yield torch.cat([getattr(inputs, side) for side in config.head.sides], -1), rows


def _search_penalty(
    C: float | None, x: Tensor, targets: Tensor, weights: Tensor, n_classes: int, folds: Tensor, threads: StepThreads
) -> tuple[float, Tensor, list[dict[str, float]]]:
    """The C of least held-out log-loss, tried from the strongest penalty up until it gets worse (weaker ones take
    longest), or the one given; the held-out logits (n, K) it gives; and what was tried."""
    search: list[dict[str, float]] = []
    for tried in LINEAR_CS if C is None else (C,):
        logits = x.new_zeros(len(x), n_classes, dtype=torch.float64)
        for fold in folds.unique():
            rest, held = folds != fold, folds == fold
            of_rest = x[rest], targets[rest], n_classes, [tried], weights[rest], SEARCH_TOLERANCE
            found = fit_logistic(*of_rest, threads)[0]
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
        threads = StepThreads(x.device, config.deterministic)
        found = fit_kernel(x, targets, n_classes, _folds(problem), gammas, ridges, weights, threads)
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
    logits = validation_logits(config, problem, head.to(problem.device), inputs)
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
