"""Training many at once: what torch's own modules, losses, schedules and optimisers give, alone or in a stack."""

import copy
import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
import torch.nn.functional as F
from problems import CLASSES, N_TRAIN, SGD, N, make_problem
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from tensors import normal
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.features.inputs import Inputs
from modeling.features.joined import Ragged
from modeling.heads.config import HeadConfig
from modeling.heads.layers import kernel_logits
from modeling.heads.registry import build_head
from modeling.training import fit as training, gradient
from modeling.training.closed_form import fit_kernel
from modeling.training.config import MONITORS, SCHEDULES, TrainConfig
from modeling.training.draws import Draws
from modeling.training.exact import LINEAR_CS
from modeling.training.fit import fit, n_epochs, stacks, work
from modeling.training.gradient import cross_entropy
from modeling.training.problem import Epoch, Problem, Trained, class_weights, predict_stack
from modeling.training.stacked_adam import StackedAdam, beta1, lr_factor


def same(one: Trained, other: Trained) -> None:
    """Bit for bit."""
    assert one.best_epoch == other.best_epoch and one.history == other.history
    assert np.array_equal(one.val_logits, other.val_logits)
    for name, tensor in one.head.state_dict().items():
        assert torch.equal(tensor, other.head.state_dict()[name]), name


def differ(one: Trained, other: Trained) -> bool:
    return np.abs(one.val_logits - other.val_logits).max() > 1e-4


# -- alone and in a stack ---------------------------------------------------------------------------------------

