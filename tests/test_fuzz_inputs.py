"""Hostile data sets by the seed: every kind of tests/fuzzing, a few inputs each; at length by `python -m tests.bench.fuzz`."""

from importlib import import_module
from pathlib import Path
from random import Random

import pytest

from feats.errors import UsageError
from tests.fuzzing.outcomes import ACCEPTED, CANARY, FAULT, OUTPUTS, REFUSED, Outcome, expect, judged, made
from tests.fuzzing.pictures import PARTS, picture
from tests.fuzzing.registry import KINDS, SELDOM

fuzz = import_module("tests.bench.fuzz")
FEW = 12  # inputs of a kind
FIRST = 1_000_000


def run(name: str, folder: Path, seeds: range) -> dict[str, int]:
    """How many inputs ended how; a fault ends the test with the seed that repeats it."""
    counts = dict.fromkeys((ACCEPTED, REFUSED), 0)
    for seed in seeds:
        outcome = KINDS[name](Random(seed), folder / str(seed))
        assert outcome.word != FAULT, f"--only {name} --seed {seed}: {outcome.told}"
        counts[outcome.word] += 1
    return counts


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"process"}))
def test_hostile_inputs_are_read_or_refused(tmp_path: Path, name: str):
    few = FEW // 4 if name in SELDOM else FEW
    assert sum(run(name, tmp_path, range(FIRST, FIRST + few)).values()) == few


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
def test_more_hostile_inputs(tmp_path: Path, name: str):
    more = {"process": 1, "command": 10}.get(name, 60)
    counts = run(name, tmp_path, range(2 * FIRST, 2 * FIRST + more))
    if name not in SELDOM:
        assert counts[ACCEPTED]  # hostile, yet near what is usual
        assert bool(counts[REFUSED]) == (name != "cleaning")  # which takes any text


# -- the judge ---------------------------------------------------------------------------------------------------


def refuse() -> None:
    raise UsageError("nothing of use")


def raise_another() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("act", "word"),
    [(lambda: None, ACCEPTED), (refuse, REFUSED), (raise_another, FAULT), (lambda: expect(False, "wrong"), FAULT)],
    ids=["accepted", "refused", "traceback", "wrong"],
)
def test_outcomes(tmp_path: Path, act: object, word: str):
    made(Random(0), tmp_path / "a")
    assert judged(tmp_path / "a", act).word == word


@pytest.mark.parametrize("place", [CANARY, "in/new", "in/old", "bait.txt"])
def test_a_file_outside_the_output_folder_is_a_fault(tmp_path: Path, place: str):
    home = made(Random(0), tmp_path / "a")
    (home / "old").write_text("x")
    assert judged(tmp_path / "a", lambda: (tmp_path / "a" / OUTPUTS / "new").write_text("y")).word == ACCEPTED
    outcome = judged(tmp_path / "a", lambda: (tmp_path / "a" / place).write_text("y"))
    assert outcome.word == FAULT and place in outcome.told


@pytest.mark.parametrize("kind", PARTS)
def test_pictures_are_made_of_their_parts(kind: str):
    for seed in range(10):
        data = picture(Random(seed), kind)
        parts = PARTS[kind](data)
        assert b"".join(parts) == data and len(parts) >= 3


# -- the runner --------------------------------------------------------------------------------------------------


def test_kinds_come_in_turns():
    kinds = dict.fromkeys("abc", None)
    found = list(fuzz.turns(kinds, 7, 100, {"b": 2}))
    assert found == list(zip("abcacab", range(100, 107), strict=True))
    assert list(fuzz.turns({"b": None}, 2, 0, {"b": 2})) == [("b", 0), ("b", 1)]


def accepting(rng: Random, folder: Path) -> Outcome:
    return Outcome(ACCEPTED)


def crashing(rng: Random, folder: Path) -> Outcome:
    import os

    os._exit(5)


def endless(rng: Random, folder: Path) -> Outcome:
    while True:
        pass


def raising(rng: Random, folder: Path) -> Outcome:
    raise ValueError("no input")


@pytest.mark.slow
def test_hangs_and_crashes_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(fuzz, "PATIENCE", 1.0)
    kinds = {"well": accepting, "crash": crashing, "raise": raising, "hang": endless}
    counts = fuzz.run_all(kinds, 4, 60.0, 1)
    assert [(count.accepted, count.faults) for count in counts.values()] == [(1, 0), (0, 1), (0, 1), (0, 1)]
    said = capsys.readouterr().err
    assert "--only hang --seed 3: 'a hang'" in said and "--only crash --seed 1: 'the process ended with 5'" in said
    assert fuzz.table(counts).splitlines()[-1].split()[:5] == ["all", "4", "1", "0", "3"]


def test_an_input_is_repeated_by_its_seed(capsys: pytest.CaptureFixture[str]):
    assert fuzz.main(["--only", "gif", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert fuzz.main(["--only", "gif", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first and first.startswith("gif Outcome(")
