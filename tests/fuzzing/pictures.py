"""Pictures: small files of each format that is read, and changes of what they are made of, not only of their bytes."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from PIL import Image, ImageCms

from feats.errors import RowError
from feats.images import FORMATS, MAX_PIXELS, ResizeCrop, augment, picture_size, read_image, read_reduced
from tests.fuzzing.mutations import INTERESTING, mutated, number
from tests.fuzzing.outcomes import Outcome, expect, judged, made

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "P", "1", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "I;16", "F", "I", "CMYK", "LAB", "YCbCr"),
}
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")


def _image(rng: Random, mode: str) -> Image.Image:
    size = rng.randint(1, 24), rng.randint(1, 24)
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    if mode == "I;16":
        return noise.convert("I").convert(mode)
    if mode == "LAB":
        return Image.frombytes(mode, size, noise.tobytes())
    return noise.convert("L").convert(mode) if mode in ("F", "I", "LA") else noise.convert(mode)


def picture(rng: Random, kind: str) -> bytes:
    """A file that is whole."""
    image, out = _image(rng, rng.choice(MODES[kind])), io.BytesIO()
    options: dict[str, object] = {}
    if kind in ANIMATED and rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [image.copy() for _ in range(rng.randint(1, 3))], "duration": 10}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
        options["exif"] = exif.tobytes()
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.2:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        options["icc_profile"] = mutated(rng, profile) if rng.random() < 0.5 else profile
    if kind == "JPEG":
        options |= {"progressive": rng.random() < 0.3, "quality": rng.randint(1, 95)}
    if kind == "TIFF":
        options["compression"] = rng.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
    if kind == "PNG" and image.mode == "P":
        options["transparency"] = rng.choice([0, b"\x00\x80\xff"])
    try:
        image.save(out, kind, **options)
    except (OSError, ValueError, RuntimeError, KeyError):  # not of this mode
        out = io.BytesIO()
        image.convert("RGB").save(out, kind)
    return out.getvalue()


# -- what files are made of: pieces of bytes that joined are the file, and how to make one fit again ---------------


def _jpeg(data: bytes) -> list[bytes]:
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xD9, 0xDA):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def _png(data: bytes) -> list[bytes]:
    parts, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def _png_fitting(part: bytes) -> bytes:
    """A chunk with a length and a checksum of what it holds."""
    if len(part) < 12:
        return part
    return struct.pack(">I", len(part) - 12) + part[4:-4] + struct.pack(">I", zlib.crc32(part[4:-4]))


def _gif(data: bytes) -> list[bytes]:
    table = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    parts, at = [data[:13], data[13 : 13 + table]], 13 + table
    while at < len(data):
        end = at + 1
        if data[at] == 0x21:
            end = at + 2
        elif data[at] == 0x2C:
            end = at + 10 + ((3 << (data[at + 9] & 7) + 1) if data[at + 9 : at + 10] and data[at + 9] & 0x80 else 0) + 1
        if data[at] in (0x21, 0x2C):
            while end < len(data) and data[end]:
                end += data[end] + 1
            end += 1
        parts.append(data[at:end])
        at = end
    return parts


def _riff(data: bytes) -> list[bytes]:
    parts, at = [data[:12]], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def _bmp(data: bytes) -> list[bytes]:
    begin = min(len(data), int.from_bytes(data[10:14], "little"))
    return [data[:14], data[14:begin], data[begin:]]


def _tiff(data: bytes) -> list[bytes]:
    """The header, what lies before the directory, its entries, the rest. Little-endian, as the library writes it."""
    at = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[at : at + 2], "little")
    entries = [data[at + 2 + 12 * k : at + 14 + 12 * k] for k in range(count)]
    return [data[:8], data[8:at], data[at : at + 2], *entries, data[at + 2 + 12 * count :]]


PARTS: dict[str, Callable[[bytes], list[bytes]]] = {
    "JPEG": _jpeg, "PNG": _png, "GIF": _gif, "WEBP": _riff, "BMP": _bmp, "TIFF": _tiff,
}  # fmt: skip


def _field_changed(rng: Random, part: bytes) -> bytes:
    """A number in a header, of whatever it tells."""
    at, size = rng.randrange(max(1, min(len(part), 48))), rng.choice((1, 2, 4))
    return part[:at] + number(rng, size, rng.choice("<>")) + part[at + size :]


def restructured(rng: Random, kind: str, data: bytes) -> bytes:
    """Parts left out, repeated, in another order, of another size, with other numbers."""
    parts = PARTS[kind](data)
    for _ in range(rng.randint(1, 3)):
        at, change = rng.randrange(len(parts)), rng.randrange(7)
        if change == 0:
            del parts[at]
            parts = parts or [b""]
        elif change == 1:
            parts[at:at] = [parts[at]] * rng.choice((1, 2, 100))
        elif change == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif change == 3:
            parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)]
        elif change == 4 and parts[at]:
            parts[at] = mutated(rng, parts[at], 2)
        else:
            parts[at] = _field_changed(rng, parts[at])
        if kind == "PNG" and rng.random() < 0.9:
            parts = [part if part.startswith(b"\x89PNG") else _png_fitting(part) for part in parts]
    if kind == "JPEG" and rng.random() < 0.1:
        size = rng.choice(INTERESTING) % 65536
        parts = [
            part[:5] + struct.pack(">HH", size, rng.choice((1, size))) + part[9:]
            if part[:2] in (b"\xff\xc0", b"\xff\xc2")
            else part
            for part in parts
        ]
    return b"".join(parts)


def read_picture(path: Path, seed: int) -> None:
    """By every way in."""
    size = None
    try:
        size = picture_size(path)
    except RowError:
        pass
    image, _ = read_image(path)
    expect(image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS, f"{image.mode} {image.size}")
    expect(size is not None, "read, but its size isn't known")
    small = read_reduced(path, 8)
    expect(small.mode == "RGB" and min(small.size) >= 1, f"reduced {small.mode} {small.size}")
    expect(ResizeCrop(16, 14, "bilinear")(image).size == (14, 14), "not resized")
    if seed % 50 == 0 and image.width * image.height < 10_000:
        expect(augment(image, seed).size == image.size, "not augmented")


def hostile_picture(kind: str, rng: Random, folder: Path) -> Outcome:
    """A file of a format, most often changed."""
    data = picture(rng, kind)
    if rng.random() < 0.9:
        data = restructured(rng, kind, data) if rng.random() < 0.7 else mutated(rng, data)
    path = made(rng, folder) / rng.choice(["a.jpg", "a.png", "a.gif"])
    path.write_bytes(data)
    return judged(folder, lambda: read_picture(path, rng.randrange(1000)))


PICTURES = {name.lower(): partial(hostile_picture, name) for name in FORMATS}
