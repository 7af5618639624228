import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, lives

from feats.errors import UsageError
from modeling.features.inputs import Inputs
from modeling.heads.config import HeadConfig
from modeling.training import workers
from modeling.training.config import TrainConfig
from modeling.training.fit import fit, n_epochs
from modeling.training.problem import Epoch, Problem

N = 60


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(image=torch.randn(N, 5, generator=generator), text=torch.randn(N, 7, generator=generator))
    labels = (inputs.image[:, 0] + inputs.text[:, 0] > 0).long()
    return Problem(inputs, labels, torch.arange(40), torch.arange(40, N), ["no", "yes"], torch.arange(40) % 4)


def jobs_of(problems: list[Problem]) -> list[tuple[list[TrainConfig], int]]:
    heads = ("fusion", "concat", "linear")
    return [
        ([TrainConfig(HeadConfig(head, 4), ep=3, bs=16, lr=0.01, seed=s) for s in (1, 2)], k)
        for head in heads
        for k in range(len(problems))
    ]


def remember_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started from now on, and no work too small for them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=start))
    return started


@pytest.mark.slow
def test_processes_give_what_this_one_gives(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    problems = [
        problem,
        Problem(problem.inputs, problem.labels, problem.train[5:], problem.val, problem.classes, problem.folds[5:]),
    ]
    jobs = jobs_of(problems)
    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    told: list[int] = []
    heard: list[tuple[int, Epoch]] = []
    found = dict(workers.run_jobs(jobs, problems, told.append, lambda k, epoch: heard.append((k, epoch))))
    assert sorted(found) == list(range(len(jobs)))
    assert sum(told) == sum(n_epochs(configs) for configs, _ in jobs)
    for number, (configs, k) in enumerate(jobs):
        for here, there in zip(fit(configs, problems[k]), found[number], strict=True):
            assert (here.config, here.best_epoch) == (there.config, there.best_epoch)
            np.testing.assert_allclose(there.val_logits, here.val_logits, atol=1e-5)
            own = [epoch.row for of, epoch in heard if of == k and epoch.config == there.config]
            assert own == (there.history if there.best_epoch else [])


def test_no_processes_for_little_work(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "_start", None)  # starting a process would fail
    assert len(dict(workers.run_jobs(jobs_of([problem]), [problem], lambda epochs: None))) == 3


def test_no_processes_for_data_too_large_to_copy(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "LARGEST_COPY", 1000)
    monkeypatch.setattr(workers, "_start", None)
    assert len(dict(workers.run_jobs(jobs_of([problem]), [problem], lambda epochs: None))) == 3


def test_an_error_in_a_process_reaches_the_user(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    bad = [TrainConfig(HeadConfig("fusion", 4), ep=3, bs=16, class_weights={"maybe": 2})]
    with pytest.raises(UsageError, match="'maybe': no such class"):
        dict(workers.run_jobs([(bad, 0), *jobs_of([problem])], [problem], lambda epochs: None))


LONG = [TrainConfig(HeadConfig("fusion", 4), ep=2000, bs=8)]  # some seconds


@pytest.mark.slow
def test_a_killed_process_ends_the_work_with_one_line(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    started = remember_processes(monkeypatch)

    def kill(epochs: int) -> None:
        started[0].kill()

    with pytest.raises(UsageError, match="a training process was killed"):
        dict(workers.run_jobs([(LONG, 0), (LONG, 0)], [problem], kill))


@pytest.mark.slow
def test_an_interruption_ends_the_processes(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """A terminal sends Ctrl-C to its whole session. The processes have their own: this one ends them."""
    started = remember_processes(monkeypatch)

    def interrupt(epochs: int) -> None:
        assert len({os.getsid(process.pid) for process in started} - {os.getsid(0)}) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dict(workers.run_jobs([(LONG, 0), (LONG, 0)], [problem], interrupt))
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


@pytest.mark.usefixtures("in_foreground")
def test_an_interruption_waits_until_a_process_is_known(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    started = remember_processes(monkeypatch)
    start = workers.subprocess.Popen

    def start_and_interrupt(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=start_and_interrupt))
    with pytest.raises(KeyboardInterrupt):
        dict(workers.run_jobs([(LONG, 0), (LONG, 0)], [problem], lambda epochs: None))
    assert [process.returncode for process in started] == [-signal.SIGTERM]


ORPHANS = """
    import os, signal, subprocess, sys, torch
    from modeling.features.inputs import Inputs
    from modeling.heads.config import HeadConfig
    from modeling.training import workers
    from modeling.training.config import TrainConfig
    from modeling.training.problem import Problem

    started, heard = [], set()

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self.pid)

    def stop(epochs):
        heard.add(epochs)
        if heard == {1, 2}:  # both are in the middle of their job, one of them training two at once
            for pid in started:
                os.kill(pid, signal.SIGSTOP)
            open(sys.argv[1], "w").write(" ".join(map(str, started)))
            os.kill(os.getpid(), signal.SIGKILL)

    workers.LEAST_WORK, workers._cores, workers.subprocess.Popen = 0, lambda: 2, Popen
    rows = torch.arange(60)
    problem = Problem(Inputs(text=torch.randn(60, 7)), rows % 2, rows[:40], rows[40:], ["no", "yes"])
    config = TrainConfig(HeadConfig("mlp", 4, sides=("text",)), ep=100_000, bs=8)
    dict(workers.run_jobs([([config], 0), ([config, config], 0)], [problem], stop))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux to end the processes, and which live")
@pytest.mark.slow
def test_no_process_outlives_a_killed_parent(tmp_path: Path):
    """Not even one that can't notice by itself: here, because it was stopped."""

    killed = subprocess.run([sys.executable, "-c", dedent(ORPHANS), str(tmp_path / "pids")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    pids, limit = list(map(int, (tmp_path / "pids").read_text().split())), time.monotonic() + 20
    assert len(pids) == 2
    while any(map(lives, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    left = [pid for pid in pids if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
