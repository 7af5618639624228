"""Splits: fair, repeatable, without leaks; and split files read as they are written."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from feats.errors import UsageError
from feats.images import hash64
from modeling.features.dealing import deal_folds, deal_split
from modeling.features.duplicates import EMPTY_TEXT_KEY, duplicate_groups
from modeling.features.split_files import read_split_file
from modeling.features.stored_splits import Split, load_split, save_split

COUNTS = {"positive": 2388, "negative": 1193, "neutral": 419}  # MVSA-Single's
RNG = np.random.default_rng(0)
IDS = [str(i) for i in RNG.permutation(4000)]
LABELS = [str(label) for label in RNG.permutation([label for label, n in COUNTS.items() for _ in range(n)])]
LABEL_OF = dict(zip(IDS, LABELS, strict=True))
GROUPS = np.where(np.arange(4000) < 600, RNG.integers(0, 230, 4000), np.arange(4000))  # about 600 rows in 215 groups
GROUP_OF = dict(zip(IDS, GROUPS.tolist(), strict=True))


def shuffled(*columns):
    order = np.random.default_rng(1).permutation(len(columns[0]))
    return [[column[i] for i in order] for column in columns]


def disjoint_and_whole(split: Split, ids: list[str] = IDS) -> None:
    assert sorted([*split.train, *split.val, *split.test]) == sorted(ids)


def no_leak(split: Split) -> None:
    sides = [{GROUP_OF[i] for i in part} for part in (split.train, split.val, split.test)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


# -- making -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.15, 0.2, 1 / 3, 0.4, 0.8])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["rows", "groups"])
def test_ratios_are_met_class_by_class(ratio: float, groups: np.ndarray | None):
    split = deal_split(IDS, LABELS, ratio, groups=groups)
    disjoint_and_whole(split)
    assert abs(len(split.val) - 4000 * ratio) <= 1
    for label, n in Counter(LABEL_OF[i] for i in split.val).items():
        assert abs(n - COUNTS[label] * ratio) <= 1
    if groups is not None:
        no_leak(split)


def test_eight_one_one():
    split = deal_split(IDS, LABELS, 0.1, groups=GROUPS, test_ratio=0.1)
    disjoint_and_whole(split)
    no_leak(split)
    assert [len(split.val), len(split.test)] == pytest.approx([400, 400], abs=1)
    assert split.how == {"val_ratio": 0.1, "test_ratio": 0.1, "seed": 42, "duplicates_together": True}


def test_duplicates_are_in_every_part_by_their_share():
    """A val part without duplicates would be another population than the training rows."""
    sizes = Counter(GROUP_OF.values())
    share = np.mean(
        [np.mean([sizes[GROUP_OF[i]] > 1 for i in deal_split(IDS, LABELS, 0.1, s, GROUPS).val]) for s in range(5)]
    )
    assert share == pytest.approx(np.mean([sizes[GROUP_OF[i]] > 1 for i in IDS]), rel=0.15)


def test_depends_on_seed_and_ids_not_on_order_nor_group_numbers():
    split = deal_split(IDS, LABELS, groups=GROUPS)
    ids, labels, groups = shuffled(IDS, LABELS, GROUPS)
    renumbered = [hash64(str(group).encode()) >> 1 for group in groups]
    assert deal_split(ids, labels, groups=renumbered) == split
    assert split.val == sorted(split.val) and split.train == sorted(split.train)
    other = deal_split(IDS, LABELS, seed=43, groups=GROUPS)
    assert 0.02 < len(set(other.val) & set(split.val)) / 400 < 0.2  # a tenth by chance
    assert deal_folds(ids, labels, 5, groups=renumbered) == deal_folds(IDS, LABELS, 5, groups=GROUPS)


def test_a_split_never_changes():
    """The ids of a small split, for good: a new library must not make yesterday's runs incomparable."""
    ids = [str(i) for i in range(30)]
    split = deal_split(ids, ["a", "b", "b"] * 10, 0.2, seed=7)
    assert split.val == PINNED
    groups = [i * i % 25 if i % 3 else 100 + i for i in range(60)]
    labels = ["a" if i % 5 < 3 else "b" if i % 5 < 4 or i % 10 else "c" for i in range(60)]
    assert deal_split([f"r{i}" for i in range(60)], labels, 0.2, groups=groups).val == PINNED_IN_GROUPS


