"""Which rows are for training, validation and testing: seeded, stratified, duplicates on one side, or from files.

A split depends on the ids, their labels, the duplicate groups, the ratios and the seed, and on nothing else: not on
the order of the rows, the features, the head, or the version of a library's random generator. That is what makes two
runs comparable row by row. Hence a hash of (seed, id) in place of a generator, and rows dealt out by class in place of
scikit-learn's StratifiedGroupKFold, whose folds are multiples of 1/k and vary in size, at a second per 4000 rows.
"""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import numbered_csv, parse_csv
from feats.errors import UsageError, first_line, reason_of
from feats.escapes import short_name
from feats.json_files import MAX_BYTES, parse_json, read_json
from feats.regular import check_regular
from feats.strings import BLOCK, Labels, Strings
from feats.writing import replacing, write_json
from modeling.choices import SplitSettings as SplitSettings
from modeling.features.duplicates import Duplicates
from modeling.features.joined import FeatureSet

PARTS = ("train", "val", "test")
REMEDY = "train again"
_FOLD = {**dict.fromkeys((f"{part}?" for part in PARTS), [str]), "ids?": str, "how?": dict}
SHAPE = {**_FOLD, "folds?": [_FOLD]}  # of what `save_split` writes
# Of a split's file: Python's objects of more ids would take gigabytes, and a longer file isn't read.
MAX_JSON_IDS, MAX_JSON_BYTES = 1_000_000, MAX_BYTES // 2
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


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
    _check_disjoint({part: getattr(split, part) for part in PARTS}, "the split")


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
    folds = [_split(fold, path) for fold in _with_ids(content.get("folds", [content]), path)]
    return folds if "folds" in content else folds[0]


def _split(parts: Mapping[str, Any], path: Path) -> Split:
    if not {"train", "val"} <= parts.keys() <= {*PARTS, "how"}:
        raise UsageError(
            f"{path} names {short_name(', '.join(parts)) or 'nothing'}, expected {', '.join(PARTS)}; {REMEDY}"
        )
    return Split(**parts)


def _with_ids(folds: Sequence[Any], path: Path) -> list[Any]:
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


# -- splits of features -----------------------------------------------------------------------------------------


def make_split(
    data: FeatureSet,
    val_ratio: float = SplitSettings.val_ratio,
    test_ratio: float = SplitSettings.test_ratio,
    seed: int = SplitSettings.seed,
    *,
    duplicates_together: bool = True,
) -> Split:
    """Split the labelled rows of `data`: stratified, seeded, the same whichever caches of a data set were joined.

    Raises `UsageError` as `deal_split`, and when a part has no features at all.
    """
    [split] = make_splits(data, SplitSettings(val_ratio, test_ratio, seed, duplicates_together=duplicates_together))
    return split


def make_folds(
    data: FeatureSet, folds: int = 5, seed: int = SplitSettings.seed, *, duplicates_together: bool = True
) -> list[Split]:
    """As `make_split`: splits, each row in the validation part of exactly one."""
    return make_splits(data, SplitSettings(seed=seed, folds=folds, duplicates_together=duplicates_together))


def make_splits(data: FeatureSet, settings: SplitSettings) -> list[Split]:
    """One split of the labelled rows or several. Rows in quarantine are dealt out too and left out afterwards, so that
    every choice of caches gets the same split. Raises `UsageError` when there is nothing to split, when an id is there
    twice, and when a part has no row left."""
    dataset = data.dataset
    rows = dataset.labelled
    if not len(rows.ids):
        raise UsageError("none of the rows has a label; there is nothing to train on")
    if not rows.ids.unique:
        where = ", ".join(data.source.names)
        raise UsageError(f"ids are there more than once in {where}; make the caches again with `overwrite`")
    groups = rows.duplicates.groups if settings.duplicates_together and rows.duplicates is not None else None
    if settings.files:
        splits = read_split_file(settings.files, dataset.ids, dataset.tags)
        # Without a label there is nothing to test.
        splits = [replace(split, test=_among(Strings.of(split.test), rows.ids)) for split in splits]
    elif settings.folds:
        splits = deal_folds(rows.ids, rows.tags, settings.folds, settings.seed, groups)
    else:
        splits = [deal_split(rows.ids, rows.tags, settings.val_ratio, settings.seed, groups, settings.test_ratio)]
    splits = [split.without(data.left_out) for split in splits]
    for split in splits:
        for part, left in (("training", split.train), ("validation", split.val)):
            if not left:
                raise UsageError(
                    f"every {part} row was left out; extract again what is in quarantine, or split otherwise"
                )
    return splits


