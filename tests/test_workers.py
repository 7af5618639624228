import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from feats.errors import UsageError
from modeling.features.inputs import Inputs
from modeling.heads.base import HeadConfig
from modeling.training import workers
from modeling.training.config import TrainConfig
from modeling.training.fit import fit, n_epochs
from modeling.training.problem import Problem

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


def test_processes_give_what_this_one_gives(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    problems = [
        problem,
        Problem(problem.inputs, problem.labels, problem.train[5:], problem.val, problem.classes, problem.folds[5:]),
    ]
    jobs = jobs_of(problems)
    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    told: list[int] = []
    found = dict(workers.run_jobs(jobs, problems, told.append))
    assert sorted(found) == list(range(len(jobs)))
    assert sum(told) == sum(n_epochs(configs) for configs, _ in jobs)
    for number, (configs, k) in enumerate(jobs):
        for here, there in zip(fit(configs, problems[k]), found[number], strict=True):
            assert (here.config, here.best_epoch) == (there.config, there.best_epoch)
            np.testing.assert_allclose(there.val_logits, here.val_logits, atol=1e-5)


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


def test_a_killed_process_ends_the_work_with_one_line(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "LEAST_WORK", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    long = [TrainConfig(HeadConfig("fusion", 4), ep=2000, bs=8)]  # some seconds
    before = set(multiprocessing.active_children())  # other tests' processes that are on their way out
    killed: list[int] = []

    def kill(epochs: int) -> None:
        if not killed:
            killed.append(next(p.pid for p in multiprocessing.active_children() if p not in before))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(UsageError, match="a training process was killed"):
        dict(workers.run_jobs([(long, 0), (long, 0)], [problem], kill))
