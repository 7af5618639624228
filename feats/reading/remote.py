"""Files at URLs of any kind that fsspec knows (s3, gs, https, memory, ...): as local copies, or read in ranges.

What fails is tried again; what goes on failing, or can't get better, is a `UsageError` that names the URL.
"""

import errno
import os
import re
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from feats.errors import UsageError, first_line
from feats.leftovers import temporary_folder
from feats.regular import check_regular

WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
CHUNK_BYTES = 8 << 20
SILENCE = 60  # seconds without a byte after which a connection counts as dead

# What no further try would change; the last is how fsspec says that a kind of place can't do something.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)
_PASSING_STATUS = (408, 425, 429)  # of HTTP's 4xx those that ask to come again

Got = TypeVar("Got")


def is_url(text: str | Path) -> bool:
    """Whether this is a URL and no path."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def public_url(url: str) -> str:
    """A URL without what may be secret or passing in it: user, password, and the query of a signed one."""
    return re.sub(r"(?<=://)[^/@]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])


def base_name(place: str) -> str:
    """The last part of a path or URL."""
    return PurePosixPath(urlsplit(public_url(place)).path if is_url(place) else place).name


def beside(url: str, name: str) -> str:
    """The URL of another file in a URL's folder."""
    return f"{public_url(url).rpartition('/')[0]}/{name}"


def listing(url: str) -> list[str]:
    """The names of what lies in the folder `url`, sorted."""
    found = _retried(url, lambda system, path: system.ls(path, detail=False))
    return sorted({PurePosixPath(public_url(str(name))).name for name in found})


@dataclass(frozen=True)
class Copy:
    """A local copy of the file at `url`: it is deleted when nobody holds this object any more."""

    path: Path
    url: str


def fetched(url: str) -> Copy:
    """Copy a file into the folder for temporary files, in chunks, and check its length where the server tells it."""
    held = ExitStack()
    folder = held.enter_context(temporary_folder())
    copy = Copy(folder / (base_name(url) or "copy"), public_url(url))
    remove = weakref.finalize(copy, _remove, held, os.getpid())
    try:
        _retried(url, partial(_copy_to, copy.path))
    except BaseException:
        remove()
        raise
    return copy


def _copy_to(local: Path, system: Any, path: str) -> None:
    try:
        size = system.info(path).get("size")
    except Exception:  # noqa: BLE001 - a server may refuse to tell about what it gives; else the copying says it better
        size = None
    system.get_file(path, str(local))
    if size is not None and local.stat().st_size != size:
        raise ConnectionError(f"{local.stat().st_size} of {size} bytes arrived")


def _remove(held: ExitStack, owner: int) -> None:
    # A worker process has a twin of the object.
    if os.getpid() == owner:
        held.close()


@dataclass(frozen=True)
class RemoteFile:
    """The bytes of a file at a URL, from any place on, in ranges that are asked for one by one."""

    url: str

    def __call__(self, start: int) -> Iterator[bytes]:
        """The chunks from byte `start` on. Raises `UsageError` for a server that gives no ranges."""
        size = _retried(self.url, lambda system, path: system.info(path).get("size"))
        if size is None:
            raise _no_ranges(self.url, "doesn't tell how long it is")
        while start < size:
            end = min(start + CHUNK_BYTES, size)
            yield _retried(self.url, partial(self._range, start, end))
            start = end

    def _range(self, start: int, end: int, system: Any, path: str) -> bytes:
        data: bytes = system.cat_file(path, start=start, end=end)
        if len(data) > end - start:
            raise _no_ranges(self.url, "sends it as a whole only")
        if len(data) < end - start:
            raise ConnectionError(f"{len(data)} of {end - start} bytes arrived")
        return data


def _no_ranges(url: str, why: str) -> UsageError:
    return UsageError(
        f"{public_url(url)} can't be read piece by piece: the server {why}; copy the file to a local disk"
    )


@dataclass(frozen=True)
class LocalFile:
    """The bytes of a local file, from any place on."""

    path: Path

    def __call__(self, start: int) -> Iterator[bytes]:
        """The chunks from byte `start` on. Raises `OSError`."""
        check_regular(self.path)
        with self.path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _retried(url: str, act: Callable[[Any, str], Got]) -> Got:
    """What `act` makes of the file system and the path in it."""
    system, path = _file_system(url)
    for tries, wait in enumerate((*WAITS, None), 1):
        try:
            return act(system, path)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - each backend has errors of its own
            if wait is None or _is_final(error):
                raise _unreadable(url, error, tries) from None
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an answer over HTTP
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
    return refused or isinstance(error, _FINAL) or getattr(error, "errno", None) == errno.ENOSPC


def _unreadable(url: str, error: Exception, tries: int) -> UsageError:
    reason = first_line(error).replace(url, public_url(url))
    if isinstance(error, FileNotFoundError):
        reason = "there is no such file, or no such server"
    elif getattr(error, "errno", None) == errno.ENOSPC:
        reason = f"no space left in {tempfile.gettempdir()} for its copy (set TMPDIR to another folder)"
    after = f" (tried {tries} times)" if tries > 1 else ""
    return UsageError(f"{public_url(url)} can't be read: {reason}{after}; check address, network and permissions")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises `UsageError` for one of no or no installed kind."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # Its own limit is 5 minutes for a whole file.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": limits}
        system, path = url_to_fs(url, **options)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        package = f"'fsspec[{protocol}]'" if package == "fsspec" else package
        raise UsageError(
            f"{protocol}:// needs a package that isn't installed ({first_line(error)}): pip install {package}"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{public_url(url)} can't be read: {first_line(error)}; known are s3://, gs://, https:// and whatever else "
            "fsspec has"
        ) from None
    return system, path
