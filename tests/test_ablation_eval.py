"""A trained two-sided head scored with a side absent: train_head.py and inference_head.py --ablation-eval."""

import csv
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import LABELS, content, make_course
from pairs import cached_pairs
from PIL import Image

from feats import ngrams_extract_feats, pixels_extract_feats
from feats.encoders.registry import load_encoder
from feats.images import decode_image, hash64
from feats.store import FeatureStore
from modeling import inference_head, train_head
from modeling.evaluation import metrics
from modeling.features.joined import FeatureSet, Ragged
from modeling.features.loading import load_features
from modeling.prediction import blank
from modeling.prediction.ablation import mean_row, without
from modeling.runs.folder import load_run
from modeling.runs.listing import list_runs
from modeling.runs.run import Run

ROWS, TEST_ROWS, COLUMNS = 45, 12, 32
BLACK = Image.new("RGB", (224, 224))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pairs in set.csv, 45 of split train and 12 of split test, and their caches pixels and ngrams in feats/."""
    root = tmp_path_factory.mktemp("home")
    make_course(root / "set", ROWS + TEST_ROWS)
    with (root / "set.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "text", "label", "split"])
        for i in range(ROWS + TEST_ROWS):
            split = "train" if i < ROWS else "test"
            rows.writerow([i, f"set/data/{i}.jpg", f"set/data/{i}.txt", LABELS[i % 3], split])
    extract(root)
    return root


def extract(root: Path, *more: str, columns: int = COLUMNS) -> None:
    common = ["--data", str(root / "set.csv"), "--out", str(root / "feats"), "--device", "cpu", "--workers", "0", *more]
    assert pixels_extract_feats.main([*common, "--size", "8"]) == 0
    assert ngrams_extract_feats.main([*common, "--hash-columns", str(columns)]) == 0


def folders(home: Path, runs: Path) -> list[str]:
    return ["--feats", str(home / "feats"), "--runs", str(runs), "--device", "cpu"]


TRAINING = ["--vtype", "pixels", "--ttype", "ngrams", "--norm", "standard", "--D", "8", "--ep", "3", "--lr", "1e-2"]


def trained(home: Path, runs: Path, *more: str) -> Run:
    before = set(list_runs(runs))
    assert train_head.main([*TRAINING, *folders(home, runs), "--ablation-eval", *more]) == 0
    [path] = set(list_runs(runs)) - before
    return load_run(path)


def replaced(data: FeatureSet, rows: dict[str, np.ndarray]) -> FeatureSet:
    """By hand: a row (1, D) in place of every row of some sides, each of one cache."""
    sides = {
        side: {name: torch.from_numpy(np.repeat(row, len(data), 0)) for name in getattr(data, side)}
        for side, row in rows.items()
    }
    return replace(data, **sides)


def blanks(columns: int = COLUMNS) -> dict[str, np.ndarray]:
    """What the encoders make of a black picture and of an empty text, without caches."""
    image = load_encoder("pixels", size=8).encode(images=[BLACK])["image"]
    text = load_encoder("ngrams", columns=columns).encode(texts=[""])["text"]
    return {"image": np.asarray(image, np.float16), "text": np.asarray(text, np.float16)}


def scored(run: Run, data: FeatureSet, ids: Sequence[str]) -> dict[str, Any]:
    labels = np.array([run.classes.index(tag) for tag in data.tags_of(ids)])
    return metrics.figures(labels, run.predict_proba(data, ids), run.classes)


def assert_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in (*metrics.AVERAGES, "n"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["log_loss_calibrated"] == pytest.approx(expected["log_loss"], rel=1e-4)


LEFT = {"text only": "image", "image only": "text"}  # what is left -> what is absent


@pytest.mark.parametrize("absent", ["blank", "mean"])
def test_figures_are_those_of_rows_replaced_by_hand(absent: str, home: Path, tmp_path: Path):
    run = trained(home, tmp_path, "--val-ratio", "0.3", "--test-ratio", "0.2", "--absent", absent)
    data = load_features(home / "feats", "train", "pixels", "ngrams")
    rows = blanks()
    if absent == "mean":
        train = data.positions(run.split.train)
        rows = {
            side: x[train].double().mean(0, keepdim=True).float().numpy()
            for side, x in (("image", data.image["pixels"]), ("text", data.text["ngrams"]))
        }
    figures = content(run.path, "metrics")
    assert list(figures["ablation_eval"]) == list(LEFT) == list(figures["ablation_eval_test"])
    for left, side in LEFT.items():
        changed = replaced(data, {side: rows[side]})
        assert_figures(figures["ablation_eval"][left], scored(run, changed, run.split.val))
        assert_figures(figures["ablation_eval_test"][left], scored(run, changed, run.split.test))
    both = scored(run, data, run.split.val)["log_loss"]
    assert all(abs(figures["ablation_eval"][left]["log_loss_calibrated"] - both) > 1e-3 for left in LEFT)


def test_members_of_folds_judge_the_rows_they_have_not_seen(home: Path, tmp_path: Path):
    run = trained(home, tmp_path, "--folds", "3", "--seeds", "2", "--absent", "mean")
    data = load_features(home / "feats", "train", "pixels", "ngrams")
    assert len(run.members) == 6
    for left, side in LEFT.items():
        labels, probabilities = [], []
        for k, split in enumerate(run.splits):
            own = replace(run, members=[m for m in run.members if m.fold == k + 1])
            x = {"image": data.image["pixels"], "text": data.text["ngrams"]}[side]
            row = x[data.positions(split.train)].float().mean(0, keepdim=True).numpy()
            probabilities.append(own.predict_proba(replaced(data, {side: row}), split.val))
            labels += [run.classes.index(tag) for tag in data.tags_of(split.val)]
        expected = metrics.figures(np.array(labels), np.concatenate(probabilities), run.classes)
        assert expected["n"] == ROWS
        assert_figures(content(run.path, "metrics")["ablation_eval"][left], expected)


def test_the_blank_pair_is_encoded_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("pixels", "ngrams"):
        (home / "feats" / f"{name}_blank.h5").unlink(missing_ok=True)
    first = trained(home, tmp_path)
    with FeatureStore.open(home / "feats" / "ngrams_blank.h5") as store:
        assert len(store) == 1
        np.testing.assert_array_equal(store.read("text_feats"), blanks()["text"])

    def broken(*args: Any, **options: Any) -> None:
        raise AssertionError("an encoder is loaded")

    monkeypatch.setattr(blank, "encoder_of", broken)
    second = trained(home, tmp_path, "--head", "concat")
    assert second.members[0].config.head.head == "concat" and "ablation_eval" in content(second.path, "metrics")
    assert content(first.path, "config")["options"]["ablation-eval"] is True


def test_a_cache_made_anew_gets_a_new_blank_row(home: Path, tmp_path: Path):
    own = Path(shutil.copytree(home, tmp_path / "own"))
    trained(own, tmp_path / "runs")
    extract(own, "--overwrite", columns=16)
    run = trained(own, tmp_path / "runs")
    with FeatureStore.open(own / "feats" / "ngrams_blank.h5") as store:
        assert store.features["text_feats"] == (16,)
    data = load_features(own / "feats", "train", "pixels", "ngrams")
    changed = replaced(data, {"text": blanks(16)["text"]})
    found = content(run.path, "metrics")["ablation_eval"]["image only"]
    assert_figures(found, scored(run, changed, run.split.val))


def test_a_blank_row_of_another_black_picture_is_made_anew(home: Path, tmp_path: Path):
    """A cache that joins later is given the picture of today, and rows are joined by the bytes of their pictures."""
    own = Path(shutil.copytree(home, tmp_path / "own"))
    first = trained(own, tmp_path / "runs")
    with h5py.File(own / "feats" / "pixels_blank.h5", "r+") as file:
        file["image_hash"][0] = 1
    second = trained(own, tmp_path / "runs")
    with FeatureStore.open(own / "feats" / "pixels_blank.h5") as store:
        assert store.facts("image_hash").tolist() == [hash64(blank.BLACK)]
    assert content(first.path, "metrics")["ablation_eval"] == content(second.path, "metrics")["ablation_eval"]


def test_the_black_picture_is_black():
    picture = decode_image(blank.BLACK)
    assert (picture.size, picture.getextrema()) == ((224, 224), ((0, 0),) * 3)


def test_a_user_s_split_named_blank_is_left_alone(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    own = Path(shutil.copytree(home, tmp_path / "own"))
    shutil.copy(own / "feats" / "pixels_test.h5", own / "feats" / "pixels_blank.h5")
    before = (own / "feats" / "pixels_blank.h5").read_bytes()
    assert train_head.main([*TRAINING, *folders(own, tmp_path / "runs"), "--ablation-eval"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pixels_blank.h5 holds other rows" in error and "--absent mean" in error
    assert (own / "feats" / "pixels_blank.h5").read_bytes() == before and not list_runs(tmp_path / "runs")


# -- inference_head.py ------------------------------------------------------------------------------------------


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """{part: {row: cells}} of what is printed; intervals and differences under the row above."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if line.startswith("test-time ablation"):
            part = found.setdefault(cells[0].partition(", ")[2], {})
        elif found and line and not line.startswith(("-", "run", "caches", "ensemble")):
            name = cells[0].partition(" (")[0]  # what predicts one class only is marked
            if not line.startswith(" "):
                above = name
            part[name if name == above else f"{above} {name}"] = cells[1:]
    return found