def _among(ids: Strings, others: Strings) -> Strings:
    return ids[others.positions(ids) >= 0]


def duplicates_of(data: FeatureSet) -> Duplicates | None:
    """The duplicate group of each labelled row, by id; None where no joined cache knows its contents."""
    return data.dataset.labelled.duplicates


# -- making splits ----------------------------------------------------------------------------------------------


def deal_split(
    ids: Sequence[str],
    labels: Sequence[str],
    val_ratio: float = 0.1,
    seed: int = 42,
    groups: Sequence[int] | np.ndarray | None = None,
    test_ratio: float = 0.0,
) -> Split:
    """Split labelled rows by class, `val_ratio` of them for validation and `test_ratio` for testing.

    Each class's share of a part is within one row of its ratio where its duplicate groups allow. `groups` (N,) gives
    each row a number; rows of one number stay together, see `modeling.features.duplicates`.
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
                "another ratio (`val_ratio`, `test_ratio`) or more rows"
            )
    part_of = _assign(ids, labels, groups, list(shares.values()), seed)
    names = list(shares)
    _check_every_class_in(labels, classes, part_of, groups, names)
    ids = Strings.of(ids)
    parts = {name: ids[_sorted_rows(ids, part_of == p)] for p, name in enumerate(names)}
    how = {"val_ratio": val_ratio, "test_ratio": test_ratio, "seed": seed, "duplicates_together": groups is not None}
    return Split(parts["train"], parts["val"], parts.get("test", Strings.of([])), how)


def _sorted_rows(ids: Strings, chosen: np.ndarray) -> np.ndarray:
    """The rows that are `chosen` (N,) bool, their ids sorted."""
    found: np.ndarray = ids.order[chosen[ids.order]]
    return found


def deal_folds(
    ids: Sequence[str],
    labels: Sequence[str],
    k: int = 5,
    seed: int = 42,
    groups: Sequence[int] | np.ndarray | None = None,
) -> list[Split]:
    """k splits, each row in the validation part of exactly one; otherwise as `deal_split`.

    Raises `UsageError` for fewer than two folds, and for a class that can't be in every fold.
    """
    fold_of = fold_numbers(ids, labels, k, seed, groups)
    ids = Strings.of(ids)
    how = {"folds": k, "seed": seed, "duplicates_together": groups is not None}
    return [
        Split(
            train=ids[_sorted_rows(ids, fold_of != fold)],
            val=ids[_sorted_rows(ids, fold_of == fold)],
            test=Strings.of([]),
            how={**how, "fold": fold + 1},
        )
        for fold in range(k)
    ]


def fold_numbers(
    ids: Sequence[str],
    labels: Sequence[str],
    k: int = 5,
    seed: int = 42,
    groups: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Of each row the fold, from 0, that validates it in `deal_folds`, (N,) int8. Raises as that."""
    if k < 2:
        raise UsageError(f"{k} folds: there must be at least 2")
    if k > len(ids):
        raise UsageError(f"{k} folds of {len(ids)} rows: there can be no more than rows; give fewer `folds`")
    classes = _check_labels(labels)
    fold_of = _assign(ids, labels, groups, [1 / k] * k, seed)
    _check_every_class_in(labels, classes, fold_of, groups, [f"fold {fold + 1} of {k}" for fold in range(k)])
    return fold_of


def _split_of(parts: Mapping[str, Sequence[str]], how: dict[str, Any]) -> Split:
    train, val, test = (Strings.of(parts.get(part, [])) for part in PARTS)
    return Split(train[train.order], val[val.order], test[test.order], how)


