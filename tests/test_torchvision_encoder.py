"""torchvision encoders against the plain models and their weights' own transforms, with random weights."""

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ENVIRONMENT
from encoding import image_features
from PIL import Image
from safetensors.torch import save_file
from tiny_models import make_torchvision
from torchvision.models import get_model_weights
from torchvision.transforms import functional as TF

from feats.encoders.convolutional import fold_batch_norms
from feats.encoders.registry import load_encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError
from feats.extraction.encode import encode_block
from feats.extraction.plan import make_plan
from feats.extraction.settings import ExtractionSettings
from feats.images import ResizeCrop
from feats.records import Record

MODELS = ["resnet18", "vit_b_16"]
EACH = [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shapes = [(300, 200), (97, 640), (224, 224), (31, 30)]
    small = [Image.fromarray(generator.integers(0, 256, (12, 9, 3), np.uint8)) for _ in shapes]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(small, shapes, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.nn.Module, Path]]:
    """Randomly initialised models, batch norms with statistics of their own, and their state-dict files."""
    torch.manual_seed(0)
    made = {}
    for name in MODELS:
        network = make_torchvision(name)
        path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
        torch.save(network.state_dict(), path)
        made[name] = network, path
    return made


@pytest.mark.parametrize("name", EACH)
def test_equals_plain_torchvision(models, pictures, name: str):
    network, path = models[name]
    transform = get_model_weights(name).DEFAULT.transforms()
    seen = {}
    hook = (network.avgpool if name == "resnet18" else network.encoder).register_forward_hook(
        lambda module, args, out: seen.update(input=args[0], output=out)
    )
    with torch.inference_mode():
        logits = network(torch.stack([transform(image) for image in pictures]))
    hook.remove()
    if name == "resnet18":
        pooled = seen["output"].flatten(1)
        tokens = torch.stack([seen["input"][:, :, i, j] for i in range(7) for j in range(7)], 1)
    else:
        pooled, tokens = seen["output"][:, 0], seen["output"][:, 1:]

    out = image_features(load_encoder("resnet", name, str(path), tokens=True), pictures)
    torch.testing.assert_close(out["feats"], pooled, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out["tokens"], tokens, atol=2e-4, rtol=1e-3)
    assert out["tokens"].shape[1] == {"resnet18": 49, "vit_b_16": 196}[name]
    out = image_features(load_encoder("resnet", name, str(path), layer="logits"), pictures[:2])
    torch.testing.assert_close(out["feats"], logits[:2], atol=5e-5, rtol=1e-3)
    assert out.keys() == {"feats"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_b_16"])
def test_preprocessing_gives_the_presets_pixels(pictures, name: str):
    preset = get_model_weights(name).DEFAULT.transforms()
    preprocess = ResizeCrop(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value)
    preprocess = pickle.loads(pickle.dumps(preprocess))
    for image in pictures:
        ours = TF.normalize(TF.to_tensor(preprocess(image)), preset.mean, preset.std)
        assert torch.equal(ours, preset(image))


@pytest.mark.parametrize(
    "interpolation", ["bilinear", "bicubic", "nearest", "nearest-exact", "lanczos", "box", "hamming"]
)
@pytest.mark.parametrize("resize, crop", [(32, 32), (37, 24), (24, 33), (1, 1)])
def test_preprocessing_gives_torchvision_s_pixels(resize: int, crop: int, interpolation: str):
    """Also where a side is odd, or the crop larger than the picture. (Longer ones than 16 to 1 lose their ends first.)"""
    rng = np.random.default_rng(0)
    for width, height in ((48, 64), (65, 47), (16, 1), (31, 31), (100, 7)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        made = ResizeCrop(resize, crop, interpolation)(image)
        expected = TF.center_crop(TF.resize(image, [resize], TF.InterpolationMode(interpolation)), [crop])
        assert made.tobytes() == expected.tobytes() and made.size == expected.size == (crop, crop)


def test_a_very_long_picture_is_resized_in_little_memory():
    strip = Image.new("RGB", (60_000, 3), "red")
    strip.paste("blue", (29_990, 0, 30_010, 3))
    made = ResizeCrop(232, 224, "bilinear")(strip)
    assert made.size == (224, 224)
    assert made.getpixel((112, 112)) == (0, 0, 255)


def test_folding_keeps_the_values():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=3).eval()
    example = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(example)
        fold_batch_norms(network)
        torch.testing.assert_close(network(example), before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", EACH)
def test_bf16_stays_close_and_rows_do_not_depend_on_the_batch(models, pictures, name: str):
    encoder = load_encoder("resnet", name, str(models[name][1]))
    pictures = pictures[:2]
    full = image_features(encoder, pictures)["feats"]
    half = load_encoder("resnet", name, str(models[name][1]), dtype=torch.bfloat16)
    assert torch.cosine_similarity(full, image_features(half, pictures)["feats"].float()).min() > 0.999
    alone = image_features(encoder, pictures[1:2])["feats"]
    torch.testing.assert_close(full[1:2], alone, atol=1e-5, rtol=1e-4)


def test_identity_and_file_formats(models, pictures, tmp_path: Path):
    network, path = models["resnet18"]
    save_file(network.state_dict(), tmp_path / "same.safetensors")
    plain, safe = (load_encoder("resnet", "resnet18", str(p)) for p in (path, tmp_path / "same.safetensors"))
    assert torch.equal(image_features(plain, pictures)["feats"], image_features(safe, pictures)["feats"])
    assert plain.identity == {
        "encoder": "resnet",
        "model": "resnet18",
        "weights_sha256": sha256_of(path),
        "layer": "pooled",
        "preprocess": {
            "resize": 256,
            "crop": 224,
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    assert not any(parameter.requires_grad for parameter in image_features(plain, pictures).values())


def test_bad_weights_and_names(models, tmp_path: Path):
    path = models["resnet18"][1]
    with pytest.raises(UsageError, match="unknown torchvision model 'vgg11'; there are .*resnet50.*vit_b_16"):
        load_encoder("resnet", "vgg11")
    with pytest.raises(UsageError, match="IMAGENET1K_V7: no such file, and resnet50 has only .*IMAGENET1K_V2"):
        load_encoder("resnet", "resnet50", "IMAGENET1K_V7")
    with pytest.raises(UsageError, match="doesn't fit resnet34"):
        load_encoder("resnet", "resnet34", str(path))
    wrong = torch.load(path, weights_only=True)
    wrong["fc.weight"] = wrong["fc.weight"][:7]
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(UsageError, match=r"doesn't fit resnet18 \(size mismatch for fc.weight") as refused:
        load_encoder("resnet", "resnet18", str(tmp_path / "wrong.pth"))
    assert "\n" not in str(refused.value)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("module.pth", "list.pth", "empty.pth", "text.pth", "text.safetensors"):
        with pytest.raises(UsageError, match=f"{name} .*(state dict|tensors)"):
            load_encoder("resnet", "resnet18", str(tmp_path / name))


def test_cache_then_download_then_one_clear_error(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        UsageError, match=r"no weights for torchvision resnet18.*cache.*\(2\) https.*no route.*`weights`"
    ):
        load_encoder("resnet", "resnet18")
    cached = tmp_path / "checkpoints" / Path(get_model_weights("resnet18").DEFAULT.url).name
    cached.write_bytes(b"half a download")
    with pytest.raises(UsageError, match="damaged: its sha256 doesn't start with .*delete it"):
        load_encoder("resnet", "resnet18", "IMAGENET1K_V1")
    monkeypatch.setattr(
        "feats.encoders.torchvision_image.sha256_of", lambda path: cached.stem.rpartition("-")[2] + "00"
    )
    cached.write_bytes(models["resnet18"][1].read_bytes())
    assert load_encoder("resnet", "resnet18").identity["model"] == "resnet18"


@pytest.mark.parametrize(("dtype", "rounded"), [("fp32", False), ("bf16", True)])
def test_fp32_is_never_rounded_to_tf32(
    models, pictures, dtype: str, rounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What cuDNN may do with float32 is set while a forward pass runs, and as it was before and after."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    encoder = load_encoder("resnet", "resnet18", models["resnet18"][1], device="cpu", dtype=dtype)
    side, seen = encoder.image_side(), []

    def watched(pixels: torch.Tensor, forward=side.forward):
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(pixels)

    monkeypatch.setattr(side, "forward", watched)
    encoder.encode(pictures)
    assert set(seen) == {rounded}
    pictures[0].save(tmp_path / "a.png")
    plan = make_plan(encoder, [Record("a", tmp_path / "a.png", None)], ExtractionSettings())
    seen.clear()
    encode_block(plan, 0)
    assert set(seen) == {rounded} and torch.backends.cudnn.allow_tf32


NEWER_SWITCH = """
    import torch
    from feats.acceleration import full_products
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    torch.backends.fp32_precision = "tf32"
    for dtype in (torch.float32, torch.bfloat16):
        with full_products(dtype):
            print(*(place.fp32_precision for place in places))
        print(*(place.fp32_precision for place in places))
"""


def test_fp32_is_full_beside_torch_s_newer_switch():
    """Where it is set, torch refuses to tell `allow_tf32`. In a process of its own: what was once set stays set."""
    command = [sys.executable, "-c", textwrap.dedent(NEWER_SWITCH)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["ieee ieee", *["tf32 tf32"] * 3], done.stderr
