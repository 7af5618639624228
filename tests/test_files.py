"""Files at places that a user chose: what is there already is replaced, written to, or left alone."""

import os
import stat
import subprocess
import sys
import threading
import tty
from pathlib import Path

import pytest
from conftest import ROOT, make_course

from feats.errors import UsageError
from modeling.runs.files import check_replaceable, user_file

HEADER = ("guid", "tag")
CONTENT = "guid,tag\n1,a\n"


def write(path: Path, content: str = CONTENT) -> None:
    with user_file(path, HEADER) as file:
        file.write(content)


def test_a_new_file_and_the_folders_above_it(tmp_path: Path):
    write(tmp_path / "a" / "b" / "out.csv")
    assert (tmp_path / "a" / "b" / "out.csv").read_text() == CONTENT
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out.csv"]


@pytest.mark.parametrize("before", ["", "guid,tag", "guid,tag\r\n5,x\r\n", "guid,tag,p_a\n", "guid,tag\r"])
def test_files_of_the_kind_are_replaced_and_keep_their_mode(tmp_path: Path, before: str):
    out = tmp_path / "out.csv"
    out.write_text(before, newline="")
    out.chmod(0o640)
    check_replaceable(out, HEADER)
    write(out)
    assert out.read_text() == CONTENT and stat.S_IMODE(out.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "before", [b"\x89HDF\r\n\x1a\n", b"id,tag,pred\n1,a,b\n", b"guid,tags\n", b"guid;tag\n", b"guid,ta", b"\n", b"\0"]
)
@pytest.mark.parametrize("through", ["its name", "a link"])
def test_anything_else_is_left_as_it_is(tmp_path: Path, before: bytes, through: str):
    file = out = tmp_path / "precious"
    file.write_bytes(before)
    if through == "a link":
        out = tmp_path / "link"
        out.symlink_to(file)
    for attempt in (lambda: check_replaceable(out, HEADER), lambda: write(out)):
        with pytest.raises(UsageError, match=r"exists and isn't known to hold predictions .*guid,tag.*`out`") as error:
            attempt()
        assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == before and set(tmp_path.iterdir()) == {file, out}


def test_the_lists_of_a_data_set_are_left_as_they_are(tmp_path: Path):
    """Layout course has the header of our predictions, and train.txt the labels."""
    make_course(tmp_path, 3, 3)
    lists = sorted(tmp_path.glob("*.txt"))
    before = [path.read_bytes() for path in lists]
    assert len(lists) == 2 and all(content.startswith(b"guid,tag\n") for content in before)
    (tmp_path / "link.csv").symlink_to(lists[-1])
    for path in (*lists, tmp_path / "link.csv"):
        with pytest.raises(UsageError, match="isn't replaced"):
            write(path)
    assert [path.read_bytes() for path in lists] == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool):
    target, link = tmp_path / "elsewhere" / "target.csv", tmp_path / "link.csv"
    target.parent.mkdir()
    if there:
        target.write_text("guid,tag\nold,x\n")
    link.symlink_to(Path("elsewhere", "target.csv"))
    write(link)
    assert link.is_symlink() and not target.is_symlink() and target.read_text() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_device_is_written_to():
    """A terminal of the test's own: were it replaced after all, nobody would miss it (never try this with /dev/null)."""
    reading, terminal = os.openpty()
    try:
        tty.setraw(terminal)
        path = Path(os.ttyname(terminal))
        before = path.stat()
        check_replaceable(path, HEADER)
        write(path)
        assert os.read(reading, 1000).decode() == CONTENT
        assert stat.S_ISCHR(before.st_mode) and os.path.samestat(before, path.stat())
    finally:
        os.close(reading)
        os.close(terminal)


def test_a_pipe_is_written_to(tmp_path: Path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    check_replaceable(pipe, HEADER)  # waits for no reader
    write(pipe)
    reader.join(20)
    assert read == [CONTENT] and stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("to", ["a file", "a pipe"])
def test_standard_output_keeps_what_is_printed_besides(tmp_path: Path, to: str):
    code = (
        "from pathlib import Path; from modeling.runs.files import user_file; print('before'); "
        "context = user_file(Path('/dev/stdout'), ('guid', 'tag')); file = context.__enter__(); "
        "file.write('guid,tag\\n1,a\\n'); context.__exit__(None, None, None); print('after')"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if to == "a file":
        with (tmp_path / "x.txt").open("w") as file:
            subprocess.run(command, env=environment, stdout=file, check=True)
        found = (tmp_path / "x.txt").read_text()
    else:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found == f"before\n{CONTENT}after\n"


@pytest.mark.parametrize("made", ["folder", "loop", "below a file"])
def test_what_cant_be_written_is_one_clear_line(tmp_path: Path, made: str):
    out = tmp_path / "out"
    if made == "folder":
        out.mkdir()
    elif made == "loop":
        out.symlink_to(out)
    else:
        out.write_text("kept")
        out = out / "below.csv"
    before = sorted(tmp_path.iterdir())
    for attempt in (lambda: check_replaceable(out, HEADER), lambda: write(out)):
        with pytest.raises(UsageError, match=r"can't write .*out.*; give another file with `out`$"):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


def test_an_interruption_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "out.csv").write_text("guid,tag\nold,x\n")
    with pytest.raises(KeyboardInterrupt), user_file(tmp_path / "out.csv", HEADER) as file:
        file.write(CONTENT)
        raise KeyboardInterrupt
    assert (tmp_path / "out.csv").read_text() == "guid,tag\nold,x\n" and len(list(tmp_path.iterdir())) == 1
