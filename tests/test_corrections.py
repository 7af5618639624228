"""Corrected labels: applied at the split that there is, kept in the run, used by whatever reads its labels."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES, make_cache, make_tags
from conftest import content
from pairs import cached_pairs
from safetensors.torch import load_file

from feats.csv_files import write_csv
from feats.errors import UsageError
from modeling import audit_labels, bad_cases, evaluate, finetune, inference_head, load_features, sweep_heads, train_head
from modeling.experiments.fitting import fit_head
from modeling.features.corrections import read_corrections
from modeling.features.joined import Rows
from modeling.features.splits import make_split
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run

HEADS = {
    "linear": ["--head", "linear", "--norm", "standard"],
    "fusion": [
        "--head",
        "fusion",
        "--D",
        "8",
        "--ep",
        "4",
        "--bs",
        "16",
        "--lr",
        "1e-2",
        "--class-weights",
        "balanced",
    ],
}
FAST = ["--head", "kernel", "--gamma", "1", "--ridge", "1"]
WRONG = {"p3": "positive", "p8": "negative", "p20": "neutral", "p41": "positive", "p77": "neutral"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Caches of 90 pairs in feats/; in corrected/ the same with the labels of `WRONG`, which corrections.csv holds."""
    tags = make_tags(90)
    assert all(tags[int(name[1:])] != label for name, label in WRONG.items())
    cache = make_cache(tmp_path / "feats", "clip")
    with_corrected = [WRONG.get(f"p{i}", tag) for i, tag in enumerate(tags)]
    features = load_features(cache.parent, "train", "clip", "clip")
    changed = {f"{side}_feats": getattr(features, side)["clip"].numpy() for side in ("image", "text")}
    make_cache(tmp_path / "corrected", "clip", tags=with_corrected, changed=changed)
    (tmp_path / "corrections.csv").write_text("id,label\n" + "".join(f"{i},{name}\n" for i, name in WRONG.items()))
    return tmp_path


def folders(root: Path, feats: str = "feats") -> list[str]:
    return ["--vtype", "clip", "--feats", str(root / feats), "--runs", str(root / "runs")]


def train(root: Path, *argv: str, feats: str = "feats") -> Path:
    assert train_head.main([*folders(root, feats), *argv]) == 0
    return newest_run(root / "runs")


def given(root: Path) -> list[str]:
    return ["--corrections", str(root / "corrections.csv")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=HEADS)
def twins(request: pytest.FixtureRequest, root: Path) -> tuple[Path, Path]:
    """A run with corrections, and one on the corrected caches at the same split."""
    split = [*HEADS[request.param], "--val-ratio", "0.2", "--test-ratio", "0.1"]
    with_file = train(root, *split, *given(root))
    files = ["--split-file", str(with_file / "split.json")]
    return with_file, train(root, *HEADS[request.param], *files, feats="corrected")


