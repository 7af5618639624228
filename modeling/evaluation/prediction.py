"""Predictions of one run or several that vote, from cached features: block by block, so that caches may be larger than
memory. And what comes of them: the submission file, the figures."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.csv_files import write_rows
from feats.errors import UsageError
from modeling.evaluation import metrics
from modeling.features.joined import FeatureSet, Rows, iter_features
from modeling.runs.files import user_file
from modeling.runs.folder import Run, load_run, newest_run, read_metrics

VOTES = ("soft", "majority")
SUBMISSION = ("guid", "tag")  # columns
TIE = "neutral"
BLOCK_ROWS = 1 << 11  # temporaries of more than some ten megabytes get fresh pages each time, at several times the cost
WRITE_ROWS = 1 << 16


@dataclass(frozen=True)
class Predictions:
    """What runs say of every row of a data set, in its order.

    `probabilities` (N, C) are the runs' mean under vote soft, the shares of votes under majority; `predicted` (N,)
    int64 are positions in `classes`. `left_out` says why rows have features for none of the runs (these get the class
    `fallback`), `partly` why others were judged by some of the runs only. `folders`: where the caches were read.
    """

    split: str
    classes: list[str]
    vote: str
    rows: Rows
    probabilities: np.ndarray
    predicted: np.ndarray
    left_out: dict[str, str]
    partly: dict[str, str]
    fallback: str
    folders: list[Path]

    def __len__(self) -> int:
        return len(self.predicted)


# -- runs -------------------------------------------------------------------------------------------------------


def open_runs(folder: Path, names: Sequence[str] | None) -> list[Run]:
    """The runs `names` (paths, or names inside `folder`); the newest in `folder` without.

    Raises `UsageError` for what is no run or is damaged, a run named twice, and runs of different classes.
    """
    if not names:
        return [load_run(newest_run(folder))]
    paths = [Path(name) if Path(name).is_dir() else folder / name for name in names]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(f"--run {' '.join(names)} names a run twice; each has one vote")
    runs = [load_run(path) for path in paths]
    for run in runs[1:]:
        if set(run.classes) != set(runs[0].classes):
            both = "; ".join(f"{r.path.name}: {', '.join(r.classes)}" for r in (runs[0], run))
            raise UsageError(f"runs of different classes can't vote together ({both}); name runs of the same data")
    return runs


def class_shares(run: Run) -> tuple[str, np.ndarray]:
    """The most common class of a run's training rows (of all folds), and each class's share (C,) of them.

    Raises `UsageError` when the run's metrics don't tell.
    """
    try:
        counted = read_metrics(run.path)["training_rows"]
        counts = np.array([counted[name] for name in run.classes], np.float64)
        return run.classes[int(counts.argmax())], counts / counts.sum()
    except (KeyError, TypeError):
        raise UsageError(f"the metrics of {run.path} don't tell how common the classes are; train again") from None


# -- predicting -------------------------------------------------------------------------------------------------


def predict(
    runs: Sequence[Run],
    folder: Path | None,
    split: str,
    *,
    vote: str = "soft",
    tie: str | None = None,
    device: torch.device | str = "cpu",
) -> Predictions:
    """What `runs` say of the caches `<folder>/<cache>_<split>.h5` of the kinds they were trained on; without `folder` in
    the one that each was trained from.

    Every row gets a prediction: one with features for some of the runs only is left to these; one without any gets
    the most common training class of the first run, with that run's class shares as probabilities. For `tie` (default:
    neutral, where that is a class) see `combine`. Raises `UsageError` for an unknown `tie`, caches that another encoder
    made than a run's, runs whose folders hold different data, and whatever keeps `features.load_features` from loading.
    """
    classes = runs[0].classes
    if tie is not None and tie not in classes:
        raise UsageError(f"--tie {tie}: no such class; there are {', '.join(classes)}")
    tie = tie or (TIE if TIE in classes else None)
    by_source: dict[_Source, list[int]] = {}
    for k, run in enumerate(runs):
        by_source.setdefault(_source(run, folder), []).append(k)
    common = _joined_rows(split, list(by_source)) if len(by_source) > 1 else None
    judged = [_judge([runs[k] for k in ks], source, split, device) for source, ks in by_source.items()]
    rows = common or judged[0].rows
    votes = np.zeros((len(runs), len(rows.ids), len(classes)))
    seen = np.zeros((len(runs), len(rows.ids)), bool)
    reasons: dict[str, str] = {}
    for ks, part in zip(by_source.values(), judged, strict=True):
        at = _positions([i for i in part.rows.ids if i not in part.left_out], rows.ids)
        for k, probabilities in zip(ks, part.probabilities, strict=True):
            votes[k, at] = probabilities[:, [runs[k].classes.index(name) for name in classes]]
            seen[k, at] = True
        reasons = part.left_out | reasons
    probabilities, predicted = combine(votes, seen, vote, None if tie is None else classes.index(tie))
    fallback = ""
    nobody = np.flatnonzero(~seen.any(0))
    if len(nobody):
        fallback, probabilities[nobody] = class_shares(runs[0])
        predicted[nobody] = classes.index(fallback)
    folders = list(dict.fromkeys(source.folder for source in by_source))
    left_out = {rows.ids[row]: reasons.pop(rows.ids[row]) for row in nobody.tolist()}
    return Predictions(split, classes, vote, rows, probabilities, predicted, left_out, reasons, fallback, folders)


def combine(votes: np.ndarray, seen: np.ndarray, vote: str, tie: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) and predictions (N,) of the runs' probabilities `votes` (R, N, C) where `seen` (R, N).

    soft: their mean, and its most probable class. majority: the share of runs that find each class the most probable,
    and the class of most votes. A tie goes to the class `tie` if it is among the tied, else to that of them with the
    highest mean probability: no row gets a class for which no run voted. Rows that no run has seen are 0.
    """
    count = np.maximum(seen.sum(0), 1)[:, None]
    mean = (votes * seen[..., None]).sum(0) / count
    shares = mean
    if vote == "majority":
        shares = (np.eye(votes.shape[2])[votes.argmax(2)] * seen[..., None]).sum(0) / count
    best = shares == shares.max(1, keepdims=True)
    predicted = np.where(best, mean, -1).argmax(1)
    if tie is not None:
        predicted[best[:, tie]] = tie
    return shares, predicted


