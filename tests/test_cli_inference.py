"""inference_head.py as a user runs it: the submission, votes, figures, raw pairs, and what is refused."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from caches import encoded_course, light_course, pair_options, submission
from conftest import ENVIRONMENT, ROOT

from feats.cache_reader import DONE, QUARANTINED
from feats.store import FeatureStore
from modeling import bad_cases, inference_head, train_head
from modeling.choices import VoteSettings
from modeling.evaluation import metrics
from modeling.features.loading import load_features
from modeling.prediction import cached as prediction
from modeling.runs.choosing import open_runs
from modeling.runs.folder import load_run
from modeling.runs.listing import list_runs, newest_run

CLASSES = ["negative", "neutral", "positive"]
WIDTHS = {"pix": ("image_feats", 6), "words": ("text_feats", 4)}
TRAIN = [f"t{i}" for i in range(60)]
TEST = [f"é{7 * i % 23},{i}" for i in range(23)]  # neither sorted nor free of commas


def make_cache(
    folder: Path,
    name: str,
    split: str,
    ids: Sequence[str],
    tags: Sequence[str],
    fingerprint: Mapping[str, object] | None = None,
    quarantined: Mapping[str, str] = {},
    broken: Sequence[str] = (),
    content: int = 0,
) -> Path:
    """Features around a corner for each class, noisy; those of untagged rows around the origin. Another `content`: other
    pictures and texts of the same ids."""
    dataset, width = WIDTHS[name]
    rng = np.random.default_rng(len(ids) + width + content)
    corners = np.eye(width) * 3
    values = np.array([corners[CLASSES.index(tag)] if tag in CLASSES else np.zeros(width) for tag in tags])
    values = (values + rng.normal(0, 1.5, values.shape)).astype(np.float16)
    values[[i in broken for i in ids], 1] = np.nan
    status = np.array([QUARANTINED if i in quarantined else DONE for i in ids], np.uint8)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_{split}.h5"
    made_by = {"encoder": name, "text_clean": "tweet"} | dict(fingerprint or {})
    with FeatureStore.create(path, ids, tags, made_by, {dataset: (width,)}, overwrite=True) as store:
        hashes = (
            {f"{dataset.partition('_')[0]}_hash": np.arange(len(ids), dtype=np.uint64) + content} if content else {}
        )
        store.write(np.arange(len(ids)), status, {dataset: values, **hashes}, quarantined)
        store.finish()
    return path


def tags_of(ids: Sequence[str]) -> list[str]:
    return [CLASSES[i % 4 % 3] for i in range(len(ids))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders feats/ (train and test of both caches) and runs/ (first: pix and words; second: words; third: both)."""
    root = tmp_path_factory.mktemp("trained")
    for name in WIDTHS:
        make_cache(root / "feats", name, "train", TRAIN, tags_of(TRAIN))
        make_cache(root / "feats", name, "test", TEST, [""] * len(TEST))
    for k, caches in enumerate((["pix", "words"], ["", "words"], ["pix", "words"])):
        sides = ["--vtype", *filter(None, caches[:1]), "--ttype", caches[1]]
        options = ["--D", "4", "--ep", "3", "--lr", "0.05", "--val-ratio", "0.2", "--seed", str(k), "--device", "cpu"]
        command = ["--feats", str(root / "feats"), "--runs", str(root / "runs"), *sides, *options]
        assert train_head.main(command) == 0
        (only,) = [path for path in list_runs(root / "runs") if path.name not in ("first", "second", "third")]
        only.rename(root / "runs" / ("first", "second", "third")[k])
    return root


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "home"))


def infer(home: Path, *more: str) -> int:
    folders = ["--feats", str(home / "feats"), "--runs", str(home / "runs")]
    return inference_head.main([*folders, "--device", "cpu", *more])


