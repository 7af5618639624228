"""The runs of a folder, newest first."""

import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feats.errors import UsageError, first_line
from feats.source import SIDES
from modeling.runs.config import CONFIG, FILES, read_config

CLOCKS_DIFFER = timedelta(hours=1)  # a run made on another machine may seem to be of the future by less
NAMED = 5  # folders that a warning names


def list_runs(folder: Path | str) -> list[Path]:
    """The complete runs in `folder`, newest first. (An unfinished one is a hidden folder.) A warning names what can't
    be read as a run, and runs dated in the future, which count as the oldest: a wrong clock would make them the newest
    for ever."""
    runs, bad = runs_in(folder)
    warn_of(bad)
    return runs


def runs_in(folder: Path | str) -> tuple[list[Path], dict[Path, str]]:
    """The complete runs, newest first, and what is the matter with folders."""
    found, bad = list[tuple[datetime, Path]](), dict[Path, str]()
    for file in Path(folder).glob("[!.]*/" + CONFIG):
        try:
            made = when_made(checked_config(file.parent))
        except UsageError as error:
            bad[file.parent] = str(error)
            continue
        found.append((made, file.parent))
        if made > latest():
            bad[file.parent] = f"it is dated {made:%Y-%m-%d}, in the future, and counts as the oldest"
    return newest_first(found), bad


def latest() -> datetime:
    """The latest time at which a run may have been made."""
    return datetime.now(UTC) + CLOCKS_DIFFER


def checked_config(path: Path) -> dict[str, Any]:
    """As `read_config`, of a run with all its files, and of the shape that who lists runs goes by. Raises `UsageError`
    for anything else."""
    config = read_config(path)
    lacking = [name for name in FILES if not (path / name).is_file()]
    if lacking:
        raise UsageError(f"{path} is damaged (there is no {lacking[0]}); train again")
    try:
        heads = [(member["train"]["head"]["head"], member["train"]["seed"]) for member in config["members"]]
        names = [config["created"], *config["classes"], *(name for side in SIDES for name in config["features"][side])]
        fit = heads and all(isinstance(name, str) for name in (*names, *(head for head, _ in heads)))
        if not fit or not all(isinstance(of, int) for of in (config["stacked"], *(seed for _, seed in heads))):
            raise TypeError("names or seeds are of other types")
        when_made(config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path / CONFIG} isn't a run's ({type(error).__name__}: {first_line(error)})") from None
    return config


def when_made(config: Mapping[str, Any]) -> datetime:
    """When a run was saved. Raises `ValueError` or `OverflowError` for what is no date."""
    made = datetime.fromisoformat(config["created"])
    return made.replace(tzinfo=UTC) if made.tzinfo is None else made.astimezone(UTC)


def newest_first(runs: Iterable[tuple[datetime, Path]]) -> list[Path]:
    """Runs by when they were made. Those of the future come last: a wrong clock would make them the newest for ever."""
    until = latest()
    return [path for _, path in sorted(runs, key=lambda of: (of[0] <= until, *of), reverse=True)]


def warn_of(bad: Mapping[Path, str]) -> None:
    """One warning that names folders and says what is the matter with each."""
    if bad:
        told = [reason if str(path) in reason else f"{path}: {reason}" for path, reason in bad.items()]
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        warnings.warn(f"left out or last among the runs: {'; '.join(told[:NAMED])}{more}", stacklevel=3)


def newest_run(folder: Path | str) -> Path:
    """The newest run. Raises `UsageError` when there is none."""
    return newest_runs(folder)[0]


def newest_runs(folder: Path | str, single_head: bool = False) -> list[Path]:
    """As `list_runs`, or those of one head on cached features. Raises `UsageError` when there are none."""
    runs = [path for path in list_runs(folder) if not single_head or is_single_head(read_config(path))]
    if not runs:
        raise UsageError(
            f"no complete run{' of one head' if single_head else ''} in {folder}; train one with: "
            "python modeling/train_head.py `vtype` clip `D` 256"
        )
    return runs


def is_single_head(config: Mapping[str, Any]) -> bool:
    """Whether a run is one head on cached features, by its config."""
    return len(config["members"]) == 1 and not config["stacked"] and not config.get("finetuned")
