"""The comparison of a sweep's configurations: bars with intervals and paired tests, and the whole table.

All figures are those of the sweep's own table.csv; nothing is computed anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from feats.csv_files import read_table
from feats.errors import UsageError
from modeling.choices import AVERAGES
from modeling.heads.config import ABLATIONS, HeadConfig, ablation_words
from modeling.report import markup
from modeling.report.sections import FigureFile, Section
from modeling.report.style import colour, figure_file, shorten
from modeling.search.sweep import TABLE, read_notes
from modeling.training.config import TrainConfig

SETTINGS = [f.name for f in (*fields(HeadConfig), *fields(TrainConfig)) if f.name not in ("head", "sides", "seed")]
FIGURES = (*AVERAGES, "±", "low", "high", "to best", "p", "gain")
COUNTS = ("seeds", "parameters", "with_encoders")
WIDTH = 5.6  # inches
BAR = 0.19  # inches, of a bar and its part of the gaps
DIGITS = 3


@dataclass(frozen=True)
class Comparison:
    """A sweep's configurations, best first by the figure `by`, as table.csv has them: cells as text. `baseline`: what
    always predicting one class scores, and which, under head."""

    rows: list[dict[str, str]]
    baseline: dict[str, str]
    by: str
    notes: str

    def varying(self) -> list[str]:
        """The settings of which there are several values."""
        return [name for name in SETTINGS if len({row[name] for row in self.rows if row.get(name)}) > 1]


def read_comparison(folder: Path) -> Comparison:
    """Of a sweep's folder. Raises `UsageError` when there is no finished sweep, or one that doesn't say what it ranks
    by."""
    try:
        table = read_table(folder / TABLE)
        rows, [baseline] = ([row for row in table if bool(row["run"]) == trained] for trained in (True, False))
        comparison = Comparison(rows, baseline, rows[0]["by"], read_notes(folder))
        _ = [number(row, name) for row in rows for name in (*FIGURES, *COUNTS)]
    except (OSError, ValueError, KeyError, IndexError):
        raise UsageError(
            f"no finished sweep that a report can show in {folder}; run its command, python modeling/sweep_heads.py, "
            "again: what is finished is kept"
        ) from None
    return comparison


def number(row: Mapping[str, str], name: str) -> float | None:
    """A cell's number, None where it is empty."""
    return float(row[name]) if row.get(name) else None


