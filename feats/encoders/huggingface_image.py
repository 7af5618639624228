"""Any Hugging Face image encoder that makes a sequence of patches: ViT, DeiT, DINOv2, Swin and their kin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from feats.encoders.base import Blocks, Encoder, Features, ImageSide, Loading
from feats.encoders.hidden_layers import find_layers
from feats.encoders.huggingface_text import (
    Kind,
    find_model,
    model_name,
    read_network,
    refuse_lost,
    refused_if_failing,
    save_folder,
    weights_in,
)
from feats.encoders.weights import verified_sha256
from feats.errors import UsageError
from feats.images import ResizeCrop
from feats.json_files import read_json

IMAGE = Kind("an image encoder", "google/vit-base-patch16-224-in21k", tokenizer=False)
PREPROCESSOR = "preprocessor_config.json"
SIZE, MEAN_AND_STD = 224, [0.5, 0.5, 0.5]  # ViT's own, where the folder doesn't say
BEFORE_PATCHES = ("cls_token", "distillation_token", "register_tokens")  # parameters (1, n, D), in this order


def load(model: str, weights: str | None, how: Loading, *, pooling: str) -> Encoder:
    """Load the image encoder `model`: a local folder, or a name looked for in the hub's cache, then on the hub.

    `weights` overrides it: a model folder, or a weights file, whose configuration comes from beside it, else from
    `model`. Features are (B, D) float32: `pooling` `cls` is the class token after the last norm, `mean` the mean of
    the patches there; with `tokens` also the patches without class, distillation and register tokens, (B, P, D).
    A pooler with weights of its own isn't used and dropped.

    Size, resampling, mean and standard deviation are those of the folder's preprocessor_config.json, else ViT's. The
    shorter side is resized and the centre cut out: unlike ViT's own preprocessing, which squeezes the picture into a
    square, this keeps its proportions.

    Raises `UsageError` when the model can't be had, lacks weights or isn't such an encoder, for `pooling` cls of a
    model without a class token, and for preprocessing of another kind.
    """
    folder, weights_file = find_model(model, weights, IMAGE)
    weights_sha256 = verified_sha256(weights_file or weights_in(folder), how.expected_sha256)
    network, missing = read_network(folder, weights_file, IMAGE)
    source = weights_file or folder
    refuse_lost(source, network, {key for key in missing if key.split(".")[0] != "pooler"})
    if any(name.startswith("pooler.") for name, _ in network.named_parameters()):
        network.register_module("pooler", None)
    first = _n_before_patches(network)
    if pooling == "cls" and not first:
        raise UsageError(
            f"{source} holds a {type(network).__name__}, which has no class token; use `pooling` mean instead of cls"
        )
    nn.Module.to(network, device=how.device, dtype=how.dtype)
    network.train(False).requires_grad_(how.trainable)
    preprocess, mean, std = read_preprocessor(folder, network.config)
    forward = _forward(network, first, pooling, how.tokens)
    with refused_if_failing(source, network, IMAGE):
        forward(torch.zeros(1, 3, preprocess.crop, preprocess.crop, device=how.device, dtype=how.dtype))

    def save(target: Path) -> None:
        save_folder(network, (), folder, target)

    return Encoder(
        identity={
            "model": model_name(model, weights, folder, weights_file),
            "weights_sha256": weights_sha256,
            "pooling": pooling,
            "preprocess": preprocess.as_json(mean, std),
        },
        loading=how,
        image=ImageSide(
            preprocess=preprocess,
            mean=mean,
            std=std,
            forward=forward,
            network=network,
            blocks=_blocks(network, forward, preprocess.crop, how),
        ),
        save=save if how.trainable else None,
    )


def read_preprocessor(folder: Path, config: Any) -> tuple[ResizeCrop, list[float], list[float]]:
    """What the folder's preprocessor_config.json asks for: resizing and cropping, then mean and standard deviation.

    Where the file doesn't say, the size is that of the model's `config`. Raises `UsageError` for a file that can't be
    read, pictures that aren't square and values not scaled to [0, 1].
    """
    path = folder / PREPROCESSOR
    try:
        settings = read_json(path, f"give a model such as {IMAGE.example}") if path.is_file() else {}
        resize = _square(settings.get("size") or _model_size(config))
        crop = _square(settings.get("crop_size") or resize) if settings.get("do_center_crop") else resize
        interpolation = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR)).name.lower()
        if abs(255 * settings.get("rescale_factor", 1 / 255) - 1) > 1e-3 or not settings.get("do_rescale", True):
            raise ValueError("pixels aren't scaled to [0, 1]")
        normalised = settings.get("do_normalize", True)
        mean = settings.get("image_mean") or MEAN_AND_STD if normalised else [0.0] * 3
        std = settings.get("image_std") or MEAN_AND_STD if normalised else [1.0] * 3
        if not len(mean) == len(std) == 3 or crop > resize:
            raise ValueError("not three colours, or a crop larger than the picture")
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} asks for other preprocessing than one square of RGB values ({error}); "
            f"give a model such as {IMAGE.example}"
        ) from error
    return ResizeCrop(resize, crop, interpolation), list(mean), list(std)


def _square(size: Any) -> int:
    """Side of the square: 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ValueError(f"size {size}")
    return side


def _model_size(config: Any) -> int:
    size = getattr(config, "image_size", SIZE)
    return size if isinstance(size, int) else SIZE


def _n_before_patches(network: nn.Module) -> int:
    """How many tokens of a sequence come before its patches; 0 for a model without a class token."""
    lengths = {name.rpartition(".")[2]: p.shape[1] for name, p in network.named_parameters() if p.dim() == 3}
    return sum(lengths[name] for name in BEFORE_PATCHES if name in lengths) if "cls_token" in lengths else 0


def _forward(network: nn.Module, first: int, pooling: str, tokens: bool) -> Callable[[torch.Tensor], Features]:
    def forward(pixels: torch.Tensor) -> Features:
        sequence = network(pixel_values=pixels, return_dict=True).last_hidden_state  # (B, first + P, D), normalised
        if sequence.dim() != 3:
            raise ValueError(f"its output is {tuple(sequence.shape)}, no sequence")
        patches = sequence[:, first:]
        feats = sequence[:, 0].float() if pooling == "cls" else patches.float().mean(1)
        return {"feats": feats, "tokens": patches} if tokens else {"feats": feats}

    return forward


def _blocks(network: nn.Module, forward: Callable[[torch.Tensor], Features], size: int, how: Loading) -> Blocks | None:
    """The network's layers as blocks; None where they can't be told apart, as tried on one picture."""

    def black(count: int) -> torch.Tensor:
        return torch.zeros(count, 3, size, size, device=how.device, dtype=how.dtype)

    layers = find_layers(network, lambda: network(pixel_values=black(1), return_dict=True).last_hidden_state)
    if layers is None:
        return None

    def below(pixels: torch.Tensor, k: int) -> torch.Tensor:
        return layers.states_before(k, lambda: forward(pixels))

    def above(hidden: torch.Tensor, pixels: torch.Tensor | None, k: int) -> Features:
        with layers.entered_with(hidden.to(how.dtype), k):
            return forward(black(len(hidden)))  # the network wants some, and makes nothing of them

    return Blocks(layers.modules, layers.after, below, above)
