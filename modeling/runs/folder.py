"""The run folder: everything a result consists of, whole or not there at all.

`config.json` (everything needed to repeat it), `head.safetensors` (weights and normalisation of every member),
`split.json` (ids), `metrics.json`, `history.csv`, `predictions_val.csv`. A run is an ensemble of one member or more:
its probabilities are the mean of its members' calibrated ones, or what a logistic regression makes of their opinions.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from feats.errors import UsageError, first_line
from feats.store import fingerprint_difference
from modeling.evaluation.metrics import softmax
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSet, Ragged
from modeling.features.splits import Split, load_split, save_split
from modeling.heads.registry import Head, HeadConfig, build_head, n_parameters
from modeling.training.fit import TrainConfig, predict_stack

FORMAT_VERSION = 1
DEFAULT_FOLDER = Path("saved/runs")
CONFIG, TENSORS, SPLIT, METRICS, HISTORY, PREDICTIONS = (
    "config.json",
    "head.safetensors",
    "split.json",
    "metrics.json",
    "history.csv",
    "predictions_val.csv",
)
LONGEST_PART = 80  # bytes of the caches in a run's name; a file system takes 255 of the whole
# What of a cache's fingerprint may differ between training and prediction: other rows, another machine. (The last two
# follow from the dtype.)
FREE_TO_DIFFER = ("data", "versions", "dtype", "views", "tokens", "image_dtype", "float32_blocks")
FLOAT64_DEVICES = ("cpu", "cuda")  # others (mps, some xpu) refuse double precision, or emulate it


@dataclass(frozen=True)
class Member:
    """One trained head (one model, on the CPU), with how its features are made and its probabilities calibrated."""

    config: TrainConfig
    head: Head
    preprocessing: Preprocessing
    widths: dict[str, int]
    temperature: float = 1.0
    group: int = 0  # stacking: members of one group (the folds of one head) speak with one voice
    best_epoch: int | None = None  # None: its head has no epochs
    facts: dict[str, Any] = field(default_factory=dict)
    fold: int | None = None  # which fold's split it was trained on, from 1

    def logits(self, features: FeatureSet, rows: torch.Tensor | None = None) -> np.ndarray:
        """(N, C) float32, of all rows or of `rows` (N,) int64. More caches than the member's own do no harm, nor do
        features on another device than the head."""
        own = self._own(features, rows).to(next(self.head.parameters()).device)
        inputs = self.preprocessing.apply(own).for_head(self.config.head)
        return predict_stack(self.head, inputs)[0].cpu().numpy()

    def _own(self, features: FeatureSet, rows: torch.Tensor | None) -> FeatureSet:
        """The tensors `logits` reads: of the member's caches and of `rows` only, without augmented views."""
        sides = {"image": ("image", "image_tokens"), "text": ("text", "text_tokens")}
        tensors = {
            name: {cache: _take(x, rows) for cache, x in getattr(features, name).items() if cache in caches}
            for side, caches in self.preprocessing.caches.items()
            for name in sides[side]
        }
        return replace(features, views={}, **tensors)

    def to(self, device: torch.device | str) -> "Member":
        """On `device`; on the CPU where the head computes in double precision and the device may not."""
        double = any(tensor.dtype == torch.float64 for tensor in self.head.state_dict().values())
        if double and torch.device(device).type not in FLOAT64_DEVICES:
            device = "cpu"
        return replace(self, head=self.head.to(device), preprocessing=self.preprocessing.to(device))


def _take(x: torch.Tensor | Ragged, rows: torch.Tensor | None) -> torch.Tensor | Ragged:
    """Some rows of features, or all of them uncopied."""
    if rows is None:
        return x
    if not isinstance(x, Ragged):
        return x[rows.to(x.device)]
    rows = rows.to(x.offsets.device)
    lengths = x.offsets.diff()[rows]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    place = torch.arange(int(offsets[-1]), device=rows.device)
    return Ragged(x.values[place + (x.offsets[rows] - offsets[:-1]).repeat_interleave(lengths)], offsets)


