"""How figures look: one style that is read on white and on dark, in colours that colour-blind readers tell apart."""

import io
import re
from collections.abc import Callable
from typing import Any, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modeling.report.sections import FigureFile

# After Okabe and Ito (Color Universal Design, 2008), each with a contrast of 3 and more to white and to the page's dark
# ground.
PALETTE = ("#D55E00", "#2C7FBF", "#009E73", "#B5609B", "#9A7B00", "#5E7F8F", "#C0504D", "#6B6BB5")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#10131a"  # of text and axes: in an SVG it becomes the colour of the text around
SIZE = (4.3, 3.0)  # inches: on a phone a figure is shown at about this width
DPI = 200

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def colour(number: int) -> str:
    """Of a class, or a line."""
    return PALETTE[number % len(PALETTE)]


def shorten(name: str, most: int = 14) -> str:
    """A name that fits on an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def figure_file(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> FigureFile:
    """A figure of one panel that `draw` fills."""
    with rc_context(cast(Any, {**_STYLE, "svg.hashsalt": name})):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        return as_file(name, figure)


def as_file(name: str, figure: Figure) -> FigureFile:
    """A figure as SVG and PNG. In the SVG what is drawn in `INK` or in black takes the colour of the text around it,
    and ids begin with `name`: several may stand in one page."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None}, dpi=DPI)
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    return FigureFile(name, plain_svg(svg.getvalue(), name), png.getvalue())


def plain_svg(svg: str, name: str) -> str:
    """The element alone: without declaration, document type and metadata, which name addresses; see `as_file`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    svg = svg.replace('xlink:href="', 'href="').replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return svg.replace(INK, "currentColor").replace("#000000", "currentColor").strip()
