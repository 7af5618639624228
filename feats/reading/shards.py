"""Layout shards: tar files of `<key>.<ext>`, the WebDataset convention."""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Self

from feats.errors import UsageError, first_line
from feats.reading.remote import LocalFile, RemoteFile, base_name, beside, is_url, listing, public_url
from feats.reading.rows import (
    EXPECTED,
    MAX_TEXT_BYTES,
    PICTURES,
    Row,
    Rows,
    TarSlice,
    decode,
    label_of,
    limited,
    scalar,
)
from feats.regular import check_regular

_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MAX_SHARDS = 1_000_000

# Headers whose content says more of the next member: of pax, and GNU's long names.
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_HEADER_BYTES = 1 << 16
_DIGITS = re.compile(rb"\d{100}")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_shards(path: Path) -> Rows:
    """Tar shards of files `<key>.<ext>`; a shard's split is the beginning of its name: train-000.tar."""
    shards = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.name.endswith(".tar"))
    if not shards:
        raise UsageError(f"{path} is not of layout shards; expected {EXPECTED['shards']}")
    return [row for shard in shards for row in shard_rows(shard, split_of(shard.name), str(shard))], []


def is_pattern(data: str | Path) -> bool:
    """Whether this stands for several shards: "train-{000..099}.tar". A path that is there is that."""
    return "{" in str(data) and (is_url(data) or not Path(data).exists())


def is_list(data: str | Path) -> bool:
    """Whether this is a text file that lists shards."""
    return base_name(str(data)).endswith(".txt") and (is_url(data) or Path(data).is_file())


def shard_places(data: str | Path) -> list[str]:
    """The paths and URLs of all shards: those of a folder, of a pattern, of the lines of a list (relative ones are
    beside it), or the one that `data` is. Raises `OSError`, and `UsageError` for none or one named twice."""
    places = _places(data)
    shown = public_url(str(data))
    if not places:
        raise UsageError(f"{shown} is not of layout shards; expected {EXPECTED['shards']}")
    twice = next((place for place, next_one in _neighbours(places) if place == next_one), None)
    if twice is not None:
        raise UsageError(f"{shown} names {public_url(twice)} twice; expected every shard once")
    return places


def _places(data: str | Path) -> list[str]:
    text = str(data)
    if is_pattern(data):
        return expanded(text)
    if is_list(data):
        return _listed(data)
    if not is_url(data):
        path = Path(data)
        if path.is_file():
            return [text]
        return sorted(str(entry) for entry in path.iterdir() if entry.name.endswith(".tar"))
    if ".tar" in base_name(text):
        return [text]
    folder = text.rstrip("/")
    return [f"{folder}/{name}" for name in listing(text) if name.endswith(".tar")]


def _neighbours(places: list[str]) -> Iterator[tuple[str, str]]:
    ordered = sorted(places)
    return zip(ordered, ordered[1:], strict=False)


