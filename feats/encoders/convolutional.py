"""What encoders with convolutional nets share. It imports no torchvision, which takes as long as torch itself."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from feats.errors import UsageError, first_line
from feats.tensor_files import SUFFIX, read_pickled, read_safetensors

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of its pictures, (R, G, B) in [0, 1]


def load_strictly(network: nn.Module, path: Path, model: str) -> None:
    """Fill `network` from a state-dict file, pickled tensors or safetensors, never other objects.

    Raises `UsageError` if the file can't be read as one or holds other names or shapes than the network.
    """
    # The line named here is for users to run on their own model, where it only writes; what is read here is tensors.
    remedy = "expected .safetensors, or .pth/.pt as torch.save(model.state_dict()) writes it"
    state = read_safetensors(path, remedy) if path.suffix == SUFFIX else read_pickled(path, remedy)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UsageError(f"{path} holds no plain state dict; save model.state_dict() alone")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [first_line(error)]
        raise UsageError(
            f"{path} doesn't fit {model} ({problems[0][:200]}); give this model's weights or the model that has these"
        ) from None


def fold_batch_norms(network: nn.Module) -> None:
    """Put each evaluated batch norm into the convolution registered just before it, in place.

    The same values to float32 rounding, for 1.1 to 1.2 times the images a second on a CPU; fold before any cast.
    """
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())


def pool_map(grid: torch.Tensor) -> torch.Tensor:
    """(B, D, H, W) -> (B, D), in float32: half precision would lose digits in the sum."""
    return grid.float().mean((2, 3))
