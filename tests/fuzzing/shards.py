"""Tar shards: members of odd names, sorts and sizes, changed headers, extended headers, cut and compressed archives."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from random import Random

from feats.errors import RowError
from feats.images import read_image
from feats.records import read_dataset
from tests.fuzzing.mutations import INTERESTING, PICKLE, encoded, mutated, odd_text, odd_value, plain_text
from tests.fuzzing.outcomes import CANARY, Outcome, expect, judged, made
from tests.fuzzing.tables import read_all, read_streamed

EXTENSIONS = ("jpg", "txt", "json", "cls", "png", "JPG", "txt.txt", "pkl", "jpeg", "__key__")
TYPES = b"01234567gxLKSVNDAX\0Z"
BLOCK = tarfile.BLOCKSIZE
FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1), "linkname": (157, 100), "magic": (257, 8), "devmajor": (329, 8), "prefix": (345, 155), "sparse": (386, 97)}  # fmt: skip


def _content(rng: Random, extension: str) -> bytes:
    if rng.random() < 0.1:
        return rng.choice((PICKLE, b"", rng.randbytes(30), b"\0" * 700))
    if extension == "json":
        keys = ("id", "text", "label", "key", odd_text(rng))
        row = {key: rng.choice([plain_text(rng), odd_value(rng), "1"]) for key in rng.sample(keys, 2)}
        try:
            return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        except ValueError:
            return b'{"text": ' + b"9" * 5000 + b"}"
    return encoded(rng, rng.choice(["good", "bad", plain_text(rng), odd_text(rng)]))


def _name(rng: Random, key: int, extension: str) -> str:
    usual = f"{key}.{extension}"
    odd = [
        f"../{CANARY}",
        f"/tmp/{CANARY}.txt",
        f"../../{usual}",
        f"a/../{usual}",
        f"./{usual}",
        f".{usual}",
        f"{odd_text(rng)}.{extension}",
        "x" * 300 + f".{extension}",
    ]
    return usual if rng.random() < 0.75 else rng.choice(odd)


def _member(rng: Random, name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    if rng.random() < 0.12:
        member.type = bytes([rng.choice(TYPES)])
        member.linkname = rng.choice(["../bait.txt", "/etc/passwd", "0.txt", odd_text(rng)])
    if rng.random() < 0.1:
        keys = ["size", "path", "linkpath", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.size", "GNU.sparse.realsize", "mtime", "hdrcharset", "uid", "comment"]  # fmt: skip
        values = [
            "1",
            "-1",
            "0",
            "nan",
            "1e999",
            "999999999999999999999",
            "0,1,2,3",
            "BINARY",
            f"../{CANARY}.txt",
            odd_text(rng),
        ]
        member.pax_headers = {key: rng.choice(values) for key in rng.sample(keys, 2)}
    return member


LISTED = ["train-0.tar", "./train-0.tar", "../bait.tar", "# x", "", "no.tar", "train-{0..1}.tar", "/dev/zero.tar", "."]
LISTED += ["file:///etc/passwd.tar", "a\0.tar", "a/../train-0.tar"]
PATTERNS = ["train-{0..0}.tar", "train-{0..99999999999}.tar", "{a,b}{0..1000}{0..1000}.tar", "{", "{}{,}", "{٠..٣}.tar"]
PATTERNS += ["train-{0,0}.tar", "{0.." + "9" * 200 + "}.tar", "train-{1..0}.tar", "train-{0..1}.tar{"]


def archive(rng: Random, first: int = 0) -> bytes:
    """A tar as the library writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]), errors="surrogatepass") as tar:  # fmt: skip
        for key in range(first, first + rng.randint(0, 5)):
            for extension in rng.sample(EXTENSIONS, rng.randint(1, 3)):
                content = _content(rng, extension)
                try:
                    tar.addfile(_member(rng, _name(rng, key, extension), len(content)), io.BytesIO(content))
                except (ValueError, UnicodeError):  # what the format can't say
                    continue
    return out.getvalue()


