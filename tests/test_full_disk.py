"""A disk that is full at any moment of any script: one line that names a file, nothing half in place, and the same
command afterwards gives what it would have given.
"""

import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from caches import light_course, make_cache
from conftest import ENVIRONMENT, ROOT, make_course
from pairs import cached_pairs
from test_help import MODULES

from feats.store import FeatureStore
from modeling.runs.folder import load_run

SHORT = ("--head", "concat", "--D", "4", "--ep", "2", "--bs", "32", "--val-ratio", "0.3")
FROM_CACHE = ("--vtype", "clip", "--feats", "feats", "--runs", "runs")
TINY_WEIGHTS = ("--weights", "vit=pairs/vit", "roberta=pairs/bert")
TINY = ("--ep", "1", "--bs", "8", "--dtype", "fp32", "--device", "cpu")
STEP = 5  # all changes would take minutes
LONG_STEPS = {"report": 129, "finetune": 45, "compare finetuning": 80, "reproduce": 25}  # of scripts that take seconds
# What differs from time to time.
VALUES = {"created", "command", "options", "seconds", "trunk_seconds", "peak_bytes", "cost", "updated"}

# -- scripts, each with what lies there before --------------------------------------------------------------------

SCRIPTS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "extract": ("feats.pixels_extract_feats", ("--data", "set", "--out", "new", "--workers", "0"), ("set",)),
    "extract by parts": (
        "feats.pixels_extract_feats",
        ("--data", "set", "--out", "new", "--workers", "0", "--piece-rows", "1", "--splits", "train"),
        ("set",),
    ),
    "merge": ("feats.merge_feats", ("new/pixels_train.parts",), ("set", "new")),
    "export": ("feats.export_feats", ("feats/clip_train.h5", "--out", "new"), ("feats",)),
    "export npy": ("feats.export_feats", ("feats/clip_train.h5", "--out", "new", "--format", "npy"), ("feats",)),
    "import": ("feats.import_feats", ("parquet/clip_train.parquet", "--out", "new"), ("feats", "parquet")),
    "export texts": ("feats.export_texts", ("--data", "set", "--out", "new"), ("set",)),
    "train": ("modeling.train_head", (*FROM_CACHE, *SHORT), ("feats",)),
    "sweep": (
        "modeling.sweep_heads",
        (*FROM_CACHE, *SHORT[2:], "--head", "concat", "mlp", "--name", "two"),
        ("feats",),
    ),
    "predict": (
        "modeling.inference_head",
        ("--runs", "runs", "--split", "train", "--out", "out/out.csv"),
        ("feats", "runs", "out"),
    ),
    "bad cases": ("modeling.bad_cases", ("--runs", "runs", "--folds", "2"), ("feats", "runs")),
    "compare": ("modeling.compare_runs", ("--runs", "runs", "--out", "new.csv"), ("feats", "runs")),
    "learning curve": (
        "modeling.learning_curve",
        ("--runs", "runs", "--shares", "0.7", "--draws", "1"),
        ("feats", "runs"),
    ),
    "audit": ("modeling.audit_labels", ("--runs", "runs", "--folds", "2"), ("feats", "runs")),
    "report": ("modeling.make_report", ("--runs", "light/runs", "--explain", "1"), ("light",)),
    "explain": (
        "modeling.explain",
        ("--runs", "light/runs", "--image", "light/set/data/24.jpg", "--text", "sun", "--orders", "1"),
        ("light",),
    ),
    "finetune": (
        "modeling.finetune",
        ("--runs", "pairs/runs", "--name", "new", *TINY_WEIGHTS, *TINY),
        ("pairs",),
    ),
    "compare finetuning": (
        "modeling.compare_finetuning",
        (
            *("--runs", "pairs/runs", "--name", "new", "--methods", "frozen", "last-1"),
            *("--folds", "2", "--only", "1", "--val-ratio", "0.25", *TINY_WEIGHTS, *TINY),
        ),
        ("pairs",),
    ),
    "reproduce": (
        "modeling.reproduce",
        ("D-ablation", "--feats", "feats", "--runs", "runs", "--seeds", "1", "--device", "cpu"),
        ("feats",),
    ),
}


