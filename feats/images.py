"""Path -> RGB image, whatever the file holds, or a reason; augmentation for cached views."""

import errno
import hashlib
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from feats.errors import RowError, UsageError
from feats.records import TarSlice

MAX_FILE_BYTES = 128 << 20  # the one budget of every way in, checked before a byte is read ...
_TOO_LARGE = f"picture file is larger than {MAX_FILE_BYTES >> 20} MB"
MAX_PIXELS = 89_478_485  # ... and before a pixel is decoded: PIL's own limit, fixed here whatever others set there
# What PIL may try. Left out are, above all, formats that start other programs (EPS: Ghostscript), and those that PIL
# decodes in Python, byte by byte, for minutes (plain PPM).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_BAND_PIXELS = 1 << 20  # converted at a time: what stands beside the picture and its RGB copy stays small

MAX_SCANS = 100  # of a JPEG: progressive ones have about ten, and each goes through all pixels, in 11 bytes of the file
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of a JPEG's segments; the others belong to a scan's data

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The views' parameters, part of the cache's fingerprint.
AUGMENTATION: dict[str, Any] = {
    "rotation_degrees": 10,
    "horizontal_flip": 0.5,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.05,
    "translate": 0.05,
    "scale": [0.9, 1.1],
    "fill": [255, 255, 255],
}


def read_image(source: Path | TarSlice | None) -> tuple[Image.Image, int]:
    """The picture as RGB, and the hash of its file's bytes (`hash64`). The file is read once.

    EXIF orientation is applied, transparency composited on white, of an animation the first frame taken, 16-bit and
    float values scaled to 8 bits. Raises `RowError` with the reason when there is no picture to be had.
    """
    data = _bytes_of(source)
    return decode_image(data), hash64(data)


def hash64(data: bytes) -> int:
    """64 bits of blake2b, as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def decode_image(data: bytes) -> Image.Image:
    """A picture file's bytes as an RGB image, see `read_image`. Raises `RowError`."""
    with _opened(data) as image:
        image.load()
        return as_rgb(image)


def read_reduced(source: Path | TarSlice | None, side: int) -> Image.Image:
    """As the picture of `read_image`, for a thumbnail: a JPEG may come at a fraction of its size, sides of 2 `side` or
    more, which is several times as fast. Raises `RowError`."""
    with _opened(_bytes_of(source)) as image:
        if image.format == "JPEG":
            image.draft("RGB", (2 * side, 2 * side))
        image.load()
        return as_rgb(image)


def picture_size(source: Path | TarSlice | None) -> tuple[int, int]:
    """Width and height of a picture by its header alone, before it is turned upright. Raises `RowError`."""
    with _opened(_bytes_of(source)) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture of which no pixel is decoded yet, within the budgets; whatever fails becomes `RowError`."""
    if len(data) > MAX_FILE_BYTES:
        raise RowError(_TOO_LARGE)
    # Filters are global to the process: call this from one thread of it (extraction decodes in processes).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on metadata and size: not for a progress bar's terminal
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if data.startswith(b"\xff\xd8") and _scans(data) > MAX_SCANS:
                    raise RowError(f"decompression bomb: more than {MAX_SCANS} scans")
                yield image
        except (MemoryError, RowError):
            raise
        except Exception as error:  # noqa: BLE001 - PIL's decoders raise anything on bad bytes
            raise RowError(_reason(error)) from None


def _scans(data: bytes) -> int:
    """How many scans a JPEG has; not counted beyond `MAX_SCANS` + 1."""
    at, scans = 2, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(data, at)) and found[0] != b"\xff\xd9":
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        scans += found[0] == b"\xff\xda"
    return scans


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as an RGB image: turned upright, transparency composited on white, wide values scaled to 8 bits."""
    return _upright(_to_rgb(image), _orientation(image))


def _bytes_of(source: Path | TarSlice | None) -> bytes:
    if source is None:
        raise RowError("no picture file")
    try:
        if isinstance(source, TarSlice):
            if source.size > MAX_FILE_BYTES:
                raise RowError(_TOO_LARGE)
            data = source.read()
            if len(data) < source.size:
                raise RowError("picture is truncated")
        else:
            data = _read_file(source)
    except ValueError:  # a NUL or a lone surrogate in the path
        raise RowError("picture file cannot be read: not a valid file name") from None
    except OSError as error:
        raise RowError(_file_reason(error)) from None
    if not data:
        raise RowError("picture file is empty")
    return data


def _read_file(path: Path) -> bytes:
    status = path.stat()  # asked before opening: a named pipe would block for ever
    if stat.S_ISDIR(status.st_mode):
        raise RowError("picture is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise RowError("picture is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise RowError(_TOO_LARGE)
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)  # it may grow meanwhile


def _file_reason(error: OSError) -> str:
    reasons = {
        errno.ENOENT: "picture file is missing",
        errno.ENOTDIR: "picture file is missing",
        errno.ELOOP: "picture file is a symlink loop",
        errno.EACCES: "no permission to read the picture file",
        errno.EPERM: "no permission to read the picture file",
    }
    code = error.errno or 0
    return reasons.get(code) or f"picture file cannot be read: {os.strerror(code) if code else error}"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture PIL can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: more than {MAX_PIXELS} pixels"
    if isinstance(error, (EOFError, struct.error)) or "truncated" in str(error).lower():
        return "picture is truncated"
    return f"picture cannot be decoded: {type(error).__name__}: {error}"[:200]


