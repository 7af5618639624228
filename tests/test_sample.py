"""The synthetic sample: a data set like any other, the same for a seed, and never written over anything."""

import csv
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from feats.errors import UsageError
from feats.records import read_dataset

SCRIPT = ROOT / "data" / "make_sample.py"
_spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def run(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "new" / "sample"
    assert script.make_sample(folder, 100, 20)
    return folder


def test_it_is_a_data_set_of_the_course_layout(sample: Path):
    data = read_dataset(sample)
    assert data.layout == "course" and not data.warnings
    train, test = data.splits["train"], data.splits["test"]
    assert Counter(r.label for r in train) == {"positive": 55, "negative": 30, "neutral": 15}
    assert len(test) == 20 and {r.label for r in test} == {None}
    with (sample / "test_labels.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["guid", "tag"] and [guid for guid, _ in rows] == [r.id for r in test]
    assert Counter(tag for _, tag in rows) == {"positive": 11, "negative": 6, "neutral": 3}
    assert json.loads((sample / "sample.json").read_text())["synthetic"] is True
    for record in train + test:
        assert record.encoding == "utf-8" and 0 < len(record.text.strip()) < 200 and "{" not in record.text
        with Image.open(record.image_path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (224, 224))
            assert np.asarray(image).std() > 5
    assert len({r.text for r in train + test}) > 100
    assert [path.name for path in sample.parent.iterdir()] == ["sample"]


@pytest.mark.parametrize("cue", script.SCENES)
def test_every_scene_can_be_drawn(cue: str):
    for scene in script.SCENES[cue]:
        first, again, other = (scene(script.Random(seed)) for seed in (1, 1, 2))
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_same_seed_gives_the_same_sample(sample: Path, tmp_path: Path):
    out = run("--out", tmp_path / "again", "--n", 100, "--n-test", 20)
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout == f"{tmp_path / 'again'}: wrote 100 labelled and 20 unlabelled synthetic pairs (seed 0)\n"
    assert contents(tmp_path / "again") == contents(sample)
    script.make_sample(tmp_path / "other", 100, 20, seed=1)
    assert contents(tmp_path / "other")["data/1.txt"] != contents(sample)["data/1.txt"]


def test_a_second_run_does_nothing(sample: Path):
    before = {file: file.stat().st_mtime_ns for file in sample.rglob("*")}
    assert script.make_sample(sample, 100, 20) is False
    out = run("--out", sample, "--n", 100, "--n-test", 20)
    assert out.returncode == 0 and "nothing to do, there are already 100 labelled" in out.stdout
    assert {file: file.stat().st_mtime_ns for file in sample.rglob("*")} == before


def test_whatever_else_is_there_is_kept(sample: Path, tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert script.make_sample(foreign, 20, 1)  # an empty folder is free
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("guid,tag\n")
    for folder in ("mine", "file"):
        with pytest.raises(UsageError, match=f"{folder} exists and holds no sample of this script.*--out"):
            script.make_sample(tmp_path / folder)
    assert contents(tmp_path / "mine") == {"train.txt": b"guid,tag\n"}
    before = contents(sample)
    out = run("--out", sample, "--n", 100, "--n-test", 20, "--seed", 1)
    assert out.returncode == 2 and not out.stdout
    assert out.stderr.startswith(f"error: {sample} holds another sample") and out.stderr.count("\n") == 1
    assert contents(sample) == before


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "tweet", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.make_sample(tmp_path / "sample", 20, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", [(19, 1, 0), (20, 0, 0), (20, 1, -1)])
def test_numbers_that_make_no_sample(tmp_path: Path, numbers: tuple[int, int, int]):
    with pytest.raises(UsageError, match="expected at least 20, 1 and 0"):
        script.make_sample(tmp_path / "sample", *numbers)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    out = run("--out", tmp_path / "file" / "sample")
    assert out.returncode == 2 and "can't be written (File exists); give another folder with --out" in out.stderr


def test_it_is_a_script_like_the_others(capsys: pytest.CaptureFixture):
    assert script.build_parser().description == script.__doc__
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0 and "--n-test" in capsys.readouterr().out