def _check_labels(labels: Sequence[str]) -> list[str]:
    counts = Labels.of(labels).counts()
    unknown = counts.pop("", 0)
    if unknown:
        raise UsageError(f"{unknown} of {len(labels)} rows have no label; only labelled rows can be split")
    classes = sorted(counts)
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
    """The part of each row, (N,) int8 where that holds them. Duplicate groups are dealt out first, the largest first;
    single rows then bring each class to its quota."""
    ids, labels = Strings.of(ids), Labels.of(labels)
    if not len(ids) == len(labels) == len(groups if groups is not None else ids) or not ids.unique:
        raise ValueError("ids must be unique, with one label and one group each")
    names = sorted(labels.counts())
    label_of = labels.numbers_as(names)
    units, single = _units(ids, groups, seed)
    share = np.asarray(shares)
    sizes = np.bincount(label_of, minlength=len(names))
    quota = share[:, None] * sizes
    held = np.zeros_like(quota)
    part_of = np.empty(len(ids), np.min_scalar_type(-len(share)))
    for rows in units:
        counts = np.bincount(label_of[rows], minlength=len(names))
        # To the part that is furthest behind its quota with half the group added (as Webster's method deals seats),
        # the rarer class counting more.
        part = int(np.argmin((held + counts / 2) / share[:, None] @ (counts / sizes**2)))
        part_of[rows] = part
        held[part] += counts
    surplus = np.zeros(len(share))  # of each part over its quotas, in the classes done so far
    for c in sorted(range(len(names)), key=lambda c: (sizes[c], names[c])):
        rows = single[label_of[single] == c]
        count = _deal(len(rows), quota[:, c], held[:, c], share, surplus)
        part_of[rows] = np.repeat(np.arange(len(share)), count)
        surplus += held[:, c] + count - quota[:, c]
    return part_of


