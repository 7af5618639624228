"""Bad and odd inputs, each with its exact outcome: one run per encoder over a data set made of nothing else."""

import csv
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from feats import efficientnet_extract_feats, vader_extract_feats
from feats.cache_reader import DONE, QUARANTINED

NO_PICTURE = "no picture file"
TRUNCATED = "picture is truncated"
NO_IMAGE = "not a picture PIL can read"
BINARY = "text cannot be decoded: NUL bytes: a binary file"

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PIXELS[:, :20] = (220, 30, 60)
PICTURE = Image.fromarray(PIXELS)
GREY = PICTURE.convert("L")
OTHER = Image.new("RGB", PICTURE.size, "blue")


def oriented(orientation: int, stored: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "PNG", exif=exif)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def with_alpha(alpha: int) -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(alpha)
    return image


def with_transparent_corner() -> tuple[Image.Image, Image.Image]:
    """A picture with a see-through corner, and how it looks on white."""
    alpha = np.full(PIXELS.shape[:2], 255, np.uint8)
    alpha[:16, :16] = 0
    flat = PIXELS.copy()
    flat[:16, :16] = 255
    return Image.fromarray(np.dstack([PIXELS, alpha])), Image.fromarray(flat)


SEE_THROUGH, ON_WHITE = with_transparent_corner()
ANIMATION = {"save_all": True, "append_images": [OTHER], "duration": 50}
CYAN = Image.new("CMYK", PICTURE.size, (255, 0, 0, 0))


@dataclass(frozen=True)
class Case:
    """Files of one pair and what must become of each side: "" encoded, else the reason of its quarantine.

    `like` is the picture that the odd one must be seen as: both have the same features.
    """

    image: bytes | None = None
    image_reason: str = ""
    text: bytes | None = b"so happy today!"
    text_reason: str = ""
    like: Image.Image | None = None
    extension: str = ".jpg"
    meaning: str | None = None  # what the text must be read as


def image(data: bytes, reason: str = "", **more) -> Case:
    return Case(image=data, image_reason=reason, **more)


def text(data: bytes, reason: str = "", **more) -> Case:
    return Case(image_reason=NO_PICTURE, text=data, text_reason=reason, **more)


JPEG = encoded(PICTURE, "JPEG")

