"""How good predictions are: figures with intervals, calibration, paired tests. Labels are integers 0..C-1 into a list
of class names; where a class neither occurs nor is predicted its precision, recall and F1 count as 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling.choices import AVERAGES as AVERAGES

BINS = 15
DRAWS = 2000  # of a posterior, or of rows with replacement
BLOCK_COUNTS = 1 << 22  # draws times rows that lie in memory at once
TINY = np.finfo(np.float64).tiny  # in place of a denominator of 0, whose numerator is 0 as well
LEVEL = 0.95


def figures(
    labels: np.ndarray | Sequence[int],
    probabilities: np.ndarray,
    classes: Sequence[str],
    majority: str | None = None,
    *,
    bins: int = BINS,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one set of predictions, as JSON values. The prediction is the most probable class.

    `labels` (N,) integers, `probabilities` (N, C). `majority`: the most common class of the training rows; what always
    predicting it would score on these rows is given beside. Keys: n, classes, accuracy, weighted_ and macro_
    precision, recall, f1, per_class, confusion (rows: true), collapsed (see `collapsed_class`), log_loss, ece,
    majority, interval.
    Raises `ValueError` for shapes that don't fit and rows that are no distributions.
    """
    labels, probabilities = _checked(labels, probabilities, len(classes))
    confusion = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    figures = {name: float(value) for name, value in scores(confusion).items()}
    per_class = zip(*(values.tolist() for values in _per_class(*_margins(confusion))), strict=True)
    result: dict[str, Any] = {"n": len(labels), "classes": list(classes), **figures}
    result["per_class"] = {
        name: {"precision": p, "recall": r, "f1": f, "support": int(n)}
        for name, (p, r, f), n in zip(classes, per_class, confusion.sum(1), strict=True)
    }
    result["confusion"] = confusion.tolist()
    result["collapsed"] = collapsed_class(confusion, classes)
    result["log_loss"] = log_loss(labels, probabilities)
    result["ece"] = expected_calibration_error(labels, probabilities, bins)
    if majority is not None:
        result["majority"] = majority_baseline(labels, classes, majority)
    result["interval"] = intervals(confusion, draws=draws, seed=seed)
    return result


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts (C, C), rows true, columns predicted. Raises `ValueError` for a class outside 0..C-1."""
    labels, predictions = (_integers(values, n_classes) for values in (labels, predictions))
    if labels.shape != predictions.shape:
        raise ValueError(f"{len(labels)} labels, but {len(predictions)} predictions")
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def collapsed_class(confusion: np.ndarray | Sequence[Sequence[int]], classes: Sequence[str]) -> str | None:
    """The class that is predicted for every row of a confusion matrix (C, C); None where several are, and where the
    rows are of one class themselves."""
    counts = np.asarray(confusion)
    predicted = np.flatnonzero(counts.sum(0))
    return classes[int(predicted[0])] if len(predicted) == 1 and (counts.sum(1) > 0).sum() > 1 else None


def marked(name: str, collapsed: str | None) -> str:
    """How tables call what predicts one class whatever it sees: "tuned (always positive)"."""
    return f"{name} (always {collapsed})" if collapsed else name


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy and the weighted and macro averages of confusion matrices (..., C, C), each of shape (...).

    Weighted: by the class's number of true rows; weighted recall is the accuracy. As scikit-learn's
    precision_recall_fscore_support with all classes as `labels` and `zero_division=0`. Without rows all are 0.
    """
    return _averages(*_margins(np.asarray(confusion)))


def _margins(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)


