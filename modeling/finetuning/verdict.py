"""Which finetuning, if any, is worth it: figures on the test rows of all folds, paired tests against the frozen head,
and a last line that says what to use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import write_table
from feats.errors import UsageError
from feats.writing import write_text
from modeling.evaluation import metrics, text_tables
from modeling.evaluation.paired import SIGNIFICANT, PairedTest, tested_together
from modeling.experiments.experiment import Experiment
from modeling.finetuning.comparison import FROZEN, STARTED, Cell
from modeling.runs.config import TEST_PREDICTIONS, read_config, read_metrics
from modeling.runs.folder import read_predictions
from modeling.search.sweep import MARKDOWN, TABLE

COLLAPSED = "predicts one class only"
AT_START = "kept its start"


@dataclass(frozen=True)
class Scored:
    """What one candidate came to on all folds done: `predictions` (N,) on their test rows, one fold after the other,
    and of each fold the monitored `validation` figure (more is better), seconds (without those of caches that serve all
    folds), peak memory and trained parameters."""

    method: str
    predictions: np.ndarray
    validation: tuple[float, ...]
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    parameters: int
    collapsed: tuple[int, ...] = ()  # folds whose model says the same of all rows
    at_start: tuple[int, ...] = ()  # folds in which no epoch bettered the start, which was kept
    resumed: tuple[int, ...] = ()  # folds begun more than once: their seconds are the last start's
    point: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[Path, ...] = ()

    @property
    def mean_validation(self) -> float:
        """The figure that chooses among points of a grid."""
        return float(np.mean(self.validation))

    @property
    def mean_seconds(self) -> float:
        """What a fold takes."""
        return float(np.mean(self.seconds))


@dataclass(frozen=True)
class Comparison:
    """Tables, notes and the verdict. `rows` has one for each method and for the majority class, `points` one for each
    point of a grid (none without a grid)."""

    rows: list[dict[str, Any]]
    columns: list[str]
    points: list[dict[str, Any]]
    notes: list[str]
    verdict: str

    def text(self, markdown: bool = False) -> str:
        """All of it, the verdict last."""
        parts = [text_tables.format_table(self.rows, self.columns, markdown=markdown)]
        if self.points:
            columns = list(dict.fromkeys(name for row in self.points for name in row))
            parts.append(text_tables.format_table(self.points, columns, markdown=markdown))
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes), self.verdict])

    def write(self, folder: Path) -> None:
        """table.csv, with every number in full, and table.md."""
        write_table(folder / TABLE, [*self.rows, *self.points])
        write_text(folder / MARKDOWN, self.text(markdown=True) + "\n")


# -- reading ----------------------------------------------------------------------------------------------------


def read_scored(cells: Sequence[Cell], experiment: Experiment, monitor: str) -> Scored:
    """The finished cells of one candidate. Raises `UsageError` for a run that tested other rows than its fold's."""
    candidate = cells[0].candidate
    predicted, validation, facts, at_start = [], [], [], []
    for cell in cells:
        ids, _, probabilities = read_predictions(cell.path / TEST_PREDICTIONS)
        config = read_config(cell.path)
        if ids != experiment.splits[cell.fold - 1].test or config["classes"] != experiment.classes:
            raise UsageError(f"{cell.path} tested other rows than this comparison's; remove it, or give another `name`")
        predicted.append(probabilities.argmax(1))
        figures = read_metrics(cell.path)["val"]
        validation.append(-figures["log_loss"] if monitor == "loss" else figures[monitor])
        [member] = config["members"]
        if candidate.method != FROZEN and member["best_epoch"] == 0:
            at_start.append(cell.fold)
        frozen = {**member["facts"], "trained_parameters": member["parameters"]}
        facts.append(frozen if candidate.method == FROZEN else config["finetuned"]["facts"])
    return Scored(
        candidate.method,
        np.concatenate(predicted),
        tuple(validation),
        tuple(of_fold["seconds"] - of_fold.get("trunk_seconds", 0.0) for of_fold in facts),
        tuple(of_fold["peak_bytes"] for of_fold in facts),
        facts[0]["trained_parameters"],
        tuple(cell.fold for cell, classes in zip(cells, predicted, strict=True) if len(set(classes.tolist())) == 1),
        tuple(at_start),
        tuple(cell.fold for cell in cells if _starts(cell.log) > 1),
        candidate.point,
        tuple(cell.path for cell in cells),
    )


def _starts(log: Path) -> int:
    """How often a cell was begun."""
    if not log.is_file():
        return 1
    return sum(line.startswith(STARTED) for line in log.read_text(encoding="utf-8", errors="replace").splitlines())


