"""reproduce.py as a user types it: published figures beside ours, which caches stand in, what is trained once only."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from caches import CLASSES, make_cache
from conftest import ROOT, content, make_course, trained_with
from pairs import cached_pairs, make_pairs, tiny_bert, tiny_clip
from PIL import Image

from feats import ngrams_extract_feats, pixels_extract_feats
from feats.encoders.registry import ENCODERS, load_encoder
from feats.errors import UsageError
from modeling import reproduce
from modeling.evaluation import metrics
from modeling.features.loading import load_features
from modeling.finetuning.studies import MODELS, EncoderChoice
from modeling.heads.registry import HEADS
from modeling.reproduction import finetuned, tables
from modeling.reproduction.published import TABLES, Row, ends
from modeling.reproduction.sources import caches_in, source_for, stand_in
from modeling.reproduction.tables import FROZEN, TUNED, Result, Scored, Settings
from modeling.runs.folder import load_run, read_predictions

PUBLISHED = {  # as the studies printed them, typed once more
    "A-fusions": ".7799 .79 .8829 .7718 .3077 .5333 .7655 .7500",
    "A-ablation": ".7799 .7312 .6962",
    "B-heads": ".62 .67 .76 .74 .74 .77 .73 .62 .77 .28",
    "C-ablation": ".73 .80 .74 .77 .61 .20 .31 .54 .76 .63 .70-.71 .61-.65",
    "D-grid": ".755 .775 .775 .787 .682 .698 .688 .718 .723 .728",
    "D-L14": ".750 .785 .767 .777 .777 .787 .780 .775",
    "D-ablation": ".762 .767 .693 .708 .738 .675",
    "E-fusions": ".5783 .6913 .9726 .5046 .6825 .9989 .4397 .5988 .8722",
    "E-ablation": ".5214 .4489",
}
ALL_ROWS = [pytest.param(table, row, id=f"{table.name} {row.label}") for table in TABLES.values() for row in table.rows]
one_seed = ["--seeds", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of every kind, none a study's."""
    folder = tmp_path_factory.mktemp("feats")
    for name in ("clip", "resnet", "roberta"):
        make_cache(folder, name, tokens=True)
    return folder


def command(feats: Path, runs: Path, *options: str) -> int:
    return reproduce.main([*options, "--feats", str(feats), "--runs", str(runs), *one_seed])


def table_of(runs: Path, name: str) -> list[dict[str, str]]:
    with (runs / f"reproduce_{name}" / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("[!.]*/config.json"))


# -- what was published -----------------------------------------------------------------------------------------


def test_all_tables_are_there():
    assert list(TABLES) == list(PUBLISHED)


@pytest.mark.parametrize("name", TABLES)
def test_published_figures_are_literally_the_studies_(name: str):
    figures = [figure for row in TABLES[name].rows for figure in row.figures.values()]
    assert [figure.removeprefix("about ") for figure in figures] == PUBLISHED[name].split()
    assert [figure for figure in figures if figure.startswith("about")] == ["about .79"] * (name == "A-fusions")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("D-grid", [(D, lr, 512) for D in (128, 256) for lr in (2e-5, 1e-4)] * 2 + [(256, 2e-5, 64), (256, 1e-4, 64)]),
        ("D-L14", [(D, lr, bs) for bs in (512, 32) for D in (128, 256) for lr in (2e-5, 1e-4)]),
    ],
)
def test_settings_are_those_of_the_table_s_rows(name: str, settings: list[tuple[int, float, int]]):
    rows = TABLES[name].rows
    assert [tuple(row.settings[key] for key in ("D", "lr", "bs")) for row in rows] == settings
    for row, (D, lr, _) in zip(rows, settings, strict=True):  # what is typed with --rows says what is trained
        assert f"D {D} " in row.label and float(re.search(r"lr (\S+)", row.label)[1]) == lr


