"""Encoders' networks with random weights, small where their kind allows it, and pictures for them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip.model import CLIP, convert_weights
from PIL import Image
from torchvision.models import get_model
from transformers import BertTokenizerFast, PreTrainedModel

# embedding, resolution, vision layers, vision width, patch, context, vocabulary, text width, text heads, text layers
CLIP_SHAPES = {
    "vit": (32, 64, 2, 128, 16, 77, 49408, 64, 1, 2),
    "resnet": (32, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 2),
}
BERT_WORDS = "a good bad very movie day the is sun rain love hate of and it we".split()
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BERT_WORDS]
BERT_SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def make_clip(family: str) -> CLIP:
    """A CLIP of `CLIP_SHAPES` in fp32. Its weights are rounded through fp16, as OpenAI's are, and none is a constant."""
    torch.manual_seed(0)
    model = CLIP(*CLIP_SHAPES[family]).eval().requires_grad_(False)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and name != "logit_scale":
            value += 0.2 * (torch.rand_like(value) - 0.5)
            value.copy_(value.half())
    return model


def save_clip(model: CLIP, path: Path) -> Path:
    """The state dict as OpenAI's hold it, its products' weights in fp16."""
    half = copy.deepcopy(model)
    convert_weights(half)
    torch.save(half.state_dict(), path)
    return path


def bert_tokenizer(folder: Path) -> BertTokenizerFast:
    """A tokenizer of `BERT_VOCABULARY`, whose file goes into `folder`."""
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY))
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=int(1e30))


def save_transformer(folder: Path, model: PreTrainedModel, tokenizer: Any) -> Path:
    """A model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_torchvision(name: str) -> torch.nn.Module:
    """A randomly initialised model, batch norms with statistics of their own."""
    network = get_model(name, weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    if name.startswith("vit"):
        torch.nn.init.normal_(network.heads.head.weight, std=0.02)  # torchvision starts it at zero
    return network


def make_pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Random patches of colour of these sizes (width, height)."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 255, (7, 9, 3), np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]
