"""Everything that decides a finetuning, but for its data, its split and what it begins with."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from feats.errors import UsageError
from modeling.finetuning.augment import TextAugmentation
from modeling.heads.config import HeadConfig
from modeling.training.config import MONITORS, OPTIMIZERS, SCHEDULES, ClassWeights, TrainConfig

HEAD_RATE = 10.0  # the head's learning rate in units of the encoders', where it isn't given
EVAL_ROWS = 64
AUGMENTED = ("image", "text")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one finetuning. A step is one change of the weights, by the gradient of `bs` rows, whatever the
    number of processes.

    `micro_bs` rows go through forward and backward pass at a time (None: all of a step's): less memory, the same
    gradient, but for dropout and batch norms, which see them part by part. `tune` says which weights change: all, head,
    or last-N, the last N blocks of every encoder with what comes after them. `lora` puts adapters of that rank on the
    attention projections, which alone change, with the head.
    Raises `UsageError` for values out of range.
    """

    ep: int = 3
    bs: int = 32
    micro_bs: int | None = None
    optimizer: str = "adamw"
    lr: float = 2e-5  # of the encoders' last layers
    head_lr: float | None = None  # None: ten times `lr`
    layer_decay: float = 1.0  # a block's rate is this times the rate of the block above it
    weight_decay: float = 0.01  # of matrices; biases and norms have none
    schedule: str = "cosine"
    warmup: float = 0.1  # share of the steps in which the rate rises
    clip_grad: float = 1.0  # largest norm of a step's gradient; 0: any
    tune: str = "all"
    lora: int | None = None
    lora_alpha: float | None = None  # None: the rank
    train_batch_norm: bool = False  # else encoders keep the statistics of their pretraining
    label_smoothing: float = 0.0
    class_weights: ClassWeights | Mapping[str, float] = "none"
    monitor: str = "macro_f1"
    patience: int | None = None  # epochs without a better `monitor`; None: train them all
    min_gain: float = 0.0  # what counts as better
    augment: tuple[str, ...] = ()  # sides whose training rows are drawn anew in each epoch
    text_augmentation: TextAugmentation = field(default_factory=TextAugmentation)
    soup: int = 0  # how many of the best epochs a greedy soup is tried of; 0: none
    wise_ft: bool = False  # also try weights between the start and the end
    dtype: str = "auto"  # of the encoders' products; weights stay float32
    seed: int = 42
    deterministic: bool = False  # the same to the bit each time, see `feats.acceleration.deterministic`
    checkpoint_steps: int | None = None  # besides those at each epoch's end

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", self.as_train_config(HeadConfig()).class_weights)  # checks the rest
        object.__setattr__(self, "augment", tuple(side for side in AUGMENTED if side in self.augment))
        for name, known in (("dtype", DTYPES), ("schedule", SCHEDULES), ("monitor", MONITORS)):
            if getattr(self, name) not in known:
                raise UsageError(f"unknown `{name}` {getattr(self, name)!r}; there are {', '.join(known)}")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"unknown `optimizer` {self.optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        for name in ("micro_bs", "lora", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` {value}: expected 1 or more")
        for name in ("head_lr", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"`{name}` {value:g}: expected a finite number above 0")
        if not 0 <= self.clip_grad < math.inf:
            raise UsageError(f"`clip_grad` {self.clip_grad:g}: expected a finite number, 0 for no clipping")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"`layer_decay` {self.layer_decay:g}: expected above 0 and at most 1")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"`warmup` {self.warmup:g}: expected a share of the steps, 0 <= warmup < 1")
        if self.soup < 0:
            raise UsageError(f"`soup` {self.soup}: expected 0 (none) or how many of the best epochs are tried")
        if self.tune not in ("all", "head") and self.last_blocks is None:
            raise UsageError(f"`tune` {self.tune!r}: expected all, head, or last-N such as last-2")
        if self.lora is not None and self.tune != "all":
            raise UsageError(f"`lora` and `tune` {self.tune} both say what is trained; give one of them")

    @property
    def last_blocks(self) -> int | None:
        """N of last-N; None for all and head."""
        found = re.fullmatch(r"last-([1-9]\d*)", self.tune)
        return int(found[1]) if found else None

    @property
    def rate_of_head(self) -> float:
        """The head's peak learning rate."""
        return HEAD_RATE * self.lr if self.head_lr is None else self.head_lr

    @property
    def rows_to_predict(self) -> int:
        """How many rows are predicted at a time: without gradients several times those of a training step fit."""
        return min(EVAL_ROWS, 4 * (self.micro_bs or self.bs))

    def as_train_config(self, head: HeadConfig) -> TrainConfig:
        """What of this a run's head remembers of its training."""
        return TrainConfig(
            head,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            ep=self.ep,
            bs=self.bs,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,
            monitor=self.monitor,
            patience=self.patience,
            min_gain=self.min_gain,
            seed=self.seed,
            deterministic=self.deterministic,
        )


def lr_factor(settings: TuneSettings, step: int, steps: int) -> float:
    """The learning rate of step 0 <= `step` < `steps` as a share of its peak.

    A linear rise over the first `warmup` of the steps; then half a cosine wave down to 0 (Loshchilov and Hutter 2017),
    or the peak all along. onecycle rises and falls in half waves, see `modeling.training.stacked_adam.lr_factor`; there
    Adam's beta1 is cycled, too.
    """
    from modeling.training import stacked_adam

    if settings.schedule == "onecycle":
        return stacked_adam.lr_factor("onecycle", step, steps, settings.warmup)
    rising = round(settings.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return stacked_adam.lr_factor(settings.schedule, step - rising, steps - rising)
