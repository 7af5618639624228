"""Reading every data layout into records. The only code that knows how data lie on disk."""

import csv
import difflib
import io
import json
import os
import re
import stat
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex, overload

from feats.errors import UsageError
from feats.source import Source
from feats.text import decode_texts

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # where an id has several, the first wins
MAX_TEXT_BYTES = 16 << 20
SENTIMENTS = ("negative", "neutral", "positive")
MANIFEST_COLUMNS = ("id", "image", "text", "label", "split")

_TYPO_MIN_ROWS = 100  # a label seen once among fewer rows is no sign of a typo
_TYPO_MAX_WARNINGS = 10
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class TarSlice:
    """A file inside an uncompressed tar: `size` bytes from `offset`."""

    path: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """The file's bytes; may raise `OSError`."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Record:
    """One image-text pair, as it lies on disk."""

    id: str
    image_path: Path | TarSlice | None  # None: the pair has no picture file
    text: str | None  # decoded, not cleaned; None when it can't be read
    label: str | None = None
    encoding: str = ""  # of the text's bytes; "" for inline text
    text_error: str = ""  # why text is None
    text_path: Path | TarSlice | None = field(default=None, compare=False)  # None: the text isn't a file of its own


class Pairs(list[Record]):
    """The records of one split, and where they lie: `data` as it was given, of which layout. Slices know it, too."""

    def __init__(self, records: Iterable[Record], data: Path, layout: str, split: str):
        super().__init__(records)
        self.data, self.layout, self.split = data, layout, split

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "Record | Pairs":
        if isinstance(index, slice):
            return Pairs(super().__getitem__(index), self.data, self.layout, self.split)
        return super().__getitem__(index)

    @property
    def source(self) -> Source:
        """Where the pairs lie, row by row, for a cache to keep."""
        resolved = self.data.resolve()
        folder = self.data if self.data.is_dir() else self.data.parent
        images = [_relative(record.image_path, folder) for record in self]
        texts = [_relative(record.text_path, folder) for record in self]
        return Source(str(self.data), str(resolved), self.layout, self.split, images, texts)


def _relative(place: Path | TarSlice | None, folder: Path) -> str:
    """A file as `Source` names it."""
    if place is None:
        return ""
    path = place.path if isinstance(place, TarSlice) else place
    name = Path(os.path.relpath(path, folder)).as_posix()
    if isinstance(place, TarSlice):
        name += f"::{place.name}"
    return "" if _has_surrogates(name) or "\0" in name else name


@dataclass
class DataSet:
    """A data set's splits, each in the order of its file, and what the user should hear about it."""

    layout: str
    splits: dict[str, Pairs]
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, split: str) -> Pairs:
        """The pairs of a split. Raises `UsageError` naming the splits there are."""
        if split not in self.splits:
            raise UsageError(f"no split {split} in the data; it has {', '.join(self.splits)}")
        return self.splits[split]


@dataclass(slots=True)
class _Row:
    """A record in the making: its text is still bytes, a string, or the reason why there is none."""

    split: str
    id: str
    source: str  # file and line, for messages
    image: Path | TarSlice | None = None
    label: str | None = None
    raw: bytes | None = None
    text: str | None = None
    error: str = ""
    text_path: Path | TarSlice | None = None


_Rows = tuple[list[_Row], list[str]]  # rows and warnings


def read_dataset(path: Path | str, layout: str | None = None) -> DataSet:
    """Read the data set at `path` (a folder, a manifest or a tar); `layout` is one of `LAYOUTS`, None: detected.

    A pair whose picture or text is missing or unreadable is still a record. Raises `UsageError` for an unknown or
    undetectable layout, an unreadable or malformed file, an empty set, and empty or repeated ids.
    """
    path = Path(path)
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    try:
        path.stat()
        layout = layout or _detect_layout(path)
        rows, warnings = LAYOUTS[layout](path)
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename or path}: {error.strerror or error}; "
            "name the data set's folder or file with `data`"
        ) from None
    if not rows:
        raise UsageError(f"{path} (layout {layout}) holds no pairs; expected at least one row")
    _check_ids(rows)
    splits: dict[str, Pairs] = {}
    for row, record in zip(rows, _records(rows), strict=True):
        splits.setdefault(row.split, Pairs([], path, layout, row.split)).append(record)
    return DataSet(layout, splits, warnings + _label_warnings(rows))


