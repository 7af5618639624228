"""Image encoders against plain transformers calls on tiny random models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoding import image_features
from tiny_models import make_pictures
from torchvision.transforms import functional as TF
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
GRID = {"image_size": 64, "patch_size": 16}
BEFORE = {"vit": 1, "classifier": 1, "deit": 2, "dinov2": 5, "swin": 0}  # tokens before the patches
PREPROCESSOR = {
    "do_center_crop": True,
    "size": {"shortest_edge": 72},
    "crop_size": {"height": 64, "width": 64},
    "resample": 3,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "swin":
        return SwinModel(SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4))
    model, config = {
        "vit": (ViTModel, ViTConfig),
        "classifier": (ViTForImageClassification, ViTConfig),
        "deit": (DeiTModel, DeiTConfig),
        "dinov2": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
    }[kind]
    return model(config(**SHAPE, **GRID))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders, one of each kind of `BEFORE`, weights drawn wide enough for every part to show in the result."""
    root = tmp_path_factory.mktemp("models")
    for kind in BEFORE:
        network = make(kind)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        network.save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return root


def load(folder: Path, pooling: str = "cls", **options) -> Encoder:
    return load_encoder("vit", str(folder), pooling=pooling, **options)


def reference_pixels(size: int = 64) -> torch.Tensor:
    """Shorter side to 72, bicubic, centre of 64, normalised: written with torchvision's functions."""
    mode = TF.InterpolationMode.BICUBIC
    cropped = [TF.center_crop(TF.resize(picture, [72], mode), [size, size]) for picture in PICTURES]
    mean, std = PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"]
    return torch.stack([TF.normalize(TF.to_tensor(picture), mean, std) for picture in cropped])


PICTURES = make_pictures([(90, 70), (64, 200), (72, 72)])


@pytest.mark.parametrize("kind", BEFORE)
def test_equals_plain_transformers(models: Path, kind: str):
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(models / kind).eval()(pixel_values=reference_pixels()).last_hidden_state
    patches = hidden[:, BEFORE[kind] :]
    assert patches.shape[1] == (4 * 4 if kind != "swin" else 8 * 8)
    out = image_features(load(models / kind, "mean", tokens=True), PICTURES)
    torch.testing.assert_close(out["feats"], patches.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["tokens"], patches, atol=1e-5, rtol=1e-5)
    if BEFORE[kind]:
        out = image_features(load(models / kind), PICTURES)
        assert out["feats"].dtype is torch.float32 and out.keys() == {"feats"}
        torch.testing.assert_close(out["feats"], hidden[:, 0], atol=1e-5, rtol=1e-5)


def test_identity_and_weights_elsewhere(models: Path, tmp_path: Path):
    encoder = load(models / "vit", "mean")
    assert encoder.identity == {
        "encoder": "vit",
        "model": "vit",
        "weights_sha256": sha256_of(models / "vit" / "model.safetensors"),
        "pooling": "mean",
        "preprocess": {
            "resize": 72,
            "crop": 64,
            "interpolation": "bicubic",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4],
        },
    }
    trained = ViTModel.from_pretrained(models / "vit")
    with torch.no_grad():
        trained.embeddings.cls_token.add_(1)
    trained.save_pretrained(tmp_path / "other")
    file = shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "tuned.safetensors")
    elsewhere = load(models / "vit", weights=str(file))
    with torch.inference_mode():
        expected = trained.eval()(reference_pixels()).last_hidden_state[:, 0]
    torch.testing.assert_close(image_features(elsewhere, PICTURES)["feats"], expected, atol=1e-5, rtol=1e-5)
    assert elsewhere.identity["weights_sha256"] == sha256_of(file)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, (64, 64, "bilinear", [0.5] * 3, [0.5] * 3)),
        ({}, (64, 64, "bilinear", [0.5] * 3, [0.5] * 3)),
        ({"size": 64, "resample": 3, "image_std": [0.1] * 3}, (64, 64, "bicubic", [0.5] * 3, [0.1] * 3)),
        ({"size": {"height": 64, "width": 64}, "crop_size": 32}, (64, 64, "bilinear", [0.5] * 3, [0.5] * 3)),
        ({"do_normalize": False, "rescale_factor": 0.00392156862745098}, (64, 64, "bilinear", [0.0] * 3, [1.0] * 3)),
    ],
)
def test_preprocessing_is_the_folder_s(models: Path, tmp_path: Path, settings: dict | None, expected: tuple):
    folder = with_preprocessor(models, tmp_path, settings)
    side = load(folder).image
    made = side.preprocess
    assert (made.resize, made.crop, made.interpolation, side.mean, side.std) == expected


