"""Which rows are for training, validation and testing: seeded, stratified, duplicates on one side, or from files.

A split depends on the ids, their labels, the duplicate groups, the ratios and the seed, and on nothing else: not on
the order of the rows, the features, the head, or the version of a library's random generator. That is what makes two
runs comparable row by row. Hence a hash of (seed, id) in place of a generator, and rows dealt out by class in place of
scikit-learn's StratifiedGroupKFold, whose folds are multiples of 1/k and vary in size, at a second per 4000 rows.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feats.errors import UsageError

PARTS = ("train", "val", "test")
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
# What feats.images.hash64 gives for no bytes: the `text_key` of texts of which cleaning left nothing.
EMPTY_TEXT_KEY = int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Split:
    """Disjoint ids of the parts, each sorted. `how` says how it was made: ratios and seed, fold number, or files."""

    train: list[str]
    val: list[str]
    test: list[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)

    def without(self, ids: Iterable[str]) -> "Split":
        """The same split less some ids, e.g. those a cache has in quarantine."""
        gone = set(ids)
        return Split(*([i for i in getattr(self, part) if i not in gone] for part in PARTS), how=self.how)


def save_split(split: Split | Sequence[Split], path: Path | str) -> None:
    """Write a split, or several of the same rows, as JSON that `load_split` and `read_split_file` read."""
    content = vars(split) if isinstance(split, Split) else {"folds": [vars(fold) for fold in split]}
    # On one line: with an indent Python's encoder takes seven times as long, a second for a million ids.
    Path(path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def load_split(path: Path | str) -> Split | list[Split]:
    """What `save_split` wrote. Raises `OSError`, and `ValueError` or `TypeError` for anything else."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Split(**fold) for fold in content["folds"]] if "folds" in content else Split(**content)


# -- making splits ----------------------------------------------------------------------------------------------


def make_split(
    ids: Sequence[str],
    labels: Sequence[str],
    val_ratio: float = 0.1,
    seed: int = 42,
    groups: Sequence[int] | np.ndarray | None = None,
    test_ratio: float = 0.0,
) -> Split:
    """Split labelled rows by class, `val_ratio` of them for validation and `test_ratio` for testing.

    Each class's share of a part is within one row of its ratio where its duplicate groups allow. `groups` (N,) gives
    each row a number; rows of one number stay together, see `duplicate_groups`.
    Raises `UsageError` for ratios that leave nothing to train on, rows without a label, one class only, and a part
    that would lack a class.
    """
    if not 0 < val_ratio < 1 or not 0 <= test_ratio < 1 or val_ratio + test_ratio >= 1:
        raise UsageError(f"val ratio {val_ratio:g}, test ratio {test_ratio:g}: each and their sum must be in (0, 1)")
    shares = {"train": 1 - val_ratio - test_ratio, "val": val_ratio, "test": test_ratio}
    shares = {part: share for part, share in shares.items() if share > 0}
    classes = _check_labels(labels)
    for part, share in shares.items():
        if round(share * len(ids)) < len(classes):
            raise UsageError(
                f"the {part} split, {share:g} of {len(ids)} rows, is too small to hold {len(classes)} classes; give "
                "another ratio (--val-ratio) or more rows"
            )
    part_of = _assign(ids, labels, groups, list(shares.values()), seed)
    names = list(shares)
    _check_every_class_in(labels, classes, part_of, groups, names)
    parts = {name: sorted(ids[i] for i in np.flatnonzero(part_of == p)) for p, name in enumerate(names)}
    how = {"val_ratio": val_ratio, "test_ratio": test_ratio, "seed": seed, "duplicates_together": groups is not None}
    return Split(*(parts.get(part, []) for part in PARTS), how=how)


