"""Parts of a cache joined into one file: the same bytes as if one process had made it. Knows no encoder.

The joined cache is created with every row pending and filled by blocks, as an extraction does it: the next joining goes
on with one that was killed. The parts are removed when all of it is on disk.
"""

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from feats.cache_layout import ROW_FACTS
from feats.cache_reader import DONE, PENDING, QUARANTINED, CacheError, CacheInUseError, fingerprint_difference
from feats.errors import UsageError, reason_of
from feats.extraction.agreement import POLL, join_lease
from feats.extraction.leases import holder_of, host_name
from feats.extraction.summary import Progress, Summary
from feats.parts import PartedStore, joined_path, parts_folder, plan_path
from feats.store import FeatureStore

Made = TypeVar("Made")
COPY_BYTES = 64 << 20  # of features copied at a time, about; one block at least


def merge(
    path: Path,
    *,
    keep_parts: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Join the parts of the cache at `path` into it, and remove them unless `keep_parts`.

    `path` is `<name>_<split>.h5` or the folder of parts. What an interrupted joining did isn't done again; where the
    cache is whole already, only the parts are removed. With `overwrite` a cache of anything else is replaced.
    Raises `CacheError` when parts are missing or damaged, when something else lies at `path`, when somebody else is
    writing it, and when the disk is full; `UsageError` when the parts can't be removed.
    """
    start = time.perf_counter()
    path = joined_path(path)
    try:
        with PartedStore(path) as parts, _joined(parts, path, overwrite) as store:
            _copy(parts, store, progress)
            store.finish()
            summary = _summary(store, start)
    except CacheInUseError:
        raise CacheInUseError(f"{path} is being joined by {_joiner(path)}; wait for it to end") from None
    except CacheError:
        if not path.is_file() or plan_path(parts_folder(path)).is_file():
            raise
        with FeatureStore.open(path) as store:  # another has joined and removed them, or was killed while it did
            if not store.complete:
                raise
            _empty_bins(parts_folder(path))
            return _summary(store, start)
    if not keep_parts:
        _remove(parts_folder(path))
    return summary


def patiently(work: Callable[[], Made], seconds: float) -> Made:
    """What `work` makes; tried again for so many seconds while another has the cache open. Who joined it has for a
    moment after all can see that it is whole, and a killed one until the last of its threads is gone."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except CacheInUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(min(POLL, seconds / 8))


def _joiner(path: Path) -> str:
    """Who joins the parts of the cache at `path`: a worker says so by its lease."""
    owner = holder_of(join_lease(path))
    if owner is None:
        return "another process"
    return f"process {owner.pid}, the last worker" + ("" if owner.host == host_name() else ", on another machine")


def _joined(parts: PartedStore, path: Path, overwrite: bool) -> FeatureStore:
    """The cache to be filled: the one that is there if it is of the very parts, else a new one."""
    len(parts)  # raises where they are no cache
    if path.exists():
        try:
            return _gone_on_with(parts, path)
        except CacheError:
            if not overwrite:
                raise
    return FeatureStore.create(
        path,
        parts.ids,
        parts.tags,
        parts.fingerprint,
        {name: tuple(shape) for name, shape in parts.shared.features.items()},  # in the order of the plain cache
        block_rows=parts.block_rows,
        token_counts=parts.token_counts() if "text_tokens" in parts.features else None,
        plan=parts.plan,
        source=parts.source,
        parameters=parts.parameters,
        overwrite=overwrite,
    )


def _gone_on_with(parts: PartedStore, path: Path) -> FeatureStore:
    """The cache that is there, open for writing. Raises `CacheError` if it isn't of the very parts."""
    store = FeatureStore.append(path)
    try:
        difference = _difference(store, parts)
        if difference:
            raise CacheError(
                f"{path} isn't of the parts in {parts.path} ({difference}); choose another `name`, or replace it with "
                "`overwrite`"
            )
    except BaseException:
        store.close()
        raise
    return store


def _difference(store: FeatureStore, parts: PartedStore) -> str:
    """What tells that a cache isn't one of the parts that was begun, or finished; '' if nothing does."""
    difference = fingerprint_difference(store.fingerprint, parts.fingerprint)
    if difference:
        return difference
    if (store.plan, store.features) != (parts.plan, parts.features):
        return "its blocks or shapes are others"
    settled = store.status != PENDING
    if (store.status != parts.status)[settled].any():
        return "other rows are in quarantine"
    facts = [name for side in ROW_FACTS.values() for name in side]
    changed = [name for name in facts if (store.facts(name) != parts.facts(name))[settled].any()]
    if "text_tokens" in store.features and (store.token_counts() != parts.token_counts()).any():
        changed.append("text_offsets")
    return f"rows differ in {changed[0]}" if changed else ""


def _copy(parts: PartedStore, store: FeatureStore, progress: Progress) -> None:
    """Copy what is pending, and bring labels and paths up to date."""
    store.update_tags(parts.tags)
    source = parts.source
    if source is not None:
        store.update_source(source)
    todo = [(first, stop) for first, stop in store.spans(COPY_BYTES) if (store.status[first:stop] == PENDING).any()]
    total, done = sum(stop - first for first, stop in todo), 0
    for first, stop in todo:
        status = parts.status[first:stop]
        quarantined = parts.ids[first:stop][np.flatnonzero(status == QUARANTINED)].tolist()
        reasons = {name: parts.reasons[name] for name in quarantined if name in parts.reasons}
        store.write(np.arange(first, stop), status, parts.stored(first, stop), reasons)
        done += stop - first
        progress(done, total)


def _summary(store: FeatureStore, start: float) -> Summary:
    summary = Summary(store.path)
    summary.done = int((store.status == DONE).sum())
    summary.quarantined = int((store.status == QUARANTINED).sum())
    summary.truncated = int(store.facts("truncated").sum()) if "text_feats" in store.features else 0
    summary.seconds = time.perf_counter() - start
    return summary


def _remove(folder: Path) -> None:
    """Remove the parts: all of them at once, for whoever looks. What a killed removal left goes, too."""
    try:
        with suppress(FileNotFoundError):  # another has joined and removed them
            place = Path(tempfile.mkdtemp(prefix=_bin_name(folder), dir=folder.parent))
            os.rename(folder, place / folder.name)
    except OSError as error:
        raise UsageError(f"{folder} is joined and can't be removed ({reason_of(error)}); remove it") from None
    _empty_bins(folder)


def _empty_bins(folder: Path) -> None:
    for old in folder.parent.glob(f"{glob.escape(_bin_name(folder))}*"):
        shutil.rmtree(old, ignore_errors=True)


def _bin_name(folder: Path) -> str:
    return f".{folder.name}.removed-"