VARIED = [  # one shape; everything that a model of a stack has for its own
    {"lr": 1e-2, "seed": 5},
    {"lr": 3e-3, "seed": 3, "weight_decay": 0.1, "schedule": "onecycle", "class_weights": "balanced"},
    {"lr": 1e-2, "seed": 5, "label_smoothing": 0.2, "monitor": "macro_f1"},
    {"lr": 2e-3, "seed": 9, "schedule": "cosine", "monitor": "loss", "class_weights": {"c": 3, "a": 0.5}},
    {"lr": 1e-2, "seed": 8, "weight_decay": 0.3, "monitor": "weighted_f1", "patience": 1},
    {"lr": 2e-2, "seed": 1, "patience": 2, "monitor": "loss", "class_weights": "sqrt"},
]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("name", SGD)
def test_a_configuration_gives_the_same_alone_and_in_a_stack(name: str, optimizer: str):
    problem = make_problem()
    shared = TrainConfig(HeadConfig(name, D=8), optimizer=optimizer, ep=3, bs=16, balanced_sampler=optimizer == "adamw")
    configs = [replace(shared, **own) for own in VARIED]
    assert [sorted(members) for members in stacks(configs, problem)] == [list(range(len(configs)))]
    together = fit(configs, problem)
    for config, found in zip(configs, together, strict=True):
        (alone,) = fit([config], problem)
        assert found.config == alone.config == config
        assert found.best_epoch == alone.best_epoch and len(found.history) == len(alone.history)
        np.testing.assert_allclose(found.val_logits, alone.val_logits, rtol=1e-5, atol=1e-5)
        for one, other in zip(found.history, alone.history, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert all(differ(together[0], other) for other in together[1:])


def test_seeds_of_one_configuration_give_the_same_alone_and_in_a_stack():
    problem, config = make_problem(), TrainConfig(HeadConfig("fusion", D=8), "adamw", 1e-2, 0.1, ep=3, bs=16)
    configs = [replace(config, seed=seed) for seed in range(7)]
    assert [len(members) for members in stacks(configs, problem)] == [7]
    for config, found in zip(configs, fit(configs, problem), strict=True):
        np.testing.assert_allclose(found.val_logits, fit([config], problem)[0].val_logits, rtol=1e-5, atol=1e-5)


def test_each_hyperparameter_of_a_stack_has_an_effect():
    problem, base = make_problem(), TrainConfig(HeadConfig("early", D=8), "adamw", 1e-2, 0.1, ep=3, bs=16)
    changes = [{}, {"lr": 1e-3}, {"weight_decay": 1.0}, {"schedule": "cosine"}, {"schedule": "onecycle"}]
    changes += [{"label_smoothing": 0.3}, {"class_weights": "balanced"}, {"seed": 0}, {"optimizer": "adam"}]
    changes += [{"balanced_sampler": True}, {"bs": 8}, {"ep": 2}]
    found = fit([replace(base, monitor="loss", **change) for change in changes], problem)
    for i, one in enumerate(found):
        assert all(differ(one, other) for other in found[:i]), changes[i]


def test_many_shapes_at_once_in_the_order_asked(monkeypatch: pytest.MonkeyPatch):
    problem = make_problem()
    heads = [
        HeadConfig("late", D=8),
        HeadConfig("early", D=4),
        HeadConfig("late", D=8, sides=("text",)),
        HeadConfig("late", D=6),
    ]
    configs = [TrainConfig(heads[i % 4], lr=1e-2 / (1 + i), ep=2, bs=16, seed=20 - i) for i in range(12)]
    told = []
    found = fit(configs, problem, told.append)
    assert [trained.config for trained in found] == configs
    assert sum(told) == n_epochs(configs) == 24
    assert Counter(map(len, stacks(configs, problem))) == {3: 4}
    monkeypatch.setitem(training.STACK_PARAMETERS, "cpu", 1)
    assert set(map(len, stacks(configs, problem))) == {1}
    for one, other in zip(found, fit(configs, problem), strict=True):
        np.testing.assert_allclose(one.val_logits, other.val_logits, atol=1e-5)


def test_stacks_hold_what_fits(monkeypatch: pytest.MonkeyPatch):
    problem, head = make_problem(), HeadConfig("late_512")
    configs = [TrainConfig(head, seed=seed) for seed in range(10)]
    size = 512 * (5 + 13 + 2) + 1025 * 512 + 513 * 3
    for limit, expected in ((10 * size, [10]), (10 * size - 1, [5, 5]), (4 * size, [4, 4, 2]), (1, [1] * 10)):
        monkeypatch.setitem(training.STACK_PARAMETERS, "cpu", limit)
        found = list(stacks(configs, problem))
        assert [len(members) for members in found] == expected
        assert sorted(i for members in found for i in members) == list(range(10))


@pytest.mark.parametrize("name", SGD)
def test_deterministic_for_a_seed_bit_for_bit(name: str):
    problem = make_problem()
    configs = [TrainConfig(HeadConfig(name, D=8), lr=1e-2, ep=2, bs=16, seed=seed) for seed in (3, 2)]
    torch.manual_seed(0)
    first = fit(configs, problem)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for one, other in zip(first, fit(configs, problem), strict=True):
        same(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert differ(*first)


@pytest.mark.parametrize("kept, side", [("text", "image"), ("image", "text")])
@pytest.mark.parametrize("name", SGD)
def test_ablation_trains_without_the_absent_side(name: str, kept: str, side: str):
    config = TrainConfig(HeadConfig(name, D=8, sides=(kept,)), lr=1e-2, ep=2, bs=16)
    problem = make_problem()
    parts = [side, f"{side}_tokens"] + ["image_views"] * (side == "image")
    none = make_problem(**dict.fromkeys(parts))
    nans = {part: getattr(problem.inputs, part) for part in parts}
    nans = {
        p: replace(x, values=x.values * math.nan) if isinstance(x, Ragged) else x * math.nan for p, x in nans.items()
    }
    (found,) = fit([config], problem)
    for other in (none, make_problem(**nans)):
        same(fit([config], other)[0], found)


# -- against torch ----------------------------------------------------------------------------------------------


def plain_fusion(
    config: TrainConfig, problem: Problem, bias: bool
) -> tuple[list[float], list[float], list[np.ndarray]]:
    """Train and validation losses and validation logits of each epoch by torch's modules, in double precision."""
    inputs = problem.inputs
    sides, D, C = {"image": inputs.image.double(), "text": inputs.text.double()}, config.head.D, len(problem.classes)
    ours = build_head(config.head, inputs.for_head(config.head).widths, C, [config.seed])
    linear = nn.ModuleDict({side: nn.Linear(x.shape[1], D, bias) for side, x in sides.items()})
    norm = nn.ModuleDict({side: nn.BatchNorm1d(D) for side in sides})
    out = nn.Linear(2 * D, C)
    with torch.no_grad():
        for side in sides:
            linear[side].weight.copy_(ours.project[side][0].weight[0])
            if bias:
                linear[side].bias.zero_()
        out.weight.copy_(ours.out.weight[0])
        out.bias.copy_(ours.out.bias[0])
    net = nn.ModuleList([linear, norm, out]).double()

    def logits(rows: Tensor) -> Tensor:
        return out(torch.cat([F.relu(norm[side](linear[side](x[rows]))) for side, x in sides.items()], 1))

    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        net.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    steps = config.ep * math.ceil(N_TRAIN / config.bs)
    schedule = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.3),
    }[config.schedule]()
    weights = class_weights(config.class_weights, problem).double()
    draws = Draws([config], problem, inputs)
    train_losses, val_losses, val_logits = [], [], []
    for _ in range(config.ep):
        losses = []
        for rows in draws.epoch()[0][0].split(config.bs):
            net.train()
            if len(rows) == 1:
                norm.eval()
            loss = F.cross_entropy(logits(rows), problem.labels[rows], weights, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item() * len(rows))
        train_losses.append(sum(losses) / N_TRAIN)
        net.eval()
        with torch.no_grad():
            val_logits.append(logits(problem.val))
        val_losses.append(F.cross_entropy(val_logits[-1], problem.labels[problem.val]).item())
    return train_losses, val_losses, [x.numpy() for x in val_logits]


