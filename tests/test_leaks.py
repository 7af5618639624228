"""Leaks across a split, against hand-made duplicates."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import make_cache

from feats.errors import UsageError
from modeling.features.duplicates import EMPTY_TEXT_KEY
from modeling.features.joined import FeatureSet
from modeling.features.leaks import Twins, find_leaks
from modeling.features.loading import load_features
from modeling.features.splits import make_folds, make_split
from modeling.features.stored_splits import Split

IDS = [f"p{i}" for i in range(12)]
TAGS = ["positive", "negative"] * 6


def data_of(folder: Path, pictures: dict[int, int] = {}, texts: dict[int, int] = {}, name: str = "clip") -> FeatureSet:
    """12 labelled rows, all different but for what is given: row -> its picture or text."""
    facts = {}
    for fact, changed in (("image_hash", pictures), ("text_key", texts)):
        facts[fact] = np.arange(12, dtype=np.uint64) + 1000
        for row, value in changed.items():
            facts[fact][row] = value
    make_cache(folder, name, tags=TAGS, facts=facts)
    return load_features(folder, "train", name if name == "clip" else (), name)


def split_of(val: Sequence[int], test: Sequence[int] = (), unused: Sequence[int] = ()) -> Split:
    parts = [[IDS[i] for i in rows] for rows in (val, test)]
    gone = {*val, *test, *unused}
    return Split([name for i, name in enumerate(IDS) if i not in gone], *parts)


@pytest.mark.parametrize(
    ("pictures", "split", "expected"),
    [
        ({}, split_of([0, 1]), Twins()),
        # Together: rows 0, 2 with one label, 4, 5 with two.
        ({0: 7, 2: 7, 4: 8, 5: 8}, split_of([0, 2, 1]), Twins(2, 1)),
        # Apart: both groups across, and of the second one row in each part.
        ({0: 7, 2: 7, 4: 8, 5: 8}, split_of([0, 1]), Twins(2, 1, 1, 0, 1, 0)),
        ({0: 7, 2: 7, 4: 8, 5: 8}, split_of([0, 1, 4]), Twins(2, 1, 2, 1, 2, 0)),
        # Three of a kind: two validation rows and one in training; one in each part; none in training.
        ({0: 7, 2: 7, 3: 7}, split_of([0, 3]), Twins(1, 1, 1, 1, 2, 0)),
        ({0: 7, 2: 7, 3: 7}, split_of([0], [3]), Twins(1, 1, 1, 1, 1, 1)),
        ({0: 7, 2: 7}, split_of([0], [2]), Twins(1, 0, 1, 0, 0, 0)),
        # A row that no part has: its label is no conflict across the parts.
        ({0: 7, 2: 7, 3: 7}, split_of([0], unused=[3]), Twins(1, 1, 1, 0, 1, 0)),
    ],
)
def test_groups_across_the_parts_are_counted(pictures: dict[int, int], split: Split, expected: Twins, tmp_path: Path):
    found = find_leaks(data_of(tmp_path / "a", pictures=pictures), [split])
    assert found.pictures == expected and found.texts == Twins()
    found = find_leaks(data_of(tmp_path / "b", texts=pictures), [split])
    assert found.texts == expected and found.pictures == Twins()


def test_the_empty_text_is_no_duplicate(tmp_path: Path):
    data = data_of(tmp_path, texts={0: EMPTY_TEXT_KEY, 1: EMPTY_TEXT_KEY, 2: EMPTY_TEXT_KEY})
    assert find_leaks(data, [split_of([0])]).texts == Twins()


def test_folds_are_added_up(tmp_path: Path):
    """Rows 0 and 1 share a picture: apart in the folds that validate one of them, together in the last."""
    data = data_of(tmp_path, pictures={0: 7, 1: 7})
    found = find_leaks(data, [split_of([0, 2]), split_of([1, 3]), split_of([4, 5])])
    assert found.pictures == Twins(1, 1, 2, 2, 2, 0)


def test_a_side_that_no_cache_knows_is_unknown(tmp_path: Path):
    data = data_of(tmp_path / "text", texts={0: 7, 1: 7}, name="vader")
    found = find_leaks(data, [split_of([0])])
    assert found.pictures is None and found.as_json()["pictures"] == "unknown"
    assert found.as_json()["texts"]["val_rows"] == 1
    assert found.line() == (
        "leaks: the texts of 1 validation rows are in the training rows, too (1 group across the parts, 1 of them with "
        "different labels); 1 of 1 groups with one text disagree in label; pictures unknown"
    )
    nothing = np.zeros(12, np.uint64)
    make_cache(tmp_path / "none", "clip", tags=TAGS, facts={"image_hash": nothing, "text_key": nothing})
    found = find_leaks(load_features(tmp_path / "none", "train", "clip", "clip"), [split_of([0])])
    assert found.as_json() == {"pictures": "unknown", "texts": "unknown"}
    assert found.line() == "leaks: unknown, no cache tells which pictures and texts are the same"


def test_a_cache_beside_tells(tmp_path: Path):
    """As for splits: a text cache alone doesn't know the pictures, the one beside it does."""
    data_of(tmp_path, pictures={0: 7, 1: 7})
    make_cache(tmp_path, "vader", tags=TAGS)
    alone = load_features(tmp_path, "train", (), "vader")
    assert find_leaks(alone, [split_of([0])]).pictures == Twins(1, 1, 1, 1, 1, 0)


def test_splits_of_this_program_leak_nothing_unless_told(tmp_path: Path):
    pictures = np.arange(120) // 2 + 1
    tags = [("positive", "negative")[i // 2 % 2] for i in range(120)]
    make_cache(tmp_path, "clip", tags=tags, facts={"image_hash": pictures})
    data = load_features(tmp_path, "train", "clip", "clip")
    assert find_leaks(data, [make_split(data, val_ratio=0.25)]).pictures == Twins(groups=60)
    assert find_leaks(data, make_folds(data, 3)).pictures == Twins(groups=60)
    apart = make_split(data, val_ratio=0.25, duplicates_together=False)
    val = {int(i[1:]) for i in apart.val}
    leaking = sum(i ^ 1 not in val for i in val)
    found = find_leaks(data, [apart]).pictures
    assert found == Twins(60, 0, leaking, 0, leaking, 0) and leaking > 5


def test_an_id_that_is_there_twice_is_no_row_to_split(tmp_path: Path):
    make_cache(tmp_path, "clip", tags=TAGS)
    with h5py.File(tmp_path / "clip_train.h5", "r+") as file:
        file["id"][1] = file["id"][0]
    with pytest.raises(UsageError, match="more than once in clip; make the caches again"):
        make_split(load_features(tmp_path, "train", "clip"))
