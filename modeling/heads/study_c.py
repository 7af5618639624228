"""Study C: co-attention over token sequences."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.heads.base import Batch, Head, HeadConfig, n_heads
from modeling.heads.layers import Dropout, Linear, MultiheadAttention


class CoAttention(Head):
    """Study C, on token sequences: image tokens through self-attention, text tokens raw, and in both directions
    cross-attention followed by self-attention. Each sequence is pooled (text at its last token, image by its mean),
    the four vectors are added, one linear layer. `image_positions` adds learnable positions to the image tokens.
    One-sided: that side's own route."""

    study = "C"
    dropout = 0.1
    tokens = ("image", "text")
    reads = ("D", "dropout", "image_positions")

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        D, heads = config.D, n_heads(config.D, 8)
        self.project = nn.ModuleDict({side: Linear(n_models, widths[f"{side}_tokens"], D) for side in self.sides})
        if "image" in self.sides:
            self.self_image = MultiheadAttention(n_models, D, heads)
            if config.image_positions:
                self.positions = nn.Parameter(torch.zeros(n_models, 1, widths["image_positions"], D))
        if len(self.sides) == 2:
            self.text_to_image, self.self_text_to_image, self.image_to_text, self.self_image_to_text = (
                MultiheadAttention(n_models, D, heads) for _ in range(4)
            )
        self.drop = Dropout(self.dropout)
        self.out = Linear(n_models, D, n_classes)

    def forward(self, batch: Batch) -> Tensor:
        routes = []
        if "text" in self.sides:
            text, mask = self.project["text"](batch.of("text_tokens")), batch.of("text_mask")
            routes.append(_last_token(text, mask))
        if "image" in self.sides:
            image = self.project["image"](batch.of("image_tokens"))
            if self.config.image_positions:
                image = image + self.positions
            routes.append(self.self_image(image, image, image)[0].mean(2))
        if len(self.sides) == 2:
            read = self.text_to_image(text, image, image)[0]
            routes.append(_last_token(self.self_text_to_image(read, read, read, mask)[0], mask))
            seen = self.image_to_text(image, text, text, mask)[0]
            routes.append(self.self_image_to_text(seen, seen, seen)[0].mean(2))
        return self.out(self.drop(torch.stack(routes).sum(0)))


def _last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last real token of each text, (M, B, D) from (M, B, L, D) and (M, B, L)."""
    last = (mask.sum(-1) - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
    return tokens.gather(2, last)[:, :, 0]
