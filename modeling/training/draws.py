"""Which rows of a problem in memory a training sees in which order, by seed."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.features.inputs import Inputs
from modeling.training.config import TrainConfig
from modeling.training.problem import Problem


def stream_of(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: one seed for all would draw the batches from the weights' numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest(), "big")


class Draws:
    """Which rows each model sees in an epoch, in which order and which views of their pictures."""

    def __init__(self, configs: Sequence[TrainConfig], problem: Problem, inputs: Inputs):
        seeds = [c.seed for c in configs]
        self.seeds = sorted(set(seeds))
        self.of_model = torch.tensor([self.seeds.index(seed) for seed in seeds])
        self.generators = [torch.Generator().manual_seed(stream_of(seed, "order")) for seed in self.seeds]
        self.train, self.n_rows, self.device = problem.train, len(problem.labels), problem.inputs.device
        self.n_views = 0 if inputs.image_views is None else inputs.image_views.shape[1]
        self.probabilities = None
        if configs[0].balanced_sampler:
            labels = problem.labels[problem.train].cpu()
            self.probabilities = 1.0 / torch.bincount(labels, minlength=len(problem.classes))[labels]

    def epoch(self) -> tuple[Tensor, Tensor | None]:
        """Rows (M, n) and views (M, N), None without views."""
        orders, views = [], []
        for generator in self.generators:
            if self.probabilities is None:
                orders.append(torch.randperm(len(self.train), generator=generator))
            else:
                orders.append(torch.multinomial(self.probabilities, len(self.train), True, generator=generator))
            if self.n_views:
                views.append(torch.randint(self.n_views + 1, (self.n_rows,), generator=generator))
        rows = self.train[torch.stack(orders)[self.of_model].to(self.device)]
        return rows, torch.stack(views)[self.of_model].to(self.device) if views else None
