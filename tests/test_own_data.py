"""People's own data as they are: tables with other column names and separators, folders, labels of any kind."""

import csv
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from feats.errors import UsageError
from feats.pieces import open_pieces
from feats.reading.columns import parse_columns
from feats.reading.manifests import separator_of
from feats.reading.rows import UNKNOWN_LABELS, label_of
from feats.records import read_dataset, read_labels

ROWS = [
    {"sku": f"s{i}", "image_path": f"pics/{i}.jpg", "title": f'a; b, "c" | {i}', "category": "ab"[i % 2], "price": i}
    for i in range(7)
]
KINDS = {"comma.csv": ",", "semicolon.csv": ";", "bar.csv": "|", "tab.csv": "\t", "t.tsv": "\t"}
TABLES = [*KINDS, "rows.jsonl", "rows.parquet"]


def table(path: Path, rows: list[dict[str, Any]], groups: int = 3) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=groups)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter=KINDS.get(path.name, ","), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(buffer.getvalue(), encoding="utf-8")
    return path


def pieces(path: Path, rows: int, **columns: Any) -> tuple[list[Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_pieces(path, rows=rows, **columns)
    records = [record for piece in opened.values() for k in range(len(piece)) for record in piece.read(k)]
    return records, [str(w.message) for w in caught]


# -- columns and separators


@pytest.mark.parametrize("name", TABLES)
def test_a_table_as_it_is(tmp_path, name):
    path = table(tmp_path / name, ROWS)
    data = read_dataset(path)
    found = [(r.id, r.image_path, r.text, r.label) for r in data["train"]]
    assert found == [(row["sku"], tmp_path / row["image_path"], row["title"], row["category"]) for row in ROWS]
    assert data.warnings == [
        f"note: {name}: read as id=sku, image=image_path, text=title, label=category; other columns ignored: price"
    ]
    assert data["train"] == read_dataset(path, columns={"text": "title", "id": "sku"})["train"]


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_pieces_of_a_table_are_the_table(tmp_path, name, numbered, every):
    rows = [{k: v for k, v in row.items() if k != "sku"} if numbered else row for row in ROWS]
    rows = [{**row, "fold": "train" if i % 3 else "test"} for i, row in enumerate(rows)]
    path = table(tmp_path / name, rows)
    data = read_dataset(path)
    records, told = pieces(path, every)
    assert records == [record for split in data.splits.values() for record in split] and told == data.warnings
    if numbered:
        assert [r.id for r in data["test"]] == ["1", "4", "7"]
        assert "no column of ids: rows are known by their number" in told[0]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators(separator):
    assert separator_of(".csv", separator.join(["id", "text", "label"]) + "\r\n") == separator
    assert separator_of(".tsv", "id,text") == "\t"
    assert separator_of(".csv", separator.join(["id", "text", '"price, EUR;|"'])) == separator
    assert separator_of(".csv", "text") == ","


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_two_that_could_be_the_one(tmp_path, name):
    path = table(tmp_path / name, [{"id": "1", "title": "a", "description": "b"}])
    with pytest.raises(UsageError, match=r"title and description could each be the text; .*`columns` text=title"):
        read_dataset(path)
    assert read_dataset(path, columns={"text": "description"})["train"][0].text == "b"
    path = table(path, [{"id": "1", "title": "a", "text": "b", "tag": "x", "class": "y"}])
    with pytest.raises(UsageError, match="tag and class could each be the label"):
        read_dataset(path)
    record = read_dataset(path, columns={"label": ""})["train"][0]
    assert (record.text, record.label) == ("b", None)  # our own name is clear
    assert read_dataset(path, label="class")["train"][0].label == "y"


def test_columns_that_are_not_there(tmp_path):
    path = table(tmp_path / "m.csv", [{"id": "1", "text": "a"}])
    with pytest.raises(UsageError, match=r"m.csv has no column 'b' \(`columns` label=b\); it has id, text"):
        read_dataset(path, label="b")
    path = table(tmp_path / "m.jsonl", [{"id": "1", "text": "a"}])
    for read in (read_dataset, lambda path, **more: open_pieces(path, rows=1, **more)):
        with pytest.raises(UsageError, match="m.jsonl has no column 'b'"):
            read(path, columns={"label": "b"})
    for words, message in ((["colour=a"], "colour=a: expected id, image"), (["text"], "'text': expected one of ours")):
        with pytest.raises(UsageError, match=message):
            parse_columns(words)
    assert parse_columns(["text=a=b", "label="]) == {"text": "a=b", "label": ""}


def test_jsonl_that_tells_columns_late(tmp_path):
    lines = [{"id": "1", "title": "a"}, {"id": "2", "title": "b", "category": "x"}, {"title": "c", "id": "3"}]
    data = read_dataset(table(tmp_path / "m.jsonl", lines))
    assert [r.label for r in data["train"]] == [None, "x", None]
    for late, message in (({"id": "9", "text": "c"}, "text could be the text, too"), ({"sku": 1, "text": "c"}, "id")):
        first = {"title": "a", "id": "1"} if "id" in late else {"text": "a"}
        with pytest.raises(UsageError, match=f"m.jsonl line 2: .*{message}"):
            read_dataset(table(tmp_path / "m.jsonl", [first, late]))


def test_columns_of_odd_names_are_told_in_one_line(tmp_path):
    (tmp_path / "m.csv").write_text('"la\nbel","\x1b[2J"\n1,2\n')
    with pytest.raises(UsageError) as error:
        read_dataset(tmp_path)
    assert r"columns la\nbel, \x1b[2J; expected" in str(error.value) and str(error.value).isprintable()
    (tmp_path / "m.csv").write_text('text,"la\nbel"\n1,2\n')
    assert r"other columns ignored: la\nbel" in read_dataset(tmp_path).warnings[0]


NO_VALUES = {
    "no-utf-8": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
    "day": pa.array([1 << 30], pa.date32()),
    "instant": pa.array([1 << 62], pa.timestamp("us")),
    "zone": pa.array([1], pa.timestamp("us", "Not/AZone")),
    "duration": pa.array([1 << 62], pa.duration("ms")),
}


@pytest.mark.parametrize("values", NO_VALUES.values(), ids=NO_VALUES)
def test_values_that_python_cant_hold(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "m.parquet")
    for read in (read_dataset, lambda data: open_pieces(data, rows=1)["train"].read(0)):
        with pytest.raises(UsageError, match="m.parquet: not valid Parquet"):
            read(tmp_path / "m.parquet")


def test_row_groups_hold_what_the_footer_says(tmp_path, monkeypatch):
    """A stream looks for its rows by these numbers."""
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "m.parquet")
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **named: (b[:2] for b in batches(*args, **named)))
    with pytest.raises(UsageError, match="m.parquet: row group 1 holds 2 rows, not 3"):
        read_dataset(tmp_path / "m.parquet")