@pytest.mark.parametrize(("table", "row"), ALL_ROWS)
def test_rows_are_of_heads_encoders_and_models_there_are(table, row: Row):
    assert HEADS[row.head].study == table.study.letter
    assert [other.label for other in table.rows].count(row.label) == 1
    for side in row.sides:
        wanted = row.wanted(side)
        spec = ENCODERS[wanted.name]
        assert all(value in spec.options[key].choices for key, value in wanted.options.items())
    if row.ablation_of is not None:
        assert row.ablation_of in {other.label for other in table.rows if other.model}
    else:
        assert (row.model in MODELS) == row.tuned and (not row.tuned or MODELS[row.model].study == table.study.letter)
    for name, figure in row.figures.items():
        low, high = ends(figure)
        of_class, _, measure = name.rpartition(" ")
        known = (*metrics.AVERAGES, "log_loss") if not of_class else ("precision", "recall", "f1")
        assert 0 < low <= high < 1 and measure in known and of_class in ("", *CLASSES)


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_a_tuned_row_is_the_study_s_recipe_and_its_own_settings(table):
    for row in table.rows:
        if row.model:
            head, settings = finetuned.tuning_of(table, row)
            assert (head.head, head.sides) == (row.head, row.sides)
            rate = {"B": 1e-5, "C": 5e-6, "D": 2e-5, "E": 1e-5}[table.study.letter]
            rate = 1e-4 if row.model in ("bert_vit_scratch", "vilbert_style") else rate
            assert settings.lr == row.settings.get("lr", rate)


def test_ends_of_ranges():
    assert ends(".61-.65") == (0.61, 0.65) and ends("about .79") == (0.79, 0.79) and ends(".5333") == (0.5333, 0.5333)


# -- every table on caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_made_of_the_caches_there_are(
    name: str, feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for recipe in ("A", "B", "B-cached", "C-cached", "D", "E", "E-cached"):  # the studies' epochs would take a minute
        monkeypatch.setitem(tables.RECIPES, recipe, {**tables.RECIPES.get(recipe, {}), "ep": 2})
    assert command(feats, tmp_path, name) == 0
    out = capsys.readouterr().out
    folder = tmp_path / f"reproduce_{name}"
    rows = table_of(tmp_path, name)
    table, markdown = TABLES[name], (folder / "table.md").read_text()
    published = [(row.label, f, v) for row in table.rows for f, v in row.figures.items()]
    assert {(r["row"], r["figure"], r["study"]) for r in rows if r["study"]} == set(published)
    assert all(figure in out and figure in markdown for _, _, figure in published)
    trained = [r for r in rows if r["encoders"] == "frozen" and r["ours"]]
    cached = [row for row in table.rows if row.cached and row.head != "early_plane"]
    assert {r["row"] for r in trained} == {row.label for row in cached}
    for line in trained:
        assert bool(line.get("95 %")) == (line["figure"] in metrics.AVERAGES)
    tuned = [r for r in rows if r["encoders"] == "tuned"]
    assert {r["row"] for r in tuned} == {row.label for row in table.rows if row.tuned}
    assert all(not r["ours"] and "not run" in r["note"] for r in tuned) and "`" not in out
    assert ("not run (--finetune)" in out) == bool(tuned)
    wanted_models = {"ViT-L/14@336px", "ViT-B/32", "resnet50", "bert-base-uncased", "bert-base-chinese", "ViT-L/14"}
    assert any(f"in place of {encoder} {model}" in out for encoder in ENCODERS for model in wanted_models)
    assert "validation rows" in out and "majority 0." in out and "duplicates together" in out
    assert ("encoders frozen in place of tuned" in out) == (table.study.letter in "BCE")
    assert ("the training rows' mean in place of a black picture" in out) == (name == "B-heads")
    assert "\nalways positive (" in out  # a narrow column breaks the label
    assert any(re.fullmatch(r"always positive \(\d+ rows\)", r["row"]) for r in rows)
    assert out.splitlines()[-1] == (
        f"{len(runs_in(folder))} runs, {len(runs_in(folder))} of them trained now, table.csv and table.md -> {folder}"
    )


