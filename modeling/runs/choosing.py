"""Which run is meant: by path, by name, the newest, or the best on the newest's rows."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feats.errors import UsageError
from modeling.choices import BEST, NEWEST
from modeling.runs.entries import Entry, figure_words, find_entries, read_entry, read_predicted, run_folders
from modeling.runs.listing import newest_runs, warn_of

if TYPE_CHECKING:
    from modeling.runs.run import Run

Say = Callable[[str], Any]


def open_runs(
    folder: Path, names: Sequence[str] | None, *, single_head: bool = False, say: Say = lambda line: None
) -> "list[Run]":
    """The runs `names`: each a path, a name in `folder` or in a sweep there, "newest", or "best": the one with the
    highest monitored validation figure of those on the same rows as the newest. Without names, the newest. With
    `single_head` these two are of one head on cached features. `say` hears which run they are, and whether there is a
    better one than the newest.

    What can't be read is passed over by newest and best, with a warning. Raises `UsageError` for what is no run or is
    damaged, a run named twice, and runs of different classes.
    """
    runs = [_opened(folder, name, single_head, say) for name in names or [NEWEST]]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UsageError(f"`run` {' '.join(names or ())} names a run twice; each has one vote")
    for run in runs[1:]:
        if set(run.classes) != set(runs[0].classes):
            both = "; ".join(f"{r.named}: {', '.join(r.classes)}" for r in (runs[0], run))
            raise UsageError(f"runs of different classes can't vote together ({both}); name runs of the same data")
    return runs


def run_path(folder: Path, name: str) -> Path:
    """The folder of the run `name`, as `open_runs` knows it; it needn't be a run. Raises `UsageError` for a name that
    several sweeps have, and where there is no newest or best."""
    if name in (NEWEST, BEST):
        return next(_candidates(folder, name, single_head=False))
    if Path(name).is_dir() or (folder / name).is_dir():
        return Path(name) if Path(name).is_dir() else folder / name
    inside = [path for path in run_folders(folder) if path.name == name]
    if len(inside) > 1:
        places = ", ".join(str(path.relative_to(folder)) for path in inside)
        raise UsageError(f"`run` {name}: several runs in {folder} have this name ({places}); give one of these")
    return inside[0] if inside else folder / name


def _opened(folder: Path, name: str, single_head: bool, say: Say) -> "Run":
    from modeling.runs.folder import load_run  # with torch, which who asks for a path alone goes without

    if name not in (NEWEST, BEST):
        return load_run(run_path(folder, name))
    failed: dict[Path, UsageError] = {}
    for path in _candidates(folder, name, single_head):
        try:
            run = load_run(path)
        except UsageError as error:
            failed[path] = error
            continue
        warn_of({path: str(error) for path, error in failed.items()})
        for line in _told(folder, path, name, single_head):
            say(line)
        return run
    raise next(iter(failed.values()))


def _candidates(folder: Path, name: str, single_head: bool) -> Iterator[Path]:
    """The runs that `name` may mean, the first one first. Raises `UsageError` when there is none."""
    if name == NEWEST:
        yield from newest_runs(folder, single_head)
        return
    entries, bad = _choice(folder, single_head)
    warn_of(bad)
    if not entries:
        yield from newest_runs(folder, single_head)  # which says what there is to do
        return
    own = [entry for entry in entries if entry.path.parent == folder]  # a sweep's run isn't the newest beside others
    reference = (own or entries)[0]
    yield from (entry.path for entry in on_same_rows(reference, entries))


def _choice(folder: Path, single_head: bool) -> tuple[list[Entry], dict[Path, str]]:
    entries, bad = find_entries(folder)
    return [entry for entry in entries if entry.single_head or not single_head], bad


def on_same_rows(reference: Entry, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Those of `entries` with the validation rows and labels of `reference`, by its monitored figure, best first. Each
    one's predictions are read when it is asked for."""
    classes = set(reference.config["classes"])
    rows = read_predicted(reference).digest(classes)
    for entry in sorted(entries, key=lambda entry: -entry.score(reference.monitor)):
        if entry.n == reference.n and set(entry.config["classes"]) == classes:
            try:
                same = read_predicted(entry).digest(classes) == rows
            except UsageError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
            if same:
                yield entry


def _told(folder: Path, path: Path, name: str, single_head: bool) -> list[str]:
    """Which run was taken, and the best on its rows where that is better."""
    try:
        taken = read_entry(path)
        figure = figure_words(taken.monitor)
        score, rows = taken.score(taken.monitor), f"{taken.n} validation rows"
        if name == BEST:
            return [f"best run {path}: {figure} {score:.3f} on {rows}, which chose it: an optimistic figure"]
        lines = [f"newest run {path}: {figure} {score:.3f} on {rows}"]
        better = [e for e in _choice(folder, single_head)[0] if e.score(taken.monitor) > score]
        best = next(on_same_rows(taken, better), None)
    except UsageError:  # damaged beside its weights: it serves nevertheless
        return [f"{name} run {path}"]
    if best is not None:
        shown = best.path.relative_to(folder)
        lines.append(f"run {shown} has {figure} {best.score(taken.monitor):.3f} on the same {taken.n} rows: `run` best")
    return lines
