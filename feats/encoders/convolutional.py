"""What encoders with convolutional nets share. It imports no torchvision, which takes as long as torch itself."""

from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from feats.errors import UsageError


def load_strictly(network: nn.Module, path: Path, model: str) -> None:
    """Fill `network` from a state-dict file, pickled tensors or safetensors, never other objects.

    Raises `UsageError` if the file can't be read as one or holds other names or shapes than the network.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        # torch's own words about what it refuses to unpickle fill a screen. (The message only tells users how such a
        # file is written; loading above is weights_only.)
        raise UsageError(
            f"{path} can't be read as a state dict ({type(error).__name__}); "
            "expected .safetensors, or .pth/.pt as torch.save(model.state_dict()) writes it"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path} holds no plain state dict; save model.state_dict() alone")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
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