def _units(
    ids: Strings, groups: Sequence[int] | np.ndarray | None, seed: int
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Rows that stay together, two or more each, the largest sets first; and those that stand alone, (M,). Both are in
    an order that else only the seed and the ids decide."""
    if groups is None:
        return iter(()), _dealt(ids, np.arange(len(ids)), seed)
    groups = np.asarray(groups)
    shared = _is_shared(groups)
    together = ids.order[shared[ids.order]]
    together = together[np.argsort(groups[together], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[together], prepend=groups[together[:1]] - 1))
    sizes = np.diff(starts, append=len(together))
    dealt = _dealt_order(ids, together[starts], seed)
    dealt = dealt[np.argsort(-sizes[dealt], kind="stable")]
    units = (together[starts[unit] : starts[unit] + sizes[unit]] for unit in dealt.tolist())
    return units, _dealt(ids, np.flatnonzero(~shared), seed)


def _is_shared(groups: np.ndarray) -> np.ndarray:
    """(N,) bool: whose number another row has, too."""
    order = np.argsort(groups, kind="stable")
    same = groups[order[1:]] == groups[order[:-1]]
    shared = np.zeros(len(groups), bool)
    shared[order[1:][same]] = True
    shared[order[:-1][same]] = True
    return shared


def _dealt(ids: Strings, rows: np.ndarray, seed: int) -> np.ndarray:
    """`rows` (M,) in the order of a hash of seed and id."""
    dealt: np.ndarray = rows[_dealt_order(ids, rows, seed)]
    return dealt


def _dealt_order(ids: Strings, rows: np.ndarray, seed: int) -> np.ndarray:
    """(M,) what brings `rows` (M,) into that order."""
    keys = np.empty((len(rows), 2), np.uint64)
    begin = hashlib.blake2b(f"{seed}/".encode(), digest_size=16)
    for low in range(0, len(rows), BLOCK):
        block = ids.encoded[rows[low : low + BLOCK]].tolist()
        digests = b"".join(_digest(begin, name) for name in block)
        keys[low : low + len(block)] = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((keys[:, 1], keys[:, 0]))


def _digest(begin: "hashlib.blake2b", name: bytes) -> bytes:
    whole = begin.copy()
    whole.update(name)
    return whole.digest()


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
    of_row = Labels.of(labels).numbers(classes)
    for number, name in enumerate(classes):
        rows = of_row == number
        empty = set(range(len(names))) - set(np.unique(part_of[rows]).tolist())
        if empty:
            n = together = int(rows.sum())
            found = f"{n} row{'s' if n > 1 else ''}"
            if groups is not None:
                together = len(set(np.asarray(groups)[rows].tolist()))
                found += f" in {together} duplicate groups"
            ratio = "give a larger `val_ratio` or fewer `folds`, or " if together > 1 else ""
            raise UsageError(
                f"class {name!r} ({found}) is too rare: none is left for {names[min(empty)]}; {ratio}leave that class "
                "out: empty its labels in the data and encode again, which only reads the labels, or list the other "
                "rows in a `split_file`"
            )


# -- splits from files ------------------------------------------------------------------------------------------


def read_split_file(paths: Path | str | Sequence[Path | str], ids: Sequence[str], labels: Sequence[str]) -> list[Split]:
    """The split in one file or three; several from a file of folds, or from lists of folds by a pattern.

    One JSON: `{"train": [ids], "val": [ids], "test": [ids]}`, also a run's split.json, or `{"folds": [...]}` of such,
    as a run with folds leaves. One CSV: columns `id` (or `guid`) and `split`. Two or three lists: CSV files whose first
    column are ids, or text files of one id per line (what follows a comma is ignored, unless it belongs to an id of
    `ids`), for the part in the file's name (`val.txt`, `my_train_ids.csv`), or, where no name tells, for train, val,
    test in that order. Lists of folds: a pattern such as `splits/{part}_{fold}.txt`, of which every name found in the
    place of `{fold}` is a fold; 2 comes before 10. Blanks around an id of a CSV or list are ignored, unless `ids` has
    it with them. Ids of `ids` that no part names stay unused. `labels` (N,) of `ids`, '' where unknown.
    Raises `UsageError` for unreadable files, unknown ids, ids named twice, an empty train or val part, rows without
    a label in them, one class only, a class that train or val lacks, and folds of which only some have a test part or,
    without test parts, several validate a row.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    source = ", ".join(map(str, files))
    ids, labels = Strings.of(ids), Labels.of(labels)
    as_json = len(files) == 1 and files[0].suffix.lower() == ".json"
    known = frozenset(() if as_json else ids)  # what a line means is told by whether it is an id, asked for each
    folds: dict[str, dict[str, Sequence[str]]] = {}  # of a pattern, by what is in the place of {fold}
    if any(place in source for place in PLACES):
        folds = _read_pattern(files, known)
        found = list(folds.values())
    elif len(files) == 1:
        found = _read_json(files[0]) if as_json else [_read_csv(files[0], known)]
    elif len(files) in (2, 3):
        found = [{part: _read_list(file, known) for part, file in zip(_parts_of_files(files), files, strict=True)}]
    else:
        raise UsageError(f"{len(files)} split files; give one (JSON or CSV), or three lists of ids: train, val, test")
    called = list(folds) or [f"{k} of {len(found)}" for k in range(1, len(found) + 1)]
    names = [f"{source}, fold {fold}" for fold in called] if len(called) > 1 else [source]
    for parts, name in zip(found, names, strict=True):
        _check_parts(parts, ids, labels, name)
    _check_folds(found, names, source)
    how: dict[str, Any] = {"files": [_from_first_place(file) for file in files]}
    hows = [{**how, "fold": fold} for fold in folds] or [how] * len(found)
    return [_split_of(parts, of_fold) for parts, of_fold in zip(found, hows, strict=True)]


def _check_folds(found: Sequence[dict[str, Sequence[str]]], names: Sequence[str], source: str) -> None:
    tested = [bool(parts.get("test")) for parts in found]
    if any(tested) and not all(tested):
        without, having = names[tested.index(False)], names[tested.index(True)]
        raise UsageError(f"{without} has no test part, and {having} has one; give one to every fold or to none")
    twice = _twice([parts["val"] for parts in found])
    if twice and not any(tested):
        raise UsageError(
            f"{source}: {_few(twice, 'id')} in the val part of several folds; keep one, or give every fold a test part"
        )


PLACES = ("{fold}", "{part}")  # in a pattern of file names


def _read_pattern(files: Sequence[Path], known: Collection[str]) -> dict[str, dict[str, Sequence[str]]]:
    """The parts of each fold."""
    pattern = files[0].as_posix()
    if len(files) > 1 or not all(place in pattern for place in PLACES):
        raise UsageError(
            f"split files {', '.join(map(str, files))}: a pattern stands alone and holds {' and '.join(PLACES)}, such "
            "as splits/{part}_{fold}.txt"
        )
    part_of = {**{part: part for part in PARTS}, **ALIASES}
    lists: dict[str, dict[str, Path]] = {}
    for fold, word in _matching(pattern, part_of):
        of_fold, part = lists.setdefault(fold, {}), part_of[word.lower()]
        file = Path(pattern.replace("{fold}", fold).replace("{part}", word))
        if part in of_fold:
            raise UsageError(f"{of_fold[part]} and {file} are both the {part} part of fold {fold}; keep one")
        of_fold[part] = file
    if not lists:
        raise UsageError(f"no file is called like {pattern}, with {', '.join(PARTS)} for {{part}}; check its folder")
    for fold, of_fold in lists.items():
        for part in PARTS[:2]:
            if part not in of_fold:
                there = ", ".join(str(file) for file in of_fold.values())
                raise UsageError(f"{pattern}: fold {fold} has no {part} list (there is {there}); add it")
    return {
        fold: {part: _read_list(lists[fold][part], known) for part in PARTS if part in lists[fold]}
        for fold in sorted(lists, key=_natural)
    }


def _matching(pattern: str, words: Collection[str]) -> list[tuple[str, str]]:
    """What stands for {fold} and {part} in the names of the files there are."""
    expression = re.escape(pattern)
    for place, meant in (("fold", "[^/]+"), ("part", f"(?i:{'|'.join(sorted(words, key=len, reverse=True))})")):
        escaped = re.escape(f"{{{place}}}")
        expression = expression.replace(escaped, f"(?P<{place}>{meant})", 1).replace(escaped, f"(?P={place})")
    paths = glob.glob(glob.escape(pattern).replace("{fold}", "*").replace("{part}", "*"))
    matches = [re.fullmatch(expression, Path(path).as_posix()) for path in sorted(paths)]
    return [(match["fold"], match["part"]) for match in matches if match]


def _natural(name: str) -> list[str | int]:
    """A key that sorts 2 before 10."""
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"(\d+)", name))]


