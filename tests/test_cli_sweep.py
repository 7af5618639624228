"""sweep_heads.py as a user runs it: grids, going on after an interruption, comparison tables, the automatic search."""

import csv
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import caches
import h5py
import numpy as np
import pytest
import sklearn.metrics as reference
from caches import CLASSES, make_cache, make_tags
from conftest import ENVIRONMENT, ROOT, content, trained_with
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from scipy.stats import beta

from feats.errors import UsageError
from feats.store import FeatureStore
from feats.strings import Labels
from modeling import sweep_heads, train_head
from modeling.command_line.options import experiment_settings
from modeling.command_line.training import grid_from
from modeling.experiments import fitting
from modeling.experiments.experiment import load_experiment
from modeling.experiments.fitting import train_all
from modeling.features.loading import load_features
from modeling.heads.config import ABLATIONS
from modeling.heads.registry import HEADS
from modeling.runs.folder import load_run, read_predictions
from modeling.runs.listing import newest_run
from modeling.search import auto, sweep as sweep_module
from modeling.search.sweep import best_run
from modeling.training import closed_form

SHORT = ["--ep", "2", "--bs", "32", "--val-ratio", "0.3"]
GRID = ["--head", "fusion", "mlp", "--D", "4", "8", "--lr", "1e-3", "1e-2", "--seeds", "2", *SHORT]


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip")
    make_cache(folder, "vader")
    return folder


def sweep(feats: Path, runs: Path, *argv: str) -> int:
    given = ["--vtype", "clip"] if "--vtype" not in argv else []
    return sweep_heads.main([*given, "--feats", str(feats), "--runs", str(runs), *argv])


@pytest.fixture(scope="module")
def swept(feats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of GRID."""
    runs = tmp_path_factory.mktemp("runs")
    assert sweep(feats, runs, *GRID) == 0
    return runs / "sweep"


def runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("[!.]*/config.json"))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*")}


# -- grids ------------------------------------------------------------------------------------------------------


def test_every_point_of_the_grid_is_trained_once(swept: Path):
    points = [(s["head"], s["D"], s["lr"], s["seed"]) for s in map(trained_with, runs_in(swept))]
    wanted = [(h, D, lr, s) for h in ("fusion", "mlp") for D in (4, 8) for lr in (1e-3, 1e-2) for s in (42, 43)]
    assert sorted(points) == sorted(wanted)
    assert not [path for path in swept.iterdir() if path.name.startswith(".")]


def test_finished_configurations_are_not_trained_again(feats: Path, swept: Path, capsys: pytest.CaptureFixture):
    before, tables = times(swept), [(swept / name).read_bytes() for name in ("table.csv", "table.md")]
    capsys.readouterr()
    assert sweep(feats, swept.parent, *GRID) == 0
    out = capsys.readouterr().out
    assert "16 trainings, 16 of them finished before" in out and f"16 runs, table.csv and table.md -> {swept}" in out
    assert times(swept) == before
    assert [(swept / name).read_bytes() for name in ("table.csv", "table.md")] == tables


def test_class_weights_stand_in_the_tables_as_they_are_typed(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    chosen = ["none", "neutral=2,positive=0.5"]
    assert sweep(feats, tmp_path, "--D", "4", "--class-weights", *chosen, *SHORT) == 0
    assert {row["class_weights"] for row in table(tmp_path / "sweep")[:-1]} == set(chosen)
    assert " neutral=2,positive=0.5 " in (tmp_path / "sweep" / "table.md").read_text(encoding="utf-8")


def test_a_larger_grid_trains_what_is_new(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    sweep(feats, tmp_path, "--head", "fusion", "--D", "4", "4", *SHORT)  # twice the same is once
    before = times(tmp_path / "sweep")
    sweep(feats, tmp_path, "--head", "fusion", "linear", "--D", "4", "--seeds", "3", "--C", "0.1", *SHORT)
    out = capsys.readouterr().out
    assert "1 trainings, 0 of them finished before" in out
    assert "4 trainings, 1 of them" in out  # fusion doesn't read --C; linear has no seeds
    sweep(feats, tmp_path, "--head", "fusion", "linear", "--D", "4", "--seeds", "2", "--C", "0.1", *SHORT)
    assert "3 trainings, 3 of them finished before" in capsys.readouterr().out
    sweep(feats, tmp_path, "--head", "fusion", "--D", "4", "--seeds", "2", *SHORT)
    assert "2 trainings, 2 of them finished before" in capsys.readouterr().out
    assert before.items() <= times(tmp_path / "sweep").items()


def test_a_head_is_trained_once_whatever_varies_that_it_does_not_read(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    grid = ["--head", "linear", "fusion", "late_512", "kernel", "--D", "4", "8", "--lr", "1e-3", "1e-2"]
    grid += ["--C", "0.1", "--ridge", "0.1", "--gamma", "1", "--seeds", "2", *SHORT]
    assert sweep(feats, tmp_path, *grid, "--monitor", "macro_f1") == 0
    out, err = capsys.readouterr()
    assert "14 trainings, 0 of them" in out and "note:" not in err  # fusion 8, late_512 4, linear and kernel 1 each
    assert len(runs_in(tmp_path / "sweep")) == 14
    rows = table(tmp_path / "sweep")[:-1]
    assert [float(r["macro_f1"]) for r in rows] == sorted((float(r["macro_f1"]) for r in rows), reverse=True)
    cells = {(r["head"], r["D"], r["lr"], r["bs"], r["C"], r["ridge"], r["gamma"], r["seeds"]) for r in rows}
    assert cells == {
        ("linear", "", "", "", "0.1", "", "", "1"),
        ("kernel", "", "", "", "", "0.1", "1.0", "1"),
        *(("fusion", D, lr, "32", "", "", "", "2") for D in "48" for lr in ("0.001", "0.01")),
        *(("late_512", "", lr, "32", "", "", "", "2") for lr in ("0.001", "0.01")),
    }
    # Where D and learning rate are compared stand the heads that have one.
    by_rate = out.split("by D and learning rate, macro_f1\n")[1].split("\n\n")[0].splitlines()[2:]
    assert sorted(line.split()[0] for line in by_rate) == ["fusion", "fusion", "late_512"]
    assert not any("_D" in r["run"] or "_lr" in r["run"] for r in rows if r["head"] in ("linear", "kernel"))
    # Another value of what isn't read is no new training; the other way round it is.
    assert sweep(feats, tmp_path, "--head", "linear", "--D", "16", "--C", "0.1", *SHORT) == 0
    out, err = capsys.readouterr()
    assert "1 trainings, 1 of them finished before" in out and "note: --D, --ep, --bs do nothing for linear" in err
    assert sweep(feats, tmp_path, "--head", "linear", "--D", "16", "--C", "0.2", *SHORT) == 0
    assert "1 trainings, 0 of them finished before" in capsys.readouterr().out


def test_the_ids_are_hashed_once_for_all_configurations(feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hashed = []

    def sha256(data: bytes) -> Any:
        hashed.append(data)
        return hashlib.sha256(data)

    monkeypatch.setattr(sweep_module, "hashlib", SimpleNamespace(sha256=sha256))
    argv = ["--head", "fusion", "--D", "4", "5", "6", "7", "--ep", "1", "--val-ratio", "0.3"]
    assert sweep(feats, tmp_path, *argv) == 0
    assert sum(b'"p17"' in data for data in hashed) == 1 and len(hashed) >= 5


@pytest.mark.parametrize("other", [["--class-weights", "balanced"], ["--dropout", "0.2"]], ids=" ".join)
def test_what_decides_a_training_is_in_its_name(
    other: list[str], feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = ["--head", "fusion", "--D", "4", *SHORT]
    sweep(feats, tmp_path, *base), capsys.readouterr()
    assert sweep(feats, tmp_path, *base, *other) == 0
    assert "1 trainings, 0 of them finished before" in capsys.readouterr().out
    assert len(runs_in(tmp_path / "sweep")) == 2


def refused_as_another(capsys: pytest.CaptureFixture, status: int) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and "holds a sweep on other features, normalisation, rows or labels (" in line
    assert line.endswith("they don't belong into one table; give another --name")


@pytest.mark.parametrize(
    "other",
    [
        ["--split-seed", "1"],
        ["--norm", "l2"],
        ["--scale", "clip=2"],
        ["--vtype", "clip", "--ttype", "vader"],
        ["--duplicates", "apart", "--split-seed", "2"],
    ],
    ids=" ".join,
)
def test_other_features_or_rows_begin_another_sweep(
    other: list[str], feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = ["--head", "fusion", "--D", "4", *SHORT]
    sweep(feats, tmp_path, *base), capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    refused_as_another(capsys, sweep(feats, tmp_path, *base, *other))
    assert before == {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    assert sweep(feats, tmp_path, *base, *other, "--name", "another") == 0
    assert "1 trainings, 0 of them finished before" in capsys.readouterr().out


def test_corrected_data_are_trained_on_anew(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The same ids, split and encoder; labels corrected, or pictures and texts encoded again."""
    ids = [f"p{i}" for i in range(90)]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:60], "val": ids[60:]}))
    command = ["--head", "fusion", "--D", "4", "--ep", "2", "--split-file", str(tmp_path / "split.json")]
    path = make_cache(tmp_path / "feats", "clip")
    sweep(tmp_path / "feats", tmp_path, *command)
    path.touch()
    capsys.readouterr()
    sweep(tmp_path / "feats", tmp_path, *command)
    assert "1 of them finished before" in capsys.readouterr().out
    tags = make_tags(90)
    tags[60] = "neutral"
    with FeatureStore.append(path) as store:
        assert store.update_tags(tags) == 1
    refused_as_another(capsys, sweep(tmp_path / "feats", tmp_path, *command))
    assert sweep(tmp_path / "feats", tmp_path, *command, "--name", "corrected") == 0
    path.unlink()
    make_cache(tmp_path / "feats", "clip", tags=tags, seed=1, facts={"image_hash": np.arange(90) + 5000})
    capsys.readouterr()
    refused_as_another(capsys, sweep(tmp_path / "feats", tmp_path, *command, "--name", "corrected"))


