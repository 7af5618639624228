"""Plan, encode and write on one machine: from records to a finished cache, from wherever an earlier run left it.

Worker processes read, decode and tokenise ahead; the main process runs the encoder; a writer thread puts finished
blocks into the store. A block is the unit of everything: its texts are sorted by length together, its rows are written
together, and a run that was killed computes the block it was in anew, with the same batches, so that it ends with the
same bytes.
"""

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feats.cache_reader import DONE, PENDING, QUARANTINED, CacheError, CacheReader, fingerprint_difference
from feats.encoders.base import Encoder
from feats.errors import UsageError
from feats.extraction.encode import Block, encode_blocks
from feats.extraction.plan import Plan, fingerprint_of, make_plan, resume_plan
from feats.extraction.preparation import hash_of_text, picture_changed
from feats.extraction.settings import ExtractionSettings
from feats.extraction.summary import Progress, Summary
from feats.records import Pairs, Record
from feats.row_runs import pieces
from feats.store import FeatureStore


def extract(
    encoder: Encoder,
    records: Sequence[Record],
    path: Path | str,
    settings: ExtractionSettings = ExtractionSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Bring the cache at `path` to hold the features of `records`; what it already holds isn't computed again.

    Of a data set's split (`read_dataset(...)["train"]`) the cache also records where its pairs lie. Rows in quarantine
    are tried again. With `overwrite` a cache of anything else is replaced; an interrupted run with `overwrite` goes on
    where it was. Raises `CacheError` when the cache there was made by anything else (the differing parts of both
    fingerprints are shown) or the rows' contents changed since. Warns where features may differ in their last bit.
    """
    start = time.perf_counter()
    path = Path(path)
    store, plan = _open(encoder, records, path, settings, overwrite)
    with store:
        summary = Summary(path, relabelled=store.update_tags([r.label or "" for r in records]))
        if isinstance(records, Pairs):
            store.update_source(records.source)
        if encoder.text:
            summary.encodings.update(r.encoding for r in records if r.encoding)
        before = int((store.status == DONE).sum())
        _write(store, plan, progress)
        store.finish()
        summary.done = int((store.status == DONE).sum())
        summary.quarantined = int((store.status == QUARANTINED).sum())
        summary.encoded = max(0, summary.done - before)
        summary.truncated = int(store.facts("truncated").sum()) if encoder.text else 0
    summary.seconds = time.perf_counter() - start
    return summary


def _write(store: FeatureStore, plan: Plan, progress: Progress) -> None:
    """Encode the plan's blocks, and write each while the next is encoded."""
    encoded, total = 0, sum(map(len, plan.blocks))

    def told(rows: int) -> None:
        nonlocal encoded
        encoded += rows
        progress(encoded, total)

    if total:
        progress(0, total)
    workers = default_workers() if plan.settings.workers is None else max(0, plan.settings.workers)
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for block in encode_blocks(plan, range(len(plan.blocks)), workers, told):
            if writing is not None:
                writing.result()
            writing = writer.submit(write_block, store, block)
        if writing is not None:
            writing.result()


def write_block(store: FeatureStore, block: Block) -> None:
    """Put a finished block into a cache of its plan."""
    store.write(block.rows, np.where(block.done, DONE, QUARANTINED), block.arrays, block.reasons)


def make_cache(plan: Plan, path: Path, progress: Progress) -> None:
    """A new cache at `path`, whose name nobody else knows, from its creation to its end."""
    with create_store(plan, path, private=True) as store:
        _write(store, plan, progress)
        store.finish()


class Counts(NamedTuple):
    """Rows of a cache."""

    done: int
    quarantined: int
    truncated: int


def count_rows(path: Path) -> Counts:
    """The rows of the cache at `path`. Raises as `FeatureStore.open`."""
    with FeatureStore.open(path) as store:
        truncated = int(store.facts("truncated").sum())
        return Counts(int((store.status == DONE).sum()), int((store.status == QUARANTINED).sum()), truncated)


def changed_in(path: Path, records: Sequence[Record]) -> dict[str, str]:
    """As `changed_rows`, of the cache at `path`."""
    with FeatureStore.open(path) as store:
        return changed_rows(store, records)


def create_store(plan: Plan, path: Path, overwrite: bool = False, private: bool = False) -> FeatureStore:
    """A new cache for a plan's rows, all pending. Raises as `FeatureStore.create`."""
    return FeatureStore.create(
        path,
        [r.id for r in plan.records],
        [r.label or "" for r in plan.records],
        plan.fingerprint,
        plan.features,
        block_rows=plan.block_rows,
        token_counts=plan.token_counts,
        plan=plan.kept,
        source=plan.records.source if isinstance(plan.records, Pairs) else None,
        parameters=plan.encoder.parameters,
        overwrite=overwrite,
        private=private,
    )


def default_workers() -> int:
    """One decoding process per core that this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# -- opening -----------------------------------------------------------------------------------------------------


def _open(
    encoder: Encoder, records: Sequence[Record], path: Path, settings: ExtractionSettings, overwrite: bool
) -> tuple[FeatureStore, Plan]:
    """The cache, open for writing, and the plan of what is to be done there."""
    if path.exists() and not overwrite:
        store = FeatureStore.append(path)
        try:
            _check_same(store, fingerprint_of(encoder, records, settings), records)
            return store, _resume(store, encoder, records, settings)
        except BaseException:
            store.close()
            raise
    plan = make_plan(encoder, records, settings)
    begun = _begun_with(plan, path) if path.exists() else None
    if begun is not None:
        return begun, replace(plan, blocks=tuple(_unfinished_blocks(begun)))
    return create_store(plan, path, overwrite), plan


def _resume(store: FeatureStore, encoder: Encoder, records: Sequence[Record], settings: ExtractionSettings) -> Plan:
    """The plan for what a cache lacks, with the batches it was begun with: others may round features differently."""
    asked, planned = settings.batch_size, store.plan["batch_size"]
    if asked and asked != planned and not store.complete:
        warnings.warn(
            f"{store.path} was begun with batches of {planned}; with {asked} its features may differ in their last bit "
            "from those of an undisturbed run",
            stacklevel=1,
        )
    try:
        return resume_plan(
            encoder,
            records,
            settings,
            kept=store.plan,
            features=store.features,
            blocks=_unfinished_blocks(store),
            token_counts=store.token_counts() if "text_tokens" in store.features else None,
        )
    except UsageError as error:
        raise CacheError(f"{store.path} can't be gone on with: {error}") from None


def _begun_with(plan: Plan, path: Path) -> FeatureStore | None:
    """The incomplete cache at `path` if an interrupted run with `overwrite` can only have begun it so: same
    fingerprint to the last version, same plan, same contents, every chunk sound. None for anything else there."""
    try:
        store = FeatureStore.append(path)
    except CacheError:
        return None
    try:
        if not store.complete and _same_plan(store, plan):
            _check_same(store, plan.fingerprint, plan.records)
            if not store.verify():
                return store
    except CacheError:
        pass
    except BaseException:
        store.close()
        raise
    store.close()
    return None


def _same_plan(store: FeatureStore, plan: Plan) -> bool:
    wanted = (json.loads(json.dumps(plan.fingerprint)), plan.kept, plan.features)
    if (store.fingerprint, store.plan, store.features) != wanted:
        return False
    return plan.token_counts is None or np.array_equal(store.token_counts(), plan.token_counts)


def _check_same(store: FeatureStore, fingerprint: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Refuse a cache of anything else. Done rows must hold the same contents as then (pictures are read again only
    where they are newer than the cache); rows that aren't done may have changed: that is how a file is repaired."""
    difference = fingerprint_difference(store.fingerprint, json.loads(json.dumps(fingerprint)))
    if difference:
        raise CacheError(
            f"{store.path} was made by something else ({difference}); choose another `name`, or replace it with "
            "`overwrite`"
        )
    changed = changed_rows(store, records)
    if changed:
        some = ", ".join(f"{i} ({what})" for i, what in list(changed.items())[:5])
        raise CacheError(
            f"{len(changed)} of {len(store)} rows hold other content than when {store.path} was made: {some}; "
            "choose another `name`, or replace it with `overwrite`"
        )


def changed_rows(store: CacheReader, records: Sequence[Record]) -> dict[str, str]:
    """Which rows that are done held another text or picture when the cache was made, and which of them ("text",
    "picture"), by id. `records` are all rows in the cache's order. Pictures no newer than the cache aren't read."""
    done = np.flatnonzero(store.status == DONE).tolist()
    changed: dict[str, str] = {}
    if "text_feats" in store.features:
        hashes = store.facts("text_hash")
        changed |= {records[i].id: "text" for i in done if hash_of_text(records[i]) != hashes[i]}
    if "image_feats" in store.features:
        hashes, sizes = store.facts("image_hash"), store.facts("image_bytes")
        since = store.written_at
        changed |= {records[i].id: "picture" for i in done if picture_changed(records[i], sizes[i], hashes[i], since)}
    return changed


def _unfinished_blocks(store: FeatureStore) -> list[np.ndarray]:
    """Row numbers to work on, block by block: whole blocks where any row is pending, then the quarantined rest."""
    starts = range(0, len(store), store.block_rows)
    blocks = [np.arange(low, min(low + store.block_rows, len(store))) for low in starts]
    pending = [rows for rows in blocks if (store.status[rows] == PENDING).any()]
    visited = np.zeros(len(store), bool)
    for rows in pending:
        visited[rows] = True
    retried = np.flatnonzero((store.status == QUARANTINED) & ~visited)
    return pending + list(pieces(retried, store.block_rows))