CASES = {
    # pictures that are odd, but can be seen
    "jpeg": image(JPEG, like=Image.open(BytesIO(JPEG))),
    "png-as-jpg": image(encoded(PICTURE, "PNG"), like=PICTURE),
    "webp-as-jpg": image(encoded(PICTURE, "WEBP", lossless=True), like=PICTURE),
    "bmp": image(encoded(PICTURE, "BMP"), like=PICTURE, extension=".bmp"),
    "upper-case-extension": image(JPEG, like=Image.open(BytesIO(JPEG)), extension=".JPG"),
    "exif-upside-down": image(oriented(3, PICTURE.rotate(180)), like=PICTURE),
    "exif-on-its-side": image(oriented(6, PICTURE.rotate(90, expand=True)), like=PICTURE),
    "exif-broken": image(encoded(PICTURE, "JPEG", exif=b"Exif\0\0junk"), like=Image.open(BytesIO(JPEG))),
    "cmyk": image(encoded(CYAN, "JPEG", quality=100), like=Image.new("RGB", PICTURE.size, (0, 255, 255))),
    "grey": image(encoded(GREY, "PNG"), like=GREY),
    "16-bit": image(encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"), like=GREY),
    "black-and-white": image(encoded(GREY.convert("1"), "PNG"), like=GREY.convert("1")),
    "palette": image(encoded(PICTURE.quantize(16), "PNG"), like=PICTURE.quantize(16)),
    "alpha-opaque": image(encoded(with_alpha(255), "PNG"), like=PICTURE),
    "alpha-transparent": image(encoded(with_alpha(0), "PNG"), like=Image.new("RGB", PICTURE.size, "white")),
    "alpha-corner": image(encoded(SEE_THROUGH, "PNG"), like=ON_WHITE),
    "animated-gif": image(encoded(PICTURE.quantize(16), "GIF", **ANIMATION), like=PICTURE.quantize(16)),
    "animated-webp": image(encoded(PICTURE, "WEBP", lossless=True, **ANIMATION), like=PICTURE),
    "animated-png": image(encoded(PICTURE, "PNG", **ANIMATION), like=PICTURE),
    "one-pixel": image(encoded(Image.new("RGB", (1, 1), "red"), "PNG"), like=Image.new("RGB", (9, 9), "red")),
    "one-pixel-high": image(encoded(Image.new("RGB", (3000, 1), "red"), "PNG"), like=Image.new("RGB", (9, 9), "red")),
    # pictures that can't
    "no-picture": Case(image=None, image_reason=NO_PICTURE),
    "empty-picture": image(b"", "picture file is empty"),
    "text-as-jpg": image(b"hello, I am no picture", NO_IMAGE),
    "html-as-jpg": image(b"<html><body>404 Not Found</body></html>", NO_IMAGE),
    "zeros-as-jpg": image(bytes(5000), NO_IMAGE),
    "postscript-as-jpg": image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", NO_IMAGE),
    "truncated-jpeg": image(encoded(PICTURE, "JPEG", quality=95)[:2500], TRUNCATED),
    "truncated-png": image(encoded(PICTURE, "PNG")[:3000], TRUNCATED),
    "bomb": image(png_of_size(10_000, 10_000), f"decompression bomb: more than {Image.MAX_IMAGE_PIXELS} pixels"),
    "giant-bomb": image(png_of_size(60_000, 60_000), f"decompression bomb: more than {Image.MAX_IMAGE_PIXELS} pixels"),
    # made by `odd_files` below
    "folder": Case(image_reason="picture is a folder", text=None, text_reason="text folder.txt is a folder"),
    "loop": Case(
        image_reason="picture file is a symlink loop",
        text=None,
        text_reason="text loop.txt cannot be read: Too many levels of symbolic links",
    ),
    "dangling": Case(
        image_reason="picture file is missing",
        text=None,
        text_reason="text dangling.txt cannot be read: No such file or directory",
    ),
    "pipe": Case(
        image_reason="picture is not a regular file", text=None, text_reason="text pipe.txt is not a regular file"
    ),
    "forbidden": image(
        JPEG,
        "no permission to read the picture file",
        text_reason="text forbidden.txt cannot be read: Permission denied",
    ),
    "linked": Case(),  # to the pair "jpeg"
    # texts
    "no-text": text(None, "no text file no-text.txt in data"),
    "neither": Case(None, NO_PICTURE, None, "no text file neither.txt in data"),
    "empty-text": text(b"", meaning=""),
    "blank-text": text(b" \r\n\t\n", meaning=""),
    "nul-text": text(b"so happy\0", BINARY),
    "picture-as-text": text(encoded(PICTURE, "PNG"), BINARY),
    "megabyte-text": text(
        b"so happy! " + b"a long word list " * 60_000, meaning="so happy! " + "a long word list " * 60_000
    ),
    "too-long-text": text(b"happy " * 3_000_000, "text is longer than 16 MB"),
    "utf8-bom": text(b"\xef\xbb\xbfso happy!", meaning="so happy!"),
    "utf16": text("so happy! 😀".encode("utf-16"), meaning="so happy! 😀"),
    "utf32": text("so happy! 😀".encode("utf-32"), meaning="so happy! 😀"),
    "broken-utf16": text(b"\xff\xfea", "text cannot be decoded: has the byte order mark of utf-16 but is not utf-16"),
    "gb18030": text("今天天气很好，我很高兴 happy".encode("gb18030"), meaning="今天天气很好，我很高兴 happy"),
    "cp1252": text("the café is horrible".encode("cp1252"), meaning="the café is horrible"),
    "no-encoding": text(bytes(range(128, 256)), "text cannot be decoded: not text in any known encoding"),
    "several-lines": text(b"so\r\nhappy\n\n:)", meaning="so\r\nhappy\n\n:)"),
    "emoji-only": text("😍😭!?".encode(), meaning="😍😭!?"),
    "only-a-link": text(b"http://t.co/abc", meaning="http://t.co/abc"),
    # ids
    "an id with spaces": image(JPEG, like=Image.open(BytesIO(JPEG))),
    "ünï-编号-😀": image(JPEG, like=Image.open(BytesIO(JPEG))),
    "a.b.c": image(JPEG, like=Image.open(BytesIO(JPEG))),
    "comma,id": image(JPEG, like=Image.open(BytesIO(JPEG))),
    "with/slash": Case(None, NO_PICTURE, None, "no text file with/slash.txt in data"),
    "../outside": Case(None, NO_PICTURE, None, "no text file ../outside.txt in data"),
    "x" * 300: Case(None, NO_PICTURE, None, f"no text file {'x' * 300}.txt in data"),
}
ODD = ("folder", "loop", "dangling", "pipe", "linked")


def reference(case: Case) -> str:
    """The id of the plain pair that an odd one is compared with; cases that mean the same share it."""
    if case.like is not None:
        return f"picture-{zlib.crc32(case.like.convert('RGB').tobytes())}"
    return "" if case.meaning is None else f"text-{zlib.crc32(case.meaning.encode())}"


def odd_files(data: Path) -> None:
    for end in ("jpg", "txt"):
        (data / f"folder.{end}").mkdir()
        (data / f"loop.{end}").symlink_to(f"loop.{end}")
        (data / f"dangling.{end}").symlink_to("nothing")
        (data / f"linked.{end}").symlink_to(f"jpeg.{end}")
        os.mkfifo(data / f"pipe.{end}")
        (data.parent / f"outside.{end}").write_bytes(b"not of this set")
        (data / "with").mkdir(exist_ok=True)
        (data / "with" / f"slash.{end}").write_bytes(b"not of this set")


def make_course(root: Path) -> None:
    data = root / "data"
    data.mkdir(parents=True)
    odd_files(data)
    for name, case in CASES.items():
        for content, end in ((case.image, case.extension), (case.text, ".txt")):
            if content is not None and name not in ODD:
                (data / (name + end)).write_bytes(content)
        if case.like is not None:
            case.like.convert("RGB").save(data / f"{reference(case)}.png")
        if case.meaning is not None:
            (data / f"{reference(case)}.txt").write_text(case.meaning, encoding="utf-8", newline="")
    references = sorted({reference(case) for case in CASES.values()} - {""})
    lines = [f"{name},happy" for name in (*CASES, *references)]
    (root / "train.txt").write_text("guid,tag\n" + "\n".join(lines) + "\n", encoding="utf-8")


MANIFEST = [
    ({"id": 1, "image": "a.png", "text": "so happy!"}, "", ""),
    ({"id": "null", "image": None, "text": None}, NO_PICTURE, "the manifest gives no text"),
    ({"id": "empty", "image": "", "text": ""}, NO_PICTURE, ""),
    ({"id": "gone", "image": "gone.png", "text": "gone.txt"}, "picture file is missing", "text gone.txt cannot be read: No such file or directory"),
    ({"id": "nul", "image": "a\0.png", "text": "a\0.txt"}, "picture file cannot be read: not a valid file name", "text 'a\\x00.txt' cannot be read: not a valid file name"),
    ({"id": "long", "image": "x" * 300, "text": "x" * 300 + ".txt"}, "picture file cannot be read: File name too long", f"text {'x' * 300}.txt cannot be read: File name too long"),
    ({"id": "surrogate", "image": "a.png", "text": "\ud83d happy"}, "", "text cannot be decoded: it holds a lone surrogate"),
    ({"id": "surrogate-path", "image": "\ud83d.png", "text": "fine"}, "picture file cannot be read: not a valid file name", ""),
    ({"id": "line\nbreak", "image": "a.png", "text": "so,\n\"happy\""}, "", ""),
    ({"id": "through-a-file", "image": "a.png/b.png", "text": "fine"}, "picture file is missing", ""),
]  # fmt: skip


@dataclass
class Outcome:
    """One finished cache: status and features by id, reasons by id."""

    status: dict[str, int] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def extract(main, data: Path, out: Path, name: str, features: str, *more: str) -> Outcome:
    common = ["--device", "cpu", "--dtype", "fp32", "--batch-size", "16", "--workers", "0"]
    assert main(["--data", str(data), "--out", str(out), *common, *more]) == 0
    with h5py.File(out / f"{name}_train.h5") as file:
        ids = [value.decode() for value in file["id"][:]]
        outcome = Outcome(dict(zip(ids, file["status"][:].tolist())), dict(zip(ids, file[features][:])))
    with (out / f"{name}_train.quarantine.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row.keys() == {"id", "reason"} for row in rows)
    outcome.reasons = {row["id"]: row["reason"] for row in rows}
    assert len(rows) == len(outcome.reasons)
    return outcome


def extract_both(data: Path, out: Path) -> tuple[Outcome, Outcome]:
    return (
        extract(efficientnet_extract_feats.main, data, out, "efficientnet", "image_feats", "--model", "lite0"),
        extract(vader_extract_feats.main, data, out, "vader", "text_feats"),
    )


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> tuple[Outcome, Outcome]:
    """What the two encoders made of `CASES`, each in one run."""
    root = tmp_path_factory.mktemp("bad")
    make_course(root / "set")
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        return extract_both(root / "set", root / "out")


def forbid(patch: pytest.MonkeyPatch) -> None:
    """Refuse to open the files named "forbidden", as the system does unless tests run as root."""

    def refusing(function):
        def wrapper(self, *args, **kwargs):
            if self.stem == "forbidden":
                raise PermissionError(13, "Permission denied", str(self))
            return function(self, *args, **kwargs)

        return wrapper

    for method in ("open", "read_bytes"):
        patch.setattr(Path, method, refusing(getattr(Path, method)))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> tuple[Outcome, Outcome]:
    root = tmp_path_factory.mktemp("manifest")
    PICTURE.save(root / "a.png")
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _, _ in MANIFEST))
    return extract_both(root / "m.jsonl", root / "out")


