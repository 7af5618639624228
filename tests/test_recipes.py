"""Recipes are the studies' settings: every value of each with what the study says of it, and what a command makes of
them."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_cache, make_tags
from conftest import content, make_course, trained_with
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score

from feats.images import hash64
from feats.records import read_dataset
from feats.text import clean_with_key
from modeling import finetune, sweep_heads, train_head
from modeling.command_line.training import grid_from
from modeling.command_line.tuning import tuning_settings
from modeling.features.dealing import deal_split
from modeling.features.duplicates import duplicate_groups
from modeling.features.loading import load_features
from modeling.features.split_files import read_split_file
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.studies import MODELS, TUNING_RECIPES
from modeling.heads.config import HeadConfig
from modeling.heads.registry import HEADS
from modeling.runs.folder import load_run, read_predictions
from modeling.runs.listing import newest_run
from modeling.training.config import TrainConfig, flat
from modeling.training.recipes import RECIPES

REAL = Path(os.environ.get("MVSA_SINGLE", Path(__file__).parents[2] / "shared" / "mvsa_single"))

# Each value beside the words of its study.
A: dict[str, Any] = {
    "optimizer": "adamw",  # "AdamW, weight decay 0.01"
    "weight_decay": 0.01,
    "schedule": "onecycle",  # "OneCycle, peak 1e-4, warm-up 0.3, cosine"
    "lr": 1e-4,
    "ep": 10,  # "at most 10 epochs, early stop after 2 without a better validation weighted F1"
    "patience": 2,
    "monitor": "weighted_f1",
    "bs": 64,  # "batch 64"
    "D": 256,  # "Linear to 256, LayerNorm, GELU, Dropout 0.5"
    "dropout": 0.5,
    "val_ratio": 0.125,  # "3500 training and 500 validation rows of the 4000 labelled"
    "test_ratio": 0.0,  # "the '1' for testing in its '8:1:1' is the unlabelled list"
}
B: dict[str, Any] = {
    "optimizer": "adamw",  # "batch 8, 10 epochs, AdamW, random 10 % validation"
    "bs": 8,
    "ep": 10,
    "val_ratio": 0.1,
    "lr": 1e-5,  # "the whole CLIP at lr 1e-5, weight decay 1e-4"
    "weight_decay": 1e-4,
    "D": 512,  # "Hidden width 512"
    "split_seed": 42,  # its published code: seed 42, best by accuracy
    "monitor": "accuracy",
}
C: dict[str, Any] = {
    "val_ratio": 0.2,  # "4:1 split"
    "ep": 10,  # "10 epochs, best by accuracy"
    "monitor": "accuracy",
    "lr": 5e-6,  # "learning rate 1e-4 -> 5e-6 was needed for finetuning"
}
D: dict[str, Any] = {
    "optimizer": "adam",  # "Adam, batch 512, lr 1e-4, 100 epochs"
    "bs": 512,
    "lr": 1e-4,
    "ep": 100,
    "dropout": 0.3,  # "Linear-BatchNorm-ReLU-Dropout 0.3 to D"
    "D": 256,  # the better of the table's 128 and 256
    "val_ratio": 0.1,  # "10 % validation, seed 42"
    "split_seed": 42,
    "precision": "fp16",  # "heads train in fp16"
    "monitor": "accuracy",  # its published code reports the best validation accuracy
}
E: dict[str, Any] = {
    "val_ratio": 0.2,  # "8:2 split"
    "bs": 16,  # "grid batch {16}, lr {1e-5, 2e-5}, dropout {0.3, 0.5}, epochs {6}", "its best (lr 1e-5, dropout .5)"
    "lr": 1e-5,
    "dropout": 0.5,
    "ep": 6,
    "optimizer": "adamw",  # "AdamW", whose own weight decay is 0.01
    "weight_decay": 0.01,
    "patience": 3,  # "early stop patience 3 on macro F1 (least gain .001)"
    "monitor": "macro_f1",
    "min_gain": 0.001,
}
CHEEMA: dict[str, Any] = {
    "head": "fusion",  # "per side Linear-BN-ReLU-Dropout .5 to 128"
    "dropout": 0.5,
    "D": 128,
    "norm": "l2",  # "L2-normalised"
    "optimizer": "adam",  # "Adam 2e-5, batch 32, 100 epochs, lowest validation loss"
    "lr": 2e-5,
    "bs": 32,
    "ep": 100,
    "monitor": "loss",
}
STUDIES = {"A": A, "B": B, "C": C, "D": D, "E": E, "cheema": CHEEMA}
# Measured here, since the studies tuned encoders.
CACHED = {
    "B-cached": {**B, "lr": 1e-4, "ep": 20},
    "C-cached": {**C, "lr": 1e-4, "bs": 64, "ep": 10, "norm": "standard"},
    "E-cached": {**E, "lr": 1e-4, "ep": 20, "norm": "standard"},
}
EXPECTED = {**STUDIES, **CACHED}
OF_THE_SPLIT = {"val_ratio": "val_ratio", "test_ratio": "test_ratio", "split_seed": "seed"}
ON_CPU = {"precision": "fp32"}


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip")
    return folder


def train(feats: Path, runs: Path, *argv: str) -> Path:
    common = ["--vtype", "clip", "--feats", str(feats), "--runs", str(runs), "--device", "cpu"]
    assert train_head.main([*common, *argv]) == 0
    return newest_run(runs)


def found(run: Path, names: dict[str, Any]) -> dict[str, Any]:
    """What a run was trained with, by the names of recipes."""
    config = content(run, "config")
    (norm,) = set(config["members"][0]["preprocessing"]["kinds"].values())
    of_split = {name: config["split"][key] for name, key in OF_THE_SPLIT.items()}
    settings = {**trained_with(run), **of_split, "norm": norm}
    return {name: settings[name] for name in names}


def test_every_value_of_every_recipe():
    assert RECIPES == EXPECTED


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_is_trained_as_typed(recipe: str, feats: Path, tmp_path: Path):
    run = train(feats, tmp_path, "--recipe", recipe)
    expected = EXPECTED[recipe] | (ON_CPU if "precision" in EXPECTED[recipe] else {})
    assert found(run, expected) == expected
    # What the study doesn't tell is what it is without a recipe.
    untold = flat(TrainConfig()).keys() - expected.keys() - {"head", "sides"}
    plain = flat(TrainConfig())
    assert {name: trained_with(run)[name] for name in untold} == {name: plain[name] for name in untold}
    assert content(run, "config")["command"].endswith(f"--recipe {recipe}")


@pytest.mark.parametrize("recipe", EXPECTED)
def test_what_is_typed_wins(recipe: str, feats: Path, tmp_path: Path):
    typed: dict[str, Any] = {
        "head": "early",
        "norm": "standard",
        "precision": "fp16",
        "lr": 0.5,
        "D": 4,
        "min_gain": 0.5,
    }
    typed |= {"val_ratio": 0.3, "bs": 7, "ep": 1, "dropout": 0.25, "monitor": "macro_f1", "weight_decay": 0.125}
    options = [word for name, value in typed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    expected = EXPECTED[recipe] | typed
    assert found(train(feats, tmp_path, "--recipe", recipe, *options), expected) == expected


def test_a_recipe_of_folds_leaves_the_ratios_out(feats: Path, tmp_path: Path):
    run = train(feats, tmp_path, "--recipe", "A", "--folds", "3", "--ep", "1")
    assert [how["folds"] for how in content(run, "config")["split"]] == [3] * 3


# -- fixed folds as files ---------------------------------------------------------------------------------------


def write_folds(folder: Path, folds: int = 3) -> str:
    """Lists of random folds of 90 rows, whose parts overlap from fold to fold; the pattern that finds them."""
    folder.mkdir()
    for fold in range(1, folds + 1):
        split = deal_split([f"p{i}" for i in range(90)], make_tags(90), 0.2, seed=fold, test_ratio=0.3)
        for part in ("train", "val", "test"):
            (folder / f"{part}_{fold}.txt").write_text("\n".join(getattr(split, part)) + "\n", encoding="utf-8")
    return str(folder / "{part}_{fold}.txt")


def test_folds_as_files_are_each_scored_on_their_own_test_part(
    feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pattern = write_folds(tmp_path / "folds")
    argv = ["--recipe", "cheema", "--ablation", "1", "--ep", "8", "--seeds", "2", "--split-file", pattern]
    path = train(feats, tmp_path / "runs", *argv)
    out, metrics, run = capsys.readouterr().out, content(path, "metrics"), load_run(path)
    assert "test" not in metrics and metrics["test_folds"]["count"] == 3
    assert "protocol: 3 folds from {part}_{fold}.txt; best epoch" in out
    tests = [(tmp_path / "folds" / f"test_{fold}.txt").read_text().split() for fold in (1, 2, 3)]
    assert set(tests[0]) & set(tests[1])
    features = load_features(feats, "train", ["clip"], ["clip"])
    tag_of = dict(zip(features.ids, features.tags, strict=True))
    accuracies, f1s = [], []
    for fold, expected in enumerate(tests, 1):
        ids, tags, probabilities = read_predictions(path / f"predictions_test_{fold}.csv")
        assert ids == sorted(expected) and tags == [tag_of[i] for i in ids]
        own = [m for m in run.members if m.fold == fold]
        assert len(own) == 2
        rows = features.positions(ids)
        by_hand = np.mean([softmax(m.logits(features, rows) / m.temperature, axis=1) for m in own], axis=0)
        np.testing.assert_allclose(probabilities, by_hand, atol=1e-6)
        predicted = [run.classes[k] for k in by_hand.argmax(1)]
        accuracies.append(accuracy_score(tags, predicted))
        f1s.append([f1_score(tags, predicted, average=kind) for kind in ("weighted", "macro")])
    assert len(set(accuracies)) > 1
    expected = dict(zip(("accuracy", "weighted_f1", "macro_f1"), np.column_stack([accuracies, f1s]).T, strict=True))
    shown = [line for line in out.splitlines() if line.startswith("test, each of 3 ")]  # one in each block of columns
    for name, values in expected.items():
        found = metrics["test_folds"]["mean_std"][name]
        assert found == pytest.approx({"mean": np.mean(values), "std": np.std(values, ddof=1), "n": 3})
        assert f"{np.mean(values):.3f}±{np.std(values, ddof=1):.3f}" in "\n".join(shown)
    assert not (path / "predictions_test.csv").exists()
    # What a run leaves can be split by and saved again.
    assert [s.test for s in read_split_file(path / "split.json", features.ids, features.tags)] == list(
        map(sorted, tests)
    )
    again = run.save(tmp_path / "again").path
    for name in ("metrics.json", *(f"predictions_test_{fold}.csv" for fold in (1, 2, 3))):
        assert (again / name).read_bytes() == (path / name).read_bytes()


def test_folds_as_files_can_be_compared_but_not_searched(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    pattern = write_folds(tmp_path / "folds", folds=2)
    argv = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    argv += ["--split-file", pattern]
    assert sweep_heads.main([*argv, "--head", "early", "mlp", "--D", "4", "--ep", "1"]) == 0
    runs = list((tmp_path / "runs" / "sweep").glob("*/metrics.json"))
    assert [content(run.parent, "metrics")["test_folds"]["count"] for run in runs] == [2, 2]
    capsys.readouterr()
    assert sweep_heads.main([*argv, "--auto", "--head", "linear"]) == 2
    assert capsys.readouterr().err.startswith("error: --auto with folds that have test parts: ")


def test_one_model_is_not_tuned_on_several_folds(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_course(tmp_path / "set", 90)
    folder = tmp_path / "folds"
    folder.mkdir()
    for fold in (1, 2):
        for part, ids in {"train": range(60), "val": range(60, 75), "test": range(75, 90)}.items():
            (folder / f"{part}_{fold}.txt").write_text("\n".join(map(str, ids)))
    argv = ["--data", str(tmp_path / "set"), "--runs", str(tmp_path / "runs"), "--text-encoder", "minilm"]
    assert finetune.main([*argv, "--device", "cpu", "--split-file", str(folder / "{part}_{fold}.txt")]) == 2
    assert "--split-file holds 2 folds, and one model is tuned on one split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"), [("{part}_{fold}.lst", "no file is called like"), ("{fold}.txt", "stands alone")]
)
def test_patterns_that_find_nothing(name: str, told: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_folds(tmp_path / "folds")
    argv = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path / "runs")]
    assert train_head.main([*argv, "--split-file", str(tmp_path / "folds" / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1


# -- notes ------------------------------------------------------------------------------------------------------


def notes(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("script", [train_head, sweep_heads])
@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_note_where_rate_and_epochs_are_not_of_cached_features(
    script: Any, recipe: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    common = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), "--device", "cpu", "--ep", "1"]
    assert script.main([*common, "--recipe", recipe, "--D", "4"]) == 0
    told = notes(capsys)
    if recipe in ("B", "C", "E"):
        assert told == [
            f"note: rate and epochs of --recipe {recipe} belong to end-to-end tuning: heads on cached features hardly "
            f"leave the majority class with them; --recipe {recipe}-cached has those for such heads"
        ]
    else:
        of_folds = "note: --recipe cheema belongs to fixed folds, with --split-file; this is another split"
        expected = {"D": ["note: fp16 of --recipe D is for a GPU, here it is fp32"], "cheema": [of_folds]}
        assert told == expected.get(recipe, [])


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "E", "--lr", "1e-2", "--ep", "1"],
        ["--recipe", "E-cached", "--head", "linear", "--C", "1"],
        ["--recipe", "B", "--head", "linear", "--C", "1"],
        ["--recipe", "D", "--precision", "fp16", "--ep", "1"],
        ["--recipe", "D", "--precision", "fp32", "--ep", "1"],
        ["--recipe", "own", "--head", "late_512", "--ep", "1"],
    ],
    ids=" ".join,
)
def test_no_note_where_a_recipe_is_followed_or_overruled(
    argv: list[str], feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    train(feats, tmp_path, *argv, "--D", "4")
    assert not [line for line in notes(capsys) if "recipe" in line]


# -- each head at its own ---------------------------------------------------------------------------------------


def test_own_is_the_study_s_recipe_for_cached_features():
    args = sweep_heads.build_parser().parse_args(["--recipe", "own", "--device", "cpu", "--head", *HEADS])
    configs = grid_from(args).configs(["a", "b"])
    assert [config.head.head for config in configs] == list(HEADS)
    of_study = {"A": "A", "B": "B-cached", "C": "C-cached", "D": "D", "E": "E-cached"}
    studies = set()
    for config in configs:
        study = HEADS[config.head.head].study
        settings = EXPECTED[of_study[study]] | (ON_CPU if study == "D" else {}) if study else {}
        expected = {name: value for name, value in settings.items() if name not in (*OF_THE_SPLIT, "norm")}
        expected |= {"lr": 1e-3} if config.head.head == "late" else {}  # a linear layer on unit vectors
        assert {name: flat(config)[name] for name in expected} == expected, config.head.head
        default = flat(TrainConfig(HeadConfig(config.head.head)))
        assert {k: v for k, v in flat(config).items() if k not in expected} == {
            k: v for k, v in default.items() if k not in expected
        }
        studies.add(study)
    assert studies == {"", *of_study}


def test_own_says_what_is_for_a_gpu(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["--vtype", "clip", "--feats", str(feats), "--runs", str(tmp_path), "--device", "cpu", "--ep", "1"]
    assert sweep_heads.main([*argv, "--D", "4", "--recipe", "own", "--head", "concat", "fusion"]) == 0
    assert notes(capsys) == ["note: fp16 of --recipe own is for a GPU, here it is fp32"]


# -- end-to-end tuning ------------------------------------------------------------------------------------------

PLAIN = {"schedule": "constant", "warmup": 0.0, "clip_grad": 0.0}  # the published code of B and D has no scheduler
TUNED = {
    "B": B | PLAIN,
    "C": C,
    # "clip no ... resnet50 roberta yes 256 2e-5"; "a finetuning module for ResNet50 + RoBERTa (batch 64)"; of that
    # module's code --ep 50, Adam(lr), and net.train() for all of the network
    "D": {
        **{name: value for name, value in D.items() if name not in ("ep", "precision")},
        "lr": 2e-5,
        "bs": 64,
        "ep": 50,
        "weight_decay": 0.0,
        "train_batch_norm": True,
        **PLAIN,
    },
    "E": E,
}
NOT_CLIP = {"lr": 1e-4, "weight_decay": 0.01}  # B's published code, and AdamW's own decay there


def test_every_value_of_every_tuning_recipe():
    assert TUNING_RECIPES == TUNED


@pytest.mark.parametrize("study", TUNED)
@pytest.mark.parametrize("model", [None, *MODELS])
def test_tuning_settings_are_the_recipe_s_and_a_model_s_own(model: str | None, study: str):
    typed = ["--recipe", study, *(["--model", model] if model else [])]
    settings = tuning_settings(finetune.build_parser().parse_args(typed))
    expected = TUNED[study] | (NOT_CLIP if study == "B" and model in ("vilbert_style", "bert_vit_scratch") else {})
    expected = {**expected, "head_lr": expected["lr"]}  # each study tells one rate
    assert vars(settings) == vars(TuneSettings()) | {k: v for k, v in expected.items() if hasattr(TuneSettings, k)}


# -- study A's validation rows ----------------------------------------------------------------------------------

OF_STUDY_A = {"positive": 299, "negative": 149, "neutral": 52}  # which its recalls prove


def test_the_split_of_study_a_has_its_class_counts():
    labels = [name for name, n in (("positive", 2388), ("negative", 1193), ("neutral", 419)) for _ in range(n)]
    label_of = {str(i): label for i, label in enumerate(labels)}
    split = deal_split(list(label_of), labels, val_ratio=A["val_ratio"], test_ratio=A["test_ratio"])
    assert Counter(label_of[i] for i in split.val) == OF_STUDY_A
    assert (len(split.train), len(split.val), len(split.test)) == (3500, 500, 0)


def test_the_split_of_study_a_on_its_data_with_duplicates_together():
    if not REAL.is_dir():
        pytest.skip("the MVSA-Single data set is not here; set MVSA_SINGLE to its folder")
    records = read_dataset(REAL).splits["train"]
    pictures = np.array([hash64(record.image_path.read_bytes()) for record in records], np.uint64)
    texts = np.array([hash64(clean_with_key(record.text, "tweet")[1].encode()) for record in records], np.uint64)
    groups = duplicate_groups(pictures, texts)
    assert len(set(groups.tolist())) < 3900
    label_of = {record.id: record.label for record in records}
    ratios = {"val_ratio": A["val_ratio"], "test_ratio": A["test_ratio"]}
    split = deal_split(list(label_of), list(label_of.values()), groups=groups, **ratios)
    assert Counter(label_of[i] for i in split.val) == OF_STUDY_A and len(split.train) == 3500