def with_preprocessor(models: Path, tmp_path: Path, settings: dict | str | None) -> Path:
    folder = shutil.copytree(models / "vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (folder / "preprocessor_config.json").write_text(text)
    return folder


def test_a_vit_of_the_usual_size_without_preprocessing():
    from feats.encoders.huggingface_image import read_preprocessor

    made, mean, std = read_preprocessor(Path("nowhere"), ViTConfig())
    assert (made.resize, made.crop, mean, std) == (224, 224, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 64, "width": 32}}, "preprocessor_config.json asks for other preprocessing.*'width': 32"),
        ({"size": {"longest_edge": 64, "shortest_edge": 32}}, "longest_edge"),
        ({"rescale_factor": 1 / 127.5}, "pixels aren't scaled"),
        ({"do_rescale": False}, "pixels aren't scaled"),
        ({"image_mean": [0.5]}, "not three colours"),
        ({"do_center_crop": True, "size": 64, "crop_size": 72}, "a crop larger"),
        ({"resample": 17}, "17 is not a valid Resampling"),
        ("{", "preprocessor_config.json"),
        ({"size": 48}, "doesn't work as an image encoder.*google/vit"),
    ],
)
def test_other_preprocessing_is_refused(models: Path, tmp_path: Path, settings: dict | str, message: str):
    with pytest.raises(UsageError, match=message) as refused:
        load(with_preprocessor(models, tmp_path, settings))
    assert "\n" not in str(refused.value)


def test_models_that_cannot_be_used(models: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="SwinModel, which has no class token; use `pooling` mean"):
        load(models / "swin")
    with pytest.raises(UsageError, match="no model folder at .*nowhere.*google/vit"):
        load(tmp_path / "nowhere")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
    with pytest.raises(UsageError, match="ResNetModel, which doesn't work as an image encoder.*no sequence"):
        load(tmp_path / "resnet", "mean")
    sides = {"text_config": {**SHAPE, "vocab_size": 9}, "vision_config": {**SHAPE, **GRID}}
    CLIPModel(CLIPConfig(**sides)).save_pretrained(tmp_path / "clip")
    with pytest.raises(UsageError, match="CLIPModel, which doesn't work as an image encoder"):
        load(tmp_path / "clip", "mean")
    folder = shutil.copytree(models / "vit", tmp_path / "vit")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UsageError, match="can't be loaded as an image encoder"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks weights"):
        load(folder)


def test_lost_weights_are_refused_except_for_the_pooler_s(models: Path, tmp_path: Path):
    network = ViTModel(ViTConfig(**SHAPE, **GRID), add_pooling_layer=False)
    network.save_pretrained(tmp_path / "bare")
    assert image_features(load(tmp_path / "bare"), PICTURES)["feats"].shape == (3, 32)
    assert not any(name.startswith("pooler") for name in load(models / "vit").image.network.state_dict())
    lost = {k: v for k, v in network.state_dict().items() if k != "layernorm.weight"}
    network.save_pretrained(tmp_path / "lost", state_dict=lost)
    with pytest.raises(UsageError, match=r"lacks 1 weights of its ViTModel \(layernorm.weight, ...\)"):
        load(tmp_path / "lost")


def test_bf16_stays_close(models: Path):
    full, half = (image_features(load(models / "vit", dtype=t), PICTURES)["feats"] for t in ("fp32", "bf16"))
    assert half.dtype is torch.float32
    assert torch.cosine_similarity(full, half).min() > 0.999
