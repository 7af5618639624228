"""An explanation as a picture for papers and mail: what was read, maps over it, words as bars."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from feats.errors import UsageError
from feats.writing import replacing
from modeling.explanations.explanation import Explanation, PartExplanation
from modeling.explanations.methods import METHODS
from modeling.explanations.telling import verdict_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermilion, which colour-blind readers tell apart: for the target, against it (Okabe and Ito).
FOR, AGAINST = "#0072B2", "#D55E00"
STRONGEST = 0.75  # opacity of the most important cell
MOST_WORDS = 30  # bars; of longer texts the most important ones
LONGEST_WORD = 24
PNG = b"\x89PNG\r\n\x1a\n"


def draw(explanation: Explanation) -> Figure:
    """The pair's picture as each image encoder reads it and, beside it, the map over it; bars of each text's words.
    Blue speaks for the target, vermilion against it."""
    pictures = [part for part in explanation.parts if part.picture is not None]
    texts = [part for part in explanation.parts if part.picture is None]
    heights = [3.4] * len(pictures) + [0.9 + 0.24 * max(1, min(len(part.words), MOST_WORDS)) for part in texts]
    figure = Figure(figsize=(7.2, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    probability = explanation.probabilities[explanation.classes.index(explanation.target)]
    figure.suptitle(f"{explanation.target}: probability {probability:.3f}", parse_math=False)
    figure.supxlabel(f"blue: for {explanation.target}, vermilion: against it", fontsize=8, parse_math=False)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for row, part in enumerate(pictures):
        _draw_picture(figure.add_subplot(grid[row, 0]), part)
        _draw_map(figure.add_subplot(grid[row, 1]), part)
    for row, part in enumerate(texts, len(pictures)):
        _draw_words(figure.add_subplot(grid[row, :]), part, explanation.target)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises `UsageError` as `check_png`, and when it can't be written."""
    check_png(path)
    with replacing(path, "give another file with `out`") as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # emoji: a box stands there
        figure.savefig(unfinished, dpi=150, format="png")


def check_png(path: Path) -> None:
    """Raise `UsageError` for what `save` doesn't replace: whatever is there and isn't a PNG file."""
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(PNG)) == PNG:
                return
    raise UsageError(f"{path} exists and is no PNG, so that it isn't replaced; give another file with `out`")


def _draw_picture(axes: "Axes", part: PartExplanation) -> None:
    assert part.picture is not None
    axes.imshow(part.picture)
    axes.set_title(f"as {part.part.partition('/')[2]} reads it", fontsize=9, parse_math=False)
    axes.set_axis_off()


def _draw_map(axes: "Axes", part: PartExplanation) -> None:
    assert part.picture is not None
    height, width = part.picture.shape[:2]
    axes.imshow(part.picture.mean(-1), cmap="gray", vmin=0, vmax=255)
    axes.imshow(overlay(part.map), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    axes.set_title(_title(part), fontsize=9, parse_math=False)
    axes.set_axis_off()


def overlay(values: np.ndarray) -> np.ndarray:
    """A map (G, G) as RGBA (G, G, 4) in 0 to 1: the colour says for or against, the opacity how much."""
    colours = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in (AGAINST, FOR)])
    largest = np.abs(values).max()
    opacity = STRONGEST * np.abs(values) / (largest or 1.0)
    return np.concatenate([colours[(values > 0).astype(int)], opacity[..., None]], -1)


def _draw_words(axes: "Axes", part: PartExplanation, target: str) -> None:
    shown = most_important(part.importance, MOST_WORDS)
    values = part.importance[shown]
    axes.barh(range(len(shown)), values, color=[FOR if value > 0 else AGAINST for value in values])
    axes.set_yticks(range(len(shown)), [_shortened(part.words[k]) for k in shown], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"log-odds of {target}", fontsize=8, parse_math=False)
    left_out = len(part.words) - len(shown)
    more = f", the {len(shown)} most important of {len(part.words)} words" if left_out else ""
    axes.set_title(_title(part) + more, fontsize=9, parse_math=False)
    if not len(shown):
        axes.text(0.5, 0.5, "no words", ha="center", transform=axes.transAxes)


def most_important(importance: np.ndarray, count: int) -> Sequence[int]:
    """The `count` units of largest importance, for or against, in their order."""
    found: list[int] = np.sort(np.argsort(-np.abs(importance), kind="stable")[:count]).tolist()
    return found


def _title(part: PartExplanation) -> str:
    return f"{part.part.partition('/')[2]}: {METHODS[part.method]}\n{verdict_words(part)}"


def _shortened(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 1]}…"