def _orientation(image: Image.Image) -> Any:
    try:
        orientation: Any = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - metadata may be broken in any way, the picture is whole
        return 1
    return orientation


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    turn = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and image.format == "JPEG":
        return image  # nearly all pictures: spared a copy
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(image)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return _by_bands(image, _on_white)
    return image.convert("RGB")


def _by_bands(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `to_rgb` makes of a picture, pixel by pixel, some rows of them at a time."""
    if image.width * image.height <= _BAND_PIXELS:
        return to_rgb(image)
    made = Image.new("RGB", image.size)
    for top, band in _bands(image):
        made.paste(to_rgb(band), (0, top))
    return made


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Each band of rows and where it begins."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys, scaled: PIL's own conversion cuts off what is over 255."""
    import numpy as np

    def values_of(part: Image.Image) -> np.ndarray:
        return np.nan_to_num(np.asarray(part, dtype=np.float64), posinf=0.0, neginf=0.0)

    extremes = [(values.min(), values.max()) for values in (values_of(band) for _, band in _bands(image))]
    low, high = float(min(least for least, _ in extremes)), float(max(most for _, most in extremes))
    # A float's range is not in the file: taken for the least usual one that holds all values.
    white = next((top for top in ((1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)) if high <= top), high)
    black = 0.0 if low >= 0 else low
    scale = 255.0 / ((white - black) or 1.0)

    def scaled(part: Image.Image) -> Image.Image:
        return Image.fromarray(np.rint((values_of(part) - black) * scale).astype(np.uint8)).convert("RGB")

    return _by_bands(image, scaled)


_OF_TENSORS = ("bilinear", "bicubic")  # what torch resizes uint8 tensors by, with antialiasing
LONGEST_RATIO = 16  # a picture longer than this loses its ends before it is resized


@dataclass(frozen=True)
class ResizeCrop:
    """Resize the shorter side to `resize`, then cut the central square of side `crop`: RGB image -> RGB image.

    Pixels are those of torchvision's Resize and CenterCrop, of PIL images with `resizer` pil, of uint8 tensors with
    torch, which round otherwise and take a third of the time. Only pictures of a side ratio above 16 first lose ends
    that the crop drops anyway: a 1 x 20000 strip would otherwise become gigabytes.

    Raises `UsageError` for an interpolation that `resizer` hasn't.
    """

    resize: int
    crop: int
    interpolation: str  # bilinear, bicubic, ...
    resizer: str = "pil"

    def __post_init__(self) -> None:
        if self.resizer == "torch" and self.interpolation not in _OF_TENSORS:
            raise UsageError(
                f"`resizer` torch can't interpolate {self.interpolation}, only {' and '.join(_OF_TENSORS)}; use pil"
            )

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture, (crop, crop)."""
        width, height = image.size
        longest = LONGEST_RATIO * min(width, height)
        if max(width, height) > longest:
            image = _center_crop(image, min(width, longest), min(height, longest))
            width, height = image.size
        if self.resizer == "torch":
            return self._as_tensor(image)
        short, long = sorted(image.size)
        resized = (self.resize, int(self.resize * long / short))
        # What torchvision calls nearest-exact is PIL's nearest.
        how = Image.Resampling[self.interpolation.removesuffix("-exact").upper()]
        image = image.resize(resized if width <= height else resized[::-1], how)
        return _center_crop(image, self.crop, self.crop)

    def _as_tensor(self, image: Image.Image) -> Image.Image:
        import numpy as np
        import torch
        from torchvision.transforms.v2 import InterpolationMode, functional

        mode = InterpolationMode(self.interpolation)
        # Channels stay last in memory, as torch's fastest kernel wants them.
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        x = functional.center_crop(functional.resize(x, [self.resize], mode, antialias=True), [self.crop])
        return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())

    def as_json(self, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
        """This, but for its resizer, and the normalisation that follows it in JSON values, for the fingerprint."""
        chosen = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        return {**chosen, "mean": list(mean), "std": list(std)}


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture, with black around one that is smaller: as torchvision's center_crop, whose import takes
    as long as that of torch."""

    def begin(there: int, wanted: int) -> int:
        return round((there - wanted) / 2) if there >= wanted else -((wanted - there) // 2)

    left, top = begin(image.width, width), begin(image.height, height)
    return image.crop((left, top, left + width, top + height))


def augment(image: Image.Image, seed: int) -> Image.Image:
    """A randomly rotated, shifted, scaled, flipped and coloured copy of an RGB image, of the same size.

    The same seed (0 to 2**64 - 1) gives the same picture; the global random state is neither used nor changed.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        view: Image.Image = _augmentation()(image)
    return view


@lru_cache(maxsize=1)
def _augmentation() -> Any:
    from torchvision import transforms

    chosen = AUGMENTATION
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(chosen["horizontal_flip"]),
            transforms.RandomAffine(  # rotation, shift and scale in one resampling
                chosen["rotation_degrees"],
                translate=(chosen["translate"], chosen["translate"]),
                scale=tuple(chosen["scale"]),
                interpolation=transforms.InterpolationMode.BILINEAR,
                fill=chosen["fill"],
            ),
            transforms.ColorJitter(chosen["brightness"], chosen["contrast"], chosen["saturation"], chosen["hue"]),
        ]
    )
