"""Deletion and insertion curves: whether what an explanation calls important is.

Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, BMVC 2018.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

STEPS = 12  # points of a curve behind its first, at most
ORDERS = 10  # random ones; even, see `random_orders`

Probability = Callable[[np.ndarray], np.ndarray]  # which units are kept (N, U) bool -> the target's probability (N,)


@dataclass(frozen=True)
class Score:
    """Areas under the curves of a target's probability while units are taken away (deletion) or put back (insertion)
    in the order of their importance, and of random orders (R,) each.

    Over random orders both areas have the same mean, since what is kept by one order's deletion is what its reverse
    inserts: their difference, `margin`, is 0 in the mean, and the one figure that both curves come to."""

    deletion: float
    insertion: float
    random_deletions: np.ndarray
    random_insertions: np.ndarray
    deletion_curve: np.ndarray  # (P,)
    insertion_curve: np.ndarray  # (P,)
    shares: np.ndarray  # (P,) of the units, 0 to 1: taken away, or put back

    @property
    def margin(self) -> float:
        """Insertion's area less deletion's."""
        return self.insertion - self.deletion

    @property
    def random_margins(self) -> np.ndarray:
        """(R,)."""
        margins: np.ndarray = self.random_insertions - self.random_deletions
        return margins

    @property
    def below(self) -> float:
        """The share of random orders that do worse, ties counted half."""
        found = self.random_margins
        return float(np.mean(found < self.margin - TIE) + np.mean(np.abs(found - self.margin) <= TIE) / 2)

    @property
    def better(self) -> bool:
        """Whether the margin is greater than that of random orders in their mean. One that knows nothing gets there in
        half of all cases; `below` tells how clearly."""
        return self.margin > TIE


TIE = 1e-9


def score_order(
    probability: Probability,
    importance: np.ndarray,
    *,
    seed: int = 0,
    steps: int = STEPS,
    orders: int = ORDERS,
) -> Score | None:
    """Score the order of `importance` (U,), the most important unit first; equal ones are ordered at random. None for
    fewer than two units, which have one order only.

    `probability` is asked once, for every different set of kept units.
    """
    count = len(importance)
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    own = rng.permutation(count)
    own = own[np.argsort(-importance[own], kind="stable")]
    others = random_orders(count, orders, rng)
    points = np.linspace(0, count, min(steps, count) + 1).round().astype(int)
    points = np.union1d(points, count - points)  # the same from both ends, as reversed orders need it
    kept = np.stack([_kept(order, points) for order in (own, *others)])  # (1 + R, 2, P, U)
    distinct, back = np.unique(kept.reshape(-1, count), axis=0, return_inverse=True)
    curves = probability(distinct)[back].reshape(kept.shape[:-1])
    shares = points / count
    areas = np.trapezoid(curves, shares, axis=-1)
    return Score(float(areas[0, 0]), float(areas[0, 1]), areas[1:, 0], areas[1:, 1], curves[0, 0], curves[0, 1], shares)


def random_orders(count: int, orders: int, rng: np.random.Generator) -> list[np.ndarray]:
    """All orders of a few units; else some random ones, each with its reverse, which needs no more predictions and
    takes the luck of the draw out of the mean."""
    if math.factorial(min(count, 20)) <= orders:
        return [np.array(order) for order in permutations(range(count))]
    drawn = [rng.permutation(count) for _ in range(math.ceil(orders / 2))]
    return [order for one in drawn for order in (one, one[::-1])]


def _kept(order: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which units are kept after the first `points` (P,) of an order are taken away, and put back: (2, P, U) bool."""
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    inserted = rank < points[:, None]
    return np.stack([~inserted, inserted])
