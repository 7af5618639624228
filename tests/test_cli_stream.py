"""--stream as a user types it: data that are read piece by piece, local and at URLs."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from test_pieces import Server, shards, tar

from feats import vader_extract_feats
from feats.quarantine import quarantine_path
from feats.store import FeatureStore

SMALL = ["--device", "cpu", "--workers", "0", "--batch-size", "2", "--piece-rows", "16"]  # blocks of 16 rows
WORDS = "so very happy sad rain sun good bad news today".split()


def vader(data: Path | str, out: Path, *more: str) -> int:
    return vader_extract_feats.main(["--data", str(data), "--out", str(out), *SMALL[:6], *more])


def digest(out: Path, split: str = "train") -> str:
    return hashlib.sha256((out / f"vader_{split}.h5").read_bytes()).hexdigest()


def manifest(folder: Path, rows: int = 70) -> Path:
    """Texts inline, every third row of the split val, one text missing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "split"])
        for k in range(rows):
            text = f"{' '.join(rng.choice(WORDS, 5))},\nline {k}" if k != 7 else "gone.txt"
            writer.writerow([f"row{k}", text, ("good", "bad")[k % 2], "val" if k % 3 == 0 else "train"])
    return folder / "pairs.csv"


def test_a_streamed_manifest_gives_the_plain_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = manifest(tmp_path / "set")
    assert vader(data, tmp_path / "plain") == 0
    assert vader(data, tmp_path / "streamed", "--stream", "--piece-rows", "16") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f"(reasons: {tmp_path}/streamed/vader_val.quarantine.csv)") or "rows done" in said[-1]
    for split in ("train", "val"):
        assert digest(tmp_path / "streamed", split) == digest(tmp_path / "plain", split)
        reasons = [quarantine_path(tmp_path / out / f"vader_{split}.h5") for out in ("streamed", "plain")]
        assert len({path.read_text() if path.exists() else "" for path in reasons}) == 1
    assert not list((tmp_path / "streamed").glob("*.parts"))


def test_the_first_rows_of_one_split(tmp_path: Path):
    data = manifest(tmp_path / "set")
    chosen = ["--splits", "train", "--limit", "21"]
    assert vader(data, tmp_path / "plain", *chosen) == 0
    assert vader(data, tmp_path / "streamed", "--stream", "--piece-rows", "16", *chosen) == 0
    assert digest(tmp_path / "streamed") == digest(tmp_path / "plain")
    assert not (tmp_path / "streamed" / "vader_val.h5").exists()


def test_streamed_shards_hold_what_plain_ones_do(tmp_path: Path):
    shards(tmp_path / "set")
    assert vader(tmp_path / "set", tmp_path / "plain") == 0
    assert vader(tmp_path / "set", tmp_path / "streamed", "--stream") == 0
    same_features(tmp_path / "plain", tmp_path / "streamed")


@pytest.mark.parametrize("place", ["", "/train-{1..2}.tar"])
def test_shards_at_a_url_without_stream_being_typed(place: str, tmp_path: Path):
    shards(tmp_path / "set")
    assert vader(tmp_path / "set", tmp_path / "plain") == 0
    with Server(tmp_path / "set") as server:
        assert vader(server.url + place, tmp_path / "remote") == 0
    same_features(tmp_path / "plain", tmp_path / "remote")
    with FeatureStore.open(tmp_path / "remote" / "vader_train.h5") as store:
        assert store.source is not None and store.source.texts[0] == f"{server.url}/train-1.tar::1a.txt"


def same_features(plain: Path, other: Path) -> None:
    with FeatureStore.open(plain / "vader_train.h5") as a, FeatureStore.open(other / "vader_train.h5") as b:
        assert a.complete and b.complete and a.ids == b.ids and a.tags == b.tags
        np.testing.assert_array_equal(a.read("text_feats"), b.read("text_feats"))


def test_a_split_that_isn_t_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards(tmp_path / "set")
    assert vader(tmp_path / "set", tmp_path / "out", "--stream", "--splits", "val") == 2
    assert capsys.readouterr().err == "error: no split val in the data; it has test, train\n"


def test_ids_of_two_shards_are_found_when_they_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in (1, 2):
        tar(tmp_path / "set" / f"train-{number}.tar", [("same.txt", f"text {number}")])
    assert vader(tmp_path / "set", tmp_path / "out", "--stream") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "1 ids are in more than one row" in line and "same" in line
