"""Normalisation of features, with statistics of training rows only."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from feats.errors import UsageError
from modeling.choices import NORMS

STATISTICS_ROWS = 1 << 16  # rows in double precision at a time
L2_EPS = 1e-12


class Moments:
    """Mean and variance of each column of blocks of rows, in double precision, one pass: Chan, Golub and LeVeque,
    Algorithms for Computing the Sample Variance, The American Statistician 37 (1983), equation 2.1."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None  # (D,)
        self.squares: torch.Tensor | None = None  # (D,), sums of squared distances from the mean

    def add(self, block: torch.Tensor) -> None:
        """Take in rows (B, D)."""
        if not len(block):
            return
        x = block.double()
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = len(x), mean, squares
            return
        total, apart = self.count + len(x), mean - self.mean
        self.mean = self.mean + apart * (len(x) / total)
        self.squares = self.squares + squares + apart.square() * (self.count * len(x) / total)
        self.count = total


@dataclass(frozen=True)
class Normalizer:
    """Normalisation of one cache's side: `kind` none; l2, each row to length 1 (a row of zeros stays); or standard,
    (x - mean) / std per column. `mean` and `std` (D,) float32 for standard, else None."""

    kind: str
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @classmethod
    def fit(cls, kind: str, features: torch.Tensor, rows: torch.Tensor | None = None) -> "Normalizer":
        """Take the statistics of `features` (N, D), of the training `rows` (M,) int64 only, or of all without them.

        std is the population's (divided by M), as scikit-learn's StandardScaler; a constant column gets 1.
        Raises `UsageError` for an unknown kind and for no rows.
        """
        if not cls.has_statistics(kind):
            return cls(kind)
        blocks = (torch.arange(len(features), device=features.device) if rows is None else rows).split(STATISTICS_ROWS)
        count = sum(map(len, blocks))
        if not count:
            raise UsageError("no training rows to take mean and standard deviation of")
        # Two passes in double precision: the sum of squares of one pass loses what float16 columns with a large mean
        # vary by. A constant column comes out as exactly 0.
        zero = features.new_zeros(features.shape[1], dtype=torch.float64)
        mean = sum((features[block].double().sum(0) for block in blocks), zero) / count
        variance = sum(((features[block].double() - mean).square().sum(0) for block in blocks), zero) / count
        std = variance.sqrt().float()
        return cls(kind, mean.float(), torch.where(std > 0, std, 1.0))

    @classmethod
    def of_moments(cls, moments: Moments) -> "Normalizer":
        """Standardising, with the statistics of rows that were read block by block: as `fit`, up to rounding. Raises
        `UsageError` for no rows."""
        if moments.mean is None or moments.squares is None:
            raise UsageError("no training rows to take mean and standard deviation of")
        std = (moments.squares / moments.count).sqrt().float()
        return cls("standard", moments.mean.float(), torch.where(std > 0, std, 1.0))

    @staticmethod
    def has_statistics(kind: str) -> bool:
        """Whether a kind of normalisation takes statistics of rows. Raises `UsageError` for an unknown one."""
        if kind not in NORMS:
            raise UsageError(f"unknown normalisation {kind!r}; there are {', '.join(NORMS)}")
        return kind == "standard"

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D), views and tokens too; float32 (wider when the input is). Nothing is changed in place."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.kind == "l2":
            return torch.nn.functional.normalize(features, dim=-1, eps=L2_EPS)
        if self.kind == "none":
            return features
        if self.mean is None or self.std is None:
            raise ValueError("standardising without mean and std; take them with `Normalizer.fit`")
        return (features - self.mean) / self.std

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors a run keeps: mean and std, or nothing."""
        return {} if self.mean is None or self.std is None else {"mean": self.mean, "std": self.std}

    @classmethod
    def from_state(cls, kind: str, state: Mapping[str, torch.Tensor]) -> "Normalizer":
        """Back from `kind` and `state()`. Raises `UsageError` when they don't belong together."""
        if kind not in NORMS or set(state) != ({"mean", "std"} if kind == "standard" else set()):
            raise UsageError(f"normalisation {kind!r} with tensors {', '.join(state) or '(none)'}: the run is damaged")
        return cls(kind, state.get("mean"), state.get("std"))

    def to(self, device: torch.device | str) -> "Normalizer":
        """The same with its statistics on `device`."""
        return Normalizer.from_state(self.kind, {name: tensor.to(device) for name, tensor in self.state().items()})
