"""A split: which rows are in which part, how it was made, and its file."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feats.errors import UsageError, first_line
from feats.escapes import few, short_name
from feats.json_files import MAX_BYTES, read_json
from feats.strings import BLOCK, Strings
from feats.writing import replacing, write_json

PARTS = ("train", "val", "test")
REMEDY = "train again"
_FOLD = {**dict.fromkeys((f"{part}?" for part in PARTS), [str]), "ids?": str, "how?": dict}
SHAPE = {**_FOLD, "folds?": [_FOLD]}  # of what `save_split` writes
# Of a split's file: Python's objects of more ids would take gigabytes, and a longer file isn't read.
MAX_JSON_IDS, MAX_JSON_BYTES = 1_000_000, MAX_BYTES // 2


@dataclass(frozen=True)
class Split:
    """Disjoint ids of the parts, each sorted. `how` says how it was made: ratios and seed, fold number, or files."""

    train: Sequence[str]
    val: Sequence[str]
    test: Sequence[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)

    def without(self, ids: Iterable[str]) -> "Split":
        """The same split less some ids, e.g. those a cache has in quarantine."""
        gone = set(ids)
        if not gone:
            return self
        train, val, test = (_without(getattr(self, part), gone) for part in PARTS)
        return Split(train, val, test, self.how)


def _without(ids: Sequence[str], gone: Collection[str]) -> Sequence[str]:
    if not isinstance(ids, Strings):
        return [i for i in ids if i not in gone]
    rows = ids.positions(list(gone))
    return ids[np.delete(np.arange(len(ids)), rows[rows >= 0])]


def check_split(split: Split) -> None:
    """Raise `UsageError` for a split without training or validation rows, and for one that names a row twice: what was
    trained on would also validate."""
    for part, rows in (("training", split.train), ("validation", split.val)):
        if not rows:
            raise UsageError(f"the split has no {part} rows; name some")
    check_disjoint({part: getattr(split, part) for part in PARTS}, "the split")


def save_split(split: Split | Sequence[Split], path: Path | str) -> None:
    """Write a split, or several of the same rows, as JSON that `load_split` and `read_split_file` read.

    With more than `MAX_JSON_IDS` ids, or `MAX_JSON_BYTES` of them, these lie beside it in `<path's stem>.npz`,
    fixed-width UTF-8 as "<number>/<part>" for each split from 0, and the JSON has `{"ids": "<file>"}` in place of the
    parts."""
    path = Path(path)
    splits = [split] if isinstance(split, Split) else list(split)
    parts = {f"{k}/{part}": Strings.of(getattr(one, part)) for k, one in enumerate(splits) for part in PARTS}
    count, size = sum(map(len, parts.values())), sum(ids.encoded.nbytes for ids in parts.values())
    if count > MAX_JSON_IDS or size > MAX_JSON_BYTES:
        beside = path.with_suffix(".npz")
        arrays: dict[str, Any] = {name: ids.encoded for name, ids in parts.items()}
        with replacing(beside) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)
        folds: list[dict[str, Any]] = [{"ids": beside.name, "how": one.how} for one in splits]
    else:
        folds = [{**{part: list(getattr(one, part)) for part in PARTS}, "how": one.how} for one in splits]
    content = folds[0] if isinstance(split, Split) else {"folds": folds}
    # On one line: with an indent Python's encoder takes seven times as long, a second for a million ids.
    write_json(path, content, indent=None)


def load_split(path: Path | str) -> Split | list[Split]:
    """What `save_split` wrote. Raises `UsageError` for anything else."""
    path = Path(path)
    content = read_json(path, REMEDY, SHAPE)
    folds = [_split(fold, path) for fold in with_ids(content.get("folds", [content]), path)]
    return folds if "folds" in content else folds[0]


def _split(parts: Mapping[str, Any], path: Path) -> Split:
    if not {"train", "val"} <= parts.keys() <= {*PARTS, "how"}:
        raise UsageError(
            f"{path} names {short_name(', '.join(parts)) or 'nothing'}, expected {', '.join(PARTS)}; {REMEDY}"
        )
    return Split(**parts)


def with_ids(folds: Sequence[Any], path: Path) -> list[Any]:
    """Splits as the JSON file `path` holds them, with ids that lie beside it. Raises `UsageError` where these can't be
    read."""
    found = []
    for k, fold in enumerate(folds):
        if isinstance(fold, dict) and isinstance(fold.get("ids"), str):
            parts = _ids_beside(path, Path(fold["ids"]).name, k)
            fold = {**parts, **{key: value for key, value in fold.items() if key != "ids"}}
        found.append(fold)
    return found


def _ids_beside(path: Path, name: str, k: int) -> dict[str, Strings]:
    """The ids of the parts of split `k` in the file `name` beside `path`."""
    try:
        file = path.with_name(name)
        if not file.is_file():
            raise ValueError(f"there is no file {name}")
        with np.load(file, allow_pickle=False) as beside:
            return {part: _as_ids(beside[f"{k}/{part}"]) for part in PARTS}
    except Exception as error:  # noqa: BLE001 - numpy's readers of archives and headers raise anything
        raise UsageError(f"{path}: the ids beside it can't be read ({first_line(error)}); copy both files") from None


def _as_ids(values: np.ndarray) -> Strings:
    if values.dtype.kind != "S" or values.ndim != 1 or not values.dtype.itemsize:
        raise ValueError(f"they are {values.dtype} {values.shape}, no list of text")
    for low in range(0, len(values), BLOCK):
        np.char.decode(values[low : low + BLOCK], "utf-8")
    return Strings(values)


def check_disjoint(parts: dict[str, Sequence[str]], source: str) -> None:
    """Raise `UsageError` for an id in two parts, or twice in one; it names `source`."""
    twice = repeated(list(parts.values()))
    if twice:
        where = ", ".join(part for part, members in parts.items() if twice[0] in members)
        raise UsageError(
            f"{source}: {counted(twice, 'id')} named more than once ({short_name(twice[0])} in {where}); keep one"
        )


def repeated(parts: Sequence[Sequence[str]]) -> list[str]:
    """The ids that are named more than once, in the order in which they first are."""
    compact = [ids for ids in parts if isinstance(ids, Strings)]
    if len(compact) == len(parts) and Strings.concatenate(compact).unique:
        return []
    return [i for i, n in Counter(i for ids in parts for i in ids).items() if n > 1]


def counted(ids: Sequence[str], what: str) -> str:
    """How many they are, and which the first are: 2 ids (a, b)."""
    first = [short_name(name) for name in ids[:6]]  # one more than is shown; there may be millions
    return f"{len(ids)} {what}{'s' if len(ids) > 1 else ''} ({few(first)})"
