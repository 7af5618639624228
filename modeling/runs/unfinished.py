"""Folders in the making. While a process fills one it holds a lock on a file beside it, which the kernel lets go when
the process dies: what is locked is alive, wherever its process runs; what isn't was left behind.

A process's number or its machine's name tell nothing of the kind: containers share names, and count processes each for
itself. (So `filelock` won't do: where a file system has no locks it judges by these.)
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feats.writing import hidden_name

try:
    import fcntl
except ImportError:  # Windows; nothing is judged there, and nothing removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, to be filled and moved to its place; removed at the end if it is still there.
    Before that, what dead processes left in `parent` is removed. Raises `OSError` when `parent` can't be written."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    path = parent / hidden_name()
    with _held(_lock_of(path)):
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove the folders in `parent` that dead processes left: those whose lock nobody holds. A folder without a lock,
    or with one that can't be asked for, can't be judged and stays."""
    if fcntl is None:
        return
    for path in parent.glob(".*.writing"):
        try:
            lock = os.open(_lock_of(path), os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                _lock_of(path).unlink(missing_ok=True)
        except OSError:  # held; or the file system has no locks
            continue
        finally:
            os.close(lock)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on the new file `path`, which is there as long as the lock is held. On a file system without locks
    there is no such file, so that nobody judges by it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                path.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)
