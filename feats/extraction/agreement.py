"""What those who share the work on a cache agree on: one plan in the folder of its parts, and when it is all done.

Knows no encoder: who works says what it would do, and hears what all do.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from feats.cache_reader import fingerprint_difference
from feats.errors import UsageError
from feats.extraction.leases import GUARD, LEASE_SECONDS, Owner, folder_time, holder_of, leased
from feats.parts import PartsPlan, part_path, parts_folder, plan_path, read_plan
from feats.quarantine import quarantine_path
from feats.store import is_complete
from feats.writing import sync

POLL = 1.0  # seconds between two looks at what others do


def agree(
    path: Path,
    wanted: PartsPlan,
    *,
    batch_size: int | None = None,
    overwrite: bool = False,
    since: float | None = None,
    lease_seconds: float = LEASE_SECONDS,
) -> PartsPlan | None:
    """The plan by which parts of the cache at `path` are made: `wanted` for whoever comes first, else the one there is.
    None where the cache was finished meanwhile.

    `batch_size` is the one that was asked for, if any: without, the plan's is taken. With `overwrite` what was there
    before `since` (`folder_time`; default: now) and is of another plan, or joined already, is removed, once: what is
    newer is of others who do the same.
    Raises `UsageError` for a plan that differs, with both sides of the difference.
    """
    folder = parts_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    since = folder_time(folder) if since is None else since
    while True:
        known = read_plan(folder)
        if known is None:
            if _parts_in(folder) and read_plan(folder) is None:
                _without_a_plan(folder, overwrite)
            if _publish(wanted, folder):
                if is_free(path, overwrite, since):
                    return plan_as_read(wanted)
                _withdraw(folder)
                return None
            continue
        difference = _difference(known, wanted, batch_size)
        old = overwrite and _time(plan_path(folder)) < since
        if old and (difference or known.fingerprint != _plain(wanted.fingerprint) or is_joined(path)):
            _replace(folder, known, lease_seconds)
            continue
        if difference:
            raise UsageError(
                f"{folder} holds parts of something else ({difference}); choose another `name`, or replace them with "
                "`overwrite`"
            )
        return known


def is_free(path: Path, overwrite: bool, since: float) -> bool:
    """Whether a cache may be begun at `path`: there is none, or one from before `since` that may be replaced."""
    return not path.exists() or (overwrite and _time(path) < since)


def is_joined(path: Path) -> bool:
    """Whether the cache at `path` is complete, and no older than the plan of its parts, if those are still there."""
    return path.exists() and _time(path) >= _time(plan_path(parts_folder(path))) and is_complete(path)


def sweep(folder: Path, seconds: float) -> None:
    """Remove unfinished files of those who died: of this machine at once, of others when they weren't touched for so
    many seconds."""
    hidden = [(place, owner) for place in folder.glob(".*") if (owner := _owner(place))]
    if not hidden:
        return
    now = folder_time(folder)
    for place, owner in hidden:
        if owner.dead or now - _time(place) > seconds:
            place.unlink(missing_ok=True)


def unfinished_path(folder: Path, number: int) -> Path:
    """A new name for a part in the making, from which `sweep` knows who makes it."""
    return folder / f".{part_path(folder, number).stem}.{Owner.here().name}.h5"


def _owner(place: Path) -> Owner | None:
    """Who made a hidden file: some part of its name is an owner's, or it is the guard of a lease and says so."""
    if place.suffix == GUARD:
        return holder_of(place)
    return next((owner for word in place.name.split(".") if (owner := Owner.from_name(word))), None)


def _time(place: Path) -> float:
    """When a file was changed last; the beginning of time for none."""
    try:
        return place.stat().st_mtime
    except OSError:
        return 0.0


def _parts_in(folder: Path) -> bool:
    return any(folder.glob("part-*.h5"))


def _without_a_plan(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{folder} holds parts, but no plan.json; replace them with `overwrite`, or remove the folder")
    _remove_parts(folder)


def _difference(known: PartsPlan, wanted: PartsPlan, batch_size: int | None) -> str:
    """Where two plans differ, with both values; '' where the same parts come of them."""
    pieces = [len(known.pieces), len(wanted.pieces)]
    a: dict[str, Any] = {"layout": known.layout, "split": known.split, "pieces": pieces[0]}
    b: dict[str, Any] = {"layout": wanted.layout, "split": wanted.split, "pieces": pieces[1]}
    if batch_size is not None:
        a["batch_size"], b["batch_size"] = known.kept["batch_size"], batch_size
    for number, (theirs, ours) in enumerate(zip(known.pieces, _plain(wanted.pieces), strict=False)):
        if theirs != ours:
            a[f"piece {number}"], b[f"piece {number}"] = theirs, ours
            break
    found = fingerprint_difference(known.fingerprint, _plain(wanted.fingerprint)), fingerprint_difference(a, b)
    return "; ".join(filter(None, found)).replace("the cache has", "its plan has")


def plan_as_read(plan: PartsPlan) -> PartsPlan:
    """A plan as others read it: lists for tuples."""
    return PartsPlan.from_json(plan.text)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _publish(plan: PartsPlan, folder: Path) -> bool:
    """Put the plan there, whole; False if there is one."""
    place = plan_path(folder)
    unfinished = folder / f".plan.{Owner.here().name}"
    try:
        unfinished.write_text(plan.text, encoding="utf-8")
        sync(unfinished)
        try:
            os.link(unfinished, place)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _publish_under_a_lease(unfinished, place)
        return True
    except FileNotFoundError:  # the folder was removed: what was made there is joined
        folder.mkdir(parents=True, exist_ok=True)
        return False
    finally:
        unfinished.unlink(missing_ok=True)


def _publish_under_a_lease(unfinished: Path, place: Path) -> bool:
    with leased(place.with_suffix(".lease")) as mine:
        if not mine or place.exists():
            time.sleep(0 if place.exists() else POLL)
            return False
        os.replace(unfinished, place)
    return True


def _withdraw(folder: Path) -> None:
    plan_path(folder).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _replace(folder: Path, known: PartsPlan, lease_seconds: float) -> None:
    """Remove the parts of a plan, and then the plan; others wait for that."""
    with leased(folder / "plan.lease", lease_seconds) as mine:
        if not mine:
            time.sleep(min(POLL, lease_seconds / 8))
        elif read_plan(folder) == known:
            _remove_parts(folder)
            plan_path(folder).unlink(missing_ok=True)


def _remove_parts(folder: Path) -> None:
    for part in folder.glob("part-*.h5"):
        remove_part(part)


def remove_part(part: Path) -> None:
    """A part and its reasons."""
    quarantine_path(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def join_lease(path: Path) -> Path:
    """The lease of who joins the parts of the cache at `path`."""
    return parts_folder(path) / "join.lease"
