"""Batches of a training's epochs, and what a stack says of the validation rows: features in memory, or streamed."""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modeling.features.inputs import Inputs
from modeling.features.stream import StreamedInputs
from modeling.heads.base import Batch, Head
from modeling.training.config import TrainConfig
from modeling.training.draws import Draws
from modeling.training.problem import Problem, predict_stack

HELD_BYTES = 1 << 30  # of validation features that a streamed training keeps in memory


class Batches(Protocol):
    """What a stack of M models is trained and validated on."""

    steps: int  # batches of an epoch
    n_rows: int  # of an epoch

    def epoch(self) -> Generator[tuple[Any, ...], None, None]:
        """What `gather` takes for each batch of the next epoch. Close it where it isn't used up."""
        ...

    def gather(self, *drawn: Any) -> tuple[Batch, Tensor]:
        """A batch and its labels (M, B)."""
        ...

    def validate(self, head: Head) -> Tensor:
        """Logits (M, len(val), C) float32 of the problem's validation rows."""
        ...


def batches_of(configs: Sequence[TrainConfig], problem: Problem, inputs: Inputs) -> Batches:
    """The batches of a stack's configurations; `inputs` are what its head reads of the problem's."""
    if problem.streamed is None:
        return InMemory(configs, problem, inputs)
    return Streamed(configs, problem, problem.streamed, inputs)


def validation_logits(config: TrainConfig, problem: Problem, head: Head, inputs: Inputs) -> Tensor:
    """`Batches.validate` for a head that isn't trained by batches."""
    if problem.streamed is None:
        return predict_stack(head, inputs, problem.val)
    return _Validation(config, problem, problem.streamed, held=False).logits(head)


class InMemory:
    """Index slices of features on the device; each model has a row order of its own seed. What an epoch gives are rows
    (M, B) and views, so that a recorded step can take in the gathering of its batch."""

    def __init__(self, configs: Sequence[TrainConfig], problem: Problem, inputs: Inputs):
        self.problem, self.inputs, self.bs = problem, inputs, configs[0].bs
        self.draws, self.n_rows = Draws(configs, problem, inputs), len(problem.train)
        self.steps = math.ceil(self.n_rows / self.bs)

    def epoch(self) -> Generator[tuple[Tensor, Tensor | None], None, None]:
        """See `Batches`."""
        rows, views = self.draws.epoch()
        for low in range(0, rows.shape[1], self.bs):
            yield rows[:, low : low + self.bs], views

    def gather(self, *drawn: Any) -> tuple[Batch, Tensor]:
        """See `Batches`."""
        rows, views = drawn
        return self.inputs.batch(rows, views), self.problem.labels[rows]

    def validate(self, head: Head) -> Tensor:
        """See `Batches`."""
        return predict_stack(head, self.inputs, self.problem.val)


class Streamed:
    """Blocks read ahead, their rows mixed within a window, see `modeling.features.stream`. All models of a stack see
    the same rows in the same order, that of the stream's own seed: a configuration gives the same alone.

    Validation features stay in memory while they fit into `HELD_BYTES`, and are read in every epoch otherwise."""

    def __init__(self, configs: Sequence[TrainConfig], problem: Problem, source: StreamedInputs, inputs: Inputs):
        self.configs, self.problem, self.source, self.bs = configs, problem, source, configs[0].bs
        self.train = np.sort(problem.train.cpu().numpy())
        self.n_rows, self.epochs = len(self.train), 0
        self.steps = math.ceil(self.n_rows / self.bs)
        self.n_views = 0 if inputs.image_views is None else inputs.image_views.shape[1]
        small = inputs.n_bytes / max(1, len(inputs)) * len(problem.val) <= HELD_BYTES
        self.validation = _Validation(configs[0], problem, source, held=small)

    def epoch(self) -> Generator[tuple[Batch, Tensor], None, None]:
        """See `Batches`. A batch may hold rows of two windows: an epoch has as many batches as in memory."""
        self.epochs += 1
        stream, head = self.source.stream, self.configs[0].head
        drawn = self._drawn()
        windows = [*stream.windows(drawn, self.epochs)]
        wanted = [block for chosen, _ in windows for block in chosen]
        rng = np.random.default_rng([stream.seed, self.epochs, 1])
        rest: tuple[Inputs, Tensor, Tensor] | None = None
        taken = 0
        with closing(self.source.read(wanted, head, views=self.n_views > 0, trains=True)) as blocks:
            for chosen, places in windows:
                inputs = Inputs.concatenated([next(blocks) for _ in chosen])
                rows = self._there(np.concatenate(chosen))
                order = self._there(places)
                views = self._there(rng.integers(self.n_views + 1, size=len(rows)))
                if rest is not None:
                    count = len(rest[1])
                    inputs = Inputs.concatenated([rest[0], inputs])
                    rows, views = torch.cat([rest[1], rows]), torch.cat([rest[2], views])
                    order = torch.cat([torch.arange(count, device=order.device), order + count])
                taken += len(chosen)
                whole = len(order) if taken == len(wanted) else len(order) // self.bs * self.bs
                for low in range(0, whole, self.bs):
                    yield self._batch(inputs, rows, views, order[low : min(low + self.bs, whole)])
                last = order[whole:]
                rest = (inputs.take(last), rows[last], views[last]) if len(last) else None

    def gather(self, *drawn: Any) -> tuple[Batch, Tensor]:
        """See `Batches`: they are gathered already."""
        batch, labels = drawn
        return batch, labels

    def validate(self, head: Head) -> Tensor:
        """See `Batches`."""
        return self.validation.logits(head)

    def _batch(self, inputs: Inputs, rows: Tensor, views: Tensor, places: Tensor) -> tuple[Batch, Tensor]:
        n_models = len(self.configs)
        batch = inputs.batch(places[None], views if self.n_views else None)
        return batch.expand(n_models), self.problem.labels[rows[places]].expand(n_models, -1)

    def _drawn(self) -> np.ndarray:
        """The rows of an epoch, ascending: all, or as many drawn, every class equally often."""
        if not self.configs[0].balanced_sampler:
            return self.train
        rng = np.random.default_rng([self.source.stream.seed, self.epochs, 2])
        labels = self.problem.labels.cpu().numpy()[self.train]
        of_class = [self.train[labels == k] for k in np.unique(labels)]
        counts = np.bincount(rng.integers(len(of_class), size=self.n_rows), minlength=len(of_class))
        return np.sort(np.concatenate([rng.choice(rows, n) for rows, n in zip(of_class, counts, strict=True)]))

    def _there(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.source.device)


class _Validation:
    """The validation rows of a streamed problem, `held` in memory or read each time."""

    def __init__(self, config: TrainConfig, problem: Problem, source: StreamedInputs, *, held: bool):
        self.config, self.source = config, source
        order = torch.argsort(problem.val)
        self.wanted = source.stream.blocks(problem.val[order].cpu().numpy())
        self.places = torch.argsort(order)
        self.held = [*self._read()] if held else None

    def logits(self, head: Head) -> Tensor:
        """See `Batches.validate`."""
        if self.held is not None:
            found = [predict_stack(head, inputs) for inputs in self.held]
        else:
            with closing(self._read()) as blocks:
                found = [predict_stack(head, inputs) for inputs in blocks]
        return torch.cat(found, 1)[:, self.places]

    def _read(self) -> Generator[Inputs, None, None]:
        return self.source.read(self.wanted, self.config.head)
