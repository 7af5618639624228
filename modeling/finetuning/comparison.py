"""Finetuning against the frozen head it begins with: the same folds, one budget, each training a run of its own.

    <folder>/comparison.json        what the comparison is; another one is refused
    <folder>/fold1/frozen/          the head on cached features
    <folder>/fold1/lp_ft_.../       a finetuning, its name told by all that decides it; lp_ft_....log: what it said
    <folder>/table.csv, table.md    see `modeling.finetuning.verdict`

Of each outer fold the rows are tested; of the others a share validates (epochs, soups, temperature, points of a grid)
and the rest trains.
"""

import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from feats.acceleration import peak_bytes
from feats.errors import UsageError
from feats.escapes import short_name
from feats.interrupts import held_back
from feats.json_files import read_json
from feats.orphans import end_with
from feats.writing import cant_write, write_json
from modeling.choices import METHODS
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import run_of, train_all
from modeling.features.dealing import deal_folds, deal_split
from modeling.features.stored_splits import Split
from modeling.finetuning.settings import TuneSettings
from modeling.runs.config import TEST_PREDICTIONS, is_whole
from modeling.runs.folder import save_run
from modeling.runs.run import Run
from modeling.search.sweep import data_digest
from modeling.training.config import TrainConfig

FROZEN = "frozen"
SETTINGS = "comparison.json"
STARTED = "started: "  # a line of a cell's log for each time it was begun
GRACE = 30.0  # seconds that an interrupted finetuning has to end by itself


# -- what is compared -------------------------------------------------------------------------------------------


def settings_of(method: str, settings: TuneSettings) -> TuneSettings:
    """A method's settings under the common ones. lp_ft begins with the frozen head and tunes all; last-N and lora-R
    tune that part; full begins with a new head; soup is lp_ft with a greedy soup of all epochs and WiSE-FT. Raises
    `UsageError` for an unknown method."""
    if not method.startswith("lora-"):
        settings = replace(settings, lora_alpha=None)  # it would tell no method's trainings apart but LoRA's
    if method in ("lp_ft", "full"):
        return settings
    if method == "soup":
        return replace(settings, soup=settings.ep, wise_ft=True)
    found = re.fullmatch(r"(last|lora)-([1-9]\d*)", method)
    if found is None:
        raise UsageError(
            f"unknown method {method!r} in `methods`; there are {', '.join(METHODS)}, any last-N and lora-R"
        )
    return replace(settings, tune=method) if found[1] == "last" else replace(settings, lora=int(found[2]))


def begins_with_new_head(method: str) -> bool:
    """Whether a method leaves the frozen head out."""
    return method == "full"


@dataclass(frozen=True)
class Candidate:
    """One finetuning, on every fold: a method at a `point` of the grid. `dropout` is the head's (None: as the run's).
    Without `settings` it is the frozen head."""

    method: str
    settings: TuneSettings | None = None
    dropout: float | None = None
    point: Mapping[str, Any] = field(default_factory=dict)  # what the grid varies
    besides: Mapping[str, Any] = field(default_factory=dict)  # what else decides it

    @property
    def name(self) -> str:
        """Its runs' name: what one can read of it, and a hash of all that decides it."""
        if self.settings is None:
            return FROZEN
        decides = {**asdict(self.settings), "dropout": self.dropout, **self.besides, "method": self.method}
        del decides["checkpoint_steps"]
        decides["micro_bs"] = None  # how it fits into memory: with less, finished cells and checkpoints serve on
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
        s = self.settings
        return f"{self.method}_lr{s.lr:g}_bs{s.bs}_ep{s.ep}_{digest}"


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    candidate: Candidate
    fold: int  # from 1
    folder: Path  # of the comparison

    @property
    def path(self) -> Path:
        """Its run."""
        return self.folder / f"fold{self.fold}" / self.candidate.name

    @property
    def log(self) -> Path:
        """What its finetuning says."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def frozen(self) -> Path:
        """The run of the frozen head that it begins with."""
        return self.path.with_name(FROZEN)

    @property
    def done(self) -> bool:
        """Whether its run is there. Raises `UsageError` when something else lies there."""
        whole = is_whole(self.path) and (self.path / TEST_PREDICTIONS).is_file()
        if not whole and self.path.exists() and self.candidate.method != FROZEN:
            raise UsageError(f"{self.path} is damaged; remove it, and run the command again to train it anew")
        return whole


def cells_of(candidates: Sequence[Candidate], folds: int, folder: Path) -> list[Cell]:
    """Every candidate on the first `folds` folds, fold after fold, the frozen head first. Raises `UsageError` when one
    is named twice."""
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UsageError(f"{twice} is to be trained twice; name each of `methods` and of a grid's values once")
    return [Cell(candidate, fold, folder) for fold in range(1, folds + 1) for candidate in candidates]


# -- folds ------------------------------------------------------------------------------------------------------


def outer_folds(experiment: Experiment, folds: int, val_ratio: float, seed: int) -> Experiment:
    """The experiment on `folds` splits of its labelled rows: each row in the test part of exactly one; of a fold's
    other rows `val_ratio` are in the validation part. Stratified and seeded, duplicates together, the same whichever
    caches were joined (what is in quarantine is left out afterwards). Raises `UsageError` as `deal_folds`."""
    data = experiment.features
    tag_of = {i: tag for i, tag in zip(data.dataset.ids, data.dataset.tags, strict=True) if tag}
    ids, tags = list(tag_of), list(tag_of.values())
    splits = []
    for k, fold in enumerate(deal_folds(ids, tags, folds, seed, experiment.groups(ids)), start=1):
        rest = fold.train
        inner = deal_split(rest, [tag_of[i] for i in rest], val_ratio, seed, experiment.groups(rest))
        how = {**inner.how, "folds": folds, "fold": k}
        splits.append(Split(inner.train, inner.val, fold.val, how).without(data.left_out))
    return replace(experiment, splits=splits, classes=sorted(set(tags)))


def claim(folder: Path, experiment: Experiment, config: TrainConfig, **protocol: Any) -> None:
    """Note in `folder` what is compared in it. Raises `UsageError` when that is another head, protocol, kind of device
    or data: figures of both mustn't meet in one table."""
    data = data_digest(replace(experiment, splits=[]))
    wanted = {**protocol, "device": experiment.device.type, "frozen head": asdict(config), "data": data}
    wanted = json.loads(json.dumps(wanted))
    file = folder / SETTINGS
    if not file.exists():
        write_json(file, wanted)
        return
    found = read_json(file, f"give another `name`, or remove {folder} to begin anew")
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing:
        facts = [
            key
            if isinstance(wanted.get(key), dict) or key == "data"
            else f"{key} {found.get(key)}, now {wanted.get(key)}"
            for key in differing
        ]
        raise UsageError(
            f"{folder} holds another comparison ({short_name('; '.join(facts), 400)}); give another `name`"
        )


