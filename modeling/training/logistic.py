"""Logistic regression on rows that come in blocks: many penalties and inner folds at once, in the same passes.

Each evaluation of all objectives and gradients is one pass over the rows, so that a search over penalties costs about
as many passes as one fit. For rows that are streamed, and for many fits on many rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from feats.errors import UsageError
from modeling.training.closed_form import (
    MAX_ROUNDS,
    PROMISED,
    TOLERANCE,
    LogisticFit,
    check_every_class,
    check_penalties,
    not_minimised,
)

PASS_VALUES = 1 << 22  # logits of all problems in one step of a pass
HESSIAN_VALUES = 1 << 26  # of the Hessians that one pass sums up
MEMORY = 10  # steps that L-BFGS remembers
ITERATIONS = 40  # passes before the coordinates are renewed
SEARCH_ITERATIONS = 200  # passes where they aren't
SUFFICIENT = 1e-4  # Armijo's share of the predicted decrease
ROUNDING = 1e-14  # of an objective: what two sums of the same may differ by

Passes = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class RowData:
    """N rows of D columns for fits of K classes. Each call of `passes` goes over all rows once: blocks of features
    (B, D) and the numbers of their rows (B,) int64, which `targets` (N,) integers, `weights` (N,) and `folds` (N,)
    integers are indexed by."""

    passes: Passes
    n_columns: int
    n_classes: int
    targets: Tensor
    weights: Tensor
    folds: Tensor

    @cached_property
    def centre(self) -> Tensor:
        """The rows' weighted mean (D,) float64: taken off, it keeps the bias out of the weights' way. Raises
        `UsageError` for numbers that aren't finite."""
        total = self.weights.new_zeros(self.n_columns, dtype=torch.float64)
        for x, rows in self.passes():
            if not torch.isfinite(x).all():
                raise UsageError("features that aren't finite numbers; check `scale` and the caches")
            total += self.weights[rows].double() @ x.double()
        return total / self.weight

    @cached_property
    def weight(self) -> Tensor:
        """Of all rows, () float64."""
        return self.weights.sum(dtype=torch.float64)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,) and eigenvectors (D, D) of the rows' weighted covariance."""
        gram = self.centre.new_zeros(self.n_columns, self.n_columns)
        for x, rows in self.blocks(self.n_columns):
            gram += x[:, :-1].T @ (self.weights[rows, None].double() * x[:, :-1])
        values, basis = _eigen(gram / self.weight)
        return values.clamp_min(0), basis

    def blocks(self, n_values: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred rows with a column of ones (B, D + 1) float64, and their numbers, so many at a time that some
        `n_values` for each don't take much."""
        count = max(256, PASS_VALUES // n_values)
        for x, rows in self.passes():
            for part, numbers in zip(x.split(count), rows.split(count), strict=True):
                yield F.pad(part.double() - self.centre, (0, 1), value=1.0), numbers


def _eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), rising, and eigenvectors (D, D) of a matrix without negative eigenvalues."""
    try:
        values, basis = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer may fail where many are equal: those of fewer rows than columns are 0. Singular values,
        # which are the same of what isn't negative, come by another way.
        basis, values, _ = torch.linalg.svd(symmetric)
        values, basis = values.flip(0), basis.flip(1)
    return values, basis


@dataclass(frozen=True)
class Fit:
    """One fit: with `C`, on all rows or on those outside the fold `left_out`."""

    C: float
    left_out: int | None = None


def fit_together(
    data: RowData, fits: Sequence[Fit], tolerance: float = TOLERANCE, *, promised: bool = True
) -> dict[Fit, LogisticFit]:
    """The minima of `modeling.training.closed_form.fit_logistic`, of each of `fits`, whose coordinates and criterion
    these are; sums and products in double precision.

    L-BFGS (Liu and Nocedal, Mathematical Programming 45, 1989) for each problem, all evaluated in the same passes;
    steps are halved where they don't decrease the objective enough. It begins with the inverse of the Hessian at zero
    of all rows, one eigendecomposition for all penalties. Where the minimum is `promised`, the
    Hessian there is summed up, and the fit goes on with it until half the squared Newton decrement is `tolerance` of
    the objective; else L-BFGS's own estimate of that ends it.
    Raises `UsageError` as `fit_logistic`.
    """
    _check(data, fits)
    problems = _Problems(data, fits)
    inverse: Callable[[Tensor, Tensor], Tensor] = _AtZero(problems)
    theta = data.weights.new_zeros(len(fits), data.n_columns + 1, data.n_classes, dtype=torch.float64)
    waiting = torch.arange(len(fits), device=theta.device)
    value, excess = theta.new_zeros(len(fits)), theta.new_full((len(fits),), torch.inf)
    for _ in range(MAX_ROUNDS):
        passes = ITERATIONS if promised else SEARCH_ITERATIONS
        theta[waiting], value[waiting], gradient = _lockstep(
            problems, waiting, theta[waiting], inverse, tolerance, passes
        )
        if not promised:
            break
        inverse = _Newton(problems, waiting, theta[waiting])
        excess[waiting] = (gradient * inverse(gradient, torch.arange(len(waiting), device=theta.device))).sum(
            (1, 2)
        ) / 2
        kept = excess[waiting] > tolerance * value[waiting]
        waiting = waiting[kept]
        if not len(waiting):
            break
        inverse = inverse.only(kept)
    else:
        worst = float((excess / value).max())
        if worst > max(tolerance, PROMISED):
            raise not_minimised(worst)
    weight, bias = theta[:, :-1], theta[:, -1] - data.centre @ theta[:, :-1]
    values = value * problems.scale
    return {fit: LogisticFit(fit.C, weight[p], bias[p], float(values[p])) for p, fit in enumerate(fits)}


def logits_left_out(
    data: RowData, found: Mapping[Fit, LogisticFit], Cs: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """In one pass, numbers of rows (B,) and their logits (len(Cs), B, K) by the fits of `found` that left them out."""
    weight, bias = {}, {}
    for fold in {fit.left_out for fit in found}:
        of_fold = [found[Fit(C, fold)] for C in Cs]
        weight[fold], bias[fold] = (torch.stack([getattr(f, part) for f in of_fold]) for part in ("weight", "bias"))
    for x, rows in data.passes():
        for fold in data.folds[rows].unique().tolist():
            held = data.folds[rows] == fold
            yield rows[held], x[held].double() @ weight[fold] + bias[fold][:, None]


def _check(data: RowData, fits: Sequence[Fit]) -> None:
    check_penalties([fit.C for fit in fits])
    if not torch.isfinite(data.weights).all():
        raise UsageError("row weights that aren't finite numbers; check `class_weights`")
    for fold in {fit.left_out for fit in fits}:
        check_every_class(data.targets if fold is None else data.targets[data.folds != fold], data.n_classes)


class _Problems:
    """The objectives of some fits, divided by their rows' weights: f(theta) for theta (D + 1, K), of which the last row
    is the bias of centred columns."""

    def __init__(self, data: RowData, fits: Sequence[Fit]):
        self.data, self.fits = data, fits
        self.left_out = torch.tensor(
            [-1 if f.left_out is None else f.left_out for f in fits], device=data.weights.device
        )
        C = data.weights.new_tensor([f.C for f in fits], dtype=torch.float64)
        without = {
            fold: data.weight - data.weights[data.folds == fold].sum(dtype=torch.float64)
            for fold in {f.left_out for f in fits} - {None}
        }
        of_rows = torch.stack([data.weight if f.left_out is None else without[f.left_out] for f in fits])
        self.scale = C * of_rows
        self.share = C / self.scale  # of a row of weight 1
        self.ridge = (2.0 if data.n_classes == 2 else 1.0) / self.scale

    def weights_in(self, problems: Tensor, rows: Tensor) -> Tensor:
        """What each of `rows` counts in each of `problems`: (B, P), 0 in the fold that is left out."""
        learnt = self.data.folds[rows][:, None] != self.left_out[problems]
        return self.data.weights[rows][:, None].double() * learnt * self.share[problems]

    def evaluate(self, problems: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Objectives (P,) and gradients (P, D + 1, K) of some problems at theta (P, D + 1, K), in one pass."""
        count, n_columns, n_classes = theta.shape
        columns = theta.transpose(0, 1).reshape(n_columns, -1)
        value, gradient = theta.new_zeros(count), torch.zeros_like(columns)
        for x, rows in self.data.blocks(count * n_classes):
            log_p = (x @ columns).view(-1, count, n_classes).log_softmax(2)
            weights, targets = self.weights_in(problems, rows), self.data.targets[rows].long()
            true = targets[:, None, None].expand(-1, count, 1)
            value -= (weights * log_p.gather(2, true)[..., 0]).sum(0)
            residual = log_p.exp_().scatter_add_(2, true, -torch.ones_like(true, dtype=log_p.dtype))
            gradient += x.T @ residual.mul_(weights[..., None]).flatten(1)
        of_theta = gradient.view(n_columns, count, n_classes).transpose(0, 1).contiguous()
        slopes, penalised = of_theta, theta[:, :-1]
        slopes[:, :-1] += self.ridge[problems][:, None, None] * penalised
        return value + self.ridge[problems] / 2 * penalised.square().sum((1, 2)), slopes


class _AtZero:
    """The inverse of each problem's Hessian at theta 0, its blocks of classes taken as equal: p (1 - p) times the
    covariance, of all rows whatever fold is left out, plus the ridge; of the bias apart, since columns are centred."""

    def __init__(self, problems: _Problems):
        self.curvature = (1 - 1 / problems.data.n_classes) / problems.data.n_classes
        values, self.basis = problems.data.spectrum
        self.stretch = self.curvature * values + problems.ridge[:, None]

    def __call__(self, gradient: Tensor, problems: Tensor) -> Tensor:
        """Its product with (P, D + 1, K)."""
        found = self.basis @ ((self.basis.T @ gradient[:, :-1]) / self.stretch[problems][..., None])
        return torch.cat([found, gradient[:, -1:] / self.curvature], 1)


class _Newton:
    """As `_AtZero`, at theta (P, D + 1, K) of some problems; they are numbered as given."""

    def __init__(self, problems: _Problems, which: Tensor, theta: Tensor):
        n = theta.shape[1]
        at_once = max(1, HESSIAN_VALUES // n**2)
        parts = [
            self._sum(problems, which[k : k + at_once], theta[k : k + at_once]) for k in range(0, len(which), at_once)
        ]
        self.factor = torch.cat(parts)

    @staticmethod
    def _sum(problems: _Problems, which: Tensor, theta: Tensor) -> Tensor:
        count, n, n_classes = theta.shape
        columns = theta.transpose(0, 1).reshape(n, -1)
        hessian = theta.new_zeros(count, n, n)
        for x, rows in problems.data.blocks(max(n, count * n_classes)):
            p = (x @ columns).view(-1, count, n_classes).softmax(2)
            curvature = problems.weights_in(which, rows) * (p * (1 - p)).mean(2)
            for of_problem, weights in zip(hessian, curvature.T, strict=True):
                of_problem += x.T @ (weights[:, None] * x)
        hessian[:, :-1, -1] = hessian[:, -1, :-1] = 0
        hessian[:, -1, -1].clamp_(min=1e-12)
        hessian.diagonal(dim1=1, dim2=2)[:, :-1] += problems.ridge[which][:, None]
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed.any():
            raise UsageError(
                "the linear head's equations are singular up to rounding: its penalty is too weak; give a smaller `C`"
            )
        return factor

    def only(self, kept: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Of those `kept` (P,) bool."""
        self.factor = self.factor[kept]
        return self

    def __call__(self, gradient: Tensor, problems: Tensor) -> Tensor:
        """Its product with (P, D + 1, K)."""
        found: Tensor = torch.cholesky_solve(gradient, self.factor[problems])
        return found


def _lockstep(
    problems: _Problems,
    which: Tensor,
    theta: Tensor,
    inverse: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """At most so many passes of L-BFGS on the problems `which` from theta (P, D + 1, K): where each is then, its
    objective and gradient there."""
    renewed = isinstance(inverse, _Newton)
    numbers = torch.arange(len(which), device=theta.device)

    def product(gradient: Tensor, own: Tensor) -> Tensor:
        return inverse(gradient, own if renewed else which[own])

    value, gradient = problems.evaluate(which, theta)
    past = _Past(theta)
    direction = -product(gradient, numbers)
    slope = (gradient * direction).sum((1, 2))
    step = torch.ones_like(value)
    active = (-slope / 2 > tolerance * value).nonzero()[:, 0]
    for _ in range(passes):
        if not len(active):
            break
        trial = theta[active] + step[active][:, None, None] * direction[active]
        found, slopes = problems.evaluate(which[active], trial)
        wanted = value[active] + SUFFICIENT * step[active] * slope[active]
        good = found <= wanted + ROUNDING * value[active].abs()
        taken = active[good]
        past.add(taken, trial[good] - theta[taken], slopes[good] - gradient[taken])
        theta[taken], value[taken], gradient[taken] = trial[good], found[good], slopes[good]
        direction[taken] = -past.product(taken, gradient[taken], product)
        slope[taken] = (gradient[taken] * direction[taken]).sum((1, 2))
        step[taken] = 1.0
        step[active[~good]] *= 0.5
        moving = (step[active] > 1e-8) & (-slope[active] / 2 > tolerance * value[active])
        active = active[moving]
    return theta, value, gradient


class _Past:
    """The last steps of P problems, and what the gradient changed by in each, newest first; L-BFGS's two loops."""

    def __init__(self, theta: Tensor):
        self.steps, self.changes = (theta.new_zeros(MEMORY, *theta.shape) for _ in range(2))
        self.rho = theta.new_zeros(MEMORY, len(theta))  # 0: no step, which then counts nothing

    def add(self, own: Tensor, step: Tensor, change: Tensor) -> None:
        """A step of each of the problems `own`; one along which the gradient hardly changes is forgotten."""
        for kept, new in ((self.steps, step), (self.changes, change)):
            kept[1:, own] = kept[:-1, own]
            kept[0, own] = new
        curvature = (step * change).sum((1, 2))
        tiny = 1e-14 * change.square().sum((1, 2)).sqrt() * step.square().sum((1, 2)).sqrt()
        self.rho[1:, own] = self.rho[:-1, own]
        self.rho[0, own] = torch.where(curvature > tiny, 1 / curvature, 0.0)

    def product(self, own: Tensor, gradient: Tensor, inverse: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The estimated inverse Hessians' product with the gradients of the problems `own`."""
        steps, changes, rho = self.steps[:, own], self.changes[:, own], self.rho[:, own]
        alphas = []
        for s, y, r in zip(steps, changes, rho, strict=True):
            alphas.append(r * (s * gradient).sum((1, 2)))
            gradient = gradient - alphas[-1][:, None, None] * y
        found = inverse(gradient, own)
        scale = (changes[0] * inverse(changes[0], own)).sum((1, 2))
        scale = torch.where(rho[0] > 0, 1 / (rho[0] * scale), 1.0)
        found = found * scale[:, None, None]
        for s, y, r, alpha in zip(reversed(steps), reversed(changes), reversed(rho), reversed(alphas), strict=True):
            found = found + (alpha - r * (y * found).sum((1, 2)))[:, None, None] * s
        return found