def refused(capsys: pytest.CaptureFixture, status: int) -> str:
    """The one line that a refused command prints on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ")
    return line


def edit_config(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((run / "config.json").read_text())
    edit(config)
    (run / "config.json").write_text(json.dumps(config))


def probabilities(home: Path, run: str, split: str = "test") -> np.ndarray:
    loaded = load_run(home / "runs" / run)
    return loaded.probabilities(load_features(home / "feats", split, loaded.source.image, loaded.source.text))


# -- the submission ---------------------------------------------------------------------------------------------


def test_as_typed_the_newest_run_predicts_the_test_split(home: Path):
    (home / "saved").mkdir()
    (home / "feats").rename(home / "saved" / "feats")
    (home / "runs").rename(home / "saved" / "runs")
    script = str(ROOT / "modeling" / "inference_head.py")
    out = subprocess.run([sys.executable, script], cwd=home, env=ENVIRONMENT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
    path = home / "saved" / "runs" / "third" / "submission_test.csv"
    assert out.stdout.startswith(
        f"newest run saved/runs/third: accuracy 0.750 on 12 validation rows\nrun saved/runs/third\ncaches {home / 'saved' / 'feats'}\n"
    )
    assert "23 predictions -> saved/runs/third/submission_test.csv" in out.stdout
    header, rows = submission(path)
    assert header == ["guid", "tag"] and [row[0] for row in rows] == TEST
    for name in CLASSES:
        count = sum(row[1] == name for row in rows)
        assert [name, str(count), f"{count / 23:.3f}"] in [line.split() for line in out.stdout.splitlines()]


def test_plain_prediction_imports_no_encoder_and_nothing_slow(home: Path):
    code = (
        "import sys; from modeling import inference_head as script; assert script.main(sys.argv[1:]) == 0; "
        "heavy = 'transformers torchvision clip PIL sklearn scipy torch._dynamo pandas matplotlib'.split(); "
        "print([name for name in [*heavy, 'feats.encoders.registry', 'feats.extraction.local'] if name in sys.modules])"
    )
    arguments = ["--feats", str(home / "feats"), "--runs", str(home / "runs"), "--device", "cpu"]
    out = subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


def test_without_a_header(home: Path, capsys: pytest.CaptureFixture):
    """Twice: the second time a file without a header is there already."""
    with_header, without = home / "a.csv", home / "runs" / "third" / "submission_test.csv"
    assert infer(home, "--proba", "--out", str(with_header)) == 0
    for _ in range(2):
        assert infer(home, "--no-header", "--proba") == 0
        lines = with_header.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("guid,tag") and without.read_text(encoding="utf-8").splitlines() == lines[1:]
    assert infer(home) == 0 and submission(without)[0] == ["guid", "tag"]
    # At a place that the user chose it might be anybody's list of labels.
    assert infer(home, "--no-header", "--out", str(with_header)) == 0
    capsys.readouterr()
    assert "isn't known to hold predictions" in refused(capsys, infer(home, "--no-header", "--out", str(with_header)))


def test_predictions_are_the_run_s_most_probable_classes(home: Path):
    assert infer(home, "--run", "first", "--proba", "--out", str(home / "new" / "out.csv")) == 0
    header, rows = submission(home / "new" / "out.csv")
    assert header == ["guid", "tag", "p_negative", "p_neutral", "p_positive"]
    written = np.array([row[2:] for row in rows], float)
    np.testing.assert_allclose(written.sum(1), 1, atol=2e-6)
    np.testing.assert_allclose(written, probabilities(home, "first"), atol=1e-6)
    assert [row[1] for row in rows] == [CLASSES[k] for k in written.argmax(1)]
    assert not list((home / "new").glob(".*"))


def test_blocks_change_nothing(home: Path, monkeypatch: pytest.MonkeyPatch):
    for k, rows in enumerate((4, 1000)):
        monkeypatch.setattr(prediction, "BLOCK_ROWS", rows)
        monkeypatch.setattr(prediction, "WRITE_ROWS", rows)
        assert infer(home, "--proba", "--out", str(home / f"{k}.csv")) == 0
    (_, few), (_, all_at_once) = submission(home / "0.csv"), submission(home / "1.csv")
    assert [row[:2] for row in few] == [row[:2] for row in all_at_once]
    np.testing.assert_allclose(
        np.array([row[2:] for row in few], float), np.array([row[2:] for row in all_at_once], float), atol=2e-6
    )


def test_the_newest_whole_run_is_taken(home: Path, capsys: pytest.CaptureFixture):
    third = home / "runs" / "third"
    shutil.copytree(third, home / "runs" / ".fourth.1.writing")
    (home / "runs" / "fifth").mkdir()
    assert infer(home) == 0
    assert f"run {third}\n" in capsys.readouterr().out
    config = json.loads((home / "runs" / "second" / "config.json").read_text())
    config["created"] = "2999" + config["created"][4:]
    (home / "runs" / "second" / "config.json").write_text(json.dumps(config))
    assert infer(home) == 0
    out = capsys.readouterr()
    assert f"run {third}\n" in out.out and "second: it is dated 2999" in out.err and "in the future" in out.err


def test_a_run_by_name_or_path(home: Path):
    assert infer(home, "--run", "first") == 0
    assert infer(home, "--run", str(home / "runs" / "second")) == 0
    assert (home / "runs" / "first" / "submission_test.csv").is_file()
    assert (home / "runs" / "second" / "submission_test.csv").is_file()


# -- which caches -----------------------------------------------------------------------------------------------


def infer_as_trained(home: Path, folders: Mapping[str, Path], *more: str) -> int:
    """Without --feats, the runs having been trained on caches in `folders`."""
    for name, folder in folders.items():
        edit_config(home / "runs" / name, lambda config, folder=folder: config["features"].update(folder=str(folder)))
        edit_config(home / "runs" / name, lambda config, folder=folder: config.update(features_from_run=str(folder)))
    return inference_head.main(["--runs", str(home / "runs"), "--device", "cpu", "--run", *folders, *more])


def test_the_caches_are_those_of_the_run(home: Path, monkeypatch: pytest.MonkeyPatch):
    expected = probabilities(home, "third")
    (home / "feats").rename(home / "elsewhere")
    (home / "saved").mkdir()
    make_cache(
        home / "saved" / "feats", "pix", "test", TEST[:5], [""] * 5
    )  # of another data set, where most caches are
    monkeypatch.chdir(home)
    assert infer_as_trained(home, {"third": home / "elsewhere"}, "--proba") == 0
    _, rows = submission(home / "runs" / "third" / "submission_test.csv")
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), expected, atol=1e-6)


def test_each_of_several_runs_reads_its_own_caches(home: Path, capsys: pytest.CaptureFixture):
    (home / "other").mkdir()
    make_cache(home / "other" / "feats", "words", "test", TEST, tags_of(TEST))
    folders = {"first": home / "feats", "second": home / "other" / "feats"}
    assert infer_as_trained(home, folders, "--proba") == 0
    _, rows = submission(home / "runs" / "submission_test.csv")
    assert [row[0] for row in rows] == TEST
    second = load_run(home / "runs" / "second").probabilities(load_features(folders["second"], "test", [], ["words"]))
    assert np.abs(second - probabilities(home, "second")).max() > 0.1
    mean = (probabilities(home, "first") + second) / 2
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), mean, atol=1e-6)
    make_cache(home / "feats", "pix", "test", TEST, tags_of(TEST))
    for ids, tags, told in (
        (TEST[:20], [""] * 20, "23 and 20 rows, 20 in common"),
        (TEST, tags_of(TEST)[::-1], "the same ids, but 0 other pictures and [1-9][0-9]* other labels"),
    ):
        make_cache(folders["second"], "words", "test", ids, tags)
        line = refused(capsys, infer_as_trained(home, folders))
        assert re.search(told, line) and "of different data" in line and "--feats" in line
        assert all(str(folder) in line for folder in folders.values())


def test_a_run_whose_caches_are_gone_says_so(home: Path, capsys: pytest.CaptureFixture):
    line = refused(capsys, infer_as_trained(home, {"third": home / "gone"}))
    assert str(home / "gone") in line and "no such folder" in line and "--feats" in line
    assert infer(home) == 0


@pytest.fixture
def projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[Path, Path]:
    """Two projects of the same ids and the same names, each with one run, made there by commands without paths."""
    roots = tmp_path / "one", tmp_path / "two"
    for k, root in enumerate(roots):
        root.mkdir()
        monkeypatch.chdir(root)
        (root / "saved").mkdir()
        for split, ids, tags in (("train", TRAIN, tags_of(TRAIN)), ("test", TEST, [""] * len(TEST))):
            make_cache(root / "saved" / "feats", "pix", split, ids, tags, content=100 * (k + 1))
        assert train_head.main(["--vtype", "pix", "--D", "4", "--ep", "2", "--lr", "0.1", "--device", "cpu"]) == 0
        newest_run(root / "saved" / "runs").rename(root / "saved" / "runs" / f"run{k}")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return roots


def predicted_from(run: Path, capsys: pytest.CaptureFixture) -> Path:
    """The folder whose caches a run reads, judging by what is printed and by the probabilities."""
    status = inference_head.main(["--run", str(run), "--proba", "--device", "cpu"])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    (folder,) = (Path(line.removeprefix("caches ")) for line in said.out.splitlines() if line.startswith("caches "))
    _, rows = submission(run / "submission_test.csv")
    expected = load_run(run).probabilities(load_features(folder, "test", ["pix"], []))
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), expected, atol=1e-6)
    return folder


def test_the_working_directory_has_no_say_in_which_caches_are_read(
    projects: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    one, two = projects
    for here in (one, two, two / "saved", one / "saved" / "runs"):
        monkeypatch.chdir(here)
        run = Path(os.path.relpath(one / "saved" / "runs" / "run0"))
        assert predicted_from(run, capsys) == one / "saved" / "feats"
    assert bad_cases.main(["--run", str(run), "--folds", "2", "--device", "cpu"]) == 0
    assert f"caches {one / 'saved' / 'feats'}\n" in capsys.readouterr().out


def test_caches_that_move_along_with_the_run_are_found(projects: tuple[Path, Path], capsys: pytest.CaptureFixture):
    one, two = projects
    moved, copied = one.with_name("moved"), one.with_name("copied")
    shutil.copytree(one, copied)
    assert predicted_from(copied / "saved" / "runs" / "run0", capsys) == copied / "saved" / "feats"
    one.rename(moved)
    assert predicted_from(moved / "saved" / "runs" / "run0", capsys) == moved / "saved" / "feats"
    two.rename(one)  # where the run's caches were there are others now
    assert predicted_from(moved / "saved" / "runs" / "run0", capsys) == moved / "saved" / "feats"
    (moved / "saved" / "feats" / "pix_train.h5").unlink()
    line = refused(capsys, inference_head.main(["--run", str(moved / "saved" / "runs" / "run0"), "--device", "cpu"]))
    assert f"{moved / 'saved' / 'feats'}: no pix_train.h5 to know it by" in line
    assert f"{one / 'saved' / 'feats'}: its training rows are others" in line and line.endswith("with --feats")


def test_a_run_that_moves_alone_never_reads_the_caches_it_comes_to(
    projects: tuple[Path, Path], capsys: pytest.CaptureFixture
):
    one, two = projects
    run = Path(shutil.move(one / "saved" / "runs" / "run0", two / "saved" / "runs"))
    assert predicted_from(run, capsys) == one / "saved" / "feats"
    shutil.rmtree(one)
    for script in (inference_head, bad_cases):
        line = refused(capsys, script.main(["--run", str(run), "--device", "cpu"]))
        assert f"{two / 'saved' / 'feats'}: its training rows are others" in line
        assert f"{one / 'saved' / 'feats'}: no such folder" in line and line.endswith("name their folder with --feats")


def test_what_has_not_moved_needs_no_proof(projects: tuple[Path, Path], capsys: pytest.CaptureFixture):
    one, _ = projects
    (one / "saved" / "feats" / "pix_train.h5").unlink()
    assert predicted_from(one / "saved" / "runs" / "run0", capsys) == one / "saved" / "feats"


# -- votes ------------------------------------------------------------------------------------------------------


def test_soft_vote_is_the_mean(home: Path):
    assert infer(home, "--run", "first", "second", "third", "--proba") == 0
    _, rows = submission(home / "runs" / "submission_test.csv")
    mean = np.mean([probabilities(home, name) for name in ("first", "second", "third")], axis=0)
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), mean, atol=1e-6)
    assert [row[1] for row in rows] == [CLASSES[k] for k in mean.argmax(1)]


def test_majority_vote_takes_the_class_of_most_runs(home: Path):
    names = ["first", "second", "third"]
    assert infer(home, "--run", *names, "--vote", "majority", "--proba") == 0
    _, rows = submission(home / "runs" / "submission_test.csv")
    single = np.stack([probabilities(home, name).argmax(1) for name in names])
    counts = np.stack([(single == k).sum(0) for k in range(3)], 1)
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), counts / 3, atol=1e-6)
    for row, count in zip(rows, counts, strict=True):
        assert row[1] == ("neutral" if count.max() == 1 else CLASSES[count.argmax()])


def votes(*said: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """One row's probabilities by each run, as `combine` takes them."""
    return np.array(said, float)[:, None], np.ones((len(said), 1), bool)