def _listed(data: str | Path) -> list[str]:
    raw = b"".join((RemoteFile(data) if isinstance(data, str) and is_url(data) else LocalFile(Path(data)))(0))
    places = []
    for number, line in enumerate(decode(raw, public_url(str(data))).splitlines(), 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if ".tar" not in base_name(name) or "\0" in name:
            raise UsageError(
                f"{base_name(str(data))} line {number}: {name[:80]!r} is no tar shard; expected one a line"
            )
        if not is_url(name):
            name = beside(str(data), name) if is_url(data) else str(Path(data).parent / name)
        places.append(name)
    return places


def expanded(pattern: str) -> list[str]:
    """What a pattern stands for, in order: {000..099} is a range (as wide as it is written), {a,b} are alternatives.

    Raises `UsageError` for one that isn't understood.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # literal, group, literal, group, ..., literal
    if any("{" in literal or "}" in literal for literal in parts[::2]):
        raise _bad_pattern(pattern, "its braces don't match")
    choices = [_alternatives(pattern, part) if k % 2 else [part] for k, part in enumerate(parts)]
    if prod(map(len, choices)) > _MAX_SHARDS:
        raise _bad_pattern(pattern, f"it stands for more than {_MAX_SHARDS} shards")
    return ["".join(chosen) for chosen in product(*choices)]


def _alternatives(pattern: str, group: str) -> list[str]:
    numbers = _RANGE.fullmatch(group)
    if numbers is None:
        if "," not in group:
            raise _bad_pattern(pattern, f"{{{group}}} is neither a range nor a choice")
        return group.split(",")
    first, last = numbers.groups()
    if int(last) < int(first):
        raise _bad_pattern(pattern, f"{{{group}}} ends before it begins")
    if int(last) - int(first) >= _MAX_SHARDS:
        raise _bad_pattern(pattern, f"it stands for more than {_MAX_SHARDS} shards")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _bad_pattern(pattern: str, why: str) -> UsageError:
    return UsageError(f"{public_url(pattern)}: {why}; write a pattern of shards as train-{{000..099}}.tar")


def split_of(name: str) -> str:
    """The split of a shard, by the beginning of its name."""
    prefix = re.match(r"[A-Za-z]+(?:_[A-Za-z]+)*", name)
    return prefix.group() if prefix else "train"


def shard_rows(shard: Path, split: str, place: str) -> list[Row]:
    """The rows of one shard; `place` is what messages call it. Raises `OSError`, and `UsageError` for what is no
    whole, uncompressed tar."""
    members: dict[str, dict[str, tuple[TarSlice, bytes]]] = defaultdict(dict)
    for key, extension, part, content in _shard_members(shard, place):
        if extension in members[key]:
            raise UsageError(f"{shard.name}: {key}.{extension} is there twice; expected one file of each kind per key")
        members[key][extension] = part, content
    return [_shard_row(shard, split, key, files) for key, files in members.items()]


def _shard_members(shard: Path, place: str) -> Iterator[tuple[str, str, TarSlice, bytes]]:
    """Key, extension, place and content of a shard's files in one pass. Pictures are read later: no content."""
    check_regular(shard)
    with shard.open("rb") as file:
        start = file.read(6)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise UsageError(f"{place} is compressed ({name}); decompress it first: pictures are read at random")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
                end = 0
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                    if member.size < 0 or tar.offset <= end:  # a pax header may say so, too
                        raise tarfile.ReadError(f"member {member.name[:80]!r} ends before it begins")
                    end = tar.offset
                    key, extension = _shard_key(member.name)
                    if not key or not member.isreg() or member.issparse():
                        continue
                    part = TarSlice(shard, member.offset_data, member.size, member.name)
                    if f".{extension}" in PICTURES:
                        yield key, extension, part, b""
                    elif extension in ("txt", "json", "cls"):
                        content = tar.extractfile(member)
                        assert content is not None  # a regular file
                        yield key, extension, part, content.read(MAX_TEXT_BYTES + 1)
                end = tar.offset
        # The library reads numbers and names of extended headers as they come.
        except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise UsageError(
                f"{place} is truncated or not a tar ({first_line(error)}); make or copy it again"
            ) from None
        # tarfile takes a cut or broken header for the end, but a whole archive ends with a block of zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UsageError(f"{place} is truncated or damaged at byte {end}; make or copy it again")


class _Member(tarfile.TarInfo):
    """A tar's header, refused before the library goes back to it for ever (negative sizes, CVE-2025-8194), takes as
    much memory as it claims, or as much time as the square of a run of digits (CVE-2024-6232)."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """As `tarfile.TarInfo.frombuf`; raises `tarfile.ReadError` as well."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise tarfile.ReadError(f"member {member.name[:80]!r} is of negative size")
        if member.type in _EXTENDED and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {member.size} bytes, of {_MAX_HEADER_BYTES} there may be")
        return member

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """As `tarfile.TarInfo.fromtarfile`; raises `tarfile.ReadError` as well."""
        file = tar.fileobj
        assert file is not None  # open for reading
        begin = file.tell()
        if file.read(tarfile.BLOCKSIZE)[156:157] in _EXTENDED and _DIGITS.search(file.read(_MAX_HEADER_BYTES)):
            raise tarfile.ReadError("an extended header holds a number of 100 digits or more")
        file.seek(begin)
        return super().fromtarfile(tar)


def _shard_key(name: str) -> tuple[str, str]:
    """Folder and basename up to its first dot; the rest, lower case. No key for hidden files."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _shard_row(shard: Path, split: str, key: str, files: dict[str, tuple[TarSlice, bytes]]) -> Row:
    source = f"{shard.name} {key}"
    facts = _shard_json(files["json"][1], source) if "json" in files else {}
    row = Row(split, facts.get("id") or key, shard.name, key, label=facts.get("label"), text=facts.get("text"))
    if "cls" in files:
        row.label = label_of(decode(files["cls"][1], f"{source}.cls"))
    row.image = next((files[ext[1:]][0] for ext in PICTURES if ext[1:] in files), None)
    if "txt" in files:
        row.text_path, content = files["txt"]
        row.raw, row.error = limited(content)
    elif row.text is None:
        row.error = f"no text file {key}.txt in {shard.name}"
    return row


def _shard_json(raw: bytes, source: str) -> dict[str, str | None]:
    try:
        values = json.loads(decode(raw, f"{source}.json"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}.json: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source}.json: a JSON {type(values).__name__}; expected an object")
    # Others' keys (captioning tools write many) are theirs.
    facts = {name: scalar(values.get(name), f"{source}.json: {name}") for name in ("id", "text")}
    return {**facts, "label": label_of(values.get("label"), f"{source}.json: label")}
