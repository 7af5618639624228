"""What a script shows while it works: bars on a terminal and lines elsewhere, all of it, or under --quiet only results
and errors, with a copy in a log file if one is asked for. With the command lines this module alone knows stderr and the
bars."""

import os
import platform
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from feats.errors import UsageError, reason_of
from feats.escapes import of_terminal, one_line

PROJECT = "multimodal-feature-probe"
LIBRARIES = ("torch", "torchvision", "transformers", "numpy", "h5py", "scikit-learn")
PERIOD = 30.0  # seconds between two lines of progress where there is no terminal
STDOUT = "standard output"
ERRORS, REMARKS = ("error:", "interrupted:"), ("warning:", "note:")  # how a message of several lines begins


@dataclass(frozen=True)
class Asked:
    """What to show: under `quiet` results and errors only; `log`: a file that gets a copy, with times."""

    quiet: bool = False
    log: Path | None = None


_asked = Asked()  # by the command line that was read last


def ask(asked: Asked) -> None:
    """Have the next `showing` show so much."""
    global _asked
    _asked = asked


@contextmanager
def showing() -> Iterator[None]:
    """While the block runs, stdout and stderr show what `ask` was told, as `feats.escapes` has it: but what goes from
    stdout into a file or a pipe stays as it is. Raises `UsageError` for a log file that can't be written, and as
    `written_out`."""
    with ExitStack() as stack:
        log = stack.enter_context(_opened(_asked.log)) if _asked.log else None
        if sys.stdout is not None:  # None: it was closed
            out = _Stream(sys.stdout, log)
            stack.enter_context(redirect_stdout(out))  # type: ignore[type-var]
            stack.callback(out.end)
        if sys.stderr is not None:
            err = _Stream(sys.stderr, log, errors_only=_asked.quiet)
            stack.enter_context(redirect_stderr(err))  # type: ignore[type-var]
            stack.callback(err.end)
        yield


