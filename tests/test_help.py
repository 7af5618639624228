"""What --help says, and what it costs."""

import importlib
import re
import shlex
import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

import pytest

from feats.cli import extraction_parser
from feats.command_line.parser import ScriptParser
from feats.encoders.registry import ENCODERS, OFFLINE

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("feats", "modeling")
    for path in (ROOT / folder).glob("*.py")
    if "build_parser()" in path.read_text(encoding="utf-8")
)
MODULES = [".".join(path.with_suffix("").parts) for path in SCRIPTS]
HEAVY = ("torch", "transformers", "sklearn", "pandas", "matplotlib", "h5py")
each_script = pytest.mark.parametrize("module", MODULES)


def parser_of(module: str) -> ScriptParser:
    parser: ScriptParser = importlib.import_module(module).build_parser()
    return parser


def test_help_imports_nothing_heavy():
    code = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module).build_parser().format_help()
    found = [name for name in {HEAVY} if name in sys.modules]
    assert not found, (module, found)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(MODULES) > 25


@each_script
def test_two_examples_that_parse(module: str):
    parser = parser_of(module)
    assert len(parser.examples) == 2
    for example in parser.examples:
        python, script, *words = shlex.split(example)
        assert (python, script) == ("python", module.replace(".", "/") + ".py")
        parser.parse_args(words)
        assert f"\n  {example}\n" in parser.format_help()


@each_script
def test_no_python_in_help(module: str):
    text = " ".join(parser_of(module).format_help().split())
    assert not re.search(r"PosixPath|default: (None|False|True|\[|\(|\{)|==SUPPRESS==|<class|functools", text)


@pytest.mark.parametrize("name", ENCODERS)
def test_only_options_that_the_encoder_can_use(name: str):
    spec = ENCODERS[name]
    shown = {
        option for action in extraction_parser(name, None)._actions if action.help != SUPPRESS
        for option in action.option_strings
    }  # fmt: skip
    usable = {
        "--views": "image" in spec.sides,
        "--views-seed": "image" in spec.sides,
        "--resizer": "image" in spec.sides,
        "--text-clean": "text" in spec.sides,
        "--tokens": spec.tokens,
        "--weights": spec.takes_weights,
    }
    assert {option: option in shown for option in usable} == usable


@pytest.mark.parametrize("name", [name for names in OFFLINE.values() for name in names])
def test_what_the_registry_says_of_an_offline_encoder_is_so(name: str):
    from feats import UsageError, load_encoder

    spec = ENCODERS[name]
    encoder = load_encoder(name)
    assert spec.sides == tuple(side for side in ("image", "text") if getattr(encoder, side) is not None)
    for able, settings in ((spec.tokens, {"tokens": True}), (spec.takes_weights, {"weights": "x"})):
        try:
            load_encoder(name, **settings)
        except UsageError as error:
            assert able == ("leave out" not in str(error))
        else:
            assert able


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dropuot", "0.5"], "error: unrecognized arguments: --dropuot 0.5; did you mean --dropout? "),
        (["--folders", "x"], "error: unrecognized arguments: --folders x; did you mean --folds? "),
        (["--nothing-like-it"], "error: unrecognized arguments: --nothing-like-it; "),
        (["--lr", "abc"], "error: argument --lr: invalid float value: 'abc'; "),
    ],
)
def test_an_option_that_cannot_be_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("modeling.train_head").main(argv)
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(said) and out.err.endswith(" --help lists the options\n")
    assert out.err.count("\n") == 1
