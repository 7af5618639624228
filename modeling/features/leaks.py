"""Whether the rows that judge a training share pictures or texts with those it learns from, and how far the labels of
such duplicates agree: two rows with one picture and two labels can't both be predicted right from that."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from feats.strings import Strings
from modeling.features.joined import FeatureSet
from modeling.features.splits import IMAGE_UNKNOWN, PARTS, TEXT_UNKNOWN, Split, shared_keys

UNKNOWN = "unknown"
TRAIN, VAL, TEST = range(len(PARTS))


@dataclass(frozen=True)
class Twins:
    """What there is of rows with the same picture, or with the same text.

    `groups`: sets of two labelled rows or more that share one, `conflicting` of them hold different labels. `across`:
    groups with rows in several parts of a split, `across_conflicting` of these hold different labels. `val_rows` and
    `test_rows` have a twin among the training rows. Of several splits the last four are sums.
    """

    groups: int = 0
    conflicting: int = 0
    across: int = 0
    across_conflicting: int = 0
    val_rows: int = 0
    test_rows: int = 0


@dataclass(frozen=True)
class Leaks:
    """Of pictures and of texts; None where no cache knows which are the same."""

    pictures: Twins | None
    texts: Twins | None

    def as_json(self) -> dict[str, Any]:
        """For metrics.json: the numbers of `Twins`, or "unknown"."""
        return {name: UNKNOWN if of is None else asdict(of) for name, of in vars(self).items()}

    def line(self) -> str:
        """All of it in one line."""
        known = {name: twins for name, twins in vars(self).items() if twins is not None}
        if not known:
            return "leaks: unknown, no cache tells which pictures and texts are the same"
        clean = [f"no {name[:-1]}" for name, twins in known.items() if not twins.val_rows + twins.test_rows]
        parts = [f"{' and '.join(clean)} of a validation or test row is in the training rows"] if clean else []
        parts += [_leaking(name, twins) for name, twins in known.items() if twins.val_rows + twins.test_rows]
        parts += [
            f"{twins.conflicting} of {twins.groups} groups with one {name[:-1]} disagree in label"
            for name, twins in known.items()
            if twins.groups
        ]
        parts += [f"{name} unknown" for name in vars(self) if name not in known]
        return f"leaks: {'; '.join(parts)}"


def find_leaks(data: FeatureSet, splits: Sequence[Split]) -> Leaks:
    """What the parts of `splits` have in common, by all that the joined caches and those beside them know. Rows in
    quarantine count for `groups`, which are of the whole labelled data."""
    rows = data.dataset.take(np.flatnonzero(data.dataset.tags.known))
    parts = [_part_of(rows.ids, split) for split in splits]
    found = []
    for keys, ignored in ((rows.image_hash, IMAGE_UNKNOWN), (rows.text_key, TEXT_UNKNOWN)):
        found.append(_twins(*shared_keys(keys, ignored), rows.tags.codes, parts) if keys.any() else None)
    return Leaks(*found)


def _part_of(ids: Strings, split: Split) -> np.ndarray:
    """(N,) int8: which of `PARTS` each row is in, -1 for none."""
    part_of = np.full(len(ids), -1, np.int8)
    for number, part in enumerate(PARTS):
        rows = ids.positions(getattr(split, part))
        part_of[rows[rows >= 0]] = number
    return part_of


def _twins(rows: np.ndarray, keys: np.ndarray, codes: np.ndarray, parts: Sequence[np.ndarray]) -> Twins:
    """Of `rows` (R,) whose keys others have, too: `keys` (R,); `codes` (N,) and `parts`, (N,) each, are of all rows."""
    group_of = np.unique(keys, return_inverse=True)[1]
    groups = int(group_of.max(initial=-1)) + 1
    conflicting = int((_distinct(group_of, codes[rows], groups) > 1).sum())
    across = across_conflicting = val_rows = test_rows = 0
    for part_of in parts:
        there = part_of[rows] >= 0
        group, part, code = group_of[there], part_of[rows[there]], codes[rows[there]]
        several = _distinct(group, part, groups) > 1
        across += int(several.sum())
        across_conflicting += int((_distinct(group, code, groups) > 1)[several].sum())
        trained = several & (np.bincount(group[part == TRAIN], minlength=groups) > 0)
        leaking = part[trained[group]]
        val_rows += int((leaking == VAL).sum())
        test_rows += int((leaking == TEST).sum())
    return Twins(groups, conflicting, across, across_conflicting, val_rows, test_rows)


def _distinct(group_of: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """How many different `values` (R,) each group has, (groups,)."""
    order = np.lexsort((values, group_of))
    group, value = group_of[order], values[order]
    new = np.ones(len(order), bool)
    new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    return np.bincount(group[new], minlength=groups)


def _leaking(name: str, twins: Twins) -> str:
    """How many rows have a twin in the training rows."""
    counts = ((twins.val_rows, "validation"), (twins.test_rows, "test"))
    rows = " and ".join(f"{count} {part}" for count, part in counts if count)
    disagree = f", {twins.across_conflicting} of them with different labels" if twins.across_conflicting else ""
    groups = f"{twins.across} group{'s' if twins.across > 1 else ''} across the parts{disagree}"
    return f"the {name} of {rows} rows are in the training rows, too ({groups})"
