"""A cache in parts is read as the one it would be joined: every reading method, and what is wrong with parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import one_line
from parted import ROWS, SETTINGS, both_sides, make_parts, pairs_with_faults

from feats import inspect_feats, parts
from feats.cache_layout import ROW_FACTS
from feats.cache_reader import CacheError, CacheReader, MissingRowsError
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.merging import merge
from feats.json_files import read_text
from feats.parts import PartedStore, PartsPlan, cache_paths, is_cache, open_cache, part_path, plan_path, read_plan
from feats.store import FeatureStore
from modeling.experiments.fitting import fit_head
from modeling.features.cache_facts import are_complete, cached_widths, caches_with
from modeling.features.loading import load_features
from modeling.features.splits import make_split
from modeling.reproduction.sources import caches_in

SIZES = [16, 5, 1, 32, 16]
FACTS = [name for side in ROW_FACTS.values() for name in side]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/, parted/ and joined/ with the cache both_train of the same pairs, and empty/ with a plan only."""
    root = tmp_path_factory.mktemp("made")
    records = pairs_with_faults(root / "set")
    extract(both_sides(), records, root / "plain" / "both_train.h5", SETTINGS)
    make_parts(both_sides(), records, root / "parted" / "both_train.h5", SIZES)
    make_parts(both_sides(), records, root / "joined" / "both_train.h5", SIZES)
    merge(root / "joined" / "both_train.h5")
    return root


@pytest.fixture
def parted(made: Path, tmp_path: Path) -> Path:
    """A copy of the parts that a test may change; the path of the cache they are parts of."""
    shutil.copytree(made / "parted", tmp_path / "parted")
    return tmp_path / "parted" / "both_train.h5"


def some_ids(store: CacheReader) -> list[str]:
    """Of many parts, in disorder, one twice."""
    ids = store.done_ids().tolist()
    return [*np.random.default_rng(0).permutation(ids)[:30].tolist(), ids[7], ids[7]]


ROW_CHOICES = {
    "all in order": lambda done: done,
    "consecutive over a border": lambda done: np.arange(14, 24),
    "one": lambda done: done[:1],
    "none": lambda done: done[:0],
    "disordered and repeated": lambda done: np.random.default_rng(1).choice(done, 90),
    "backwards": lambda done: done[::-1],
}
READINGS: dict[str, Callable[[CacheReader], Any]] = {
    "ids": lambda s: s.ids.tolist(),
    "tags": lambda s: s.tags.tolist(),
    "status": lambda s: s.status,
    "fingerprint": lambda s: json.dumps(s.fingerprint),
    "plan": lambda s: json.dumps(s.plan),
    "features": lambda s: s.features,
    "schema": lambda s: s.schema,
    "block_rows": lambda s: s.block_rows,
    "content_digest": lambda s: s.content_digest(),
    "parameters": lambda s: s.parameters,
    "token_counts": lambda s: s.token_counts(),
    "source": lambda s: s.source,
    "reasons": lambda s: list(s.reasons.items()),
    "complete": lambda s: s.complete,
    "length": len,
    "done_ids": lambda s: s.done_ids().tolist(),
    "positions": lambda s: s.positions(some_ids(s)),
    "frame": lambda s: [*s.to_frame().arrays.values()],
    "names in the frame": lambda s: [s.to_frame().ids.tolist(), s.to_frame().labels.tolist(), [*s.to_frame().arrays]],
    "frame of some": lambda s: s.to_frame("image_views")["image_views"],
    "tokens": lambda s: [*s.read_tokens()],
    "tokens by id": lambda s: [*s.read_tokens(some_ids(s))],
    "stored": lambda s: [*s.stored(0, ROWS).values(), *s.stored(15, 23).values(), *s.stored(21, 22).values()],
    "problems": lambda s: s.verify(),
    **{f"facts {name}": lambda s, name=name: s.facts(name) for name in FACTS},
    **{
        f"rows of {name}, {which}": lambda s, name=name, which=which: s.read_rows(
            name, ROW_CHOICES[which](np.flatnonzero(s.status == 1))
        )
        for name in ("image_feats", "image_views", "image_tokens", "text_feats", "image_hash")
        for which in ROW_CHOICES
    },
    **{
        f"tokens, {which}": lambda s, which=which: [
            *s.read_token_rows(ROW_CHOICES[which](np.flatnonzero(s.status == 1)))
        ]
        for which in ROW_CHOICES
    },
    "by id": lambda s: s.read("text_feats", some_ids(s)),
}


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, list) and a and isinstance(a[0], np.ndarray):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("reading", READINGS)
def test_parts_read_as_the_plain_cache(made: Path, reading: str):
    with (
        open_cache(made / "plain" / "both_train.h5") as plain,
        open_cache(made / "parted" / "both_train.h5") as parted,
        open_cache(made / "joined" / "both_train.h5") as joined,
    ):
        assert [type(store) for store in (plain, parted, joined)] == [FeatureStore, PartedStore, FeatureStore]
        expected = READINGS[reading](plain)
        assert_equal(READINGS[reading](parted), expected)
        assert_equal(READINGS[reading](joined), expected)


