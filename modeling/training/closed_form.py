"""Classifiers on feature matrices that need no learning rate: logistic regression to its optimum, exact RBF kernels.

Both are convex and give the same answer on every machine up to rounding; everything is computed in double precision on
the features' device. Features come normalised and scaled: an RBF kernel sees only their distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from feats.errors import UsageError
from modeling.heads.layers import squared_distances
from modeling.training.threads import StepThreads, threads_kept

MAX_KERNEL_ROWS = 20_000  # five N x N matrices of 3.2 GB each
KERNEL_GAMMAS = (0.5, 1.0, 2.0, 4.0)  # divided by the mean squared distance of two rows
KERNEL_RIDGES = (0.3, 1.0, 3.0, 10.0)
CALIBRATION_C = 1.0  # matters on small data only: few rows must not make a sharp calibration
MAX_ROUNDS = 100  # some five are enough but for separable classes under a weak penalty
ITERATIONS = 25
TOLERANCE, PROMISED = 1e-10, 1e-6  # of the objective: where to stop, and what must be reached


# -- logistic regression ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogisticFit:
    """Logits of rows x are x @ weight + bias. `weight` (D, K) and `bias` (K,) float64; `objective` is the minimum."""

    C: float
    weight: torch.Tensor
    bias: torch.Tensor
    objective: float


@threads_kept()
def fit_logistic(
    x: torch.Tensor,
    targets: torch.Tensor,
    n_classes: int,
    Cs: Sequence[float],
    row_weights: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
    threads: StepThreads | None = None,
) -> list[LogisticFit]:
    """Multinomial logistic regression of `targets` (N,) int64 on `x` (N, D), one fit for each of `Cs`, in their order.

    Minimises C Σ_i w_i logloss_i + ½ ||weight||², the bias free: scikit-learn's LogisticRegression, also for two
    classes, where that has one weight vector and this the same as ± its half. `row_weights` (N,), above 0, are the w_i.
    `threads` chooses those of each evaluation of the objective, from fit to fit; without it torch's are used.

    L-BFGS in the coordinates in which the Hessian, its blocks taken as equal, is the identity: standardised features
    of a thousand columns need some forty evaluations where plain L-BFGS needs hundreds. There half the squared
    gradient estimates the distance from the minimum (Boyd and Vandenberghe, Convex Optimization, section 9.5.1); the
    coordinates are renewed until it is `tolerance` of the objective.
    Raises `UsageError` for a C that isn't positive or so large that the minimum isn't found, for numbers that aren't
    finite, and for a class without a row.
    """
    threads = threads or StepThreads(x.device, steady=True)
    threads.resume()
    x, weights = _checked(x, targets, n_classes, row_weights)
    check_penalties(Cs)
    centre = weights @ x / weights.sum()  # takes the bias out of the weights' way
    x = x - centre
    basis = None
    if x.shape[1] > len(x):  # the minimum is a combination of the rows: look for it in a basis of these
        basis, coordinates = torch.linalg.qr(x.T)
        x = coordinates.T
    weight, bias = x.new_zeros(x.shape[1], n_classes), x.new_zeros(n_classes)
    ridge = 2.0 if n_classes == 2 else 1.0
    fits = {}
    for C in sorted(set(Cs)):  # from the strongest penalty: each starts where the last ended
        weight, bias, objective = _minimise(x, targets, C * weights, ridge, weight, bias, tolerance, threads)
        of_columns = weight if basis is None else basis @ weight
        fits[C] = LogisticFit(C, of_columns, bias - centre @ of_columns, objective)
    return [fits[C] for C in Cs]


def _minimise(
    x: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    ridge: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tolerance: float,
    threads: StepThreads,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Minimise Σ_i weights_i logloss_i + ridge / 2 ||weight||² from `weight`, `bias`; also gives the minimum."""
    scale = float(weights.sum())
    weights, ridge = weights / scale, ridge / scale
    for _ in range(MAX_ROUNDS):
        p = (x @ weight + bias).softmax(1)
        curvature = weights * (p * (1 - p)).mean(1)
        hessian = x.T @ (curvature[:, None] * x)
        hessian.diagonal().add_(ridge)
        factor = _cholesky(hessian, "linear").T
        stretch = curvature.sum().sqrt().clamp_min(1e-6)
        weight, bias, value, excess = _lbfgs(x, targets, weights, ridge, weight, bias, factor, stretch, threads)
        if excess <= tolerance * value:
            break
    if excess > max(tolerance, PROMISED) * value:
        raise not_minimised(excess / value)
    return weight, bias, value * scale