def test_training_equals_that_on_corrected_caches(twins: tuple[Path, Path], root: Path):
    a, b = twins
    plain = train(root, *FAST, "--val-ratio", "0.2", "--test-ratio", "0.1")
    split = content(plain, "split")
    assert {part: content(a, "split")[part] for part in ("train", "val", "test")} == {
        part: split[part] for part in ("train", "val", "test")
    }
    left, right = load_file(a / "head.safetensors"), load_file(b / "head.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name].numpy(), right[name].numpy(), err_msg=name)
    for name in ("predictions_val.csv", "predictions_test.csv", "history.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    figures = [{k: v for k, v in content(run, "metrics").items() if k != "protocol"} for run in (a, b)]
    assert figures[0] == figures[1]
    assert (a / "predictions_val.csv").read_bytes() != (plain / "predictions_val.csv").read_bytes()


@pytest.mark.parametrize("twins", ["fusion"], indirect=True)
def test_what_reads_the_runs_labels_reads_the_corrected_ones(
    twins: tuple[Path, Path], root: Path, capsys: pytest.CaptureFixture
):
    outputs: dict[str, list[object]] = {"bad": [], "queue": [], "table": []}
    for run in twins:
        for script, name in ((bad_cases, "bad"), (audit_labels, "queue")):
            out = root / f"{name}_{run.name}.csv"
            assert (
                script.main(["--runs", str(root / "runs"), "--run", str(run), "--folds", "3", "--out", str(out)]) == 0
            )
            outputs[name].append(out.read_bytes())
        capsys.readouterr()
        assert inference_head.main(["--runs", str(root / "runs"), "--run", str(run), "--split", "train"]) == 0
        out = capsys.readouterr().out
        outputs["table"].append(re.findall(r"^train .*|^  always .*", out, re.M))
        assert ("5 labels corrected, as in the run" in out) == (run == twins[0])
    for name, (left, right) in outputs.items():
        assert left == right and left, name
    queue = {row["id"]: row["given"] for row in rows_of(root / f"queue_{twins[0].name}.csv")}
    assert {name: queue[name] for name in WRONG} == WRONG
    run, data = load_run(twins[0]), load_features(root / "feats", "train", "clip", "clip")
    other = load_features(root / "corrected", "train", "clip", "clip")
    assert evaluate(run, data) == evaluate(load_run(twins[1]), other) and run.score(data) == run.score(other)


def test_corrections_are_kept_and_told(root: Path, capsys: pytest.CaptureFixture):
    before = (root / "feats" / "clip_train.h5").read_bytes()
    capsys.readouterr()
    path = train(root, *FAST, "--val-ratio", "0.3", "--test-ratio", "0.3", *given(root))
    out, split = capsys.readouterr().out, content(path, "split")
    counts = {
        words: len(WRONG.keys() & set(split[part]))
        for words, part in (("test", "test"), ("training", "train"), ("validation", "val"))
    }
    counts = {words: count for words, count in counts.items() if count}
    assert "validation" in counts and len(counts) > 1
    words = "5 labels corrected (" + ", ".join(f"{n} of {part} rows" for part, n in counts.items())
    words += ": figures on these go by the corrected labels)"
    assert f"{root / 'corrections.csv'}: {words}; the caches keep theirs" in out.splitlines()
    protocol = next(line for line in out.splitlines() if line.startswith("protocol: "))
    assert f"; {words}; " in protocol and words in content(path, "metrics")["protocol"]
    assert {row["id"]: row["label"] for row in rows_of(path / "corrections.csv")} == WRONG
    kept = content(path, "config")["corrections"]
    assert kept["count"] == 5 and len(kept["sha256"]) == 64
    assert load_run(path).corrections == WRONG
    assert (root / "feats" / "clip_train.h5").read_bytes() == before
    again = train(root, *FAST, "--corrections", str(path / "corrections.csv"))  # a run's own file
    assert content(again, "config")["corrections"] == kept
    plain = train(root, *FAST)
    assert content(plain, "config")["corrections"] is None and not (plain / "corrections.csv").exists()
    assert "corrected" not in content(plain, "metrics")["protocol"]
    (path / "corrections.csv").write_text("id,label\np3,neutral\n")
    with pytest.raises(UsageError, match="damaged .*corrections.csv isn't what the run was saved with"):
        load_run(path)


def test_folds_and_the_search_keep_them(root: Path):
    folds = train(root, "--head", "linear", "--C", "1", "--folds", "2", *given(root))
    assert "5 labels corrected (5 of validation rows: figures" in content(folds, "metrics")["protocol"]
    search = ["--auto", "--head", "kernel", "--gamma", "1", "--ridge", "1", *given(root)]
    assert sweep_heads.main([*folders(root), *search]) == 0
    assert load_run(newest_run(root / "runs")).corrections == WRONG


def test_a_sweep_tells_runs_with_corrections_from_others(root: Path, capsys: pytest.CaptureFixture):
    grid = [*folders(root), "--head", "kernel", "--gamma", "1", "--ridge", "1"]
    assert sweep_heads.main(grid) == 0
    capsys.readouterr()
    assert sweep_heads.main([*grid, *given(root)]) == 2
    assert "belong into one table; give another --name" in capsys.readouterr().err
    grid += ["--name", "corrected"]
    assert sweep_heads.main([*grid, *given(root)]) == 0
    out = capsys.readouterr().out
    assert "1 trainings, 1 of them finished before" not in out and "Of the labels, 5 labels corrected" in out
    assert "5 labels corrected" in (root / "runs" / "corrected" / "table.md").read_text()
    assert sweep_heads.main([*grid, *given(root)]) == 0
    assert "1 trainings, 1 of them finished before" in capsys.readouterr().out


def test_an_edited_queue_is_a_file_of_corrections(root: Path):
    def edit(path: Path, labels: dict[str, str]) -> Path:
        rows = rows_of(path)
        for row in rows:
            row["corrected"] = labels.get(row["id"], "")
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
            csv.DictWriter(file, list(rows[0])).writeheader()
            csv.DictWriter(file, list(rows[0])).writerows(rows)
        return path

    first = train(root, *FAST)
    assert audit_labels.main(["--runs", str(root / "runs")]) == 0
    queue = edit(first / "label_audit.csv", {"p3": "positive", "p8": "negative", "p1": make_tags(90)[1]})
    second = train(root, *FAST, "--corrections", str(queue))
    assert load_run(second).corrections == {"p3": "positive", "p8": "negative"}  # p1 keeps its label
    assert audit_labels.main(["--runs", str(root / "runs"), "--run", str(second)]) == 0
    queue = edit(second / "label_audit.csv", {"p20": "neutral", "p8": make_tags(90)[8]})
    third = train(root, *FAST, "--corrections", str(queue))
    assert load_run(third).corrections == {"p3": "positive", "p20": "neutral"}  # what was corrected before stays so


@pytest.mark.parametrize("safe", [[], ["--csv-safe"]])
def test_a_queue_for_spreadsheets_says_the_same(safe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    signs = dict(zip(CLASSES, ("-1", "=0", "+1"), strict=True))
    make_cache(tmp_path / "feats", "clip", tags=[signs[tag] for tag in make_tags(90)])
    run = train(tmp_path, *FAST)
    assert audit_labels.main(["--runs", str(tmp_path / "runs"), "--folds", "2", *safe]) == 0
    rows = rows_of(run / "label_audit.csv")
    assert {row["given"] for row in rows} == {f"'{sign}" if safe else sign for sign in signs.values()}
    wanted = {"p3": "+1", "p8": "-1"}
    with (run / "label_audit.csv").open("w", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, list(rows[0])).writeheader()
        typed = {"p3": "+1", "p8": "'-1" if safe else "-1"}  # by hand, and pasted from another row
        csv.DictWriter(file, list(rows[0])).writerows({**row, "corrected": typed.get(row["id"], "")} for row in rows)
    assert load_run(train(tmp_path, *FAST, "--corrections", str(run / "label_audit.csv"))).corrections == wanted


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("twins", [("=x", "'=x"), ("'@", "''@"), ("'x", "x"), ("\tx", "'\tx")])
def test_ids_come_back_from_a_file_for_spreadsheets(safe: bool, twins: tuple[str, str], tmp_path: Path):
    rows = Rows.of([*twins, "other"], ["-", "'-", "a"], np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64))
    write_csv(tmp_path / "c.csv", [["id", "label"], [twins[0], "'-"], [twins[1], "-"], ["other", "a"]], safe=safe)
    assert read_corrections(tmp_path / "c.csv", rows) == {twins[0]: "'-", twins[1]: "-"}


def test_from_python_the_run_keeps_what_its_data_had_corrected(root: Path):
    data = load_features(root / "feats", "train", "clip", "clip")
    corrected = data.corrected(WRONG)
    assert make_split(corrected, 0.2) == make_split(data, 0.2)
    run = fit_head(corrected, make_split(corrected, 0.2), "linear", C=1.0)
    assert run.corrections == WRONG and data.corrections == {} and run.save(root / "runs" / "mine").corrections == WRONG
    assert evaluate(run, data) == evaluate(run, corrected)
    other = data.corrected({"p0": "neutral"})  # what a caller corrects comes on top
    assert run.with_own_labels(other).corrections == {**WRONG, "p0": "neutral"}


def test_runs_that_correct_differently_are_told(root: Path, capsys: pytest.CaptureFixture):
    a = train(root, *FAST, *given(root))
    (root / "corrections.csv").write_text("id,label\np3,neutral\np5,neutral\n".replace("p3,neutral", "p20,negative"))
    b = train(root, *FAST, *given(root))
    capsys.readouterr()
    runs = ["--runs", str(root / "runs"), "--run", str(a), str(b), "--split", "train"]
    assert inference_head.main(runs) == 0
    out, err = capsys.readouterr()
    assert "1 labels are corrected differently by the runs, e.g. p20" in err and "6 labels corrected" in out


def test_other_data_with_the_same_ids_keep_their_labels(root: Path, capsys: pytest.CaptureFixture):
    train(root, *FAST, *given(root))
    make_cache(root / "others", "clip", fingerprint={"data": {"rows": 90, "ids_sha256": "1" * 64}})
    make_cache(root / "feats", "clip", split="test")
    for where in (["--feats", str(root / "others"), "--split", "train"], ["--split", "test"]):
        capsys.readouterr()
        assert inference_head.main(["--runs", str(root / "runs"), *where]) == 0
        assert "corrected" not in capsys.readouterr().out


def test_finetuning_goes_by_them(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = ["--weights", *(f"{name}={path}" for name, path in cached_pairs(tmp_path).items())]
    (tmp_path / "c.csv").write_text("id,label\n0,rain\n4,bad\n5,good\n7,rain\n")  # of bad, good, rain, good
    corrections, wanted = (
        ["--corrections", str(tmp_path / "c.csv")],
        {"0": "rain", "4": "bad", "5": "good", "7": "rain"},
    )
    runs, short = ["--runs", str(tmp_path / "runs")], ["--bs", "8", "--ep", "1", "--device", "cpu"]
    sides = ["--vtype", "vit", "--ttype", "roberta", "--head", "concat", "--D", "8", "--val-ratio", "0.5"]
    assert train_head.main(["--feats", str(tmp_path / "feats"), *runs, *sides, *short, *corrections]) == 0
    assert finetune.main([*runs, *weights, *short, "--dtype", "fp32", *corrections]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --corrections: a run keeps the labels its head was trained with; train the head")
    assert finetune.main([*runs, *weights, *short, "--dtype", "fp32", "--name", "tuned"]) == 0
    new = ["--image-encoder", "vit", "--text-encoder", "roberta", "--head", "concat", "--D", "8", "--val-ratio", "0.5"]
    new += ["--data", str(tmp_path / "set"), "--name", "new"]
    assert finetune.main([*runs, *weights, *short, "--dtype", "fp32", *new, *corrections]) == 0
    assert capsys.readouterr().out.count("note: 4 labels corrected (") == 2
    for name in ("tuned", "new"):
        run = load_run(tmp_path / "runs" / name)
        tags = {row["id"]: row["tag"] for row in rows_of(run.folder / "predictions_val.csv")}
        assert run.corrections == wanted and "4 labels corrected" in content(run.folder, "metrics")["protocol"]
        assert tags.keys() & wanted and all(tags[i] == wanted[i] for i in tags.keys() & wanted)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,label\np3,positive\np3,neutral\n", "line 3: id p3 is named twice; keep one"),
        ("id,label\np3,positive\nq1,neutral\n", "1 of 2 ids (q1) aren't among the 88 labelled rows"),
        ("id,label\np89,positive\n", "1 of 1 ids (p89) aren't among the 88 labelled rows"),  # has no label to correct
        ("id,label\np3,happy\n", "label 'happy' is no class of the data; expected negative, neutral, positive"),
        ("label,id\npositive\n", "1 of 1 ids () aren't among"),
        ("id,tag\np3,positive\n", "has columns id,tag; expected id and label"),
        ("id,given,suggested\np3,positive,neutral\n", "has columns id,given,suggested; expected id and label"),
        ("", "has columns (nothing); expected id and label"),
        (b"id,label\n\xff,positive\n", "can't read the corrections"),
    ],
)
@pytest.mark.parametrize("script", [train_head.main, sweep_heads.main])
def test_what_is_no_file_of_corrections(
    text: str | bytes, words: str, script: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    make_cache(tmp_path / "feats", "clip", tags=[*make_tags(88), "", ""])
    file = tmp_path / "c.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert script([*folders(tmp_path), "--head", "kernel", "--corrections", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and str(file) in line
    assert not (tmp_path / "runs").exists()


def test_a_file_that_isnt_there(root: Path, capsys: pytest.CaptureFixture):
    assert train_head.main([*folders(root), "--corrections", str(root / "typo.csv")]) == 2
    assert f"can't read the corrections {root / 'typo.csv'}: No such file" in capsys.readouterr().err


def test_a_file_that_changes_nothing(root: Path, capsys: pytest.CaptureFixture):
    (root / "corrections.csv").write_text(f"id,label\np0,{make_tags(90)[0]}\np1,\n")
    path = train(root, *FAST, *given(root))
    assert f"{root / 'corrections.csv'}: no label differs from the caches'" in capsys.readouterr().out
    assert load_run(path).corrections == {} and set(load_run(path).classes) == set(CLASSES)
