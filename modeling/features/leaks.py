"""Whether the rows that judge a training share pictures or texts with those it learns from, and how far the labels of
such duplicates agree: two rows with one picture and two labels can't both be predicted right from that."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from feats.strings import Strings
from modeling.features.duplicates import IMAGE_UNKNOWN, TEXT_UNKNOWN, duplicate_sets, set_sizes
from modeling.features.joined import FeatureSet
from modeling.features.stored_splits import PARTS, Split

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
    rows = data.dataset.labelled
    parts = [_part_of(rows.ids, split) for split in splits]
    found = []
    for keys, ignored in ((rows.image_hash, IMAGE_UNKNOWN), (rows.text_key, TEXT_UNKNOWN)):
        found.append(_twins(*duplicate_sets(keys, ignored), rows.tags.codes, parts) if keys.any() else None)
    return Leaks(*found)


def _part_of(ids: Strings, split: Split) -> np.ndarray:
    """(N,) int8: which of `PARTS` each row is in, -1 for none."""
    part_of = np.full(len(ids), -1, np.int8)
    for number, part in enumerate(PARTS):
        rows = ids.positions(getattr(split, part))
        part_of[rows[rows >= 0]] = number
    return part_of


def _twins(rows: np.ndarray, starts: np.ndarray, codes: np.ndarray, parts: Sequence[np.ndarray]) -> Twins:
    """Of the sets of rows that `rows` (R,) and `starts` (S,) are, see `duplicate_sets`; `codes` (N,) and `parts`, (N,)
    each, are of all rows."""
    if not len(rows):
        return Twins()
    code = codes[rows]
    conflicting = int(_differ(code, np.ones(len(rows), bool), starts).sum())
    across = across_conflicting = val_rows = test_rows = 0
    for part_of in parts:
        part = part_of[rows]
        there = part >= 0
        several = _differ(part, there, starts)
        across += int(several.sum())
        across_conflicting += int((_differ(code, there, starts) & several).sum())
        trained = several & np.logical_or.reduceat(part == TRAIN, starts)
        leaking = np.repeat(trained, set_sizes(rows, starts))
        val_rows += int((leaking & (part == VAL)).sum())
        test_rows += int((leaking & (part == TEST)).sum())
    return Twins(len(starts), conflicting, across, across_conflicting, val_rows, test_rows)


def _differ(values: np.ndarray, there: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(S,) bool: which sets have different `values` (R,) among their rows that are `there` (R,) bool."""
    bounds = np.iinfo(values.dtype)
    least = np.minimum.reduceat(np.where(there, values, bounds.max), starts)
    most = np.maximum.reduceat(np.where(there, values, bounds.min), starts)
    return np.asarray(least < most)


def _leaking(name: str, twins: Twins) -> str:
    """How many rows have a twin in the training rows."""
    counts = ((twins.val_rows, "validation"), (twins.test_rows, "test"))
    rows = " and ".join(f"{count} {part}" for count, part in counts if count)
    disagree = f", {twins.across_conflicting} of them with different labels" if twins.across_conflicting else ""
    groups = f"{twins.across} group{'s' if twins.across > 1 else ''} across the parts{disagree}"
    return f"the {name} of {rows} rows are in the training rows, too ({groups})"