def test_the_values_are_those_of_the_parts_themselves(made: Path):
    """Read without this program."""
    folder = made / "parted" / "both_train.parts"
    with PartedStore(folder) as store:
        rows = np.flatnonzero(store.status == 1)
        found, tokens = store.read_rows("image_views", rows), store.read_tokens()[0]
    values, words = [], []
    for number in range(len(SIZES)):
        with h5py.File(part_path(folder, number)) as file:
            done = np.flatnonzero(file["status"][:] == 1)
            values.append(file["image_views"][:][done])
            offsets = file["text_offsets"][:]
            words += [file["text_tokens"][offsets[row] : offsets[row + 1]] for row in done]
    assert found.shape == (67, 2, 3) and np.isfinite(found).all()
    np.testing.assert_array_equal(found, np.concatenate(values))
    np.testing.assert_array_equal(tokens, np.concatenate(words))


def test_few_files_are_open_at_a_time(made: Path, monkeypatch: pytest.MonkeyPatch):
    def opened() -> int:
        return h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)

    before = opened()
    monkeypatch.setattr(parts, "OPEN_PARTS", 2)
    with PartedStore(made / "parted" / "both_train.h5") as store:
        assert opened() == before  # lazily
        rows = np.flatnonzero(store.status == 1)
        mixed = np.random.default_rng(0).permutation(rows)
        np.testing.assert_array_equal(
            store.read_rows("text_feats", mixed)[np.argsort(mixed)], store.read_rows("text_feats", rows)
        )
        assert opened() == before + 2
    assert opened() == before


