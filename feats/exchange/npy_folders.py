"""Features as NumPy matrices, in the folders that clip-retrieval writes and reads, and LAION shares its own in.

`img_emb/img_emb_<k>.npy` and `text_emb/text_emb_<k>.npy` are (N_k, D), `metadata/metadata_<k>.parquet` has a row for
each of theirs. `<k>` counts files from 0, with leading zeros where there are many.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feats.cache_reader import DONE, CacheReader
from feats.errors import UsageError, first_line
from feats.escapes import few
from feats.exchange.foreign import Batch, Columns, Foreign, dtype_of_files, strings
from feats.exchange.parquet_files import facts_in, facts_of, maker_in, told_of
from feats.extraction.summary import Progress
from feats.strings import Labels
from feats.writing import cant_write, replace_folder, sync_tree

FOLDERS = {"image_feats": "img_emb", "text_feats": "text_emb"}
METADATA = "metadata"
FILE_ROWS = 1_000_000  # as clip-retrieval
COPY_ROWS = 4096


def is_npy_folder(path: Path) -> bool:
    """Whether a folder holds features so."""
    return any((path / folder).is_dir() for folder in FOLDERS.values())


def _holds_nothing_else(path: Path) -> bool:
    return is_npy_folder(path) and {entry.name for entry in path.iterdir()} <= {METADATA, *FOLDERS.values()}


def write_npy(
    store: CacheReader,
    path: Path,
    *,
    file_rows: int = FILE_ROWS,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a cache's finished rows into the folder `path`, which appears when it is whole; returns how many they are.

    The metadata have `id`, `image_path` (where the cache knows it, else the id), `label` and the row facts. Views and
    tokens have no place there. Memory: some thousand rows. Raises as `write_parquet`.
    """
    if path.exists() and not (overwrite and _holds_nothing_else(path)):
        raise UsageError(
            f"{path} exists; name another folder with `out`, or replace such features (nothing else) with `overwrite`"
        )
    unfinished = path.with_name(f".{path.name}.writing")
    rows = np.flatnonzero(store.status == DONE)
    source = store.source
    images = source.images if source is not None else []
    tags = store.tags
    files = max(1, -(-len(rows) // file_rows))
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for number in range(files):
            chosen = rows[number * file_rows : (number + 1) * file_rows]
            name = str(number).zfill(len(str(files - 1)))
            for dataset in FOLDERS.keys() & store.features.keys():
                _write_matrix(store, dataset, chosen, unfinished, name)
            _write_metadata(store, tags, images, chosen, unfinished, name)
            progress(number * file_rows + len(chosen), len(rows))
        sync_tree(unfinished)
        replace_folder(unfinished, path)
    except OSError as error:
        raise cant_write(path, error, "name another folder with `out`") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(rows)


def _place(root: Path, folder: str, number: str, suffix: str) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    return root / folder / f"{folder}_{number}.{suffix}"


def _write_matrix(store: CacheReader, dataset: str, rows: np.ndarray, root: Path, number: str) -> None:
    shape = (len(rows), *store.features[dataset])
    with _place(root, FOLDERS[dataset], number, "npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for low in range(0, len(rows), COPY_ROWS):
            file.write(store.read_rows(dataset, rows[low : low + COPY_ROWS]).astype("<f2").tobytes())


def _write_metadata(
    store: CacheReader, tags: Labels, images: Sequence[str], rows: np.ndarray, root: Path, number: str
) -> None:
    facts = {name: store.facts(name)[rows] for name in facts_of(store)}
    ids = store.ids[rows].tolist()
    paths = [images[row] or name for row, name in zip(rows.tolist(), ids)] if len(images) else ids
    labels = [tag or None for tag in tags[rows].tolist()]
    table = pa.table({"id": ids, "image_path": paths, "label": pa.array(labels, pa.string()), **facts})
    pq.write_table(table.replace_schema_metadata(told_of(store)), _place(root, METADATA, number, "parquet"))


# -- reading -----------------------------------------------------------------------------------------------------


def read_npy(path: Path, columns: Columns) -> Foreign:
    """The features in a folder; only ids and labels are read here. Raises `UsageError` for files that lack another, of
    other shapes, or without ids."""
    there = {name: folder for name, folder in FOLDERS.items() if (path / folder).is_dir()}
    numbered = {folder: _numbered(path / folder, folder, "npy") for folder in there.values()}
    numbered[METADATA] = _numbered(path / METADATA, METADATA, "parquet")
    first = next(iter(there.values()))
    for folder, files in numbered.items():
        if files.keys() != numbered[first].keys() or not files:
            raise UsageError(
                f"{path}: {first} has files {few(sorted(numbered[first])) or 'none'}, {folder} "
                f"{few(sorted(files)) or 'none'}; each number must be in all"
            )
    ids: list[str | None] = []
    labels: list[str] = []
    kinds, widths = set(), dict[str, int]()
    for number, file in sorted(numbered[METADATA].items()):
        own_ids, own_labels = _metadata(file, columns)
        ids += own_ids
        labels += own_labels
        for dataset, folder in there.items():
            matrix = _matrix(numbered[folder][number])
            kinds.add(matrix.dtype.name)
            if len(matrix) != len(own_ids):
                raise UsageError(f"{numbered[folder][number]} has {len(matrix)} rows, {file} {len(own_ids)}")
            if widths.setdefault(dataset, matrix.shape[1]) != matrix.shape[1]:
                raise UsageError(
                    f"{numbered[folder][number]} is of width {matrix.shape[1]}, the files before it of "
                    f"{widths[dataset]}; all must be of one"
                )
    matrices = [{d: numbered[folder][number] for d, folder in there.items()} for number in sorted(numbered[first])]
    metadata = [file for _, file in sorted(numbered[METADATA].items())]
    schema = pq.read_schema(numbered[METADATA][min(numbered[METADATA])])
    return Foreign(
        format="npy",
        files=[file for _, files in sorted(numbered.items()) for _, file in sorted(files.items())],
        ids=ids,
        labels=labels,
        features={dataset: (width,) for dataset, width in widths.items()},
        dtype=dtype_of_files(kinds),
        read=partial(_read, matrices, metadata),
        **maker_in(schema),
    )


def _numbered(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    found = ((re.fullmatch(rf"{name}_(\d+)\.{suffix}", path.name), path) for path in folder.glob(f"*.{suffix}"))
    return {int(match[1]): path for match, path in found if match}


def _metadata(file: Path, columns: Columns) -> tuple[list[str | None], list[str]]:
    try:
        names = pq.read_schema(file).names
        id_column, label_column = columns.id_in(names, file), columns.label_in(names, file)
        table = pq.read_table(file, columns=[id_column, *([label_column] if label_column else [])])
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file} can't be read as Parquet ({first_line(error)})") from None
    labels = [x or "" for x in strings(table.column(label_column))] if label_column else [""] * len(table)
    return strings(table.column(id_column)), labels


def _matrix(file: Path) -> np.ndarray:
    try:
        matrix: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read as an array ({first_line(error)})") from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise UsageError(f"{file} holds {matrix.dtype} of shape {matrix.shape}; expected a matrix of floats")
    return matrix


def _read(matrices: Sequence[Mapping[str, Path]], metadata: Sequence[Path]) -> Iterator[Batch]:
    for files, beside in zip(matrices, metadata, strict=True):
        table = pq.read_table(beside, columns=facts_in(pq.read_schema(beside)))
        facts = {name: table.column(name).to_numpy() for name in table.column_names}
        opened = {dataset: _matrix(file) for dataset, file in files.items()}
        rows = len(next(iter(opened.values())))
        for low in range(0, rows, COPY_ROWS):
            arrays = {dataset: np.asarray(matrix[low : low + COPY_ROWS]) for dataset, matrix in opened.items()}
            own = {name: values[low : low + COPY_ROWS] for name, values in facts.items()}
            yield Batch(min(COPY_ROWS, rows - low), arrays, own, {})