@pytest.mark.parametrize(
    ("said", "tie", "expected"),
    [
        ([(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)], 1, 1),  # each another
        ([(0.9, 0.1, 0.0), (0.1, 0.6, 0.3), (0.0, 0.4, 0.6)], 2, 2),
        ([(0.9, 0.1, 0.0), (0.1, 0.6, 0.3), (0.0, 0.4, 0.6)], None, 1),  # the highest mean
        ([(0.6, 0.0, 0.4), (0.2, 0.0, 0.8)], 1, 2),  # nobody voted for the class of ties
        ([(0.4, 0.3, 0.3), (0.4, 0.3, 0.3), (0.0, 0.0, 1.0)], 2, 0),  # no tie
    ],
)
def test_ties_of_majorities(said: list[Sequence[float]], tie: int | None, expected: int):
    shares, predicted = prediction.combine(*votes(*said), "majority", tie)
    assert predicted == [expected] and shares.sum() == pytest.approx(1)


def test_runs_of_different_classes_dont_vote(home: Path, capsys: pytest.CaptureFixture):
    config = json.loads((home / "runs" / "second" / "config.json").read_text())
    config["classes"][0] = "angry"
    config["training_rows"]["angry"] = 3
    (home / "runs" / "second" / "config.json").write_text(json.dumps(config))
    line = refused(capsys, infer(home, "--run", "first", "second"))
    assert "different classes" in line and "angry" in line


