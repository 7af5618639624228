"""What goes on inside a trained head: the vectors between its layers, its first linear layer, its attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modeling.features.inputs import Inputs
from modeling.heads.base import Head
from modeling.heads.layers import Linear, MultiheadAttention
from modeling.heads.registry import build_head
from modeling.runs.run import Member
from modeling.training.problem import predict_stack

CLASSIFIERS = ("classifier", "mlp")  # what heads call the layers behind their fusion
HISTOGRAM_BINS = 60


@dataclass(frozen=True)
class Vectors:
    """Of N rows: what the classifier reads once the sides are one (N, W), and what enters the last linear layer (N, H);
    None where a head has no such layer, or where it is what `fused` is."""

    fused: np.ndarray
    fused_name: str
    hidden: np.ndarray | None


def vectors_of(member: Member, inputs: Inputs) -> Vectors:
    """Of all rows of `inputs`, which are the head's own (`Inputs.for_head`)."""
    head = member.head
    linears = [layer for layer in head.modules() if isinstance(layer, Linear)]
    classifier = next((layer for name in CLASSIFIERS if (layer := getattr(head, name, None)) is not None), None)
    with _inputs_of([*linears, *([] if classifier is None else [classifier])]) as seen:
        logits = predict_stack(head, inputs)[0]
    last = next((layer for layer in reversed(seen.order) if isinstance(layer, Linear)), None)
    hidden = None if last is None else seen.inputs(last)
    if hidden is not None and not (last is not None and torch.equal(seen.outputs(last), logits)):
        hidden = None  # several layers' outputs make the logits: none of them reads all there is
    read = joined_inputs(inputs)
    fused, name = read, "the features as the head reads them, side by side"
    if classifier is not None and len(found := seen.inputs(classifier)) == len(logits):
        fused, name = found, "the fused vector, as the classifier reads it"
    if fused.shape[1] == read.shape[1] and torch.equal(fused, read):
        name = "the features as the head reads them, side by side"
    if hidden is not None and hidden.shape == fused.shape and torch.equal(hidden, fused):
        if torch.equal(fused, read):
            hidden = None
        else:
            fused, name = read, "the features as the head reads them, side by side"
    return Vectors(fused.numpy(), name, None if hidden is None else hidden.numpy())