class Before:
    """What may lie there before, each thing made when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def copy(self, name: str, to: Path) -> None:
        if not (self.root / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.root)
                getattr(self, name)()
        if to != self.root / name:
            shutil.copytree(self.root / name, to)

    def set(self) -> None:
        make_course(Path("set"), 4, 1)
        Path("set/data/3.jpg").write_bytes(b"no picture")

    def feats(self) -> None:
        make_cache(Path("feats"), "clip", 60, quarantined=(5,))

    def runs(self) -> None:
        self.copy("feats", self.root / "feats")
        assert run("modeling.train_head", (*FROM_CACHE, *SHORT)) == 0

    def parquet(self) -> None:
        self.copy("feats", self.root / "feats")
        assert run("feats.export_feats", ("feats/clip_train.h5", "--out", "parquet")) == 0

    def new(self) -> None:
        """Parts that nobody joined."""
        self.copy("set", self.root / "set")
        words = ("--data", "set", "--out", "new", "--workers", "0", "--piece-rows", "1", "--no-join")
        assert run("feats.pixels_extract_feats", (*words, "--splits", "train")) == 0

    def light(self) -> None:
        """Pairs, their caches, and a run of encoders that need no weights."""
        light_course(Path("light"))

    def pairs(self) -> None:
        """Pairs, tiny transformers, their caches and a run."""
        cached_pairs(Path("pairs"))
        words = ("--vtype", "vit", "--ttype", "roberta", "--feats", "pairs/feats", "--runs", "pairs/runs")
        assert run("modeling.train_head", (*words, *SHORT)) == 0

    def out(self) -> None:
        """Older predictions."""
        Path("out").mkdir()
        Path("out/out.csv").write_text("guid,tag\nold,positive\n")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    return Before(tmp_path_factory.mktemp("before"))


def fresh(before: Before, root: Path, parts: Sequence[str]) -> Path:
    """The folder with copies of these, and nothing else."""
    for left in root.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for part in parts:
        before.copy(part, root / part)
    return root


def run(module: str, words: Sequence[str]) -> int:
    status: int = import_module(module).main(list(words))
    return status


def tree(root: Path) -> dict[str, Any]:
    """What readers find there: files by name, runs without their dates."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = re.sub(r"\d{8}-\d{6}", "DATE", str(path.relative_to(root)))
        if path.is_file() and not path.name.endswith(".lock"):
            found[name] = plain(path)
    return found


def plain(path: Path) -> Any:
    if path.suffix == ".log":  # all it was ever said
        return True
    # Trainings that go on in a stack of fewer round otherwise: what the table shows of them is the same.
    if any(part.startswith("reproduce_") for part in path.parts) and path.name != "table.md":
        return path.stat().st_size > 0
    if path.suffix == ".json" and path.name != "plan.json" and ".tuning/" not in str(path):
        return undated(json.loads(path.read_text()))
    text = re.sub(rb"\d{8}-\d{6}", b"DATE", path.read_bytes())
    if b"peak GB" in text:  # beside seconds, and a line on those that went on
        text = re.sub(rb" *\d+\.\d+|- fold 1 .* went on .*\n", b"", text)
    return text if path.suffix != ".html" else len(text) > 1000


def undated(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: undated(value) for name, value in content.items() if name not in VALUES}
    return [undated(value) for value in content] if isinstance(content, list) else content