def test_classes_are_matched_by_name(home: Path):
    """A run with its classes in another order votes for the same names."""
    config = json.loads((home / "runs" / "second" / "config.json").read_text())
    config["classes"] = ["positive", "negative", "neutral"]
    (home / "runs" / "second" / "config.json").write_text(json.dumps(config))
    assert infer(home, "--run", "first", "second", "--proba") == 0
    _, rows = submission(home / "runs" / "submission_test.csv")
    mean = (probabilities(home, "first") + probabilities(home, "second")[:, [1, 2, 0]]) / 2
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), mean, atol=1e-6)


# -- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["soft", "majority"])
def test_labelled_rows_give_figures(home: Path, capsys: pytest.CaptureFixture, vote: str):
    tags = tags_of(TEST)
    tags[5] = ""
    for name in WIDTHS:
        make_cache(home / "feats", name, "test", TEST, tags)
    assert infer(home, "--run", "third", "--vote", vote) == 0
    out = capsys.readouterr().out
    called = ["rows", "log_loss_calibrated", "ece_calibrated"]  # as in the tables of a run itself
    lines = [line.split() for line in out.splitlines()]
    assert (called in lines) == (vote == "soft")
    known = [row for row, tag in enumerate(tags) if tag]
    labels = [CLASSES.index(tags[row]) for row in known]
    figures = metrics.figures(labels, probabilities(home, "third")[known], CLASSES, "negative")
    shown = [f"{figures[name]:.3f}" for name in ("accuracy", "weighted_f1", "macro_f1")]
    calibration = [f"{figures[name]:.3f}" for name in ("log_loss", "ece")]
    assert ["test", "22", *shown] in lines
    assert (["test", *calibration] in lines) == (vote == "soft")
    edges = ["{:.3f}-{:.3f}".format(*figures["interval"][n]) for n in ("accuracy", "weighted_f1", "macro_f1")]
    assert ["95", "%", *edges] in lines
    always = [f"{figures['majority'][name]:.3f}" for name in ("accuracy", "weighted_f1", "macro_f1")]
    assert ["always", "negative", *always] in lines


