"""The comparison of a sweep: every number is one of its table.csv."""

import csv
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest
from caches import make_cache
from conftest import one_line

from feats.errors import UsageError
from modeling import sweep_heads
from modeling.report.comparison import (
    bars_by_ablation,
    bars_by_width_and_rate,
    comparison_sections,
    p_words,
    read_comparison,
)
from modeling.runs.config import read_metrics

GRID = ["--head", "fusion", "mlp", "linear", "--D", "4", "8", "--lr", "1e-3", "1e-2", "--ablation", "0", "1"]
SHORT = ["--ep", "2", "--bs", "32", "--val-ratio", "0.3", "--C", "0.1", "--monitor", "macro_f1"]
RATES = {"lr 0.001", "lr 0.01"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("comparison")
    make_cache(root / "feats", "clip")
    given = ["--vtype", "clip", "--feats", str(root / "feats"), "--runs", str(root)]
    assert sweep_heads.main([*given, *GRID, *SHORT]) == 0
    return root / "sweep"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Cells(HTMLParser):
    """The cells of a table as rows of text and `data-value`, its heads first."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[list[str | None]]] = []
        self.kinds: list[str | None] = []
        self.open = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.kinds.append(dict(attrs).get("class"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", dict(attrs).get("data-value")])
        self.open = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1][0] += data


def test_bars_are_the_best_of_the_table(swept: Path):
    rows, comparison = table(swept)[:-1], read_comparison(swept)
    assert comparison.by == "macro_f1" and comparison.baseline["head"] == "always positive"
    by_ablation, by_rate = bars_by_ablation(comparison), bars_by_width_and_rate(comparison)
    heads, known = ("fusion", "mlp", "linear"), {row["ablation"] for row in rows}
    assert {(bar.group, bar.series) for bar in by_ablation} == set(product(heads, known)) and len(known) == 2
    widths = [f"{head} D {D}" for head in heads[:2] for D in (4, 8)]  # linear has neither D nor lr
    assert {(bar.group, bar.series) for bar in by_rate} == set(product(widths, RATES))
    for bar in (*by_ablation, *by_rate):
        head, _, D = bar.group.partition(" D ")
        own = [
            row
            for row in rows
            if row["head"] == head
            and (not D or row["D"] == D)
            and (row["ablation"] == bar.series if bar in by_ablation else f"lr {row['lr']}" == bar.series)
        ]
        best = max(own, key=lambda row: float(row["macro_f1"]))
        assert bar.value == float(best["macro_f1"]) == read_metrics(swept / bar.run)["val"]["macro_f1"]
        [shown] = [row for row in rows if row["run"] == bar.run]
        assert (bar.low, bar.high) == (float(shown["low"]), float(shown["high"]))
        assert bar.p == (float(shown["p"]) if shown["p"] else None) and bar.collapsed == shown["collapsed"]
        assert p_words(bar).startswith(f"p {bar.p:.3f}" if bar.p is not None else "best")


def test_the_table_holds_every_number_in_full(swept: Path):
    _, section = comparison_sections(swept)
    cells = Cells(section.html)
    assert cells.kinds == ["sortable"]
    heads, *shown = cells.rows
    columns = [name for name, _ in heads]
    assert {"head", "ablation", "D", "lr", "accuracy", "macro_f1", "95 %", "to best", "p"} <= set(columns)
    assert "bs" not in columns and "±" not in columns  # one value, one seed
    rows = table(swept)
    assert len(shown) == len(rows)
    for line, row in zip(shown, rows):
        for name, (text, value) in zip(columns, line):
            if name in ("accuracy", "weighted_f1", "macro_f1", "to best", "p") and row[name]:
                assert float(value or "nan") == float(row[name]) and text == f"{float(row[name]):.3f}"
            elif name in ("head", "ablation", "95 %", "D", "lr", "collapsed"):
                assert text == row[name]


def test_sections_stand_alone(swept: Path):
    sections = comparison_sections(swept)
    assert [section.anchor for section in sections] == ["comparison", "configurations"]
    files = sections[0].figures
    assert [file.name for file in files] == ["comparison-ablation", "comparison-settings"]
    for file in files:
        assert file.svg in sections[0].html and file.png.startswith(b"\x89PNG")
    for bar in bars_by_ablation(read_comparison(swept)):
        assert f"{bar.value:.3f}  {p_words(bar)}" in files[0].svg
    assert "The best of" in sections[0].html  # the sweep's own notes
    assert not re.search(r'(src|href)="(?!#)', "".join(section.html for section in sections))


def test_what_no_sweep_left_is_refused(swept: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="no finished sweep that a report can show") as error:
        comparison_sections(tmp_path)
    one_line(error)
    text = (swept / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace(",by,", ",was,", 1))
    (tmp_path / "table.md").write_text((swept / "table.md").read_text())
    with pytest.raises(UsageError, match="run its command"):
        comparison_sections(tmp_path)


def test_texts_are_escaped(swept: Path, tmp_path: Path):
    for name in ("table.csv", "table.md"):
        (tmp_path / name).write_text((swept / name).read_text().replace("fusion", "<script>x</script>"))
    html = "".join(section.html for section in comparison_sections(tmp_path))
    assert "<script" not in html and "&lt;script&gt;x&lt;/script&gt;" in html
