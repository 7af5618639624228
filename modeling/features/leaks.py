"""Whether the rows that judge a training share pictures or texts with those it learns from, and how far the labels of
such duplicates agree: two rows with one picture and two labels can't both be predicted right from that."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modeling.features.joined import FeatureSet
from modeling.features.splits import EMPTY_TEXT_KEY, PARTS, Split

UNKNOWN = "unknown"


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
    rows = data.dataset
    labelled = [k for k, tag in enumerate(rows.tags) if tag]
    tag_of = {rows.ids[k]: rows.tags[k] for k in labelled}
    found = []
    for keys, ignored in ((rows.image_hash, {0}), (rows.text_key, {0, EMPTY_TEXT_KEY})):
        key_of = {rows.ids[k]: int(keys[k]) for k in labelled}
        known = any(key_of.values())
        shown = {i: key for i, key in key_of.items() if key not in ignored}
        found.append(_twins(shown, tag_of, splits) if known else None)
    return Leaks(*found)


def _twins(key_of: Mapping[str, int], tag_of: Mapping[str, str], splits: Sequence[Split]) -> Twins:
    members: dict[int, list[str]] = {}
    for i, key in key_of.items():
        members.setdefault(key, []).append(i)
    groups = [ids for ids in members.values() if len(ids) > 1]
    conflicting = sum(_disagree(ids, tag_of) for ids in groups)
    across = across_conflicting = 0
    leaking = dict.fromkeys(PARTS, 0)
    for split in splits:
        part_of = {i: part for part in PARTS for i in getattr(split, part)}
        for ids in groups:
            there = [i for i in ids if i in part_of]
            parts = [part_of[i] for i in there]
            if len(set(parts)) < 2:
                continue
            across += 1
            across_conflicting += _disagree(there, tag_of)
            if "train" in parts:
                for part in parts:
                    leaking[part] += 1
    return Twins(len(groups), conflicting, across, across_conflicting, leaking["val"], leaking["test"])


def _disagree(ids: Sequence[str], tag_of: Mapping[str, str]) -> bool:
    return len({tag_of[i] for i in ids}) > 1


def _leaking(name: str, twins: Twins) -> str:
    """How many rows have a twin in the training rows."""
    counts = ((twins.val_rows, "validation"), (twins.test_rows, "test"))
    rows = " and ".join(f"{count} {part}" for count, part in counts if count)
    disagree = f", {twins.across_conflicting} of them with different labels" if twins.across_conflicting else ""
    groups = f"{twins.across} group{'s' if twins.across > 1 else ''} across the parts{disagree}"
    return f"the {name} of {rows} rows are in the training rows, too ({groups})"