# -- comparing --------------------------------------------------------------------------------------------------


def compare(
    frozen: Scored,
    tuned: Sequence[Scored],
    labels: np.ndarray,
    classes: Sequence[str],
    majority: str,
    monitor: str,
    protocol: str,
) -> Comparison:
    """Of each method the point of the grid with the best mean validation figure, tested against the frozen head on the
    test rows, `labels` (N,) int64. The figure is `monitor`, or accuracy where that is the loss."""
    figure = monitor if monitor in metrics.AVERAGES else "accuracy"
    best = chosen_points(tuned)
    tests, against_best = paired_tests(frozen, best, labels, len(classes), figure)
    rows = [_row(frozen, labels, classes, figure, monitor)]
    for scored, tested in zip(best, tests, strict=True):
        of_test = {
            "to frozen": f"{tested.difference:+.3f}",
            "95 % of that": f"{tested.low:+.3f} to {tested.high:+.3f}",
            "p": tested.holm,
        }
        in_full = {"difference": tested.difference, "difference_low": tested.low, "difference_high": tested.high}
        rows.append({**_row(scored, labels, classes, figure, monitor), **of_test, **in_full, "p_alone": tested.p})
    always = metrics.majority_baseline(labels, classes, majority)
    rows.append(
        {"method": f"always {majority}", "rows": len(labels), **{name: always[name] for name in metrics.AVERAGES}}
    )
    varying = _varying(tuned)
    columns = ["method", *varying, "rows", *metrics.AVERAGES, "95 %", "to frozen", "95 % of that", "p"]
    columns += ["trained M", "s a fold", "peak GB", *(["note"] if any(row.get("note") for row in rows) else [])]
    points = _points(tuned, best, varying, monitor) if len(tuned) > len(best) else []
    notes = [
        protocol,
        f"figures on {len(labels)} test rows, all folds pooled; 95 % is of the {figure}, over rows; p is a paired "
        f"bootstrap against the frozen head on the same rows, by Holm over {len(best)} method{'s'[: len(best) != 1]}",
        "intervals and p are over test rows alone: each method was trained once a fold, and another training would "
        "come to other figures, too",
        "seconds are without what serves all folds and is done once: the extraction of the frozen head's features, and "
        "the outputs of blocks below last-N",
    ]
    if len(best) > 1:
        notes.append(
            f"which of {len(best)} methods leads is told by the same test rows, which flatters its lead a little"
        )
    if points:
        notes.append(f"points of the grid were chosen by their mean validation {monitor}; no test row had a say")
    notes += [
        f"fold{'s'[: len(scored.resumed) != 1]} {', '.join(map(str, scored.resumed))} of {scored.method} went on after "
        "an interruption: seconds are of the last start"
        for scored in best
        if scored.resumed
    ]
    verdict = verdict_line(best, tests, against_best, len(labels), figure)
    return Comparison(rows, columns, points, notes, verdict)


def chosen_points(tuned: Sequence[Scored]) -> list[Scored]:
    """Of each method the point with the best mean validation figure, of equals the first."""
    of_method: dict[str, Scored] = {}
    for scored in tuned:
        other = of_method.get(scored.method)
        if other is None or scored.mean_validation > other.mean_validation:
            of_method[scored.method] = scored
    return list(of_method.values())


def paired_tests(
    frozen: Scored, best: Sequence[Scored], labels: np.ndarray, n_classes: int, figure: str
) -> tuple[list[PairedTest], list[float]]:
    """Each method against the frozen head; and, by their place in `best`, the p of each against the best of those that
    are significantly better (1 of itself, and where none is)."""
    if not best:
        return [], []
    predictions = np.stack([frozen.predictions, *(scored.predictions for scored in best)])
    found = [figure_of(predicted, labels, n_classes, figure) for predicted in predictions]
    drawn = metrics.resampled(labels, predictions, n_classes, figure)
    differences = drawn[:, 1:] - drawn[:, :1]
    tests = tested_together([value - found[0] for value in found[1:]], differences)
    better = [k for k, tested in enumerate(tests) if tested.better]
    first = max(better, key=lambda k: tests[k].difference, default=None)
    if first is None:
        return tests, [1.0] * len(best)
    against = [metrics.two_sided_p(of_one - differences[:, first]) for of_one in differences.T]
    return tests, against


def figure_of(predictions: np.ndarray, labels: np.ndarray, n_classes: int, figure: str) -> float:
    """One of `metrics.AVERAGES` of predictions (N,)."""
    return float(metrics.scores(metrics.confusion_matrix(labels, predictions, n_classes))[figure])


