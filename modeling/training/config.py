"""Everything that decides a training, features and split aside, and what a head reads of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from feats.errors import UsageError
from modeling.heads.config import HeadConfig
from modeling.heads.registry import head_class

OF_CLOSED_FORM = ("C", "ridge", "gamma")  # what heads trained by gradient descent don't read
OPTIMIZERS = ("adam", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine", "onecycle")
MONITORS = ("accuracy", "weighted_f1", "macro_f1", "loss")
CLASS_WEIGHTS = ("none", "balanced", "sqrt")
MOST = 1 << 30  # epochs, or rows of a batch
MOST_SEEDS = 10_000
LARGEST_WEIGHT = 1e6  # of a class, and of its reciprocal

ClassWeights = str | tuple[tuple[str, float], ...]  # one of `CLASS_WEIGHTS`, or the weights of named classes


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training, features and split aside. The defaults are study D's.

    `class_weights` may be given as a dictionary. Raises `UsageError` for values out of range.
    """

    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    ep: int = 100
    bs: int = 512
    label_smoothing: float = 0.0
    class_weights: ClassWeights | Mapping[str, float] = "none"
    balanced_sampler: bool = False
    monitor: str = "accuracy"
    patience: int | None = None  # epochs without a better `monitor`; None: train them all
    min_gain: float = 0.0  # of the monitored figure, to count as better
    precision: str = "fp32"  # of the products in training; bf16, fp16: faster where the processor has them
    seed: int = 42
    deterministic: bool = False  # the same to the bit each time, see `feats.acceleration.deterministic`
    C: float | None = None  # linear: inverse strength of the penalty, as scikit-learn's. None: chosen by inner folds
    ridge: float | None = None  # kernel: strength of the penalty. None: chosen by inner folds
    gamma: float | None = None  # kernel: gamma times the rows' mean squared distance. None: chosen by inner folds

    def __post_init__(self) -> None:
        of_names = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "monitor": MONITORS, "precision": PRECISIONS}
        for name, known in of_names.items():
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; there are {', '.join(known)}")
        for name in ("ep", "bs"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UsageError(f"`{name}` {getattr(self, name)}: expected 1 or more, and at most {MOST}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"lr {self.lr:g}, weight decay {self.weight_decay:g}: expected lr > 0 and decay >= 0")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label smoothing {self.label_smoothing:g}: expected 0 <= smoothing < 1")
        for name in OF_CLOSED_FORM:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"`{name}` {value:g}: expected a number above 0")
        if not 0 <= self.min_gain < math.inf:
            raise UsageError(f"`min_gain` {self.min_gain:g}: expected a finite number, 0 or more")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"`seed` {self.seed}: expected 0 to 2^63 - 1")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"`patience` {self.patience}: expected 1 or more epochs")
        object.__setattr__(self, "class_weights", _checked_weights(self.class_weights))


def _checked_weights(weights: ClassWeights | Mapping[str, float]) -> ClassWeights:
    if isinstance(weights, str):
        if weights not in CLASS_WEIGHTS:
            raise UsageError(
                f"class weights {weights!r}: expected {', '.join(CLASS_WEIGHTS)}, or a weight for each of some classes"
            )
        return weights
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    named = tuple((str(name), float(value)) for name, value in pairs)
    for name, value in named:
        if not 0 < value < math.inf:
            raise UsageError(f"class weight {value:g} of {name}: every weight must be a finite number above 0")
        if not 1 / LARGEST_WEIGHT <= value <= LARGEST_WEIGHT:
            raise UsageError(
                f"class weight {value:g} of {name}: expected {1 / LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}; losses of "
                "others lose their digits"
            )
    return named


def flat(config: TrainConfig) -> dict[str, Any]:
    """The fields of a configuration and of its head by name, as `from_flat` takes them."""
    of_head = {f.name: getattr(config.head, f.name) for f in fields(config.head)}
    return {**of_head, **{f.name: getattr(config, f.name) for f in fields(config) if f.name != "head"}}


def from_flat(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from flat values; the fields of `HeadConfig` and `TrainConfig` that are absent keep defaults."""
    of_head = {f.name for f in fields(HeadConfig)}
    of_train = {f.name for f in fields(TrainConfig)} - {"head"}
    head = HeadConfig(**{name: value for name, value in values.items() if name in of_head})
    return replace(TrainConfig(head), **{name: value for name, value in values.items() if name in of_train})


def changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The same training with some fields of its own and its head's set. Raises `UsageError` for names that are none."""
    values = flat(config)
    for name in settings:
        if name not in values:
            close = get_close_matches(name, values, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown setting {name!r}{hint} (there are {', '.join(values)})")
    return from_flat({**values, **settings})


def settings_read(head: str) -> set[str]:
    """The fields of `HeadConfig` and `TrainConfig` that decide what becomes of a head."""
    chosen = head_class(head)
    read = {"head", "sides", "deterministic", *chosen.reads}
    if not chosen.closed_form():
        read |= {f.name for f in fields(TrainConfig)} - set(OF_CLOSED_FORM)
    return read


def as_read(config: TrainConfig) -> TrainConfig:
    """The same training with what its head doesn't read at the defaults: so that equal trainings are equal."""
    read = settings_read(config.head.head)
    return from_flat({name: value for name, value in flat(config).items() if name in read})


def with_seeds(config: TrainConfig, n: int = 1) -> list[TrainConfig]:
    """`n` seeds from the configuration's own up; a head in closed form gives the same for all of them and gets one.
    Raises `UsageError` for fewer than one."""
    if not 1 <= n <= MOST_SEEDS:
        raise UsageError(f"`seeds` {n}: expected 1 or more, and at most {MOST_SEEDS}")
    count = 1 if head_class(config.head.head).closed_form() else n
    return [replace(config, seed=config.seed + k) for k in range(count)]


def is_better(score: float, best: float, min_gain: float) -> bool:
    """Whether a monitored figure, turned so that more is better, betters the best so far: by more than `min_gain`."""
    return score > best + min_gain


def hyperparameters(config: TrainConfig) -> tuple[float, float, str]:
    """What may differ between the models of a stack and concerns the optimiser."""
    return config.lr, config.weight_decay, config.schedule


class Epochs(int):
    """So many epochs that are done, of a training like `config`."""

    config: TrainConfig

    @classmethod
    def of(cls, count: int, config: TrainConfig) -> "Epochs":
        """`count` of them."""
        epochs = cls(count)
        epochs.config = config
        return epochs
