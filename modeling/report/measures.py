"""The numbers that figures show, of predictions as a run stores them: labels (N,) integers 0..C-1, probabilities
(N, C). Nothing here draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.evaluation.metrics import BINS, confusion_matrix, intervals, softmax

SMALLEST = 5e-7  # half of the last digit that stored probabilities have
KEPT_SHARES = (0.25, 0.5, 0.75, 1)  # of the rows, the surest: shown of `RiskCoverage`
GROUPS = 5  # of rows by text length or picture size
CURVE_POINTS = 200


# -- right and wrong --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """Counts (C, C), rows true, columns predicted; `share` of each true class's rows, 0 for a class without."""

    counts: np.ndarray
    share: np.ndarray


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> Confusion:
    """Of the most probable classes."""
    counts = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    return Confusion(counts, counts / np.maximum(counts.sum(1, keepdims=True), 1))


@dataclass(frozen=True)
class RiskCoverage:
    """Rows kept in the order of their confidence, the surest first: `coverage` (N,), the share kept, and `accuracy`
    (N,) of these. El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, JMLR 2010."""

    coverage: np.ndarray
    accuracy: np.ndarray
    threshold: np.ndarray  # (N,), the least confidence among those kept

    def at(self, share: float) -> float:
        """The accuracy when `share` of the rows are kept, rounded up to whole rows."""
        return float(self.accuracy[max(0, int(np.ceil(share * len(self.accuracy) - 1e-9)) - 1)])


def risk_coverage(labels: np.ndarray, probabilities: np.ndarray) -> RiskCoverage:
    """Rows of equal confidence share the accuracy that all of them together have: their order means nothing."""
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    accuracy = (probabilities.argmax(1) == labels)[order].cumsum() / kept
    threshold = confidence[order]
    last = np.searchsorted(-threshold, -threshold, side="right") - 1
    return RiskCoverage(kept / len(order), accuracy[last], threshold)


# -- probabilities ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """Of each bin of confidence that has rows: mean confidence, accuracy, rows (each (B,)); and their `ece`."""

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray
    ece: float


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Bins as `metrics.expected_calibration_error` has them: ((b-1)/bins, b/bins]."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    rows = np.bincount(bin_of, minlength=bins)
    there = rows > 0
    mean, accuracy = (np.bincount(bin_of, x, bins)[there] / rows[there] for x in (confidence, right))
    ece = float((rows[there] * np.abs(accuracy - mean)).sum() / len(labels))
    return Reliability(mean, accuracy, rows[there], ece)


def before_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """What one head said before its logits z were divided by T: softmax(z) = softmax(T log p), of stored p (N, C)."""
    return softmax(temperature * np.log(np.maximum(probabilities, SMALLEST)))


@dataclass(frozen=True)
class Density:
    """A kernel density estimate: `values` (P,) at `points` (P,) within 0 and 1, which integrate to 1."""

    points: np.ndarray
    values: np.ndarray
    rows: int


def density(values: np.ndarray, points: int = CURVE_POINTS) -> Density:
    """Gaussian kernels, Silverman's width (1986, equation 3.31), mirrored at 0 and 1: without that a density near an
    edge would lose what falls beyond it. `values` (N,) within 0 and 1, N > 0."""
    quartiles = np.percentile(values, (25, 75))
    spread = min(values.std(), (quartiles[1] - quartiles[0]) / 1.34) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, 0.01)
    grid = np.linspace(0, 1, points)
    mirrored = np.concatenate([values, -values, 2 - values])
    kernels = np.exp(-0.5 * ((grid[:, None] - mirrored) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return Density(grid, kernels.sum(1) / len(values), len(values))


def confidence_densities(labels: np.ndarray, probabilities: np.ndarray) -> list[Density | None]:
    """For each true class the density of the prediction's probability; None for a class without rows."""
    confidence = probabilities.max(1)
    return [density(confidence[labels == k]) if (labels == k).any() else None for k in range(probabilities.shape[1])]


def prediction_pattern(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All rows (N, C), by true class and, within one, the surest of it first; and where each class begins (C + 1,)."""
    own = probabilities[np.arange(len(labels)), labels]
    order = np.lexsort((-own, labels))
    starts = np.searchsorted(labels[order], np.arange(probabilities.shape[1] + 1))
    return probabilities[order], starts


# -- groups of rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Rows whose value is `low` to `high`: their accuracy with its 95 % interval."""

    low: float
    high: float
    rows: int
    accuracy: float
    interval: tuple[float, float]


def by_value(values: np.ndarray, right: np.ndarray) -> list[Group]:
    """Rows in `GROUPS` of about the same number by their values (N,); `right` (N,) bool. Equal values stay together, so
    that there may be fewer groups."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, GROUPS + 1)[1:-1], method="lower"))
    group_of = np.searchsorted(edges, values, side="left")
    found = []
    for k in np.unique(group_of):
        own, inside = right[group_of == k], values[group_of == k]
        low, high = share_interval(int(own.sum()), len(own))
        found.append(Group(float(inside.min()), float(inside.max()), len(own), float(own.mean()), (low, high)))
    return found


def share_interval(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, see `metrics.intervals`."""
    found: Any = intervals(np.array([[hits, rows - hits], [0, 0]]))["accuracy"]
    return found[0], found[1]


# -- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """One training's epochs: `values` (E,) of each column by name, NaN where a row has none."""

    name: str
    fold: int | None
    seed: int | None
    epochs: np.ndarray
    values: Mapping[str, np.ndarray]


def courses(history: Sequence[Mapping[str, Any]]) -> list[Course]:
    """The rows of a run's history as one course for each fold and seed; heads without epochs have none."""
    of_training: dict[tuple[int | None, int | None], list[Mapping[str, Any]]] = {}
    for row in history:
        if _number(row.get("epoch")) > 0:
            of_training.setdefault((_whole(row.get("fold")), _whole(row.get("seed"))), []).append(row)
    found = []
    for (fold, seed), rows in of_training.items():
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}
        told = [f"{what} {of}" for what, of in (("fold", fold), ("seed", seed)) if of is not None]
        found.append(Course(", ".join(told), fold, seed, values["epoch"], values))
    return found


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _whole(value: Any) -> int | None:
    return None if value in (None, "") else int(value)


# -- neighbourhoods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Purity:
    """The mean share of a row's nearest neighbours that are of its class, and what neighbours drawn at random would
    give."""

    share: float
    by_chance: float
    neighbours: int
    rows: int


def purity(points: np.ndarray, labels: np.ndarray, asked: np.ndarray, among: np.ndarray, neighbours: int) -> Purity:
    """Of the rows `asked` (numbers), by the Euclidean distances of `points` (N, D) to those `among`, the row itself
    left out."""
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(among) - 1)
    nearest = NearestNeighbors(n_neighbors=count + 1, algorithm="brute").fit(points[among])
    found = among[nearest.kneighbors(points[asked], return_distance=False)]
    shares = []
    for row, near in zip(asked.tolist(), found.tolist(), strict=True):
        others = [other for other in near if other != row][:count]
        shares.append(np.mean(labels[others] == labels[row]))
    drawn = np.bincount(labels[among]) / len(among)
    chance = float(np.mean([drawn[label] if label < len(drawn) else 0.0 for label in labels[asked].tolist()]))
    return Purity(float(np.mean(shares)), chance, count, len(asked))
