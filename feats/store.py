"""The HDF5 feature cache: create, resume, write, read, validate.

Every dataset is chunked, checksummed (fletcher32) and allocated in full at creation, filled with NaN, so that writing
never changes the file's structure: a killed writer can only tear the chunks it was writing, a full disk shows at
creation, and a row that was never written reads as NaN, not as zeros. Rows are written in blocks that share no chunk
with other rows; a row's status becomes `DONE` only after its features are on disk.

The file format stays below HDF5 1.10: from there on a killed writer leaves a mark that makes the library refuse the
file until a separate tool clears it.
"""

import errno
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
from filelock import FileLock, Timeout

from feats.csv_files import parse_csv, write_rows
from feats.errors import UsageError, first_line
from feats.json_files import parse_json
from feats.plain_hdf5 import attribute_problem, dataset_problem
from feats.source import Source
from feats.strings import Labels, Strings
from feats.writing import appearing, settle, sync

FORMAT_VERSION = 2
PENDING, DONE, QUARANTINED = 0, 1, 2
STATUS_NAMES = {PENDING: "pending", DONE: "done", QUARANTINED: "quarantined"}

PATHS = ("image_path", "text_path")  # a row's files, see `Source`; not every cache has them

_KEPT = "the rows done so far are intact; free some space and run the same command again"
_REMEDY = "the file is damaged or foreign: make it again with `overwrite`"
_RESUME = "an interrupted run may have left it so: run the same extraction again to repair it, else use `overwrite`"

CHUNK_BYTES = 1 << 20
PIECE_ROWS = 1 << 16  # rows whose strings are worked on at a time
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


class CacheError(UsageError):
    """A cache file that is damaged, foreign or in use."""


class CacheInUseError(CacheError):
    """A cache file that another process is writing."""


class MissingRowsError(UsageError):
    """Rows asked for that the cache doesn't hold. `absent`, `pending` and `quarantined` list their ids."""

    def __init__(self, path: Path, absent: list[str], pending: list[str], quarantined: list[str]):
        self.absent, self.pending, self.quarantined = absent, pending, quarantined
        parts = [
            f"{len(ids)} {what} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
            for what, ids in (("not in it", absent), ("not encoded yet", pending), ("in quarantine", quarantined))
            if ids
        ]
        super().__init__(f"{path} lacks rows: {'; '.join(parts)}. Leave them out, or run the extraction again")


@dataclass(frozen=True)
class Frame:
    """What a cache holds of its finished rows, in the cache's order: `ids` (N,), `labels` (N,), '' where unknown, and
    `arrays`, features by dataset, (N, ...) float16."""

    ids: np.ndarray
    labels: np.ndarray
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


