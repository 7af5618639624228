"""Closed-form heads: against scikit-learn, and held-out predictions against fits that never saw the fold."""

import re

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel

from feats.errors import UsageError
from modeling.heads.layers import kernel_logits
from modeling.training import closed_form
from modeling.training.closed_form import fit_kernel, fit_logistic

CS = [1e-4, 1e-2, 1.0, 1e3]


def problem(n_classes: int, rows: int = 300, columns: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes; columns of different sizes and far from 0."""
    x, y = make_classification(
        rows, columns, n_informative=12, n_classes=n_classes, class_sep=0.7, flip_y=0.1, random_state=seed
    )
    rng = np.random.default_rng(seed)
    return x * rng.lognormal(size=columns) + rng.normal(size=columns), y


def normalised(x: np.ndarray, kind: str) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True) if kind == "l2" else (x - x.mean(0)) / x.std(0)


def objective(x, y, C, weight, bias, row_weights) -> float:
    """scikit-learn's; its two-class weights are the difference of ours."""
    z = x @ weight + bias
    losses = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(y)), y]
    penalised = weight[:, 1] - weight[:, 0] if weight.shape[1] == 2 else weight
    return C * (row_weights * losses).sum() + (penalised**2).sum() / 2


def rows_weighing(y: np.ndarray) -> np.ndarray:
    """scikit-learn's class_weight="balanced"."""
    return len(y) / len(np.unique(y)) / np.bincount(y)[y]


def fold_numbers(n: int, k: int = 4) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.arange(n) % k)


# -- logistic regression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True], ids=["even", "balanced"])
@pytest.mark.parametrize("norm", ["standard", "l2"])
@pytest.mark.parametrize("n_classes", [2, 3, 17])
def test_logistic_is_scikit_learns(n_classes: int, norm: str, balanced: bool):
    x, y = problem(n_classes)
    x = normalised(x, norm)
    weights = rows_weighing(y) if balanced else np.ones(len(y))
    given = torch.tensor(weights) if balanced else None
    fits = fit_logistic(torch.tensor(x), torch.tensor(y), n_classes, CS, given)
    assert [fit.C for fit in fits] == CS
    for fit in fits:
        theirs = LogisticRegression(C=fit.C, tol=1e-8, max_iter=10_000, solver="newton-cholesky")
        theirs.fit(x, y, sample_weight=weights)
        weight, bias = theirs.coef_.T, theirs.intercept_
        if n_classes == 2:
            weight, bias = np.hstack([-weight / 2, weight / 2]), np.array([-bias[0] / 2, bias[0] / 2])
        ours = objective(x, y, fit.C, fit.weight.numpy(), fit.bias.numpy(), weights)
        assert ours <= objective(x, y, fit.C, weight, bias, weights) * (1 + 1e-6)
        assert fit.objective == pytest.approx(ours, rel=1e-9)
        predictions = (torch.tensor(x) @ fit.weight + fit.bias).argmax(1).numpy()
        assert np.array_equal(predictions, theirs.predict(x))


def test_logistic_in_any_order_and_alone():
    x, y = map(torch.tensor, problem(3))
    some = fit_logistic(x, y, 3, [10.0, 0.01, 10.0])
    alone = fit_logistic(x, y, 3, [10.0])[0]
    assert [fit.C for fit in some] == [10.0, 0.01, 10.0]
    assert torch.allclose(some[0].weight, alone.weight, rtol=0, atol=1e-3 * float(alone.weight.abs().max()))
    assert some[0].objective == pytest.approx(alone.objective, rel=1e-6)


def test_logistic_on_separable_and_constant_columns():
    """The objective is bounded below by the penalty alone; a column that says nothing gets no weight."""
    y = torch.tensor([0, 1] * 10)
    x = torch.stack([y * 2.0 - 1, torch.full((20,), 5.0), torch.zeros(20)], 1)
    fit = fit_logistic(x.half(), y, 2, [1e6])[0]
    assert ((x.double() @ fit.weight + fit.bias).argmax(1) == y).all()
    assert fit.weight[1:].abs().max() < 1e-9
    assert fit.weight.dtype == torch.float64


def test_more_columns_than_rows():
    x, y = problem(3, rows=30, columns=200)
    x = normalised(x, "standard")
    fit = fit_logistic(torch.tensor(x), torch.tensor(y), 3, [0.1])[0]
    theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x, y)
    assert np.allclose(fit.weight.numpy(), theirs.coef_.T, atol=1e-5)


