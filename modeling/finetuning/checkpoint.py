"""The working folder of a finetuning: what an interrupted one goes on from.

    <folder>/settings.json      what the finetuning is; another one is refused
    <folder>/step-00000042/     tensors.safetensors, state.json: all that the rest of the steps depends on
    <folder>/epoch-0003/        tensors.safetensors: the tuned weights as they were after an epoch

A folder in it appears only when it is whole and on disk, and only then is its predecessor removed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from feats.errors import CantWriteError, UsageError, reason_of
from feats.escapes import short_name
from feats.json_files import read_json
from feats.tensor_files import read_safetensors
from feats.writing import replace_folder, sync_tree, write_json

SETTINGS, TENSORS, STATE = "settings.json", "tensors.safetensors", "state.json"
FORMAT = 2  # of what a checkpoint holds

Tensors = dict[str, torch.Tensor]


class WorkFolder:
    """Use it in a `with` block, which keeps other processes out. `writes`: whether this process is the one that writes
    (see `modeling.finetuning.distributed.Team`).

    Raises `UsageError` when the folder holds another finetuning, is in use, or can't be written.
    """

    def __init__(self, path: Path, what: Mapping[str, Any], writes: bool = True):
        self.path, self.what, self.writes = path, json.loads(json.dumps({"format": FORMAT, **what})), writes
        self.lock = FileLock(path / "lock", timeout=0)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._steps())

    def __enter__(self) -> "WorkFolder":
        with self._disk("begun"):
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    self.lock.acquire()
                except Timeout:
                    raise UsageError(f"another process is at work in {self.path}; wait for it, or stop it") from None
                try:
                    self._check_settings()
                except BaseException:
                    self.lock.release()
                    raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.lock.release()

    def _check_settings(self) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            write_json(file, self.what)
            return
        found = read_json(file, f"remove {self.path} to begin anew")
        found, wanted = _flat(found), _flat(self.what)
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            facts = [f"{k} {json.dumps(found.get(k))}, now {json.dumps(wanted.get(k))}" for k in differing[:5]]
            told = short_name("; ".join(facts), 400)
            raise UsageError(
                f"{self.path} holds checkpoints of another finetuning ({told}); give another "
                "`name`, or remove that folder to begin anew"
            )

    def save_step(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """A checkpoint after `step` steps; older ones are removed when it is on disk."""
        if not self.writes:
            return
        older = self._steps()
        with self._new(f"step-{step:08d}") as folder:
            _save_tensors(tensors, folder / TENSORS)
            (folder / STATE).write_text(json.dumps(state))
        for path in older:
            if path != self.path / f"step-{step:08d}":
                shutil.rmtree(path, ignore_errors=True)

    def load_step(self, device: torch.device) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest checkpoint, or None. Raises `UsageError` when it is damaged."""
        for path in reversed(self._steps()):
            remedy = f"remove {self.path} to begin anew"
            return read_safetensors(path / TENSORS, remedy, str(device)), read_json(path / STATE, remedy)
        return None

    def save_epoch(self, epoch: int, tensors: Tensors) -> None:
        """The tuned weights after an epoch."""
        if self.writes:
            with self._new(f"epoch-{epoch:04d}") as folder:
                _save_tensors(tensors, folder / TENSORS)

    def load_epoch(self, epoch: int, device: torch.device) -> Tensors:
        """What `save_epoch` wrote. Raises `UsageError` when it is damaged."""
        remedy = f"remove {self.path} to begin anew"
        return read_safetensors(self.path / f"epoch-{epoch:04d}" / TENSORS, remedy, str(device))

    def keep_epochs(self, wanted: list[int]) -> None:
        """Remove the weights of all other epochs."""
        if self.writes:
            for path in self.path.glob("epoch-????"):
                if int(path.name.removeprefix("epoch-")) not in wanted:
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """All of it: the finetuning is done."""
        if self.writes:
            shutil.rmtree(self.path, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.path.glob("step-????????"))

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        unfinished = self.path / f"{name}.writing"
        with self._disk("gone on with"):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                yield unfinished
                sync_tree(unfinished)
                replace_folder(unfinished, self.path / name)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise

    @contextmanager
    def _disk(self, state: str) -> Iterator[None]:
        """What can't be written, in words that tell what is left."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            steps = self._steps() if self.path.is_dir() else []
            left = f"the checkpoint {steps[-1]} is intact" if steps else "there is no checkpoint yet"
            raise CantWriteError(
                f"a checkpoint in {self.path} can't be {state} ({reason_of(error)}); {left}: make room there, or "
                "give another folder with `runs`, and run the same command again"
            ) from None


def _flat(what: Mapping[str, Any]) -> dict[str, Any]:
    """{"settings": {"lr": 1}} as {"settings.lr": 1}: so that what differs is named alone."""
    found: dict[str, Any] = {}
    for key, value in what.items():
        below = _flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): x for name, x in below.items()}
    return found


def _save_tensors(tensors: Tensors, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)  # it takes no channels_last
