"""Training jobs side by side on a CPU, in processes of one thread each.

Steps of small batches are short: a second thread spends its time waiting at the end of every operation, while another
process is free to get on. On a GPU, for few or short jobs, and for data too large to copy, jobs run here one by one.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from feats.errors import UsageError
from feats.interrupts import held_back
from feats.orphans import end_with
from modeling.training.config import TrainConfig
from modeling.training.fit import fit, work
from modeling.training.problem import Epoch, Problem, Trained

LEAST_WORK = 4e12  # floating-point operations for which starting processes pays: some 20 s of one core
MOST_WORKERS = 16
LARGEST_COPY = 1 << 29  # bytes of features that every process may hold for itself

Job = tuple[Sequence[TrainConfig], int]  # configurations of one stack, and the number of their problem


def run_jobs(
    jobs: Sequence[Job],
    problems: Sequence[Problem],
    progress: Callable[[int], Any],
    told: Callable[[int, Epoch], Any] | None = None,
) -> Iterator[tuple[int, list[Trained]]]:
    """Each job's number and result, in any order. `progress` and `told` hear of epochs as in `training.fit`, `told`
    with the number of the problem.

    Raises what `fit` raises in any process, and `UsageError` when a process is killed.
    """
    count = min(len(jobs), _cores(), MOST_WORKERS)
    on_cpu = problems[0].device.type == "cpu"
    enough = sum(work(configs, problems[k]) for configs, k in jobs) >= LEAST_WORK
    in_memory = all(problem.streamed is None for problem in problems)
    small = in_memory and sum(problem.inputs.n_bytes for problem in problems) <= LARGEST_COPY
    if not (on_cpu and enough and small and count > 1 and os.name == "posix"):
        for number, (configs, k) in enumerate(jobs):
            yield number, fit(configs, problems[k], progress, None if told is None else partial(told, k))
        return
    lightest_first = sorted(range(len(jobs)), key=lambda j: work(jobs[j][0], problems[jobs[j][1]]))
    waiting = [(number, *jobs[number]) for number in lightest_first]  # taken from the end: the long ones start early
    processes: list[subprocess.Popen[bytes]] = []
    try:
        busy = [_start(processes) for _ in range(count)]
        for worker in busy:
            _send(worker, (list(problems), told is not None))
            _send(worker, waiting.pop())
        while busy:
            ready = wait(busy)
            for worker in [worker for worker in busy if worker in ready]:
                kind, value = _receive(worker)
                if kind == "error":
                    raise value
                if kind == "epochs":
                    progress(value)
                    continue
                if kind == "told":
                    assert told is not None
                    told(*value)
                    continue
                if waiting:
                    _send(worker, waiting.pop())
                else:
                    busy.remove(worker)
                yield value
    except (EOFError, ConnectionError):
        raise UsageError(
            "a training process was killed, for want of memory as a rule; what was finished is kept where the command "
            "keeps it, run it again with fewer processes beside it"
        ) from None
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _start(processes: list[subprocess.Popen[bytes]]) -> Connection:
    """Add a process to `processes`; returns the connection to it, which ends when the process does."""
    here, there = Pipe()
    code = f"from modeling.training.workers import serve; serve({there.fileno()}, {os.getpid()})"
    with held_back():
        processes.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                # A script's own path, which -P and -c would not give: the process must import the very same packages.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[there.fileno()],
                start_new_session=True,  # where a terminal's Ctrl-C doesn't reach: this process ends the others
            )
        )
    there.close()
    return here


def serve(connection: int, parent_pid: int) -> None:
    """What a process does: receive the problems, then train job after job until the parent is gone. `connection`: the
    number of an open pipe to it."""
    end_with(parent_pid)  # not only when the job is done
    parent = Connection(connection)
    torch.set_num_threads(1)
    try:
        problems, telling = _receive(parent)
        while True:
            number, configs, k = _receive(parent)
            told = partial(_tell, parent, k) if telling else None
            try:
                trained = fit(configs, problems[k], lambda epochs: _send(parent, ("epochs", epochs)), told)
                _send(parent, ("done", (number, trained)))
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                error.add_note(traceback.format_exc())  # a traceback doesn't travel
                _send(parent, ("error", error))
    except (EOFError, ConnectionError):
        return  # the parent has all it wants, or was killed


def _tell(parent: Connection, k: int, epoch: Epoch) -> None:
    _send(parent, ("told", (k, epoch)))


def _send(to: Connection, message: Any) -> None:
    # Bytes rather than tensors: torch would send those through shared memory, of which containers have little. Only
    # this process and its own children hold the pipe: nothing unpickled from it was ever a file.
    to.send_bytes(pickle.dumps(message))


def _receive(sender: Connection) -> Any:
    # Safe: the pipe was made by this process or its parent and has no other end, see `_send`.
    return pickle.loads(sender.recv_bytes())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
