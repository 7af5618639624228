"""Layouts of a folder: course, MVSA, a folder for each class; files of odd names and sorts, links, pipes, loops."""

import os
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.fuzzing.mutations import encoded, mutated, odd_text, plain_text
from tests.fuzzing.outcomes import Outcome, judged, made
from tests.fuzzing.tables import read_all, read_streamed

EXTENSIONS = (".jpg", ".txt", ".png", ".JPG", ".jpeg", ".TXT", ".gif", ".csv", "", ".tar", ".jsonl")


def odd_name(rng: Random) -> bytes:
    """A name that a file can have, on Linux all but a slash and a NUL."""
    raw = rng.choice(
        [
            odd_text(rng).encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace"),
            rng.randbytes(5),
            str(rng.randrange(6)).encode(),
        ]
    )
    return raw.replace(b"/", b"_").replace(b"\0", b"_")[:200] or b"_"


def odd_file(rng: Random, folder: Path, name: bytes) -> None:
    """A file of some sort: a text, noise, a link, a pipe, a loop, a folder. One that can't be made isn't."""
    path = os.path.join(os.fsencode(folder), name)
    sort = rng.randrange(12)
    if os.path.lexists(path):  # may be a pipe
        return
    with suppress(OSError, ValueError):
        if sort == 0:
            os.symlink(rng.choice(["../bait.txt", "../../bait.txt", "nowhere", "/dev/zero", "/proc/self/mem"]), path)
        elif sort == 1:
            os.symlink(name, path)
        elif sort == 2:
            os.mkfifo(path)
        elif sort == 3:
            os.mkdir(path)
        else:
            with open(path, "wb") as file:
                file.write(encoded(rng, plain_text(rng)) if sort < 9 else rng.randbytes(20))


def _files(rng: Random, folder: Path, most: int = 8) -> None:
    for _ in range(rng.randint(0, most)):
        name = str(rng.randrange(6)).encode() if rng.random() < 0.6 else odd_name(rng)
        odd_file(rng, folder, name + rng.choice(EXTENSIONS).encode())


def _list(rng: Random, path: Path, lines: list[str]) -> None:
    if os.path.lexists(path):
        return
    raw = encoded(rng, rng.choice(["\n", "\r\n", "\r"]).join(lines))
    path.write_bytes(mutated(rng, raw) if rng.random() < 0.4 else raw)


def _read(rng: Random, home: Path, layout: str | None) -> None:
    read_all(home, layout=layout)
    read_streamed(rng, home)


def course(rng: Random, folder: Path) -> Outcome:
    """`train.txt` and `test_without_label.txt` of odd lines."""
    home = made(rng, folder)
    for name in ("train.txt", "test_without_label.txt"):
        if rng.random() < 0.1:
            odd_file(rng, home, name.encode())
        elif rng.random() < 0.8:
            ids = [odd_text(rng) if rng.random() < 0.2 else f"{name[:2]}{n}" for n in range(rng.randint(0, 6))]
            _list(
                rng,
                home / name,
                ["guid,tag", *(f"{one},{rng.choice(['good', 'null', '', odd_text(rng, 1)])}" for one in ids)],
            )
    pairs = home / rng.choice(["data", "pics_texts_pair", "."])
    pairs.mkdir(exist_ok=True)
    _files(rng, pairs)
    return judged(folder, lambda: _read(rng, home, rng.choice([None, None, "course"])))


def mvsa(rng: Random, folder: Path) -> Outcome:
    """`labelResultAll.txt` of odd lines."""
    home = made(rng, folder)
    votes = ["positive,neutral", "negative,negative", "positive,negative", "x,y", "positive", ",", odd_text(rng)]
    lines = [
        f"{n if rng.random() < 0.8 else odd_text(rng)}\t" + "\t".join(rng.choices(votes, k=rng.randint(0, 3)))
        for n in range(rng.randint(0, 7))
    ]
    _list(rng, home / "labelResultAll.txt", ["ID\ttext,image", *lines])
    (home / "data").mkdir()
    _files(rng, home / "data")
    return judged(folder, lambda: _read(rng, home, rng.choice([None, "mvsa"])))


def class_folders(rng: Random, folder: Path) -> Outcome:
    """A folder for each class, perhaps in folders of splits."""
    home = made(rng, folder)
    places = [home]
    if rng.random() < 0.4:
        places = [home / name for name in rng.sample(["train", "Test", "val", "dev", "x"], rng.randint(1, 3))]
    for place in places:
        place.mkdir(exist_ok=True)
        for _ in range(rng.randint(0, 4)):
            name = rng.choice([b"good", b"bad", b".hidden", odd_name(rng)])
            with suppress(OSError, ValueError):
                os.mkdir(os.path.join(os.fsencode(place), name))
                below = Path(os.fsdecode(os.path.join(os.fsencode(place), name)))
                _files(rng, below, 4)
                if rng.random() < 0.2:
                    os.symlink("..", below / "up")
        if rng.random() < 0.3:
            _files(rng, place, 3)
    return judged(folder, lambda: _read(rng, home, rng.choice([None, "folders"])))


FOLDERS = {"course": course, "mvsa": mvsa, "folders": class_folders}
