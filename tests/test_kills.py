"""Scripts killed at random moments, in bounded form, and that the harness sees what it looks for."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

kills = import_module("tests.bench.kill_scripts")

pytestmark = pytest.mark.slow


def test_kills_leave_nothing_behind(tmp_path: Path):
    command = [sys.executable, "-m", "tests.bench.kill_scripts", "--kills", "8", "--seed", "1", "--work", str(tmp_path)]
    done = subprocess.run(
        [*command, "--script", "inference", "npy"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, count, *_, readers, differ, left, _, _ = done.stdout.splitlines()[-1].split()
    assert [name, count, readers, differ, left] == ["all", "8", "0", "0", "0"]


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path, Path]:
    """What a killed command left, what was there before, and what an undisturbed one leaves."""
    work, start, calm = (tmp_path / name for name in ("work", "start", "calm"))
    start.mkdir()
    for folder, stamp in ((work, "20260101-000000"), (calm, "20260202-111111")):
        run = folder / f"{stamp}_clip_s0"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text('{"accuracy": 0.512345}')
        (run / "config.json").write_text(json.dumps({"created": stamp, "classes": ["a", "b"]}))
    return work, start, calm


def test_equal_up_to_time(trees: tuple[Path, Path, Path]):
    work, start, calm = trees
    assert list(kills.half_made(*trees, False)) == list(kills.differences(work, calm, False)) == []
    assert list(kills.left_over(work, calm, start, set())) == []


def test_what_is_half_is_found(trees: tuple[Path, Path, Path]):
    work, _, calm = trees
    metrics = next(work.glob("*/metrics.json"))
    metrics.write_text('{"accuracy": 0.51')
    assert [what.split()[0] for what in kills.half_made(*trees, True)] == ["half:"]
    metrics.write_text('{"accuracy": 0.512346}')
    assert list(kills.differences(work, calm, True)) == []
    assert [what.split()[0] for what in kills.differences(work, calm, False)] == ["differs:"]
    metrics.unlink()
    assert [what.split()[0] for what in kills.differences(work, calm, False)] == ["lacks:"]


def test_left_overs_are_found(trees: tuple[Path, Path, Path]):
    work, temporary, calm = trees
    (work / ".abc.writing").mkdir()
    (work / "table.csv.creating").touch()
    (temporary / "pymp-1").mkdir()
    found = list(kills.left_over(work, calm, temporary, {"torch_1"}))
    assert found == [
        "left: table.csv.creating",
        "left: .abc.writing/",
        "left in TMPDIR: pymp-1",
        "left in /dev/shm: torch_1",
    ]


def test_processes_that_outlive_their_group_are_found():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert kills.group_of(process.pid) == [process.pid]
    process.kill()
    process.wait()
    assert kills.group_of(process.pid) == kills.outlived(process.pid) == []
