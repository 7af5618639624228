"""Training from caches that are read block by block: same rows, same results, nothing left open."""

import csv
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from caches import make_cache
from problems import SGD
from sklearn.linear_model import LogisticRegression

from feats.errors import UsageError
from feats.memory import available_bytes
from modeling import inference_head, sweep_heads, train_head
from modeling.choices import SplitSettings
from modeling.experiments.experiment import Experiment, ExperimentSettings, load_experiment
from modeling.experiments.fitting import train_run
from modeling.features import stream as streaming
from modeling.features.inputs import Inputs, Preprocessing
from modeling.features.joined import FeatureSource
from modeling.features.loading import load_features
from modeling.features.normalizer import Moments
from modeling.features.stream import Stream, ahead, streams
from modeling.heads.config import HeadConfig
from modeling.heads.registry import build_head
from modeling.training import batches, exact
from modeling.training.batches import Streamed
from modeling.training.closed_form import fit_logistic
from modeling.training.config import TrainConfig
from modeling.training.fit import fit
from modeling.training.logistic import Fit, RowData, fit_together, logits_left_out

ROWS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches with tokens and quarantined rows, clip's with views, too; and a test split."""
    path = tmp_path_factory.mktemp("feats")
    make_cache(path, "clip", ROWS, tokens=True, views=2, quarantined=(3, 40))
    make_cache(path, "vader", ROWS)
    make_cache(path, "resnet", ROWS)
    for name in ("clip", "vader"):
        make_cache(path, name, 30, split="test", first_id=500, tokens=name == "clip", seed=1)
    return path


def experiments(folder: Path, heads: list[str], image: str = "clip", **settings: Any) -> tuple[Experiment, Experiment]:
    """In memory and streamed: blocks of 16 rows, two of which are mixed."""
    source = FeatureSource(folder, (image,), ("clip", "vader"))
    norms = {"clip": "standard", "vader": "l2", "resnet": "standard"}
    asked = ExperimentSettings(source, SplitSettings(val_ratio=0.3), {n: norms[n] for n in source.names}, device="cpu")
    both = [
        load_experiment(replace(asked, stream=c, **settings), [HeadConfig(h) for h in heads])
        for c in ("never", "always")
    ]
    assert both[1].stream is not None
    both[1].stream.block_rows, both[1].stream.window = 16, 2
    return both[0], both[1]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


# -- the order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_row_comes_once_in_an_order_of_seed_and_epoch(folder: Path, window: int):
    rows = np.flatnonzero(np.arange(85) % 7)
    with Stream(FeatureSource(folder, ("clip",)), "train", block_rows=10, window=window) as stream:
        first = stream.order(rows, 1)
        assert np.array_equal(np.sort(first), rows) and not np.array_equal(first, rows)
        assert np.array_equal(stream.order(rows, 1), first)
        assert not np.array_equal(stream.order(rows, 2), first)
        # A window is made of whole blocks: within as many rows as it holds, no others come.
        (chosen, _), *_ = stream.windows(rows, 1)
        assert set(first[: sum(map(len, chosen))]) == set(np.concatenate(chosen))
        assert len(chosen) == min(window, 9)
    with Stream(FeatureSource(folder, ("clip",)), "train", block_rows=10, window=window, seed=1) as other:
        assert not np.array_equal(other.order(rows, 1), first)


