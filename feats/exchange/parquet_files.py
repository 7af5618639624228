"""Features in Parquet: a row a pair, a column a dataset.

Written are `id`, `label` (null where unknown), `quarantine` (why a row has no features, null where it has some), a list
of float16 for each feature dataset and the row facts of `feats.cache_layout.ROW_FACTS`. Datasets with more than one
vector a row are one list after another; the field's metadata have the `shape`. The file's metadata say what made the
features. Read are these, and files of others with one column of lists of floats for each side.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feats.cache_layout import ROW_FACTS
from feats.cache_reader import DONE, CacheReader
from feats.errors import UsageError, first_line
from feats.exchange.foreign import Batch, Columns, Foreign, dtype_of_files, strings
from feats.extraction.summary import Progress
from feats.json_files import parse_json, shape_problem
from feats.source import SIDES
from feats.writing import replacing

GROUP_BYTES = 64 << 20  # of features in a row group, about
READ_ROWS = 4096
MADE_BY = b"feature_cache"


def write_parquet(
    store: CacheReader, path: Path, *, overwrite: bool = False, progress: Progress = lambda done, total: None
) -> int:
    """Write a cache as the Parquet file `path`, which appears when it is whole; returns how many rows have features.

    Memory: one row group. Raises `UsageError` when the file exists (without `overwrite`) or can't be written, and as
    reading the cache does.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; name another folder with `out`, or replace it with `overwrite`")
    with (
        replacing(path, "name another folder with `out`") as unfinished,
        pq.ParquetWriter(unfinished, _schema(store), use_dictionary=["label"]) as writer,
    ):
        for table, stop in _tables(store, writer.schema):
            writer.write_table(table, row_group_size=len(table))
            progress(stop, len(store))
    return int((store.status == DONE).sum())


def facts_of(store: CacheReader) -> dict[str, Any]:
    """The row facts a cache holds, with their types."""
    return {name: dtype for side in ROW_FACTS.values() for name, dtype in side.items() if name in store.schema}


def _schema(store: CacheReader) -> pa.Schema:
    fields = [pa.field("id", pa.string(), nullable=False), pa.field("label", pa.string())]
    fields.append(pa.field("quarantine", pa.string()))
    for name, shape in store.features.items():
        kind = pa.list_(pa.float16(), -1 if name == "text_tokens" else int(np.prod(shape)))
        fields.append(pa.field(name, kind, metadata={"shape": json.dumps(shape)}))
    fields += [pa.field(name, pa.from_numpy_dtype(dtype)) for name, dtype in facts_of(store).items()]
    return pa.schema(fields, metadata=told_of(store))


def told_of(store: CacheReader) -> dict[bytes, str]:
    """What a file's metadata say of the cache it was written from."""
    return {MADE_BY: json.dumps({"fingerprint": store.fingerprint, "parameters": store.parameters})}


def maker_in(schema: pa.Schema) -> dict[str, Any]:
    """`made_by` and `parameters` of `Foreign`, as a file's metadata say them; nothing in files of others."""
    told = (schema.metadata or {}).get(MADE_BY)
    if told is None:
        return {}
    try:
        found = parse_json(told)
    except ValueError as error:
        found = str(error)
    wrong = shape_problem(found, {"fingerprint": dict, "parameters": (None, {str: int})})
    if wrong:
        raise UsageError(f"what the file says of its maker {wrong}; write it again, or leave its metadata out")
    return {"made_by": found["fingerprint"], "parameters": found["parameters"]}


def facts_in(schema: pa.Schema) -> list[str]:
    """The row facts in a file that this program wrote. In others' files columns of these names may be anything."""
    return [name for side in ROW_FACTS.values() for name in side if maker_in(schema) and name in schema.names]


def _tables(store: CacheReader, schema: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
    """The rows by row groups, and the number of the row behind each."""
    tags = store.tags
    for first, stop in store.spans(GROUP_BYTES):
        rows = slice(first, stop)
        absent = store.status[rows] != DONE
        ids = store.ids[rows].tolist()
        reasons = [store.reasons.get(name, "not encoded") if gone else None for name, gone in zip(ids, absent)]
        columns: dict[str, Any] = {"id": ids, "label": [tag or None for tag in tags[rows].tolist()]}
        columns["quarantine"] = pa.array(reasons, pa.string())
        for name, values in store.stored(first, stop).items():
            if name == "text_tokens":
                columns[name] = _ragged(values, store.token_counts()[rows], absent)
            elif name in store.features:
                flat = pa.array(np.ascontiguousarray(values).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(
                    flat, int(np.prod(values.shape[1:])), mask=pa.array(absent)
                )
            else:
                columns[name] = values
        yield pa.table({name: columns[name] for name in schema.names}, schema=schema), stop


def _ragged(values: np.ndarray, counts: np.ndarray, absent: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts * values.shape[1])])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.reshape(-1)), mask=pa.array(absent))


# -- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """Where a dataset is: its column and the shape of one row (of one token)."""

    name: str
    shape: tuple[int, ...]