def test_any_saved_run_can_be_scored(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train_head.main([*TRAINING, *folders(home, tmp_path), "--val-ratio", "0.3"]) == 0
    [path] = list_runs(tmp_path)
    before = sorted(path.iterdir())
    capsys.readouterr()
    assert inference_head.main(["--ablation-eval", *folders(home, tmp_path)]) == 0
    found = tables(capsys.readouterr().out)
    assert list(found) == ["val", "test caches"] and sorted(path.iterdir()) == before
    run = load_run(path)
    data = {split: load_features(home / "feats", split, "pixels", "ngrams") for split in ("train", "test")}
    for part, of_part, ids in (
        ("val", data["train"], run.split.val),
        ("test caches", data["test"], data["test"].ids),
    ):
        both = scored(run, of_part, ids)
        for left, side in {"both": None, **LEFT}.items():
            changed = of_part if side is None else replaced(of_part, {side: blanks()[side]})
            figures = scored(run, changed, ids)
            assert found[part][left] == [str(len(ids)), *(f"{figures[name]:.3f}" for name in metrics.AVERAGES)]
            low, high = figures["interval"]["accuracy"]
            assert found[part][f"{left} 95 %"][0] == f"{low:.3f}-{high:.3f}"
            if side:
                drop = [f"{figures[name] - both[name]:+.3f}" for name in metrics.AVERAGES]
                assert found[part][f"{left} to both"] == drop


def test_scoring_leaves_no_predictions(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["--ablation-eval", *folders(home, tmp_path), "--out", str(tmp_path / "x.csv"), "--no-header"]
    assert inference_head.main(options) == 2
    assert "--ablation-eval with --out, --no-header: it scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--ablation", "1"], "--ablation-eval leaves one of two sides out, and there is the text alone"),
        (["--weights", "clip=x"], "--weights names clip; the caches in use are pixels, ngrams"),
        (["--absent", "mean", "--weights", "pixels=x"], "--weights with --absent mean: nothing is encoded"),
    ],
)
def test_what_makes_no_sense_is_said_before_training(
    more: list[str], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert train_head.main([*TRAINING, *folders(home, tmp_path), "--ablation-eval", *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list_runs(tmp_path)


def test_an_absent_side_is_for_the_ablation(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for main, argv in ((train_head.main, TRAINING), (inference_head.main, [])):
        assert main([*argv, *folders(home, tmp_path), "--absent", "mean"]) == 2
        assert (
            capsys.readouterr().err == "error: --absent mean is for --ablation-eval; give that, too, or leave it out\n"
        )
    assert not list_runs(tmp_path)


def test_one_class_is_marked_once(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = trained(home, tmp_path, "--lr", "1e-9", "--ep", "1", "--seed", "1")
    out = capsys.readouterr().out.splitlines()
    figures = content(run.path, "metrics")["ablation_eval"]
    lost = {left: found["collapsed"] for left, found in figures.items() if found["collapsed"]}
    assert lost
    for left, name in lost.items():
        [line] = [line for line in out if line.startswith(left)]
        assert line.startswith(f"{left} (always {name})  ") and line.count("always") == 1


def test_weights_are_for_what_encodes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train_head.main([*TRAINING, *folders(home, tmp_path), "--weights", "pixels=x"]) == 2
    assert "--weights is for --ablation-eval" in capsys.readouterr().err


# -- tokens, several caches, encoders with weights --------------------------------------------------------------


def test_token_heads(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = cached_pairs(tmp_path, 30, tokens=True)
    common = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    head = ["--vtype", "vit", "--ttype", "roberta", "--head", "coattention", "--D", "8", "--ep", "2", "--lr", "1e-2"]
    command = [*common, *head, "--val-ratio", "0.3", "--ablation-eval"]
    assert train_head.main(command) == 2  # nobody knows where the tiny encoders' weights lie
    error = capsys.readouterr().err
    assert ", the encoder of vit; tried:\n" in error and "\n  # take the training rows' mean\n" in error
    assert " --ablation-eval --absent mean\n" in error and " --weights vit=PATH\n" in error
    assert train_head.main([*command, "--weights", *(f"{name}={path}" for name, path in weights.items())]) == 0
    run = load_run(list_runs(tmp_path / "runs")[0])
    data = load_features(tmp_path / "feats", "train", "vit", "roberta", tokens=True)
    vit = load_encoder("vit", weights=weights["vit"], tokens=True)
    pixels = vit.to_pixels(vit.image.to_bytes(BLACK)[None])
    roberta = load_encoder("roberta", weights=weights["roberta"], tokens=True)
    empty = roberta.text.tokenize([""])[0]
    with torch.inference_mode():
        picture = vit.image.forward(pixels)["tokens"].half()
        text = roberta.text.forward([empty.ids])["tokens"][0, : empty.length].half()
    n = len(data)
    ragged = Ragged(text.repeat(n, 1), torch.arange(n + 1) * len(text))
    figures = content(run.path, "metrics")["ablation_eval"]
    no_image = replace(data, image_tokens={"vit": picture.repeat(n, 1, 1)})
    assert_figures(figures["text only"], scored(run, no_image, run.split.val))
    no_text = replace(data, text_tokens={"roberta": ragged})
    assert_figures(figures["image only"], scored(run, no_text, run.split.val))
    # By the means of tokens: of each position of the pictures, of all tokens of all texts.
    rows = mean_row(data, run.split.train)
    at = data.positions(run.split.train)
    torch.testing.assert_close(rows["image_tokens"]["vit"][0], data.image_tokens["vit"][at].float().mean(0))
    values = [data.text_tokens["roberta"].take(at[k : k + 1]).values.float() for k in range(len(at))]
    changed = without(data, "text", rows).text_tokens["roberta"]
    assert changed.offsets.tolist() == list(range(n + 1))
    torch.testing.assert_close(changed.values[3], torch.cat(values).mean(0))


def test_several_caches_of_a_side(home: Path, tmp_path: Path):
    pytest.importorskip("vaderSentiment")
    from feats import vader_extract_feats

    common = ["--data", str(home / "set.csv"), "--out", str(home / "feats"), "--workers", "0"]
    assert vader_extract_feats.main(common) == 0
    run = trained(home, tmp_path, "--ttype", "ngrams", "vader")
    data = load_features(home / "feats", "train", "pixels", ["ngrams", "vader"])
    rows = {"ngrams": blanks()["text"], "vader": load_encoder("vader").encode(texts=[""])["text"]}
    text = {name: torch.from_numpy(np.repeat(np.asarray(row, np.float16), len(data), 0)) for name, row in rows.items()}
    expected = scored(run, replace(data, text=text), run.split.val)
    assert_figures(content(run.path, "metrics")["ablation_eval"]["image only"], expected)


def test_a_finetuned_run_is_scored_as_it_was_when_it_was_tuned(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("peft")
    from modeling import finetune

    weights = cached_pairs(tmp_path)
    common = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    start = ["--vtype", "vit", "--ttype", "roberta", "--D", "8", "--ep", "2", "--val-ratio", "0.25"]
    assert train_head.main([*common, *start]) == 0
    named = ["--weights", *(f"{name}={path}" for name, path in weights.items())]
    tuning = ["--ep", "1", "--bs", "9", "--dtype", "fp32", "--lr", "1e-3", "--name", "tuned", "--ablation-eval"]
    assert finetune.main([*common, *named, *tuning]) == 0
    tuned = tables(capsys.readouterr().out)["val"]
    runs = ["--runs", str(tmp_path / "runs"), "--run", "tuned", "--device", "cpu"]
    assert inference_head.main([*runs, "--ablation-eval"]) == 0
    found = tables(capsys.readouterr().out)["val"]
    assert {"both", "text only to both", "image only 95 %"} <= found.keys()
    assert found == {row: tuned[row] for row in found}
