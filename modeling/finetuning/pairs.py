"""The raw pairs that caches were made of."""

from dataclasses import dataclass
from pathlib import Path

from feats.errors import UsageError
from feats.extraction.local import changed_rows
from feats.parts import open_cache
from feats.records import Pairs, read_dataset
from modeling.features.joined import FeatureSource


@dataclass(frozen=True)
class DataPlace:
    """Where raw pairs lie: `path` None is where caches say."""

    path: Path | None = None
    layout: str | None = None


def records_of(source: FeatureSource, place: DataPlace) -> Pairs:
    """The pairs that caches were made of. Raises `UsageError` when they aren't found, or are others."""
    stores = [source.path(name, "train") for name in source.names]
    with open_cache(stores[0]) as store:
        kept = store.source
    if place.path is None and kept is None:
        raise UsageError(f"{stores[0]} doesn't say where its pairs lie; name their folder with `data`")
    path = place.path or Path(kept.resolved if kept else "")
    split = kept.split if kept else "train"
    layout, columns = (kept.layout, kept.columns) if kept and place.path is None else (None, {})
    records = read_dataset(path, place.layout or layout, columns=columns)[split]
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
