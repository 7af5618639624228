"""Finetuning as a library: where it begins, what a step does, what is frozen, what is kept, and that it goes on."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line
from pairs import cache, cached_pairs, make_pairs, tiny_clip
from safetensors.torch import load_file
from sklearn import metrics

from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from modeling import HeadConfig, fit_head, load_features, make_split
from modeling.choices import SplitSettings
from modeling.finetuning.checkpoint import WorkFolder
from modeling.finetuning.choosing import Candidate, Choice
from modeling.finetuning.data import PairReader, Sample, epoch_samples
from modeling.finetuning.distributed import Team
from modeling.finetuning.model import PairBatch, PairModel
from modeling.finetuning.outcomes import what_is_tuned
from modeling.finetuning.parameters import choose_parameters, leave_out_unused, optimizer_of
from modeling.finetuning.predicting import predict
from modeling.finetuning.settings import TuneSettings, lr_factor
from modeling.finetuning.starts import Start, start_from_encoders, start_from_run
from modeling.finetuning.studies import EncoderChoice
from modeling.finetuning.trunk import data_of
from modeling.finetuning.tuning import Tuned, tune
from modeling.runs.folder import load_run
from modeling.runs.pairs import DataPlace

CPU = torch.device("cpu")
PLAIN = TuneSettings(ep=2, bs=8, lr=1e-3, head_lr=1e-2, dtype="fp32", schedule="constant", warmup=0, monitor="accuracy")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pairs, their caches by a tiny ViT and a tiny BERT, and a run of a head on these."""
    weights = cached_pairs(tmp_path)
    (tmp_path / "weights.txt").write_text("\n".join(f"{name}={path}" for name, path in weights.items()))
    save_run(tmp_path, "concat", norm="standard")
    return tmp_path


def save_run(root: Path, head: str, name: str = "run", tokens: bool = False, **settings: Any) -> Path:
    data = load_features(root / "feats", "train", ["vit"], ["roberta"], tokens=tokens)
    split = make_split(data, val_ratio=0.25)
    run = fit_head(data, split, HeadConfig(head, D=8, dropout=0.0), **{"ep": 3, "bs": 8, **settings}, device="cpu")
    run.save(root / name)
    return root / name


def begin(root: Path, settings: TuneSettings = PLAIN, name: str = "run", **more: Any) -> Start:
    weights = dict(line.split("=", 1) for line in (root / "weights.txt").read_text().splitlines())
    return start_from_run(load_run(root / name), settings, device=CPU, weights=weights, **more)


def tuned(
    root: Path, settings: TuneSettings = PLAIN, work: str = "work", live: bool = True, **more: Any
) -> tuple[Start, Tuned]:
    start = begin(root, settings)
    data = data_of(start, settings, root / "trunks", cached=not live)
    with WorkFolder(root / work, {"settings": repr(settings)}) as folder:
        return start, tune(start.model, data, settings, folder, **more)


def state(model: PairModel) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def digest(start: Start, result: Tuned) -> str:
    """Of everything a finetuning leaves."""
    of = hashlib.sha256(result.val_logits.tobytes() + repr((result.history, result.chosen, result.tried)).encode())
    for name, x in sorted(state(start.model).items()):
        of.update(name.encode() + x.numpy().tobytes())
    return of.hexdigest()


# -- where it begins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "norm", "tokens"),
    [
        ("fusion", "none", False),
        ("concat", "standard", False),
        ("late", "l2", False),
        ("linear", "standard", False),
        ("kernel", "standard", False),
        ("coattention", "standard", True),
        ("query_attention", "none", True),
    ],
)
def test_tuning_begins_at_the_runs_own_logits(head: str, norm: str, tokens: bool, tmp_path: Path):
    weights = cached_pairs(tmp_path, tokens=tokens)
    run = load_run(save_run(tmp_path, head, tokens=tokens, norm=norm))
    start = start_from_run(run, PLAIN, device=CPU, weights=weights)
    data = data_of(start, PLAIN, tmp_path / "trunks")
    features = load_features(tmp_path / "feats", "train", ["vit"], ["roberta"], tokens=tokens)
    expected = run.members[0].logits(features, features.positions(start.split.val))
    found = predict(start.model, data.reader, data.val)
    assert np.abs(found - expected).max() < 4e-3 * max(1, np.abs(expected).max())
    assert np.abs(expected).max() > 0.01


