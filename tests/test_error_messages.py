"""Errors that a user meets first, as typed: one line, and what it proposes works."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from caches import make_cache
from conftest import make_course
from huggingface_hub import constants
from pairs import tiny_bert
from test_report import fast

from feats import ngrams_extract_feats, pixels_extract_feats, roberta_extract_feats, vader_extract_feats
from feats.command_line.commands import no_weights_lines, offline_commands
from feats.encoders.registry import ENCODERS
from feats.encoders.weights import unobtainable
from modeling import explain, finetune, inference_head, make_report, serve, train_head
from modeling.runs.listing import list_runs

QUICK = ("--device", "cpu", "--head", "mlp", "--D", "4", "--ep", "1", "--val-ratio", "0.3")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_course(tmp_path / "my data", 12, 4)
    return tmp_path


def one_line(capsys: pytest.CaptureFixture) -> str:
    said: str = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def encode(*more: str) -> None:
    common = ["--data", "my data", "--workers", "0", "--device", "cpu", *more]
    assert pixels_extract_feats.main([*common, "--size", "16"]) == 0
    assert ngrams_extract_feats.main([*common, "--hash-columns", "64"]) == 0


@pytest.mark.parametrize("name", [name for name in ENCODERS if ENCODERS[name].takes_weights])
@pytest.mark.parametrize("torch_hub", [False, True])
def test_remedies_fit_the_encoder(name: str, torch_hub: bool):
    given = {"data": "my data", "columns": ["text=a b"], "out": "o", "batch-size": 8, "name": "own"}
    error = unobtainable("it", ["here", "there"], torch_hub=torch_hub)
    lines = no_weights_lines(error, f"feats/{name}_extract_feats.py", given, offline_commands(name, given))
    assert lines[:3] == ["error: no weights for it; tried:", "  here", "  there"]
    commands = [line.strip() for line in lines if "_extract_feats.py" in line]
    firsts = {"image": "efficientnet", "text": "minilm"}
    sides = ENCODERS[name].sides
    assert (
        commands[0] == f"python feats/{firsts[sides[0]]}_extract_feats.py --data 'my data' --columns 'text=a b' --out o"
    )
    offline = [command for command in commands if f"/{name}_" not in command]
    of_sides = {"image": ["efficientnet", "pixels"], "text": ["minilm", "ngrams", "vader"]}
    assert {re.search(r"feats/(\w+)_extract", c)[1] for c in offline} == {
        other for side in sides for other in of_sides[side] if other != name
    }
    own = (
        f"python feats/{name}_extract_feats.py --data 'my data' --columns 'text=a b' --out o --batch-size 8 --name own"
    )
    assert f"{own} --weights PATH" in commands
    assert (f"TORCH_HOME=FOLDER {own}" in commands) == torch_hub
    assert (f"HF_HOME=FOLDER {own}" in commands) != torch_hub
    assert len(commands) == len(set(commands)) and all(command != own for command in commands)
    assert "\n" not in str(error) and "(2) there" in str(error)


@pytest.fixture
def nowhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on caches of a text encoder whose weights have moved to kept/, and no network."""
    weights = tiny_bert(home / "bert", layers=1)["weights"]
    encode = ["--data", "my data", "--weights", weights, "--workers", "0", "--device", "cpu"]
    assert roberta_extract_feats.main(encode) == 0
    assert train_head.main(["--vtype", "--ttype", "roberta", *QUICK]) == 0
    (home / "kept").mkdir()
    (home / "bert").rename(home / "kept" / "bert")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home


def helps(err: str) -> list[list[str]]:
    """The commands below what was tried, as words."""
    first, *rest = err[err.index("error: ") :].splitlines()
    assert first.startswith("error: no weights for ") and first.endswith("; tried:")
    at = rest.index("any of these commands helps:")
    assert at > 0 and all(line.startswith("  ") for line in [*rest[:at], *rest[at + 1 :]])
    return [shlex.split(line) for line in rest[at + 2 :: 2]]


@pytest.mark.parametrize(
    ("script", "typed"),
    [
        (explain, ["--text", "a fine day", "--device", "cpu"]),
        (inference_head, ["--text", "a fine day", "--device", "cpu", "--proba"]),
        (finetune, ["--tune", "last-1", "--ep", "1", "--bs", "4", "--device", "cpu", "--dtype", "fp32"]),
        (serve, ["--max-batch", "2", "--device", "cpu"]),
    ],
    ids=["explain", "inference_head", "finetune", "serve"],
)
def test_what_helps_where_a_run_s_weights_are_gone(nowhere: Path, capsys, monkeypatch, script, typed: list[str]):
    monkeypatch.setattr(sys, "argv", ["modeling/x.py", *typed])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    capsys.readouterr()
    assert script.main(typed) == 2
    [own, *others] = helps(capsys.readouterr().err)
    assert own[:2] == ["python", "modeling/x.py"] and own[-2:] == ["--weights", "roberta=PATH"]
    parser = script.build_parser()
    assert parser.parse_args(own[2:-2]).given == parser.parse_args(typed).given
    assert [words[0] for words in others] == ["HF_ENDPOINT=https://MIRROR", "HF_HOME=FOLDER"]
    assert all(words[1:] == own[:-2] for words in others)
    assert script.main([word.replace("PATH", "kept/bert") for word in own[2:]]) == 0