@dataclass(frozen=True)
class _Source:
    """Where a run's features are: runs of one source share every block that is read."""

    folder: Path
    vtypes: tuple[str, ...]
    ttypes: tuple[str, ...]
    tokens: bool


@dataclass(frozen=True)
class _Judged:
    """What runs that read the same caches say: (runs, n, C) of the n rows of `rows` that aren't left out."""

    rows: Rows
    left_out: dict[str, str]
    probabilities: np.ndarray


def _judge(runs: Sequence[Run], source: _Source, split: str, device: torch.device | str) -> _Judged:
    moved = [run.to(device) for run in runs]
    blocks = iter_features(
        source.folder, split, source.vtypes, source.ttypes, block_rows=BLOCK_ROWS, tokens=source.tokens
    )
    done = 0
    for block in _read_ahead(blocks):
        if not done:
            for run in runs:
                run.check_fingerprints(block, str(source.folder))
                _check_tokens(run, block, source.folder)
            rows, left_out = block.dataset, block.left_out
            # All at once: small arrays kept from every block would sit in the gaps that blocks leave, and memory grow.
            probabilities = np.empty((len(runs), len(rows.ids) - len(left_out), len(run.classes)))
        on_device = block.to(device)
        for run, own in zip(moved, probabilities, strict=True):
            own[done : done + len(block)] = run.probabilities(on_device)
        done += len(block)
    for run, own in zip(runs, probabilities, strict=True):
        if not np.isfinite(own).all():
            raise UsageError(f"{run.path} gives probabilities that aren't finite; train again")
    return _Judged(rows, left_out, probabilities)


def _source(run: Run, folder: Path | None) -> _Source:
    caches = run.features
    return _Source(run.feature_folder(folder), tuple(caches["vtype"]), tuple(caches["ttype"]), bool(caches["tokens"]))


def _joined_rows(split: str, sources: Sequence[_Source]) -> Rows:
    """All rows of the data set that all caches must be of."""
    of_folder = {}
    for folder in dict.fromkeys(source.folder for source in sources):
        here = [source for source in sources if source.folder == folder]
        sides = ([name for source in here for name in getattr(source, side)] for side in ("vtypes", "ttypes"))
        vtypes, ttypes = (list(dict.fromkeys(names)) for names in sides)
        of_folder[folder] = next(iter_features(folder, split, vtypes, ttypes, block_rows=1)).dataset
    return _same_rows(split, of_folder)


def _same_rows(split: str, of_folder: Mapping[Path, Rows]) -> Rows:
    """The rows that every folder holds, in the first one's order. Raises `UsageError` for folders of different data."""
    (first, rows), *others = of_folder.items()
    for folder, other in others:
        common = len(set(rows.ids) & set(other.ids))
        found = f"{len(rows.ids)} and {len(other.ids)} rows, {common} in common"
        if common == len(rows.ids) == len(other.ids):
            at = _positions(rows.ids, other.ids)
            pairs = [(rows.image_hash, other.image_hash[at], 0)]
            pairs += [(np.array(rows.tags, object), np.array(other.tags, object)[at], "")]
            pictures, labels = (int(((a != b) & (a != no) & (b != no)).sum()) for a, b, no in pairs)
            if not pictures and not labels:
                continue
            found = f"the same ids, but {pictures} other pictures and {labels} other labels"
        raise UsageError(
            f"the {split} caches in {first} and {folder} are of different data ({found}), and runs vote on the same rows; "
            "name one folder that has the caches of all runs with --feats"
        )
    return rows