def _from_first_place(file: Path) -> str:
    """A file's name; of a pattern also the folders that have a place."""
    first = next((k for k, part in enumerate(file.parts) if any(place in part for place in PLACES)), -1)
    return "/".join(file.parts[first:])


def _check_parts(parts: dict[str, Sequence[str]], ids: Strings, labels: Labels, source: str) -> None:
    _check_disjoint(parts, source)
    rows = {part: ids.positions(members) for part, members in parts.items()}
    unknown = [members[k] for part, members in parts.items() for k in np.flatnonzero(rows[part] < 0).tolist()]
    if unknown:
        raise UsageError(f"{source}: {_few(unknown, 'id')} not among the {len(ids)} rows of the data set")
    for part in ("train", "val"):
        if not len(parts.get(part, ())):
            raise UsageError(f"{source}: no ids for {part}; name some")
        bare = [parts[part][k] for k in np.flatnonzero(~labels.known[rows[part]]).tolist()]
        if bare:
            raise UsageError(f"{source}: {_few(bare, f'{part} id')} without a label in the data set")
    have = {part: set(labels[rows[part]].counts()) for part in ("train", "val")}
    _check_labels(labels[np.concatenate([rows["train"], rows["val"]])])
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
            f"can't tell which of {', '.join(path.name for path in paths)} is train, val and test; put the part in "
            "each file's name, or in none and give them in that order"
        )
    return [parts.pop() for parts in told]


def _read_json(path: Path) -> list[dict[str, Sequence[str]]]:
    """The parts of one split, or of each fold."""
    try:
        content = parse_json(_read(path))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({first_line(error)}); expected {_FORM}") from None
    folds = content["folds"] if isinstance(content, dict) and set(content) == {"folds"} else [content]
    if not isinstance(folds, list) or not folds:
        raise UsageError(f'{path} names no folds; expected {_FORM}, or {{"folds": [...]}} of such')
    return [_parts_of(fold, path) for fold in _with_ids(folds, path)]


