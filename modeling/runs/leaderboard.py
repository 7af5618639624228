"""Runs of any kind beside one another: on the same rows, with intervals and paired tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from feats.errors import UsageError
from modeling.choices import AVERAGES, RUNS
from modeling.evaluation import metrics
from modeling.evaluation.paired import PairedTest, tested_together
from modeling.runs.config import CONFIG
from modeling.runs.entries import (
    Entry,
    Predicted,
    find_entries,
    read_entry,
    read_predicted,
    rows_words,
)
from modeling.runs.groups import Group, Place
from modeling.runs.layouts import written
from modeling.runs.listing import warn_of

# The smallest p is 2 / (draws + 1): times the number of runs, as Holm has it, it must stay far below .05.
DRAWS_A_RUN = 100


@dataclass(frozen=True)
class Leaderboard:
    """Groups of comparable runs, the largest first; what was left out, and why."""

    groups: list[Group]
    left_out: dict[Path, str] = field(default_factory=dict)

    def text(self, layout: str = "terminal", *, csv_safe: bool = False) -> str:
        """As one of `modeling.runs.layouts.LAYOUTS`; `csv_safe`: as `safe` of `feats.csv_files.write_rows`. Raises
        `UsageError` for another."""
        return written(self.groups, layout, csv_safe)

    def __str__(self) -> str:
        return self.text()


def compare_runs(
    runs: Path | str | Sequence[Path | str] = RUNS,
    *,
    by: str | None = None,
    against: Path | str | None = None,
) -> Leaderboard:
    """A leaderboard of runs from their stored predictions on validation rows: of folders of runs, or of folders in
    which they lie, sweeps' and comparisons' runs among them. Runs whose rows or labels differ are in groups of their
    own and aren't compared.

    Each group is ranked `by` one of `metrics.AVERAGES`; without, by the figure that chose all its epochs, or accuracy.
    Paired tests are against the best of the group, or against the run `against`, which is compared, too; p is adjusted
    after Holm for how many runs the group has. In cross-validated runs every row is predicted by heads that hadn't seen
    it, and all folds count as one set of predictions.

    What can't be read in a folder of runs is in `left_out`, and a warning names it. Raises `UsageError` for an unknown
    figure, for a run named by itself that can't be read, and when there are no runs.
    """
    if by is not None and by not in AVERAGES:
        raise UsageError(f"`by` {by}: expected one of {', '.join(AVERAGES)}")
    places = [Path(place) for place in ([runs] if isinstance(runs, (str, Path)) else runs)]
    named = [*places, *([Path(against)] if against is not None else [])]
    entries, left_out = _entries(named)
    chosen = None if against is None else Path(against).resolve()
    groups: dict[str, list[tuple[Entry, Predicted]]] = {}
    for entry in entries:
        try:
            predicted = read_predicted(entry)
        except UsageError as error:
            if entry.path in named:
                raise
            left_out[entry.path] = str(error)
            continue
        groups.setdefault(predicted.digest(entry.config["classes"]), []).append((entry, predicted))
    if not groups:
        why = f" ({next(iter(left_out.values()))})" if left_out else ""
        raise UsageError(
            f"no complete run in {', '.join(map(str, places))}{why}; train one with: python modeling/train_head.py"
        )
    warn_of(left_out)
    base = places[0] if len(places) == 1 else None
    titles = _titles({digest: [entry for entry, _ in of] for digest, of in groups.items()})
    found = [_group(titles[digest], of, by, chosen, base) for digest, of in groups.items()]
    return Leaderboard(sorted(found, key=lambda group: -len(group.places)), left_out)


def _entries(named: Sequence[Path]) -> tuple[list[Entry], dict[Path, str]]:
    """Runs of all these places, each once."""
    found, left_out = dict[Path, Entry](), dict[Path, str]()
    for place in named:
        if (place / CONFIG).exists():
            found.setdefault(place.resolve(), read_entry(place))
            continue
        if not place.is_dir():
            raise UsageError(f"{place} is no run and no folder of runs; give the path of one")
        entries, bad = find_entries(place)
        left_out |= bad
        for entry in entries:
            found.setdefault(entry.path.resolve(), entry)
    return list(found.values()), left_out


def _titles(groups: Mapping[str, Sequence[Entry]]) -> dict[str, str]:
    """What rows each group's are; the caches' folder, and what tells them apart at least, where others say the same."""
    titles = {digest: rows_words(entries) for digest, entries in groups.items()}
    folders = {digest: str(entries[0].config["features"].get("folder")) for digest, entries in groups.items()}
    for more in (folders, {digest: f"rows {digest[:8]}" for digest in groups}):
        alike = {d: {more[other] for other in titles if titles[other] == title} for d, title in titles.items()}
        titles = {d: f"{title}, {more[d]}" if len(alike[d]) > 1 else title for d, title in titles.items()}
    return titles


def _group(
    rows: str, runs: Sequence[tuple[Entry, Predicted]], by: str | None, against: Path | None, base: Path | None
) -> Group:
    entries = [entry for entry, _ in runs]
    monitors = {entry.monitor for entry in entries}
    by = by or (monitors.pop() if len(monitors) == 1 else AVERAGES[0])
    classes = sorted(entries[0].config["classes"])
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[name] for name in runs[0][1].labels])
    predictions = np.array([[number[name] for name in predicted.predictions] for _, predicted in runs])
    found = [metrics.confusion_matrix(labels, of_run, len(classes)) for of_run in predictions]
    scores = [{name: float(value) for name, value in metrics.scores(c).items() if name in AVERAGES} for c in found]
    order = sorted(range(len(runs)), key=lambda k: (-scores[k][by], str(entries[k].path)))
    reference = next((k for k in order if entries[k].path.resolve() == against), order[0])
    tests = _tests(labels, predictions, len(classes), by, [of[by] for of in scores], reference)
    places = [
        Place(
            entries[k],
            _name(entries[k].path, base),
            scores[k],
            {name: edges for name, edges in metrics.intervals(found[k]).items() if isinstance(edges, list)},
            entries[k].deviation(by),
            tests.get(k),
        )
        for k in order
    ]
    majority = metrics.majority_baseline(labels, classes, _majority(entries[order[0]], labels, classes))
    return Group(rows, by, places, majority, _name(entries[reference].path, base))


def _tests(
    labels: np.ndarray,
    predictions: np.ndarray,
    n_classes: int,
    by: str,
    values: Sequence[float],
    reference: int,
) -> dict[int, PairedTest]:
    """Of every run but the `reference`, by its place in `predictions` (M, N)."""
    others = [k for k in range(len(values)) if k != reference]
    if not others:
        return {}
    draws = max(metrics.DRAWS, DRAWS_A_RUN * len(others))
    drawn = metrics.resampled(labels, predictions, n_classes, by, draws=draws)
    tests = tested_together([values[k] - values[reference] for k in others], drawn[:, others] - drawn[:, [reference]])
    return dict(zip(others, tests, strict=True))


def _majority(entry: Entry, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The most common class of a run's training rows; of its validation rows where it doesn't tell."""
    counts = entry.config.get("training_rows")
    if isinstance(counts, Mapping) and set(counts) == set(classes):
        return max(classes, key=lambda name: counts[name])
    return classes[int(np.bincount(labels).argmax())]


def _name(path: Path, base: Path | None) -> str:
    """A run's folder, as seen from the folder of runs where there is one."""
    return str(path.relative_to(base)) if base is not None and path != base and path.is_relative_to(base) else str(path)