def joined_inputs(inputs: Inputs) -> Tensor:
    """What a head reads of each row as one vector, (N, W): of tokens their mean."""
    parts = []
    for side in ("image", "text"):
        tokens = getattr(inputs, f"{side}_tokens")
        if (vector := getattr(inputs, side)) is not None:
            parts.append(vector)
        elif isinstance(tokens, Tensor):
            parts.append(tokens.mean(1))
        elif tokens is not None:
            rows = torch.arange(len(inputs))
            means = []
            for block in rows.split(512):
                values, mask = tokens.padded(block)
                means.append(values.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
            parts.append(torch.cat(means))
    return torch.cat(parts, -1)


class _Seen:
    """What layers read and gave in a prediction that may go through its rows in blocks."""

    def __init__(self) -> None:
        self.order: list[nn.Module] = []
        self.read: dict[nn.Module, list[Tensor]] = {}
        self.gave: dict[nn.Module, list[Tensor]] = {}

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.order.append(layer)
        vectors = torch.cat([x[0].reshape(x.shape[1], -1) for x in args], -1)
        self.read.setdefault(layer, []).append(vectors.float().cpu())
        self.gave.setdefault(layer, []).append(output[0].float().cpu())

    def inputs(self, layer: nn.Module) -> Tensor:
        return torch.cat(self.read[layer])

    def outputs(self, layer: nn.Module) -> Tensor:
        return torch.cat(self.gave[layer])


@contextmanager
def _inputs_of(layers: list[nn.Module]) -> Iterator[_Seen]:
    seen = _Seen()

    def hook(layer: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if all(isinstance(x, Tensor) for x in args):
            seen(layer, args, output)  # type: ignore[arg-type]

    handles = [layer.register_forward_hook(hook) for layer in dict.fromkeys(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- the first linear layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """`density` (B,) between `edges` (B + 1,), and the values' mean and standard deviation."""

    edges: np.ndarray
    density: np.ndarray
    mean: float
    std: float


@dataclass(frozen=True)
class FirstLayer:
    """The weights and outputs of a head's first linear layer, before training and after."""

    name: str
    weights: tuple[Histogram, Histogram]
    outputs: tuple[Histogram, Histogram]


def first_layer(member: Member, inputs: Inputs, n_classes: int) -> FirstLayer | None:
    """Of rows `inputs`; None for a head without a linear layer, or without a start. The start is drawn again from the
    seed, as training drew it."""
    if member.head.closed_form():
        return None
    start = build_head(member.config.head, member.widths, n_classes, [member.config.seed])
    found = [_first_linear(head, inputs) for head in (start, member.head)]
    if any(one is None for one in found):
        return None
    (name, *before), (_, *after) = [one for one in found if one is not None]
    weights, outputs = (histograms(a, b) for a, b in zip(before, after, strict=True))
    return FirstLayer(name, weights, outputs)


def _first_linear(head: Head, inputs: Inputs) -> tuple[str, np.ndarray, np.ndarray] | None:
    names = {layer: name for name, layer in head.named_modules() if isinstance(layer, Linear)}
    with _inputs_of(list(names)) as seen:
        predict_stack(head, inputs)
    if not seen.order:
        return None
    layer = seen.order[0]
    assert isinstance(layer, Linear)
    return names[layer], layer.weight.detach().numpy().ravel(), seen.outputs(layer).numpy().ravel()


def histograms(before: np.ndarray, after: np.ndarray) -> tuple[Histogram, Histogram]:
    """Two densities over the same bins, from the least to the largest of all values."""
    low, high = _range(before, after)
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    first, second = (np.histogram(x, edges, density=True)[0] for x in (before, after))
    return (
        Histogram(edges, first, float(before.mean()), float(before.std())),
        Histogram(edges, second, float(after.mean()), float(after.std())),
    )


def _range(*arrays: np.ndarray) -> tuple[float, float]:
    low, high = min(float(x.min()) for x in arrays), max(float(x.max()) for x in arrays)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# -- attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideAttention:
    """How much of its attention a head that reads sides as a sequence pays each: `shares` (C, sides), the mean over
    layers, heads, queries and the rows of each true class; NaN for a class without rows."""

    sides: tuple[str, ...]
    shares: np.ndarray
    layers: int


def side_attention(member: Member, inputs: Inputs, labels: np.ndarray, n_classes: int) -> SideAttention | None:
    """None for a head without attention over its sides. `labels` (N,) of the rows of `inputs`."""
    head, sides = member.head, member.head.sides
    layers = [layer for layer in head.modules() if isinstance(layer, MultiheadAttention)]
    if len(sides) < 2 or not layers or any(side in head.tokens for side in sides):
        return None
    kept: list[list[Tensor]] = []

    def hook(layer: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        kept[-1].append(output[1][0])

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        for rows in torch.arange(len(inputs)).split(1024):
            kept.append([])
            with torch.inference_mode():
                head.eval()(inputs.batch(rows[None]))
    finally:
        for handle in handles:
            handle.remove()
    if any(weights.shape[-1] != len(sides) for block in kept for weights in block):
        return None
    # (B, heads, queries, keys) of each layer -> (N, keys)
    of_row = torch.cat([torch.stack([w.mean((1, 2)) for w in block]).mean(0) for block in kept]).numpy()
    order = sequence_order(head)
    with np.errstate(invalid="ignore"):
        shares = np.stack([_mean(of_row[labels == k]) for k in range(n_classes)])
    return SideAttention(sides, shares[:, [order.index(side) for side in sides]], len(layers))


def sequence_order(head: Head) -> list[str]:
    """The sides in the order in which the head puts them into its sequence: text first in the studies B and D."""
    return list(head.sides) if head.study == "A" else list(reversed(head.sides))


def _mean(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows.mean(0) if len(rows) else np.full(rows.shape[1], np.nan)
    return found
