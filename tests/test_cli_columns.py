"""--columns as it is typed wherever stage 2 reads raw pairs: the very table, the same one elsewhere, one of other names."""

import csv
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from caches import submission
from conftest import content
from pairs import CLASSES, tiny_bert

from feats import roberta_extract_feats
from feats.errors import UsageError
from feats.store import FeatureStore
from modeling import (
    audit_labels,
    compare_finetuning,
    explain,
    finetune,
    inference_head,
    make_report,
    reproduce,
    train_head,
)
from modeling.finetuning import comparison
from modeling.finetuning.comparison import Cell
from modeling.report import making
from modeling.runs.listing import newest_run
from modeling.runs.pairs import DataPlace

HEADER = ["nr", "wording", "verdict", "where"]  # no usual name among them
COLUMNS = ["id=nr", "text=wording", "label=verdict", "split=where"]
N = 54
TUNE = "--ep 1 --bs 8 --lr 1e-3 --dtype fp32".split()


def write(path: Path, header: list[str], separator: str = "\t", rows: int = N) -> str:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(header)
        for i in range(rows):
            name = CLASSES[i % 3]
            writer.writerow([f"r{i}", f"the day {name} {i}", name, "test" if i >= 48 else "train"])
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of a tiny BERT, made of old/odd.tsv with --columns, a run on them, and new/ with the same table; old/ is
    gone."""
    home = tmp_path_factory.mktemp("odd")
    table = write(home / "old" / "odd.tsv", HEADER)
    weights = tiny_bert(home / "bert", layers=1)["weights"]
    encode = ["--data", table, "--out", str(home / "feats"), "--weights", weights, "--columns", *COLUMNS]
    assert roberta_extract_feats.main([*encode, "--workers", "0", "--device", "cpu"]) == 0
    head = "--ttype roberta --head concat --D 8 --ep 2 --bs 8 --val-ratio 0.25 --device cpu".split()
    assert train_head.main(["--feats", str(home / "feats"), "--runs", str(home / "runs"), *head]) == 0
    newest_run(home / "runs").rename(home / "runs" / "cached")
    shutil.rmtree(home / "old")
    write(home / "new" / "odd.tsv", HEADER)
    write(home / "new" / "other.csv", ["nr", "words", "verdict", "where"], ";")
    return home


def in_this_process(cell: Cell, command: Sequence[str]) -> None:
    if finetune.main(command[1:]):
        raise UsageError("see above")


def typed(home: Path, script) -> list[str]:
    """What a script is given besides where the pairs lie."""
    words = ["--runs", str(home / "runs"), "--device", "cpu", "--run", str(home / "runs" / "cached")]
    weights = ["--weights", f"roberta={home / 'bert'}"]
    of_script = {
        finetune: [*weights, *TUNE, "--name", "tuned"],
        compare_finetuning: [*weights, *TUNE, *"--methods lp_ft --folds 3 --only 1 --name compared".split()],
        explain: [*weights, *"--check 1 --orders 2".split()],
        audit_labels: "--folds 2".split(),
        make_report: [],
    }
    return [*words, *of_script[script]]


def made(home: Path, script) -> None:
    """Assert what a script leaves, and remove it."""
    runs = home / "runs"
    if script is finetune:
        assert content(runs / "tuned", "config")["finetuned"]["data"].startswith(str(home / "new"))
        shutil.rmtree(runs / "tuned")
    elif script is compare_finetuning:
        assert "lp_ft" in (runs / "compared" / "table.md").read_text()
        shutil.rmtree(runs / "compared")
    elif script is audit_labels:
        rows = list(csv.DictReader((runs / "cached" / "label_audit.csv").open()))
        assert {f"the day {row['given']} {row['id'][1:]}" for row in rows} == {row["text"] for row in rows}
        (runs / "cached" / "label_audit.csv").unlink()


@pytest.mark.parametrize(
    "script", [finetune, compare_finetuning, explain, audit_labels, make_report], ids=lambda s: s.__name__
)
def test_a_table_elsewhere(home: Path, capsys, monkeypatch: pytest.MonkeyPatch, script):
    """The columns that its caches were made with are its own, and what is typed stands before them."""
    texts: list[str] = []
    monkeypatch.setattr(comparison, "finetune", in_this_process)
    monkeypatch.setattr(making, "_sections", lambda material, *_: texts.append(material.text("r0")) or [])
    argv = typed(home, script)
    moved, other = str(home / "new" / "odd.tsv"), str(home / "new" / "other.csv")
    assert script.main([*argv, "--data", other]) == 2
    assert "error: other.csv has no column 'wording' (--columns text=wording)" in capsys.readouterr().err
    assert script.main([*argv, "--data", other, "--columns", "text=words"]) == 0
    made(home, script)
    assert script.main([*argv, "--data", moved]) == 0
    made(home, script)
    assert texts == (["the day bad 0"] * 2 if script is make_report else [])


@pytest.mark.parametrize("script", [audit_labels, make_report], ids=lambda s: s.__name__)
def test_columns_that_cannot_be_are_refused_where_the_pairs_lie_as_ever(
    home: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, script
):
    """What goes without the pairs where nobody says how to read them says so of columns that somebody typed."""
    monkeypatch.setattr(making, "_sections", lambda *_: [])
    argv = [*typed(home, script), "--out", str(tmp_path / "out.html")]
    assert script.main(argv) == 0  # the caches' table is gone
    capsys.readouterr()
    assert script.main([*argv, "--columns", "text=words"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read ")


def test_a_new_model_on_a_table(home: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """It knows no caches: columns are typed or guessed, and the guesses said. Its run knows them from then on."""
    monkeypatch.setattr(making, "_sections", lambda *_: [])
    runs = ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    moved, other = home / "new" / "odd.tsv", home / "new" / "other.csv"
    new = [*runs, "--text-encoder", "roberta", "--weights", f"roberta={home / 'bert'}", "--head", "concat", *TUNE]
    assert finetune.main([*new, "--data", str(moved)]) == 2
    assert "Say which column is which with --columns" in capsys.readouterr().err
    tuned = [*new, "--name", "tuned", "--val-ratio", "0.25"]
    assert finetune.main([*tuned, "--data", str(moved), "--columns", *COLUMNS]) == 0
    told = "note: odd.tsv: read as id=nr, text=wording, label=verdict, split=where\n"
    assert told in capsys.readouterr().err
    kept = content(tmp_path / "runs" / "tuned", "config")["finetuned"]
    assert kept["columns"] == dict(word.split("=") for word in COLUMNS)
    explained = [*runs, "--run", "tuned", "--check", "1", "--orders", "2"]
    assert explain.main(explained) == 0  # of rows that it hasn't encoded yet
    assert explain.main([*explained, "--data", write(tmp_path / "odd.tsv", HEADER, rows=9)]) == 2
    assert "odd.tsv lacks " in capsys.readouterr().err
    assert make_report.main([*runs, "--run", "tuned"]) == 0
    [command] = re.findall(r"make it with: python modeling/inference_head.py (.*) \(caches", capsys.readouterr().out)
    assert inference_head.main([*shlex.split(command), "--device", "cpu"]) == 0
    assert (tmp_path / "runs" / "tuned" / "feats" / "roberta_train.h5").is_file()
    predict = [*runs, "--run", "tuned", "--split", "test"]
    for more in ([], ["--data", str(moved)], ["--data", str(other), "--columns", "text=words"]):
        assert inference_head.main([*predict, *more]) == 0
        _, rows = submission(tmp_path / "runs" / "tuned" / "submission_test.csv")
        assert [row[0] for row in rows] == [f"r{i}" for i in range(48, N)]
    with FeatureStore.open(tmp_path / "runs" / "tuned" / "feats" / "roberta_test.h5") as store:
        assert store.source.columns["text"] == "words"


def test_a_study_s_tuned_row_on_a_table(home: Path, tmp_path: Path, capsys):
    argv = ["D-ablation", "--finetune", "--rows", "roberta tuned", "--weights", f"roberta={home / 'bert'}"]
    argv += ["--runs", str(tmp_path / "runs"), "--device", "cpu", "--data", str(home / "new" / "other.csv")]
    of_all = ["text=words", *(word for word in COLUMNS if word != "text=wording")]
    for feats, columns in ((home / "feats", ["text=words"]), (tmp_path, of_all)):
        assert reproduce.main([*argv, "--feats", str(feats), "--columns", *columns]) == 0
        assert "1 runs" in capsys.readouterr().out
    assert reproduce.main([*argv, "--feats", str(tmp_path)]) == 2
    assert "Say which column is which with --columns" in capsys.readouterr().out


def test_a_place_over_a_known_one(tmp_path: Path):
    known = DataPlace(tmp_path / "gone.csv", "manifest", {"text": "title", "label": "mood"})
    table, folder = Path(write(tmp_path / "t.csv", HEADER)), tmp_path / "course"
    folder.mkdir()
    (folder / "train.txt").write_text("guid,tag\n1,a\n")
    assert DataPlace().over(known) == known
    assert DataPlace(table).over(known) == DataPlace(table, None, known.columns)
    assert DataPlace(table, columns={"label": "", "id": "nr"}).over(known).columns == {
        "text": "title",
        "label": "",
        "id": "nr",
    }
    assert DataPlace(folder).over(known) == DataPlace(folder)  # which has no columns
    assert DataPlace(table, "shards").over(known) == DataPlace(table, "shards")
    assert DataPlace(columns={"id": "nr"}).over(DataPlace(folder, "course")).columns == {"id": "nr"}
    with pytest.raises(UsageError, match="layout course; leave it out"):
        DataPlace(columns={"id": "nr"}).over(DataPlace(folder, "course")).read()
    with pytest.raises(UsageError, match="cannot read .*nowhere"):
        DataPlace(tmp_path / "nowhere").over(known)
