"""Row numbers cut into what is read or written at once."""

from collections.abc import Iterator

import numpy as np


def split_where(items: np.ndarray, key: np.ndarray, step: int = 0) -> list[np.ndarray]:
    """`items` cut wherever their `key` differs from the one before by anything but `step`."""
    return np.split(items, np.flatnonzero(np.diff(key) != step) + 1) if len(items) else []


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers in ascending `rows`."""
    return [(int(run[0]), int(run[-1])) for run in split_where(rows, rows, 1)]


def selection(rows: np.ndarray) -> slice | np.ndarray:
    """A slice where the rows are consecutive: HDF5 writes those at once."""
    found = runs(rows)
    return slice(found[0][0], found[0][1] + 1) if len(found) == 1 else rows


def pieces(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`items` cut into pieces of `size`; the last may be shorter."""
    return (items[low : low + size] for low in range(0, len(items), size))
