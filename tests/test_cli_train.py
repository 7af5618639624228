"""train_head.py as a user runs it: defaults, options, what lies in the run, and one clear line when it can't."""

import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from caches import CLASSES, make_cache, make_tags, read
from conftest import ENVIRONMENT, ROOT, content, trained_with
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from modeling import train_head
from modeling.evaluation.metrics import softmax
from modeling.experiments import fitting
from modeling.experiments.experiment import Experiment
from modeling.features.loading import load_features
from modeling.heads.registry import HEADS
from modeling.runs import folder as run_folder
from modeling.runs.folder import load_run, read_predictions
from modeling.runs.listing import newest_run
from modeling.training.config import settings_read

SHORT = ["--ep", "3", "--D", "8", "--bs", "32", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four caches of the same 90 pairs; clip has tokens."""
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip", tokens=True)
    for name in ("resnet", "roberta", "vader"):
        make_cache(folder, name)
    return folder


def train(feats: Path, runs: Path, *argv: str) -> Path:
    """The run that the command leaves."""
    before = set(runs.glob("*"))
    given = ["--vtype", "clip"] if "--vtype" not in argv else []
    assert train_head.main([*given, "--feats", str(feats), "--runs", str(runs), *SHORT, *argv]) == 0
    (path,) = set(runs.glob("*")) - before
    return path


# -- the documented command -------------------------------------------------------------------------------------


def test_the_documented_command(tmp_path: Path):
    """`python modeling/train_head.py --vtype clip --D 256`, everything else by default."""
    make_cache(tmp_path / "saved" / "feats", "clip")
    command = [sys.executable, str(ROOT / "modeling" / "train_head.py"), "--vtype", "clip", "--D", "256"]
    out = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100
    )
    assert out.returncode == 0, out.stderr
    (path,) = (tmp_path / "saved" / "runs").iterdir()
    assert out.stdout.rstrip().endswith(f"run of 1 head -> saved/runs/{path.name}")
    assert path.name.endswith("_clip_clip_fusion_D256_a0_s42") and newest_run(path.parent) == path
    assert "Traceback" not in out.stderr and "Warning" not in out.stderr
    settings = trained_with(path)
    given = {"head": "fusion", "D": 256, "optimizer": "adam", "lr": 1e-4, "bs": 512, "ep": 100, "seed": 42}
    assert {name: settings[name] for name in given} == given
    config = content(path, "config")
    assert config["command"].split()[0] == "python" and config["command"].endswith("train_head.py --vtype clip --D 256")
    assert config["split"] == {"val_ratio": 0.1, "test_ratio": 0.0, "seed": 42, "duplicates_together": True}
    metrics = content(path, "metrics")["val"]
    assert metrics["n"] == 9 and f"{metrics['accuracy']:.3f}" in out.stdout
    assert "always positive" in out.stdout and "95 %" in out.stdout and "protocol: stratified split" in out.stdout
    assert metrics["accuracy"] > metrics["majority"]["accuracy"]


def test_the_help_shows_defaults_and_every_head():
    text = " ".join(train_head.build_parser().format_help().split())
    for words in ("(default: fusion)", "(default: 256)", "(default: 0.0001)", "(default: saved/feats)", *HEADS):
        assert words in text
    for words in (
        "(default: 0.1, or the recipe's)",
        "none with --ttype alone",
        "linear: inverse strength of the penalty",
    ):
        assert words in text


# -- what lies in a run -----------------------------------------------------------------------------------------


def check_figures(figures: dict[str, Any], tags: list[str], probabilities: np.ndarray) -> None:
    """scikit-learn's figures of the predictions."""
    y = np.array([CLASSES.index(tag) for tag in tags])
    predicted = probabilities.argmax(1)
    assert figures["n"] == len(y) and figures["classes"] == CLASSES
    assert figures["accuracy"] == pytest.approx(reference.accuracy_score(y, predicted))
    for kind in ("macro", "weighted"):
        values = reference.precision_recall_fscore_support(y, predicted, labels=range(3), average=kind, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            assert figures[f"{kind}_{name}"] == pytest.approx(value)
    assert figures["confusion"] == reference.confusion_matrix(y, predicted, labels=range(3)).tolist()
    loss = reference.log_loss(y, probabilities / probabilities.sum(1, keepdims=True), labels=range(3))
    assert figures["log_loss_calibrated"] == pytest.approx(loss, abs=1e-4)
    low, high = figures["interval"]["accuracy"]
    assert low <= figures["accuracy"] <= high


@pytest.mark.parametrize("name", HEADS)
def test_every_head_leaves_a_run_that_predicts_what_it_reports(name: str, feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--head", name, "--val-ratio", "0.3")
    width = "_D8" if "D" in HEADS[name].reads else ""
    assert trained_with(path)["head"] == name and f"_clip_clip_{name}{width}_a0_s42" in path.name
    ids, tags, probabilities = read_predictions(path / "predictions_val.csv")
    split = content(path, "split")
    assert ids == split["val"] and len(ids) == 27 and len(split["train"]) == 63
    tag_of = dict(zip([f"p{i}" for i in range(90)], make_tags(90), strict=True))
    assert tags == [tag_of[i] for i in ids]
    check_figures(content(path, "metrics")["val"], tags, probabilities)
    run = load_run(path)
    assert run.source.tokens == bool(HEADS[name].tokens or HEADS[name].optional_tokens)
    features = load_features(feats, "train", ["clip"], ["clip"], tokens=run.source.tokens)
    found = run.probabilities(features, features.positions(ids))
    np.testing.assert_allclose(found, probabilities, atol=1e-5)
    with (path / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    [best] = [member["best_epoch"] for member in content(path, "config")["members"]]
    assert best == run.members[0].best_epoch
    if not HEADS[name].closed_form():
        assert [row["epoch"] for row in history] == ["1", "2", "3"] and best in (1, 2, 3)
    else:  # one row that is of no epoch
        assert [row["epoch"] for row in history] == [""] and best is None
        assert float(history[0]["accuracy"]) == content(path, "metrics")["val"]["accuracy"]


@pytest.mark.parametrize(
    ("argv", "chosen"),
    [
        (["--head", "mlp"], "; best epoch and temperature chosen on the validation rows"),
        (
            ["--head", "linear"],
            "; temperature chosen on the validation rows, C by inner folds of the training rows",
        ),
        (["--head", "linear", "--C", "1"], "; temperature chosen on the validation rows"),
        (
            ["--head", "kernel"],
            "; temperature chosen on the validation rows, ridge and gamma by inner folds of the training rows",
        ),
        (
            ["--head", "kernel", "--ridge", "1"],
            "; temperature chosen on the validation rows, gamma by inner folds of the training rows",
        ),
        (["--head", "kernel", "--ridge", "1", "--gamma", "1"], "; temperature chosen on the validation rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_protocol_says_what_was_chosen(
    argv: list[str], chosen: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    capsys.readouterr()
    path = train(feats, tmp_path, *argv)
    out = capsys.readouterr().out
    assert content(path, "metrics")["protocol"].endswith(f"duplicates together{chosen}")
    assert f"duplicates together{chosen}\n" in out and ("best epoch" in out) == ("mlp" in argv)


def test_the_saved_epoch_is_the_best_one(feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--val-ratio", "0.3", "--ep", "12", "--lr", "0.1", "--monitor", "loss")
    with (path / "history.csv").open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file)]
    best = int(np.argmin(losses)) + 1
    assert 1 < best < 12 and content(path, "config")["members"][0]["best_epoch"] == best
    run = load_run(path)
    features = load_features(feats, "train", ["clip"], ["clip"])
    logits = run.members[0].logits(features, features.positions(run.split.val))
    y = torch.tensor([CLASSES.index(tag) for tag in (read_predictions(path / "predictions_val.csv")[1])])
    assert torch.nn.functional.cross_entropy(torch.from_numpy(logits), y).item() == pytest.approx(
        losses[best - 1], 1e-5
    )
    assert content(path, "metrics")["val"]["log_loss"] == pytest.approx(losses[best - 1], 1e-5)


def test_losses_of_members_are_before_the_temperature_as_those_of_all(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    argv = ["--val-ratio", "0.3", "--ep", "4", "--lr", "0.1", "--monitor", "loss", "--seeds", "3"]
    path = train(feats, tmp_path, *argv)
    with (path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [min(float(row["val_loss"]) for row in rows if row["seed"] == seed) for seed in ("42", "43", "44")]
    told = content(path, "metrics")["members"]["mean_std"]
    assert told["log_loss"]["mean"] == pytest.approx(np.mean(losses), 1e-5)
    assert told["log_loss_calibrated"]["mean"] < told["log_loss"]["mean"] and "ece_calibrated" in told
    assert f"{np.mean(losses):.3f}±{np.std(losses, ddof=1):.3f}" in capsys.readouterr().out


def test_a_test_part_is_predicted_by_the_finished_run(feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--val-ratio", "0.2", "--test-ratio", "0.3", "--seeds", "2")
    split, figures = content(path, "split"), content(path, "metrics")["test"]
    assert [len(split[part]) for part in ("train", "val", "test")] == [45, 18, 27]
    features = load_features(feats, "train", ["clip"], ["clip"])
    probabilities = load_run(path).probabilities(features, features.positions(split["test"]))
    tag_of = dict(zip(features.ids, features.tags, strict=True))
    check_figures(figures, [tag_of[i] for i in split["test"]], probabilities)
    assert figures["log_loss"] != figures["log_loss_calibrated"]


def test_the_same_command_gives_the_same_bytes(feats: Path, tmp_path: Path):
    for argv in (["--norm", "standard", "--seeds", "2"], ["--head", "kernel"], ["--folds", "2", "--dropout", "0.5"]):
        one, other = train(feats, tmp_path, *argv), train(feats, tmp_path, *argv)
        for name in ("head.safetensors", "split.json", "metrics.json", "history.csv", "predictions_val.csv"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (argv, name)
    first = train(feats, tmp_path / "my runs")
    _, _, *argv = shlex.split(content(first, "config")["command"])
    assert train_head.main(argv) == 0  # as config.json tells it
    second = newest_run(first.parent)
    assert second != first and (second / "head.safetensors").read_bytes() == (first / "head.safetensors").read_bytes()
    second = train(feats, tmp_path, "--seed", "43")
    assert (first / "head.safetensors").read_bytes() != (second / "head.safetensors").read_bytes()


def test_tensorboard_shows_the_history(feats: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = train(feats, tmp_path, "--tensorboard", "--folds", "2", "--seeds", "2", "--schedule", "cosine")
    with (path / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert len(history) == 12
    folders = {f"fold{fold}_seed{seed}" for fold in (1, 2) for seed in (42, 43)}
    assert {p.name for p in (path / "tensorboard").iterdir()} == folders
    for name in folders:
        events = EventAccumulator(str(path / "tensorboard" / name)).Reload()
        rows = [row for row in history if f"fold{row['fold']}_seed{row['seed']}" == name]
        assert set(events.Tags()["scalars"]) == set(history[0]) - {"fold", "seed", "epoch"}
        for scalar in events.Tags()["scalars"]:
            found = [(event.step, event.value) for event in events.Scalars(scalar)]
            assert found == [(int(r["epoch"]), pytest.approx(float(r[scalar]), rel=1e-6)) for r in rows]
    assert not (train(feats, tmp_path) / "tensorboard").exists()
    path = train(feats, tmp_path, "--tensorboard", "--head", "linear", "--C", "1")  # without epochs
    events = EventAccumulator(str(path / "tensorboard" / "seed42")).Reload()
    [event] = events.Scalars("accuracy")
    assert event.value == pytest.approx(content(path, "metrics")["val"]["accuracy"])


EPOCH_COLUMNS = [
    *("fold", "seed", "epoch", "lr", "train_loss", "train_accuracy", "train_weighted_f1", "train_macro_f1"),
    *("val_loss", "accuracy", "weighted_f1", "macro_f1", *(f"predicted_{name}" for name in CLASSES)),
]


def epochs_of(path: Path) -> list[dict[str, str]]:
    with (path / "history.csv").open() as file:
        return list(csv.DictReader(file))


def shown_epoch(row: dict[str, str], words: str, whose: str = "") -> str:
    """The line that a terminal shows of a row of history.csv."""

    def figures(loss: str, prefix: str = "") -> str:
        of = {name: float(row[prefix + name]) for name in ("accuracy", "weighted_f1", "macro_f1")}
        return (
            f"loss {float(row[loss]):.4f}, accuracy {of['accuracy']:.3f}, weighted F1 {of['weighted_f1']:.3f}, "
            f"macro F1 {of['macro_f1']:.3f}"
        )

    counts = ", ".join(f"{row[f'predicted_{name}']} {name}" for name in CLASSES)
    end = f"; {words}" if words else ""
    told = f"train {figures('train_loss', 'train_')}; validation {figures('val_loss')}; predicted {counts}{end}"
    return f"{whose}epoch {row['epoch']}: {told}"


def test_epochs_are_shown(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["--val-ratio", "0.3", "--ep", "12", "--lr", "0.1", "--patience", "3"]
    capsys.readouterr()
    path = train(feats, tmp_path, *argv, "--verbose")
    out, err = capsys.readouterr()
    history, [member] = epochs_of(path), content(path, "config")["members"]
    assert list(history[0]) == EPOCH_COLUMNS and err == ""
    best, expected = -1.0, []
    for row in history:
        better = float(row["accuracy"]) > best
        best = max(best, float(row["accuracy"]))
        expected.append(shown_epoch(row, "best so far" if better else ""))
    assert [line for line in out.splitlines() if line.startswith("epoch ")] == expected
    assert all(sum(int(row[f"predicted_{name}"]) for name in CLASSES) == 27 for row in history)
    last = len(history)
    assert 1 <= member["best_epoch"] == last - 3 and member["epochs"] == last
    assert f"; best epoch {last - 3} of 12, stopped at {last}\n" in out
    train(feats, tmp_path, *argv)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines == [shown_epoch(history[last - 4], "best"), shown_epoch(history[-1], "last")]


@pytest.mark.parametrize("verbose", [[], ["--verbose"]])
def test_epochs_of_several_trainings_name_theirs(
    verbose: list[str], feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    capsys.readouterr()
    path = train(feats, tmp_path, "--folds", "2", "--seeds", "2", *verbose)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fold ")]
    history = epochs_of(path)
    if verbose:
        expected = [shown_epoch(row, "", f"fold {row['fold']}, seed {row['seed']}, ") for row in history]
        assert sorted(line.removesuffix("; best so far") for line in lines) == sorted(expected)
    else:
        for member in content(path, "config")["members"]:
            [best, last] = [
                next(
                    r for r in history if (r["fold"], r["seed"], r["epoch"]) == (str(member["fold"]), seed, str(epoch))
                )
                for seed in [str(member["train"]["seed"])]
                for epoch in (member["best_epoch"], 3)
            ]
            whose = f"fold {member['fold']}, seed {member['train']['seed']}, "
            assert shown_epoch(best, "best", whose) in lines
            assert (shown_epoch(last, "last", whose) in lines) == (best is not last)


@pytest.mark.slow
def test_epoch_lines_pass_through_the_processes(feats: Path, tmp_path: Path):
    """As on a terminal, with a bar on stderr, whose remains don't end up between the lines."""
    code = (
        "import sys; from modeling import train_head; from modeling.training import workers; workers.LEAST_WORK = 0; "
    )
    code += "workers._cores = lambda: 2; sys.exit(train_head.main(sys.argv[1:]))"
    argv = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), *SHORT, "--folds", "2", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, "--history-batches"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.iterdir()
    lines = sorted(line.removesuffix("; best so far") for line in done.stdout.splitlines() if line.startswith("fold"))
    assert lines == sorted(shown_epoch(r, "", f"fold {r['fold']}, seed {r['seed']}, ") for r in epochs_of(path))
    with (path / "history_batches.csv").open() as file:
        assert [row["fold"] for row in csv.DictReader(file)] == ["1"] * 6 + ["2"] * 6


def test_losses_by_batch_where_they_are_asked_for(feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--seeds", "2", "--history-batches", "--val-ratio", "0.3")
    with (path / "history_batches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["fold", "seed", "epoch", "batch", "train_loss"]
    assert [(r["seed"], r["epoch"], r["batch"]) for r in rows] == [
        (str(seed), str(epoch), str(batch)) for seed in (42, 43) for epoch in (1, 2, 3) for batch in (1, 2)
    ]
    for told in epochs_of(path):
        own = [float(r["train_loss"]) for r in rows if (r["seed"], r["epoch"]) == (told["seed"], told["epoch"])]
        assert float(told["train_loss"]) == pytest.approx((32 * own[0] + 31 * own[1]) / 63, rel=1e-5)
    assert not (train(feats, tmp_path) / "history_batches.csv").exists()
    load_run(path).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "history_batches.csv").read_bytes() == (path / "history_batches.csv").read_bytes()


# -- what there is to know of a result ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "remedy"),
    [("mlp", "raise --lr or --ep"), ("linear", "raise --C"), ("kernel", "lower --ridge")],
)
def test_a_head_that_predicts_one_class_is_no_result(
    head: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    nothing = np.zeros((90, 8), np.float16)
    make_cache(tmp_path / "feats", "clip", changed={"image_feats": nothing, "text_feats": nothing})
    given = ["--ridge", "1", "--gamma", "1"] if head == "kernel" else ["--C", "1"] if head == "linear" else []
    path = train(tmp_path / "feats", tmp_path / "runs", "--head", head, "--val-ratio", "0.3", *given)
    (out, err), figures = capsys.readouterr(), content(path, "metrics")
    _, _, probabilities = read_predictions(path / "predictions_val.csv")
    [only] = {CLASSES[k] for k in probabilities.argmax(1)}
    assert figures["val"]["collapsed"] == only
    assert figures["members"]["collapsed"] == [{"fold": None, "seed": 42, "class": only}]
    assert f"\nval (always {only}) " in out
    note = f"note: this head predicts {only} for every validation row: no result; {remedy}, or give --class-weights"
    assert note in err.splitlines()[-1]


def test_one_collapsed_seed_of_several_is_seen(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = train(feats, tmp_path, "--head", "mlp", "--D", "4", "--lr", "1e-7", "--seeds", "8", "--val-ratio", "0.3")
    (out, err), run = capsys.readouterr(), load_run(path)
    features = load_features(feats, "train", ["clip"], ["clip"])
    rows = features.positions(run.split.val)
    expected = []
    for member in run.members:
        classes = set(member.logits(features, rows).argmax(1).tolist())
        if len(classes) == 1:
            expected.append({"fold": None, "seed": member.config.seed, "class": CLASSES[classes.pop()]})
    figures = content(path, "metrics")
    assert 0 < len(expected) < 8 and figures["members"]["collapsed"] == expected
    assert figures["val"]["collapsed"] is None and f"  each of 8 ({len(expected)} of one class)" in out
    named = "; ".join(f"seed {of['seed']}: {of['class']}" for of in expected)
    assert f"note: {len(expected)} of 8 heads predict one class for every validation row ({named}): no result" in err


def test_rows_leaks_and_cost_are_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    """p0 and p2 share a picture; p4 and p5 another, with two labels; p6 and p7 a text."""
    pictures, texts = np.arange(90) + 1000, np.arange(90) + 1000
    pictures[2], pictures[5], texts[7] = pictures[0], pictures[4], texts[6]
    made, ids = tmp_path / "feats", [f"p{i}" for i in range(90)]
    make_cache(made, "clip", facts={"image_hash": pictures, "text_key": texts})
    (tmp_path / "split.json").write_text(json.dumps({"val": ids[2:5] + ids[60:], "train": ids[:2] + ids[5:60]}))
    path = train(made, tmp_path / "runs", "--split-file", str(tmp_path / "split.json"))
    out, figures, config = capsys.readouterr().out, content(path, "metrics"), content(path, "config")
    tags = dict(zip(ids, make_tags(90), strict=True))
    for part, key in (("train", "training_rows"), ("val", "validation_rows")):
        found = [tags[i] for i in content(path, "split")[part]]
        assert figures[key] == {name: found.count(name) for name in CLASSES}
        counts = ", ".join(f"{name} {found.count(name)}" for name in CLASSES)
        assert f"{len(found)} for {key.removesuffix('_rows')} ({counts})" in out
    nothing = {"across": 0, "across_conflicting": 0, "val_rows": 0, "test_rows": 0}
    leaking = {"across": 2, "across_conflicting": 1, "val_rows": 2, "test_rows": 0}
    assert figures["leaks"] == {
        "pictures": {"groups": 2, "conflicting": 1, **leaking},
        "texts": {"groups": 1, "conflicting": 1, **nothing},
    }
    assert (
        "leaks: no text of a validation or test row is in the training rows; the pictures of 2 validation rows are in "
        "the training rows, too (2 groups across the parts, 1 of them with different labels); 1 of 2 groups with one "
        "picture disagree in label; 1 of 1 groups with one text disagree in label\n"
    ) in out
    cost = config["cost"]
    assert cost["device"] == "cpu" and 0 < cost["seconds"] < 60 and 1e8 < cost["peak_bytes"] < 1e11
    assert re.search(r"\ntraining took \d+\.\d s on cpu, peak memory \d+\.\d\d GB\n", out)
    assert load_run(path).cost == cost


def test_the_size_with_encoders(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "resnet", parameters={"image": 25_000_000})
    make_cache(tmp_path / "feats", "roberta", parameters={"text": 1_250_000})
    sides = ["--vtype", "resnet", "--ttype", "roberta"]
    for ablation, encoders, shown in (("0", 26_250_000, "26.3 M"), ("1", 1_250_000, "1.3 M")):
        path = train(tmp_path / "feats", tmp_path / "runs", *sides, "--ablation", ablation)
        [member] = content(path, "config")["members"]
        assert member["with_encoders"] == encoders + member["parameters"]
        assert f" parameters, with its encoders {shown}; best epoch " in capsys.readouterr().out
    path = train(feats, tmp_path / "runs")  # caches that don't tell
    assert content(path, "config")["members"][0]["with_encoders"] is None
    assert "with its encoders" not in capsys.readouterr().out


# -- splits -----------------------------------------------------------------------------------------------------


def test_the_split_is_the_same_for_every_head_and_pair_of_caches(feats: Path, tmp_path: Path):
    choices = [
        ["--head", "mlp"],
        ["--head", "kernel"],
        ["--vtype", "resnet", "--ttype", "roberta", "vader"],
        ["--vtype", "resnet", "clip", "--ablation", "2"],
        ["--vtype", "--ttype", "vader", "--seed", "7", "--norm", "l2"],
    ]
    paths = [train(feats, tmp_path, *argv) for argv in choices]
    assert len({(path / "split.json").read_bytes() for path in paths}) == 1
    assert len({tuple(read_predictions(path / "predictions_val.csv")[0]) for path in paths}) == 1
    other = train(feats, tmp_path, "--split-seed", "1")
    assert content(other, "split")["val"] != content(paths[0], "split")["val"]


def test_a_cache_with_quarantined_rows_keeps_the_others_in_place(feats: Path, tmp_path: Path):
    whole = content(train(feats, tmp_path / "runs"), "split")
    gone = {whole["train"][3], whole["train"][40], whole["val"][2]}
    make_cache(tmp_path / "feats", "clip", quarantined=[int(i[1:]) for i in gone])
    split = content(train(tmp_path / "feats", tmp_path / "runs"), "split")
    for part in ("train", "val"):
        assert split[part] == [i for i in whole[part] if i not in gone]


def test_folds_predict_every_row_by_a_member_that_has_not_seen_it(feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--folds", "3", "--seeds", "2")
    folds = content(path, "split")["folds"]
    features = load_features(feats, "train", ["clip"], ["clip"])
    assert sorted(i for fold in folds for i in fold["val"]) == sorted(features.ids)
    run = load_run(path)
    assert [(m.fold, m.config.seed) for m in run.members] == [(f, s) for s in (42, 43) for f in (1, 2, 3)] or [
        (m.fold, m.config.seed) for m in run.members
    ] == [(f, s) for f in (1, 2, 3) for s in (42, 43)]
    ids, tags, probabilities = read_predictions(path / "predictions_val.csv")
    assert ids == [i for fold in folds for i in fold["val"]]
    found = dict(zip(ids, probabilities, strict=True))
    for number, fold in enumerate(folds, 1):
        assert not set(fold["train"]) & set(fold["val"])
        rows = features.positions(fold["val"])
        own = [m for m in run.members if m.fold == number]
        mean = np.mean([softmax(m.logits(features, rows), m.temperature) for m in own], axis=0)
        np.testing.assert_allclose([found[i] for i in fold["val"]], mean, atol=1e-5)
    figures = content(path, "metrics")
    check_figures(figures["val"], tags, probabilities)
    assert figures["members"]["count"] == 6 and "3-fold cross-validation" in figures["protocol"]


def test_split_files(feats: Path, tmp_path: Path):
    ids = [f"p{i}" for i in range(90)]
    parts = {"train": ids[:50], "val": ids[50:70], "test": ids[70:84]}
    (tmp_path / "split.json").write_text(json.dumps(parts))
    one = train(feats, tmp_path / "runs", "--split-file", str(tmp_path / "split.json"))
    saved = content(one, "split")
    assert {part: saved[part] for part in parts} == {part: sorted(names) for part, names in parts.items()}
    assert content(one, "metrics")["test"]["n"] == 14
    assert "split from split.json" in content(one, "metrics")["protocol"]
    # A run's own split file gives the same split; so do three lists of ids.
    again = train(feats, tmp_path / "runs", "--split-file", str(one / "split.json"))
    assert (again / "head.safetensors").read_bytes() == (one / "head.safetensors").read_bytes()
    for part, names in parts.items():
        (tmp_path / f"{part}.txt").write_text("\n".join(names) + "\n")
    lists = train(feats, tmp_path / "runs", "--split-file", *(str(tmp_path / f"{part}.txt") for part in parts))
    assert (lists / "predictions_val.csv").read_bytes() == (one / "predictions_val.csv").read_bytes()


def test_classes_are_those_of_the_rows_that_are_split(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    ids = [f"p{i}" for i in range(90)]
    polar = [i for i, tag in zip(ids, make_tags(90), strict=True) if tag != "neutral"]
    (tmp_path / "split.json").write_text(json.dumps({"train": polar[:50], "val": polar[50:]}))
    capsys.readouterr()
    for head in ("linear", "kernel", "fusion"):
        argv = ["--head", head, "--norm", "standard", "--split-file", str(tmp_path / "split.json")]
        path = train(feats, tmp_path / "runs", *argv)
        run, figures = load_run(path), content(path, "metrics")["val"]
        assert run.classes == figures["classes"] == ["negative", "positive"]
        _, tags, probabilities = read_predictions(path / "predictions_val.csv")
        predicted = [run.classes[k] for k in probabilities.argmax(1)]
        assert figures["macro_f1"] == pytest.approx(reference.f1_score(tags, predicted, average="macro"))
    assert "warning" not in capsys.readouterr().err
    # Test rows of another class can't be predicted.
    rest = [i for i in ids if i not in polar[:70]]
    parts = {"train": polar[:50], "val": polar[50:70], "test": rest}
    (tmp_path / "split.json").write_text(json.dumps(parts))
    path = train(feats, tmp_path / "runs", "--split-file", str(tmp_path / "split.json"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "warning: 15 test rows are of classes that no training or validation row has (neutral): left out"
    )
    assert content(path, "metrics")["test"]["n"] == len(rest) - 15 == len(content(path, "split")["test"])


def test_the_split_of_a_run_with_folds_can_be_used_again(feats: Path, tmp_path: Path):
    one = train(feats, tmp_path, "--folds", "3", "--split-seed", "7")
    again = train(feats, tmp_path, "--split-file", str(one / "split.json"))
    for name in ("head.safetensors", "predictions_val.csv"):
        assert (again / name).read_bytes() == (one / name).read_bytes()
    folds = [content(path, "split")["folds"] for path in (one, again)]
    assert [[fold[part] for part in ("train", "val")] for fold in folds[0]] == [
        [fold[part] for part in ("train", "val")] for fold in folds[1]
    ]
    assert content(again, "metrics")["protocol"].startswith("3 folds from split.json")


def test_caches_of_one_side_are_split_as_both_sides_where_the_other_side_is_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    pairs = np.arange(120) // 2 + 1  # p0 and p1 share a picture, p2 and p3, ...; p1 and p2 a text, p7 and p8, ...
    texts = np.arange(120) + 1000
    facts = {"image_hash": pairs, "text_key": np.where(np.arange(120) % 6 == 2, texts - 1, texts)}
    tags = [("positive", "negative")[i // 12 % 2] for i in range(120)]
    for name in ("resnet", "roberta", "vader"):
        make_cache(tmp_path / "feats", name, tags=tags, facts=facts)
    argv = ["--val-ratio", "0.3"]
    both = train(tmp_path / "feats", tmp_path / "runs", "--vtype", "resnet", "--ttype", "roberta", *argv)
    assert "also told" not in capsys.readouterr().out
    for caches in (["--vtype", "--ttype", "vader"], ["--vtype", "--ttype", "roberta", "vader"], ["--vtype", "resnet"]):
        alone = train(tmp_path / "feats", tmp_path / "runs", *caches, *argv)
        told_by = "roberta_train.h5" if "resnet" in caches else "resnet_train.h5"
        assert f"duplicates are also told by {told_by}\n" in capsys.readouterr().out
        assert (alone / "split.json").read_bytes() == (both / "split.json").read_bytes()
    # Not by a cache of other rows, other labels or other texts.
    (tmp_path / "feats" / "resnet_train.h5").unlink()
    alone = train(tmp_path / "feats", tmp_path / "runs", "--vtype", "--ttype", "vader", *argv)
    other_text = {**facts, "text_key": facts["text_key"] + 7}
    for name, changes in (
        ("resnet", {"tags": tags[:100], "facts": {"image_hash": pairs[:100]}}),
        ("resnet", {"tags": tags[::-1], "facts": facts}),
        ("clip", {"tags": tags, "facts": other_text}),
    ):
        path = make_cache(tmp_path / "feats", name, **changes)
        capsys.readouterr()
        again = train(tmp_path / "feats", tmp_path / "runs", "--vtype", "--ttype", "vader", *argv)
        assert "also told" not in capsys.readouterr().out
        assert (again / "split.json").read_bytes() == (alone / "split.json").read_bytes()
        path.unlink()


def test_duplicates_stay_together_unless_told(tmp_path: Path):
    pairs = np.arange(120) // 2 + 1  # p0 and p1 share a picture, p2 and p3, ...
    tags = [("positive", "negative")[i // 2 % 2] for i in range(120)]
    make_cache(tmp_path / "feats", "clip", tags=tags, facts={"image_hash": pairs})

    def torn(path: Path) -> int:
        val = {int(i[1:]) for i in content(path, "split")["val"]}
        return sum((i in val) != (i + 1 in val) for i in range(0, 120, 2))

    argv = ["--val-ratio", "0.25"]
    together, apart = (
        train(tmp_path / "feats", tmp_path / "runs", *argv, "--duplicates", how) for how in ("together", "apart")
    )
    assert torn(together) == 0 and torn(apart) > 5
    assert "duplicates together" in content(together, "metrics")["protocol"]
    assert "duplicates anywhere" in content(apart, "metrics")["protocol"]
    folds = content(train(tmp_path / "feats", tmp_path / "runs", "--folds", "3"), "split")["folds"]
    for fold in folds:
        assert all((f"p{i}" in fold["val"]) == (f"p{i + 1}" in fold["val"]) for i in range(0, 120, 2))


def test_the_features_of_large_folds_do_not_lie_side_by_side(
    feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One at a time where they are large: the same figures, a fraction of the memory."""
    argv = ["--folds", "4", "--head", "fusion", "--seeds", "2"]
    together = train(feats, tmp_path, *argv)
    make, alive, most = Experiment.problem, weakref.WeakSet(), []

    def counted(*args: Any) -> Any:
        made = make(*args)
        alive.add(made[0].inputs.image)
        most.append(len(alive))
        return made

    monkeypatch.setattr(Experiment, "problem", counted)
    monkeypatch.setattr(fitting, "LARGEST_COPY", 0)
    alone = train(feats, tmp_path, *argv)
    assert len(most) >= 4 and max(most) == 1
    for name in ("head.safetensors", "metrics.json", "predictions_val.csv"):
        assert (alone / name).read_bytes() == (together / name).read_bytes()


# -- what is trained --------------------------------------------------------------------------------------------


def test_ablation_reads_one_side_only(feats: Path, tmp_path: Path):
    for ablation, sides, widths in (("1", ([], ["clip", "vader"]), {"text": 12}), ("2", (["clip"], []), {"image": 8})):
        path = train(feats, tmp_path, "--ttype", "clip", "vader", "--ablation", ablation, "--norm", "standard")
        config = content(path, "config")
        assert (config["features"]["image"], config["features"]["text"]) == sides
        assert set(config["features"]["fingerprints"]) == set(sides[0] + sides[1])
        features = load_features(feats, "train", *sides)  # the other side isn't needed to predict
        assert load_run(path).probabilities(features).shape == (90, 3)
        (member,) = config["members"]
        assert {side: member["widths"][side] for side in widths} == widths


def test_one_sided_caches_need_no_ablation(feats: Path, tmp_path: Path):
    text = train(feats, tmp_path, "--vtype", "--ttype", "roberta")
    image = train(feats, tmp_path, "--vtype", "resnet")
    assert [trained_with(path)["sides"] for path in (text, image)] == [["text"], ["image"]]
    assert "_none_roberta_" in text.name and "_resnet_none_" in image.name


def test_a_text_cache_alone_has_no_image_side(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["--feats", str(feats), "--runs", str(tmp_path), *SHORT]
    assert train_head.main([*argv, "--ttype", "roberta"]) == 0
    path = newest_run(tmp_path)
    assert "_none_roberta_" in path.name and trained_with(path)["sides"] == ["text"]
    assert train_head.main(argv) == 0  # without any, CLIP's
    assert "_clip_clip_" in newest_run(tmp_path).name


def test_coattention_on_one_side_needs_tokens_of_that_side_only(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for caches in (
        ["--vtype", "--ttype", "clip"],
        ["--vtype", "--ttype", "clip", "--ablation", "1"],
        ["--vtype", "resnet", "--ttype", "clip", "--ablation", "1"],
        ["--vtype", "clip", "--ttype", "roberta", "--ablation", "2"],
    ):
        assert len(trained_with(train(feats, tmp_path, "--head", "coattention", *caches))["sides"]) == 1
    for caches, side in ((["--vtype", "--ttype", "roberta"], "text"), (["--ttype", "roberta"], "text")):
        error = refused(capsys, feats, tmp_path, "--head", "coattention", *caches)
        assert f"needs {side} tokens" in error and "--tokens" in error


def test_a_cache_whose_name_says_tokens(feats: Path, tmp_path: Path):
    (tmp_path / "clip_tokens_train.h5").write_bytes((feats / "clip_train.h5").read_bytes())
    for head, tokens in (("fusion", False), ("coattention", True)):
        path = train(tmp_path, tmp_path / "runs", "--vtype", "clip_tokens", "--head", head)
        assert content(path, "config")["features"]["tokens"] == tokens


def test_normalisation_and_scale_of_each_cache(feats: Path, tmp_path: Path):
    """scikit-learn's pipeline on the same caches."""
    argv = ["--vtype", "clip", "--ttype", "roberta", "vader", "--head", "linear", "--C", "0.3"]
    argv += ["--norm", "standard", "roberta=l2", "vader=none", "--scale", "vader=3", "clip=0.5"]
    path = train(feats, tmp_path, *argv, "--val-ratio", "0.3")
    run = load_run(path)
    kinds = {"image/clip": "standard", "text/roberta": "l2", "text/vader": "none"}
    assert run.members[0].preprocessing.kinds == kinds

    def matrix(ids: list[str]) -> np.ndarray:
        clip, roberta, vader = (
            read(feats, name, f"{side}_feats", ids)
            for name, side in (("clip", "image"), ("roberta", "text"), ("vader", "text"))
        )
        return np.concatenate([0.5 * scaler.transform(clip), normalize(roberta), 3 * vader], 1)

    scaler = StandardScaler().fit(read(feats, "clip", "image_feats", run.split.train))
    tensors = load_file(path / "head.safetensors")
    np.testing.assert_allclose(tensors["0/norm/image/clip/mean"], scaler.mean_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensors["0/norm/image/clip/std"], scaler.scale_, rtol=1e-5)
    tag_of = dict(zip([f"p{i}" for i in range(90)], make_tags(90), strict=True))
    model = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000)
    model.fit(matrix(run.split.train), [tag_of[i] for i in run.split.train])
    features = load_features(feats, "train", ["clip"], ["roberta", "vader"])
    logits = run.members[0].logits(features, features.positions(run.split.val))
    np.testing.assert_allclose(softmax(logits), model.predict_proba(matrix(run.split.val)), atol=1e-4)


def test_validation_rows_do_not_touch_what_is_learned(feats: Path, tmp_path: Path):
    argv = ["--head", "kernel", "--norm", "standard", "--val-ratio", "0.3"]
    one = train(feats, tmp_path / "runs", *argv)
    held = [int(i[1:]) for i in content(one, "split")["val"]]
    ids = [f"p{i}" for i in range(90)]
    changed = {name: read(feats, "clip", name, ids).astype(np.float16) for name in ("image_feats", "text_feats")}
    for values in changed.values():
        values[held] = 100 - 7 * values[held]
    make_cache(tmp_path / "feats", "clip", changed=changed)
    other = train(tmp_path / "feats", tmp_path / "runs", *argv)
    assert content(one, "split") == content(other, "split")
    assert (one / "head.safetensors").read_bytes() == (other / "head.safetensors").read_bytes()
    assert (one / "predictions_val.csv").read_bytes() != (other / "predictions_val.csv").read_bytes()
    changed["image_feats"][int(content(one, "split")["train"][0][1:])] += 1  # a training row does
    make_cache(tmp_path / "more", "clip", changed=changed)
    third = train(tmp_path / "more", tmp_path / "runs", *argv)
    assert (one / "head.safetensors").read_bytes() != (third / "head.safetensors").read_bytes()


def test_seeds_make_an_ensemble_of_single_trainings(feats: Path, tmp_path: Path):
    path = train(feats, tmp_path, "--seeds", "3", "--seed", "5", "--val-ratio", "0.3")
    assert path.name.endswith("_s5_x3")
    run = load_run(path)
    assert [m.config.seed for m in run.members] == [5, 6, 7]
    alone = load_run(train(feats, tmp_path, "--seed", "6", "--val-ratio", "0.3"))
    features = load_features(feats, "train", ["clip"], ["clip"])
    logits = [m.logits(features) for m in run.members]
    np.testing.assert_allclose(logits[1], alone.members[0].logits(features), atol=1e-4)
    assert np.abs(logits[0] - logits[1]).max() > 0.01
    mean = np.mean([softmax(z, m.temperature) for z, m in zip(logits, run.members, strict=True)], axis=0)
    ids, tags, probabilities = read_predictions(path / "predictions_val.csv")
    np.testing.assert_allclose(probabilities, mean[features.positions(ids)], atol=1e-5)
    members = content(path, "metrics")["members"]
    rows = features.positions(ids)
    right = [np.mean([CLASSES[k] == tag for k, tag in zip(z[rows].argmax(1), tags, strict=True)]) for z in logits]
    assert members["count"] == 3 and members["mean_std"]["accuracy"]["mean"] == pytest.approx(np.mean(right))
    assert members["mean_std"]["accuracy"]["std"] == pytest.approx(np.std(right, ddof=1))
    # A head without randomness is trained once.
    assert len(load_run(train(feats, tmp_path, "--seeds", "3", "--head", "linear")).members) == 1


def test_without_epochs_none_are_shown(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shown = ["--verbose", "--history-batches"]
    run = train(feats, tmp_path, "--head", "linear", "--C", "1", *shown)
    assert "--verbose, --history-batches do nothing for linear" in capsys.readouterr().err
    assert not (run / "history_batches.csv").exists()
    train(feats, tmp_path, "--ep", "2", *shown)
    assert "do nothing" not in capsys.readouterr().out


@pytest.mark.parametrize("name", HEADS)
def test_what_a_head_reads_decides_what_becomes_of_it(
    name: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """... and nothing else: comparing runs that differ in nothing but what isn't read."""
    caches = ["--vtype", "clip"] if HEADS[name].tokens else ["--vtype", "resnet", "--ttype", "clip"]
    # Without --deterministic the number of threads may change, and with it how sums are rounded.
    given = ["--dropout", "0.2", "--gamma", "2", "--C", "2", "--ridge", "2"]
    common = ["--head", name, *caches, "--deterministic", *given]
    base = train(feats, tmp_path, *common)
    idle = [option for option in ("D", "dropout", "C", "ridge", "gamma") if option not in settings_read(name)]
    note = next((line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")), "")
    assert set(re.findall("--([a-z]+)", note, re.IGNORECASE)) >= set(idle) and note.endswith(name if idle else "")
    options = [
        ["--D", "16"],
        ["--dropout", "0.6"],
        ["--C", "0.1"],
        ["--ridge", "0.1"],
        ["--gamma", "0.5"],
        ["--layers", "1"],
        ["--attention-norm", "none"],
        ["--image-positions", "learnable"],
        ["--image-pooling", "last"],
    ]
    options += [["--lr", "0.5"], ["--seed", "3"], ["--label-smoothing", "0.3"], ["--class-weights", "neutral=5"]]
    read = [option for option in options if option[0].lstrip("-").replace("-", "_") in settings_read(name)]
    unread = [word for option in options if option not in read for word in option]
    for option in [*read, unread]:
        other = train(feats, tmp_path, *common, *option)
        same = (base / "head.safetensors").read_bytes() == (other / "head.safetensors").read_bytes()
        assert same == (option is unread), option


def test_class_weights_move_predictions(feats: Path, tmp_path: Path):
    def predicted(*argv: str) -> dict[str, int]:
        path = train(feats, tmp_path, "--head", "linear", "--C", "0.01", "--val-ratio", "0.3", *argv)
        found = read_predictions(path / "predictions_val.csv")[2].argmax(1)
        return {name: int((found == k).sum()) for k, name in enumerate(CLASSES)}

    plain, heavy = predicted(), predicted("--class-weights", "neutral=20,positive=0.1")
    balanced = predicted("--class-weights", "balanced")
    assert heavy["neutral"] > balanced["neutral"] >= plain["neutral"] and heavy["positive"] < plain["positive"]


# -- what can't work --------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, feats: Path, runs: Path, *argv: str) -> str:
    """The one line on stderr that is no note; nothing is left behind."""
    before = sorted(runs.rglob("*")) if runs.exists() else []
    given = ["--vtype", "clip"] if "--vtype" not in argv else []
    capsys.readouterr()
    status = train_head.main([*given, "--feats", str(feats), "--runs", str(runs), *SHORT, *argv])
    lines = capsys.readouterr().err.splitlines(keepends=True)
    [error] = [line for line in lines if not line.startswith("note: ")]
    assert status == 2 and error.startswith("error: "), lines
    assert (sorted(runs.rglob("*")) if runs.exists() else []) == before
    return error


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--D", "0"], "D=0.*1 or more"),
        (["--lr", "0"], "lr 0.*lr > 0"),
        (["--lr=-1e-3"], "expected lr > 0"),
        (["--lr", "nan"], "expected lr > 0"),
        (["--weight-decay", "-1"], "decay >= 0"),
        (["--ep", "0"], "--ep 0: expected 1 or more"),
        (["--bs", "0"], "--bs 0: expected 1 or more"),
        (["--patience", "0"], "--patience 0"),
        (["--dropout", "1"], "dropout 1"),
        (["--label-smoothing", "1"], "label smoothing 1"),
        (["--head", "fusoin"], "unknown head 'fusoin'; did you mean fusion"),
        (["--optimizer", "sgd"], "unknown optimizer 'sgd'; there are adam, adamw"),
        (["--schedule", "step"], "unknown schedule 'step'"),
        (["--monitor", "auc"], "unknown monitor 'auc'"),
        (["--norm", "l3"], "--norm l3: expected one of none, l2, standard"),
        (["--norm", "resnet=l2"], "--norm resnet=l2.*clip"),
        (["--norm", "l2", "standard"], "--norm l2 standard: expected one KIND.*once for each kind"),
        (["--norm", "clip=l2", "clip=none"], "expected one KIND for all caches, and at most one CACHE=KIND for each"),
        (["--scale", "clip=1", "clip=2"], "--scale names clip twice"),
        (["--scale", "clip"], "--scale clip: expected NAME=NUMBER"),
        (["--scale", "clip=nan"], "--scale clip=nan: expected NAME=NUMBER, a finite number above 0"),
        (["--scale", "clip=inf"], "--scale clip=inf: .*finite"),
        (["--scale", "clip=0"], "--scale clip=0: .*above 0"),
        (["--scale", "vader=2"], "--scale names vader"),
        (["--class-weights", "happy=2"], "'happy' is no class .there are negative, neutral, positive"),
        (["--class-weights", "positive=much"], "'much' of positive is no number"),
        (["--class-weights", "positive=0"], "above 0"),
        (["--val-ratio", "0.01"], "val split.*too small to hold 3 classes"),
        (["--val-ratio", "1.5"], "val ratio 1.5"),
        (["--folds", "3", "--val-ratio", "0.1"], "--folds leaves no use for --val-ratio: .*give one or the other"),
        (
            ["--folds", "3", "--test-ratio", "0.1", "--recipe", "A"],
            "--folds leaves no use for --test-ratio: ",
        ),
        (
            ["--split-file", "x.json", "--folds", "3", "--split-seed", "1"],
            "--split-file leaves no use for --folds, --split-seed: ",
        ),
        (["--split-file", "x.json", "--val-ratio", "0.2"], "--split-file leaves no use for --val-ratio"),
        (["--folds", "1"], "at least 2"),
        (["--folds", "40"], "too rare.*fewer --folds"),
        (["--split-file", "nowhere.json"], "can't read the split file nowhere.json"),
        (["--lr", "1e30"], "loss of fusion became (nan|inf).*smaller --lr"),
        (["--device", "abacus"], "device 'abacus' can't be used"),
        (["--vtype", "clip", "clip"], "names clip twice"),
        (["--vtype", "roberta"], "roberta_train.h5 has no image side.*clip, resnet"),
        (["--vtype", "--ttype"], "no cache was named"),
        (["--vtype", "resnet", "--ablation", "1"], "is to read text, and the caches give image: nothing is left"),
        (["--vtype", "resnet", "--head", "coattention"], "needs image tokens.*--tokens"),
        (["--vtype", "clipp"], "no cache .*clipp_train.h5.*Did you mean clip"),
        (["--head", "linear", "--C", "0"], "--C 0: expected a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit(
    argv: list[str], told: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert re.search(told, refused(capsys, feats, tmp_path, *argv))


def test_numbers_that_are_none_end_with_status_2(feats: Path, capsys: pytest.CaptureFixture):
    for argv in (
        ["--D", "many"],
        ["--folds", "0"],
        ["--seeds", "-1"],
        ["--ablation", "3"],
        ["--recipe", "F"],
        ["--hea"],
    ):
        with pytest.raises(SystemExit) as ended:
            train_head.main(["--feats", str(feats), *argv])
        assert ended.value.code == 2 and argv[0] in capsys.readouterr().err


def test_a_missing_cache_names_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert train_head.main(["--vtype", "clip", "--D", "256"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1
    assert "no cache saved/feats/clip_train.h5; make it with: python feats/clip_extract_feats.py (" in out.err
    assert not list(tmp_path.iterdir())


def test_data_that_do_not_fit(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    runs = tmp_path / "runs"
    make_cache(tmp_path / "one", "clip", tags=["happy"] * 30)
    assert "all 30 rows are 'happy'" in refused(capsys, tmp_path / "one", runs)
    make_cache(tmp_path / "none", "clip", tags=[""] * 30)
    assert "none of the rows has a label" in refused(capsys, tmp_path / "none", runs)
    values = np.ones((90, 8), np.float16)
    values[[4, 60], 2] = np.nan, np.inf
    make_cache(tmp_path / "nan", "clip", changed={"image_feats": values})
    assert "image_feats holds NaN or infinite values (2 rows: p4, p60)" in refused(capsys, tmp_path / "nan", runs)
    make_cache(tmp_path / "two", "clip")
    make_cache(tmp_path / "two", "roberta", 60)
    error = refused(capsys, tmp_path / "two", runs, "--ttype", "roberta")
    assert "clip_train.h5 and roberta_train.h5 are of different data: 90 and 60 rows" in error
    make_cache(tmp_path / "two", "resnet", facts={"image_hash": np.arange(90) + 5})
    assert "made from different pictures" in refused(capsys, tmp_path / "two", runs, "--vtype", "clip", "resnet")
    ids = [f"p{i}" for i in range(90)]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:70], "val": ids[70:]}))
    make_cache(tmp_path / "gone", "clip", quarantined=range(70, 90))
    error = refused(capsys, tmp_path / "gone", runs, "--split-file", str(tmp_path / "split.json"))
    assert "every validation row was left out" in error and "quarantine" in error
    path = make_cache(tmp_path / "torn", "clip")
    path.write_bytes(path.read_bytes()[:-4000])
    assert "clip_train.h5" in refused(capsys, tmp_path / "torn", runs)


def test_classes_too_rare_for_inner_folds(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    ids, tags = [f"p{i}" for i in range(90)], make_tags(90)
    tags[40] = tags[60] = "rare"
    make_cache(tmp_path / "feats", "clip", tags=tags)
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:60], "val": ids[60:]}))
    argv = ["--split-file", str(tmp_path / "split.json")]
    for head in ("linear", "kernel"):
        error = refused(capsys, tmp_path / "feats", tmp_path / "runs", "--head", head, *argv)
        assert "class 'rare' has 1 training row, expected at least 2 that are no duplicates" in error
        assert "--val-ratio" not in error and "--folds" not in error
    train(tmp_path / "feats", tmp_path / "runs", "--head", "fusion", *argv)  # needs no inner folds
    # Two rows of one text are one; two that are no duplicates will do.
    tags[41] = "rare"
    facts = {"text_key": np.where(np.isin(np.arange(90), (40, 41)), 5, np.arange(90) + 1000)}
    make_cache(tmp_path / "same", "clip", tags=tags, facts=facts)
    error = refused(capsys, tmp_path / "same", tmp_path / "runs", "--head", "linear", *argv)
    assert "class 'rare' has 2 training rows, expected at least 2 that are no duplicates" in error
    make_cache(tmp_path / "two", "clip", tags=tags)
    train(tmp_path / "two", tmp_path / "runs", "--head", "linear", *argv)
    # A class whose training rows are all in quarantine.
    make_cache(tmp_path / "gone", "clip", tags=tags, quarantined=[40, 41])
    error = refused(capsys, tmp_path / "gone", tmp_path / "runs", "--head", "kernel", *argv)
    assert "class 'rare' has no training row, and kernel can't learn it" in error and "quarantine" in error


def test_a_runs_folder_that_cannot_be_written(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("kept")
    for runs in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "give another folder for --runs" in refused(capsys, feats, runs)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("in_foreground")
def test_interrupted_training_leaves_nothing(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    on_the_next = []

    def ctrl_c(*args: Any, **kwargs: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            on_the_next.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(run_folder, "save_run", ctrl_c)
    assert train_head.main(["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), *SHORT]) == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was saved\n") and not list(tmp_path.iterdir())
    assert on_the_next == [signal.SIG_DFL]  # an impatient second Ctrl-C ends the process where it is
