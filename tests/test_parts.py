"""Caches made by parts: leases, the plan that all share, parts, workers that come and die; the bytes of one process."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, make_course, one_line
from test_extraction import both_sides

from feats import parts
from feats.cache_reader import QUARANTINED
from feats.encoders.base import Encoder
from feats.errors import UsageError
from feats.extraction import agreement, leases, shared
from feats.extraction.agreement import agree, sweep
from feats.extraction.leases import Owner, folder_time, leased
from feats.extraction.local import extract
from feats.extraction.plan import as_begun
from feats.extraction.settings import ExtractionSettings
from feats.extraction.shared import Worker, make_part, make_plan_of_parts, row_pieces, work
from feats.parts import part_path, parts_folder, plan_path, read_plan
from feats.pieces import RowPieces
from feats.quarantine import quarantine_path
from feats.records import Pairs, read_dataset
from feats.store import FeatureStore

ALONE = ExtractionSettings(workers=0, batch_size=2)  # blocks of 16 rows
ROWS = 70


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return read_dataset(make_course(tmp_path / "set", ROWS))["train"]


def plain(encoder: Encoder, pairs: Pairs, path: Path, settings: ExtractionSettings = ALONE) -> str:
    """The digest of the cache that one process makes."""
    path.parent.mkdir(exist_ok=True)
    extract(encoder, pairs, path, settings)
    return sha256(path)


def agreed(encoder: Encoder, pairs: Pairs, path: Path, settings: ExtractionSettings = ALONE, rows: int = 16):
    """Pieces of so many rows, and the plan by which their parts are made."""
    pieces = RowPieces(pairs, rows)
    plan = agree(path, make_plan_of_parts(encoder, pieces, settings)[0])
    assert plan is not None
    return pieces, plan


def ended_process() -> Owner:
    """A process of this machine that is no more, and that was waited for."""
    code = "from feats.extraction.leases import Owner; import dataclasses, json; print(json.dumps(dataclasses.asdict(Owner.here())))"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return Owner(**json.loads(out.stdout))


def held_by(path: Path, owner: Owner, age: float = 0.0) -> Path:
    """A lease of another process, touched so many seconds ago."""
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)
    return path


STRANGER = Owner("elsewhere", 1, "1", "a" * 16)


# -- leases ------------------------------------------------------------------------------------------------------


def test_a_lease_is_held_by_one_and_given_back(tmp_path: Path):
    lease = tmp_path / "x.lease"
    with leased(lease) as mine:
        assert mine
        with leased(lease) as other:
            assert not other
        assert lease.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_lease_is_given_back_by_whatever_ends_the_work(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), leased(tmp_path / "x.lease") as mine:
        assert mine
        raise error
    assert not list(tmp_path.iterdir())


def test_of_many_who_want_a_stale_lease_one_gets_it(tmp_path: Path):
    lease = held_by(tmp_path / "x.lease", STRANGER, age=100)
    got, start, done = [], threading.Barrier(8), threading.Barrier(8)

    def want() -> None:
        start.wait()
        with leased(lease, 60) as mine:
            got.append(mine)
            done.wait()

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert not list(tmp_path.iterdir())


def test_who_found_a_lease_stale_looks_again_before_taking_it_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The look that comes too late: another took the lease over just after it."""
    lease = held_by(tmp_path / "x.lease", STRANGER, age=100)
    look, looks, other = leases._is_stale, [], Owner.here()

    def look_and_be_late(path: Path, seconds: float) -> bool:
        looks.append(look(path, seconds))
        if len(looks) == 1:
            held_by(lease, other)
        return looks[-1]

    monkeypatch.setattr(leases, "_is_stale", look_and_be_late)
    with leased(lease, 60) as mine:
        assert not mine
    assert looks == [True, False]
    assert json.loads(lease.read_text()) == asdict(other) and list(tmp_path.iterdir()) == [lease]


