"""Recorded training steps against steps computed as they come, to the bit.

On a CPU a recording is played by `Software`: it writes down every operation of torch with the very tensors it was given,
undoes what these did, and replays them on the same memory. Whatever Python computed stays as it was while recording,
and asking for a value is an error, as with CUDA graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import SGD, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.features.inputs import Inputs
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Dropout, Noise, attach_noise
from modeling.heads.registry import HEADS
from modeling.training import gradient, graphs
from modeling.training.config import TrainConfig
from modeling.training.fit import fit
from modeling.training.graphs import HeldMasks, Results, recorded, recorder_for
from modeling.training.problem import Trained

RECORDED = [name for name in SGD if "text_tokens" not in HEADS[name].read_features(("image", "text"))]


class _Tape(TorchDispatchMode):
    """Operations, and the tensors from before them as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value of the device is asked for while recording")
        assert torch.Tag.nondeterministic_seeded not in operation.tags, operation
        for x in tensors((args, kwargs)):
            place = x.untyped_storage().data_ptr()
            if place not in self.made and place not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                self.before[place] = (whole, whole.clone())
        out = operation(*args, **kwargs)
        outputs = tensors(out)
        self.made |= {x.untyped_storage().data_ptr() for x in outputs} - self.before.keys()
        self.operations.append((operation, args, kwargs, outputs))
        return out

    def undo(self) -> None:
        for place, was in self.before.values():
            place.copy_(was)

    def play(self) -> None:
        for operation, args, kwargs, outputs in self.operations:
            for kept, new in zip(outputs, tensors(operation(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Software:
    """Recordings on a CPU."""

    def __init__(self) -> None:
        self.recordings = self.replays = self.warmed = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.warmed += 1
        yield

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        self.recordings += 1
        with _Tape() as tape:
            results = work()
        tape.undo()
        for result in results:
            result.fill_(-1)

        def replay() -> Results:
            self.replays += 1
            with torch.no_grad():
                tape.play()
            return results

        return replay


@pytest.fixture
def software(monkeypatch: pytest.MonkeyPatch) -> Software:
    """A CPU that records every training."""
    recorder = Software()
    monkeypatch.setattr(gradient, "recorder_for", lambda device, steps: recorder)
    return recorder


def same(one: Trained, other: Trained) -> None:
    assert (one.history, one.best_epoch, one.failure) == (other.history, other.best_epoch, other.failure)
    assert (one.val_logits == other.val_logits).all()
    for name, values in one.head.state_dict().items():
        assert torch.equal(values, other.head.state_dict()[name]), name


# Rates that float32 holds exactly: fused Adam takes those of recordings in it.
CONFIG = TrainConfig(HeadConfig("fusion", D=8, dropout=0.3), ep=4, bs=16, lr=2.0**-7)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_are_the_eager_ones_to_the_bit(name: str, request: pytest.FixtureRequest):
    """Three models of two rates, with dropout and views; batches of 16, and the last row of each epoch's 49 alone."""
    problem, config = make_problem(), replace(CONFIG, head=HeadConfig(name, D=8, dropout=0.3), seed=1)
    configs = [config, replace(config, seed=2), replace(config, lr=2.0**-6)]
    eager = fit(configs, problem)
    software = request.getfixturevalue("software")
    found = fit(configs, problem)
    assert software.recordings == 2  # one a batch size
    assert software.warmed == 2 * graphs.WARM_STEPS
    assert software.replays == 4 * 4 - software.warmed
    for one, other in zip(found, eager, strict=True):
        same(one, other)


@pytest.mark.parametrize("changed", [{"schedule": "cosine"}, {"optimizer": "adamw", "weight_decay": 0.25}])
def test_rates_change_between_replays(changed: dict[str, Any], request: pytest.FixtureRequest):
    """Weighted, smoothed loss, and a rate that differs from step to step."""
    config = replace(CONFIG, class_weights="balanced", label_smoothing=0.125, **changed)
    (eager,) = fit([config], make_problem())
    software = request.getfixturevalue("software")
    (found,) = fit([config], make_problem())
    assert software.replays == 10
    assert [row["lr"] for row in found.history] == [row["lr"] for row in eager.history]
    torch.testing.assert_close(torch.tensor(found.val_logits), torch.tensor(eager.val_logits), rtol=1e-5, atol=1e-6)
    if "schedule" in changed:
        assert len({row["lr"] for row in found.history}) == 4
        (constant,) = fit([replace(config, schedule="constant")], make_problem())
        assert abs(constant.val_logits - found.val_logits).max() > 1e-3
    else:
        same(found, eager)


@pytest.mark.parametrize(
    "config", [replace(CONFIG, schedule="onecycle"), replace(CONFIG, head=HeadConfig("cross_modal", D=8))]
)
def test_what_can_t_be_recorded_isn_t(config: TrainConfig, request: pytest.FixtureRequest):
    (eager,) = fit([config], make_problem())
    software = request.getfixturevalue("software")
    (found,) = fit([config], make_problem())
    assert (software.recordings, software.warmed) == (0, 0)
    same(found, eager)


def test_a_step_that_asks_for_values_is_computed_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    batch = Inputs.batch

    def asking(self, rows=None, views=None):
        if rows is not None:
            int(rows.max())
        return batch(self, rows, views)

    monkeypatch.setattr(Inputs, "batch", asking)
    (eager,) = fit([CONFIG], make_problem())
    software = request.getfixturevalue("software")
    with pytest.warns(UserWarning, match="aren't recorded, which costs much speed .a value of the device is asked for"):
        (found,) = fit([CONFIG], make_problem())
    assert (software.recordings, software.replays) == (2, 0)
    same(found, eager)


def test_a_failed_training_fails_alike(request: pytest.FixtureRequest):
    configs = [CONFIG, replace(CONFIG, lr=2.0**126, seed=3)]
    eager = fit(configs, make_problem())
    request.getfixturevalue("software")
    good, bad = fit(configs, make_problem())
    assert good.failure is None and "the loss of fusion became" in bad.failure == eager[1].failure
    same(good, eager[0])


def test_masks_are_drawn_in_the_order_of_the_steps():
    """Those of a plain source, whatever sizes take turns."""
    plain, held = Noise([1, 2, 1]), Noise([1, 2, 1])
    sizes = {4: HeldMasks(held), 3: HeldMasks(held)}
    for size in (4, 4, 3, 4, 3, 4):
        masks = sizes[size]
        masks.next_step()
        masks.asked = 0
        for width, p in ((5, 0.5), (2, 0.25)):
            assert torch.equal(masks.keep_mask((3, size, width), p), plain.keep_mask((3, size, width), p))


def test_results_of_a_step_outlive_the_next():
    """A recorder's own tensors are overwritten."""
    head, noise = Dropout(0.5), Noise([0])
    attach_noise(head, noise)
    step = recorded(lambda rows, views: (rows * 2.0,), head, noise, Software())
    steps = [step(torch.full((1, 2), k), None)[0] for k in range(6)]
    assert [x.tolist() for x in steps] == [[[2.0 * k] * 2] for k in range(6)]


def test_a_cpu_records_nothing():
    assert recorder_for(torch.device("cpu"), 10**6) is None