@contextmanager
def written_out(stream: TextIO | None = None) -> Iterator[None]:
    """Raises `UsageError` when stdout (`stream`: what stands for it) doesn't take what is written in here, as on a full
    disk, and a `BrokenPipeError` that names it when whoever read it has gone."""
    try:
        yield
    except OSError as error:
        let_go(stream or sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise BrokenPipeError(error.errno, error.strerror, STDOUT) from None
        raise UsageError(
            f"can't write to {STDOUT} ({reason_of(error)}); make room there, or send it elsewhere"
        ) from None


def let_go(stream: TextIO) -> None:
    """Send all that `stream` still gets nowhere. What it holds already Python would write when it ends, and show a
    traceback when that fails, too."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"`log_file` {path} can't be written ({error.strerror}); give another file") from None


class _Stream:
    """A text stream that passes lines on to `shown`, and to `log` with their times."""

    def __init__(self, shown: TextIO, log: TextIO | None, errors_only: bool = False):
        self.shown, self.log, self.errors_only = shown, log, errors_only
        self.begun = ""  # a line without its end
        self.in_error = False
        self.is_stdout = shown is sys.stdout
        self.escapes = errors_only or not self.is_stdout or shown.isatty()

    def write(self, text: str) -> int:
        if not self.errors_only:
            self._show(of_terminal(text) if self.escapes else text)
            if self.log is None:
                return len(text)
        *lines, self.begun = (self.begun + of_terminal(text)).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def end(self) -> None:
        """Take what is left as a line."""
        if self.begun:
            self._take(self.begun)
            self.begun = ""
        self.flush()

    def flush(self) -> None:
        with self._written():
            self.shown.flush()
        if self.log:
            self.log.flush()

    def _show(self, text: str) -> None:
        with self._written():
            self.shown.write(text)

    def _written(self) -> AbstractContextManager[None]:
        return written_out(self.shown) if self.is_stdout else nullcontext()

    def _take(self, line: str) -> None:
        if self.errors_only:
            self.in_error = line.startswith(ERRORS) or (self.in_error and not line.startswith(REMARKS))
            if not self.in_error:
                return
            self._show(f"{line}\n")
        if self.log and line.strip():
            self.log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shown, name)


# -- progress ---------------------------------------------------------------------------------------------------


class Progress:
    """How far some work of `total` steps is: a bar on a terminal, elsewhere a line of stderr every `PERIOD` seconds.

    Time left goes by the steps' weights, which add up to `weight` in all (default: each counts 1). A bar that doesn't
    `stay` leaves nothing on the terminal."""

    def __init__(self, title: str, total: int, unit: str, weight: float | None = None, *, stay: bool = False):
        from tqdm import tqdm

        self.total, self.unit = total, unit
        self.weight = float(total) if weight is None else weight
        self.done, self.weighed, self.now = 0, 0.0, ""
        self.began = self.told = time.monotonic()
        self.title = title = one_line(title)
        stream = sys.stderr
        while isinstance(stream, _Stream):
            stream = stream.shown
        self.bar: Any = None
        if stream.isatty() and not _asked.quiet:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
            settings = {"bar_format": layout, "leave": stay, "dynamic_ncols": True, "file": stream}
            self.bar = tqdm(total=self.weight, desc=title, postfix=self._steps(), **settings)

    def add(self, steps: int, weight: float | None = None, now: str = "") -> None:
        """So many steps more are done, `now` by the name of what did them."""
        self.done, self.now = self.done + steps, one_line(now) or self.now
        before, self.weighed = self.weighed, min(self.weight, self.weighed + (steps if weight is None else weight))
        if self.bar is not None:
            self.bar.set_postfix_str(self._steps(), refresh=False)
            self.bar.update(self.weighed - before)
        elif time.monotonic() - self.told >= PERIOD:
            self.told = time.monotonic()
            print(f"{self.title}: {self._line()}", file=sys.stderr, flush=True)

    def to(self, done: int) -> None:
        """So many steps are done in all."""
        self.add(min(done, self.total) - self.done)

    def close(self) -> None:
        """Take the bar from the terminal, or leave it there as it is."""
        if self.bar is not None:
            self.bar.close()

    def _steps(self) -> str:
        seconds = time.monotonic() - self.began
        rate = f", {self.done / seconds:,.0f}/s" if seconds > 1 and self.done >= seconds else ""
        return ", ".join([f"{self.done} of {self.total} {self.unit}s", *filter(None, [self.now])]) + rate

    def _line(self) -> str:
        share = self.weighed / self.weight if self.weight else 1.0
        left = (time.monotonic() - self.began) * (1 - share) / share if share else None
        return f"{share:.0%}, {self._steps()}" + ("" if left is None else f", {_duration(left)} left")


@contextmanager
def progress(title: str, total: int, unit: str, weight: float | None = None) -> Iterator[Progress]:
    """A `Progress` that is closed when the block ends."""
    shown = Progress(title, total, unit, weight)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def rows_progress(title: str, *, stay: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of rows done and rows to do that shows them as `Progress`, from when it is first called."""
    shown: Progress | None = None

    def tell(done: int, total: int) -> None:
        nonlocal shown
        shown = shown or Progress(title, total, "row", stay=stay)
        shown.to(done)

    try:
        yield tell
    finally:
        if shown is not None:
            shown.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


# -- version ----------------------------------------------------------------------------------------------------


def version_line() -> str:
    """The versions of this project, of Python and of the libraries that decide results."""
    of_libraries = [f"{name} {_version(name)}" for name in LIBRARIES]
    return ", ".join([f"{PROJECT} {_project_version()}", f"Python {platform.python_version()}", *of_libraries])


def _project_version() -> str:
    """Of this tree, where it is one; else of what is installed."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    if path.is_file():
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"])
    return _version(PROJECT)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
