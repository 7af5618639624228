"""Figures as text: aligned tables that fit a terminal, Markdown, confusions."""

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import numpy as np

from feats.escapes import one_line
from modeling.choices import AVERAGES
from modeling.evaluation.metrics import marked

WIDTH = 80  # of terminals
LEAST_TEXT = 12  # characters that a text's lines have at least
TOP_CONFUSIONS = 10
# What tables show: weighted recall is the accuracy, and stands beside it for who looks for it.
SHOWN_AVERAGES = ("accuracy", "weighted_precision", "weighted_recall", "weighted_f1", "macro_f1")


def figure_rows(figures: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Results of `figures` as rows for `format_table` whose column "rows" says what they are: the figures under
    `name`, `marked` where they are of one class, their intervals, and the majority baseline."""
    interval, majority = figures["interval"], figures["majority"]
    edges = {key: "{:.3f}-{:.3f}".format(*interval[key]) for key in AVERAGES}
    return [
        {"rows": marked(name, figures.get("collapsed")), **figures},
        {"rows": f"  {100 * interval['level']:g} %", **edges},
        {"rows": f"  always {majority['class']}", **majority},
    ]


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    markdown: bool = False,
    digits: int = 3,
    width: int | None = WIDTH,
) -> str:
    """Rows (dicts) as a table of `columns`: aligned for a terminal of `width` columns, or Markdown. Numbers stand to
    the right, floats with `digits` decimals; what a row lacks or has as None is left blank.

    On a terminal the first column names the rows. Columns in which nothing stands are left out, and those that are the
    same in all of three rows or more are said once, above. What is too wide still gets headings and texts of several
    lines, and in the end its columns one block below the other. `width` None: as wide as it comes, nothing left out."""
    if markdown:
        return "\n".join(_markdown_lines(rows, columns, digits))
    if width is None:
        return "\n".join(_plain_lines(rows, columns, digits, None))
    same = constants(rows, columns, digits)
    shown = [
        name
        for k, name in enumerate(columns)
        if k == 0 or (name not in same and any(_cell(row.get(name), digits) for row in rows))
    ]
    told = wrap(f"all: {', '.join(f'{name} {value}' for name, value in same.items())}", width) if same else []
    blocks = [
        "\n".join(_plain_lines(rows, block, digits, width)) for block in _column_groups(rows, shown, digits, width)
    ]
    return "\n\n".join(["\n".join([*told, blocks[0]]), *blocks[1:]])


def constants(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int = 3) -> dict[str, str]:
    """The columns behind the first that say the same in all of three rows or more, with what they say."""
    if len(rows) < 3:
        return {}
    of_column = {name: {one_line(_cell(row.get(name), digits)) for row in rows} for name in columns[1:]}
    return {name: next(iter(cells)) for name, cells in of_column.items() if len(cells) == 1 and cells != {""}}


def confusion_text(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix (C, C) for a terminal: whole, or where that is wider the pairs of classes that are most often
    taken for one another."""
    title = "true \\ predicted"
    whole = [{title: name, **dict(zip(classes, counts, strict=True))} for name, counts in zip(classes, confusion)]
    table = format_table(whole, [title, *classes], width=None)
    if max(map(len, table.splitlines())) <= WIDTH:
        return table
    counts = np.asarray(confusion)
    off = np.where(np.eye(len(classes), dtype=bool), 0, counts)
    order = np.argsort(-off, axis=None, kind="stable")[:TOP_CONFUSIONS]
    pairs = [(int(k) // len(classes), int(k) % len(classes)) for k in order if off.flat[k]]
    rows = [
        {
            "true": classes[true],
            "predicted": classes[other],
            "rows": int(counts[true, other]),
            "of the true": f"{counts[true, other] / counts[true].sum():.0%}",
        }
        for true, other in pairs
    ]
    more = int((off > 0).sum()) - len(pairs)
    table = format_table(rows, ["true", "predicted", "rows", "of the true"])
    return f"{table}\n... and {more} more pairs of classes" if more else table


def _markdown_lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int) -> list[str]:
    cells = [[_cell(row.get(column), digits) for column in columns] for row in rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    right, widths = _right(rows, columns), _widths([list(columns), *cells])
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [_aligned(columns, widths, right), rule, *(_aligned(row, widths, right) for row in cells)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain_lines(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int, width: int | None
) -> list[str]:
    """A table's lines; headings, then the longest texts are broken as far as `width` asks."""
    right = _right(rows, columns)
    heads = [[one_line(name)] for name in columns]
    cells = [[[one_line(_cell(row.get(column), digits))] for column in columns] for row in rows]
    if width is not None and _total([heads, *cells]) > width:
        heads = [_broken(name, max([3, *(len(row[k][0]) for row in cells)])) for k, name in enumerate(columns)]
        for k in sorted(range(len(columns)), key=lambda k: -max(map(len, (row[k][0] for row in cells)), default=0)):
            over = _total([heads, *cells]) - width
            longest = max((len(row[k][0]) for row in cells), default=0)
            if over <= 0 or longest <= LEAST_TEXT:
                break
            room = max(LEAST_TEXT, longest - over)
            cells = [[wrap(c[0], room) or [""] if j == k else c for j, c in enumerate(row)] for row in cells]
            heads[k] = _broken(columns[k], room)
    widths = _widths([[max(cell, key=len) for cell in row] for row in (heads, *cells)])
    lines = [["-" * w for w in widths]]
    deepest = max(map(len, heads))
    lines[:0] = [_aligned(line, widths, right) for line in zip(*([""] * (deepest - len(h)) + h for h in heads))]
    for row in cells:
        lines += [_aligned(line, widths, right) for line in zip_longest(*row, fillvalue="")]
    return ["  ".join(line).rstrip() for line in lines]


def _column_groups(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int, width: int
) -> list[list[str]]:
    """The columns in as many groups as it takes for each to fit, the first column in all of them."""
    first, *rest = columns
    blocks = [[first]]
    for name in rest:
        wider = [*blocks[-1], name]
        if len(wider) > 2 and max(map(len, _plain_lines(rows, wider, digits, width))) > width:
            blocks.append([first, name])
        else:
            blocks[-1] = wider
    return blocks


def _broken(heading: str, room: int) -> list[str]:
    """A heading on lines of `room` characters where its underscores and spaces allow that."""
    lines: list[str] = []
    for word in re.findall(r"[^_ ]*[_ ]?", heading):
        if lines and len((lines[-1] + word).rstrip()) <= room:
            lines[-1] += word
        elif word:
            lines.append(word)
    return [line.rstrip(" ") for line in lines] or [""]


def _right(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[bool]:
    """Which columns hold numbers only."""
    return [
        any(isinstance(row.get(column), (int, float, np.number)) for row in rows)
        and all(isinstance(row.get(column), (int, float, np.number, type(None))) for row in rows)
        for column in columns
    ]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(3, *map(len, column)) for column in zip(*lines, strict=True)]


def _total(lines: Sequence[Sequence[Sequence[str]]]) -> int:
    """The width of a table of cells of several lines each."""
    widths = _widths([[max(cell, key=len) for cell in row] for row in lines])
    return sum(widths) + 2 * (len(widths) - 1)


def _aligned(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, (float, np.floating)) else str(value)


def spread(values: Sequence[int]) -> int | str:
    """The value of all, or "12-37"."""
    low, high = min(values), max(values)
    return low if low == high else f"{low}-{high}"
