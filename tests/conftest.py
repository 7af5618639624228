"""What tests of every kind share: tiny data sets, made afresh for each test, and what commands leave."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

# Two test processes on two cores: with two threads each, tiny models spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # for scripts: this tree, whatever is installed
WORDS = "sun rain happy sad train lunch goal winter #music :) game city the a my so very good bad news".split()
LABELS = ("positive", "negative", "neutral")


def make_course(
    root: Path, rows: int = 20, test_rows: int = 0, labels: Sequence[str] = LABELS, size: tuple[int, int] = (80, 60)
) -> Path:
    """A data set in the course layout: `rows` labelled pairs, `test_rows` without labels, random pictures and texts."""
    rng = np.random.default_rng(rows)
    pairs = root / "data"
    pairs.mkdir(parents=True)
    for i in range(rows + test_rows):
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(pairs / f"{i}.jpg")
        text = " ".join(rng.choice(WORDS, rng.integers(1, 20)))
        (pairs / f"{i}.txt").write_text(f"{text} {i}\n", encoding="utf-8")
    lines = [f"{i},{labels[i % len(labels)]}" for i in range(rows)]
    (root / "train.txt").write_text("\n".join(["guid,tag", *lines]) + "\n")
    if test_rows:
        lines = [f"{i},null" for i in range(rows, rows + test_rows)]
        (root / "test_without_label.txt").write_text("\n".join(["guid,tag", *lines]) + "\n")
    return root


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture's file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_line(error: pytest.ExceptionInfo) -> str:
    (line,) = str(error.value).splitlines()
    return line


def content(run: Path, name: str) -> Any:
    """<run>/<name>.json."""
    return json.loads((run / f"{name}.json").read_text(encoding="utf-8"))


def trained_with(run: Path) -> dict[str, Any]:
    """The settings of a run's first head and of its training."""
    settings = content(run, "config")["members"][0]["train"]
    return {**settings, **settings["head"]}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own is the same each time, whichever tests ran before it."""
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """20 labelled pairs and 6 without labels."""
    return make_course(tmp_path / "set", 20, 6)


@pytest.fixture
def in_foreground() -> Iterator[None]:
    """SIGINT and SIGTERM as a script in the foreground finds them: a shell's background jobs, as tests may be, ignore
    SIGINT."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def lives(pid: int) -> bool:
    """Whether a process runs: one whose parent only hasn't heard of its end doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
