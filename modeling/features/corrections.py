"""Corrected labels: what a person made of a label audit, or any list of ids and labels. Caches keep their own labels;
a run is trained with the corrected ones and keeps them."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from feats.csv_files import numbered_csv, read_table, unquoted, write_csv
from feats.errors import UsageError
from feats.escapes import few
from feats.regular import check_regular
from modeling.features.joined import FeatureSet, Rows
from modeling.features.stored_splits import Split

COLUMNS = ("id", "label")
# The columns that may say a label, the first that isn't empty wins. A label audit has `given`, the label it audited:
# where that was corrected before, it stays so.
LABEL_COLUMNS = ("corrected", "label", "given")
Line = tuple[int, str, str]  # its number, an id, a label or ''


def read_corrections(path: Path, dataset: Rows) -> dict[str, str]:
    """The labels in a file that differ from those of `dataset`, by id.

    The file is CSV with the columns id and label, or the queue of a label audit with labels in its column corrected;
    empty cells change nothing. It may have been written `safe` for spreadsheets (see `feats.csv_files.write_rows`): it
    is read as such where more of its ids and labels are known then. Raises `UsageError` for an unreadable file, one of
    other columns, an id named twice, ids that aren't among the labelled rows, and labels that none of these has.
    """
    label_of = {name: tag for name, tag in zip(dataset.ids, dataset.tags, strict=True) if tag}
    classes = sorted(set(label_of.values()))
    found: dict[str, str] = {}
    for line, name, label in _as_meant(_lines(path), label_of.keys(), {*classes, ""}):
        if name in found:
            raise UsageError(f"{path}, line {line}: id {name} is named twice; keep one")
        found[name] = label
    unknown = [name for name in found if name not in label_of]
    if unknown:
        raise UsageError(
            f"{path}: {len(unknown)} of {len(found)} ids ({few(unknown)}) aren't among the {len(label_of)} labelled "
            "rows; corrections change labels, they add none"
        )
    foreign = sorted(set(found.values()) - {*classes, ""})
    if foreign:
        raise UsageError(f"{path}: label {foreign[0]!r} is no class of the data; expected {', '.join(classes)}")
    return {name: label for name, label in found.items() if label not in ("", label_of[name])}


def _as_meant(lines: list[Line], ids: Collection[str], labels: Collection[str]) -> list[Line]:
    """The lines as they are, or without the quotes of a `safe` file where that makes more of them known."""
    readings = lines, [(line, unquoted(name), unquoted(label)) for line, name, label in lines]
    return max(readings, key=lambda reading: sum((i in ids) + (label in labels) for _, i, label in reading))


def _lines(path: Path) -> list[Line]:
    """Line number, id and label, '' for none, of each row."""
    try:
        check_regular(path)
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it isn't UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"can't read the corrections {path}: {reason}") from None
    (_, columns), *rows = [(line, row) for line, row in numbered_csv(text) if row] or [(1, [])]
    named = [name for name in LABEL_COLUMNS if name in columns]
    if "id" not in columns or not set(named) & {"corrected", "label"}:
        shown = ",".join(columns)[:60] or "(nothing)"
        raise UsageError(
            f"{path} has columns {shown}; expected {' and '.join(COLUMNS)}, or those of a label audit with corrected"
        )
    found = []
    for line, row in rows:
        cells = {"id": "", **dict(zip(columns, row, strict=False))}
        labels = [text for name in named if (text := cells.get(name, "").strip())]
        found.append((line, cells["id"], labels[0] if labels else ""))
    return found


def corrected_words(data: FeatureSet, splits: Sequence[Split]) -> str:
    """How many labels of `data` are corrected, and in which parts of `splits`; '' for none."""
    if not data.corrections:
        return ""
    part_of = dict.fromkeys(data.corrections, "unused")
    for split in splits:
        for part, ids in (("training", split.train), ("validation", split.val), ("test", split.test)):
            # Of folds every row validates in one, and that is what figures rest on.
            part_of |= {name: part for name in ids if name in part_of and part_of[name] != "validation"}
    counts = Counter(part_of.values())
    parts = ", ".join(f"{count} of {part} rows" for part, count in sorted(counts.items()))
    held_out = "" if counts.keys() <= {"training", "unused"} else ": figures on these go by the corrected labels"
    return f"{len(part_of)} label{'s' if len(part_of) > 1 else ''} corrected ({parts}{held_out})"


# -- in a run ---------------------------------------------------------------------------------------------------


def corrections_digest(corrections: Mapping[str, str]) -> str:
    """Hex sha256 of ids and labels, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(corrections.items())).encode()).hexdigest()


def save_corrections(corrections: Mapping[str, str], path: Path) -> None:
    """Write a file that `load_corrections` and `read_corrections` read."""
    write_csv(path, [COLUMNS, *corrections.items()])


def load_corrections(path: Path, known: Mapping[str, object]) -> dict[str, str]:
    """What `save_corrections` wrote. Raises `OSError` and `ValueError` when it isn't there or its digest isn't that of
    `known`, a run's note of it."""
    corrections = {row["id"]: row["label"] for row in read_table(path)}
    if corrections_digest(corrections) != known["sha256"]:
        raise ValueError(f"{path.name} isn't what the run was saved with")
    return corrections
