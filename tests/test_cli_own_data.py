"""Own tables and folders, and another target, as they are typed."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feats import export_texts, ngrams_extract_feats, pixels_extract_feats
from feats.errors import UsageError
from feats.store import FeatureStore
from modeling import audit_labels, bad_cases, inference_head, sweep_heads, train_head
from modeling.runs.folder import load_run

SMALL = ["--device", "cpu", "--workers", "0", "--batch-size", "8"]
N = 60


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shop.csv: a word of the text tells the mood, another the kind; a third of the rows are a test split. Encoded."""
    home = tmp_path_factory.mktemp("shop")
    with (home / "shop.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["sku", "title", "mood", "kind", "fold", "price"])
        for i in range(N):
            mood, kind = ("glad", "sad")[i % 2], ("tool", "toy", "")[i // 2 % 3]
            writer.writerow([f"s{i}", f"{mood * 3} {kind * 3}; {i}", mood, kind, ("train", "test")[i % 3 == 2], i])
    assert encode(home, "--columns", "label=mood") == 0
    return home


def encode(home: Path, *more: str, data: str = "shop.csv", out: str = "feats") -> int:
    command = ["--data", str(home / data), "--out", str(home / out), "--hash-columns", "64", *SMALL, *more]
    return ngrams_extract_feats.main(command)


def train(home: Path, *more: str, runs: str = "runs", script=train_head) -> int:
    words = ["--feats", str(home / "feats"), "--runs", str(home / runs), "--device", "cpu", "--ttype", "ngrams"]
    return script.main([*words, "--head", "linear", *more])


def newest(home: Path, runs: str = "runs") -> Path:
    return max((home / runs).glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns).parent


def test_a_table_is_encoded_with_one_note(shop, tmp_path, capsys):
    (tmp_path / "shop.csv").write_bytes((shop / "shop.csv").read_bytes())
    assert encode(tmp_path) == 0
    note = "note: shop.csv: read as id=sku, text=title, split=fold; other columns ignored: mood, kind, price\n"
    assert note in capsys.readouterr().err
    assert encode(tmp_path, "--columns", "label=mood") == 0
    with FeatureStore.open(tmp_path / "feats" / "ngrams_train.h5") as store:
        assert set(store.tags) == {"glad", "sad"} and store.source.columns == {"label": "mood"}
        assert store.ids[0] == "s0" and len(store) == N - N // 3
    assert encode(tmp_path, "--columns", "label=mood", "--stream", out="streamed") == 0
    with FeatureStore.open(tmp_path / "streamed" / "ngrams_train.h5") as store:
        assert store.source.columns == {"label": "mood"} and set(store.tags) == {"glad", "sad"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["label=nothing"], "error: shop.csv has no column 'nothing' (--columns label=nothing); it has sku, title"),
        (["colour=a"], "error: --columns colour=a: expected id, image, text, label, split before ="),
    ],
)
def test_columns_that_cannot_be(shop, capsys, columns, said):
    assert encode(shop, "--columns", *columns, out="none") == 2
    assert said in capsys.readouterr().err


def test_two_that_could_be_the_text(tmp_path, capsys):
    (tmp_path / "shop.csv").write_text("title,description\na,b\n")
    assert encode(tmp_path) == 2
    said = "error: shop.csv: title and description could each be the text; say which with --columns text=title, or text= for none\n"
    assert capsys.readouterr().err.endswith(said)
    command = ["--data", str(tmp_path / "shop.csv"), "--out", str(tmp_path / "texts"), "--columns", "text=description"]
    assert export_texts.main(command) == 0
    assert (tmp_path / "texts" / "1.txt").read_text() == "b"


def test_pictures_only(tmp_path, capsys):
    for name in ("red/1", "red/2", "blue/1"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), name.split("/")[0]).save(tmp_path / "set" / f"{name}.png")
    assert pixels_extract_feats.main(["--data", str(tmp_path / "set"), "--out", str(tmp_path), *SMALL]) == 0
    with FeatureStore.open(tmp_path / "pixels_train.h5") as store:
        frame = store.to_frame()
    assert frame.ids.tolist() == ["blue/1", "red/1", "red/2"] and frame.labels.tolist() == ["blue", "red", "red"]
    assert len(np.unique(frame["image_feats"], axis=0)) == 2
    capsys.readouterr()
    assert encode(tmp_path, data="set") == 2
    said = (
        "error: this encoder reads texts, and none of the rows of train has a text; take an encoder of the other side"
    )
    assert capsys.readouterr().err.startswith(said)
    assert not list((tmp_path).glob("feats/*"))


