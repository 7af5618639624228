"""Manifests: CSV, TSV and its like, JSONL, Parquet; read as a whole, and by pieces, which must be the same."""

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from feats.errors import RowError, UsageError
from feats.images import picture_size
from feats.pieces import open_pieces
from feats.reading import remote
from feats.reading.columns import parse_columns
from feats.records import Record, read_dataset
from tests.fuzzing.mutations import encoded, mutated, odd_text, odd_value, plain_text, without_surrogates
from tests.fuzzing.outcomes import Outcome, expect, judged, made

HEADERS = (
    "id",
    "image",
    "text",
    "label",
    "split",
    "guid",
    "title",
    "caption",
    "class",
    "fold",
    "tag",
    "ID",
    " Text ",
    "file",
)
Facts = list[tuple[str, str, str | None, str | None]]


def facts(records: Iterable[Record]) -> Facts:
    """What reading one way and another must agree on."""
    return [(record.id, str(record.image_path), record.text, record.label) for record in records]


def read_all(data: Path, columns: dict[str, str] | None = None, layout: str | None = None) -> dict[str, Facts]:
    """The splits of a data set. Every row has a text or a reason, and a name for all its files."""
    whole = read_dataset(data, layout, columns=columns)
    for pairs in whole.splits.values():
        source = pairs.source
        expect(len(source.images) == len(source.texts) == len(pairs), "a source of another length")
        for record in pairs:
            expect(
                (record.text is None) == bool(record.text_error), f"text {record.text!r}, reason {record.text_error!r}"
            )
            expect(bool(record.id), "an empty id")
        for record in pairs[:3]:
            try:
                picture_size(record.image_path)
            except RowError as error:
                expect(bool(str(error)), "no reason")
    return {split: facts(pairs) for split, pairs in whole.splits.items()}


def read_streamed(rng: Random, data: Path, columns: dict[str, str] | None = None) -> dict[str, Facts]:
    """As `read_all`, piece by piece, in chunks of a few bytes."""
    usual = remote.CHUNK_BYTES
    remote.CHUNK_BYTES = rng.choice((1, 2, 3, 7, 64, usual))
    try:
        pieces = open_pieces(data, rows=rng.randint(1, 4), columns=columns)
        found = {split: [row for n in range(len(of)) for row in facts(of.read(n))] for split, of in pieces.items()}
        for of in pieces.values():
            json.dumps([of.describe(n) for n in range(len(of))])
        return found
    finally:
        remote.CHUNK_BYTES = usual


def _columns(rng: Random) -> dict[str, str] | None:
    if rng.random() < 0.85:
        return None
    roles = rng.sample(["id", "image", "text", "label", "split"], rng.randint(1, 3))
    words = [f"{role}={rng.choice((*HEADERS, '', odd_text(rng)))}" for role in roles]
    return parse_columns(words if rng.random() < 0.9 else [*words, odd_text(rng)])


def _cell(rng: Random, role: str, number: int) -> str:
    if rng.random() < 0.08:
        return odd_text(rng)
    usual = {
        "id": str(number),
        "image": rng.choice(["a.jpg", "../bait.txt", "", "b/c.png", "link.jpg"]),
        "text": rng.choice([plain_text(rng), "a.txt", "../bait.txt", "sub.txt", "latin.txt"]),
        "label": rng.choice(["good", "bad", "", "null", "1.0"]),
        "split": rng.choice(["train", "train", "test", ""]),
    }
    return usual.get(role.strip().lower(), plain_text(rng))


def _header(rng: Random) -> list[str]:
    if rng.random() < 0.85:
        return rng.sample(["id", "text", "image", "label", "split"], rng.choice([2, 4, 5, 5, 5]))
    return [rng.choice((*HEADERS, odd_text(rng))) for _ in range(rng.randint(1, 6))]


def _neighbours(folder: Path) -> None:
    """Files that rows name."""
    (folder / "a.txt").write_bytes("good näive day".encode())
    (folder / "latin.txt").write_bytes("zürich größe".encode("latin-1"))
    (folder / "sub.txt").mkdir()
    os.symlink("../bait.txt", folder / "link.jpg")


def _both(rng: Random, path: Path, columns: dict[str, str] | None) -> None:
    data = path if rng.random() < 0.8 else path.parent
    whole: dict[str, Facts] | UsageError
    try:
        whole = read_all(data, columns, "manifest" if rng.random() < 0.3 else None)
    except UsageError as error:
        whole = error
    try:
        streamed = read_streamed(rng, data, columns)
    except UsageError as error:
        told = str(error)
        # Encodings are told from a whole, and long before its rows are read a stream looks for repeated ids.
        expect(isinstance(whole, UsageError) or "UTF-8" in told, f"only a stream refuses: {told}")
        if isinstance(whole, UsageError):
            raise whole from None
        return
    if isinstance(whole, UsageError):
        raise whole
    expect(_comparable(whole) == _comparable(streamed), f"{whole} differs from {streamed}")


def _comparable(found: dict[str, Facts]) -> dict[str, Any]:
    """Texts in files of no certain encoding may come out otherwise, by what is read together."""
    return {
        split: [row if row[2] is None or row[2].isascii() else (*row[:2], row[3]) for row in rows]
        for split, rows in found.items()
    }


