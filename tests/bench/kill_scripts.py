"""Kill scripts at random moments, see that every reader copes with what they leave, run them again, and compare what
comes of it with what an undisturbed run leaves.

    python -m tests.bench.kill_scripts --kills 300
    python -m tests.bench.kill_scripts --kills 40 --script sweep auto

Each script runs in a process group of its own, a fork of a process that has imported all that the script needs: a
moment is drawn from the undisturbed run's time after its imports; every other one from the time after the first output,
since some write theirs in the last moment only. The signal is SIGKILL, to the whole group, or for every fourth kill to
the script's own process alone (as when memory runs out). Exit status 0 if nothing was found, else 1. Linux only:
processes are found in /proc. Workers of extractions by parts are killed by `kill_parts.py`.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from kill_parts import ENVIRONMENT, kill  # noqa: E402

CALM_RUNS = 3  # of which the quickest tells how long a run takes
PATIENCE = 60.0  # seconds after which a script hangs
POLL = 0.001
ORPHANS_END = 5.0  # seconds after which a process of a killed script has outlived it
MAIN_ALONE = 4  # every so many kills only the script's own process dies
OF_TIME = {"created", "cost", "tensors_sha256"}  # of a run's config.json
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
ROUNDING = 1e-4  # of figures, where trainings that are left are stacked otherwise than all of them were
TORCH_CACHE = "torchinductor_"  # begins a folder that torch keeps in TMPDIR, one for each user
UNDER_WAY = (".creating", ".writing", ".importing", ".parts", ".lock")  # ends of names that nobody takes for results


# -- scripts in processes that have imported all they need ------------------------------------------------------


def nursery() -> int:
    """Fork for each line of standard input, a command as JSON: tell the process's number and, when it has ended, its
    status."""
    for line in sys.stdin:
        told = json.loads(line)
        for name in told.get("imports", ()):
            with contextlib.suppress(Exception):  # a module that only another could import
                importlib.import_module(name)
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            end(child(told))
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child does it, too: who comes first
            os.setpgid(pid, pid)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return 0


def end(status: int) -> NoReturn:
    """End as an interpreter does, but leave its memory as it is: to take it apart would last longer than most scripts,
    of all that was imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def child(told: dict[str, Any]) -> int:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    said = os.open(told["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(told["folder"])
    script = importlib.import_module(told["module"])
    sys.argv = [str(script.__file__), *told["options"]]
    try:
        return int(script.main())
    except SystemExit as error:  # of argparse
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        if "modules" in told:
            Path(told["modules"]).write_text(json.dumps(sorted(sys.modules)))


@dataclass(frozen=True)
class Ended:
    """How a command ended: `first` is when it first wrote something, `killed` whether it was; what it said."""

    status: int
    seconds: float
    first: float | None
    killed: bool
    pid: int
    said: str


class Commands:
    """Commands in forks of one process, in the folder `work`."""

    def __init__(self, home: Path):
        self.home, self.work, self.temporary = home, home / "work", home / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__)), "--nursery"]
        environment = {**ENVIRONMENT, "TMPDIR": str(self.temporary), "PYTHONWARNINGS": "ignore::DeprecationWarning"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def warm_up(self, module: str, options: Sequence[str], folder: Path | None = None) -> None:
        """Run a command once, so that whatever it imports is imported for all that follow."""
        names = self.home / "modules.json"
        self.run(module, options, folder=folder, modules=str(names))
        self.imports = json.loads(names.read_text())

    imports: Sequence[str] = ()

    def run(
        self,
        module: str,
        options: Sequence[str],
        *,
        kill_at: float | None = None,
        from_first: bool = False,
        alone: bool = False,
        watch: bool = False,
        folder: Path | None = None,
        modules: str | None = None,
    ) -> Ended:
        """Run a command to its end, or kill it after `kill_at` seconds (`from_first`: from when it writes something),
        its main process `alone`."""
        said = self.home / "said.txt"
        told = {"module": module, "options": list(options), "folder": str(folder or self.work), "said": str(said)}
        if self.imports:
            told["imports"], self.imports = self.imports, ()
        if modules:
            told["modules"] = modules
        before = outputs(self.work)
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        start, first, killed, watch = time.monotonic(), None, False, watch or from_first
        while not select.select([self.process.stdout], [], [], POLL)[0]:
            elapsed = time.monotonic() - start
            if watch and first is None and outputs(self.work) != before:
                first = elapsed
            due = kill_at is not None and elapsed > kill_at + (
                0 if not from_first else PATIENCE if first is None else first
            )
            if not killed and (due or elapsed > PATIENCE):
                killed = True
                if alone:
                    kill([pid])
                else:
                    with contextlib.suppress(ProcessLookupError):  # it has ended just now
                        os.killpg(pid, signal.SIGKILL)
                if first is None and outputs(self.work) != before:
                    first = elapsed
        status = int(self.process.stdout.readline())
        killed &= status == -signal.SIGKILL
        return Ended(status, time.monotonic() - start, first, killed, pid, said.read_text(errors="replace"))


def outputs(folder: Path) -> dict[str, int]:
    """Every file of a folder, locks aside, and when it was last written."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                if not name.endswith(".lock"):
                    path = os.path.join(place, name)
                    found[path] = os.stat(path).st_mtime_ns
    return found


def group_of(pid: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            told = place.read_text(errors="replace")
            state, _, group = told[told.rindex(")") + 1 :].split()[:3]
            if int(group) == pid and state not in "ZX":
                found.append(int(place.parent.name))
    return found


def outlived(pid: int) -> list[int]:
    """Processes of a killed script that don't end; they are ended."""
    limit = time.monotonic() + ORPHANS_END
    while (left := group_of(pid)) and time.monotonic() < limit:
        time.sleep(POLL)
    kill(left)
    return left


# -- what is killed, and who reads what it leaves ---------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A command that reads; `statuses` are those it may end with."""

    module: str
    options: Sequence[str]
    statuses: Sequence[int] = (0,)


@dataclass(frozen=True)
class Script:
    """A command and those who read what it leaves. `prepare` fills `start`, from which each trial begins, and `given`,
    beside it. `rounds`: what goes on may differ in last digits."""

    module: str
    options: Sequence[str]
    prepare: Callable[[Path, "Commands"], None]
    readers: Sequence[Reader]
    rounds: bool = False


def course(rows: int, size: tuple[int, int] = (64, 48), clip: bool = False) -> Callable[[Path, Commands], None]:
    def prepare(home: Path, commands: Commands) -> None:
        from conftest import make_course

        make_course(home / "given" / "set", rows, size=size)
        (home / "given" / "set" / "data" / "7.jpg").write_bytes(b"no picture")
        if clip:
            from tiny_models import make_clip, save_clip

            save_clip(make_clip("vit"), home / "given" / "clip.pt")

    return prepare


def caches(rows: int, test_rows: int = 0) -> Callable[[Path, Commands], None]:
    """Caches and a run of before, so that every reader of runs finds one."""

    def prepare(home: Path, commands: Commands) -> None:
        from caches import make_cache

        make_cache(home / "given" / "feats", "clip", rows, quarantined=[3])
        if test_rows:
            make_cache(home / "given" / "feats", "clip", test_rows, split="test", seed=1, first_id=rows)
        (home / "start" / "runs").mkdir(parents=True)
        first = [*FEATS, "--head", "concat", "--D", "8", "--ep", "1", "--val-ratio", "0.2"]
        commands.warm_up("modeling.train_head", first, home / "start")
        [run] = (home / "start" / "runs").iterdir()
        run.rename(run.with_name("before"))

    return prepare


def manifest(home: Path, commands: Commands) -> None:
    """Raw pairs, and a run of the encoder that is quickest to load."""
    from conftest import make_course

    (home / "start" / "runs").mkdir(parents=True)
    make_course(home / "given" / "small", 60)
    data = ["--data", "../given/small", "--out", "../given/feats", "--device", "cpu", "--workers", "0"]
    commands.warm_up("feats.vader_extract_feats", data, home / "start")
    first = ["--feats", "../given/feats", "--ttype", "vader", "--head", "linear", "--val-ratio", "0.2"]
    commands.warm_up("modeling.train_head", [*first, "--runs", "runs", "--device", "cpu"], home / "start")
    [run] = (home / "start" / "runs").iterdir()
    run.rename(run.with_name("before"))
    rows = [json.dumps({"id": f"r{k}", "text": f"a {'good' if k % 3 else 'sad'} day, number {k}"}) for k in range(2000)]
    (home / "given" / "pairs.jsonl").write_text("\n".join(rows) + "\n")


def parts(home: Path, commands: Commands) -> None:
    from parted import SETTINGS, both_sides, make_parts, pairs_with_faults

    records = pairs_with_faults(home / "given" / "set", PART_ROWS)
    sizes = [16] * (len(records) // 16) + [len(records) % 16]
    make_parts(both_sides(), records, home / "start" / "both_train.h5", [size for size in sizes if size], SETTINGS)


def one_cache(home: Path, commands: Commands) -> None:
    from caches import make_cache

    make_cache(home / "given", "clip", 20000, quarantined=[3], views=4, tokens=True)


def inspected(cache: str, *more: str) -> list[Reader]:
    """It may not be there yet."""
    return [Reader("feats.inspect_feats", [cache, *option], (0, 2)) for option in ([], ["--verify"])]


PART_ROWS = 330
CPU = ["--device", "cpu"]
FEATS = ["--feats", "../given/feats", "--vtype", "clip", "--ttype", "clip", "--runs", "runs", *CPU]
OF_RUNS = [
    Reader("modeling.list_runs", ["--runs", "runs"]),
    Reader("modeling.compare_runs", ["--runs", "runs"]),
    Reader("modeling.inference_head", ["--runs", "runs", "--split", "train", "--out", "../read.csv", *CPU]),
]
OF_SWEEP = [
    Reader("modeling.compare_runs", ["--runs", "runs", "runs/sweep"], (0, 2)),
    Reader("modeling.inference_head", ["--runs", "runs", "--run", "best", "--split", "train", "--out", "-", *CPU]),
    Reader(
        "modeling.bad_cases", ["--runs", "runs", "--run", "sweep", "--folds", "2", "--out", "../bad.csv", *CPU], (2,)
    ),
]
OUT = ["--out", "out.csv"]
SCRIPTS = {
    "vader": Script(
        "feats.vader_extract_feats",
        ["--data", "../given/set", "--out", ".", *CPU, "--workers", "0", "--batch-size", "16"],
        course(1500, size=(24, 16)),
        [
            *inspected("vader_train.h5"),
            Reader("feats.export_feats", ["vader_train.h5", "--out", "../read", "--overwrite"], (0, 2)),
        ],
    ),
    "clip": Script(
        "feats.clip_extract_feats",
        ["--data", "../given/set", "--out", ".", *CPU, "--weights", "../given/clip.pt", "--workers", "2", "--tokens"]
        + ["--batch-size", "4"],
        course(160, clip=True),
        inspected("clip_train.h5"),
    ),
    "train": Script(
        "modeling.train_head",
        [*FEATS, "--head", "fusion", "--D", "16", "--ep", "6", "--folds", "3"],
        caches(6000),
        OF_RUNS,
    ),
    "sweep": Script(
        "modeling.sweep_heads",
        [*FEATS, "--head", "fusion", "mlp", "linear", "--D", "8", "16", "--ep", "4"] + ["--val-ratio", "0.2"],
        caches(1200),
        [*OF_RUNS[:2], *OF_SWEEP],
        rounds=True,
    ),
    "auto": Script(
        "modeling.sweep_heads",
        [*FEATS, "--auto", "--head", "linear", "--val-ratio", "0.2"],
        caches(200),
        OF_RUNS,
    ),
    "inference": Script(
        "modeling.inference_head",
        ["--runs", "runs", "--run", "before", "--split", "test", "--proba", *OUT, *CPU],
        caches(300, test_rows=60000),
        OF_RUNS,
    ),
    "manifest": Script(
        "modeling.inference_head",
        ["--runs", "runs", "--run", "before", "--csv", "../given/pairs.jsonl", *OUT, *CPU],
        manifest,
        OF_RUNS[:2],
    ),
    "bad_cases": Script(
        "modeling.bad_cases",
        ["--runs", "runs", "--run", "before", "--folds", "5", *OUT, *CPU],
        caches(20000),
        OF_RUNS,
    ),
    "merge": Script("feats.merge_feats", ["both_train.h5"], parts, inspected("both_train.h5")),
    "parquet": Script(
        "feats.export_feats",
        ["../given/clip_train.h5", "--out", ".", "--overwrite"],
        one_cache,
        [
            Reader(
                "feats.import_feats", ["clip_train.parquet", "--out", "../read", "--name", "x", "--overwrite"], (0, 2)
            )
        ],
    ),
    "npy": Script(
        "feats.export_feats",
        ["../given/clip_train.h5", "--format", "npy", "--file-rows", "3000", "--out", ".", "--overwrite"],
        one_cache,
        [Reader("feats.import_feats", ["clip_train", "--out", "../read", "--name", "x", "--overwrite"], (0, 2))],
    ),
}


# -- what was left ----------------------------------------------------------------------------------------------


def plain(path: Path) -> str:
    """A path without times: the runs of one command, of whatever second and number."""
    return "/".join(re.sub(r"^\d{8}-\d{6}_(.*?)(-\d+)?$", r"\1", part) for part in path.parts)


def files_of(folder: Path) -> dict[str, list[Path]]:
    """Every file by its `plain` path from `folder`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        found.setdefault(plain(path.relative_to(folder)), []).append(path)
    return found


def same(a: Path, b: Path, rounds: bool) -> bool:
    """Whether two files hold the same, up to what tells of time."""
    left, right = a.read_bytes(), b.read_bytes()
    if left == right:
        return True
    if a.name == "config.json":
        left, right = (
            json.dumps({k: v for k, v in json.loads(x).items() if k not in OF_TIME}).encode() for x in (left, right)
        )
    if not rounds or a.suffix not in (".json", ".csv", ".md", ".safetensors"):
        return left == right
    if a.suffix == ".safetensors":
        return close_tensors(a, b)
    texts = left.decode(), right.decode()
    numbers = zip(*([float(number) for number in NUMBER.findall(text)] for text in texts), strict=False)
    return NUMBER.sub("", texts[0]) == NUMBER.sub("", texts[1]) and all(
        abs(x - y) <= ROUNDING * max(1, abs(x)) for x, y in numbers
    )


def close_tensors(a: Path, b: Path) -> bool:
    import numpy as np
    from safetensors.numpy import load_file

    left, right = load_file(a), load_file(b)
    close = {"rtol": ROUNDING, "atol": ROUNDING}
    return left.keys() == right.keys() and all(np.allclose(left[name], right[name], **close) for name in left)


def half_made(work: Path, start: Path, calm: Path, rounds: bool) -> Iterator[str]:
    """Files that look finished, and are what neither was there before nor an undisturbed run leaves."""
    whole = [files_of(calm), files_of(start)]
    for name, paths in files_of(work).items():
        if any(part.startswith(".") or part.endswith(UNDER_WAY) for part in name.split("/")):
            continue
        wanted = [path for known in whole for path in known.get(name, ())]
        for path in paths:
            if path.suffix == ".h5":
                fine = not is_finished(path) or any(same_cache(path, other) for other in wanted)
            else:
                fine = any(same(path, other, rounds) for other in wanted)
            if not fine:
                yield f"half: {path.relative_to(work)}"


def same_cache(a: Path, b: Path) -> bool:
    """Whether two caches hold the same. (While one is open for writing, a flag in its head says so, after a kill as
    well.)"""
    import h5py

    with h5py.File(a, locking=False) as left, h5py.File(b, locking=False) as right:
        if left.keys() != right.keys() or dict(left.attrs) != dict(right.attrs):
            return False
        return all(left[name][:].tobytes() == right[name][:].tobytes() for name in left)


def is_finished(cache: Path) -> bool:
    import h5py

    with h5py.File(cache, locking=False) as file:
        return bool(file.attrs["complete"])


def differences(work: Path, calm: Path, rounds: bool) -> Iterator[str]:
    """What a repeated command left otherwise than an undisturbed one, left-overs aside."""
    found, wanted = files_of(work), files_of(calm)
    for name, [path, *_] in wanted.items():
        others = found.get(name, [])
        if not others:
            yield f"lacks: {name}"
        yield from (f"differs: {other.relative_to(work)}" for other in others if not same(other, path, rounds))


def left_over(work: Path, calm: Path, temporary: Path, shared: set[str]) -> Iterator[str]:
    """What a repeated command has not removed."""
    wanted = files_of(calm)
    yield from (f"left: {paths[0].relative_to(work)}" for name, paths in files_of(work).items() if name not in wanted)
    folders = {plain(path.relative_to(calm)) for path in calm.rglob("*") if path.is_dir()}
    for path in work.rglob("*"):
        if path.is_dir() and plain(path.relative_to(work)) not in folders:
            yield f"left: {path.relative_to(work)}/"
    own = [path.name for path in temporary.iterdir() if not path.name.startswith(TORCH_CACHE)]
    yield from (f"left in TMPDIR: {name}" for name in own)
    yield from (f"left in /dev/shm: {name}" for name in shared)


def shared_memory(pids: Sequence[int] | None = None) -> set[str]:
    """Names in /dev/shm; other programs use it, too, so that what counts has the number of one of `pids` in its name."""
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    return names if pids is None else {name for name in names if {int(n) for n in re.findall(r"\d+", name)} & set(pids)}


# -- trials -----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the kills of one script."""

    name: str
    calm_seconds: float = 0.0
    kills: int = 0
    before: int = 0  # the first output
    middle: int = 0
    after: int = 0  # the end: nothing was killed
    repeats: int = 0
    readers: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


def reset(home: Path) -> None:
    shutil.rmtree(home / "work", ignore_errors=True)
    shutil.copytree(home / "start", home / "work")


def undisturbed(script: Script, home: Path, commands: Commands) -> Ended:
    """Leave in `calm` what the command leaves, the second time: the first imports."""
    reset(home)
    commands.warm_up(script.module, script.options)
    for reader in script.readers:
        commands.warm_up(reader.module, reader.options)
    reset(home)
    commands.run(script.module, ["--help"])  # takes the imports
    runs = []
    for _ in range(CALM_RUNS):
        reset(home)
        runs.append(commands.run(script.module, script.options, watch=True))
        if runs[-1].status or runs[-1].first is None:
            raise SystemExit(f"{script.module} failed by itself:\n{runs[-1].said}")
    shutil.copytree(home / "work", home / "calm")
    return min(runs, key=lambda run: run.seconds)


def unreadable(reader: Reader, ended: Ended) -> Iterator[str]:
    """What is the matter with how a reader ended."""
    whole = f"{reader.module} {' '.join(reader.options)}"
    if ended.killed:
        yield f"{whole}: hangs"
    elif "Traceback" in ended.said or ended.status not in reader.statuses:
        yield f"{whole}: status {ended.status}\n{ended.said[-2000:]}"
    elif ended.status == 2 and "error: " not in ended.said:
        yield f"{whole}: no line of an error\n{ended.said[-2000:]}"


def trial(name: str, kills: int, home: Path, seed: int, every: int) -> Outcome:
    """Kill one script so many times; after every so many it is repeated and compared."""
    script, outcome, draw = SCRIPTS[name], Outcome(name), random.Random(f"{seed}/{name}")
    (home / "given").mkdir(parents=True)
    (home / "start").mkdir()
    commands = Commands(home)
    start_time, pids = time.monotonic(), list[int]()
    try:
        script.prepare(home, commands)
        calm = undisturbed(script, home, commands)
        assert calm.first is not None
        outcome.calm_seconds = calm.seconds
        reset(home)
        for number in range(kills):
            late = number % 2 == 1
            at = draw.uniform(0, calm.seconds - (calm.first if late else 0))
            alone = number % MAIN_ALONE == MAIN_ALONE - 1
            ended = commands.run(script.module, script.options, kill_at=at, from_first=late, alone=alone)
            pids.append(ended.pid)
            outcome.kills += 1
            where = f"{name}, kill {number} at {at:.3f} s{' from its output' * late}{', alone' * alone}"
            if (not ended.killed and ended.status) or "Traceback" in ended.said:
                outcome.differs.append(f"{where}: failed by itself\n{ended.said[-2000:]}")
            outcome.after += not ended.killed
            outcome.before += ended.killed and ended.first is None
            outcome.middle += ended.killed and ended.first is not None
            outcome.left += [f"{where}: process {pid} lives" for pid in outlived(ended.pid)]
            made = half_made(home / "work", home / "start", home / "calm", script.rounds)
            outcome.readers += [f"{where}: {what}" for what in made]
            for reader in script.readers:
                told = unreadable(reader, commands.run(reader.module, reader.options))
                outcome.readers += [f"{where}: {what}" for what in told]
            if number % every == every - 1:
                again = commands.run(script.module, script.options)
                pids.append(again.pid)
                outcome.repeats += 1
                if again.status or "Traceback" in again.said:
                    outcome.differs.append(f"{where}: repeated, status {again.status}\n{again.said[-2000:]}")
                outcome.differs += [f"{where}: {w}" for w in differences(home / "work", home / "calm", script.rounds)]
                left = left_over(home / "work", home / "calm", commands.temporary, shared_memory(pids))
                outcome.left += [f"{where}: {what}" for what in left]
                reset(home)
                shutil.rmtree(commands.temporary)
                commands.temporary.mkdir()
    finally:
        commands.close()
    outcome.seconds = time.monotonic() - start_time
    return outcome


HEAD = "script      kills before middle after repeats readers differ  left    run  seconds"


def line(outcome: Outcome) -> str:
    counts = (outcome.kills, outcome.before, outcome.middle, outcome.after, outcome.repeats)
    found = (len(outcome.readers), len(outcome.differs), len(outcome.left))
    widths = (6, 7, 7, 6, 8, 8, 7, 6)
    cells = "".join(f"{n:{width}}" for n, width in zip((*counts, *found), widths))
    return f"{outcome.name:11}{cells} {outcome.calm_seconds:6.2f} {outcome.seconds:8.0f}"


def summed(outcomes: Sequence[Outcome]) -> Outcome:
    """All scripts together; seconds are those of a lane."""
    total = Outcome("all")
    for outcome in outcomes:
        for name, value in vars(outcome).items():
            if name != "name":
                setattr(total, name, getattr(total, name) + value)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="of all scripts together (default: %(default)s)")
    parser.add_argument("--script", nargs="+", choices=tuple(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument(
        "--repeat-every", type=int, default=2, metavar="N", help="kills, one after another, to a repeat"
    )
    parser.add_argument("--lanes", type=int, default=2, help="scripts side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where trials are made; quick on a disk in memory")
    parser.add_argument("--nursery", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.nursery:
        return nursery()
    names = args.script
    counts = [args.kills // len(names) + (k < args.kills % len(names)) for k in range(len(names))]
    print(f"{args.kills} kills, seed {args.seed}\n{HEAD}", flush=True)
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=args.work))
    outcomes = []
    try:
        with ThreadPoolExecutor(args.lanes) as lanes:
            started = [
                lanes.submit(trial, name, count, root / name, args.seed, args.repeat_every)
                for name, count in zip(names, counts, strict=True)
            ]
            for of_script in started:
                outcomes.append(of_script.result())
                told = (outcomes[-1].readers, outcomes[-1].differs, outcomes[-1].left)
                print("\n".join([line(outcomes[-1]), *(f"  {what}" for faults in told for what in faults)]), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    total = summed(outcomes)
    print(line(total))
    return 1 if total.readers or total.differs or total.left else 0


if __name__ == "__main__":
    sys.exit(main())
