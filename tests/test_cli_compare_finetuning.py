"""compare_finetuning.py as a user types it: folds, cells, what is skipped and refused, and the verdict."""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
from caches import make_cache
from conftest import ENVIRONMENT, ROOT, content, lives, one_line
from pairs import CLASSES, cached_pairs

from feats.errors import UsageError
from modeling import compare_finetuning, finetune, train_head
from modeling.command_line.options import new_parser
from modeling.command_line.tuning import add_tuning_options, tuning_command, tuning_settings
from modeling.evaluation.metrics import holm
from modeling.features.stored_splits import Split
from modeling.finetuning import comparison, past
from modeling.finetuning.comparison import Candidate, Cell
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.studies import TUNING_RECIPES
from modeling.finetuning.verdict import Scored, compare, paired_tests, read_scored

METHODS = ["frozen", "lp_ft", "last-2", "lora-2", "full", "soup"]
FOLDS = "--folds 3 --only 2 --val-ratio 0.25 --device cpu".split()
FAST = [*FOLDS, *"--ep 2 --bs 8 --lr 1e-3 --dtype fp32".split()]


# -- on disk ----------------------------------------------------------------------------------------------------


def in_this_process(cell: Cell, command: Sequence[str]) -> None:
    """In place of a process of its own, which would import everything anew."""
    assert Path(command[0]) == ROOT / "modeling" / "finetune.py"
    assert finetune.main(command[1:]) == 0


def never(cell: Cell, *_: Any, **__: Any) -> None:
    raise AssertionError(f"{cell.path} is trained again")


