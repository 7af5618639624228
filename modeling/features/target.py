"""Another target: the labels of another column of the data set that caches were made of, in place of the caches'."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feats.csv_files import read_table, write_csv
from feats.errors import UsageError
from feats.parts import open_cache
from feats.records import read_labels
from feats.strings import Labels

RAW = "raw"  # the split of pairs that a user gives, with the labels that are meant
FILE_COLUMNS = ("split", "id", "label")


@dataclass(frozen=True)
class Target:
    """The labels in a `column` of the table `data`: by split, by id, '' where unknown."""

    column: str
    data: str
    labels: Mapping[str, Mapping[str, str]] = field(repr=False)

    def tags(self, split: str, ids: Sequence[str]) -> Labels:
        """The labels of a split's rows; '' of all where the table doesn't know each of them: those of other data are
        of another target."""
        known = self.labels.get(split, {})
        if any(name not in known for name in ids):
            return Labels.of([""] * len(ids))
        return Labels.of([known[name] for name in ids])

    def words(self) -> str:
        """What it is, for a protocol."""
        return f"labels of column {self.column}"

    def digest(self) -> str:
        """Hex sha256 of all labels, whatever their order."""
        return hashlib.sha256(json.dumps(self._rows()).encode()).hexdigest()

    def _rows(self) -> list[list[str]]:
        return sorted([split, name, tag] for split, of_split in self.labels.items() for name, tag in of_split.items())

    def save(self, path: Path) -> None:
        """Write the labels as a file that `load_target` reads."""
        write_csv(path, [FILE_COLUMNS, *self._rows()])

    def as_json(self) -> dict[str, object]:
        """What is noted of it beside its file."""
        count = sum(map(len, self.labels.values()))
        return {"column": self.column, "data": self.data, "count": count, "sha256": self.digest()}


def read_target(column: str, data: Path | None, cache: Path, ids: Sequence[str]) -> Target:
    """The labels in `column` of the table `data`, None: of the one that `cache` was made of. Raises `UsageError` as
    `feats.records.read_labels`, where that table isn't known, and for training rows `ids` that it lacks."""
    with open_cache(cache) as store:
        kept = store.source
    if data is None and kept is None:
        raise UsageError(f"{cache} doesn't say where its pairs lie; name their table with `data`")
    place = str(data) if data is not None else kept.resolved if kept else ""
    columns = kept.columns if kept and data is None else {}
    target = Target(column, place, read_labels(place, column, columns=columns))
    known = target.labels.get("train", {})
    lacking = [name for name in ids if name not in known]
    if lacking:
        raise UsageError(
            f"{place} lacks {len(lacking)} of the {len(ids)} train rows of {cache.name} (e.g. {lacking[0]}); name "
            "the table they came from with `data`"
        )
    if not any(known[name] for name in ids):
        raise UsageError(f"{place}: column {column} holds no label of the {len(ids)} train rows; name another column")
    return target


def load_target(path: Path, known: Mapping[str, object]) -> Target:
    """What `Target.save` wrote. Raises `OSError` and `ValueError` when it isn't there or isn't what `known`, a run's
    note of it, tells."""
    labels: dict[str, dict[str, str]] = {}
    for row in read_table(path):
        labels.setdefault(row["split"], {})[row["id"]] = row["label"]
    target = Target(str(known["column"]), str(known["data"]), labels)
    if target.digest() != known["sha256"]:
        raise ValueError(f"{path.name} isn't what the run was saved with")
    return target
