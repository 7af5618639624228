"""Explanations of one pair, part by part, each scored; and how often they are better than chance."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from feats.acceleration import full_products
from feats.encoders.base import Features, ImageSide
from feats.errors import UsageError
from modeling.evaluation.metrics import intervals
from modeling.explanations.curves import ORDERS, Score, score_order
from modeling.explanations.evidence import Neighbour, SideImportance, TrainingRows
from modeling.explanations.explained import ExplainedModel, Pair
from modeling.explanations.maps import grad_cam, grad_cam_layer, gradient_attention, has_attention, is_convolutional
from modeling.explanations.methods import ATTENTION, GRAD_CAM, INTEGRATED_GRADIENTS, METHODS, OCCLUSION
from modeling.explanations.perturbing import PerturbedPicture, PerturbedText
from modeling.explanations.token_gradients import Completeness, integrated_gradients

OCCLUDED_GRID = 7  # cells a side of pictures whose network has no map of its own
NEIGHBOURS = 5


@dataclass(frozen=True)
class PartExplanation:
    """What one encoder reads of a pair, and how much of the target's log-odds its units carry: `words` of its text, or
    `grid` x `grid` cells of its `picture` (H, W, 3) uint8, row by row.

    `importance` (U,) is above 0 for what speaks for the target. Integrated gradients and occlusion give it in log-odds;
    maps of gradients tell more from less only. `score` is None for a text of one word, or none.
    """

    part: str
    method: str
    importance: np.ndarray
    score: Score | None
    words: tuple[str, ...] = ()
    picture: np.ndarray | None = None
    completeness: Completeness | None = None

    @property
    def grid(self) -> int:
        """Cells a side."""
        return 0 if self.picture is None else round(len(self.importance) ** 0.5)

    @property
    def map(self) -> np.ndarray:
        """`importance` as the picture's cells, (G, G)."""
        return self.importance.reshape(self.grid, self.grid)


@dataclass(frozen=True)
class Explanation:
    """Why a run gives a class its probability. `probabilities` (C,) are in the order of `classes`."""

    classes: list[str]
    probabilities: np.ndarray
    target: str
    parts: list[PartExplanation]
    sides: list[SideImportance]
    neighbours: list[Neighbour]


def methods_of(model: ExplainedModel, part: str) -> list[str]:
    """The methods that can explain a part, its default first. One without gradients is explained by occlusion."""
    side = model.parts[part]
    if isinstance(side, ImageSide):
        found = [GRAD_CAM] if grad_cam_layer(side) is not None else []
        if not is_convolutional(side) and has_attention(side, model.to_pixels(part, side.blank()[None])):
            found.insert(0, ATTENTION)
        return [*found, OCCLUSION]
    return [*([INTEGRATED_GRADIENTS] if side.blocks is not None and side.padding is not None else []), OCCLUSION]


def choose_methods(model: ExplainedModel, wanted: Sequence[str] = ()) -> dict[str, str]:
    """The method of each part: the first of those `wanted` that can explain it, else its default. Raises `UsageError`
    for one that isn't there, or can explain none of the parts."""
    unknown = sorted(set(wanted) - set(METHODS))
    if unknown:
        raise UsageError(f"unknown `method` {', '.join(unknown)}; there are {', '.join(METHODS)}")
    able = {part: methods_of(model, part) for part in model.parts}
    for method in wanted:
        if not any(method in of_part for of_part in able.values()):
            shown = "; ".join(f"{part}: {', '.join(of_part)}" for part, of_part in able.items())
            raise UsageError(f"`method` {method} can't explain what {model.run.named} reads; there are {shown}")
    return {part: next((m for m in wanted if m in of_part), of_part[0]) for part, of_part in able.items()}


def explain_pair(
    model: ExplainedModel,
    image: Image.Image | None,
    text: str | None,
    *,
    target: str | None = None,
    methods: Mapping[str, str] | None = None,
    rows: TrainingRows | None = None,
    neighbours: int = NEIGHBOURS,
    orders: int = ORDERS,
    seed: int = 0,
) -> Explanation:
    """Explain the probability of `target`, a class (default: the most probable). `methods` as `choose_methods` gives
    them; without `rows` neither sides nor neighbours are told. Raises `UsageError` for an unknown class."""
    pair = model.read(image, text)
    features = model.features(pair)
    probabilities = model.logits(features).double().softmax(-1)[0].cpu().numpy()
    number = int(probabilities.argmax()) if target is None else class_number(model, target)
    chosen = choose_methods(model) if methods is None else methods
    parts = [
        explain_part(model, pair, features, part, number, method, orders=orders, seed=seed)
        for part, method in chosen.items()
    ]
    sides = rows.side_importance(model, features, number) if rows else []
    nearest = rows.nearest(model, features, neighbours) if rows else []
    return Explanation(model.classes, probabilities, model.classes[number], parts, sides, nearest)