# -- kernel -----------------------------------------------------------------------------------------------------


def refit(x, y, n_classes, gamma, penalty, weights, queries) -> np.ndarray:
    """scikit-learn's kernel ridge regression of one-hot targets with kernel 1 + RBF."""
    model = KernelRidge(alpha=penalty, kernel="precomputed")
    model.fit(1 + rbf_kernel(x, gamma=gamma), np.eye(n_classes)[y], sample_weight=weights)
    return model.predict(1 + rbf_kernel(queries, x, gamma=gamma))


@pytest.mark.parametrize("balanced", [False, True], ids=["even", "balanced"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_kernel_is_ridge_regression_calibrated(n_classes: int, balanced: bool):
    """Held-out scores are those of fits without the fold; one calibration makes logits of both kinds of scores."""
    x, y = problem(n_classes, rows=150, columns=15)
    x, new = normalised(x, "l2")[:120], normalised(x, "l2")[120:]
    y, folds = y[:120], fold_numbers(120)
    weights = rows_weighing(y) if balanced else None
    fit = fit_kernel(
        *map(torch.tensor, (x, y)),
        n_classes,
        torch.tensor(folds),
        row_weights=torch.tensor(weights) if balanced else None,
    )
    scores = np.zeros((120, n_classes))
    for fold in range(4):
        known, held = folds != fold, folds == fold
        some = weights[known] if balanced else None
        scores[held] = refit(x[known], y[known], n_classes, fit.gamma, fit.ridge, some, x[held])
    calibration = LogisticRegression(C=closed_form.CALIBRATION_C, tol=1e-12, max_iter=10_000)
    calibration.fit(scores / scores.std(ddof=1), y, sample_weight=weights)
    expected = calibration.predict_proba(scores / scores.std(ddof=1))
    assert np.allclose(fit.held_out.softmax(1).numpy(), expected, atol=1e-5)
    assert fit.loss == pytest.approx(np.average(-np.log(expected[np.arange(120), y]), weights=weights), abs=1e-5)
    expected = calibration.predict_proba(
        refit(x, y, n_classes, fit.gamma, fit.ridge, weights, new) / scores.std(ddof=1)
    )
    logits = kernel_logits(torch.tensor(new), fit.support, fit.dual, fit.bias, fit.gamma)
    assert np.allclose(logits.softmax(1).numpy(), expected, atol=1e-5)


def test_the_best_of_the_search_is_kept():
    x, y = map(torch.tensor, problem(3, rows=90))
    folds = torch.tensor(fold_numbers(90))
    fit = fit_kernel(x, y, 3, folds, gammas=(0.1, 1.0), ridges=(0.01, 0.1, 10.0))
    assert len(fit.search) == 6
    best = min(fit.search, key=lambda row: row["loss"])
    assert (fit.gamma, fit.ridge, fit.loss) == (best["gamma"], best["ridge"], best["loss"])
    distances = torch.cdist(x, x).square()
    relative = best["gamma"] * float(distances.mean())
    assert min(abs(relative - 0.1), abs(relative - 1)) < 1e-9
    alone = fit_kernel(x, y, 3, folds, [relative], [best["ridge"]])
    assert torch.allclose(alone.dual, fit.dual) and torch.allclose(alone.held_out, fit.held_out)


def test_kernel_does_not_depend_on_scale_or_on_fold_numbers():
    x, y = map(torch.tensor, problem(3, rows=90))
    folds = torch.tensor(fold_numbers(90))
    fit, other = fit_kernel(x, y, 3, folds), fit_kernel(x * 8, y, 3, 7 - 2 * folds)
    assert torch.allclose(fit.held_out, other.held_out, atol=1e-6) and fit.ridge == other.ridge
    logits = [kernel_logits(s * x, f.support, f.dual, f.bias, f.gamma) for s, f in ((1, fit), (8, other))]
    assert torch.allclose(*logits, atol=1e-6)


def test_two_folds_are_enough():
    x, y = problem(2, rows=60, columns=15)
    folds = fold_numbers(60, 2)
    fit = fit_kernel(*map(torch.tensor, (x, y)), 2, torch.tensor(folds), [1.0], [1.0])
    assert fit.held_out.shape == (60, 2) and fit.loss < np.log(2)


def test_kernel_sees_what_no_line_separates():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    fit = fit_kernel(torch.tensor(x), torch.tensor(y), 2, torch.tensor(fold_numbers(400)))
    assert (fit.held_out.argmax(1).numpy() == y).mean() > 0.93


@pytest.mark.parametrize("same", [False, True], ids=["noise", "equal rows"])
def test_twenty_rows(same: bool):
    """Nothing to learn: the probabilities stay near the share of the classes."""
    x = torch.ones(20, 8) if same else torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0] * 14 + [1] * 6)
    fit = fit_kernel(x, y, 2, torch.tensor(fold_numbers(20)))
    p = kernel_logits(x, fit.support, fit.dual, fit.bias, fit.gamma).softmax(1)
    assert torch.isfinite(fit.held_out).all() and fit.loss < 0.75
    assert 0.1 < float(p[:, 1].mean()) < 0.5


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_logits_in_blocks(block_rows: int):
    rng = torch.Generator().manual_seed(0)
    x, support, dual = (torch.randn(*shape, generator=rng) for shape in ((23, 5), (11, 5), (11, 3)))
    bias = torch.tensor([1.0, 2.0, 3.0])
    logits = kernel_logits(x.half(), support, dual, bias, 0.3, block_rows)
    expected = rbf_kernel(x.half().float(), support, gamma=0.3) @ dual.numpy() + bias.numpy()
    assert logits.dtype == torch.float32 and np.allclose(logits.numpy(), expected, atol=1e-5)