def test_tied_votes_count_as_what_they_were_settled_to(home: Path):
    make_cache(home / "feats", "pix", "test", TEST, tags_of(TEST))
    make_cache(home / "feats", "words", "test", TEST, tags_of(TEST))
    runs = open_runs(home / "runs", ["first", "second"])
    predictions = prediction.predict_caches(runs, home / "feats", "test", VoteSettings("majority", "neutral"))
    figures = prediction.figures_of(predictions, "negative")
    labels = np.array([CLASSES.index(tag) for tag in predictions.rows.tags])
    assert figures["accuracy"] == (predictions.predicted == labels).mean()
    assert figures["confusion"] == metrics.confusion_matrix(labels, predictions.predicted, 3).tolist()


def test_a_foreign_label_costs_the_figures_not_the_predictions(home: Path, capsys: pytest.CaptureFixture):
    for name in WIDTHS:
        make_cache(home / "feats", name, "test", TEST, ["mixed", *tags_of(TEST)[1:]])
    assert infer(home) == 0
    out = capsys.readouterr()
    assert "no figures (labels mixed in the test data" in out.err and "weighted_f1" not in out.out
    assert len(submission(home / "runs" / "third" / "submission_test.csv")[1]) == len(TEST)


def blank_tags(path: Path, *rows: int) -> None:
    with h5py.File(path, "r+") as file:
        file["tag"][list(rows)] = [b""] * len(rows)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_are_gone_are_unknown(home: Path, capsys: pytest.CaptureFixture, split: str):
    ids = {"train": TRAIN, "test": TEST}[split]
    for name in WIDTHS:
        make_cache(home / "feats", name, split, ids, tags_of(ids))
        blank_tags(home / "feats" / f"{name}_{split}.h5", 2, 3, 7)
    assert infer(home, "--split", split) == 0
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [split, str(len(ids) - 3)] in shown
    for name in WIDTHS:
        blank_tags(home / "feats" / f"{name}_{split}.h5", *range(len(ids)))
    assert infer(home, "--split", split) == 0
    out = capsys.readouterr()
    assert "weighted_f1" not in out.out and out.err == ""
    assert len(submission(home / "runs" / "third" / f"submission_{split}.csv")[1]) == len(ids)


def test_figures_on_training_rows_are_called_so(home: Path, capsys: pytest.CaptureFixture):
    assert infer(home, "--split", "train") == 0
    assert "warning: 60 of these rows were trained on or validated with" in capsys.readouterr().err
    assert (home / "runs" / "third" / "submission_train.csv").is_file()


# -- rows without features --------------------------------------------------------------------------------------


def test_quarantined_rows_get_the_majority_class_and_are_named(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "feats", "pix", "test", TEST, [""] * 23, quarantined={TEST[4]: "picture is truncated"})
    for name in WIDTHS:
        (home / "feats" / f"{name}_train.h5").unlink()  # the run knows its classes
    assert infer(home, "--proba") == 0
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "warning: 1 of 23 rows have no features and get the most common class, negative:",
        f"  {TEST[4]}: pix: picture is truncated",
    ]
    _, rows = submission(home / "runs" / "third" / "submission_test.csv")
    assert [row[0] for row in rows] == TEST
    of_training = json.loads((home / "runs" / "third" / "split.json").read_text())["train"]
    tags = [tag for name, tag in zip(TRAIN, tags_of(TRAIN), strict=True) if name in of_training]
    shares = [tags.count(name) / 48 for name in CLASSES]
    assert rows[4] == [TEST[4], "negative", *(f"{share:.6f}" for share in shares)]
    others = [row for row in range(23) if row != 4]
    expected = probabilities(home, "third")
    np.testing.assert_allclose(np.array([rows[row][2:] for row in others], float), expected, atol=1e-6)


def test_a_row_that_some_runs_can_read_is_left_to_them(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "feats", "pix", "test", TEST, [""] * 23, quarantined={TEST[4]: "picture is truncated"})
    assert infer(home, "--run", "first", "second", "--proba") == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "warning: 1 of 23 rows lack features of some runs and are left to the others:"
    _, rows = submission(home / "runs" / "submission_test.csv")
    np.testing.assert_allclose(np.array(rows[4][2:], float), probabilities(home, "second")[4], atol=1e-6)


