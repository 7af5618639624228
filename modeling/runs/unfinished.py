"""Folders in the making."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feats.leftovers import held, remove_leftovers
from feats.writing import hidden_name


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, to be filled and moved to its place; removed at the end if it is still there.
    Before that, what dead processes left in `parent` is removed. Raises `OSError` when `parent` can't be written."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    path = parent / hidden_name()
    with held(path):
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
