"""One cache made by several processes that share nothing but a folder: each makes parts, the last one joins.

No process waits for another, none is special. Who takes which part is settled by leases, so that workers may come, die
and go at any time, on any machine that sees the folder.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path

from feats.encoders.base import Encoder
from feats.errors import UsageError, first_line
from feats.extraction.agreement import (
    POLL,
    agree,
    is_free,
    is_joined,
    join_lease,
    remove_part,
    sweep,
    unfinished_path,
)
from feats.extraction.leases import LEASE_SECONDS, folder_time, leased, touched
from feats.extraction.local import (
    Counts,
    changed_in,
    count_rows,
    extract,
    make_cache,
)
from feats.extraction.merging import merge, patiently
from feats.extraction.plan import (
    as_begun,
    block_rows_of,
    decide,
    default_batch_size,
    fingerprint_of,
    plan_rows,
)
from feats.extraction.settings import ExtractionSettings
from feats.extraction.summary import Progress, Summary
from feats.parts import PartsPlan, is_plan_of, part_path, parts_folder, publish, read_plan
from feats.pieces import Pieces, RowPieces
from feats.quarantine import quarantine_path
from feats.records import Pairs
from feats.writing import made_as

PIECES_EACH, MOST_ROWS = 4, 32768  # pieces per worker, so that none waits long at the end; rows that a kill may cost
LONE_BLOCKS = 16  # of a piece at least, where no other worker is known of


@dataclass(frozen=True)
class Worker:
    """One of `world` processes that do the same, beginning at its own share: `rank`, from 0 on. Only where it begins
    depends on it."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None  # on this machine, where that is told: of several GPUs it takes that one

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Worker":
        """As torchrun or SLURM tell it: tasks of a job array, tasks of a step, or both. The only one where none tells.

        Raises `UsageError` for numbers that can't be.
        """
        rank, world = 0, 1
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        else:
            if "SLURM_ARRAY_TASK_ID" in environment:
                step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
                first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
                rank = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step
                world = _number(environment, "SLURM_ARRAY_TASK_COUNT", rank + 1)
            if "SLURM_PROCID" in environment:
                tasks = _number(environment, "SLURM_NTASKS", 1)
                rank, world = rank * tasks + _number(environment, "SLURM_PROCID"), world * tasks
        if world < 1 or rank < 0:
            raise UsageError(
                f"the environment tells of worker {rank} of {world}; expected 0 to one less than there are"
            )
        local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), None)
        return cls(rank % world, world, _number(environment, local) if local else None)  # an array like 0,3,7 has holes


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "" if otherwise is None else str(otherwise))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"the environment's {name} is {text!r}; expected a whole number") from None


@dataclass
class Share(Summary):
    """What one worker did: `parts` of `of` parts, `encoded` rows. `done`, `quarantined` and `truncated` count the rows
    of all. `whole` says that it speaks for the cache: it joined the parts, or there was nothing to share."""

    worker: Worker = Worker()
    parts: int = 0
    of: int = 0
    whole: bool = False

    def __str__(self) -> str:
        if self.whole:
            return super().__str__()
        made = f"worker {self.worker.rank} of {self.worker.world} made {self.parts} of {self.of} parts"
        return f"{self.path.stem}: {made}, {self.encoded} rows, in {self.seconds:.1f} s"