@pytest.mark.parametrize(
    "own, bias",
    [
        # With a bias before BatchNorm, as study D has it: in double precision it stays where it is, at 0.
        ({"optimizer": "adam", "bs": 64}, True),
        ({"optimizer": "adam", "bs": 16, "schedule": "cosine", "weight_decay": 0.05}, False),
        ({"optimizer": "adamw", "bs": 16, "schedule": "onecycle", "weight_decay": 0.1, "label_smoothing": 0.1}, False),
        ({"optimizer": "adamw", "bs": 7, "class_weights": "balanced", "balanced_sampler": True}, False),
    ],
    ids=["adam", "adam-cosine", "adamw-onecycle", "adamw-balanced"],
)
def test_a_whole_training_of_fusion_is_torch_s(own: dict, bias: bool):
    problem = make_problem(image_views=None)
    config = TrainConfig(HeadConfig("fusion", D=6, dropout=0.0), lr=1e-2, ep=6, monitor="loss", seed=3, **own)
    (found,) = fit([config], problem)
    train_losses, val_losses, val_logits = plain_fusion(config, problem, bias)
    assert [row["train_loss"] for row in found.history] == pytest.approx(train_losses, rel=1e-4)
    assert [row["val_loss"] for row in found.history] == pytest.approx(val_losses, rel=1e-4)
    assert found.best_epoch == 1 + int(np.argmin(val_losses))
    np.testing.assert_allclose(found.val_logits, val_logits[found.best_epoch - 1], rtol=1e-3, atol=1e-4)
    assert train_losses[-1] < train_losses[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 37, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torch_s(name: str, steps: int):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = {
        "constant": lambda: None,
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps, pct_start=0.3),
    }[name]()
    for step in range(steps):
        (group,) = optimizer.param_groups
        assert 0.5 * lr_factor(name, step, steps) == pytest.approx(group["lr"], rel=1e-6, abs=1e-9), step
        assert beta1(name, step, steps) == pytest.approx(group["betas"][0], rel=1e-6), step
        optimizer.step()
        if schedule and step < steps - 1:
            schedule.step()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_steps_of_onecycle_are_those_of_torch_s_with_its_momentum(optimizer: str):
    """Rate and beta1 of every step, and the weights they lead to, of groups that differ in all that groups may."""
    own = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.03}, {"lr": 0.02, "schedule": "constant"}]
    configs = [
        TrainConfig(HeadConfig(), optimizer=optimizer, **{"schedule": "onecycle", **settings}) for settings in own
    ]
    steps, start = 40, normal(3, 4, 5)
    stack = nn.ParameterList([nn.Parameter(start.clone())])
    ours, found = StackedAdam(stack, configs, steps), []
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    weights = [nn.Parameter(x.clone()) for x in start]
    theirs = [kind([x], lr=c.lr, weight_decay=c.weight_decay) for x, c in zip(weights, configs, strict=True)]
    cycles = [
        torch.optim.lr_scheduler.OneCycleLR(of_model, config.lr, total_steps=steps)
        for of_model, config in zip(theirs[:2], configs, strict=False)
    ]
    for step in range(steps):
        stack[0].grad = normal(3, 4, 5, seed=step + 1)
        for m, x in enumerate(weights):
            x.grad = stack[0].grad[m].clone()
        ours.begin_step()
        ours.apply()
        found.append(beta1("onecycle", step, steps))
        for m, of_model in enumerate(theirs):
            (group,) = of_model.param_groups
            assert ours.last_lr(m) == pytest.approx(group["lr"], rel=1e-6)
            assert group["betas"][0] == pytest.approx(found[-1] if m < 2 else 0.9)
            of_model.step()
        if step < steps - 1:
            for cycle in cycles:
                cycle.step()
        torch.testing.assert_close(stack[0].detach(), torch.stack([x.detach() for x in weights]), rtol=1e-5, atol=1e-6)
    assert [found[0], min(found), found[-1]] == pytest.approx([0.95, 0.85, 0.95])


def test_cross_entropy_is_torch_s():
    weights = torch.tensor([[1.0, 1, 1, 1], [0.5, 3, 1, 2], [1, 1, 9, 1], [2, 0.1, 1, 1]])
    smoothing, logits = torch.tensor([0.0, 0.1, 0.0, 0.9]), (3 * normal(4, 12, 4)).requires_grad_()
    labels = torch.randint(4, (4, 12), generator=torch.Generator().manual_seed(0))
    found = cross_entropy(logits, labels, weights, smoothing)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    for m in range(4):
        own = logits.detach()[m].requires_grad_()
        expected = F.cross_entropy(own, labels[m], weights[m], label_smoothing=smoothing[m].item())
        expected.backward()
        torch.testing.assert_close(found[m], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[m], own.grad, rtol=1e-4, atol=1e-6)


# -- class weights and the sampler ------------------------------------------------------------------------------