def class_number(model: ExplainedModel, name: str) -> int:
    """Where a class stands. Raises `UsageError` for an unknown one."""
    if name not in model.classes:
        raise UsageError(f"`target` {name!r} is no class of {model.run.named}; there are {', '.join(model.classes)}")
    return model.classes.index(name)


@full_products(torch.float32)
def explain_part(
    model: ExplainedModel,
    pair: Pair,
    features: Mapping[str, Features],
    part: str,
    target: int,
    method: str,
    *,
    orders: int = ORDERS,
    seed: int = 0,
) -> PartExplanation:
    """Explain one part of a pair and score that; the other parts stay as they are."""
    if part in pair.pixels:
        picture = PerturbedPicture(model, features, part, target, pair, OCCLUDED_GRID)
        if method != OCCLUSION:
            found = (grad_cam if method == GRAD_CAM else gradient_attention)(picture)
            picture.grid = len(found)
        importance = picture.occlusion() if method == OCCLUSION else found.ravel()
        score = score_order(picture.probability, importance, orders=orders, seed=seed)
        return PartExplanation(part, method, importance, score, picture=picture.pixels.numpy())
    text = PerturbedText(model, features, part, target, pair)
    completeness = None
    if method == OCCLUSION or not text.count:
        importance = text.occlusion()
    else:
        importance, completeness = integrated_gradients(text)
    score = score_order(text.probability, importance, orders=orders, seed=seed)
    return PartExplanation(part, method, importance, score, text.words, completeness=completeness)


# -- are they any good ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodCheck:
    """How often one part's explanations were better than random orders, of pairs that have an order to score."""

    part: str
    method: str
    scores: list[Score]
    incomplete: int = 0  # integrated gradients that don't add up

    @property
    def count(self) -> int:
        """Pairs scored."""
        return len(self.scores)

    @property
    def share(self) -> float:
        """Of pairs whose explanation was better than random."""
        return self._mean([score.better for score in self.scores])

    @property
    def of_deletions(self) -> float:
        """The share of pairs better by the deletion curve alone."""
        return self._mean([score.deletion < score.random_deletions.mean() for score in self.scores])

    @property
    def of_insertions(self) -> float:
        """The share of pairs better by the insertion curve alone."""
        return self._mean([score.insertion > score.random_insertions.mean() for score in self.scores])

    @property
    def beaten(self) -> float:
        """The share of random orders that do worse, in the mean of the pairs."""
        return self._mean([score.below for score in self.scores])

    @staticmethod
    def _mean(values: Sequence[bool | float]) -> float:
        return float(np.mean(values)) if values else 0.0

    @property
    def interval(self) -> list[float]:
        """95 % interval of the share, [low, high], see `intervals`."""
        better = sum(score.better for score in self.scores)
        shares = intervals(np.array([[better, self.count - better], [0, 0]]))["accuracy"]
        assert isinstance(shares, list)
        return shares


def check_methods(
    model: ExplainedModel,
    pairs: Iterable[tuple[Image.Image | None, str | None]],
    methods: Mapping[str, str],
    *,
    orders: int = ORDERS,
    seed: int = 0,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[MethodCheck]:
    """Explain the most probable class of many pairs and count how often each part's explanation beats random orders.
    `progress` is told pairs as they are done."""
    found: dict[str, list[PartExplanation]] = {part: [] for part in methods}
    for number, (image, text) in enumerate(pairs):
        pair = model.read(image, text)
        features = model.features(pair)
        target = int(model.logits(features)[0].argmax())
        for part, method in methods.items():
            explained = explain_part(model, pair, features, part, target, method, orders=orders, seed=seed + number)
            found[part].append(explained)
        progress(1)
    return [
        MethodCheck(
            part,
            methods[part],
            [one.score for one in explained if one.score is not None],
            sum(one.completeness is not None and not one.completeness.complete for one in explained),
        )
        for part, explained in found.items()
    ]
