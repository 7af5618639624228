"""Layout manifest: a CSV or JSONL with a row for each pair."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from feats.errors import UsageError
from feats.reading.rows import (
    MANIFEST_COLUMNS,
    MAX_TEXT_BYTES,
    Row,
    Rows,
    decode_file,
    label_of,
    read_text_file,
    scalar,
)

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


def read_manifest(path: Path) -> Rows:
    """A CSV or JSONL with `id`, `image` and/or `text`, and perhaps `label` and `split`."""
    file = _manifest_file(path)
    content = decode_file(file)
    cells = _csv_rows(file, content) if file.suffix.lower() == ".csv" else _jsonl_rows(file, content)
    rows = [_manifest_row(file.parent, values, f"{file.name} line {number}") for number, values in cells]
    return rows, []


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
        yield number, {name: scalar(value, f"{file.name} line {number}: {name}") for name, value in values.items()}


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


def _manifest_row(folder: Path, values: dict[str, str | None], source: str) -> Row:
    split = (values.get("split") or "").strip() or "train"
    if not _SPLIT_NAME.fullmatch(split):
        raise UsageError(f"{source}: split {split!r}; expected letters, digits, '-' and '_' only")
    row = Row(split, (values.get("id") or "").strip(), source, label=label_of(values.get("label")))
    image = (values.get("image") or "").strip()
    row.image = folder / image if image else None
    text = values.get("text")
    if text is None:
        row.error = "the manifest gives no text"
    elif _names_a_file(text.strip(), folder):
        row.text_path = folder / text.strip()
        row.raw, row.error = read_text_file(row.text_path, text.strip())
    else:
        row.text = text
    return row


def _names_a_file(text: str, folder: Path) -> bool:
    """Whether a text is the path of one: ends in .txt, and is one word or there."""
    return text.lower().endswith(".txt") and (len(text.split()) == 1 or os.path.exists(folder / text))
