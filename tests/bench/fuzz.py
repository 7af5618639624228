"""Feed hostile input of every kind to the public doors, at length, and count what becomes of it.

    python -m tests.bench.fuzz --inputs 70000 --seconds 600
    python -m tests.bench.fuzz --only tiff --seed 1234567   # one input again, in this process

Inputs are made and read in two child processes, so that one that hangs or crashes the interpreter is counted, too: it
is a fault like any exception but a refusal. Each fault is printed with the seed that repeats it. Exit status 1 if there
are any.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from tests.fuzzing.outcomes import ACCEPTED, FAULT, REFUSED, Kind, Outcome
from tests.fuzzing.registry import KINDS, SELDOM

SECONDS = 5.0  # of processor time for an input; more is a fault ...
PATIENCE = 30.0  # ... and so many seconds without an answer are a hang
PATIENCE_OF = {"process": 90.0}  # what starts a process of its own
MEMORY = 8 << 30  # bytes of address space of a child
FIRST_SECONDS = 120.0  # of a child's first input, which imports libraries


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m tests.bench.fuzz", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000, help="in all (default: 1000)")
    parser.add_argument("--seconds", type=float, default=60, help="begin no more after these (default: 60)")
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first input (default: 0)")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, help="repeat this input of the kinds named by --only, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    kinds = {name: KINDS[name] for name in args.only} if args.only else KINDS
    if args.seed is not None:
        for name in kinds:
            print(name, run_one(kinds[name], args.seed))
        return 0
    counts = run_all(kinds, args.inputs, args.seconds, args.processes, args.first)
    print(table(counts))
    return int(any(count.faults for count in counts.values()))


def run_one(kind: Kind, seed: int) -> Outcome:
    """An input in a folder of its own, which is deleted."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        return kind(Random(seed), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Count:
    """What became of the inputs of a kind."""

    accepted: int = 0
    refused: int = 0
    faults: int = 0
    slowest: float = 0.0  # seconds of processor time

    def add(self, outcome: Outcome, seconds: float) -> None:
        self.accepted += outcome.word == ACCEPTED
        self.refused += outcome.word == REFUSED
        self.faults += outcome.word == FAULT
        self.slowest = max(self.slowest, seconds)


def turns(
    kinds: Mapping[str, Kind], inputs: int, first: int, seldom: Mapping[str, int] = SELDOM
) -> Iterator[tuple[str, int]]:
    """The kinds in turns with the seeds of their inputs; those that are `seldom` come once in so many turns."""
    seed, last, turn = first, first + inputs, 0
    while seed < last:
        for name in kinds:
            if turn % (seldom.get(name, 1) if len(kinds) > 1 else 1) == 0 and seed < last:
                yield name, seed
                seed += 1
        turn += 1


@dataclass(eq=False)
class _Child:
    """A process that runs inputs one after the other."""

    kinds: Mapping[str, Kind]
    now: tuple[str, int] | None = None  # what it is busy with
    since: float = 0.0
    is_warm: bool = False

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(self.kinds)), daemon=True)
        self.process.start()
        theirs.close()
        self.connection, self.is_warm = ours, False

    def give(self, turn: tuple[str, int]) -> None:
        self.now, self.since = turn, time.monotonic()
        self.connection.send(turn)

    @property
    def is_late(self) -> bool:
        assert self.now is not None
        limit = max(PATIENCE_OF.get(self.now[0], PATIENCE), 0.0 if self.is_warm else FIRST_SECONDS)
        return time.monotonic() - self.since > limit

    def end(self, seconds: float) -> int | None:
        """Kill it after so many seconds; returns how it had ended by itself."""
        self.process.join(seconds)
        status = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        return status


def _serve(connection: Connection, kinds: Mapping[str, Kind]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C write there what they think of pictures
    while True:
        try:
            name, seed = connection.recv()
        except EOFError:
            return
        start = time.process_time()
        try:
            outcome = run_one(kinds[name], seed)
        except Exception as error:  # noqa: BLE001 - of who makes the input
            outcome = Outcome(FAULT, f"no input: {type(error).__name__}: {error}")
        connection.send((outcome, time.process_time() - start))


def run_all(kinds: Mapping[str, Kind], inputs: int, seconds: float, processes: int, first: int = 0) -> dict[str, Count]:
    """Run the turns until one of the limits; faults are printed as they come."""
    counts = {name: Count() for name in kinds}
    todo, stop = turns(kinds, inputs, first), time.monotonic() + seconds
    home = tempfile.mkdtemp(prefix="fuzzing-")
    before, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), home  # what killed children leave goes with it
    children = [_Child(kinds) for _ in range(processes)]
    try:
        while True:
            for child in children:
                turn = next(todo, None) if child.now is None and time.monotonic() < stop else None
                if turn is not None:
                    child.give(turn)
            busy = {child.connection: child for child in children if child.now}
            if not busy:
                return counts
            ready = {busy[end] for end in wait(list(busy), timeout=0.2) if isinstance(end, Connection)}
            for child in busy.values():
                if child in ready or child.is_late:
                    _note(counts, child)
    finally:
        for child in children:
            child.end(0)
        shutil.rmtree(home, ignore_errors=True)
        os.environ.pop("TMPDIR")
        os.environ |= {} if before is None else {"TMPDIR": before}


def _note(counts: dict[str, Count], child: _Child) -> None:
    """Take an answer, or put another child in the place of one that gives none."""
    assert child.now is not None
    (name, seed), child.now = child.now, None
    answers = child.connection.poll()
    try:
        if not answers:
            raise TimeoutError
        outcome, seconds = child.connection.recv()
        child.is_warm = True
    except (EOFError, OSError, TimeoutError):
        seconds = time.monotonic() - child.since
        status = child.end(5 if answers else 0)
        outcome = Outcome(FAULT, "a hang" if status is None else f"the process ended with {status}")
        child.start()
    if outcome.word != FAULT and child.is_warm and seconds > SECONDS:
        outcome = Outcome(FAULT, f"{seconds:.1f} s")
    counts[name].add(outcome, seconds)
    if outcome.word == FAULT:
        print(f"FAULT --only {name} --seed {seed}: {ascii(outcome.told)}", file=sys.stderr, flush=True)


def table(counts: Mapping[str, Count]) -> str:
    """A line for each kind, and one for all."""
    rows = [
        (name, c.accepted + c.refused + c.faults, c.accepted, c.refused, c.faults, f"{c.slowest:.2f}")
        for name, c in counts.items()
    ]
    total = (
        "all",
        *(sum(row[k] for row in rows) for k in range(1, 5)),
        f"{max(c.slowest for c in counts.values()):.2f}",
    )
    header = ("kind", "inputs", "accepted", "refused", "faults", "slowest s")
    return "\n".join("".join([f"{row[0]:<14}", *(f"{cell:>10}" for cell in row[1:])]) for row in (header, *rows, total))


if __name__ == "__main__":
    sys.exit(main())
