"""A leaderboard as text: for a terminal of 80 columns, Markdown, LaTeX and CSV."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from feats.csv_files import write_rows
from feats.errors import UsageError
from feats.escapes import one_line
from modeling.choices import AVERAGES
from modeling.evaluation.text_tables import WIDTH, format_table
from modeling.runs.entries import Entry, age_of, figure_words
from modeling.runs.groups import Group, Place

HEAD, CACHES = 13, 12  # widths of the terminal's columns that are wrapped
# First lines, by which files are known that may be replaced.
FIRST = {"terminal": "leaderboard", "markdown": "<!-- leaderboard -->", "latex": "% leaderboard"}
CSV_COLUMNS = (
    "rows",
    "rank",
    "run",
    "kind",
    "head",
    "caches",
    "seed",
    "n",
    *(f"{name}{end}" for name in AVERAGES for end in ("", "_low", "_high")),
    "std",
    "by",
    "against",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "saved",
)
SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
}


def written(groups: Sequence[Group], layout: str, csv_safe: bool = False) -> str:
    """One of `LAYOUTS`, ending without a line feed; `csv_safe` as `safe` of `write_rows`. Raises `UsageError` for
    another."""
    if layout not in LAYOUTS:
        raise UsageError(f"`format` {layout}: expected one of {', '.join(LAYOUTS)}")
    return csv(groups, safe=csv_safe) if layout == "csv" else LAYOUTS[layout](groups)


def first_line_of(layout: str) -> str:
    """How a file of a layout begins."""
    return ",".join(CSV_COLUMNS) if layout == "csv" else FIRST[layout]


# -- terminal ---------------------------------------------------------------------------------------------------


def terminal(groups: Sequence[Group]) -> str:
    """A table for each group; every run has as many lines as its names need."""
    return "\n\n".join(map(_terminal_group, groups))


def _terminal_group(group: Group) -> str:
    head, caches, to = "head, seed", "caches", "to best" if _against_best(group) else "to other"
    columns = ["#", head, caches, *map(figure_words, AVERAGES), to]
    rows: list[dict[str, Any]] = []
    for rank, place in enumerate(group.places, 1):
        entry = place.entry
        names = {"#": [f"{rank:>3}"], head: [*_wrapped(entry.head, HEAD), *_wrapped(_kind_words(entry), HEAD)]}
        names[caches] = _wrapped(entry.caches, CACHES)
        figures = {
            figure_words(name): [_figure(place, name, group.by), _edges(place.intervals[name])] for name in AVERAGES
        }
        test = place.test
        told = ["best" if _against_best(group) else "the other"] if test is None else []
        told = told or [f"{test.difference:+.3f}", f"p {test.holm:.3f}"] if test else told
        rows += _lines({**names, **figures, to: told})
    always = f"always {group.majority['class']}"
    figures = {figure_words(name): [f"{group.majority[name]:.3f}"] for name in AVERAGES}
    rows += _lines({head: _wrapped(always, HEAD), **figures})
    folders = [f"{rank:>3}  {one_line(place.name)}" for rank, place in enumerate(group.places, 1)]
    notes = [line for note in group.notes for line in wrap(one_line(note), WIDTH, break_on_hyphens=False)]
    title = wrap(one_line(group.rows), WIDTH, break_on_hyphens=False)
    return "\n".join([*title, "", format_table(rows, columns, width=None), "", *folders, "", *notes])


def _lines(cells: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The lines of a row whose cells have several each."""
    return [dict(zip(cells, line, strict=True)) for line in zip_longest(*cells.values(), fillvalue="")]


def _wrapped(text: str, width: int) -> list[str]:
    """Broken behind commas and plus signs where that is possible."""
    lines: list[str] = []
    for word in re.findall(r"[^,+ ]*[,+ ]?", one_line(text)):
        if lines and len(lines[-1]) + len(word.rstrip()) <= width:
            lines[-1] += word
        elif word:
            lines += [word[k : k + width] for k in range(0, len(word), width)]
    return [line.rstrip() for line in lines]


def _kind_words(entry: Entry) -> str:
    return f"s{entry.seed}" + ("" if entry.kind == "head" else f", {entry.kind}")


def _against_best(group: Group) -> bool:
    return group.against == group.places[0].name


def _figure(place: Place, name: str, by: str) -> str:
    deviation = place.deviation if name == by else None
    return f"{place.figures[name]:.3f}" + (f"±{deviation:.3f}" if deviation is not None else "")


def _edges(interval: Sequence[float]) -> str:
    return "{:.3f}-{:.3f}".format(*interval)


# -- Markdown and LaTeX -----------------------------------------------------------------------------------------

COLUMNS = ["#", "run", "head", "caches", "seed", *map(figure_words, AVERAGES), "difference", "p"]


