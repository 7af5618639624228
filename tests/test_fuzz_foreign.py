"""Damaged and forged files, and absurd settings, by every door: accepted, or refused in one line. More of them with
FUZZ_FOREIGN=<inputs of each kind>, or at length by `python -m tests.bench.fuzz_foreign`."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from caches import make_cache

from feats import pixels_extract_feats, resnet_extract_feats
from modeling import finetune, sweep_heads, train_head

fuzz = import_module("tests.bench.fuzz_foreign")

INPUTS = int(os.environ.get("FUZZ_FOREIGN", "16"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 60)  # a busy machine is no hang
        patch.setattr(fuzz, "IMPORTED", ())
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield fuzz.begin(tmp_path_factory.mktemp("fuzz") / "top")
        fuzz.own.clear()


def outcomes(kind: str, first: int, count: int, place: fuzz.Place) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in range(first, first + count):
        outcome, said = fuzz.attempt(kind, number, place)
        assert outcome not in fuzz.BAD, f"{kind} {number}: {outcome}\n{said}"
        counts[outcome] += 1
    return counts


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_input_is_accepted_or_refused_in_one_line(kind: str, place: fuzz.Place):
    counts = outcomes(kind, 0, INPUTS, place)
    assert counts[fuzz.REFUSED] >= 3 or INPUTS < 10  # the damage is some


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_many_inputs(kind: str, place: fuzz.Place):
    outcomes(kind, 1000, 80, place)


# -- the fuzzer itself sees what it should ----------------------------------------------------------------------


def test_it_sees_tracebacks_hangs_files_and_processes(place: fuzz.Place, monkeypatch: pytest.MonkeyPatch):
    def fails(rng, where):
        raise KeyError("x")

    def two_lines(rng, where):
        raise fuzz.UsageError("a\nb")

    def hangs(rng, where):
        while True:
            pass

    def writes(rng, where):
        (where.given / "x").write_text("x")

    def runs(rng, where):
        os.system("true")

    def unpickles(rng, where):
        (where.work / "executed").touch()

    def writes_its_own(rng, where):
        (where.out / "x").write_text("x")

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    expected = {fails: fuzz.TRACEBACK, two_lines: fuzz.TRACEBACK, hangs: fuzz.HANG, writes: fuzz.OUTSIDE}
    expected |= {runs: fuzz.EXECUTED, unpickles: fuzz.EXECUTED, writes_its_own: fuzz.ACCEPTED}
    for one, outcome in expected.items():
        monkeypatch.setitem(fuzz.KINDS, "made up", one)
        assert fuzz.attempt("made up", 0, place)[0] == outcome, one.__name__


def test_a_process_that_dies_is_seen_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    def dies(rng, where):
        if rng.random() < 0.5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fuzz, "make_given", lambda folder: None)
    monkeypatch.setattr(fuzz, "IMPORTED", ())
    monkeypatch.setitem(fuzz.KINDS, "made up", dies)
    result = fuzz.fuzz([("made up", number) for number in range(6)])
    counts = result.counts["made up"]
    assert counts[fuzz.CRASH] + counts[fuzz.ACCEPTED] == 6 and counts[fuzz.CRASH] >= 1 and counts[fuzz.ACCEPTED] >= 1
    assert [finding[2] for finding in result.findings] == [fuzz.CRASH] * counts[fuzz.CRASH]
    assert "crash" in fuzz.table(result)


# -- found by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--D", "10000000000"], "at most 65536"),
        (["--class-weights", "positive=1e308"], "class weight 1e+308 of positive: expected 1e-06 to 1e+06"),
        (["--bs", "1" + "0" * 30], "--bs 1000000000000000000000000000000: expected 1 or more, and at most"),
        (["--ep", "1" + "0" * 30], "--ep 1000000000000000000000000000000: expected 1 or more, and at most"),
        (["--layers", "1000000", "--head", "gated_transformer"], "--layers 1000000: expected 1 or more, and at most"),
        (["--seeds", "10000000000"], "--seeds 10000000000: expected 1 or more, and at most"),
        (["--lr", "nan"], "expected lr > 0"),
        (["--lr", "1e308"], "use a smaller --lr"),
        (["--weight-decay", "1e308"], "the loss of fusion became nan"),
        (["--seed", "9223372036854775808"], "expected 0 to 2^63 - 1"),
    ],
)
def test_absurd_settings(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip", 40)
    common = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--ep", "1", "--vtype", "clip"]
    assert train_head.main([*common, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "runs").exists()


def test_a_long_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip", 40)
    common = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs")]
    for main in (sweep_heads.main, finetune.main):
        assert main([*common, "--name", "x" * 300]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "300 bytes" in line
    assert not (tmp_path / "runs").exists()


def test_weights_of_three_bytes_and_too_many_views(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02.")
    common = ["--data", str(course), "--out", str(tmp_path / "feats")]
    for main, words, message in (
        (resnet_extract_feats.main, ["--weights", str(tmp_path / "weights.pth")], "can't be read as tensors"),
        (pixels_extract_feats.main, ["--views", "10000000000"], "--views 10000000000: expected"),
    ):
        assert main([*common, *words]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "feats").exists()
