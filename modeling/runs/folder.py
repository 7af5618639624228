"""The run folder: everything a result consists of, whole or not there at all.

`config.json` (everything needed to repeat it), `head.safetensors` (weights and normalisation of every member),
`split.json` (ids), `metrics.json`, `history.csv`, `predictions_val.csv`; where the split has a test part
`predictions_test.csv`, where several folds have `predictions_test_1.csv` and so on, each by its fold's own members;
where losses by batch were asked for, `history_batches.csv`; where labels were corrected `corrections.csv`, where they
are of another column than the caches' `labels.csv`; of a finetuned run also its encoders, in `encoders`.
"""

import csv
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from feats.config_file import OPTIONS
from feats.csv_files import read_csv, read_table, write_csv, write_table
from feats.errors import CantWriteError, UsageError, first_line, reason_of
from feats.escapes import short_name
from feats.source import SIDES
from feats.strings import BLOCK
from feats.tensor_files import read_safetensors
from feats.writing import open_to_others, replace_folder, settle, sync_tree, unfinished_folder, write_json
from modeling.choices import ENCODERS
from modeling.features.corrections import corrections_digest, load_corrections, save_corrections
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSource
from modeling.features.stored_splits import load_split, save_split
from modeling.features.target import load_target
from modeling.heads.base import n_parameters
from modeling.heads.config import ablation_number
from modeling.heads.registry import build_head, head_shapes
from modeling.runs.config import (
    BATCHES,
    CONFIG,
    CORRECTIONS,
    FILES,
    FOLD_PREDICTIONS,
    FORMAT_VERSION,
    HISTORY,
    METRICS,
    PREDICTION_COLUMNS,
    PREDICTIONS,
    REMEDY,
    SPLIT,
    TARGET,
    TENSORS,
    TEST_PREDICTIONS,
    read_config,
    read_metrics,
    train_config,
)
from modeling.runs.listing import runs_in
from modeling.runs.run import Finetuned, FoldTest, Member, Report, Run, Stacking
from modeling.training.config import settings_read

LONGEST_PART = 80  # bytes of the caches in a run's name; a file system takes 255 of the whole


# -- saving -----------------------------------------------------------------------------------------------------


def save_run(
    run: Run,
    path: Path | str,
    *,
    overwrite: bool = False,
    numbered: bool = False,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
    encoders: Path | None = None,
) -> Run:
    """Write `run` as the folder `path`, which appears only when it is whole; returns the run as it lies there.

    Where `path` is taken it is replaced with `overwrite`, or with `numbered` gets a number behind its name. `command`
    is what the user typed, `options` what it gave, as JSON values by name, `encoders` the folder of a finetuned run's
    encoders, which moves into the run. Raises `UsageError` when it is taken otherwise, when what is to be replaced
    isn't a run, and when the folder can't be written.
    """
    path = Path(path)
    if path.exists() and overwrite:
        _check_replaceable(path)
    elif path.exists() and not numbered:
        raise UsageError(f"{path} is there already; give another name, or replace it with `overwrite`")
    report = run.report or (None if run.path is None else read_report(run.path))
    if report is None:
        raise UsageError("this run has no report of its training and can't be saved; get one from fit_head")
    try:
        with unfinished_folder(path.parent) as unfinished:
            save_file(_tensors(run), unfinished / TENSORS)
            open_to_others(unfinished / TENSORS)
            made_by = {"command": command, OPTIONS: None if options is None else dict(options)}
            config = _config(run, path, made_by, _sha256(unfinished / TENSORS))
            write_json(unfinished / CONFIG, config)
            write_json(unfinished / METRICS, report.figures)
            save_split(run.split, unfinished / SPLIT)
            write_table(unfinished / HISTORY, report.history)
            if report.batches:
                write_table(unfinished / BATCHES, report.batches)
            write_predictions(unfinished / PREDICTIONS, report.ids, report.tags, report.probabilities, run.classes)
            if report.test is not None:
                write_predictions(unfinished / TEST_PREDICTIONS, *report.test, run.classes)
            for part in report.test_folds:
                path_of_fold = unfinished / FOLD_PREDICTIONS.format(part.fold)
                write_predictions(path_of_fold, part.ids, part.tags, part.probabilities, run.classes)
            if run.target is not None:
                run.target.save(unfinished / TARGET)
            if run.corrections:
                save_corrections(run.corrections, unfinished / CORRECTIONS)
            if encoders is not None:
                shutil.move(encoders, unfinished / ENCODERS)
            sync_tree(unfinished)
            if overwrite:
                replace_folder(unfinished, path)
            else:
                path = _under_a_free_name(unfinished, path)
            return replace(run, path=path, report=report)
    except (OSError, SafetensorError) as error:
        why = f"can't write the run {path}: {reason_of(error)}"
        raise CantWriteError(f"{why}; give another folder for `runs`") from None