def check(outcome: Outcome, name: str, reason: str) -> None:
    assert outcome.reasons.get(name, "") == reason
    assert outcome.status[name] == (QUARANTINED if reason else DONE)
    if not reason:
        assert np.isfinite(outcome.features[name]).all()


def test_there_are_enough_cases():
    assert len(CASES) + len(MANIFEST) >= 40


@pytest.mark.parametrize("name", CASES)
def test_course(course, name):
    case = CASES[name]
    images, texts = course
    check(images, name, case.image_reason)
    check(texts, name, case.text_reason)
    if case.like is not None:
        odd, plain = (images.features[i].astype(np.float32) for i in (name, reference(case)))
        assert np.dot(odd, plain) / np.linalg.norm(odd) / np.linalg.norm(plain) > 0.999
    if case.meaning is not None:
        np.testing.assert_array_equal(texts.features[name], texts.features[reference(case)])


def test_pictures_differ_enough_for_the_comparison_to_mean_something(course):
    features = {name: course[0].features[name].astype(np.float32) for name in ("jpeg", "grey", "cmyk")}
    for name in ("grey", "cmyk"):
        a, b = features["jpeg"], features[name]
        assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) < 0.99


@pytest.mark.parametrize(
    ("row", "image_reason", "text_reason"), MANIFEST, ids=[str(row["id"]) for row, _, _ in MANIFEST]
)
def test_manifest(manifest, row, image_reason, text_reason):
    check(manifest[0], str(row["id"]), image_reason)
    check(manifest[1], str(row["id"]), text_reason)


def test_quarantine_lists_nothing_else(course, manifest):
    for outcome in (*course, *manifest):
        assert set(outcome.reasons) == {i for i, status in outcome.status.items() if status == QUARANTINED}
        assert set(outcome.status.values()) == {DONE, QUARANTINED}
