"""What is too large, endless or leads elsewhere: refused in time, within memory, by one door for each kind."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from multiprocessing.process import current_process
from pathlib import Path

import ftfy
import h5py
import numpy as np
import pytest
from caches import make_cache
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from feats import import_feats, inspect_feats, roberta_extract_feats, vader_extract_feats
from feats.cache_reader import CacheError
from feats.errors import RowError, UsageError
from feats.extraction import preparation
from feats.images import FORMATS, MAX_FILE_BYTES, MAX_SCANS, decode_image, picture_size, read_image, read_reduced
from feats.names import MAX_NAME_BYTES, cache_path, checked_cache, checked_name
from feats.pieces import open_pieces
from feats.reading.manifests import _split
from feats.reading.rows import MAX_NAME_BYTES as MAX_ID_BYTES, TarSlice
from feats.records import Pairs, read_dataset
from feats.store import FeatureStore, is_complete
from feats.strings import Labels
from feats.text import _FTFY, clean, fix_text
from modeling import compare_finetuning, finetune, sweep_heads
from modeling.experiments.experiment import _downwards, _rows_apart
from modeling.features.corrections import read_corrections
from modeling.features.joined import FeatureSource, Rows
from modeling.features.split_files import read_split_file

SECONDS = 60  # for what takes less than one; without its limit each took minutes to years


def in_time(code: str, *args: object) -> str:
    """What a program prints that ends in time."""
    words = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- texts ------------------------------------------------------------------------------------------------------

ENDLESS = {
    "marks": "'a' + '\\u0301\\u0316' * 150_000",
    "marks-of-two": "'a' + '\\u0f73' * 100_000",
    "marks-of-entities": "'a' + '&#769;&#790;' * 60_000",
    "marks-of-mojibake": "'I\\u0300\\u20ac' * 60_000",
    "entities-of-entities": "'&' + 'amp;' * 60_000 + '\\xe9' * 60_000",
    "nested-entities": "'&am' * 60_000 + '&#112;;' + '#112;;' * 60_000",
    "mojibake-of-mojibake": "'\\xc2' * 60_000 + '\\xa9'",
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_no_text_takes_the_square_of_its_length(text: str):
    in_time(f"from feats.text import clean\nfor level in ('none', 'basic', 'tweet'): clean({text}, level)")


def test_short_texts_are_followed_to_the_end_only_where_that_is_quick():
    in_time("from feats.text import clean\nfor _ in range(12): clean('\\xc2' * 4000 + '\\xa9', 'basic')")


def test_runs_of_marks_end_after_thirty():
    assert clean("a" + "\u0316" * 100, "none") == "a" + "\u0316" * 30
    assert clean("e" + "\u0301" * 100, "basic") == "é" + "\u0301" * 29


WORDS = [
    *"the Zürich naïve don’t “quoted” ÃœberraschungÃ¼ &amp;amp; &lt;3 😂👩‍👩‍👧 тест 測試文字 ﬁne ｆｕｌｌ e\u0301 \u0939\u093f".split()
]
WORDS += [
    "сообщение".encode().decode("latin-1"),
    "你好".encode().decode("cp1252", "ignore"),
    "Z̈a̧l̨g̛ǫ",
    "\x85",
    "\r",
    "\x1b[1m",
]


def test_ordinary_texts_are_repaired_as_by_the_library():
    rng = np.random.default_rng(0)
    for size in [5, 100, 100, 300, 300, 1000] * 5:  # words: shorter and longer than what is left to the library
        text = " ".join(rng.choice(WORDS, size))
        for config in (_FTFY, ftfy.TextFixerConfig(explain=False)):
            assert fix_text(text, config) == ftfy.fix_text(text, config)


# -- pictures ---------------------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_read(kind: str):
    assert decode_image(picture(kind)).size == (8, 6)


@pytest.mark.parametrize(
    "data",
    [b"P3 900 900 255\n" + b"1 " * 900, picture("PPM"), picture("ICO"), picture("TGA"), picture("PCX")],
    ids=["plain-ppm", "ppm", "ico", "tga", "pcx"],
)
def test_no_other_format_is_tried_by_any_way_in(tmp_path: Path, data: bytes):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for read in (read_image, picture_size, lambda place: read_reduced(place, 8)):
        with pytest.raises(RowError, match="not a picture"):
            read(path)


@pytest.mark.parametrize("read", [read_image, picture_size, lambda place: read_reduced(place, 8)])
def test_large_files_are_not_read(tmp_path: Path, read: Callable[[Path | TarSlice], object]):
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for place in (path, TarSlice(path, 0, MAX_FILE_BYTES + 1, "a.jpg")):
        with pytest.raises(RowError, match="larger than 128 MB"):
            read(place)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(RowError, match="not a regular file"):
        read(tmp_path / "pipe.jpg")


def jpeg_of_scans(scans: int, side: int = 8) -> bytes:
    """A progressive JPEG which, after its own first scan, goes on through all its coefficients again and again."""
    image = Image.new("L", (8, 8))
    image.save(out := io.BytesIO(), "JPEG", progressive=True)
    data = bytearray(out.getvalue())
    size = data.index(b"\xff\xc2") + 5
    data[size : size + 4] = side.to_bytes(2, "big") * 2
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    again = bytes.fromhex("ffda 0008 0101 0001 3f00 00")
    return bytes(data[:second]) + again * (scans - 1) + b"\xff\xd9"


def test_no_jpeg_of_thousands_of_scans(tmp_path: Path):
    assert decode_image(jpeg_of_scans(MAX_SCANS)).size == (8, 8)
    (tmp_path / "a.jpg").write_bytes(jpeg_of_scans(20_000, 9000))  # 220 KB; a minute
    for read in (read_image, lambda place: read_reduced(place, 8)):
        with pytest.raises(RowError, match=f"more than {MAX_SCANS} scans"):
            read(tmp_path / "a.jpg")


def test_scans_are_told_from_what_looks_like_them():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", progressive=True, comment=b"\xff\xda" * 200)
    assert decode_image(out.getvalue() + b"\xff\xda" * 200).size == (8, 8)  # what follows the picture: a film, often


PEAK = """
import resource, sys
from feats.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import numpy
assert read_image(__import__("pathlib").Path(sys.argv[1]))[0].size == (6000, 6000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA"])
def test_no_picture_takes_much_more_than_its_pixels(tmp_path: Path, mode: str):
    path = tmp_path / "a.png"
    path.write_bytes(picture("PNG", mode, (6000, 6000)))
    # The picture and its RGB copy take up to 4 bytes a pixel each. Before, they took 26, and 16 with transparency.
    assert int(in_time(PEAK, path)) << 10 < 10 * 6000 * 6000


@pytest.mark.parametrize("mode", ["I;16", "F", "RGBA", "LA", "P"])
def test_bands_give_the_same_picture(monkeypatch: pytest.MonkeyPatch, mode: str):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (23, 17, 4), dtype=np.uint8)
    if mode in ("I;16", "F"):
        image = Image.fromarray(rng.integers(0, 60000, (23, 17)).astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(values, "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "F" else "PNG")
    whole = decode_image(buffer.getvalue())
    monkeypatch.setattr("feats.images._BAND_PIXELS", 40)
    assert np.array_equal(decode_image(buffer.getvalue()), whole)


# -- tar shards -------------------------------------------------------------------------------------------------


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a field of size as it is given."""
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf())
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def pax(records: bytes, name: bytes = b"a.txt", size: int = 1) -> bytes:
    return header(b"pax", octal(len(records)), b"x") + padded(records) + header(name, octal(size)) + padded(b"x" * size)


FIRST = header(b"k.txt", octal(1)) + padded(b"x")
SHARDS = {
    "negative": FIRST + header(b"a.txt", b"\xff" * 10 + b"\xfc\x00"),
    "negative-in-pax": FIRST + pax(b"14 size=-4096\n"),
    "negative-pax": FIRST + header(b"a", b"\xff" * 10 + b"\xfc\x00", b"x"),
    "huge-pax": FIRST + header(b"a", octal(1 << 32), b"x"),
    "huge-global-pax": FIRST + header(b"a", octal(1 << 32), b"g"),
    "huge-long-name": FIRST + header(b"a", octal(1 << 32), b"L"),
    "digits-in-pax": FIRST + pax(b"1" * 60_000) * 200,
    "chained-pax": FIRST + (header(b"pax", octal(9), b"x") + padded(b"9 a=bcd\n\n")) * 5000,
    "sparse-map": FIRST + pax(b"24 GNU.sparse.map=a,b,c\n"),
    "sparse-1.0": FIRST + pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
    "sparse": FIRST + header(b"a.txt", octal(1), b"S")[:482] + b"\1" * 30,
    "not-utf-8": FIRST + pax(b"21 hdrcharset=BINARY\n12 path=\xff\xfe\n"),
}


@pytest.mark.parametrize("content", SHARDS.values(), ids=SHARDS)
def test_hostile_tar_headers(tmp_path: Path, content: bytes):
    path = tmp_path / "train-000.tar"
    path.write_bytes(content + bytes(1024))
    code = """
import sys, resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from feats.reading.shards import read_shards
from feats.errors import UsageError
from pathlib import Path
try: print(len(read_shards(Path(sys.argv[1]))[0]))
except UsageError as error: print(error)
"""
    said = in_time(code, path)
    assert "truncated or not a tar" in said or "damaged" in said or said.strip() in ("1", "2")


def test_usual_extended_headers_are_read(tmp_path: Path):
    name = "ü" * 150 + ".txt"
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w", format=kind) as archive:
            member = tarfile.TarInfo(f"{number}{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    records = read_dataset(tmp_path)["train"]
    assert [record.id for record in records] == [f"{number}{'ü' * 150}" for number in range(2)]


# -- tables and lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.csv", "x.jsonl", "x.parquet", "train-0.tar"])
def test_pipes_and_devices_are_no_data(tmp_path: Path, name: str):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path = tmp_path / name
        make(path)
        for read in (read_dataset, lambda data: open_pieces(data, rows=2)["train"].read(0)):
            with pytest.raises(UsageError, match=f"cannot read .*{name}: .*not a regular file"):
                read(tmp_path)
        path.unlink()
    (tmp_path / "list.txt").write_text("train-1.tar\n")
    os.mkfifo(tmp_path / "train-1.tar")
    with pytest.raises(UsageError, match="not a regular file"):
        open_pieces(tmp_path / "list.txt", rows=2)["train"].read(0)


def test_pipes_are_no_lists_of_ids(tmp_path: Path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="can't read the split file .*: it is not a regular file"):
        read_split_file(tmp_path / "a.csv", ["1", "2"], ["x", "y"])
    with pytest.raises(UsageError, match="can't read the corrections .*: it is not a regular file"):
        read_corrections(tmp_path / "a.csv", Rows.of(["1"], ["x"], np.zeros(1, np.uint64), np.zeros(1, np.uint64)))


def test_a_line_without_end_takes_no_square_of_its_length():
    # Each of its chunks copied together with all before it: hours.
    in_time(
        "from feats.reading.manifests import _split\n"
        "lines = list(_split(iter([b'x' * 1000] * 60_000 + [b'\\r', b'\\n', b'y']), True))\n"
        "assert [len(line) for line in lines] == [60_000_002, 1], [len(line) for line in lines]"
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_lines_are_cut_alike_whatever_the_chunks(chunk: int):
    data = b"a\r\nb\rc\n\n\r\r\nd\r"
    for carriage_returns, expected in (
        (True, data.splitlines(keepends=True)),
        (False, [b"a\r\n", b"b\rc\n", b"\n", b"\r\r\n", b"d\r"]),
    ):
        chunks = (data[low : low + chunk] for low in range(0, len(data), chunk))
        assert list(_split(chunks, carriage_returns)) == expected


@pytest.mark.parametrize("column", ["id", "label"])
def test_names_of_a_megabyte(tmp_path: Path, column: str):
    """Each row of a cache takes the room of the longest."""
    for size, refused in ((MAX_ID_BYTES, False), (MAX_ID_BYTES + 1, True), (1 << 20, True)):
        (tmp_path / "m.csv").write_text(f"text,{column}\ngood,{'x' * size}\n")
        for read in (read_dataset, lambda data: open_pieces(data, rows=2)["train"].read(0)):
            if refused:
                with pytest.raises(UsageError, match=f"^m.csv line 2: {column} .* is longer than {MAX_ID_BYTES} bytes"):
                    read(tmp_path)
            else:
                assert read(tmp_path)


def test_a_path_that_no_file_can_have_is_not_kept(tmp_path: Path):
    (tmp_path / "m.csv").write_text(f"text,image\ngood,{'x/' * 100_000}a.jpg\nbad,a.jpg\n")
    pairs = read_dataset(tmp_path)["train"]
    assert pairs.source.images == ["", "a.jpg"]
    with pytest.raises(RowError, match="File name too long"):
        read_image(pairs[0].image_path)


def test_labels_are_compared_in_time():
    # Some 40 comparisons of each single label, each of a million steps and more.
    in_time(
        "from collections import Counter\n"
        "from feats.reading.rows import warnings_of_labels\n"
        "labels = [''.join('ab'[(k >> n % 14) & 1] for n in range(1000)) for k in range(9000)]\n"
        "counts = Counter(labels[:10] + labels[10:] * 2)\n"
        "assert len(warnings_of_labels(counts, {label: 'm.csv' for label in labels[:10]})) == 10"
    )


@pytest.mark.parametrize(
    "read", [lambda data: read_dataset(data)["train"], lambda data: open_pieces(data, rows=2)["train"].read(0)]
)
def test_a_first_line_of_a_long_cell(tmp_path: Path, read: Callable[[Path], Pairs]):
    (tmp_path / "m.csv").write_text(f"text,{'y' * 200_000}\ngood,1\n")
    assert [record.text for record in read(tmp_path)] == ["good"]
    (tmp_path / "m.csv").write_text("x" * 200_000)
    with pytest.raises(UsageError, match="expected image or text among them"):
        read(tmp_path)


# -- decoding processes -----------------------------------------------------------------------------------------

LONG_TMPDIR = """
import os, sys, tempfile
from pathlib import Path
long = Path(sys.argv[1]) / ("x" * 120)
long.mkdir()
os.environ["TMPDIR"] = str(long)
from feats import pixels_extract_feats
code = pixels_extract_feats.main(["--data", sys.argv[2], "--out", sys.argv[1], "--workers", "1"])
assert tempfile.gettempdir() == str(long) and not list(long.iterdir())
sys.exit(code)
"""


@pytest.mark.slow
def test_sockets_of_decoding_processes_have_a_short_path(tmp_path: Path, course: Path):
    assert "20 rows done" in in_time(LONG_TMPDIR, tmp_path, course)


def test_where_no_short_path_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setattr(preparation, "_SHORT_TMPDIR", str(tmp_path / "none"))
    monkeypatch.setitem(current_process()._config, "tempdir", None)
    with pytest.raises(UsageError, match="TMPDIR is .* set TMPDIR to a shorter one, or `workers` to 0"):
        preparation.prepare([1, 2], 1, False)
    assert tempfile.tempdir.endswith("x")


# -- folds ------------------------------------------------------------------------------------------------------


def test_the_largest_number_of_folds_is_computed():
    tags = Labels.of(["a", "a", "a", "b", "b", "b", "b"])
    assert _rows_apart(tags, None) == {"a": 3, "b": 4}
    assert _rows_apart(tags, np.array([0, 0, 1, 1, 2, 3, 3])) == {"a": 2, "b": 3}
    tried = list(_downwards(4000))
    assert tried[:17] == list(range(4000, 3983, -1)) and tried[-1] == 2 and len(tried) < 100
    assert list(_downwards(17)) == list(range(17, 1, -1))


# -- caches -----------------------------------------------------------------------------------------------------


def soft(file: h5py.File) -> None:
    file.move("image_feats", "text_views")
    file["image_feats"] = h5py.SoftLink("/text_views")


def external(file: h5py.File) -> None:
    del file["image_feats"]
    file["image_feats"] = h5py.ExternalLink("pipe.h5", "/x")


def outside(file: h5py.File) -> None:
    del file["image_feats"]
    file.create_dataset("image_feats", (90, 8), np.float16, external=[("pipe.h5", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    del file["image_feats"]
    layout = h5py.VirtualLayout((90, 8), np.float16)
    layout[:] = h5py.VirtualSource("pipe.h5", "x", (90, 8))
    file.create_virtual_dataset("image_feats", layout)


def filtered(file: h5py.File) -> None:
    del file["image_feats"]
    file.create_dataset("image_feats", (90, 8), np.float16, chunks=(90, 8), compression="gzip", fletcher32=True)


def bomb(file: h5py.File) -> None:
    del file["id"]
    file.create_dataset("id", (10**12,), "S8", chunks=(1 << 16,), fletcher32=True)


def wide(file: h5py.File) -> None:
    del file["image_feats"]
    file.create_dataset("image_feats", (90, 10**9), np.float16, chunks=(1, 1 << 16), fletcher32=True)


def ragged_text(file: h5py.File) -> None:
    del file["id"]
    file.create_dataset("id", (90,), h5py.string_dtype(), chunks=(90,))


def integers(file: h5py.File) -> None:
    del file["tag"]
    file.create_dataset("tag", data=np.zeros(90, np.int64), chunks=(90,), fletcher32=True)


def short(file: h5py.File) -> None:
    del file["status"]
    file.create_dataset("status", data=np.ones(7, np.uint8), chunks=(7,), fletcher32=True)


def group(file: h5py.File) -> None:
    file.create_group("more")


def attribute(value: object, name: str = "fingerprint") -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


HOSTILE = {
    "soft-link": soft,
    "external-link": external,
    "external-storage": outside,
    "virtual": virtual,
    "filter": filtered,
    "claimed-rows": bomb,
    "claimed-width": wide,
    "variable-text": ragged_text,
    "integers-for-text": integers,
    "other-length": short,
    "group": group,
    "attribute-number": attribute(3),
    "attribute-list": attribute(np.bytes_(b"[1]")),
    "attribute-nested": attribute(np.bytes_(b"[" * 30_000)),
    "attribute-array": attribute(np.zeros(5)),
    "attribute-variable": attribute("{}"),
    "attribute-float": attribute(2.5, "more"),
    "plan-without-rows": attribute(np.bytes_(b"{}"), "plan"),
    "parameters": attribute(np.bytes_(b"[]"), "parameters"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_only_plain_caches_are_read(
    tmp_path: Path, change: Callable[[h5py.File], None], capsys: pytest.CaptureFixture[str]
):
    path = make_cache(tmp_path, "clip")
    with FeatureStore.open(path) as store:
        assert store.verify() == []
    with h5py.File(path, "r+") as file:
        change(file)
    os.mkfifo(tmp_path / "pipe.h5")
    assert inspect_feats.main([str(path), "--verify"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "--overwrite" in printed and printed.count("\n") == 1


def test_pipes_are_no_caches(tmp_path: Path):
    os.mkfifo(tmp_path / "a_train.h5")
    with pytest.raises(CacheError, match="no cache"):
        FeatureStore.open(tmp_path / "a_train.h5")
    assert not is_complete(tmp_path / "a_train.h5")


# -- names ------------------------------------------------------------------------------------------------------

BAD_NAMES = ["", ".", "..", "../../x", "/x", "a\\b", "a\0b", "a\nb", "\ud800", " a", "x" * 300, "ü" * 100]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_lead_elsewhere(name: str):
    for check in (checked_name, checked_cache, lambda name, setting: cache_path(Path(), "clip", name)):
        with pytest.raises(UsageError, match="^`(name|split)` .*can't be a"):
            check(name, "name")
    for of_side in ("image", "text"):
        with pytest.raises(UsageError, match="^`[vt]type` "):
            FeatureSource(**{of_side: (name,)})
    with pytest.raises(UsageError, match="`vtype`"):
        FeatureSource(fingerprints={name: {}})  # as a foreign config.json may have them


def test_usual_names():
    for name in ("clip", "ViT-B_32", "a.b", "測試", "a b", "x" * MAX_NAME_BYTES):
        assert checked_name(name, "name") == checked_cache(name, "name") == name
    assert cache_path(Path("f"), "sub/clip", "train") == Path("f/sub/clip_train.h5")
    with pytest.raises(UsageError):
        checked_name("sub/clip", "name")
    with pytest.raises(UsageError):
        checked_cache("sub/../../clip", "name")


MAINS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "extract": (vader_extract_feats.main, ["--data", "."]),
    "extract-text": (roberta_extract_feats.main, ["--data", "."]),
    "import": (import_feats.main, ["."]),
    "sweep": (sweep_heads.main, []),
    "compare": (compare_finetuning.main, []),
    "finetune": (finetune.main, []),
}


@pytest.mark.parametrize("name", ["..", ".", "../../x", "x" * 300], ids=lambda name: name[:8])
@pytest.mark.parametrize("script", MAINS)
def test_scripts_refuse_such_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, name: str
):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    main, words = MAINS[script]
    assert main([*words, "--name", name]) == 2
    assert "error: --name " in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


def test_a_split_of_the_data_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    Path("m.csv").write_text("id,text,split\n1,good day,/../../x\n")
    assert vader_extract_feats.main(["--data", "m.csv", "--out", "out"]) == 2
    assert "split '/../../x'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"m.csv"}
