"""The public API, from the README's own examples on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES, make_cache, make_tags
from conftest import ENVIRONMENT, ROOT, make_course
from sklearn.metrics import accuracy_score

import feats
import modeling
from feats import minilm_extract_feats
from feats.errors import UsageError
from modeling import inference_head, train_head
from modeling.experiments.fitting import evaluate, fit_head
from modeling.features.loading import load_features
from modeling.features.splits import make_folds, make_split
from modeling.features.stored_splits import Split
from modeling.heads.base import Head
from modeling.heads.config import HeadConfig
from modeling.heads.registry import HEADS
from modeling.runs.config import read_config
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run
from modeling.runs.run import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    """saved/feats with CLIP caches of 90 labelled and 20 unlabelled rows."""
    folder = tmp_path / "saved" / "feats"
    make_cache(folder, "clip")
    make_cache(folder, "vader")
    for name in ("clip", "vader"):
        make_cache(folder, name, split="test", tags=[""] * 20, first_id=500)
    return folder


# -- as the README writes it ------------------------------------------------------------------------------------


def test_the_readme_shows_both_stages():
    assert [example.split()[1] for example in EXAMPLES] == [
        "pathlib",
        "feats",
        "modeling",
        "modeling",
        "modeling",
        "modeling.heads.base",
    ]


def test_stage_2_as_written(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(EXAMPLES[2], names)
    accuracy = float(capsys.readouterr().out.split()[0])
    assert 0.5 < accuracy <= 1 and (tmp_path / "saved" / "runs" / "mine" / "head.safetensors").is_file()
    probabilities = load_run("saved/runs/mine").predict_proba(names["test_data"])
    assert probabilities.shape == (20, 3) and np.allclose(probabilities.sum(1), 1)


def test_finetuning_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_course(tmp_path / "set", 30)
    arguments = ["--data", "set", "--workers", "0", "--device", "cpu", "--dtype", "fp32"]
    assert minilm_extract_feats.main(arguments) == 0
    data = load_features("saved/feats", "train", text="minilm")
    fit_head(data, make_split(data, val_ratio=0.2), "mlp", D=8, ep=1, bs=8, device="cpu").save("saved/runs/mine")
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(EXAMPLES[4], names)  # a warm predictor, of texts alone: the picture isn't asked for
    assert names["future"].result() == names["answer"] and capsys.readouterr().out.startswith(names["answer"].label)
    names = {}
    exec(EXAMPLES[3], names)
    assert float(capsys.readouterr().out) == names["tuned"].report.figures["val"]["macro_f1"]
    assert (tmp_path / "saved" / "runs" / "mine_tuned" / "encoders" / "minilm" / "model.safetensors").is_file()


# -- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [feats, modeling], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_nothing_else(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__ or isinstance(getattr(package, name), dict), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        package.nothing  # noqa: B018


def test_importing_the_packages_costs_nothing():
    code = "import sys, feats, modeling; print(sorted({'torch', 'numpy', 'h5py', 'sklearn'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# -- what notebooks do ------------------------------------------------------------------------------------------


def test_a_head_fitted_from_python_is_the_command_line_s(caches: Path, tmp_path: Path):
    argv = [
        "--vtype",
        "clip",
        "--D",
        "8",
        "--lr",
        "1e-2",
        "--ep",
        "5",
        "--norm",
        "standard",
        "--class-weights",
        "neutral=2",
    ]
    assert train_head.main([*argv, "--feats", str(caches), "--runs", str(tmp_path / "runs")]) == 0
    typed = load_run(newest_run(tmp_path / "runs"))
    data = load_features(caches, "train", "clip", "clip")
    settings = {"lr": 1e-2, "ep": 5, "class_weights": {"neutral": 2}}
    fitted = fit_head(data, make_split(data), HeadConfig("fusion", D=8), norm="standard", **settings)
    assert fitted.split == typed.split and fitted.members[0].config == typed.members[0].config
    np.testing.assert_array_equal(fitted.predict_proba(data), typed.predict_proba(data))
    saved = fitted.save(tmp_path / "mine")
    figures = [json.loads((run.path / "metrics.json").read_text()) for run in (saved, typed)]
    assert figures[0] == figures[1]
    assert read_config(saved.path)["command"] is None


def test_labels_in_labels_out(caches: Path):
    data = load_features(caches, "train", "clip", "clip")
    split = make_split(data, val_ratio=0.2)
    run = fit_head(data, split, "linear", norm="standard", C=0.1)
    predicted = run.predict(data, split.val)
    truth = dict(zip([f"p{i}" for i in range(90)], make_tags(90), strict=True))
    expected = accuracy_score([truth[i] for i in split.val], predicted)
    assert set(predicted) <= set(CLASSES) and run.classes == CLASSES
    assert run.score(data, split.val) == expected == evaluate(run, data, split.val)["accuracy"]
    assert run.predict(data) == [CLASSES[k] for k in run.predict_proba(data).argmax(1)]
    figures = evaluate(run, data, split.val)
    assert figures["majority"]["class"] == "positive" and set(figures["per_class"]) == set(CLASSES)


def test_one_side_needs_no_word(caches: Path):
    data = load_features(caches, "train", text=["clip", "vader"])
    run = fit_head(data, make_split(data), "fusion", ep=2, bs=16)
    assert run.members[0].config.head.sides == ("text",) and run.source.image == ()
    assert len(run.predict(load_features(caches, "test", text=["clip", "vader"]))) == 20


def test_folds_and_seeds_make_an_ensemble(caches: Path):
    data = load_features(caches, "train", "clip", "clip")
    heard: list[int] = []
    run = fit_head(data, make_folds(data, 3), "mlp", seeds=2, ep=2, D=4, bs=16, progress=heard.append)
    assert len(run.members) == 6 and sum(heard) == 12 and len(run.split) == 3
    assert sorted(run.report.ids) == sorted(data.ids)


def test_what_does_not_fit_is_said(caches: Path, tmp_path: Path):
    data, text = load_features(caches, "train", "clip", "clip"), load_features(caches, "train", text="vader")
    split = make_split(data)
    run: Run = fit_head(data, split, ep=1, bs=16)
    test = load_features(caches, "test", "clip", "clip")
    unfit = {
        "unknown head 'fusoin'; did you mean fusion": lambda: fit_head(data, split, "fusoin"),
        "unknown setting 'lrr'; did you mean lr": lambda: fit_head(data, split, lrr=1),
        "`scale` of clip 0: expected a finite number above 0": lambda: fit_head(data, split, scale={"clip": 0}),
        "`scale` of clip nan: expected": lambda: fit_head(data, split, scale={"clip": float("nan")}),
        "is to read image, and the caches give text": lambda: fit_head(text, split, HeadConfig(sides="image")),
        "this run reads clip as (image|text) features, and the data from .* have none": lambda: run.predict(text),
        "none of the 20 rows has a label": lambda: evaluate(run, test),
        "1 row: nobody not among the 90 train rows": lambda: run.predict(data, ["nobody"]),
        "mine is there already; give another name, or replace it with `overwrite`": lambda: run.save(tmp_path / "mine"),
        "`norm` names nothing; the caches in use are clip": lambda: fit_head(data, split, norm={"nothing": "l2"}),
    }
    (tmp_path / "mine").mkdir()
    for message, call in unfit.items():
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "--" not in str(error.value), "a flag's name"


def test_a_split_of_one_s_own(caches: Path, tmp_path: Path):
    data = load_features(caches, "train", "clip", "clip")
    ids = data.ids
    run = fit_head(data, Split(ids[:60], ids[60:]), "linear", norm="standard", C=0.1)
    saved = run.save(tmp_path / "mine")
    assert load_run(saved.path).split == Split(ids[:60], ids[60:])
    assert json.loads((saved.path / "metrics.json").read_text())["protocol"].startswith("split as given; ")
    unfit = {
        "the split has no validation rows": lambda: fit_head(data, Split(ids, [])),
        "the split has no training rows": lambda: fit_head(data, Split([], ids)),
        r"the split: 5 ids .* named more than once \(p55 in train, val\)": lambda: fit_head(
            data, Split(ids[:60], ids[55:])
        ),
        "there is no split to train on": lambda: fit_head(data, []),
        "`seeds` 0: expected 1 or more": lambda: fit_head(data, Split(ids[:60], ids[60:]), seeds=0),
    }
    for message, call in unfit.items():
        with pytest.raises(UsageError, match=message):
            call()


def test_tokens_that_were_not_loaded(tmp_path: Path):
    make_cache(tmp_path, "clip", tokens=True)
    data, bare = (load_features(tmp_path, "train", "clip", "clip", tokens=tokens) for tokens in (True, False))
    with pytest.raises(UsageError, match="needs image tokens, and none were loaded; load the features with `tokens`"):
        fit_head(bare, make_split(bare), "coattention")
    run = fit_head(data, make_split(data), "query_attention", D=8, ep=1, bs=16)
    with pytest.raises(UsageError, match="the data from .* have none; load the features with `tokens`"):
        run.predict(bare)


def test_only_a_run_is_replaced(caches: Path, tmp_path: Path):
    data = load_features(caches, "train", "clip", "clip")
    run = fit_head(data, make_split(data), ep=1, bs=16)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    run.save(tmp_path / "runs" / "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for taken in (tmp_path / "thesis", tmp_path / "thesis" / "config.json", tmp_path / "runs"):
        with pytest.raises(UsageError, match=f"{taken} is there already and is no run, so that it isn't replaced"):
            run.save(taken, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for replaced in (tmp_path / "empty", tmp_path / "runs" / "a"):
        assert run.save(replaced, overwrite=True).path == replaced and load_run(replaced).classes == CLASSES


def test_another_encoder_s_features_are_refused(caches: Path, tmp_path: Path):
    data = load_features(caches, "train", "clip", "clip")
    run = fit_head(data, make_split(data), ep=1, bs=16)
    make_cache(tmp_path / "other", "clip", fingerprint={"weights_sha256": "1" * 64})
    with pytest.raises(UsageError, match="isn't what this run was trained on"):
        run.predict_proba(load_features(tmp_path / "other", "train", "clip", "clip"))
    more = load_features(caches, "train", "clip", ["clip", "vader"])  # more caches than it reads do no harm
    np.testing.assert_array_equal(run.predict_proba(more), run.predict_proba(data))


# -- one file and one line --------------------------------------------------------------------------------------


def test_a_new_head_is_a_class_and_a_line(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    names: dict[str, type[Head]] = {}
    exec(EXAMPLES[5], names)
    Difference = names["Difference"]
    monkeypatch.setitem(HEADS, "difference", Difference)
    runs = ["--runs", str(tmp_path / "runs")]
    argv = ["--vtype", "clip", "--feats", str(caches), "--head", "difference", "--ep", "2", "--D", "8", "--seeds", "2"]
    assert train_head.main([*argv, *runs]) == 0
    assert "note: --D does nothing for difference" in capsys.readouterr().err
    run = load_run(newest_run(tmp_path / "runs"))
    assert [type(member.head) for member in run.members] == [Difference, Difference]
    assert inference_head.main(runs) == 0
    assert (run.path / "submission_test.csv").read_text().count("\n") == 21