def _parts_of(content: Any, path: Path) -> dict[str, Sequence[str]]:
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, expected {_FORM}")
    named: dict[str, Any] = content
    part_of = {name: ALIASES.get(name, name) for name in named if name != "how"}
    parts = {part: named[name] for name, part in part_of.items()}
    foreign = sorted(parts.keys() - set(PARTS))
    if len(parts) < len(part_of):  # two names of one part
        foreign += [name for name, part in part_of.items() if list(part_of.values()).count(part) > 1]
    if foreign or not all(map(_are_ids, parts.values())):
        problem = short_name(", ".join(map(str, foreign))) or "parts that are no lists of ids"
        raise UsageError(f"{path} holds {problem}, expected {_FORM}")
    return {
        part: members if isinstance(members, Strings) else [str(i) for i in members] for part, members in parts.items()
    }


def _are_ids(members: Any) -> bool:
    """Whether these are strings, or numbers that stand for such."""
    return isinstance(members, Strings) or (
        isinstance(members, list) and all(isinstance(i, str | int | float) and not isinstance(i, bool) for i in members)
    )


_FORM = '{"train": [ids], "val": [ids], "test": [ids]}'


def _read_csv(path: Path, known: Collection[str]) -> dict[str, Sequence[str]]:
    (_, columns), *rows = [(line, row) for line, row in numbered_csv(_read(path)) if row] or [(1, [])]
    key = next((name for name in ("id", "guid") if name in columns), None)
    if key is None or "split" not in columns:
        raise UsageError(f"{path} has columns {', '.join(columns) or '(none)'}; expected id and split")
    parts: dict[str, list[str]] = {}
    for line, row in rows:
        cells = {**dict.fromkeys(columns, ""), **dict(zip(columns, row, strict=False))}
        part = cells["split"].strip().lower()
        part = ALIASES.get(part, part)
        if part not in PARTS:
            raise UsageError(f"{path}, line {line}: split {part!r}; expected train, val or test")
        parts.setdefault(part, []).append(_known([cells[key]], known))
    return dict(parts)


def _read_list(path: Path, known: Collection[str]) -> list[str]:
    content = _read(path)
    if path.suffix.lower() == ".csv":
        candidates = [row[:1] for row in parse_csv(content) if row]
    else:
        # "\r" ends lines where no "\n" does; else it is part of an id, as Unicode's line separators are anywhere.
        lines = content.split("\n" if "\n" in content else "\r")
        candidates = [
            [line, line.removesuffix("\r"), line.rpartition(",")[0], line.partition(",")[0]] for line in lines if line
        ]
    names = [name for texts in candidates if (name := _known(texts, known))]
    return names[1:] if names and names[0].lower() in ("id", "guid") else names


def _known(candidates: Sequence[str], known: Collection[str]) -> str:
    """The first candidate that is a known id, as it stands or without the blanks around it; the last one without them
    where none is."""
    tried = [form for text in candidates for form in (text, text.strip())]
    return next((form for form in tried if form in known), tried[-1])


def _read(path: Path) -> str:
    """A file's text with the line ends it has there."""
    try:
        check_regular(path)
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "it isn't UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason_of(error)
        raise UsageError(f"can't read the split file {path}: {reason}") from None


def _check_disjoint(parts: dict[str, Sequence[str]], source: str) -> None:
    twice = _twice(list(parts.values()))
    if twice:
        where = ", ".join(part for part, members in parts.items() if twice[0] in members)
        raise UsageError(
            f"{source}: {_few(twice, 'id')} named more than once ({short_name(twice[0])} in {where}); keep one"
        )


def _twice(parts: Sequence[Sequence[str]]) -> list[str]:
    """The ids that are named more than once, in the order in which they first are."""
    compact = [ids for ids in parts if isinstance(ids, Strings)]
    if len(compact) == len(parts) and Strings.concatenate(compact).unique:
        return []
    return [i for i, n in Counter(i for ids in parts for i in ids).items() if n > 1]


def _few(ids: Sequence[str], what: str) -> str:
    some = ", ".join(map(short_name, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids)} {what}{'s' if len(ids) > 1 else ''} ({some})"