def make_folds(
    ids: Sequence[str],
    labels: Sequence[str],
    k: int = 5,
    seed: int = 42,
    groups: Sequence[int] | np.ndarray | None = None,
) -> list[Split]:
    """k splits, each row in the validation part of exactly one; otherwise as `make_split`.

    Raises `UsageError` for fewer than two folds, and for a class that can't be in every fold.
    """
    if k < 2:
        raise UsageError(f"{k} folds: there must be at least 2")
    classes = _check_labels(labels)
    fold_of = _assign(ids, labels, groups, [1 / k] * k, seed)
    _check_every_class_in(labels, classes, fold_of, groups, [f"fold {fold + 1} of {k}" for fold in range(k)])
    members = [sorted(ids[i] for i in np.flatnonzero(fold_of == fold)) for fold in range(k)]
    how = {"folds": k, "seed": seed, "duplicates_together": groups is not None}
    return [
        Split(
            train=sorted(i for other in range(k) if other != fold for i in members[other]),
            val=members[fold],
            how={**how, "fold": fold + 1},
        )
        for fold in range(k)
    ]


def duplicate_groups(image_hash: np.ndarray | None, text_key: np.ndarray | None) -> np.ndarray:
    """Group number of each row, (N,) int64: rows that share a picture or a text, directly or through others.

    `image_hash` (N,) of the picture's bytes, `text_key` (N,) of the text as compared (either may be None). 0 means
    unknown and ties nothing; nor does the key of the empty text: two pairs without words are no duplicates.
    """
    columns = [column for column in (image_hash, text_key) if column is not None]
    if not columns:
        raise ValueError("neither picture hashes nor text keys: there is nothing to find duplicates by")
    parent = list(range(len(columns[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]  # halve the path on the way
        return row

    for column, ignored in ((image_hash, {0}), (text_key, {0, EMPTY_TEXT_KEY})):
        first: dict[int, int] = {}
        for row, key in enumerate([] if column is None else column.tolist()):
            if key not in ignored:
                a, b = sorted((root(first.setdefault(key, row)), root(row)))
                parent[b] = a
    return np.array([root(row) for row in range(len(parent))], np.int64)


def _check_labels(labels: Sequence[str]) -> list[str]:
    unknown = sum(not label for label in labels)
    if unknown:
        raise UsageError(f"{unknown} of {len(labels)} rows have no label; only labelled rows can be split")
    classes = sorted(set(labels))
    if len(classes) < 2:
        found = f"all {len(labels)} rows are {classes[0]!r}" if classes else "there are no rows"
        raise UsageError(f"{found}: a classifier needs two classes or more")
    return classes


def _assign(
    ids: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[int] | np.ndarray | None,
    shares: Sequence[float],
    seed: int,
) -> np.ndarray:
    """The part of each row, (N,). Duplicate groups are dealt out first, the largest first; single rows then bring
    each class to its quota."""
    if not len(ids) == len(labels) == len(groups if groups is not None else ids) == len(set(ids)):
        raise ValueError("ids must be unique, with one label and one group each")
    names, label_of = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    units = _units(ids, groups, seed)
    share = np.asarray(shares)
    sizes = np.bincount(label_of, minlength=len(names))
    quota = share[:, None] * sizes
    held = np.zeros_like(quota)
    part_of = np.empty(len(ids), np.int64)
    for rows in sorted((unit for unit in units if len(unit) > 1), key=len, reverse=True):
        counts = np.bincount(label_of[rows], minlength=len(names))
        # To the part that is furthest behind its quota with half the group added (as Webster's method deals seats),
        # the rarer class counting more.
        part = int(np.argmin((held + counts / 2) / share[:, None] @ (counts / sizes**2)))
        part_of[rows] = part
        held[part] += counts
    singles: list[list[int]] = [[] for _ in names]
    for unit in units:
        if len(unit) == 1:
            singles[label_of[unit[0]]].append(unit[0])
    surplus = np.zeros(len(share))  # of each part over its quotas, in the classes done so far
    for c in sorted(range(len(names)), key=lambda c: (sizes[c], names[c])):
        count = _deal(len(singles[c]), quota[:, c], held[:, c], share, surplus)
        part_of[singles[c]] = np.repeat(np.arange(len(share)), count)
        surplus += held[:, c] + count - quota[:, c]
    return part_of


def _units(ids: Sequence[str], groups: Sequence[int] | np.ndarray | None, seed: int) -> list[list[int]]:
    """Rows that stay together, in an order that only the seed and the ids decide."""
    together: dict[Any, list[int]] = {}
    for row in sorted(range(len(ids)), key=ids.__getitem__):
        together.setdefault(row if groups is None else int(groups[row]), []).append(row)

    def key(unit: list[int]) -> bytes:
        return hashlib.blake2b(f"{seed}/{ids[unit[0]]}".encode(), digest_size=16).digest()

    return sorted(together.values(), key=key)


def _deal(n: int, quota: np.ndarray, held: np.ndarray, share: np.ndarray, surplus: np.ndarray) -> np.ndarray:
    """How many of a class's n single rows each part gets, (P,): what it lacks, by largest remainder.

    The odd rows go to parts without any of the class, then to those most behind in rows over all classes, so that
    roundings don't add up."""
    need = np.maximum(quota - held, 0)
    need = n * (need / need.sum() if need.sum() > 0 else share)
    count = np.floor(need + 1e-9).astype(np.int64)
    behind = surplus + held + count - quota
    order = sorted(range(len(share)), key=lambda p: (held[p] + count[p] > 0, round(behind[p], 9), p))
    count[order[: n - count.sum()]] += 1
    return count


def _check_every_class_in(
    labels: Sequence[str],
    classes: Sequence[str],
    part_of: np.ndarray,
    groups: Sequence[int] | np.ndarray | None,
    names: Sequence[str],
) -> None:
    labels = np.asarray(labels, dtype=str)
    for name in classes:
        rows = labels == name
        empty = set(range(len(names))) - set(part_of[rows].tolist())
        if empty:
            n = int(rows.sum())
            found = f"{n} row{'s' if n > 1 else ''}"
            if groups is not None:
                found += f" in {len(set(np.asarray(groups)[rows].tolist()))} duplicate groups"
            raise UsageError(
                f"class {name!r} ({found}) is too rare: none is left for {names[min(empty)]}; give a larger "
                "--val-ratio or fewer --folds, or leave that class out"
            )


# -- splits from files ------------------------------------------------------------------------------------------


def read_split_file(paths: Path | str | Sequence[Path | str], ids: Sequence[str], labels: Sequence[str]) -> list[Split]:
    """The split in one file or three; several only from a file of folds.

    One JSON: `{"train": [ids], "val": [ids], "test": [ids]}`, also a run's split.json, or `{"folds": [...]}` of such,
    as a run with folds leaves. One CSV: columns `id` (or `guid`) and `split`. Two or three text files: one id per line
    (what follows a comma is ignored), for the part in the file's name (`val.txt`, `my_train_ids.csv`), or, where no
    name tells, for train, val, test in that order.
    Ids of `ids` that no part names stay unused. `labels` (N,) of `ids`, '' where unknown.
    Raises `UsageError` for unreadable files, unknown ids, ids named twice, an empty train or val part, rows without
    a label in them, one class only, a class that train or val lacks, and folds with a test part or that validate a row
    twice.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    source = ", ".join(map(str, paths))
    if len(paths) == 1:
        found = _read_json(paths[0]) if paths[0].suffix.lower() == ".json" else [_read_csv(paths[0])]
    elif len(paths) in (2, 3):
        found = [{part: _read_lines(path) for part, path in zip(_parts_of_files(paths), paths, strict=True)}]
    else:
        raise UsageError(f"{len(paths)} split files; give one (JSON or CSV), or three lists of ids: train, val, test")
    label_of = dict(zip(ids, labels, strict=True))
    names = [source] if len(found) == 1 else [f"{source}, fold {k} of {len(found)}" for k in range(1, len(found) + 1)]
    for parts, name in zip(found, names, strict=True):
        _check_parts(parts, label_of, name)
    if len(found) > 1:
        twice = [i for i, n in Counter(i for parts in found for i in parts["val"]).items() if n > 1]
        if twice:
            raise UsageError(f"{source}: {_few(twice, 'id')} in the val part of several folds; keep one")
        if any(parts.get("test") for parts in found):
            raise UsageError(f"{source}: folds with a test part; name train and val only, every row is tested as val")
    how = {"files": [path.name for path in paths]}
    return [Split(*(sorted(parts.get(part, [])) for part in PARTS), how=how) for parts in found]


def _check_parts(parts: dict[str, list[str]], label_of: dict[str, str], source: str) -> None:
    _check_disjoint(parts, source)
    unknown = [i for members in parts.values() for i in members if i not in label_of]
    if unknown:
        raise UsageError(f"{source}: {_few(unknown, 'id')} not among the {len(label_of)} rows of the data set")
    for part in ("train", "val"):
        if not parts.get(part):
            raise UsageError(f"{source}: no ids for {part}; name some")
        bare = [i for i in parts[part] if not label_of[i]]
        if bare:
            raise UsageError(f"{source}: {_few(bare, f'{part} id')} without a label in the data set")
    have = {part: {label_of[i] for i in parts[part]} for part in ("train", "val")}
    _check_labels([label_of[i] for part in ("train", "val") for i in parts[part]])
    for part, other in (("val", "train"), ("train", "val")):
        missing = sorted(have[other] - have[part])
        if missing:
            raise UsageError(f"{source}: {part} holds no row of class {', '.join(missing)}; move some there")


def _parts_of_files(paths: Sequence[Path]) -> list[str]:
    known = {**{part: part for part in PARTS}, **ALIASES}
    told = []
    for path in paths:
        words = "".join(c if c.isalnum() else " " for c in path.stem.lower()).split()
        told.append({known[word] for word in words if word in known})
    if not any(told):
        return list(PARTS[: len(paths)])
    if any(len(parts) != 1 for parts in told) or len(set.union(*told)) != len(paths):
        raise UsageError(
            f"can't tell which of {', '.join(path.name for path in paths)} is train, val and test; put the part in each "
            "file's name, or in none and give them in that order"
        )
    return [parts.pop() for parts in told]


def _read_json(path: Path) -> list[dict[str, list[str]]]:
    """The parts of one split, or of each fold."""
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON ({error}); expected {_FORM}") from None
    folds = content["folds"] if isinstance(content, dict) and set(content) == {"folds"} else [content]
    if not isinstance(folds, list) or not folds:
        raise UsageError(f'{path} names no folds; expected {_FORM}, or {{"folds": [...]}} of such')
    return [_parts_of(fold, path) for fold in folds]


def _parts_of(content: Any, path: Path) -> dict[str, list[str]]:
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, expected {_FORM}")
    parts = {ALIASES.get(part, part): members for part, members in content.items() if part != "how"}
    foreign = sorted(parts.keys() - set(PARTS))
    if foreign or not all(isinstance(members, list) for members in parts.values()):
        raise UsageError(f"{path} holds {', '.join(map(str, foreign)) or 'parts that are no lists'}, expected {_FORM}")
    return {part: [str(i) for i in members] for part, members in parts.items()}


_FORM = '{"train": [ids], "val": [ids], "test": [ids]}'


def _read_csv(path: Path) -> dict[str, list[str]]:
    rows = csv.DictReader(_read(path).splitlines())
    columns = rows.fieldnames or []
    key = next((name for name in ("id", "guid") if name in columns), None)
    if key is None or "split" not in columns:
        raise UsageError(f"{path} has columns {', '.join(map(str, columns)) or '(none)'}; expected id and split")
    parts: dict[str, list[str]] = {}
    for row in rows:
        part = (row["split"] or "").strip().lower()
        part = ALIASES.get(part, part)
        if part not in PARTS:
            raise UsageError(f"{path}, line {rows.line_num}: split {part!r}; expected train, val or test")
        parts.setdefault(part, []).append((row[key] or "").strip())
    return parts


def _read_lines(path: Path) -> list[str]:
    names = [line.split(",")[0].strip() for line in _read(path).splitlines()]
    names = [name for name in names if name]
    return names[1:] if names and names[0].lower() in ("id", "guid") else names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it isn't UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"can't read the split file {path}: {reason}") from None


def _check_disjoint(parts: dict[str, list[str]], source: str) -> None:
    twice = [i for i, n in Counter(i for members in parts.values() for i in members).items() if n > 1]
    if twice:
        where = ", ".join(part for part, members in parts.items() if twice[0] in members)
        raise UsageError(f"{source}: {_few(twice, 'id')} named more than once ({twice[0]} in {where}); keep one")


def _few(ids: Sequence[str], what: str) -> str:
    return f"{len(ids)} {what}{'s' if len(ids) > 1 else ''} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