def test_a_guard_that_was_left_delays_a_take_over_only(tmp_path: Path):
    lease = held_by(tmp_path / "x.lease", STRANGER, age=100)
    guard = held_by(tmp_path / ".x.lease.guard", STRANGER, age=30)
    with leased(lease, 60) as mine:
        assert not mine
    assert guard.exists()
    held_by(guard, STRANGER, age=90)
    with leased(lease, 60) as mine:
        assert not mine
    with leased(lease, 60) as mine:
        assert mine
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("age", "taken"), [(30, False), (90, True)])
def test_a_lease_of_another_machine_is_taken_over_by_its_age(tmp_path: Path, age: float, taken: bool):
    with leased(held_by(tmp_path / "x.lease", STRANGER, age), 60) as mine:
        assert mine == taken
    assert (tmp_path / "x.lease").exists() != taken


def test_ages_are_of_the_file_system_s_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lease = held_by(tmp_path / "x.lease", STRANGER, age=90)
    monkeypatch.setattr(leases, "folder_time", lambda folder: lease.stat().st_mtime + 1)
    with leased(lease, 60) as mine:
        assert not mine
    monkeypatch.setattr(leases, "folder_time", lambda folder: lease.stat().st_mtime + 61)
    with leased(lease, 60) as mine:
        assert mine


