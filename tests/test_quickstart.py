"""quickstart.py as a user runs it: from pictures and texts to predictions, and nothing done twice."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import LABELS, ROOT, make_course

from modeling import quickstart
from modeling.runs.folder import load_run

FAST = ["--ttype", "vader", "--head", "linear"]
QUICK = ["--vtype", "pixels", *FAST]


@pytest.fixture(autouse=True)
def this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run the code of this tree, wherever another one is installed from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def printed_commands(out: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]


def all_but_the_report(command: list[object], check: bool, run=subprocess.run) -> subprocess.CompletedProcess:
    """The page is made anew whenever it is asked for: the longest step of all, and seen before."""
    if Path(str(command[1])).name == "make_report.py":
        return subprocess.CompletedProcess(command, 0)
    return run(command, check=check)


@pytest.mark.slow
def test_from_pairs_to_predictions_and_again(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    make_course(tmp_path / "my set", 36, 5)
    argv = ["--data", "my set", *QUICK]
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(argv) == 0
    first = capfd.readouterr().out
    commands = printed_commands(first)
    scripts = [command[1] for command in commands]
    encoders = [f"feats/{name}_extract_feats.py" for name in ("pixels", "vader")]
    last = ["modeling/sweep_heads.py", "modeling/inference_head.py", "modeling/make_report.py"]
    assert scripts == [*encoders, *last]
    assert all(command[0] == "python" and (ROOT / command[1]).is_file() for command in commands)
    (out,) = (tmp_path / "saved" / "quickstart").iterdir()
    assert commands[0][2:] == ["--data", "my set", "--out", str(out.relative_to(tmp_path) / "feats")]
    # What it says is there is there.
    assert (tmp_path / re.search(r" report +(.*)  \(open", first)[1]).is_file()
    caches = {f"{name}_{split}.h5" for name in ("pixels", "vader") for split in ("train", "test")}
    assert {path.name for path in (out / "feats").glob("*.h5")} == caches
    best = re.search("best run +(.*)", first)[1]
    assert load_run(tmp_path / best).members[0].config.head.head == "linear"
    assert (tmp_path / re.search("comparison +(.*)", first)[1]).read_text().startswith("| head")
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guid"] for row in rows] == [str(i) for i in range(36, 41)]
    assert {row["tag"] for row in rows} <= set(LABELS)
    # Again: the same commands, nothing encoded, nothing trained.
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / best).iterdir() if p.stem != "report"}
    predicted = (out / "predictions.csv").read_bytes()
    monkeypatch.setattr(subprocess, "run", all_but_the_report)
    assert quickstart.main(argv) == 0
    again = capfd.readouterr().out
    assert printed_commands(again) == commands
    assert again.count("36 rows done; 0 quarantined") == 2 and again.count(" 0 encoded now") == 4
    assert "1 trainings, 1 of them finished before" in again
    assert kept == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}
    assert (out / "predictions.csv").read_bytes() == predicted


def refused(capfd: pytest.CaptureFixture, *argv: str) -> tuple[str, str]:
    assert quickstart.main(list(argv)) == 2
    found = capfd.readouterr()
    assert "Traceback" not in found.err
    return found.out, found.err


def test_each_data_set_has_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Caches of different pairs have the same names: in one folder the second data set would be refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))

    def folders(*argv: str) -> str:
        assert quickstart.main([*argv, *FAST]) == 2  # since nothing was run, there is no sweep
        encode = next(c for c in printed_commands(capsys.readouterr().out) if c[1].startswith("feats/"))
        return encode[encode.index("--out") + 1]

    sample, mine, namesake = folders(), folders("--data", "mine"), folders("--data", "other/mine")
    assert sample == "saved/quickstart/sample/feats"
    assert re.fullmatch("saved/quickstart/mine-[0-9a-f]{8}/feats", mine)
    assert len({sample, mine, namesake, folders("--data", "sample")}) == 4
    assert folders("--data", str(tmp_path / "mine")) == mine  # the same data, typed otherwise
    assert folders("--data", "mine", "--out", "out") == "out/feats"


def test_options_are_handed_on(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Those of the data to every extraction, those of messages to every command but the sample's; under --quiet the
    commands that go well aren't shown."""
    ran: list[list[str]] = []

    def noted(command: list[object], check: bool) -> subprocess.CompletedProcess:
        ran.append([str(word) for word in command[1:]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", noted)
    data = ["--data", "shop.tsv", "--layout", "manifest", "--columns", "text=wording", "label="]
    assert quickstart.main([*data, "--vtype", "pixels", *FAST, "--quiet", "--log-file", "log.txt"]) == 2
    assert not capfd.readouterr().out
    assert [command[0] for command in ran] == [
        *(str(ROOT / "feats" / f"{name}_extract_feats.py") for name in ("pixels", "vader")),
        str(ROOT / "modeling" / "sweep_heads.py"),
    ]
    assert all(command[-3:] == ["--quiet", "--log-file", "log.txt"] for command in ran)
    assert all(command[1:-5] == data for command in ran[:2])
    ran.clear()
    assert quickstart.main(["--data", "shop.tsv", "--vtype", *FAST]) == 2
    extraction, sweep = ran
    assert extraction[0].endswith("vader_extract_feats.py") and "--vtype" not in sweep and "--ttype" in sweep
    ran.clear()
    assert quickstart.main([*FAST, "--quiet"]) == 2
    assert ran[0][1:] == ["--out", "data/sample"] and all(command[-1] == "--quiet" for command in ran[1:])


def test_what_cannot_work_stops_at_once(tmp_path: Path, capfd: pytest.CaptureFixture):
    for argv, told in (
        (["--ttype", "vader", "clop"], "error: no encoder 'clop'; there are clip, efficientnet,"),
        (["--vtype", "--ttype"], "error: --vtype and --ttype name no encoder; there are clip, efficientnet,"),
        (["--head", "fusion", "liner"], "error: unknown head 'liner'; did you mean linear"),
        (["--columns", "colour=a"], "error: --columns colour=a: expected id, image, text, label, split before ="),
    ):
        out, error = refused(capfd, "--data", str(tmp_path), "--out", str(tmp_path / "out"), *argv)
        assert error.startswith(told) and error.count("\n") == 1
        assert not printed_commands(out)  # nothing was begun
    assert refused(capfd, "--columns", "text=a")[1].startswith("error: --layout and --columns are of your own pairs")
    out, error = refused(capfd, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    (command,) = printed_commands(out)  # it isn't tried any further
    assert command[:2] == ["python", "feats/efficientnet_extract_feats.py"]
    own, last = error.splitlines()
    assert own.startswith("error: ") and "nowhere" in own
    assert last == "error: that command ended with status 2; what it says above is what to mend"


def test_score_of_the_synthetic_sample(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "truth.csv").write_text("guid,tag\n1,a\n2\u2028,b\n3,c\n", encoding="utf-8")
    (tmp_path / "predictions.csv").write_text("guid,tag\n3,c\n1,b\n2\u2028,b\n", encoding="utf-8")
    quickstart.print_score(tmp_path / "predictions.csv", tmp_path / "truth.csv")
    assert capsys.readouterr().out.startswith("of the sample's 3 unlabelled pairs 2 are predicted right")