def test_figures_are_those_of_the_runs(feats: Path, tmp_path: Path):
    argv = ["A-fusions", "--feats", str(feats), "--runs", str(tmp_path), "--seeds", "2", "--device", "cpu"]
    assert reproduce.main(argv) == 0
    runs = [p for p in runs_in(tmp_path / "reproduce_A-fusions") if trained_with(p)["head"] == "concat"]
    assert len(runs) == 2 and {trained_with(path)["seed"] for path in runs} == {42, 43}
    found: dict[str, list[float]] = {}
    for path in runs:
        _, tags, probabilities = read_predictions(path / "predictions_val.csv")
        y, predicted = [CLASSES.index(tag) for tag in tags], probabilities.argmax(1)
        recall = reference.recall_score(y, predicted, average=None, labels=range(3), zero_division=0)
        of_run = {
            "accuracy": reference.accuracy_score(y, predicted),
            "weighted_f1": reference.f1_score(y, predicted, average="weighted"),
            "positive recall": recall[2],
            "neutral recall": recall[1],
        }
        for name, value in of_run.items():
            found.setdefault(name, []).append(value)
    lines = {r["figure"]: r for r in table_of(tmp_path, "A-fusions") if r["row"] == "concatenation"}
    for name, values in found.items():
        assert float(lines[name]["ours"]) == pytest.approx(np.mean(values))
        assert float(lines[name]["±"]) == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    y = np.array(y)
    both = np.array([read_predictions(path / "predictions_val.csv")[2].argmax(1) for path in runs])
    low, high = metrics.interval_of_mean(y, both, 3, "weighted_f1")
    assert (float(lines["weighted_f1"]["low"]), float(lines["weighted_f1"]["high"])) == pytest.approx((low, high))
    if "collapsed" not in lines["weighted_f1"]["note"]:
        assert float(lines["weighted_f1"]["difference"]) == pytest.approx(np.mean(found["weighted_f1"]) - 0.7799)
        assert lines["weighted_f1"]["agrees"] == ("yes" if low <= 0.7799 <= high else "no")


def test_heads_get_the_study_s_settings_and_split(feats: Path, tmp_path: Path):
    assert command(feats, tmp_path, "D-L14") == 0
    folder = tmp_path / "reproduce_D-L14"
    found = [trained_with(path) for path in runs_in(folder)]
    points = sorted((s["D"], s["lr"], s["bs"], s["optimizer"], s["ep"]) for s in found)
    assert points == sorted((D, lr, bs, "adam", 100) for bs in (512, 32) for D in (128, 256) for lr in (2e-5, 1e-4))
    how = content(runs_in(folder)[0], "config")["split"]
    assert (how["val_ratio"], how["seed"], how["duplicates_together"]) == (0.1, 42, True)


def test_a_second_start_trains_nothing(
    feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert command(feats, tmp_path, "D-ablation") == 0
    folder = tmp_path / "reproduce_D-ablation"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    told = capsys.readouterr().out.replace("4 of them trained now", "")
    written = [(folder / name).read_bytes() for name in ("table.csv", "table.md")]
    monkeypatch.setattr(tables, "save_run", None)
    assert command(feats, tmp_path, "D-ablation") == 0
    out = capsys.readouterr().out
    assert "4 runs, 0 of them trained now" in out and told == out.replace("0 of them trained now", "")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert written == [(folder / name).read_bytes() for name in ("table.csv", "table.md")]


@pytest.mark.slow
def test_a_side_is_removed_from_heads_on_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(tables.RECIPES, "B-cached", {**tables.RECIPES["B-cached"], "ep": 2})
    make_course(tmp_path / "set", 45)
    common = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "feats"), "--device", "cpu", "--workers", "0"]
    assert pixels_extract_feats.main([*common, "--size", "8"]) == 0
    assert ngrams_extract_feats.main([*common, "--hash-columns", "32"]) == 0
    folders = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path), "--device", "cpu", "--seeds", "2"]
    argv = ["B-heads", "--rows", "attention", "removed", "--vtype", "pixels", "--ttype", "ngrams", *folders]
    assert reproduce.main(argv) == 0
    out = capsys.readouterr().out
    assert "2 runs, 2 of them trained now" in out and "rows' mean in place" not in out
    data = load_features(tmp_path / "feats", "train", "pixels", "ngrams")
    black = load_encoder("pixels", size=8).encode(images=[Image.new("RGB", (224, 224))])["image"]
    empty = load_encoder("ngrams", columns=32).encode(texts=[""])["text"]
    found = {r["row"]: r for r in table_of(tmp_path, "B-heads") if r["encoders"] == "frozen"}
    for label, side, cache, blank in (
        ("image removed at test time", "image", "pixels", black),
        ("text removed at test time", "text", "ngrams", empty),
    ):
        rows = torch.from_numpy(np.repeat(blank.astype(np.float16), len(data), 0))
        without = replace(data, **{side: {cache: rows}})
        runs = [load_run(path) for path in runs_in(tmp_path / "reproduce_B-heads")]
        accuracies = [run.score(without, run.split.val) for run in runs]
        assert float(found[label]["ours"]) == pytest.approx(np.mean(accuracies))
        assert float(found[label]["low"]) <= np.mean(accuracies) <= float(found[label]["high"])