def _check_tokens(run: Run, features: FeatureSet, folder: Path) -> None:
    for key in {key for member in run.members for key in member.preprocessing.normalizers}:
        side, _, name = key.partition("/")
        if name not in getattr(features, side):
            raise UsageError(
                f"{run.path} reads the tokens of {name}, and the cache {name} in {folder} has none; extract it again "
                "with --tokens --overwrite"
            )


def _positions(ids: list[str], of: list[str]) -> np.ndarray | slice:
    if ids == of:
        return slice(None)
    position = {name: row for row, name in enumerate(of)}
    return np.fromiter((position[i] for i in ids), np.int64, len(ids))


def _read_ahead(blocks: Iterator[FeatureSet]) -> Iterator[FeatureSet]:
    """The same blocks; while one is worked on, a thread reads the next."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


# -- what comes of them -----------------------------------------------------------------------------------------


def write_submission(path: Path, predictions: Predictions, proba: bool = False) -> None:
    """CSV of guid and tag in the data set's order; with `proba` also a column "p_<class>" for each class.

    For what is there already see `user_file`. Raises `UsageError` when it can't be written.
    """
    names = np.array(predictions.classes, object)
    with user_file(path, SUBMISSION) as file:
        write_rows(file, [[*SUBMISSION, *(f"p_{name}" for name in names if proba)]])
        for low in range(0, len(predictions), WRITE_ROWS):
            rows = slice(low, low + WRITE_ROWS)
            columns = [predictions.rows.ids[rows], names[predictions.predicted[rows]]]
            if proba:
                columns += [map("%.6f".__mod__, column) for column in predictions.probabilities[rows].T.tolist()]
            write_rows(file, zip(*columns, strict=True))


def distribution(predictions: Predictions) -> str:
    """How many rows got each class, as a table."""
    counts = np.bincount(predictions.predicted, minlength=len(predictions.classes)).tolist()
    rows = [
        {"predicted": name, "rows": count, "share": count / len(predictions)}
        for name, count in zip(predictions.classes, counts, strict=True)
    ]
    return metrics.format_table(rows, ["predicted", "rows", "share"])


def describe_row(predictions: Predictions, row: int) -> str:
    """One row's prediction, and each class's probability."""
    probabilities = zip(predictions.classes, predictions.probabilities[row].tolist(), strict=True)
    shown = ", ".join(f"{name} {p:.3f}" for name, p in probabilities)
    return f"{predictions.classes[predictions.predicted[row]]} ({shown})"


def evaluate(predictions: Predictions, majority: str) -> dict[str, Any]:
    """`metrics.evaluate` of the rows with a label, those without features included; `majority` as there.

    Raises `UsageError` for labels that are no class of the runs."""
    classes = predictions.classes
    number = {"": -1} | {name: k for k, name in enumerate(classes)}
    foreign = sorted(set(predictions.rows.tags) - number.keys())
    if foreign:
        raise UsageError(f"labels {', '.join(foreign)} in the {predictions.split} data; expected {', '.join(classes)}")
    labels = np.array([number[tag] for tag in predictions.rows.tags], np.int64)
    known = labels >= 0
    probabilities, predicted = predictions.probabilities[known], predictions.predicted[known]
    other = np.flatnonzero(probabilities.argmax(1) != predicted)  # ties of votes; metrics.evaluate takes the first
    probabilities[other, predicted[other]] = probabilities[other].max(1) + 1e-9
    probabilities /= probabilities.sum(1, keepdims=True)
    return metrics.evaluate(labels[known], probabilities, classes, majority)


def figures_table(figures: dict[str, Any], name: str, calibrated: bool) -> str:
    """Figures of `evaluate` with their 95 % intervals and the majority baseline; log-loss and ECE if `calibrated`."""
    columns = ["rows", "n", *metrics.AVERAGES, *(["log_loss", "ece"] if calibrated else [])]
    return metrics.format_table(metrics.figure_rows(figures, name), columns)


def known_rows(runs: Sequence[Run], predictions: Predictions) -> int:
    """How many labelled rows a run was trained on, or chosen by, judging by their ids."""
    splits = [split for run in runs for split in (run.split if isinstance(run.split, list) else [run.split])]
    known = {i for split in splits for i in (*split.train, *split.val)}
    return sum(i in known for i, tag in zip(predictions.rows.ids, predictions.rows.tags, strict=True) if tag)
