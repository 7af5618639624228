"""Encoders with gradients and a head of stage 2 as one model of raw pairs.

    pictures, texts --encoders--> features --normalisation, as of caches--> head --> logits

With what lies below a cut cached (see `modeling.finetuning.trunk`), the encoders begin above it.
"""

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feats.acceleration import full_products
from feats.encoders.base import Encoder, Features, ImageSide, TextSide
from feats.errors import UsageError
from feats.source import SIDES
from modeling.features.inputs import Preprocessing
from modeling.heads.base import Batch, Head
from modeling.heads.layers import BatchNorm as HeadBatchNorm

HEAD = "head"
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, HeadBatchNorm)


@dataclass(frozen=True)
class PairBatch:
    """B pairs as encoders read them, by cache. Of a side that is cut, what enters its first block above the cut."""

    pixels: dict[str, Tensor] = field(default_factory=dict)  # (B, H, W, 3) uint8
    ids: dict[str, list[Any]] = field(default_factory=dict)  # each text's `Tokens.ids`
    hidden: dict[str, Tensor] = field(default_factory=dict)  # by "image/clip": (B, L, width)

    @property
    def size(self) -> int:
        """B."""
        there: list[Sized] = [*self.pixels.values(), *self.ids.values(), *self.hidden.values()]
        return len(there[0])


class PairModel:
    """`encoders` by cache name, how their features are normalised and joined, and a head of one model.

    Its networks are `parts`: "image/clip", "text/roberta", ..., "head". `autocast` says in which dtype each encoder
    multiplies; the head and all between work in float32. `cuts` says, by part, which block a cached trunk feeds.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        preprocessing: Preprocessing,
        head: Head,
        autocast: Mapping[str, torch.dtype] = {},
    ):
        self.encoders, self.preprocessing, self.head, self.autocast = encoders, preprocessing, head, autocast
        self.cuts: dict[str, int] = {}
        self.sides: dict[str, ImageSide | TextSide] = {}
        for side in SIDES:
            for name in preprocessing.caches[side]:
                self.sides[f"{side}/{name}"] = checked_side(encoders[name], side)
        self.tuned = False  # whether it has been trained: then it is no start any more
        self.adapted: list[str] = []  # parts with adapters, see `modeling.finetuning.lora`
        self.train_batch_norm = False  # of encoders
        self.new_head = True  # a run's head isn't: its batch norms have statistics to keep

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return next(iter(self.encoders.values())).device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by side and cache, and the head."""
        networks = {name: side.network for name, side in self.sides.items() if side.network is not None}
        return {**networks, HEAD: self.head}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter, by part and its name there."""
        for part, network in self.parts.items():
            for name, parameter in network.named_parameters():
                yield f"{part}/{name}", parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer that belongs to the state: running statistics."""
        for part, network in self.parts.items():
            kept = network.state_dict().keys()
            for name, buffer in network.named_buffers():
                if name in kept:
                    yield f"{part}/{name}", buffer

    def train(self, mode: bool = True) -> None:
        """Training mode, but for what is frozen: a network or block without a parameter to train works as it will be
        used, and batch norms keep their statistics unless they are to be trained."""
        for name, network in self.parts.items():
            network.train(mode)
            if not mode:
                continue
            frozen_norms = not (self.new_head if name == HEAD else self.train_batch_norm)
            for module in network.modules():
                own = list(module.parameters())
                if (own and not any(p.requires_grad for p in own)) or (
                    frozen_norms and isinstance(module, BATCH_NORMS)
                ):
                    module.eval()

    def __call__(self, batch: PairBatch) -> Tensor:
        """Logits (B, C) float32."""
        joined: dict[str, Tensor] = {}
        for side in SIDES:
            names = self.preprocessing.caches[side]
            if not names:
                continue
            of_cache = {name: self._features(f"{side}/{name}", batch) for name in names}
            vectors = [
                self.preprocessing.normalised(side, name, out["feats"].float()) for name, out in of_cache.items()
            ]
            joined[side] = torch.cat(vectors, -1)[None]
            for name, out in of_cache.items():
                kind = f"{side}_tokens"
                if f"{kind}/{name}" in self.preprocessing.normalizers:
                    tokens = self.preprocessing.normalised(kind, name, out["tokens"].float())
                    joined |= self._tokens(kind, name, tokens, batch)
        return self.head(Batch(**joined))[0].float()

    def _features(self, part: str, batch: PairBatch) -> Features:
        side, name = self.sides[part], part.partition("/")[2]
        encoder = self.encoders[name]
        with self.autocast_of(name):
            if part in self.cuts:
                assert side.blocks is not None
                return side.blocks.above(
                    batch.hidden[part].to(self.device).float(), batch.ids.get(name), self.cuts[part]
                )
            if isinstance(side, ImageSide):
                return side.forward(encoder.to_pixels(batch.pixels[name]))
            return side.forward(batch.ids[name])

    def _tokens(self, kind: str, name: str, tokens: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        if kind == "image_tokens":
            return {kind: tokens[None]}
        lengths = torch.tensor([len(ids) for ids in batch.ids[name]], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return {kind: tokens.masked_fill(~mask[..., None], 0)[None], "text_mask": mask[None]}

    @contextmanager
    def autocast_of(self, name: str) -> Iterator[None]:
        """Inside the block an encoder multiplies in its dtype, as in extraction: float32 in full on a GPU, too."""
        dtype = self.autocast.get(name, torch.float32)
        usual = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=True)
        with full_products(dtype), usual:
            yield


def checked_side(encoder: Encoder, side: str) -> ImageSide | TextSide:
    """A side of an encoder that can be tuned. Raises `UsageError` for one without a network."""
    chosen = encoder.image_side() if side == "image" else encoder.text_side()
    if chosen.network is None:
        raise UsageError(
            f"encoder {encoder.identity['encoder']} has no gradients: there is nothing in it to tune; give a run, or "
            "an encoder, that does without it"
        )
    return chosen


@torch.no_grad()
def hidden_of_nothing(model: PairModel, side: str) -> dict[str, Tensor]:
    """What a black picture, or an empty text, is to the blocks above each cut of a side: (1, L, width) by part."""
    found = {}
    for part, cut in model.cuts.items():
        name = part.partition("/")[2]
        chosen, encoder = model.sides[part], model.encoders[name]
        if not part.startswith(f"{side}/") or chosen.blocks is None:
            continue
        if isinstance(chosen, ImageSide):
            nothing: Any = encoder.to_pixels(chosen.blank()[None])
        else:
            nothing = [chosen.tokenize([""])[0].ids]
        with model.autocast_of(name):
            found[part] = chosen.blocks.below(nothing, cut)
    return found