def test_a_run_of_several_rows_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip")  # stands in for ResNet and RoBERTa, too
    rows = ["--rows", "clip D 128 lr 1e-4", "roberta D 128 lr 1e-4"]
    assert command(tmp_path / "feats", tmp_path, "D-grid", *rows) == 0
    out = capsys.readouterr().out
    assert "1 runs, 1 of them trained now" in out
    assert "\n- clip D 128 lr 1e-4 bs 512, resnet50 + roberta D 128 lr 1e-4 bs 512 (frozen): validation rows " in out


def test_a_run_s_configuration_repeats_its_table(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command(feats, tmp_path, "A-ablation", "--folds", "2", "--rows", "text") == 0
    [run] = runs_in(tmp_path / "reproduce_A-ablation")
    told = capsys.readouterr().out
    assert reproduce.main(["--config", str(run / "config.json")]) == 0
    assert capsys.readouterr().out == told.replace("1 of them trained now", "0 of them trained now")


def test_folds_give_figures_of_all_rows(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command(feats, tmp_path, "A-ablation", "--folds", "3", "--rows", "text") == 0
    out = capsys.readouterr().out
    assert "always positive (90 rows)" in out and "3-fold cross-validation" in out
    [run] = runs_in(tmp_path / "reproduce_A-ablation")
    assert len(read_predictions(run / "predictions_val.csv")[0]) == 90
    assert {r["row"] for r in table_of(tmp_path, "A-ablation") if r["study"]} == {"text only"}


def test_all_tables_in_one_command(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command(feats, tmp_path, "all", "--rows", "text only") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"4 tables (A-ablation, B-heads, C-ablation, E-ablation) -> {tmp_path}/reproduce_*"


def test_without_a_table_they_are_listed(capsys: pytest.CaptureFixture):
    assert reproduce.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TABLES, "all"]


# -- collapsed heads --------------------------------------------------------------------------------------------


def test_a_head_of_one_class_is_never_the_study_s_result(
    feats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A rate of nearly nothing, on features that tell nothing: the start's own class for every row."""
    recipe = {"lr": 1e-12, "ep": 1, "val_ratio": 0.2}
    monkeypatch.setitem(tables.RECIPES, "A", recipe)
    make_cache(
        tmp_path / "feats", "clip", changed={f"{s}_feats": np.zeros((90, 8), np.float16) for s in ("image", "text")}
    )
    assert command(tmp_path / "feats", tmp_path, "A-ablation") == 0
    out = capsys.readouterr().out
    rows = [r for r in table_of(tmp_path, "A-ablation") if r["study"]]
    assert len(rows) == 3
    for row in rows:
        assert re.match(r"collapsed: predicts \w+ for every row$", row["note"])
        assert row["ours"] and not row.get("agrees") and not row.get("to study")
    assert "has learned nothing: it isn't the study's result" in out


def test_one_collapsed_seed_of_several_is_enough():
    healthy, collapsed = (
        metrics.figures(np.array([0, 0, 0, 0, 1, 1]), np.eye(2)[predicted], ["a", "b"], "a")
        for predicted in ([0, 0, 0, 1, 1, 1], [0] * 6)
    )
    assert Scored([healthy, healthy], {}).collapsed == ""
    assert Scored([healthy, collapsed, healthy], {}).collapsed == "collapsed: predicts a for every row (1 of 3 seeds)"
    assert Scored([collapsed], {}).collapsed == "collapsed: predicts a for every row"


# -- which caches stand in --------------------------------------------------------------------------------------


def named_cache(folder: Path, kind: str, name: str, **fingerprint: str) -> None:
    """A cache of `kind` under another name."""
    make_cache(folder, kind, fingerprint=fingerprint).rename(folder / f"{name}_train.h5")


def test_the_nearest_cache_stands_in(tmp_path: Path):
    wanted = EncoderChoice("roberta", "roberta-base", {"pooling": "pooler"})
    nearest = []
    for kind, name, fingerprint in (  # from the farthest to the nearest
        ("vader", "c_other", {}),
        ("vader", "b_other", {}),
        ("roberta", "kind", {"encoder": "minilm"}),
        ("roberta", "encoder", {"model": "bert-base-uncased"}),
        ("roberta", "model", {"model": "FacebookAI/roberta-base", "pooling": "mean"}),
        ("roberta", "same", {"model": "roberta-base", "pooling": "pooler"}),
    ):
        named_cache(tmp_path, kind, name, **fingerprint)
        nearest.append(stand_in(wanted, "text", caches_in(tmp_path)).name)
    assert nearest == ["c_other", "b_other", "kind", "encoder", "model", "same"]
    assert stand_in(wanted, "image", caches_in(tmp_path)) is None
    assert stand_in(wanted, "text", caches_in(tmp_path), tokens=True) is None


def test_nothing_stands_in_for_the_picture_itself_nor_it_for_an_encoder(tmp_path: Path):
    make_cache(tmp_path, "resnet", tokens=True, fingerprint={"encoder": "pixels", "model": "pixels"})
    make_cache(tmp_path, "clip", tokens=True)
    pixels, resnet = EncoderChoice("pixels", "pixels"), EncoderChoice("resnet", "resnet50")
    caches = caches_in(tmp_path)
    assert stand_in(pixels, "image", caches, tokens=True).name == "resnet"
    assert stand_in(resnet, "image", caches, tokens=True).name == "clip"
    assert stand_in(pixels, "image", caches[:1], tokens=True) is None


def test_what_has_no_cache_is_said_and_the_others_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "resnet")
    assert command(tmp_path / "feats", tmp_path, "E-ablation") == 0
    out = capsys.readouterr().out
    assert "text only (frozen): not run: late_512 needs a cache of texts, and there is none in" in out
    assert "image: resnet tiny in place of resnet resnet50" in out and "1 runs" in out
    assert command(tmp_path / "feats", tmp_path, "C-ablation") == 2
    out, err = capsys.readouterr()
    assert "coattention needs a cache of pictures made with --tokens" in out and ".73" in out
    assert err.startswith("error: no row of C-ablation could be trained") and err.count("\n") == 1


def test_named_caches_are_taken_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture):
    feats = tmp_path / "feats"
    for name in ("clip", "resnet", "roberta", "vader"):
        make_cache(feats, name)
    assert command(feats, tmp_path, "A-fusions", "--vtype", "resnet", "--ttype", "roberta", "vader") == 0
    out = capsys.readouterr().out
    assert "image: resnet tiny in place of clip ViT-L/14@336px" in out
    assert "text: roberta tiny + vader tiny in place of clip ViT-L/14@336px" in out
    features = [content(path, "config")["features"] for path in runs_in(tmp_path / "reproduce_A-fusions")]
    assert all(f["image"] == ["resnet"] and f["text"] == ["roberta", "vader"] for f in features) and features
    assert command(feats, tmp_path, "A-fusions", "--vtype", "rasnet") == 2
    assert "Did you mean resnet?" in capsys.readouterr().err


def test_the_study_s_own_encoder_leaves_only_its_options_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "resnet", fingerprint={"model": "resnet50", "layer": "pooled"})
    named_cache(tmp_path / "feats", "roberta", "text", model="roberta-base", pooling="pooler")
    named_cache(tmp_path / "feats", "clip", "clip", model="ViT-B/32")
    assert command(tmp_path / "feats", tmp_path, "D-ablation") == 0
    out = capsys.readouterr().out
    assert "resnet50 (frozen): image: layer pooled of resnet in place of logits" in out
    assert "text:" not in out and "clip image (frozen): image" not in out