def test_caches_in_another_order_are_joined_by_id(home: Path):
    assert infer(home, "--run", "second", "--proba", "--out", str(home / "before.csv")) == 0
    assert infer(home, "--run", "first", "--proba", "--out", str(home / "first.csv")) == 0
    before = {row[0]: row[1:] for row in submission(home / "before.csv")[1]}
    first = {row[0]: row[1:] for row in submission(home / "first.csv")[1]}
    with FeatureStore.open(home / "feats" / "words_test.h5") as store:
        ids, values = store.ids.tolist()[::-1], store.read("text_feats")[::-1]
        fingerprint = store.fingerprint
    path = home / "feats" / "words_test.h5"
    with FeatureStore.create(path, ids, [""] * 23, fingerprint, {"text_feats": (4,)}, overwrite=True) as store:
        store.write(np.arange(23), np.full(23, DONE), {"text_feats": values})
        store.finish()
    assert infer(home, "--run", "first", "second", "--proba") == 0
    _, rows = submission(home / "runs" / "submission_test.csv")
    assert [row[0] for row in rows] == TEST
    for name, _, *p in rows:
        mean = (np.array(before[name][1:], float) + np.array(first[name][1:], float)) / 2
        np.testing.assert_allclose(np.array(p, float), mean, atol=3e-6)


# -- refusals ---------------------------------------------------------------------------------------------------


def test_a_cache_of_other_weights_is_refused(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "feats", "words", "test", TEST, [""] * 23, {"weights_sha256": "f00"})
    line = refused(capsys, infer(home))
    assert "the cache words" in line and "weights_sha256" in line and "f00" in line
    assert not (home / "runs" / "third" / "submission_test.csv").exists()


def test_text_cleaning_matters_only_to_those_who_read_texts(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "feats", "pix", "test", TEST, [""] * 23, {"text_clean": "none"})
    assert infer(home) == 0
    make_cache(home / "feats", "words", "test", TEST, [""] * 23, {"text_clean": "none"})
    capsys.readouterr()
    assert "text_clean" in refused(capsys, infer(home))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_run_is_refused(home: Path, capsys: pytest.CaptureFixture, damage: str):
    tensors = home / "runs" / "third" / "head.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    tensors.write_bytes(content[:-5] if damage == "truncated" else content)
    if damage == "gone":
        tensors.unlink()
    line = refused(capsys, infer(home, "--run", "third"))
    assert "damaged" in line and "train again" in line
    assert infer(home) == 0
    out = capsys.readouterr()
    (warning,) = out.err.splitlines()
    assert warning.startswith("warning: ") and f"{home / 'runs' / 'third'}" in warning and "damaged" in warning
    assert f"run {home / 'runs' / 'second'}\n" in out.out


def test_a_missing_cache_names_the_command_that_makes_it(home: Path, capsys: pytest.CaptureFixture):
    (home / "feats" / "words_test.h5").unlink()
    line = refused(capsys, infer(home))
    command = "python feats/<encoder>_extract_feats.py --splits test --name words "  # whose cache doesn't tell
    assert "words_test.h5" in line and command in line


def test_values_that_arent_finite_are_refused(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "feats", "words", "test", TEST, [""] * 23, broken=[TEST[2]])
    line = refused(capsys, infer(home))
    assert "NaN" in line and TEST[2] in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--run", "nope"], "nope is no run.*runs beside it: third"),
        (["--run", "first", "first"], "names a run twice"),
        (["--runs", "empty"], "no complete run in empty; train one with: python modeling/train_head.py"),
        (["--tie", "mixed"], "--tie mixed: no such class; there are negative, neutral, positive"),
        (["--csv", "a.csv", "--text", "b"], "--csv together with --image or --text"),
        (["--weights", "words=a.pt"], "--weights is for raw pairs"),
        (["--text", "b", "--weights", "a.pt", "--run", "second"], "--weights a.pt: expected CACHE=PATH"),
        (
            ["--text", "b", "--weights", "pix=a.pt", "--run", "second"],
            "--weights names pix; the caches in use are words",
        ),
        (["--text", "b"], "reads pix; give --image, too"),
        (["--csv", "nope.csv"], "cannot read nope.csv"),
        (["--device", "abacus"], "device 'abacus' can't be used"),
        (["--split", "nope"], "no cache .*pix_nope.h5"),
    ],
)
def test_what_cant_be_done_is_said_in_one_line(
    trained: Path, capsys: pytest.CaptureFixture, more: list[str], said: str
):
    assert re.search(said, refused(capsys, infer(trained, *more)))


def test_a_file_that_cant_be_written(home: Path, capsys: pytest.CaptureFixture):
    (home / "taken").mkdir()
    assert "give another file with --out" in refused(capsys, infer(home, "--out", str(home / "taken")))
    assert not list(home.glob(".taken*"))
    (home / "file").write_text("kept")
    line = refused(capsys, infer(home, "--out", str(home / "file" / "below.csv")))
    assert "give another file with --out" in line and (home / "file").read_text() == "kept"


def test_what_isnt_ours_is_not_replaced_and_nothing_is_computed_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    cache = home / "feats" / "pix_test.h5"
    before = cache.read_bytes()
    (home / "link.csv").symlink_to(home / "target.csv")
    assert infer(home, "--out", str(home / "link.csv")) == 0
    assert (home / "link.csv").is_symlink() and len(submission(home / "target.csv")[1]) == len(TEST)
    assert infer(home, "--proba", "--out", str(home / "target.csv")) == 0
    capsys.readouterr()
    monkeypatch.setattr(prediction, "predict_caches", lambda *args, **options: pytest.fail("predicted in vain"))
    line = refused(capsys, infer(home, "--out", str(cache)))
    assert str(cache) in line and "give another file with --out" in line
    assert cache.read_bytes() == before