def _check_replaceable(path: Path) -> None:
    """Raise `UsageError` for all but a run, be it damaged, and an empty folder: whatever else lies there is somebody's,
    the runs in a folder of runs among it."""
    if path.is_dir() and (any((path / name).is_file() for name in (TENSORS, PREDICTIONS)) or not any(path.iterdir())):
        return
    raise UsageError(f"{path} is there already and is no run, so that it isn't replaced; give another name")


def _under_a_free_name(unfinished: Path, wanted: Path) -> Path:
    """Move a folder to `wanted`, with a number behind it if that is taken: another process may take it any moment."""
    path, number = wanted, 1
    while True:
        try:
            os.replace(unfinished, path)
            settle(path)
            return path
        except OSError:
            if not path.exists():
                raise
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")


def run_name(run: Run, when: float | None = None, label: str | None = None) -> str:
    """A name that tells runs apart: time, caches, head with D, where it reads it, and ablation (or `label` in their
    place), seed."""
    config = run.members[0].config
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(when))
    caches = "_".join("+".join(run.source.of(side)) or "none" for side in SIDES)
    width = f"_D{config.head.D}" if "D" in settings_read(config.head.head) else ""
    head = label or f"{config.head.head}{width}_a{ablation_number(config.head.sides)}"
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


def _config(run: Run, path: Path, made_by: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    trained_on = run.source.folder.resolve()
    try:
        from_run = os.path.relpath(trained_on, path.resolve())
    except ValueError:  # on another drive
        from_run = str(trained_on)
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
            "epochs": m.epochs,
            "facts": m.facts,
            "fold": m.fold,
            "parameters": n_parameters(m.head),
            "with_encoders": m.parameters_with_encoders(run.source),
        }
        for m in run.members
    ]
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(),
        **made_by,
        "classes": run.classes,
        "training_rows": run.training_rows,
        "features": {**asdict(run.source), "folder": str(trained_on)},
        "features_from_run": from_run,
        "split": [s.how for s in run.split] if isinstance(run.split, list) else run.split.how,
        "stacked": run.stacking is not None,
        "deterministic": all(m.config.deterministic for m in run.members),
        "finetuned": None if run.finetuned is None else asdict(run.finetuned),
        "cost": run.cost,
        "corrections": _corrections(run.corrections),
        "target": None if run.target is None else run.target.as_json(),
        "members": members,
        "tensors_sha256": sha256,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def _corrections(corrections: Mapping[str, str]) -> dict[str, Any] | None:
    """What config.json says of corrected labels; they themselves have a file of their own."""
    return {"count": len(corrections), "sha256": corrections_digest(corrections)} if corrections else None


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """Every member's tensors by name: "0/head/out.weight" (without the dimension of models), "0/norm/image/clip/mean";
    and "stacking/weight"."""
    tensors = {} if run.stacking is None else {f"stacking/{k}": t.contiguous() for k, t in vars(run.stacking).items()}
    for k, member in enumerate(run.members):
        tensors |= {f"{k}/head/{name}": t[0].cpu().clone() for name, t in member.head.state_dict().items()}
        tensors |= {f"{k}/norm/{name}": t.cpu().clone() for name, t in member.preprocessing.state().items()}
    return tensors