def test_clip_on_both_sides_begins_there_too(tmp_path: Path):
    make_pairs(tmp_path / "set")
    where = tiny_clip(tmp_path / "clip")
    cache(load_encoder("clip", **where), tmp_path / "set", tmp_path / "feats", "clip")
    data = load_features(tmp_path / "feats", "train", ["clip"], ["clip"])
    split = make_split(data, val_ratio=0.25)
    run = fit_head(data, split, HeadConfig("clip_match", D=8), ep=2, bs=8, norm="l2", device="cpu")
    run.save(tmp_path / "run")
    start = start_from_run(load_run(tmp_path / "run"), PLAIN, device=CPU, weights={"clip": where["weights"]})
    rows = data_of(start, PLAIN, tmp_path)
    expected = run.members[0].logits(data, data.positions(split.val))
    assert np.abs(predict(start.model, rows.reader, rows.val) - expected).max() < 4e-3
    assert sorted(start.model.parts) == ["head", "image/clip", "text/clip"]


def test_a_new_head_has_the_runs_shape_and_other_weights(root: Path):
    old, new = begin(root), begin(root, new_head=True)
    a, b = old.model.head.state_dict(), new.model.head.state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert not torch.equal(a["classifier.0.weight"], b["classifier.0.weight"])


# -- what a step does --------------------------------------------------------------------------------------------


