"""What the report page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feats.writing import write_bytes, write_text


@dataclass(frozen=True)
class FigureFile:
    """A figure as files beside the page: `<name>.svg` and `<name>.png`. `svg` is the text of an SVG element that stands
    alone, without an XML declaration; `png` the bytes of the same at 150 dpi or more."""

    name: str  # unique on the page: a letter, then letters, digits, - and _
    svg: str
    png: bytes

    def write(self, folder: Path, remedy: str) -> list[Path]:
        """Both files in `folder`. Raises `UsageError`, with the `remedy`, where they can't be written."""
        svg, png = folder / f"{self.name}.svg", folder / f"{self.name}.png"
        write_text(svg, '<?xml version="1.0" encoding="utf-8"?>\n' + self.svg, remedy)
        write_bytes(png, self.png, remedy)
        return [svg, png]


@dataclass(frozen=True)
class Section:
    """One section of the page. `html` is safe as it stands: who makes it has escaped all data in it, and has put the
    SVGs of `figures` where they belong. It loads nothing, from no network and no file."""

    title: str  # plain text
    anchor: str  # unique on the page
    html: str
    figures: Sequence[FigureFile] = field(default_factory=list)