def write_tensorboard(run: Run) -> None:
    """Event files of every member's history under the saved run's folder, in `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    assert run.report is not None and run.path is not None
    for (fold, seed), rows in groupby(run.report.history, lambda row: (row["fold"], row["seed"])):
        with SummaryWriter(run.path / "tensorboard" / f"{f'fold{fold}_' if fold else ''}seed{seed}") as writer:
            for row in rows:
                for name, value in row.items():
                    if name not in ("fold", "seed", "epoch"):
                        writer.add_scalar(name, value, row["epoch"] or 0)  # 0: a head without epochs


def write_predictions(
    path: Path, ids: Iterable[str], tags: Iterable[str], probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """CSV of id, tag, pred and a column "p_<class>" for each class: probabilities (N, C)."""
    write_csv(path, prediction_rows(ids, tags, probabilities, classes))


def prediction_rows(
    ids: Iterable[str], tags: Iterable[str], probabilities: np.ndarray, classes: Sequence[str]
) -> Iterator[list[str]]:
    """The lines of `write_predictions`, the header first."""
    yield [*PREDICTION_COLUMNS, *(f"p_{name}" for name in classes)]
    shown = zip(ids, tags, _predicted(probabilities, classes), strict=True)
    for name, tag, predicted in shown:
        yield [name, tag, *predicted]


def _predicted(probabilities: np.ndarray, classes: Sequence[str]) -> Iterator[list[str]]:
    for low in range(0, len(probabilities), BLOCK):
        block = probabilities[low : low + BLOCK]
        for best, row in zip(block.argmax(1).tolist(), block.tolist(), strict=True):
            yield [classes[best], *map("%.6f".__mod__, row)]


def read_predictions(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Ids, tags and probabilities (N, C) that `write_predictions` wrote. Raises `UsageError` for anything else."""
    try:
        header, *rows = read_csv(path)
        probabilities = np.array([r[3:] for r in rows], np.float64).reshape(len(rows), len(header) - 3)
        return [r[0] for r in rows], [r[1] for r in rows], probabilities
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise UsageError(
            f"{path} can't be read as predictions ({first_line(error)}); remove its folder and train again"
        ) from None


# -- loading ----------------------------------------------------------------------------------------------------


def load_run(path: Path | str) -> Run:
    """Read a run, strictly: every tensor must be there, of the right shape, and none besides.

    Raises `UsageError` when it is no run, is damaged, or of another format version.
    """
    path = Path(path)
    if not (path / CONFIG).exists():
        beside = [p.name for p in runs_in(path.parent)[0]]
        close = get_close_matches(path.name, beside, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        near = ", ".join(beside[:5]) or "none"
        raise UsageError(f"{path} is no run: there is no {CONFIG} in it{hint} (runs beside it: {near})")
    config = read_config(path)
    _check_plain(path)
    try:
        if _sha256(path / TENSORS) != config["tensors_sha256"]:
            raise UsageError(f"{path / TENSORS} is damaged (its checksum isn't the one in {CONFIG}); train again")
        tensors = read_safetensors(path / TENSORS, REMEDY)
        members = [_member(k, m, tensors, len(config["classes"])) for k, m in enumerate(config["members"])]
        split = load_split(path / SPLIT)
        stacking = None
        if config["stacked"]:
            stacking = Stacking(tensors.pop("stacking/weight"), tensors.pop("stacking/bias"))
            _check_stacking(stacking, len({m.group for m in members}), len(config["classes"]))
        source, nearby = _source(config["features"]), (path / config["features_from_run"]).resolve()
        tuned = config.get("finetuned")
        finetuned = None if tuned is None else Finetuned(**tuned)
        corrections = load_corrections(path / CORRECTIONS, config["corrections"]) if config.get("corrections") else {}
        target = load_target(path / TARGET, config["target"]) if config.get("target") else None
        run = Run(
            config["classes"],
            members,
            source,
            split,
            config["training_rows"],
            stacking,
            finetuned,
            path,
            nearby,
            cost=config.get("cost"),
            corrections=corrections,
            target=target,
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]  # torch says which tensors don't fit below its first line
        raise UsageError(f"{path} is damaged ({reason}); train again") from None
    if tensors:
        raise UsageError(
            f"{path / TENSORS} holds tensors no member has ({short_name(', '.join(sorted(tensors)[:3]))}); train again"
        )
    return run


def _check_plain(path: Path) -> None:
    """Raise `UsageError` where a run's file is none: a pipe would be waited for."""
    for name in (*FILES, CORRECTIONS, TARGET):
        if (path / name).exists() and not (path / name).is_file():
            raise UsageError(f"{path} is damaged ({name} is no regular file); train again")


def _check_stacking(stacking: Stacking, groups: int, classes: int) -> None:
    """Raise `ValueError` for tensors that don't speak of so many groups' opinions."""
    shapes = {"weight": (groups * classes, classes), "bias": (classes,)}
    for name, shape in shapes.items():
        tensor = getattr(stacking, name)
        if tuple(tensor.shape) != shape or not _is_finite(tensor):
            raise ValueError(f"stacking/{name} isn't {shape} of finite numbers")


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())


