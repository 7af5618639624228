"""What killed processes leave beside files, and that the next writer removes it, and nothing else."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from feats import leftovers
from feats.extraction.preparation import prepare
from feats.leftovers import held, remove_leftovers, temporary_folder
from feats.writing import appearing, hidden_name, replace_folder, write_text

fork = multiprocessing.get_context("fork")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], None]) -> None:
    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def afresh():
    """Every test is a process that hasn't looked anywhere yet."""
    leftovers.remove_leftovers_once.cache_clear()


def test_half_a_file_goes_with_the_next(tmp_path: Path):
    def write() -> None:
        with appearing(tmp_path / "a.csv") as unfinished:
            unfinished.write_text("half")
            die()

    killed(write)
    assert len(names(tmp_path)) == 2  # the file and its lock
    write_text(tmp_path / "b.csv", "whole")
    assert names(tmp_path) == ["b.csv"]


def test_a_lock_without_a_file_goes_with_the_next(tmp_path: Path):
    """The kill came between the two."""

    def lock() -> None:
        with held(tmp_path / hidden_name()):
            die()

    killed(lock)
    assert [name.endswith(".writing.lock") for name in names(tmp_path)] == [True]
    write_text(tmp_path / "b.csv", "whole")
    assert names(tmp_path) == ["b.csv"]


def test_a_replaced_folder_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    monkeypatch.setattr("feats.writing.shutil.rmtree", lambda *args, **options: die())
    killed(lambda: replace_folder(tmp_path / "new", tmp_path / "old"))
    assert (tmp_path / "old" / "which").read_text() == "new" and len(names(tmp_path)) == 3
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["old"]


def test_a_folder_that_was_to_be_replaced_is_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kill came when it had made room."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    monkeypatch.setattr("feats.writing.os.replace", lambda *args: die())
    killed(lambda: replace_folder(tmp_path / "new", tmp_path / "old"))
    monkeypatch.undo()
    assert not (tmp_path / "old").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["new", "old"] and (tmp_path / "old" / "which").read_text() == "old"


def test_a_folder_in_the_place_of_a_link_leaves_nothing_beside_it(tmp_path: Path):
    for name in ("elsewhere", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    (tmp_path / "run").symlink_to("elsewhere")
    replace_folder(tmp_path / "new", tmp_path / "run")
    assert names(tmp_path) == ["elsewhere", "run"]
    assert [(tmp_path / name / "which").read_text() for name in names(tmp_path)] == ["elsewhere", "new"]


def test_without_locks_there_are_no_files_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On Windows, where no file can be removed that is open."""
    monkeypatch.setattr(leftovers, "fcntl", None)
    with held(tmp_path / "a"):
        assert names(tmp_path) == []


def test_a_users_own_files_stay(tmp_path: Path):
    for name in (".novel.writing", ".novel.writing.lock"):
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "b.csv", "whole")
    assert names(tmp_path) == [".novel.writing", ".novel.writing.lock", "b.csv"]


def test_what_a_living_process_makes_stays(tmp_path: Path):
    with appearing(tmp_path / "a.csv") as unfinished:
        unfinished.write_text("half")
        before = names(tmp_path)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == before
    assert names(tmp_path) == ["a.csv"]


def test_a_temporary_folder_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "feats-mine.tmp").mkdir()  # without a lock: nobody knows whose

    def work() -> None:
        with temporary_folder() as folder:
            (folder / "picture").touch()
            die()

    killed(work)
    assert len(names(tmp_path)) == 3
    with temporary_folder() as folder:
        assert len(names(tmp_path)) == 3 and names(folder) == []
    assert names(tmp_path) == ["feats-mine.tmp"]


class Tensors(Dataset[torch.Tensor]):
    """Such as pass through shared memory, which asks for sockets."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1000,), index)


@pytest.mark.parametrize("taken", [3, 8])
def test_workers_sockets_are_gone_with_them(
    taken: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are too long for sockets
    request.addfinalizer(lambda: shutil.rmtree(short))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    items = prepare(Tensors(), 1, pin_memory=False)
    assert [int(next(items)[0]) for _ in range(taken)] == list(range(taken))
    assert list(short.glob("feats-*.tmp/listener-*"))
    del items
    assert names(short) == [] and capfd.readouterr().err == ""


def test_what_another_put_where_temporary_files_are_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "feats-0.tmp.lock")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "feats-1.tmp.lock").symlink_to(tmp_path / "kept")
    with temporary_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert names(tmp_path) == ["feats-0.tmp.lock", "feats-1.tmp.lock", "kept"]


def test_a_lock_that_is_taken_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Who removes left-overs may come between a lock's creation and its locking."""
    lock, taken = fcntl.flock, []

    def late(number: int, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        lock(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(tmp_path / ".a.writing"):
        assert taken and names(tmp_path) == [".a.writing.lock"]
    assert names(tmp_path) == []