def test_batches_give_the_rows_of_the_order_with_their_labels_and_one_of_their_views(folder: Path):
    plain, streamed = experiments(folder, ["fusion"])
    config = TrainConfig(HeadConfig("fusion", D=4), bs=16)
    memory, _ = plain.problem(plain.splits[0], ["fusion"])
    with streamed:
        problem, _ = streamed.problem(streamed.splits[0], ["fusion"])
        own = Streamed(
            [config, replace(config, seed=7)], problem, problem.streamed, problem.inputs.for_head(config.head)
        )
        order = streamed.stream.order(np.sort(problem.train.numpy()), 1)
        found = [*own.epoch()]
    assert [labels.shape[1] for _, labels in found] == [16] * (len(order) // 16) + [len(order) % 16]
    assert np.array_equal(torch.cat([labels for _, labels in found], 1)[1].numpy(), memory.labels[order].numpy())
    image, text = (torch.cat([getattr(batch, side) for batch, _ in found], 1) for side in ("image", "text"))
    torch.testing.assert_close(text[0], memory.inputs.text[order])
    choices = torch.cat([memory.inputs.image[order][:, None], memory.inputs.image_views[order]], 1)
    same = (image[0][:, None] - choices).abs().amax(2) < 1e-5
    assert same.any(1).all() and same.any(0).all()  # each is one of its own, and all kinds are drawn
    assert torch.equal(image[0], image[1])


def test_balanced_classes_are_drawn_equally_often(folder: Path):
    _, streamed = experiments(folder, ["fusion"])
    config = TrainConfig(HeadConfig("fusion", D=4), bs=16, balanced_sampler=True)
    with streamed:
        problem, _ = streamed.problem(streamed.splits[0], ["fusion"])
        own = Streamed([config], problem, problem.streamed, problem.inputs.for_head(config.head))
        drawn = torch.cat([labels[0] for _ in range(20) for _, labels in own.epoch()])
    assert len(drawn) == 20 * len(problem.train)
    shares = torch.bincount(drawn) / len(drawn)
    assert (shares - 1 / 3).abs().max() < 0.05


# -- same results -----------------------------------------------------------------------------------------------


def test_moments_of_blocks_are_those_of_all_rows():
    x = (1000 + np.random.default_rng(0).normal(size=(500, 3)) * [1, 0, 1e-2]).astype(np.float32)
    moments = Moments()
    for block in np.split(x, [1, 1, 130, 400]):
        moments.add(torch.from_numpy(block))
    exact_x = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact_x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.squares / moments.count, exact_x.var(0), rtol=1e-10)
    assert moments.squares[1] == 0


