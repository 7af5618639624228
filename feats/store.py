"""The HDF5 feature cache in one file: create, resume, write, read, validate.

Rows are written in blocks that share no chunk with other rows; a row's status becomes `DONE` only after its features
are on disk. What the file looks like, and why a killed writer can't damage it, is told in `feats.cache_layout`.

The file format stays below HDF5 1.10: from there on a killed writer leaves a mark that makes the library refuse the
file until a separate tool clears it.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from filelock import FileLock, Timeout

from feats.cache_layout import (
    FORMAT_VERSION,
    LIBVER,
    PATHS,
    ROW_FACTS,
    blank_chunk,
    decoded,
    encoded,
    index_digest,
    lay_out,
    lay_out_source,
    layout_problem,
    short_enough,
    source_bytes,
)
from feats.cache_reader import DONE, PENDING, CacheError, CacheInUseError, CacheReader
from feats.errors import first_line
from feats.json_files import parse_json
from feats.plain_hdf5 import attribute_problem
from feats.quarantine import add_reasons, quarantine_path, read_reasons, write_reasons
from feats.row_runs import pieces, runs, selection, split_where
from feats.source import Source
from feats.strings import BLOCK, Labels, Strings
from feats.writing import settle, sync

_KEPT = "the rows done so far are intact; free some space and run the same command again"
_REMEDY = "the file is damaged or foreign: make it again with `overwrite`"
_RESUME = "an interrupted run may have left it so: run the same extraction again to repair it, else use `overwrite`"


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
                _refuse(path, layout_problem(file))
                self.fingerprint = _mapping(file, "fingerprint")
                self.plan = _mapping(file, "plan")
                self._indices: dict[str, str] = _mapping(file, "chunk_indices")
                if not isinstance(self.plan.get("block_rows"), int) or self.plan["block_rows"] < 1:
                    raise ValueError("its plan tells no block_rows")
                _ = self.complete
            with _damage(path, "id"):
                self.ids = decoded(self._dataset("id")[:])
            if lock is not None:
                with _disk(path, _KEPT):
                    self._heal()
            with _damage(path, "status", self._remedy):
                self.status = self._dataset("status")[:]
        except BaseException:
            file.close()
            raise
        self.reasons = read_reasons(self.quarantine_path)
        self._reasons_whole = False  # whether this process wrote all of their file

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
                    lay_out(file, ids, tags, features, block_rows, token_counts)
                    if source is not None:
                        lay_out_source(file, source, block_rows)
                    file.attrs["format_version"] = FORMAT_VERSION
                    indices = {name: index_digest(dataset) for name, dataset in file.items()}
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
            return Labels.of_blocks(dataset[low : low + BLOCK] for low in range(0, len(self), BLOCK))

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
            images, texts = (decoded(self._dataset(name)[:]) for name in PATHS)
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
            self._keep_reasons(self.ids[rows].tolist(), dict(reasons or {}))
            done = status == DONE
            for name, values in arrays.items():
                if name == "text_tokens":
                    self._write_ragged(rows, values)
                else:
                    if self._file[name].dtype == np.float16 and not done.all():
                        values = np.where(done.reshape(-1, *[1] * (values.ndim - 1)), values, np.float16(np.nan))
                    self._file[name][selection(rows)] = values
            self._sync()
            self.status[rows] = status
            self.status[neighbours] = DONE
            self._set_status(unsettled, self.status[unsettled])

    def _keep_reasons(self, ids: Sequence[str], now: dict[str, str]) -> None:
        """The reasons of some rows are now these. Rows that had none before get theirs behind the others, so that very
        many cost no more time each; behind a file that this process wrote: another may have been torn, or edited."""
        before = {i: self.reasons[i] for i in ids if i in self.reasons}
        if now == before:
            return
        whole, self._reasons_whole = self._reasons_whole, False
        if whole and not before:
            self.reasons.update(now)
            add_reasons(self.quarantine_path, now)
        else:
            self.reasons = {i: reason for i, reason in self.reasons.items() if i not in before} | now
            write_reasons(self.quarantine_path, self.reasons)
        self._reasons_whole = bool(self.reasons)

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
        new = encoded(tags, room)
        if new.dtype.itemsize > room:
            raise CacheError(
                f"{self.path} has room for labels of {room} bytes, the data set now has one of "
                f"{new.dtype.itemsize}; shorten it, or make the cache again with `overwrite`"
            )
        try:
            changed = int((dataset[:] != new).sum())
        except OSError:  # torn by a kill in the midst of an update
            for low in range(0, len(new), dataset.chunks[0]):
                blank_chunk(dataset, low)
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
            new = encoded(short_enough(paths, room), room)
            try:
                same = (dataset[:] == new).all()
            except OSError:  # torn by a kill in the midst of an update
                same = False
            if not same:
                with _disk(self.path, _KEPT):
                    dataset[:] = new
        told = source_bytes(source)
        with _disk(self.path, _KEPT):
            if self._file.attrs["source"] != told.item():
                self._file.attrs.modify("source", told)
            self._sync()

    def _write_ragged(self, rows: np.ndarray, values: np.ndarray) -> None:
        offsets = self._offsets
        start = 0
        for first, last in runs(rows):
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
            self._rows_sharing_chunks(name, first, last + 1) for name in self.features for first, last in runs(rows)
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
        self._file["status"][selection(rows)] = status
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
                blank_chunk(dataset, low)
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
                    blank_chunk(dataset, low)
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
        if not self.ids.unique:
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
            sound = index_digest(dataset) == self._indices[name]
            for low in range(0, dataset.shape[0], dataset.chunks[0]):
                dataset.id.read_direct_chunk((low, *[0] * (dataset.ndim - 1)))  # fails where the look-up does
        if not sound:
            raise CacheError(f"{self.path}: {name} has a damaged chunk index; {_REMEDY}")


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


def _refuse(path: Path, problem: str) -> None:
    if problem:
        raise CacheError(f"{path}: {problem}; {_REMEDY}")


def _mapping(file: h5py.File, name: str) -> dict[str, Any]:
    """What an attribute tells as JSON. Raises `ValueError` for anything but an object."""
    value = file.attrs[name]
    told = parse_json(value) if isinstance(value, bytes | str) else None
    if not isinstance(told, dict):
        raise ValueError(f"{name} is no JSON object")
    return told
