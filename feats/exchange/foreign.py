"""Features that another program made, brought into a cache: the steps that all formats share."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feats.cache_layout import ROW_FACTS
from feats.cache_reader import DONE, QUARANTINED, CacheError
from feats.errors import UsageError
from feats.escapes import few
from feats.extraction.summary import Progress, Summary
from feats.parts import parts_folder, publish
from feats.quarantine import quarantine_path
from feats.source import SIDES, data_identity
from feats.store import FeatureStore
from feats.strings import Strings
from feats.writing import cant_write, made_as

ENCODER = "imported"  # what fingerprints name in place of an encoder
ID_COLUMNS = ("id", "uid", "key", "image_path")  # of files that don't say which; the first that is there
LABEL_COLUMN = "label"
BLOCK_ROWS = 512


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: `ID_COLUMNS`, `LABEL_COLUMN`, no features."""

    id: str | None = None
    label: str | None = None
    image: str | None = None
    text: str | None = None

    def id_in(self, names: Sequence[str], path: Path) -> str:
        """The column of ids. Raises `UsageError` when there is none."""
        wanted = (self.id,) if self.id else ID_COLUMNS
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise UsageError(
                f"{path} has no column of ids ({' or '.join(wanted)}); it has {', '.join(names)}: name one with `id`"
            )
        return found

    def label_in(self, names: Sequence[str], path: Path) -> str | None:
        """The column of labels, None for none. Raises `UsageError` when the one that was named isn't there."""
        if self.label and self.label not in names:
            raise UsageError(f"{path} has no column {self.label}; it has {', '.join(names)}")
        return self.label or (LABEL_COLUMN if LABEL_COLUMN in names else None)


@dataclass(frozen=True)
class Batch:
    """Some rows: `arrays` map datasets to (R, ...) floats, NaN where a row has none, `text_tokens` to (ΣL, D); `facts`
    to (R,); `reasons` say of positions without features why."""

    rows: int
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, np.ndarray]
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class Foreign:
    """What is to be brought in: N rows. `read` gives their features batch by batch, in the order of `ids`.

    `dtype` is of the values, `made_by` the fingerprint they had in a cache of this program's, if known.
    """

    format: str
    files: Sequence[Path]
    ids: Sequence[str | None]
    labels: Sequence[str]
    features: Mapping[str, tuple[int, ...]]
    dtype: str
    read: Callable[[], Iterator[Batch]]
    token_counts: np.ndarray | None = None
    made_by: Mapping[str, Any] | None = None
    parameters: Mapping[str, int] | None = None


