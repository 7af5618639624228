"""Caches as other tools' files and back: Parquet and folders of matrices, read and written here without this program."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches import make_cache
from conftest import ENVIRONMENT, ROOT
from parted import SETTINGS, both_sides, make_parts, pairs_with_faults

from feats import export_feats, import_feats
from feats.cache_layout import ROW_FACTS
from feats.cache_reader import QUARANTINED
from feats.exchange import foreign, npy_folders, parquet_files
from feats.extraction.local import extract
from feats.store import FeatureStore
from modeling.experiments.fitting import fit_head
from modeling.features.loading import load_features
from modeling.features.splits import make_split

FACTS = [name for side in ROW_FACTS.values() for name in side]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both_train.h5, of pairs of which three are in quarantine, with views and tokens."""
    folder = tmp_path_factory.mktemp("both")
    records = pairs_with_faults(folder / "set", 50)
    extract(both_sides(), records, folder / "both_train.h5", SETTINGS)
    make_parts(both_sides(), records, folder / "parted_train.h5", [20, 30])
    return folder


def run(script: Any, *arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def assert_same_rows(a: Path, b: Path) -> None:
    """Two caches tell the same of their rows, whoever made them."""
    with FeatureStore.open(a) as left, FeatureStore.open(b) as right:
        assert left.complete and right.complete and right.verify() == []
        assert left.ids.tolist() == right.ids.tolist() and left.tags.tolist() == right.tags.tolist()
        assert left.features == right.features and left.reasons == right.reasons
        np.testing.assert_array_equal(left.status, right.status)
        for name in left.features:
            if name == "text_tokens":
                for x, y in zip(left.read_tokens(), right.read_tokens()):
                    np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_array_equal(left.read(name), right.read(name))
        for name in FACTS:
            np.testing.assert_array_equal(left.facts(name), right.facts(name))
        assert left.content_digest() == right.content_digest() and left.parameters == right.parameters


# -- Parquet -------------------------------------------------------------------------------------------------------


def test_parquet_as_others_read_it(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(export_feats, both / "both_train.h5", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert out == f"both_train: 47 rows, 3 in quarantine there without features -> {tmp_path}/both_train.parquet\n"
    table = pq.read_table(tmp_path / "both_train.parquet")
    assert table.column_names[:3] == ["id", "label", "quarantine"] and len(table) == 50
    assert table.schema.field("image_feats").type == pa.list_(pa.float16(), 3)
    assert table.schema.field("image_views").type == pa.list_(pa.float16(), 6)
    assert table.schema.field("text_tokens").type == pa.list_(pa.float16())
    assert table.schema.field("image_hash").type == pa.uint64()
    rows = table.to_pylist()
    with FeatureStore.open(both / "both_train.h5") as store:
        views = store.read("image_views", ["7"])[0]
        tokens = store.read_tokens(["7"])[0]
        assert [row["id"] for row in rows] == store.ids.tolist()
        assert [row["label"] or "" for row in rows] == store.tags.tolist() and rows[5]["label"] is None
        assert [row["text_key"] for row in rows] == store.facts("text_key").tolist()
    np.testing.assert_array_equal(np.array(rows[7]["image_views"], np.float16).reshape(2, 3), views)
    np.testing.assert_array_equal(np.array(rows[7]["text_tokens"], np.float16).reshape(tokens.shape), tokens)
    assert rows[40]["image_feats"] is None and "no text file" in rows[40]["quarantine"]
    assert rows[7]["quarantine"] is None
    told = json.loads(table.schema.metadata[b"feature_cache"])
    assert told["fingerprint"]["encoder"] == "both"


@pytest.mark.parametrize("cache", ["both_train.h5", "parted_train.parts"])
def test_through_parquet_and_back(both: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(parquet_files, "GROUP_BYTES", 1)  # one block
    monkeypatch.setattr(parquet_files, "READ_ROWS", 7)
    assert run(export_feats, both / cache, "--out", tmp_path) == 0
    (file,) = tmp_path.glob("*.parquet")
    assert pq.ParquetFile(file).num_row_groups == 4
    assert run(import_feats, file, "--out", tmp_path, "--name", "back") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("back_train: 47 rows done; 3 quarantined")
    assert_same_rows(both / "both_train.h5", tmp_path / "back_train.h5")
    with FeatureStore.open(tmp_path / "back_train.h5") as store:
        print_ = store.fingerprint
    assert (print_["encoder"], print_["model"], print_["dtype"]) == ("imported", "both tiny", "fp16")
    assert print_["made_by"]["text_clean"] == "basic" and print_["data"]["format"] == "parquet"
    assert print_["data"]["files"] == [{"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}]
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".h5", ".csv", ".parquet"}


def write_table(path: Path, rows: int = 12, **columns: Any) -> Path:
    """A file as somebody else writes it: `uid`, `emb` of float32, `class`."""
    rng = np.random.default_rng(0)
    table = {
        "uid": [f"u{i}" for i in range(rows)],
        "emb": list(rng.normal(size=(rows, 5)).astype(np.float32)),
        "class": [i % 3 for i in range(rows)],
        **columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=5)
    return path


def test_parquet_of_others(tmp_path: Path):
    first = write_table(tmp_path / "in" / "a.parquet")
    write_table(tmp_path / "in" / "b.parquet", uid=[f"v{i}" for i in range(12)])
    arguments = ["--out", tmp_path, "--name", "x", "--split", "test", "--text", "emb", "--label", "class"]
    assert run(import_feats, first.parent, *arguments, "--model", "e5-small") == 0
    values = pq.read_table(first).column("emb").to_pylist()
    with FeatureStore.open(tmp_path / "x_test.h5") as store:
        assert store.ids.tolist() == [f"{c}{i}" for c in "uv" for i in range(12)]
        assert store.tags.tolist() == [str(i % 3) for i in range(12)] * 2 and store.features == {"text_feats": (5,)}
        np.testing.assert_array_equal(store.read("text_feats")[:12], np.array(values, np.float16))
        assert store.facts("text_key").tolist() == [0] * 24 and store.verify() == []
        assert (store.fingerprint["model"], store.fingerprint["dtype"]) == ("e5-small", "fp32")
        assert len(store.fingerprint["data"]["files"]) == 2 and store.source is None


def test_rows_beyond_float16_and_empty_ones_are_quarantined(tmp_path: Path, capsys):
    values = [np.full(4, i, np.float32) for i in range(12)]
    values[3], values[8] = np.array([1e6, 0, 0, 0], np.float32), None
    file = write_table(tmp_path / "a.parquet", emb=pa.array(values, pa.list_(pa.float32())))
    assert run(import_feats, file, "--out", tmp_path, "--image", "emb", "--strict") == 3
    with FeatureStore.open(tmp_path / "imported_train.h5") as store:
        assert np.flatnonzero(store.status == QUARANTINED).tolist() == [3, 8]
        assert store.reasons == {"u3": "image_feats beyond float16's range", "u8": "no image_feats in a.parquet"}
        np.testing.assert_array_equal(store.read("image_feats")[:, 0], [0, 1, 2, 4, 5, 6, 7, 9, 10, 11])


UNEVEN = pa.array([[1.0, 2.0]] * 11 + [[1.0]], pa.list_(pa.float32()))
NAN = [np.array([np.nan if i == 4 else 1.0, 2.0], np.float32) for i in range(12)]
WRONG = {
    "uneven": ({"emb": UNEVEN}, [], "emb has 1 values in row u11, 2 in others"),
    "nan": ({"emb": NAN}, [], r"1 rows hold NaN or infinite values in image_feats (u4)"),
    "no id": ({"uid": [None, "", *"abcdefghij"]}, [], "2 rows have no id (rows 0, 1, counted from 0)"),
    "the same id": ({"uid": [*"aabbcdefghij"]}, [], "2 ids are there more than once (a, b)"),
    "no such id column": ({}, ["--id", "name"], "has no column of ids (name); it has uid, emb, class"),
    "no such label column": ({}, ["--label", "tag"], "has no column tag; it has uid, emb, class"),
    "no such feature column": ({}, ["--image", "class"], "has no column class of lists of floats; it has emb"),
    "no features": ({"emb": pa.array([None] * 12, pa.list_(pa.float32()))}, [], "column emb holds no features"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_t_be_imported_is_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]):
    columns, options, message = WRONG[case]
    file = write_table(tmp_path / "in" / "a.parquet", **columns)
    assert run(import_feats, file, "--out", tmp_path / "out", "--image", "emb", *options) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err
    assert not list(tmp_path.glob("out/*"))


def test_files_that_aren_t_what_they_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_table(tmp_path / "a.parquet")
    assert run(import_feats, file, "--out", tmp_path) == 2
    assert "1 columns of lists of floats (emb); say which holds features of pictures with --image" in error_line(capsys)
    assert run(import_feats, tmp_path / "nothing", "--out", tmp_path) == 2
    assert "is no Parquet file, nor a folder" in error_line(capsys)
    (tmp_path / "exported" / "clip_train" / "img_emb").mkdir(parents=True)
    assert run(import_feats, tmp_path / "exported", "--out", tmp_path) == 2
    assert error_line(capsys).endswith(f"; give {tmp_path / 'exported' / 'clip_train'}")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    assert run(import_feats, tmp_path / "b.parquet", "--out", tmp_path) == 2
    assert "b.parquet can't be read as Parquet" in error_line(capsys)
    pq.write_table(pa.table({"uid": ["z"]}), tmp_path / "b.parquet")
    assert run(import_feats, file, tmp_path / "b.parquet", "--image", "emb", "--out", tmp_path) == 2
    assert "b.parquet has no column emb" in error_line(capsys)
    assert run(import_feats, file, "--image", "emb", "--out", tmp_path, "--name", "../x") == 2
    assert "can't be a file's name" in error_line(capsys)


def test_nothing_is_imported_beside_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Who reads the cache would get either."""
    file = write_table(tmp_path / "a.parquet")
    (tmp_path / "imported_train.parts").mkdir()
    assert run(import_feats, file, "--image", "emb", "--out", tmp_path, "--overwrite") == 2
    told = error_line(capsys)
    assert "imported_train.parts holds parts of a cache of this name; choose another --name" in told
    assert "merge_feats.py" in told and not (tmp_path / "imported_train.h5").exists()


def test_nothing_is_replaced_unless_asked(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_table(tmp_path / "a.parquet")
    for options, status in ([], 0), ([], 2), (["--overwrite"], 0):
        assert run(import_feats, file, "--image", "emb", "--out", tmp_path, *options) == status
        assert run(export_feats, both / "both_train.h5", "--out", tmp_path, *options) == status
        assert run(export_feats, both / "both_train.h5", "--out", tmp_path, "--format", "npy", *options) == status
    (tmp_path / "mine" / "both_train").mkdir(parents=True)
    arguments = ["--out", tmp_path / "mine", "--format", "npy", "--overwrite"]
    capsys.readouterr()
    assert run(export_feats, both / "both_train.h5", *arguments) == 2
    assert (
        "such features (nothing else) with --overwrite" in error_line(capsys)
        and (tmp_path / "mine" / "both_train").is_dir()
    )
    (tmp_path / "both_train" / "notes.txt").write_text("mine, beside what was exported")
    assert run(export_feats, both / "both_train.h5", "--out", tmp_path, *arguments[2:]) == 2
    assert (tmp_path / "both_train" / "notes.txt").exists()


def test_an_incomplete_cache_isn_t_exported(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copy(both / "both_train.h5", tmp_path)
    with FeatureStore.append(tmp_path / "both_train.h5") as store:
        store._file.attrs.modify("complete", False)
    assert run(export_feats, tmp_path / "both_train.h5", "--out", tmp_path) == 2
    assert "both_train.h5 is incomplete" in error_line(capsys)
    assert run(export_feats, both / "both_train.h5") == 2
    assert "name one with --out" in error_line(capsys)


# -- folders of matrices -------------------------------------------------------------------------------------------


def test_matrices_as_others_read_them(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--out", tmp_path, "--format", "npy", "--file-rows", 4]
    assert run(export_feats, both / "parted_train.h5", *arguments) == 0
    root = tmp_path / "parted_train"
    assert capsys.readouterr().out == f"parted_train: 47 rows, 3 in quarantine left out -> {root}\n"
    with FeatureStore.open(both / "both_train.h5") as store:
        frame, source, hashes = store.to_frame(), store.source, store.facts("image_hash")[store.status == 1]
    for folder, name in ("img_emb", "image_feats"), ("text_emb", "text_feats"):
        files = sorted((root / folder).iterdir())
        assert [file.name for file in files] == [f"{folder}_{k:02d}.npy" for k in range(12)]
        arrays = [np.load(file) for file in files]
        assert {array.dtype for array in arrays} == {np.dtype(np.float16)} and arrays[-1].shape[0] == 3
        np.testing.assert_array_equal(np.concatenate(arrays), frame[name])
    table = pa.concat_tables(pq.read_table(file) for file in sorted((root / "metadata").iterdir()))
    assert table["id"].to_pylist() == frame.ids.tolist()
    assert [label or "" for label in table["label"].to_pylist()] == frame.labels.tolist()
    assert table["image_path"][0].as_py() == source.images[0] == "data/0.jpg"
    assert table["image_hash"].to_pylist() == hashes.tolist()
    assert {entry.name for entry in root.iterdir()} == {"img_emb", "text_emb", "metadata"}


def write_folder(root: Path, rows: tuple[int, ...] = (5, 4), width: int = 6) -> Path:
    """As clip-retrieval leaves them: `image_path` and `caption`, more if it was told to."""
    rng = np.random.default_rng(0)
    for number, count in enumerate(rows):
        for folder in ("img_emb", "text_emb"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / folder / f"{folder}_{number}.npy", rng.normal(size=(count, width)).astype(np.float32))
        (root / "metadata").mkdir(exist_ok=True)
        table = {
            "image_path": [f"pics/{number}_{k}.jpg" for k in range(count)],
            "caption": ["a"] * count,
            "mood": ["good", None, "bad", "good", "bad"][:count],
        }
        pq.write_table(pa.table(table), root / "metadata" / f"metadata_{number}.parquet")
    return root


def test_matrices_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(npy_folders, "COPY_ROWS", 3)
    root = write_folder(tmp_path / "laion")
    assert run(import_feats, root, "--out", tmp_path, "--name", "laion", "--label", "mood") == 0
    images = np.concatenate([np.load(root / "img_emb" / f"img_emb_{k}.npy") for k in range(2)])
    with FeatureStore.open(tmp_path / "laion_train.h5") as store:
        assert store.features == {"image_feats": (6,), "text_feats": (6,)} and store.verify() == []
        assert store.ids.tolist() == [f"pics/0_{k}.jpg" for k in range(5)] + [f"pics/1_{k}.jpg" for k in range(4)]
        assert store.tags.tolist() == ["good", "", "bad", "good", "bad", "good", "", "bad", "good"]
        np.testing.assert_array_equal(store.read("image_feats"), images.astype(np.float16))
        told = store.fingerprint["data"]
    assert told["format"] == "npy" and len(told["files"]) == 6
    assert {"name": "img_emb_0.npy", "sha256": foreign.file_sha256(root / "img_emb" / "img_emb_0.npy")} in told["files"]


def test_through_matrices_and_back(tmp_path: Path):
    cache = make_cache(tmp_path / "feats", "clip", 20)
    assert run(export_feats, cache, "--out", tmp_path / "out", "--format", "npy", "--file-rows", 7) == 0
    assert run(import_feats, tmp_path / "out" / "clip_train", "--out", tmp_path, "--name", "clip") == 0
    with FeatureStore.open(cache) as before, FeatureStore.open(tmp_path / "clip_train.h5") as after:
        assert before.ids.tolist() == after.ids.tolist() and before.tags.tolist() == after.tags.tolist()
        for name in ("image_feats", "text_feats"):
            np.testing.assert_array_equal(before.read(name), after.read(name))
        for name in FACTS:
            np.testing.assert_array_equal(before.facts(name), after.facts(name))


def broken(root: Path, case: str) -> str:
    """Break a folder; what is said of it."""
    if case == "a file lacks":
        (root / "text_emb" / "text_emb_1.npy").unlink()
        return "img_emb has files 0, 1, text_emb 0; each number must be in all"
    if case == "no metadata":
        shutil.rmtree(root / "metadata")
        return "img_emb has files 0, 1, metadata none"
    if case == "rows":
        np.save(root / "img_emb" / "img_emb_1.npy", np.zeros((3, 6), np.float32))
        return "img_emb_1.npy has 3 rows"
    if case == "width":
        np.save(root / "img_emb" / "img_emb_1.npy", np.zeros((4, 7), np.float32))
        return "img_emb_1.npy is of width 7, the files before it of 6"
    if case == "integers":
        np.save(root / "img_emb" / "img_emb_0.npy", np.zeros((5, 6), np.int64))
        return "img_emb_0.npy holds int64 of shape (5, 6); expected a matrix of floats"
    if case == "pickled":
        np.save(root / "img_emb" / "img_emb_0.npy", np.array([{}] * 5, object), allow_pickle=True)
        return "img_emb_0.npy can't be read as an array"
    file = root / "text_emb" / "text_emb_1.npy"
    values = np.load(file)
    values[2, 3] = np.inf
    np.save(file, values)
    return "1 rows hold NaN or infinite values in text_feats (pics/1_2.jpg)"


@pytest.mark.parametrize("case", ["a file lacks", "no metadata", "rows", "width", "integers", "pickled", "infinite"])
def test_matrices_that_don_t_fit_are_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]):
    root = write_folder(tmp_path / "laion")
    message = broken(root, case)
    assert run(import_feats, root, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err
    assert not list(tmp_path.glob("out/*"))


# -- stage 2 -------------------------------------------------------------------------------------------------------


def test_a_head_on_imported_features_is_that_of_the_cache(tmp_path: Path):
    """The same figures, and the other split's fingerprint fits."""
    for split, rows in ("train", 60), ("test", 12):
        cache = make_cache(tmp_path / "feats", "clip", rows, split=split, first_id=len(split) * 100)
        assert run(export_feats, cache, "--out", tmp_path / "out") == 0
        file = tmp_path / "out" / f"clip_{split}.parquet"
        assert run(import_feats, file, "--out", tmp_path / "back", "--name", "clip", "--split", split) == 0
    probabilities = []
    for folder in ("feats", "back"):
        data = load_features(tmp_path / folder, "train", image="clip", text="clip")
        fitted = fit_head(data, make_split(data, val_ratio=0.25), "fusion", D=4, ep=2, bs=16, device="cpu")
        test = load_features(tmp_path / folder, "test", image="clip", text="clip")
        probabilities.append(fitted.predict_proba(test))
    np.testing.assert_array_equal(*probabilities)


def test_the_commands_run_by_path(both: Path, tmp_path: Path):
    def command(script: str, *arguments: str) -> str:
        words = [sys.executable, str(ROOT / "feats" / script), *arguments]
        out = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return out.stdout

    assert "-> exported/both_train.parquet" in command(
        "export_feats.py", str(both / "both_train.h5"), "--out", "exported"
    )
    assert "-> saved/feats/clip_train.h5" in command("import_feats.py", "exported/both_train.parquet", "--name", "clip")
    assert_same_rows(both / "both_train.h5", tmp_path / "saved" / "feats" / "clip_train.h5")


def test_a_folder_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert export_feats.main([".", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: no cache .; make it with")