def csv_table(rng: Random, folder: Path) -> Outcome:
    """CSV, and with other separators."""
    home = made(rng, folder)
    _neighbours(home)
    header = _header(rng)
    rows = [[_cell(rng, role, n) for role in header] for n in range(rng.randint(0, 6))]
    if rng.random() < 0.15:
        rows.append(rows[0][:-1] if rows else [])
    name = rng.choice(["manifest.csv", "x.csv", "x.tsv", "manifest.tsv", "X.CSV"])
    out = io.StringIO()
    writer = csv.writer(
        out,
        delimiter="\t" if name.endswith("tsv") and rng.random() < 0.9 else rng.choice(",,,;|\t"),
        lineterminator=rng.choice(["\n", "\r\n"]),
        quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    writer.writerows([header, *rows])
    raw = encoded(rng, out.getvalue())
    if rng.random() < 0.5:
        raw = mutated(rng, raw)
    if rng.random() < 0.01:
        raw = raw * 100
    path = home / name
    path.write_bytes(raw)
    return judged(folder, lambda: _both(rng, path, _columns(rng)))


def jsonl_table(rng: Random, folder: Path) -> Outcome:
    """JSON lines of odd values."""
    home = made(rng, folder)
    _neighbours(home)
    header = _header(rng)
    lines = []
    for n in range(rng.randint(0, 6)):
        row = {
            role: odd_value(rng) if rng.random() < 0.04 else _cell(rng, role, n)
            for role in header
            if rng.random() < 0.95
        }
        try:
            lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5))
        except ValueError:  # an integer of too many digits
            lines.append('{"text": ' + "9" * 5000 + "}")
    if rng.random() < 0.05:
        lines.append(rng.choice(["[" * 3000, '{"a":' * 100_000, "null", "3", '{"id": 1, "id": 2, "text": "x"}']))
    raw = encoded(rng, "\n".join(lines))
    path = home / rng.choice(["manifest.jsonl", "x.jsonl"])
    path.write_bytes(mutated(rng, raw) if rng.random() < 0.4 else raw)
    return judged(folder, lambda: _both(rng, path, _columns(rng)))


def _arrow_column(rng: Random, role: str, rows: int) -> Any:
    import pyarrow as pa

    kinds = {
        "text": lambda: pa.array([without_surrogates(_cell(rng, role, n)) for n in range(rows)]),
        "integers": lambda: pa.array(range(rows), rng.choice([pa.int8(), pa.int64(), pa.uint64()])),
        "floats": lambda: pa.array([rng.choice([0.5, 1.0, float("nan"), 1e300]) for _ in range(rows)]),
        "bytes": lambda: pa.array([rng.randbytes(4) for _ in range(rows)], pa.binary()),
        "no-utf-8": lambda: pa.array([rng.choice([b"a", b"\xff\xfe"]) for _ in range(rows)], pa.binary()).view(pa.string()),
        "lists": lambda: pa.array([["a"]] * rows),
        "structs": lambda: pa.array([{"a": 1}] * rows),
        "instants": lambda: pa.array([rng.randrange(-(1 << 62), 1 << 62) for _ in range(rows)], pa.timestamp(rng.choice(["s", "us", "ns"]), rng.choice([None, "UTC", "Not/AZone"]))),
        "days": lambda: pa.array([rng.randrange(-(1 << 31), 1 << 31) for _ in range(rows)], pa.date32()),
        "durations": lambda: pa.array([rng.randrange(-(1 << 62), 1 << 62) for _ in range(rows)], pa.duration("s")),
        "nulls": lambda: pa.nulls(rows),
        "booleans": lambda: pa.array([rng.random() < 0.5 for _ in range(rows)]),
        "dictionary": lambda: pa.array(rng.choices("ab", k=rows)).dictionary_encode(),
    }  # fmt: skip
    chosen = "text" if rng.random() < 0.85 else rng.choice(list(kinds))
    return kinds[chosen]()


def parquet_table(rng: Random, folder: Path) -> Outcome:
    """Parquet of all types, whole and with changed bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    home = made(rng, folder)
    _neighbours(home)
    rows = rng.randint(0, 6)
    names = [without_surrogates(name) for name in _header(rng)]
    path = home / rng.choice(["manifest.parquet", "x.parquet"])
    columns = _columns_or_none(rng)
    table = pa.table([_arrow_column(rng, name, rows) for name in names], names=names)
    options = {"row_group_size": rng.choice([1, 2, 100]), "compression": rng.choice(["snappy", "none", "zstd"])}
    try:
        pq.write_table(table, path, **options)
    except pa.ArrowException:  # an instant that the format can't say
        pq.write_table(table.select([]), path)
    if rng.random() < 0.6:
        raw = path.read_bytes()
        at = rng.choice((0, 4, max(0, len(raw) - 600), max(0, len(raw) - 60)))
        path.write_bytes(raw[:at] + mutated(rng, raw[at:], 3))
    return judged(folder, lambda: _both(rng, path, columns))


def _columns_or_none(rng: Random) -> dict[str, str] | None:
    try:
        return _columns(rng)
    except UsageError:
        return None


TABLES = {"csv": csv_table, "jsonl": jsonl_table, "parquet": parquet_table}