PINNED = ["12", "16", "18", "20", "26", "28"]
PINNED_IN_GROUPS = ["r12", "r15", "r19", "r27", "r3", "r31", "r32", "r39", "r43", "r44", "r56", "r7"]


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["rows", "groups"])
@pytest.mark.parametrize("k", [2, 5, 10])
def test_folds_partition_the_rows(k: int, groups: np.ndarray | None):
    folds = deal_folds(IDS, LABELS, k, groups=groups)
    assert sorted(i for fold in folds for i in fold.val) == sorted(IDS)
    for number, fold in enumerate(folds, 1):
        disjoint_and_whole(fold)
        assert not fold.test and fold.how["fold"] == number and fold.how["folds"] == k
        assert abs(len(fold.val) - 4000 / k) <= 1
        for label, n in Counter(LABEL_OF[i] for i in fold.val).items():
            assert abs(n - COUNTS[label] / k) < 1 + 1e-9
        if groups is not None:
            no_leak(fold)


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_groups_are_dealt_first(seed: int):
    """A group that comes when the small ones lie evenly in both halves would have nothing to even it out."""
    groups = np.repeat(np.arange(10), [6, 2, 2, 2, 12, 4, 4, 2, 1, 1])
    labels = ["a"] * 12 + ["b"] * 24
    ids = [f"r{i}" for i in range(36)]
    for split in (deal_split(ids, labels, 0.5, seed, groups), *deal_folds(ids, labels, 2, seed, groups)):
        assert Counter(labels[int(i[1:])] for i in split.val) == {"a": 6, "b": 12}


def websters_seats(seats: int, shares: list[float]) -> list[int]:
    """Seats by highest averages, Webster's divisors: half, one and a half, ..."""
    averages = [(share / (k + 0.5), p) for p, share in enumerate(shares) for k in range(seats)]
    taken = Counter(p for _, p in sorted(averages, reverse=True)[:seats])
    return [taken[p] for p in range(len(shares))]


@pytest.mark.parametrize("n", range(9, 21))
def test_groups_are_dealt_as_webster_deals_seats(n: int):
    labels = ["a"] * 3 * n + ["b"] * 3 * n
    groups = np.repeat(np.arange(2 * n), 3)
    ids = [f"r{i}" for i in range(6 * n)]
    shares = {"train": 0.62, "val": 0.27, "test": 0.11}
    split = deal_split(ids, labels, shares["val"], groups=groups, test_ratio=shares["test"])
    expected = [3 * seats for seats in websters_seats(n, list(shares.values()))]
    for label in "ab":
        found = [sum(labels[int(i[1:])] == label for i in part) for part in (split.train, split.val, split.test)]
        assert found == expected


def test_mixed_groups_are_dealt_by_their_rarest_class():
    """Large enough to even out the common class, they would leave the rare one on one side."""
    for seed in range(3):
        groups = np.repeat(np.arange(53), [8, 6, 5, *[1] * 50])
        labels = ["common"] * 8 + ["common"] * 4 + ["rare"] * 2 + ["common"] * 3 + ["rare"] * 2 + ["common"] * 50
        folds = deal_folds([f"r{i}" for i in range(69)], labels, 2, seed, groups)
        assert [sum(labels[int(i[1:])] == "rare" for i in fold.val) for fold in folds] == [2, 2]


def test_single_rows_make_up_for_groups():
    """... to the row; and where groups fill the parts exactly there is nothing to make up for."""
    labels = ["a"] * 40 + ["b"] * 40
    groups = np.r_[np.zeros(10), np.arange(1, 31), np.full(3, 40), np.arange(41, 78)]
    for fold in deal_folds([f"r{i}" for i in range(80)], labels, 2, groups=groups):
        assert Counter(labels[int(i[1:])] for i in fold.val) == {"a": 20, "b": 20}
    groups = np.repeat(np.arange(4), [32, 8, 32, 8])
    split = deal_split([f"r{i}" for i in range(80)], labels, 0.2, groups=groups)
    assert Counter(labels[int(i[1:])] for i in split.val) == {"a": 8, "b": 8}


