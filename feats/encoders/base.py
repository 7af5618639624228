"""What an encoder is: an image side, a text side, or both, and what they are run on.

A side splits its work in two, so that the first part can run in worker processes and overlap with the second:

    image:  RGB PIL image --to_bytes--> uint8 --(shared: Encoder.to_pixels)--> forward --> features
    text:   str           --tokenize--> Tokens ------------------------------> forward --> features
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from feats.acceleration import full_products
from feats.errors import UsageError
from feats.images import as_rgb
from feats.text import clean

Features = dict[str, torch.Tensor]  # "feats": (B, D); where tokens are asked for also "tokens": (B, P, D')


@dataclass(frozen=True)
class Tokens:
    """One tokenised text. `ids` is whatever the encoder's own forward takes, `length` its number of tokens."""

    ids: Any
    length: int
    truncated: bool = False


@dataclass(frozen=True)
class Blocks:
    """A side's network as blocks one after another, so that it can be cut between two of them.

    `modules` are the blocks, the first applied first. `after` are the beginnings of the parameters' names in
    `network` that come after the last block; every other parameter outside the blocks comes before the first.

    `below` (inputs, k) computes what enters block k, for k from 0 to len(modules): (B, L, width), where L are the
    tokens of the longest text (what is beyond a text's length means nothing), a picture's positions, or those of a
    convolutional net's square map, row by row. `above` (that in any floating dtype, inputs, k) goes on from there to
    what `forward` gives: above(below(x, k), x, k) is forward(x), with gradients, too. `inputs` are what `forward`
    takes; for pictures `above` needs none and takes None. `deepest` is the last k that `above` can go on from (None:
    any).
    """

    modules: Sequence[nn.Module]
    after: tuple[str, ...]
    below: Callable[[Any, int], torch.Tensor]
    above: Callable[[torch.Tensor, Any, int], Features]
    deepest: int | None = None


@dataclass
class ImageSide:
    """`preprocess` runs in forked worker processes and returns RGB images of one size.

    `forward` takes what `Encoder.to_pixels` gives: (B, 3, H, W), scaled to [0, 1], normalised with `mean` and `std`, in
    the compute dtype and on the compute device. Tokens, where the model has them, are its patch or grid positions
    (B, P, D'). `network` holds the parameters that `forward` uses, under the names of a checkpoint of its kind,
    `blocks` is the same network as a stack.
    """

    preprocess: Callable[[Image.Image], Image.Image]
    mean: Sequence[float]
    std: Sequence[float]
    forward: Callable[[torch.Tensor], Features]
    network: nn.Module | None = None
    channels_last: bool = False  # memory format of the pixels: convolutional nets want it
    blocks: Blocks | None = None
    n_parameters: int | None = None  # where folding has left `network` with fewer than its kind has

    def to_bytes(self, image: Image.Image) -> torch.Tensor:
        """An RGB image after preprocessing, (H, W, 3) uint8."""
        return torch.from_numpy(np.array(self.preprocess(image)))  # a copy: PIL's own buffer is read-only

    def blank(self) -> torch.Tensor:
        """A black picture after preprocessing, (H, W, 3) uint8."""
        return self.to_bytes(Image.new("RGB", (512, 512)))


@dataclass
class TextSide:
    """`forward` takes a list of `Tokens.ids`, in any number and any mix of lengths.

    It pads to the longest itself; its tokens are (B, longest, D') with row b valid up to its length. `network` and
    `blocks` are as in `ImageSide`; None where nothing is learned. `blocks` is also None for a network whose layers
    can't be told apart, such as ALBERT's, which are one. `padding` is the id that stands for no word.
    """

    tokenize: Callable[[Sequence[str]], list[Tokens]]
    forward: Callable[[list[Any]], Features]
    network: nn.Module | None = None
    blocks: Blocks | None = None
    padding: int | None = None