def test_a_second_sweep_of_a_name_adds_to_its_table(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    first = ["--head", "fusion", "mlp", "--D", "4", *SHORT]
    second = ["--head", "mlp", "late", "--D", "4", "8", *SHORT]
    assert sweep(feats, tmp_path, *first) == 0
    before = table(tmp_path / "sweep")
    capsys.readouterr()
    assert sweep(feats, tmp_path, *second) == 0
    out = capsys.readouterr().out
    merged = table(tmp_path / "sweep")
    assert "3 trainings, 1 of them finished before" in out  # late reads no D
    assert "4 runs (1 of earlier sweeps), table.csv" in out
    assert sorted((row["head"], row["D"]) for row in merged[:-1]) == [
        ("fusion", "4"),
        ("late", ""),
        ("mlp", "4"),
        ("mlp", "8"),
    ]
    figures = {row["run"]: (row["accuracy"], row["macro_f1"], row["low"], row["high"]) for row in merged[:-1]}
    for row in before[:-1]:
        assert figures[row["run"]] == (row["accuracy"], row["macro_f1"], row["low"], row["high"])
    accuracies = [float(row["accuracy"]) for row in merged[:-1]]
    assert accuracies == sorted(accuracies, reverse=True) and best_run(tmp_path / "sweep").name == merged[0]["run"]
    # The same is found in the other order, and after everything again.
    assert sweep(feats, tmp_path / "turned", *second) == 0 and sweep(feats, tmp_path / "turned", *first) == 0
    turned = table(tmp_path / "turned" / "sweep")
    assert {(row["run"], row["accuracy"], row["seeds"]) for row in turned} == {
        (row["run"], row["accuracy"], row["seeds"]) for row in merged
    }


def test_what_diverged_stays_left_out_of_a_merged_table(
    feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One seed of two diverges: the other, saved, would flatter its configuration."""
    real = train_all

    def failing(configs, experiment, progress, failed, *rest):
        for k, outcomes in real(configs, experiment, progress, failed, *rest):
            if configs[k].head.head == "mlp" and configs[k].seed == 43:
                failed[k] = "the loss of mlp isn't finite"
                continue
            yield k, outcomes

    monkeypatch.setattr(fitting, "train_all", failing)
    assert sweep(feats, tmp_path, "--head", "fusion", "mlp", "--D", "4", "--seeds", "2", *SHORT) == 0
    assert {row["head"] for row in table(tmp_path / "sweep")[:-1]} == {"fusion"}
    monkeypatch.undo()
    assert sweep(feats, tmp_path, "--head", "late", *SHORT) == 0
    assert {row["head"] for row in table(tmp_path / "sweep")[:-1]} == {"fusion", "late"}
    assert "Left out for diverging (1 of 3)" in (tmp_path / "sweep" / "table.md").read_text()
    assert sweep(feats, tmp_path, "--head", "mlp", "--D", "4", "--seeds", "2", *SHORT) == 0  # it doesn't any more
    assert {row["head"] for row in table(tmp_path / "sweep")[:-1]} == {"fusion", "late", "mlp"}
    assert json.loads((tmp_path / "sweep" / "diverged.json").read_text()) == []


def test_a_run_of_a_sweep_is_that_of_train_head(feats: Path, swept: Path, tmp_path: Path):
    features = load_features(feats, "train", ["clip"], ["clip"])
    for path in runs_in(swept)[::3]:
        s = trained_with(path)
        argv = ["--head", s["head"], "--D", str(s["D"]), "--lr", str(s["lr"]), "--seed", str(s["seed"]), *SHORT]
        argv += ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path)]
        assert train_head.main(argv) == 0
        one, other = load_run(path), load_run(newest_run(tmp_path))
        assert one.members[0].config == other.members[0].config and one.split == other.split
        np.testing.assert_allclose(one.members[0].logits(features), other.members[0].logits(features), atol=1e-4)
        assert content(path, "metrics")["val"]["accuracy"] == content(other.path, "metrics")["val"]["accuracy"]


# -- interruptions ----------------------------------------------------------------------------------------------

COUNT = 14
LONG = ["--head", "fusion", "--D", *map(str, range(4, 4 + COUNT)), "--ep", "150", "--bs", "16", "--val-ratio", "0.3"]


@pytest.fixture(scope="module")
def uninterrupted(feats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert sweep(feats, runs, *LONG) == 0
    return runs / "sweep"


def rounded(text: str) -> str:
    """Numbers to six places."""
    return re.sub(r"\d+\.\d{7,}", lambda number: f"{float(number[0]):.6f}", text)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
@pytest.mark.usefixtures("in_foreground")
def test_an_interrupted_sweep_goes_on(
    how: signal.Signals, feats: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "sweep"
    script = [sys.executable, str(ROOT / "modeling" / "sweep_heads.py"), "--vtype", "clip"]
    command = [*script, "--feats", str(feats), "--runs", str(tmp_path), *LONG]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        limit = time.monotonic() + 60
        while len(runs_in(folder)) < 2 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(how)
        error = process.stderr.read().decode()
    done = len(runs_in(folder))
    assert 2 <= done < COUNT, (process.returncode, error)  # it was in the middle
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in error
        assert error.endswith("interrupted: what is finished is kept, run the same command to go on\n")
    else:
        assert process.returncode == -signal.SIGKILL
    before = times(folder)
    with pytest.raises(UsageError, match="no finished sweep in .*sweep_heads.py"):
        best_run(folder)
    assert sweep(feats, tmp_path, *LONG) == 0
    assert f"{COUNT} trainings, {done} of them finished before" in capsys.readouterr().out
    finished = {path: at for path, at in before.items() if "writing" not in path}
    assert finished.items() <= times(folder).items() and len(runs_in(folder)) == COUNT
    # The rest is stacked otherwise than the whole was, which rounds otherwise.
    for name in ("table.csv", "table.md"):
        assert rounded((folder / name).read_text()) == rounded((uninterrupted / name).read_text())


def test_ids_and_labels_that_hold_line_ends(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = make_cache(tmp_path / "feats", "clip", tags=["a\rb", "c", "\n,d"] * 20)
    with h5py.File(path, "r+") as file:
        file["id"][:] = [f"\r{i:02}".encode() for i in range(60)]
    command = ["--head", "fusion", "mlp", "--D", "4", *SHORT]
    for done in (0, 2):
        assert sweep(tmp_path / "feats", tmp_path, *command) == 0, capsys.readouterr().err
        assert f"2 trainings, {done} of them finished before" in capsys.readouterr().out
    for path in runs_in(tmp_path / "sweep"):
        found, tags, probabilities = read_predictions(path / "predictions_val.csv")
        assert found == content(path, "split")["val"] and len(found) == len(tags) == len(probabilities)
        assert set(tags) == {"a\rb", "c", "\n,d"}
    assert best_run(tmp_path / "sweep") in runs_in(tmp_path / "sweep")


def test_half_a_run_is_trained_again(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["--head", "fusion", "mlp", "--D", "4", *SHORT]
    sweep(feats, tmp_path, *command)
    one, other = runs_in(tmp_path / "sweep")
    (one / "predictions_val.csv").unlink()
    (other / "config.json").write_text("{")
    capsys.readouterr()
    assert sweep(feats, tmp_path, *command) == 0
    assert "2 trainings, 0 of them finished before" in capsys.readouterr().out
    assert runs_in(tmp_path / "sweep") == [one, other] and load_run(one) and load_run(other)


# -- tables -----------------------------------------------------------------------------------------------------


def rows_right(folder: Path, row: dict[str, str]) -> np.ndarray:
    """Whether each run of a table's row gets each validation row right, (seeds, n), from the runs themselves."""
    right = []
    for path in runs_in(folder):
        s = trained_with(path)
        if (s["head"], s["D"], s["lr"]) == (row["head"], int(row["D"]), float(row["lr"])):
            with (path / "predictions_val.csv").open() as file:
                right.append([r["pred"] == r["tag"] for r in csv.DictReader(file)])
    return np.array(right, np.float64)


def sweep_predictions(folder: Path, row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and what each seed of a table's row predicts (seeds, n)."""
    runs = [path for path in runs_in(folder) if trained_with(path)["head"] == row["head"]]
    of_seeds = [read_predictions(path / "predictions_val.csv") for path in runs]
    return np.array([CLASSES.index(tag) for tag in of_seeds[0][1]]), np.array([p.argmax(1) for _, _, p in of_seeds])


def numpy_bootstrap(x: np.ndarray, resamples: int = 20_000) -> tuple[np.ndarray, float]:
    """Percentile interval of the mean, and twice the share of resampled means on the other side of 0."""
    drawn = np.concatenate(
        [x[np.random.default_rng(k).integers(0, len(x), (2000, len(x)))].mean(1) for k in range(resamples // 2000)]
    )
    return np.percentile(drawn, [2.5, 97.5]), min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))


def test_the_table_says_what_the_runs_say(swept: Path):
    *rows, always = table(swept)
    assert len(rows) == 8 and [float(r["accuracy"]) for r in rows] == sorted(float(r["accuracy"]) for r in rows)[::-1]
    best = rows_right(swept, rows[0])
    for row in rows:
        right = rows_right(swept, row)
        assert right.shape == (2, 27) and row["seeds"] == "2"
        assert float(row["accuracy"]) == pytest.approx(right.mean())
        assert float(row["±"]) == pytest.approx(np.std(right.mean(1), ddof=1), abs=1e-12)
        interval, _ = numpy_bootstrap(right.mean(0))
        np.testing.assert_allclose([float(row["low"]), float(row["high"])], interval, atol=0.025)
        assert row["95 %"] == f"{float(row['low']):.3f}-{float(row['high']):.3f}"
        if row is rows[0]:
            assert row["to best"] == row["p"] == ""
        else:
            difference = right.mean(0) - best.mean(0)
            assert float(row["to best"]) == pytest.approx(difference.mean(), abs=1e-12)
            assert float(row["p"]) == pytest.approx(numpy_bootstrap(difference)[1], abs=0.04)
        first = swept / row["run"]
        assert trained_with(first)["seed"] == 42
        assert int(row["parameters"]) == sum(
            t.numel() for name, t in load_file(first / "head.safetensors").items() if "running" not in name
        )
    f1 = []
    for path in runs_in(swept):
        s = trained_with(path)
        if (s["head"], s["D"], s["lr"]) == (rows[0]["head"], int(rows[0]["D"]), float(rows[0]["lr"])):
            _, tags, probabilities = read_predictions(path / "predictions_val.csv")
            predicted = [CLASSES[k] for k in probabilities.argmax(1)]
            f1.append([reference.f1_score(tags, predicted, average=a, zero_division=0) for a in ("macro", "weighted")])
    assert (float(rows[0]["macro_f1"]), float(rows[0]["weighted_f1"])) == pytest.approx(tuple(np.mean(f1, 0)))
    assert always["head"] == "always positive" and float(always["accuracy"]) == pytest.approx(14 / 27)


def test_the_ranked_figure_is_the_compared_one(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Interval, difference, spread and p of the macro F1 where that ranks, against drawing rows and asking scikit-learn."""
    argv = ["--head", "mlp", "late", "--D", "4", "--lr", "3e-3", "--ep", "12", "--seeds", "3", "--bs", "32"]
    assert sweep(feats, tmp_path, *argv, "--val-ratio", "0.4", "--monitor", "macro_f1") == 0
    out = capsys.readouterr().out
    assert "Of the macro_f1: ± is over seeds" in out and "also chose their best epoch on these rows" in out
    first, second, _ = table(tmp_path / "sweep")
    labels, _ = sweep_predictions(tmp_path / "sweep", first)
    predictions, drawn = [sweep_predictions(tmp_path / "sweep", row)[1] for row in (first, second)], [[], []]

    def f1(rows: Any, of_seeds: np.ndarray) -> list[float]:
        return [
            reference.f1_score(labels[rows], p[rows], average="macro", labels=[0, 1, 2], zero_division=0)
            for p in of_seeds
        ]

    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = rng.integers(0, len(labels), len(labels))
        for found, of_seeds in zip(drawn, predictions, strict=True):
            found.append(np.mean(f1(rows, of_seeds)))
    for row, found, of_seeds in zip((first, second), drawn, predictions, strict=True):
        assert float(row["macro_f1"]) == pytest.approx(np.mean(f1(slice(None), of_seeds)))
        assert float(row["±"]) == pytest.approx(np.std(f1(slice(None), of_seeds), ddof=1))
        np.testing.assert_allclose(
            [float(row["low"]), float(row["high"])], np.percentile(found, [2.5, 97.5]), atol=0.05
        )
    difference = np.array(drawn[1]) - drawn[0]
    assert float(second["to best"]) == pytest.approx(float(second["macro_f1"]) - float(first["macro_f1"]))
    expected = min(1, 2 * min((difference <= 0).mean(), (difference >= 0).mean()))
    assert float(second["p"]) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("argv", "figure"),
    [
        (["--recipe", "own", "--head", "concat", "fusion", "late_512", "linear"], "accuracy"),
        (["--recipe", "own", "--head", "late_512", "concat"], "accuracy"),
        (["--recipe", "own", "--head", "concat", "fusion", "--monitor", "macro_f1"], "macro_f1"),
        (["--recipe", "A", "--head", "linear", "concat"], "weighted_f1"),
        (["--head", "concat", "fusion", "--monitor", "loss"], "accuracy"),
        (["--head", "concat", "fusion", "--monitor", "weighted_f1", "accuracy"], "weighted_f1"),
        (["--head", "concat", "fusion"], "accuracy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_figure_ranks_whichever_head_stands_first(
    argv: list[str], figure: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    split = [] if "A" in argv else ["--val-ratio", "0.3"]
    assert sweep(feats, tmp_path, *argv, "--C", "0.1", "--D", "4", "--ep", "2", *split) == 0
    out, rows = capsys.readouterr().out, table(tmp_path / "sweep")[:-1]
    found = [float(row[figure]) for row in rows]
    assert found == sorted(found, reverse=True)
    named = re.findall(r"each at its best (\w+)|Of the (\w+): ±|best by validation (\w+):", out)
    assert [name for names in named for name in names if name] == [figure] * 3
    for row in rows[1:]:
        assert float(row["to best"]) == pytest.approx(float(row[figure]) - found[0], abs=1e-12)
    assert float(rows[0]["low"]) <= found[0] <= float(rows[0]["high"])


def test_all_right_is_not_sure_to_be_right(tmp_path: Path):
    """What 27 of 27 right, of several seeds even, can tell: Jeffreys's interval."""
    told = np.eye(3, 8)[[CLASSES.index(tag) for tag in make_tags(90)]].astype(np.float16)
    make_cache(tmp_path / "feats", "clip", changed={"image_feats": told, "text_feats": told})
    argv = ["--head", "linear", "mlp", "--C", "1", "--ep", "30", "--lr", "1e-1", "--seeds", "2"]
    assert sweep(tmp_path / "feats", tmp_path, *argv, "--val-ratio", "0.3") == 0
    low, _ = beta(27.5, 0.5).ppf([0.025, 0.975])
    for row in table(tmp_path / "sweep")[:-1]:
        assert row["accuracy"] == row["high"] == "1.0" and float(row["low"]) == pytest.approx(low, abs=0.02)
        interval = content(tmp_path / "sweep" / row["run"], "metrics")["val"]["interval"]
        assert interval["accuracy"] == [pytest.approx(low, abs=0.02), 1] and interval["macro_f1"][0] < 0.95


def test_heads_without_epochs_choose_none(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sweep(feats, tmp_path, "--head", "linear", "--C", "0.1", "1", "--val-ratio", "0.3") == 0
    assert "best epoch" not in capsys.readouterr().out


def test_the_markdown_holds_the_same_tables(swept: Path):
    text = (swept / "table.md").read_text(encoding="utf-8")
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    parsed = []
    for header, rule, *lines in blocks:
        assert set(rule) <= set("|-: ")
        names = [cell.strip() for cell in header.strip("|").split("|")]
        parsed.append([dict(zip(names, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines])
    rows = table(swept)
    assert len(parsed[0]) == len(rows) == 9 and len(parsed[1]) == 8  # the majority class isn't trained
    for shown, row in zip(parsed[1], rows[:-1], strict=True):
        assert (shown["best_epoch"], shown["epochs"]) == (row["best_epoch"], row["epochs"])
        assert shown["weighted_precision"] == f"{float(row['weighted_precision']):.3f}"
        assert shown["weighted_recall"] == f"{float(row['accuracy']):.3f}"  # which it is
    for shown, row in zip(parsed[0], rows, strict=True):
        assert shown["head"] == row["head"] and shown["accuracy"] == f"{float(row['accuracy']):.3f}"
        assert {"D", "lr"} <= set(shown) and "bs" not in shown  # what varies
    titles = re.findall("^### (.*)", text, re.MULTILINE)
    assert titles == ["by head, each at its best accuracy", "by D and learning rate, accuracy"]
    by_head, by_rate = parsed[2:]
    for line in by_head:
        assert line["accuracy"] == next(f"{float(r['accuracy']):.3f}" for r in rows if r["head"] == line["head"])
    accuracy = {(r["head"], r["D"], f"lr {r['lr']}"): f"{float(r['accuracy']):.3f}" for r in rows}
    assert len(by_rate) == 4
    for line in by_rate:
        for rate in ("lr 0.001", "lr 0.01"):
            assert line[rate].split()[0] == accuracy[line["head"], line["D"], rate]


def test_a_gain_needs_both_single_sides(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sweep(feats, tmp_path, "--head", "linear", "--C", "0.1", "1", "--ablation", "0", "1", *SHORT) == 0
    assert {row["gain"] for row in table(tmp_path / "sweep")} == {""}
    headers = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("#  ", "head "))]
    assert len(headers) == 2 and not any("gain" in header for header in headers)


def test_heads_that_predict_one_class_are_marked_wherever_they_stand(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A logistic regression that its penalty keeps at the class shares, beside one that learns."""
    command = ["--head", "linear", "--C", "1e-9", "1", "--ablation", "0", "1", "2", *SHORT]
    assert sweep(feats, tmp_path, *command) == 0
    out, err = capsys.readouterr()
    *rows, _ = table(tmp_path / "sweep")
    assert {(row["C"], row["collapsed"]) for row in rows} == {("1e-09", "always positive"), ("1.0", "")}
    headers = [line.split() for line in out.splitlines() if line.startswith("#  ")]
    assert headers[0][:4] == ["#", "head", "collapsed", "ablation"]
    assert (
        "note: 3 of 6 configurations have heads that predict one class for every validation row: no result of theirs; "
        "raise --C, or give --class-weights balanced\n"
    ) in err  # not what linear doesn't read
    capsys.readouterr()
    assert sweep(feats, tmp_path, "--name", "lost", "--head", "linear", *command[2:], "--C", "1e-9") == 0
    pivot = capsys.readouterr().out.split("by ablation, accuracy\n")[1].split("\n\n")[0]
    assert pivot.count("0.519 (always") == 3  # of a narrow column the rest stands below
    assert "0.519 (always positive)" in (tmp_path / "lost" / "table.md").read_text()


def test_a_part_val_of_the_data_that_no_training_reads_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("clip", "vader"):
        make_cache(tmp_path / "feats", name)
    make_cache(tmp_path / "feats", "clip", 12, split="val", first_id=500)
    given = ["--vtype", "clip", "--ttype", "vader", "--head", "linear", "--C", "1", *SHORT]
    assert sweep(tmp_path / "feats", tmp_path, *given) == 0
    words = "note: the data's own part val (clip) isn't read: validation rows are some of train's; "
    assert words + "modeling/inference_head.py --split val scores it" in capsys.readouterr().err.splitlines()
    given[:4] = ["--vtype", "--ttype", "vader", "--name", "text"]
    assert sweep(tmp_path / "feats", tmp_path, *given) == 0
    assert "own part" not in capsys.readouterr().err


def test_what_is_said_of_labels_and_of_collapsed_heads_stands_apart(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "corrections.csv").write_text("id,label\np0,neutral\n")
    grid = ["--head", "linear", "--C", "1e-9", "1", "--corrections", str(tmp_path / "corrections.csv"), *SHORT]
    assert sweep(feats, tmp_path, *grid) == 0
    told = [line for stream in capsys.readouterr() for line in stream.splitlines()]
    [collapsed] = [line for line in told if line.startswith("note: ") and "one class" in line]
    assert collapsed.endswith("give --class-weights balanced")
    assert any("Of the labels, 1 label corrected" in line for line in told if line != collapsed)


def test_some_collapsed_seeds_are_counted(tmp_path: Path):
    """A seed's head collapses, the mean of all doesn't: the run says of each."""
    made = tmp_path / "feats"
    make_cache(made, "clip")
    grid = ["--head", "mlp", "--D", "4", "--lr", "1e-7", "--ep", "1", "--seeds", "8", "--val-ratio", "0.3"]
    assert sweep(made, tmp_path, *grid) == 0
    seeds = [read_predictions(path / "predictions_val.csv")[2].argmax(1) for path in runs_in(tmp_path / "sweep")]
    lost = sorted({int(p[0]) for p in seeds if len(set(p.tolist())) == 1})
    count = sum(len(set(p.tolist())) == 1 for p in seeds)
    assert 0 < count < 8  # else this tests nothing
    [row, _] = table(tmp_path / "sweep")
    assert row["collapsed"] == f"{count} of 8 " + (f"always {CLASSES[lost[0]]}" if len(lost) == 1 else "one class each")


def test_epochs_and_whole_sizes_stand_in_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip", parameters={"image": 5_000_000, "text": 2_000_000})
    make_cache(tmp_path / "feats", "vader")
    patient = ["--head", "fusion", "--lr", "3e-2", "--ep", "30", "--patience", "2", "--seeds", "3", "--D", "4"]
    command = [*patient, "--bs", "16", "--val-ratio", "0.3", "--ablation", "0", "2"]
    assert sweep(tmp_path / "feats", tmp_path, *command) == 0
    assert max(map(len, capsys.readouterr().out.split("27 validation rows.")[0].splitlines())) <= 140
    for row in table(tmp_path / "sweep")[:-1]:
        sides = ABLATIONS[0] if row["ablation"] == "both" else ("image",)
        members = [
            content(path, "config")["members"][0]
            for path in runs_in(tmp_path / "sweep")
            if tuple(trained_with(path)["sides"]) == sides
        ]
        for name in ("best_epoch", "epochs"):
            found = sorted(member[name] for member in members)
            assert row[name] == (str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}")
        assert all(member["epochs"] == min(30, member["best_epoch"] + 2) for member in members)
        encoders = 7_000_000 if row["ablation"] == "both" else 5_000_000
        assert int(row["with_encoders"]) == encoders + int(row["parameters"])
    # A cache that doesn't tell: unknown, and no column.
    assert sweep(tmp_path / "feats", tmp_path, "--name", "other", "--ttype", "vader", *command[:-3]) == 0
    assert "with_encoders" not in capsys.readouterr().out
    assert {row["with_encoders"] for row in table(tmp_path / "other")} == {""}


def test_ablations_are_tabled(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["--head", "fusion", "linear", "--C", "0.1", "--D", "4", "--ablation", "0", "1", "2", *SHORT]
    assert sweep(feats, tmp_path, *command, "--monitor", "macro_f1") == 0
    out = capsys.readouterr().out
    rows = table(tmp_path / "sweep")[:-1]
    assert {(r["head"], r["ablation"]) for r in rows} == {
        (h, a) for h in ("fusion", "linear") for a in ("both", "text only", "image only")
    }
    pivot = out.split("by ablation, macro_f1\n")[1].split("\n\n")[0].splitlines()
    assert pivot[0].split() == ["head", "both", "text", "only", "image", "only", "gain"]
    figure = {(r["head"], r["ablation"]): float(r["macro_f1"]) for r in rows}
    for r in rows:
        gain = r["ablation"] == "both" and figure[r["head"], "both"] - max(
            figure[r["head"], f"{side} only"] for side in ("image", "text")
        )
        assert r["gain"] == ("" if gain is False else pytest.approx(gain)) or float(r["gain"]) == pytest.approx(gain)
    for line in pivot[2:]:
        gain = next(float(r["gain"]) for r in rows if r["head"] == line.split()[0] and r["gain"])
        assert line.split()[-1] == f"{gain:.3f}"
    best = rows[0]
    assert float(best["macro_f1"]) == max(float(r["macro_f1"]) for r in rows)
    assert best_run(tmp_path / "sweep") == tmp_path / "sweep" / best["run"]
    assert (
        f"best by validation macro_f1: python modeling/inference_head.py --run {tmp_path / 'sweep' / best['run']}"
        in out
    )


def test_folds_are_compared_on_all_rows(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sweep(feats, tmp_path, "--head", "fusion", "mlp", "--D", "4", "--ep", "2", "--folds", "3") == 0
    assert "2 trainings" in (out := capsys.readouterr().out) and "90 validation rows" in out
    for row in table(tmp_path / "sweep")[:-1]:
        with (tmp_path / "sweep" / row["run"] / "predictions_val.csv").open() as file:
            right = [r["pred"] == r["tag"] for r in csv.DictReader(file)]
        assert len(right) == 90 and float(row["accuracy"]) == pytest.approx(np.mean(right))


def test_a_diverging_configuration_does_not_end_the_others(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ("--head", "early", "--D", "4", "--lr", "1e-3", "1e30", "--seeds", "2", *SHORT)
    for finished in (0, 2):  # what diverged is tried again
        assert sweep(feats, tmp_path, *argv) == 0
        out = capsys.readouterr().out
        assert f"4 trainings, {finished} of them finished before" in out
        assert "Left out for diverging (1 of 2):" in out and "the loss of early became" in out
        assert {trained_with(path)["lr"] for path in runs_in(tmp_path / "sweep")} == {1e-3}
        assert [row["head"] for row in table(tmp_path / "sweep")] == ["early", "always positive"]
    assert sweep(feats, tmp_path / "other", "--head", "early", "--D", "4", "--lr", "1e30", *SHORT) == 2
    error = capsys.readouterr().err
    assert re.search("every configuration diverged; .*smaller --lr", error) and error.count("\n") == 1


def test_unusable_sweeps(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("x")
    for argv, told in (
        (["--head", "fusion", "fusoin"], "did you mean fusion"),
        (["--lr", "1e-3", "0"], "expected lr > 0"),
        (["--runs", str(tmp_path / "file"), "--ep", "1"], "give another folder for --runs"),
        (["--vtype", "clap"], "no cache .*clap_train.h5.*Did you mean clip"),
    ):
        assert sweep(feats, tmp_path / "runs", *argv) == 2
        error = capsys.readouterr().err
        assert re.search(told, error) and error.startswith("error: ") and error.count("\n") == 1
    sweep(feats, tmp_path, "--head", "fusion", "--D", "4", *SHORT)
    (tmp_path / "sweep" / "table.md").unlink()
    (tmp_path / "sweep" / "table.md").mkdir()
    capsys.readouterr()
    assert sweep(feats, tmp_path, "--head", "fusion", "--D", "4", *SHORT) == 2
    assert "table.md" in (error := capsys.readouterr().err) and error.count("\n") == 1


def heads_of_all(feats: Path, *argv: str) -> set[str]:
    args = sweep_heads.build_parser().parse_args(["--feats", str(feats), "--head", "all", *argv])
    return {head.head for head in grid_from(args).heads}


def test_all_heads_are_those_that_the_caches_suit(feats: Path, tmp_path: Path):
    """Heads that need tokens only where there are tokens of the sides that they read."""
    for name in ("clip", "resnet", "roberta"):
        make_cache(tmp_path, name, tokens=True)
    make_cache(tmp_path, "vader")
    usual = {name for name, head in HEADS.items() if not head.tokens}
    on_both, on_image = {"coattention", "cross_modal"}, {"early_plane"}
    assert set(HEADS) == usual | on_both | on_image
    assert heads_of_all(feats, "--vtype", "clip") == usual  # a cache without tokens
    assert heads_of_all(tmp_path, "--vtype", "clip") == set(HEADS)
    assert heads_of_all(tmp_path, "--vtype", "resnet", "--ttype", "roberta", "vader") == set(HEADS)
    assert heads_of_all(tmp_path, "--vtype", "resnet", "--ttype", "vader") == usual | on_image
    assert heads_of_all(tmp_path, "--vtype", "clip", "--ttype", "clip", "roberta") == usual | on_image  # which tokens?
    assert heads_of_all(tmp_path, "--ttype", "roberta") == set(HEADS)  # early_plane reads the text's vector alone
    both = ("--vtype", "resnet", "--ttype", "vader", "--ablation")
    assert heads_of_all(tmp_path, *both, "2") == set(HEADS) and heads_of_all(tmp_path, *both, "1") == usual | on_image
    assert heads_of_all(tmp_path, *both, "1", "2") == usual | on_image
    assert heads_of_all(tmp_path / "nowhere", "--vtype", "clip") == usual  # loading says what is missing


def test_a_sweep_of_all_heads_on_tokens(tmp_path: Path):
    make_cache(tmp_path / "feats", "clip", tokens=True)
    argv = ("--head", "all", "--D", "4", "--ep", "1", "--bs", "32", "--gamma", "1", "--ridge", "1", "--C", "1")
    assert sweep(tmp_path / "feats", tmp_path, *argv, "--val-ratio", "0.3") == 0
    assert {row["head"] for row in table(tmp_path / "sweep")[:-1]} == set(HEADS)


def test_a_grid_of_coattention_s_options(tmp_path: Path):
    make_cache(tmp_path / "feats", "clip", tokens=True)
    argv = ["--head", "coattention", "gated_transformer", "--layers", "1", "3", "--image-positions", "none", "absolute"]
    argv += ["--attention-norm", "layer", "batch", "none", "--image-pooling", "last", "--D", "4", *SHORT]
    assert sweep(tmp_path / "feats", tmp_path, *argv) == 0
    rows = [row for row in table(tmp_path / "sweep") if row["head"] == "coattention"]
    tried = sorted((row["image_positions"], row["attention_norm"]) for row in rows)
    assert tried == sorted(product(("none", "absolute"), ("layer", "batch", "none")))
    layers = {row["layers"] for row in table(tmp_path / "sweep") if row["head"] == "gated_transformer"}
    assert layers == {"1", "3"}
    assert {trained_with(path)["image_pooling"] for path in runs_in(tmp_path / "sweep")} == {"last", "mean"}


def test_optional_tokens_of_several_caches_are_left_aside(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("clip", "resnet"):
        make_cache(tmp_path / "feats", name, tokens=True)
    argv = ["--vtype", "clip", "resnet", "--ttype", "clip", "--D", "4", "--ep", "1", "--val-ratio", "0.3"]
    assert sweep(tmp_path / "feats", tmp_path / "runs", "--head", "query_attention", "mlp", *argv) == 0
    assert "note: clip, resnet all hold image tokens, none are used" in capsys.readouterr().err
    for path in runs_in(tmp_path / "runs" / "sweep"):
        config = content(path, "config")
        assert not config["features"]["tokens"] and "image_tokens" not in config["members"][0]["widths"]
    assert sweep(tmp_path / "feats", tmp_path / "other", "--head", "coattention", *argv) == 2
    assert "clip, resnet all hold image tokens; name one cache" in capsys.readouterr().err


# -- searching on one head --------------------------------------------------------------------------------------

SEARCH = ["--lr", "1e-3", "1e-2", "--dropout", "0", "0.5", "--monitor", "macro_f1", "--seeds", "2", "--D", "4", *SHORT]


def test_the_best_settings_of_one_head_are_applied_to_the_others(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    heads = ["--head", "late_512", "fusion", "concat"]
    assert sweep(feats, tmp_path, "--name", "full", *heads, *SEARCH) == 0
    best = next(row for row in table(tmp_path / "full") if row["head"] == "late_512")
    capsys.readouterr()
    assert sweep(feats, tmp_path, "--name", "search", *heads, *SEARCH, "--search-on", "late_512") == 0
    out = capsys.readouterr().out
    chosen = (float(best["lr"]), float(best["dropout"]))
    found: dict[str, set[tuple[float, float]]] = {}
    for path in runs_in(tmp_path / "search"):
        s = trained_with(path)
        found.setdefault(s["head"], set()).add((s["lr"], s["dropout"]))
    assert found.pop("late_512") == {(lr, dropout) for lr in (1e-3, 1e-2) for dropout in (0, 0.5)}
    assert found == {"fusion": {chosen}, "concat": {chosen}}
    assert len(runs_in(tmp_path / "search")) == 2 * (4 + 1 + 1)
    line = (
        f"Searched on late_512 alone: lr {chosen[0]}, dropout {chosen[1]}, its best by these rows, applied to fusion, "
    )
    assert f"{line}concat." in out and line in (tmp_path / "search" / "table.md").read_text()
    of_full = {row["run"]: row["macro_f1"] for row in table(tmp_path / "full") if row["run"]}
    of_search = {row["run"]: row["macro_f1"] for row in table(tmp_path / "search") if row["run"]}
    assert of_search.items() <= of_full.items() and len(of_search) == 6
    before = times(tmp_path / "search")
    assert sweep(feats, tmp_path, "--name", "search", *heads, *SEARCH, "--search-on", "late_512") == 0
    out = capsys.readouterr().out
    assert "8 trainings, 8 of them finished before" in out and "4 trainings, 4 of them finished before" in out
    assert times(tmp_path / "search") == before


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--head", "fusion", "mlp", "--lr", "1e-3", "1e-2", "--search-on", "concat"],
            "the heads here are fusion, mlp",
        ),
        (["--head", "fusion", "--lr", "1e-3", "1e-2", "--search-on", "fusion"], "no other head gets its best settings"),
        (["--lr", "1e-3", "1e-2", "--search-on", "fusion"], "no other head gets its best settings"),
        (["--head", "fusion", "mlp", "--search-on", "mlp"], "--search-on mlp: nothing to search"),
        (["--head", "fusion", "late_512", "--D", "4", "8", "--search-on", "late_512"], "among values of --D; give one"),
        (["--head", "fusion", "mlp", "--ablation", "0", "1", "--search-on", "mlp"], "among values of --ablation"),
        (
            ["--head", "fusion", "mlp", "--lr", "1e-3", "1e-2", "--search-on", "mlp", "--auto"],
            "--auto with --search-on",
        ),
    ],
)
def test_unusable_searches(argv: list[str], told: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sweep(feats, tmp_path, *argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())


# -- the automatic search ---------------------------------------------------------------------------------------


def searched(feats: Path, runs: Path, *argv: str) -> Path:
    assert sweep(feats, runs, "--auto", *argv) == 0
    return newest_run(runs)


@pytest.mark.slow
def test_auto_leaves_a_run_that_beats_guessing(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = searched(feats, tmp_path, "--vtype", "clip", "--ttype", "vader", "--val-ratio", "0.3")
    out = capsys.readouterr().out
    assert "_clip_vader_auto_s42_x4" in path.name and f"-> {path}" in out
    run, figures = load_run(path), content(path, "metrics")
    val = figures["val"]
    assert val["n"] == 27 and val["accuracy"] > val["majority"]["accuracy"] + 0.1
    assert "nested" in figures["protocol"]
    # The run, loaded, predicts the validation rows as reported; the figures are scikit-learn's.
    features = load_features(feats, "train", ["clip"], ["vader"])
    ids, tags, probabilities = read_predictions(path / "predictions_val.csv")
    assert ids == content(path, "split")["val"]
    np.testing.assert_allclose(run.probabilities(features, features.positions(ids)), probabilities, atol=1e-5)
    y = [CLASSES.index(tag) for tag in tags]
    assert val["accuracy"] == pytest.approx(reference.accuracy_score(y, probabilities.argmax(1)))
    assert val["macro_f1"] == pytest.approx(reference.f1_score(y, probabilities.argmax(1), average="macro"))
    assert val["log_loss"] == pytest.approx(-np.log(probabilities[np.arange(27), y]).mean(), abs=1e-4)
    # Each cache alone competes beside the joined ones; the best of each family is stacked.
    candidates = figures["candidates"]
    families = {(c["head"], c["caches"]) for c in candidates}
    both = "image clip + text vader"
    assert families == {("kernel", both), ("linear", both), ("kernel", "image clip"), ("kernel", "text vader")}
    for family in families:
        of_family = [c for c in candidates if (c["head"], c["caches"]) == family]
        best = min(of_family, key=lambda c: c["log_loss"])
        assert [c["stacked"] for c in of_family] == ["yes" if c is best else "" for c in of_family]
        assert all(0 < c["log_loss"] < 2 and 0 < c["accuracy"] <= 1 for c in of_family)
    assert len({m.group for m in run.members}) == len(families)
    assert all(word in out for c in candidates for word in c["caches"].split())
    with (path / "history.csv").open() as file:
        told = [(row["head"], row["caches"], row["epoch"], float(row["val_loss"])) for row in csv.DictReader(file)]
    assert told == [(c["head"], c["caches"], "", c["log_loss"]) for c in candidates if c["stacked"]]
    assert {member["best_epoch"] for member in content(path, "config")["members"]} == {None}


def test_auto_stacks_the_sides_of_one_cache(feats: Path, tmp_path: Path):
    path = searched(feats, tmp_path, "--vtype", "clip", "--head", "kernel")
    stacked = {c["caches"] for c in content(path, "metrics")["candidates"] if c["stacked"]}
    assert stacked == {"image clip + text clip", "image clip", "text clip"}
    assert {m.config.head.sides for m in load_run(path).members} == set(ABLATIONS)


@pytest.mark.parametrize("norm", ["l2", "standard"])
@pytest.mark.slow
def test_auto_makes_caches_equally_loud_and_scores_a_tenth_as_loud(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the squared distances that a kernel sees. A cache of 16 columns or fewer holds scores: rows of length 1 would
    lose what they say by theirs."""
    folder = tmp_path / "feats"
    for name, widths in {"wide": (17, None), "wider": (None, 40), "scores": (None, 16)}.items():
        monkeypatch.setitem(caches.WIDTHS, name, widths)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 17)) + 3 * np.eye(3, 17)[[CLASSES.index(tag) for tag in make_tags(90)]]
    if norm == "l2":  # fits rows of all lengths
        rows *= rng.permutation(np.linspace(0.1, 10, 90))[:, None]
    else:  # ... columns of all sizes: the last is noise
        rows[:, -1] *= 100
    make_cache(folder, "wide", changed={"image_feats": rows.astype(np.float16)})
    make_cache(folder, "wider")
    make_cache(folder, "scores")
    argv = ["--vtype", "wide", "--ttype", "wider", "scores", "--head", "kernel", "--gamma", "1", "--ridge", "1"]
    path = searched(folder, tmp_path / "runs", *argv)
    chosen = {c["caches"]: c["norm"] for c in content(path, "metrics")["candidates"] if c["stacked"]}
    assert chosen["image wide + text wider + text scores"] == norm
    (member,) = [m for m in load_run(path).members if m.config.head.sides == ("image", "text")]
    ids = content(path, "split")["train"]
    *loud, scores = (
        caches.read(folder, *source, ids)
        for source in (("wide", "image_feats"), ("wider", "text_feats"), ("scores", "text_feats"))
    )
    if norm == "l2":
        loud = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in loud]
    else:
        *loud, scores = ((x - x.mean(0)) / x.std(0) / x.shape[1] ** 0.5 for x in (*loud, scores))
    expected, found = np.hstack([*loud, 0.1**0.5 * scores]), np.asarray(member.head.support[0], np.float64)
    np.testing.assert_allclose(cdist(found, found), cdist(expected, expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--norm", "none"], "--auto with --norm: it chooses normalisation"),
        (["--scale", "clip=2", "--seeds", "1"], "--auto with --scale, --seeds: "),
        (["--name", "sweep"], "--auto with --name: "),
        (
            ["--D", "8", "--lr", "1e-3"],
            "--auto with --D, --lr: does nothing for the heads it searches .kernel, linear.",
        ),
        (["--head", "linear", "--gamma", "1"], "--auto with --gamma: .*.linear.*; leave it out"),
        (["--head", "mlp", "--C", "1"], "--auto with --C: .*name heads that read it"),
        (["--recipe", "own"], "--auto with --recipe: "),
        (["--recipe", "cheema"], "--auto with --recipe: it chooses normalisation"),
        (["--recipe", "B", "--folds", "3"], "--auto with --recipe: "),
        (["--folds", "3", "--val-ratio", "0.2"], "--folds leaves no use for --val-ratio"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_auto_does_not_use_is_refused(
    argv: list[str], told: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert sweep(feats, tmp_path / "runs", "--auto", *argv) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {told}", error) and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_auto_with_what_it_reads(feats: Path, tmp_path: Path):
    argv = ["--head", "kernel", "--ablation", "1", "--gamma", "1", "--ridge", "1", "--recipe", "A"]
    run = load_run(searched(feats, tmp_path, *argv, "--class-weights", "neutral=1.2"))
    assert run.split.how["val_ratio"] == 0.125 and {m.config.class_weights for m in run.members} == {
        (("neutral", 1.2),)
    }


def test_auto_keeps_to_the_side_it_is_told(feats: Path, tmp_path: Path):
    argv = ["--vtype", "clip", "--ttype", "clip", "vader", "--ablation", "1", "--head", "kernel"]
    path = searched(feats, tmp_path, *argv)
    run = load_run(path)
    assert run.source.image == () and {m.config.head.sides for m in run.members} == {("text",)}
    stacked = {c["caches"] for c in content(path, "metrics")["candidates"] if c["stacked"]}
    assert stacked == {"text clip + text vader", "text clip", "text vader"}


def test_the_held_out_figures_of_a_candidate_are_held_out(feats: Path, tmp_path: Path):
    """Features without any information: held out, a kernel that can learn the training rows by heart does no better
    than guessing."""
    noise = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float16)
    make_cache(tmp_path / "feats", "clip", changed={"image_feats": noise, "text_feats": noise})
    path = searched(tmp_path / "feats", tmp_path / "runs", "--vtype", "clip", "--head", "kernel")
    guessing = reference.log_loss(make_tags(90), np.tile([1 / 3, 1 / 6, 1 / 2], (90, 1)))
    for candidate in content(path, "metrics")["candidates"]:
        assert candidate["log_loss"] > guessing - 0.1 and candidate["accuracy"] < 0.7


@pytest.mark.slow
def test_auto_with_folds_is_nested(feats: Path, tmp_path: Path):
    """Other labels for the rows of one fold: that fold's predictions don't change, as no member of its search, nor the
    stacking, saw them; the other folds' do."""
    argv = ["--feats", str(feats), "--vtype", "clip", "--ttype", "vader", "--folds", "3", "--ep", "2"]
    argv += ["--bs", "16", "--gamma", "1", "--ridge", "1"]
    args = train_head.build_parser().parse_args(argv)
    experiment = load_experiment(experiment_settings(args), [])
    configs = grid_from(args, head=["kernel", "mlp"], D=4).configs(experiment.classes)
    run, _ = auto.auto(experiment, configs)
    before = run.report.probabilities
    held = set(experiment.splits[1].val)
    rows = experiment.features.rows
    tags = [
        CLASSES[(CLASSES.index(tag) + 1) % 3] if i in held else tag for i, tag in zip(rows.ids, rows.tags, strict=True)
    ]
    flipped = replace(experiment, features=replace(experiment.features, rows=replace(rows, tags=Labels.of(tags))))
    after = auto.auto(flipped, configs)[0].report.probabilities
    sizes = np.cumsum([len(split.val) for split in experiment.splits])[:-1]
    (one, two, three), (other_one, other_two, other_three) = np.split(before, sizes), np.split(after, sizes)
    np.testing.assert_array_equal(two, other_two)
    assert np.abs(one - other_one).max() > 0.05 and np.abs(three - other_three).max() > 0.05
    # The run itself has learned from all rows.
    assert all(m.head.support.shape[1] == 90 for m in run.members if m.config.head.head == "kernel")
    path = searched(feats, tmp_path, *argv[2:], "--head", "kernel", "mlp", "--D", "4")
    ids, tags, probabilities = read_predictions(path / "predictions_val.csv")
    assert ids == [i for split in experiment.splits for i in split.val]
    np.testing.assert_allclose(probabilities, before, atol=1e-4)
    figures = content(path, "metrics")["val"]
    assert figures["accuracy"] == np.mean([CLASSES[k] == t for k, t in zip(probabilities.argmax(1), tags, strict=True)])


def test_the_test_part_of_a_stacked_run_is_of_that_run(feats: Path, tmp_path: Path):
    path = searched(feats, tmp_path, "--val-ratio", "0.2", "--test-ratio", "0.3", "--gamma", "1", "--ridge", "1")
    test, features = content(path, "metrics")["test"], load_features(feats, "train", ["clip"], ["clip"])
    ids = content(path, "split")["test"]
    probabilities = load_run(path).probabilities(features, features.positions(ids))
    y = [CLASSES.index(make_tags(90)[int(i[1:])]) for i in ids]
    loss = reference.log_loss(y, probabilities, labels=range(3))
    assert test["log_loss"] == test["log_loss_calibrated"] == pytest.approx(loss, abs=1e-4)
    assert test["ece"] == test["ece_calibrated"]


def test_the_epoch_of_a_held_out_prediction_is_not_chosen_by_it(tmp_path: Path):
    """Features without any information: the best of many epochs would look better than guessing."""
    noise = np.random.default_rng(1).normal(size=(90, 8)).astype(np.float16)
    make_cache(tmp_path / "feats", "clip", tags=CLASSES * 30, changed={"image_feats": noise, "text_feats": noise})
    argv = ["--head", "mlp", "--D", "16", "--lr", "1e-2", "--ep", "60", "--bs", "8", "--ablation", "2"]
    path = searched(tmp_path / "feats", tmp_path / "runs", *argv)
    (candidate,) = content(path, "metrics")["candidates"]
    assert candidate["accuracy"] < 0.4 and candidate["log_loss"] > np.log(3)
    with (path / "history.csv").open() as file:
        epochs = [(row["member"], row["head"], row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == [(str(k), "mlp", str(epoch)) for k in range(5) for epoch in range(1, 61)]


def test_the_run_after_folds_learns_from_rows_that_no_fold_validates(feats: Path, tmp_path: Path):
    ids = [f"p{i}" for i in range(90)]
    folds = [{"train": ids[30:], "val": ids[:30]}, {"train": ids[:30] + ids[60:], "val": ids[30:60]}]
    (tmp_path / "folds.json").write_text(json.dumps({"folds": folds}))
    argv = ["--head", "kernel", "--gamma", "1", "--ridge", "1", "--split-file", str(tmp_path / "folds.json")]
    path = searched(feats, tmp_path / "runs", *argv)
    assert all(m.head.support.shape[1] == 90 for m in load_run(path).members)
    assert read_predictions(path / "predictions_val.csv")[0] == sorted(ids[:30]) + sorted(ids[30:60])


def test_too_many_rows_for_a_kernel(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "vader", 22_600)
    argv = ["--vtype", "--ttype", "vader", "--auto", "--head", "kernel"]
    assert sweep(tmp_path / "feats", tmp_path / "runs", *argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search("error: 203[0-9]+ training rows, expected at most 20000.*linear or mlp", error)
    assert not (tmp_path / "runs").exists()
    assert auto.default_heads(20_000, 2048) == ("kernel", "linear") and auto.default_heads(20_000, 2049) == ("kernel",)
    assert auto.default_heads(20_001, 2048) == ("linear", "mlp") and auto.default_heads(20_001, 2049) == ("mlp",)


@pytest.mark.slow
def test_without_a_kernel_where_any_of_the_searches_has_too_many_rows(
    feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With folds the last search is on all rows."""
    for module in (auto, closed_form):
        monkeypatch.setattr(module, "MAX_KERNEL_ROWS", 70)
    for argv, heads in ((["--val-ratio", "0.3"], {"kernel", "linear"}), (["--folds", "3"], {"linear", "mlp"})):
        path = searched(feats, tmp_path, "--vtype", "--ttype", "vader", *argv, "--C", "0.3")
        assert {c["head"] for c in content(path, "metrics")["candidates"]} == heads
