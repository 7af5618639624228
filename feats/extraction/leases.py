"""Leases: who of several processes, on one machine or many, works on what.

A lease is a small file in a folder that all of them see, created exclusively, with its holder's name in it. The holder
touches it again and again; one that wasn't touched for long is stale and may be taken over. Nothing here needs a
server, locks of the file system, or clocks that agree: ages are differences of two times of the file system's own.

A lease keeps others from doing the same work, it doesn't promise that nobody does (a process that was suspended for
long may wake up): work under a lease is to be published in a way that doing it twice harms nothing.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Thread

from feats.json_files import parse_json

LEASE_SECONDS = 60.0
GUARD = ".guard"  # ends the name of the file under which a lease is taken over
BEATS = 4  # touches in the time after which a lease is stale
BOOT_ID, PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process, named so that it is never taken for another.

    `host` stands for a machine since it was started, or a container on it; `started` is when process `pid` began
    ('' where the system doesn't tell), since numbers of processes are used again; `token` is unique.
    """

    host: str
    pid: int
    started: str
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """This process, with a token never used before."""
        return cls(host_name(), os.getpid(), _started(os.getpid()) or "", uuid.uuid4().hex[:16])

    @property
    def name(self) -> str:
        """All of it as part of a file's name."""
        return "-".join((self.host, str(self.pid), self.started, self.token))

    @classmethod
    def from_name(cls, name: str) -> "Owner | None":
        """The owner of that `name`; None if it is none."""
        words = name.split("-")
        return cls(words[0], int(words[1]), *words[2:]) if len(words) == 4 and words[1].isdecimal() else None

    @property
    def dead(self) -> bool:
        """Whether it is known to have ended: only processes of this machine are."""
        if self.host != host_name():
            return False
        if PROCESSES.joinpath("self", "stat").exists():
            return _started(self.pid) != self.started
        if os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@cache
def host_name() -> str:
    """Short, and different for machines, for their boots, and for containers that see no processes of each other."""
    seen = [socket.gethostname()]
    with suppress(OSError):
        seen += [BOOT_ID.read_text(), os.readlink("/proc/self/ns/pid")]
    return sha256("\n".join(seen).encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks since boot; None where there is none, or only what is left
    of one until its parent hears of its end."""
    try:
        told = (PROCESSES / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    state, *rest = told[told.rindex(")") + 1 :].split()  # before it stands the program's name, whatever it holds
    return None if state in "ZX" else rest[18]


def folder_time(folder: Path) -> float:
    """Now, in seconds, by the clock that gives files in `folder` their times."""
    with TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


@contextmanager
def touched(every: float, touch: Callable[[], object]) -> Iterator[None]:
    """In here a thread calls `touch` every so many seconds; what is gone can't be touched, which is no error."""
    ended = Event()

    def beat() -> None:
        while not ended.wait(every):
            with suppress(OSError):
                touch()

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def leased(path: Path, seconds: float = LEASE_SECONDS) -> Iterator[bool]:
    """Hold the lease `path`: True in here, or False where somebody else holds it.

    It is kept fresh until the end, and given back there, whatever ends it. Others find it stale `seconds` after it was
    last touched, and at once where its holder was a process of their machine that is no more.
    Raises `OSError` where the folder is gone or can't be written.
    """
    owner = Owner.here()
    try:
        if not _create(path, owner) and not _take_over(path, owner, seconds):
            yield False
            return
        with touched(seconds / BEATS, lambda: _touch(path, owner)):
            yield True
    finally:
        with suppress(OSError):
            if holder_of(path) == owner:
                path.unlink()


def _create(path: Path, owner: Owner) -> bool:
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(owner)))
    except OSError:  # a full disk: nobody could tell whose the empty one is
        path.unlink(missing_ok=True)
        raise
    return True


def holder_of(path: Path) -> Owner | None:
    """Who holds the lease, or the guard of one, at `path`; None for nobody, or one that isn't written to its end."""
    try:
        return _holder(path.read_bytes())
    except OSError:
        return None


def _holder(text: bytes) -> Owner | None:
    """Who a lease names; None for one that wasn't written to its end."""
    try:
        return Owner(**parse_json(text))
    except (ValueError, TypeError):
        return None


def _touch(path: Path, owner: Owner) -> None:
    """Through the open file: a lease that another has put in its place meanwhile isn't touched."""
    with path.open("rb") as file:
        if _holder(file.read()) == owner:
            os.utime(file.fileno() if os.utime in os.supports_fd else path)


def _take_over(path: Path, owner: Owner, seconds: float) -> bool:
    """Put an own lease in the place of a stale one.

    Whoever does so holds a guard beside it meanwhile, and looks again under it: of all who found the lease stale one
    takes it over. The lease is never gone in between, where somebody could create it.
    """
    if not _is_stale(path, seconds):
        return False
    guard = path.with_name(f".{path.name}{GUARD}")
    if not _create(guard, owner):
        if _is_stale(guard, seconds):  # its maker died in the few lines below: the next look finds it gone
            guard.unlink(missing_ok=True)
        return False
    own = path.with_name(f".{path.name}.{owner.name}")
    try:
        if not _is_stale(path, seconds):
            return False
        _create(own, owner)
        own.replace(path)
        return True
    finally:
        own.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)


def _is_stale(path: Path, seconds: float) -> bool:
    """Whether a lease's holder is known to be dead, or didn't touch it for so long. What is gone isn't stale."""
    try:
        with path.open("rb") as file:  # opening makes a network's file system ask for the time anew
            holder, touched_at = _holder(file.read()), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    return (holder is not None and holder.dead) or folder_time(path.parent) - touched_at > seconds
