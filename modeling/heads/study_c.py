"""Study C: co-attention over token sequences."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, n_heads
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Dropout, LayerNorm, Linear, MultiheadAttention, TokenBatchNorm


class SelfAttention(nn.Module):
    """norm(x + attention(x)) of tokens (M, B, L, width): `norm` is layer, batch or none (`ATTENTION_NORMS`)."""

    def __init__(self, n_models: int, width: int, norm: str):
        super().__init__()
        self.attention = MultiheadAttention(n_models, width, n_heads(width, 8))
        kinds = {"layer": LayerNorm, "batch": TokenBatchNorm}
        self.norm = kinds[norm](n_models, width) if norm in kinds else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = x + self.attention(x, x, x, mask)[0]
        return self.norm(y, mask) if isinstance(self.norm, TokenBatchNorm) else self.norm(y)


class CoAttention(Head):
    """Study C, on token sequences: image tokens through self-attention, text tokens raw, and in both directions
    cross-attention followed by self-attention. Each sequence is pooled (text at its last token, image by its mean),
    the four vectors are added, one linear layer. One-sided: that side's own route.

    The study's trials are options: `image_positions` adds learnable positions to the image tokens, or absolute ones
    (fixed sinusoids: Vaswani et al. 2017); `image_pooling` last takes the image's last token; `attention_norm` is the
    norm of the self-attentions, LayerNorm in the study, or BatchNorm over the batch's real tokens, or none. Told are
    the routes, the pooling, the sum, the linear layer and the LayerNorm; chosen are the residual around the
    self-attentions under their norm, 8 heads, linear layers that bring both sides to D, and dropout behind the sum."""

    study = "C"
    dropout = 0.1
    tokens = ("image", "text")
    reads = ("D", "dropout", "attention_norm", "image_positions", "image_pooling")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D, norm = config.D, config.attention_norm
        self.project = nn.ModuleDict({side: Linear(n_models, widths[f"{side}_tokens"], D) for side in self.sides})
        if "image" in self.sides:
            self.self_image = SelfAttention(n_models, D, norm)
            if config.image_positions == "learnable":
                self.positions = nn.Parameter(torch.zeros(n_models, 1, widths["image_positions"], D))
            elif config.image_positions == "absolute":
                self.register_buffer("positions", sinusoids(widths["image_positions"], D), persistent=False)
        if len(self.sides) == 2:
            self.text_to_image = MultiheadAttention(n_models, D, n_heads(D, 8))
            self.self_text_to_image = SelfAttention(n_models, D, norm)
            self.image_to_text = MultiheadAttention(n_models, D, n_heads(D, 8))
            self.self_image_to_text = SelfAttention(n_models, D, norm)
        self.drop = Dropout(self.dropout)
        self.out = Linear(n_models, D, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        routes = []
        if "text" in self.sides:
            text, mask = self.project["text"](batch.of("text_tokens")), batch.of("text_mask")
            routes.append(_last_token(text, mask))
        if "image" in self.sides:
            image = self.project["image"](batch.of("image_tokens"))
            if self.config.image_positions != "none":
                image = image + self.positions
            routes.append(self._pooled(self.self_image(image)))
        if len(self.sides) == 2:
            read = self.text_to_image(text, image, image)[0]
            routes.append(_last_token(self.self_text_to_image(read, mask), mask))
            seen = self.image_to_text(image, text, text, mask)[0]
            routes.append(self._pooled(self.self_image_to_text(seen)))
        return self.out(self.drop(torch.stack(routes).sum(0)))

    def _pooled(self, image: Tensor) -> Tensor:
        """(M, B, D) of image tokens (M, B, P, D)."""
        return image.mean(2) if self.config.image_pooling == "mean" else image[:, :, -1]


def sinusoids(length: int, width: int) -> Tensor:
    """Positions (length, width): column 2i is sin(position / 10000^(2i / width)), 2i + 1 the cosine of the same."""
    # By numpy: a head that is only counted is built on the device meta, where torch would import the compiler for this.
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, -1)[:, :width]
    return torch.from_numpy(waves.astype(np.float32))


def _last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last real token of each text, (M, B, D) from (M, B, L, D) and (M, B, L)."""
    last = (mask.sum(-1) - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
    return tokens.gather(2, last)[:, :, 0]
