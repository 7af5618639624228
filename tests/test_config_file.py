"""--config and --show-config: options from files, by every script."""

import importlib
import json
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from caches import make_cache
from conftest import ENVIRONMENT, ROOT, content, trained_with
from test_house import SCRIPTS, dotted

from feats import minilm_extract_feats, vader_extract_feats
from feats.command_line.options import data_place
from feats.command_line.parser import ScriptParser
from modeling import finetune, inference_head, sweep_heads, train_head
from modeling.experiments.fitting import fit_head
from modeling.features.loading import load_features
from modeling.features.splits import make_split
from modeling.runs.listing import list_runs

each_script = pytest.mark.parametrize("name", [dotted(path) for path in SCRIPTS])


def parser_of(name: str) -> ScriptParser:
    return importlib.import_module(name).build_parser()


def options_of(parser: ArgumentParser) -> list[Any]:
    own = ("-h", "--config", "--show-config", "--version", "--quiet", "--log-file")
    return [a for a in parser._actions if not set(own) & set(a.option_strings)]


def shown_name(action: Any) -> str:
    """Of several names the first, by which records hold the option."""
    return action.option_strings[0].lstrip("-") if action.option_strings else action.dest


def example(action: Any) -> Any:
    """Some value that isn't the default, as TOML text and as it arrives."""
    if action.nargs == 0:
        return "true", True
    choices = list(action.choices or ())
    kind = action.type or str
    paths = (Path, data_place)
    value = choices[-1] if choices else {int: 7, float: 0.25, str: "a b=\"ü'"}.get(kind, 3)
    value = "some/where" if kind in paths else value
    text = json.dumps(value, ensure_ascii=False)
    value = Path(value) if kind in paths else value
    return (f"[{text}, {text}]", [value, value]) if action.nargs in ("+", "*") else (text, value)


@each_script
def test_a_file_may_hold_every_option(name: str, tmp_path: Path):
    parser = parser_of(name)
    actions = options_of(parser)
    expected, lines = {}, []
    for k, action in enumerate(actions):
        key = action.option_strings[-1].lstrip("-") if action.option_strings else action.dest
        text, expected[action.dest] = example(action)
        lines.append(f"{key.replace('-', '_') if k % 2 else key} = {text}")
    (tmp_path / "all.toml").write_text("\n".join(lines), encoding="utf-8")
    found = parser.parse_args(["--config", str(tmp_path / "all.toml")])
    assert len(expected) > 1 and {dest: getattr(found, dest) for dest in expected} == expected
    assert json.loads(json.dumps(found.given)).keys() == {shown_name(action) for action in actions}