@dataclass(frozen=True)
class Loading:
    """How to load an encoder, whichever it is.

    With `tokens` its sides give token vectors, too. With `trainable` parameters require gradients, nothing is folded
    or fused, and weights stay float32. With `expected_sha256`, weights of another digest are refused before anything
    of them is opened.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: bool = False
    trainable: bool = False
    expected_sha256: str | None = None


@dataclass
class Encoder:
    """A loaded model, ready to run.

    `identity` holds all that decides the features' values, for the fingerprint: model, weights_sha256, preprocessing,
    pooling, ... as JSON values. `text_clean` is the cleaning level that its texts get where none is asked for.
    `options` are the values of those that its line in the registry has.
    `save` writes the networks' present weights, exactly, into an existing folder that the backend's `load` takes as
    `weights`; None where nothing is learned, or the encoder wasn't loaded as trainable: its weights may be rounded and
    folded. `feats.encoders.saved.save_encoder` calls it.
    """

    identity: dict[str, Any]
    loading: Loading
    image: ImageSide | None = None
    text: TextSide | None = None
    text_clean: str = "tweet"
    options: dict[str, str | int] = field(default_factory=dict)
    save: Callable[[Path], None] | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.loading.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.loading.dtype

    @property
    def tokens(self) -> bool:
        """Whether its sides give token vectors."""
        return self.loading.tokens

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters each of its sides has, by "image" and "text": 0 where nothing is learned."""
        sides = {"image": self.image, "text": self.text}
        return {name: _parameters(side) for name, side in sides.items() if side is not None}

    def to_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) on the host -> normalised (B, 3, H, W) on the device, in the compute dtype.

        In float32 the same operations as torchvision's ToTensor and Normalize.
        """
        side = self.image_side()
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last if side.channels_last else torch.contiguous_format)
        mean, std = (_per_channel(tuple(values), self.device) for values in (side.mean, side.std))
        return x.to(torch.float32).div_(255).sub_(mean).div_(std).to(self.dtype)

    def image_side(self) -> ImageSide:
        """The image side. Raises `UsageError` for an encoder of texts only."""
        if self.image is None:
            raise UsageError(f"encoder {self.identity.get('encoder')} has no image side")
        return self.image

    def text_side(self) -> TextSide:
        """The text side. Raises `UsageError` for an encoder of pictures only."""
        if self.text is None:
            raise UsageError(f"encoder {self.identity.get('encoder')} has no text side")
        return self.text

    def encode(
        self,
        images: Sequence[Image.Image] | None = None,
        texts: Sequence[str] | None = None,
        *,
        text_clean: str | None = None,
        batch_size: int = 32,
    ) -> dict[str, np.ndarray]:
        """Features of Python objects: {"image": (N, D), "text": (N, D)} float32, of the sides that are given.

        The values are those that extraction puts into a cache, before their rounding to float16: pictures are turned
        upright, put on white and preprocessed in the same way, texts cleaned to the level `text_clean` (default: the
        encoder's). Raises `UsageError` for a side the encoder hasn't, an unknown level and a text in place of a list.
        """
        if isinstance(texts, str):
            raise UsageError(f"`texts` {texts[:20]!r} is one text, expected a list: its letters would be encoded")
        found = {}
        with torch.inference_mode(), full_products(self.dtype):
            if images is not None:
                found["image"] = self._encode_images(images, batch_size)
            if texts is not None:
                found["text"] = self._encode_texts([clean(t, text_clean or self.text_clean) for t in texts], batch_size)
        return found

    def _encode_images(self, images: Sequence[Image.Image], size: int) -> np.ndarray:
        side = self.image_side()
        feats = []
        for low in range(0, max(len(images), 1), size):
            batch = [side.to_bytes(as_rgb(image)) for image in images[low : low + size]]
            out = side.forward(self.to_pixels(torch.stack(batch or [side.blank()])))["feats"]
            feats.append(out[: len(batch)].float().cpu())  # of no picture at all: (0, D)
        return torch.cat(feats).numpy()

    def _encode_texts(self, texts: Sequence[str], size: int) -> np.ndarray:
        side = self.text_side()
        tokens = side.tokenize(texts or [""])
        feats: torch.Tensor | None = None
        for chosen in by_length(tokens, size):
            out = side.forward([tokens[k].ids for k in chosen])["feats"].float().cpu()
            feats = out.new_empty(len(tokens), out.shape[1]) if feats is None else feats
            feats[torch.from_numpy(chosen)] = out
        assert feats is not None
        return feats[: len(texts)].numpy()


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on the device. To a GPU they go by way of pinned memory: otherwise the host would wait until
    the GPU has done all its work so far."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def count_parameters(network: nn.Module | None) -> int:
    """The parameters of a network; 0 of none."""
    return 0 if network is None else sum(p.numel() for p in network.parameters())


def _parameters(side: ImageSide | TextSide) -> int:
    known = side.n_parameters if isinstance(side, ImageSide) else None
    return count_parameters(side.network) if known is None else known


def parameter_depths(side: ImageSide | TextSide) -> dict[str, int]:
    """How deep each parameter of the side's network lies, by name: 0 before the blocks, i + 1 in block i,
    len(modules) + 1 after them. Empty where nothing is learned.

    Raises `UsageError` for a network that can't be seen as blocks.
    """
    if side.network is None:
        return {}
    if side.blocks is None:
        raise UsageError(
            f"{type(side.network).__name__} can't be seen as blocks one after another; choose another model, or train "
            "it as a whole"
        )
    within = {id(p): depth for depth, block in enumerate(side.blocks.modules, 1) for p in block.parameters()}
    last = len(side.blocks.modules) + 1
    return {
        name: within.get(id(parameter), last if name.startswith(side.blocks.after) else 0)
        for name, parameter in side.network.named_parameters()
    }


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `hidden` (B, L, D) over the positions where `mask` (B, L) is 1, at least one a row -> (B, D)."""
    weights = mask.to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden)[:, 0] / weights.sum(1, keepdim=True)


def by_length(tokens: Sequence[Tokens], size: int) -> Iterator[np.ndarray]:
    """Positions of the texts in batches of `size`, the shortest first, so that a batch pads little."""
    order = np.argsort([t.length for t in tokens], kind="stable")
    return (order[low : low + size] for low in range(0, len(order), size))


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) on the device; made once, since each such copy would make the host wait for the GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