# -- what bars show ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """The best configuration of a `group`, and in it of a `series`: its figure, the 95 % interval over rows, and the p
    of the paired test against the best of all (None: it is the best)."""

    group: str
    series: str
    number: int  # of the series
    value: float
    low: float
    high: float
    p: float | None
    collapsed: str  # "always positive" where it predicts one class
    run: str


def bars_by_ablation(comparison: Comparison) -> list[Bar]:
    """Each head at its best under each ablation, heads in the order of their best."""
    known = {row["ablation"] for row in comparison.rows}
    series = [(words, {"ablation": words}) for words in map(ablation_words, ABLATIONS) if words in known]
    groups = [(head, {"head": head}) for head in dict.fromkeys(row["head"] for row in comparison.rows)]
    return _bars(comparison, groups, series)


def bars_by_width_and_rate(comparison: Comparison) -> list[Bar]:
    """Each head and width at its best with each learning rate; none where the sweep varies neither. Heads that have no
    rate have no bars."""
    rows = [row for row in comparison.rows if row["lr"]]
    rates = sorted({row["lr"] for row in rows}, key=float)
    if len(rates) < 2 and len({row["D"] for row in rows if row["D"]}) < 2:
        return []
    pairs = dict.fromkeys((row["head"], row["D"]) for row in rows)
    order = list(dict.fromkeys(row["head"] for row in rows))
    groups = [
        (f"{head} D {D}" if D else head, {"head": head, "D": D})
        for head, D in sorted(pairs, key=lambda pair: (order.index(pair[0]), float(pair[1] or 0)))
    ]
    return _bars(comparison, groups, [(f"lr {rate}", {"lr": rate}) for rate in rates])


def _bars(
    comparison: Comparison,
    groups: Sequence[tuple[str, Mapping[str, str]]],
    series: Sequence[tuple[str, Mapping[str, str]]],
) -> list[Bar]:
    found = []
    for group, of_group in groups:
        for k, (name, of_series) in enumerate(series):
            wanted = {**of_group, **of_series}
            best = next((row for row in comparison.rows if all(row[k] == v for k, v in wanted.items())), None)
            if best is not None:
                value, low, high = (float(best[column]) for column in (comparison.by, "low", "high"))
                p, collapsed, run = number(best, "p"), best["collapsed"], best["run"]
                found.append(Bar(group, name, k, value, low, high, p, collapsed, run))
    return found


# -- drawing ----------------------------------------------------------------------------------------------------


def bars_figure(name: str, bars: Sequence[Bar], comparison: Comparison) -> FigureFile:
    """Horizontal bars from what the majority class scores, with their intervals and p."""
    gaps = len({bar.group for bar in bars}) - 1
    height = 1.1 + BAR * (len(bars) + 0.7 * gaps)
    return figure_file(name, lambda axes: _draw(axes, bars, comparison), (WIDTH, height))


def _draw(axes: Axes, bars: Sequence[Bar], comparison: Comparison) -> None:
    base = float(comparison.baseline[comparison.by])
    series = dict(sorted({bar.number: bar.series for bar in bars}.items()))
    place, ticks, previous = 0.0, dict[str, list[float]](), None
    for bar in bars:
        place += 0.7 if previous not in (None, bar.group) else 0
        previous = bar.group
        ticks.setdefault(bar.group, []).append(place)
        axes.barh(place, bar.value - base, left=base, height=0.8, color=colour(bar.number), alpha=0.75, zorder=2)
        axes.plot([bar.low, bar.high], [place, place], color="0.5", linewidth=1.4, zorder=3)
        axes.plot([bar.value], [place], "o", color="0.5", markersize=3, zorder=3)
        axes.annotate(
            f"{bar.value:.3f}  {p_words(bar)}",
            (max(bar.high, base), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
        place += 1
    axes.axvline(base, color="0.5", linestyle=":", linewidth=1.2)
    axes.set_yticks([sum(of) / len(of) for of in ticks.values()], [shorten(group, 24) for group in ticks])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    low, high = min([base, *(bar.low for bar in bars)]), max(bar.high for bar in bars)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    axes.set_xlabel(f"{figure_words(comparison.by)} (bars begin at {comparison.baseline['head']}: {base:.3f})")
    if len(series) > 1:
        handles = [Patch(color=colour(k), alpha=0.75, label=words) for k, words in series.items()]
        axes.figure.legend(handles=handles, loc="outside upper center", ncols=min(len(series), 4))


def p_words(bar: Bar) -> str:
    """What stands beside a bar: "best", or p; and that it predicts one class, where it does."""
    told = "best" if bar.p is None else f"p {bar.p:.3f}"
    return f"{told}, {bar.collapsed}" if bar.collapsed else told


def figure_words(name: str) -> str:
    """weighted F1 of weighted_f1."""
    return name.replace("_f1", " F1")


# -- sections ---------------------------------------------------------------------------------------------------


def comparison_sections(sweep_folder: Path) -> list[Section]:
    """The sweep's bars, and the table of all its configurations. Raises as `read_comparison`."""
    comparison = read_comparison(sweep_folder)
    whole = {
        "comparison-ablation": (
            bars_by_ablation(comparison),
            "Each head at its best, by the sides it reads.",
        ),
        "comparison-settings": (
            bars_by_width_and_rate(comparison),
            "Each head and width D at its best, by learning rate.",
        ),
    }
    drawn = {name: (bars, words) for name, (bars, words) in whole.items() if bars}
    explained = (
        " Lines are 95 % intervals over validation rows; p is a paired bootstrap against the best of all on the same "
        "rows."
    )
    files = [bars_figure(name, bars, comparison) for name, (bars, _) in drawn.items()]
    captions = {name: words + explained for name, (_, words) in drawn.items()}
    notes = markup.paragraphs(comparison.notes.splitlines(), "note")
    columns = table_columns(comparison)
    cells = [table_cells(row, columns) for row in [*comparison.rows, comparison.baseline]]
    table = markup.table(
        columns,
        cells,
        f"All configurations, best first by {figure_words(comparison.by)}; a click on a head of a column sorts",
        sortable=True,
    )
    return [
        Section("Comparison", "comparison", markup.figures(files, captions) + notes, files),
        Section("All configurations", "configurations", table),
    ]


def table_columns(comparison: Comparison) -> list[str]:
    """What the table shows: what differs, and figures."""
    wanted = ["head", "collapsed", "ablation", *comparison.varying(), "seeds", *AVERAGES, "±", "95 %", "to best", "p"]
    wanted += ["gain", "best_epoch", "parameters", "with_encoders"]
    return [name for name in wanted if any(row.get(name) for row in comparison.rows)]


def table_cells(row: Mapping[str, str], columns: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each column's text and, of numbers, its value; of an interval its lower end."""
    return [_shown(row, name) for name in columns]


def _shown(row: Mapping[str, str], name: str) -> tuple[str, float | None]:
    text = row.get(name, "")
    if name == "95 %":
        return text, number(row, "low")
    if name in FIGURES and text:
        return f"{float(text):.{DIGITS}f}", float(text)
    if name in (*COUNTS, *SETTINGS) and text:
        try:
            return text, float(text)
        except ValueError:
            return text, None
    return text, None
