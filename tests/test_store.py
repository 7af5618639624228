"""The cache file: what is written is what is read, whatever happens in between."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ENVIRONMENT

from feats import inspect_feats
from feats.cache_reader import DONE, PENDING, QUARANTINED, CacheError, MissingRowsError, fingerprint_difference
from feats.quarantine import write_reasons
from feats.store import FeatureStore
from feats.strings import Labels, Strings

N, BLOCK = 200, 32
RNG = np.random.default_rng(0)
IDS = [f"row {i} é/{'x' * (i % 5)}" for i in range(N)]
TAGS = ["happy" if i % 3 else "" for i in range(N)]
LENGTHS = RNG.integers(1, 9, N)
FEATS = RNG.normal(size=(N, 24)).astype(np.float16)
VIEWS = RNG.normal(size=(N, 3, 24)).astype(np.float16)
TOKENS = RNG.normal(size=(LENGTHS.sum(), 7)).astype(np.float16)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
SHAPES = {"image_feats": (24,), "image_views": (3, 24), "text_tokens": (7,)}


def create(path: Path, **options) -> FeatureStore:
    return FeatureStore.create(
        path, IDS, TAGS, {"encoder": "test"}, SHAPES, block_rows=BLOCK, token_counts=LENGTHS, **options
    )


def arrays(rows: np.ndarray, sign: int = 1) -> dict[str, np.ndarray]:
    return {
        "image_feats": sign * FEATS[rows],
        "image_views": sign * VIEWS[rows],
        "text_tokens": sign * np.concatenate([TOKENS[OFFSETS[i] : OFFSETS[i + 1]] for i in rows]),
        "n_tokens": LENGTHS[rows].astype(np.int32),
    }


def blocks(step: int = BLOCK) -> list[np.ndarray]:
    return [np.arange(low, min(low + step, N)) for low in range(0, N, step)]


def fill(store: FeatureStore, bad: tuple[int, ...] = ()) -> None:
    for rows in blocks():
        status = np.where(np.isin(rows, bad), QUARANTINED, DONE)
        store.write(rows, status, arrays(rows), {IDS[i]: f"reason {i}" for i in rows if i in bad})
    store.finish()


@pytest.fixture
def full(tmp_path: Path) -> Path:
    with create(tmp_path / "full_train.h5") as store:
        fill(store)
    return tmp_path / "full_train.h5"


def test_schema_is_the_contract(full: Path):
    with h5py.File(full) as file:
        assert file["id"].shape == file["tag"].shape == file["status"].shape == (N,)
        assert h5py.check_string_dtype(file["id"].dtype).encoding == "utf-8"
        assert file["status"].dtype == np.uint8
        assert file["image_feats"].shape == (N, 24) and file["image_feats"].dtype == np.float16
        assert file["image_views"].shape == (N, 3, 24)
        assert file["text_tokens"].shape == (LENGTHS.sum(), 7)
        assert file["text_offsets"].shape == (N + 1,) and file["text_offsets"].dtype == np.int64
        assert file["truncated"].shape == (N,)
        assert all(dataset.fletcher32 for dataset in file.values())
        assert file.attrs["complete"] and "fingerprint" in file.attrs and "format_version" in file.attrs


def test_the_encoder_s_size_is_kept_where_it_is_told(full: Path, tmp_path: Path):
    with FeatureStore.open(full) as store:
        assert store.parameters is None
    sizes = {"image": 0, "text": 22_713_216}
    how = {"parameters": sizes}
    FeatureStore.create(tmp_path / "x.h5", ["a"], [""], {"encoder": "x"}, {"text_feats": (3,)}, **how).close()
    with FeatureStore.append(tmp_path / "x.h5") as store:
        assert store.parameters == sizes and store.fingerprint == {"encoder": "x"}


def test_reads_in_the_asked_order(full: Path):
    order = RNG.permutation(N)[:77]
    asked = [IDS[i] for i in order]
    with FeatureStore.open(full) as store:
        np.testing.assert_array_equal(store.ids, IDS)
        np.testing.assert_array_equal(store.tags, TAGS)
        np.testing.assert_array_equal(store.read("image_feats"), FEATS)
        np.testing.assert_array_equal(store.read("image_feats", asked), FEATS[order])
        np.testing.assert_array_equal(store.read("image_views", asked), VIEWS[order])
        tokens, offsets = store.read_tokens(asked)
        for k, i in enumerate(order):
            np.testing.assert_array_equal(tokens[offsets[k] : offsets[k + 1]], TOKENS[OFFSETS[i] : OFFSETS[i + 1]])
        np.testing.assert_array_equal(store.read_tokens()[0], TOKENS)
        assert store.read("image_feats", []).shape == (0, 24)
        np.testing.assert_array_equal(store.read("image_feats", [IDS[3], IDS[3]]), FEATS[[3, 3]])
        assert store.verify() == []


ROWS = {
    "all": np.arange(N),
    "one run across chunks": np.arange(20, 101),
    "gaps": np.array([0, 1, 2, 31, 32, 64, 65, 66, 199]),
    "every second": np.arange(0, 60, 2),
    "backwards": np.arange(N)[::-1],
    "any order": RNG.permutation(N)[:77],
    "repeated": np.array([5, 5, 6, 5, 199, 0]),
    "none": np.arange(0),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_reading_by_row_is_reading_by_id(full: Path, rows: np.ndarray):
    ids = [IDS[row] for row in rows]
    with FeatureStore.open(full) as store:
        for name, values in (("image_feats", FEATS), ("image_views", VIEWS)):
            np.testing.assert_array_equal(store.read_rows(name, rows), values[rows])
            np.testing.assert_array_equal(store.read(name, ids), values[rows])
        tokens, offsets = store.read_token_rows(rows)
        expected = [TOKENS[OFFSETS[row] : OFFSETS[row + 1]] for row in rows]
        np.testing.assert_array_equal(tokens, np.concatenate([TOKENS[:0], *expected]))
        np.testing.assert_array_equal(np.diff(offsets), LENGTHS[rows])
        for by_row, by_id in zip((tokens, offsets), store.read_tokens(ids), strict=True):
            np.testing.assert_array_equal(by_row, by_id)


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path):
    with create(tmp_path / "part_train.h5") as store:
        store.write(np.arange(BLOCK), np.where(np.arange(BLOCK) == 5, QUARANTINED, DONE), arrays(np.arange(BLOCK)))
        for read in (lambda rows: store.read_rows("image_feats", rows), store.read_token_rows):
            with pytest.raises(MissingRowsError) as error:
                read(np.array([3, 5, 4, 199]))
            assert (error.value.absent, error.value.quarantined, error.value.pending) == ([], [IDS[5]], [IDS[199]])
            assert str(error.value).startswith(f"{tmp_path / 'part_train.h5'} lacks rows: 1 not encoded yet (")
            for row in (-1, N):
                with pytest.raises(IndexError, match=f"has rows 0 to {N - 1}; asked for {row}$"):
                    read(np.array([3, row]))
        with pytest.raises(CacheError, match="holds no bert_feats"):
            store.read_rows("bert_feats", np.arange(3))


def test_a_flipped_bit_is_an_error_in_rows_too(full: Path):
    flip(full, "image_feats", 100)
    with FeatureStore.open(full) as store:
        np.testing.assert_array_equal(store.read_rows("image_feats", np.arange(96)), FEATS[:96])
        for rows in (np.arange(90, 140), np.array([100, 3])):
            with pytest.raises(CacheError, match="image_feats can't be read.*`overwrite`"):
                store.read_rows("image_feats", rows)


def test_ids_and_labels_of_any_script(tmp_path: Path):
    """Plain ASCII is decoded another way than the rest."""
    for n, strings in enumerate((["a", "bcd", "~"], ["", "", ""], ["é", "bc", "日本"])):
        with FeatureStore.create(
            tmp_path / f"{n}_train.h5", ["x", "yy", "z"], strings, {}, {"image_feats": (2,)}
        ) as store:
            assert store.tags.tolist() == strings and store.ids.tolist() == ["x", "yy", "z"]


def test_missing_rows_are_named(tmp_path: Path):
    with create(tmp_path / "part_train.h5") as store:
        store.write(np.arange(BLOCK), np.where(np.arange(BLOCK) == 5, QUARANTINED, DONE), arrays(np.arange(BLOCK)))
        assert not store.finish() and not store.complete
        with pytest.raises(MissingRowsError) as error:
            store.read("image_feats", [IDS[0], "stranger", IDS[5], IDS[199]])
        assert (error.value.absent, error.value.quarantined, error.value.pending) == (
            ["stranger"],
            [IDS[5]],
            [IDS[199]],
        )
        with pytest.raises(CacheError, match="holds no bert_feats; it has .*image_feats"):
            store.read("bert_feats")
        np.testing.assert_array_equal(store.done_ids(), [i for k, i in enumerate(IDS[:BLOCK]) if k != 5])
        for n, listed in ((2, "a, b"), (5, "a, b, c, d, e"), (6, "a, b, c, d, e, ...")):
            with pytest.raises(MissingRowsError, match=re.escape(f"lacks rows: {n} not in it ({listed}).")):
                store.read("image_feats", list("abcdef"[:n]))


def test_facts_of_every_row(full: Path):
    with FeatureStore.open(full) as store:
        np.testing.assert_array_equal(store.facts("n_tokens"), LENGTHS)
        np.testing.assert_array_equal(store.token_counts(), LENGTHS)
        assert store.features == SHAPES and store.block_rows == BLOCK and len(store) == N
        assert store.schema["image_views"] == ((N, 3, 24), "float16")


def test_facts_of_a_side_that_the_encoder_lacks(tmp_path: Path):
    with FeatureStore.create(
        tmp_path / "a" / "b" / "text_train.h5", ["x", "y"], ["", ""], {}, {"text_feats": (2,)}
    ) as s:
        facts = s.facts("image_hash")
        assert facts.dtype == np.uint64 and facts.tolist() == [0, 0] and "image_hash" not in s.schema


def test_quarantined_rows_are_never_zeros(tmp_path: Path):
    path = tmp_path / "q_train.h5"
    with create(path) as store:
        fill(store, bad=(3, 40))
        assert store.complete and store.reasons == {IDS[3]: "reason 3", IDS[40]: "reason 40"}
    assert (tmp_path / "q_train.quarantine.csv").read_text().splitlines()[0] == "id,reason"
    with h5py.File(path) as file:
        assert np.isnan(file["image_feats"][3]).all() and np.isnan(file["image_views"][40]).all()
    with FeatureStore.append(path) as store:  # repaired one by one
        store.write(np.array([3]), np.array([DONE]), arrays(np.array([3])))
        assert store.finish() and store.reasons == {IDS[40]: "reason 40"}
        (tmp_path / "q_train.quarantine.csv").unlink()  # by whoever has read it
        store.write(np.array([40]), np.array([DONE]), arrays(np.array([40])))
        store.finish()
    assert not (tmp_path / "q_train.quarantine.csv").exists()
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.read("image_feats"), FEATS)
        np.testing.assert_array_equal(store.read_tokens()[0], TOKENS)


def test_reasons_are_written_behind_those_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, bad = tmp_path / "q_train.h5", tuple(range(0, N, 7))
    whole = list[int]()
    monkeypatch.setattr("feats.store.write_reasons", lambda to, reasons: whole.append(write_reasons(to, reasons)))
    with create(path) as store:
        fill(store, bad=bad)
        write_reasons(tmp_path / "at_once.csv", store.reasons)
    expected = (tmp_path / "at_once.csv").read_bytes()
    assert len(whole) == 1 < len(blocks()) and expected.count(b"\n") == 1 + len(bad)
    file = path.with_name("q_train.quarantine.csv")
    assert file.read_bytes() == expected
    file.write_bytes(expected[:-5])  # torn by a kill: its row isn't done and is tried again
    last = np.array(bad[-1:])
    with FeatureStore.append(path) as store:
        store.write(last, np.array([QUARANTINED]), arrays(last), {IDS[bad[-1]]: f"reason {bad[-1]}"})
    assert file.read_bytes() == expected


def test_reasons_come_back_as_they_were_written(tmp_path: Path):
    reasons = {"a\rb": "one\r\ntwo", 'c,"d"\n': "", "é": "数"}
    with FeatureStore.create(tmp_path / "q_train.h5", list(reasons), [""] * 3, {}, {"image_feats": (2,)}) as store:
        store.write(np.arange(3), np.full(3, QUARANTINED), {"image_feats": np.zeros((3, 2), np.float16)}, reasons)
    with FeatureStore.open(tmp_path / "q_train.h5") as store:
        assert store.reasons == reasons


def test_labels_can_be_corrected_without_encoding_again(full: Path):
    with FeatureStore.append(full) as store:
        assert store.update_tags(TAGS) == 0
        assert store.update_tags(["sad", *TAGS[1:]]) == 1
        with pytest.raises(CacheError, match="room for labels of 32 bytes.*`overwrite`"):
            store.update_tags(["x" * 33, *TAGS[1:]])
    with FeatureStore.open(full) as store:
        assert store.tags[0] == "sad" and store.complete


WRITER = """
    import sys, time, numpy as np
    sys.path.insert(0, {tests!r})
    import test_store as t
    with t.FeatureStore.append(sys.argv[1]) as store:
        print("open", flush=True)
        for rows in t.blocks():
            if (store.status[rows] == t.PENDING).any():
                store.write(rows, np.full(len(rows), t.DONE), t.arrays(rows))
        store.finish()
