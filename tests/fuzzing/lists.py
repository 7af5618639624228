"""Lists of ids that users write: splits in every form, and corrected labels."""

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from feats.csv_files import write_csv
from feats.strings import Strings
from modeling.features.corrections import read_corrections
from modeling.features.joined import Rows
from modeling.features.split_files import read_split_file
from tests.fuzzing.mutations import encoded, mutated, odd_text, odd_value, without_surrogates
from tests.fuzzing.outcomes import Outcome, expect, judged, made

PARTS = ("train", "val", "test")


def shown(value: Any) -> str:
    """As a line or a cell."""
    return value if isinstance(value, str) else json.dumps(value, default=str)[:3000]


def _ids(rng: Random) -> list[str]:
    """Ids that a data set can have."""
    ids = [f"{n}" for n in range(24)]
    for _ in range(rng.randint(0, 4)):
        name = without_surrogates(odd_text(rng)).replace("\0", "")
        ids += [name] if name and name not in ids else []
    return ids


def _parts(rng: Random, ids: list[str]) -> dict[str, Any]:
    order = rng.sample(ids, len(ids))
    cuts = sorted(rng.sample(range(len(ids) + 1), 2)) if rng.random() < 0.1 else [10, 18]
    parts: dict[str, Any] = dict(
        zip(PARTS, (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]), strict=True)
    )
    if rng.random() < 0.1:
        parts["train"] = [*parts["train"], rng.choice([odd_value(rng), "0", 0, None, "\0", "\ud800", ids])]
    if rng.random() < 0.08:
        parts[rng.choice(["valid", "dev", "how", "folds", "train_ids", odd_text(rng)])] = odd_value(rng)
    return parts


def _json(rng: Random, home: Path, ids: list[str]) -> list[Path]:
    content: Any = _parts(rng, ids)
    if rng.random() < 0.3:
        content = {"folds": [_parts(rng, ids) for _ in range(rng.randint(0, 3))]}
    if rng.random() < 0.1:
        content = rng.choice([odd_value(rng), {"folds": odd_value(rng)}, {"folds": {}}, {"train": {"first": 0, "rows": 3}}, {"ids": "ids.npz", "train": [0, 1]}, {"train": "0", "val": "1"}])  # fmt: skip
    try:
        raw = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except ValueError:
        raw = b'{"train": [' + b"9" * 5000 + b"]}"
    if rng.random() < 0.05:
        raw = rng.choice(
            [b"[" * 100_000, b'{"train":' * 100_000, b"", b"NaN", b'{"train": ["0"], "train": ["1"], "val": ["2"]}']
        )
    path = home / rng.choice(["split.json", "s.JSON"])
    path.write_bytes(mutated(rng, raw) if rng.random() < 0.3 else raw)
    return [path]


def _csv(rng: Random, home: Path, ids: list[str]) -> list[Path]:
    rows = [[name, part] for part, members in _parts(rng, ids).items() if isinstance(members, list) for name in members]
    rows = [[without_surrogates(shown(cell)) for cell in row] for row in rows if not isinstance(row[0], int)]
    header = rng.choice([["id", "split"], ["guid", "split"], ["split", "id"], ["id"], ["id", "id", "split"], []])
    rows = [row[::-1] if header[:1] == ["split"] else row for row in rows]
    rows = [row[:1] if rng.random() < 0.03 else row for row in rows]
    path = home / "split.csv"
    write_csv(path, [header, *rows])
    if rng.random() < 0.3:
        path.write_bytes(mutated(rng, path.read_bytes()))
    return [path]


def _lists(rng: Random, home: Path, ids: list[str]) -> list[Path]:
    parts = _parts(rng, ids)
    end = rng.choice(["\n", "\r\n", "\r"])
    files = []
    names = rng.choice([PARTS, ("a", "b", "c"), ("train", "train2", "x"), ("my_val", "my train", "TEST"), PARTS[:2]])
    for name, part in zip(names, PARTS, strict=False):
        path = home / f"{name}{rng.choice(['.txt', '.txt', '.csv'])}"
        lines = parts[part] if isinstance(parts[part], list) else [parts[part]]
        raw = encoded(rng, end.join([*rng.choice([[], ["id"], ["guid,tag"]]), *(shown(one) for one in lines)]))
        path.write_bytes(mutated(rng, raw) if rng.random() < 0.3 else raw)
        files.append(path)
    return files


def _pattern(rng: Random, home: Path, ids: list[str]) -> list[Path]:
    for fold in rng.sample(["1", "2", "10", "a", "٣", "x" * 100, "{fold}", "[1]"], rng.randint(1, 3)):
        for part in rng.sample(["train", "val", "test", "valid", "VAL"], rng.randint(1, 3)):
            (home / f"{part}_{fold}.txt").write_text(
                "\n".join(ids[{"train": 0, "val": 8}.get(part, 16) :][:8]), errors="replace"
            )
    return [home / rng.choice(["{part}_{fold}.txt", "{part}_{fold}{fold}.txt", "{fold}.txt", "{part}_{fold}.[t]xt"])]


def split_files(rng: Random, folder: Path) -> Outcome:
    """JSON, CSV, lists and patterns. What is taken names known ids once."""
    home = made(rng, folder)
    ids = _ids(rng)
    labels = [rng.choice(["x", "y"]) for _ in ids]
    labels[-1] = rng.choice(["x", ""])
    files = rng.choice([_json, _json, _csv, _lists, _pattern])(rng, home, ids)
    if rng.random() < 0.02:
        files = [home / rng.choice(["nowhere.csv", ".", "split\0.csv", "x" * 300, "pipe.csv"])] * rng.randint(1, 4)
        os.mkfifo(home / "pipe.csv")

    def act() -> None:
        for split in read_split_file(files, ids, labels):
            named = [*split.train, *split.val, *split.test]
            expect(len(named) == len(set(named)) and set(named) <= set(ids), f"{named} of {ids}")
            expect(bool(len(split.train) and len(split.val)), "an empty part")

    return judged(folder, act)


def corrections(rng: Random, folder: Path) -> Outcome:
    """Labels that a person has corrected."""
    home = made(rng, folder)
    ids = _ids(rng)
    tags = [rng.choice(["x", "y", ""]) for _ in ids]
    header = rng.choice(
        [["id", "label"], ["label", "id"], ["id", "given", "corrected"], ["corrected", "id"], ["id"], []]
    )
    values = {
        "id": lambda: rng.choice(ids),
        "label": lambda: rng.choice(["x", "y", ""]),
        "given": lambda: "x",
        "corrected": lambda: rng.choice(["", "y", odd_text(rng)]),
    }
    rows = [[without_surrogates(values[name]()) for name in header] for _ in range(rng.randint(0, 5))]
    rows = [row[: rng.randrange(len(row) + 1)] if rng.random() < 0.1 else row for row in rows]
    path = home / "c.csv"
    write_csv(path, [header, *rows])
    if rng.random() < 0.3:
        path.write_bytes(mutated(rng, path.read_bytes()))
    zeros = np.zeros(len(ids), np.uint64)

    def act() -> None:
        found = read_corrections(path, Rows.of(Strings.of(ids), tags, zeros, zeros))
        expect(set(found) <= set(ids) and set(found.values()) <= {"x", "y"}, found)

    return judged(folder, act)


LISTS = {"split-files": split_files, "corrections": corrections}