def test_a_vector_is_read_where_the_study_read_one(feats: Path, tmp_path: Path):
    """query_attention would take image tokens where there are some."""
    assert command(feats, tmp_path, "E-fusions", "--rows", "cross") == 0
    [run] = runs_in(tmp_path / "reproduce_E-fusions")
    assert not content(run, "config")["features"]["tokens"]


def test_both_sides_or_none(tmp_path: Path):
    make_cache(tmp_path, "resnet")
    row = TABLES["A-fusions"].rows[0]
    with pytest.raises(UsageError, match="concat needs a cache of texts"):
        source_for(row, caches_in(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--rows", "nothing of the kind"], "no row is called so; there are concatenation; attention"),
        (["--weights", "clip=x.pt"], "--weights names clip; the encoders of tuned rows here are"),
    ],
)
def test_what_does_nothing_is_refused(
    options: list[str], why: str, feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert command(feats, tmp_path, "A-fusions", *options) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_without_caches(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command(tmp_path / "none", tmp_path, "all") == 2
    assert "no row of A-fusions, A-ablation" in capsys.readouterr().err


# -- tuned rows -------------------------------------------------------------------------------------------------


def test_a_tuned_row_is_filled_once_and_others_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    make_pairs(tmp_path / "set", 40)
    missing = str(tmp_path / "nothing.pth")
    weights = ["--weights", f"roberta={tiny_bert(tmp_path / 'bert', layers=1)['weights']}", f"resnet={missing}"]
    argv = ["D-ablation", "--rows", "tuned", *weights, "--data", str(tmp_path / "set")]
    assert command(tmp_path / "feats", tmp_path, *argv, "--finetune") == 0
    out = capsys.readouterr().out
    [run] = runs_in(tmp_path / "reproduce_D-ablation")
    facts, head = content(run, "config")["finetuned"]["facts"], trained_with(run)
    assert (facts["lr"], facts["bs"], facts["tune"], head["D"], head["sides"]) == (2e-5, 64, "all", 256, ["text"])
    line = next(r for r in table_of(tmp_path, "D-ablation") if r["row"] == "roberta tuned")
    assert float(line["ours"]) == pytest.approx(content(run, "metrics")["val"]["accuracy"])
    assert line["study"] == ".675" and "unstable, says the study" in line["note"]
    assert re.search(r"resnet50 tuned \(tuned\): not run: .*nothing.pth", out)
    assert "1 runs, 1 of them trained now" in out
    monkeypatch.setattr(finetuned, "_tune", None)
    assert command(tmp_path / "feats", tmp_path, *argv) == 0  # finished: shown without --finetune, too
    out = capsys.readouterr().out
    assert "1 runs, 0 of them trained now" in out and "not run (--finetune)" in out
    (tmp_path / "set" / "train.txt").write_text((tmp_path / "set" / "train.txt").read_text().replace("0,bad", "0,good"))
    assert command(tmp_path / "feats", tmp_path, *argv) == 2  # of other labels: another tuning
    assert command(tmp_path / "feats", tmp_path, *argv[:-1], str(tmp_path / "nowhere"), "--finetune") == 2
    assert "name their folder with --data" in capsys.readouterr().out


@pytest.mark.slow
def test_a_side_is_removed_from_the_tuned_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = cached_pairs(tmp_path, rows=40)
    assert set(weights) == {"vit", "roberta"}
    clip = tiny_clip(tmp_path / "clip")["weights"]
    argv = ["B-heads", "--rows", "attention", "removed", "--finetune", "--weights", f"clip={clip}"]
    assert command(tmp_path / "feats", tmp_path, *argv) == 0  # the pairs lie where the caches say
    tuned = [p for p in runs_in(tmp_path / "reproduce_B-heads") if content(p, "config")["finetuned"]]
    figures = content(tuned[0], "metrics")["ablation_eval"]
    found = {r["row"]: r for r in table_of(tmp_path, "B-heads") if r["encoders"] == "tuned"}
    assert len(tuned) == 1 and trained_with(tuned[0])["head"] == "gated_transformer"
    for label, left in (("image removed at test time", "text only"), ("text removed at test time", "image only")):
        assert float(found[label]["ours"]) == pytest.approx(figures[left]["accuracy"])
        assert found[label]["95 %"]
    assert "model clip with head gated_transformer" in capsys.readouterr().out


def test_a_removed_side_without_its_model_is_not_run(tmp_path: Path):
    table = TABLES["B-heads"]
    row = next(row for row in table.rows if row.ablation_of)
    [result] = finetuned.tuned_results(table, [row], Settings(tmp_path, tmp_path), train=False)
    reason = "not run: it is of the row attention, improved; name that in `rows`, too"
    assert result == Result(row, TUNED, reason=reason)
    [result] = tables.frozen_results(table, [row], Settings(tmp_path, tmp_path))
    assert result == Result(row, FROZEN, reason=reason)


def test_the_readme_names_every_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in TABLES)