def _with_checksum(block: bytearray) -> None:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) & 0o777777)


def _headers_changed(rng: Random, raw: bytes) -> bytes:
    """Fields of a header or two, with a checksum that fits."""
    out = bytearray(raw)
    places = [at for at in range(0, len(out) - BLOCK + 1, BLOCK) if out[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(places, min(len(places), rng.randint(1, 2))):
        block = out[at : at + BLOCK]
        start, size = FIELDS[rng.choice(list(FIELDS))]
        value = rng.choice(INTERESTING)
        field = rng.choice([
            b"%0*o" % (size - 1, abs(value)), b"\x80" + value.to_bytes(11, "big", signed=True), b"\xff" * size, rng.randbytes(size),
            b"-1", b"0x10", bytes(size), b"9" * size, b" " * size, bytes([rng.choice(TYPES)]), odd_text(rng).encode("utf-8", "replace"),
        ])  # fmt: skip
        block[start : start + size] = field[:size].ljust(size, b"\0")
        _with_checksum(block)
        out[at : at + BLOCK] = block
    return bytes(out)


def _damaged(rng: Random, raw: bytes) -> bytes:
    how = rng.randrange(8)
    if how < 3:
        return _headers_changed(rng, raw)
    if how == 3:
        return mutated(rng, raw)
    if how == 4:
        return raw[: rng.randrange(len(raw) + 1)]
    if how == 5:
        return rng.choice((gzip.compress, bz2.compress, lzma.compress))(raw)
    if how == 6:
        return raw + rng.choice((raw, rng.randbytes(512), bytes(512 * 20)))
    return raw


def shards(rng: Random, folder: Path) -> Outcome:
    """A shard or two in a folder, by themselves, by a list or by a pattern."""
    home = made(rng, folder)
    for number in range(rng.randint(1, 2)):
        raw = archive(rng, 10 * number)
        (home / f"train-{number}.tar").write_bytes(_damaged(rng, raw) if rng.random() < 0.7 else raw)
    if rng.random() < 0.05:
        os.symlink(rng.choice(["../bait.txt", "/dev/zero", "nowhere"]), home / "val-0.tar")
    if rng.random() < 0.02:
        os.mkfifo(home / "val-1.tar")
    return judged(folder, lambda: _read(rng, home))


def _read(rng: Random, home: Path) -> None:
    data = rng.choice([home, home, home / "train-0.tar"])
    whole = read_all(data)
    streamed = read_streamed(rng, data)
    # A shard is decoded by itself, and messages of a whole are of all.
    names = {split: [row[0] for row in rows] for split, rows in whole.items()}
    expect(
        names == {split: [row[0] for row in rows] for split, rows in streamed.items()},
        f"{whole} differs from {streamed}",
    )
    for pairs in read_dataset(data).splits.values():
        for record in pairs:
            try:
                read_image(record.image_path)
            except RowError as error:
                expect(bool(str(error)), "no reason")


def shard_places(rng: Random, folder: Path) -> Outcome:
    """Lists of shards, and patterns."""
    home = made(rng, folder)
    for number in range(2):
        (home / f"train-{number}.tar").write_bytes(archive(rng, 10 * number))
    lines = [
        rng.choice(LISTED if rng.random() < 0.6 else ["train-0.tar", "train-1.tar", f"{odd_text(rng)}.tar"])
        for _ in range(rng.randint(1, 2))
    ]
    patterns = [*PATTERNS, f"{{{odd_text(rng)}}}"] if rng.random() < 0.5 else ["train-{0..1}.tar", "train-{1,0}.tar"]
    if rng.random() < 0.5:
        raw = encoded(rng, "\n".join(lines))
        (home / "list.txt").write_bytes(mutated(rng, raw) if rng.random() < 0.3 else raw)
        return judged(folder, lambda: read_streamed(rng, home / "list.txt"))
    return judged(folder, lambda: read_streamed(rng, home / rng.choice(patterns)))


SHARDS = {"shards": shards, "shard-places": shard_places}