def options(root: Path, *more: str) -> list[str]:
    weights = (root / "weights.txt").read_text().splitlines()
    return ["--runs", str(root / "runs"), "--name", "compared", "--weights", *weights, *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, caches of a tiny ViT and a tiny BERT, a run on these, and a comparison of every method on two folds."""
    root = tmp_path_factory.mktemp("compared")
    weights = cached_pairs(root)
    (root / "weights.txt").write_text("\n".join(f"{name}={path}" for name, path in weights.items()))
    sides = (
        "--vtype vit --ttype roberta --head concat --D 8 --ep 8 --lr 1e-2 --bs 8 --val-ratio 0.25 --device cpu".split()
    )
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "runs")]
    assert train_head.main([*folders, *sides, "--norm", "standard"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "finetune", in_this_process)
        assert compare_finetuning.main(options(root, "--methods", *METHODS, *FAST)) == 0
    return root


@pytest.fixture
def compared(root: Path) -> Path:
    return root / "runs" / "compared"


def cells(folder: Path) -> dict[str, list[Path]]:
    """By method the runs of both folds."""
    found: dict[str, list[Path]] = {}
    for fold in ("fold1", "fold2"):
        for path in sorted((folder / fold).iterdir()):
            if path.is_dir():
                found.setdefault(path.name.partition("_lr")[0], []).append(path)
    return found


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_figures_are_those_of_the_test_rows_of_all_folds(compared: Path):
    rows, found = table(compared), cells(compared)
    assert sorted(found) == sorted(METHODS) and list(rows)[:-1] == METHODS
    accuracy = {}
    for method, runs in found.items():
        predicted = [row for run in runs for row in csv.DictReader((run / "predictions_test.csv").open())]
        tags, said = [row["tag"] for row in predicted], [row["pred"] for row in predicted]
        assert len({row["id"] for row in predicted}) == len(predicted) == int(rows[method]["rows"])
        accuracy[method] = reference.accuracy_score(tags, said)
        expected = {
            "accuracy": accuracy[method],
            "weighted_f1": reference.f1_score(tags, said, average="weighted", zero_division=0),
            "macro_f1": reference.f1_score(tags, said, average="macro", labels=CLASSES, zero_division=0),
        }
        assert {name: float(rows[method][name]) for name in expected} == pytest.approx(expected)
    frozen = float(rows["frozen"]["macro_f1"])
    for method in METHODS[1:]:
        assert float(rows[method]["difference"]) == pytest.approx(float(rows[method]["macro_f1"]) - frozen)
        facts = [content(run, "config")["finetuned"]["facts"] for run in found[method]]
        assert float(rows[method]["trained M"]) * 1e6 == pytest.approx(facts[0]["trained_parameters"])
        assert float(rows[method]["peak GB"]) * 1e9 == pytest.approx(max(f["peak_bytes"] for f in facts))
    assert float(rows["lora-2"]["trained M"]) < float(rows["last-2"]["trained M"]) < float(rows["full"]["trained M"])
    text = (compared / "table.md").read_text()
    assert text.rstrip().splitlines()[-1].startswith("verdict: ") and "2 of 3 folds, stratified" in text


def test_seconds_are_without_the_outputs_of_frozen_blocks_that_serve_all_folds(compared: Path, tmp_path: Path):
    """They are made in the first fold, or were there before: whichever it is, a method costs the same."""
    runs = {method: found[0] for method, found in cells(compared).items()}
    config = content(runs["last-2"], "config")
    assert config["finetuned"]["facts"]["trunk_seconds"] <= config["finetuned"]["facts"]["seconds"]
    shutil.copytree(runs["last-2"], tmp_path / "fold1" / runs["last-2"].name)
    config["finetuned"]["facts"] |= {"seconds": 70.5, "trunk_seconds": 60.0}
    (tmp_path / "fold1" / runs["last-2"].name / "config.json").write_text(json.dumps(config))

    class Named(Candidate):
        name = runs["last-2"].name

    split = Split(*(content(runs["last-2"], "split")[part] for part in ("train", "val", "test")), {})
    experiment = SimpleNamespace(splits=[split], classes=config["classes"])
    [seconds] = read_scored([Cell(Named("last-2"), 1, tmp_path)], experiment, "macro_f1").seconds
    assert seconds == 10.5


def test_each_fold_is_tested_by_models_of_the_others(compared: Path):
    tested = []
    for fold in range(2):
        splits = [content(runs[fold], "split") for runs in cells(compared).values()]
        parts = [set(splits[0][part]) for part in ("train", "val", "test")]
        assert all(split == splits[0] for split in splits)
        assert sum(map(len, parts)) == len(set.union(*parts)) == 24
        assert (len(parts[1]), len(parts[2])) == (4, 8)
        tested.append(parts[2])
    assert not tested[0] & tested[1]


def test_methods_are_what_they_say(compared: Path):
    facts = {method: content(runs[0], "config")["finetuned"] for method, runs in cells(compared).items()}
    del facts["frozen"]
    how = {m: tuple(f["facts"][key] for key in ("tune", "lora", "soup", "wise_ft")) for m, f in facts.items()}
    assert how == {
        "lp_ft": ("all", None, 0, False),
        "last-2": ("last-2", None, 0, False),
        "lora-2": ("all", 2, 0, False),
        "full": ("all", None, 0, False),
        "soup": ("all", None, 2, True),
    }

    def first_loss(method: str) -> float:
        return float(next(csv.DictReader((cells(compared)[method][0] / "history.csv").open()))["val_loss"])

    frozen = cells(compared)["frozen"][0]
    best = content(frozen, "config")["members"][0]["best_epoch"]
    expected = float(list(csv.DictReader((frozen / "history.csv").open()))[best - 1]["val_loss"])
    assert first_loss("lp_ft") == pytest.approx(expected, abs=2e-3)
    assert abs(first_loss("full") - expected) > 1e-2


def test_what_is_finished_is_kept_and_the_tables_are_the_same(
    root: Path, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(comparison, "finetune", never)
    monkeypatch.setattr(comparison, "train_frozen", never)
    before = [(compared / name).read_bytes() for name in ("table.csv", "table.md")]
    assert compare_finetuning.main(options(root, "--methods", *METHODS, *FAST, "--checkpoint-steps", "3")) == 0
    assert [(compared / name).read_bytes() for name in ("table.csv", "table.md")] == before
    out = capsys.readouterr().out
    assert "12 cells, 12 of them finished before" in out
    assert out.rstrip().splitlines()[-1] == before[1].decode().rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--val-ratio", "0.3"], "holds another comparison (val_ratio 0.25, now 0.3); give another --name"),
        (["--split-seed", "1"], "split_seed 42, now 1"),
        (["--folds", "4"], "folds 3, now 4"),
        (["--methods", "last"], "unknown method 'last' in --methods; there are frozen, lp_ft"),
        (["--tune", "last-1"], "--tune: --methods say what is tuned"),
        (["--soup", "2", "--wise-ft"], "--soup, --wise-ft: --methods say"),
        (["--lr", "1e-3", "1e-3"], "is to be trained twice"),
        (["--run", "two"], "has 2 heads, expected one head on cached features"),
        (["--run", "compared/fold1/lp_ft"], "was finetuned, expected one head"),
        (["--run", "other"], "holds another comparison (frozen head)"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    root: Path,
    compared: Path,
    more: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr(comparison, "finetune", never)
    made = ["--vtype", "vit", "--ttype", "roberta", "--head", "concat", "--ep", "1", "--val-ratio", "0.25"]
    made += ["--norm", "standard"]
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "made"), "--device", "cpu", *made]
    if "two" in more or "other" in more:
        train_head.main([*folders, *(["--seeds", "2"] if "two" in more else ["--D", "16"])])
        more = ["--run", str(next(p for p in (root / "made").iterdir() if p.name.endswith("x2") == ("two" in more)))]
    elif "--run" in more:
        more = ["--run", str(cells(compared)["lp_ft"][0])]
    capsys.readouterr()
    assert compare_finetuning.main([*options(root), *FAST, *more]) == 2
    out, err = capsys.readouterr()
    assert why in err and len(err.splitlines()) == 1 and "Traceback" not in err + out


def test_a_damaged_cell_is_named(root: Path, compared: Path, capsys: pytest.CaptureFixture):
    history = cells(compared)["lp_ft"][1] / "history.csv"
    kept = history.read_bytes()
    history.unlink()
    try:
        assert compare_finetuning.main(options(root, "--methods", "lp_ft", *FAST)) == 2
    finally:
        history.write_bytes(kept)
    assert f"error: {history.parent} is damaged; remove it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_adds_cells_and_validation_chooses(
    root: Path, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    trained = []

    def noted(cell: Cell, command: Sequence[str]) -> None:
        trained.append((cell.fold, cell.candidate.point))
        in_this_process(cell, command)

    monkeypatch.setattr(comparison, "finetune", noted)
    kept = {name: (compared / name).read_bytes() for name in ("table.csv", "table.md")}
    grid = [*FOLDS, "--ep", "2", "--bs", "8", "--dtype", "fp32", "--lr", "1e-3", "1e-5", "--dropout", "0.2"]
    assert compare_finetuning.main(options(root, "--methods", "lora-2", *grid)) == 0
    out = capsys.readouterr().out
    assert trained == [(fold, {"lr": lr}) for fold in (1, 2) for lr in (1e-3, 1e-5)]  # with another dropout than before
    runs = [path for path in cells(compared)["lora-2"] if trained_dropout(path) == 0.2]
    assert len(runs) == 4
    means = {}
    for lr in ("0.001", "1e-05"):
        figures = [content(run, "metrics")["val"]["macro_f1"] for run in runs if f"_lr{lr}_" in run.name]
        means[lr] = sum(figures) / 2
    with (compared / "table.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["chosen"] or (row["lr"] and not row["rows"])]
    assert {row["lr"]: float(row["validation macro_f1"]) for row in points} == pytest.approx(means)
    [chosen] = [row["lr"] for row in points if row["chosen"] == "yes"]
    assert means[chosen] == max(means.values()) and "no test row had a say" in out
    for name, content_before in kept.items():
        (compared / name).write_bytes(content_before)
    for path in runs:
        path.rename(tmp_path / f"{path.parent.name}{path.name}")


def trained_dropout(run: Path) -> Any:
    return content(run, "config")["members"][0]["train"]["head"]["dropout"]


def test_another_dropout_leaves_the_start_as_it_was(root: Path, compared: Path, tmp_path: Path):
    frozen = cells(compared)["frozen"][0]
    losses = []
    for dropout in ("0.0", "0.9"):
        given = ["--run", str(frozen), "--runs", str(tmp_path), "--name", dropout, "--dropout", dropout]
        assert finetune.main([*given, *options(root)[4:], *"--ep 1 --bs 8 --dtype fp32 --device cpu".split()]) == 0
        losses.append([row["val_loss"] for row in csv.DictReader((tmp_path / dropout / "history.csv").open())])
        assert trained_dropout(tmp_path / dropout) == float(dropout)
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_the_usual_grid_is_where_nothing_was_typed():
    parser = compare_finetuning.build_parser()
    points = compare_finetuning.points_of(parser.parse_args(["--grid", "--lr", "1", "--bs", "4", "8"]), "fusion")
    wanted = [{"lr": 1.0, "dropout": d, "bs": b} for d in (0.3, 0.5) for b in (4, 8)]
    assert points == wanted
    assert compare_finetuning.points_of(parser.parse_args([]), "fusion") == [{}]
    assert [set(p) for p in compare_finetuning.points_of(parser.parse_args(["--grid"]), "linear")] == [{"lr"}] * 2
    with pytest.raises(UsageError, match="`dropout` does nothing for the head linear") as error:
        compare_finetuning.points_of(parser.parse_args(["--dropout", "0.1"]), "linear")
    assert one_line(error)


# -- history ----------------------------------------------------------------------------------------------------


def test_history_lists_every_finetuning_without_training(
    root: Path, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(comparison, "finetune", never)
    assert compare_finetuning.main(["--runs", str(root / "runs"), "--history"]) == 0
    out = capsys.readouterr().out
    named = dict(re.findall(r"^(?:runs:)? +(\d+) (compared/fold\S+)$", out, re.M))
    runs = [path for method, paths in cells(compared).items() for path in paths if method != "frozen"]
    assert sorted(named.values()) == sorted(str(p.relative_to(root / "runs")) for p in runs)
    made = [content(root / "runs" / named[str(k)], "config")["created"] for k in range(1, len(named) + 1)]
    assert made == sorted(made, reverse=True)
    assert max(map(len, out.splitlines()[: out.splitlines().index("")])) <= 80
    figures = content(cells(compared)["lora-2"][1], "metrics")["val"]
    for words in ("vit+roberta", "concat", "lora-2", f"{figures['macro_f1']:.3f}"):
        assert words in out
    assert out.rstrip().splitlines()[-1] == (compared / "table.md").read_text().rstrip().splitlines()[-1]


def test_history_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert compare_finetuning.main(["--runs", str(tmp_path), "--history"]) == 2
    assert "nothing was finetuned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3, "0 s"), (59, "59 s"), (60, "1 min"), (7300, "2 h"), (86400 * 40, "40 d")]
)
def test_age(seconds: float, words: str):
    assert past.age(seconds) == words


# -- cells as processes -----------------------------------------------------------------------------------------


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return Cell(Candidate("lp_ft", TuneSettings()), 1, tmp_path)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('error: a --micro-bs of 4'); print('more'); raise SystemExit(2)", "failed: a --micro-bs of 4 ("),
        (
            "print('error: no weights for x, the encoder of bert; tried:'); print('  here'); raise SystemExit(2)",
            "failed: no weights for x, the encoder of bert; say where some are with `weights` NAME=PATH (",
        ),
        ("raise ValueError('odd')", "failed: ValueError: odd ("),
        ("import os; os.kill(os.getpid(), 9)", "failed: it was ended by signal 9, for want of memory as a rule ("),
        ("import sys; print(sys.argv)", "'--x', '1']"),  # it ended well, but left no run
    ],
)
@pytest.mark.slow
def test_a_cell_that_fails_shows_its_last_error_and_its_log(cell: Cell, tmp_path: Path, code: str, why: str):
    script = tmp_path / "script.py"
    script.write_text(code)
    with pytest.raises(UsageError) as error:
        comparison.finetune(cell, [str(script), "--x", "1"])
    assert why in one_line(error) and str(cell.log) in one_line(error)
    assert cell.log.read_text().splitlines()[0] == f"started: {script} --x 1"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_cell_ends_with_the_comparison(tmp_path: Path, number: int, in_foreground: None):
    """Ctrl-C is passed on, so that the finetuning ends in its own way; a comparison that is killed takes it along."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nprint(os.getpid(), flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    code = (
        "import sys; from pathlib import Path; from modeling.finetuning.comparison import *\n"
        "from modeling.finetuning.settings import TuneSettings\n"
        "finetune(Cell(Candidate('lp_ft', TuneSettings()), 1, Path(sys.argv[1])), [sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(script)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    log = Cell(Candidate("lp_ft", TuneSettings()), 1, tmp_path).log
    said = wait_for(lambda: log.read_text().splitlines()[1:] if log.exists() else [])
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not lives(int(said[0])))
    assert ("interrupted" in log.read_text()) == (number == signal.SIGINT)


