"""What a power cut may leave: the order in which scripts write, recorded, and replayed at every step of it.

A file's bytes are sure once it was synced; what was written since is there or not. A name in a folder (of a new file, a
moved one, a removed one) is sure once the folder was synced; later changes of names are there up to any of them, since
file systems keep these in order. The moments a file is torn in its midst are in tests/test_store.py.
"""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
from caches import make_cache
from conftest import make_course
from test_full_disk import FROM_CACHE, SHORT, run, tree

from feats.cache_reader import DONE
from feats.store import FeatureStore
from modeling.runs.folder import load_run
from modeling.runs.listing import list_runs

Files = dict[str, int]  # names below the root, and the file (a number of its own) that bears each


class Trace:
    """Every step that `root` sees: names change, or a file is synced.

    `names[k]`: the names after k steps. `synced[k]`, by file: its bytes when it was synced last before step k.
    `written[k]`: its bytes then, synced or not.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self.root, self.synced_bytes, self.kept = root, dict[int, bytes](), list[Any]()
        self.names: list[Files] = []
        self.synced: list[dict[int, bytes]] = []
        self.written: list[dict[int, bytes]] = []
        self.lock = RLock()
        self.sure: list[int] = []  # up to which step names are sure
        self._note()
        self.sure[0] = 0
        for name in ("replace", "rename", "unlink", "fsync"):
            patch.setattr(os, name, partial(self._step, getattr(os, name)))

    def _step(self, function: Any, place: Any, *rest: Any, **how: Any) -> Any:
        with self.lock:  # of files that are synced at the same time
            return self._noted(function, place, *rest, **how)

    def _noted(self, function: Any, place: Any, *rest: Any, **how: Any) -> Any:
        result = function(place, *rest, **how)
        if function.__name__ == "fsync":
            path = Path(os.readlink(f"/proc/self/fd/{place}"))
            if path.is_relative_to(self.root) and path.is_file():
                self.synced_bytes[self._number(path)] = path.read_bytes()
                self._note()
            elif path.is_relative_to(self.root) and path.is_dir():
                self._note()
                self.sure[-1] = len(self.names) - 1
        elif isinstance(place, (str, Path)) and Path(os.path.abspath(place)).is_relative_to(self.root):
            self._note()
        return result

    def _number(self, path: Path) -> int:
        """A file's own, while a handle keeps the system from giving it to another."""
        number = path.stat().st_ino
        if number not in {known for known, _ in self.kept}:
            self.kept.append((number, path.open("rb")))
        return number

    def _note(self) -> None:
        paths = [path for path in self.root.rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.root)): self._number(path) for path in paths}
        self.names.append(names)
        self.written.append({number: path.read_bytes() for path, number in zip(paths, names.values(), strict=True)})
        self.synced.append(dict(self.synced_bytes))
        self.sure.append(self.sure[-1] if self.sure else 0)

    def close(self) -> None:
        for _, file in self.kept:
            file.close()

    def cut(self, step: int, known: int, lost: bool) -> dict[str, bytes]:
        """The files after a power cut at `step`: names as after `known`; what wasn't synced `lost`, or written."""
        found = {}
        for name, number in self.names[known].items():
            synced = self.synced[step].get(number, b"")
            found[name] = synced if lost else self.written[step].get(number, self.written[known][number])
        return found

    def cuts(self) -> list[dict[str, bytes]]:
        """All there are, each once."""
        found: list[dict[str, bytes]] = []
        for step in range(len(self.names)):
            for known in range(self.sure[step], step + 1):
                for lost in (True, False):
                    files = self.cut(step, known, lost)
                    if files not in found:
                        found.append(files)
        return found


def recorded(root: Path, module: str, words: Sequence[str], place: str) -> list[dict[str, bytes]]:
    with pytest.MonkeyPatch.context() as patch:
        trace = Trace(root / place, patch)
        assert run(module, words) == 0
    trace.close()
    return trace.cuts()


def laid_out(files: dict[str, bytes], place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def visible(place: Path) -> dict[str, Any]:
    """What readers find there: hidden files in the making, which nobody goes on with, aside."""
    return {name: content for name, content in tree(place).items() if not name.startswith(".")}


def some(cuts: list[dict[str, bytes]], count: int) -> list[dict[str, bytes]]:
    """About so many of them, the last among them."""
    return cuts[:: -max(1, len(cuts) // count)]


def check_extraction(root: Path, count: int) -> None:
    make_course(root / "set", 5, 2)
    (root / "set/data/3.jpg").write_bytes(b"no picture")
    words = ("--data", "set", "--out", "new", "--workers", "0", "--batch-size", "2", "--splits", "train")
    (root / "new").mkdir()
    cuts = recorded(root, "feats.pixels_extract_feats", words, "new")
    undisturbed = tree(root / "new")
    with FeatureStore.open(root / "new/pixels_train.h5") as store:
        feats, status = store.read_rows("image_feats", (store.status == DONE).nonzero()[0]), store.status.copy()
    assert len(cuts) > 8
    seen = set[int]()
    for files in some(cuts, count):
        laid_out(files, root / "new")
        if "pixels_train.h5" in files:
            with FeatureStore.append(root / "new/pixels_train.h5") as store:  # every done row reads, as it was written
                done = store.status == DONE
                seen.add(int(done.sum()))
                assert (done <= (status == DONE)).all()
                rows = done.nonzero()[0]
                assert (store.read_rows("image_feats", rows) == feats[done[status == DONE]]).all()
                if store.complete:
                    assert (store.status == status).all()
            laid_out(files, root / "new")
        assert run("feats.pixels_extract_feats", words) == 0
        assert visible(root / "new") == undisturbed
    assert seen >= {0, len(feats)} or count < len(cuts)


def check_training(root: Path, count: int) -> None:
    make_cache(root / "feats", "clip", 60)
    (root / "runs").mkdir()
    words = (*FROM_CACHE, *SHORT)
    cuts = recorded(root, "modeling.train_head", words, "runs")
    undisturbed = tree(root / "runs")
    assert len(cuts) > 8
    whole = 0
    for files in some(cuts, count):
        laid_out(files, root / "runs")
        (root / "runs").mkdir(exist_ok=True)
        runs = list_runs(root / "runs")
        assert len(runs) == any(not name.startswith(".") for name in files)  # what has a name is whole
        for path in runs:
            load_run(path)
            assert visible(root / "runs") == undisturbed
            shutil.rmtree(path)
            whole += 1
        assert run("modeling.train_head", words) == 0
        assert visible(root / "runs") == undisturbed
    assert 0 < whole


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:left out or last")
@pytest.mark.parametrize("check", [check_extraction, check_training])
def test_a_power_cut_at_some_steps(check: Any, root: Path):
    check(root, 4)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_extraction, check_training])
def test_a_power_cut_at_any_step(check: Any, root: Path):
    check(root, 1000)


def test_a_trace_tells_a_write_that_nobody_synced(root: Path):
    """The check can fail: names that appear before what they name is on disk."""
    (root / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        trace = Trace(root / "runs", patch)
        (root / "runs/.half").write_bytes(b"whole")
        os.replace(root / "runs/.half", root / "runs/file")
    trace.close()
    assert {"file": b""} in trace.cuts() and {"file": b"whole"} in trace.cuts() and {} in trace.cuts()
