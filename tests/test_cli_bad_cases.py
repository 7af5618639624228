"""bad_cases.py as a user runs it: training rows that a head gets wrong when it hasn't seen them."""

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import CLASSES, make_cache, make_tags, read
from conftest import content
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from modeling import bad_cases, sweep_heads, train_head
from modeling.experiments.experiment import Experiment, experiment_of_run
from modeling.prediction.out_of_fold import unseen_folds
from modeling.runs.folder import load_run, read_predictions
from modeling.runs.listing import newest_run

SHORT = ["--ep", "4", "--D", "8", "--bs", "16", "--lr", "1e-2"]
WRONG = ("p0", "p7", "p16", "p33")  # rows whose label is not what their features say


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pairs, four of them with the features of another class, told without doubt."""
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip")
    ids = [f"p{i}" for i in range(90)]
    tags = make_tags(90)
    changed = {}
    for name in ("image_feats", "text_feats"):
        changed[name] = read(folder, "clip", name, ids).astype(np.float16)
        centres = {tag: changed[name][[t == tag for t in tags]].mean(0) for tag in CLASSES}
        for row in map(ids.index, WRONG):
            other = "positive" if tags[row] == "negative" else "negative"
            changed[name][row] = 2 * centres[other]
    (folder / "clip_train.h5").unlink()
    make_cache(folder, "clip", changed=changed)
    return folder


def train(feats: Path, runs: Path, *argv: str) -> Path:
    assert train_head.main(["--vtype", "clip", "--feats", str(feats), "--runs", str(runs), *SHORT, *argv]) == 0
    return newest_run(runs)


def export(runs: Path, *argv: str) -> int:
    return bad_cases.main(["--runs", str(runs), *argv])


def of_run(path: Path) -> Experiment:
    run = load_run(path)
    return experiment_of_run(run, run.source, "cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check(rows: Sequence[dict[str, str]], train: Sequence[str]) -> None:
    tag_of = dict(zip([f"p{i}" for i in range(90)], make_tags(90), strict=True))
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["id"] in train and row["tag"] == tag_of[row["id"]] != row["pred"]
        assert max(CLASSES, key=lambda name, row=row: float(row[f"p_{name}"])) == row["pred"]
    confidence = [max(float(row[f"p_{name}"]) for name in CLASSES) for row in rows]
    assert confidence == sorted(confidence, reverse=True)


def test_training_rows_that_are_wrong_the_surest_first(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    older = train(feats, tmp_path, "--seed", "1")
    path = train(feats, tmp_path, "--val-ratio", "0.2", "--test-ratio", "0.1", "--ep", "30")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    capsys.readouterr()
    assert export(tmp_path) == 0  # of the newest run, with the caches it was trained on
    out, split = capsys.readouterr().out, content(path, "split")
    rows = rows_of(path / "bad_cases.csv")
    check(rows, split["train"])
    planted = [i for i in WRONG if i in split["train"]]
    assert len(planted) >= 2 and set(planted) <= {row["id"] for row in rows}
    assert f"{len(rows)} of {len(split['train'])} training rows wrong in 5-fold" in out and f"-> {path}" in out
    counts = [line.split()[1:] for line in out.splitlines() if line.split()[0] in CLASSES]
    confusion = np.array(counts, int)
    assert confusion.sum() == len(split["train"]) and confusion.sum() - np.trace(confusion) == len(rows)
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "bad_cases.csv"} == before
    assert not (older / "bad_cases.csv").exists()


def test_a_file_that_isnt_ours_is_not_replaced(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = train(feats, tmp_path)
    cache, before = feats / "clip_train.h5", (feats / "clip_train.h5").read_bytes()
    (tmp_path / "submission.csv").write_text("guid,tag\n1,a\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    for out in (cache, tmp_path / "submission.csv"):
        line = refused(capsys, tmp_path, "--out", str(out))
        assert str(out) in line and "id,tag,pred" in line and "give another file with --out" in line
    for _ in range(2):
        assert export(tmp_path, "--run", str(path), "--folds", "2", "--out", str(tmp_path / "link.csv")) == 0
    assert (tmp_path / "link.csv").is_symlink() and rows_of(tmp_path / "target.csv")
    assert cache.read_bytes() == before and (tmp_path / "submission.csv").read_text() == "guid,tag\n1,a\n"


def test_every_misclassified_row_is_there(feats: Path, tmp_path: Path):
    """scikit-learn's logistic regression, trained on the same rows."""
    argv = ["--head", "linear", "--C", "0.1", "--norm", "standard", "--val-ratio", "0.2"]
    path = train(feats, tmp_path, *argv)
    assert export(tmp_path, "--run", str(path), "--folds", "3", "--out", str(tmp_path / "new" / "bad.csv")) == 0
    rows = rows_of(tmp_path / "new" / "bad.csv")
    experiment = of_run(path)
    folds = unseen_folds(content(path, "split")["train"], 3, experiment, 0.2)
    tag_of = dict(zip([f"p{i}" for i in range(90)], make_tags(90), strict=True))

    def matrix(ids: Sequence[str], like: Sequence[str]) -> np.ndarray:
        of_side = [[read(feats, "clip", f"{side}_feats", names) for names in (ids, like)] for side in ("image", "text")]
        return np.concatenate([StandardScaler().fit(rest).transform(x) for x, rest in of_side], 1)

    wrong = {}
    for fold in folds:
        parts = [set(fold.train), set(fold.val), set(fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 72 and len(fold.val) == pytest.approx(48 / 5, abs=2)
        model = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
        model.fit(matrix(fold.train, fold.train), [tag_of[i] for i in fold.train])
        predicted = model.predict(matrix(fold.test, fold.train))
        wrong |= {i: p for i, p in zip(fold.test, predicted, strict=True) if p != tag_of[i]}
    assert sorted(i for fold in folds for i in fold.test) == content(path, "split")["train"]
    assert {row["id"]: row["pred"] for row in rows} == wrong and len(wrong) > 2


def test_only_those_as_sure_as_asked(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = train(feats, tmp_path, "--head", "linear", "--C", "0.1")
    capsys.readouterr()
    export(tmp_path)
    every = read_predictions(path / "bad_cases.csv")
    wrong = f"{len(every[0])} of {len(content(path, 'split')['train'])} training rows wrong"
    out = capsys.readouterr().out
    assert wrong in out and "confidence" not in out
    middle = np.median(every[2].max(1)) + 1e-6
    export(tmp_path, "--min-confidence", str(middle), "--out", str(tmp_path / "sure.csv"))
    sure = read_predictions(tmp_path / "sure.csv")
    wanted = [i for i, row in zip(every[0], every[2], strict=True) if row.max() >= middle]
    assert sure[0] == wanted and 0 < len(wanted) < len(every[0])
    out = capsys.readouterr().out
    assert wrong in out and f", {len(wanted)} of them with confidence {middle:g} or more, the surest first" in out
    export(tmp_path, "--min-confidence", "1", "--out", str(tmp_path / "certain.csv"))
    certain = read_predictions(tmp_path / "certain.csv")[0]
    assert set(certain) < set(wanted)
    assert f"{wrong} in 5-fold out-of-fold predictions, {len(certain)} of them with" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["nan", "9", "-0.1", "inf"])
def test_a_confidence_that_is_no_probability(given: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert refused(capsys, tmp_path, f"--min-confidence={given}").startswith(
        f"error: --min-confidence {given}: expected a probability, 0 to 1"
    )


def test_of_a_sweeps_run_and_of_several_seeds(feats: Path, tmp_path: Path):
    grid = ["--head", "mlp", "--D", "8", "--ep", "4", "--lr", "1e-2"]
    assert sweep_heads.main(["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), *grid]) == 0
    (path,) = (p.parent for p in (tmp_path / "sweep").glob("*/config.json"))
    seeds = train(feats, tmp_path, "--seeds", "2", "--ablation", "1")
    for run in (path, seeds):
        assert export(tmp_path, "--run", str(run)) == 0
        check(rows_of(run / "bad_cases.csv"), content(run, "split")["train"])


def random_cache(folder: Path, tags: Sequence[str], twins: bool = False) -> None:
    """Features that tell nothing; with `twins` rows 0 and 1, 2 and 3, ... are the same pair."""
    rng = np.random.default_rng(0)
    rows = np.arange(len(tags)) // 2 if twins else np.arange(len(tags))
    changed = {name: rng.normal(size=(len(tags), 8))[rows].astype(np.float16) for name in ("image_feats", "text_feats")}
    make_cache(folder, "clip", tags=tags, changed=changed, facts={"image_hash": rows + 1, "text_key": rows + 1})


@pytest.mark.slow
def test_no_row_has_a_say_in_what_predicts_it(tmp_path: Path):
    """Of noise a coin's share is wrong; the best of many epochs by the predicted rows would look better."""
    random_cache(tmp_path / "feats", [("a", "b")[i % 2] for i in range(240)])
    path = train(tmp_path / "feats", tmp_path, "--ep", "60", "--lr", "5e-2")
    assert export(tmp_path) == 0
    assert len(rows_of(path / "bad_cases.csv")) > 0.42 * len(content(path, "split")["train"])


@pytest.mark.parametrize("duplicates", ["together", "apart"])
def test_duplicates_fall_as_in_the_run(duplicates: str, tmp_path: Path):
    """Noise can be told only by a row's twin."""
    random_cache(tmp_path / "feats", list(np.random.default_rng(1).choice(CLASSES, 60).repeat(2)), twins=True)
    head = ["--head", "kernel", "--gamma", "8", "--ridge", "0.001"]
    path = train(tmp_path / "feats", tmp_path, *head, "--duplicates", duplicates)
    assert export(tmp_path) == 0
    share = len(rows_of(path / "bad_cases.csv")) / len(content(path, "split")["train"])
    assert share > 0.55 if duplicates == "together" else share < 0.45


def test_a_rare_class_costs_no_training_rows(tmp_path: Path):
    random_cache(tmp_path / "feats", [*["a", "b"] * 58, *["c"] * 4])
    path = train(tmp_path / "feats", tmp_path)
    ids = content(path, "split")["train"]
    experiment = of_run(path)
    assert len(ids) == 108 and experiment.features.tags_of(ids).count("c") == 3
    folds = unseen_folds(ids, 5, experiment, 0.1)
    assert [(len(f.train), len(f.val), len(f.test)) for f in folds] == [(65, 7, 36)] * 3
    assert all("c" in experiment.features.tags_of(part) for f in folds for part in (f.train, f.val, f.test))
    assert export(tmp_path) == 0


def test_of_few_rows(tmp_path: Path):
    """The run's share of the other rows may be too few to hold every class: then it is one of each."""
    random_cache(tmp_path / "feats", make_tags(30))
    path = train(tmp_path / "feats", tmp_path)
    experiment = of_run(path)
    assert {len(f.val) for f in unseen_folds(content(path, "split")["train"], 5, experiment, 0.1)} == {3}
    assert export(tmp_path) == 0


@pytest.mark.parametrize("twins", [False, True])
def test_a_class_too_rare_to_part_in_three(twins: bool, tmp_path: Path, capsys: pytest.CaptureFixture):
    rare = 6 if twins else 3  # of which a pair or one is validated
    random_cache(tmp_path / "feats", [*["a", "a", "b", "b"] * 28, *["c"] * rare], twins=twins)
    path = train(tmp_path / "feats", tmp_path, "--val-ratio", "0.4" if twins else "0.1")
    line = refused(capsys, tmp_path)
    assert f"class 'c' has {4 if twins else 2} training rows, expected at least 3 that are no duplicates" in line
    assert "one to validate by" in line and "kernel" not in line and not (path / "bad_cases.csv").exists()


def test_a_rare_class_of_duplicates(tmp_path: Path):
    """All of its pairs would fall into the larger part of an uneven split."""
    random_cache(tmp_path / "feats", [*["a", "a", "b", "b"] * 28, *["c"] * 12], twins=True)
    train(tmp_path / "feats", tmp_path)
    assert export(tmp_path) == 0


def test_too_few_folds_for_a_rare_class(tmp_path: Path, capsys: pytest.CaptureFixture):
    random_cache(tmp_path / "feats", [*["a", "b"] * 58, *["c"] * 4])
    train(tmp_path / "feats", tmp_path)
    assert "with --folds 2 some class isn't left" in refused(capsys, tmp_path, "--folds", "2")


def test_a_run_by_name(feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = train(feats, tmp_path / "runs")
    newest = train(feats, tmp_path / "runs", "--seed", "1")
    monkeypatch.chdir(tmp_path)
    assert bad_cases.main(["--runs", "runs", "--run", path.name]) == 0
    assert (path / "bad_cases.csv").is_file() and not (newest / "bad_cases.csv").exists()


def test_a_cache_in_a_folder(feats: Path, tmp_path: Path):
    home = tmp_path / "feats"
    shutil.copytree(feats, home)
    (home / "sub").mkdir()
    (home / "clip_train.h5").rename(home / "sub" / "clip_train.h5")
    path = train(home, tmp_path, "--vtype", "sub/clip", "--norm", "standard")
    assert bad_cases.main(["--run", str(path)]) == 0


def test_labels_that_are_gone(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    home = tmp_path / "feats"
    shutil.copytree(feats, home)
    path = train(home, tmp_path)
    split = content(path, "split")
    with h5py.File(home / "clip_train.h5", "r+") as file:
        tags = file["tag"][:]
        for row in (3, 5, 8, 13):
            file["tag"][row] = b""
    lost = len({"p3", "p5", "p8", "p13"} & set(split["train"]))
    capsys.readouterr()
    assert export(tmp_path) == 0
    err = capsys.readouterr().err
    assert err == f"warning: {lost} of {len(split['train'])} training rows have no label any more: left out\n"
    rows = rows_of(path / "bad_cases.csv")
    check(rows, split["train"])
    assert rows and not {row["id"] for row in rows} & {"p3", "p5", "p8", "p13"}
    for blanked, told in (
        (tags == tags, "none of the run's .* training rows has a label .*--feats"),
        (tags != b"positive", "'positive'.*two classes or more"),
    ):
        with h5py.File(home / "clip_train.h5", "r+") as file:
            file["tag"][:] = np.where(blanked, b"", tags)
        assert re.search(told, refused(capsys, tmp_path))
    with h5py.File(home / "clip_train.h5", "r+") as file:
        file["tag"][:] = np.where(tags == b"neutral", b"", tags)  # one class of three
    assert export(tmp_path) == 0
    with h5py.File(home / "clip_train.h5", "r+") as file:
        file["tag"][:] = np.where(tags == b"neutral", b"mixed", tags)
    assert "labels mixed" in refused(capsys, tmp_path)


def refused(capsys: pytest.CaptureFixture, runs: Path, *argv: str) -> str:
    """The error of a refused command, after its warnings."""
    capsys.readouterr()
    assert export(runs, *argv) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings)
    return error


def test_what_has_no_training_rows_of_its_own_is_refused(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def refused_here(*argv: str) -> str:
        return refused(capsys, tmp_path, *argv)

    assert "no complete run" in refused_here()
    folds = train(feats, tmp_path, "--folds", "2")
    assert "cross-validation" in refused_here("--run", str(folds)) and "--val-ratio" in refused_here()
    given = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), "--auto", "--head", "kernel"]
    assert sweep_heads.main([*given, "--gamma", "1", "--ridge", "1"]) == 0
    line = refused_here()
    assert "ensemble of --auto" in line and "train with modeling/train_head.py" in line and "--run" in line
    assert not list(tmp_path.glob("*/bad_cases.csv"))
    assert "is no run" in refused_here("--run", str(tmp_path / "typo"))
    path = train(feats, tmp_path)
    assert "no cache" in refused_here("--feats", str(tmp_path / "elsewhere"))
    assert str(tmp_path) in refused_here("--out", str(tmp_path))  # a folder
    make_cache(tmp_path / "other", "clip", fingerprint={"weights_sha256": "1" * 64})
    assert "isn't what" in refused_here("--feats", str(tmp_path / "other"), "--run", str(path))
    make_cache(tmp_path / "fewer", "clip", 60)
    line = refused_here("--feats", str(tmp_path / "fewer"))
    assert "holds other rows" in line and '{"rows": 60}' in line and '{"rows": 90}' in line
    make_cache(tmp_path / "namesakes", "clip", fingerprint={"data": {"rows": 90, "ids_sha256": "1" * 64}})
    assert "holds other rows" in refused_here("--feats", str(tmp_path / "namesakes"))
    moved = train(shutil.copytree(feats, tmp_path / "moved"), tmp_path)
    shutil.rmtree(tmp_path / "moved")
    line = refused_here("--run", str(moved))
    assert str(tmp_path / "moved") in line and "no such folder" in line and "--feats" in line
