"""Outputs of a cached trunk, row by row, as a training step reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from feats.errors import UsageError
from feats.store import FeatureStore
from modeling.features.joined import Ragged

MEMORY_BYTES = 4 << 30  # of one cache; larger ones are read batch by batch

Rows = Callable[[torch.Tensor], torch.Tensor]  # row numbers (B,) -> hidden states (B, L, width)


def hidden_states(path: Path, used: Sequence[int]) -> dict[str, Rows]:
    """By side, a function from row numbers to hidden states (B, L, width), padded to the longest. Raises `UsageError`
    when rows in use couldn't be encoded."""
    store = FeatureStore.open(path)  # left open for reading, as long as any of the functions is there
    done = set(store.done_ids().tolist())
    lacking = [i for i in store.ids[np.asarray(used)].tolist() if i not in done]
    if lacking:
        reasons = store.reasons
        some = "; ".join(f"{i} ({reasons.get(i, 'not done')})" for i in lacking[:5])
        raise UsageError(
            f"{len(lacking)} rows have no outputs of the frozen blocks in {path}: {some}; repair their files, or use "
            "`live_trunk`, which doesn't store them"
        )
    small = path.stat().st_size <= MEMORY_BYTES
    found: dict[str, Rows] = {}
    if "image_tokens" in store.features:
        found["image"] = _of_memory(store, used) if small else _of_store(store)
    if "text_tokens" in store.features:
        found["text"] = _texts_of(store, used, small)
    return found


def _of_memory(store: FeatureStore, used: Sequence[int]) -> Rows:
    values = torch.from_numpy(store.read_rows("image_tokens", np.asarray(used)))
    place = _places(used, len(store))
    return lambda rows: values[place[rows]]


def _of_store(store: FeatureStore) -> Rows:
    return lambda rows: torch.from_numpy(store.read_rows("image_tokens", rows.numpy()))


def _texts_of(store: FeatureStore, used: Sequence[int], small: bool) -> Rows:
    def read(rows: np.ndarray) -> Ragged:
        values, offsets = store.read_token_rows(rows)
        return Ragged(torch.from_numpy(values), torch.from_numpy(offsets))

    if not small:
        return lambda rows: read(rows.numpy()).padded(torch.arange(len(rows)))[0]
    texts, place = read(np.asarray(used)), _places(used, len(store))
    return lambda rows: texts.padded(place[rows])[0]


def _places(used: Sequence[int], count: int) -> torch.Tensor:
    place = torch.full((count,), -1)
    place[list(used)] = torch.arange(len(used))
    return place
