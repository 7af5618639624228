"""CSV files: any string comes back as it was written, through every file of ours that holds strings of the user."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from feats.cache_reader import QUARANTINED
from feats.csv_files import LONGEST_CELL, parse_csv, read_csv, read_table, write_csv, write_rows, write_table
from feats.store import FeatureStore
from modeling.features.joined import Rows
from modeling.features.split_files import read_split_file
from modeling.features.stored_splits import Split, save_split
from modeling.prediction.cached import Predictions, write_submission
from modeling.runs.folder import read_predictions, write_predictions

# What CSV readers and Python's own notion of a line trip over, each often.
AWKWARD = [
    "",
    '"',
    '""',
    ",",
    "\r",
    "\n",
    "\r\n",
    "\n\r",
    " ",
    "\t",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u2029",
]
CELLS = st.one_of(st.text(), st.lists(st.sampled_from([*AWKWARD, "a", "é", "😀"]), max_size=6).map("".join))
NAMES = st.lists(CELLS.filter(bool), min_size=2, max_size=8, unique=True)
IDS = CELLS.filter(lambda name: "\0" not in name)  # data sets and caches have no others
any_strings = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_strings
@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width))))
def test_any_string_comes_back(tmp_path: Path, rows: list[list[str]]):
    write_csv(tmp_path / "t.csv", rows)
    assert read_csv(tmp_path / "t.csv") == rows
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:  # and any other reader gets the same
        assert list(csv.reader(file)) == rows


@any_strings
@given(st.lists(st.dictionaries(st.sampled_from(["id", "a,b", "\r", " x "]), CELLS, min_size=1), min_size=1))
def test_tables_come_back_with_what_they_lack(tmp_path: Path, rows: list[dict[str, str]]):
    write_table(tmp_path / "t.csv", rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    assert read_table(tmp_path / "t.csv") == [{**dict.fromkeys(columns, ""), **row} for row in rows]


def test_plain_cells_are_written_plainly():
    file = io.StringIO()
    write_rows(file, [["id", "tag"], [1, None], ["a b", 0.1], ["", "x"]])
    assert file.getvalue() == "id,tag\n1,\na b,0.1\n,x\n"


def test_a_cell_may_be_long(tmp_path: Path):
    limit = csv.field_size_limit()
    assert limit < 1 << 20 < LONGEST_CELL
    write_csv(tmp_path / "t.csv", [["a", "x" * (1 << 20)]])
    assert [list(map(len, row)) for row in read_csv(tmp_path / "t.csv")] == [[1, 1 << 20]]
    assert csv.field_size_limit() == limit


def test_lines_end_where_the_format_says():
    assert parse_csv("a,b\r\nc\u2028,d\re\x85,f\n\n") == [["a", "b"], ["c\u2028", "d"], ["e\x85", "f"], []]


@any_strings
@given(NAMES, st.data())
def test_predictions_come_back(tmp_path: Path, ids: list[str], data: st.DataObject):
    classes = data.draw(NAMES)
    tags = data.draw(st.lists(st.sampled_from(["", *classes]), min_size=len(ids), max_size=len(ids)))
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(classes)), len(ids))
    write_predictions(tmp_path / "p.csv", ids, tags, probabilities, classes)
    found_ids, found_tags, found = read_predictions(tmp_path / "p.csv")
    assert (found_ids, found_tags) == (ids, tags)
    np.testing.assert_allclose(found, probabilities, atol=5.1e-7, rtol=0)
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header == ["id", "tag", "pred", *(f"p_{name}" for name in classes)]
    assert [row[2] for row in rows] == [classes[k] for k in probabilities.argmax(1)]


@any_strings
@given(st.lists(IDS, min_size=2, max_size=8, unique=True), st.data())
def test_submissions_come_back(tmp_path: Path, ids: list[str], data: st.DataObject):
    classes, n = data.draw(NAMES), len(ids)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(classes)), n)
    rows = Rows.of(ids, [""] * n, np.zeros(n, np.uint64), np.zeros(n, np.uint64))
    predicted = probabilities.argmax(1)
    predictions = Predictions("test", classes, "soft", rows, probabilities, predicted, {}, {}, "", [])
    write_submission(tmp_path / "s.csv", predictions, proba=data.draw(st.booleans()))
    header, *rows = read_csv(tmp_path / "s.csv")
    assert header[:2] == ["guid", "tag"] and header[2:] in ([], [f"p_{name}" for name in classes])
    assert [row[:2] for row in rows] == [[name, classes[k]] for name, k in zip(ids, predicted, strict=True)]


@settings(any_strings, max_examples=25)
@given(reasons=st.lists(CELLS, min_size=3, max_size=3))
def test_reasons_of_quarantined_rows_come_back(tmp_path: Path, reasons: list[str]):
    ids = ["a\rb", 'c"\r\n', "d,e"]
    path = tmp_path / "q_train.h5"
    with FeatureStore.create(path, ids, [""] * 3, {}, {"image_feats": (2,)}, overwrite=True) as store:
        values = {"image_feats": np.zeros((3, 2), np.float16)}
        store.write(np.arange(3), np.full(3, QUARANTINED), values, dict(zip(ids, reasons, strict=True)))
    with FeatureStore.open(path) as store:
        assert store.reasons == dict(zip(ids, reasons, strict=True))


@any_strings
@given(st.lists(IDS.filter(str.strip), min_size=6, max_size=12, unique=True), st.sampled_from(["json", "csv", "lists"]))
def test_split_files_name_any_id(tmp_path: Path, ids: list[str], how: str):
    labels = ["x", "y"] * len(ids)
    split = Split(sorted(ids[:2]), sorted(ids[2:4]), sorted(ids[4:6]))
    parts = {part: getattr(split, part) for part in ("train", "val", "test")}
    if how == "json":
        save_split(split, tmp_path / "split.json")
        files = [tmp_path / "split.json"]
    elif how == "csv":
        files = [tmp_path / "split.csv"]
        write_csv(files[0], [["id", "split"], *([i, part] for part, members in parts.items() for i in members)])
    else:  # e.g. the predictions of other runs
        files = [tmp_path / f"{part}.csv" for part in parts]
        for file, members in zip(files, parts.values(), strict=True):
            write_csv(file, [["id", "tag"], *([i, "x"] for i in members)])
    (found,) = read_split_file(files, ids, labels[: len(ids)])
    assert (found.train, found.val, found.test) == (split.train, split.val, split.test)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_plain_lines_ends_them_as_it_likes(tmp_path: Path, end: str):
    ids = ["a,b", "é\u2028ü", "c", ' "d', "e"]
    (tmp_path / "train.txt").write_bytes(end.join(["guid,tag", "a,b,x", "é\u2028ü,y", ""]).encode())
    (tmp_path / "val.txt").write_bytes(end.join(["", "  c  ", ' "d', ""]).encode())
    (split,) = read_split_file([tmp_path / "train.txt", tmp_path / "val.txt"], ids, ["x", "y", "x", "y", ""])
    assert (split.train, split.val) == (["a,b", "é\u2028ü"], sorted(["c", ' "d']))


def test_an_id_may_hold_a_carriage_return_in_a_list_of_plain_lines(tmp_path: Path):
    (tmp_path / "1.txt").write_bytes(b"a\rb\nc\n")
    (tmp_path / "2.txt").write_bytes(b"a\nb\n")
    (split,) = read_split_file([tmp_path / "1.txt", tmp_path / "2.txt"], ["a", "b", "c", "a\rb"], ["x", "y", "y", "x"])
    assert (split.train, split.val) == (["a\rb", "c"], ["a", "b"])
