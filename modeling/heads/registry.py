"""The registry of heads: a new one is a class in one of these files, or in one of its own, and a line here.

The letters of the studies, whose descriptions stand in the README: A (CLIP, light fusion), B (CLIP, six heads),
C (ResNet and BERT on token sequences), D (feature cache and linear probe), E (BERT and ResNet, three fusions).
"""

from collections.abc import Mapping, Sequence

import torch

from modeling.heads.base import Head, HeadConfig, head_class
from modeling.heads.beyond import KernelHead, LinearHead, Mlp
from modeling.heads.layers import initialise
from modeling.heads.study_a import Attention, AttentionLinear, Concat, WeightedSum
from modeling.heads.study_b import ClipMatch, CrossModal, Early, GatedTransformer, Late, Vilbert
from modeling.heads.study_c import CoAttention
from modeling.heads.study_d import CrossAttention, Fusion
from modeling.heads.study_e import EarlyPlane, Late512, QueryAttention

HEADS: dict[str, type[Head]] = {
    "fusion": Fusion,
    "cross_attention": CrossAttention,
    "concat": Concat,
    "weighted_sum": WeightedSum,
    "attention": Attention,
    "attention_linear": AttentionLinear,
    "early": Early,
    "late": Late,
    "clip_match": ClipMatch,
    "gated_transformer": GatedTransformer,
    "vilbert": Vilbert,
    "cross_modal": CrossModal,
    "late_512": Late512,
    "query_attention": QueryAttention,
    "early_plane": EarlyPlane,
    "coattention": CoAttention,
    "mlp": Mlp,
    "linear": LinearHead,
    "kernel": KernelHead,
}


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
    head = head_class(config.head)(config, widths, n_classes, len(seeds))
    initialise(head, seeds)
    return head.to(device)
