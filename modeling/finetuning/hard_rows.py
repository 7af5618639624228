"""Training rows that a head gets wrong, of which augmented copies are added to training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from feats.csv_files import read_csv
from feats.errors import UsageError, first_line
from feats.escapes import few
from modeling.features.stored_splits import Split
from modeling.runs.config import PREDICTION_COLUMNS

REMEDY = "export the training rows of a run with this split (modeling/bad_cases.py)"


def hard_rows(path: Path, split: Split, group_of: Mapping[str, int] | None) -> list[str]:
    """The ids in a file of bad cases, as modeling/bad_cases.py writes it: in the file's order, each once.

    All are training rows of `split`, and none has the number in `group_of` (duplicates share one) of a row that
    validates or tests: copies of it would leak. Without `group_of` duplicates aren't known.
    Raises `UsageError` for any row that isn't such, naming the first few, and a file that isn't of this kind.
    """
    ids = list(dict.fromkeys(_read_ids(path)))
    held_out = {*split.val, *split.test}
    _refuse(path, [i for i in ids if i in held_out], "for validation or testing")
    groups = group_of or {}
    held_groups = {groups[i] for i in held_out if i in groups}
    _refuse(path, [i for i in ids if groups.get(i) in held_groups], "duplicates of rows for validation or testing")
    train = set(split.train)
    _refuse(path, [i for i in ids if i not in train], "no training rows of this split, of other data perhaps")
    return ids


def _read_ids(path: Path) -> list[str]:
    try:
        header, *rows = read_csv(path) or [[]]
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read {path} as a list of bad cases ({first_line(error)}); {REMEDY}") from None
    columns = list(PREDICTION_COLUMNS)
    if header[: len(columns)] != columns:
        raise UsageError(f"{path} begins with {','.join(header)[:60]!r}, expected {','.join(columns)},...; {REMEDY}")
    return [row[0] for row in rows if row]


def _refuse(path: Path, ids: Sequence[str], what: str) -> None:
    if ids:
        raise UsageError(f"{path}: {len(ids)} of its rows are {what} ({few(ids)}); {REMEDY}")