def test_a_part_is_checked_once_however_often_it_is_opened(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Checking a dataset takes as long as reading all of it, and rows of many parts are read in turn."""
    checked: list[tuple[Path, str]] = []
    check = FeatureStore._check_chunks

    def told(store: FeatureStore, name: str, dataset: h5py.Dataset) -> None:
        checked.append((store.path, name))
        check(store, name, dataset)

    monkeypatch.setattr(FeatureStore, "_check_chunks", told)
    monkeypatch.setattr(parts, "OPEN_PARTS", 1)
    with PartedStore(made / "parted" / "both_train.h5") as store:
        rows = np.flatnonzero(store.status == 1)
        for row in (rows[0], rows[-1], rows[0], rows[-1]):
            store.read_rows("text_feats", np.array([row]))
        of_feats = [path for path, name in checked if name == "text_feats"]
        assert len(of_feats) == len(set(of_feats)) == 2


@pytest.mark.parametrize("rows", [[-1], [ROWS]])
def test_rows_that_don_t_exist_are_refused(made: Path, rows: list[int]):
    with (
        PartedStore(made / "parted" / "both_train.h5") as store,
        pytest.raises(IndexError, match=f"rows 0 to {ROWS - 1}"),
    ):
        store.read_rows("text_feats", np.array(rows))


def test_rows_in_quarantine_are_named(made: Path):
    with PartedStore(made / "parted" / "both_train.h5") as store:
        with pytest.raises(MissingRowsError, match=r"1 not in it \(nobody\); 1 in quarantine \(40\)"):
            store.read("text_feats", ["1", "40", "nobody"])
        with pytest.raises(MissingRowsError, match=r"in quarantine \(40, 41\)"):
            store.read_token_rows(np.array([39, 40, 41]))
        with pytest.raises(CacheError, match="holds no nothing"):
            store.read_rows("nothing", np.array([0]))


# -- which is opened ---------------------------------------------------------------------------------------------


def test_a_cache_is_found_in_either_form(made: Path, parted: Path):
    assert is_cache(parted) and not is_cache(parted.with_name("other_train.h5"))
    with open_cache(parted.with_suffix(".parts")) as store:
        assert isinstance(store, PartedStore) and len(store) == ROWS
    shutil.copy(made / "plain" / "both_train.h5", parted.with_name("plain_train.h5"))
    parted.with_name("nothing_train.parts").mkdir()
    assert [path.name for path in cache_paths(parted.parent, "train")] == ["both_train.h5", "plain_train.h5"]
    assert cache_paths(parted.parent) == cache_paths(parted.parent, "train") and cache_paths(parted.parent, "x") == []
    with pytest.raises(CacheError, match="no cache .*nothing_train.h5; make it with an extraction script"):
        open_cache(parted.with_name("nothing_train.h5"))


def test_while_parts_are_joined_they_are_read(made: Path, parted: Path):
    shutil.copy(made / "plain" / "both_train.h5", parted)
    with open_cache(parted) as store:
        assert isinstance(store, FeatureStore)
    with FeatureStore.append(parted) as joining:
        joining._file.attrs.modify("complete", False)
        with open_cache(parted) as store:  # it is being written
            assert isinstance(store, PartedStore) and store.complete
    with open_cache(parted) as store:  # it was left so
        assert isinstance(store, PartedStore) and store.complete


# -- what is wrong with parts ------------------------------------------------------------------------------------


@pytest.fixture
def lacking(parted: Path) -> Path:
    for number in (1, 3):
        part_path(parted.with_suffix(".parts"), number).unlink()
    return parted


NEEDING = [name for name in READINGS if name not in ("complete", "plan", "features", "block_rows", "problems")]


@pytest.mark.parametrize("reading", NEEDING)
def test_what_needs_missing_parts_says_so(lacking: Path, reading: str):
    with open_cache(lacking) as store, pytest.raises(CacheError) as error:
        READINGS[reading](store)
    assert "2 of 5 parts are still to be made" in one_line(error) and "run the same extraction again" in one_line(error)


def test_what_parts_that_are_there_tell(lacking: Path, capsys: pytest.CaptureFixture[str]):
    part_path(lacking.with_suffix(".parts"), 3).with_suffix(".lease").write_text("{}")
    with open_cache(lacking) as store:
        assert not store.complete and store.missing == [1, 3] and store.features["image_views"] == (2, 3)
        assert store.block_rows == 16 and len(store.verify()) == 1
    assert inspect_feats.main([str(lacking), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert "in 5 parts, split train, INCOMPLETE: 2 missing (1, 3), of which 1 in work (3)" in out
    assert "encoder: both" in out and "2 of 5 parts are still to be made" in err


def test_inspecting_parts(parted: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect_feats.main([str(parted), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "both_train.parts: in 5 parts, split train\n" in out and "70 rows (67 done, 3 quarantined), complete" in out
    assert "every chunk is sound" in out and "    40: no text file" in out


def test_damage_in_any_part_is_found(parted: Path, capsys: pytest.CaptureFixture[str]):
    part = part_path(parted.with_suffix(".parts"), 3)
    with h5py.File(part) as file:
        at = file["image_feats"].id.get_chunk_info(0).byte_offset
    data = bytearray(part.read_bytes())
    data[at] ^= 255
    part.write_bytes(data)
    assert inspect_feats.main([str(parted), "--verify"]) == 2
    assert "part-00000003.h5: image_feats: 1 damaged chunks (checksum)" in capsys.readouterr().err
    with open_cache(parted) as store, pytest.raises(CacheError, match="part-00000003.h5: image_feats can't be read"):
        store.read("image_feats")


def test_an_id_in_two_parts(parted: Path):
    folder = parted.with_suffix(".parts")
    shutil.copy(part_path(folder, 0), part_path(folder, 4))
    with open_cache(parted) as store:
        with pytest.raises(CacheError) as error:
            len(store)
        assert "16 ids are in more than one row of" in one_line(error) and ": 0, 1, 10, 11, 12, ..." in one_line(error)
        (problem,) = store.verify()
        assert problem == str(error.value)


def test_a_part_of_something_else(parted: Path, tmp_path: Path):
    """Made with other views, or begun only."""
    folder = parted.with_suffix(".parts")
    plan = json.loads(plan_path(folder).read_text())
    plan_path(folder).write_text(json.dumps({**plan, "fingerprint": {**plan["fingerprint"], "dtype": "bf16"}}))
    with open_cache(parted) as store, pytest.raises(CacheError, match='part-00000000.h5 .*dtype: the cache has "fp32"'):
        _ = store.ids
    plan_path(folder).write_text(json.dumps({**plan, "kept": {**plan["kept"], "batch_size": 3}}))
    with open_cache(parted) as store, pytest.raises(CacheError, match="was made by another plan"):
        _ = store.tags.tolist(), store.status
    plan_path(folder).write_text(json.dumps(plan))
    with FeatureStore.append(part_path(folder, 2)) as part:
        part._file.attrs.modify("complete", False)
    with open_cache(parted) as store, pytest.raises(CacheError, match="part-00000002.h5 isn't complete; remove"):
        len(store)


PLAN = {"format_version": 1, "fingerprint": {}, "kept": {"block_rows": 16}, "features": {"image_feats": [3]}}
PLAN |= {"layout": "course", "split": "train", "pieces": [{"rows": 3}]}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "Expecting value"),
        ("[]", "isn't a plan of format 1"),
        (json.dumps({**PLAN, "format_version": 2}), "isn't a plan of format 1"),
        (json.dumps({key: value for key, value in PLAN.items() if key != "kept"}), "expected format_version, fing"),
        (json.dumps({**PLAN, "more": 1}), "more; expected"),
        (json.dumps({**PLAN, "split": 3}), "its split isn't"),
        (json.dumps({**PLAN, "kept": {}}), "its kept.block_rows isn't"),
        (json.dumps({**PLAN, "features": {"image_feats": 3}}), "its features isn't"),
        (json.dumps({**PLAN, "pieces": [3]}), "its pieces isn't"),
    ],
)
def test_a_damaged_plan_is_one_line(tmp_path: Path, text: str, what: str):
    plan_path(tmp_path).write_text(text)
    with pytest.raises(UsageError) as error:
        read_plan(tmp_path)
    assert "plan.json can't be read" in one_line(error) and what in one_line(error)


def test_a_plan_survives_its_file(tmp_path: Path):
    assert read_plan(tmp_path) is None
    plan = PartsPlan.from_json(json.dumps(PLAN))
    plan_path(tmp_path).write_text(plan.text)
    assert read_plan(tmp_path) == plan and plan.features == {"image_feats": [3]}


def test_a_plan_that_goes_while_it_is_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last worker has joined the parts, and removes them."""
    plan_path(tmp_path).write_text("{}")

    def gone(path: Path, remedy: str) -> str:
        path.unlink()
        return read_text(path, remedy)

    monkeypatch.setattr("feats.parts.read_text", gone)
    assert read_plan(tmp_path) is None


# -- stage 2 -----------------------------------------------------------------------------------------------------


def test_a_head_trained_on_parts_is_that_of_the_joined_cache(made: Path):
    """The same weights, to the bit."""
    runs = {}
    for kind in ("plain", "parted", "joined"):
        data = load_features(made / kind, "train", image="both", text="both", tokens=True)
        run = fit_head(data, make_split(data, val_ratio=0.25), "fusion", D=4, ep=2, bs=16, device="cpu")
        runs[kind] = run
    weights = {kind: run.members[0].head.state_dict() for kind, run in runs.items()}
    assert weights["plain"].keys() == weights["parted"].keys() and len(weights["plain"]) > 3
    for kind in ("parted", "joined"):
        for name, value in weights["plain"].items():
            assert np.array_equal(weights[kind][name].numpy(), value.numpy()), name
        assert runs[kind].source.fingerprints == runs["plain"].source.fingerprints
        assert runs[kind].source.contents == runs["plain"].source.contents


def test_stage_2_finds_caches_in_parts(made: Path, lacking: Path):
    folder = made / "parted"
    assert caches_with("image", folder, "train", ["both", "other"]) == ["both"]
    source = load_features(folder, "train", image="both", text="both").source
    assert cached_widths(source, "train") == cached_widths(source, "train") != {}
    assert are_complete(folder, "train", ["both"]) and not are_complete(lacking.parent, "train", ["both"])
    assert [cache.name for cache in caches_in(folder)] == ["both"] and caches_in(lacking.parent) == []
    with pytest.raises(UsageError, match="2 of 5 parts are still to be made"):
        load_features(lacking.parent, "train", image="both")
    with pytest.raises(UsageError, match=r"no cache .*boht_train.h5.*caches there: both_train\).*mean both"):
        load_features(folder, "train", image="boht")