def test_damaged_parquet(tmp_path):
    path = table(tmp_path / "m.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="m.parquet: not valid Parquet"):
        read_dataset(path)
    with pytest.raises(UsageError, match="m.parquet row 1: text holds bytes"):
        read_dataset(table(path, [{"id": "1", "text": b"a"}]))


# -- labels

NOT_LABELS = [None, math.nan, "", "  ", "null", "None", " NaN "]
SAME = {"1": [1, 1.0, "1", "1.0", " 1 "], "true": [True, "true"], "false": [False], "0": [0, -0.0, 0.0], "a B": ["a B"]}
words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words)


def test_labels():
    assert [label_of(value) for value in NOT_LABELS] == [None] * len(NOT_LABELS)
    assert {name: {label_of(value) for value in same} for name, same in SAME.items()} == {n: {n} for n in SAME}


@given(values)
def test_a_label_is_a_label_of_itself(value):
    label = label_of(value)
    assert label is None or (label == label.strip() and label.lower() not in UNKNOWN_LABELS)
    assert label_of(label) == label and label_of(f" {label or ''}\n") == label


@given(st.integers(-(2**53), 2**53))
def test_whole_numbers_are_one_class(number):
    assert {label_of(x) for x in (number, str(number), f"{number}.0", f"{number}.00")} == {str(number)}
    if abs(number) < 10**15:
        assert label_of(float(number)) == str(number)


@given(words, words)
def test_other_words_stay_apart(a, b):
    if label_of(a) == label_of(b) is not None:
        assert a.strip() == b.strip() or float(a) == float(b)


@pytest.mark.parametrize("layout", ["course", "m.csv", "m.jsonl", "m.parquet", "shards"])
def test_one_rule_in_all_layouts(tmp_path, layout):
    from test_records import tar

    cells = ["good", "null", "NaN", "none", "", "1.0", "1", " good "]
    if layout == "course":
        (tmp_path / "train.txt").write_text("guid,tag\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    elif layout == "shards":
        members = [
            (f"{i}.{kind}", text) for i, cell in enumerate(cells) for kind, text in (("txt", "x"), ("cls", cell))
        ]
        tar(tmp_path / "train-0.tar", members)
    else:
        table(tmp_path / layout, [{"id": str(i), "text": "x", "label": cell} for i, cell in enumerate(cells)])
    labels = [record.label for record in read_dataset(tmp_path)["train"]]
    assert labels == ["good", None, None, None, None, "1", "1", "good"]


def test_json_labels(tmp_path):
    lines = '{"text": "a", "label": 1}\n{"text": "a", "label": 1.0}\n{"text": "a", "label": NaN}\n'
    (tmp_path / "m.jsonl").write_text(lines + '{"text": "a", "label": true}\n')
    assert [record.label for record in read_dataset(tmp_path)["train"]] == ["1", "1", None, "true"]


def test_labels_none_are_told_of(tmp_path):
    path = table(tmp_path / "m.csv", [{"id": str(i), "text": "a", "label": ["None", "null", "b"][i]} for i in range(3)])
    told = ["note: m.csv: rows labelled none count as unlabelled (1): rename them if it is a class"]
    assert read_dataset(path).warnings == told and pieces(path, 1)[1] == told


def test_labels_of_another_column(tmp_path):
    rows = [{"id": str(i), "title": "a", "text": "b", "x": [1, None, "c"][i], "fold": "ab"[i % 2]} for i in range(3)]
    path = table(tmp_path / "m.jsonl", rows)
    assert read_labels(path, "x") == {"a": {"0": "1", "2": "c"}, "b": {"1": ""}}
    only = table(tmp_path / "only.csv", [{"id": "1", "x": "p"}])
    assert read_labels(only, "x") == {"train": {"1": "p"}}
    table(only, [{"id": "1", "x": "p"}, {"id": "1", "x": "p"}])
    with pytest.raises(UsageError, match="1 repeated ids"):
        read_labels(only, "x")


# -- folders


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"of {name}")
    return root


