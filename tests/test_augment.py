"""Texts augmented for training, and the rows of which copies are added."""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import one_line
from hypothesis import given, strategies as st

from feats.csv_files import write_csv
from feats.errors import UsageError
from modeling.features.dealing import deal_split
from modeling.features.stored_splits import Split
from modeling.finetuning.augment import PARTICLES, SYNONYMS, TextAugmentation, augment_text
from modeling.finetuning.hard_rows import hard_rows
from modeling.runs.folder import prediction_rows

KEPT = [
    "#happy",
    "@you",
    "http://t.co/x",
    "https://a.b/c",
    "www.a.org",
    "🙂",
    "good🙂",
    "👍🏽",
    "<3",
    ":D",
    "Ⓜ",
    "not",
    "Don't",
]
ONLY = {
    "drop": TextAugmentation(0.5, 0, 0),
    "swap": TextAugmentation(0, 0.5, 0),
    "synonym": TextAugmentation(0, 0, 0.5),
}
SENTENCE = "the movie was really good , my friend Anna and everyone in town said so !".split()
probabilities = st.floats(0, 1, exclude_max=True)
settings = st.builds(TextAugmentation, probabilities, probabilities, probabilities, st.booleans())
texts = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from([*KEPT, *SENTENCE, "GREAT!!"]), st.text()), max_size=12).map(" ".join),
)


@given(texts, st.integers(0, 2**40), settings)
def test_whatever_the_text(text: str, seed: int, how: TextAugmentation):
    state = random.getstate(), np.random.get_state()[1].tolist()
    made = augment_text(text, seed, how)
    assert made == augment_text(text, seed, how)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())
    assert bool(made) == bool(text) and bool(made.split()) == bool(text.split())
    before, after = Counter(text.split()), Counter(made.split())
    assert all(after[word] == before[word] for word in KEPT)
    letters = r"[^\W\d_]"
    assert all(after[word] >= n for word, n in before.items() if not re.search(letters, word))
    assert after.total() <= before.total() + (2 if how.particles else 0)


@given(texts, st.integers())
def test_nothing_asked_for_changes_nothing(text: str, seed: int):
    assert augment_text(text, seed, TextAugmentation(0, 0, 0)).split() == text.split()


def shares(kind: str, count: int = 4000) -> Counter:
    """How often each word of the sentence is at its place in augmented ones."""
    made = [augment_text(" ".join(SENTENCE), seed, ONLY[kind]).split() for seed in range(count)]
    if kind == "drop":
        return Counter({word: sum(word in words for words in made) / count for word in SENTENCE})
    assert all(len(words) == len(SENTENCE) for words in made)
    return Counter({word: sum(words[i] == word for words in made) / count for i, word in enumerate(SENTENCE)})


def test_words_are_dropped_as_often_as_asked():
    assert shares("drop") == {word: pytest.approx(0.5, abs=0.04) if word.isalpha() else 1 for word in SENTENCE}


def test_negations_are_not_dropped():
    made = [
        augment_text("We DON’T want this, never! Didnt not went", seed, TextAugmentation(0.9, 0, 0)).split()
        for seed in range(99)
    ]
    assert set.intersection(*map(set, made)) == {"DON’T", "never!", "Didnt", "not"}


def test_words_are_replaced_as_often_as_asked():
    known = {word for group in SYNONYMS for word in group}
    assert shares("synonym") == {word: pytest.approx(0.5, abs=0.04) if word in known else 1 for word in SENTENCE}


def test_words_change_places_with_the_next():
    made = [augment_text(" ".join(SENTENCE), seed, ONLY["swap"]).split() for seed in range(4000)]
    assert all(sorted(words) == sorted(SENTENCE) for words in made)
    assert all(abs(words.index(word) - i) <= 1 for words in made for i, word in enumerate(SENTENCE))
    assert np.mean([words[0] == SENTENCE[1] for words in made]) == pytest.approx(0.5, abs=0.04)
    # The second moves unless it moved with the first: it is free in half the texts, and moves in half of those.
    assert np.mean([words[1] == SENTENCE[2] for words in made]) == pytest.approx(0.25, abs=0.04)


def test_a_synonym_keeps_case_and_ends():
    made = {augment_text("“Good!” (GOOD) good… gooD", seed, TextAugmentation(0, 0, 0.9)) for seed in range(100)}
    assert "“Nice!” (NICE) nice… nice" in made
    assert {word for text in made for word in text.split()} == set(
        "“Good!” “Nice!” (GOOD) (NICE) good… nice… gooD nice".split()
    )


