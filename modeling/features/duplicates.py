"""Rows that share a picture or a text: which they are, and which belong together."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from feats.strings import Strings, row_type

# What feats.images.hash64 gives for no bytes: the `text_key` of texts of which cleaning left nothing.
EMPTY_TEXT_KEY = int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "big")
IMAGE_UNKNOWN, TEXT_UNKNOWN = (0,), (0, EMPTY_TEXT_KEY)  # keys that say nothing of which rows are the same


class Duplicates(Mapping[str, int]):
    """The duplicate group of each of some rows, by id: `groups` (N,) integers of `ids`. Asked for one by one it makes a
    dictionary of them; `of` needs none."""

    def __init__(self, ids: Strings, groups: np.ndarray):
        self.ids, self.groups = ids, groups

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return dict(zip(self.ids, self.groups.tolist(), strict=True))

    def __getitem__(self, name: str) -> int:
        return self._by_id[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, ids: Sequence[str]) -> np.ndarray:
        """(len(ids),) integers. Raises `KeyError` for an id that isn't there."""
        rows = self.ids.positions(ids)
        if (rows < 0).any():
            raise KeyError(ids[int(np.flatnonzero(rows < 0)[0])])
        found: np.ndarray = self.groups[rows]
        return found


def duplicate_groups(image_hash: np.ndarray | None, text_key: np.ndarray | None) -> np.ndarray:
    """Group number of each row, (N,) integers: the first of the rows that share a picture or a text with it, directly
    or through others.

    `image_hash` (N,) of the picture's bytes, `text_key` (N,) of the text as compared (either may be None). 0 means
    unknown and ties nothing; nor does the key of the empty text: two pairs without words are no duplicates.

    Groups are connected components: every set of rows with one key takes the least number that any of them has, and
    hands it to the rows these numbers stand for, until nothing changes (Zhang, Azad and Hu, FastSV, SIAM PP 2020).
    """
    columns = [(image_hash, IMAGE_UNKNOWN), (text_key, TEXT_UNKNOWN)]
    known = [(column, ignored) for column, ignored in columns if column is not None]
    if not known:
        raise ValueError("neither picture hashes nor text keys: there is nothing to find duplicates by")
    n = len(known[0][0])
    groups = np.arange(n, dtype=row_type(n))
    sets = [duplicate_sets(column, ignored) for column, ignored in known]
    changed = True
    while changed:
        changed = False
        for rows, starts in sets:
            if not len(rows):
                continue
            before = groups[rows]
            least = np.repeat(np.minimum.reduceat(before, starts), set_sizes(rows, starts))
            if (least < before).any():
                changed = True
                groups[rows] = least
                np.minimum.at(groups, before, least)
                groups = groups[groups]
    return groups


def duplicate_sets(column: np.ndarray, ignored: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of rows with keys `column` (N,) uint64 those whose key another has, too, and isn't `ignored`: their numbers (R,),
    those of one key side by side, and where in them each such set starts, (S,)."""
    order = np.argsort(column)
    keys = column[order]
    first, last = np.ones((2, len(keys)), bool)
    first[1:] = keys[1:] != keys[:-1]
    last[:-1] = first[1:]
    shared = ~(first & last)
    for key in ignored:
        shared &= keys != np.uint64(key)
    return order[shared].astype(row_type(len(column))), np.flatnonzero(first[shared])


def set_sizes(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many rows each set of `duplicate_sets` has, (S,)."""
    return np.diff(starts, append=len(rows))
