"""Which rows of a feature set are for training, validation and testing: dealt out, or from files."""

from dataclasses import replace

from feats.errors import UsageError
from feats.strings import Strings
from modeling.choices import FOLDS, SplitSettings
from modeling.features.dealing import deal_folds, deal_split
from modeling.features.duplicates import Duplicates
from modeling.features.joined import FeatureSet
from modeling.features.split_files import read_split_file
from modeling.features.stored_splits import Split


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
    data: FeatureSet, folds: int = FOLDS, seed: int = SplitSettings.seed, *, duplicates_together: bool = True
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