LAYOUTS = {
    "classes": (["cat/1.jpg", "dog/1.png"], {"train": [("cat/1", True, False, "cat"), ("dog/1", True, False, "dog")]}),
    "with texts": (
        ["cat/1.jpg", "cat/1.txt", "dog/deep/2.txt", "dog/1.jpg", "README.txt"],
        {"train": [("cat/1", 1, 1, "cat"), ("dog/1", 1, 0, "dog"), ("dog/deep/2", 0, 1, "dog")]},
    ),
    "splits": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "test/2.jpg"],
        {
            "test": [("test/2", 1, 0, None)],
            "train": [("train/cat/1", 1, 0, "cat"), ("train/dog/1", 1, 0, "dog")],
        },
    ),
    "pictures": (["b.jpg", "a.PNG", ".hidden.jpg"], {"train": [("a", 1, 0, None), ("b", 1, 0, None)]}),
    "texts": (["b.txt", "a.txt"], {"train": [("a", 0, 1, None), ("b", 0, 1, None)]}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_folders(tmp_path, case):
    names, expected = LAYOUTS[case]
    data = read_dataset(files(tmp_path, *names))
    assert data.layout == "folders" and data.warnings == []
    found = {
        split: [(r.id, r.image_path is not None, r.text is not None, r.label) for r in records]
        for split, records in data.splits.items()
    }
    assert found == expected


def test_what_are_no_class_folders(tmp_path):
    with pytest.raises(UsageError, match="none of the known layouts"):
        read_dataset(files(tmp_path / "one", "data/1.jpg"))
    assert read_dataset(tmp_path / "one", "folders")["train"][0].label == "data"
    with pytest.raises(UsageError, match="holds pictures both in folders .cat, ....* and beside them"):
        read_dataset(files(tmp_path / "both", "cat/1.jpg", "dog/1.jpg", "x.jpg"))
    data = read_dataset(files(tmp_path / "twice", "1.jpg", "1.png", "2.jpg"))
    assert len(data["train"]) == 2 and "1.png is left out: 1.jpg beside it" in data.warnings[0]
    with pytest.raises(UsageError, match="`columns` is for tables, and the data are of layout folders"):
        read_dataset(tmp_path / "twice", columns={"text": "a"})


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["train.txt", "1.jpg"], "course"),
        (["labelResultAll.txt", "data/1.jpg", "other/1.jpg"], "mvsa"),
        (["m.tsv", "cat/1.jpg", "dog/1.jpg"], "manifest"),
        (["train-0.tar", "cat/1.jpg", "dog/1.jpg"], "shards"),
    ],
)
def test_other_marks_come_first(tmp_path, names, layout):
    from feats.records import detect_layout

    assert detect_layout(files(tmp_path, *names)) == layout


# -- files outside


def test_files_outside_are_counted(tmp_path):
    files(tmp_path, "a.jpg", "set/in.jpg", "note.txt")
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "a.jpg")
    images = ["in.jpg", "../a.jpg", str(tmp_path / "a.jpg"), "link.jpg", "../set/in.jpg", ""]
    rows = [{"id": str(i), "image": image, "text": "x"} for i, image in enumerate(images)]
    rows[-1]["text"] = "../note.txt"
    path = table(tmp_path / "set" / "m.csv", rows)
    [told] = read_dataset(path).warnings
    assert told.startswith(f"note: 4 files outside the data folder {path.parent}, e.g. {path.parent}/../a.jpg (m.csv ")
    records, [by_name] = pieces(path, 2)
    assert by_name.startswith("note: 3 files outside")  # links aren't followed while counting
    assert records == read_dataset(path)["train"] and records[-1].text == "of note.txt"