def test_a_part_gets_a_row_of_a_class_before_another_gets_its_second():
    labels = ["rare"] * 2 + ["common"] * 38
    ids = [f"r{i}" for i in range(40)]
    for seed in range(5):
        split = deal_split(ids, labels, 0.2, seed)
        assert len(split.val) == 8 and len({"r0", "r1"} & set(split.val)) == 1


def test_roundings_do_not_add_up():
    """Each of twelve classes has 1.3 rows for validation; together they have 15.6."""
    labels = [f"class {i % 12}" for i in range(156)]
    split = deal_split([f"r{i}" for i in range(156)], labels, 0.1)
    assert 15 <= len(split.val) <= 16
    assert set(Counter(labels[int(i[1:])] for i in split.val).values()) == {1, 2}


def test_folds_tell_how_they_were_made():
    folds = deal_folds(IDS, LABELS, 3, 7, GROUPS)
    told = {"folds": 3, "seed": 7, "duplicates_together": True}
    assert [fold.how for fold in folds] == [{**told, "fold": k} for k in (1, 2, 3)]
    assert deal_folds(IDS, LABELS) == deal_folds(IDS, LABELS, 5, 42)
    assert deal_folds(IDS, LABELS, 5, 43)[0].val != deal_folds(IDS, LABELS)[0].val
    assert not deal_folds(IDS, LABELS)[0].how["duplicates_together"]


@pytest.mark.parametrize("seed", range(20))
def test_small_and_crooked_sets(seed: int):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(40, 120)), int(rng.integers(2, 4))
    ids = [f"r{i}" for i in range(n)]
    labels = [f"c{min(c, 2)}" for c in rng.geometric(0.5, n) - 1]
    groups = np.where(rng.random(n) < 0.4, rng.integers(0, 8, n), np.arange(n) + 100)
    split = deal_split(ids, labels, 0.25, seed, groups)
    disjoint_and_whole(split, ids)
    assert abs(len(split.val) / n - 0.25) < 0.08
    folds = deal_folds(ids, labels, k, seed, groups)
    assert sorted(i for fold in folds for i in fold.val) == sorted(ids)
    of = dict(zip(ids, groups.tolist(), strict=True))
    for each in (split, *folds):
        assert not {of[i] for i in each.train} & {of[i] for i in each.val}
        assert {labels[int(i[1:])] for i in each.val} == set(labels)


def test_refusals():
    with pytest.raises(UsageError, match="all 3 rows are 'a': a classifier needs two"):
        deal_split(["1", "2", "3"], ["a"] * 3)
    with pytest.raises(UsageError, match="^there are no rows: a classifier needs two"):
        deal_split([], [])
    with pytest.raises(UsageError, match="2 of 3 rows have no label"):
        deal_split(["1", "2", "3"], ["a", "", ""])
    with pytest.raises(UsageError, match="the val split, 0.1 of 20 rows, is too small to hold 3 classes"):
        deal_split(list(map(str, range(20))), ["a", "b", "c", "a", "b"] * 4)
    assert len(deal_split(list(map(str, range(30))), ["a", "b", "c"] * 10).val) == 3  # just large enough
    with pytest.raises(UsageError, match=r"class 'c' \(1 row\) is too rare: none is left for val; leave") as error:
        deal_split(list(map(str, range(100))), ["a", "b"] * 49 + ["a", "c"])
    assert "larger" not in str(error.value) and "`split_file`" in str(error.value)  # no ratio parts one row
    with pytest.raises(UsageError, match=r"class 'c' \(1 row\) is too rare"):  # which is no duplicate
        deal_split(list(map(str, range(100))), ["a", "b"] * 49 + ["a", "c"], groups=range(100))
    with pytest.raises(
        UsageError, match=r"class 'c' \(4 rows in 1 duplicate group\) is too rare: none is left for val"
    ):
        deal_split(list(map(str, range(100))), ["a", "b"] * 48 + ["c"] * 4, groups=[*range(96), 96, 96, 96, 96])
    with pytest.raises(UsageError, match=r"class 'c' \(4 rows\) is too rare: none is left for fold 5 of 5"):
        deal_folds(list(map(str, range(100))), ["a", "b"] * 48 + ["c"] * 4, 5)
    with pytest.raises(UsageError, match=r"class 'c' \(4 rows in 2 duplicate groups\) .* none is left for fold 3 of 5"):
        deal_folds(list(map(str, range(100))), ["a", "b"] * 48 + ["c"] * 4, 5, groups=[*range(98), 96, 97])
    with pytest.raises(UsageError, match=f"{10**30} folds of .* rows: there can be no more"):
        deal_folds(IDS, LABELS, 10**30)
    with pytest.raises(UsageError, match="1 folds: there must be at least 2"):
        deal_folds(IDS, LABELS, 1)
    for ratios in (
        {"val_ratio": 0},
        {"val_ratio": 1},
        {"val_ratio": 0.6, "test_ratio": 0.4},
        {"val_ratio": float("nan")},
    ):
        with pytest.raises(UsageError, match="must be in"):
            deal_split(IDS, LABELS, **ratios)
    with pytest.raises(ValueError, match="unique"):
        deal_split(["1", "1", "2"] * 2, ["a", "b", "a"] * 2, 0.5)


