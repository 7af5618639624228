"""The learning curve on the report page."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from modeling.report import markup
from modeling.report.sections import FigureFile, Section
from modeling.report.style import DASHES, MARKERS, colour, figure_file, shorten
from modeling.runs.run import Run
from modeling.search.learning_curve import FILE, MEASURED, PREDICTED, answers, notes, read_curve

NAME = "learning-curve"
COLUMNS = {  # of the table: the curve's name and what a reader sees
    "what": "",
    "share": "share of the rows",
    "rows": "training rows",
    "mean": "mean",
    "std": "± over draws",
    "low": "95 % from",
    "high": "to",
    "gain_low": "gain from",
    "gain_high": "to",
    "why": "no statement, since",
}


def learning_curve_section(run: Run, rows: Sequence[Mapping[str, Any]] | None = None) -> Section | None:
    """The curve `rows`, a `search.learning_curve.table`; without, what lies in the run's folder as learning_curve.csv,
    and None where nothing does. Raises `UsageError` for a file that can't be read."""
    if rows is None:
        if not (run.folder / FILE).is_file():
            return None
        rows = read_curve(run.folder / FILE)
    file = curve_figure(rows)
    caption = (
        "Points: mean over draws of that many training rows, with the 95 % interval over validation rows. Shaded: "
        "95 % band of power laws for more rows; dotted: the majority class."
    )
    told = markup.paragraphs(answers(rows)) + markup.figures([file], {file.name: caption})
    return Section(
        "How many more labels?", NAME, told + _table(rows) + markup.paragraphs([notes(rows)], "note"), [file]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [*(["head"] if len({row["head"] for row in rows}) > 1 else []), *COLUMNS]
    names = [name for name in names if any(row[name] not in (None, "") for row in rows)]
    cells = [[_cell(row[name], name) for name in names] for row in rows]
    return markup.table([COLUMNS.get(name, name) for name in names], cells, rows[0]["figure"].replace("_f1", " F1"))


def _cell(value: Any, name: str) -> tuple[str, float | None]:
    if value is None or isinstance(value, str):
        return value or "", None
    return (f"{value:g}" if name in ("share", "rows") else f"{value:.3f}"), float(value)


def curve_figure(rows: Sequence[Mapping[str, Any]]) -> FigureFile:
    """Measured points with intervals, bands beyond."""
    return figure_file(NAME, lambda axes: _draw(axes, rows), (4.6, 3.3))


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    heads = list(dict.fromkeys(row["head"] for row in rows))
    for k, head in enumerate(heads):
        measured, beyond = (
            [row for row in rows if row["head"] == head and row["what"] == what and row["mean"] is not None]
            for what in (MEASURED, PREDICTED)
        )
        n, mean = ([row[name] for row in measured] for name in ("rows", "mean"))
        ends = [[row["mean"] - row["low"] for row in measured], [row["high"] - row["mean"] for row in measured]]
        look: dict[str, Any] = {"color": colour(k), "marker": MARKERS[k % len(MARKERS)], "markersize": 4}
        axes.errorbar(n, mean, ends, **look, elinewidth=1, capsize=2, label=shorten(head, 24))
        if beyond:
            on = [measured[-1], *beyond]
            n, mean, low, high = ([row[name] for row in on] for name in ("rows", "mean", "low", "high"))
            axes.fill_between(n, low, high, color=colour(k), alpha=0.2, linewidth=0)
            axes.plot(n, mean, DASHES[1], color=colour(k))
    axes.axhline(rows[0]["chance"], color="0.5", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    last = max(row["rows"] for row in rows if row["mean"] is not None)
    ticks = [row["rows"] for row in rows if row["head"] == heads[0] and row["rows"] <= last]
    axes.set_xticks(_apart(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training rows")
    axes.set_ylabel(rows[0]["figure"].replace("_f1", " F1"))
    if len(heads) > 1:
        axes.legend(loc="lower right")


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those that are far enough from one another on a logarithmic axis for their labels."""
    kept = [min(ticks)]
    for tick in sorted(ticks):
        if tick >= 1.7 * kept[-1]:
            kept.append(tick)
    return kept
