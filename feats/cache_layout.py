"""How a cache's HDF5 file is laid out.

Every dataset is chunked, checksummed (fletcher32) and allocated in full at creation, filled with NaN, so that writing
never changes the file's structure: a killed writer can only tear the chunks it was writing, a full disk shows at
creation, and a row that was never written reads as NaN, not as zeros. No chunk spans two blocks of rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from feats.plain_hdf5 import dataset_problem
from feats.source import Source
from feats.strings import BLOCK, Labels, Strings

FORMAT_VERSION = 2

PATHS = ("image_path", "text_path")  # a row's files, see `Source`; not every cache has them

CHUNK_BYTES = 1 << 20
LIBVER = ("v108", "v108")
MIN_TAG_BYTES = 32  # room for labels corrected later
PATH_ROOM, MAX_PATH_BYTES = 32, 1024  # room for data that move later; longer paths aren't kept
SOURCE_BYTES = 8192

# One value per row beside the features. The hashes let a later run see that a row's content changed, and let stage 2
# find duplicates without opening a picture or a tweet.
ROW_FACTS: dict[str, dict[str, Any]] = {
    "image": {
        "image_hash": np.uint64,  # of the picture file's bytes
        "image_bytes": np.int64,  # the picture file's size
    },
    "text": {
        "n_tokens": np.int32,
        "truncated": np.uint8,
        "text_hash": np.uint64,  # of the decoded, uncleaned text
        "text_key": np.uint64,  # of the text as compared for duplicates: cleaned, case folded
    },
}

# What a cache's file may hold beside features, see `feats.plain_hdf5.dataset_problem`.
_KNOWN: dict[str, Any] = {
    **dict.fromkeys(("id", "tag", *PATHS), "S"),
    "status": np.uint8,
    "text_offsets": np.int64,
    **{name: dtype for facts in ROW_FACTS.values() for name, dtype in facts.items()},
}
_LENGTHS = {"text_offsets": 1, "text_tokens": None}
_DIMENSIONS = {"image_feats": 1, "text_feats": 1, "text_tokens": 1, "image_views": 2, "image_tokens": 2}  # of a row


def lay_out(
    file: h5py.File,
    ids: Sequence[str],
    tags: Sequence[str],
    features: Mapping[str, tuple[int, ...]],
    block_rows: int,
    token_counts: np.ndarray | None,
) -> None:
    """Make the datasets of a cache whose N rows are all pending, see `feats.store.FeatureStore.create`: ids and labels,
    status (N,), the facts of the sides that `features` are of, and these."""
    n = len(ids)
    for name, values, room in (("id", ids, 1), ("tag", tags, MIN_TAG_BYTES)):
        width = _width(values, room)
        dataset = new_dataset(file, name, (n,), h5py.string_dtype("utf-8", width), block_rows)
        step = -(-BLOCK // block_rows) * block_rows  # whole chunks
        for low in range(0, n, step):
            dataset[low : low + step] = encoded(values[low : low + step], width)
    new_dataset(file, "status", (n,), np.uint8, block_rows)
    for side, facts in ROW_FACTS.items():
        if any(name.startswith(side) for name in features):
            for name, dtype in facts.items():
                new_dataset(file, name, (n,), dtype, block_rows)
    for name, shape in features.items():
        if name == "text_tokens":
            if token_counts is None:
                raise ValueError("text_tokens need token_counts, how many each text has")
            offsets = np.concatenate([[0], np.cumsum(token_counts)]).astype(np.int64)
            new_dataset(file, "text_offsets", (n + 1,), np.int64, block_rows)[:] = offsets
            new_dataset(file, name, (int(offsets[-1]), *shape), np.float16, block_rows)
        else:
            new_dataset(file, name, (n, *shape), np.float16, block_rows)


def lay_out_source(file: h5py.File, source: Source, block_rows: int) -> None:
    """Make what tells where the raw pairs lie."""
    for name, paths in zip(PATHS, (source.images, source.texts), strict=True):
        kept = short_enough(paths, MAX_PATH_BYTES)
        values = encoded(kept, _width(kept, 0) + PATH_ROOM)
        new_dataset(file, name, (len(kept),), values.dtype, block_rows)[:] = values
    file.attrs["source"] = source_bytes(source)


def short_enough(paths: Sequence[str], room: int) -> Sequence[str]:
    """The paths, '' for one that takes more than `room` bytes."""
    if isinstance(paths, Strings) and paths.width <= room:
        return paths
    return [path if len(path.encode()) <= room else "" for path in paths]


def source_bytes(source: Source) -> np.ndarray:
    """What is told once for all rows, always of the same size, so that bringing it up to date changes no structure.
    Empty if it needs more."""
    keys = ("data", "resolved", "layout", "split", *(["columns"] if source.columns else []))
    told = json.dumps({key: getattr(source, key) for key in keys}).encode()
    return np.array(told if len(told) <= SOURCE_BYTES else b"", f"S{SOURCE_BYTES}")


def new_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any, block_rows: int) -> h5py.Dataset:
    """A dataset whose chunks are on disk from the start; h5py's own call can't ask for that."""
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
    rows = block_rows  # then divisors of it, so that no chunk spans two blocks
    while rows % 2 == 0 and rows * row_bytes > CHUNK_BYTES:
        rows //= 2
    rows = min(rows, shape[0])
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((rows, *shape[1:]))
    plist.set_fletcher32()
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_obj_track_times(False)
    if np.dtype(dtype) == np.float16:
        plist.set_fill_value(np.array(np.nan, np.float16))
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype), logical=True), space, plist)
    )


def blank_chunk(dataset: h5py.Dataset, low: int) -> None:
    """Write the fill value to the chunk that begins at row `low`, whatever is there. An ordinary write of fewer rows
    than a chunk's, as the last one mostly holds, reads the chunk first and fails where it is torn."""
    with h5py.File("blank", "w", driver="core", backing_store=False) as spare:
        blank = new_dataset(spare, "blank", dataset.chunks, dataset.dtype, dataset.chunks[0])
        blank[:] = dataset.fillvalue
        first = (0,) * dataset.ndim
        dataset.id.write_direct_chunk((low, *first[1:]), blank.id.read_direct_chunk(first)[1])