def bring_in(
    foreign: Foreign,
    path: Path,
    *,
    model: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Make the cache `path` of features from elsewhere; it appears when it is whole.

    Its fingerprint says that they were imported, which `model` made them as far as anybody knows, and under "data" the
    files with their sha256. Values are rounded to float16; rows beyond its range, and rows without features, go into
    quarantine. Memory: ids, labels and one batch.
    Raises `UsageError` for ids that are missing or repeated and for values that aren't finite, `CacheError` when the
    cache exists (without `overwrite`), lies there in parts, or can't be written.
    """
    start = time.perf_counter()
    ids = _checked(foreign)
    if path.exists() and not overwrite:
        raise CacheError(f"{path} exists; choose another `name`, or replace it with `overwrite`")
    if parts_folder(path).exists():
        raise CacheError(
            f"{parts_folder(path)} holds parts of a cache of this name; choose another `name`, join them with "
            f"python feats/merge_feats.py {path}, or remove that folder"
        )
    unfinished = path.with_name(f"{path.name}.importing")
    summary = Summary(path)
    try:
        with (
            made_as(unfinished, path),
            FeatureStore.create(
                unfinished,
                ids,
                foreign.labels,
                _fingerprint(foreign, ids, model),
                foreign.features,
                block_rows=BLOCK_ROWS,
                token_counts=foreign.token_counts,
                parameters=foreign.parameters,
                overwrite=True,
            ) as store,
        ):
            _write(foreign, ids, store, progress)
            store.finish()
            summary.done = summary.encoded = int((store.status == DONE).sum())
            summary.quarantined = int((store.status == QUARANTINED).sum())
            summary.truncated = int((store.facts("truncated") > 0).sum()) if "text_feats" in store.features else 0
        try:
            publish(unfinished, path)
        except OSError as error:
            raise cant_write(path, error) from None
    finally:
        for left in (unfinished, quarantine_path(unfinished), unfinished.with_name(f".{unfinished.name}.lock")):
            left.unlink(missing_ok=True)
    summary.seconds = time.perf_counter() - start
    return summary


def strings(column: Any) -> list[str | None]:
    """The values of an Arrow column as text, None for nulls."""
    return [None if value is None else str(value) for value in column.to_pylist()]


def dtype_of_files(kinds: Set[str]) -> str:
    """How fingerprints name the type of values; the widest of several."""
    named = {"float16": "fp16", "halffloat": "fp16", "float": "fp32", "float32": "fp32"}
    found = {named.get(kind, "fp32") for kind in kinds}
    return "fp32" if "fp32" in found else "fp16"


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(foreign: Foreign) -> list[str]:
    """The ids. Raises `UsageError` unless every row has its own."""
    place = foreign.files[0]
    if not foreign.ids:
        raise UsageError(f"{place} holds no rows")
    none = [row for row, name in enumerate(foreign.ids) if not name or "\0" in name]
    if none:
        raise UsageError(f"{place}: {len(none)} rows have no id (rows {few(none)}, counted from 0); give them one")
    ids = [str(name) for name in foreign.ids]
    twice = Strings.of(ids).repeated()
    if twice:
        raise UsageError(f"{place}: {len(twice)} ids are there more than once ({few(twice)}); each row needs its own")
    return ids


def _fingerprint(foreign: Foreign, ids: Sequence[str], model: str | None) -> dict[str, Any]:
    made_by = foreign.made_by and {k: v for k, v in foreign.made_by.items() if k not in ("data", "versions")}
    known = f"{made_by['encoder']} {made_by['model']}" if made_by and {"encoder", "model"} <= made_by.keys() else None
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in foreign.files]
    return {
        "encoder": ENCODER,
        "model": model or known or "unknown",
        "made_by": made_by,
        "text_clean": None,
        "tokens": any(name.endswith("_tokens") for name in foreign.features),
        "views": None,
        "dtype": foreign.dtype,
        "data": {**data_identity(ids), "format": foreign.format, "files": files},
    }


def _write(foreign: Foreign, ids: Sequence[str], store: FeatureStore, progress: Progress) -> None:
    first = 0
    for batch in foreign.read():
        own = ids[first : first + batch.rows]
        if len(own) < batch.rows:
            raise UsageError(f"{foreign.files[0]} changed while it was read; import it again")
        counts = None if foreign.token_counts is None else foreign.token_counts[first : first + batch.rows]
        reasons = dict(batch.reasons)
        arrays = {name: _as_half(name, x, own, reasons, counts) for name, x in batch.arrays.items()}
        status = np.full(batch.rows, DONE, np.uint8)
        status[list(reasons)] = QUARANTINED
        told = {own[row]: reasons[row] for row in sorted(reasons)}
        store.write(np.arange(first, first + batch.rows), status, arrays | _facts(store, batch), told)
        first += batch.rows
        progress(first, len(ids))
    if first < len(ids):
        raise UsageError(f"{foreign.files[0]} changed while it was read; import it again")


def _as_half(
    name: str, values: np.ndarray, ids: Sequence[str], reasons: dict[int, str], counts: np.ndarray | None
) -> np.ndarray:
    """Values in float16; rows that it can't hold get a reason. Raises `UsageError` for those that weren't finite."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    wrong = np.flatnonzero(~np.isfinite(half.reshape(len(half), -1)).all(1))
    if not len(wrong):
        return half
    finite = np.isfinite(values[wrong].reshape(len(wrong), -1)).all(1)
    rows = wrong
    if name == "text_tokens":
        assert counts is not None
        rows = np.searchsorted(np.cumsum(counts), wrong, "right")
    broken = [ids[row] for row in dict.fromkeys(rows[~finite].tolist()) if row not in reasons]
    if broken:
        raise UsageError(
            f"{len(broken)} rows hold NaN or infinite values in {name} ({few(broken)}); leave them out of the file, or "
            "their features empty (null)"
        )
    for row in rows[finite].tolist():
        reasons.setdefault(row, f"{name} beyond float16's range")
    return half


def _facts(store: FeatureStore, batch: Batch) -> dict[str, np.ndarray]:
    """Facts of the sides there are: 0, unknown, where a file doesn't tell."""
    found = {}
    for side in SIDES:
        if any(name.startswith(side) for name in store.features):
            for name, dtype in ROW_FACTS[side].items():
                found[name] = np.asarray(batch.facts.get(name, np.zeros(batch.rows)), dtype)
    return found
