"""Study E: early and late fusion and cross-attention of a text and an image encoder."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.heads.base import Batch, Head, n_heads
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Conv2d, Dropout, Linear, MaxPool2d, MultiheadAttention


class Late512(Head):
    """Study E's late fusion: each side by a bare linear layer to 512, concatenated, then
    Linear(512)-ReLU-Dropout-Linear. D isn't used. One-sided: that side's 512 and the same classifier."""

    study = "E"
    dropout = 0.5
    reads = ("dropout",)
    width = 512

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.project = nn.ModuleDict({side: Linear(n_models, widths[side], self.width) for side in self.sides})
        self.classifier = nn.Sequential(
            Linear(n_models, self.width * len(self.sides), self.width),
            nn.ReLU(),
            Dropout(self.dropout),
            Linear(n_models, self.width, n_classes),
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(torch.cat([self.project[side](batch.of(side)) for side in self.sides], -1))


class QueryAttention(Head):
    """Study E's cross-attention: the text as query, the image, brought to the text's width, as key and value, 2 heads,
    linear. Image tokens, where cached, take the place of the image vector. One-sided: the side attends to itself.

    Told are the sides' parts, the widths (768 of the text, 2048 to 768 of the image) and the 2 heads; dropout and one
    linear layer behind them are chosen.

    Over a single key the weights are 1 whatever the query: without image tokens the text has no say, and the figures
    are the image's alone."""

    study = "E"
    dropout = 0.5
    reads = ("dropout",)
    optional_tokens = ("image",)

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.key_name = "image_tokens" if "image_tokens" in widths and "image" in self.sides else self.sides[0]
        query_side = self.sides[-1]
        width = widths[query_side]
        self.to_query_width = Linear(n_models, widths[self.key_name], width)
        self.attention = MultiheadAttention(n_models, width, n_heads(width, 2))
        self.drop = Dropout(self.dropout)
        self.out = Linear(n_models, width, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        query, keys = batch.of(self.sides[-1])[:, :, None], batch.of(self.key_name)
        keys = self.to_query_width(keys if keys.dim() == 4 else keys[:, :, None])
        mixed, _ = self.attention(query, keys, keys)
        return self.out(self.drop(mixed[:, :, 0]))


class EarlyPlane(Head):
    """Study E's early fusion: the text vector, by a linear layer, as one more plane behind the picture's colours (the
    image tokens of the encoder `pixels`), and convolutions over all of them. One-sided: the picture, or the plane alone
    of 224 x 224.

    Told are the plane, its size and convolutions. Chosen is the plain net: three stages of a 3 x 3 convolution of
    stride 2 to D/4, D/2 and D channels, ReLU and 2 x 2 max pooling; then dropout and a linear layer."""

    study = "E"
    dropout = 0.5
    tokens = ("image",)
    plane = 224
    eval_rows = 16

    @classmethod
    def require(cls, config: HeadConfig, widths: Mapping[str, int]) -> None:
        super().require(config, widths)
        if "image" in config.sides and math.isqrt(n := widths["image_positions"]) ** 2 != n:
            raise UsageError(
                f"head {config.head} needs square pictures, and there are {n} image tokens; use the encoder pixels"
            )

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.size = math.isqrt(widths["image_positions"]) if "image" in self.sides else self.plane
        colours = widths["image_tokens"] if "image" in self.sides else 0
        if "text" in self.sides:
            self.to_plane = Linear(n_models, widths["text"], self.size**2)
        channels = [colours + ("text" in self.sides), *(max(1, config.D // part) for part in (4, 2, 1))]
        stages: list[nn.Module] = []
        size = self.size
        for n_in, n_out in pairwise(channels):
            stages += [Conv2d(n_models, n_in, n_out, 3, stride=2), nn.ReLU(), MaxPool2d(2)]
            size = math.ceil(size / 4)
        self.stages = nn.Sequential(*stages)
        self.drop = Dropout(self.dropout)
        self.out = Linear(n_models, config.D * size**2, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        read = [batch.of("image_tokens" if side == "image" else side) for side in self.sides]
        # A row's maps take megabytes, whatever its features take: the rows of a cache can't all be predicted at once.
        rows = read[0].shape[1] if self.training else self.eval_rows
        return torch.cat([self._logits(block) for block in zip(*(x.split(rows, 1) for x in read), strict=True)], 1)

    def _logits(self, block: Sequence[Tensor]) -> Tensor:
        planes = []  # (M, B, channels, height, width)
        for side, x in zip(self.sides, block, strict=True):
            plane = x.transpose(-1, -2) if side == "image" else self.to_plane(x)[:, :, None]
            planes.append(plane.unflatten(-1, (self.size, self.size)))
        return self.out(self.drop(self.stages(torch.cat(planes, 2)).flatten(2)))
