"""The raw pairs that caches were made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from feats.errors import UsageError
from feats.extraction.local import changed_rows
from feats.parts import is_cache, open_cache
from feats.records import DataSet, Pairs, detected_layout, read_dataset
from feats.source import Source
from modeling.features.joined import FeatureSource
from modeling.runs.run import Finetuned, Run

DATA = Path("data")
TABLE = "manifest"  # the layout that has columns


@dataclass(frozen=True)
class DataPlace:
    """Where raw pairs lie, and how: `path` None is where caches say, or else `data`; `layout` and `columns` are those
    of `feats.records.read_dataset`."""

    path: Path | None = None
    layout: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def over(self, known: "DataPlace") -> "DataPlace":
        """This place where it says something, else the known one. Columns that were named of a table are those of the
        same table at another place, too. Raises `UsageError` for a place that can't be looked at."""
        path = self.path or known.path
        layout = self.layout or (known.layout if self.path is None else None)
        kept = known.columns
        if kept and path is not None and detected_layout(path, layout) != TABLE:
            kept = {}
        return DataPlace(path, layout, {**kept, **self.columns})

    def read(self) -> DataSet:
        """The data set there. Raises as `read_dataset`."""
        return read_dataset(self.path or DATA, self.layout, columns=self.columns)


def kept_place(source: Source) -> DataPlace:
    """Where a cache's pairs lay when it was made."""
    return DataPlace(Path(source.resolved), source.layout, source.columns)


def tuned_place(tuned: Finetuned) -> DataPlace:
    """Where the pairs lay that a finetuned run's encoders were tuned on."""
    return DataPlace(Path(tuned.data), tuned.layout, tuned.columns)


def records_of_run(run: Run, feats: Path | None, place: DataPlace) -> Pairs:
    """The pairs that a run's training caches, in the folder `feats` (None: where they lay), were made of; of a
    finetuned one that has made none yet those it was tuned on. Raises `UsageError` as `records_of`."""
    source = replace(run.source, folder=run.feature_folder(feats))
    if run.finetuned is None or feats is not None or is_cache(source.path(source.names[0], "train")):
        return records_of(source, place)
    place = place.over(tuned_place(run.finetuned))
    records = place.read()["train"]
    lacking = {name for split in run.splits for name in split.val} - {record.id for record in records}
    if lacking:
        raise UsageError(
            f"{place.path} lacks {len(lacking)} of the validation rows of {run.named}, such as {min(lacking)}; name "
            "the right folder with `data`"
        )
    return records


def records_of(source: FeatureSource, place: DataPlace) -> Pairs:
    """The pairs that caches were made of. Raises `UsageError` when they aren't found, or are others."""
    stores = [source.path(name, "train") for name in source.names]
    with open_cache(stores[0]) as store:
        kept = store.source
    if place.path is None and kept is None:
        raise UsageError(f"{stores[0]} doesn't say where its pairs lie; name their folder with `data`")
    place = place.over(kept_place(kept)) if kept else place
    path, split = place.path, kept.split if kept else "train"
    records = place.read()[split]
    for file in stores:
        with open_cache(file) as store:
            if store.ids.tolist() != [record.id for record in records]:
                common = len(set(store.ids.tolist()) & {record.id for record in records})
                raise UsageError(
                    f"{path} holds other data than {file} was made of ({len(records)} and {len(store)} rows, {common} "
                    "ids in common); name the right folder with `data`"
                )
            changed = changed_rows(store, records)
        if changed:
            some = ", ".join(f"{i} ({what})" for i, what in list(changed.items())[:5])
            raise UsageError(
                f"{len(changed)} rows in {path} hold other content than when {file} was made: {some}; name the right "
                "folder with `data`, or extract and train again"
            )
    return records
