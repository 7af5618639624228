"""Which cells of a picture speak for a class, by gradients."""

from math import isqrt

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from feats.encoders.base import Blocks, ImageSide
from modeling.explanations.attention import recorded_attention
from modeling.explanations.perturbing import PerturbedPicture


def is_convolutional(side: ImageSide) -> bool:
    """Whether a network's last block is one of convolutions."""
    return side.blocks is not None and _has_convolution(side.blocks.modules[-1])


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Conv2d) for inner in module.modules())


def has_attention(side: ImageSide, pixels: Tensor) -> bool:
    """Whether every block's attention weights can be had, as tried on a picture (1, 3, H, W)."""
    if side.blocks is None or is_convolutional(side):
        return False
    with recorded_attention() as recorded:  # with gradients: without, torch's modules take another way
        side.blocks.below(pixels.requires_grad_(), len(side.blocks.modules))
    return len(recorded) == len(side.blocks.modules)


def grad_cam_layer(side: ImageSide) -> nn.Module | None:
    """Where Grad-CAM looks: a convolutional net's last block; else the first convolution, a ViT's patch embedding. None
    where there is neither."""
    if side.blocks is not None and is_convolutional(side):
        return side.blocks.modules[-1]
    modules = side.network.modules() if side.network is not None else iter(())
    return next((module for module in modules if isinstance(module, nn.Conv2d)), None)


def grad_cam(picture: PerturbedPicture) -> np.ndarray:
    """Grad-CAM of the target's log-odds, (G, G) of the layer's map: Σ_c mean(∂/∂A_c) A_c, signed.

    Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017. What
    speaks against the class, which the paper's ReLU takes away, is kept below 0: the order of cells needs it.
    """
    side = picture.model.image_side(picture.part)
    layer = grad_cam_layer(side)
    assert layer is not None

    def log_odds(pixels: Tensor) -> Tensor:
        return picture.log_odds_of(side.forward(pixels))

    pixels = picture.model.to_pixels(picture.part, picture.pixels[None]).requires_grad_()
    attribution = LayerGradCam(log_odds, layer).attribute(pixels)
    return as_array(attribution[0, 0])


def gradient_attention(picture: PerturbedPicture) -> np.ndarray:
    """Gradient × attention through all blocks of a ViT, for the target's log-odds, (G, G) of its patches, 0 or more.

    Chefer, Gur and Wolf, Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers, ICCV 2021, for self-attention: R = 1; of each block, with attention A, Ā = mean over heads of
    (∂A ⊙ A)+, R = R + Ā R. They read the row of the class token. Here each position that leaves the last block counts
    by the length of the target's gradient there: the class token alone where features are read there, all patches
    where features are their mean.
    """
    side = picture.model.image_side(picture.part)
    blocks = side.blocks
    assert isinstance(blocks, Blocks)
    pixels = picture.model.to_pixels(picture.part, picture.pixels[None]).requires_grad_()
    depth = len(blocks.modules)
    with recorded_attention() as recorded:
        hidden = blocks.below(pixels, depth)  # (1, L, width)
    log_odds = picture.log_odds_of(blocks.above(hidden, None, depth))
    of_hidden, *gradients = torch.autograd.grad(log_odds.sum(), [hidden, *recorded])
    relevance = torch.eye(hidden.shape[1], device=hidden.device)
    for weights, gradient in zip(recorded, gradients, strict=True):
        relevance = relevance + (gradient * weights).clamp(min=0).mean(1)[0] @ relevance
    read = of_hidden[0].norm(dim=-1)
    of_positions = read / read.sum().clamp(min=torch.finfo(read.dtype).tiny) @ relevance
    grid = isqrt(len(of_positions))  # class, distillation and register tokens come before the square of patches
    return as_array(of_positions[-grid * grid :].view(grid, grid))


def as_array(x: Tensor) -> np.ndarray:
    """On the host, in double precision."""
    found: np.ndarray = x.detach().double().cpu().numpy()
    return found
