"""What decides a head's shape and what it reads; without torch, so that a command line's help is quick."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from feats.errors import UsageError
from feats.source import SIDES
from modeling.heads.registry import check_head, head_class

MAX_WIDTH, MAX_LAYERS = 1 << 16, 256  # a head of more than these is a slip of the finger, or fills the memory
# Of coattention: what stands behind its self-attentions, what is added to the image tokens, how they become one vector.
ATTENTION_NORMS = ("layer", "batch", "none")
IMAGE_POSITIONS = ("none", "learnable", "absolute")
IMAGE_POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class HeadConfig:
    """What decides a head's shape. `dropout` or `layers` None is the head's own. `sides` says what it reads; where the
    features lack one of them, training takes the other alone.

    Raises `UsageError` for an unknown head and values out of range.
    """

    head: str = "fusion"
    D: int = 256  # width of the common space or hidden layer
    dropout: float | None = None
    sides: tuple[str, ...] = SIDES
    layers: int | None = None  # of the gated Transformer's encoder
    attention_norm: str = ATTENTION_NORMS[0]
    image_positions: str = IMAGE_POSITIONS[0]
    image_pooling: str = IMAGE_POOLINGS[0]

    def __post_init__(self) -> None:
        check_head(self.head)
        object.__setattr__(self, "sides", checked_sides(self.sides))
        if not 1 <= self.D <= MAX_WIDTH:
            raise UsageError(f"D={self.D}: the width of a head must be 1 or more, and at most {MAX_WIDTH}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"dropout {self.dropout:g}: expected 0 <= dropout < 1")
        if self.layers is not None and not 1 <= self.layers <= MAX_LAYERS:
            raise UsageError(f"`layers` {self.layers}: expected 1 or more, and at most {MAX_LAYERS}")
        known = {"attention_norm": ATTENTION_NORMS, "image_positions": IMAGE_POSITIONS, "image_pooling": IMAGE_POOLINGS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"`{name}` {getattr(self, name)}: expected one of {', '.join(values)}")

    def resolved(self) -> "HeadConfig":
        """With the head's own dropout and layers filled in."""
        own = head_class(self.head)
        dropout = own.dropout if self.dropout is None else self.dropout
        return replace(self, dropout=dropout, layers=own.layers if self.layers is None else self.layers)


# The sides a head reads, as the studies number their ablations: 0 both, 1 no image, 2 no text.
ABLATIONS = (SIDES, ("text",), ("image",))


def ablation_number(sides: tuple[str, ...]) -> int:
    """The number of the ablation that leaves `sides`."""
    return ABLATIONS.index(sides)


def ablation_words(sides: tuple[str, ...]) -> str:
    """How tables call it: both, text only, image only."""
    return "both" if sides == SIDES else f"{sides[0]} only"


def checked_sides(sides: Iterable[str]) -> tuple[str, ...]:
    """The sides in their order. Raises `UsageError` unless they are image, text or both."""
    sides = (sides,) if isinstance(sides, str) else tuple(sides)
    if not sides or set(sides) - set(SIDES):
        raise UsageError(f"sides {', '.join(sides) or '(none)'}: expected {', '.join(SIDES)} or both")
    return tuple(side for side in SIDES if side in sides)
