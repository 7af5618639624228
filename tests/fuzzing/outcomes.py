"""What became of an input, and the judge: what may be raised, which files may change, what must be said."""

import hashlib
import os
import stat
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from feats.errors import RowError, UsageError

ACCEPTED, REFUSED, FAULT = "accepted", "refused", "fault"
INPUTS, OUTPUTS = "in", "out"  # folders of an input's own: what is read, and the only one where files may appear
CANARY = "canary"  # beside them: what an input that gets its code executed creates


@dataclass(frozen=True)
class Outcome:
    """`told`: the refusal, or what the fault is."""

    word: str
    told: str = ""


Kind = Callable[[Random, Path], Outcome]


class Broken(AssertionError):
    """The program took the input, and what it made of it is wrong."""


def expect(holds: bool, told: object) -> None:
    if not holds:
        raise Broken(str(told)[:500])


def made(rng: Random, folder: Path) -> Path:
    """The folders of an input. Returns that of what is read, which has a file outside it as a bait."""
    (folder / INPUTS).mkdir(parents=True)
    (folder / OUTPUTS).mkdir()
    (folder / "bait.txt").write_text("outside")
    return folder / INPUTS


def judged(folder: Path, act: Callable[[], object]) -> Outcome:
    """Run `act`, which raises `UsageError` or `RowError` where it refuses and `Broken` where it finds a fault."""
    before = snapshot(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
        outcome = Outcome(ACCEPTED)
    except (UsageError, RowError) as error:
        outcome = Outcome(REFUSED if str(error).strip() else FAULT, str(error))
    except Exception as error:  # noqa: BLE001 - that is the question
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = Outcome(FAULT, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:500])
    after = snapshot(folder)
    if before != after:
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return Outcome(FAULT, f"files outside the output folder: {', '.join(changed)[:300]}")
    return outcome


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, but for the output folder's, and what it is."""
    found = {}
    for place, folders, names in os.walk(os.fsencode(folder)):
        if place == os.fsencode(folder):
            folders.remove(OUTPUTS.encode())
        for name in [*folders, *names]:
            path = os.path.join(place, name)
            found[ascii(os.path.relpath(path, os.fsencode(folder)))] = _fact(path)
    return found


def _fact(path: bytes) -> str:
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        return oct(mode)
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read()).hexdigest()