def row_pieces(
    encoder: Encoder,
    pairs: Pairs,
    path: Path | str,
    settings: ExtractionSettings = ExtractionSettings(),
    *,
    world: int = 1,
    piece_rows: int | None = None,
    overwrite: bool = False,
) -> RowPieces:
    """Pairs in memory cut for `work`: as the plan at `path` has it, else in pieces of `piece_rows`, rounded up to whole
    blocks; without, at least four for each of `world` workers, of one block at least and 32768 rows at most. A lone
    worker's have 16 blocks at least: each part begins with a block that nothing was prepared ahead for."""
    block = block_rows_of(settings.batch_size or default_batch_size(encoder))
    known = read_plan(parts_folder(Path(path)))
    if piece_rows is None and known is not None and (not overwrite or _made_alike(known, encoder, settings)):
        rows = known.pieces[0].get("rows") if known.pieces else None
        if isinstance(rows, int) and rows > 0:
            return RowPieces(pairs, rows)
    if piece_rows is not None:
        return RowPieces(pairs, whole_blocks(encoder, settings, piece_rows))
    rows = max(len(pairs) // (PIECES_EACH * world), LONE_BLOCKS * block if world == 1 else 0)
    return RowPieces(pairs, max(1, min(MOST_ROWS, rows) // block) * block)


def whole_blocks(encoder: Encoder, settings: ExtractionSettings, rows: int) -> int:
    """At least so many rows, as whole blocks: then parts hold what a plain extraction holds, to the bit."""
    block = block_rows_of(settings.batch_size or default_batch_size(encoder))
    return -(-rows // block) * block


def _made_alike(known: PartsPlan, encoder: Encoder, settings: ExtractionSettings) -> bool:
    batch_size = settings.batch_size or default_batch_size(encoder)
    return known.fingerprint == _common_fingerprint(encoder, settings) and known.kept["batch_size"] == batch_size


def _common_fingerprint(encoder: Encoder, settings: ExtractionSettings) -> dict[str, object]:
    return {key: value for key, value in fingerprint_of(encoder, [], settings).items() if key != "data"}


def make_plan_of_parts(
    encoder: Encoder, pieces: Pieces, settings: ExtractionSettings = ExtractionSettings()
) -> tuple[PartsPlan, Encoder]:
    """The plan by which this process would make the parts, and the encoder to do so, compiled where that pays."""
    described = [pieces.describe(number) for number in range(len(pieces))]
    rows = sum(piece.get("rows", MOST_ROWS) for piece in described)
    chosen, features, kept = decide(encoder, rows, settings)
    fingerprint = _common_fingerprint(encoder, settings)
    return PartsPlan(fingerprint, kept, features, pieces.layout, pieces.split, described), chosen


def make_part(
    encoder: Encoder,
    pieces: Pieces,
    number: int,
    folder: Path,
    plan: PartsPlan,
    settings: ExtractionSettings = ExtractionSettings(),
    progress: Progress = lambda done, total: None,
    lease_seconds: float = LEASE_SECONDS,
) -> Counts | None:
    """Make part `number` in `folder`, and tell of its rows; None, at once, if it is there already.

    All depends on the arguments alone: any process may call it at any time, and two that make the same part leave the
    same. `encoder` is compiled if the plan says so (`feats.extraction.plan.as_begun`), `folder` holds the plan
    (`feats.extraction.agreement.agree`). Nothing unfinished is left behind by an error; what a killed process leaves is
    told by its age: a living one touches its file four times in `lease_seconds`.
    Raises `UsageError` if another plan has taken the folder over meanwhile, else as `Pieces.read` and `extract`.
    """
    place = part_path(folder, number)
    if place.exists():
        return None
    unfinished = unfinished_path(folder, number)
    try:
        with made_as(unfinished, place), touched(lease_seconds / 4, lambda: os.utime(unfinished)):
            features = {name: tuple(shape) for name, shape in plan.features.items()}
            rows = plan_rows(encoder, pieces.read(number), settings, kept=plan.kept, features=features)
            rows = replace(rows, fingerprint={**rows.fingerprint, "versions": plan.fingerprint["versions"]})
            make_cache(rows, unfinished, progress)
            counts = count_rows(unfinished)
        if not is_plan_of(plan, folder):
            raise UsageError(f"{folder} was taken over by an extraction with other settings; nothing of it was changed")
        publish(unfinished, place)
    finally:
        for left in (unfinished, quarantine_path(unfinished), unfinished.with_name(unfinished.name + ".creating")):
            left.unlink(missing_ok=True)
    return counts


def work(
    encoder: Encoder,
    pieces: Pieces,
    path: Path | str,
    settings: ExtractionSettings = ExtractionSettings(),
    worker: Worker = Worker(),
    *,
    lease_seconds: float = LEASE_SECONDS,
    overwrite: bool = False,
    since: float | None = None,
    join: bool = True,
    progress: Progress = lambda done, total: None,
) -> Share:
    """Help to bring the cache at `path` into being, until it is there; without `join`, until all its parts are.

    Parts are taken one by one, from this worker's share on and then wherever there are any. Whose lease isn't renewed
    for `lease_seconds` counts as dead, and so does, at once, one of this machine whose process is gone. Rows in
    quarantine of finished parts aren't tried again.
    Where a cache is already, and no parts are, there is nothing to share: one worker after another goes on with it as
    `extract` does. With `overwrite`, what was there before `since` (`time_in` its folder; default: now) is replaced,
    by whoever comes first.
    Raises `UsageError` as `agree` and `extract` do.
    """
    start = time.perf_counter()
    path = Path(path)
    share = Share(path, worker=worker, of=len(pieces))
    now = time_in(path.parent)
    since = now if since is None else since
    if not is_free(path, overwrite, since) and not _in_parts(path):
        return _by_one(encoder, pieces, path, settings, share, lease_seconds, progress)
    wanted, chosen = make_plan_of_parts(encoder, pieces, settings)
    with _written(parts_folder(path)):
        plan = agree(
            path,
            wanted,
            batch_size=settings.batch_size,
            overwrite=overwrite,
            since=since,
            lease_seconds=lease_seconds,
        )
    if plan is None:
        return _by_one(encoder, pieces, path, settings, share, lease_seconds, progress)
    if plan.kept["compiled"] != wanted.kept["compiled"] or plan.kept["batch_size"] != wanted.kept["batch_size"]:
        chosen = _as_planned(encoder, plan, path)
    shared = _Work(chosen, pieces, path, settings, plan, worker, lease_seconds, overwrite, join, progress, share)
    try:
        with _written(shared.folder):
            shared.check_finished()
            shared.until_all_is_done()
    except UsageError:
        if not is_joined(path):  # else the parts were removed under our hands, and rightly so
            raise
    places = [path] if is_joined(path) else [part_path(shared.folder, number) for number in range(len(pieces))]
    counted = (patiently(partial(count_rows, place), lease_seconds) for place in places)
    share.done, share.quarantined, share.truncated = map(sum, zip(*counted, strict=True))
    share.seconds = time.perf_counter() - start
    return share


def time_in(folder: Path) -> float:
    """`feats.extraction.leases.folder_time` of a folder of caches, which is made if it isn't there. Raises `UsageError`
    for one that can't be written."""
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return folder_time(folder)


def _in_parts(path: Path) -> bool:
    """Whether a cache is being made by parts, or joined: not where they were kept after that."""
    return parts_folder(path).exists() and (not is_joined(path) or join_lease(path).exists())


def _as_planned(encoder: Encoder, plan: PartsPlan, path: Path) -> Encoder:
    try:
        return as_begun(encoder, plan.kept)
    except UsageError as error:
        raise UsageError(f"{parts_folder(path)} can't be gone on with: {error}") from None


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into one clear error."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{folder} can't be written ({first_line(error)}); choose another folder with `out`") from None


def _by_one(
    encoder: Encoder,
    pieces: Pieces,
    path: Path,
    settings: ExtractionSettings,
    share: Share,
    lease_seconds: float,
    progress: Progress,
) -> Share:
    """Go on with a cache that isn't in parts: one worker after another, all but the first find nothing to do."""
    if not isinstance(pieces, RowPieces):
        if not is_joined(path):
            raise UsageError(
                f"{path} is incomplete, and its pairs aren't in memory: run the extraction that began it again, or "
                "replace it with `overwrite`"
            )
        share.done, share.quarantined, share.truncated = patiently(partial(count_rows, path), lease_seconds)
        share.whole = True
        return share
    while True:
        with leased(path.with_name(f".{path.name}.lease"), lease_seconds) as mine:
            if mine:
                going_on = partial(extract, encoder, pieces.pairs, path, settings, progress=progress)
                told = patiently(going_on, lease_seconds)
                known = {field.name: getattr(told, field.name) for field in fields(Summary)}
                return replace(share, **known, whole=True)
        time.sleep(_patience(lease_seconds))


def _patience(lease_seconds: float) -> float:
    return min(POLL, lease_seconds / 8)


@dataclass
class _Work:
    """One worker's way through the parts of a plan."""

    encoder: Encoder
    pieces: Pieces
    path: Path
    settings: ExtractionSettings
    plan: PartsPlan
    worker: Worker
    lease_seconds: float
    overwrite: bool
    join: bool
    progress: Progress
    share: Share

    def __post_init__(self) -> None:
        self.folder = parts_folder(self.path)
        total, world = len(self.pieces), self.worker.world
        self.first, stop = (number * total // world for number in (self.worker.rank, self.worker.rank + 1))
        self.order = [(self.first + k) % total for k in range(total)]
        self.own = range(self.first, stop)
        told = [piece.get("rows") for piece in self.plan.pieces]
        self.in_rows = None not in told
        self.sizes: list[int] = [size or 0 for size in told] if self.in_rows else [1] * total

    def until_all_is_done(self) -> None:
        """Make parts while there are any to make, then see that they are joined, and by whom."""
        sweep(self.folder, self.lease_seconds)
        for turn in count():
            joined = is_joined(self.path)
            missing = [] if joined else self.missing()
            self.show(missing)
            if joined and not join_lease(self.path).exists():
                return
            if not (joined or missing or self.join):
                return
            did = self.make_some(missing) if missing else self.try_to_join()
            if not did:
                time.sleep(_patience(self.lease_seconds))
                if turn % 16 == 15:
                    sweep(self.folder, self.lease_seconds)

    def missing(self) -> list[int]:
        """Parts that aren't there, in this worker's order."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return [number for number in self.order if part_path(self.folder, number).name not in there]

    def make_some(self, missing: list[int]) -> bool:
        """Make those that nobody works on, one after another; False where others work on all of them."""
        did = False
        left = set(missing)
        for number in missing:
            place = part_path(self.folder, number)
            if not place.exists():
                with leased(place.with_suffix(".lease"), self.lease_seconds) as mine:
                    if not mine:
                        continue
                    if is_joined(self.path):  # else a part that was joined and removed would be made again
                        return True
                    self.make(number, left)
                did = True
            left.discard(number)
        return did

    def make(self, number: int, left: set[int]) -> None:
        """Make one part."""
        total = sum(self.sizes)
        before = total - sum(self.sizes[other] for other in left)
        arguments = (self.encoder, self.pieces, number, self.folder, self.plan, self.settings)

        def told(done: int, _: int) -> None:
            if self.in_rows:
                self.progress(before + done, total)

        counts = make_part(*arguments, told, self.lease_seconds)
        if counts is not None:
            self.share.encoded += counts.done
            self.share.parts += 1

    def show(self, missing: list[int]) -> None:
        """Say how far all are."""
        total = sum(self.sizes)
        self.progress(total - sum(self.sizes[number] for number in missing), total)

    def try_to_join(self) -> bool:
        """Join the parts, unless another does; finish that of one who died after all was joined."""
        with leased(join_lease(self.path), self.lease_seconds) as mine:
            if mine:
                before = is_joined(self.path)  # else its parts are still to be removed
                patiently(partial(merge, self.path, overwrite=self.overwrite and not before), self.lease_seconds)
                self.share.whole = not before
                if self.encoder.text and isinstance(self.pieces, RowPieces):
                    self.share.encodings.update(r.encoding for r in self.pieces.pairs if r.encoding)
        return mine

    def check_finished(self) -> None:
        """Refuse finished parts of this worker's share whose rows hold other content now, or with `overwrite` remove
        them. Only of pairs in memory: others would have to be read once more."""
        if not isinstance(self.pieces, RowPieces):
            return
        for number in self.own:
            place = part_path(self.folder, number)
            changed = changed_in(place, self.pieces.read(number)) if place.exists() else {}
            if changed and self.overwrite:
                remove_part(place)
            elif changed:
                some = ", ".join(f"{i} ({what})" for i, what in list(changed.items())[:5])
                raise UsageError(
                    f"{len(changed)} rows hold other content than when {place} was made: {some}; choose another "
                    "`name`, or replace it with `overwrite`"
                )