# ---------------------------------------------------------------------------------------------- detection


_EXPECTED = {
    "course": "train.txt or test_without_label.txt (guid,tag) in a folder, pairs in data/, pics_texts_pair/ or beside",
    "mvsa": "labelResultAll.txt in a folder, pairs in data/",
    "manifest": f"one .csv or .jsonl with the columns {', '.join(MANIFEST_COLUMNS)}",
    "shards": "*.tar files, uncompressed, named <split>-<number>.tar",
}


def _detect_layout(path: Path) -> str:
    """The one layout whose mark is at `path`. Raises `UsageError` for none and for several."""
    names = [path.name] if path.is_file() else sorted(entry.name for entry in os.scandir(path))
    if path.is_file():
        marks = {"manifest": path.suffix.lower() in (".csv", ".jsonl"), "shards": ".tar" in path.name.lower()}
    else:
        marks = {
            "course": "train.txt" in names or "test_without_label.txt" in names,
            "mvsa": "labelResultAll.txt" in names,
            "manifest": "manifest.csv" in names or "manifest.jsonl" in names,
            "shards": any(name.endswith(".tar") for name in names),
        }
    found = [layout for layout, is_there in marks.items() if is_there]
    # A .csv beside the marks of another layout may be anything; alone it is the manifest.
    if not found and len([name for name in names if name.endswith((".csv", ".jsonl"))]) == 1:
        found = ["manifest"]
    if len(found) == 1:
        return found[0]
    problem = f"looks like {' and '.join(found)}" if found else "is none of the known layouts"
    listing = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    expected = "; ".join(f"{layout}: {what}" for layout, what in _EXPECTED.items())
    raise UsageError(
        f"{path} {problem}. Found: {listing or 'an empty folder'}. Expected one of: {expected}. "
        "Name the folder with `data` and the layout with `layout`"
    )


# ---------------------------------------------------------------------------------------------- layouts


def _read_course(path: Path) -> _Rows:
    """`train.txt` and `test_without_label.txt`, lines `guid,tag`; tag `null` or empty: unknown."""
    files = {"train": path / "train.txt", "test": path / "test_without_label.txt"}
    present = {split: file for split, file in files.items() if file.is_file()}
    if not present:
        raise UsageError(f"{path} is not of layout course; expected {_EXPECTED['course']}")
    rows: list[_Row] = []
    for split, file in present.items():
        rows += [_Row(split, guid, source, label=tag) for guid, tag, source in _course_lines(file)]
    _attach_pairs(rows, path)
    filled = {row.split for row in rows}
    return rows, [f"{file.name} holds no rows" for split, file in present.items() if split not in filled]


def _course_lines(file: Path) -> Iterator[tuple[str, str | None, str]]:
    header_possible = True
    for number, line in _numbered_lines(file):
        if not line.strip():
            continue
        if header_possible:
            header_possible = False
            names = [cell.strip().lower() for cell in line.split(",")]
            if names[0] in ("guid", "id") or names[-1] == "tag":
                if names not in (["guid", "tag"], ["guid"]):
                    raise UsageError(f"{file.name} line {number}: columns {','.join(names)}; expected guid,tag")
                continue
        # From the right: a comma can be part of an id, never of a tag.
        guid, _, tag = line.rpartition(",") if "," in line else (line, "", "")
        yield guid.strip(), None if tag.strip().lower() in ("", "null") else tag.strip(), f"{file.name} line {number}"


def _read_mvsa(path: Path) -> _Rows:
    """`labelResultAll.txt`, tab separated: an id, then `text label,image label` once per annotator."""
    file = path / "labelResultAll.txt"
    if not file.is_file():
        raise UsageError(f"{path} is not of layout mvsa; expected {_EXPECTED['mvsa']}")
    rows: list[_Row] = []
    dropped: Counter[str] = Counter()
    total = 0
    for number, line in _numbered_lines(file):
        if not line.strip() or line.strip().lower().startswith("id\t"):
            continue
        total += 1
        guid, *cells = line.rstrip().split("\t")
        label, why_not = _mvsa_label(cells)
        if label is None:
            dropped[why_not] += 1
        else:
            rows.append(_Row("train", guid.strip(), f"{file.name} line {number}", label=label))
    _attach_pairs(rows, path)
    return rows, [f"{count} of {total} pairs dropped: {reason}" for reason, count in dropped.items()]


