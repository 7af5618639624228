"""serve.py as a user runs it: lines through a pipe, requests to a port, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from caches import light_course, pair_options, submission
from conftest import ENVIRONMENT, ROOT

from modeling import inference_head, serve
from modeling.runs.listing import list_runs

SCRIPT = str(ROOT / "modeling" / "serve.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light_course(tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def expected(home: Path) -> list[list[str]]:
    """What inference_head.py says of single raw pairs: class and probabilities as written."""
    rows = []
    for number in range(24, 28):
        out = home / f"{number}.csv"
        command = ["--runs", str(home / "runs"), *pair_options(home, number), "--proba", "--out", str(out)]
        assert inference_head.main([*command, "--device", "cpu"]) == 0
        rows.append(submission(out)[1][0][1:])
    return rows


def as_written(answer: dict[str, Any]) -> list[str]:
    return [answer["label"], *(f"{p:.6f}" for p in answer["probabilities"].values())]


def command(home: Path, *more: str) -> list[str]:
    return [sys.executable, SCRIPT, "--runs", str(home / "runs"), "--device", "cpu", *more]


def pair(home: Path, number: int) -> dict[str, str]:
    _, image, _, text = pair_options(home, number)
    return {"image": image, "text": text}


# -- lines ------------------------------------------------------------------------------------------------------


def test_lines_through_a_pipe(home: Path, expected: list[list[str]]):
    asked = [json.dumps({"id": f"é{k}", **pair(home, 24 + k)}, ensure_ascii=False) for k in range(4)]
    asked.insert(2, "{nonsense")
    out = subprocess.run(command(home), input="\n".join(asked), env=ENVIRONMENT, capture_output=True, text=True)
    [run] = list_runs(home / "runs")
    assert (out.returncode, out.stderr) == (0, f"ready: run {run}\n")
    answers = [json.loads(line) for line in out.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == ["é0", "é1", 3, "é2", "é3"]
    assert "not valid JSON" in answers.pop(2)["error"]
    assert [as_written(answer) for answer in answers] == expected


def test_answered_at_once_and_interrupted(home: Path, expected: list[list[str]], in_foreground: None):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(home), env=ENVIRONMENT, **pipes) as process:
        for k in range(2):
            process.stdin.write(json.dumps(pair(home, 24 + k)) + "\n")
            process.stdin.flush()
            assert as_written(json.loads(process.stdout.readline())) == expected[k]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[1:] == ["interrupted: no longer serving"]


def test_a_reader_that_goes_away_is_no_error(home: Path):
    lines = (json.dumps(pair(home, 24)) + "\n") * 200
    reading, writing = os.pipe()
    with subprocess.Popen(
        command(home), stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        os.close(writing)
        os.close(reading)
        _, err = process.communicate(lines, timeout=60)
    assert process.returncode == 0 and len(err.splitlines()) == 1


# -- HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def served(home: Path, *more: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server's address, and its process; killed at the end if it still runs."""
    process = subprocess.Popen(
        command(home, "--http", "--port", "0", *more),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        run, address = process.stdout.readline(), process.stdout.readline()
        assert run.startswith("run ") and address.startswith("http://"), process.communicate(timeout=10)
        yield address.split()[0], process
    finally:
        process.kill()
        process.communicate()


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def form(parts: Sequence[tuple[str, str, bytes]]) -> bytes:
    made = [
        f'--cut\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for name, more, content in parts
    ]
    return b"".join([*made, b"--cut--\r\n"])


FORM = {"Content-Type": "multipart/form-data; boundary=cut"}


def test_over_http(home: Path, expected: list[list[str]], in_foreground: None):
    """As typed: several at once are answered as one by one, what is wrong is said, Ctrl-C ends it."""

    def body(number: int) -> bytes:
        asked = pair(home, number)
        picture = Path(asked["image"]).read_bytes()
        return form([("image", '; filename="a.jpg"', picture), ("text", "", asked["text"].encode())])

    with served(home, "--max-delay", "50", "--max-body", "1") as (address, process):
        assert address.startswith("http://127.0.0.1:")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda k: get(f"{address}/predict", body(24 + k % 4), **FORM), range(16)))
        assert [status for status, _ in answers] == [200] * 16
        assert [as_written(answer) for _, answer in answers] == expected * 4
        status, health = get(f"{address}/health")
        assert status == 200 and health["answered"] == 16 and list(health["encoders"]) == ["pixels", "vader"]
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200 and b"</html>" in page.read()
        json_kind = {"Content-Type": "application/json"}
        assert get(f"{address}/predict", b"{", **json_kind)[0] == 400
        status, told = get(f"{address}/predict", b"x" * (5 << 20), **json_kind)
        assert (status, told) == (413, {"error": "the request is larger than 1048576 bytes"})
        no_picture = form([("image", '; filename="a.jpg"', b"text"), ("text", "", b"a")])
        assert get(f"{address}/predict", no_picture, **FORM) == (400, {"error": "not a picture PIL can read"})
        assert get(f"{address}/health", Host="evil.example")[0] == 421
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted: no longer serving\n"


def test_sigterm_ends_it_and_another_host_is_warned_of(home: Path):
    with served(home, "--host", "0.0.0.0") as (address, process):
        assert get(f"http://127.0.0.1:{address.rpartition(':')[2]}/health")[0] == 200
        process.terminate()
        assert process.wait(60) == 130
        warning, last = process.stderr.read().splitlines()
        assert warning.startswith("warning: whoever reaches this machine can use 0.0.0.0")
        assert last == "interrupted: no longer serving"


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--port", "80"], "--port without --http"),
        (["--host", "127.0.0.1"], "--host without --http"),
        (["--http", "--port", "99999"], "give another --port"),
        (["--max-delay", "5000"], "--max-delay 5000: expected milliseconds"),
        (["--run", "nope"], "nope is no run"),
        (["--weights", "clip=a.pt"], "--weights names clip; the caches in use are pixels, vader"),
        (["--tie", "angry"], "--tie angry: no such class"),
    ],
)
def test_what_cant_be_done_is_said_in_one_line(
    home: Path, capsys: pytest.CaptureFixture, options: list[str], reason: str
):
    assert serve.main(["--runs", str(home / "runs"), "--device", "cpu", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
