"""Kill workers of an extraction by parts at random moments, start them again, and compare what comes of it with the plain
extraction's bytes.

    python tests/bench/kill_parts.py --engine torchrun --processes 4 --kills 20

Workers are started as a user would, by an engine; each kill is a SIGKILL of one of them, or of all (a machine that
dies). Where a cache was finished before the last kill, its bytes are compared, it is removed and made anew. Exit status
0 if all were one sha256, else 1. Linux only: processes are found in /proc.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_course  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
NAME = "pixels_train"
START_SECONDS = 300  # after which workers that do nothing are an error
LONGEST_PAUSE = 1.5  # seconds from when somebody works to the kill


Command = tuple[list[str], dict[str, str]]  # and what its environment has besides


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = place.read_text(errors="replace")
        except OSError:
            continue
        if int(told[told.rindex(")") + 1 :].split()[1]) == pid:
            found.append(int(place.parent.name))
    return found


def under_torchrun(script: list[str], processes: int) -> list[Command]:
    """One launcher; it ends all its workers when one of them dies."""
    return [([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *script], {})]


def under_slurm(script: list[str], processes: int) -> list[Command]:
    """A job array's tasks; each lives alone."""
    count = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(processes)}
    return [([sys.executable, *script], {"SLURM_ARRAY_TASK_ID": str(i), **count}) for i in range(processes)]


def on_ray(script: list[str], processes: int) -> list[Command]:
    """A cluster of its own on this machine; it starts workers again that die."""
    each = min(1, (os.cpu_count() or 1) / processes)
    options = ["--engine", "ray", "--ray-workers", str(processes), "--cpus-per-worker", f"{each:g}"]
    return [([sys.executable, *script, *options], {})]


def of_ray(pid: int) -> list[int]:
    """Processes of its cluster that are at work."""
    found = []
    for child in children(pid):
        with suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_text().startswith("ray::_in_place"):
                found.append(child)
        found += of_ray(child)
    return found


@dataclass(frozen=True)
class Engine:
    """`commands` start so many workers on a script's command line, each is started again until it ends well; `workers`
    are the processes that do the work, to be killed, of one that a command has started."""

    commands: Callable[[list[str], int], list[Command]]
    workers: Callable[[int], list[int]]


ENGINES = {
    "torchrun": Engine(under_torchrun, children),
    "slurm": Engine(under_slurm, lambda pid: [pid]),
    "ray": Engine(on_ray, of_ray),
}


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def digests(folder: Path) -> dict[str, str]:
    """Of the cache and of its reasons."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(f"{NAME}.*[5v]"))}


def busy(out: Path) -> bool:
    """Whether somebody works on a part, or joins them."""
    return any((out / f"{NAME}.parts").glob("*.lease"))


class Harness:
    """One engine's workers on one set of pairs."""

    def __init__(self, engine: Engine, processes: int, script: list[str], out: Path, seed: int):
        self.engine, self.out = engine, out
        self.commands = engine.commands(script, processes)
        self.random = random.Random(seed)
        self.processes: list[subprocess.Popen[str]] = []
        self.kills = self.whole_kills = 0

    def round(self, kills: int) -> dict[str, str]:
        """Make the cache once, with kills while there are to be more and it isn't finished; returns what came of it."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.processes = [self.start(number) for number in range(len(self.commands))]
        try:
            while self.running():
                if self.kills < kills and self.wait_until_busy():
                    time.sleep(self.random.uniform(0, LONGEST_PAUSE))
                    self.kill_some(kills - self.kills)
                time.sleep(0.05)
        finally:
            kill([*self.workers(), *(process.pid for process in self.processes if process.poll() is None)])
            for process in self.processes:
                process.wait()
        return digests(self.out)

    def start(self, number: int) -> subprocess.Popen[str]:
        """Start a command; what it says goes to a file beside the caches."""
        command, more = self.commands[number]
        with self.said(number).open("w") as file:
            return subprocess.Popen(command, env={**ENVIRONMENT, **more}, stdout=file, stderr=file, text=True)

    def said(self, number: int) -> Path:
        return self.out.with_name(f"said-{number}.txt")

    def running(self) -> bool:
        """Start again what was killed; False once all have ended well."""
        for number, process in enumerate(self.processes):
            if process.poll() not in (None, 0):
                said = self.said(number).read_text(errors="replace")
                if re.search(r'^error: |^  File "[^"]*/feats/', said, re.MULTILINE):
                    raise SystemExit(f"a worker failed by itself:\n{said}")
                self.processes[number] = self.start(number)
        return any(process.poll() is None for process in self.processes)

    def workers(self) -> list[int]:
        running = [process.pid for process in self.processes if process.poll() is None]
        return [pid for launcher in running for pid in self.engine.workers(launcher)]

    def wait_until_busy(self) -> bool:
        """False if the cache is finished before somebody works on it."""
        deadline = time.monotonic() + START_SECONDS
        while not busy(self.out):
            if not self.running():
                return False
            if time.monotonic() > deadline:
                raise SystemExit("the workers do nothing")
            time.sleep(0.02)
        return True

    def kill_some(self, most: int) -> None:
        victims = self.workers()[:most]
        if victims and self.random.random() < 0.8:
            victims = [self.random.choice(victims)]
        self.kills += len(victims)
        self.whole_kills += len(victims) > 1
        kill(victims)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(ENGINES), default="torchrun")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1000, help="pairs; parts have 16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        data = make_course(root / "set", args.rows, size=(320, 240))
        (data / "data" / "7.jpg").write_bytes(b"no picture")
        script = [str(ROOT / "feats" / "pixels_extract_feats.py"), "--data", str(data), "--device", "cpu", "--tokens"]
        script += ["--workers", "0", "--batch-size", "2"]
        subprocess.run(
            [sys.executable, *script, "--out", str(root / "plain")], env=ENVIRONMENT, check=True, capture_output=True
        )
        expected = digests(root / "plain")
        shared = ["--out", str(root / "out"), "--parts", "--piece-rows", "16", "--lease-seconds", "20"]
        harness = Harness(ENGINES[args.engine], args.processes, [*script, *shared], root / "out", args.seed)
        rounds, start_time = 0, time.perf_counter()
        while harness.kills < args.kills:
            rounds += 1
            found = harness.round(args.kills)
            if found != expected:
                print(f"{args.engine} x {args.processes}: after {harness.kills} kills {found}, expected {expected}")
                return 1
    print(
        f"{args.engine} x {args.processes}: {harness.kills} kills ({harness.whole_kills} times of all at once) in "
        f"{rounds} rounds and {time.perf_counter() - start_time:.0f} s; one sha256: {expected[f'{NAME}.h5']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
