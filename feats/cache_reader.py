"""What reading a cache is, wherever it lies: rows with ids, labels, status and features, told apart by their status."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from feats.errors import UsageError
from feats.escapes import few
from feats.source import Source
from feats.strings import BLOCK, Labels, Strings

PENDING, DONE, QUARANTINED = 0, 1, 2
STATUS_NAMES = {PENDING: "pending", DONE: "done", QUARANTINED: "quarantined"}


class CacheError(UsageError):
    """A cache file that is damaged, foreign or in use."""


class CacheInUseError(CacheError):
    """A cache file that another process is writing."""


class MissingRowsError(UsageError):
    """Rows asked for that the cache doesn't hold. `absent`, `pending` and `quarantined` list their ids."""

    def __init__(self, path: Path, absent: list[str], pending: list[str], quarantined: list[str]):
        self.absent, self.pending, self.quarantined = absent, pending, quarantined
        parts = [
            f"{len(ids)} {what} ({few(ids)})"
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
        for low in range(0, len(self), BLOCK):  # as json.dumps of them all
            block = json.dumps(self.ids[low : low + BLOCK].tolist())
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


def fingerprint_difference(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two fingerprints differ, with both values, library versions aside; '' when they agree."""
    keys = [key for key in {**cached, **wanted} if key != "versions"]
    return "; ".join(
        f"{key}: the cache has {json.dumps(cached.get(key))}, this run {json.dumps(wanted.get(key))}"
        for key in keys
        if cached.get(key) != wanted.get(key)
    )