def index_digest(dataset: h5py.Dataset) -> str:
    """Hex sha256 of where the chunks lie; fixed at creation, since all are allocated then."""
    found = []
    dataset.id.chunk_iter(lambda chunk: found.append(tuple(chunk)))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def encoded(values: Sequence[str], min_bytes: int = 1) -> np.ndarray:
    """Fixed-length UTF-8: variable-length strings lie in a heap that no checksum covers."""
    if isinstance(values, Strings):
        width = max(min_bytes, values.width)
        return values.encoded.astype(h5py.string_dtype("utf-8", width))
    utf8 = [value.encode() for value in values]
    width = max(min_bytes, max(map(len, utf8), default=0))
    return np.array(utf8, dtype=h5py.string_dtype("utf-8", width))


def _width(values: Sequence[str], room: int) -> int:
    """How many bytes the longest of `values` takes, at least `room`."""
    if isinstance(values, Strings):
        return max(room, values.width)
    distinct = values.names if isinstance(values, Labels) else values
    return max(room, max((len(value.encode()) for value in distinct), default=0))


def decoded(values: np.ndarray) -> Strings:
    """Strings of what a dataset of fixed-length UTF-8 holds. Raises `ValueError` for what isn't that: here, not when
    one of them is asked for."""
    for low in range(0, len(values), BLOCK):
        block = values[low : low + BLOCK]
        if block.view(np.uint8).max(initial=0) >= 128:
            np.char.decode(block, "utf-8")
    return Strings(values)


def layout_problem(file: h5py.File) -> str:
    """What isn't as a cache's file is laid out, '' for nothing."""
    problem = dataset_problem(file, _KNOWN, _LENGTHS)
    return problem or _shape_problem({name: dataset.shape[1:] for name, dataset in file.items()})


def _shape_problem(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the shapes of rows, '' for nothing."""
    for name, shape in shapes.items():
        if len(shape) != _DIMENSIONS.get(name, len(shape)):
            return f"a row of {name} has {len(shape)} dimensions, expected {_DIMENSIONS[name]}"
    if "image_views" in shapes and shapes["image_views"][1:] != shapes.get("image_feats"):
        return "its views aren't as wide as its features"
    return ""
