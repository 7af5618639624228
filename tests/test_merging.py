"""Parts joined into one cache: the bytes of a plain extraction, whatever happens on the way."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, one_line
from parted import ROWS, SETTINGS, both_sides, make_parts, pairs_with_faults

from feats import merge_feats
from feats.cache_reader import CacheError
from feats.encoders.registry import load_encoder
from feats.extraction import merging
from feats.extraction.agreement import join_lease
from feats.extraction.leases import leased
from feats.extraction.local import extract
from feats.extraction.merging import merge
from feats.extraction.settings import ExtractionSettings
from feats.parts import open_cache, part_path, parts_folder
from feats.quarantine import quarantine_path
from feats.records import Pairs, read_dataset
from feats.store import FeatureStore


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return pairs_with_faults(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def plain(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process makes of them."""
    path = tmp_path_factory.mktemp("plain") / "both_train.h5"
    extract(both_sides(), pairs, path, SETTINGS)
    return path


@pytest.fixture(scope="module")
def parts(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five parts of them, none of whole blocks only."""
    path = tmp_path_factory.mktemp("parts") / "both_train.h5"
    make_parts(both_sides(), pairs, path, [21, 1, 9, 30, 9])
    return parts_folder(path)


@pytest.fixture
def parted(parts: Path, tmp_path: Path) -> Path:
    """The path of a cache to be joined."""
    path = tmp_path / "both_train.h5"
    shutil.copytree(parts, parts_folder(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_joined(path: Path, plain: Path) -> None:
    """The very bytes, the reasons too, and nothing left beside them."""
    assert sha256(path) == sha256(plain)
    assert quarantine_path(path).read_bytes() == quarantine_path(plain).read_bytes()
    left = {entry.name for entry in path.parent.iterdir()} - {path.name, quarantine_path(path).name}
    assert not {name for name in left if not name.endswith(".lock")}, left


# -- the same bytes ----------------------------------------------------------------------------------------------


def test_joined_is_the_plain_cache(parted: Path, plain: Path):
    told: list[tuple[int, int]] = []
    summary = merge(parted, progress=lambda done, total: told.append((done, total)))
    assert_joined(parted, plain)
    assert (summary.path, summary.done, summary.quarantined, summary.encoded) == (parted, 67, 3, 0)
    with FeatureStore.open(plain) as store:
        assert summary.truncated == int(store.facts("truncated").sum()) > 0
    assert told[-1] == (ROWS, ROWS)


@pytest.mark.parametrize("sizes", [[16, 48, 6], [32, 32, 6], [64, 6], [70]])
def test_parts_of_whole_blocks_have_the_plain_cache_s_features(pairs: Pairs, tmp_path: Path, sizes: list[int]):
    """Of an encoder whose values depend on the batch, too."""
    encoder = both_sides(by_batch=True)
    extract(encoder, pairs, tmp_path / "plain" / "both_train.h5", SETTINGS)
    make_parts(encoder, pairs, tmp_path / "both_train.h5", sizes)
    merge(tmp_path / "both_train.parts")
    assert sha256(tmp_path / "both_train.h5") == sha256(tmp_path / "plain" / "both_train.h5")


@pytest.mark.parametrize("name", ["vader", "pixels"])
def test_an_encoder_of_one_side(pairs: Pairs, tmp_path: Path, name: str):
    settings = ExtractionSettings(workers=0, batch_size=4)
    encoder = load_encoder(name)
    extract(encoder, pairs[:40], tmp_path / "plain" / "x_train.h5", settings)
    make_parts(encoder, pairs[:40], tmp_path / "x_train.h5", [32, 8], settings)
    merge(tmp_path / "x_train.h5")
    assert sha256(tmp_path / "x_train.h5") == sha256(tmp_path / "plain" / "x_train.h5")


def test_several_blocks_at_a_time_or_one(parted: Path, plain: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging, "COPY_BYTES", 1)
    told: list[int] = []
    merge(parted, progress=lambda done, total: told.append(done))
    assert told == [16, 32, 48, 64, 70]
    assert_joined(parted, plain)


# -- interrupted ---------------------------------------------------------------------------------------------------

JOINER = """
import sys
from pathlib import Path
from feats.extraction import merging

merging.COPY_BYTES = 1

def progress(done, total):
    print(done, flush=True)
    if len(sys.argv) > 2 and done >= int(sys.argv[2]):
        input()  # until the test kills us

merging.merge(Path(sys.argv[1]), progress=progress)
"""


def joiner(path: Path, *until: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(JOINER), str(path), *until]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("until", ["16", "48"])
def test_a_killed_joining_is_gone_on_with(parted: Path, plain: Path, until: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging, "COPY_BYTES", 1)
    process = joiner(parted, until)
    wait_for(process, until)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    with FeatureStore.open(parted) as store:
        assert not store.complete and (store.status != 0).sum() == int(until)
    with open_cache(parted) as store:
        assert len(store) == ROWS and store.complete  # the parts
    told: list[tuple[int, int]] = []
    merge(parted, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (ROWS - int(until), ROWS - int(until))
    assert_joined(parted, plain)


@pytest.mark.slow
def test_kills_at_any_moment(parts: Path, plain: Path, tmp_path: Path):
    for number in range(6):
        path = tmp_path / str(number) / "both_train.h5"
        shutil.copytree(parts, parts_folder(path))
        for blocks in (0, 1, 2, 5):
            process = joiner(path)
            assert process.stdout is not None
            for _ in range(blocks):
                process.stdout.readline()
            time.sleep(0.001 * number)
            process.kill()
            process.communicate()
        merge(path)
        assert_joined(path, plain)


def test_a_joining_that_died_before_it_removed_the_parts(parted: Path, plain: Path):
    merge(parted, keep_parts=True)
    assert parts_folder(parted).is_dir() and sha256(parted) == sha256(plain)
    told: list[int] = []
    merge(parted, progress=lambda done, total: told.append(done))
    assert told == []
    assert_joined(parted, plain)
    assert merge(parted).done == 67  # nothing is left to do


def test_what_a_killed_removal_left_goes_with_the_next(parted: Path, plain: Path):
    old = parted.with_name(f".{parts_folder(parted).name}.removed-1") / parts_folder(parted).name
    old.mkdir(parents=True)
    merge(parted)
    assert_joined(parted, plain)


def test_a_removal_that_was_killed_is_ended_by_the_next(parted: Path, plain: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging.shutil, "rmtree", lambda *args, **options: None)
    merge(parted)
    monkeypatch.undo()
    assert list(parted.parent.glob(".*.removed-*")) and not parts_folder(parted).exists()
    assert merge(parted).done == 67
    assert_joined(parted, plain)


def test_two_joiners(parted: Path, plain: Path):
    """The second says that the first is at it, or finds it done."""
    process = joiner(parted, "32")
    wait_for(process, "32")
    with pytest.raises(CacheError) as error:
        merge(parted)
    assert one_line(error) == f"{parted} is being joined by another process; wait for it to end"
    with leased(join_lease(parted)), pytest.raises(CacheError) as error:
        merge(parted)
    assert f"is being joined by process {os.getpid()}, the last worker; wait for it to end" in one_line(error)
    out, err = process.communicate("\n\n\n\n")
    assert process.returncode == 0, err
    assert merge(parted).done == 67
    assert_joined(parted, plain)


def test_parts_that_go_while_they_are_looked_at(parted: Path, plain: Path, monkeypatch: pytest.MonkeyPatch):
    """Another has joined them meanwhile."""
    look = merging._joined

    def late(parts, path, overwrite):
        monkeypatch.setattr(merging, "_joined", look)
        merge(path)
        return look(parts, path, overwrite)

    monkeypatch.setattr(merging, "_joined", late)
    assert merge(parted).done == 67
    assert_joined(parted, plain)


# -- what can't be joined ------------------------------------------------------------------------------------------


def test_missing_parts(parted: Path):
    part_path(parts_folder(parted), 3).unlink()
    with pytest.raises(CacheError) as error:
        merge(parted)
    assert "1 of 5 parts are still to be made" in one_line(error) and not parted.exists()
    shutil.rmtree(parts_folder(parted))
    with pytest.raises(CacheError, match="no cache .*both_train.h5, nor parts of it"):
        merge(parted)


def test_a_cache_of_something_else_is_kept(pairs: Pairs, parted: Path, plain: Path):
    extract(load_encoder("vader"), pairs, parted, ExtractionSettings(workers=0))
    before = sha256(parted)
    with pytest.raises(CacheError) as error:
        merge(parted)
    assert 'encoder: the cache has "vader", this run "both"' in one_line(error) and "`overwrite`" in one_line(error)
    assert sha256(parted) == before and parts_folder(parted).is_dir()
    merge(parted, overwrite=True)
    assert_joined(parted, plain)


def test_a_cache_of_other_pictures_is_kept(pairs: Pairs, parted: Path, tmp_path: Path, plain: Path):
    """The same ids, repaired since, or changed."""
    shutil.copytree(pairs.data, tmp_path / "set")
    shutil.copy(tmp_path / "set" / "data" / "8.jpg", tmp_path / "set" / "data" / "9.jpg")
    extract(both_sides(), read_dataset(tmp_path / "set")["train"], parted, SETTINGS)
    with pytest.raises(CacheError, match="rows differ in image_hash"):
        merge(parted)
    shutil.copy(tmp_path / "set" / "data" / "8.jpg", tmp_path / "set" / "data" / "41.jpg")
    extract(both_sides(), read_dataset(tmp_path / "set")["train"], parted, SETTINGS, overwrite=True)
    with pytest.raises(CacheError, match="other rows are in quarantine"):
        merge(parted)
    shutil.rmtree(tmp_path / "set")
    merge(parted, overwrite=True)
    assert_joined(parted, plain)


def test_a_damaged_cache_is_only_overwritten_on_demand(parted: Path, plain: Path):
    parted.write_bytes(b"nothing")
    with pytest.raises(CacheError, match="can't be opened as HDF5"):
        merge(parted)
    merge(parted, overwrite=True)
    assert_joined(parted, plain)


# -- the command ---------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "feats" / "merge_feats.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def test_all_parts_in_saved_feats(parts: Path, plain: Path, tmp_path: Path):
    folder = tmp_path / "saved" / "feats"
    for name in ("both_train", "other_train"):
        shutil.copytree(parts, folder / f"{name}.parts")
    out = run(tmp_path)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("both_train: 67 rows done, 3 quarantined, joined in ")
    assert lines[-1].endswith("-> saved/feats/other_train.h5") and out.stderr == "", "no bar in a pipe"
    assert sha256(folder / "both_train.h5") == sha256(folder / "other_train.h5") == sha256(plain)
    again = run(tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: there are no parts of caches in saved/feats")


def test_the_command_s_options(parted: Path, plain: Path, capsys: pytest.CaptureFixture[str]):
    parted.write_bytes(plain.read_bytes()[:-100])
    folder = str(parts_folder(parted))
    assert merge_feats.main([folder]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert merge_feats.main([folder, str(parted), "--keep-parts", "--overwrite"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 and sha256(parted) == sha256(plain)
    assert parts_folder(parted).is_dir()
    assert merge_feats.main([folder]) == 0
    assert_joined(parted, plain)
    assert ", joined in " in capsys.readouterr().out
    assert merge_feats.main([folder]) == 0
    assert capsys.readouterr().out == f"both_train: 67 rows done, 3 quarantined, joined before -> {parted}\n"


def test_joining_needs_neither_torch_nor_an_encoder(parted: Path):
    code = "import sys; from feats import merge_feats; merge_feats.main([sys.argv[1]]); print({'torch', 'feats.records'} & {*sys.modules})"
    command = [sys.executable, "-c", code, str(parted)]
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=os.path.dirname(parted))
    assert out.stdout.splitlines()[-1] == "set()", out.stderr
