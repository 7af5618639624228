"""Which of a model's parameters are trained, and at which rates."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from feats.encoders.base import ImageSide, TextSide, parameter_depths
from feats.errors import UsageError
from modeling.finetuning.checkpoint import Tensors
from modeling.finetuning.data import PairReader, Sample, stream
from modeling.finetuning.lora import add_lora, has_attention, merged_state
from modeling.finetuning.model import BATCH_NORMS, HEAD, PairModel
from modeling.finetuning.predicting import seeded
from modeling.finetuning.settings import TuneSettings
from modeling.heads.layers import Noise, attach_noise


def choose_parameters(model: PairModel, settings: TuneSettings) -> None:
    """Let those parameters require gradients that `settings` say are trained. Raises `UsageError` when an encoder has
    fewer blocks than are to be tuned, or none has attention for adapters."""
    for part, side in model.sides.items():
        network = model.parts[part]
        network.requires_grad_(settings.tune == "all" and settings.lora is None)
        if settings.last_blocks is not None and next(network.parameters(), None) is not None:
            first = first_tuned_block(part, side, settings)
            depths = parameter_depths(side)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(depths[name] > first)
    model.head.requires_grad_(True)
    model.train_batch_norm = settings.train_batch_norm
    if settings.lora is not None:
        _add_adapters(model, settings)


def first_tuned_block(part: str, side: ImageSide | TextSide, settings: TuneSettings) -> int:
    """The number of the first block that is tuned; that of all blocks under `tune` head. Raises `UsageError` when
    there are fewer than are to be tuned."""
    count = 0 if side.blocks is None else len(side.blocks.modules)
    last = settings.last_blocks or 0
    if count < last:
        raise UsageError(f"`tune` {settings.tune}: {part} has {count} blocks; give a smaller number, or all")
    return count - last


def _add_adapters(model: PairModel, settings: TuneSettings) -> None:
    """Sides without attention stay as they are, as long as there is another."""
    assert settings.lora is not None
    model.adapted = [part for part in model.sides if has_attention(model.parts[part])] or list(model.sides)
    for part in model.adapted:
        add_lora(model.parts[part], settings.lora, settings.lora_alpha, stream(settings.seed, f"lora/{part}"))


def leave_out_unused(model: PairModel, reader: PairReader, row: int) -> None:
    """Let parameters that take no part in the logits (a classifier for another task) not be trained: found by one
    backward pass on a row of the reader."""
    batch = next(reader.batches([[Sample(row)] * 2]))
    with seeded(0, model.device):
        attach_noise(model.head, Noise([0], model.device))
        model.train(False)
        model(batch).sum().backward()
    for _, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def moving_statistics(model: PairModel) -> dict[str, Tensor]:
    """The running statistics of batch norms that training changes, and their counts, by name."""
    model.train()
    moving = {
        f"{part}/{path}{'.' if path else ''}{name}"
        for part, network in model.parts.items()
        for path, module in network.named_modules()
        if isinstance(module, BATCH_NORMS) and module.training
        for name, _ in module.named_buffers(recurse=False)
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in moving}


def plain_state(model: PairModel, trained: Sequence[str], statistics: Sequence[str]) -> Tensors:
    """Copies of the weights and statistics that training changes, adapters folded in, by their names in plain
    networks. `trained` are the names of all parameters in training."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    plain = [name for name in trained if not name.startswith(tuple(f"{part}/" for part in model.adapted))]
    state = {name: own[name].detach().clone() for name in (*plain, *statistics)}
    for part in model.adapted:
        state |= {f"{part}/{name}": x.detach().clone() for name, x in merged_state(model.parts[part]).items()}
    return state


def load_plain(model: PairModel, state: Tensors) -> None:
    """Put a `plain_state` into a model without adapters."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def optimizer_of(
    model: PairModel, trained: dict[str, torch.nn.Parameter], settings: TuneSettings
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Adam or AdamW, and the peak rate of each of its groups: a rate by depth, decay for matrices only."""
    peaks = _peak_rates(model, trained.keys(), settings)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        stacked = name.startswith(f"{HEAD}/")  # a head's parameters have the models as their first dimension
        decay = settings.weight_decay if parameter.dim() - stacked > 1 else 0.0
        groups.setdefault((peaks[name], decay), []).append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    chosen: list[dict[str, Any]] = [{"params": some, "weight_decay": decay} for (_, decay), some in groups.items()]
    return kind(chosen, lr=settings.lr, fused=True), [peak for peak, _ in groups]


def _peak_rates(model: PairModel, trained: Collection[str], settings: TuneSettings) -> dict[str, float]:
    """By trained parameter. The rate falls by `layer_decay` from each block to the one below, from an encoder's topmost
    trained layer on: what lies above it unused, a classifier or a pooler, isn't counted."""
    rates = {name: settings.rate_of_head for name in trained if name.startswith(f"{HEAD}/")}
    for part, side in model.sides.items():
        names = [name for name in trained if name.startswith(f"{part}/")]
        if not names:
            continue
        of_side = {} if settings.layer_decay == 1 else parameter_depths(side)
        depths = {name: of_side.get(name.removeprefix(f"{part}/"), 0) for name in names}
        top = max(depths.values())
        rates |= {name: settings.lr * settings.layer_decay ** (top - depth) for name, depth in depths.items()}
    return rates
