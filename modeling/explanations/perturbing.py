"""A pair with parts of its picture blurred or words of its text left out, as the run sees it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from feats.encoders.base import Features
from modeling.explanations.explained import ExplainedModel, Pair

BATCH = 32
BLUR = 0.1  # of the picture's side: no shape is left, the colours stay
# A word is what blanks part; of scripts that write without blanks (kana, Chinese characters), each character.
_UNSPACED = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED})\S)+")


class Perturbed(ABC):
    """One part of a pair as U units, cells of its picture or words of its text, any of which can be missing.

    The other parts stay as they are. `target` is the class whose log-odds are asked for."""

    def __init__(self, model: ExplainedModel, features: Mapping[str, Features], part: str, target: int):
        self.model, self.all_features, self.part, self.target = model, features, part, target

    @property
    @abstractmethod
    def count(self) -> int:
        """U; every kind of part defines its own."""

    @abstractmethod
    def features(self, kept: np.ndarray) -> Features:
        """The part's features with some units only, `kept` (B, U) bool; every kind of part defines its own."""

    @torch.no_grad()
    def log_odds(self, kept: np.ndarray) -> np.ndarray:
        """(N,) float64, of N choices of kept units (N, U) bool."""
        found = []
        for low in range(0, len(kept), BATCH):
            features = self.features(kept[low : low + BATCH])
            found.append(self.log_odds_of(features).double().cpu().numpy())
        return np.concatenate(found)

    def log_odds_of(self, features: Features) -> Tensor:
        """(B,), of B features of the part beside the pair's other parts; with gradients."""
        return self.model.log_odds(self.model.with_part(self.all_features, self.part, features), self.target)

    def probability(self, kept: np.ndarray) -> np.ndarray:
        """The target's probability (N,), see `log_odds`."""
        found: np.ndarray = 1 / (1 + np.exp(-self.log_odds(kept)))
        return found

    def occlusion(self) -> np.ndarray:
        """How much the log-odds fall when one unit is missing, (U,)."""
        if not self.count:
            return np.zeros(0)
        kept = np.concatenate([np.ones((1, self.count), bool), ~np.eye(self.count, dtype=bool)])
        log_odds = self.log_odds(kept)
        fall: np.ndarray = log_odds[0] - log_odds[1:]
        return fall


class PerturbedPicture(Perturbed):
    """The picture as `grid` x `grid` cells, row by row; a missing one is blurred."""

    def __init__(
        self, model: ExplainedModel, features: Mapping[str, Features], part: str, target: int, pair: Pair, grid: int
    ):
        super().__init__(model, features, part, target)
        self.pixels, self.grid = pair.pixels[part], grid

    @property
    def count(self) -> int:
        """Cells."""
        return self.grid**2

    @cached_property
    def blurred(self) -> Tensor:
        """The picture without its shapes, (H, W, 3) uint8."""
        radius = BLUR * self.pixels.shape[0]
        picture = Image.fromarray(self.pixels.numpy()).filter(ImageFilter.GaussianBlur(radius))
        return torch.from_numpy(np.array(picture))

    def features(self, kept: np.ndarray) -> Features:
        """See `Perturbed.features`."""
        cells = torch.from_numpy(kept).view(-1, 1, self.grid, self.grid).float()
        mask = torch.nn.functional.interpolate(cells, self.pixels.shape[:2], mode="nearest-exact")
        pixels = torch.where(mask[:, 0, :, :, None] > 0, self.pixels, self.blurred)
        return self.model.image_side(self.part).forward(self.model.to_pixels(self.part, pixels))


class PerturbedText(Perturbed):
    """The text as words; a missing one is left out, and the rest tokenised anew."""

    def __init__(self, model: ExplainedModel, features: Mapping[str, Features], part: str, target: int, pair: Pair):
        super().__init__(model, features, part, target)
        self.text = pair.texts[part]
        self.spans = word_spans(self.text)

    @property
    def count(self) -> int:
        """Words."""
        return len(self.spans)

    @property
    def words(self) -> tuple[str, ...]:
        """In their order."""
        return tuple(self.text[low:high] for low, high in self.spans)

    def without(self, kept: Sequence[bool] | np.ndarray) -> str:
        """The text with some of its words only, the blanks behind each with it."""
        ends = [low for low, _ in self.spans[1:]] + [len(self.text)]
        pieces = [self.text[low:end] for (low, _), end, keep in zip(self.spans, ends, kept, strict=True) if keep]
        return "".join(pieces).strip()

    def features(self, kept: np.ndarray) -> Features:
        """See `Perturbed.features`."""
        return self.model.of_texts(self.part, [self.without(row) for row in kept])


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end."""
    return [match.span() for match in _WORD.finditer(text)]
