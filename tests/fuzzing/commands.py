"""Whole commands on hostile data sets: their exit status, their one line, and which rows the cache calls done."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np

from feats import pixels_extract_feats, vader_extract_feats
from feats.cache_reader import DONE, QUARANTINED
from feats.errors import RowError, UsageError
from feats.images import read_image
from feats.records import Record, read_dataset
from feats.store import FeatureStore
from tests.fuzzing.folders import class_folders, course, mvsa
from tests.fuzzing.mutations import odd_text, without_surrogates
from tests.fuzzing.outcomes import ACCEPTED, INPUTS, OUTPUTS, Outcome, expect, judged
from tests.fuzzing.pictures import picture, restructured
from tests.fuzzing.shards import shards
from tests.fuzzing.tables import csv_table, jsonl_table, parquet_table

ROOT = Path(__file__).parents[2]
BUILDERS = (csv_table, csv_table, jsonl_table, parquet_table, course, mvsa, class_folders, shards)
SECONDS = 60  # for a process to start and end


def _built(rng: Random, folder: Path) -> Path:
    """A data set of any layout, with some pictures; what reading it gave is judged elsewhere."""
    for _ in range(4):  # most often one that is read
        if rng.choice(BUILDERS)(rng, folder).word == ACCEPTED:
            break
        shutil.rmtree(folder)
    else:
        csv_table(rng, folder)
    home = folder / INPUTS
    for name in ("a.jpg", "0.jpg", "1.png", "data/2.jpg"):
        path = home / name
        if rng.random() < 0.4 and path.parent.is_dir() and not os.path.lexists(path):
            kind = rng.choice(["JPEG", "PNG", "GIF", "WEBP"])
            data = picture(rng, kind)
            path.write_bytes(restructured(rng, kind, data) if rng.random() < 0.4 else data)
    tables = [
        entry for entry in os.scandir(home) if entry.name.lower().endswith((".csv", ".tsv", ".jsonl", ".parquet"))
    ]
    return Path(tables[0].path) if len(tables) == 1 else home


def _words(rng: Random, home: Path, out: Path) -> list[str]:
    words = ["--data", str(home), "--out", str(out), "--workers", "0", "--device", "cpu"]
    words += ["--stream"] if rng.random() < 0.2 else []
    if rng.random() < 0.2:
        words += ["--columns", f"text={without_surrogates(odd_text(rng)).replace(chr(0), '')}"]
    return words + (["--limit", "2"] if rng.random() < 0.1 else [])


def _check_said(status: int, said: str) -> None:
    """As the README has it: 0 and 3 are done, 2 is one line of error."""
    expect(status in (0, 2, 3), f"exit status {status}: {said[-300:]}")
    expect("Traceback" not in said, said[-400:])
    if status == 2:
        errors = [line for line in said.split("\n") if line.startswith("error: ")]
        expect(len(errors) == 1 and said.split("\n")[-2:] == [errors[0], ""], f"no single line: {said[-400:]!r}")
        raise UsageError(errors[0])


def _whole(record: Record, sides: tuple[str, ...]) -> bool:
    if "text" in sides and record.text is None:
        return False
    if "image" in sides:
        try:
            read_image(record.image_path)
        except RowError:
            return False
    return True


def _check_caches(home: Path, out: Path, name: str, sides: tuple[str, ...], words: list[str]) -> None:
    """Done are the rows whose sides can be read, in quarantine with a reason the others."""
    if "--columns" in words or "--limit" in words:
        return
    whole = read_dataset(home)
    for split, pairs in whole.splits.items():
        with FeatureStore.open(out / f"{name}_{split}.h5") as store:
            expect(list(store.ids) == [record.id for record in pairs], "other ids")
            expect(list(store.tags) == [record.label or "" for record in pairs], "other labels")
            expected = [DONE if _whole(record, sides) else QUARANTINED for record in pairs]
            expect(store.status.tolist() == expected, f"{store.status.tolist()}, not {expected}")
            expect(
                all(
                    store.reasons.get(record.id) for record, s in zip(pairs, expected, strict=True) if s == QUARANTINED
                ),
                "no reason",
            )
            for dataset in store.features:
                values = np.asarray(store.read_rows(dataset, np.flatnonzero(store.status == DONE)), np.float32)
                expect(bool(np.isfinite(values).all()), f"{dataset} isn't finite")


def command(rng: Random, folder: Path) -> Outcome:
    """An encoder of texts or of pictures, in this process."""
    home = _built(rng, folder)
    name, sides, main = rng.choice(
        [("vader", ("text",), vader_extract_feats.main), ("pixels", ("image",), pixels_extract_feats.main)]
    )
    out = folder / OUTPUTS / "feats"
    words = _words(rng, home, out)

    def act() -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(words)
            except SystemExit as ended:
                status = int(ended.code or 0)
        _check_said(status, said.getvalue())
        _check_caches(home, out, name, sides, words)

    return judged(folder, act)


def process(rng: Random, folder: Path) -> Outcome:
    """As a user types it."""
    home = _built(rng, folder)
    words = _words(rng, home, folder / OUTPUTS / "feats")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def act() -> None:
        script = [sys.executable, str(ROOT / "feats" / "vader_extract_feats.py"), *words]
        done = subprocess.run(script, cwd=folder / OUTPUTS, env=environment, capture_output=True, timeout=SECONDS)
        _check_said(done.returncode, done.stderr.decode(errors="replace"))

    return judged(folder, act)


COMMANDS = {"command": command, "process": process}
