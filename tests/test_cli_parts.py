"""Extraction by several processes as a user types it: torchrun, SLURM's environment, one process by parts."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, make_course

from feats import ngrams_extract_feats, pixels_extract_feats
from feats.quarantine import quarantine_path
from feats.store import FeatureStore

ROWS = 60
SMALL = ["--device", "cpu", "--workers", "0", "--batch-size", "2"]  # blocks of 16 rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_course(tmp_path / "set", ROWS, 20)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def ngrams(data: Path, out: Path, *more: str) -> int:
    command = ["--data", str(data), "--out", str(out), "--hash-columns", "64", *SMALL, *more]
    return ngrams_extract_feats.main(command)


def pixels(data: Path, out: Path, *more: str) -> int:
    return pixels_extract_feats.main(["--data", str(data), "--out", str(out), *SMALL, *more])


def digests(out: Path) -> dict[str, str]:
    """Of all files but locks."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_slurm(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.mark.parametrize(("script", "more"), [(ngrams, []), (ngrams, ["--limit", "33"]), (pixels, ["--tokens"])])
def test_by_parts_alone(data: Path, tmp_path: Path, script, more: list[str], capsys: pytest.CaptureFixture[str]):
    """The same files as without --parts, the same line, and nothing else."""
    (data / "data" / "5.jpg").write_bytes(b"no picture")
    assert script(data, tmp_path / "plain", *more) == 0
    plain = capsys.readouterr().out
    assert script(data, tmp_path / "parts", "--parts", "--piece-rows", "16", *more) == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "plain")

    def without_time(text: str) -> str:
        return re.sub(r"in [0-9.]+ s, [0-9.]+ rows/s", "", text)

    assert without_time(capsys.readouterr().out) == without_time(plain).replace("/plain/", "/parts/")


def test_a_job_array_one_task_after_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ngrams(data, tmp_path / "plain")
    capsys.readouterr()
    in_slurm(monkeypatch, ARRAY_TASK_ID=2, ARRAY_TASK_MIN=1, ARRAY_TASK_COUNT=3)
    assert ngrams(data, tmp_path / "out", "--splits", "train", "--no-join") == 0
    assert "ngrams_train: worker 1 of 3 made 4 of 4 parts, 60 rows, in " in capsys.readouterr().out
    assert not (tmp_path / "out" / "ngrams_train.h5").exists()
    in_slurm(monkeypatch, ARRAY_TASK_ID=3)
    assert ngrams(data, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "ngrams_train: 60 rows done; 0 quarantined; " in said and "0 encoded now" in said
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_a_folder_of_parts_is_gone_on_with_by_the_plain_command(data: Path, tmp_path: Path):
    ngrams(data, tmp_path / "plain")
    assert ngrams(data, tmp_path / "out", "--no-join", "--piece-rows", "32") == 0
    assert ngrams(data, tmp_path / "out") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_other_settings_are_refused_in_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ngrams(data, tmp_path / "out", "--no-join") == 0
    capsys.readouterr()
    assert ngrams(data, tmp_path / "out", "--hash-columns", "32") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "64" in line and "32" in line and "--name" in line and "--overwrite" in line
    assert ngrams(data, tmp_path / "out", "--hash-columns", "32", "--overwrite") == 0
    assert ngrams(data, tmp_path / "plain", "--hash-columns", "32") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_overwriting_where_there_is_nothing_yet(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ngrams(data, tmp_path / "plain")
    assert ngrams(data, tmp_path / "new" / "out", "--parts", "--overwrite") == 0
    assert digests(tmp_path / "new" / "out") == digests(tmp_path / "plain")
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert ngrams(data, tmp_path / "file", "--parts", "--overwrite") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file can't be written" in line and "--out" in line


def test_quarantine_of_the_whole_counts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "data" / "50.jpg").write_bytes(b"no picture")
    assert pixels(data, tmp_path / "out", "--no-join", "--strict", "--splits", "train") == 3
    in_slurm(monkeypatch, PROCID=0, NTASKS=2)
    assert pixels(data, tmp_path / "out", "--strict", "--splits", "train") == 3
    assert "50" in quarantine_path(tmp_path / "out" / "pixels_train.h5").read_text()


def test_a_launcher_that_tells_nonsense(data: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ngrams(data, tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: the environment's RANK is 'one'; expected a whole number\n"


@pytest.mark.slow
def test_torchrun_with_two_processes(data: Path, tmp_path: Path):
    ngrams(data, tmp_path / "plain")
    script = [str(ROOT / "feats" / "ngrams_extract_feats.py"), "--data", str(data), "--out", str(tmp_path / "out")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        *script,
        "--hash-columns",
        "64",
        *SMALL,
    ]
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert out.stdout.count(f"ngrams_train: {ROWS} rows done; 0 quarantined") >= 1
    with FeatureStore.open(tmp_path / "out" / "ngrams_train.h5") as store:
        assert store.complete and len(store) == ROWS


@pytest.mark.slow
def test_two_tasks_of_a_step_at_once(data: Path, tmp_path: Path):
    ngrams(data, tmp_path / "plain")
    script = [str(ROOT / "feats" / "ngrams_extract_feats.py"), "--data", str(data), "--out", str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, *script, "--hash-columns", "64", *SMALL],
            env={**ENVIRONMENT, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