def _mvsa_label(cells: list[str]) -> tuple[str | None, str]:
    """The published rule: `(label, "")`, or `(None, reason)` for a pair that has none."""
    votes = [[label.strip().lower() for label in cell.split(",")] for cell in cells if cell.strip()]
    if not votes or any(len(vote) != 2 or not set(vote) <= set(SENTIMENTS) for vote in votes):
        return None, f"their labels are not pairs of {', '.join(SENTIMENTS)}"
    text, image = (_majority(labels) for labels in zip(*votes, strict=True))
    if text is None or image is None:
        return None, "the annotators have no majority"
    if text == image or image == "neutral":
        return text, ""
    if text == "neutral":
        return image, ""
    return None, "text and image labels contradict (positive against negative)"


def _majority(labels: Iterable[str]) -> str | None:
    labels = list(labels)
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def _read_manifest(path: Path) -> _Rows:
    """A CSV or JSONL with `id`, `image` and/or `text`, and perhaps `label` and `split`."""
    file = _manifest_file(path)
    content = _decode_file(file)
    cells = _csv_rows(file, content) if file.suffix.lower() == ".csv" else _jsonl_rows(file, content)
    rows = [_manifest_row(file.parent, values, f"{file.name} line {number}") for number, values in cells]
    return rows, []


def manifest_records(content: bytes, folder: Path, name: str) -> list[Record]:
    """The rows of a manifest that is no file, CSV or JSONL, in their order; its paths are relative to `folder`, and
    messages call it `name`. Raises `UsageError` as `read_dataset`."""
    is_csv = not content.lstrip().startswith(b"{")
    called, text = Path(name), _decode(content, name)
    cells = _csv_rows(called, text) if is_csv else _jsonl_rows(called, text)
    rows = [_manifest_row(folder, values, f"{name} line {number}") for number, values in cells]
    if not rows:
        raise UsageError(f"{name} holds no pairs; expected at least one row of {', '.join(MANIFEST_COLUMNS)}")
    _check_ids(rows)
    return list(_records(rows))


def _manifest_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("manifest.csv", "manifest.jsonl"):
        if (path / name).is_file():
            return path / name
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".csv", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise UsageError(f"{path} must hold one manifest (.csv or .jsonl); found {names}. Name the file with `data`")
    return found[0]