def _per_class(hits: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 per class, each (..., C), from its hits, true rows and predictions (..., C): counts, or
    shares of all rows."""
    either = true + predicted
    return hits / np.maximum(predicted, TINY), hits / np.maximum(true, TINY), 2 * hits / np.maximum(either, TINY)


def _averages(hits: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    n = np.maximum(true.sum(-1), TINY)
    per_class = dict(zip(("precision", "recall", "f1"), _per_class(hits, true, predicted), strict=True))
    weighted = {f"weighted_{name}": (values * true).sum(-1) / n for name, values in per_class.items()}
    macro = {f"macro_{name}": values.mean(-1) for name, values in per_class.items()}
    return {"accuracy": hits.sum(-1) / n, **weighted, **macro}


def majority_baseline(labels: np.ndarray, classes: Sequence[str], majority: str) -> dict[str, Any]:
    """What always predicting the class `majority` scores on these rows."""
    if majority not in classes:
        raise ValueError(f"majority class {majority!r} is none of {', '.join(classes)}")
    always = np.zeros((len(classes), len(classes)), np.int64)
    always[:, list(classes).index(majority)] = np.bincount(_integers(labels, len(classes)), minlength=len(classes))
    figures = scores(always)
    return {"class": majority, **{name: float(figures[name]) for name in AVERAGES}}


# -- probabilities ----------------------------------------------------------------------------------------------


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean of -ln p(true class), probabilities kept from 0 by the double's epsilon, as scikit-learn does."""
    true = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(true, np.finfo(np.float64).eps, 1)).mean())


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """ECE = Σ_b (n_b / n) |accuracy_b - confidence_b| over `bins` equal-width bins ((b-1)/bins, b/bins] of the
    prediction's probability. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    return float(np.abs(np.bincount(bin_of, weights=gap, minlength=bins)).sum() / len(gap))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities (N, C) of logits (N, C) divided by `temperature`, in double precision."""
    scaled = np.asarray(logits, np.float64) / temperature
    odds: np.ndarray = np.exp(scaled - scaled.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    return odds


def fit_temperature(logits: np.ndarray, labels: np.ndarray, bounds: tuple[float, float] = (0.01, 100.0)) -> float:
    """The temperature T that minimises the log-loss of softmax(logits / T), within `bounds`.

    The loss is convex in 1/T; its derivative, mean of E_p[z] - z_true, is bisected. Rows that are all predicted
    right have no optimum: they give the lower bound. Fit on validation rows: its ECE there is then in-sample.
    Guo et al. 2017, section 4.2.
    """
    logits = np.asarray(logits, np.float64)
    labels = _integers(labels, logits.shape[1])
    if not np.isfinite(logits).all():
        raise ValueError("logits hold values that aren't finite")
    true = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((softmax(logits, 1 / inverse) * logits).sum(1) - true).mean())

    low, high = 1 / bounds[1], 1 / bounds[0]
    if slope(high) <= 0:
        return bounds[0]
    if slope(low) >= 0:
        return bounds[1]
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        if high / low < 1 + 1e-12:
            break
    return float(1 / (low * high) ** 0.5)


# -- intervals and tests ----------------------------------------------------------------------------------------


def intervals(
    confusion: np.ndarray, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, float | list[float]]:
    """Intervals of accuracy, weighted and macro F1 by a confusion matrix (C, C): {"level": ..., name: [low, high]}.

    Equal-tailed credible intervals: the shares of the C² cells among all such rows have a Dirichlet posterior, and so
    has every figure of them (Goutte and Gaussier, ECIR 2005; Caelen, Annals of Mathematics and Artificial Intelligence
    81, 2017). The prior weighs one row, half of it right, and no class more than another. The interval of the accuracy
    is thus the Jeffreys interval, reaching to the figure itself where all rows or none are right (Brown, Cai and
    DasGupta, Statistical Science 16, 2001). Unlike the bootstrap, which can't draw what it hasn't seen and gives 6 of 6
    right no interval, it covers the truth in about `level` of all cases; of macro F1 in fewer where a class has fewer
    than ten rows, since nothing is known of a class without any.
    """
    true, predicted, prior = _prior(len(confusion))
    drawn = _posterior(true, predicted[None], np.ravel(confusion) + prior, len(confusion), draws, seed)
    figures = scores(confusion)
    return {"level": level, **{name: _interval(drawn[name], float(figures[name]), level) for name in AVERAGES}}


def interval_of_mean(
    labels: np.ndarray,
    predictions: np.ndarray,
    n_classes: int,
    figure: str,
    *,
    draws: int = DRAWS,
) -> list[float]:
    """[low, high] of the mean of one of `AVERAGES` over several predictions (M, N) of the same rows, such as those of
    seeds: over rows, the M as they are. As `intervals`; the prior's row is predicted alike by all M."""
    (true, *predicted), counts = _cells([labels, *predictions], n_classes)
    of_class, alike, prior = _prior(n_classes)
    true, weights = np.concatenate([true, of_class]), np.concatenate([counts, prior])
    with_prior = np.stack([np.concatenate([column, alike]) for column in predicted])
    drawn = _posterior(true, with_prior, weights, n_classes, draws, 0)[figure]
    found = [scores(confusion_matrix(labels, p, n_classes))[figure] for p in predictions]
    return _interval(drawn, float(np.mean(found)), LEVEL)


