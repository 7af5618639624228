"""compare_runs.py and list_runs.py as a user types them, and --run best."""

import csv
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT
from ready_runs import labels_of, noisy, ready_run, template

from modeling import bad_cases, sweep_heads, train_head

compare_runs, list_runs = (import_module(f"modeling.{name}") for name in ("compare_runs", "list_runs"))
LABELS = labels_of(80)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real runs of every kind in runs/: one head, seeds, folds, and a sweep of two."""
    root = tmp_path_factory.mktemp("made")
    template(root)
    common = ["--feats", str(root / "feats"), "--runs", str(root / "runs"), "--vtype", "clip", "--ep", "2"]
    one_split = [*common, "--val-ratio", "0.3"]
    assert train_head.main([*one_split, "--head", "linear", "--C", "1"]) == 0
    assert sweep_heads.main([*one_split, "--head", "mlp", "late", "--D", "4"]) == 0
    assert train_head.main([*common, "--folds", "3", "--head", "linear", "--C", "1"]) == 0
    assert train_head.main([*one_split, "--head", "concat", "--D", "4", "--seeds", "2"]) == 0
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_as_typed_from_anywhere(made: Path):
    script = [sys.executable, str(ROOT / "modeling" / "compare_runs.py"), "--runs", "runs"]
    out = subprocess.run(script, cwd=made, env=ENVIRONMENT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "") and max(map(len, out.stdout.splitlines())) <= 80
    one, folds = out.stdout.split("60 validation rows of train, 3 folds, split seed 42")
    assert one.startswith("18 validation rows of train, split seed 42\n")
    assert re.search(r"^ +4  ", one, re.M) and not re.search(r"^ +5  ", one, re.M)
    assert "s42, 3 folds" in " ".join(folds.split()) and "always" in folds and "±" in folds


def test_the_figures_are_those_of_the_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "board.csv"
    assert compare_runs.main(["--runs", str(made / "runs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"5 runs on 2 sets of rows -> {out}\n"
    rows = [row for row in table(out) if row["run"]]
    assert {row["kind"] for row in rows} == {"head", "2 heads", "3 folds"}
    assert sorted(row["head"].split(" ")[0] for row in rows) == ["concat", "late", "linear", "linear", "mlp"]
    for row in rows:
        saved = table(made / "runs" / row["run"] / "predictions_val.csv")
        right = sum(of["tag"] == of["pred"] for of in saved)
        assert float(row["accuracy"]) == pytest.approx(right / len(saved)) and int(row["n"]) == len(saved)


@pytest.mark.parametrize(
    ("name", "first"), [("b.md", "<!-- leaderboard -->"), ("b.tex", "% leaderboard"), ("b.txt", "leaderboard")]
)
def test_a_file_is_replaced_by_one_of_its_kind_only(
    made: Path, tmp_path: Path, name: str, first: str, capsys: pytest.CaptureFixture
):
    out, command = tmp_path / name, ["--runs", str(made / "runs"), "--out", str(tmp_path / name)]
    for _ in range(2):
        assert compare_runs.main(command) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"{first}\n") and "optimistic: confirm it on others" in " ".join(text.split())
    out.write_text("my notes\n")
    capsys.readouterr()
    assert compare_runs.main(command) == 2 and out.read_text() == "my notes\n"
    assert "isn't known to hold a leaderboard of this format" in capsys.readouterr().err


def test_some_runs_by_name_against_one(made: Path, capsys: pytest.CaptureFixture):
    late = next((made / "runs" / "sweep").glob("late*"))
    argv = ["best", late.name, "--runs", str(made / "runs"), "--against", late.name, "--by", "macro_f1"]
    assert compare_runs.main([*argv, "--format", "csv"]) == 0
    first, second, majority = csv.DictReader(capsys.readouterr().out.splitlines())
    assert first["against"] == str(late) and second["p"] == "" != first["p"] and majority["kind"] == "majority"
    assert compare_runs.main([str(made / "runs" / "sweep"), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 5  # head, rule, two runs, majority


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["typo"], "typo is no run and no folder of runs"),
        (["--against", "typo"], "typo is no run and no folder of runs"),
        (["--runs", "nowhere"], "nowhere is no run and no folder of runs"),
    ],
)
def test_what_is_refused(made: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture):
    runs = [] if "--runs" in argv else ["--runs", str(made / "runs")]
    assert compare_runs.main([*argv, *runs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_list_of_all_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = next((made / "template").iterdir())
    runs = tmp_path / "runs"
    caches = (["efficientnet", "clip"], ["minilm", "vader"])
    ready_run(model, runs / "old", LABELS, LABELS, hours=75, caches=caches)
    ready_run(model, runs / "sweep" / "new", LABELS, noisy(LABELS, 0.5, 1), hours=3.5)
    ready_run(model, runs / "middle", LABELS, noisy(LABELS, 0.3, 1), hours=26)
    (runs / "bad").mkdir()
    (runs / "bad" / "config.json").write_text("{}")

    def listed(*argv: str) -> list[str]:
        assert list_runs.main(["--runs", str(runs), *argv]) == 0
        out, err = capsys.readouterr()
        (warning,) = err.splitlines()
        assert warning.startswith("warning: ") and str(runs / "bad") in warning
        assert max(map(len, out.splitlines())) <= 80 and "3 runs; " in out
        assert "efficientnet+" in out and "vader" in out and f"accuracy {1:.3f} of 80" in out
        assert all(re.search(rf"^{age} +head +concat D4 ", out, re.M) for age in ("3 h", "1 d", "3 d"))
        return re.findall(r"^  (old|middle|sweep/new)$", out, re.M)

    assert listed() == ["sweep/new", "middle", "old"]
    assert listed("--sort", "score") == ["old", "sweep/new", "middle"]
    assert list_runs.main(["--runs", str(tmp_path / "none")]) == 2
    assert "no complete run in" in capsys.readouterr().err


def test_the_best_is_used_where_a_run_is_taken(made: Path, capsys: pytest.CaptureFixture):
    runs = ["--runs", str(made / "runs")]
    assert bad_cases.main(["--run", "best", "--folds", "2", *runs]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.match(
        rf"best run {made}/runs/\S+linear\S*: accuracy \d\.\d+ on 18 validation rows, which chose it", first
    )
    assert bad_cases.main(["--folds", "2", *runs]) == 0
    newest, better = capsys.readouterr().out.splitlines()[:2]
    assert re.match(rf"newest run {made}/runs/\S+concat\S+_x2: accuracy \d\.\d+ on 18 validation rows$", newest)
    assert re.match(r"run \S+linear\S* has accuracy \d\.\d+ on the same 18 rows: --run best$", better)