def not_minimised(excess: float) -> UsageError:
    """The error of a logistic regression that ends `excess`, a share of its objective, above the minimum."""
    return UsageError(
        f"logistic regression is {excess:.1g} of its objective from the minimum after {MAX_ROUNDS} rounds: "
        "the classes can be told apart and next to nothing keeps the weights small; give a smaller `C`"
    )


def _lbfgs(
    x: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    ridge: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    factor: torch.Tensor,
    stretch: torch.Tensor,
    threads: StepThreads,
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Some steps in the coordinates factor @ weight (factor (D, D) upper triangular) and stretch * bias. Gives the new
    weight and bias, the objective there and by how much it exceeds the minimum, estimated."""
    v, c = (factor @ weight).requires_grad_(), (stretch * bias).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v, c], max_iter=ITERATIONS, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        threads.begin_step()
        optimiser.zero_grad()
        w = torch.linalg.solve_triangular(factor, v, upper=True)
        losses = F.cross_entropy(x @ w + c / stretch, targets, reduction="none")
        value: torch.Tensor = weights @ losses + ridge / 2 * w.square().sum()
        value.backward()
        threads.end_step()
        return value

    optimiser.step(objective)
    value = objective().item()
    squares = [float(x.grad.square().sum()) for x in (v, c) if x.grad is not None]  # of both, just computed
    excess = sum(squares) / 2
    return torch.linalg.solve_triangular(factor, v.detach(), upper=True), c.detach() / stretch, value, excess


# -- RBF kernel -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelFit:
    """Logits of rows x are `kernel_logits(x, support, dual, bias, gamma)`: calibrated, softmax gives probabilities.

    `support` (N, D) are the training rows in double precision, `dual` (N, K) and `bias` (K,) their weights with the
    calibration folded in. `held_out` (N, K) are the training rows' logits by the fits without their fold, and `loss`
    is their log-loss, which chose `gamma` and `ridge` from `search`, a row for each pair tried.
    """

    support: torch.Tensor
    dual: torch.Tensor
    bias: torch.Tensor
    gamma: float
    ridge: float
    loss: float
    held_out: torch.Tensor
    search: list[dict[str, float]]


def fit_kernel(
    x: torch.Tensor,
    targets: torch.Tensor,
    n_classes: int,
    fold_of: torch.Tensor,
    gammas: Sequence[float] = KERNEL_GAMMAS,
    ridges: Sequence[float] = KERNEL_RIDGES,
    row_weights: torch.Tensor | None = None,
    threads: StepThreads | None = None,
) -> KernelFit:
    """Least-squares classifier with kernel 1 + exp(-gamma ||x - x'||²), gamma and ridge chosen on held-out folds.

    Ridge regression of one-hot targets Y, `row_weights` w_i in it: dual = A Y with A = (K + ridge diag(1/w))⁻¹. The
    1 is the bias. Rows B (`fold_of` (N,) int64, duplicates in one fold) held out need no second fit: their scores are
    Y_B - (A_BB)⁻¹ dual_B (An, Liu and Venkatesh, Pattern Recognition 40, 2007). On those, `fit_logistic`
    makes logits of scores (matrix scaling, Guo et al., ICML 2017, section 4.2), and the least log-loss wins.
    `gammas` are in units of 1 / (mean squared distance of two rows), so that they hold for any scale of x.
    `threads` are those of the calibrations, as of `fit_logistic`.
    Time grows with N³: two seconds for each pair at 3600 rows on one core.
    Raises `UsageError` for more than 20000 rows, fewer than two folds, numbers that aren't finite, a ridge too small
    to invert the kernel, and a class without a row.
    """
    if len(x) > MAX_KERNEL_ROWS:
        raise UsageError(
            f"{len(x)} training rows, expected at most {MAX_KERNEL_ROWS}: an exact kernel holds N x N numbers; use a "
            "linear or mlp head, or train on fewer rows"
        )
    x, weights = _checked(x, targets, n_classes, row_weights)
    folds = [torch.nonzero(fold_of == fold).squeeze(1) for fold in fold_of.unique()]
    if len(folds) < 2:
        raise UsageError(f"all {len(x)} rows are in one fold, expected two or more; give 2 `folds` or more")
    y = F.one_hot(targets, n_classes).to(x)
    distances = squared_distances(x, x)
    spread = max(2 * float(x.var(0, correction=0).sum()), torch.finfo(x.dtype).eps)
    best, search = None, []
    for relative in gammas:
        gamma = relative / spread
        kernel = distances.mul(-gamma).exp_().add_(1)
        for ridge in ridges:
            dual, scores = _ridge(kernel, ridge / weights, y, folds)
            scale = scores.std().clamp_min(torch.finfo(x.dtype).eps)
            fit = fit_logistic(scores / scale, targets, n_classes, [CALIBRATION_C], row_weights, threads=threads)[0]
            calibration = fit.weight / scale
            held_out = scores @ calibration + fit.bias
            loss = float(weights @ F.cross_entropy(held_out, targets, reduction="none") / weights.sum())
            search.append({"gamma": gamma, "ridge": ridge, "loss": loss})
            if best is None or loss < best.loss:
                dual = dual @ calibration
                best = KernelFit(x, dual, dual.sum(0) + fit.bias, gamma, ridge, loss, held_out, search)
    if best is None:
        raise ValueError(f"gammas {list(gammas)}, ridges {list(ridges)}: expected one or more of each")
    return best


def _ridge(
    kernel: torch.Tensor, penalty: torch.Tensor, y: torch.Tensor, folds: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel ridge regression of `y` (N, K) with `penalty` (N,) per row: dual (N, K), and held-out scores (N, K)."""
    inverse = kernel.clone()
    inverse.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(_cholesky(inverse, "kernel"))
    dual = inverse @ y
    scores = torch.empty_like(y)
    for rows in folds:
        scores[rows] = y[rows] - torch.linalg.solve(inverse[rows][:, rows], dual[rows])
    return dual, scores


def _cholesky(matrix: torch.Tensor, head: str) -> torch.Tensor:
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise UsageError(
            f"the {head} head's equations are singular up to rounding: its penalty is too weak; give a "
            f"{'smaller `C`' if head == 'linear' else 'larger `ridge`'}"
        )
    return factor


def _checked(
    x: torch.Tensor, targets: torch.Tensor, n_classes: int, row_weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and row weights in double precision; weights of 1 when there are none."""
    if x.ndim != 2 or targets.shape != x.shape[:1] or (row_weights is not None and row_weights.shape != targets.shape):
        raise ValueError(f"features {tuple(x.shape)}, targets {tuple(targets.shape)}: expected (N, D) and (N,)")
    check_every_class(targets, n_classes)
    for what, values in (("features", x), ("row weights", row_weights)):
        if values is not None and not torch.isfinite(values).all():
            raise UsageError(f"{what} that aren't finite numbers; check `scale`, `class_weights` and the caches")
    x = x.double()
    return x, torch.ones_like(x[:, 0]) if row_weights is None else row_weights.to(x)


def check_penalties(Cs: Sequence[float]) -> None:
    """Raise `UsageError` for no `C`, and for one that isn't positive."""
    if not Cs or min(Cs) <= 0:
        raise UsageError(f"C {', '.join(f'{C:g}' for C in Cs) or '(none)'}: expected numbers above 0")


def check_every_class(targets: torch.Tensor, n_classes: int) -> None:
    """Raise `UsageError` unless each of the classes has a row among `targets` (N,) int64, and no other has."""
    counts = torch.bincount(targets, minlength=n_classes)
    if len(counts) > n_classes or not counts.all():
        raise UsageError(
            f"rows per class {counts.tolist()}, expected some in each of {n_classes}; leave a class without rows out"
        )