def wait_for(what: Any) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(
    root: Path, tmp_path: Path, in_foreground: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Real processes: interrupted in a finetuning, then started again, it ends with what an undisturbed one ends."""
    given = ["--methods", "lp_ft", "lora-2", *FOLDS, "--only", "1", *"--bs 8 --lr 1e-3 --ep 30 --dtype fp32".split()]
    script = [sys.executable, str(ROOT / "modeling" / "compare_finetuning.py")]

    def command(name: str) -> list[str]:
        return [*script, *options(root, *given), "--name", name]

    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "finetune", in_this_process)
        capsys.readouterr()
        assert compare_finetuning.main(command("straight")[2:]) == 0
        verdict = capsys.readouterr().out.splitlines()[-1]
    process = subprocess.Popen(command("broken"), env=environment, stderr=subprocess.PIPE, text=True)
    fold = root / "runs" / "broken" / "fold1"
    wait_for(lambda: list(fold.glob(".lp_ft*.tuning/step-*[1-9]")))
    process.send_signal(signal.SIGINT)
    assert "run the same command to go on" in process.communicate(timeout=60)[1] and process.returncode == 130
    assert list(fold.glob(".lp_ft*.tuning/step-*")) and not list(fold.glob("lp_ft*/config.json"))
    again = subprocess.run(command("broken"), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "3 cells, 1 of them finished before" in again.stdout and "fold 1 of lp_ft went on after" in again.stdout
    assert again.stdout.splitlines()[-1].replace("broken", "straight") == verdict
    for run in (root / "runs" / "straight" / "fold1").glob("l*[0-9a-f]"):
        if run.is_dir():
            assert (fold / run.name / "history.csv").read_bytes() == (run / "history.csv").read_bytes()
            facts = content(fold / run.name, "config")["finetuned"]["facts"]
            assert 1e8 < facts["peak_bytes"] < 4e9
    for name in ("straight", "broken"):
        (root / "runs" / name).rename(tmp_path / name)


# -- figures and verdict ----------------------------------------------------------------------------------------


LABELS = np.arange(300) % 3


def scored(method: str, right: float, seconds: float = 10.0, seed: int = 0, **more: Any) -> Scored:
    """Predictions of which about a share `right` is right, the others a class further."""
    wrong = np.random.default_rng(seed).random(len(LABELS)) >= right
    given = {"validation": (0.5,), "peak_bytes": (10**9,), "parameters": 1_200_000, **more}
    return Scored(method, (LABELS + wrong) % 3, seconds=(seconds,), **given)


def verdict_of(*tuned: Scored, frozen: Scored | None = None, monitor: str = "macro_f1") -> str:
    found = compare(frozen or scored("frozen", 0.5), tuned, LABELS, CLASSES, CLASSES[0], monitor, "folds")
    assert found.text().splitlines()[-1] == found.text(markdown=True).splitlines()[-1] == found.verdict
    return found.verdict


def test_a_better_model_is_named_with_its_runs():
    runs = (Path("a/fold1/x"), Path("a/fold2/x"))
    said = verdict_of(scored("lora-8", 0.8, seed=1, runs=runs), scored("full", 0.3, seed=2))
    assert said.startswith("verdict: use lora-8 (macro_f1 +0.") and said.endswith("saved: a/fold1/x, a/fold2/x")
    assert "1.2 M trained parameters" in said and "not told apart" not in said


def test_the_frozen_features_are_kept_when_nothing_is_better():
    said = verdict_of(scored("lp_ft", 0.52, seed=3), scored("full", 0.2, seed=2))
    assert said.startswith("verdict: keep the frozen features: no tuned model is significantly better on 300 test rows")
    assert "(best: lp_ft, macro_f1 " in said


def test_a_worse_model_is_never_used_however_sure_it_is_worse():
    assert verdict_of(scored("full", 0.1, seed=2)).startswith("verdict: keep the frozen features")


def test_the_cheapest_that_is_not_told_apart_stands_beside():
    best, near = scored("full", 0.82, 90, seed=1), scored("lora-8", 0.80, 20, seed=2)
    said = verdict_of(best, near, scored("last-2", 0.81, 40, seed=1), scored("lp_ft", 0.65, 1, seed=3))
    assert said.startswith("verdict: use full") and "; lora-8, not told apart from it (p 0." in said
    assert "takes 20 s a fold, not 90 s" in said
    assert "not told apart" not in verdict_of(scored("full", 0.82, 10, seed=1), scored("lora-8", 0.80, 20, seed=2))


def test_the_table_marks_models_that_predict_one_class():
    always = scored("full", 1.0, collapsed=(1,))
    object.__setattr__(always, "predictions", np.zeros_like(LABELS))
    found = compare(scored("frozen", 0.5), [always], LABELS, CLASSES, CLASSES[0], "accuracy", "folds")
    assert [row.get("note", "") for row in found.rows] == ["", "predicts one class only", ""]
    assert "note" in found.columns and "full (predicts one class only)" in found.verdict
    assert {name: found.rows[1][name] for name in ("accuracy", "macro_f1")} == pytest.approx(
        {name: found.rows[2][name] for name in ("accuracy", "macro_f1")}
    )


def test_the_points_of_a_grid_are_marked_too():
    tuned = [scored("full", 0.6, collapsed=(1,), point={"lr": 1e-5}), scored("full", 0.6, point={"lr": 2e-5})]
    found = compare(scored("frozen", 0.5), tuned, LABELS, CLASSES, CLASSES[0], "accuracy", "folds")
    assert [row.get("note", "") for row in found.points] == ["predicts one class only", ""]
    assert "predicts one class only" in found.text()


def test_the_table_marks_models_that_kept_their_start():
    twice = {"validation": (0.5, 0.6)}
    tuned = [scored("lp_ft", 0.5, at_start=(2,), **twice), scored("soup", 0.5, at_start=(1, 2), **twice)]
    found = compare(scored("frozen", 0.5), tuned, LABELS, CLASSES, CLASSES[0], "accuracy", "folds")
    assert [row.get("note", "") for row in found.rows] == ["", "kept its start in fold 2", "kept its start", ""]


def test_what_the_intervals_leave_out_is_said():
    """Rows are drawn anew, trainings aren't; and the leader of several is chosen by the rows that score it."""

    def notes(*tuned: Scored) -> str:
        return " ".join(compare(scored("frozen", 0.5), tuned, LABELS, CLASSES, CLASSES[0], "accuracy", "folds").notes)

    two = notes(scored("lp_ft", 0.6), scored("full", 0.6, seed=1))
    assert "each method was trained once a fold, and another training would come to other figures" in two
    assert "which of 2 methods leads is told by the same test rows" in two
    assert "leads" not in notes(scored("lp_ft", 0.6))


def test_nothing_but_the_frozen_head():
    assert verdict_of().startswith("verdict: nothing was tuned")


def test_validation_chooses_the_point_whatever_the_test_rows_say():
    chosen = scored("lp_ft", 0.4, seed=1, validation=(0.6, 0.7), point={"lr": 1e-5})
    better = scored("lp_ft", 0.9, seed=2, validation=(0.7, 0.5), point={"lr": 1e-4})
    found = compare(scored("frozen", 0.5), [better, chosen], LABELS, CLASSES, CLASSES[0], "macro_f1", "folds")
    assert [row.get("lr") for row in found.rows] == [None, "1e-05", None]
    assert [(row["lr"], row["validation macro_f1"], row["chosen"]) for row in found.points] == [
        ("0.0001", pytest.approx(0.6), ""),
        ("1e-05", pytest.approx(0.65), "yes"),
    ]
    assert found.verdict.startswith("verdict: keep the frozen features") and "lp_ft at lr 1e-05" in found.verdict
    assert not {"accuracy", "macro_f1"} & set(found.points[0])  # of the test rows


def test_a_monitored_loss_is_the_smaller_the_better():
    high = scored("lp_ft", 0.8, seed=1, validation=(-0.9,), point={"lr": 1e-5})
    low = scored("lp_ft", 0.7, seed=2, validation=(-0.8,), point={"lr": 1e-4})
    found = compare(scored("frozen", 0.5), [high, low], LABELS, CLASSES, CLASSES[0], "loss", "folds")
    assert [(row["chosen"], row["validation loss"]) for row in found.points] == [("", 0.9), ("yes", 0.8)]
    assert "accuracy +" in found.verdict


def test_p_agrees_with_the_exact_test_of_pairs():
    """Of accuracy: the rows that only one of both has right are tossed coins, if they are alike (McNemar)."""
    from scipy.stats import binomtest

    frozen, tuned = scored("frozen", 0.5, seed=5), scored("lp_ft", 0.58, seed=6)
    [tested], _ = paired_tests(frozen, [tuned], LABELS, 3, "accuracy")
    a, b = (one.predictions == LABELS for one in (frozen, tuned))
    exact = binomtest(int((b & ~a).sum()), int((a ^ b).sum())).pvalue
    assert tested.difference == pytest.approx(b.mean() - a.mean())
    assert tested.p == pytest.approx(exact, abs=0.05) and tested.holm == tested.p
    assert tested.low < tested.difference < tested.high


def rejected(p: Sequence[float], level: float) -> set[int]:
    """Holm's procedure by its definition: from the smallest on, until one is above level / (how many are left)."""
    found: set[int] = set()
    for k in sorted(range(len(p)), key=lambda k: p[k]):
        if p[k] > level / (len(p) - len(found)):
            break
        found.add(k)
    return found


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.4, 0.6], [0.02], [0.03, 0.03, 0.03], []])
def test_holm(p: list[float]):
    adjusted = holm(p)
    assert len(adjusted) == len(p) and all(0 <= value <= 1 for value in adjusted)
    for level in np.linspace(0.0003, 0.9997, 701):
        assert rejected(p, level) == {k for k, value in enumerate(adjusted) if value <= level}