# -- trainings --------------------------------------------------------------------------------------------------


def train_frozen(
    cell: Cell,
    config: TrainConfig,
    experiment: Experiment,
    *,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Train the head on the cached features of the cell's fold and save its run. Raises `UsageError` when it
    diverges."""
    of_fold = replace(experiment, splits=[experiment.splits[cell.fold - 1]])
    if experiment.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(experiment.device)
    began = time.perf_counter()
    outcomes = [outcome for _, found in train_all([config], of_fold) for outcome in found]
    facts = {"seconds": round(time.perf_counter() - began, 1), "peak_bytes": peak_bytes(experiment.device)}
    outcomes = [replace(o, member=replace(o.member, facts={**o.member.facts, **facts})) for o in outcomes]
    return save_run(run_of(outcomes, of_fold), cell.path, overwrite=True, command=command, options=options)


def finetune(cell: Cell, command: Sequence[str]) -> None:
    """Run a script with its arguments, which must leave the cell's run, as a process of its own, so that its peak
    memory is its own. An interruption ends it, too; what it has done is in its checkpoints.

    Raises `UsageError` with its last error when it fails.
    """
    _begin_log(cell, command)
    code = f"import feats.threads; from {__name__} import run_script; run_script({os.getpid()})"
    with cell.log.open("a+b") as log:
        before = log.tell()
        process = None
        try:
            with held_back():
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code, *command],
                    # A script's own path, which -P and -c would not give: it must import the very same packages.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # where a terminal's Ctrl-C doesn't reach: this process passes it on, once
                )
            status = process.wait()
        finally:
            if process is not None and process.poll() is None:
                _end(process)
        log.seek(before)
        said = log.read().decode(errors="replace").splitlines()
    if status or not cell.done:
        reason = _reason(status, said)
        raise UsageError(f"{cell.candidate.name} of fold {cell.fold} failed: {reason} (all it said: {cell.log})")


def _begin_log(cell: Cell, command: Sequence[str]) -> None:
    try:
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            log.write(f"{STARTED}{' '.join(command)}\n".encode())
    except OSError as error:
        raise cant_write(cell.log, error) from None


def run_script(parent: int) -> None:
    """What a process does: run the script that its arguments name as if it had been started by itself, and end with
    the process that started it."""
    end_with(parent, signal.SIGTERM)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(status: int, said: Sequence[str]) -> str:
    if status < 0:
        want = ", for want of memory as a rule" if status == -signal.SIGKILL else ""
        return f"it was ended by signal {-status}{want}"
    errors = [line for line in said if line.startswith("error: ")] or [line for line in said if line.strip()]
    if not errors:
        return f"exit status {status}"
    # Where weights are missing, the places tried stand in the lines below it, and a command for this cell alone.
    return errors[-1].removeprefix("error: ").replace("; tried:", "; say where some are with `weights` NAME=PATH")
