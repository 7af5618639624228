"""Rows dealt out into parts and folds: seeded, stratified, duplicates on one side.

A split depends on the ids, their labels, the duplicate groups, the ratios and the seed, and on nothing else: not on
the order of the rows, the features, the head, or the version of a library's random generator. That is what makes two
runs comparable row by row. Hence a hash of (seed, id) in place of a generator, and rows dealt out by class in place of
scikit-learn's StratifiedGroupKFold, whose folds are multiples of 1/k and vary in size, at a second per 4000 rows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from feats.errors import UsageError
from feats.strings import BLOCK, Labels, Strings
from modeling.choices import FOLDS, SplitSettings
from modeling.features.stored_splits import PARTS, Split


def deal_split(
    ids: Sequence[str],
    labels: Sequence[str],
    val_ratio: float = SplitSettings.val_ratio,
    seed: int = SplitSettings.seed,
    groups: Sequence[int] | np.ndarray | None = None,
    test_ratio: float = SplitSettings.test_ratio,
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
    classes = check_labels(labels)
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
    k: int = FOLDS,
    seed: int = SplitSettings.seed,
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
    k: int = FOLDS,
    seed: int = SplitSettings.seed,
    groups: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Of each row the fold, from 0, that validates it in `deal_folds`, (N,) int8. Raises as that."""
    if k < 2:
        raise UsageError(f"{k} folds: there must be at least 2")
    if k > len(ids):
        raise UsageError(f"{k} folds of {len(ids)} rows: there can be no more than rows; give fewer `folds`")
    classes = check_labels(labels)
    fold_of = _assign(ids, labels, groups, [1 / k] * k, seed)
    _check_every_class_in(labels, classes, fold_of, groups, [f"fold {fold + 1} of {k}" for fold in range(k)])
    return fold_of


def split_of(parts: Mapping[str, Sequence[str]], how: dict[str, Any]) -> Split:
    """The split of these ids by part, each sorted."""
    train, val, test = (Strings.of(parts.get(part, [])) for part in PARTS)
    return Split(train[train.order], val[val.order], test[test.order], how)


def check_labels(labels: Sequence[str]) -> list[str]:
    """The classes of N labels, sorted. Raises `UsageError` for unknown labels, and for fewer than two classes."""
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
                found += f" in {together} duplicate group{'s' if together > 1 else ''}" if together < n else ""
            ratio = "give a larger `val_ratio` or fewer `folds`, or " if together > 1 else ""
            raise UsageError(
                f"class {name!r} ({found}) is too rare: none is left for {names[min(empty)]}; {ratio}leave that class "
                "out: empty its labels in the data and encode again, which only reads the labels, or list the other "
                "rows in a `split_file`"
            )