# -- refusals ---------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch: pytest.MonkeyPatch):
    x, y, folds = torch.randn(20, 3), torch.tensor([0, 1] * 10), torch.arange(20) % 4
    with pytest.raises(UsageError, match="C 1, 0: expected numbers above 0"):
        fit_logistic(x, y, 2, [1.0, 0.0])
    with pytest.raises(UsageError, match=r"C \(none\): expected numbers above 0"):
        fit_logistic(x, y, 2, [])
    with pytest.raises(UsageError, match=r"rows per class \[10, 10, 0\], expected some in each of 3"):
        fit_logistic(x, y, 3, [1.0])
    with pytest.raises(ValueError, match=r"features \(20, 3\), targets \(19,\): expected"):
        fit_logistic(x, y[1:], 2, [1.0])
    with pytest.raises(UsageError, match="all 20 rows are in one fold"):
        fit_kernel(x, y, 2, torch.zeros(20, dtype=torch.int64))
    monkeypatch.setattr(closed_form, "MAX_KERNEL_ROWS", 19)
    with pytest.raises(UsageError, match="20 training rows, expected at most 19: .* linear or mlp head"):
        fit_kernel(x, y, 2, folds)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float):
    x, y, folds = torch.randn(20, 3), torch.tensor([0, 1] * 10), torch.arange(20) % 4
    weights = torch.ones(20).index_fill(0, torch.tensor([3]), bad)
    for features, of_rows, told in ((x * bad, None, "features that"), (x, weights, "row weights that")):
        for fit in (
            lambda *a: fit_logistic(*a, 2, [1.0], of_rows),
            lambda *a: fit_kernel(*a, 2, folds, row_weights=of_rows),
        ):
            with pytest.raises(UsageError, match=f"{told} aren't finite"):
                fit(features, y)


def test_penalties_too_weak_to_be_solved():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0).long() + ((x[:, 1] > 0.5) & (x[:, 0] > 0)).long()  # told apart by planes
    told = r"is (\S+) of its objective from the minimum after 100 rounds: .*; give a smaller "
    with pytest.raises(UsageError, match=told) as error:
        fit_logistic(x, y, 3, [1e15])
    assert closed_form.PROMISED <= float(re.search(told, str(error.value))[1]) <= 1
    twice = torch.cat([x[:, :1], x[:, :1]], 1)  # only the penalty tells how two equal columns share a weight
    with pytest.raises(UsageError, match="the linear head's equations are singular.*too weak; give a smaller "):
        fit_logistic(twice, torch.arange(60) // 7 % 2, 2, [1e17])
    with pytest.raises(UsageError, match="the kernel head's equations are singular.*too weak; give a larger `ridge`"):
        fit_kernel(x, y, 3, torch.arange(60) % 4, gammas=[1e-12], ridges=[1e-20])