def reference(
    start: Start, settings: TuneSettings, root: Path, steps: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The `steps` of an epoch written plainly: every row's logits, torch's own loss and optimiser, no parts and no
    processes. The weights afterwards, and of all rows of these steps the labels and predictions."""
    truth, predicted = [], []
    data = data_of(start, settings, root / "trunks")
    model = start.model
    encoders = [p for part, network in model.parts.items() if part != "head" for p in network.parameters()]
    head = list(model.head.parameters())
    decay = settings.weight_decay
    groups = [
        {"params": [p for p in encoders if p.dim() > 1], "lr": settings.lr, "weight_decay": decay},
        {"params": [p for p in encoders if p.dim() <= 1], "lr": settings.lr, "weight_decay": 0},
        {"params": [p for p in head if p.dim() > 2], "lr": settings.rate_of_head, "weight_decay": decay},
        {"params": [p for p in head if p.dim() <= 2], "lr": settings.rate_of_head, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups)
    cycle = None
    if settings.schedule == "onecycle":
        peaks = [group["lr"] for group in groups]
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=settings.warmup)
    order = epoch_samples(data.train, (), settings.seed, 1, ())
    model.train(False)  # no dropout here, and batch norms are frozen
    for step in range(steps):
        rows = order[step * settings.bs : (step + 1) * settings.bs]
        logits = model(next(data.reader.batches([rows])))
        targets = data.labels[[sample.row for sample in rows]]
        truth.append(targets)
        predicted.append(logits.detach().argmax(1))
        loss = torch.nn.functional.cross_entropy(
            logits, targets, data.class_weights, label_smoothing=settings.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*encoders, *head], settings.clip_grad)
        optimizer.step()
        if cycle is not None and step < steps - 1:
            cycle.step()
    return state(model), torch.cat(truth), torch.cat(predicted)


@pytest.mark.parametrize(
    "own",
    [{"bs": 9}, {"bs": 9, "micro_bs": 3}, {"bs": 3, "schedule": "onecycle", "warmup": 0.5}],
    ids=["whole", "in parts", "onecycle"],
)
def test_steps_are_those_of_plain_torch(own: dict, root: Path):
    weighty = {"class_weights": {"good": 3.0}, "label_smoothing": 0.1, "clip_grad": 0.5}
    settings = replace(PLAIN, ep=1, **own, **weighty)
    expected, truth, predicted = reference(begin(root), settings, root, steps=18 // settings.bs)
    start = begin(root)
    data = data_of(start, settings, root / "trunks")
    assert len(data.train) == 18
    seen: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
    with WorkFolder(root / "work", {}) as work:
        tuned = tune(start.model, data, settings, work, told=lambda row, best: seen.append((state(start.model), row)))
    (before, first), (after, last) = seen
    assert tuned.history == [first, last] and first["train_accuracy"] is None
    assert last["train_accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    for average in ("weighted", "macro"):
        f1 = metrics.f1_score(truth, predicted, average=average, labels=range(len(data.classes)), zero_division=0)
        assert last[f"train_{average}_f1"] == pytest.approx(f1)
    assert sum(last[f"predicted_{name}"] for name in start.experiment.classes) == len(data.val)
    # A key's bias changes no attention: its gradient is rounding noise, which Adam turns into full steps.
    assert [name for name, x in expected.items() if not torch.allclose(after[name], x, atol=2e-6)] == []
    moved = [name for name, x in before.items() if not torch.equal(x, after[name])]
    assert len(moved) > 40


def test_the_rate_rises_then_falls():
    settings = replace(PLAIN, schedule="cosine", warmup=0.2)
    rates = [lr_factor(settings, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5) and rates[-1] == pytest.approx((1 + np.cos(np.pi * 15 / 16)) / 2)
    once = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(once, 1.0, total_steps=20, pct_start=0.2, cycle_momentum=False)
    for step in range(20):
        assert lr_factor(replace(settings, schedule="onecycle"), step, 20) == pytest.approx(cycle.get_last_lr()[0])
        once.step()
        cycle.step()
    assert {lr_factor(replace(PLAIN, warmup=0), step, 5) for step in range(5)} == {1.0}


def test_rates_fall_from_block_to_block(root: Path):
    """The ViT has three blocks and what comes before and after, the BERT four and nothing after."""
    settings = replace(PLAIN, layer_decay=0.5)
    start = begin(root, settings)
    choose_parameters(start.model, settings)
    optimizer, peaks = optimizer_of(start.model, dict(start.model.named_parameters()), settings)
    rate_of = {
        id(parameter): peak for group, peak in zip(optimizer.param_groups, peaks) for parameter in group["params"]
    }
    found = {name: rate_of[id(p)] for name, p in start.model.named_parameters() if id(p) in rate_of}
    vit = {name.removeprefix("image/vit/"): rate for name, rate in found.items() if name.startswith("image/vit/")}
    bert = {name.removeprefix("text/roberta/"): rate for name, rate in found.items() if name.startswith("text/roberta")}

    def expected(name: str, top: int) -> float:
        digits = [int(part) for part in name.split(".") if part.isdigit()]
        depth = digits[0] + 1 if digits else 0 if "embeddings" in name else top
        return 1e-3 * 0.5 ** (top - depth)

    # The ViT's last LayerNorm is above its third block, nothing above the BERT's fourth.
    assert vit == {name: pytest.approx(expected(name, 4)) for name in vit} and len(set(vit.values())) == 5
    assert bert == {name: pytest.approx(expected(name, 4)) for name in bert} and len(set(bert.values())) == 5
    assert {rate for name, rate in found.items() if name.startswith("head/")} == {1e-2}


def test_rates_fall_from_the_topmost_layer_in_use(tmp_path: Path):
    """Above the BERT's last block is a pooler, which a mean of tokens doesn't read."""
    weights = cached_pairs(tmp_path, layers=2, pooler=True)
    (tmp_path / "weights.txt").write_text("\n".join(f"{name}={path}" for name, path in weights.items()))
    save_run(tmp_path, "linear")
    settings = replace(PLAIN, ep=1, layer_decay=0.5)
    start = begin(tmp_path, settings)
    choose_parameters(start.model, settings)
    data = data_of(start, settings, tmp_path / "trunks")
    leave_out_unused(start.model, data.reader, data.train[0])
    trained = {name: p for name, p in start.model.named_parameters() if p.requires_grad}
    optimizer, peaks = optimizer_of(start.model, trained, settings)
    rate_of = {id(p): peak for group, peak in zip(optimizer.param_groups, peaks) for p in group["params"]}
    bert = {name.removeprefix("text/roberta/"): rate_of[id(p)] for name, p in trained.items() if "text/" in name}
    assert not any(name.startswith("pooler") for name in bert)
    for prefix, rate in (("encoder.layer.1.", 1e-3), ("encoder.layer.0.", 5e-4), ("embeddings.", 2.5e-4)):
        assert {found for name, found in bert.items() if name.startswith(prefix)} == {rate}
    with WorkFolder(tmp_path / "work", {}) as work:
        again = begin(tmp_path, settings)
        assert tune(again.model, data_of(again, settings, tmp_path), settings, work).history[-1]["lr"] == settings.lr


# -- what is frozen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "free"),
    [
        ({"tune": "head"}, lambda name: name.startswith("head/")),
        (
            {"tune": "last-1"},
            lambda name: (
                name.startswith(("head/", "text/roberta/encoder.layer.3."))
                or ".layernorm." in f".{name}."
                and "image/" in name
                and "layers.2" in name
                or "image/vit/layers.2" in name
                or "image/vit/encoder.layer.2" in name
                or name in ("image/vit/layernorm.weight", "image/vit/layernorm.bias")
            ),
        ),
        ({"tune": "all"}, lambda name: True),
    ],
)
def test_gradients_reach_what_is_trained_and_nothing_else(how: dict[str, str], free: Callable, root: Path):
    settings = replace(PLAIN, ep=1, **how)
    start = begin(root, settings)
    before = state(start.model)
    choose_parameters(start.model, settings)
    data = data_of(start, settings, root / "trunks", cached=False)
    start.model.train()
    start.model(next(data.reader.batches([[Sample(row) for row in data.train]]))).square().sum().backward()
    parameters = dict(start.model.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if free(n)}
    assert all((p.grad is not None and bool(p.grad.abs().sum() > 0)) == free(n) for n, p in parameters.items())
    again, result = tuned(root, settings, work="second")
    moved = {name for name, x in state(again.model).items() if not torch.equal(x, before[name])}
    trained = {n for n in parameters if free(n)}
    assert moved <= trained and (moved == trained or result.epoch == 0)
    assert result.trained_parameters == sum(parameters[n].numel() for n in trained)


def test_frozen_blocks_work_without_dropout_and_batch_norms_keep_their_statistics(tmp_path: Path):
    cached_pairs(tmp_path, dropout=0.5)
    (tmp_path / "weights.txt").write_text(f"vit={tmp_path / 'vit'}\nroberta={tmp_path / 'bert'}")
    save_run(tmp_path, "fusion")
    settings = replace(PLAIN, tune="last-1")
    start = begin(tmp_path, settings)
    choose_parameters(start.model, settings)
    start.model.train()
    layers = start.model.parts["text/roberta"].encoder.layer
    assert not layers[0].training and layers[3].training
    assert not layers[2].output.dropout.training and layers[3].output.dropout.training
    before = {name: x.clone() for name, x in start.model.named_buffers()}
    assert any("running_mean" in name for name in before)
    data = data_of(start, settings, tmp_path / "trunks", cached=False)
    with WorkFolder(tmp_path / "work", {}) as work:
        tune(start.model, data, settings, work)
    assert all(torch.equal(x, before[name]) for name, x in start.model.named_buffers())


def test_adapters_alone_are_trained_and_folded_in_at_the_end(root: Path):
    settings = replace(PLAIN, lora=2, ep=3)
    names = [name for name, _ in begin(root).model.named_parameters()]
    before = state(begin(root).model)
    start, result = tuned(root, settings)
    head = sum(p.numel() for p in start.model.head.parameters())
    of_projections = 4 * 2 * (32 + 32)  # query, key, value, output, each 32 wide, at rank 2
    assert result.trained_parameters == head + (3 + 4) * of_projections
    assert [name for name, _ in start.model.named_parameters()] == names
    moved = {name for name, x in state(start.model).items() if not torch.equal(x, before[name])}
    assert result.epoch and all("attention" in name or name.startswith("head/") for name in moved)
    assert sum("attention" in name for name in moved) == (3 + 4) * 4
    data = data_of(start, settings, root)
    assert np.abs(predict(start.model, data.reader, data.val) - result.val_logits).max() < 1e-5


# -- the cached trunk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["last-1", "last-3", "head"])
def test_a_cached_trunk_gives_the_loss_curve_of_a_live_one(how: str, root: Path):
    settings = replace(PLAIN, tune=how, ep=3)
    _, live = tuned(root, settings, "live")
    start, cached = tuned(root, settings, "cached", live=False)
    assert set(start.model.cuts.values()) == {"last-1": {2, 3}, "last-3": {0, 1}, "head": {3, 4}}[how]
    for a, b in zip(live.history, cached.history, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=2e-3)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=2e-3)
    assert np.abs(live.val_logits - cached.val_logits).max() < 2e-2
    encoded: list[int] = []
    data_of(begin(root, settings), settings, root / "trunks", progress=lambda done, total: encoded.append(total))
    assert encoded == []  # it is there already
    data_of(begin(root, settings), settings, root / "others", progress=lambda done, total: encoded.append(total))
    assert set(encoded) == {24}


def test_pictures_arent_read_where_their_trunk_is_cached(root: Path):
    settings = replace(PLAIN, tune="last-1")
    start = begin(root, settings)
    data = data_of(start, settings, root / "trunks")
    assert data.reader.image == {} and set(data.reader.hidden) == {"image/vit", "text/roberta"}
    augmented = data_of(begin(root, settings), replace(settings, augment=("text",)), root / "trunks")
    assert augmented.reader.hidden == {}


# -- going on ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_after(rows: int) -> Callable[[int, int], None]:
    """Interrupts when so many rows more than at the beginning are done."""
    begun: int | None = None

    def progress(done: int, total: int) -> None:
        nonlocal begun
        begun = done if begun is None else begun
        if done >= begun + rows:
            raise Killed

    return progress


@pytest.mark.parametrize(
    "how",
    [
        {"augment": ("image", "text"), "schedule": "cosine", "warmup": 0.2},
        {},
        {"lora": 2, "soup": 2, "wise_ft": True},
        {"tune": "last-1", "optimizer": "adam"},
    ],
)
@pytest.mark.slow
def test_wherever_it_is_interrupted_it_ends_with_the_same_bytes(how: dict[str, Any], tmp_path: Path):
    weights = cached_pairs(tmp_path, dropout=0.3)
    (tmp_path / "weights.txt").write_text("\n".join(f"{name}={path}" for name, path in weights.items()))
    save_run(tmp_path, "fusion", dropout=0.3)
    settings = replace(PLAIN, bs=5, checkpoint_steps=2, **how)
    undisturbed = digest(*tuned(tmp_path, settings, "undisturbed"))
    for rows in (5, 20, 35):
        work = f"work-{rows}"
        with pytest.raises(Killed):
            tuned(tmp_path, settings, work, progress=killed_after(rows))
        with pytest.raises(Killed):  # a second time, as soon as it has begun again
            tuned(tmp_path, settings, work, progress=killed_after(1))
        assert digest(*tuned(tmp_path, settings, work)) == undisturbed
    other = replace(settings, seed=7)
    assert digest(*tuned(tmp_path, other, "other")) != undisturbed


def test_a_convolutional_net_ends_with_the_same_bytes_too(tmp_path: Path):
    """Its weights lie in channels_last, which files don't know; fused optimisers go by memory, not by shape."""
    make_pairs(tmp_path / "set")
    resnet = EncoderChoice("clip")
    weights = {"clip": tiny_clip(tmp_path / "clip", "resnet")["weights"]}
    settings = replace(PLAIN, bs=6, checkpoint_steps=1)

    def through(work: str, **more: Any) -> str:
        start = start_from_encoders(
            resnet,
            resnet,
            HeadConfig("concat"),
            settings,
            SplitSettings(val_ratio=0.25),
            device=CPU,
            place=DataPlace(tmp_path / "set"),
            weights=weights,
        )
        data = data_of(start, settings, tmp_path / "trunks")
        with WorkFolder(tmp_path / work, {}) as folder:
            return digest(start, tune(start.model, data, settings, folder, **more))

    with pytest.raises(Killed):
        through("work", progress=killed_after(12))
    assert through("work") == through("undisturbed")


def test_another_finetuning_isnt_gone_on_with(root: Path):
    with WorkFolder(root / "work", {"settings": {"lr": 1}}), pytest.raises(UsageError, match="at work in") as held:
        WorkFolder(root / "work", {"settings": {"lr": 1}}).__enter__()
    assert one_line(held)
    with pytest.raises(UsageError, match="another finetuning .*lr.*1.*now.*2.*give another `name`") as refused:
        WorkFolder(root / "work", {"settings": {"lr": 2}}).__enter__()
    assert one_line(refused)
    with WorkFolder(root / "work", {"settings": {"lr": 1}}):
        pass
    # Checkpoints of other code hold other tensors.
    (root / "work" / "settings.json").write_text('{"format": 1, "settings": {"lr": 1}}')
    with pytest.raises(UsageError, match="another finetuning .format 1, now 2.; give another `name`") as refused:
        WorkFolder(root / "work", {"settings": {"lr": 1}}).__enter__()
    assert one_line(refused)


def test_a_model_is_tuned_once(root: Path):
    start, _ = tuned(root)
    with pytest.raises(UsageError, match="has been tuned already, and is no start any more; make a new one"):
        tune(start.model, data_of(start, PLAIN, root), PLAIN, WorkFolder(root / "second", {}))


@pytest.mark.parametrize("what", ["norms", "settings", "contents", "head", "dtypes"])
def test_what_decides_the_result_decides_whether_checkpoints_fit(what: str, root: Path):
    start = begin(root)
    before = what_is_tuned(start, PLAIN)
    settings = replace(PLAIN, lr=1.0) if what == "settings" else replace(PLAIN, micro_bs=2, checkpoint_steps=3)
    if what == "norms":
        start.model.preprocessing.scales["vit"] = 2.0
    elif what == "contents":
        start.experiment.features.dataset.text_key[0] += 1
    elif what == "head":
        with torch.no_grad():
            next(start.model.head.parameters()).add_(1)
    elif what == "dtypes":
        start = begin(root, replace(PLAIN, dtype="bf16"))
    after = what_is_tuned(start, settings)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {{"norms": "features", "head": "head_sha256"}.get(what, what)}


def test_counts_of_batch_norms_go_on_too(tmp_path: Path):
    """The same bytes, with batch norms in training: those of a ResNet count their batches."""
    make_pairs(tmp_path / "set")
    where = tiny_clip(tmp_path / "clip", "resnet")
    cache(load_encoder("clip", **where), tmp_path / "set", tmp_path / "feats", "clip")
    data = load_features(tmp_path / "feats", "train", ["clip"], ["clip"])
    run = fit_head(data, make_split(data, val_ratio=0.25), HeadConfig("concat", D=8), ep=1, bs=8, device="cpu")
    run.save(tmp_path / "run")
    settings = replace(PLAIN, bs=6, micro_bs=3, train_batch_norm=True, checkpoint_steps=1, lr=1e-4, soup=2)

    def again(work: str, **more: Any) -> tuple[Start, Tuned]:
        start = start_from_run(load_run(tmp_path / "run"), settings, device=CPU, weights={"clip": where["weights"]})
        with WorkFolder(tmp_path / work, {}) as folder:
            return start, tune(start.model, data_of(start, settings, tmp_path), settings, folder, **more)

    undisturbed = again("undisturbed")
    with pytest.raises(Killed):
        again("killed", progress=killed_after(12))
    assert digest(*again("killed")) == digest(*undisturbed)
    counts = {name: int(x) for name, x in undisturbed[0].model.named_buffers() if "num_batches" in name}
    assert counts and (undisturbed[1].epoch == 0 or set(counts.values()) == {3 * (undisturbed[1].epoch or 2)})


def test_rows_a_trunk_cant_store_are_named(root: Path):
    settings = replace(PLAIN, tune="last-1")
    start = begin(root, settings)
    data_of(start, settings, root / "trunks")
    other = begin(root, settings)
    with torch.no_grad():  # beyond float16's range, in every row
        other.model.parts["image/vit"].layers[0].mlp.fc2.bias.add_(1e6)
    with pytest.raises(UsageError, match="rows have no outputs of the frozen blocks .*float16.*`live_trunk`") as raised:
        data_of(other, settings, root / "others")
    assert one_line(raised)


def test_large_trunks_are_read_batch_by_batch(root: Path, monkeypatch: pytest.MonkeyPatch):
    settings = replace(PLAIN, tune="last-1")
    _, in_memory = tuned(root, settings, "small", live=False)
    monkeypatch.setattr("modeling.finetuning.hidden_states.MEMORY_BYTES", 1)
    _, from_store = tuned(root, settings, "large", live=False)
    assert from_store.history == in_memory.history
    assert np.array_equal(from_store.val_logits, in_memory.val_logits)


def test_pictures_beyond_memory_are_decoded_batch_by_batch(root: Path, monkeypatch: pytest.MonkeyPatch):
    _, in_memory = tuned(root, PLAIN, "small")
    monkeypatch.setattr("modeling.finetuning.trunk.PICTURE_BYTES", 1)
    start, decoded = tuned(root, PLAIN, "large")
    assert decoded.history == in_memory.history


def test_pooling_of_the_last_four_layers_is_cut_below_them(tmp_path: Path):
    weights = cached_pairs(tmp_path, layers=6)
    cache(
        load_encoder("roberta", weights=weights["roberta"], pooling="last4"), tmp_path / "set", tmp_path / "feats", "b4"
    )
    data = load_features(tmp_path / "feats", "train", [], ["b4"])
    run = fit_head(data, make_split(data, val_ratio=0.25), HeadConfig("mlp", D=8), ep=1, bs=8, device="cpu")
    run.save(tmp_path / "run")
    settings = replace(PLAIN, tune="last-1")
    histories = []
    for cached in (True, False):
        start = start_from_run(load_run(tmp_path / "run"), settings, device=CPU, weights={"b4": weights["roberta"]})
        with WorkFolder(tmp_path / f"work{cached}", {}) as work:
            rows = data_of(start, settings, tmp_path / "trunks", cached=cached)
            histories.append(tune(start.model, rows, settings, work).history)
    assert start.model.cuts == {}
    assert [row["val_loss"] for row in histories[0]] == pytest.approx([r["val_loss"] for r in histories[1]], abs=2e-3)


def test_a_damaged_checkpoint_is_refused(root: Path):
    with pytest.raises(Killed):
        tuned(root, replace(PLAIN, checkpoint_steps=1), progress=killed_after(8))
    [step] = (root / "work").glob("step-*")
    content = (step / "tensors.safetensors").read_bytes()
    (step / "tensors.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="can't be read as safetensors .*remove .* to begin anew") as refused:
        tuned(root, replace(PLAIN, checkpoint_steps=1))
    assert one_line(refused)


# -- which weights are kept --------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_and_patience_ends_it(root: Path):
    settings = replace(PLAIN, ep=8, lr=1e-6, head_lr=1e-6, patience=2, monitor="loss", min_gain=10.0)
    start, result = tuned(root, settings)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert (result.epoch, result.chosen) == (0, "the start, which no epoch bettered")
    before = state(begin(root).model)
    assert all(torch.equal(x, before[name]) for name, x in state(start.model).items())
    # Without a least gain the last of ever better epochs is kept, and with it its logits.
    start, result = tuned(root, replace(settings, min_gain=0.0, ep=3, lr=1e-4, head_lr=1e-3), "second")
    losses = [row["val_loss"] for row in result.history]
    assert result.epoch == int(np.argmin(losses)) > 0
    data = data_of(start, settings, root)
    assert np.array_equal(predict(start.model, data.reader, data.val), result.val_logits)


def test_soups_and_interpolations_are_means_of_weights_and_chosen_by_validation(root: Path):
    settings = replace(PLAIN, ep=4, soup=3, wise_ft=True, monitor="loss", lr=3e-3, head_lr=3e-2)
    start, result = tuned(root, settings)
    losses = {row["epoch"]: row["val_loss"] for row in result.history}
    tried = {row["weights"]: row["loss"] for row in result.tried}
    assert len([name for name in tried if name.startswith("the mean of epochs")]) == 2
    assert len([name for name in tried if " of the way from the start to " in name]) in (0, 9)
    data = data_of(start, settings, root)
    labels = data.labels[data.val]
    loss = float(torch.nn.functional.cross_entropy(torch.from_numpy(result.val_logits), labels))
    assert loss == pytest.approx(min([*losses.values(), *tried.values()]), abs=1e-6)
    # The mean of two epochs, by hand.
    ranked = sorted((epoch for epoch in losses if epoch), key=losses.__getitem__)
    name = f"the mean of epochs {ranked[0]}, {ranked[1]}"
    with WorkFolder(root / "work", {"settings": repr(settings)}) as work:
        states = [load_file(work.path / f"epoch-{epoch:04d}" / "tensors.safetensors") for epoch in ranked[:2]]
    own = dict(start.model.named_parameters())
    with torch.no_grad():
        for key in states[0]:
            own[key].copy_((states[0][key] + states[1][key]) / 2)
    mixed = torch.from_numpy(predict(start.model, data.reader, data.val))
    assert tried[name] == pytest.approx(float(torch.nn.functional.cross_entropy(mixed, labels)), abs=1e-5)


def test_a_soup_takes_in_what_does_not_worsen_it(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Wortsman et al. 2022, recipe 1: at least as good is good enough."""
    settings = replace(PLAIN, soup=4)
    accuracies = {"1, 2": 0.5, "1, 2, 3": 0.4, "1, 2, 4": 0.6}
    history = [{"epoch": 0, "accuracy": 0.1}, *({"epoch": k, "accuracy": 0.5} for k in range(1, 5))]
    work = WorkFolder(root / "work", {})
    monkeypatch.setattr(work, "load_epoch", lambda epoch, device: {"w": torch.tensor(float(epoch))})
    start = begin(root)
    choice = Choice(start.model, data_of(start, settings, root), settings, work, Team(), history, {})

    def judged(weights: dict[str, torch.Tensor], words: str, epoch: int | None = None) -> Candidate:
        score = 0.5 if epoch else accuracies[words.removeprefix("the mean of epochs ")]
        return Candidate(weights, words, epoch, score, np.zeros((1, 3)))

    monkeypatch.setattr(choice, "_judged", judged)
    monkeypatch.setattr("modeling.finetuning.choosing.load_plain", lambda model, weights: None)
    best = choice.best()
    assert [score for _, score in choice.tried] == list(accuracies.values())
    assert best.words == "the mean of epochs 1, 2, 4" and float(best.state["w"]) == pytest.approx((1 + 2 + 4) / 3)


def test_a_loss_that_isnt_finite_ends_it_in_one_line(root: Path):
    with pytest.raises(UsageError, match=r"the loss became nan in epoch \d .*use a smaller `lr`") as raised:
        tuned(root, replace(PLAIN, lr=1e30, head_lr=1e30, clip_grad=0))
    assert one_line(raised)


def test_too_large_a_step_names_the_option(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The allocation really fails, in the first step; the checkpoint of the start is there, and a smaller part goes on."""
    plain = PairModel.__call__

    def large(self: PairModel, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and batch.size > 2:
            torch.empty(1 << 50, dtype=torch.uint8)
        return plain(self, batch)

    monkeypatch.setattr(PairModel, "__call__", large)
    with pytest.raises(UsageError, match="8 rows at a time don't fit into memory; give a smaller `micro_bs`") as raised:
        tuned(root)
    assert one_line(raised) and list((root / "work").glob("step-00000000"))
    start = begin(root)
    smaller = replace(PLAIN, micro_bs=2)
    with WorkFolder(root / "work", {"settings": repr(PLAIN)}) as work:
        result = tune(start.model, data_of(start, smaller, root), smaller, work)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]


# -- data --------------------------------------------------------------------------------------------------------


def test_predictions_need_no_more_memory_than_steps_do(root: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[tuple[bool, int]] = []
    forward = PairModel.__call__

    def noted(model: PairModel, batch: PairBatch) -> torch.Tensor:
        sizes.append((torch.is_grad_enabled(), batch.size))
        return forward(model, batch)

    monkeypatch.setattr(PairModel, "__call__", noted)
    tuned(root, replace(PLAIN, ep=1, micro_bs=1))
    assert {size for learning, size in sizes if learning} == {1, 2}  # the latter once, to see what is in use
    assert {size for learning, size in sizes if not learning} == {4, 2}  # of six validation rows


@pytest.mark.parametrize(("dtype", "rounded"), [("fp32", False), ("bf16", True)])
def test_fp32_is_not_rounded_to_tf32_as_in_extraction(
    root: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, rounded: bool
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    start, seen = begin(root, replace(PLAIN, dtype=dtype)), []
    for part in start.model.sides:
        start.model.parts[part].register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    data = data_of(start, PLAIN, root / "trunks")
    predict(start.model, data.reader, data.val)
    assert len(seen) >= 2 and set(seen) == {rounded} and torch.backends.cudnn.allow_tf32


def test_what_an_epoch_sees_is_a_function_of_seed_and_epoch():
    rows = list(range(20))
    first = epoch_samples(rows, (), 1, 1, ())
    assert [s.row for s in first] != rows and sorted(s.row for s in first) == rows
    assert first == epoch_samples(rows, (), 1, 1, ())
    assert first != epoch_samples(rows, (), 1, 2, ()) and first != epoch_samples(rows, (), 2, 1, ())
    augmented = epoch_samples(rows, (), 1, 1, ("image",))
    assert len({s.seed for s in augmented}) == 20 and {s.sides for s in augmented} == {("image",)}
    assert {s.seed for s in augmented}.isdisjoint({s.seed for s in epoch_samples(rows, (), 1, 2, ("image",))})
    with_copies = epoch_samples(rows, [3, 4], 1, 1, ())
    assert sorted(s.row for s in with_copies if s.sides) == [3, 4] and len(with_copies) == 22


def test_augmentation_changes_training_rows_only(root: Path):
    start = begin(root)
    data = data_of(start, PLAIN, root)
    plain, again, other = (
        next(data.reader.batches([[sample]]))
        for sample in (Sample(0), Sample(0, ("image", "text"), 5), Sample(0, ("image", "text"), 6))
    )
    assert not torch.equal(plain.pixels["vit"], again.pixels["vit"])
    assert not torch.equal(other.pixels["vit"], again.pixels["vit"])
    repeated = next(data.reader.batches([[Sample(0, ("image", "text"), 5)]]))
    assert torch.equal(repeated.pixels["vit"], again.pixels["vit"]) and repeated.ids == again.ids
    seen: list[Sample] = []
    inner = data.reader.batches

    def watched(jobs: Any) -> Any:
        seen.extend(sample for job in jobs for sample in job)
        return inner(jobs)

    data.reader.batches = watched  # type: ignore[method-assign]
    with WorkFolder(root / "work", {}) as work:
        tune(start.model, data, replace(PLAIN, ep=1, augment=("image",)), work)
    assert {s.row for s in seen if s.sides} == set(data.train)
    assert {s.row for s in seen if not s.sides} == {*data.val, data.train[0]}  # and one row to find what is used
    assert not {s.row for s in seen if s.sides} & set(data.val)


def test_a_picture_that_cant_be_read_is_named(root: Path):
    start = begin(root)
    data = data_of(start, PLAIN, root)
    broken = start.records[data.train[0]]
    Path(str(broken.image_path)).write_bytes(b"no picture")
    reader = PairReader(start.records, start.model.encoders, start.model.preprocessing.caches, start.cleaning)
    with pytest.raises(UsageError, match=f"1 rows can't be read: {broken.id} .*repair") as raised:
        reader.fill(range(len(start.records)))
    assert one_line(raised)


def test_bf16_comes_near_fp32(root: Path):
    _, exact = tuned(root, replace(PLAIN, ep=3), "fp32")
    _, rough = tuned(root, replace(PLAIN, ep=3, dtype="bf16"), "bf16")
    for a, b in zip(exact.history, rough.history, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=0.05)
    assert exact.history[1]["val_loss"] != rough.history[1]["val_loss"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tune": "last-0"},
        {"tune": "some"},
        {"lora": 0},
        {"lora": 2, "tune": "head"},
        {"warmup": 1.0},
        {"layer_decay": 0.0},
        {"clip_grad": -1.0},
        {"lr": float("nan")},
        {"dtype": "fp8"},
        {"schedule": "linear"},
        {"monitor": "f1"},
        {"micro_bs": 0},
        {"soup": -1},
        {"class_weights": {"a": -1.0}},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(UsageError) as raised:
        TuneSettings(**wrong)
    assert one_line(raised)
