"""Strings and labels in little memory are what lists of str are."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from feats.cache_reader import DONE
from feats.store import FeatureStore
from feats.strings import Labels, Strings
from modeling.features.loading import load_features
from modeling.features.splits import make_split

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
NAMES = st.lists(st.one_of(TEXTS, st.sampled_from(["", "a", "é", "😀"])), max_size=12)
KINDS = [Strings.of, Labels.of]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["Strings", "Labels"])


@kinds
@given(names=NAMES, data=st.data())
@settings(deadline=None)
def test_is_a_list(kind, names, data):
    found = kind(names)
    assert len(found) == len(names) and list(found) == found.tolist() == names
    assert found == names and names == found and found == kind(names)
    assert found != [*names, "x"] and found != kind([*names, "x"]) and found != "".join(names)
    assert np.asarray(found).tolist() == names
    for name in [*names, "a", "?"]:
        assert (name in found) == (name in names)
    part = data.draw(st.slices(len(names)))
    assert isinstance(found[part], type(found)) and found[part] == names[part]
    rows = data.draw(st.lists(st.integers(0, len(names) - 1))) if names else []
    assert found[np.array(rows, np.int64)] == [names[row] for row in rows]
    assert [found[row] for row in rows] == [names[row] for row in rows]
    mask = np.array([len(name) > 1 for name in names], bool)
    assert found[mask] == [name for name in names if len(name) > 1]


@given(NAMES, st.lists(st.one_of(TEXTS, st.sampled_from(["a", "a\0", "\ud800", "abcdefgh"]))))
@settings(deadline=None)
def test_look_ups_and_order(names, others):
    found = Strings.of(names)
    asked = [*names, *others]
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    rows = [first.get(name, -1) for name in asked]
    assert found.positions(asked).tolist() == rows
    usual = [name for name in asked if "\0" not in name and name != "\ud800"]
    assert found.positions(Strings.of(usual)).tolist() == [first.get(name, -1) for name in usual]
    assert found[found.order] == sorted(names)
    assert found.unique == (len(set(names)) == len(names))
    assert found.ascending == all(a < b for a, b in zip(names, names[1:], strict=False))
    assert found.width == max([0, *(len(name.encode()) for name in names)])


@given(NAMES, NAMES)
@settings(deadline=None)
def test_labels_as_numbers(names, others):
    labels = Labels.of(names)
    assert labels.counts() == {name: names.count(name) for name in names}
    assert labels.known.tolist() == [name != "" for name in names]
    distinct = list(dict.fromkeys(others))
    assert labels.numbers(distinct).tolist() == [distinct.index(n) if n in distinct else -1 for n in names]
    encoded = Strings.of(names).encoded
    assert Labels.of_blocks([encoded[:3], encoded[3:]]) == names
    rows = np.arange(min(len(names), len(others)))
    changed = [*others[: len(rows)], *names[len(rows) :]]
    assert labels.with_changes(rows, others[: len(rows)]) == changed and labels == names


def test_many_labels_take_wider_numbers():
    names = [str(k % 300) for k in range(900)]
    labels = Labels.of(names)
    assert labels.codes.dtype == np.uint16 and labels == names
    assert Labels.of(["a", "b"]).codes.dtype == np.uint8


@pytest.mark.parametrize("name", ["a\0", "\0", "\ud800"])
def test_what_has_no_fixed_width_form(name: str):
    with pytest.raises(ValueError):
        Strings.of(["a", name])


def test_bytes_of_a_row(tmp_path: Path):
    n = 200_000
    ids, tags = Strings.of(f"{k:08}" for k in range(n)), Labels(np.arange(n, dtype=np.uint8) % 2, ["no", "yes"])
    keys = np.arange(1, n + 1, dtype=np.uint64)
    for name, side, facts in (("a", "image", ["image_hash"]), ("b", "text", ["text_hash", "text_key"])):
        shapes = {f"{side}_feats": (1,)}
        with FeatureStore.create(tmp_path / f"{name}_train.h5", ids, tags, {}, shapes, block_rows=1 << 14) as store:
            arrays = {f"{side}_feats": np.ones((n, 1), np.float16)} | dict.fromkeys(facts, keys)
            store.write(np.arange(n), np.full(n, DONE), arrays)
            store.finish()
    del ids, tags
    tracemalloc.start()
    try:
        data = load_features(tmp_path, "train", "a", "b")
        loaded, most = tracemalloc.get_traced_memory()
        split = make_split(data)
        _, most_split = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(split.train), len(split.val)) == (n * 9 // 10, n // 10)
    # 8 bytes of id, 16 of hashes, 1 of label, 4 of features; on the way numbers of rows and hashes of both caches.
    assert loaded / n < 40
    assert most / n < 200
    assert most_split / n < 250
