"""Runs ranked and tested on the same rows: what a leaderboard consists of."""

from dataclasses import dataclass
from typing import Any

from modeling.evaluation.paired import PairedTest, optimism_words
from modeling.runs.entries import Entry, figure_words


@dataclass(frozen=True)
class Place:
    """A run in a group: its figures by name, their 95 % credible intervals over rows, the standard deviation of the
    ranking figure over folds or seeds (None of a single head), and its test (None: it is the one tested against)."""

    entry: Entry
    name: str
    figures: dict[str, float]
    intervals: dict[str, list[float]]
    deviation: float | None
    test: PairedTest | None


@dataclass(frozen=True)
class Group:
    """Runs on the same validation rows with the same labels, best first by the figure `by`. `rows`: which they are;
    `majority`: what always predicting the most common class of the training rows scores (`metrics.majority_baseline`);
    `against`: the name of the run that the others are tested against."""

    rows: str
    by: str
    places: list[Place]
    majority: dict[str, Any]
    against: str

    @property
    def notes(self) -> list[str]:
        """How the figures came about."""
        several = len(self.places) > 1
        lines = [f"95 % intervals are credible ones, over rows. Figures are those of {self.rows}."]
        if several:
            others = len(self.places) - 1
            lines.append(
                f"To {'the best' if self.against == self.places[0].name else self.against}: the difference in "
                f"{figure_words(self.by)}; p is a paired bootstrap on the same rows, by Holm over "
                f"{others} run{'s'[: others != 1]}."
            )
            lines.append(optimism_words(len(self.places), any(place.entry.epochs_chosen for place in self.places)))
        elif self.places[0].entry.epochs_chosen:
            lines.append("Its best epoch was chosen on these very rows, which is optimistic.")
        if any(place.deviation is not None for place in self.places):
            lines.append("± is over a run's folds or seeds; its figure is of all of them together.")
        return lines