# -- the command of a cell --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        TuneSettings(),
        TuneSettings(tune="last-3", lr=1.25e-5, layer_decay=0.9, augment=("text", "image"), train_batch_norm=True),
        TuneSettings(
            lora=4, lora_alpha=8.0, class_weights={"good": 2.0, "bad": 1 / 3, "rain": 1.0}, soup=3, wise_ft=True
        ),
        *(
            TuneSettings(**{k: v for k, v in recipe.items() if k in TuneSettings.__dataclass_fields__})
            for recipe in TUNING_RECIPES.values()
        ),
    ],
)
def test_settings_come_back_from_the_command_that_gives_them(settings: TuneSettings):
    parser = new_parser("")
    add_tuning_options(parser)
    assert tuning_settings(parser.parse_args(tuning_command(settings)), CLASSES) == settings


def test_a_cell_is_named_by_all_that_decides_it():
    base = TuneSettings()
    different = [
        Candidate("lp_ft", base),
        Candidate("full", base),
        Candidate("lp_ft", TuneSettings(lr=1e-3)),
        Candidate("lp_ft", TuneSettings(seed=1)),
        Candidate("lp_ft", base, dropout=0.1),
        Candidate("lp_ft", base, besides={"live_trunk": True}),
        Candidate("soup", comparison.settings_of("soup", base)),
    ]
    assert len({candidate.name for candidate in different}) == len(different)
    assert different[0].name == Candidate("lp_ft", TuneSettings(checkpoint_steps=5)).name
    assert different[0].name == Candidate("lp_ft", TuneSettings(micro_bs=4)).name  # what an error asks for
    assert comparison.settings_of("lp_ft", TuneSettings(lora_alpha=3.0)) == base


