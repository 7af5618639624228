"""Pictures resized as tensors: close to PIL's pixels, told by the fingerprint, and done again by whoever reads that."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_course
from PIL import Image

from feats import pixels_extract_feats
from feats.encoders.registry import ENCODERS, load_encoder
from feats.errors import UsageError
from feats.images import ResizeCrop
from feats.store import FeatureStore
from modeling.runs.encoders import encoder_of

SIZES = [(640, 480), (300, 500), (225, 226), (90, 60), (40, 900)]
OF_PICTURES = [name for name, spec in ENCODERS.items() if "resizer" in spec.options]


def picture(size: tuple[int, int]) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(sum(size))
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(small, np.int16) + rng.integers(-8, 9, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_torch_s_own_resizing_in_float(size: tuple[int, int], interpolation: str):
    image = picture(size)
    pil, ours = (ResizeCrop(64, 56, interpolation, by)(image) for by in ("pil", "torch"))
    assert ours.size == pil.size == (56, 56) and ours.mode == "RGB"
    found, other = (np.asarray(x, np.int16) for x in (ours, pil))
    assert np.abs(found - other).mean() < 0.5
    width, height = (max(64, int(64 * side / min(size))) for side in size)
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    if max(size) > 16 * min(size):
        exact = exact[:, :, 130:770]  # 40 * 16 rows of the middle
        height = 1024
    exact = F.interpolate(exact, (height, width), mode=interpolation, antialias=True)[0]
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    exact = exact[:, top : top + 56, left : left + 56].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(found - exact).mean() < 0.5
    assert np.abs(found - exact).max() < 12  # rounded to 8 bits between both directions


def test_other_interpolations_are_refused():
    ResizeCrop(8, 8, "lanczos")
    with pytest.raises(
        UsageError, match="`resizer` torch can't interpolate lanczos, only bilinear and bicubic; use pil"
    ):
        ResizeCrop(8, 8, "lanczos", "torch")


def test_the_option_is_every_picture_encoder_s():
    assert OF_PICTURES == ["clip", "resnet", "vit", "efficientnet", "pixels"]


def test_identity_tells_of_torch_and_not_of_pil():
    plain, named, other = (
        load_encoder("pixels", size=16, **by) for by in ({}, {"resizer": "pil"}, {"resizer": "torch"})
    )
    assert plain.identity == named.identity and "resizer" not in json.dumps(plain.identity)
    assert other.identity == {**plain.identity, "resizer": "torch"}
    with pytest.raises(UsageError, match="unknown `resizer` cv2; there are pil, torch|unknown `resizer` 'cv2'"):
        load_encoder("pixels", resizer="cv2")


def test_features_stay_close(tmp_path: Path):
    pictures = [picture(size) for size in SIZES[:4]]
    pil, ours = (load_encoder("efficientnet", "lite0", resizer=by).encode(pictures)["image"] for by in ("pil", "torch"))
    cosine = (pil * ours).sum(1) / np.linalg.norm(pil, axis=1) / np.linalg.norm(ours, axis=1)
    assert (cosine > 0.995).all() and not np.array_equal(pil, ours)


def test_a_cache_says_what_resized_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    course = make_course(tmp_path / "set", 12, size=(48, 64))
    (course / "data" / "3.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    command = ["--data", str(course), "--splits", "train", "--size", "16", "--device", "cpu", "--out"]
    made = {}
    for name, more in {"a": [], "b": ["--resizer", "torch"], "c": ["--resizer", "torch", "--workers", "0"]}.items():
        assert pixels_extract_feats.main([*command, str(tmp_path / name), *more]) == 0
        made[name] = (tmp_path / name / "pixels_train.h5").read_bytes()
    assert made["b"] == made["c"] != made["a"]
    with FeatureStore.open(tmp_path / "b" / "pixels_train.h5") as store:
        fingerprint = store.fingerprint
        quarantined = int((store.status == 2).sum())
    assert fingerprint["resizer"] == "torch"
    capsys.readouterr()
    assert pixels_extract_feats.main([*command, str(tmp_path / "a"), "--resizer", "torch"]) == 2
    error = capsys.readouterr().err
    assert "resizer" in error and "made by something else" in error
    reasons = [path.read_text() for path in (tmp_path / "a").glob("*quarantine*")]
    assert reasons == [path.read_text() for path in (tmp_path / "b").glob("*quarantine*")]
    assert (quarantined, len(reasons)) == (1, 1)
    again = encoder_of("pixels", fingerprint, device=torch.device("cpu"))
    assert again.image_side().preprocess.resizer == "torch"
