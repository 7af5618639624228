"""Files written whole or not at all: the one door for them.

A file appears under its name, or replaces what was there, once it is on disk. What the file system refuses becomes one
line that names the file as the user knows it. What is written into a folder that itself appears only when it is whole
(see `in_the_making`) goes straight to its place, and to disk with its folder: `sync_tree`.

Caches, which are written block by block, have `feats.store`.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_IMODE
from typing import Any

from feats.errors import CantWriteError, UsageError, reason_of
from feats.leftovers import IN_THE_MAKING, held, remove, remove_leftovers, remove_leftovers_once

REMEDY = "make room there, or give another place"
_SYNCS_AT_ONCE = 8
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # what file systems without it answer to syncing a folder


def hidden_name() -> str:
    """A new name for a file or folder in the making. It is short whatever the final name: that may be of any length."""
    return f".{secrets.token_hex(8)}.writing"


def in_the_making(path: Path) -> bool:
    """Whether it lies in a folder that has a `hidden_name`: nobody looks into that before it is whole."""
    return any(fnmatchcase(parent.name, IN_THE_MAKING) for parent in path.parents)


@contextmanager
def appearing(path: Path, *, follow: bool = True, durable: bool = True) -> Iterator[Path]:
    """A path to write a file at, which is at `path` when the block ends and is gone when it fails.

    Folders above are made. What is replaced gives its permissions. A link stays: its target is written; without
    `follow` the link itself is replaced. Without `durable` a power cut may empty it: syncs take milliseconds each, too
    long for very many small files that can be made again. Raises `OSError`.
    """
    if in_the_making(path):
        yield path
        return
    target = Path(os.path.realpath(path)) if follow else path
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(target.parent)
    unfinished = target.with_name(hidden_name())
    with held(unfinished):
        try:
            yield unfinished
            if target.exists():
                shutil.copymode(target, unfinished)
            if durable:
                sync(unfinished)
            os.replace(unfinished, target)
            if durable:
                settle(target)
        finally:
            with suppress(OSError):
                unfinished.unlink()


@contextmanager
def replacing(path: Path, remedy: str = REMEDY, *, follow: bool = True, durable: bool = True) -> Iterator[Path]:
    """As `appearing`, but raises `UsageError` for what can't be written, with what to do next: `remedy`. In a folder in
    the making it stays an `OSError`, for whoever makes that folder and knows its name."""
    try:
        with appearing(path, follow=follow, durable=durable) as unfinished:
            yield unfinished
    except OSError as error:
        if in_the_making(path):
            raise
        raise cant_write(path, error, remedy) from None


@contextmanager
def made_as(unfinished: Path, place: Path) -> Iterator[None]:
    """What is said in here of a file in the making names the place it will have."""
    try:
        yield
    except UsageError as error:
        error.args = tuple(
            said.replace(str(unfinished), str(place)) if isinstance(said, str) else said for said in error.args
        )
        raise


def cant_write(path: Path, error: Exception, remedy: str = REMEDY) -> CantWriteError:
    """The one line for a file or folder that the file system refuses."""
    return CantWriteError(f"can't write {path} ({reason_of(error)}); {remedy}")


def write_bytes(path: Path, content: bytes, remedy: str = REMEDY, *, follow: bool = True, durable: bool = True) -> None:
    """A whole file. Raises as `replacing`."""
    with replacing(path, remedy, follow=follow, durable=durable) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: Path, text: str, remedy: str = REMEDY) -> None:
    """As `write_bytes`, in UTF-8, with lines ended as they are."""
    write_bytes(path, text.encode(), remedy)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """As `write_text`, with a line end."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


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


def replace_folder(unfinished: Path, path: Path) -> None:
    """Move a whole folder to `path`, in place of the one that may be there. Raises `OSError`; that one is then still
    there, or is again once what a killed process left is removed."""
    old = path.with_name(hidden_name())
    with held(old, path.name):
        with suppress(FileNotFoundError):
            os.rename(path, old)
        try:
            os.replace(unfinished, path)
        except OSError:
            with suppress(FileNotFoundError):
                os.rename(old, path)
            raise
        remove(old)
    settle(path)


def open_to_others(path: Path) -> None:
    """Give `path` the permissions that the user's mask gives to new files: safetensors writes files that only their
    owner may read, in folders that others work in, too."""
    beside = path.with_name(hidden_name())
    beside.touch()
    with suppress(OSError):  # some file systems know no permissions
        path.chmod(S_IMODE(beside.stat().st_mode))
    beside.unlink()


def sync(path: Path) -> None:
    """See that a file, or the names in a folder, are on disk. Raises `OSError`."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(number)


def settle(path: Path) -> None:
    """See that the new name of what is whole is on disk. It has appeared and stays, whatever the file system says."""
    with suppress(OSError):
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """As `sync`, for all there is in a folder, and the folder. What is asked for at once is written together, in a
    fourth of the time that a run's files take one after the other."""
    files, folders = list[Path](), list[Path]()
    for root, _, names in os.walk(folder, topdown=False):
        files += [Path(root) / name for name in names]
        folders.append(Path(root))
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        for _done in pool.map(sync, files):  # raises what one of them raised
            pass
    for path in folders:
        sync(path)