def verdict_line(
    best: Sequence[Scored], tests: Sequence[PairedTest], against_best: Sequence[float], n_rows: int, figure: str
) -> str:
    """Which to use. Of the methods that are significantly better than the frozen head the best; where one that isn't
    told apart from it takes less time, the cheapest such is named beside."""
    if not best:
        return "verdict: nothing was tuned, so that nothing is compared; name more than frozen in `methods`"
    ranked = sorted(range(len(best)), key=lambda k: -tests[k].difference)
    better = [k for k in ranked if tests[k].better]
    if not better:
        k = ranked[0]
        return (
            f"verdict: keep the frozen features: no tuned model is significantly better on {n_rows} test rows (best: "
            f"{_named(best[k])}, {figure} {tests[k].difference:+.3f}, p {tests[k].holm:.3f})"
        )
    k = better[0]
    winner, tested = best[k], tests[k]
    alike = [j for j in better[1:] if against_best[j] >= SIGNIFICANT and best[j].mean_seconds < winner.mean_seconds]
    beside = ""
    if alike:
        j = min(alike, key=lambda j: best[j].mean_seconds)
        times = f"{best[j].mean_seconds:.0f} s a fold, not {winner.mean_seconds:.0f} s"
        beside = f"; {_named(best[j])}, not told apart from it (p {against_best[j]:.3f}), takes {times}"
    saved = ", ".join(map(str, winner.runs))
    millions = winner.parameters / 1e6
    size = f"{millions:.1f}" if millions >= 0.1 else f"{millions:.3f}"
    return (
        f"verdict: use {_named(winner)} ({figure} {tested.difference:+.3f}, 95 % {tested.low:+.3f} to "
        f"{tested.high:+.3f}, p {tested.holm:.3f}), {size} M trained parameters{beside}"
        + (f"; saved: {saved}" if saved else "")
    )


def _named(scored: Scored) -> str:
    point = ", ".join(f"{name} {_short(value)}" for name, value in scored.point.items())
    return scored.method + (f" at {point}" if point else "") + (f" ({COLLAPSED})" if scored.collapsed else "")


# -- rows of the tables -----------------------------------------------------------------------------------------


def _row(scored: Scored, labels: np.ndarray, classes: Sequence[str], figure: str, monitor: str) -> dict[str, Any]:
    confusion = metrics.confusion_matrix(labels, scored.predictions, len(classes))
    found = metrics.scores(confusion)
    interval = metrics.intervals(confusion)[figure]
    assert isinstance(interval, list)
    notes = [_of_folds(COLLAPSED, scored.collapsed, scored), _of_folds(AT_START, scored.at_start, scored)]
    return {
        "method": scored.method,
        **{name: _short(value) for name, value in scored.point.items()},
        "rows": len(labels),
        **{name: float(found[name]) for name in metrics.AVERAGES},
        "95 %": "{:.3f}-{:.3f}".format(*interval),
        "trained M": scored.parameters / 1e6,
        "s a fold": round(scored.mean_seconds, 1),
        "peak GB": max(scored.peak_bytes) / 1e9,
        "note": "; ".join(filter(None, notes)),
        f"validation {monitor}": abs(scored.mean_validation),
        "folds": len(scored.validation),
    }


def _of_folds(what: str, folds: Sequence[int], scored: Scored) -> str:
    """What is so in some folds, and in which unless in all."""
    if not folds or len(folds) == len(scored.validation):
        return what if folds else ""
    return f"{what} in fold{'s'[: len(folds) != 1]} {', '.join(map(str, folds))}"


def _points(
    tuned: Sequence[Scored], best: Sequence[Scored], varying: Sequence[str], monitor: str
) -> list[dict[str, Any]]:
    """Every point of the grid by its validation figure. Test figures of points that weren't chosen are left out: who
    sees them is tempted to choose by them."""
    return [
        {
            "method": scored.method,
            **{name: _short(scored.point.get(name)) for name in varying},
            f"validation {monitor}": abs(scored.mean_validation),
            "s a fold": round(scored.mean_seconds, 1),
            "chosen": "yes" if any(scored is other for other in best) else "",
            **({"note": _of_folds(COLLAPSED, scored.collapsed, scored)} if scored.collapsed else {}),
        }
        for scored in tuned
    ]


def _varying(tuned: Sequence[Scored]) -> list[str]:
    return list(dict.fromkeys(name for scored in tuned for name in scored.point))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
