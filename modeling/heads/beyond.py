"""Heads beyond the studies: an MLP for ensembles, and two that are solved in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Dropout, Linear, kernel_logits


class Mlp(Head):
    """Concatenated, Dropout-Linear(D)-GELU-Dropout-Linear: for ensembles over seeds."""

    dropout = 0.5

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.mlp = nn.Sequential(
            Dropout(self.dropout),
            Linear(n_models, sum(widths[s] for s in self.sides), config.D),
            nn.GELU(),
            Dropout(self.dropout),
            Linear(n_models, config.D, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.mlp(self.joined(batch))


class LinearHead(Head):
    """Multinomial logistic regression on the concatenated vectors, by full-batch L-BFGS."""

    solver = "logistic"
    reads = ("class_weights", "C")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.out = Linear(n_models, sum(widths[s] for s in self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(self.joined(batch))


class KernelHead(Head):
    """RBF kernel classifier on the concatenated vectors, in closed form (`modeling.training.closed_form.fit_kernel`).
    The training rows are its support. Their number is `widths["support"]`."""

    support: Tensor
    gamma: Tensor
    solver = "kernel"
    reads = ("class_weights", "ridge", "gamma")
    norms = ("l2", "standard")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        n_support, width = widths["support"], sum(widths[s] for s in self.sides)
        self.register_buffer("support", torch.zeros(n_models, n_support, width))
        self.register_buffer("gamma", torch.zeros(n_models, dtype=torch.float64))
        self.dual = nn.Parameter(torch.zeros(n_models, n_support, n_classes, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(n_models, n_classes, dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        logits = [
            kernel_logits(x, support.double(), dual, bias, float(gamma))
            for x, support, dual, bias, gamma in zip(
                self.joined(batch), self.support, self.dual, self.bias, self.gamma, strict=True
            )
        ]
        return torch.stack(logits).float()
