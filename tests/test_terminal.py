"""What a terminal and a pipe show: tables of 80 columns, no bars in pipes, --quiet, --log-file, --version, long names."""

import importlib
import io
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from caches import light_course
from conftest import ROOT, trained_with
from test_house import SCRIPTS, dotted

from feats import inspect_feats, terminal
from modeling import (
    audit_labels,
    bad_cases,
    inference_head,
    learning_curve,
    reproduce,
    sweep_heads,
    train_head,
)
from modeling.evaluation.text_tables import confusion_text, format_table
from modeling.runs.listing import newest_run

# Beside these scripts the package has functions of their names.
compare_runs, list_runs = map(importlib.import_module, ("modeling.compare_runs", "modeling.list_runs"))
RULE = re.compile(r"^---+(  ---+)*$", re.M)
SIDES = ["--vtype", "pixels", "--ttype", "vader"]
SHORT = [*SIDES, "--val-ratio", "0.25", "--ep", "2", "--D", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course set with its caches and one run."""
    return light_course(tmp_path_factory.mktemp("course"))


@pytest.fixture
def at_course(course: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(course)
    return course


# -- tables -----------------------------------------------------------------------------------------------------


def widest(table: str) -> int:
    return max(map(len, table.splitlines()))


def test_a_table_says_once_what_is_the_same_and_leaves_out_what_is_empty():
    rows = [{"head": h, "D": 256, "lr": lr, "gain": None} for h, lr in zip("abc", (0.1, 0.2, 0.3))]
    assert format_table(rows, ["head", "D", "lr", "gain"], digits=1).splitlines() == [
        "all: D 256",
        "head   lr",
        "----  ---",
        "a     0.1",
        "b     0.2",
        "c     0.3",
    ]
    assert "gain" in format_table(rows, ["head", "D", "lr", "gain"], markdown=True)
    assert "D" in format_table(rows[:2], ["head", "D", "lr"]), "two rows may agree by chance"


@pytest.mark.parametrize("width", [40, 80])
def test_any_table_fits_and_loses_nothing(width: int):
    names = [f"weighted_figure_{k}" for k in range(12)]
    rows = [
        {"head": f"h{i}", "text": "word " * 30 + f"end{i}", **{n: i + k / 7 for k, n in enumerate(names)}}
        for i in range(4)
    ]
    table = format_table(rows, ["head", "text", *names], width=width)
    assert widest(table) <= width
    for i in range(4):
        assert f"end{i}" in table and all(f"{i + k / 7:.3f}" in table for k in range(12))
    assert len(re.findall(r"^head", table, re.M)) == len(RULE.findall(table)) > 1, "each block names its rows"


def test_headings_break_before_columns_go_below():
    rows = [{"head": "a", **{f"weighted_figure_{k}": k / 7 for k in range(6)}} for _ in range(2)]
    table = format_table(rows, list(rows[0]))
    assert len(RULE.findall(table)) == 1 and widest(table) <= 80


def test_many_classes_show_what_is_most_often_confused():
    classes = [f"class number {k}" for k in range(20)]
    confusion = [[50 if i == j else 0 for j in range(20)] for i in range(20)]
    confusion[3][7], confusion[7][3] = 30, 10
    table = confusion_text(confusion, classes)
    first, second = table.splitlines()[2:]
    assert first.split("  ")[:2] == ["class number 3", "class number 7"] and first.endswith("38%"), "30 of 80"
    assert second.startswith("class number 7") and widest(table) <= 80
    few = confusion_text([[3, 1], [0, 2]], ["no", "yes"])
    assert [line.split() for line in few.splitlines()[2:]] == [["no", "3", "1"], ["yes", "0", "2"]]


FOLDERS = ["--feats", "feats", "--runs", "runs", "--device", "cpu"]
SHOWN = {
    "train_head": (
        train_head,
        [*FOLDERS, *SHORT, "--seeds", "2", "--test-ratio", "0.25", "--ablation-eval", "--runs", "other"],
    ),
    "sweep_heads": (
        sweep_heads,
        [
            *FOLDERS,
            *SHORT,
            "--head",
            "concat",
            "linear",
            "--ablation",
            "0",
            "1",
            "2",
            "--lr",
            "1e-2",
            "1e-3",
            "--seeds",
            "2",
        ],
    ),
    "sweep_heads --auto": (
        sweep_heads,
        [*FOLDERS, *SIDES, "--val-ratio", "0.25", "--auto", "--head", "linear", "--runs", "other"],
    ),
    "inference_head": (inference_head, [*FOLDERS, "--split", "train", "--out", "p.csv"]),
    "inference_head --ablation-eval": (inference_head, [*FOLDERS, "--ablation-eval"]),
    "bad_cases": (bad_cases, [*FOLDERS, "--folds", "3"]),
    "audit_labels": (audit_labels, [*FOLDERS, "--folds", "3"]),
    "learning_curve": (learning_curve, [*FOLDERS, "--shares", "0.8", "--draws", "2"]),
    "compare_runs": (compare_runs, ["--runs", "runs"]),
    "list_runs": (list_runs, ["--runs", "runs"]),
    "reproduce": (
        reproduce,
        [*FOLDERS[:-2], *SIDES, "--device", "cpu", "--seeds", "1", "--runs", "other", "E-ablation"],
    ),
    "inspect_feats": (inspect_feats, ["feats/vader_train.h5"]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_table_of_every_script_fits(name: str, at_course: Path, capfd: pytest.CaptureFixture):
    script, arguments = SHOWN[name]
    assert script.main(arguments) == 0
    out, err = capfd.readouterr()
    rules = [found[0] for found in RULE.finditer(out)]
    assert rules or name == "inspect_feats"
    assert all(len(rule) <= 80 for rule in rules), max(rules, key=len)
    assert "\r" not in out + err, "a bar in a pipe"
    assert not [line for line in out.splitlines() if line.startswith(("note:", "warning:"))]


# -- progress ---------------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 0.0)
    with terminal.progress("train", 100, "epoch", weight=1000.0) as shown:
        monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
        for _ in range(8):
            shown.add(5, 100.0, "fusion")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "\r" not in err and 1 <= len(lines) < 8
    share, steps, head = re.fullmatch(r"train: (\d+)%, (\d+) of 100 epochs, (\w+).* left", lines[0]).groups()
    assert head == "fusion" and int(share) == 2 * int(steps), "time left goes by weights"


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with terminal.progress("train", 10, "epoch") as shown:
        shown.add(5, now="fusion")
        shown.bar.refresh()
    text = terminal.sys.stderr.getvalue()
    assert "\rtrain:  50%" in text and "5 of 10 epochs, fusion" in text


def test_a_sweep_s_bar_names_heads_and_ends_at_its_weight(at_course: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[tuple[float, str]] = []
    add = terminal.Progress.add

    def heard(self: terminal.Progress, *given: object) -> None:
        add(self, *given)
        told.append((self.weighed / self.weight, self.now))

    monkeypatch.setattr(terminal.Progress, "add", heard)
    grid = ["--head", "concat", "linear", "--lr", "1e-2", "2e-2", "--name", "bars"]
    assert sweep_heads.main([*FOLDERS, *SHORT, *grid]) == 0
    assert {name for _, name in told} == {"concat", "linear"} and told[-1][0] == pytest.approx(1)


# -- messages ---------------------------------------------------------------------------------------------------

OF_PARSER = [path for path in SCRIPTS if path.is_relative_to(ROOT / "feats") or path.is_relative_to(ROOT / "modeling")]


@pytest.mark.parametrize("path", OF_PARSER, ids=dotted)
def test_every_script_tells_its_versions_and_knows_the_options_of_messages(path: Path, capsys: pytest.CaptureFixture):
    script = importlib.import_module(dotted(path))
    with pytest.raises(SystemExit) as stopped:
        script.main(["--version"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and out.count("\n") == 1
    assert f"torch {version('torch')}" in out and re.match(r"multimodal-feature-probe \d+\.\d+", out)
    options = {option for action in script.build_parser()._actions for option in action.option_strings}
    assert {"--quiet", "--log-file", "--version"} <= options


def test_quiet_leaves_results_and_errors(at_course: Path, capsys: pytest.CaptureFixture):
    noted = [*FOLDERS, *SHORT, "--head", "linear", "--runs", "other"]
    assert train_head.main(noted) == 0
    usual = capsys.readouterr()
    assert "note: --ep, --D do nothing for linear" in usual.err and "\nleaks:" in usual.out
    assert train_head.main([*noted, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert not quiet.err and "leaks:" not in quiet.out and "macro_f1" in quiet.out and " -> other/" in quiet.out
    assert train_head.main([*FOLDERS, "--vtype", "nosuch", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert train_head.main(noted) == 0
    assert "note:" in capsys.readouterr().err, "quiet outlives its command"


def test_an_error_of_several_lines_is_shown_whole_under_quiet():
    shown = io.StringIO()
    stream = terminal._Stream(shown, None, errors_only=True)
    for text in ("warning: a\n  more\n", "error: b\n  tri", "ed c\n", "note: d\n", "interrupted: e"):
        stream.write(text)
    stream.end()
    assert shown.getvalue() == "error: b\n  tried c\ninterrupted: e\n"


def test_a_log_file_gets_all_that_is_shown_with_times(at_course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    log = tmp_path / "log.txt"
    for _ in range(2):
        assert list_runs.main(["--runs", "runs", "--log-file", str(log)]) == 0
    once = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert train_head.main([*FOLDERS, "--vtype", "nosuch", "--log-file", str(log)]) == 2
    error = capsys.readouterr().err.splitlines()
    times, lines = zip(*((line[:19], line[20:]) for line in log.read_text().splitlines()))
    assert list(lines) == [*once, *error] and all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", t) for t in times)


def test_a_log_file_that_cannot_be_written_is_one_line(at_course: Path, capsys: pytest.CaptureFixture):
    assert list_runs.main(["--runs", "runs", "--log-file", "none/log.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not Path("none").exists()


# -- other names of options -------------------------------------------------------------------------------------


def test_long_names_are_the_short_ones(at_course: Path, tmp_path: Path):
    long = ["--epochs", "2", "--batch-size", "16", "--hidden", "8", "--modality", "text"]
    common = [*SIDES, "--val-ratio", "0.25", "--device", "cpu", "--feats", "feats", "--runs", str(tmp_path)]
    assert train_head.main([*common, *long]) == 0
    run = newest_run(tmp_path)
    settings = trained_with(run)
    assert (settings["ep"], settings["bs"], settings["D"], settings["sides"]) == (2, 16, 8, ["text"])
    options = json.loads((run / "config.json").read_text())["options"]
    assert {"ep": 2, "bs": 16, "D": 8, "ablation": 1}.items() <= options.items()
    assert not {"epochs", "batch-size", "hidden", "modality", "log-file", "quiet"} & options.keys()


@pytest.mark.parametrize(("text", "number"), [("both", 0), ("text", 1), ("image", 2), ("1", 1)])
def test_modalities_are_ablations(text: str, number: int):
    assert train_head.build_parser().parse_args(["--modality", text]).ablation == number
    assert sweep_heads.build_parser().parse_args(["--modality", text, "0"]).ablation == [number, 0]


def test_files_hold_either_name_and_typed_ones_win(tmp_path: Path):
    file = tmp_path / "o.toml"
    file.write_text('epochs = 3\nbs = 7\nmodality = "image"\n')
    found = train_head.build_parser().parse_args(["--config", str(file), "--batch-size", "9"])
    assert (found.ep, found.bs, found.ablation) == (3, 9, 2) and found.given == {"ep": 3, "bs": 9, "ablation": 2}


def test_two_names_with_two_values_are_one_line(capsys: pytest.CaptureFixture):
    parser = train_head.build_parser
    assert parser().parse_args(["--modality", "text", "--ablation", "1"]).ablation == 1
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--ablation", "2", "--modality", "text"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --ablation and --modality are one option, given two values; give one of them"