def test_without():
    split = Split(["1", "2"], ["3"], ["4"], {"seed": 1})
    assert split.without({"2": "bad", "4": "bad"}) == Split(["1"], ["3"], [], {"seed": 1})


# -- duplicates -------------------------------------------------------------------------------------------------


def test_duplicate_groups_tie_through_others():
    image = np.array([5, 0, 5, 6, 0, 7, 8, 9, 10, 11], np.uint64)
    text = np.array([1, 2, 3, 3, EMPTY_TEXT_KEY, EMPTY_TEXT_KEY, 0, 0, 1, 4], np.uint64)
    assert duplicate_groups(image, text).tolist() == [0, 1, 0, 0, 4, 5, 6, 7, 0, 9]
    assert duplicate_groups(image, None).tolist() == [0, 1, 0, 3, 4, 5, 6, 7, 8, 9]
    assert duplicate_groups(None, text).tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 0, 9]
    assert EMPTY_TEXT_KEY == hash64(b"") and np.uint64(EMPTY_TEXT_KEY) == EMPTY_TEXT_KEY
    with pytest.raises(ValueError, match="nothing to find duplicates by"):
        duplicate_groups(None, None)


def test_no_rows_are_no_duplicates():
    none = np.zeros(0, np.uint64)
    assert duplicate_groups(none, none).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_duplicate_groups_are_connected_components(seed: int):
    rng = np.random.default_rng(seed)
    n = 300
    image, text = (rng.integers(0, 400, n).astype(np.uint64) + np.uint64(2**63) for _ in range(2))
    edges = [(i, j) for i in range(n) for j in range(i) if image[i] == image[j] or text[i] == text[j]]
    graph = coo_matrix((np.ones(len(edges)), tuple(zip(*edges, strict=True))), shape=(n, n))
    expected = connected_components(graph, directed=False)[1]
    found = duplicate_groups(image, text)
    assert len(set(zip(found.tolist(), expected.tolist(), strict=True))) == len(set(found)) == len(set(expected))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_chain_of_duplicates_is_one_group(mixed: bool):
    """Each row shares its picture with the one before and its text with the one behind."""
    n = 5000
    places = np.random.default_rng(1).permutation(n) if mixed else np.arange(n)
    image, text = ((places + shift) // 2 + 1 for shift in (0, 1))
    groups = duplicate_groups(image.astype(np.uint64), text.astype(np.uint64))
    assert not groups.any()


# -- files ------------------------------------------------------------------------------------------------------

FILE_IDS = list("abcdefgh")
FILE_LABELS = ["x", "y"] * 3 + ["", "x"]
WANTED = Split(["a", "b"], ["c", "d"], ["e", "g"])


def test_save_and_load(tmp_path: Path):
    split = deal_split(IDS, LABELS, groups=GROUPS)
    save_split(split, tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == split
    (again,) = read_split_file(tmp_path / "split.json", IDS, LABELS)
    assert (again.train, again.val, again.test) == (split.train, split.val, split.test)
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]
    # Short, and quick to write: each run of a sweep holds one, of as many ids as there are rows.
    text = (tmp_path / "split.json").read_text()
    assert text.count("\n") == 1 and len(text) < sum(len(i) for i in IDS) + 4 * len(IDS) + 200


def test_folds_come_back_from_their_file(tmp_path: Path):
    folds = deal_folds(IDS, LABELS, 3, groups=GROUPS)
    save_split(folds, tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == folds
    again = read_split_file(tmp_path / "split.json", IDS, LABELS)
    assert [(s.train, s.val, s.test) for s in again] == [(s.train, s.val, []) for s in folds]
    save_split(folds[1:2], tmp_path / "split.json")  # one of them is an ordinary split
    (again,) = read_split_file(tmp_path / "split.json", IDS, LABELS)
    assert (again.train, again.val) == (folds[1].train, folds[1].val)


def write(folder: Path, files: dict[str, str]) -> list[Path]:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


@pytest.mark.parametrize(
    "files",
    [
        {"s.json": json.dumps({"train": ["b", "a"], "val": ["c", "d"], "test": ["e", "g"]})},
        {"s.json": json.dumps({"train": ["b", "a"], "dev": ["c", "d"], "test": ["e", "g"], "how": {"seed": 1}})},
        {"s.csv": "id,split\na,train\nb,train\nc,val\nd,VAL\ne,test\ng,test\n"},
        {"s.csv": "\ufeffsplit,guid\r\ntrain,a\r\ntrain,b\r\nvalid,c\r\nval,d\r\ntest,e\r\ntest,g\r\n"},
        {"1.txt": "a\nb\n", "2.txt": "c\nd\n", "3.txt": "\ne\ng"},
        {"test.txt": "e\ng", "my_val-ids.csv": "guid,tag\nc,x\nd,y\n", "train.txt": "ID\nb\n a \n"},
    ],
    ids=["json", "json of a run", "csv", "csv, other names", "three, by position", "three, by name"],
)
def test_split_files(tmp_path: Path, files: dict[str, str]):
    (split,) = read_split_file(write(tmp_path, files), FILE_IDS, FILE_LABELS)
    assert (split.train, split.val, split.test) == (WANTED.train, WANTED.val, WANTED.test)
    assert split.how == {"files": list(files)}


def test_a_split_file_without_a_test_part(tmp_path: Path):
    (split,) = read_split_file(
        write(tmp_path, {"s.json": '{"train": ["a", "b"], "val": ["c", "d"]}'}), FILE_IDS, FILE_LABELS
    )
    assert (split.train, split.val, split.test) == (["a", "b"], ["c", "d"], [])


@pytest.mark.parametrize(
    ("beside", "match"),
    [
        (np.array([b"a"]), "ids beside it can't be read"),  # .npy, no archive
        ({}, "ids beside it can't be read"),
        ({"0/train": np.zeros(3), "0/val": np.array([b"c"]), "0/test": np.array([b"d"])}, "no list of text"),
        ({"0/train": np.array([[b"a"]]), "0/val": np.array([b"c"]), "0/test": np.array([b"d"])}, "no list of text"),
    ],
    ids=["array", "empty", "numbers", "table"],
)
def test_ids_beside_a_split_file_are_lists_of_ids(
    tmp_path: Path, beside: np.ndarray | dict[str, np.ndarray], match: str
):
    (tmp_path / "s.json").write_text('{"ids": "ids.npz"}')
    with (tmp_path / "ids.npz").open("wb") as file:
        if isinstance(beside, dict):
            np.savez(file, **beside)
        else:
            np.save(file, beside)
    with pytest.raises(UsageError, match=match):
        read_split_file(tmp_path / "s.json", FILE_IDS, FILE_LABELS)


@pytest.mark.parametrize(
    "files, match",
    [
        ({"s.json": '{"train": ["a", "b"], "val": ["c", "z", "y"]}'}, r"s.json: 2 ids \(z, y\) not among the 8 rows"),
        (
            {"s.json": '{"train": ["a", "b"], "val": ["c", "a"]}'},
            r"s.json: 1 id \(a\) named more than once \(a in train, val\)",
        ),
        ({"s.csv": "id,split\na,train\nb,train\na,train\n"}, r"1 id \(a\) named more than once \(a in train\)"),
        ({"s.json": '{"train": ["a", "b"], "val": ["c"]}'}, "val holds no row of class y"),
        ({"s.json": '{"train": ["a"], "val": ["c", "d"]}'}, "train holds no row of class y"),
        ({"s.json": '{"train": ["a", "c"], "val": ["e"]}'}, "all 3 rows are 'x'"),
        ({"s.json": '{"train": ["a", "b", "g"], "val": ["c", "d"]}'}, r"1 train id \(g\) without a label"),
        ({"s.json": '{"train": ["a", "b"]}'}, "no ids for val"),
        ({"s.json": '["a"]'}, "holds a list, expected"),
        ({"s.json": "{"}, "is not JSON"),
        ({"s.json": '{"train": ["a"], "holdout": ["b"]}'}, "holds holdout, expected"),
        ({"s.json": '{"train": "a", "val": ["b"]}'}, "parts that are no lists of ids, expected"),
        ({"s.json": '{"train": ["a", null], "val": ["b"]}'}, "parts that are no lists of ids, expected"),
        ({"s.json": '{"train": ["a", true], "val": ["b"]}'}, "parts that are no lists of ids, expected"),
        ({"s.json": '{"train": ["a", "b"], "val": ["c"], "dev": ["d"]}'}, "holds val, dev, expected"),
        ({"s.json": '{"train": ["a"], "train": ["b"], "val": ["c"]}'}, r"is not JSON \(a key is there twice\)"),
        ({"s.json": "[" * 100_000}, "is not JSON .it is nested too deeply"),
        ({"s.json": '{"train": [' + "9" * 5000 + "]}"}, "is not JSON .Exceeds the limit"),
        ({"s.json": r'{"train": ["a", "\ud800"], "val": ["c"]}'}, "is not JSON .it holds a lone surrogate"),
        ({"s.json": r'{"train": ["a", "\u0000"], "val": ["c"]}'}, "1 id .* not among"),
        ({"s.json": '{"folds": []}'}, "s.json names no folds; expected"),
        ({"s.json": '{"folds": ["a"]}'}, "s.json holds a str, expected"),
        (
            {"s.json": '{"folds": [{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["c"], "val": ["a", "b"]}]}'},
            "s.json, fold 2 of 2: train holds no row of class y",
        ),
        (
            {
                "s.json": '{"folds": [{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["f", "a"], "val": ["c", "b"]}]}'
            },
            r"s.json: 1 id \(c\) in the val part of several folds",
        ),
        (
            {
                "s.json": '{"folds": [{"train": ["a", "b"], "val": ["c", "d"]}, '
                '{"train": ["c", "d"], "val": ["a", "b"], "test": ["e"]}]}'
            },
            r"s.json, fold 1 of 2 has no test part, and \S*s.json, fold 2 of 2 has one; give one to every fold or to none",
        ),
        ({"s.csv": "a,train\nb,val\n"}, "has columns a, train; expected id and split"),
        ({"s.csv": "id,part\na,train\n"}, "has columns id, part; expected id and split"),
        ({"s.csv": ""}, r"has columns \(none\); expected id and split"),
        ({"s.csv": "id,split\n"}, "s.csv: no ids for train; name some"),
        ({"s.csv": "id,split\na,train\nb,held\n"}, "line 3: split 'held'; expected train, val or test"),
        ({"s.csv": "id,split\n\na,train\n\n\nb,held\n"}, "line 6: split 'held'; expected"),
        ({"s.csv": "id,split\na,train\nb\n"}, "line 3: split ''; expected train, val or test"),
        ({"s.csv": "split,id\ntrain,a\nval\n"}, r"1 id \(\) not among the 8 rows"),
        (
            {"s.json": '{"train": ["a", "b"], "val": ["1", "2", "3", "4", "5"]}'},
            r"5 ids \(1, 2, 3, 4, 5\) not among the 8 rows",
        ),
        (
            {"s.json": '{"train": ["a", "b"], "val": ["1", "2", "3", "4", "5", "6"]}'},
            r"6 ids \(1, 2, 3, 4, 5, \.\.\.\) not among the 8 rows",
        ),
        ({"train.txt": "a\nb", "val.txt": "c\nz"}, r"train.txt, \S*val.txt: 1 id \(z\) not among"),
        ({"train.txt": "a", "x.txt": "b", "y.txt": "c"}, "can't tell which of train.txt, x.txt, y.txt"),
        ({"train.txt": "a", "train_val.txt": "b"}, "can't tell which"),
        ({"1.txt": "a", "2.txt": "b", "3.txt": "c", "4.txt": "d"}, "4 split files; give one"),
    ],
)
def test_split_file_refusals(tmp_path: Path, files: dict[str, str], match: str):
    with pytest.raises(UsageError, match=match) as error:
        read_split_file(write(tmp_path, files), FILE_IDS, FILE_LABELS)
    assert "\n" not in str(error.value)


# -- lists of folds ---------------------------------------------------------------------------------------------

FOLD_LISTS = {  # FILE_IDS a to f have labels; parts of different folds may share rows
    "train_1.txt": "a\nb\n",
    "val_1.txt": "c\nd\n",
    "test_1.txt": "e\nf\n",
    "train_10.txt": "c\nd\n",
    "dev_10.txt": "a\nb\n",
    "test_10.txt": "e\n",
    "Train_2.txt": "a\nd\n",
    "VALIDATION_2.txt": "c\nb\n",
    "testing_2.txt": "e\nf\n",
    "notes_1.txt": "no list",
    "train_1.txt.bak": "x",
}


@pytest.mark.parametrize("pattern", ["{part}_{fold}.txt", "{fold}/{part}.txt", "fold-{fold}/{part}-{fold}.csv"])
def test_a_pattern_finds_every_fold_in_natural_order(tmp_path: Path, pattern: str):
    folder = tmp_path / "splits [1]"
    for name, text in FOLD_LISTS.items():
        part, _, fold = name.partition(".")[0].partition("_")
        end = "" if name.endswith(".txt") else ".bak"
        path = folder / (pattern.replace("{part}", part).replace("{fold}", fold) + end)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    splits = read_split_file(folder / pattern, FILE_IDS, FILE_LABELS)
    assert [(s.train, s.val, s.test) for s in splits] == [
        (["a", "b"], ["c", "d"], ["e", "f"]),
        (["a", "d"], ["b", "c"], ["e", "f"]),
        (["c", "d"], ["a", "b"], ["e"]),
    ]
    assert [s.how for s in splits] == [{"files": [pattern], "fold": fold} for fold in ("1", "2", "10")]
    save_split(splits, tmp_path / "split.json")  # as a run leaves it: test parts and shared rows come back
    again = read_split_file(tmp_path / "split.json", FILE_IDS, FILE_LABELS)
    assert [(s.train, s.val, s.test) for s in again] == [(s.train, s.val, s.test) for s in splits]


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"val_1.txt": None}, r"fold 1 has no val list \(there is \S*test_1.txt, \S*train_1.txt\); add it"),
        ({"Train_2.txt": None}, "fold 2 has no train list"),
        ({"valid_1.txt": "c\n"}, r"\S*val_1.txt and \S*valid_1.txt are both the val part of fold 1; keep one"),
        ({"test_10.txt": None}, r"txt, fold 10 has no test part, and \S*, fold 1 has one; give one to every fold"),
        ({"test_1.txt": "e\na\n"}, r"fold 1: 1 id \(a\) named more than once \(a in train, test\)"),
        ({"test_10.txt": "z\n"}, r"fold 10: 1 id \(z\) not among the 8 rows"),
        ({"val_1.txt": "c\n"}, "fold 1: val holds no row of class y"),
        (dict.fromkeys(["test_1.txt", "testing_2.txt", "test_10.txt"]), r"2 ids \(\S, \S\) in the val part of several"),
        (dict.fromkeys(FOLD_LISTS), r"no file is called like \S*\{part\}_\{fold\}.txt, with train, val, test for"),
    ],
)
def test_patterns_that_do_not_work(tmp_path: Path, changed: dict[str, str | None], match: str):
    write(tmp_path, {name: text for name, text in (FOLD_LISTS | changed).items() if text is not None})
    with pytest.raises(UsageError, match=match) as error:
        read_split_file(tmp_path / "{part}_{fold}.txt", FILE_IDS, FILE_LABELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [["{part}.txt"], ["train_{fold}.txt"], ["{part}_{fold}.txt", "val.txt"]])