@dataclass(frozen=True)
class Stacking:
    """Logistic regression on the groups' opinions, fitted on rows they hadn't seen. Wolpert, Stacked Generalization,
    Neural Networks 1992. `weight` (groups * C, C) and `bias` (C,) float64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def probabilities(self, opinions: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) of each group's opinion (N, C), see `opinion`."""
        return softmax(np.concatenate(opinions, 1) @ self.weight.numpy() + self.bias.numpy())


def opinion(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities less their mean over the classes, (N, C) float64, of logits (N, C)."""
    logits = np.asarray(logits, np.float64)
    return logits - logits.mean(1, keepdims=True)


@dataclass(frozen=True)
class Run:
    """A trained classifier. `features` says which caches it reads: folder, vtype, ttype, tokens and `fingerprints`."""

    classes: list[str]
    members: list[Member]
    features: dict[str, Any]
    split: Split | list[Split]
    stacking: Stacking | None = None
    path: Path | None = None

    def probabilities(self, features: FeatureSet, rows: torch.Tensor | None = None) -> np.ndarray:
        """Calibrated class probabilities (N, C) float64 of features joined from the run's caches, or of `rows` of them."""
        logits = [m.logits(features, rows) for m in self.members]
        if self.stacking is None:
            return np.mean([softmax(z, m.temperature) for z, m in zip(logits, self.members, strict=True)], axis=0)
        groups = sorted({m.group for m in self.members})
        of_group = [[opinion(z) for z, m in zip(logits, self.members, strict=True) if m.group == g] for g in groups]
        return self.stacking.probabilities([np.mean(opinions, axis=0) for opinions in of_group])

    def to(self, device: torch.device | str) -> "Run":
        return replace(self, members=[m.to(device) for m in self.members])

    def feature_folder(self, given: Path | None = None) -> Path:
        """`given`, or else the folder of the caches the run was trained on. Raises `UsageError` when that is gone."""
        folder = Path(self.features["folder"]) if given is None else given
        if given is None and not folder.is_dir():
            raise UsageError(
                f"{self.path} was trained on caches in {folder}, and there is no such folder (now, or as seen from here); "
                "name the folder of caches with --feats"
            )
        return folder

    def check_fingerprints(self, features: FeatureSet, source: str, same_rows: bool = False) -> None:
        """Raise `UsageError` when a cache of `features` was made by another encoder than the run was trained on, or,
        with `same_rows`, holds the rows of another data set."""
        for name, cached in features.fingerprints.items():
            trained = self.features["fingerprints"].get(name, {})
            if same_rows and cached.get("data") != trained.get("data"):
                raise UsageError(
                    f"the cache {name} in {source} holds other rows than {self.path} was trained on ("
                    f"{fingerprint_difference(*({'data': f.get('data')} for f in (cached, trained)))}); name the folder of "
                    "that run's caches with --feats, or train again on these"
                )
            free = FREE_TO_DIFFER if name in self.features["ttype"] else (*FREE_TO_DIFFER, "text_clean")
            kept = [{k: v for k, v in f.items() if k not in free} for f in (cached, trained)]
            difference = fingerprint_difference(*kept)
            if difference:
                raise UsageError(
                    f"the cache {name} in {source} isn't what {self.path} was trained on ({difference}); extract it again "
                    "with the encoder of that run, or train a new head"
                )


# -- saving -----------------------------------------------------------------------------------------------------


def save_run(
    run: Run,
    folder: Path | str,
    name: str,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    predictions: tuple[Sequence[str], Sequence[str], np.ndarray],
    command: str,
    exact_name: bool = False,
) -> Path:
    """Write `run` as <folder>/<name>, with a number behind it if that is taken (unless `exact_name`: then it is
    replaced). The folder appears only when it is whole. `predictions`: ids, tags ('' unknown), probabilities (N, C).

    Raises `UsageError` when the folder can't be written.
    """
    folder = Path(folder)
    unfinished = folder / f".{socket.gethostname()}.{os.getpid()}.writing"
    try:
        _remove_leftovers(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(_tensors(run), unfinished / TENSORS)
        config = _config(run, command, _sha256(unfinished / TENSORS))
        _write_json(unfinished / CONFIG, config)
        _write_json(unfinished / METRICS, metrics)
        save_split(run.split, unfinished / SPLIT)
        _write_history(unfinished / HISTORY, history)
        write_predictions(unfinished / PREDICTIONS, *predictions, run.classes)
        if exact_name:
            shutil.rmtree(folder / name, ignore_errors=True)
        return _under_a_free_name(unfinished, folder / name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"can't write the run {folder / name}: {reason}; give another --runs folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished: of this machine's only, another's may be alive and share the
    folder."""
    for path in folder.glob(".*.writing"):
        _, _, written_by = path.stem.rpartition(f".{socket.gethostname()}.")
        if written_by.isdigit() and not _is_alive(int(written_by)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 isn't harmless
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's process, or no number of one
    return True


def _under_a_free_name(unfinished: Path, wanted: Path) -> Path:
    """Move a folder to `wanted`, with a number behind it if that is taken: another process may take it at any moment."""
    path, number = wanted, 1
    while True:
        try:
            os.replace(unfinished, path)
            return path
        except OSError:
            if not path.exists():
                raise
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")


def run_name(run: Run, when: float | None = None, label: str | None = None) -> str:
    """A name that tells runs apart: time, caches, head with D and ablation (or `label` in their place), seed."""
    config = run.members[0].config
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(when))
    caches = "_".join("+".join(run.features[side]) or "none" for side in ("vtype", "ttype"))
    head = label or f"{config.head.head}_D{config.head.D}_a{config.head.ablation}"
    count = f"_x{len(run.members)}" if len(run.members) > 1 else ""
    return f"{stamp}_{_plain(caches)}_{head}_s{config.seed}{count}"


def _plain(text: str) -> str:
    """A part of a file's name: caches may lie in folders (sub/clip), and there may be many."""
    plain = re.sub(r"[^\w+.-]+", "-", text)
    if len(plain.encode()) <= LONGEST_PART:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    # The cut may fall into a letter of several bytes, which is then left out.
    return f"{plain.encode()[: LONGEST_PART - 9].decode(errors='ignore')}-{digest}"


def _config(run: Run, command: str, sha256: str) -> dict[str, Any]:
    members = [
        {
            "train": asdict(m.config),
            "preprocessing": {
                "caches": m.preprocessing.caches,
                "scales": m.preprocessing.scales,
                "kinds": m.preprocessing.kinds,
            },
            "widths": m.widths,
            "temperature": m.temperature,
            "group": m.group,
            "best_epoch": m.best_epoch,
            "facts": m.facts,
            "fold": m.fold,
            "parameters": n_parameters(m.head),
        }
        for m in run.members
    ]
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(),
        "command": command,
        "classes": run.classes,
        "features": run.features,
        "split": [s.how for s in run.split] if isinstance(run.split, list) else run.split.how,
        "stacked": run.stacking is not None,
        "members": members,
        "tensors_sha256": sha256,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """Every member's tensors by name: "0/head/out.weight" (without the dimension of models), "0/norm/image/clip/mean";
    and "stacking/weight"."""
    tensors = {} if run.stacking is None else {f"stacking/{k}": t.contiguous() for k, t in vars(run.stacking).items()}
    for k, member in enumerate(run.members):
        tensors |= {f"{k}/head/{name}": t[0].cpu().clone() for name, t in member.head.state_dict().items()}
        tensors |= {f"{k}/norm/{name}": t.cpu().clone() for name, t in member.preprocessing.state().items()}
    return tensors


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_history(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tensorboard(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Event files of every member's history under <path>/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    for (fold, seed), rows in groupby(history, lambda row: (row["fold"], row["seed"])):
        with SummaryWriter(path / "tensorboard" / f"{f'fold{fold}_' if fold else ''}seed{seed}") as writer:
            for row in rows:
                for name, value in row.items():
                    if name not in ("fold", "seed", "epoch"):
                        writer.add_scalar(name, value, row["epoch"] or 0)  # 0: a head without epochs


def write_predictions(
    path: Path, ids: Iterable[str], tags: Iterable[str], probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """CSV of id, tag, pred and a column "p_<class>" for each class: probabilities (N, C)."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "tag", "pred", *(f"p_{name}" for name in classes)])
        for name, tag, row in zip(ids, tags, probabilities, strict=True):
            writer.writerow([name, tag, classes[int(row.argmax())], *(f"{p:.6f}" for p in row)])


def read_predictions(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Ids, tags and probabilities (N, C) that `write_predictions` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [r[0] for r in rows], [r[1] for r in rows], np.array([r[3:] for r in rows], np.float64)


# -- loading ----------------------------------------------------------------------------------------------------


def load_run(path: Path | str) -> Run:
    """Read a run, strictly: every tensor must be there, of the right shape, and none besides.

    Raises `UsageError` when it is no run, is damaged, or of another format version.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        near = ", ".join(p.name for p in list_runs(path.parent)[:5]) or "none"
        raise UsageError(f"{path} is no run: there is no {CONFIG} in it (runs beside it: {near})")
    config = read_config(path)
    try:
        if _sha256(path / TENSORS) != config["tensors_sha256"]:
            raise UsageError(f"{path / TENSORS} is damaged (its checksum isn't the one in {CONFIG}); train again")
        tensors = load_file(path / TENSORS)
        members = [_member(k, m, tensors, len(config["classes"])) for k, m in enumerate(config["members"])]
        split = load_split(path / SPLIT)
        stacking = None
        if config["stacked"]:
            stacking = Stacking(tensors.pop("stacking/weight"), tensors.pop("stacking/bias"))
        run = Run(config["classes"], members, config["features"], split, stacking, path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # torch says which tensors don't fit below its first line
        raise UsageError(f"{path} is damaged ({reason}); train again") from None
    if tensors:
        raise UsageError(
            f"{path / TENSORS} holds tensors no member has ({', '.join(sorted(tensors)[:3])}); train again"
        )
    return run


def _member(k: int, saved: dict[str, Any], tensors: dict[str, torch.Tensor], n_classes: int) -> Member:
    train = dict(saved["train"])
    config = TrainConfig(**{**train, "head": HeadConfig(**train["head"])})
    own = {
        part: {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{k}/{part}/")}
        for part in ("head", "norm")
    }
    head = build_head(config.head, saved["widths"], n_classes)
    head.load_state_dict({name.split("/", 2)[2]: t[None] for name, t in own["head"].items()})
    how = saved["preprocessing"]
    preprocessing = Preprocessing.from_state(
        how["caches"],
        how["scales"],
        how["kinds"],
        {name.split("/", 2)[2]: t for name, t in own["norm"].items()},
    )
    plain = {name: saved[name] for name in ("widths", "temperature", "group", "best_epoch", "facts", "fold")}
    return Member(config, head.eval(), preprocessing, **plain)


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json. Raises `UsageError` when it isn't there or isn't that."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / CONFIG} can't be read ({first_line(error)}); train again") from None
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{path / CONFIG} isn't of format version {FORMAT_VERSION}; train again with this version")
    return config


def is_whole(path: Path) -> bool:
    """Whether there is a run with all its files; they aren't checked beyond the config's format version."""
    if not all((path / name).is_file() for name in (CONFIG, TENSORS, SPLIT, METRICS, HISTORY, PREDICTIONS)):
        return False
    try:
        read_config(path)
    except UsageError:
        return False
    return True


def read_metrics(path: Path) -> dict[str, Any]:
    """A run's metrics.json. Raises `UsageError` when it can't be read."""
    try:
        return json.loads((path / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / METRICS} can't be read ({first_line(error)}); train again") from None


def list_runs(folder: Path | str) -> list[Path]:
    """The complete runs in `folder`, newest first. (An unfinished one is a hidden folder.)"""
    found = []
    for path in Path(folder).glob("[!.]*/" + CONFIG):
        try:
            found.append((read_config(path.parent)["created"], path.parent))
        except (UsageError, KeyError):
            continue
    return [path for _, path in sorted(found, reverse=True)]


def newest_run(folder: Path | str) -> Path:
    """Raises `UsageError` when there is none."""
    runs = list_runs(folder)
    if not runs:
        raise UsageError(
            f"no complete run in {folder}; train one with: python modeling/train_head.py --vtype clip --D 256"
        )
    return runs[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