class CacheReader(ABC):
    """What reading a cache is, whether it lies in one file (`FeatureStore`) or in parts (`feats.parts.PartedStore`).

    Attributes: `path`, `ids` (N str, `Strings`), `status` (N,) uint8, `fingerprint` (dict), `plan` (dict: how the rows
    are cut into blocks), `reasons` (id -> why it is in quarantine). A context manager; N is its length.
    """

    path: Path
    plan: dict[str, Any]

    if TYPE_CHECKING:  # a file has them as attributes

        @property
        @abstractmethod
        def ids(self) -> Strings:
            """N of them."""

        @property
        @abstractmethod
        def status(self) -> np.ndarray:
            """(N,) uint8."""

        @property
        @abstractmethod
        def fingerprint(self) -> dict[str, Any]:
            """What made the features."""

        @property
        @abstractmethod
        def reasons(self) -> dict[str, str]:
            """Id -> why it is in quarantine."""

    @abstractmethod
    def close(self) -> None:
        """Close all files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.ids)

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Every row is done or in quarantine."""

    @property
    @abstractmethod
    def tags(self) -> Labels:
        """N labels, '' where unknown."""

    @property
    @abstractmethod
    def features(self) -> dict[str, tuple[int, ...]]:
        """Dataset -> shape of one row, for the feature datasets; of one token for `text_tokens`."""

    @property
    @abstractmethod
    def schema(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Dataset -> (shape, dtype), for all of them."""

    @property
    def block_rows(self) -> int:
        """Rows of a block: no chunk spans two."""
        return int(self.plan["block_rows"])

    @property
    @abstractmethod
    def written_at(self) -> float:
        """When the features were last written, in seconds since the epoch; of those in parts the first part's time."""

    @abstractmethod
    def facts(self, name: str) -> np.ndarray:
        """A dataset of `ROW_FACTS`, (N,); 0 where the row isn't done, and all 0 where the encoder lacks the side."""

    def content_digest(self) -> str:
        """Hex sha256 of which rows these are: ids, pictures and texts. Labels, features and the file's place don't
        count."""
        digest = hashlib.sha256(b"[")
        for low in range(0, len(self), PIECE_ROWS):  # as json.dumps of them all
            block = json.dumps(self.ids[low : low + PIECE_ROWS].tolist())
            digest.update(((", " if low else "") + block[1:-1]).encode())
        digest.update(b"]")
        for name in ("image_hash", "text_hash"):
            digest.update(self.facts(name).tobytes())
        return digest.hexdigest()

    @property
    @abstractmethod
    def parameters(self) -> dict[str, int] | None:
        """How many parameters the encoder of each side has, by "image" and "text"; None where the cache doesn't
        tell."""

    @abstractmethod
    def token_counts(self) -> np.ndarray:
        """Tokens there is room for, per row (N,); only in a cache with `text_tokens`."""

    @property
    @abstractmethod
    def source(self) -> Source | None:
        """Where the raw pairs lay when the cache was last brought up to date; None where that wasn't told."""

    # -- reading ------------------------------------------------------------------------------------------------

    def to_frame(self, *names: str) -> Frame:
        """Ids, labels and the features `names` of all rows that are done; without names every dataset with one vector
        or array a row (all but `text_tokens`). Raises as `read`."""
        rows = np.flatnonzero(self.status == DONE)
        chosen = names or [name for name in self.features if name != "text_tokens"]
        arrays = {name: self.read_rows(name, rows) for name in chosen}
        return Frame(np.asarray(self.ids[rows]), np.asarray(self.tags[rows]), arrays)

    def done_ids(self) -> Strings:
        """Ids of the rows that are done, in the cache's order."""
        return self.ids[np.flatnonzero(self.status == DONE)]

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of `ids`. Raises `MissingRowsError` naming those that are absent, pending or quarantined."""
        rows = self.ids.positions(ids)
        status = np.where(rows < 0, np.int8(-1), self.status[rows].astype(np.int8)) if len(self) else rows
        if (status != DONE).any():
            lacking = ([str(ids[k]) for k in np.flatnonzero(status == s).tolist()] for s in (-1, PENDING, QUARANTINED))
            raise MissingRowsError(self.path, *lacking)
        return rows

    def read(self, name: str, ids: Sequence[str] | None = None) -> np.ndarray:
        """Features `name` of the rows `ids`, in that order: (len(ids), ...) float16; all done rows without `ids`.

        Memory beyond the result is one chunk. Not for `text_tokens`: see `read_tokens`.
        Raises `MissingRowsError` for ids that aren't done, `CacheError` for an unknown dataset or a damaged one.
        """
        return self.read_rows(name, self._done_rows(ids))

    @abstractmethod
    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """As `read`, by row numbers (R,), repeated ones too: no look-up of ids, and consecutive rows are read at once.

        Raises `IndexError` for numbers outside 0..N-1, else as `read`.
        """

    def read_tokens(self, ids: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Text tokens of the rows `ids`: (ΣL, D) float16, concatenated in that order, and offsets (len(ids) + 1,)."""
        return self.read_token_rows(self._done_rows(ids))

    @abstractmethod
    def read_token_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read_tokens`, by row numbers (R,). Raises as `read_rows`."""

    @abstractmethod
    def stored(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Features and facts of the rows first..stop as `FeatureStore.write` takes them, whatever the rows' status:
        dataset -> (stop - first, ...), for `text_tokens` (ΣL, D). Raises `CacheError` for damaged ones."""

    def spans(self, size: int) -> Iterator[tuple[int, int]]:
        """Rows first..stop of the whole cache in order: whole blocks, whose features take about `size` bytes."""
        row_bytes = 0.0
        for name, shape in self.features.items():
            each = self.token_counts().mean() if name == "text_tokens" else 1
            row_bytes += each * np.prod(shape) * np.dtype(np.float16).itemsize
        step = self.block_rows * max(1, int(size / max(row_bytes, 1) / self.block_rows))
        return ((first, min(first + step, len(self))) for first in range(0, len(self), step))

    @abstractmethod
    def verify(self) -> list[str]:
        """Read every chunk and check the structure; returns what is wrong, one line each."""

    def _done_rows(self, ids: Sequence[str] | None) -> np.ndarray:
        return np.flatnonzero(self.status == DONE) if ids is None else self.positions(ids)

    def _check_rows(self, rows: np.ndarray) -> None:
        """Raise `IndexError` for rows that don't exist, `MissingRowsError` for those that aren't done."""
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}; asked for {outside[0]}")
        status = self.status[rows]
        if (status != DONE).any():
            undone = (self.ids[rows[status == s]].tolist() for s in (PENDING, QUARANTINED))
            raise MissingRowsError(self.path, [], *undone)


class FeatureStore(CacheReader):
    """One cache file. Make one with `create`, `append` or `open`; use it as a context manager.

    Attributes: `path`, `ids` and `tags`, sequences of N str (`Strings`, `Labels`), `status` (N,) uint8, `fingerprint`
    (dict), `plan` (dict: how the rows are cut into blocks), `reasons` (id -> why it is in quarantine), `repaired` (rows
    whose chunks a killed writer had torn, pending again), `trusted` (datasets whose chunks' places were checked).
    """

    ids: Strings
    status: np.ndarray
    fingerprint: dict[str, Any]
    reasons: dict[str, str]

    def __init__(self, path: Path, file: h5py.File, lock: FileLock | None = None):
        self.path = path
        self._file = file
        self._lock = lock
        self.trusted: set[str] = set()
        self.repaired = 0
        try:
            with _damage(path, "its structure"):
                _refuse(path, attribute_problem(file))
                version = file.attrs.get("format_version")
                if version != FORMAT_VERSION:
                    raise CacheError(f"{path} has cache format {version}, expected {FORMAT_VERSION}; {_REMEDY}")
                _refuse(path, dataset_problem(file, _KNOWN, _LENGTHS))
                _refuse(path, _shape_problem(self.features))
                self.fingerprint = _mapping(file, "fingerprint")
                self.plan = _mapping(file, "plan")
                self._indices: dict[str, str] = _mapping(file, "chunk_indices")
                if not isinstance(self.plan.get("block_rows"), int) or self.plan["block_rows"] < 1:
                    raise ValueError("its plan tells no block_rows")
                _ = self.complete
            with _damage(path, "id"):
                self.ids = _strings(self._dataset("id")[:])
            if lock is not None:
                with _disk(path, _KEPT):
                    self._heal()
            with _damage(path, "status", self._remedy):
                self.status = self._dataset("status")[:]
        except BaseException:
            file.close()
            raise
        self.reasons = _read_reasons(self.quarantine_path)

    # -- opening ------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path | str,
        ids: Sequence[str],
        tags: Sequence[str],
        fingerprint: Mapping[str, Any],
        features: Mapping[str, tuple[int, ...]],
        *,
        block_rows: int = 512,
        token_counts: np.ndarray | None = None,
        plan: Mapping[str, Any] | None = None,
        source: Source | None = None,
        parameters: Mapping[str, int] | None = None,
        overwrite: bool = False,
        private: bool = False,
    ) -> "FeatureStore":
        """Make a cache with every row pending, and open it for writing.

        `features` maps a dataset to the shape of one row, e.g. `{"image_feats": (512,)}`; all are float16.
        `text_tokens` is ragged: its row shape is (width,), and `token_counts` (N,) says how many rows each text has.
        `source` says where the pairs lie, `parameters` how many each side's encoder has. The file appears under its
        name only when it is whole. A `private` one has a name that nobody else knows: it needs no lock.
        Raises `CacheError` when the file exists (without `overwrite`), is in use, or the disk is full.
        """
        path = Path(path)
        lock = None if private else _acquire(path)
        unfinished = path.with_name(path.name + ".creating")
        try:
            if path.exists() and not overwrite:
                raise CacheError(f"{path} exists; remove it or use `overwrite`")
            with _disk(path, "its creation was undone"):
                with h5py.File(unfinished, "w", libver=LIBVER) as file:
                    _lay_out(file, ids, tags, features, block_rows, token_counts)
                    if source is not None:
                        _lay_out_source(file, source, block_rows)
                    file.attrs["format_version"] = FORMAT_VERSION
                    indices = {name: _index_digest(dataset) for name, dataset in file.items()}
                    file.attrs["chunk_indices"] = np.bytes_(json.dumps(indices))
                    file.attrs["complete"] = False
                    file.attrs["fingerprint"] = np.bytes_(json.dumps(fingerprint))
                    if parameters is not None:
                        file.attrs["parameters"] = np.bytes_(json.dumps(dict(parameters)))
                    file.attrs["plan"] = np.bytes_(json.dumps({**(plan or {}), "block_rows": block_rows}))
                sync(unfinished)
                quarantine_path(path).unlink(missing_ok=True)
                os.replace(unfinished, path)
                settle(path)
                return cls(path, h5py.File(path, "r+", libver=LIBVER), lock)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            if lock is not None:
                lock.release()
            raise

    @classmethod
    def append(cls, path: Path | str) -> "FeatureStore":
        """Open for writing. What a killed writer tore is made pending again (`repaired` counts those rows).

        Raises `CacheError` when it is missing, damaged beyond the rows in flight, or being written by someone else.
        """
        path = Path(path)
        lock = _acquire(path)
        try:
            return cls(path, _open(path, "r+"), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: Path | str) -> "FeatureStore":
        """Open for reading. Raises `CacheError` when it is missing, damaged, or being written right now."""
        path = Path(path)
        return cls(path, _open(path, "r"))

    def close(self) -> None:
        """Close the file, and let others write it."""
        try:
            self._file.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every row is done or in quarantine."""
        return bool(self._file.attrs["complete"])

    @property
    def _remedy(self) -> str:
        """What to do about a torn chunk."""
        return _REMEDY if self.complete else _RESUME

    @property
    def quarantine_path(self) -> Path:
        """The CSV of quarantined ids and reasons beside the cache."""
        return quarantine_path(self.path)

    @property
    def tags(self) -> Labels:
        """The label of each row, '' where unknown."""
        with _damage(self.path, "tag"):
            dataset = self._dataset("tag")
            # In pieces: room for labels corrected later takes more than ids do.
            return Labels.of_blocks(dataset[low : low + PIECE_ROWS] for low in range(0, len(self), PIECE_ROWS))

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """Dataset -> shape of one row, for the feature datasets; of one token for `text_tokens`."""
        return {name: d.shape[1:] for name, d in self._file.items() if d.dtype == np.float16}

    @property
    def schema(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Dataset -> (shape, dtype), for all of them."""
        return {name: (d.shape, str(d.dtype)) for name, d in self._file.items()}

    @property
    def written_at(self) -> float:
        """When the file was last written, in seconds since the epoch."""
        return self.path.stat().st_mtime

    def facts(self, name: str) -> np.ndarray:
        """A dataset of `ROW_FACTS`, (N,); 0 where the row isn't done, and all 0 where the encoder lacks the side."""
        with _damage(self.path, name, self._remedy):
            return self._dataset(name)[:] if name in self._file else np.zeros(len(self), np.uint64)

    @property
    def parameters(self) -> dict[str, int] | None:
        """How many parameters the encoder of each side has, by "image" and "text"; None where the cache doesn't
        tell."""
        with _damage(self.path, "parameters"):
            return _mapping(self._file, "parameters") if "parameters" in self._file.attrs else None

    def token_counts(self) -> np.ndarray:
        """Tokens there is room for, per row (N,); only in a cache with `text_tokens`."""
        return np.diff(self._offsets)

    @property
    def source(self) -> Source | None:
        """Where the raw pairs lay when the cache was last brought up to date; None where that wasn't told."""
        with _damage(self.path, "source"):
            told = parse_json(bytes(self._file.attrs.get("source", b"")) or b"{}")
        if not told:
            return None
        with _damage(self.path, "its paths"):
            images, texts = (_strings(self._dataset(name)[:]) for name in PATHS)
            return Source(**told, images=images, texts=texts)

    # -- writing ------------------------------------------------------------------------------------------------

    def write(
        self,
        rows: np.ndarray,
        status: np.ndarray,
        arrays: Mapping[str, np.ndarray],
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        """Write some rows: features and facts first, then, once those are on disk, their status.

        `rows` (R,) ascending positions; `status` (R,) `DONE` or `QUARANTINED`; `arrays` maps datasets to (R, ...)
        values, for `text_tokens` to the concatenated tokens of all R texts; `reasons` says why, for the quarantined
        ids. Features of rows that aren't `DONE` are stored as NaN.
        Raises `CacheError` when the disk is full; what was done before stays readable.
        """
        with _disk(self.path, _KEPT):
            neighbours = self._neighbours(rows)
            unsettled = np.union1d(rows, neighbours)
            if self.complete:
                self._file.attrs.modify("complete", False)
                self._sync()  # what a kill tears from here on is repaired, in a complete cache it is damage
            if (self.status[unsettled] != PENDING).any():
                self._set_status(unsettled, PENDING)
            kept = self.reasons.keys() - set(self.ids[rows].tolist()) if self.reasons else set()
            updated = {i: reason for i, reason in self.reasons.items() if i in kept} | dict(reasons or {})
            if updated != self.reasons:
                self.reasons = updated
                _write_reasons(self.quarantine_path, updated)
            done = status == DONE
            for name, values in arrays.items():
                if name == "text_tokens":
                    self._write_ragged(rows, values)
                else:
                    if self._file[name].dtype == np.float16 and not done.all():
                        values = np.where(done.reshape(-1, *[1] * (values.ndim - 1)), values, np.float16(np.nan))
                    self._file[name][_selection(rows)] = values
            self._sync()
            self.status[rows] = status
            self.status[neighbours] = DONE
            self._set_status(unsettled, self.status[unsettled])

    def finish(self) -> bool:
        """Mark the cache complete if no row is pending; returns whether it is."""
        done = not (self.status == PENDING).any()
        with _disk(self.path, _KEPT):
            if done and not self.complete:
                self._file.attrs.modify("complete", True)
            self._sync()
        return done

    def update_tags(self, tags: Sequence[str]) -> int:
        """Bring the labels up to date; returns how many changed. Features don't depend on them.

        Raises `CacheError` for a label that is longer than the cache has room for.
        """
        dataset = self._file["tag"]
        room = dataset.dtype.itemsize
        new = _encode(tags, room)
        if new.dtype.itemsize > room:
            raise CacheError(
                f"{self.path} has room for labels of {room} bytes, the data set now has one of "
                f"{new.dtype.itemsize}; shorten it, or make the cache again with `overwrite`"
            )
        try:
            changed = int((dataset[:] != new).sum())
        except OSError:  # torn by a kill in the midst of an update
            for low in range(0, len(new), dataset.chunks[0]):
                _blank_chunk(dataset, low)
            changed = len(new)
        if changed:
            with _disk(self.path, _KEPT):
                dataset[:] = new
                self._sync()
        return changed

    def update_source(self, source: Source) -> None:
        """Bring up to date where the raw pairs lie, in a cache made with a source. Features don't depend on it: a path
        that the cache has no room for becomes empty."""
        if "source" not in self._file.attrs:
            return
        for name, paths in zip(PATHS, (source.images, source.texts), strict=True):
            dataset = self._file[name]
            room = dataset.dtype.itemsize
            new = _encode(_short_enough(paths, room), room)
            try:
                same = (dataset[:] == new).all()
            except OSError:  # torn by a kill in the midst of an update
                same = False
            if not same:
                with _disk(self.path, _KEPT):
                    dataset[:] = new
        told = _source_bytes(source)
        with _disk(self.path, _KEPT):
            if self._file.attrs["source"] != told.item():
                self._file.attrs.modify("source", told)
            self._sync()

    def _write_ragged(self, rows: np.ndarray, values: np.ndarray) -> None:
        offsets = self._offsets
        start = 0
        for first, last in _runs(rows):
            low, high = int(offsets[first]), int(offsets[last + 1])
            self._file["text_tokens"][low:high] = values[start : start + high - low]
            start += high - low

    @cached_property
    def _offsets(self) -> np.ndarray:
        with _damage(self.path, "text_offsets"):
            offsets: np.ndarray = self._dataset("text_offsets")[:]
            if offsets[0] != 0 or offsets[-1] != len(self._dataset("text_tokens")) or (np.diff(offsets) < 0).any():
                raise ValueError("they aren't those of its tokens")
        return offsets

    def _neighbours(self, rows: np.ndarray) -> np.ndarray:
        """Done rows that share a chunk with `rows` without being among them: writing one endangers the other."""
        if not len(rows):
            return rows
        ranges = [
            self._rows_sharing_chunks(name, first, last + 1) for name in self.features for first, last in _runs(rows)
        ]
        ranges = [(int(rows[0]), int(rows[-1]) + 1), *((first, stop) for first, stop in ranges if first < stop)]
        low, high = min(first for first, _ in ranges), max(stop for _, stop in ranges)
        shared = np.zeros(high - low, bool)  # of all rows it would take as long as they are many, for every block
        for first, stop in ranges[1:]:
            shared[first - low : stop - low] = True
        shared[rows - low] = False
        return low + np.flatnonzero(shared & (self.status[low:high] == DONE))

    def _rows_sharing_chunks(self, name: str, first: int, stop: int) -> tuple[int, int]:
        """The range of rows in the chunks of `name` that hold the rows first..stop."""
        step = self._file[name].chunks[0]
        if name != "text_tokens":
            return first // step * step, min(len(self), -(-stop // step) * step)
        offsets = self._offsets
        low, high = offsets[first] // step * step, -(-offsets[stop] // step) * step
        return int(np.searchsorted(offsets, low, "right")) - 1, int(np.searchsorted(offsets[:-1], high, "left"))

    def _set_status(self, rows: np.ndarray, status: np.ndarray | int) -> None:
        self._file["status"][_selection(rows)] = status
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def _heal(self) -> None:
        """Make readable again what a killed writer left torn: chunks all of whose done rows were made pending."""
        if self.complete:
            return
        dataset = self._file["status"]
        step = dataset.chunks[0]
        for low in range(0, len(self), step):
            try:
                dataset[low : low + step]
            except OSError:
                _blank_chunk(dataset, low)
        pending = dataset[:] == PENDING
        facts = [name for side in ROW_FACTS.values() for name in side if name in self._file]
        for name in [*self.features, *facts]:
            dataset = self._file[name]
            step = dataset.chunks[0]
            for low in range(0, dataset.shape[0], step):
                high = min(low + step, dataset.shape[0])
                first, stop = low, high
                if name == "text_tokens":
                    first = int(np.searchsorted(self._offsets, low, "right")) - 1
                    stop = int(np.searchsorted(self._offsets[:-1], high, "left"))
                if not pending[first:stop].any():
                    continue
                try:
                    dataset[low:high]
                except OSError:
                    _blank_chunk(dataset, low)
                    self.repaired += int((~pending[first:stop]).sum())
                    self._file["status"][first:stop] = PENDING
        self._sync()

    # -- reading ------------------------------------------------------------------------------------------------

    def shape_of(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """The shape of one row (of one token) of a dataset, and its type. Raises `CacheError` for an unknown one."""
        dataset = self._dataset(name)
        return dataset.shape[1:], dataset.dtype

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """As `read`, by row numbers (R,), repeated ones too: no look-up of ids, and consecutive rows are read at once.

        Raises `IndexError` for numbers outside 0..N-1, else as `read`.
        """
        dataset = self._dataset(name)
        self._check_rows(rows)
        out = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
        with _damage(self.path, name):
            if len(rows) and (np.diff(rows) == 1).all():
                dataset.read_direct(out, np.s_[int(rows[0]) : int(rows[-1]) + 1])
            else:
                order = np.argsort(rows, kind="stable")
                step = dataset.chunks[0]
                for chosen in split_where(order, rows[order] // step):
                    low = int(rows[chosen[0]]) // step * step
                    out[chosen] = dataset[low : low + step][rows[chosen] - low]
        self._check_written(name, out)
        return out

    def read_token_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read_tokens`, by row numbers (R,). Raises as `read_rows`."""
        dataset, offsets = self._dataset("text_tokens"), self._offsets
        self._check_rows(rows)
        starts = np.concatenate([[0], np.cumsum(offsets[rows + 1] - offsets[rows])])
        out = np.empty((starts[-1], *dataset.shape[1:]), dataset.dtype)
        order = np.argsort(rows, kind="stable")
        with _damage(self.path, "text_tokens"):
            for run in split_where(order, rows[order], 1):
                for piece in pieces(run, self.block_rows):
                    low = offsets[rows[piece[0]]]
                    tokens = dataset[low : offsets[rows[piece[-1]] + 1]]
                    for part in split_where(piece, piece, 1):  # texts that lie side by side in the result, too
                        first, last = part[0], part[-1]
                        found = tokens[offsets[rows[first]] - low : offsets[rows[last] + 1] - low]
                        out[starts[first] : starts[last + 1]] = found
        self._check_written("text_tokens", out)
        return out, starts

    def stored(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Features and facts of the rows first..stop as `write` takes them, whatever the rows' status: dataset ->
        (stop - first, ...), for `text_tokens` (ΣL, D). Raises `CacheError` for damaged ones."""
        facts = [name for side in ROW_FACTS.values() for name in side if name in self._file]
        found = {}
        for name in [*self.features, *facts]:
            rows = slice(first, stop)
            if name == "text_tokens":
                rows = slice(int(self._offsets[first]), int(self._offsets[stop]))
            with _damage(self.path, name, self._remedy):
                found[name] = self._dataset(name)[rows]
        return found

    def verify(self) -> list[str]:
        """Read every chunk and check the structure; returns what is wrong, one line each."""
        problems = []
        for name in self._file:
            try:
                with _damage(self.path, name):
                    dataset = self._file[name]
                    self._check_chunks(name, dataset)
            except CacheError as error:
                problems.append(str(error))
                continue
            step = dataset.chunks[0]
            bad = []
            for low in range(0, dataset.shape[0], step):
                try:
                    dataset[low : low + step]
                except OSError:
                    bad.append(low)
            if bad:
                problems.append(f"{name}: {len(bad)} damaged chunks (checksum), the first at {bad[0]}; {self._remedy}")
        if repeated(self.ids):
            problems.append("id: not unique")
        if not problems:
            problems += self._check_done_rows()
        return problems

    def _check_done_rows(self) -> list[str]:
        problems = []
        if self.complete and (self.status == PENDING).any():
            problems.append("complete, yet rows are pending")
        for name in self.features:
            if name == "text_tokens":
                finite = np.isfinite(self.read_tokens()[0]).all()
            else:
                blocks = pieces(self._done_rows(None), self.block_rows)
                finite = all(np.isfinite(self.read_rows(name, rows)).all() for rows in blocks)
            if not finite:
                problems.append(f"{name}: rows marked done hold values that aren't finite")
        return problems

    def _dataset(self, name: str) -> h5py.Dataset:
        with _damage(self.path, name):
            if name not in self._file:
                raise CacheError(f"{self.path} holds no {name}; it has {', '.join(self._file)}")
            dataset = self._file[name]
        if name not in self.trusted:
            self._check_chunks(name, dataset)
            self.trusted.add(name)
        return dataset

    def _check_written(self, name: str, values: np.ndarray) -> None:
        """Done rows never hold the fill value."""
        if values.dtype == np.float16 and values.size and np.isnan(values.reshape(len(values), -1)[:, 0]).any():
            raise CacheError(f"{self.path}: {name} has no values for rows that are marked done; {_REMEDY}")

    def _check_chunks(self, name: str, dataset: h5py.Dataset) -> None:
        """The chunk index carries no checksum of its own: see that it is the one the cache was created with, and that
        looking up each chunk finds it (one that isn't found reads as if never written)."""
        with _damage(self.path, name):
            sound = _index_digest(dataset) == self._indices[name]
            for low in range(0, dataset.shape[0], dataset.chunks[0]):
                dataset.id.read_direct_chunk((low, *[0] * (dataset.ndim - 1)))  # fails where the look-up does
        if not sound:
            raise CacheError(f"{self.path}: {name} has a damaged chunk index; {_REMEDY}")


def fingerprint_difference(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two fingerprints differ, with both values, library versions aside; '' when they agree."""
    keys = [key for key in {**cached, **wanted} if key != "versions"]
    return "; ".join(
        f"{key}: the cache has {json.dumps(cached.get(key))}, this run {json.dumps(wanted.get(key))}"
        for key in keys
        if cached.get(key) != wanted.get(key)
    )


def _lay_out(
    file: h5py.File,
    ids: Sequence[str],
    tags: Sequence[str],
    features: Mapping[str, tuple[int, ...]],
    block_rows: int,
    token_counts: np.ndarray | None,
) -> None:
    n = len(ids)
    for name, values, room in (("id", ids, 1), ("tag", tags, MIN_TAG_BYTES)):
        width = _width(values, room)
        dataset = _new(file, name, (n,), h5py.string_dtype("utf-8", width), block_rows)
        step = -(-PIECE_ROWS // block_rows) * block_rows  # whole chunks
        for low in range(0, n, step):
            dataset[low : low + step] = _encode(values[low : low + step], width)
    _new(file, "status", (n,), np.uint8, block_rows)
    for side, facts in ROW_FACTS.items():
        if any(name.startswith(side) for name in features):
            for name, dtype in facts.items():
                _new(file, name, (n,), dtype, block_rows)
    for name, shape in features.items():
        if name == "text_tokens":
            if token_counts is None:
                raise ValueError("text_tokens need token_counts, how many each text has")
            offsets = np.concatenate([[0], np.cumsum(token_counts)]).astype(np.int64)
            _new(file, "text_offsets", (n + 1,), np.int64, block_rows)[:] = offsets
            _new(file, name, (int(offsets[-1]), *shape), np.float16, block_rows)
        else:
            _new(file, name, (n, *shape), np.float16, block_rows)


def _lay_out_source(file: h5py.File, source: Source, block_rows: int) -> None:
    for name, paths in zip(PATHS, (source.images, source.texts), strict=True):
        kept = _short_enough(paths, MAX_PATH_BYTES)
        values = _encode(kept, _width(kept, 0) + PATH_ROOM)
        _new(file, name, (len(kept),), values.dtype, block_rows)[:] = values
    file.attrs["source"] = _source_bytes(source)


def _short_enough(paths: Sequence[str], room: int) -> Sequence[str]:
    """The paths, '' for one that takes more than `room` bytes."""
    if isinstance(paths, Strings) and paths.width <= room:
        return paths
    return [path if len(path.encode()) <= room else "" for path in paths]


def _source_bytes(source: Source) -> np.ndarray:
    """What is told once for all rows, always of the same size, so that bringing it up to date changes no structure.
    Empty if it needs more."""
    keys = ("data", "resolved", "layout", "split", *(["columns"] if source.columns else []))
    told = json.dumps({key: getattr(source, key) for key in keys}).encode()
    return np.array(told if len(told) <= SOURCE_BYTES else b"", f"S{SOURCE_BYTES}")


def _new(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any, block_rows: int) -> h5py.Dataset:
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


def _blank_chunk(dataset: h5py.Dataset, low: int) -> None:
    """Write the fill value to the chunk that begins at row `low`, whatever is there. An ordinary write of fewer rows
    than a chunk's, as the last one mostly holds, reads the chunk first and fails where it is torn."""
    with h5py.File("blank", "w", driver="core", backing_store=False) as spare:
        blank = _new(spare, "blank", dataset.chunks, dataset.dtype, dataset.chunks[0])
        blank[:] = dataset.fillvalue
        first = (0,) * dataset.ndim
        dataset.id.write_direct_chunk((low, *first[1:]), blank.id.read_direct_chunk(first)[1])


def _index_digest(dataset: h5py.Dataset) -> str:
    """Hex sha256 of where the chunks lie; fixed at creation, since all are allocated then."""
    found = []
    dataset.id.chunk_iter(lambda chunk: found.append(tuple(chunk)))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _encode(values: Sequence[str], min_bytes: int = 1) -> np.ndarray:
    """Fixed-length UTF-8: variable-length strings lie in a heap that no checksum covers."""
    if isinstance(values, Strings):
        width = max(min_bytes, values.width)
        return values.encoded.astype(h5py.string_dtype("utf-8", width))
    encoded = [value.encode() for value in values]
    width = max(min_bytes, max(map(len, encoded), default=0))
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", width))


def _width(values: Sequence[str], room: int) -> int:
    """How many bytes the longest of `values` takes, at least `room`."""
    if isinstance(values, Strings):
        return max(room, values.width)
    distinct = values.names if isinstance(values, Labels) else values
    return max(room, max((len(value.encode()) for value in distinct), default=0))


def _strings(values: np.ndarray) -> Strings:
    """Strings of what a dataset of fixed-length UTF-8 holds. Raises `ValueError` for what isn't that: here, not when
    one of them is asked for."""
    for low in range(0, len(values), PIECE_ROWS):
        block = values[low : low + PIECE_ROWS]
        if block.view(np.uint8).max(initial=0) >= 128:
            np.char.decode(block, "utf-8")
    return Strings(values)


def _refuse(path: Path, problem: str) -> None:
    if problem:
        raise CacheError(f"{path}: {problem}; {_REMEDY}")


def _shape_problem(features: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the shapes of rows, '' for nothing."""
    for name, shape in features.items():
        if len(shape) != _DIMENSIONS.get(name, len(shape)):
            return f"a row of {name} has {len(shape)} dimensions, expected {_DIMENSIONS[name]}"
    if "image_views" in features and features["image_views"][1:] != features.get("image_feats"):
        return "its views aren't as wide as its features"
    return ""


def _mapping(file: h5py.File, name: str) -> dict[str, Any]:
    """What an attribute tells as JSON. Raises `ValueError` for anything but an object."""
    value = file.attrs[name]
    told = parse_json(value) if isinstance(value, bytes | str) else None
    if not isinstance(told, dict):
        raise ValueError(f"{name} is no JSON object")
    return told


def _open(path: Path, mode: str) -> h5py.File:
    if not path.is_file():
        raise CacheError(f"no cache {path}; make it with an extraction script (feats/*_extract_feats.py)")
    try:
        return h5py.File(path, mode, libver=LIBVER if mode == "r+" else None)
    except BlockingIOError:
        raise CacheInUseError(f"{path} is being written by another process; wait for it to end") from None
    except OSError as error:
        raise CacheError(f"{path} can't be opened as HDF5 ({first_line(error)}); {_REMEDY}") from None


def _acquire(path: Path) -> FileLock:
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # what a killed run held may take a moment to go
    except Timeout:
        raise CacheInUseError(
            f"{path} is being written by another process; wait for it to end, or use another `name`"
        ) from None
    except (OSError, ValueError, NotImplementedError) as error:  # no folder, no permission, a file system without locks
        raise CacheError(f"{path} can't be written ({first_line(error)}); choose another folder with `out`") from None
    return lock


@contextmanager
def _damage(path: Path, name: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn a failed checksum into one clear error."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{path}: {name} can't be read ({first_line(error)}); {remedy}") from None


@contextmanager
def _disk(path: Path, state: str) -> Iterator[None]:
    """Turn a write that the disk refused into one clear error."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py: RuntimeError where closing fails
        numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = getattr(error, "errno", None) in numbers or any(
            os.strerror(number) in str(error) or f"errno = {number}," in str(error) for number in numbers
        )
        what = "the disk is full" if full else f"writing failed ({first_line(error)})"
        raise CacheError(f"{path}: {what}; {state}") from None


def is_complete(path: Path) -> bool:
    """Whether every row of the cache at `path` is done or in quarantine; False, too, where none can be read. Takes no
    lock: whoever is writing it isn't disturbed."""
    try:
        if not path.is_file():
            return False  # a pipe would block for ever
        with h5py.File(path, "r", locking=False) as file:
            return not attribute_problem(file) and bool(file.attrs["complete"])
    except (OSError, RuntimeError, KeyError):
        return False


def quarantine_path(path: Path) -> Path:
    """Where the reasons of the rows in quarantine lie, for the cache at `path`."""
    return path.with_name(f"{path.stem}.quarantine.csv")


def _read_reasons(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = parse_csv(path.read_bytes().decode(errors="replace"))  # whoever edited it: only a report
    rows = [row for row in rows if len(row) == 2]
    return {i: reason for i, reason in rows if (i, reason) != ("id", "reason")}


def _write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    if not reasons:
        path.unlink(missing_ok=True)
        return
    with appearing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [["id", "reason"], *reasons.items()])


def _selection(rows: np.ndarray) -> slice | np.ndarray:
    """A slice where the rows are consecutive: HDF5 writes those at once."""
    runs = _runs(rows)
    return slice(runs[0][0], runs[0][1] + 1) if len(runs) == 1 else rows


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers in ascending `rows`."""
    return [(int(run[0]), int(run[-1])) for run in split_where(rows, rows, 1)]


def split_where(items: np.ndarray, key: np.ndarray, step: int = 0) -> list[np.ndarray]:
    """`items` cut wherever their `key` differs from the one before by anything but `step`."""
    return np.split(items, np.flatnonzero(np.diff(key) != step) + 1) if len(items) else []


def repeated(ids: Strings) -> list[str]:
    """Those of `ids` that stand there more than once, each once, sorted."""
    if ids.unique:
        return []
    ordered = ids.encoded[ids.order]
    return Strings(np.unique(ordered[1:][ordered[1:] == ordered[:-1]])).tolist()


def pieces(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`items` cut into pieces of `size`; the last may be shorter."""
    return (items[low : low + size] for low in range(0, len(items), size))