def test_a_folder_s_time_is_that_of_its_files(tmp_path: Path):
    before = folder_time(tmp_path)
    (tmp_path / "x").touch()
    assert before <= (tmp_path / "x").stat().st_mtime <= folder_time(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_dead_process_s_lease_is_free_at_once(tmp_path: Path):
    with leased(held_by(tmp_path / "x.lease", ended_process()), 60) as mine:
        assert mine


def test_a_killed_process_that_nobody_waited_for_is_dead(tmp_path: Path):
    """Whoever started it may be busy: it stays in the list of processes."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(Owner.here(), pid=process.pid, started=leases._started(process.pid))
    assert not owner.dead
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays as it is
    assert owner.dead
    process.communicate()


@pytest.mark.skipif(not leases.PROCESSES.joinpath("self", "stat").exists(), reason="the system doesn't tell")
def test_a_process_of_the_same_number_isn_t_the_holder(tmp_path: Path):
    here = Owner.here()
    assert not here.dead and replace(here, started=str(int(here.started) - 1)).dead
    with leased(held_by(tmp_path / "x.lease", replace(here, started="1")), 60) as mine:
        assert mine
    with leased(held_by(tmp_path / "x.lease", replace(here, token="b" * 16)), 60) as mine:
        assert not mine


def test_an_unfinished_lease_is_taken_over_by_its_age_only(tmp_path: Path):
    lease = tmp_path / "x.lease"
    lease.touch()
    with leased(lease, 60) as mine:
        assert not mine
    os.utime(lease, (time.time() - 61,) * 2)
    with leased(lease, 60) as mine:
        assert mine


def test_a_lease_is_kept_fresh(tmp_path: Path):
    lease = tmp_path / "x.lease"
    with leased(lease, 0.2) as mine:
        assert mine
        os.utime(lease, (0, 0))
        deadline = time.monotonic() + 30
        while lease.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lease.stat().st_mtime > 0


def test_a_lease_that_was_taken_over_is_left_alone(tmp_path: Path):
    lease = tmp_path / "x.lease"
    with leased(lease, 60) as mine:
        assert mine
        held_by(lease, STRANGER)
    assert json.loads(lease.read_text())["token"] == STRANGER.token


def test_owners_are_told_from_names():
    here = Owner.here()
    assert Owner.from_name(here.name) == here
    assert Owner.from_name("part-00000001") is None and Owner.from_name("a-b-c-d") is None


def test_unfinished_files_of_the_dead_are_swept_up(tmp_path: Path):
    dead, alive = ended_process(), Owner.here()
    old = replace(STRANGER, token="c" * 16)
    for owner in (dead, alive, STRANGER, old):
        (tmp_path / f".part-00000001.{owner.name}.h5").touch()
    (tmp_path / f".part-00000002.{dead.name}.h5.creating").touch()
    (tmp_path / f".x.lease.{dead.name}").touch()
    held_by(tmp_path / ".y.lease.guard", dead)
    os.utime(tmp_path / f".part-00000001.{old.name}.h5", (time.time() - 61,) * 2)
    (tmp_path / "part-00000001.h5").touch()
    (tmp_path / ".unknown").touch()
    sweep(tmp_path, 60)
    left = {".unknown", "part-00000001.h5", *(f".part-00000001.{owner.name}.h5" for owner in (alive, STRANGER))}
    assert {path.name for path in tmp_path.iterdir()} == left


# -- who a worker is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, Worker(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, Worker(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Worker(2, 4, 0)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, Worker(4, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            Worker(5, 8),
        ),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}, Worker(1, 3)),
    ],
)
def test_the_environment_tells_who_a_worker_is(environment: dict[str, str], worker: Worker):
    assert Worker.here(environment) == worker


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}])
def test_an_environment_that_can_t_be(environment: dict[str, str]):
    with pytest.raises(UsageError, match="the environment"):
        Worker.here(environment)


# -- one plan for all --------------------------------------------------------------------------------------------


def test_whoever_comes_first_writes_the_plan(tmp_path: Path, pairs: Pairs):
    path = tmp_path / "x_train.h5"
    encoder = both_sides()
    wanted, _ = make_plan_of_parts(encoder, RowPieces(pairs, 16), ALONE)
    plans, start = [], threading.Barrier(6)

    def come() -> None:
        start.wait()
        plans.append(agree(path, wanted))

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 6 and all(plan == read_plan(parts_folder(path)) for plan in plans)
    assert [p.name for p in parts_folder(path).iterdir()] == ["plan.json"]
    assert wanted.kept == {"batch_size": 2, "compiled": False, "block_rows": 16}
    assert "data" not in wanted.fingerprint and wanted.fingerprint["encoder"] == "both"
    assert [piece["rows"] for piece in wanted.pieces] == [16, 16, 16, 16, 6]


def test_a_plan_that_comes_while_it_is_looked_for(tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x_train.h5"
    _, plan = agreed(both_sides(), pairs, path)
    place = plan_path(parts_folder(path))
    hidden = place.rename(tmp_path / "plan.json")

    def look(at: Path) -> None:
        hidden.rename(at)
        raise FileNotFoundError(2, "No such file or directory", str(at))

    with monkeypatch.context() as patch:
        patch.setattr("feats.json_files.check_regular", look)
        assert read_plan(parts_folder(path)) is None
    assert read_plan(parts_folder(path)) == plan


def test_without_links_the_plan_is_written_all_the_same(tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    def no_links(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    _, plan = agreed(both_sides(), pairs, tmp_path / "x_train.h5")
    assert agreed(both_sides(), pairs, tmp_path / "x_train.h5")[1] == plan
    assert [p.name for p in (tmp_path / "x_train.parts").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda pairs: (both_sides(tokens=False), RowPieces(pairs, 16), ALONE),
            "tokens: its plan has true, this run f",
        ),
        (lambda pairs: (both_sides(), RowPieces(pairs, 32), ALONE), "pieces: its plan has 5, this run 3"),
        (lambda pairs: (both_sides(), RowPieces(pairs[:66], 16), ALONE), "piece 4: its plan has .*6.*this run .*2"),
        (
            lambda pairs: (both_sides(), RowPieces(pairs[-1:] + pairs[1:], 16), ALONE),
            "piece 0: its plan has .*ids_sha256.*this run .*ids_sha256",
        ),
        (
            lambda pairs: (both_sides(), RowPieces(pairs, 16), replace(ALONE, batch_size=1)),
            "batch_size: its plan has 2, this run 1",
        ),
    ],
)
def test_another_plan_is_refused_with_both_sides(
    tmp_path: Path, pairs: Pairs, change: Callable[[Pairs], tuple], told: str
):
    path = tmp_path / "x_train.h5"
    agreed(both_sides(), pairs, path)
    encoder, pieces, settings = change(pairs)
    pieces = RowPieces(Pairs(pieces.pairs, pairs.data, pairs.layout, pairs.split), pieces.rows)
    with pytest.raises(UsageError, match=told) as refused:
        work(encoder, pieces, path, settings)
    assert "choose another `name`, or replace them with `overwrite`" in one_line(refused)


def test_a_joiner_that_hasnt_let_the_cache_go_yet_is_waited_for(tmp_path: Path, pairs: Pairs):
    """It has said that all is there, and still has the file open; or it was killed, and a thread of it isn't gone."""
    path = tmp_path / "x_train.h5"
    agreed(both_sides(), pairs, path)
    work(both_sides(), RowPieces(pairs, 16), path, ALONE)
    code = (
        "import sys, time; from feats.store import FeatureStore as S; s = S.append(sys.argv[1]); print(); time.sleep(1)"
    )
    command = [sys.executable, "-uc", code, str(path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as joiner:
        assert joiner.stdout is not None and joiner.stdout.readline()
        assert work(both_sides(), RowPieces(pairs, 16), path, ALONE).done == ROWS
        assert joiner.poll() is not None
    with FeatureStore.append(path), pytest.raises(UsageError, match="being written by another process"):
        work(both_sides(), RowPieces(pairs, 16), path, ALONE, lease_seconds=0.2)


def test_parts_without_a_plan_are_refused(tmp_path: Path, pairs: Pairs):
    path = tmp_path / "x_train.h5"
    pieces, plan = agreed(both_sides(), pairs, path)
    make_part(both_sides(), pieces, 0, parts_folder(path), plan, ALONE)
    plan_path(parts_folder(path)).unlink()
    with pytest.raises(UsageError, match="holds parts, but no plan.json"):
        agree(path, plan)
    assert agree(path, plan, overwrite=True) == plan
    assert [p.name for p in parts_folder(path).iterdir()] == ["plan.json"]


def test_parts_of_another_plan_are_replaced_once(tmp_path: Path, pairs: Pairs):
    """Two who overwrite: the second, who began before the first had made a part, goes on with its parts."""
    path = tmp_path / "x_train.h5"
    pieces, old = agreed(both_sides(tokens=False), pairs, path)
    make_part(both_sides(tokens=False), pieces, 0, parts_folder(path), old, ALONE)
    os.utime(plan_path(parts_folder(path)), (time.time() - 5,) * 2)
    since = folder_time(tmp_path) - 1
    wanted, _ = make_plan_of_parts(both_sides(), pieces, ALONE)
    plan = agree(path, wanted, overwrite=True, since=since)
    assert plan is not None and plan.features != old.features
    assert not part_path(parts_folder(path), 0).exists()
    make_part(both_sides(), pieces, 1, parts_folder(path), plan, ALONE)
    assert agree(path, wanted, overwrite=True, since=since) == plan
    assert part_path(parts_folder(path), 1).exists()
    with pytest.raises(UsageError, match="tokens: its plan has true, this run false"):  # not what was just made
        agree(path, make_plan_of_parts(both_sides(tokens=False), pieces, ALONE)[0], overwrite=True, since=since)


def test_a_plan_isn_t_written_beside_a_finished_cache(tmp_path: Path, pairs: Pairs):
    """Who was slow to start finds neither plan nor parts: others have joined and removed them."""
    path = tmp_path / "x_train.h5"
    wanted, _ = make_plan_of_parts(both_sides(), RowPieces(pairs, 16), ALONE)
    since = folder_time(tmp_path) - 1
    plain(both_sides(), pairs, path)
    for overwrite in (False, True):
        assert agree(path, wanted, overwrite=overwrite, since=since) is None
        assert not parts_folder(path).exists()


@pytest.mark.parametrize(
    ("world", "asked", "rows"), [(1, None, 256), (4, None, 16), (1, 1, 16), (1, 17, 32), (1, 64, 64), (2, 1000, 1008)]
)
def test_pieces_are_whole_blocks(tmp_path: Path, pairs: Pairs, world: int, asked: int | None, rows: int):
    pieces = row_pieces(both_sides(), pairs, tmp_path / "x_train.h5", ALONE, world=world, piece_rows=asked)
    assert pieces.rows == rows and sum(len(pieces.read(i)) for i in range(len(pieces))) == ROWS


def test_pieces_are_few_of_many_rows(tmp_path: Path, pairs: Pairs):
    many = Pairs(list(pairs) * 30, pairs.data, pairs.layout, pairs.split)
    assert row_pieces(both_sides(), many, tmp_path / "x_train.h5", ALONE, world=2).rows == 30 * ROWS // 8 // 16 * 16
    assert row_pieces(both_sides(), many, tmp_path / "x_train.h5", ALONE).rows == 30 * ROWS // 4 // 16 * 16


def test_pieces_are_cut_as_the_plan_has_it_however_many_come(tmp_path: Path, pairs: Pairs):
    path = tmp_path / "x_train.h5"
    agreed(both_sides(), pairs, path, rows=48)
    for world in (1, 8):
        assert row_pieces(both_sides(), pairs, path, ALONE, world=world).rows == 48
        assert row_pieces(both_sides(), pairs, path, ALONE, world=world, overwrite=True).rows == 48
    other = row_pieces(both_sides(tokens=False), pairs, path, ALONE, overwrite=True)
    assert other.rows == 256  # what will be replaced decides nothing


# -- parts -------------------------------------------------------------------------------------------------------


def test_a_part_is_the_cache_of_its_piece(tmp_path: Path, pairs: Pairs):
    """Byte for byte what a plain extraction of these rows makes."""
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    (tmp_path / "set" / "data" / "20.jpg").write_bytes(b"no picture")
    pieces, plan = agreed(both_sides(), pairs, path)
    told = []
    counts = make_part(both_sides(), pieces, 1, folder, plan, ALONE, lambda *now: told.append(now))
    assert counts == (15, 1, 0) and told[-1] == (16, 16)
    assert make_part(both_sides(), pieces, 1, folder, plan, ALONE) is None
    part = part_path(folder, 1)
    assert sha256(part) == plain(both_sides(), pairs[16:32], tmp_path / "alone" / "x.h5")
    assert quarantine_path(part).read_bytes() == (tmp_path / "alone" / "x.quarantine.csv").read_bytes()
    assert {p.name for p in folder.iterdir()} == {"plan.json", part.name, quarantine_path(part).name}


def test_a_part_that_fails_leaves_nothing(tmp_path: Path, pairs: Pairs):
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    encoder = both_sides()
    pieces, plan = agreed(encoder, pairs, path)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_part(encoder, pieces, 0, folder, plan, ALONE, interrupted)
    assert [p.name for p in folder.iterdir()] == ["plan.json"]


def test_a_part_of_a_replaced_plan_isn_t_published(tmp_path: Path, pairs: Pairs):
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    pieces, plan = agreed(both_sides(tokens=False), pairs, path)
    other = make_plan_of_parts(both_sides(), pieces, ALONE)[0]

    def replaced(done: int, total: int) -> None:
        plan_path(folder).write_text(other.text)

    with pytest.raises(UsageError, match="was taken over by an extraction with other settings"):
        make_part(both_sides(tokens=False), pieces, 0, folder, plan, ALONE, replaced)
    assert [p.name for p in folder.iterdir()] == ["plan.json"]


def test_no_part_takes_as_long_as_all_pieces_of_the_plan(tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    """A plan of 10^5 pieces takes a second and a half to write and to understand: too long for each of as many parts."""
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    pieces, plan = agreed(both_sides(), pairs, path)
    make_part(both_sides(), pieces, 0, folder, plan, ALONE)
    monkeypatch.setattr(parts.PartsPlan, "from_json", lambda text: pytest.fail("it was read in full"))
    monkeypatch.setattr(parts, "asdict", lambda plan: pytest.fail("it was written in full"))
    make_part(both_sides(), pieces, 1, folder, plan, ALONE)
    assert part_path(folder, 1).exists()


def test_a_plan_of_other_spelling_is_the_same(tmp_path: Path, pairs: Pairs):
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    pieces, plan = agreed(both_sides(), pairs, path)
    plan_path(folder).write_text(json.dumps(json.loads(plan.text), sort_keys=True))
    assert make_part(both_sides(), pieces, 0, folder, plan, ALONE) is not None


def test_two_who_make_the_same_part_leave_the_same(tmp_path: Path, pairs: Pairs):
    path, folder = tmp_path / "x_train.h5", tmp_path / "x_train.parts"
    pieces, plan = agreed(both_sides(), pairs, path)
    nested = []

    def again(done: int, total: int) -> None:
        if not nested:
            nested.append(make_part(both_sides(), pieces, 0, folder, plan, ALONE))
            nested.append(sha256(part_path(folder, 0)))

    assert make_part(both_sides(), pieces, 0, folder, plan, ALONE, again) == nested[0]
    assert sha256(part_path(folder, 0)) == nested[1]


def test_a_compiled_plan_needs_a_compiled_encoder(monkeypatch: pytest.MonkeyPatch):
    from feats.extraction import plan as plans

    encoder = both_sides()
    assert as_begun(encoder, {"compiled": False, "batch_size": 2}) is encoder
    monkeypatch.setattr(plans, "compiled", lambda forward, example: (None, "no compiler"))
    with pytest.raises(UsageError, match="no compiler"):
        as_begun(encoder, {"compiled": True, "batch_size": 2})


# -- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("rows", "views"), [(16, 0), (48, 2), (80, 0)])
def test_the_joined_cache_is_that_of_one_process(tmp_path: Path, pairs: Pairs, tokens: bool, rows: int, views: int):
    settings = replace(ALONE, views=views)
    for number in (3, 40, 41):
        (tmp_path / "set" / "data" / f"{number}.jpg").write_bytes(b"no picture")
    expected = plain(both_sides(tokens), pairs, tmp_path / "plain" / "x_train.h5", settings)
    path = tmp_path / "x_train.h5"
    share = work(both_sides(tokens), RowPieces(pairs, rows), path, settings)
    assert sha256(path) == expected
    assert quarantine_path(path).read_bytes() == (tmp_path / "plain" / "x_train.quarantine.csv").read_bytes()
    assert (share.done, share.quarantined, share.encoded, share.whole) == (ROWS - 3, 3, ROWS - 3, True)
    assert f"x_train: {ROWS - 3} rows done; 3 quarantined; text encodings " in str(share)
    assert share.parts == share.of == -(-ROWS // rows)
    assert not parts_folder(path).exists()


def test_workers_begin_at_their_share_and_go_round(tmp_path: Path, pairs: Pairs):
    pieces, made = RowPieces(pairs, 16), []

    def told(done: int, total: int) -> None:
        made.append([int(p.stem[-8:]) for p in (tmp_path / "x_train.parts").glob("part-*.h5")])

    share = work(both_sides(), pieces, tmp_path / "x_train.h5", ALONE, Worker(1, 2), join=False, progress=told)
    order = sorted(range(5), key=lambda k: next(i for i, there in enumerate(made) if k in there))
    assert order == [2, 3, 4, 0, 1]
    assert (share.parts, share.encoded, share.whole) == (5, ROWS, False)
    assert str(share).startswith("x_train: worker 1 of 2 made 5 of 5 parts, 70 rows, in ")
    assert read_plan(tmp_path / "x_train.parts") is not None and not (tmp_path / "x_train.h5").exists()


def test_progress_counts_the_rows_of_all(tmp_path: Path, pairs: Pairs):
    encoder, path = both_sides(), tmp_path / "x_train.h5"
    pieces, plan = agreed(encoder, pairs, path)
    for number in (0, 4):
        make_part(encoder, pieces, number, parts_folder(path), plan, ALONE)
    told = []
    work(encoder, pieces, path, ALONE, join=False, progress=lambda *now: told.append(now))
    assert told[0] == (22, ROWS) and told[-1] == (ROWS, ROWS) and told == sorted(told)


def test_a_part_that_another_holds_is_waited_for(tmp_path: Path, pairs: Pairs):
    """And taken over when the other's lease is stale."""
    encoder, path = both_sides(), tmp_path / "x_train.h5"
    pieces, _ = agreed(encoder, pairs, path)
    lease = held_by(part_path(parts_folder(path), 3).with_suffix(".lease"), STRANGER)
    looks = []

    def told(done: int, total: int) -> None:
        looks.append(done)
        if looks[-4:] == [ROWS - 16] * 4:  # all but that one are there
            os.utime(lease, (0, 0))

    share = work(encoder, pieces, path, ALONE, join=False, lease_seconds=0.4 * 60, progress=told)
    assert share.parts == 5 and looks.count(ROWS - 16) >= 4


def test_several_at_once(tmp_path: Path, pairs: Pairs):
    """In threads: each part is made once, one joins, all tell of the whole."""
    expected = plain(both_sides(), pairs, tmp_path / "plain" / "x_train.h5")
    path, shares = tmp_path / "x_train.h5", []

    def one(rank: int) -> None:
        shares.append(work(both_sides(), RowPieces(pairs, 16), path, ALONE, Worker(rank, 3), lease_seconds=20))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sha256(path) == expected and len(shares) == 3
    assert {(share.done, share.quarantined) for share in shares} == {(ROWS, 0)}
    assert sum(share.parts for share in shares) == 5


def test_a_finished_cache_is_gone_on_with_as_by_one_process(tmp_path: Path, pairs: Pairs):
    path = tmp_path / "x_train.h5"
    expected = plain(both_sides(), pairs, path)
    share = work(both_sides(), RowPieces(pairs, 16), path, ALONE, Worker(1, 2))
    assert (share.done, share.encoded, share.whole) == (ROWS, 0, True) and "0 encoded now" in str(share)
    assert sha256(path) == expected and sorted(tmp_path.glob("x_*")) == [path]
    renamed = [replace(pairs[0], label="other"), *pairs[1:]]
    relabelled = Pairs(renamed, pairs.data, pairs.layout, pairs.split)
    assert work(both_sides(), RowPieces(relabelled, 16), path, ALONE).relabelled == 1
    with pytest.raises(UsageError, match="was made by something else"):
        work(both_sides(tokens=False), RowPieces(pairs, 16), path, ALONE)


def test_an_interrupted_plain_run_is_gone_on_with_as_it_began(tmp_path: Path, pairs: Pairs):
    expected = plain(both_sides(), pairs, tmp_path / "plain" / "x_train.h5")
    path = tmp_path / "x_train.h5"

    def interrupted(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(both_sides(), pairs, path, ALONE, progress=interrupted)
    share = work(both_sides(), RowPieces(pairs, 16), path, ALONE)
    assert sha256(path) == expected and 0 < share.encoded <= ROWS and share.parts == 0


def test_with_overwrite_a_finished_cache_is_made_anew_once(tmp_path: Path, pairs: Pairs):
    path = tmp_path / "x_train.h5"
    plain(both_sides(tokens=False), pairs, path)
    os.utime(path, (time.time() - 5,) * 2)
    expected = plain(both_sides(), pairs, tmp_path / "plain" / "x_train.h5")
    since = folder_time(tmp_path) - 1
    pieces = RowPieces(pairs, 16)
    share = work(both_sides(), pieces, path, ALONE, overwrite=True, since=since)
    assert (share.parts, sha256(path)) == (5, expected)
    late = work(both_sides(), pieces, path, ALONE, Worker(1, 2), overwrite=True, since=since)
    assert (late.parts, late.encoded, late.whole) == (0, 0, True)


def test_rows_that_changed_are_refused_or_made_again(tmp_path: Path, pairs: Pairs):
    encoder, path = both_sides(), tmp_path / "x_train.h5"
    pieces, plan = agreed(encoder, pairs, path)
    for number in (0, 1):
        make_part(encoder, pieces, number, parts_folder(path), plan, ALONE)
    (tmp_path / "set" / "data" / "17.txt").write_text("other words")
    now = RowPieces(read_dataset(tmp_path / "set")["train"], 16)
    with pytest.raises(UsageError, match=r"1 rows hold other content than when .*00000001.h5 was made: 17 \(text\)"):
        work(encoder, now, path, ALONE)
    before = sha256(part_path(parts_folder(path), 0))
    share = work(encoder, now, path, ALONE, overwrite=True, join=False)
    assert share.parts == 4 and sha256(part_path(parts_folder(path), 0)) == before


def test_rows_in_quarantine_are_tried_again_once_the_parts_are_joined(tmp_path: Path, pairs: Pairs):
    picture = tmp_path / "set" / "data" / "20.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    path = tmp_path / "x_train.h5"
    pieces = RowPieces(pairs, 16)
    assert work(both_sides(), pieces, path, ALONE, join=False).quarantined == 1
    picture.write_bytes(whole)
    assert work(both_sides(), pieces, path, ALONE).quarantined == 1
    with FeatureStore.open(path) as store:
        assert store.status[20] == QUARANTINED
    share = work(both_sides(), pieces, path, ALONE)
    assert (share.quarantined, share.encoded) == (0, 1)


def test_a_joining_that_was_interrupted_is_gone_on_with(tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    expected = plain(both_sides(), pairs, tmp_path / "plain" / "x_train.h5")
    path, pieces = tmp_path / "x_train.h5", RowPieces(pairs, 16)
    write = FeatureStore.write

    def interrupted(store: FeatureStore, rows, *rest) -> None:
        if store.path == path:
            raise KeyboardInterrupt
        write(store, rows, *rest)

    monkeypatch.setattr(FeatureStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(both_sides(), pieces, path, ALONE)
    assert path.exists() and len(list(parts_folder(path).glob("part-*.h5"))) == 5
    assert not agreement.join_lease(path).exists()
    monkeypatch.undo()
    share = work(both_sides(), pieces, path, ALONE)
    assert share.whole and share.parts == 0 and sha256(path) == expected and not parts_folder(path).exists()


def test_parts_that_were_joined_but_not_removed(tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    """Their joiner died after all was done: the next one removes them, and makes none again."""
    path, pieces, merge = tmp_path / "x_train.h5", RowPieces(pairs, 16), shared.merge
    monkeypatch.setattr(shared, "merge", lambda path, overwrite: merge(path, overwrite=overwrite, keep_parts=True))
    work(both_sides(), pieces, path, ALONE)
    monkeypatch.undo()
    before = sha256(path)
    share = work(both_sides(), pieces, path, ALONE)  # kept, for all we know
    assert share.whole and share.encoded == 0 and parts_folder(path).exists()
    held_by(agreement.join_lease(path), ended_process())
    share = work(both_sides(), pieces, path, ALONE)
    assert (share.parts, share.done, sha256(path)) == (0, ROWS, before) and not parts_folder(path).exists()


# -- killed ------------------------------------------------------------------------------------------------------

WORKER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from test_extraction import ALONE, both_sides
    from feats.extraction.shared import Worker, work
    from feats.pieces import RowPieces
    from feats.records import read_dataset

    def slowly(done, total):
        print(done, flush=True)
        time.sleep(float(sys.argv[4]))

    root, rank, world = Path(sys.argv[2]), *map(int, sys.argv[3].split("/"))
    pieces = RowPieces(read_dataset(root / "set")["train"], 16)
    print(work(both_sides(), pieces, root / "x_train.h5", ALONE, Worker(rank, world), progress=slowly))
"""


def start_worker(root: Path, who: str, pause: float) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(WORKER), tests, str(root), who, str(pause)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def test_a_killed_worker_s_parts_are_taken_over(tmp_path: Path, pairs: Pairs):
    """By another number of workers, at once: on its machine a dead process is known to be dead."""
    expected = plain(both_sides(), pairs, tmp_path / "plain" / "x_train.h5")
    folder = tmp_path / "x_train.parts"
    killed = start_worker(tmp_path, "1/2", 0.05)
    for line in killed.stdout:
        if list(folder.glob("part-*.h5")) and list(folder.glob(".part-*.h5")):  # one done, one begun
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(folder.glob("part-*.lease"))) == 1 and list(folder.glob(".part-*"))
    kept = {part: sha256(part) for part in folder.glob("part-*.h5")}
    share = work(both_sides(), RowPieces(pairs, 16), tmp_path / "x_train.h5", ALONE, Worker(0, 3), join=False)
    assert share.parts == 5 - len(kept)
    assert {part: sha256(part) for part in kept} == kept
    assert not list(folder.glob(".part-*")) and not list(folder.glob("*.lease"))
    work(both_sides(), RowPieces(pairs, 16), tmp_path / "x_train.h5", ALONE)
    assert sha256(tmp_path / "x_train.h5") == expected
