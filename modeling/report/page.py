"""The report page: one file that opens from disk, and its figures beside it."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from feats.errors import UsageError
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
    html = whole(title=title, sections=sections, generator=GENERATOR)
    folder = path.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [file for section in sections for figure in section.figures for file in figure.write(folder)]
        unfinished = path.with_name(f".{secrets.token_hex(8)}.html")
        try:
            unfinished.write_text(html, encoding="utf-8", errors="replace")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"can't write {path} ({error.strerror or error}); give another file with `out`") from None
    return written
