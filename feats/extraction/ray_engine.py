"""Workers on a Ray cluster.

Ray starts, places and restarts them, and may grow the cluster for them; what each does, and how they share the parts,
is `feats.extraction.shared.work`, as everywhere. A worker whose node or process dies is started again where there is
room; meanwhile the others take its parts over. The cluster's machines must see the folder of caches and the data under
the same paths.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

import feats
from feats.errors import UsageError, first_line
from feats.extraction.shared import Share, Worker
from feats.extraction.summary import Progress
from feats.parts import part_path, parts_folder, read_plan

LOOK = 1.0  # seconds between two looks at how many parts there are
PATIENCE = 30.0  # seconds for workers to end once one has seen the end: whoever joins removes the parts after that
RETRIES = 100  # of a worker: machines are taken away at any time, but one that can't live at all ends the run


@dataclass(frozen=True)
class RaySettings:
    """Which cluster, and what of it.

    `address`: "auto", "HOST:PORT"; None is that of RAY_ADDRESS, else one of its own on this machine. `workers`: None is
    as many as there is room for now; more make an autoscaling cluster grow. `gpus` and `cpus` are each worker's.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float = 0
    cpus: float = 1


def work_on_ray(
    task: Callable[[Worker], Share], path: Path, settings: RaySettings, progress: Progress = lambda done, total: None
) -> Share:
    """Have the cluster's workers do `task`, each as a `Worker` of its own, until the cache at `path` is there; gives
    the share of the one that joined it, with the rows that all of them encoded.

    `task` is pickled: it loads encoder and pairs by itself. It ends when all is done, whoever did it. `progress` hears
    of the rows of finished parts.
    Raises `UsageError` where the cluster can't be reached or has no room for a worker, and what a task raises.
    """
    with _cluster(settings.address):
        count = settings.workers or _room(settings)
        remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=RETRIES)(_in_place)
        running = [remote.remote(task, Worker(rank, count), os.getcwd()) for rank in range(count)]
        shares = _until_done(running, path, progress)
    joined = next((share for share in shares if share.whole), shares[0])
    return replace(joined, encoded=sum(share.encoded for share in shares))


def _in_place(task: Callable[[Worker], Share], worker: Worker, folder: str) -> Share:
    """The task, from where the command was given: caches record the data's path as it was typed."""
    os.chdir(folder)
    return task(worker)


def _until_done(running: Sequence[Any], path: Path, progress: Progress) -> list[Share]:
    """What workers say, once one has seen the end. One that waits for a place to be restarted in isn't waited for."""
    ended: list[Any] = []
    rows: list[int] | None = None
    while not ended:
        ended, _ = ray.wait(list(running), timeout=LOOK)
        rows = rows or _rows_of_parts(path)
        if rows is not None:
            there = {part.name for part in parts_folder(path).glob("part-*.h5")}
            progress(sum(n for number, n in enumerate(rows) if part_path(Path(), number).name in there), sum(rows))
    ended, left = ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)
    for one in left:
        ray.cancel(one, force=True)
    try:
        return list(ray.get(ended))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UsageError(f"the cluster's workers died again and again ({first_line(error)}); see its logs") from None


def _rows_of_parts(path: Path) -> list[int] | None:
    """How many rows each part has, 1 where that isn't known; None before there is a plan."""
    plan = read_plan(parts_folder(path))
    return None if plan is None else [piece.get("rows", 1) for piece in plan.pieces]


def _room(settings: RaySettings) -> int:
    """How many workers the cluster can run at once."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    each = {"CPU": settings.cpus, "GPU": settings.gpus}
    room = min((int(there.get(kind, 0) // amount) for kind, amount in each.items() if amount), default=1)
    if not room:
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items() if amount)
        found = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in each)
        raise UsageError(
            f"a worker needs {wanted} and the cluster has {found}; ask for less, or tell a cluster that grows how many "
            "`ray_workers` there shall be"
        )
    return room


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A connection to the cluster, whose workers have this project's modules whatever is installed there."""
    environment = {"py_modules": [str(Path(feats.__file__).parent)]}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UsageError(
            f"the Ray cluster {address or 'on this machine'} can't be reached ({first_line(error)}); start one with "
            "ray start, or leave `address` out"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