def test_an_interruption_leaves_nothing_half_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class Interrupting:
        def writerows(self, rows: object) -> None:
            raise KeyboardInterrupt

    before = sorted(home.iterdir())
    monkeypatch.setattr(csv, "writer", lambda *args, **options: Interrupting())
    assert infer(home, "--out", str(home / "x.csv")) == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err
    assert sorted(home.iterdir()) == before


# -- raw pairs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course set in set/, its caches by the offline encoders in feats/, and one run in runs/."""
    return encoded_course(tmp_path_factory.mktemp("encoded"))


def cached_prediction(root: Path) -> list[list[str]]:
    assert infer(root, "--proba", "--out", str(root / "cached.csv")) == 0
    return submission(root / "cached.csv")[1]


def test_a_raw_pair_is_predicted_as_when_cached(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    name, tag, *cached = cached_prediction(encoded)[2]
    capsys.readouterr()
    assert infer(encoded, *pair_options(encoded, int(name)), "--proba", "--out", str(tmp_path / "raw.csv")) == 0
    ((_, predicted, *p),) = submission(tmp_path / "raw.csv")[1]
    assert predicted == tag
    np.testing.assert_allclose(np.array(p, float), np.array(cached, float), atol=1e-3)
    shown = ", ".join(f"{c} {float(x):.3f}" for c, x in zip(CLASSES, p, strict=True))
    assert f"\n{predicted} ({shown})\n" in capsys.readouterr().out


def test_a_manifest_is_predicted_as_when_cached(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    cached = cached_prediction(encoded)
    folder = encoded / "set" / "data"
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "text", "label"])
        writer.writerows([n, folder / f"{n}.jpg", folder / f"{n}.txt", CLASSES[0]] for n, *_ in cached)
        writer.writerow(["lost", folder / "lost.jpg", "no picture", CLASSES[1]])
    capsys.readouterr()
    assert infer(encoded, "--csv", str(tmp_path / "pairs.csv"), "--proba", "--vote", "soft") == 0
    out = capsys.readouterr()
    assert "1 of 7 rows have no features" in out.err and "lost: efficientnet: picture" in out.err
    assert "accuracy" in out.out and "7 predictions -> " in out.out
    (run,) = list_runs(encoded / "runs")
    _, rows = submission(run / "submission_pairs.csv")
    assert [row[0] for row in rows] == [*(row[0] for row in cached), "lost"]
    for row, before in zip(rows, cached, strict=False):
        np.testing.assert_allclose(np.array(row[2:], float), np.array(before[2:], float), atol=1e-3)


def test_a_pair_that_cant_be_encoded(encoded: Path, capfd: pytest.CaptureFixture):
    (encoded / "none.jpg").write_bytes(b"")
    assert infer(encoded, "--image", str(encoded / "none.jpg"), "--text", "a") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no row of the raw data") and "picture file is empty" in error


def test_an_encoder_with_other_weights_is_refused(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    home = Path(shutil.copytree(encoded, tmp_path / "home"))
    (run,) = list_runs(home / "runs")
    config = json.loads((run / "config.json").read_text())
    config["features"]["fingerprints"]["minilm"]["weights_sha256"] = "f00"
    (run / "config.json").write_text(json.dumps(config))
    assert infer(home, *pair_options(home, 24)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "weights_sha256" in error and "f00" in error and "--weights minilm=PATH" in error
    config["features"]["fingerprints"]["minilm"]["model"] = "other"
    (run / "config.json").write_text(json.dumps(config))
    assert infer(home, *pair_options(home, 24)) == 2
    assert "unknown model 'other'" in capsys.readouterr().err.splitlines()[-1]


def test_one_raw_pair_imports_only_what_its_encoders_need(tmp_path: Path):
    home = light_course(tmp_path / "light")
    code = (
        "import sys; from modeling import inference_head as script; assert script.main(sys.argv[1:]) == 0; "
        "heavy = 'transformers torchvision clip sklearn scipy torch._dynamo triton pandas matplotlib peft'.split(); "
        "print([name for name in heavy if name in sys.modules])"
    )
    arguments = ["--runs", str(home / "runs"), "--device", "cpu", *pair_options(home, 24)]
    out = subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


# -- formats, streams, and manifests that take long ---------------------------------------------------------------


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light_course(tmp_path_factory.mktemp("light"))


def raw_manifest(home: Path, path: Path, rows: int = 6) -> Path:
    """Pairs of the test part, with paths relative to the manifest."""
    pairs = home / "set" / "data"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "text"])
        for n in range(24, 24 + rows):
            text = (pairs / f"{n}.txt").read_text(encoding="utf-8")
            writer.writerow([f"é,{n}", os.path.relpath(pairs / f"{n}.jpg", path.parent), text])
    return path