def test_patterns_need_both_places_and_stand_alone(tmp_path: Path, names: list[str]):
    write(tmp_path, FOLD_LISTS)
    with pytest.raises(UsageError, match=r"a pattern stands alone and holds \{fold\} and \{part\}, such as splits/"):
        read_split_file([tmp_path / name for name in names], FILE_IDS, FILE_LABELS)


def test_unreadable_split_files(tmp_path: Path):
    (tmp_path / "bad.csv").write_bytes(b"id,split\n\xff\xfe,train\n")
    with pytest.raises(UsageError, match="bad.csv: it isn't UTF-8 text"):
        read_split_file(tmp_path / "bad.csv", FILE_IDS, FILE_LABELS)
    with pytest.raises(UsageError, match="gone.csv: No such file"):
        read_split_file(str(tmp_path / "gone.csv"), FILE_IDS, FILE_LABELS)


def digest_of_splits(seed: int, grouped: bool) -> str:
    """Of random rows, some of them duplicates."""
    rng = np.random.default_rng(seed)
    ids = [f"{'é' if k % 7 == 0 else ''}{k}" for k in rng.permutation(900).tolist()]
    labels = [("a", "b", "c")[k] for k in rng.choice(3, 900, p=[0.5, 0.3, 0.2]).tolist()]
    pictures, texts = rng.integers(0, 800, 900).astype(np.uint64), rng.integers(0, 2000, 900).astype(np.uint64)
    groups = duplicate_groups(pictures, texts) if grouped else None
    splits = [deal_split(ids, labels, 0.15, seed, groups, 0.1), *deal_folds(ids, labels, 4, seed, groups)]
    parts = [[list(split.train), list(split.val), list(split.test)] for split in splits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# As first published: runs are compared row by row over versions.
GOLDEN = {
    (0, False): "2d1caa4c930e0dd7",
    (0, True): "f76b658d00b28ee8",
    (42, False): "f528c90867b7453f",
    (42, True): "b26bb5c2750acd63",
}


@pytest.mark.parametrize(("seed", "grouped"), GOLDEN)
def test_splits_are_those_of_every_version(seed: int, grouped: bool):
    assert digest_of_splits(seed, grouped) == GOLDEN[seed, grouped]


@pytest.mark.parametrize(("limit", "most"), [("MAX_JSON_IDS", 3), ("MAX_JSON_BYTES", 5)])
def test_ids_of_large_splits_lie_beside(limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"modeling.features.stored_splits.{limit}", most)
    folds = [Split(["a", "é"], ["c"], ["d"], {"fold": 1}), Split(["c", "d"], ["a", "é"], [], {"fold": 2})]
    for name, split in (("one", folds[0]), ("folds", folds)):
        save_split(split, tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.npz").is_file() and "é" not in (tmp_path / f"{name}.json").read_text("utf-8")
        assert load_split(tmp_path / f"{name}.json") == split
    ids, labels = ["a", "c", "d", "é"], ["x", "x", "y", "y"]
    [read] = read_split_file(save_of(Split(["a", "d"], ["c", "é"]), tmp_path), ids, labels)
    assert (read.train, read.val) == (["a", "d"], ["c", "é"])
    (tmp_path / "s.npz").unlink()
    with pytest.raises(UsageError, match=r"s\.json: the ids beside it can't be read .*copy both files"):
        read_split_file(tmp_path / "s.json", ids, labels)


def save_of(split: Split, folder: Path) -> Path:
    save_split(split, folder / "s.json")
    return folder / "s.json"
