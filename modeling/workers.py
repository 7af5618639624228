"""Training jobs side by side on a CPU, in processes of one thread each.

Steps of small batches are short: a second thread spends its time waiting at the end of every operation, while another
process is free to get on. On a GPU, for few or short jobs, and for data too large to copy, jobs run here one by one.
"""

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import torch
from torch import multiprocessing

from modeling.training import Problem, TrainConfig, Trained, fit, work

LEAST_WORK = 4e12  # floating-point operations for which starting processes pays: some 20 s of one core
LARGEST_COPY = 1 << 29  # bytes of features that every process may hold for itself

Job = tuple[Sequence[TrainConfig], int]  # configurations of one stack, and the number of their problem


def run_jobs(
    jobs: Sequence[Job], problems: Sequence[Problem], progress: Callable[[int], Any]
) -> Iterator[tuple[int, list[Trained]]]:
    """Each job's number and result, in any order. `progress` is told epochs as in `training.fit`."""
    count = min(len(jobs), _cores())
    on_cpu = problems[0].inputs.device.type == "cpu"
    pays = on_cpu and count > 1 and sum(work(configs, problems[k]) for configs, k in jobs) >= LEAST_WORK
    copy = pickle.dumps(list(problems)) if pays else b""
    if not 0 < len(copy) <= LARGEST_COPY:
        for number, (configs, k) in enumerate(jobs):
            yield number, fit(configs, problems[k], progress)
        return
    # Bytes rather than tensors: torch would send those through shared memory, of which containers have little.
    spawn = multiprocessing.get_context("spawn")
    reports = spawn.SimpleQueue()
    listener = Thread(target=_listen, args=(reports, progress), daemon=True)
    listener.start()
    heaviest_first = sorted(range(len(jobs)), key=lambda j: -work(jobs[j][0], problems[jobs[j][1]]))
    tasks = [pickle.dumps((number, *jobs[number])) for number in heaviest_first]
    with spawn.Pool(count, _start, (copy, reports)) as pool:
        for result in pool.imap_unordered(_do, tasks):
            yield pickle.loads(result)
    reports.put(None)
    listener.join()


def _listen(reports: Any, progress: Callable[[int], Any]) -> None:
    while (epochs := reports.get()) is not None:
        progress(epochs)


_state: dict[str, Any] = {}  # of a worker process


def _start(problems: bytes, reports: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(1)
    _state.update(problems=pickle.loads(problems), progress=reports.put)


def _do(task: bytes) -> bytes:
    number, configs, k = pickle.loads(task)
    return pickle.dumps((number, fit(configs, _state["problems"][k], _state["progress"])))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
