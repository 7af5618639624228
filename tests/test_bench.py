"""The table of all benchmarks: of given figures, of a benchmark made up here, and of a real one as a user types it."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

bench = import_module("tests.bench.__main__")
limits = import_module("limits")  # found once the runner is imported

FACTS = {
    "cpu": "A Processor With A Very Long Name Indeed, Of Many Words",
    "cores": 2,
    "gpu": None,
    "torch": "2.14.1",
    "threads": 1,
    "load": 0.5,
    "pairs": "synthetic",
    "quick": True,
}
TINY = """
from limits import Figure

def measure(settings):
    assert settings.work.is_dir() and settings.quick and settings.data is None
    return [Figure("one / other", [3.0, 1.0, 2.0], "bytes", note="made up")]
"""


def test_figures_are_medians_and_quartiles():
    figure = limits.Figure("a / b", [4.0, 1.0, 2.0, 3.0, 100.0], "bytes")
    assert (figure.median, figure.quartiles) == (3.0, (2.0, 4.0))
    assert limits.Figure("a / b", [2.0], "bytes").quartiles == (2.0, 2.0)
    assert limits.ratios({"a": [2.0, 9.0], "b": [4.0, 3.0]}, "a", "b") == [0.5, 3.0]


def test_a_table_of_given_figures():
    figures = {
        "extract": [limits.Figure("end to end / slower of encoder, decode", [0.9, 0.92, 0.96], "JPEG decode")],
        "heads": [
            limits.Figure("training / usual loop", [9.994, 12.0, 31.04], "import"),
            limits.Figure("sweep / usual loops", [123.4], "FLOPs"),
        ],
    }
    lines = bench.table(FACTS, figures).splitlines()
    assert lines == [
        "A Processor With A Very Long Name , 2 cores, no GPU",
        "torch 2.14.1, 1 threads, synthetic pairs, quick, load 0.5 at the end",
        "",
        "          ratio                                  median quartiles  n limit",
        "extract   end to end / slower of encoder, decode   0.92 0.91-0.94  3 JPEG decode",
        "heads     training / usual loop                    12.0 11.0-21.5  3 import",
        "heads     sweep / usual loops                       123   123-123  1 FLOPs",
    ]
    assert max(map(len, lines)) <= 80


def test_every_benchmark_is_found_and_has_a_door():
    found = bench.benchmarks()
    assert {"extract", "heads", "finetune"} <= found.keys() and "limits" not in found.values()
    for module in found.values():
        assert callable(bench.module_of(next(name for name, value in found.items() if value == module)).measure)


def test_the_runner_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "bench_tiny.py").write_text(TINY)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(limits, "REAL", tmp_path / "nowhere")
    out = tmp_path / "new" / "x.json"
    assert bench.main(["tiny", "--quick", "--device", "cpu", "--json", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == "tiny one / other 2.00 1.50-2.50 3 bytes".split()
    told = json.loads(out.read_text())
    assert told["figures"] == [
        {
            "benchmark": "tiny",
            "name": "one / other",
            "unit": "x",
            "median": 2.0,
            "quartiles": [1.5, 2.5],
            "samples": [3.0, 1.0, 2.0],
            "limit": "bytes",
            "note": "made up",
        }
    ]
    assert told["hardware"]["torch"] == torch.__version__ and told["hardware"]["pairs"] == "synthetic"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "no benchmark nonsense; there are "), (["--data", "nowhere"], "no folder nowhere; give one")],
)
def test_unusable_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_user_types_it(tmp_path: Path):
    environment = {**ENVIRONMENT, "MVSA_SINGLE": str(tmp_path / "nowhere")}
    out = tmp_path / "x.json"
    command = [sys.executable, "-m", "tests.bench", "finetune", "--quick", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert {figure["benchmark"] for figure in told["figures"]} == {"finetune"} and len(told["figures"]) == 2
    assert all(0 < sample < 100 for figure in told["figures"] for sample in figure["samples"])
    assert told["hardware"]["threads"] == 1 and told["hardware"]["pairs"] == "synthetic"
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and "epoch: live / cached trunk" in lines[-1]