def test_formats_hold_the_same(light: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    found = {}
    for name, *more in (("a.csv",), ("a.json",), ("a.JSONL",), ("other", "--format", "jsonl")):
        for _ in range(2):  # what is there already is of the kind, and replaced
            assert infer(light, "--proba", "--out", str(tmp_path / name), *more) == 0
        found[name] = (tmp_path / name).read_text(encoding="utf-8")
    _, rows = submission(tmp_path / "a.csv")
    expected = [
        {"guid": name, "tag": tag, "probabilities": dict(zip(CLASSES, map(float, p), strict=True))}
        for name, tag, *p in rows
    ]
    assert json.loads(found["a.json"]) == expected
    assert [json.loads(line) for line in found["a.JSONL"].splitlines()] == expected
    assert found["other"] == found["a.JSONL"]
    assert infer(light, "--out", str(tmp_path / "plain.json")) == 0
    assert json.loads((tmp_path / "plain.json").read_text()) == [
        {k: row[k] for k in ("guid", "tag")} for row in expected
    ]
    assert infer(light, "--format", "json") == 0
    [run] = list_runs(light / "runs")
    assert json.loads((run / "submission_test.json").read_text())[0]["guid"] == "24"


def test_json_in_blocks(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prediction, "WRITE_ROWS", 4)
    assert infer(light, "--out", str(tmp_path / "a.json")) == 0
    assert [row["guid"] for row in json.loads((tmp_path / "a.json").read_text())] == [str(n) for n in range(24, 30)]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--out", "a.xlsx"], "--out a.xlsx: .xlsx tells no format, known are .csv, .json, .jsonl"),
        (["--out", "a.json", "--no-header"], "--no-header with format json"),
        (["--out", "data.json"], "JSON that begins with ["),
        (["--out", "data.jsonl"], "isn't replaced"),
        (["--image", "none.jpg", "--text", "a"], "--image: cannot read none.jpg (no such file)"),
        (["--csv", "none.csv"], "--csv: cannot read none.csv"),
        (["--csv", "lost.csv"], "reads pixels, and no picture is there of all 2 rows (lost/1.jpg: no such file)"),
        (["--csv", "lost.csv"], "which column holds them with --columns image=NAME"),
    ],
)
def test_what_cant_be_is_said_before_an_encoder_is_loaded(
    light: Path, tmp_path: Path, options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    from modeling.prediction import raw_pairs

    monkeypatch.setattr(raw_pairs, "encoder_for", lambda *given: pytest.fail("an encoder was loaded"))
    monkeypatch.chdir(tmp_path)
    for name in ("data.json", "data.jsonl"):
        Path(name).write_text('{"mine": 1}\n')
    Path("lost.csv").write_text("id,image,text\n1,lost/1.jpg,a\n2,lost/2.jpg,b\n")
    before = sorted(tmp_path.iterdir())
    assert reason in refused(capsys, infer(light, *options))
    assert sorted(tmp_path.iterdir()) == before and Path("data.json").read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("kind", [pytest.param("csv", marks=pytest.mark.slow), "jsonl"])
def test_a_pipe_in_and_out(light: Path, tmp_path: Path, kind: str):
    """As typed: paths are relative to the working directory, and standard output holds nothing but predictions."""
    manifest = raw_manifest(light, tmp_path / "pairs.csv")
    assert infer(light, "--csv", str(manifest), "--out", str(tmp_path / "expected.csv")) == 0
    content = manifest.read_text(encoding="utf-8")
    if kind == "jsonl":
        content = "\n".join(json.dumps(row) for row in csv.DictReader(content.splitlines(keepends=True)))
    script = [sys.executable, str(ROOT / "modeling" / "inference_head.py"), "--runs", str(light / "runs")]
    out = subprocess.run(
        [*script, "--device", "cpu", "--csv", "-", "--out", "-"],
        input=content.encode(),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout == (tmp_path / "expected.csv").read_bytes()
    assert b"run " in out.stderr and b"predicted" in out.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.csv", "pairs.csv"]


def test_an_interrupted_manifest_goes_on_where_it_was(
    light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    from feats.extraction import local

    manifest, out = raw_manifest(light, tmp_path / "pairs.csv"), tmp_path / "out.csv"
    command = ["--csv", str(manifest), "--proba", "--out", str(out)]
    encoded: list[str] = []
    encode_blocks = local.encode_blocks

    def second_stops(plan, numbers, workers, told):
        if len(numbers):
            encoded.append(plan.encoder.identity["encoder"])
            if len(encoded) == 2:
                raise KeyboardInterrupt
        return encode_blocks(plan, numbers, workers, told)

    monkeypatch.setattr(local, "encode_blocks", second_stops)
    assert infer(light, *command) == 130
    assert "the same command goes on with them" in capsys.readouterr().err and not out.exists()
    assert infer(light, *command) == 0
    assert encoded == ["pixels", "vader", "vader"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "pairs.csv"]
    expected = out.read_bytes()
    # What another manifest left there isn't taken for this one's.
    encoded.clear()
    assert infer(light, "--csv", str(raw_manifest(light, tmp_path / "few.csv", 3)), "--out", str(out)) == 130
    assert infer(light, *command) == 0
    assert out.read_bytes() == expected
    assert not list(tmp_path.glob(".*"))
