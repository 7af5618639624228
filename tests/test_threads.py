"""How many threads a training runs on: what its own steps measure decides, and nothing else changes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from modeling.features.inputs import Inputs
from modeling.heads.config import HeadConfig
from modeling.training import threads as module
from modeling.training.config import TrainConfig
from modeling.training.fit import fit
from modeling.training.problem import Problem
from modeling.training.threads import StepThreads, threads_kept

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def run(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], steps: int) -> list[int]:
    """The threads of each step on a machine whose steps take `seconds` by number of threads; n times as long on n
    threads that weren't as many in the step before, since they must wake."""
    clock, used = [0.0], []
    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    chosen = StepThreads(CPU)
    for _ in range(steps):
        chosen.begin_step()
        used.append(torch.get_num_threads())
        clock[0] += seconds[used[-1]] * (1 if used[-1:] == used[-2:-1] else used[-1])
        chosen.end_step()
    return used


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_the_fastest_number_is_found_and_kept(fastest: int, four_threads: None, monkeypatch: pytest.MonkeyPatch):
    seconds = {n: 1.0 if n == fastest else 1.5 for n in (1, 2, 4)}
    used = run(monkeypatch, seconds, 1000)
    assert set(used[:28]) == {1, 2, 4} and used[28:200] == [fastest] * 172
    assert used.count(fastest) > 900  # trials are repeated, and take a twentieth of the time


def test_a_hopeless_number_is_given_up_at_once(four_threads: None, monkeypatch: pytest.MonkeyPatch):
    used = run(monkeypatch, {1: 1.0, 2: 1.2, 4: 50.0}, 300)
    assert used[:28].count(4) == 3  # one turn


def test_other_programs_come_and_go(four_threads: None, monkeypatch: pytest.MonkeyPatch):
    seconds = {1: 2.0, 2: 1.0, 4: 0.5}
    clock, used = [0.0], []
    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    chosen = StepThreads(CPU)
    for step in range(4000):
        if step == 1000:
            seconds = {1: 2.0, 2: 3.0, 4: 9.0}
        chosen.begin_step()
        used.append(torch.get_num_threads())
        clock[0] += seconds[used[-1]]
        chosen.end_step()
    assert used[500:1000].count(4) > 400 and used[-1000:].count(1) > 900


def test_the_number_of_threads_is_left_as_it_was(four_threads: None):
    with pytest.raises(KeyboardInterrupt), threads_kept():
        torch.set_num_threads(1)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 4


def test_training_on_any_number_of_threads_is_the_same(four_threads: None, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.arange(300), torch.randn(300, 64, generator=generator)
    problem = Problem(Inputs(text=x), (x[:, 0] > 0).long(), rows[:250], rows[250:], ["no", "yes"])
    config = TrainConfig(HeadConfig("fusion", D=64, sides=("text",)), lr=1e-3, ep=8, bs=32)
    (measured,) = fit([config], problem)
    assert torch.get_num_threads() == 4
    torch.set_num_threads(1)
    (alone,) = fit([config], problem)
    np.testing.assert_allclose(measured.val_logits, alone.val_logits, atol=1e-5)


@pytest.mark.parametrize(("deterministic", "most_used"), [(False, 1), (True, 4)])
@pytest.mark.parametrize("name", ["linear", "kernel"])
def test_closed_forms_run_on_the_threads_that_are_fastest(
    name: str, deterministic: bool, most_used: int, four_threads: None, monkeypatch: pytest.MonkeyPatch
):
    clock, used = [0.0], []
    cross_entropy = torch.nn.functional.cross_entropy

    def timed(logits: torch.Tensor, *args, **more) -> torch.Tensor:  # once in every evaluation of the objective
        if logits.requires_grad:
            used.append(torch.get_num_threads())
            clock[0] += used[-1]  # as on a machine that is busy: the more threads, the longer
        return cross_entropy(logits, *args, **more)

    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", timed)
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.arange(120), torch.randn(120, 8, generator=generator)
    problem = Problem(Inputs(text=x), (x[:, 0] > 0).long(), rows[:100], rows[100:], ["no", "yes"], rows[:100] % 4)
    fit([TrainConfig(HeadConfig(name, sides=("text",)), deterministic=deterministic)], problem)
    assert used.count(most_used) > 0.8 * len(used) > 100 and torch.get_num_threads() == 4
