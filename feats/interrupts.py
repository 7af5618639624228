"""Ctrl-C at any moment of a script's work ends it, with the script's own line and no traceback.

Python raises `KeyboardInterrupt` between any two steps. In a finalizer, or in what runs around a fork, nobody can catch
it: it would be printed as a traceback and forgotten, and the work would go on.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import CodeType, FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.001  # seconds for a finalizer to end


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """In here the first of `signals` raises `KeyboardInterrupt`, if need be once more, until it isn't lost.

    The next one, or one while Python shuts down, ends the process at once. What the process was started to ignore stays
    ignored.
    """
    minded = [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    again: list[Timer] = []
    otherwise = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_inside(lost.__code__, frame):  # what is raised there is lost, too
            once_more()
            return
        _end_at_once(minded)
        raise KeyboardInterrupt

    def lost(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is not KeyboardInterrupt or not minded:
            otherwise(what)
            return
        signal.signal(minded[0], interrupt)
        once_more()

    def once_more() -> None:
        again.append(Timer(PATIENCE, signal.pthread_kill, (main_thread().ident, minded[0])))
        again[-1].start()

    atexit.unregister(_end_at_once)
    atexit.register(_end_at_once, minded)
    sys.unraisablehook = lost
    try:
        with _handled(minded, interrupt):
            yield
    finally:
        sys.unraisablehook = otherwise
        for timer in again:
            timer.cancel()


@contextmanager
def held_back() -> Iterator[None]:
    """An interruption that comes in here is raised at the end: for what mustn't be cut in two."""
    came: list[int] = []
    raising = [number for number in INTERRUPTS if callable(signal.getsignal(number))]
    try:
        with _handled(raising, lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled(signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if current_thread() is not main_thread():  # interruptions are raised in the main thread only
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _is_inside(function: CodeType, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not function:
        frame = frame.f_back
    return frame is not None


def _end_at_once(signals: Iterable[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_DFL)


def quiet_start() -> None:
    """For a script's first lines: while its libraries are imported nothing is begun, and Ctrl-C ends it at once, with
    status 130. `interruptible` has its own way then."""
    for number in _usual():
        signal.signal(number, _end_without_a_word_more)


@contextmanager
def started_quietly() -> Iterator[None]:
    """As `quiet_start`, in here."""
    with _handled(_usual(), _end_without_a_word_more):
        yield


def _usual() -> list[signal.Signals]:
    """Ctrl-C, where it would raise `KeyboardInterrupt`."""
    return [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []


def _end_without_a_word_more(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
