"""What killed processes leave: files and folders in the making, and temporary folders. While a process makes one it
holds a lock on a file beside it, which the kernel lets go when the process dies: what is locked is alive, wherever its
process runs; what isn't was left behind.

A process's number or its machine's name tell nothing of the kind: containers share names, and count processes each for
itself. (So `filelock` won't do: where a file system has no locks it judges by these.)
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; nothing is judged there, and nothing removed
    fcntl = None  # type: ignore[assignment]

IN_THE_MAKING, TEMPORARY = f".{'[0-9a-f]' * 16}.writing", "feats-*.tmp"  # names of what may be left
LOCK = ".lock"
LONGEST_NAME = 1024  # bytes; file systems take 255


@contextmanager
def held(path: Path, home: str = "") -> Iterator[None]:
    """Hold the lock of what is made in here at the new name `path`. Where there are no locks there is no file of one,
    so that nobody judges by it. `home` is the name beside it of what is moved to `path` only to make room: it goes back
    there if the process dies before anything else has that name. Raises `OSError` when the folder can't be written."""
    if fcntl is None:
        yield
        return
    place, owner = _lock_of(path), os.getpid()
    lock = _locked(place)
    try:
        os.write(lock, os.fsencode(home))
        yield
    finally:
        if os.getpid() == owner:  # a forked process ends this, too, when it forgets it
            place.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def temporary_folder(root: Path | None = None) -> Iterator[Path]:
    """A new folder in `root`, None: where the system keeps temporary files (`tempfile.gettempdir`). It is removed at
    the end; before that, those that dead processes left there are. Raises `OSError` when none can be made."""
    root = root or Path(tempfile.gettempdir())
    remove_leftovers(root, TEMPORARY)
    path, owner = root / TEMPORARY.replace("*", secrets.token_hex(4)), os.getpid()
    with held(path):
        try:
            path.mkdir(0o700)
            yield path
        finally:
            if os.getpid() == owner:
                shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path, names: str = IN_THE_MAKING) -> None:
    """Remove what dead processes left in `folder` under such `names`: locks that nobody holds, and what was made under
    them; what has a free `home` goes there, see `held`. What has no lock, or one that can't be asked for, can't be
    judged and stays."""
    if fcntl is None:
        return
    for place in folder.glob(names + LOCK):
        path = place.with_name(place.name.removesuffix(LOCK))
        try:
            # Others write temporary folders, too: a pipe of such a name isn't waited for, and no link followed.
            lock = os.open(place, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            home = os.fsdecode(os.read(lock, LONGEST_NAME))
            if home and Path(home).name == home and not os.path.lexists(folder / home):
                os.rename(path, folder / home)
            remove(path)
            if not os.path.lexists(path):
                place.unlink(missing_ok=True)
        except OSError:  # held, can't be moved, or the file system has no locks
            continue
        finally:
            os.close(lock)


@cache
def remove_leftovers_once(folder: Path) -> None:
    """As `remove_leftovers`, when this process first asks: of folders with very many files, each written alone."""
    remove_leftovers(folder)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + LOCK)


def _locked(place: Path) -> int:
    """A descriptor of the new file `place`, locked. Whoever removes left-overs may come in between the two, and take
    the file away."""
    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            place.unlink()
            return lock
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)
