"""The registry of heads: a new one is a class in one of these files, or in one of its own, and a line here.

The letters of the studies, whose descriptions stand in the README: A (CLIP, light fusion), B (CLIP, six heads),
C (ResNet and BERT on token sequences), D (feature cache and linear probe), E (BERT and ResNet, three fusions).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from feats.errors import UsageError

if TYPE_CHECKING:
    import torch

    from modeling.heads.base import Head
    from modeling.heads.config import HeadConfig


class Heads(MutableMapping[str, "type[Head]"]):
    """Heads by name, each given as "<module>.<class>" of this package, or as its class. Their names are there at once;
    modules, and torch with them, are imported where a head is taken."""

    def __init__(self, homes: Mapping[str, str | type[Head]]):
        self._homes = dict(homes)

    def __getitem__(self, name: str) -> type[Head]:
        home = self._homes[name]
        if isinstance(home, str):
            module, _, of_class = home.rpartition(".")
            found: type[Head] = getattr(import_module(f"modeling.heads.{module}"), of_class)
            self._homes[name] = found
            return found
        return home

    def __setitem__(self, name: str, head: type[Head]) -> None:
        self._homes[name] = head

    def __delitem__(self, name: str) -> None:
        del self._homes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


HEADS = Heads(
    {
        "fusion": "study_d.Fusion",
        "cross_attention": "study_d.CrossAttention",
        "concat": "study_a.Concat",
        "weighted_sum": "study_a.WeightedSum",
        "attention": "study_a.Attention",
        "attention_linear": "study_a.AttentionLinear",
        "early": "study_b.Early",
        "late": "study_b.Late",
        "clip_match": "study_b.ClipMatch",
        "gated_transformer": "study_b.GatedTransformer",
        "vilbert": "study_b.Vilbert",
        "cross_modal": "study_b.CrossModal",
        "late_512": "study_e.Late512",
        "query_attention": "study_e.QueryAttention",
        "early_plane": "study_e.EarlyPlane",
        "coattention": "study_c.CoAttention",
        "mlp": "beyond.Mlp",
        "linear": "beyond.LinearHead",
        "kernel": "beyond.KernelHead",
    }
)


def check_head(name: str) -> None:
    """Raise `UsageError` for a head that isn't in the registry."""
    if name not in HEADS:
        close = get_close_matches(name, HEADS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"unknown head {name!r}{hint} (there are {', '.join(HEADS)})")


def head_class(name: str) -> type[Head]:
    """The head `name` of the registry. Raises `UsageError` for one that isn't there."""
    check_head(name)
    return HEADS[name]


def head_shapes(config: HeadConfig, widths: Mapping[str, int], n_classes: int) -> dict[str, torch.Size]:
    """The shapes of a head's tensors by name, of one model (1, ...), without the memory for them. Raises `UsageError`
    as `build_head`, and torch's `RuntimeError` for more numbers than can be counted."""
    import torch

    with torch.device("meta"):
        head = head_class(config.head)(config, widths, n_classes, 1)
    return {name: tensor.shape for name, tensor in head.state_dict().items()}


def build_head(
    config: HeadConfig,
    widths: Mapping[str, int],
    n_classes: int,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
) -> Head:
    """A stack of len(seeds) models, model m initialised from seeds[m].

    Raises `UsageError` when the features lack what the head needs.
    """
    from modeling.heads.layers import initialise

    head = head_class(config.head)(config, widths, n_classes, len(seeds))
    initialise(head, seeds)
    return head.to(device)