def test_class_weights():
    problem = make_problem()
    labels = problem.labels[problem.train].numpy()
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert len(set(balanced)) == 3
    for spec, expected in {
        "none": [1, 1, 1],
        "balanced": balanced,
        "sqrt": np.sqrt(balanced),
        (("b", 2.5),): [1, 2.5, 1],
        (("c", 3), ("a", 0.5)): [0.5, 1, 3],
    }.items():
        assert class_weights(spec, problem).tolist() == pytest.approx(list(expected), rel=1e-6)


@pytest.mark.parametrize(
    "chosen, match",
    [
        ({"neutral": 2}, "class weight of 'neutral': no such class; there are a, b, c"),
        ("balance", "class weights 'balance': expected none, balanced, sqrt, or a weight for each"),
        *(({"a": 1, "b": value}, "every weight must be a finite number above 0") for value in (0, -1, np.nan, np.inf)),
    ],
)
def test_class_weights_that_make_no_sense(chosen: str | dict[str, float], match: str):
    with pytest.raises(UsageError, match=match):
        fit([TrainConfig(HeadConfig("early", D=4), class_weights=chosen, ep=1)], make_problem())


def test_class_weights_of_a_class_with_one_row():
    problem = make_problem()
    rare = problem.labels[problem.train] == 2
    problem = replace(problem, train=torch.cat([problem.train[~rare], problem.train[rare][:1]]))
    labels = problem.labels[problem.train].numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights("balanced", problem).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("spec", ["balanced", "sqrt"])
def test_class_weights_where_a_class_has_no_training_row(spec: str):
    problem = replace(make_problem(), classes=[*CLASSES, "d"])
    assert class_weights(spec, problem).isfinite().all()
    (found,) = fit([TrainConfig(HeadConfig("early", D=4), class_weights=spec, label_smoothing=0.1, ep=1)], problem)
    assert found.val_logits.shape == (N - N_TRAIN, 4)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, [0.6, 0.3, 0.1]),
        ({"balanced_sampler": True}, [1 / 3] * 3),
        ({"class_weights": "balanced"}, [1 / 3] * 3),
        ({"class_weights": {"c": 6}}, [0.4, 0.2, 0.4]),
    ],
    ids=["none", "sampler", "weights", "by name"],
)
def test_what_evens_out_classes(own: dict, expected: list[float]):
    """Without any information, a head learns how often it sees each class."""
    labels = torch.tensor([0] * 120 + [1] * 60 + [2] * 20)
    problem = Problem(Inputs(image=torch.zeros(200, 2)), labels, torch.arange(200), torch.arange(3), CLASSES)
    config = TrainConfig(
        HeadConfig("early", D=2, dropout=0.0, sides=("image",)), lr=3e-2, ep=60, bs=100, schedule="cosine"
    )
    # The last epoch is the one to look at: patience and the best epoch play no part.
    (found,) = fit([replace(config, **own, monitor="accuracy")], problem)
    train_loss = found.history[-1]["train_loss"]
    entropy = -sum(p * math.log(p) for p in expected)
    assert train_loss == pytest.approx(entropy, abs=0.02)


def test_the_balanced_sampler_draws_classes_alike():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    problem = Problem(Inputs(image=torch.zeros(1000, 1)), labels, torch.arange(1000), torch.arange(3), CLASSES)
    config = TrainConfig(HeadConfig("early", sides=("image",)), balanced_sampler=True)
    draws = Draws([config, replace(config, seed=1)], problem, problem.inputs)
    for rows in draws.epoch()[0]:
        counts = torch.bincount(labels[rows], minlength=3)
        assert counts.sum() == 1000 and (counts - 1000 / 3).abs().max() < 75  # five standard deviations
    plain = Draws([replace(config, balanced_sampler=False)], problem, problem.inputs)
    orders = [plain.epoch()[0][0] for _ in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(1000)) for order in orders)
    assert not torch.equal(*orders)


# -- views ------------------------------------------------------------------------------------------------------


def test_training_draws_views_and_validation_sees_the_picture(monkeypatch: pytest.MonkeyPatch):
    rows = torch.arange(N, dtype=torch.float32)
    views = rows[:, None, None] + torch.tensor([0.25, 0.5])[None, :, None]
    problem = make_problem(image=rows[:, None], text=rows[:, None], image_views=views)
    seen: dict[bool, list] = {True: [], False: []}

    def spy(self: Inputs, rows: Tensor, chosen: Tensor | None = None):
        batch = original(self, rows, chosen)
        assert torch.equal(batch.image.floor(), batch.text)  # a view of the same row
        seen[torch.is_grad_enabled()].append(batch.image.squeeze(-1))
        return batch

    original = Inputs.batch
    monkeypatch.setattr(Inputs, "batch", spy)
    config = TrainConfig(HeadConfig("early", D=4), lr=1e-6, ep=30, bs=16)
    fit([config, replace(config, seed=1)], problem)
    for x in seen[False]:
        assert torch.equal(x, x.floor())
    trained = torch.cat(seen[True], 1).view(2, 30, N_TRAIN)
    for one in trained:
        values, counts = (one % 1).unique(return_counts=True)
        assert values.tolist() == [0, 0.25, 0.5]
        assert (counts / one.numel() - 1 / 3).abs().max() < 0.06
        epochs = one.sort(1).values  # the same rows in each, through other views
        assert torch.equal(epochs.floor(), problem.train.float().sort().values.expand(30, -1))
        assert (epochs % 1).std(0).min() > 0
    assert not torch.equal(trained[0].sort(1).values, trained[1].sort(1).values)


