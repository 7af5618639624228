"""Training jobs side by side on a CPU, in processes of one thread each.

Steps of small batches are short: a second thread spends its time waiting at the end of every operation, while another
process is free to get on. On a GPU, for few or short jobs, and for data too large to copy, jobs run here one by one.
"""

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from typing import Any

import torch
from torch import multiprocessing

from feats.errors import UsageError
from modeling.training import Problem, TrainConfig, Trained, fit, work

LEAST_WORK = 4e12  # floating-point operations for which starting processes pays: some 20 s of one core
MOST_WORKERS = 16
LARGEST_COPY = 1 << 29  # bytes of features that every process may hold for itself

Job = tuple[Sequence[TrainConfig], int]  # configurations of one stack, and the number of their problem


def run_jobs(
    jobs: Sequence[Job], problems: Sequence[Problem], progress: Callable[[int], Any]
) -> Iterator[tuple[int, list[Trained]]]:
    """Each job's number and result, in any order. `progress` is told epochs as in `training.fit`."""
    count = min(len(jobs), _cores(), MOST_WORKERS)
    on_cpu = problems[0].inputs.device.type == "cpu"
    least = sum(work(configs, problems[k]) for configs, k in jobs) >= LEAST_WORK
    if not (on_cpu and least and count > 1 and sum(problem.inputs.n_bytes for problem in problems) <= LARGEST_COPY):
        for number, (configs, k) in enumerate(jobs):
            yield number, fit(configs, problems[k], progress)
        return
    spawn = multiprocessing.get_context("spawn")
    reports = spawn.SimpleQueue()
    listener = Thread(target=_listen, args=(reports, progress), daemon=True)
    listener.start()
    # Bytes rather than tensors: torch would send those through shared memory, of which containers have little. Pickled
    # bytes pass only between this process and its own children, through pipes: nothing unpickled here was ever a file.
    executor = ProcessPoolExecutor(count, spawn, _start, (pickle.dumps(list(problems)), reports))
    try:
        heaviest_first = sorted(range(len(jobs)), key=lambda j: -work(jobs[j][0], problems[jobs[j][1]]))
        with _deaf_to_interrupts():
            tasks = [executor.submit(_do, pickle.dumps((number, *jobs[number]))) for number in heaviest_first]
        for task in as_completed(tasks):
            yield pickle.loads(task.result())  # from an own child
        reports.put(None)
        listener.join()
    except BrokenProcessPool:
        raise UsageError(
            "a training process was killed, for want of memory as a rule; what was finished is kept where the command "
            "keeps it, run it again with fewer processes beside it"
        ) from None
    finally:
        # Reached early by an error or an interruption: what runs is of no use to anybody.
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C from their first moment on: the parent ends them."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(reports: Any, progress: Callable[[int], Any]) -> None:
    while (epochs := reports.get()) is not None:
        progress(epochs)


_state: dict[str, Any] = {}  # of a worker process


def _start(problems: bytes, reports: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(1)
    _state.update(problems=pickle.loads(problems), progress=reports.put)  # from the parent


def _do(task: bytes) -> bytes:
    number, configs, k = pickle.loads(task)  # from the parent
    return pickle.dumps((number, fit(configs, _state["problems"][k], _state["progress"])))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