def test_an_encoder_of_both_sides_on_one(tmp_path, capsys):
    """Of a table without pictures, whole and in pieces."""
    from feats.encoders.registry import load_encoder
    from feats.extraction.job import with_sides_of
    from feats.pieces import open_pieces
    from feats.records import read_dataset

    (tmp_path / "m.csv").write_text("id,text\n1,a\n2,b\n")
    texts, pictures = load_encoder("ngrams", columns=8), load_encoder("pixels")
    both = replace(texts, image=pictures.image)
    for data in (read_dataset(tmp_path)["train"], open_pieces(tmp_path, rows=1)["train"]):
        with pytest.warns(UserWarning, match="none of the rows of train has an image: only the other side"):
            one = with_sides_of(both, data)
        assert one.image is None and one.text is texts.text
        assert with_sides_of(texts, data) is texts
        with pytest.raises(UsageError, match="this encoder reads images, and none of the rows"):
            with_sides_of(pictures, data)


# -- another target


@pytest.mark.slow
def test_another_target_from_the_same_caches(shop, capsys):
    assert train(shop, "--label-column", "kind") == 0
    assert f"labels of column kind of {shop / 'shop.csv'}" in capsys.readouterr().out
    run = load_run(newest(shop))
    assert run.classes == ["tool", "toy"] and run.target.column == "kind"
    table = {row["sku"]: row for row in csv.DictReader((shop / "shop.csv").open(), delimiter=";")}
    ids = [*run.split.train, *run.split.val]
    assert set(ids) == {i for i, row in table.items() if row["kind"] and row["fold"] == "train"}  # split by it, too
    assert {i: run.target.labels["train"][i] for i in ids} == {i: table[i]["kind"] for i in ids}

    common = ["--run", str(run.path), "--device", "cpu"]
    assert inference_head.main([*common, "--out", str(shop / "out.csv")]) == 0
    said = capsys.readouterr().out
    labelled = sum(row["fold"] == "test" and bool(row["kind"]) for row in table.values())
    assert f"{labelled} " in said and "tool" in said and "glad" not in said
    assert bad_cases.main([*common, "--out", str(shop / "bad.csv")]) == 0
    assert "glad" not in capsys.readouterr().out
    assert audit_labels.main([*common, "--out", str(shop / "audit.csv")]) == 0
    given = {row["id"]: row["given"] for row in csv.DictReader((shop / "audit.csv").open())}
    assert given == {i: table[i]["kind"] for i in given} and len(given) == len(ids)


def test_a_sweep_over_another_target(shop, tmp_path):
    (tmp_path / "other.csv").write_text("id,mine\n" + "".join(f"s{i},{'ab'[i // 5 % 2]}\n" for i in range(N)))
    more = ("--label-column", "mine", "--data", str(tmp_path / "other.csv"), "--C", "1", "--norm", "none")
    assert train(shop, *more, runs="sweeps", script=sweep_heads) == 0
    [run] = [load_run(path.parent) for path in (shop / "sweeps").rglob("config.json")][:1]
    assert run.classes == ["a", "b"] and run.target.data == str(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label-column", "colour"], "shop.csv has no column 'colour'; it has "),
        (["--data", "x.csv"], "--data is the table of --label-column: name the column"),
        (
            ["--label-column", "kind", "--data", "{few}"],
            "lacks 39 of the 40 train rows of ngrams_train.h5 (e.g. s1); name",
        ),
        (["--label-column", "kind", "--data", "{none}"], "column kind holds no label of the 40 train rows"),
    ],
)
def test_targets_that_cannot_be(shop, tmp_path, capsys, words, said):
    (tmp_path / "few.csv").write_text("id,kind\ns0,a\n")
    (tmp_path / "none.csv").write_text("id,kind\n" + "".join(f"s{i},null\n" for i in range(N)))
    places = {"few": tmp_path / "few.csv", "none": tmp_path / "none.csv"}
    assert train(shop, *(word.format(**places) for word in words), runs="none") == 2
    assert said in capsys.readouterr().err


def test_runs_of_different_targets_are_no_ensemble(shop, capsys):
    for column in ("mood", "kind"):
        assert train(shop, "--label-column", column, runs=column) == 0
    runs = [str(newest(shop, column)) for column in ("mood", "kind")]
    capsys.readouterr()
    assert inference_head.main(["--run", *runs, "--device", "cpu", "--out", str(shop / "both.csv")]) == 2
    assert "error: " in capsys.readouterr().err


def test_raw_pairs_of_a_table_with_other_columns(shop, tmp_path, capsys):
    assert train(shop, "--label-column", "kind", runs="raw") == 0
    (tmp_path / "new.tsv").write_text("caption\ttag\n" + "tooltooltool\ttool\ntoytoytoy\ttoy\n")
    out = tmp_path / "out.csv"
    command = [
        "--run",
        str(newest(shop, "raw")),
        "--csv",
        str(tmp_path / "new.tsv"),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    capsys.readouterr()
    assert inference_head.main(command) == 0
    assert "note: new.tsv: read as text=caption, label=tag; no column of ids" in capsys.readouterr().err
    assert [row[0] for row in csv.reader(out.open())] == ["guid", "1", "2"]
    assert inference_head.main([*command, "--columns", "text=tag"]) == 0
