"""What a model in training says of rows, and how good that is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.finetuning.data import PairReader, Sample
from modeling.finetuning.distributed import Team
from modeling.finetuning.model import PairBatch, PairModel
from modeling.finetuning.settings import EVAL_ROWS
from modeling.training.problem import validation_figures


@torch.no_grad()
def predict(
    model: PairModel,
    reader: PairReader,
    rows: Sequence[int],
    team: Team = Team(),
    change: Callable[[PairBatch], PairBatch] = lambda batch: batch,
    at_once: int = EVAL_ROWS,
) -> np.ndarray:
    """Logits (len(rows), C) float32 of `rows`, `at_once` at a time, each by exactly one process. `change` may alter the
    batches."""
    model.train(False)
    blocks = [rows[low : low + at_once] for low in range(0, len(rows), at_once)]
    own = team.share(blocks)
    batches = reader.batches([[Sample(row) for row in block] for block in own])
    found = [model(change(batch)).cpu().numpy() for batch in batches]
    of_all = team.gather(found)
    return np.concatenate([of_all[k % team.size][k // team.size] for k in range(len(blocks))])


def figures_of(logits: np.ndarray, labels: Tensor, classes: Sequence[str] = ()) -> dict[str, float]:
    """Loss, accuracy and F1s of logits (n, C) and labels (n,), and how many rows are predicted as each of `classes`."""
    found = validation_figures(torch.from_numpy(logits)[None], labels, classes)
    return {name: values[0].item() for name, values in found.items()}


def score_of(figures: Mapping[str, Any], monitor: str) -> float:
    """The monitored figure, turned so that more is better."""
    return float(-figures["val_loss"] if monitor == "loss" else figures[monitor])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[int]:
    """The block draws its random numbers from `seed`; the random state outside stays as it is."""
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        torch.default_generator.manual_seed(seed)
        for gpu in on_gpu:
            with torch.cuda.device(gpu):  # which needn't be the current one
                torch.cuda.manual_seed(seed)
        yield seed
