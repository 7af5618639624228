"""Files at places that a user chose: written whole or not at all, and over nothing but files of the same kind."""

import errno
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from feats.errors import UsageError
from feats.writing import appearing, cant_write

# A data set's own lists (layout course) have the header of our predictions. They hold labels: nothing may replace them.
DATA_SET_FILES = ("train.txt", "test_without_label.txt")
_REMEDY = "give another file with `out`"


@contextmanager
def user_file(
    path: Path, header: Sequence[str], *, own: bool = False, what: str = "", begins: str | None = None
) -> Iterator[TextIO]:
    """A text file to write CSV into, at a place the user chose; `header`: the first columns, which all files of the
    kind have; `own`: the place is the program's own; `what` the kind is (default: predictions); `begins`: how all
    files of a kind that isn't CSV begin.

    A regular file appears, or is replaced, once it is whole; folders above it are made. A link stays a link: its target
    is written. What is no regular file (a device, a pipe, standard output) is written as it is.
    Raises `UsageError` as `check_replaceable` does, and when writing fails.
    """
    check_replaceable(path, header, own=own, what=what, begins=begins)
    try:
        with _stream(path) if _is_stream(path) else _replacement(path) as file:
            yield file
    except OSError as error:
        raise cant_write(path, error, _REMEDY) from None


def check_replaceable(
    path: Path, header: Sequence[str], *, own: bool = False, what: str = "", begins: str | None = None
) -> None:
    """Raise `UsageError` for what `user_file` doesn't write over: folders, and files that aren't empty and don't begin
    with `header`, or as `begins` (at a place of our `own`: without it, too). Scripts ask before the work whose result
    is to be written."""
    try:
        if _is_stream(path) or not path.exists():
            return
        with path.open("r+b") as file:  # "+": what one may not write isn't to be replaced
            wanted = (",".join(header) if begins is None else begins).encode()
            found = file.read(len(wanted) + 1)
    except OSError as error:
        raise cant_write(path, error, _REMEDY) from None
    ends = found[len(wanted) :] in (b"", b",", b"\n", b"\r")
    same_kind = own or (found[: len(wanted)] == wanted and (ends or begins is not None))
    if begins is not None:
        kind = f"JSON that begins with {' '.join(begins.split())}"
    else:
        kind = f"a file that begins with {header[0][:40]}" if what else f"a CSV file of {','.join(header)}..."
    if found and (not same_kind or Path(os.path.realpath(path)).name in DATA_SET_FILES):
        raise UsageError(
            f"{path} exists and isn't known to hold {what or 'predictions'} ({kind}), so that it "
            "isn't replaced; remove it, or give another file with `out`"
        )


def _is_stream(path: Path) -> bool:
    """Whether there is something that can't be replaced, only written. Raises `OSError` for what can be neither."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "it is a folder")
    if stat.S_ISBLK(status.st_mode):
        raise OSError(errno.EPERM, "it is a disk")
    return not stat.S_ISREG(status.st_mode) or _is_standard_output(status)


def _is_standard_output(status: os.stat_result) -> bool:
    """`--out /dev/stdout > file`: to replace that file would lose what is printed besides."""
    try:
        return os.path.samestat(status, os.fstat(1))
    except OSError:  # closed
        return False


def _stream(path: Path) -> TextIO:
    if _is_standard_output(path.stat()):
        sys.stdout.flush()
        # Opened anew, a file would be written from its beginning, over what was printed.
        return open(os.dup(1), "w", encoding="utf-8", newline="")
    return path.open("w", encoding="utf-8", newline="")


@contextmanager
def _replacement(path: Path) -> Iterator[TextIO]:
    with appearing(path) as unfinished, unfinished.open("x", encoding="utf-8", newline="") as file:
        yield file
