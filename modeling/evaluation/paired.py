"""Several models compared on the same rows: paired bootstrap tests, and what is to be said of the best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling.evaluation import metrics

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class PairedTest:
    """A paired bootstrap of one model against another on the same rows: the difference of the figure, its 95 %
    interval, p, and p by Holm over all models that are tested together."""

    difference: float
    low: float
    high: float
    p: float
    holm: float

    @property
    def better(self) -> bool:
        """Whether the model is significantly better than the other."""
        return self.difference > 0 and self.holm < SIGNIFICANT


def tested_together(differences: Sequence[float], drawn: np.ndarray) -> list[PairedTest]:
    """A test of each of M differences, which were `drawn` (R, M) in R bootstrap samples (`metrics.resampled`)."""
    alone = [metrics.two_sided_p(of_one) for of_one in drawn.T]
    edges = np.quantile(drawn, [0.025, 0.975], axis=0).T.tolist()
    return [
        PairedTest(difference, low, high, p, adjusted)
        for difference, (low, high), p, adjusted in zip(differences, edges, alone, metrics.holm(alone), strict=True)
    ]


def optimism_words(count: int, epochs_chosen: bool) -> str:
    """What the first of `count` ranked models is to be taken with; `epochs_chosen`: some chose epochs by these rows."""
    words = f"The best of {count} by these very rows is optimistic: confirm it on others."
    if epochs_chosen:
        words += (
            " Heads trained by gradient descent also chose their best epoch on these rows, which favours them over "
            "linear and kernel."
        )
    return words
