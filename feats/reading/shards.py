"""Layout shards: tar files of `<key>.<ext>`, the WebDataset convention."""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from feats.errors import UsageError
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

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_shards(path: Path) -> Rows:
    """Tar shards of files `<key>.<ext>`; a shard's split is the beginning of its name: train-000.tar."""
    shards = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.name.endswith(".tar"))
    if not shards:
        raise UsageError(f"{path} is not of layout shards; expected {EXPECTED['shards']}")
    rows: list[Row] = []
    for shard in shards:
        prefix = re.match(r"[A-Za-z]+(?:_[A-Za-z]+)*", shard.stem)
        rows += _shard_rows(shard, prefix.group() if prefix else "train")
    return rows, []


def _shard_rows(shard: Path, split: str) -> list[Row]:
    members: dict[str, dict[str, tuple[TarSlice, bytes]]] = defaultdict(dict)
    for key, extension, place, content in _shard_members(shard):
        if extension in members[key]:
            raise UsageError(f"{shard.name}: {key}.{extension} is there twice; expected one file of each kind per key")
        members[key][extension] = place, content
    return [_shard_row(shard, split, key, files) for key, files in members.items()]


def _shard_members(shard: Path) -> Iterator[tuple[str, str, TarSlice, bytes]]:
    """Key, extension, place and content of a shard's files in one pass. Pictures are read later: no content."""
    with shard.open("rb") as file:
        start = file.read(6)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise UsageError(f"{shard} is compressed ({name}); decompress it first: pictures are read at random")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                    key, extension = _shard_key(member.name)
                    if not key or not member.isreg() or member.issparse():
                        continue
                    place = TarSlice(shard, member.offset_data, member.size, member.name)
                    if f".{extension}" in PICTURES:
                        yield key, extension, place, b""
                    elif extension in ("txt", "json", "cls"):
                        content = tar.extractfile(member)
                        assert content is not None  # a regular file
                        yield key, extension, place, content.read(MAX_TEXT_BYTES + 1)
                end = tar.offset
        except tarfile.TarError as error:
            raise UsageError(f"{shard} is truncated or not a tar ({error}); make or copy it again") from None
        # tarfile takes a cut or broken header for the end, but a whole archive ends with a block of zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UsageError(f"{shard} is truncated or damaged at byte {end}; make or copy it again")


def _shard_key(name: str) -> tuple[str, str]:
    """Folder and basename up to its first dot; the rest, lower case. No key for hidden files."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _shard_row(shard: Path, split: str, key: str, files: dict[str, tuple[TarSlice, bytes]]) -> Row:
    source = f"{shard.name} {key}"
    facts = _shard_json(files["json"][1], source) if "json" in files else {}
    row = Row(
        split, facts.get("id") or key, shard.name, key, label=label_of(facts.get("label")), text=facts.get("text")
    )
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
    return {name: scalar(values.get(name), f"{source}.json: {name}") for name in ("id", "label", "text")}