def test_synonyms_are_a_list_of_single_words_each_once():
    words = [word for group in SYNONYMS for word in group]
    assert len(words) == len(set(words)) >= 60 and all(word.isalpha() and word.islower() for word in words)


def test_at_most_one_particle_and_only_where_asked_for():
    quiet, moody = (
        Counter(augment_text("we are here", seed, TextAugmentation(0, 0, 0, particles)) for seed in range(400))
        for particles in (False, True)
    )
    assert set(quiet) == {"we are here"}
    assert set(moody) == {"we are here", *(f"we are here {particle}" for particle in PARTICLES)}
    assert 150 < moody["we are here"] < 250


def test_seeds_and_texts_are_changed_each_in_its_own_way():
    how = TextAugmentation(drop=0.5)
    assert len({augment_text(" ".join(SENTENCE), seed, how) for seed in range(50)}) > 45
    beginnings = {augment_text(f"a b c d e f g h #{i}", 0, how).rpartition(" ")[0] for i in range(50)}
    assert len(beginnings) > 40
    # The same in every process and version: what was trained can be trained again.
    assert augment_text("so good to see everyone in town", 7, TextAugmentation(0.3, 0.3, 0.3)) == PINNED


PINNED = "so see good town everybody"


@pytest.mark.parametrize("name", ["drop", "swap", "synonym"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_probabilities_are_checked(name: str, value: float):
    with pytest.raises(UsageError, match=f"`{name}` {value:g}: expected a probability") as raised:
        TextAugmentation(**{name: value})
    assert one_line(raised)


# -- hard rows ---------------------------------------------------------------------------------------------------


def bad_cases(path: Path, ids: list[str]) -> Path:
    probabilities = np.tile([0.2, 0.8], (len(ids), 1))
    write_csv(path, prediction_rows(ids, ["a"] * len(ids), probabilities, ("a", "b")))
    return path


def test_hard_rows_keep_their_order_each_once(tmp_path: Path):
    split = Split(train=["1", "2", "é, x", "4"], val=["5"], test=["6"])
    path = bad_cases(tmp_path / "bad.csv", ["4", "é, x", "4", "1"])
    groups = {"1": 0, "2": 1, "é, x": 1, "4": 0, "5": 2, "6": 3}
    assert hard_rows(path, split, groups) == hard_rows(path, split, None) == ["4", "é, x", "1"]
    assert hard_rows(bad_cases(tmp_path / "none.csv", []), split, groups) == []


def test_no_row_that_validates_or_tests_nor_a_duplicate_of_one_can_enter(tmp_path: Path):
    """Each row of a data set in which duplicates lie on both sides, alone in a file and among all harmless ones."""
    ids = [f"{i}" for i in range(60)]
    split = deal_split(ids, ["a", "b"] * 30, val_ratio=0.2, test_ratio=0.2)
    group_of = {i: int(i) % 25 for i in ids}
    held_out = {*split.val, *split.test}
    leaking = {i for i in ids if any(group_of[i] == group_of[j] for j in held_out)}
    harmless = [i for i in ids if i not in leaking]
    assert held_out < leaking and leaking & set(split.train) and len(harmless) > 3
    assert hard_rows(bad_cases(tmp_path / "bad.csv", harmless), split, group_of) == harmless
    for row in leaking:
        for among in ([], harmless):
            kind = "for validation or testing" if row in held_out else "duplicates of rows for validation or testing"
            with pytest.raises(UsageError, match=rf"1 of its rows are {kind} \({row}\)") as raised:
                hard_rows(bad_cases(tmp_path / "bad.csv", [*among, row]), split, group_of)
            assert one_line(raised)
    for row in held_out:
        with pytest.raises(UsageError, match="for validation or testing"):
            hard_rows(bad_cases(tmp_path / "bad.csv", [row]), split, None)


def test_rows_of_other_data_are_refused(tmp_path: Path):
    split = Split(train=["1", "2"], val=["3"])
    path = bad_cases(tmp_path / "bad.csv", ["1", *"abcdefg"])
    with pytest.raises(
        UsageError, match=r"7 of its rows are no training rows of this split.* \(a, b, c, d, e, \.\.\.\)"
    ):
        hard_rows(path, split, {"1": 0, "2": 1, "3": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,tag\n1,a\n", "begins with 'id,tag', expected id,tag,pred,..."),
        (b"", "begins with '', expected"),
        (b"\xff\xfe", "can't read .* as a list of bad cases"),
        (None, "can't read .* as a list of bad cases"),
    ],
)
def test_other_files_are_refused(content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        hard_rows(tmp_path / "bad.csv", Split(["1"], ["2"]), None)
    assert "modeling/bad_cases.py" in one_line(raised)