@pytest.mark.parametrize("norm", ["none", "l2", "standard"])
def test_preprocessing_is_that_of_rows_in_memory(folder: Path, norm: str):
    source = FeatureSource(folder, ("clip",), ("clip", "vader"), tokens=True)
    rows = np.flatnonzero(np.arange(88) % 5)
    data = load_features(folder, "train", source.image, source.text, tokens=True)
    wanted = Preprocessing.fit(data, torch.from_numpy(rows), norm, {"vader": 0.5})
    with Stream(source, "train", block_rows=16) as stream:
        assert stream.shell.ids == data.ids and stream.shell.left_out == data.left_out
        found = stream.preprocessing(rows, norm, {"vader": 0.5})
        assert (stream.tally.read_rows > 0) == (norm == "standard")
    assert (found.kinds, found.caches, found.scales) == (wanted.kinds, wanted.caches, wanted.scales)
    assert found.state().keys() == wanted.state().keys()
    for name, tensor in found.state().items():
        torch.testing.assert_close(tensor, wanted.state()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head", SGD)
def test_training_is_a_plain_loop_over_the_stream_s_order(folder: Path, head: str):
    """Every head, its tokens included, against torch's own optimiser and loss on features in memory."""
    plain, streamed = experiments(folder, [head], image="resnet" if head == "fusion" else "clip")
    plain = replace(plain, features=plain.features.only({"views": ()}))
    config = TrainConfig(HeadConfig(head, D=4, dropout=0.0), ep=2, bs=16, lr=1e-2, monitor="loss", patience=9)
    with streamed:
        streamed = replace(streamed, features=streamed.features.only({"views": ()}))
        streamed.stream.caches.shell = streamed.features
        problem, _ = streamed.problem(streamed.splits[0], [head])
        trained = fit([replace(config, seed=9), config], problem)[1]
        orders = [streamed.stream.order(np.sort(problem.train.numpy()), epoch) for epoch in (1, 2)]
    memory, _ = plain.problem(plain.splits[0], [head])
    inputs = memory.inputs.for_head(config.head)
    model = build_head(config.head, inputs.widths, 3, [config.seed])
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr)
    losses = []
    for order in orders:
        model.train()
        for rows in torch.from_numpy(order).split(16):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs.batch(rows[None]))[0], memory.labels[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            logits = model.eval()(inputs.batch(memory.val[None]))[0]
        losses.append(F.cross_entropy(logits, memory.labels[memory.val]).item())
    np.testing.assert_allclose([row["val_loss"] for row in trained.history], losses, rtol=2e-4)


def test_validation_rows_held_or_read_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for limit in (batches.HELD_BYTES, 0):
        monkeypatch.setattr(batches, "HELD_BYTES", limit)
        _, streamed = experiments(folder, [SGD[0]])
        with streamed:
            problem, _ = streamed.problem(streamed.splits[0], [SGD[0]])
            found.append(fit([TrainConfig(HeadConfig(SGD[0], D=4), ep=2, bs=16)], problem)[0].val_logits)
            reads = streamed.stream.tally.read_rows
        found.append(reads)
    assert np.array_equal(found[0], found[2])
    assert found[3] == found[1] + len(problem.val)  # twice in place of once


# -- logistic regression ----------------------------------------------------------------------------------------


def rows_of(n: int, d: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of unequal scale off the origin, targets, weights, folds."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g)
    targets = (z @ torch.randn(d, k, generator=g) / d**0.5 + torch.randn(n, k, generator=g)).argmax(1)
    x = z * torch.logspace(-1, 0.5, d) + 2
    return x, targets, torch.rand(n, generator=g) + 0.5, torch.arange(n) % 3


def in_blocks(x: torch.Tensor, targets: torch.Tensor, k: int, weights: torch.Tensor, folds: torch.Tensor) -> RowData:
    numbers = torch.randperm(len(x), generator=torch.Generator().manual_seed(5)).split(37)
    return RowData(lambda: ((x[rows], rows) for rows in numbers), x.shape[1], k, targets, weights, folds)


@pytest.mark.parametrize(("n", "d", "k"), [(200, 7, 3), (200, 5, 2), (60, 90, 3)])
def test_minima_are_those_of_scikit_learn_and_of_one_fit_at_a_time(n: int, d: int, k: int):
    x, targets, weights, folds = rows_of(n, d, k)
    Cs = [1e-3, 0.1, 10.0]
    fits = [Fit(C, fold) for C in Cs for fold in (None, 1)]
    found = fit_together(in_blocks(x, targets, k, weights, folds), fits)
    for wanted, ours in found.items():
        kept = folds != wanted.left_out if wanted.left_out is not None else torch.ones(n, dtype=torch.bool)
        alone = fit_logistic(x[kept], targets[kept], k, [wanted.C], weights[kept])[0]
        assert ours.objective == pytest.approx(alone.objective, rel=1e-9)
        reference = LogisticRegression(C=wanted.C, tol=1e-10, max_iter=10000, solver="newton-cg" if k > 2 else "lbfgs")
        reference.fit(x[kept].double().numpy(), targets[kept].numpy(), weights[kept].double().numpy())
        probabilities = (x.double() @ ours.weight + ours.bias).softmax(1)
        np.testing.assert_allclose(probabilities, reference.predict_proba(x.double().numpy()), atol=2e-4)
        assert ours.objective <= alone.objective * (1 + 1e-9)


def test_where_lapack_finds_no_eigenvalues_the_minima_are_the_same(monkeypatch: pytest.MonkeyPatch):
    def diverging(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    x, targets, weights, folds = rows_of(60, 90, 3)
    before = fit_together(in_blocks(x, targets, 3, weights, folds), [Fit(0.1), Fit(10.0, 1)])
    monkeypatch.setattr(torch.linalg, "eigh", diverging)
    data = in_blocks(x, targets, 3, weights, folds)
    values, basis = data.spectrum
    covariance = torch.cov(x.double().T, correction=0, aweights=weights.double())
    torch.testing.assert_close(basis @ values.diag() @ basis.T, covariance)
    assert (values.diff() >= 0).all()
    for fit_, ours in fit_together(data, list(before)).items():
        assert ours.objective == pytest.approx(before[fit_].objective, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_s_fits_are_near_their_minima_where_classes_nearly_separate(seed: int):
    """Without the promise of the minimum: hundreds of passes under a weak penalty, not the forty of one round."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 40, generator=g)
    targets = (x @ torch.randn(40, 3, generator=g)).argmax(1)
    ones, folds = torch.ones(300), torch.arange(300) % 3
    fits = [Fit(C, fold) for C in (1.0, 100.0) for fold in range(3)]
    found = fit_together(in_blocks(x, targets, 3, ones, folds), fits, 1e-6, promised=False)
    for wanted, ours in found.items():
        kept = folds != wanted.left_out
        best = fit_logistic(x[kept], targets[kept], 3, [wanted.C])[0].objective
        assert ours.objective <= best * (1 + 1e-4)


def test_each_row_is_told_by_the_fit_that_left_it_out():
    x, targets, weights, folds = rows_of(100, 4, 3)
    data, Cs = in_blocks(x, targets, 3, weights, folds), [0.01, 1.0]
    found = fit_together(data, [Fit(C, k) for C in Cs for k in range(3)])
    logits = torch.zeros(2, 100, 3, dtype=torch.float64)
    for rows, of_rows in logits_left_out(data, found, Cs):
        logits[:, rows] = of_rows
    for c, C in enumerate(Cs):
        for k in range(3):
            alone = fit_logistic(x[folds != k], targets[folds != k], 3, [C], weights[folds != k])[0]
            wanted = x[folds == k].double() @ alone.weight + alone.bias
            np.testing.assert_allclose(logits[c, folds == k].softmax(1), wanted.softmax(1), atol=1e-4)


def test_what_can_t_be_fitted_is_said():
    x, targets, weights, folds = rows_of(60, 3, 3)
    data = in_blocks(x, targets, 3, weights, folds)
    with pytest.raises(UsageError, match="C -1: expected"):
        fit_together(data, [Fit(-1.0)])
    with pytest.raises(UsageError, match="rows per class"):
        fit_together(replace(data, folds=targets), [Fit(1.0, 2)])
    x[5, 1] = torch.nan
    with pytest.raises(UsageError, match="aren't finite"):
        fit_together(in_blocks(x, targets, 3, weights, folds), [Fit(1.0)])


@pytest.mark.parametrize("Cs", [[None], [0.01, 1.0]])
def test_linear_is_the_same_streamed_in_shared_passes_and_one_by_one(
    folder: Path, Cs: list[float | None], monkeypatch: pytest.MonkeyPatch
):
    plain, streamed = experiments(folder, ["linear"])
    configs = [TrainConfig(HeadConfig("linear"), C=C, class_weights="balanced") for C in Cs]
    memory, _ = plain.problem(plain.splits[0], ["linear"])
    one_by_one = fit(configs, memory)
    with streamed:
        problem, _ = streamed.problem(streamed.splits[0], ["linear"])
        found = [fit(configs, problem)]
        assert streamed.stream.tally.rows >= 5 * len(problem.train)
    monkeypatch.setattr(exact, "LARGE", 1)
    found.append(fit(configs, memory))
    for trained in found:
        for ours, wanted in zip(trained, one_by_one, strict=True):
            assert ours.facts["C"] == wanted.facts["C"]
            assert ours.facts["objective"] == pytest.approx(wanted.facts["objective"], rel=1e-6)
            assert [row["C"] for row in ours.facts["search"]] == [row["C"] for row in wanted.facts["search"]]
            losses = [[row["loss"] for row in of.facts["search"]] for of in (ours, wanted)]
            np.testing.assert_allclose(*losses, rtol=2e-2)
            np.testing.assert_allclose(ours.val_logits, wanted.val_logits, atol=1e-3)
            assert ours.held_out is not None and ours.held_out.shape == wanted.held_out.shape


# -- reading ahead ----------------------------------------------------------------------------------------------


def test_reading_ahead_keeps_order_and_bound_and_hands_errors_on():
    made: list[int] = []

    def items():
        for k in range(50):
            made.append(k)
            yield k
        raise UsageError("the disk is gone")

    reading, taken = ahead(items(), 4), []
    with pytest.raises(UsageError, match="disk is gone"):
        for item in reading:
            taken.append(item)
            assert len(made) <= len(taken) + 6
    assert taken == [*range(50)] and not readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_breaks_off_leaves_no_reader_and_no_open_cache(folder: Path, error: type[BaseException]):
    _, streamed = experiments(folder, ["fusion"])
    streamed.stream.block_rows, streamed.stream.window = 2, 1

    def stop(epoch: Any, fold: int | None) -> None:
        raise error

    config = TrainConfig(HeadConfig("fusion", D=4), ep=3, bs=4)
    with pytest.raises(error), streamed:
        train_run([config], streamed, told=stop)
    assert not readers()
    with pytest.raises((UsageError, ValueError, OSError)):
        streamed.stream.caches.read(np.arange(3))


def test_an_interrupt_in_the_midst_of_an_epoch_leaves_no_reader(folder: Path, monkeypatch: pytest.MonkeyPatch):
    _, streamed = experiments(folder, ["fusion"])
    streamed.stream.block_rows, streamed.stream.window = 2, 1
    steps: list[int] = []
    original = Inputs.batch

    def interrupted(self: Inputs, *args: Any) -> Any:
        steps.append(len(self))
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Inputs, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt), streamed:
        train_run([TrainConfig(HeadConfig("fusion", D=4), ep=3, bs=4)], streamed)
    assert len(steps) == 5 and not readers()


# -- choosing ---------------------------------------------------------------------------------------------------


def test_available_bytes_is_the_least_that_machine_and_groups_leave(tmp_path: Path):
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "10\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/a/memory.max", "5000\n")
    write("sys/fs/cgroup/a/memory.current", "3000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 7\ninactive_file 500\n")
    assert available_bytes(tmp_path) == 2500
    write("proc/self/cgroup", "7:memory:/x\n3:cpu:/x\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "900\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n")
    assert available_bytes(tmp_path) == 0
    assert available_bytes() > 0


def test_auto_streams_what_takes_more_than_half(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source, cpu = FeatureSource(folder, ("resnet",), ("vader",)), torch.device("cpu")
    size = 4 * ROWS * (12 + 4)
    for available, expected in ((2 * size - 1, True), (2 * size, False)):
        monkeypatch.setattr(streaming, "available_bytes", lambda value=available: value)
        assert streams("auto", source, "train", cpu) is expected
    with_views = 4 * ROWS * (8 + 8 + 2 * 8)
    monkeypatch.setattr(streaming, "available_bytes", lambda: 2 * with_views - 1)
    assert streams("auto", FeatureSource(folder, ("clip",), ("clip",)), "train", cpu)
    assert not streams("never", source, "train", cpu) and streams("always", source, "train", cpu)
    with pytest.raises(UsageError, match="`stream` sometimes: expected auto, always, never"):
        streams("sometimes", source, "train", cpu)


# -- as typed ---------------------------------------------------------------------------------------------------


def options(folder: Path, runs: Path, *more: str) -> list[str]:
    own = [
        "--feats",
        str(folder),
        "--runs",
        str(runs),
        "--vtype",
        "clip",
        "--ttype",
        "clip",
        "vader",
        "--device",
        "cpu",
    ]
    return [*own, "--norm", "standard", "--D", "4", "--ep", "2", "--bs", "16", "--lr", "1e-2", *more]


@pytest.mark.parametrize("head", ["fusion", "linear"])
def test_a_streamed_run_is_whole_and_predicts(folder: Path, tmp_path: Path, head: str, capsys: pytest.CaptureFixture):
    typed = options(folder, tmp_path, "--head", head, "--val-ratio", "0.2", "--test-ratio", "0.2", "--stream", "always")
    assert train_head.main(typed) == 0
    out = capsys.readouterr().out
    assert "features are read in blocks of" in out
    assert "; streamed " in out and "waiting for blocks (reading alone: " in out
    (run,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    figures = json.loads((run / "metrics.json").read_text())
    split = json.loads((run / "split.json").read_text())
    assert (figures["val"]["n"], figures["test"]["n"]) == (len(split["val"]), len(split["test"])) and split["test"]
    with (run / "predictions_val.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == split["val"]
    rates = json.loads((run / "config.json").read_text())["cost"]["streamed"]
    assert rates["rows_per_second"] > 0 and rates["reading_rows_per_second"] > 0 and 0 <= rates["waiting"] <= 1
    assert len((run / "history.csv").read_text().splitlines()) == (3 if head == "fusion" else 2)
    assert inference_head.main(["--runs", str(tmp_path), "--device", "cpu"]) == 0
    with (run / "submission_test.csv").open() as file:
        assert len([*csv.DictReader(file)]) == 30
    assert not readers()


def test_streamed_and_in_memory_linear_runs_say_the_same(folder: Path, tmp_path: Path):
    found = []
    for choice in ("never", "always"):
        typed = options(folder, tmp_path / choice, "--head", "linear", "--C", "0.1", "--folds", "2", "--stream", choice)
        assert train_head.main(typed) == 0
        (run,) = (tmp_path / choice).iterdir()
        with (run / "predictions_val.csv").open() as file:
            rows = [*csv.DictReader(file)]
        found.append([[row["id"], row["pred"]] for row in rows])
    assert found[0] == found[1] and len(found[0]) == 88


def test_a_sweep_streams(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    typed = options(
        folder, tmp_path, "--head", "fusion", "linear", "--seeds", "2", "--stream", "always", "--folds", "2"
    )
    assert sweep_heads.main([*typed, "--lr", "1e-2", "1e-3"]) == 0
    out = capsys.readouterr().out
    assert "5 trainings, 0 of them finished before" in out and "; streamed " in out
    assert sweep_heads.main([*typed, "--lr", "1e-2", "1e-3"]) == 0
    assert "5 trainings, 5 of them finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (train_head, ["--head", "kernel"], "the kernel head computes with all training rows at once and can't stream"),
        (train_head, ["--ablation-eval"], "`ablation_eval` needs all features in memory"),
        (sweep_heads, ["--auto"], "`auto` needs all features in memory"),
    ],
)
def test_what_can_t_stream_says_so(
    folder: Path, tmp_path: Path, script: Any, more: list[str], message: str, capsys: pytest.CaptureFixture
):
    typed = ["--feats", str(folder), "--runs", str(tmp_path), "--device", "cpu", "--stream", "always", *more]
    assert script.main(typed) == 2
    error = capsys.readouterr().err
    assert message.replace("`ablation_eval`", "--ablation-eval").replace("`auto`", "--auto") in error
    assert "--stream never" in error and not readers()


def test_values_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    broken = np.zeros((ROWS, 4), np.float16)
    broken[50, 2] = np.inf
    make_cache(tmp_path, "vader", ROWS, changed={"text_feats": broken})
    typed = ["--feats", str(tmp_path), "--ttype", "vader", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert train_head.main([*typed, "--head", "linear", "--stream", "always"]) == 2
    error = capsys.readouterr().err
    assert "NaN or infinite values (1 row: p50)" in error and not readers()
