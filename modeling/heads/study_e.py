"""Study E: late fusion and cross-attention of a text and an image encoder."""

from collections.abc import Mapping

from torch import Tensor, nn

from modeling.heads.base import Batch, Head, HeadConfig, n_heads
from modeling.heads.layers import Dropout, Linear, MultiheadAttention


class Late512(Head):
    """Study E's late fusion: each side by Linear-ReLU-Dropout to 512, concatenated, linear. D isn't used."""

    study = "E"
    recipe = "E"
    dropout = 0.5
    reads = ("dropout",)
    width = 512

    def build(self, config: HeadConfig, widths: Mapping[str, int], n_classes: int, n_models: int) -> None:
        self.project = nn.ModuleDict(
            {
                side: nn.Sequential(Linear(n_models, widths[side], self.width), nn.ReLU(), Dropout(self.dropout))
                for side in self.sides
            }
        )
        self.out = Linear(n_models, self.width * len(self.sides), n_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(*(self.project[side](batch.of(side)) for side in self.sides))


class QueryAttention(Head):
    """Study E's cross-attention: the text as query, the image, brought to the text's width, as key and value, 2 heads,
    linear. Image tokens, where cached, take the place of the image vector. One-sided: the side attends to itself.

    Over a single key the weights are 1 whatever the query: without image tokens the text has no say, and the figures
    are the image's alone."""

    study = "E"
    recipe = "E"
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