@each_script
def test_what_is_shown_is_read_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """All there is, and the same once more from its own file."""
    takes_files = ("feats.inspect_feats", "feats.export_feats", "feats.import_feats")
    words = ["x.h5"] if name in takes_files else ["--out", "x"] if name == "feats.export_texts" else []

    def shown(*typed: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parser_of(name).parse_args([*typed, "--show-config"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    text = shown(*words)
    for action in options_of(parser_of(name)):
        key = shown_name(action)
        assert any(line.startswith((f"{key} = ", f"# {key} isn't set")) for line in text.splitlines()), key
    path = tmp_path / "shown.toml"
    path.write_text(text, encoding="utf-8")
    assert tomllib.loads(text) and shown("--config", str(path)) == text


# -- trainings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip")
    return folder


def train(feats: Path, runs: Path, *more: str) -> Path:
    before = set(list_runs(runs))
    assert train_head.main([*more, "--feats", str(feats), "--runs", str(runs), "--device", "cpu"]) == 0
    [new] = set(list_runs(runs)) - before
    return new


def head(run: Path) -> bytes:
    return (run / "head.safetensors").read_bytes()


TYPED = ["--vtype", "clip", "--D", "8", "--ep", "3", "--lr", "1e-2", "--norm", "l2", "--seed", "7", "--recipe", "D"]


def test_a_run_s_config_repeats_its_training(feats: Path, tmp_path: Path):
    first = train(feats, tmp_path / "runs", *TYPED, "--balanced-sampler")
    options = content(first, "config")["options"]
    assert options == {
        "vtype": ["clip"],
        "D": 8,
        "ep": 3,
        "lr": 0.01,
        "norm": ["l2"],
        "seed": 7,
        "recipe": "D",
        "balanced-sampler": True,
        "feats": str(feats),
        "runs": str(tmp_path / "runs"),
        "device": "cpu",
    }
    again = tmp_path / "again"
    assert train_head.main(["--config", str(first / "config.json"), "--runs", str(again)]) == 0
    [second] = list_runs(again)
    assert head(second) == head(first) and content(second, "metrics") == content(first, "metrics")
    assert content(second, "config")["options"] == {**options, "runs": str(again)}
    other = train(feats, tmp_path / "other", "--config", str(first / "config.json"), "--seed", "8")
    assert head(other) != head(first) and trained_with(other)["seed"] == 8 and trained_with(other)["D"] == 8


@pytest.mark.parametrize("more", [[], ["--recipe", "E"], ["--head", "mlp", "--recipe", "own"], ["--folds", "3"]])
def test_a_shown_config_repeats_its_training(
    more: list[str], feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    typed = ["--feats", str(feats), "--D", "8", "--ep", "2", *more]
    with pytest.raises(SystemExit) as stopped:
        train_head.main([*typed, "--show-config"])
    assert stopped.value.code == 0 and not (tmp_path / "runs").exists()
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    first = train(feats, tmp_path / "runs", *typed)
    second = train(feats, tmp_path / "runs", "--config", str(tmp_path / "run.toml"))
    assert head(first) == head(second)
    assert content(first, "config")["members"] == content(second, "config")["members"]
    assert content(first, "split") == content(second, "split")


def test_recipes_and_defaults_are_shown(capsys: pytest.CaptureFixture):
    def shown(main: Any, *typed: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main([*typed, "--show-config"])
        return tomllib.loads(capsys.readouterr().out)

    found = shown(train_head.main, "--recipe", "E", "--lr", "0.5")
    assert (found["monitor"], found["bs"], found["val-ratio"], found["lr"]) == ("macro_f1", 16, 0.2, 0.5)
    assert (found["vtype"], found["D"], found["head"], found["ablation"]) == (["clip"], 256, "fusion", 0)
    by_alias = shown(train_head.main, "--epochs", "7", "--hidden", "8")
    assert (by_alias["ep"], by_alias["D"]) == (7, 8) and not {"epochs", "hidden"} & by_alias.keys()
    assert "lr" not in shown(train_head.main, "--head", "linear")  # which doesn't read it
    assert shown(train_head.main, "--ttype", "vader")["vtype"] == []
    assert "val-ratio" not in shown(train_head.main, "--folds", "3")
    own = shown(sweep_heads.main, "--head", "fusion", "late_512", "--recipe", "own")
    assert own["head"] == ["fusion", "late_512"] and own["seed"] == 42 and "bs" not in own
    assert "norm" not in shown(sweep_heads.main, "--auto") and "bs" not in shown(sweep_heads.main, "--auto")
    tuned = shown(finetune.main, "--model", "clip", "--recipe", "B")
    assert (tuned["D"], tuned["bs"], tuned["head"], tuned["val-ratio"]) == (512, 8, "clip_match", 0.1)
    assert "D" not in shown(finetune.main)  # a run has its own
    minilm = shown(minilm_extract_feats.main)
    assert (minilm["model"], minilm["text-clean"]) == ("all-MiniLM-L6-v2", "tweet")
    assert shown(vader_extract_feats.main)["text-clean"] == "none"
    assert "model" not in shown(minilm_extract_feats.main, "--weights", "somewhere")


def test_a_sweep_s_config_repeats_the_sweep(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    grid = ["--vtype", "clip", "--D", "4", "8", "--ep", "2", "--feats", str(feats), "--runs", str(tmp_path)]
    assert sweep_heads.main(grid) == 0
    config = list_runs(tmp_path / "sweep")[0] / "config.json"
    assert sweep_heads.main(["--config", str(config)]) == 0
    assert "2 trainings, 2 of them finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train_head.main(["--config", str(config)])
    assert stopped.value.code == 2 and "D has 2 values; --D takes one" in capsys.readouterr().err


def test_as_typed(feats: Path, tmp_path: Path):
    (tmp_path / "run.toml").write_text(
        f'feats = {json.dumps(str(feats))}\nvtype = "clip"\nD = 8\nep = 2\nruns = "runs"\n'
    )
    script = [sys.executable, str(ROOT / "modeling" / "train_head.py"), "--config", "run.toml", "--ep", "1"]
    out = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
    [run] = list_runs(tmp_path / "runs")
    assert content(run, "config")["options"]["ep"] == 1
    assert content(run, "config")["command"].endswith("train_head.py --config run.toml --ep 1")


def test_a_finetuning_keeps_its_options(tmp_path: Path):
    pytest.importorskip("peft")
    from pairs import cached_pairs

    weights = cached_pairs(tmp_path)
    folders = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert (
        train_head.main(
            ["--vtype", "vit", "--ttype", "roberta", "--D", "4", "--ep", "1", "--val-ratio", "0.25", *folders]
        )
        == 0
    )
    named = ["--weights", *(f"{name}={place}" for name, place in weights.items())]
    assert finetune.main([*folders, *named, "--ep", "1", "--bs", "12", "--tune", "head", "--name", "tuned"]) == 0
    options = content(tmp_path / "runs" / "tuned", "config")["options"]
    assert (options["tune"], options["bs"], len(options["weights"])) == ("head", 12, 2) and "lr" not in options


# -- what can't be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr = 1", r"lrr is no option of train_head.py; did you mean lr\?"),
        ("show-config = true", "show-config is no option"),
        ("config = 'x'", "config is no option"),
        ("lr = [1, 2]", "lr has 2 values; --lr takes one"),
        ("lr = 'fast'", "argument --lr: invalid float value: 'fast'"),
        ("ep = 1.5", "argument --ep/--epochs: invalid int value: '1.5'"),
        ("duplicates = 'x'", "argument --duplicates: invalid choice"),
        ("tensorboard = 1", "tensorboard = 1: expected true or false"),
        ("lr = true", "lr = True: expected a value, not true or false"),
        ("[lr]\nx = 1", "lr is .*; expected a string, a number, true, false, or a list"),
        ("lr = ", r"can't be read as options \(Invalid value.*; expected TOML"),
        (None, r"can't be read \(No such file or directory\)"),
    ],
)
def test_one_line_says_what_a_file_can_t_hold(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import re

    monkeypatch.setattr(sys, "argv", ["train_head.py"])
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        train_head.main(["--config", str(tmp_path / "x.toml")])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and re.search(message, line) and "x.toml" in line


def test_a_run_from_python_has_no_options(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = load_features(feats, "train", "clip", "clip")
    fit_head(data, make_split(data), D=4, ep=1).save(tmp_path / "mine")
    (tmp_path / "list.json").write_text("[]")
    for path, message in (
        (tmp_path / "mine" / "config.json", "is of a run made from Python"),
        (tmp_path / "list.json", "isn't the config.json of a run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_head.main(["--config", str(path)])
        [line] = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and message in line


def test_another_script_s_run_is_named(feats: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = train(feats, tmp_path, *TYPED)
    config = content(run, "config")
    config["command"] = "python modeling/train_head.py --D 8"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        inference_head.main(["--config", str(run / "config.json")])
    assert "(the run was made by modeling/train_head.py)" in capsys.readouterr().err


def test_typed_positional_ones_stand_in_the_file_s_place(tmp_path: Path):
    (tmp_path / "x.toml").write_text('files = ["a.h5", "b.h5"]\nverify = true')
    typed = ["--config", str(tmp_path / "x.toml")]
    found = parser_of("feats.inspect_feats").parse_args(typed)
    assert found.files == [Path("a.h5"), Path("b.h5")] and found.verify
    assert found.given == {"files": ["a.h5", "b.h5"], "verify": True}
    assert parser_of("feats.inspect_feats").parse_args([*typed, "c.h5"]).files == [Path("c.h5")]


def test_a_list_of_the_file_takes_in_no_typed_word(tmp_path: Path):
    (tmp_path / "x.toml").write_text("numbers = [1, 2]")
    parser = ScriptParser("")
    parser.add_argument("table")
    parser.add_argument("--numbers", nargs="+", type=int)
    found = parser.parse_args(["table", "--config", str(tmp_path / "x.toml")])
    assert (found.table, found.numbers) == ("table", [1, 2])
