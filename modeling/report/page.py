"""The report page: one file that opens from disk, and its figures beside it."""

from collections.abc import Sequence
from pathlib import Path

from feats.errors import UsageError
from feats.writing import write_bytes
from modeling.report.sections import Section
from modeling.report.template import whole

GENERATOR = "multimodal-feature-probe report"
PAGE, FIGURES = "report.html", "report"


def check_page(path: Path) -> None:
    """Raise `UsageError` for what `write_page` doesn't replace: whatever is there and isn't such a page."""
    if not path.exists():
        return
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if f'content="{GENERATOR}"' in file.read(4096):
                return
    raise UsageError(f"{path} exists and is no report, so that it isn't replaced; give another file with `out`")


def write_page(path: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write the page, whole or not at all, and every figure as SVG and PNG into the folder beside it that bears its
    name without ending; returns the figures' files. Raises `UsageError` as `check_page` does."""
    check_page(path)
    page = whole(title=title, sections=sections, generator=GENERATOR)
    remedy = "give another file with `out`"
    figures = [figure for section in sections for figure in section.figures]
    written = [file for figure in figures for file in figure.write(path.with_suffix(""), remedy)]
    write_bytes(path, page.encode("utf-8", "replace"), remedy)
    return written
