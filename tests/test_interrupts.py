"""Ctrl-C wherever it comes: see also tests/test_cli_extract.py and tests/test_workers.py."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from feats.interrupts import held_back, interruptible

pytestmark = pytest.mark.usefixtures("in_foreground")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_raised_once(number: signal.Signals):
    with pytest.raises(KeyboardInterrupt), interruptible(signal.SIGINT, signal.SIGTERM):
        try:
            signal.raise_signal(number)
        finally:
            now = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert now == [signal.SIG_DFL, signal.SIG_DFL]  # the next one ends the process
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts background jobs
    with interruptible(signal.SIGINT, signal.SIGTERM), held_back():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits(number: signal.Signals):
    done = []
    with interruptible(signal.SIGINT, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        with held_back():
            signal.raise_signal(number)
            done.append("what mustn't be cut in two")
        done.append("never")
    assert done == ["what mustn't be cut in two"]


def test_an_interruption_waits_for_an_error_too():
    with interruptible(signal.SIGINT), pytest.raises(KeyboardInterrupt) as caught, held_back():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_an_interruption_that_a_finalizer_swallows_is_raised_behind_it(capfd: pytest.CaptureFixture):
    class Left:
        def __del__(self) -> None:
            if not done:
                done.append("finalized")
                signal.raise_signal(signal.SIGINT)

    done: list[str] = []
    with interruptible(signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            Left()
            time.sleep(60)
            done.append("never")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert done == ["finalized"] and capfd.readouterr().err == ""


def test_one_swallowed_at_the_very_end_comes_too_late():
    class Left:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with suppress(KeyboardInterrupt), interruptible(signal.SIGINT):
        Left()
    time.sleep(0.1)  # here nobody would expect it


@pytest.mark.parametrize(
    "moment",
    [
        "with interruptible(signal.SIGINT):\n  try: signal.raise_signal(signal.SIGINT)\n"
        "  finally: signal.raise_signal(signal.SIGINT)",
        "import atexit; atexit.register(signal.raise_signal, signal.SIGINT)\nwith interruptible(signal.SIGINT): pass",
    ],
    ids=["a second time", "while Python shuts down"],
)
def test_later_ones_end_the_process_at_once_and_silently(moment: str):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from feats.interrupts import interruptible\n{moment}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


# -- while libraries are imported ---------------------------------------------------------------------------------

SCRIPTS = sorted([*ROOT.glob("feats/*_feats.py"), ROOT / "feats/export_texts.py"]) + sorted(
    path for path in ROOT.glob("modeling/*.py") if "def build_parser" in path.read_text(encoding="utf-8")
)
# Ctrl-C when the module is first asked for, by whoever does so.
STARTED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
path, module, *sys.argv[1:] = sys.argv[1:]
left = [module]
def pressed(event, told):
    if event == "import" and told[0] in left:
        left.clear()
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(pressed)
sys.argv[0] = path
if path == "mmprobe":
    from modeling.console import main
    sys.exit(main())
runpy.run_path(path, run_name="__main__")
"""


def interrupted_at(script: Path | str, module: str, *words: str) -> None:
    command = [sys.executable, "-c", STARTED, str(script), module, *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (ended.returncode, ended.stdout) == (130, ""), ended
    assert ended.stderr.startswith("interrupted") and len(ended.stderr.splitlines()) == 1, ended


@pytest.mark.parametrize("module", ["argparse", "feats.command_line.parser", "feats.errors"])
def test_ctrl_c_while_libraries_are_imported(module: str):
    interrupted_at(ROOT / "modeling/train_head.py", module)


def test_ctrl_c_while_mmprobe_finds_its_command():
    interrupted_at("mmprobe", "feats.command_line.parser", "train")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_ctrl_c_while_any_script_starts(script: Path):
    interrupted_at(script, "feats.command_line.exit_status")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["numpy", "torch", "torch.nn", "h5py"])
def test_ctrl_c_within_the_heavy_libraries(module: str, tmp_path: Path):
    words = ["--feats", str(tmp_path), "--runs", str(tmp_path)]
    interrupted_at("mmprobe", module, "train", *words)
    interrupted_at(ROOT / "modeling/sweep_heads.py", module, *words)