@pytest.mark.slow
def test_a_report_explains_pairs_with_weights_from_elsewhere(nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    pages = []
    for more in ([], ["--weights", "roberta=kept/bert"]):
        assert make_report.main(["--explain", "1", "--device", "cpu", "--out", "page.html", *more]) == 0
        pages.append((nowhere / "page.html").read_text(encoding="utf-8"))
    without, explained = (page.partition("<h2>Explanations</h2>")[2] for page in pages)
    assert without.startswith('\n<p class="note">No explanations, an encoder can&#39;t be had: no weights for ')
    assert "text/roberta: integrated-gradients" in explained.partition("<h2>")[0]


def test_what_helps_where_a_new_model_s_weights_are_nowhere(nowhere: Path, capsys, monkeypatch):
    typed = ["--data", "my data", "--image-encoder", "vit=nobody/has", "--text-encoder", "roberta", "--weights"]
    typed += ["roberta=kept/bert", "--ep", "1", "--val-ratio", "0.4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["modeling/finetune.py", *typed])
    capsys.readouterr()
    assert finetune.main(typed) == 2
    err = capsys.readouterr().err
    assert "error: no weights for nobody/has, the encoder of vit; tried:" in err
    offline, own, *_ = (finetune.build_parser().parse_args(words[2:]) for words in helps(err)[:2])
    assert (offline.image_encoder, offline.text_encoder) == ("efficientnet", "roberta")
    assert own.weights == ["roberta=kept/bert", "vit=PATH"] and own.image_encoder == "vit=nobody/has"


def test_training_without_clip_proposes_what_is_there(home: Path, capsys: pytest.CaptureFixture):
    encode("--splits", "train")
    capsys.readouterr()
    assert train_head.main([*QUICK]) == 2
    said = one_line(capsys)
    assert "make it with: python feats/clip_extract_feats.py --data 'my data' (" in said
    proposed = said.partition("Or take what is there: ")[2]
    assert proposed == "--vtype pixels --ttype ngrams\n"
    assert train_head.main([*shlex.split(proposed), *QUICK]) == 0


def test_the_command_for_a_missing_test_cache_makes_it(home: Path, capsys: pytest.CaptureFixture):
    encode("--splits", "train")
    assert train_head.main(["--vtype", "pixels", "--ttype", "ngrams", *QUICK]) == 0
    for script, setting in ((pixels_extract_feats, "--size 16"), (ngrams_extract_feats, "--hash-columns 64")):
        capsys.readouterr()
        assert inference_head.main(["--device", "cpu"]) == 2
        command = re.search(r"make it with: (.*) \(caches there", one_line(capsys))[1]
        assert f"--data 'my data' --splits test {setting}" in command and "Or take" not in command
        assert script.main([*shlex.split(command)[2:], "--workers", "0", "--device", "cpu"]) == 0
    assert inference_head.main(["--device", "cpu"]) == 0


def test_a_run_that_is_not_there(home: Path, capsys: pytest.CaptureFixture):
    make_cache(home / "saved" / "feats", "clip")
    assert train_head.main([*QUICK]) == 0
    [run] = list_runs(home / "saved" / "runs")
    capsys.readouterr()
    assert inference_head.main(["--run", run.name[:-1] + "x"]) == 2
    assert f"did you mean {run.name}?" in one_line(capsys)


@pytest.mark.parametrize(
    ("script", "typed", "said"),
    [
        (pixels_extract_feats, ["--data", "nowhere"], "name the data set's folder or file with --data"),
        (pixels_extract_feats, ["--data", "empty"], "empty is none of the known layouts. Found: an empty folder."),
        (ngrams_extract_feats, ["--data", "my data", "--splits", "tset"], "no split tset in the data; it has train, "),
        (ngrams_extract_feats, ["--data", "my data", "--views", "2"], "ngrams encodes no images; leave out --views"),
        (pixels_extract_feats, ["--text-clean", "none"], "pixels encodes no texts; leave out --text-clean"),
        (vader_extract_feats, ["--data", "my data", "--tokens"], "leave out --tokens"),
        (
            train_head,
            ["--vtype", "vader", "--ttype", "vader"],
            "vader can be --ttype only. For --vtype there are: clip",
        ),
    ],
)
def test_what_is_found_and_what_to_do(home: Path, capsys: pytest.CaptureFixture, script, typed: list[str], said: str):
    (home / "empty").mkdir()
    for name in ("clip", "vader"):
        make_cache(home / "saved" / "feats", name)
    assert script.main(typed) == 2
    assert said in one_line(capsys)