def _csv_rows(file: Path, content: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    limit = csv.field_size_limit(MAX_TEXT_BYTES)  # the module's own limit is 128 KB
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        _check_columns(file, header)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UsageError(
                    f"{file.name} line {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the header; "
                    'quote a cell that holds a comma or a line break with "..."'
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{file.name} line {reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(file: Path, content: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines(): a string may hold U+2028
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{file.name} line {number}: not valid JSON ({error}); expected one object per line"
            ) from None
        if not isinstance(values, dict):
            raise UsageError(f"{file.name} line {number}: a JSON {type(values).__name__}; expected one object per line")
        _check_columns(file, list(values), f" line {number}")
        yield number, {name: _scalar(value, f"{file.name} line {number}: {name}") for name, value in values.items()}


def _check_columns(file: Path, names: list[str], where: str = "") -> None:
    known = ", ".join(MANIFEST_COLUMNS)
    unknown = [name for name in names if name not in MANIFEST_COLUMNS]
    if unknown:
        raise UsageError(f"{file.name}{where}: unknown column {', '.join(map(repr, unknown))}; known are {known}")
    if len(set(names)) < len(names):
        raise UsageError(f"{file.name}{where}: a column is named twice in {', '.join(names)}")
    if "id" not in names or not {"image", "text"} & set(names):
        raise UsageError(
            f"{file.name}{where}: columns {', '.join(names) or 'none'}; expected id and at least one of image, text "
            f"(known are {known})"
        )


def _scalar(value: Any, where: str) -> str | None:
    if isinstance(value, (dict, list)):
        raise UsageError(f"{where} is a JSON {type(value).__name__}; expected a string, a number or null")
    return None if value is None else str(value)


def _manifest_row(folder: Path, values: dict[str, str | None], source: str) -> _Row:
    split = (values.get("split") or "").strip() or "train"
    if not _SPLIT_NAME.fullmatch(split):
        raise UsageError(f"{source}: split {split!r}; expected letters, digits, '-' and '_' only")
    row = _Row(split, (values.get("id") or "").strip(), source, label=_label(values.get("label")))
    image = (values.get("image") or "").strip()
    row.image = folder / image if image else None
    text = values.get("text")
    if text is None:
        row.error = "the manifest gives no text"
    elif _names_a_file(text.strip(), folder):
        row.text_path = folder / text.strip()
        row.raw, row.error = _read_text_file(row.text_path, text.strip())
    else:
        row.text = text
    return row


def _names_a_file(text: str, folder: Path) -> bool:
    """Whether a text is the path of one: ends in .txt, and is one word or there."""
    return text.lower().endswith(".txt") and (len(text.split()) == 1 or os.path.exists(folder / text))


def _label(value: str | None) -> str | None:
    return (value or "").strip() or None


def _read_shards(path: Path) -> _Rows:
    """Tar shards of files `<key>.<ext>`; a shard's split is the beginning of its name: train-000.tar."""
    shards = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.name.endswith(".tar"))
    if not shards:
        raise UsageError(f"{path} is not of layout shards; expected {_EXPECTED['shards']}")
    rows: list[_Row] = []
    for shard in shards:
        prefix = re.match(r"[A-Za-z]+(?:_[A-Za-z]+)*", shard.stem)
        rows += _shard_rows(shard, prefix.group() if prefix else "train")
    return rows, []


def _shard_rows(shard: Path, split: str) -> list[_Row]:
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


def _shard_row(shard: Path, split: str, key: str, files: dict[str, tuple[TarSlice, bytes]]) -> _Row:
    source = f"{shard.name} {key}"
    facts = _shard_json(files["json"][1], source) if "json" in files else {}
    row = _Row(split, facts.get("id") or key, source, label=_label(facts.get("label")), text=facts.get("text"))
    if "cls" in files:
        row.label = _label(_decode(files["cls"][1], f"{source}.cls"))
    row.image = next((files[ext[1:]][0] for ext in PICTURES if ext[1:] in files), None)
    if "txt" in files:
        row.text_path, content = files["txt"]
        row.raw, row.error = _limited(content)
    elif row.text is None:
        row.error = f"no text file {key}.txt in {shard.name}"
    return row


def _shard_json(raw: bytes, source: str) -> dict[str, str | None]:
    try:
        values = json.loads(_decode(raw, f"{source}.json"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}.json: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source}.json: a JSON {type(values).__name__}; expected an object")
    # Others' keys (captioning tools write many) are theirs.
    return {name: _scalar(values.get(name), f"{source}.json: {name}") for name in ("id", "label", "text")}


LAYOUTS: dict[str, Callable[[Path], _Rows]] = {
    "course": _read_course,
    "mvsa": _read_mvsa,
    "manifest": _read_manifest,
    "shards": _read_shards,
}


# ---------------------------------------------------------------------------------------------- files


def _attach_pairs(rows: list[_Row], root: Path) -> None:
    """Give each row the files `<id>.<extension>` of the pairs' folder.

    The folder is listed, ids are never joined to a path: one like `../x` has no files rather than a stranger's.
    """
    folder, pictures, texts = _list_pairs(root)
    for row in rows:
        row.image = pictures.get(row.id)
        row.text_path = texts.get(row.id)
        if row.text_path:
            row.raw, row.error = _read_text_file(row.text_path, row.text_path.name)
        else:
            row.error = f"no text file {row.id}.txt in {folder.name}"


def _list_pairs(root: Path) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The folder of the pairs, and its pictures and texts by id."""
    folder = next((root / name for name in ("data", "pics_texts_pair") if (root / name).is_dir()), root)
    pictures: dict[str, tuple[int, str, Path]] = {}
    texts: dict[str, tuple[int, str, Path]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            kinds, by_id = (PICTURES, pictures) if extension.lower() in PICTURES else ((".txt",), texts)
            if extension.lower() in kinds:
                found = (kinds.index(extension.lower()), entry.name, folder / entry.name)
                by_id[stem] = min(by_id.get(stem, found), found)
    first = [{stem: path for stem, (_, _, path) in by_id.items()} for by_id in (pictures, texts)]
    return folder, first[0], first[1]


def _read_text_file(path: Path, name: str) -> tuple[bytes | None, str]:
    """A text's bytes, or None and the reason."""
    try:
        # Asked before opening: a named pipe would block for ever.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return None, f"text {name} is a folder" if stat.S_ISDIR(mode) else f"text {name} is not a regular file"
        with path.open("rb") as file:
            return _limited(file.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        return None, f"text {name} cannot be read: {error.strerror}"
    except ValueError:  # a NUL or a lone surrogate in the path
        return None, f"text {name!r} cannot be read: not a valid file name"


def _limited(raw: bytes) -> tuple[bytes | None, str]:
    too_long = len(raw) > MAX_TEXT_BYTES
    return (None, f"text is longer than {MAX_TEXT_BYTES >> 20} MB") if too_long else (raw, "")


def _decode_file(file: Path) -> str:
    return _decode(file.read_bytes(), str(file))


def _decode(raw: bytes, source: str) -> str:
    text, reason = decode_texts([raw])[0]
    if text is None:
        raise UsageError(f"{source} cannot be decoded: {reason}; save it as UTF-8")
    return text


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    return enumerate(io.StringIO(_decode_file(file), newline=None), 1)


# ---------------------------------------------------------------------------------------------- all layouts


def _check_ids(rows: list[_Row]) -> None:
    """Raise `UsageError` for ids that are empty, unstorable or repeated (across splits too)."""
    first: dict[str, _Row] = {}
    repeated: dict[str, str] = {}
    for row in rows:
        if not row.id:
            raise UsageError(f"{row.source}: empty id; every row needs one of its own")
        if "\0" in row.id or _has_surrogates(row.id + (row.label or "")):
            raise UsageError(f"{row.source}: id {row.id!r} or its label holds a NUL or a lone surrogate; rename it")
        if first.setdefault(row.id, row) is not row:
            repeated.setdefault(row.id, f"{row.id!r} ({first[row.id].source} and {row.source})")
    if repeated:
        shown = "; ".join(list(repeated.values())[:5]) + ("; ..." if len(repeated) > 5 else "")
        raise UsageError(
            f"{len(repeated)} repeated ids: {shown}. Expected unique ids across all splits; rename or remove them"
        )


def _has_surrogates(text: str) -> bool:
    """Whether a string (from JSON's escapes) can't be written as UTF-8."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _records(rows: list[_Row]) -> Iterator[Record]:
    """The finished records. All texts are decoded together: they tell each other's encoding."""
    decoded = iter(decode_texts([row.raw for row in rows if row.raw is not None]))
    for row in rows:
        text, encoding, reason = row.text, "", row.error
        if row.raw is not None:
            text, outcome = next(decoded)
            encoding, reason = (outcome, "") if text is not None else ("", f"text cannot be decoded: {outcome}")
        elif text is not None and _has_surrogates(text):
            text, reason = None, "text cannot be decoded: it holds a lone surrogate"
        yield Record(row.id, row.image, text, row.label, encoding, reason, row.text_path)


def _label_warnings(rows: list[_Row]) -> list[str]:
    """One warning for each label seen once among many rows: most likely a typo."""
    labelled = [(row, row.label) for row in rows if row.label is not None]
    counts = Counter(label for _, label in labelled)
    if len(labelled) < _TYPO_MIN_ROWS:
        return []
    common = [label for label, count in counts.most_common() if count > 1]
    single = [(row, label) for row, label in labelled if counts[label] == 1]
    warnings = []
    for row, label in single[:_TYPO_MAX_WARNINGS]:
        close = difflib.get_close_matches(label, common, 1)
        hint = f"; is it {close[0]!r}?" if close else ""
        warnings.append(f"label {label!r} is seen once among {len(labelled)} rows ({row.source}){hint}")
    if len(single) > _TYPO_MAX_WARNINGS:
        warnings.append(f"{len(single) - _TYPO_MAX_WARNINGS} more labels are seen only once")
    return warnings