"""


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_data(tmp_path: Path, full: Path):
    """`kill -9` again and again while writing; nothing is lost, nothing differs."""
    path = tmp_path / "killed_train.h5"
    create(path).close()
    script = textwrap.dedent(WRITER.format(tests=str(Path(__file__).parent)))
    rng = np.random.default_rng(1)
    kills, done = 0, 0
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        process.stdout.readline()
        try:
            process.wait(timeout=rng.uniform(0, 0.01))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += process.returncode == -signal.SIGKILL
        with FeatureStore.open(path) as store:
            now = int((store.status == DONE).sum())
            assert now >= done - 2 * store.block_rows  # at most the block in flight and a neighbour are done again
            rows = np.flatnonzero(store.status == DONE)
            np.testing.assert_array_equal(store.read("image_feats"), FEATS[rows])
            done = now
            if store.complete:
                break
    assert kills
    with FeatureStore.append(path) as store:
        for rows in blocks():
            if (store.status[rows] == PENDING).any():
                store.write(rows, np.full(len(rows), DONE), arrays(rows))
        assert store.finish()
    with h5py.File(path) as a, h5py.File(full) as b:
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name][:], b[name][:], err_msg=name)


@pytest.mark.parametrize("block", [2, -1], ids=["a whole chunk", "the last, of fewer rows"])
@pytest.mark.parametrize("name", ["status", "image_feats", "text_tokens", "n_tokens"])
def test_a_chunk_torn_in_flight_is_made_pending(tmp_path: Path, name: str, block: int):
    """What a kill in the middle of a chunk's write leaves: data and checksum that don't fit."""
    path = tmp_path / "torn_train.h5"
    with create(path) as store:
        for rows in blocks():
            store.write(rows, np.full(len(rows), DONE), arrays(rows))
        torn = blocks()[block]
        store._set_status(torn, PENDING)
    flip(path, name, row=int(OFFSETS[torn[-1]]) if name == "text_tokens" else int(torn[-1]))
    with FeatureStore.append(path) as store:
        assert (store.status[torn] == PENDING).all()
        for rows in blocks():
            if (store.status[rows] == PENDING).any():
                store.write(rows, np.full(len(rows), DONE), arrays(rows))
        assert store.finish() and store.verify() == []
        np.testing.assert_array_equal(store.read("image_feats"), FEATS)
        np.testing.assert_array_equal(store.read_tokens()[0], TOKENS)


@pytest.mark.parametrize("name", ["image_feats", "text_tokens", "n_tokens"])
def test_done_rows_of_a_torn_chunk_are_made_pending_unless_no_row_of_it_was_in_flight(tmp_path: Path, name: str):
    """Beside pending rows a torn chunk is what a kill left; among done rows only it is damage, to be told."""
    path, some = tmp_path / "part_train.h5", np.arange(80)
    with create(path) as store:
        for rows in (some[:32], some[32:64], some[64:]):  # the last chunk of 32 is half done
            store.write(rows, np.full(len(rows), DONE), arrays(rows))
    content = path.read_bytes()
    chunk = int(OFFSETS[some[-1]]) // 32 * 32 if name == "text_tokens" else 64  # the last with a done row
    lost = [i for i in some if OFFSETS[i + 1] > chunk] if name == "text_tokens" else list(range(64, 80))
    flip(path, name, chunk)
    with FeatureStore.append(path) as store:
        assert store.repaired == len(lost)
        np.testing.assert_array_equal(np.flatnonzero(store.status == DONE), some[: -len(lost)])
        done_rows_are_whole(store)
    path.write_bytes(content)
    flip(path, name, 0)
    with FeatureStore.append(path) as store:
        assert store.repaired == 0 and (store.status[some] == DONE).all()
        with pytest.raises(CacheError, match=f"{name} can't be read"):
            done_rows_are_whole(store)


SECTOR = 512  # bytes that a disk writes as one piece


def after_a_power_cut(before: bytes, after: bytes, rng: np.random.Generator) -> list[bytes]:
    """Files that a disk may hold between two syncs: any of the sectors that change have changed."""
    old, new = (np.frombuffer(content, np.uint8).reshape(-1) for content in (before, after))
    changed = np.unique(np.flatnonzero(old != new) // SECTOR)
    if not len(changed):
        return []
    kept = [changed[: rng.integers(1, len(changed) + 1)]]  # in the order of the file
    kept += [rng.permutation(changed)[:k] for k in rng.integers(1, len(changed) + 1, 2)]
    kept += [changed[k : k + 1] for k in rng.permutation(len(changed))[:3]]
    files = []
    for sectors in {tuple(sorted(sectors)) for sectors in kept}:
        content = old.copy()
        for sector in sectors:
            content[sector * SECTOR : (sector + 1) * SECTOR] = new[sector * SECTOR : (sector + 1) * SECTOR]
        files.append(content.tobytes())
    return files


def done_rows_are_whole(store: FeatureStore) -> None:
    """Every done row reads as it was written, the first time or, negated, the second."""
    done = np.flatnonzero(store.status == DONE)
    feats, views = store.read_rows("image_feats", done), store.read_rows("image_views", done)
    tokens, offsets = store.read_token_rows(done)
    sign = np.where(feats[:, 0] == FEATS[done, 0], 1, -1).astype(np.float16)
    np.testing.assert_array_equal(feats, sign[:, None] * FEATS[done])
    np.testing.assert_array_equal(views, sign[:, None, None] * VIEWS[done])
    expected = np.concatenate([TOKENS[:0], *(TOKENS[OFFSETS[i] : OFFSETS[i + 1]] for i in done)])
    np.testing.assert_array_equal(tokens, np.repeat(sign, np.diff(offsets))[:, None] * expected)
    np.testing.assert_array_equal(store.facts("n_tokens")[done], LENGTHS[done])


def test_a_power_cut_leaves_no_row_done_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was synced is on the disk; of what was written since, any part. A killed process leaves all of it, so that
    only this tells whether features are synced before their status says done, and status before features change."""
    path, states = tmp_path / "cut_train.h5", []
    sync = os.fsync

    def recorded(fd: int) -> None:
        sync(fd)
        states.append(path.read_bytes())

    with create(path) as store:
        monkeypatch.setattr(os, "fsync", recorded)
        fill(store, bad=(3, 40))
        finished = states[-1]
    with FeatureStore.append(path) as store:
        for rows in (np.array([40]), np.array([64, 65, 100])):  # in chunks and token chunks of done rows
            store.write(rows, np.full(len(rows), DONE), arrays(rows, -1))
        store.finish()
    monkeypatch.undo()
    states.append(path.read_bytes())
    path.write_bytes(finished)
    with FeatureStore.open(path) as store:
        assert store.complete
    rng, unreadable = np.random.default_rng(0), 0
    for before, after in zip(states, states[1:], strict=False):
        for content in after_a_power_cut(before, after, rng):
            path.write_bytes(content)
            try:
                with FeatureStore.open(path) as store:
                    done_rows_are_whole(store)
            except CacheError as error:  # torn among pending rows: the next writer repairs it
                assert "run the same extraction again to repair it" in str(error)
                unreadable += 1
            with FeatureStore.append(path) as store:
                done_rows_are_whole(store)
    assert unreadable