def _prior(n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, prediction and weight of each cell of a confusion matrix, (C²,) each: see `intervals`."""
    true, predicted = np.divmod(np.arange(n_classes**2), n_classes)
    weight = np.where(true == predicted, 1.0, 1 / max(n_classes - 1, 1)) / (2 * n_classes)
    return true, predicted, weight


def _posterior(
    true: np.ndarray, predicted: np.ndarray, weights: np.ndarray, n_classes: int, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Draws (R,) of every average, its mean over M predictions, where `weights` (K,) rows, a prior's among them, are of
    class `true` (K,) and predicted as `predicted` (M, K)."""
    generator = np.random.default_rng(seed)
    blocks = []
    for n in _blocks(draws, len(weights)):
        shares = generator.standard_gamma(weights, (n, len(weights)))
        shares /= shares.sum(1, keepdims=True)
        blocks.append([_averages(*_margins_of_cells(shares, true, column, n_classes)) for column in predicted])
    return {
        name: np.concatenate([np.mean([of_one[name] for of_one in block], axis=0) for block in blocks])
        for name in AVERAGES
    }


def _margins_of_cells(
    samples: np.ndarray, true: np.ndarray, predicted: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, true rows and predictions per class, each (R, C), of samples (R, K) over cells of class `true` (K,) and
    prediction `predicted` (K,)."""
    one_hot = np.eye(n_classes)
    hit = one_hot[true] * (true == predicted)[:, None]
    return samples @ hit, samples @ one_hot[true], samples @ one_hot[predicted]


def _interval(drawn: np.ndarray, figure: float, level: float) -> list[float]:
    """The equal-tailed interval of draws (R,), reaching to the figure itself."""
    low, high = np.percentile(drawn, (50 * (1 - level), 50 * (1 + level))).tolist()
    return [min(low, figure), max(high, figure)]


def _cells(columns: Sequence[np.ndarray], n_classes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows with the same values in all columns (each (N,) integers) are alike: each column's value in every kind of row
    there is, (K,) each, and how many rows are of it (K,)."""
    columns = [_integers(column, n_classes) for column in columns]
    cell = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        cell = np.unique(cell * n_classes + column, return_inverse=True)[1]
    _, first, counts = np.unique(cell, return_index=True, return_counts=True)
    return [column[first] for column in columns], counts


def _blocks(draws: int, size: int) -> list[int]:
    """`draws` of `size` numbers each in parts that fit into memory."""
    at_once = max(1, BLOCK_COUNTS // size)
    return [min(at_once, draws - low) for low in range(0, draws, at_once)]


def resampled(
    labels: np.ndarray,
    predictions: np.ndarray,
    n_classes: int,
    figure: str,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """One of `AVERAGES` of several predictions (M, N) of the same rows, in bootstrap samples of these rows that are the
    same for all: (R, M). For differences, see `two_sided_p`: where two predictions hardly differ, many samples show no
    difference at all, which counts against one. A class that a sample lacks counts as F1 0 in it. Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13."""
    columns, counts = _cells([labels, *predictions], n_classes)
    one_hot = np.eye(n_classes, dtype=np.float32)  # whole numbers are exact in it up to 16 million
    true, *predicted = (one_hot[column] for column in columns)
    generator, found = np.random.default_rng(seed), []
    for n in _blocks(draws, len(counts)):
        samples = generator.multinomial(len(labels), counts / len(labels), n).astype(np.float32)
        of_true = (samples @ true).astype(np.float64)
        block = []
        for column in predicted:
            counted = (samples @ np.hstack([column * true, column])).astype(np.float64)
            block.append(_averages(counted[:, :n_classes], of_true, counted[:, n_classes:])[figure])
        found.append(np.stack(block, 1))
    return np.concatenate(found)


def two_sided_p(drawn: np.ndarray) -> float:
    """Whether a difference is none, by its bootstrap samples (R,): twice the share in which it has the other sign or is
    none, the observed one counted in so that p is never 0. Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, section 4.4. (Swapping the two predictions of a row instead would need as many seeds of both.)"""
    drawn = np.round(drawn, 12)  # means over seeds are equal up to rounding
    tail = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * tail / (len(drawn) + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are: the i-th smallest times (m - i + 1), none below a smaller one's. Holm,
    A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979."""
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = largest
    return adjusted


def mean_std(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Mean and sample standard deviation (n - 1) of each number that all results of several seeds or folds hold.

    {name: {"mean", "std", "n"}}; std is None for a single result. What isn't a number (tables, names) is left out.
    """
    summary = {}
    for name in results[0] if results else ():
        values: list[Any] = [result.get(name) for result in results]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            summary[name] = {"mean": float(np.mean(values)), "std": std, "n": len(values)}
    return summary


# -- checks -----------------------------------------------------------------------------------------------------


def _checked(labels: Any, probabilities: Any, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = _integers(labels, n_classes), np.asarray(probabilities, np.float64)
    if probabilities.shape != (len(labels), n_classes) or not len(labels):
        raise ValueError(f"probabilities of shape {probabilities.shape} for {len(labels)} rows and {n_classes} classes")
    if not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise ValueError("probabilities must be finite and not negative")
    sums = probabilities.sum(1)
    if not 0.99 <= sums.min() <= sums.max() <= 1.01:  # room for half precision
        raise ValueError("probabilities must sum to 1 in each row; are these logits? see softmax()")
    return labels, probabilities


def _integers(values: Any, n_classes: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"classes must be (N,) integers, not {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < n_classes:
        raise ValueError(f"classes {array.min()} to {array.max()}, expected 0 to {n_classes - 1}")
    return array.astype(np.int64, copy=False)