def test_the_folds_keep_duplicates_together_and_do_not_depend_on_what_is_in_quarantine(tmp_path: Path):
    from modeling.experiments.experiment import ExperimentSettings, load_experiment
    from modeling.features.joined import FeatureSource
    from modeling.heads.config import HeadConfig

    hashes = {"image_hash": np.repeat(np.arange(45), 2) + 1}
    parts = []
    for name, quarantined in (("whole", ()), ("less", (3, 50))):
        make_cache(tmp_path / name, "clip", facts=hashes, quarantined=quarantined)
        source = FeatureSource(tmp_path / name, ("clip",), ("clip",))
        experiment = load_experiment(ExperimentSettings(source, device="cpu"), [HeadConfig()])
        parts.append(comparison.outer_folds(experiment, 3, 0.2, 7).splits)
    for whole, less in zip(*parts, strict=True):
        assert less == whole.without(["p3", "p50"])
        of_pair = [{int(i[1:]) // 2 for i in rows} for rows in (whole.train, whole.val, whole.test)]
        assert not any(a & b for a, b in itertools.combinations(of_pair, 2))
        assert abs(len(whole.test) - 30) <= 2 and abs(len(whole.val) - 12) <= 2
    assert sorted(i for split in parts[0] for i in split.test) == sorted(f"p{i}" for i in range(90))
