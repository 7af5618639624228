"""A small problem for training, with everything that heads can read."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tensors import normal
from torch import Tensor

from modeling.features.inputs import Inputs
from modeling.features.joined import Ragged
from modeling.heads.registry import HEADS
from modeling.training.problem import Problem

SGD = [name for name, head in HEADS.items() if head.closed_form() is False]
N_TRAIN, N = 49, 70  # batches of 16 leave one row over
CLASSES = ["a", "b", "c"]


def make_problem(**changed: Tensor) -> Problem:
    """Three classes of unequal size, features that tell them half, views and tokens."""
    labels = torch.bucketize(torch.arange(N) * 7 % 10, torch.tensor([4, 7]))
    lengths = torch.arange(N) * 3 % 4 + 1
    sides = {"image": normal(N, 5), "text": normal(N, 13, seed=1)}
    for x in sides.values():
        x[:, 0] += labels
    inputs = Inputs(
        **sides,
        image_views=sides["image"][:, None] + 0.1 * normal(N, 2, 5, seed=2),
        image_tokens=normal(N, 4, 6, seed=3) + labels[:, None, None],
        text_tokens=Ragged(normal(int(lengths.sum()), 7, seed=4), F.pad(lengths.cumsum(0), (1, 0))),
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return Problem(replace(inputs, **changed), labels, order[:N_TRAIN], order[N_TRAIN:], CLASSES)


def moved(value: Any, device: str) -> Any:
    """A problem, or any part of one, with its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value
