"""Encoders of random weights, as checkpoints that the ordinary loading code reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoding import image_features, text_features
from safetensors.torch import load_file
from tiny_models import make_pictures
from transformers import BertModel, BertTokenizerFast, ViTModel

from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from modeling.finetuning.scratch import HEADS, LAYERS, WIDTH, untrained_text, untrained_vit
from modeling.heads.base import n_parameters
from modeling.heads.config import HeadConfig
from modeling.heads.registry import build_head

SMALL = {"layers": 2, "width": 24, "heads": 3}
TEXTS = ["What a lovely day at the beach!", "", "😀 #sunny"]


def test_a_text_encoder(tmp_path: Path):
    assert untrained_text(tmp_path / "text", **SMALL) == tmp_path / "text"
    encoder = load_encoder("roberta", str(tmp_path / "text"), pooling="cls", tokens=True)
    config = encoder.text.network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.intermediate_size, config.vocab_size, encoder.identity["max_length"]) == (96, 30522, 512)
    plain = BertModel.from_pretrained(tmp_path / "text").eval()
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "text")
    tokens = tokenizer.tokenize(TEXTS[0])
    assert tokens == "what a lovely day at the beach !".split()
    with torch.inference_mode():
        expected = [plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS]
    torch.testing.assert_close(text_features(encoder, TEXTS)["feats"], torch.stack(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="no trained pooler"):
        load_encoder("roberta", str(tmp_path / "text"), pooling="pooler")


@pytest.mark.parametrize("patch", [16, 32])
def test_an_image_encoder(patch: int, tmp_path: Path):
    encoder = load_encoder("vit", str(untrained_vit(tmp_path / "vit", patch=patch, **SMALL)), tokens=True)
    pictures = make_pictures([(80, 60)])
    out = image_features(encoder, pictures)
    assert out["feats"].shape == (1, 24) and out["tokens"].shape == (1, (224 // patch) ** 2, 24)
    config = encoder.image.network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.intermediate_size, config.patch_size, config.image_size) == (96, patch, 224)
    made = encoder.identity["preprocess"]
    assert (made["crop"], made["mean"], made["std"]) == (224, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("make", [untrained_text, untrained_vit])
def test_the_seed_alone_decides_the_bytes(make: Callable[..., Path], tmp_path: Path):
    torch.manual_seed(3)
    first = make(tmp_path / "a", seed=1, **SMALL)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    again, other = make(tmp_path / "b", seed=1, **SMALL), make(tmp_path / "c", seed=2, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files
    assert {p.name for p in other.iterdir() if p.read_bytes() != files[p.name]} == {"model.safetensors"}
    tensors = load_file(first / "model.safetensors")
    assert not any(name.startswith("pooler") for name in tensors)
    weights = next(x for name, x in tensors.items() if name.endswith("position_embeddings.weight") or x.dim() == 4)
    assert 0.01 < weights.std() < 0.04  # BERT's and ViT's start: 0.02


def test_writing_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture):
    untrained_text(tmp_path / "text", **SMALL), untrained_vit(tmp_path / "vit", **SMALL)
    assert capfd.readouterr() == ("", "")


def test_the_defaults_come_near_the_study_s_size():
    """125.646 M, of encoders and head. Counted without memory for the encoders."""
    from transformers import BertConfig, ViTConfig

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes["intermediate_size"] = 4 * WIDTH
    with torch.device("meta"):
        encoders = [
            BertModel(BertConfig(**sizes), add_pooling_layer=False),
            ViTModel(ViTConfig(**sizes), add_pooling_layer=False),
        ]
    widths = {"image_tokens": WIDTH, "image_positions": 196, "text_tokens": WIDTH}
    count = n_parameters(build_head(HeadConfig("cross_modal", D=512), widths, 3))
    count += sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert count == 127_228_675 and count == pytest.approx(125.646e6, rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "`layers` 0: expected 1 or more"),
        ({"width": -8}, "`width` -8: expected 1 or more"),
        ({"width": 10, "heads": 4}, "`width` 10: expected a multiple of `heads` 4"),
        ({"seed": -1}, "`seed` -1: expected 0 to"),
    ],
)
def test_sizes_that_make_no_model(sizes: dict[str, int], message: str, tmp_path: Path):
    for make in (untrained_text, untrained_vit):
        with pytest.raises(UsageError, match=message):
            make(tmp_path / "x", **sizes)
    with pytest.raises(UsageError, match="`patch` 14: expected 16 or 32"):
        untrained_vit(tmp_path / "x", patch=14)
    assert not any(tmp_path.iterdir())