def _source(saved: Mapping[str, Any]) -> FeatureSource:
    names = {side: tuple(saved[side]) for side in SIDES}
    return FeatureSource(**{**saved, "folder": Path(saved["folder"]), **names})


def _member(k: int, saved: dict[str, Any], tensors: dict[str, torch.Tensor], n_classes: int) -> Member:
    config = train_config(saved["train"])
    own = {
        part: {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{k}/{part}/")}
        for part in ("head", "norm")
    }
    state = {name.split("/", 2)[2]: t[None] for name, t in own["head"].items()}
    _check_state(state, head_shapes(config.head, saved["widths"], n_classes))
    head = build_head(config.head, saved["widths"], n_classes)
    head.load_state_dict(state)
    how = saved["preprocessing"]
    preprocessing = Preprocessing.from_state(
        {side: how["caches"][side] for side in SIDES},
        how["scales"],
        how["kinds"],
        {name.split("/", 2)[2]: t for name, t in own["norm"].items()},
    )
    _check_statistics(preprocessing)
    plain = {name: saved[name] for name in ("widths", "temperature", "group", "best_epoch", "facts", "fold")}
    return Member(config, head.eval(), preprocessing, **plain, epochs=saved.get("epochs"))


def _check_statistics(preprocessing: Preprocessing) -> None:
    """Raise `ValueError` for means and deviations that aren't finite numbers of one width."""
    for key, normalizer in preprocessing.normalizers.items():
        mean, std = normalizer.mean, normalizer.std
        if mean is None or std is None:
            continue
        fit = mean.dim() == 1 and mean.shape == std.shape and _is_finite(mean) and _is_finite(std)
        if not fit or not bool((std > 0).all()):
            raise ValueError(f"mean and std of {short_name(key)} aren't finite numbers of one width")


def _check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise `ValueError` for other tensors than a head's, before memory is taken for one."""
    for name in [*expected, *state]:
        if name not in state:
            raise ValueError(f"there is no tensor {name}")
        if name not in expected:
            raise ValueError(f"there is a tensor {short_name(name)}, and the head has none of this name")
        if state[name].shape != expected[name]:
            found, wanted = (tuple(shape[1:]) for shape in (state[name].shape, expected[name]))
            raise ValueError(f"the tensor {name} is {found}, expected {wanted}")
        if not _is_finite(state[name]):
            raise ValueError(f"the tensor {name} holds what isn't a finite number")


def read_report(path: Path) -> Report:
    """What a saved run's training said. Raises `UsageError` when its files can't be read."""
    try:
        test = read_predictions(path / TEST_PREDICTIONS) if (path / TEST_PREDICTIONS).is_file() else None
        folds = sorted({m["fold"] for m in read_config(path)["members"] if m["fold"]})
        files = {fold: path / FOLD_PREDICTIONS.format(fold) for fold in folds}
        of_folds = [FoldTest(fold, *read_predictions(file)) for fold, file in files.items() if file.is_file()]
        batches = read_table(path / BATCHES) if (path / BATCHES).is_file() else []
        told, history = read_predictions(path / PREDICTIONS), read_table(path / HISTORY)
        return Report(*told, read_metrics(path), history, test, of_folds, batches)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}); train again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
