"""feats/export_texts.py as a user runs it."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from feats import export_texts
from feats.records import read_dataset
from feats.text import CLEAN_LEVELS, clean

TEXTS = {
    "1": ("RT @user so happy &amp; glad\r\nhttp://t.co/abc 🙂 #fun ", "utf-8"),
    "2": ("caf\u00e9 \u201cnaïve\u201d", "cp1252"),
    "3": ("", "utf-8"),
    "é 4": ("fine", "utf-16"),
}


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """Four labelled texts in several encodings, one that is binary, one that isn't there, and one without a label."""
    pairs = tmp_path / "set" / "data"
    pairs.mkdir(parents=True)
    for name, (text, encoding) in TEXTS.items():
        (pairs / f"{name}.txt").write_bytes(text.encode(encoding))
    (pairs / "5.txt").write_bytes(b"\0\1")
    (pairs / "7.txt").write_text("later")
    lines = [f"{name},good" for name in [*TEXTS, "5", "6"]]
    (tmp_path / "set" / "train.txt").write_text("\n".join(["guid,tag", *lines]), encoding="utf-8")
    (tmp_path / "set" / "test_without_label.txt").write_text("guid,tag\n7,null\n")
    return tmp_path / "set"


def export(data: Path, out: Path, *more: str) -> int:
    return export_texts.main(["--data", str(data), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().decode("utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("level", CLEAN_LEVELS)
def test_texts_as_extraction_reads_and_cleans_them(
    level: str, course: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "new" / "out"
    assert export(course, out, "--text-clean", level) == 0
    expected = {f"{name}.txt": clean(text, level) for name, (text, _) in TEXTS.items()}
    assert contents(out) == {**expected, "7.txt": "later"}
    assert ("@user" in contents(out)["1.txt"]) == (level != "tweet") and "🙂" in contents(out)["1.txt"]
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"5 texts of train, test, UTF-8, cleaning {level} -> {out}"
    assert "warning: 2 of 7 rows can't be read:" in shown.err
    assert "  5: text cannot be decoded: NUL bytes" in shown.err and "  6: no text file 6.txt in data" in shown.err


def test_texts_wait_for_no_disk(course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sync for each of a million would take hours."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert export(course, tmp_path / "out") == 0
    assert len(contents(tmp_path / "out")) == 5 and not synced


def test_status_and_splits(course: Path, tmp_path: Path):
    assert export(course, tmp_path / "a", "--strict") == 3
    assert export(course, tmp_path / "b", "--strict", "--split", "test") == 0
    assert contents(tmp_path / "b") == {"7.txt": "later"}
    assert contents(tmp_path / "a").keys() == {*(f"{name}.txt" for name in TEXTS), "7.txt"}


def test_what_is_exported_reads_as_a_data_set(course: Path, tmp_path: Path):
    assert export(course, tmp_path / "again" / "data") == 0
    for name in ("train.txt", "test_without_label.txt"):
        (tmp_path / "again" / name).write_bytes((course / name).read_bytes())
    before, after = (read_dataset(path)["train"] for path in (course, tmp_path / "again"))
    assert [r.text and r.text.strip() for r in before][:4] == [r.text for r in after][:4]
    assert {r.encoding for r in after} == {"utf-8", ""}


def test_only_what_is_asked_for_is_written_over(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    out.mkdir()
    (out / "3.txt").write_text("mine")
    (out / "other.txt").write_text("mine")
    assert export(course, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of the texts are in" in error and "3.txt first" in error and "--overwrite" in error
    assert contents(out) == {"3.txt": "mine", "other.txt": "mine"}
    (out / "7.txt").symlink_to(course / "data" / "7.txt")
    (course / "data" / "7.txt").write_bytes(b" later ")
    assert export(course, out, "--overwrite") == 0
    assert contents(out)["3.txt"] == "" and contents(out)["other.txt"] == "mine"
    assert not (out / "7.txt").is_symlink() and (course / "data" / "7.txt").read_bytes() == b" later "


@pytest.mark.parametrize("place", ["", "data", "data/../data"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_data_stay_as_they_are(place: str, more: list[str], course: Path, capsys: pytest.CaptureFixture):
    before = contents_in_bytes(course)
    assert export(course, course / place, *more) == 2
    assert "holds the data themselves" in capsys.readouterr().err.splitlines()[-1]
    assert contents_in_bytes(course) == before


def contents_in_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_manifests_and_ids_that_name_no_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "list.csv").write_text('id,text\na/b,"one, two"\n../c,x\n/d,x\na//b,x\n.,y\n', encoding="utf-8")
    assert export(tmp_path / "list.csv", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == {"a/b.txt": "one, two", "..txt": "y"}
    assert not os.path.exists(tmp_path / "c.txt")
    error = capsys.readouterr().err
    assert error.count("its id can't be the name of a file") == 3
    assert export(tmp_path / "list.csv", tmp_path) == 2


def test_shards(tmp_path: Path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, text in (("x/1.txt", "hé".encode("cp1252")), ("2.txt", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    assert export(tmp_path / "train-0.tar", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == {"x/1.txt": "hé", "2.txt": "two"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--split", "val"], "no split val in the data; it has train, test"),
        (["--data", "nowhere"], "cannot read nowhere"),
        (["--out", "set/train.txt/x"], "can't write"),
    ],
)
def test_one_line_for_what_can_t_be(
    more: list[str], message: str, course: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(course.parent)
    assert export(course, Path("out"), *more) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_as_typed(course: Path, tmp_path: Path):
    script = [sys.executable, str(ROOT / "feats" / "export_texts.py"), "--data", "set", "--text-clean", "tweet"]
    out = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "error: no folder for the texts; name one with --out\n"
    out = subprocess.run([*script, "--out", "texts"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 0 and out.stderr.startswith("warning: 2 of 7 rows can't be read:"), "no bar in a pipe"
    assert out.stdout == "5 texts of train, test, UTF-8, cleaning tweet -> texts\n"
