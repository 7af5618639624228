"""Strings of the data's on a terminal, and in spreadsheets."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from caches import make_cache

from feats.command_line.parser import ScriptParser
from feats.command_line.wording import error_line, remark
from feats.csv_files import read_csv, unquoted, write_csv
from feats.errors import UsageError
from feats.escapes import of_terminal, one_line, printable
from feats.terminal import Asked, Progress, ask, showing
from modeling import bad_cases, inference_head, train_head
from modeling.evaluation.text_tables import format_table

EVIL = "a\x1b]0;owned\x07\x1b[2Jb\rc\x9b31m\u202ed\x7f"
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def obeyed(text: str) -> list[str]:
    """The characters in it that are no text, line ends and tabs aside."""
    return [c for c in text if not c.isprintable() and c not in "\n\t"]


def test_what_a_terminal_would_obey_is_shown():
    assert printable("é 猫 👩\u200d👩\n\tx") == "é 猫 👩\u200d👩\n\tx"
    assert printable(EVIL) == r"a\x1b]0;owned\x07\x1b[2Jb\rc\x9b31m\u202ed\x7f"
    assert one_line("a\nb\tc\udc80\u2028") == r"a\nb\tc\udc80\u2028"
    assert of_terminal("\r 50%|##") == "\r 50%|##" and of_terminal("\n\x1b[A\x1b[A") == "\n\x1b[A\x1b[A"
    assert of_terminal("\r\x1b[A") == "\r\\x1b[A"


@pytest.mark.parametrize("asked", [Asked(), Asked(quiet=True)])
def test_both_streams_of_a_script_escape(asked: Asked, tmp_path: Path):
    out, err = Terminal(), Terminal()
    ask(Asked(asked.quiet, tmp_path / "log"))
    try:
        with redirect_stdout(out), redirect_stderr(err), showing():
            print(f"id {EVIL}")
            print(f"error: {EVIL}", file=sys.stderr)
    finally:
        ask(Asked())
    shown = [out.getvalue(), err.getvalue(), (tmp_path / "log").read_text()]
    assert all("\\x1b]0;owned" in text and not obeyed(text) for text in shown)


def test_what_goes_from_stdout_into_a_file_stays_as_it_is():
    out = io.StringIO()
    with redirect_stdout(out), showing():
        print(EVIL)
    assert out.getvalue() == f"{EVIL}\n"


def test_messages_tables_and_bars_hold_no_line_that_data_wrote():
    forged = "x\nerror: all is lost"
    assert error_line(UsageError(f"no row {forged}")) == r"error: no row x\nerror: all is lost"
    assert remark(f"row {forged}") == r"warning: row x\nerror: all is lost"
    assert not any(
        line.startswith("error") for line in format_table([{"label": forged, "n": 1}], ["label", "n"]).splitlines()
    )
    err = Terminal()
    with redirect_stderr(err), showing():
        bar = Progress(f"{EVIL}\n", 2, "row")
        bar.add(1, now=EVIL)
        bar.close()
    assert "owned" in err.getvalue() and not [c for c in obeyed(err.getvalue()) if c != "\r"]


def test_a_parser_shows_what_was_typed_wrong_escaped(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        ScriptParser().parse_args([EVIL])
    err = capsys.readouterr().err
    assert r"\x1b]0;owned" in err and not obeyed(err)


def test_a_parser_leaves_the_colours_of_help(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ScriptParser, "format_help", lambda parser: "\x1b[1musage\x1b[0m\n")
    with pytest.raises(SystemExit):
        ScriptParser().parse_args(["--help"])
    assert capsys.readouterr().out == "\x1b[1musage\x1b[0m\n"


# -- spreadsheets -------------------------------------------------------------------------------------------------


def test_formulas_get_an_apostrophe_if_asked(tmp_path: Path):
    rows: list[list[object]] = [["id", "n"], *([text, -1.5] for text in FORMULAS), ["a=b", "'x"], ["'=x", 1]]
    write_csv(tmp_path / "plain.csv", rows)
    write_csv(tmp_path / "safe.csv", rows, safe=True)
    texts = [[str(cell) for cell in row] for row in rows]
    assert read_csv(tmp_path / "plain.csv") == texts
    safe = read_csv(tmp_path / "safe.csv")
    assert [row[0] for row in safe] == ["id", *(f"'{text}" for text in FORMULAS), "a=b", "''=x"]
    assert [[unquoted(cell) for cell in row] for row in safe] == texts
    assert [row[1] for row in safe] == [row[1] for row in texts]  # numbers stay numbers


def test_scripts_ask_by_csv_safe(tmp_path: Path, capsys: pytest.CaptureFixture):
    tags = ["=negative", "+positive"] * 30
    make_cache(tmp_path / "feats", "clip", tags=tags)
    folders = ["--runs", str(tmp_path / "runs")]
    short = ["--head", "concat", "--D", "4", "--ep", "1", "--val-ratio", "0.3"]
    assert train_head.main([*folders, "--feats", str(tmp_path / "feats"), "--vtype", "clip", *short]) == 0
    for safe, mark in ([], ""), (["--csv-safe"], "'"):
        out = tmp_path / f"predictions{mark}.csv"
        assert inference_head.main([*folders, "--split", "train", "--out", str(out), *safe]) == 0
        assert {row[1] for row in read_csv(out)[1:]} <= {f"{mark}{tag}" for tag in tags}
        bad = tmp_path / f"bad{mark}.csv"
        assert bad_cases.main([*folders, "--folds", "2", "--out", str(bad), *safe]) == 0
        assert {row[1] for row in read_csv(bad)[1:]} <= {f"{mark}{tag}" for tag in tags} and len(read_csv(bad)) > 1
    capsys.readouterr()