def test_evaluation_in_steps_is_evaluation_at_once(monkeypatch: pytest.MonkeyPatch):
    problem = make_problem()
    head = build_head(HeadConfig("coattention", D=8), problem.inputs.widths, 3, seeds=[1, 2])
    at_once = predict_stack(head, problem.inputs)
    sizes: list[int] = []
    monkeypatch.setattr("modeling.training.problem.EVAL_BYTES", problem.inputs.n_bytes // 3)
    original = Inputs.batch
    monkeypatch.setattr(Inputs, "batch", lambda self, rows: sizes.append(rows.shape[1]) or original(self, rows))
    torch.testing.assert_close(predict_stack(head, problem.inputs), at_once)
    assert sum(sizes) == N and max(sizes) == N // 6  # a third of the bytes, two models


# -- the best epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3, None])
@pytest.mark.parametrize("monitor", MONITORS)
def test_the_best_epoch_is_kept_and_patience_ends_the_rest(monitor: str, patience: int | None):
    problem = make_problem()
    config = TrainConfig(HeadConfig("fusion", D=16), lr=3e-2, ep=30, bs=16, monitor=monitor, patience=patience, seed=3)
    patient = replace(config, patience=None, seed=4)  # another model, that keeps the stack running
    found = fit([config, patient], problem)[0]
    history = found.history
    told: list[int] = []
    fit([config], problem, told.append)
    assert sum(told) == 30 and len(told) <= len(history) + 1  # what needn't be trained is reported at once
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    figures = [-row["val_loss"] if monitor == "loss" else row[monitor] for row in history]
    assert found.best_epoch == 1 + int(np.argmax(figures))  # the first of equals
    assert len(history) == (30 if patience is None else found.best_epoch + patience)
    assert found.best_epoch < len(history) < 30 or patience is None
    (recomputed,) = predict_stack(found.head, problem.inputs.for_head(config.head), problem.val)
    np.testing.assert_allclose(found.val_logits, recomputed.numpy(), atol=1e-5)
    # Training that ends at the best epoch ends with these weights.
    if patience is not None:
        (shorter,) = fit([replace(config, ep=found.best_epoch, patience=None)], problem)
        np.testing.assert_allclose(found.val_logits, shorter.val_logits, atol=1e-5)
    labels, best = problem.labels[problem.val].numpy(), history[found.best_epoch - 1]
    predictions = found.val_logits.argmax(1)
    assert best["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert best["macro_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
    assert best["weighted_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="weighted"))
    loss = F.cross_entropy(torch.tensor(found.val_logits), torch.tensor(labels)).item()
    assert best["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert all(math.isfinite(value) for row in history for value in row.values())


@pytest.mark.parametrize(("monitor", "gain"), [("loss", 0.03), ("accuracy", 0.06)])  # of 21 rows: one more is 0.048
def test_a_gain_below_the_least_one_is_none(monitor: str, gain: float):
    problem = make_problem()
    config = TrainConfig(HeadConfig("fusion", D=16), lr=3e-3, ep=30, bs=16, monitor=monitor, patience=4, seed=1)
    demanding = replace(config, min_gain=gain)
    plain, found = fit([config, demanding], problem)
    figures = [-row["val_loss"] if monitor == "loss" else row[monitor] for row in found.history]
    best = 0
    for k, figure in enumerate(figures):
        best = k if figure > figures[best] + gain else best
    assert found.best_epoch == best + 1 and len(found.history) == min(30, best + 5)
    assert figures[best] < max(figures), "an epoch that betters by less must be among them"
    assert plain.best_epoch != found.best_epoch


@pytest.mark.parametrize(
    "more", [{}, {"balanced_sampler": True}, {"label_smoothing": 0.2, "precision": "bf16"}], ids=str
)
def test_history_tells_what_was_predicted(more: dict, monkeypatch: pytest.MonkeyPatch):
    """Of the training rows, by the logits that the losses were of; of the validation rows, class by class."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = gradient.cross_entropy

    def spy(logits: Tensor, labels: Tensor, *others: Any) -> Tensor:
        seen.append((logits.detach().float().argmax(-1).numpy(), labels.numpy()))
        return original(logits, labels, *others)

    monkeypatch.setattr(gradient, "cross_entropy", spy)
    config = TrainConfig(HeadConfig("fusion", D=4), lr=1e-2, ep=3, bs=16, **more)
    problem = make_problem()
    for m, found in enumerate(fit([config, replace(config, seed=5)], problem)):
        for epoch, row in enumerate(found.history):
            batches = seen[4 * epoch : 4 * epoch + 4]
            predicted, truth = (np.concatenate([batch[k][m] for batch in batches]) for k in (0, 1))
            assert len(truth) == N_TRAIN
            assert row["train_accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
            for average in ("weighted", "macro"):
                f1 = reference.f1_score(truth, predicted, labels=range(3), average=average, zero_division=0)
                assert row[f"train_{average}_f1"] == pytest.approx(f1)
        counts = np.bincount(found.val_logits.argmax(1), minlength=3).tolist()
        assert [found.history[found.best_epoch - 1][f"predicted_{name}"] for name in CLASSES] == counts
    assert len(seen) == 12


def test_every_epoch_is_told_as_it_ends():
    problem = replace(make_problem(), folds=torch.arange(N_TRAIN) % 3)
    config = TrainConfig(HeadConfig("fusion", D=16), lr=3e-2, ep=12, bs=16, patience=2, seed=3)
    told: list[Epoch] = []
    configs = [config, replace(config, seed=4), TrainConfig(HeadConfig("linear"), C=1.0)]
    found = fit(configs, problem, told=told.append)
    for trained in found[:2]:
        own = [epoch for epoch in told if epoch.config == trained.config]
        assert [epoch.row for epoch in own] == trained.history and len(own) < 12
        assert [epoch.row["epoch"] for epoch in own if epoch.best][-1] == trained.best_epoch
        for epoch in own:
            losses = np.average(epoch.batch_losses, weights=[16, 16, 16, 1])
            assert epoch.row["train_loss"] == pytest.approx(losses, rel=1e-5)
    assert {epoch.config for epoch in told} == set(configs[:2])  # a closed form has no epochs


def test_history_tells_the_learning_rate_and_the_weights_of_the_sides():
    config = TrainConfig(HeadConfig("weighted_sum", D=8), lr=1e-2, ep=5, bs=16, schedule="onecycle")
    (found,) = fit([config], make_problem())
    lrs = [row["lr"] for row in found.history]
    assert lrs == pytest.approx([1e-2 * lr_factor("onecycle", 4 * epoch - 1, 20) for epoch in range(1, 6)])
    shares = [(row["weight_image"], row["weight_text"]) for row in found.history]
    assert all(sum(share) == pytest.approx(1) for share in shares) and len(set(shares)) == 5
    final = found.head.scalars()["weight_image"].item()
    assert found.history[found.best_epoch - 1]["weight_image"] == pytest.approx(final)


def test_a_trained_head_stands_alone():
    problem = make_problem()
    (found,) = fit([TrainConfig(HeadConfig("fusion", D=8), lr=1e-2, ep=2, bs=16)], problem)
    assert not found.head.training and found.head.n_models == 1
    other = build_head(found.config.head, found.widths, 3)
    other.load_state_dict(copy.deepcopy(found.head.state_dict()))
    assert np.array_equal(predict_stack(other, problem.inputs, problem.val)[0].numpy(), found.val_logits)


# -- heads in closed form ---------------------------------------------------------------------------------------


def closed_form_problem() -> tuple[Problem, np.ndarray, np.ndarray, np.ndarray]:
    """A problem with inner folds, and its joined rows, labels and folds of training as arrays."""
    problem = make_problem(image_views=None, image_tokens=None, text_tokens=None)
    problem = replace(problem, folds=torch.arange(N_TRAIN) * 3 % 4)
    x = torch.cat([problem.inputs.image, problem.inputs.text], 1).double().numpy()
    return problem, x, problem.labels.numpy(), problem.folds.numpy()


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("given", [None, 0.05])
def test_a_linear_head_is_scikit_learn_s_and_its_penalty_held_out(given: float | None, class_weights: str):
    problem, x, labels, folds = closed_form_problem()
    train, val = problem.train.numpy(), problem.val.numpy()
    config = TrainConfig(HeadConfig("linear"), C=given, class_weights=class_weights)
    told: list[int] = []
    (found,) = fit([config], problem, told.append)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=labels[train])[labels[train]]
    weights = np.ones(N_TRAIN) if class_weights == "none" else weights

    def fitted(C: float, rows: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=C, tol=1e-8, max_iter=10_000)
        return model.fit(x[train[rows]], labels[train[rows]], sample_weight=weights[rows])

    losses = {}
    for C in LINEAR_CS if given is None else (given,):
        held_out = np.empty((N_TRAIN, 3))
        for fold in range(4):
            held_out[folds == fold] = fitted(C, np.flatnonzero(folds != fold)).predict_proba(x[train[folds == fold]])
        losses[C] = held_out, reference.log_loss(labels[train], held_out, sample_weight=weights)
    best = min(losses, key=lambda C: losses[C][1])
    assert (
        found.facts["C"] == best
        and [row["C"] for row in found.facts["search"]] == list(losses)[: len(found.facts["search"])]
    )
    for row in found.facts["search"]:
        assert row["loss"] == pytest.approx(losses[row["C"]][1], rel=1e-3)
    assert given is not None or 2 < len(found.facts["search"]) < len(losses)  # stopped where it got worse
    np.testing.assert_allclose(torch.tensor(found.held_out).softmax(1), losses[best][0], atol=2e-3)
    expected = fitted(best, np.arange(N_TRAIN)).predict_proba(x[val])
    np.testing.assert_allclose(torch.tensor(found.val_logits).softmax(1), expected, atol=1e-4)
    finished(found, config, problem, told)


def finished(found: Trained, config: TrainConfig, problem: Problem, told: list[int]) -> None:
    """What every closed-form head leaves: no epoch, its figures, and a head that gives the logits again."""
    assert found.config == config and found.failure is None and told == [1] and n_epochs([config]) == 1
    assert found.best_epoch is None and [row["epoch"] for row in found.history] == [None]
    labels = problem.labels[problem.val]
    assert found.history[0]["val_loss"] == pytest.approx(F.cross_entropy(torch.tensor(found.val_logits), labels).item())
    assert found.history[0]["accuracy"] == np.mean(found.val_logits.argmax(1) == labels.numpy())
    other = build_head(config.head, found.widths, 3)
    other.load_state_dict(found.head.state_dict())
    assert not found.head.training
    np.testing.assert_allclose(predict_stack(other, problem.inputs, problem.val)[0], found.val_logits, atol=1e-6)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("given", [{}, {"gamma": 0.7}, {"ridge": 0.2}], ids=str)
def test_a_kernel_head_is_the_kernel_s_fit(given: dict[str, float], class_weights: str):
    """... on the joined rows (tested in test_closed_form.py), with what is given in place of its search."""
    problem, x, labels, folds = closed_form_problem()
    config = TrainConfig(HeadConfig("kernel"), class_weights=class_weights, **given)
    told: list[int] = []
    (found,) = fit([config], problem, told.append)
    train = problem.train.numpy()
    weights = compute_class_weight("balanced", classes=np.arange(3), y=labels[train])[labels[train]]
    grids = {"gamma": "gammas", "ridge": "ridges"}
    expected = fit_kernel(
        *map(torch.tensor, (x[train], labels[train])),
        3,
        torch.tensor(folds),
        row_weights=None if class_weights == "none" else torch.tensor(weights),
        **{grids[name]: [value] for name, value in given.items()},
    )
    assert found.facts["ridge"] == expected.ridge and found.facts["gamma"] == pytest.approx(expected.gamma)
    tried = [(row["gamma"], row["ridge"], row["loss"]) for row in expected.search]
    np.testing.assert_allclose([list(row.values()) for row in found.facts["search"]], tried, rtol=1e-4)
    np.testing.assert_allclose(found.held_out, expected.held_out, atol=1e-4)
    logits = kernel_logits(torch.tensor(x)[problem.val], expected.support, expected.dual, expected.bias, expected.gamma)
    np.testing.assert_allclose(found.val_logits, logits, atol=1e-4)
    finished(found, config, problem, told)


@pytest.mark.parametrize("name", ["linear", "kernel"])
def test_a_head_in_closed_form_without_a_side(name: str):
    problem = closed_form_problem()[0]
    config = TrainConfig(HeadConfig(name, sides=("text",)), C=1.0, ridge=1.0, gamma=1.0)
    (found,) = fit([config], problem)
    (other,) = fit([config], replace(problem, inputs=Inputs(text=problem.inputs.text)))
    assert np.array_equal(found.val_logits, other.val_logits) and found.widths["text"] == 13


def test_the_work_of_a_training():
    """Six operations for each parameter of a head, row and epoch; what is solved in closed form counts as none."""
    problem, head = make_problem(), HeadConfig("early", D=8)
    parameters = sum(p.numel() for p in build_head(head, problem.inputs.widths, 3).parameters())
    config = TrainConfig(head, ep=7)
    assert work([config], problem) == 6 * parameters * N_TRAIN * 7
    assert (
        work([config, replace(config, ep=3), TrainConfig(HeadConfig("linear"))], problem)
        == 6 * parameters * N_TRAIN * 10
    )


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; there are adam, adamw"),
        ({"schedule": "step"}, "unknown schedule 'step'; there are constant, cosine, onecycle"),
        ({"monitor": "f1"}, "unknown monitor 'f1'; there are accuracy, weighted_f1, macro_f1, loss"),
        ({"ep": 0}, "`ep` 0: expected 1 or more"),
        ({"bs": -1}, "`bs` -1: expected 1 or more"),
        ({"lr": 0.0}, "lr 0, weight decay 0: expected lr > 0"),
        ({"lr": math.nan}, "lr nan"),
        ({"weight_decay": -1.0}, "weight decay -1"),
        ({"label_smoothing": 1.0}, "label smoothing 1: expected 0 <= smoothing < 1"),
        ({"patience": 0}, "`patience` 0: expected 1 or more epochs"),
        ({"lr": math.inf}, "lr inf"),
        ({"weight_decay": math.inf}, "weight decay inf"),
        ({"C": 0.0}, "`C` 0: expected a number above 0"),
        ({"ridge": 0.0}, "`ridge` 0: expected a number above 0"),
        ({"gamma": math.inf}, "`gamma` inf: expected a number above 0"),
        ({"gamma": math.nan}, "`gamma` nan"),
        ({"seed": -1}, "`seed` -1: expected 0 to"),
        ({"seed": 2**63}, "`seed` 9223372036854775808: expected 0 to"),
    ],
)
def test_configurations_that_can_not_train(wrong: dict, match: str):
    with pytest.raises(UsageError, match=match):
        TrainConfig(**wrong)


def test_configurations_at_the_edge():
    TrainConfig(ep=1, bs=1, patience=1, seed=0, weight_decay=0.0, label_smoothing=0.0, C=1e-9, ridge=1e-9, gamma=1e9)
    TrainConfig(seed=2**63 - 1)


@pytest.mark.parametrize("name, lacks", [("coattention", "image tokens"), ("fusion", "image"), ("linear", "image")])
def test_features_that_lack_what_a_head_needs(name: str, lacks: str):
    problem = make_problem(image_tokens=None, image_views=None)
    if lacks == "image":
        problem = replace(problem, inputs=replace(problem.inputs, image=None))
    with pytest.raises(UsageError, match=f"head {name} needs {lacks} features, and there are "):
        fit([TrainConfig(HeadConfig(name))], problem)


@pytest.mark.parametrize("ep", [1, 5])
@pytest.mark.parametrize("lr", [1e30, 3e38])
def test_a_loss_that_is_not_finite(lr: float, ep: int):
    wild = TrainConfig(HeadConfig("early", D=8), lr=lr, ep=ep, bs=64)
    tame = replace(wild, lr=0.01)
    problem = make_problem()
    told: list[int] = []
    lost, kept = fit([wild, tame], problem, told.append)
    assert re.match(r"the loss of early became (nan|inf) in epoch \d .lr .*; use a smaller `lr`", lost.failure)
    assert kept.failure is None and len(kept.history) == ep and sum(told) == 2 * ep
    np.testing.assert_allclose(kept.val_logits, fit([tame], problem)[0].val_logits, atol=1e-5)


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("name", ["fusion", "concat", "cross_attention"])
def test_low_precision_trains_what_fp32_does_up_to_rounding(name: str, precision: str, share: float):
    problem, config = make_problem(), TrainConfig(HeadConfig(name, D=32), lr=3e-3, ep=8, bs=32)
    exact, low = fit([config, replace(config, precision=precision)], problem)
    assert 0 < np.abs(exact.val_logits - low.val_logits).max() < share * np.abs(exact.val_logits).max()
    same(low, fit([low.config], problem)[0])
    # What is validated is what the saved weights give, in fp32.
    logits = predict_stack(low.head, problem.inputs, problem.val)[0]
    np.testing.assert_allclose(logits, low.val_logits, atol=1e-5)


@pytest.mark.parametrize("name", ["fusion", "concat", "cross_attention"])
def test_fp16_in_a_stack_is_fp16_alone(name: str):
    """Up to its rounding, whatever the others' gradients are."""
    problem, config = make_problem(), TrainConfig(HeadConfig(name, D=32), lr=3e-3, ep=4, bs=32, precision="fp16")
    stack = [config, replace(config, class_weights={"a": 50.0}, seed=1)]
    for found in fit(stack, problem):
        np.testing.assert_allclose(found.val_logits, fit([found.config], problem)[0].val_logits, atol=5e-3)


def test_what_becomes_of_a_model_after_it_stopped_hurts_nobody():
    """Weights that decay by a factor of -1000 a step overflow, but after patience has ended."""
    problem = make_problem()
    config = TrainConfig(HeadConfig("early", D=8), "adamw", 1e-2, ep=40, bs=64)
    wild = replace(config, lr=1.0, weight_decay=1001.0, patience=1, monitor="loss")
    alone = fit([wild], problem)[0]
    assert len(alone.history) < 5
    found = fit([config, wild], problem)
    assert found[1].best_epoch == alone.best_epoch and len(found[1].history) == len(alone.history)
    np.testing.assert_allclose(found[1].val_logits, alone.val_logits, rtol=1e-4)
    np.testing.assert_allclose(found[0].val_logits, fit([config], problem)[0].val_logits, atol=1e-5)
    assert "the loss of early became" in fit([replace(wild, patience=None)], problem)[0].failure
