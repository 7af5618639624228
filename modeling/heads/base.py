"""What a head is: its configuration, what it reads, and the base class of all.

A head maps a pair's features to class logits. It holds M models of one shape at once (see `modeling.heads.layers`);
with M = 1 it is an ordinary module.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Linear


@dataclass(frozen=True)
class Batch:
    """What a head reads, each None where it isn't there."""

    image: Tensor | None = None  # (M, B, Dv)
    text: Tensor | None = None  # (M, B, Dt)
    image_tokens: Tensor | None = None  # (M, B, P, Dv')
    text_tokens: Tensor | None = None  # (M, B, L, Dt'), zero behind a text's end
    text_mask: Tensor | None = None  # (M, B, L), which tokens are real

    def of(self, name: str) -> Tensor:
        """A side, its tokens, or their mask, by name. Raises `KeyError` when the batch hasn't got it."""
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise KeyError(f"the batch has no {name}")
        return found

    def expand(self, n_models: int) -> "Batch":
        """The same rows for every model of a stack, without copying them."""
        there = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Batch(**{name: x.expand(n_models, *x.shape[1:]) for name, x in there.items()})


class Head(nn.Module, ABC):
    """Base of all heads: `forward(batch) -> logits (M, B, C)`.

    A head describes itself by the attributes below: nothing else in the project lists heads by name. `widths` gives the
    widths of what there is: image, text, image_tokens, image_positions (their number P) and text_tokens. A head must
    not touch a side that its configuration leaves out. Raises `UsageError` when the features lack what the head needs.
    """

    study: str = ""  # letter of the reference study it comes from
    dropout: float = 0.0  # the study's own
    layers: int | None = None  # the study's own, of heads with several alike
    tokens: tuple[str, ...] = ()  # sides whose token features are needed, in place of their vectors
    optional_tokens: tuple[str, ...] = ()  # sides whose token features are used where cached
    # What of `HeadConfig`, beside head and sides, decides its result; of heads solved in closed form also what of
    # `modeling.training.config.TrainConfig` does: others read all that concerns gradient descent.
    reads: tuple[str, ...] = ("D", "dropout")
    norms: tuple[str, ...] = ("standard",)  # normalisations of the features worth trying
    solver: str = "gradient"  # who trains it: see `modeling.training.fit.SOLVERS`

    def __init__(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int):
        super().__init__()
        self.config, self.n_models = config, n_models
        self.sides = config.sides
        if config.dropout is not None:
            self.dropout = config.dropout
        if config.layers is not None:
            self.layers = config.layers
        self.require(config, widths)
        self.build(config, widths, n_classes, n_models)

    @classmethod
    def closed_form(cls) -> bool:
        """Whether it is solved exactly, without epochs, batches or seeds."""
        return cls.solver != "gradient"

    @classmethod
    def require(cls, config: HeadConfig, widths: Mapping[str, int]) -> None:
        """Raise `UsageError` when the features lack what the head needs."""
        for name in [f"{side}_tokens" if side in cls.tokens else side for side in config.sides]:
            if name not in widths:
                what = name.replace("_", " ")
                raise UsageError(
                    f"head {config.head} needs {what} features, and there are {', '.join(widths) or 'none'}"
                )

    @classmethod
    def read_features(cls, sides: Sequence[str]) -> set[str]:
        """Names of the features that it reads of `sides` where they are cached: image, text, image_tokens, ..."""
        vectors = set(sides) - set(cls.tokens)
        return vectors | {f"{side}_tokens" for side in (*cls.tokens, *cls.optional_tokens) if side in sides}

    @abstractmethod
    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        """Make the layers; every head defines its own."""

    def joined(self, batch: Batch) -> Tensor:
        """The sides' vectors side by side, (M, B, Dv + Dt)."""
        return torch.cat([batch.of(side) for side in self.sides], -1)

    def scalars(self) -> dict[str, Tensor]:
        """Figures of each model (M,) worth following over training."""
        return {}

    def __call__(self, batch: Batch) -> Tensor:
        logits: Tensor = super().__call__(batch)
        return logits


def n_parameters(head: Head) -> int:
    """Trainable numbers of one model of the stack."""
    return sum(p.numel() for p in head.parameters()) // head.n_models


# -- parts that several heads share ------------------------------------------------------------------------------


def n_heads(width: int, wanted: int) -> int:
    """The largest number of attention heads up to `wanted` that divides `width`."""
    return max(h for h in range(1, wanted + 1) if width % h == 0)


class ToCommonWidth(nn.Module):
    """Each side as a vector of one width: as it is where all have the same, else by a linear layer to D."""

    def __init__(self, sides: Sequence[str], config: HeadConfig, widths: Mapping[str, int], n_models: int):
        super().__init__()
        distinct = {widths[side] for side in sides}
        self.width = distinct.pop() if len(distinct) == 1 else config.D
        project = any(widths[side] != self.width for side in sides)
        self.project = nn.ModuleDict(
            {side: Linear(n_models, widths[side], self.width) for side in sides} if project else {}
        )
        self.sides = sides

    def forward(self, batch: Batch) -> list[Tensor]:
        """The sides' vectors, each (M, B, width)."""
        vectors = [batch.of(side) for side in self.sides]
        if self.project:
            vectors = [self.project[side](x) for side, x in zip(self.sides, vectors, strict=True)]
        return vectors

    def __call__(self, batch: Batch) -> list[Tensor]:
        vectors: list[Tensor] = super().__call__(batch)
        return vectors