class InThisProcess:
    """In place of a process of its own: `feats.threads`'s line, then a script and its words."""

    def __init__(self, command: Sequence[str], stdout: Any, **_: Any):
        script, *words = command[4:]
        with open(os.dup(stdout.fileno()), "w") as shown, redirect_stdout(shown), redirect_stderr(shown):
            self.status = run(f"modeling.{Path(script).stem}", words)

    def wait(self) -> int:
        return self.status

    poll = wait


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds and writes nothing below `root`: figures in memory, processes."""
    from matplotlib.figure import Figure

    from modeling.finetuning import comparison

    def save(figure: Figure, file: Any, format: str, **how: Any) -> None:
        if hasattr(file, "getvalue"):
            file.write("<svg></svg>" if format == "svg" else b"png")
        else:
            usual(figure, file, format=format, **how)

    usual = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(comparison.subprocess, "Popen", InThisProcess)
    for name in ("_tsne", "_umap"):
        monkeypatch.setattr(f"modeling.report.embedding.{name}", lambda components, seed: components[:, :2])


# -- the disk -----------------------------------------------------------------------------------------------------


class FullDisk:
    """From the `fails`-th change below `root` on nothing can be written there: files that are opened for that are
    empty and stay so, and what needs a new entry in a folder, or a sync, is refused. `once`: then there is room again.
    """

    CALLS = {"fsync": 1, "replace": 2, "rename": 2, "link": 2, "mkdir": 1}

    def __init__(self, root: Path, fails: int, patch: pytest.MonkeyPatch, once: bool = False):
        self.root, self.fails, self.once, self.changes = str(root), fails, once, 0
        self.lock = Lock()
        for name in self.CALLS:
            patch.setattr(os, name, partial(self._call, getattr(os, name)))
        patch.setattr(os, "open", partial(self._os_open, os.open))
        for module in (io, builtins):
            patch.setattr(module, "open", partial(self._open, open))

    def _refuses(self, place: Any) -> bool:
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        if not os.path.abspath(os.fspath(place)).startswith(self.root):
            return False
        with self.lock:  # files may be synced at the same time
            self.changes += 1
            return self.changes == self.fails if self.once else self.changes >= self.fails

    def _call(self, function: Callable[..., Any], place: Any, *rest: Any, **how: Any) -> Any:
        if self._refuses(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        return function(place, *rest, **how)

    def _os_open(self, function: Callable[..., Any], place: Any, flags: int, *rest: Any, **how: Any) -> Any:
        if flags & os.O_CREAT and self._refuses(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        return function(place, flags, *rest, **how)

    def _open(self, function: Callable[..., Any], place: Any, mode: str = "r", *rest: Any, **how: Any) -> Any:
        if isinstance(place, int) or not set(mode) & set("wxa") or not self._refuses(place):
            return function(place, mode, *rest, **how)
        if "+" in mode:  # what reads /dev/full again would find zeros without end
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        function(place, mode, *rest, **how).close()
        return function("/dev/full", mode.replace("x", "w"), *rest, **how)


def said_in_one_line(err: str) -> None:
    errors = [line for line in err.splitlines() if not line.startswith(("warning:", "note:", "  "))]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in err, err
    named = re.findall(r"[\w./-]*(?:new|runs|out/)[\w./-]*", errors[0])
    assert named and ".writing" not in errors[0] and ".creating" not in errors[0], err


def nothing_half(found: dict[str, Any], earlier: dict[str, Any], undisturbed: dict[str, Any], root: Path) -> None:
    """Every file is as it was or as it will be, but for caches in the making, which open, and the working folder that a
    finetuning goes on with; hidden ones are gone."""
    for name, content in found.items():
        if ".tuning/" in name:
            continue
        if name.endswith((".h5", ".quarantine.csv", "plan.json")) and content != earlier.get(name):
            continue
        assert not re.search(r"/\.|^\.", name), name
        assert content in (earlier.get(name), undisturbed.get(name)), name
    for path in root.rglob("[!.]*.h5"):
        with FeatureStore.open(path) as store:
            store.read_rows(next(iter(store.features)), (store.status == 1).nonzero()[0])


@contextmanager
def full_from(fails: int, root: Path, once: bool = False) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(root, fails, patch, once)
        yield


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, whoever writes it: the libraries of HDF5, safetensors and Parquet, too."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "at").mkdir()
    monkeypatch.chdir(tmp_path / "at")
    return tmp_path / "at"


def undisturbed_result(script: str, before: Before, root: Path) -> tuple[dict[str, Any], int]:
    """What a script leaves, and the number of its changes."""
    module, words, parts = SCRIPTS[script]
    fresh(before, root, parts)
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(root, 1 << 30, patch)
        assert run(module, words) == 0
    return tree(root), disk.changes


def disturbed(
    script: str, full: AbstractContextManager[None], before: Before, root: Path, undisturbed: dict[str, Any]
) -> bool:
    """Run a script on a full disk, then on one with room; whether the first failed."""
    module, words, parts = SCRIPTS[script]
    fresh(before, root, parts)
    earlier = tree(root)
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()), full:
        status = run(module, words)
    if status == 0:  # it could do without: a folder's sync after all has appeared, the removal of joined parts
        assert {name: content for name, content in tree(root).items() if ".parts/" not in name} == undisturbed
        return False
    assert status == 2, err.getvalue()
    said_in_one_line(err.getvalue())
    nothing_half(tree(root), earlier, undisturbed, root)
    again = ["--overwrite"] if "--overwrite" in err.getvalue() else []
    assert run(module, [*words, *again]) == 0
    assert tree(root) == undisturbed
    return True


@pytest.mark.parametrize("script", ["extract", "train", "export", "export texts"])
def test_a_full_disk_is_one_line_and_nothing_half(script: str, before: Before, root: Path):
    undisturbed, changes = undisturbed_result(script, before, root)
    assert disturbed(script, full_from(1, root), before, root, undisturbed)
    assert disturbed(script, full_from(changes // 2, root), before, root, undisturbed)
    if script != "export texts":  # whose files are all small
        assert disturbed(script, small_files(600), before, root, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script", SCRIPTS)
def test_full_from_any_change_on(script: str, before: Before, root: Path):
    undisturbed, changes = undisturbed_result(script, before, root)
    some = range(1, changes + 1, LONG_STEPS.get(script, STEP))
    failed = [disturbed(script, full_from(fails, root), before, root, undisturbed) for fails in some]
    assert changes > 2 and failed[0] and failed.count(False) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["extract by parts", "merge"])
def test_one_write_that_fails_before_there_is_room_again(script: str, before: Before, root: Path):
    """It is made up for, or it ends the work: no lease is left that others would wait for, and no part that is none."""
    undisturbed, changes = undisturbed_result(script, before, root)
    some = range(1, changes + 1, STEP)
    failed = [disturbed(script, full_from(fails, root, once=True), before, root, undisturbed) for fails in some]
    assert any(failed)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["extract", "extract by parts", "merge", "export npy", "import", "predict"])
def test_files_that_grow_beyond_what_there_is_room_for(script: str, before: Before, root: Path):
    undisturbed, _ = undisturbed_result(script, before, root)
    sizes = (0, 100, 2_000, 8_000, 16_000, 1 << 20)
    failed = [disturbed(script, small_files(size), before, root, undisturbed) for size in sizes]
    assert failed[0] and not failed[-1]


# -- behind stdout ------------------------------------------------------------------------------------------------

NO_ROOM = "error: can't write to standard output (No space left on device); make room there, or send it elsewhere\n"
MMPROBE = "import sys; from modeling.console import main; sys.exit(main())"


def shown_on_a_full_disk(*python: str) -> None:
    with open("/dev/full", "w") as full:
        environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}
        words = [sys.executable, *python]
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, NO_ROOM), words


@pytest.mark.parametrize("python", [("-m", "modeling.train_head", "--version"), ("-c", MMPROBE, "--help")])
def test_what_cant_be_shown_is_one_line(python: Sequence[str]):
    """And nothing more of it when Python ends."""
    shown_on_a_full_disk(*python)


@pytest.mark.parametrize("module", MODULES)
def test_no_script_ends_well_whose_help_cant_be_shown(module: str, capsys: pytest.CaptureFixture):
    with open("/dev/full", "w") as full, redirect_stdout(full), pytest.raises(SystemExit) as ended:
        run(module, ("--help",))
    assert ended.value.code == 2 and capsys.readouterr().err == NO_ROOM


@pytest.mark.parametrize("words", [(), ("--quiet",)])
def test_a_result_that_cant_be_shown_is_no_success(words: Sequence[str], before: Before, root: Path):
    fresh(before, root, ("feats",))
    err = io.StringIO()
    with open("/dev/full", "w") as full, redirect_stdout(full), redirect_stderr(err):
        assert run("feats.inspect_feats", ("feats/clip_train.h5", *words)) == 2
    assert err.getvalue() == NO_ROOM


@pytest.mark.slow
def test_scripts_whose_results_cant_be_shown(before: Before, root: Path):
    fresh(before, root, ("feats", "runs"))
    for words in (
        ("list_runs", "--runs", "runs"),
        ("train_head", *FROM_CACHE, *SHORT),
        ("train_head", "--show-config"),
    ):
        shown_on_a_full_disk("-m", f"modeling.{words[0]}", *words[1:])
    for path in (root / "runs").iterdir():  # of training, too, either nothing or a whole run
        load_run(path)
    shown_on_a_full_disk(str(ROOT / "data/make_sample.py"), "--n", "20", "--n-test", "1")
