"""The README: its commands parse, its options and links exist, its first script runs as written."""

import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, make_course
from test_help import MODULES, parser_of

from modeling.console import COMMANDS
from modeling.runs.folder import load_run

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCE.findall(README)
PROSE = FENCE.sub("", README)
# Of other programs: pip, pytest, ruff, SLURM, torchrun, and `python -m tests.bench`.
FOREIGN = {
    *("--check", "--array", "--gpus-per-task", "--nproc-per-node", "--nnodes", "--rdzv-endpoint"),
    *("--study-models", "--quick", "--json"),
}


def commands() -> list[str]:
    """Every command line of this project in the README, in blocks (not in what they print) and in the text."""
    lines = [line for kind, block in BLOCKS if kind not in ("text", "python") for line in block.splitlines()]
    parts = [part for line in [*lines, *re.findall(r"`([^`\n]+)`", PROSE)] for part in line.split(" && ")]
    return [part for part in parts if part.startswith(("python ", "torchrun ", "mmprobe ")) and parsed(part)]


def parsed(command: str) -> tuple[str, list[str]] | None:
    """The module of a command line and its arguments; None for that of another program, or a name alone."""
    words = shlex.split(re.split(r" [<>|] ", command)[0], comments=True)
    if words[0] == "mmprobe":
        if len(words) == 1 or words[1].startswith("--"):
            return None
        if words[1] == "extract":
            return f"feats.{words[2]}_extract_feats", words[3:]
        return COMMANDS[words[1]], words[2:]
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(feats|modeling)/\w+\.py", word)]
    if not scripts:
        return None
    return words[scripts[0]].removesuffix(".py").replace("/", "."), words[scripts[0] + 1 :]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_parses(command: str):
    found = parsed(command)
    assert found is not None
    module, words = found
    if "--config" in words:  # of a file that isn't there
        at = words.index("--config")
        del words[at : at + 2]
    parser_of(module).parse_args([word for word in words if word not in ("…", "...", "--show-config")])


def test_commands_are_found():
    modules = {found[0] for command in commands() if (found := parsed(command))}
    assert set(MODULES) <= modules, "a script that the README shows no command of"


def test_every_option_named_is_some_script_s():
    known = {option for module in MODULES for option in options(parser_of(module))}
    for bench in (ROOT / "tests" / "bench").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', bench.read_text(encoding="utf-8")))
    shown = "\n".join([PROSE, *(block for kind, block in BLOCKS if kind != "text")])
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown, re.IGNORECASE))
    assert named - known - FOREIGN == set()


def options(parser: ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_link_leads_somewhere():
    titles = re.findall(r"^#{1,4} (.+)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert len(anchors) == len(titles), "two sections of one name"
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).is_file(), target


def test_what_commands_print_fits_a_terminal():
    for kind, block in BLOCKS:
        assert kind != "text" or max(map(len, block.splitlines())) <= 80, block


def test_the_layout_names_every_room():
    layout = next(block for _, block in BLOCKS if block.startswith("data/ "))
    for house in ("feats", "modeling"):
        for room in (ROOT / house).glob("*/__init__.py"):
            assert f"\n  {room.parent.name}/ " in layout, room.parent


@pytest.mark.slow
def test_the_first_script_runs_as_written(tmp_path: Path):
    script = next(block for kind, block in BLOCKS if kind == "python" and block.startswith("from pathlib"))
    (tmp_path / "first.py").write_text(script, encoding="utf-8")
    make_course(tmp_path / "data" / "sample", 30, test_rows=4)
    command = [sys.executable, "first.py"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^accuracy \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) on \d+ validation rows$", done.stdout, re.M)
    header, *rows = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert header == "guid,tag" and [row.split(",")[0] for row in rows] == ["30", "31", "32", "33"]
    assert load_run(tmp_path / "saved" / "runs" / "first").classes
    script = [sys.executable, str(ROOT / "feats" / "minilm_extract_feats.py"), "--data", "data/sample"]
    again = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0 and "minilm_train: 30 rows done" in again.stdout, again.stderr
    assert again.stdout.count("; 0 encoded now") == 2  # the same cache as the script's