def read_parquet(files: Sequence[Path], columns: Columns) -> Foreign:
    """Features in Parquet files, one after another. `columns` name those of files that this program didn't write.

    Only ids and labels are read here. Raises `UsageError` for files that can't be read or are of different columns.
    """
    schemas = [_opened(path).schema_arrow for path in files]
    maker = maker_in(schemas[0])
    datasets = _own(schemas[0]) if maker else _theirs(files[0], schemas[0], columns)
    facts = facts_in(schemas[0])
    id_column = columns.id_in(schemas[0].names, files[0])
    label_column = columns.label_in(schemas[0].names, files[0])
    needed = [id_column, *([label_column] if label_column else []), *(c.name for c in datasets.values()), *facts]
    for path, schema in zip(files, schemas, strict=True):
        lacking = [name for name in needed if name not in schema.names]
        if lacking:
            raise UsageError(f"{path} has no column {lacking[0]}, which {files[0]} has; import them one by one")
    ids: list[str | None] = []
    labels: list[str] = []
    counts: list[np.ndarray] = []
    for path in files:
        for batch in _batches(path, needed if "text_tokens" in datasets else needed[: 1 + bool(label_column)]):
            ids += strings(batch.column(id_column))
            labels += [x or "" for x in strings(batch.column(label_column))] if label_column else [""] * len(batch)
            if "text_tokens" in datasets:
                lengths = pc.fill_null(pc.list_value_length(batch.column("text_tokens")), 0)
                counts.append(lengths.to_numpy(zero_copy_only=False) // datasets["text_tokens"].shape[0])
    shapes = datasets if maker else {name: _measured(files, column) for name, column in datasets.items()}
    return Foreign(
        format="parquet",
        files=files,
        ids=ids,
        labels=labels,
        features={name: column.shape for name, column in shapes.items()},
        dtype=dtype_of_files({str(schemas[0].field(column.name).type.value_type) for column in datasets.values()}),
        read=partial(_read, files, shapes, facts, id_column),
        token_counts=np.concatenate(counts).astype(np.int64) if "text_tokens" in datasets else None,
        **maker,
    )


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} can't be read as Parquet ({first_line(error)})") from None


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        with _opened(path) as file:
            yield from file.iter_batches(READ_ROWS, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} can't be read to its end ({first_line(error)}); fetch it again") from None


def _own(schema: pa.Schema) -> dict[str, _Column]:
    """The datasets of a file that this program wrote."""
    shapes = {f.name: f.metadata[b"shape"] for f in schema if f.metadata and b"shape" in f.metadata}
    try:
        told = {name: parse_json(shape) for name, shape in shapes.items()}
    except ValueError as error:
        raise UsageError(f"a column's shape can't be read ({first_line(error)}); write the file again") from None
    if any(shape_problem(shape, [int]) or min(shape, default=0) < 0 for shape in told.values()):
        raise UsageError(f"columns of shapes {str(list(told.values()))[:80]}; write the file again")
    return {name: _Column(name, tuple(shape)) for name, shape in told.items()}


def _theirs(path: Path, schema: pa.Schema, columns: Columns) -> dict[str, _Column]:
    """The columns that hold features, of unknown widths yet."""
    lists = [f.name for f in schema if _is_list_of_floats(f.type)]
    named = {side: name for side in SIDES if (name := getattr(columns, side))}
    if not named:
        raise UsageError(
            f"{path} has {len(lists)} columns of lists of floats ({', '.join(lists) or 'none'}); say which holds "
            "features of pictures with `image`, which of texts with `text`"
        )
    for name in named.values():
        if name not in lists:
            raise UsageError(f"{path} has no column {name} of lists of floats; it has {', '.join(lists) or 'none'}")
    return {f"{side}_feats": _Column(name, ()) for side, name in named.items()}


def _is_list_of_floats(kind: pa.DataType) -> bool:
    a_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(a_list and pa.types.is_floating(kind.value_type))


def _measured(files: Sequence[Path], column: _Column) -> _Column:
    """The column with the width of its first row that has one."""
    for path in files:
        for batch in _batches(path, [column.name]):
            lengths = pc.drop_null(pc.list_value_length(batch.column(column.name)))
            if len(lengths) and lengths[0].as_py():
                return _Column(column.name, (lengths[0].as_py(),))
    raise UsageError(f"{files[0]}: column {column.name} holds no features")


def _read(
    files: Sequence[Path], datasets: Mapping[str, _Column], facts: Sequence[str], id_column: str
) -> Iterator[Batch]:
    reason = "quarantine"
    for path in files:
        own = reason in _opened(path).schema_arrow.names
        names = dict.fromkeys([id_column, *(c.name for c in datasets.values()), *facts, *([reason] if own else [])])
        for batch in _batches(path, [*names]):
            ids = strings(batch.column(id_column))
            arrays: dict[str, np.ndarray] = {}
            reasons: dict[int, str] = {}
            for name, column in datasets.items():
                values = batch.column(column.name)
                absent = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)).tolist()
                reasons |= dict.fromkeys(absent, f"no {name} in {path.name}")
                arrays[name] = _values(path, name, column, values, ids)
            if own and reasons:
                told = batch.column(reason).to_pylist()
                reasons = {row: told[row] or why for row, why in reasons.items()}
            kept = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in facts}
            yield Batch(len(batch), arrays, kept, reasons)


def _values(path: Path, name: str, column: _Column, values: pa.Array, ids: Sequence[str | None]) -> np.ndarray:
    """A column's rows (R, ...), NaN where a row has none; the tokens of all (ΣL, D)."""
    flat: np.ndarray = values.flatten().to_numpy(zero_copy_only=False)
    if name == "text_tokens":
        return flat.reshape(-1, *column.shape)
    there = values.is_valid().to_numpy(zero_copy_only=False)
    size = int(np.prod(column.shape))
    lengths = pc.fill_null(pc.list_value_length(values), size).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != size)
    if len(wrong):
        raise UsageError(
            f"{path}: {column.name} has {lengths[wrong[0]]} values in row {ids[wrong[0]]}, {size} in others; all rows "
            "of a column must have the same"
        )
    out = np.full((len(values), size), np.nan, flat.dtype)
    out[there] = flat.reshape(-1, size)
    return out.reshape(-1, *column.shape)
