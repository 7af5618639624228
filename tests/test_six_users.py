"""What six kinds of users type on their first day, one command after the other, and what they see."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, make_course
from PIL import Image

pytestmark = pytest.mark.slow  # every command is a process that imports torch

TERMINAL = {**ENVIRONMENT, "COLUMNS": "80"}


class Shell:
    """A folder in which commands are typed. Every table line must fit 80 columns, no command may show a traceback."""

    def __init__(self, place: Path):
        self.place = place
        self.status = 0

    def __call__(self, line: str, given: str = "", fails: bool = False) -> str:
        words = shlex.split(line)
        words[:2] = [sys.executable, str(ROOT / words[1])]
        ran = subprocess.run(words, cwd=self.place, env=TERMINAL, capture_output=True, text=True, input=given)
        assert "Traceback" not in ran.stderr, ran.stderr
        assert (ran.returncode != 0) == fails, f"{line}\n{ran.stdout}\n{ran.stderr}"
        rules = [shown for shown in ran.stdout.splitlines() if set(shown) == {"-", " "}]
        assert all(len(rule) <= 80 for rule in rules), ran.stdout
        return ran.stderr if fails else ran.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_student_with_the_course_s_data(shell: Shell):
    """Encode, train, predict the unlabelled rows, hand in a file."""
    make_course(shell.place / "data", rows=60, test_rows=9)
    shell("python feats/vader_extract_feats.py")
    shell("python feats/pixels_extract_feats.py")
    no_clip = shell("python modeling/train_head.py --vtype clip --D 256", fails=True)
    assert "--vtype pixels --ttype vader" in no_clip  # what is there, as a command
    shown = shell("python modeling/train_head.py --vtype pixels --ttype vader --D 8 --epochs 3")
    assert "macro_f1" in shown and "always" in shown
    predicted = shell("python modeling/inference_head.py")
    assert "9 predictions -> " in predicted
    submission = next(shell.place.glob("saved/runs/*/submission_test.csv")).read_text().splitlines()
    assert submission[0] == "guid,tag" and [line.split(",")[0] for line in submission[1:]] == [
        str(n) for n in range(60, 69)
    ]


def test_a_data_scientist_with_a_table(shell: Shell):
    """Own names of columns, two targets from one encoding, predictions for a new table."""
    (shell.place / "shop" / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for k in range(60):
        kind, mood = ("shoe", "hat")[k % 2], ("good", "bad")[k // 2 % 2]
        pixels = rng.integers(0, 60, (8, 8, 3)) + (150 if k % 2 else 20)
        Image.fromarray(pixels.astype(np.uint8)).save(shell.place / f"shop/pictures/{k}.png")
        word = {"good": "great happy", "bad": "awful sad"}[mood]
        rows.append([f"sku{k}", f"pictures/{k}.png", f"{word} {kind} {k} {rng.integers(9)}", kind, mood, "x"])
    table = shell.place / "shop" / "products.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["sku", "image_path", "title", "category", "mood", "price"], *rows])
    for encoder in ("vader", "pixels"):
        shell(f"python feats/{encoder}_extract_feats.py --data shop/products.csv --columns label=category")
    head = "--vtype pixels --ttype vader --head linear --C 1"
    assert "hat" in shell(f"python modeling/train_head.py {head}")
    assert "bad" in shell(f"python modeling/train_head.py {head} --label-column mood")
    shell("python modeling/inference_head.py --csv shop/products.csv --out new.json")
    assert len(json.loads((shell.place / "new.json").read_text())) == 60


def test_a_researcher(shell: Shell):
    """A comparison with folds, a leaderboard in LaTeX, and the next best thing to a published table."""
    make_course(shell.place / "data", rows=90)
    for encoder in ("vader", "pixels"):
        shell(f"python feats/{encoder}_extract_feats.py")
    swept = shell(
        "python modeling/sweep_heads.py --vtype pixels --ttype vader --head concat linear --D 4 --epochs 2 --folds 3"
    )
    assert "95 %" in swept and "always" in swept
    table = shell("python modeling/compare_runs.py --runs saved/runs --format latex")
    assert table.count(r"\begin{tabular}") >= 1
    assert "concat" in shell("python modeling/list_runs.py")
    assert "D" in shell("python modeling/reproduce.py")


def test_an_engineer(shell: Shell):
    """Two processes make a cache, which is as one's; a warm predictor answers lines of JSON."""
    make_course(shell.place / "data", rows=60)
    shell("python feats/vader_extract_feats.py --out plain")
    shell("python feats/vader_extract_feats.py --out saved/feats --parts --no-join --batch-size 8 --piece-rows 64")
    shell("python feats/merge_feats.py")
    shell("python modeling/train_head.py --ttype vader --head linear --C 1")
    pairs = [{"id": 1, "text": "what a happy day"}, {"text": 3}]
    answers = shell("python modeling/serve.py", given="".join(json.dumps(pair) + "\n" for pair in pairs))
    first, second = map(json.loads, answers.splitlines())
    assert first["id"] == 1 and abs(sum(first["probabilities"].values()) - 1) < 1e-6
    assert "error" in second


def test_somebody_who_mistypes(shell: Shell):
    """Each mistake is one line on stderr, and says what to do."""
    make_course(shell.place / "data", rows=30)
    for line, says in {
        "python feats/vader_extract_feats.py --data dta": "dta",
        "python feats/clip_extract_feats.py --splits vall": "vall",
        "python modeling/train_head.py --ttype vadr": "vadr",
        "python modeling/inference_head.py": "run",
        "python modeling/train_head.py --epochs 0": "expected 1 or more",
    }.items():
        assert says in shell(line, fails=True).splitlines()[-1]


def test_a_notebook_s_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The calls of the README's first cells, with an encoder that is quick."""
    make_course(tmp_path / "data", rows=60)
    monkeypatch.chdir(tmp_path)
    code = """
from feats import extract, load_encoder, read_dataset
from modeling import HeadConfig, evaluate, fit_head, load_features, make_split

data = read_dataset("data")
print(extract(load_encoder("vader"), data["train"], "saved/feats/vader_train.h5"))
features = load_features("saved/feats", "train", text="vader")
split = make_split(features, val_ratio=0.2)
model = fit_head(features, split, HeadConfig("mlp", D=4), ep=2)
print(evaluate(model, features, split.val)["accuracy"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    summary, accuracy = ran.stdout.splitlines()
    assert "60 rows done" in summary and 0 <= float(accuracy) <= 1
