"""A finetuning from its start to the run it leaves: what scripts and notebooks call."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from feats.acceleration import deterministic, peak_bytes
from feats.errors import UsageError
from modeling.choices import RUNS
from modeling.features.splits import duplicates_of
from modeling.finetuning import outcomes as outcome
from modeling.finetuning.checkpoint import WorkFolder
from modeling.finetuning.distributed import Team
from modeling.finetuning.hard_rows import hard_rows
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start
from modeling.finetuning.trunk import FOLDER, data_of
from modeling.finetuning.tuning import memory_named, tune
from modeling.runs.run import Run
from modeling.runs.tables import collapse_notes, epoch_line

Progress = Callable[[int, int], Any]  # rows done, rows to do


@contextmanager
def no_bar(title: str) -> Iterator[Progress]:
    """A `bar` that shows nothing."""
    yield lambda done, total: None


def finetune_model(
    start: Start,
    settings: TuneSettings = TuneSettings(),
    runs: Path | str = RUNS,
    *,
    name: str | None = None,
    bad_cases: Path | None = None,
    ablation_eval: bool = False,
    cached_trunk: bool = True,
    caches: Path | None = None,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
    team: Team = Team(),
    say: Callable[[str], Any] = lambda line: None,
    bar: Callable[[str], AbstractContextManager[Progress]] = no_bar,
) -> Run | None:
    """Tune the model of `start_from_run` or `start_from_encoders` and save it as a run in the folder `runs`; only the
    leading process of a `team` returns that.

    An interrupted finetuning goes on when it is called again with a start and settings like those before: its
    checkpoints lie in a hidden folder of `runs`, called by `name` or by all that decides the result. `bad_cases` is a
    file of training rows that come once more, augmented; `ablation_eval` also scores the model with one side removed.
    With `cached_trunk` frozen blocks run once, and their outputs are kept beside the `caches` (None: those of the run,
    or the usual folder). `say` hears what there is to tell, `bar` (title) shows progress; `command`
    and `options` are for the run's records, see `save_run`.
    Raises `UsageError` for whatever doesn't fit, as `tune`, and when a file can't be written.
    """
    runs, began = Path(runs), time.perf_counter()
    if settings.wise_ft and start.model.new_head:
        raise UsageError("`wise_ft` mixes in the start's weights, and those of a new head are random; leave it out")
    # Duplicates matter here whether or not the split kept them together.
    hard = hard_rows(bad_cases, start.split, duplicates_of(start.experiment.features)) if bad_cases else []
    what = outcome.what_is_tuned(start, settings, hard)

    def told(row: dict[str, Any], best: bool) -> None:
        say(epoch_line(row, "best so far" if best else ""))

    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    folder = runs / f".{name or digest[:12]}.tuning"
    with deterministic(settings.deterministic), memory_named(settings), WorkFolder(folder, what, team.leads) as working:
        finished = outcome.finished_run(runs, digest, name) if working.begun else None
        finished = team.gather(finished)[0]  # before any process removes what the others look at
        if finished is not None:  # it was interrupted between its last two strokes
            working.remove()
            return finished if team.leads else None
        say(outcome.start_line(start))
        for line in start.experiment.rows_lines():
            say(line)
        with bar("frozen blocks") as progress:
            trunks = (caches or outcome.cache_folder(start)) / FOLDER
            data = data_of(start, settings, trunks, team, hard=hard, cached=cached_trunk, progress=progress)
        say(outcome.model_line(start))
        for note in outcome.notes_of(start, settings, ablation_eval):
            say(note)
        with bar("tune") as progress:
            tuned = tune(start.model, data, settings, working, team, progress, told)
        predicted = outcome.predicted_of(start, data, settings, team, ablation_eval)
        if not team.leads:
            return None
        seconds = round(time.perf_counter() - began, 1)
        facts = {
            "digest": digest,
            "seconds": seconds,
            "trunk_seconds": round(data.trunk_seconds, 1),
            "peak_bytes": peak_bytes(start.model.device),
        }
        run = outcome.save_tuned(
            start,
            tuned,
            predicted,
            settings,
            runs,
            working.path,
            name=name,
            command=command,
            options=options,
            facts=facts,
        )
        working.remove()
    say(f"{outcome.tables(start, run, settings.monitor)}\nweights kept: {tuned.chosen}")
    for note in collapse_notes(run):
        say(note)
    return run
