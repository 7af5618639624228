import os
import subprocess
import sys
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import encoded
from PIL import Image

from feats.errors import RowError
from feats.images import AUGMENTATION, augment, hash64, read_image
from feats.records import TarSlice

COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [128, 128, 128], [250, 240, 230]]], np.uint8
)


def picture(size=(32, 24), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def read(tmp_path):
    """Write bytes (or save an image) under a .jpg name and read it back as an array."""

    def read(data, kind=None, **options):
        path = tmp_path / "picture.jpg"
        path.write_bytes(encoded(data, kind, **options) if kind else data)
        image, _ = read_image(path)
        assert image.mode == "RGB"
        return np.asarray(image)

    return read


def test_jpeg_equals_plain_pil(tmp_path):
    path = tmp_path / "a.jpg"
    picture((123, 77)).save(path, quality=90)
    image, digest = read_image(path)
    assert np.array_equal(image, Image.open(path).convert("RGB"))
    assert digest == hash64(path.read_bytes())


def test_hash_is_64_bits_of_blake2b():
    assert hash64(b"") == 0xE4A6A0577479B2B4  # the published digest of blake2b-64 over nothing
    assert hash64(b"a") != hash64(b"b")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_under_a_jpg_name(read, kind):
    assert np.array_equal(read(Image.fromarray(COLOURS), kind), COLOURS)


def test_webp_under_a_jpg_name(read):
    assert np.array_equal(read(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS)


# What each EXIF orientation stores, seen from the upright array.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(read, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](COLOURS)))
    assert np.array_equal(read(stored, "PNG", exif=exif), COLOURS)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_exif_does_not_cost_the_picture(read, exif):
    image = picture()
    assert np.array_equal(read(image, "JPEG", exif=exif), np.asarray(Image.open(BytesIO(encoded(image, "JPEG")))))


def test_cmyk(read):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0] = 255  # cyan only: no red
    pixels = read(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    assert np.abs(pixels.astype(int) - [0, 255, 255]).max() <= 2
    white = read(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=100)
    assert white.min() >= 253


def test_sixteen_bit_grey_is_scaled_not_clipped(read):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read(Image.fromarray(levels), "PNG")[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    assert read(Image.fromarray(levels), "TIFF")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read(Image.fromarray(levels.astype(">u2")), "TIFF")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_float_grey_is_scaled(read, top):
    values = np.array([[0.0, 0.5, 1.0]], np.float32) * np.float32(top)
    assert read(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 128, 255]


def test_float_with_nan_and_negatives(read):
    values = np.array([[-1.0, np.nan, 1.0]], np.float32)
    assert read(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("mode", "pixel", "expected"), [
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ("LA", (100, 0), (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("1", 0, (0, 0, 0)),
])  # fmt: skip
def test_alpha_and_greys(read, mode, pixel, expected):
    assert read(Image.new(mode, (3, 2), pixel), "PNG").reshape(-1, 3).tolist() == [list(expected)] * 6


def test_palette_with_and_without_transparency(read):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert read(image, "PNG")[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert read(image, "PNG", transparency=0)[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert read(image, "PNG", transparency=b"\xff\x00")[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert read(image, "GIF", transparency=1)[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_transparent_colour_of_an_rgb_png(read):
    pixels = read(Image.fromarray(COLOURS), "PNG", transparency=(255, 0, 0))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(read, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = read(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert pixels.reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


def test_slice_of_a_tar(tmp_path):
    data = encoded(picture(), "PNG")
    (tmp_path / "a.tar").write_bytes(b"x" * 100 + data + b"y" * 50)
    image, digest = read_image(TarSlice(tmp_path / "a.tar", 100, len(data), "a.png"))
    assert np.array_equal(image, picture())
    assert digest == hash64(data)
    with pytest.raises(RowError, match="^picture is truncated$"):
        read_image(TarSlice(tmp_path / "a.tar", 100, len(data) + 1000, "a.png"))


def bomb():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD_BYTES = [
    (b"", "picture file is empty"),
    (b"this is no picture", "not a picture PIL can read"),
    (b"\x00" * 1000, "not a picture PIL can read"),
    (encoded(picture(), "JPEG")[:15], "picture is truncated"),
    (encoded(picture((200, 200)), "JPEG")[:5000], "picture is truncated"),
    (encoded(picture(), "PNG")[:1000], "picture is truncated"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture PIL can read"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture PIL can read"),
    (bomb(), f"decompression bomb: more than {Image.MAX_IMAGE_PIXELS} pixels"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_BYTES)
def test_bad_bytes(read, data, reason):
    with warnings.catch_warnings(), pytest.raises(RowError) as caught:
        warnings.simplefilter("error")
        read(data)
    assert str(caught.value) == reason


def test_no_byte_of_a_picture_can_raise_anything_else(read):
    rng = np.random.default_rng(0)
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
        whole = encoded(picture(), kind)
        for _ in range(60):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 4):
                data[position] = rng.integers(256)
            try:
                read(bytes(data))
                outcomes.add("read")
            except RowError as error:
                assert str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_bad_paths(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "folder.jpg": "picture is a folder",
        "loop.jpg": "picture file is a symlink loop",
        "dangling.jpg": "picture file is missing",
        "missing.jpg": "picture file is missing",
        "pipe.jpg": "picture is not a regular file",
        "nul\0.jpg": "picture file cannot be read: not a valid file name",
        "x" * 300 + ".jpg": "picture file cannot be read: File name too long",
    }
    for name, reason in reasons.items():
        with pytest.raises(RowError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value) == reason
    with pytest.raises(RowError, match="^no picture file$"):
        read_image(None)


def test_permission_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    picture().save(path)
    if os.geteuid() == 0:  # root may read anything: let the system call refuse

        def refuse(self, *_):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(path), "open", refuse)
    else:
        path.chmod(0)
    with pytest.raises(RowError, match="^no permission to read the picture file$"):
        read_image(path)


def test_warnings_do_not_leak_and_filters_come_back(read):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x00\x01\x02\0\xff\0\0\0\xff\xff\0\0"  # PIL remarks on corrupt EXIF data
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        read(picture(), "JPEG", exif=exif)
    assert not heard
    assert warnings.filters == before


def test_augment_is_seeded_and_leaves_the_global_state_alone():
    image = picture((64, 48))
    state = torch.get_rng_state()
    first = augment(image, 2**64 - 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = augment(image, 2**64 - 1)
    assert first.size == image.size and first.mode == "RGB"
    assert np.array_equal(first, again)
    assert not np.array_equal(first, image)
    assert not np.array_equal(first, augment(image, 7))


def test_augment_flips_about_half_and_fills_white():
    half = np.zeros((40, 40, 3), np.uint8)
    half[:, 20:] = 200
    views = np.stack([np.asarray(augment(Image.fromarray(half), seed)).astype(int) for seed in range(60)])
    left_brighter = views[:, 10:30, 12:15].mean((1, 2, 3)) > views[:, 10:30, 25:28].mean((1, 2, 3))
    assert 15 <= left_brighter.sum() <= 45
    assert AUGMENTATION["horizontal_flip"] == 0.5
    black = [np.asarray(augment(Image.new("RGB", (40, 40)), seed)) for seed in range(20)]
    corners = np.stack([view[[0, 0, -1, -1], [0, -1, 0, -1]] for view in black])
    assert corners.max() > 200  # what turns in from outside is white (colour jitter may dim it), not black


def test_import_needs_no_torch():
    code = "import sys, feats.images, feats.records; assert not {'torch', 'torchvision'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
