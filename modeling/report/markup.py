"""Pieces of HTML for sections made without a template; every text handed in is escaped, the SVG of figures aside."""

from collections.abc import Mapping, Sequence
from html import escape

from modeling.report.sections import FigureFile


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[tuple[str, float | None]]],
    caption: str,
    *,
    sortable: bool = False,
) -> str:
    """A table of cells: what is shown, and of numbers the value, which goes in full into `data-value`. With `sortable`
    the page's script sorts it by a click on a column's head; without the script it is a table in the given order."""
    numeric = [any(row[k][1] is not None for row in rows) for k in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{_of_number(number)}>{escape(name)}</th>' for name, number in zip(columns, numeric)
    )
    lines = ["".join(_cell(*cell, number) for cell, number in zip(row, numeric, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _cell(shown: str, value: float | None, number: bool) -> str:
    data = f' data-value="{value!r}"' if value is not None else ' data-value=""' if number else ""
    return f"<td{_of_number(number)}{data}>{escape(shown)}</td>"


def _of_number(number: bool) -> str:
    return ' class="number"' if number else ""


def figures(files: Sequence[FigureFile], captions: Mapping[str, str]) -> str:
    """Figures with their captions, by name."""
    shown = [
        f'<figure id="figure-{file.name}">{file.svg}<figcaption>{escape(captions[file.name])}</figcaption></figure>'
        for file in files
    ]
    return f'<div class="figures">{"".join(shown)}</div>'


def paragraphs(lines: Sequence[str], kind: str = "") -> str:
    """A paragraph for each line, of a class `kind`."""
    return "".join(f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(line)}</p>" for line in lines)