def test_labels_torn_in_an_update_are_written_again(full: Path):
    for row in (0, N - 1):
        flip(full, "tag", row)
        with FeatureStore.append(full) as store:
            assert store.update_tags(TAGS) == N
            np.testing.assert_array_equal(store.tags, TAGS)
            assert store.verify() == []


def flip(path: Path, name: str, row: int = 100) -> None:
    """Turn one bit in the chunk of `name` that holds `row`."""
    with h5py.File(path) as file:
        dataset = file[name]
        found = []
        dataset.id.chunk_iter(found.append)
        chunk = next(c for c in found if c.chunk_offset[0] == row // dataset.chunks[0] * dataset.chunks[0])
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize(
    "name", ["id", "tag", "status", "n_tokens", "image_feats", "image_views", "text_tokens", "text_offsets"]
)
def test_a_flipped_bit_is_an_error(full: Path, name: str, capsys: pytest.CaptureFixture):
    assert inspect_feats.main(["--verify", str(full)]) == 0
    assert "every chunk is sound" in capsys.readouterr().out
    flip(full, name)
    assert inspect_feats.main(["--verify", str(full)]) == 2
    assert name in capsys.readouterr().err
    with (
        pytest.raises(CacheError, match=f"^{full}: {name} can't be read.*`overwrite`"),
        FeatureStore.open(full) as store,
    ):
        assert store.tags is not None and store.facts("n_tokens") is not None
        store.read("image_feats"), store.read("image_views"), store.read_tokens()


def changed(path: Path, name: str, row: int, value: Any) -> None:
    """Give a row another value, its checksum too."""
    with h5py.File(path, "r+") as file:
        file[name][row] = value


def test_what_verify_finds(full: Path):
    content = full.read_bytes()

    def found(name: str, row: int, value: Any) -> list[str]:
        full.write_bytes(content)
        changed(full, name, row, value)
        with FeatureStore.open(full) as store:
            return store.verify()

    assert found("id", 3, IDS[7]) == ["id: not unique"]
    assert found("status", 3, PENDING) == ["complete, yet rows are pending"]
    for name, row in (("image_feats", 150), ("image_views", 150), ("text_tokens", 400)):
        assert found(name, row, np.inf) == [f"{name}: rows marked done hold values that aren't finite"]
    full.write_bytes(content)
    flip(full, "image_feats", 100)
    flip(full, "image_feats", 150)
    with FeatureStore.open(full) as store:
        (problem,) = store.verify()
    assert (
        problem.startswith("image_feats: 2 damaged chunks (checksum), the first at 96; ") and "`overwrite`" in problem
    )


@pytest.mark.parametrize("name", ["image_feats", "image_views", "text_tokens"])
def test_a_done_row_that_was_never_written_is_an_error(full: Path, name: str):
    """The fill value under a sound checksum, as of a chunk that a look-up doesn't find."""
    changed(full, name, int(OFFSETS[70]) if name == "text_tokens" else 70, np.nan)
    with FeatureStore.open(full) as store:
        with pytest.raises(
            CacheError, match=f"^{full}: {name} has no values for rows that are marked done.*`overwrite`"
        ):
            store.read_tokens() if name == "text_tokens" else store.read(name)
        assert store.read_token_rows(np.arange(70))[0].shape == (OFFSETS[70], 7)


@pytest.mark.slow
def test_every_flipped_byte_of_the_structure_is_noticed_or_harmless(full: Path, tmp_path: Path):
    """The chunk index has no checksum in this file format: whatever is flipped, wrong values are never returned."""
    raw = full.read_bytes()
    covered = np.zeros(len(raw), bool)
    with h5py.File(full) as file:
        for dataset in file.values():
            dataset.id.chunk_iter(lambda c: covered.__setitem__(slice(c.byte_offset, c.byte_offset + c.size), True))
    structure = np.random.default_rng(2).choice(np.flatnonzero(~covered), 150, replace=False)
    # ... and more of where the chunk indices lie, of which a look-up may miss a chunk that a listing shows.
    trees = [match.start() for match in re.finditer(b"TREE", raw)]
    in_trees = [start + k for start in trees[:3] for k in range(24, 24 + 7 * 32) if k % 7 == start % 7]
    path = tmp_path / "flipped_train.h5"
    noticed = 0
    messages = ""
    for position in [*structure, *in_trees]:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :])
        try:
            with FeatureStore.open(path) as store:
                np.testing.assert_array_equal(store.read("image_feats"), FEATS)
                np.testing.assert_array_equal(store.ids, IDS)
                np.testing.assert_array_equal(store.read_tokens()[0], TOKENS)
        except CacheError as error:
            noticed += 1
            messages += str(error)
    assert noticed and f"{path}: id has a damaged chunk index; " in messages


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no cache .*extraction script"), (b"", "can't be opened as HDF5"), (b"hello" * 999, "can't be opened")],
)
def test_what_is_no_cache_is_refused(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "x_train.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CacheError, match=message):
        FeatureStore.open(path)


def test_a_foreign_hdf5_file_is_refused(tmp_path: Path):
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(CacheError, match="cache format None, expected 2; .*`overwrite`"):
        FeatureStore.open(tmp_path / "foreign.h5")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"text_feats": (2, 4)}, "a row of text_feats has 2 dimensions, expected 1; .*`overwrite`"),
        ({"image_feats": (4,), "image_tokens": (4,)}, "a row of image_tokens has 1 dimensions, expected 2"),
        ({"image_feats": (4,), "image_views": (3, 5)}, "its views aren't as wide as its features"),
        ({"image_views": (3, 5)}, "its views aren't as wide as its features"),
    ],
)
def test_shapes_that_are_no_features(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(CacheError, match=message):
        FeatureStore.create(tmp_path / "x.h5", ["a"], [""], {"encoder": "x"}, shapes)


def test_a_truncated_file_is_refused(full: Path):
    os.truncate(full, full.stat().st_size // 2)
    with pytest.raises(CacheError, match="truncated file"):
        FeatureStore.open(full)


def test_creation_is_atomic_and_keeps_what_is_there(full: Path, monkeypatch: pytest.MonkeyPatch):
    before = full.read_bytes()
    with pytest.raises(CacheError, match="exists.*`overwrite`"):
        create(full)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create(full, overwrite=True)
    assert full.read_bytes() == before
    monkeypatch.undo()
    synced, replaced = set(), os.replace
    sync = os.fsync

    def checked(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (sync(fd), synced.add(os.fstat(fd).st_ino)))
    monkeypatch.setattr(os, "replace", checked)
    create(full, overwrite=True).close()
    assert full.read_bytes() != before
    assert [p.name for p in full.parent.iterdir() if p.suffix != ".lock"] == [full.name]


def test_two_writers_are_refused(full: Path):
    with FeatureStore.append(full):
        for attempt in (lambda: FeatureStore.append(full), lambda: create(full, overwrite=True)):
            with pytest.raises(CacheError, match="being written by another process"):
                attempt()
        reader = "import sys; from feats.inspect_feats import main; sys.exit(main(sys.argv[1:]))"
        out = subprocess.run(
            [sys.executable, "-c", reader, str(full)],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert out.returncode == 2 and "being written by another process" in out.stderr
    FeatureStore.append(full).close()


FULL_DISK = """
    import sys, resource, signal, numpy as np
    sys.path.insert(0, {tests!r})
    import test_store as t
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        t.create(t.Path(sys.argv[1]))
    except t.CacheError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", [100, 8_192, 20_000, 30_000])
def test_a_full_disk_is_one_clear_message(tmp_path: Path, limit: int):
    path = tmp_path / "big_train.h5"
    script = textwrap.dedent(FULL_DISK.format(tests=str(Path(__file__).parent)))
    out = subprocess.run(
        [sys.executable, "-c", script, str(path), str(limit)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "the disk is full; its creation was undone" in out.stdout, out
    assert not path.exists() and not list(tmp_path.glob("*.creating"))


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_a_failing_write_keeps_what_was_done(full: Path, monkeypatch: pytest.MonkeyPatch, fails: int):
    """Whichever sync of a write it is that fails."""
    rows, syncs = np.arange(BLOCK), []

    def sync(fd: int) -> None:
        syncs.append(fd)
        if len(syncs) >= fails:
            raise OSError(28, os.strerror(28))

    with FeatureStore.append(full) as store:
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(CacheError, match=f"^{full}: the disk is full; the rows done so far are intact"):
            store.write(rows, np.full(BLOCK, DONE), arrays(rows, -1))
        with pytest.raises(CacheError, match=f"^{full}: the disk is full; the rows done so far are intact"):
            store.finish()
    with FeatureStore.open(full) as store:
        assert set(np.flatnonzero(store.status == DONE)) >= set(range(2 * BLOCK, N))
        done_rows_are_whole(store)


MILLION = """
    import resource, sys, numpy as np
    from feats.cache_reader import DONE
    from feats.store import FeatureStore
    n = int(sys.argv[2])
    with FeatureStore.create(sys.argv[1], [str(i) for i in range(n)], ["a"] * n, {}, {"image_feats": (256,)}, block_rows=4096) as s:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for low in range(0, n, 4096):
            rows = np.arange(low, min(low + 4096, n))
            s.write(rows, np.full(len(rows), DONE), {"image_feats": np.full((len(rows), 256), low % 999, np.float16)})
        s.finish()
        for low in range(0, n, 65536):
            block = s.read("image_feats", s.ids[low:low + 65536])
            assert (block[0] == low % 999).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_rows(tmp_path: Path):
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MILLION), str(tmp_path / "m_train.h5"), "1000000"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert out.returncode == 0, out.stderr
    assert (
        int(out.stdout) < 64 * 1024
    )  # KiB; the features are 488 MiB, what is held are an index of the ids and a few blocks


def test_writing_a_block_takes_nothing_of_all_rows(tmp_path: Path):
    n, block = 300_000, 512
    ids = Strings(np.arange(n).astype("S6"))
    with FeatureStore.create(tmp_path / "x_train.h5", ids, Labels.of([""] * n), {}, {"text_feats": (1,)}) as store:
        rows = np.arange(block)
        arrays = {"text_feats": np.ones((block, 1), np.float16)}
        store.write(rows, np.full(block, DONE, np.uint8), arrays)
        tracemalloc.start()
        store.write(rows + block, np.full(block, DONE, np.uint8), arrays)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < n / 2


def test_fingerprints_differ_only_where_it_matters():
    cached = {"model": "a", "dtype": "bf16", "versions": {"torch": "1"}}
    assert fingerprint_difference(cached, {**cached, "versions": {"torch": "2"}}) == ""
    assert fingerprint_difference(cached, {**cached, "model": "b"}) == 'model: the cache has "a", this run "b"'
    assert "extra: the cache has null, this run 1" in fingerprint_difference(cached, {**cached, "extra": 1})


def test_the_digest_of_the_content_tells_rows_pictures_and_texts_apart(tmp_path: Path):
    def digest(name: str, ids: list[str], tags: list[str], picture: int = 1, text: int = 2, value: float = 0) -> str:
        shapes = {"image_feats": (2,), "text_feats": (2,)}
        values = {side: np.full((2, 2), value, np.float16) for side in shapes}
        hashes = {"image_hash": np.array([7, picture], np.uint64), "text_hash": np.array([7, text], np.uint64)}
        with FeatureStore.create(tmp_path / f"{name}_train.h5", ids, tags, {"made by": name}, shapes) as store:
            store.write(np.arange(2), np.full(2, DONE), {**values, **hashes})
        with FeatureStore.open(tmp_path / f"{name}_train.h5") as store:
            return store.content_digest()

    same = {digest("a", ["x", "y"], ["", ""]), digest("b", ["x", "y"], ["q", ""], value=1)}
    others = {digest("c", ["x", "z"], ["", ""]), digest("d", ["y", "x"], ["", ""])}
    others |= {digest("e", ["x", "y"], ["", ""], picture=3), digest("f", ["x", "y"], ["", ""], text=3)}
    assert len(same) == 1 and len(others) == 4 and not same & others


def test_chunks_stay_small_whatever_the_number_of_rows(tmp_path: Path):
    """A set smaller than a block, of wide rows: reading one row must not read them all."""
    for rows in (511, 512, 513):
        path = tmp_path / f"wide{rows}_train.h5"
        FeatureStore.create(path, [str(i) for i in range(rows)], [""] * rows, {}, {"image_tokens": (49, 2048)}).close()
        with h5py.File(path) as file:
            assert np.prod(file["image_tokens"].chunks) * 2 <= 1 << 20


def test_an_edited_quarantine_report_harms_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    with create(tmp_path / "q_train.h5") as store:
        fill(store, bad=(3, 40))
    (tmp_path / "q_train.quarantine.csv").write_bytes(b"ID;why\n\xff\xfe\n")
    assert inspect_feats.main([str(tmp_path / "q_train.h5")]) == 0
    out = capsys.readouterr().out
    assert f"{IDS[3]}: (reason not recorded)" in out and f"{IDS[40]}: (reason not recorded)" in out