def _cells(group: Group) -> Iterator[list[str]]:
    """The rows of a group by `COLUMNS`, the majority class's last."""
    for rank, place in enumerate(group.places, 1):
        entry, test = place.entry, place.test
        figures = [f"{_figure(place, name, group.by)} ({_edges(place.intervals[name])})" for name in AVERAGES]
        tested = ["", ""] if test is None else [f"{test.difference:+.3f}", f"{test.holm:.3f}"]
        seed = entry.seed + ("" if entry.kind == "head" else f" ({entry.kind})")
        yield [str(rank), place.name, entry.head, entry.caches, seed, *figures, *tested]
    figures = [f"{group.majority[name]:.3f}" for name in AVERAGES]
    yield ["", "", f"always {group.majority['class']}", "", "", *figures, "", ""]


def markdown(groups: Sequence[Group]) -> str:
    """A heading, a table and notes for each group."""
    parts = [FIRST["markdown"]]
    for group in groups:
        rows = [dict(zip(COLUMNS, map(_of_markdown, cells), strict=True)) for cells in _cells(group)]
        notes = "\n".join(f"- {_of_markdown(note)}" for note in group.notes)
        parts += [f"### {_of_markdown(group.rows)}", format_table(rows, COLUMNS, markdown=True), notes]
    return "\n\n".join(parts)


def _of_markdown(text: str) -> str:
    """Plain text; pipes are left to `format_table`, and an underscore inside a word means nothing."""
    return re.sub(r"([\\`*<>\[\]&~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def latex(groups: Sequence[Group]) -> str:
    """A table environment for each group; it needs no package."""
    parts = [FIRST["latex"]]
    for group in groups:
        caption = _of_latex(" ".join([f"{group.rows}.", *group.notes]))
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        lines += [rf"\begin{{tabular}}{{r{'l' * (len(COLUMNS) - 1)}}}", r"\hline", _latex_row(COLUMNS), r"\hline"]
        *rows, majority = (_latex_row(cells) for cells in _cells(group))
        lines += [*rows, r"\hline", majority, r"\hline", r"\end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_of_latex, cells)) + r" \\"


def _of_latex(text: str) -> str:
    """Plain text; between digits a hyphen is a dash."""
    escaped = "".join(SPECIAL.get(c, c) for c in one_line(text))
    return re.sub(r"(?<=\.\d{3})-(?=\d\.)", "--", escaped)


# -- CSV --------------------------------------------------------------------------------------------------------


def csv(groups: Sequence[Group], *, safe: bool = False) -> str:
    """One table of all groups with every number in full, a line for each run and each group's majority class."""
    file = io.StringIO()
    write_rows(file, [CSV_COLUMNS, *(row for group in groups for row in _csv_rows(group))], safe=safe)
    return file.getvalue().removesuffix("\n")


def _csv_rows(group: Group) -> Iterator[list[Any]]:
    for rank, place in enumerate(group.places, 1):
        entry, test = place.entry, place.test
        figures = [x for name in AVERAGES for x in (place.figures[name], *place.intervals[name])]
        tested = [None] * 5 if test is None else [test.difference, test.low, test.high, test.p, test.holm]
        names = [place.name, entry.kind, entry.head, entry.caches, entry.seed, entry.n]
        yield [
            *(group.rows, rank, *names, *figures, place.deviation, group.by, group.against),
            *(*tested, entry.made.isoformat()),
        ]
    always = [x for name in AVERAGES for x in (group.majority[name], None, None)]
    n = group.places[0].entry.n
    names = ["", "majority", f"always {group.majority['class']}", "", "", n]
    yield [group.rows, None, *names, *always, None, group.by, "", *[None] * 5, ""]


LAYOUTS: dict[str, Callable[[Sequence[Group]], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": csv,
}


# -- lists of runs ----------------------------------------------------------------------------------------------


def runs_table(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Runs one below the other in 80 columns, each with its folder's name on a line of its own."""
    columns = ["age", "kind", "head", "caches", "validation"]
    rows = []
    for entry in entries:
        score = f"{figure_words(entry.monitor)} {entry.score(entry.monitor):.3f} of {entry.n}"
        cells = {"age": [age_of(entry)], "kind": [entry.kind], "head": _wrapped(entry.head, 16)}
        rows.append(_lines({**cells, "caches": _wrapped(entry.caches, 16), "validation": _wrapped(score, 25)}))
    lines = format_table([row for of_run in rows for row in of_run], columns, width=None).splitlines()
    table, place = lines[:2], 2
    for of_run, name in zip(rows, names, strict=True):
        table += [*lines[place : place + len(of_run)], f"  {one_line(name)}"]
        place += len(of_run)
    return "\n".join(table)
