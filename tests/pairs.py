"""Tiny encoders, and pairs whose pictures and texts both tell the class: what a model of any kind can learn in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import BERT_SHAPE, BERT_VOCABULARY, bert_tokenizer, make_clip, save_clip, save_transformer
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.records import read_dataset

CLASSES = ["bad", "good", "rain"]  # words of the tiny BERT
COLOURS = {"bad": (200, 40, 40), "good": (40, 200, 40), "rain": (40, 40, 200)}


def make_pairs(root: Path, rows: int = 24, test_rows: int = 4) -> Path:
    """A course set of which every picture has its class's colour and every text its class's word, both in noise."""
    rng = np.random.default_rng(rows)
    (root / "data").mkdir(parents=True)
    for i in range(rows + test_rows):
        name = CLASSES[i % 3]
        pixels = np.clip(rng.normal(COLOURS[name], 30, (6, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(root / "data" / f"{i}.jpg")
        words = [*rng.choice(["a", "the", "day", "movie", "very", "is"], rng.integers(0, 4)), name]
        rng.shuffle(words)
        (root / "data" / f"{i}.txt").write_text(f"{' '.join(words)} {i}\n")
    lines = [f"{i},{CLASSES[i % 3]}" for i in range(rows)]
    (root / "train.txt").write_text("\n".join(["guid,tag", *lines]) + "\n")
    lines = [f"{i},null" for i in range(rows, rows + test_rows)]
    (root / "test_without_label.txt").write_text("\n".join(["guid,tag", *lines]) + "\n")
    return root


def tiny_bert(folder: Path, layers: int = 4, dropout: float = 0.0, pooler: bool = False) -> dict[str, Any]:
    """Arguments of `load_encoder("roberta", ...)`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bert_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(BERT_VOCABULARY),
        max_position_embeddings=32,
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **BERT_SHAPE,
    )
    torch.manual_seed(0)
    return {"weights": str(save_transformer(folder, BertModel(config, add_pooling_layer=pooler), tokenizer))}


def tiny_vit(folder: Path, layers: int = 3) -> dict[str, Any]:
    """Arguments of `load_encoder("vit", ...)`."""
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": layers}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **shape, **dropout), add_pooling_layer=False)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    return {"weights": str(folder)}


def tiny_clip(folder: Path, family: str = "vit") -> dict[str, Any]:
    """Arguments of `load_encoder("clip", ...)`."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"weights": str(save_clip(make_clip(family), folder / f"{family}.pt"))}


def cache(encoder: Encoder, pairs: Path, folder: Path, name: str) -> None:
    """<folder>/<name>_train.h5 and <name>_test.h5."""
    folder.mkdir(parents=True, exist_ok=True)
    data = read_dataset(pairs)
    for split in data.splits:
        extract(encoder, data[split], folder / f"{name}_{split}.h5", ExtractionSettings(workers=0))


def cached_pairs(root: Path, rows: int = 24, tokens: bool = False, **bert: Any) -> dict[str, str]:
    """`root` with pairs in set/ and the caches vit and roberta, of tiny encoders, in feats/; returns their weights."""
    make_pairs(root / "set", rows)
    weights = {"vit": tiny_vit(root / "vit"), "roberta": tiny_bert(root / "bert", **bert)}
    for name, where in weights.items():
        cache(load_encoder(name, **where, tokens=tokens), root / "set", root / "feats", name)
    return {name: where["weights"] for name, where in weights.items()}
