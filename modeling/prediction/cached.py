"""Predictions of one run or several that vote, from cached features: block by block, so that caches may be larger than
memory. And what comes of them: the submission file, the figures."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.csv_files import Writable, write_rows
from feats.errors import UsageError
from feats.source import SIDES
from feats.strings import BLOCK
from modeling.choices import TIE, VoteSettings
from modeling.evaluation import metrics, text_tables
from modeling.features.joined import FeatureSet, FeatureSource, Rows
from modeling.features.loading import differing_labels, iter_features
from modeling.features.target import RAW
from modeling.runs.files import check_replaceable, user_file
from modeling.runs.run import Run

SUBMISSION = ("guid", "tag")  # columns
FORMATS = {"csv": None, "json": '[\n{"guid": ', "jsonl": '{"guid": '}  # and how their files begin, of CSV by the header
BLOCK_ROWS = 1 << 11  # temporaries of more than some ten megabytes get fresh pages each time, at several times the cost
WRITE_ROWS = 1 << 16


@dataclass(frozen=True)
class Predictions:
    """What runs say of every row of a data set, in its order.

    `probabilities` (N, C) are the runs' mean under vote soft, the shares of votes under majority; `predicted` (N,)
    int64 are positions in `classes`. `left_out` says why rows have features for none of the runs (these get the class
    `fallback`), `partly` why others were judged by some of the runs only.
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
    folders: list[Path]  # where the caches lie
    corrected: int = 0  # of the rows' labels, those that runs know better than the caches

    def __len__(self) -> int:
        return len(self.predicted)


# -- predicting -------------------------------------------------------------------------------------------------


def predict_caches(
    runs: Sequence[Run],
    folder: Path | None,
    split: str,
    voting: VoteSettings = VoteSettings(),
    device: torch.device | str = "cpu",
) -> Predictions:
    """What `runs` say of the caches `<folder>/<cache>_<split>.h5` of the kinds they were trained on; without `folder`
    in the one that each was trained from.

    Every row gets a prediction: one with features for some of the runs only is left to these; one without any gets
    the most common training class of the first run, with that run's class shares as probabilities. For ties see
    `combine`. Raises `UsageError` for an unknown `tie`, caches that another encoder made than a run's, runs whose
    folders hold different data, and whatever keeps `joined.load_features` from loading.
    """
    classes = runs[0].classes
    if voting.tie is not None and voting.tie not in classes:
        raise UsageError(f"`tie` {voting.tie}: no such class; there are {', '.join(classes)}")
    targets = {run.target.column if run.target else None for run in runs}
    if len(targets) > 1:
        names = ", ".join(sorted(name or "those of the caches" for name in targets))
        raise UsageError(f"the runs were trained on different labels ({names}); predict with one at a time")
    target = runs[0].target
    tie = voting.tie or (TIE if TIE in classes else None)
    by_source: dict[FeatureSource, list[int]] = {}
    for k, run in enumerate(runs):
        by_source.setdefault(_caches_of(run, folder), []).append(k)
    common = _joined_rows(split, list(by_source)) if len(by_source) > 1 else None
    judged = [_judge([runs[k] for k in ks], source, split, device) for source, ks in by_source.items()]
    rows = common or judged[0].rows
    if target is not None and split != RAW:
        rows = replace(rows, tags=target.tags(split, rows.ids))
    votes = np.zeros((len(runs), len(rows.ids), len(classes)), np.float64)
    seen = np.zeros((len(runs), len(rows.ids)), bool)
    reasons: dict[str, str] = {}
    own_labels = [own for part in judged for own in part.own_labels]
    for ks in by_source.values():
        part = judged.pop(0)  # its probabilities are as large as what becomes of them
        at = part.kept if part.rows.ids == rows.ids else rows.ids.positions(part.rows.ids[part.kept])
        for k, probabilities in zip(ks, part.probabilities, strict=True):
            for c, name in enumerate(classes):
                votes[k, at, c] = probabilities[:, runs[k].classes.index(name)]
            seen[k, at] = True
        reasons = part.left_out | reasons
        del part, probabilities
    probabilities, predicted = combine(votes, seen, voting.vote, None if tie is None else classes.index(tie))
    del votes
    fallback = ""
    nobody = np.flatnonzero(~seen.any(0))
    if len(nobody):
        fallback = runs[0].majority
        counts = np.array([runs[0].training_rows[name] for name in classes], np.float64)
        probabilities[nobody] = counts / counts.sum()
        predicted[nobody] = classes.index(fallback)
    folders = list(dict.fromkeys(source.folder for source in by_source))
    left_out = {rows.ids[row]: reasons.pop(rows.ids[row]) for row in nobody.tolist()}
    labels = _own_labels(own_labels)
    if labels:
        at = rows.ids.positions(list(labels))
        changed = [label for label, row in zip(labels.values(), at, strict=True) if row >= 0]
        rows = replace(rows, tags=rows.tags.with_changes(at[at >= 0], changed))
    return Predictions(
        split, classes, voting.vote, rows, probabilities, predicted, left_out, reasons, fallback, folders, len(labels)
    )


def combine(votes: np.ndarray, seen: np.ndarray, vote: str, tie: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) and predictions (N,) of the runs' probabilities `votes` (R, N, C) where `seen` (R, N).

    soft: their mean, and its most probable class. majority: the share of runs that find each class the most probable,
    and the class of most votes. A tie goes to the class `tie` if it is among the tied, else to that of them with the
    highest mean probability: no row gets a class for which no run voted. Rows that no run has seen are 0.
    """
    shares, predicted = np.empty(votes.shape[1:]), np.empty(votes.shape[1], np.int64)
    for low in range(0, votes.shape[1], BLOCK):  # what is computed on the way is several times as large as the votes
        block = slice(low, low + BLOCK)
        shares[block], predicted[block] = _combined(votes[:, block], seen[:, block], vote, tie)
    return shares, predicted


def _combined(votes: np.ndarray, seen: np.ndarray, vote: str, tie: int | None) -> tuple[np.ndarray, np.ndarray]:
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
class _Judged:
    """What runs that read the same caches say: (runs, n, C) of the n rows of `rows` that aren't left out, `kept`."""

    rows: Rows
    kept: np.ndarray
    left_out: dict[str, str]
    probabilities: np.ndarray
    own_labels: list[Mapping[str, str]]  # of each run


def _own_labels(of_runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The labels that runs were trained with in place of the caches', by id; a warning where runs differ."""
    labels: dict[str, str] = {}
    differing = set()
    for own in of_runs:
        differing |= {name for name, label in own.items() if labels.setdefault(name, label) != label}
    if differing:
        warnings.warn(
            f"{len(differing)} labels are corrected differently by the runs, e.g. {min(differing)}: figures go by the "
            "first run that corrects them",
            stacklevel=2,
        )
    return labels


def _judge(runs: Sequence[Run], source: FeatureSource, split: str, device: torch.device | str) -> _Judged:
    moved = [run.to(device) for run in runs]
    blocks = iter_features(source, split, block_rows=BLOCK_ROWS)
    done = 0
    for block in _read_ahead(blocks):
        if not done:
            for run in runs:
                run.check(block)
            rows, left_out = block.dataset, block.left_out
            own_labels = [run.own_labels(block) for run in runs]
            # All at once: small arrays kept from every block would sit in the gaps that blocks leave, and memory grow.
            probabilities = np.empty((len(runs), len(rows.ids) - len(left_out), len(run.classes)))
        on_device = block.to(device)
        for run, own in zip(moved, probabilities, strict=True):
            own[done : done + len(block)] = run.probabilities(on_device)
        done += len(block)
    for run, own in zip(runs, probabilities, strict=True):
        if not np.isfinite(own).all():
            raise UsageError(f"{run.path} gives probabilities that aren't finite; train again")
    kept = np.ones(len(rows.ids), bool)
    kept[rows.ids.positions(list(left_out))] = False
    return _Judged(rows, np.flatnonzero(kept), left_out, probabilities, own_labels)


def _caches_of(run: Run, folder: Path | None) -> FeatureSource:
    """Where a run's features are: runs of one source share every block that is read."""
    return replace(run.source, folder=run.feature_folder(folder), fingerprints={})


def _joined_rows(split: str, sources: Sequence[FeatureSource]) -> Rows:
    """All rows of the data set that all caches must be of."""
    of_folder = {}
    for folder in dict.fromkeys(source.folder for source in sources):
        here = [source for source in sources if source.folder == folder]
        image, text = (tuple(dict.fromkeys(name for s in here for name in s.of(side))) for side in SIDES)
        of_folder[folder] = next(iter_features(FeatureSource(folder, image, text), split, block_rows=1)).dataset
    return _same_rows(split, of_folder)


def _same_rows(split: str, of_folder: Mapping[Path, Rows]) -> Rows:
    """The rows that every folder holds, in the first one's order. Raises `UsageError` for folders of different data."""
    (first, rows), *others = of_folder.items()
    for folder, other in others:
        at = other.ids.positions(rows.ids)
        common = int((at >= 0).sum())
        found = f"{len(rows.ids)} and {len(other.ids)} rows, {common} in common"
        if common == len(rows.ids) == len(other.ids):
            own, theirs = rows.image_hash, other.image_hash[at]
            pictures = int(((own != theirs) & (own != 0) & (theirs != 0)).sum())
            labels = int(differing_labels(rows.tags, other.tags[at]).sum())
            if not pictures and not labels:
                continue
            found = f"the same ids, but {pictures} other pictures and {labels} other labels"
        raise UsageError(
            f"the {split} caches in {first} and {folder} are of different data ({found}), and runs vote on the same "
            "rows; name one folder that has the caches of all runs with `feats`"
        )
    return rows


def _read_ahead(blocks: Iterator[FeatureSet]) -> Iterator[FeatureSet]:
    """The same blocks; while one is worked on, a thread reads the next."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


# -- what comes of them -----------------------------------------------------------------------------------------


def check_submission(path: Path, form: str = "csv", own: bool = False) -> None:
    """Raise `UsageError` for what `write_submission` doesn't write over."""
    check_replaceable(path, SUBMISSION, own=own, begins=FORMATS[form])


def write_submission(
    path: Path,
    predictions: Predictions,
    proba: bool = False,
    *,
    header: bool = True,
    own: bool = False,
    form: str = "csv",
    safe: bool = False,
) -> None:
    """The file that `write_predictions` fills. For what is there already see `user_file`. Raises `UsageError` when it
    can't be written."""
    with user_file(path, SUBMISSION, own=own, begins=FORMATS[form]) as file:
        write_predictions(file, predictions, proba, header=header, form=form, safe=safe)


def write_predictions(
    file: Writable,
    predictions: Predictions,
    proba: bool = False,
    *,
    header: bool = True,
    form: str = "csv",
    safe: bool = False,
) -> None:
    """Guid and tag of each row in the data set's order, in a format of `FORMATS`.

    csv: with `proba` also a column "p_<class>" for each class; without `header` its first line, the columns' names, is
    left out, and `safe` is as in `write_rows`. json: a list of objects {"guid", "tag"}, with `proba` also
    "probabilities" {class: p}; jsonl: one a line.
    """
    names = np.array(predictions.classes, object)
    if form == "csv" and header:
        write_rows(file, [[*SUBMISSION, *(f"p_{name}" for name in names if proba)]], safe=safe)
    for low in range(0, len(predictions), WRITE_ROWS):
        rows = slice(low, low + WRITE_ROWS)
        columns = [predictions.rows.ids[rows], names[predictions.predicted[rows]]]
        probabilities = predictions.probabilities[rows]
        if form != "csv":
            _write_objects(file, predictions, zip(*columns, probabilities.tolist(), strict=True), proba, form, low)
            continue
        if proba:
            columns += [map("%.6f".__mod__, column) for column in probabilities.T.tolist()]
        write_rows(file, zip(*columns, strict=True), safe=safe)
    if form == "json":
        file.write("\n]\n" if len(predictions) else "[]\n")


def _write_objects(
    file: Writable,
    predictions: Predictions,
    rows: Iterable[tuple[str, str, list[float]]],
    proba: bool,
    form: str,
    before: int,
) -> None:
    """Some rows as JSON, `before` so many of which others were written."""
    for k, (name, tag, probabilities) in enumerate(rows, before):
        row: dict[str, Any] = dict(zip(SUBMISSION, (name, tag), strict=True))
        if proba:
            row["probabilities"] = {of: round(p, 6) for of, p in zip(predictions.classes, probabilities, strict=True)}
        line = json.dumps(row, ensure_ascii=False)
        file.write(f"{line}\n" if form == "jsonl" else f"{',' if k else '['}\n{line}")


def distribution_table(predictions: Predictions) -> str:
    """How many rows got each class, as a table."""
    counts = np.bincount(predictions.predicted, minlength=len(predictions.classes)).tolist()
    rows = [
        {"predicted": name, "rows": count, "share": count / len(predictions)}
        for name, count in zip(predictions.classes, counts, strict=True)
    ]
    return text_tables.format_table(rows, ["predicted", "rows", "share"])


def row_line(predictions: Predictions, row: int) -> str:
    """One row's prediction, and each class's probability."""
    probabilities = zip(predictions.classes, predictions.probabilities[row].tolist(), strict=True)
    shown = ", ".join(f"{name} {p:.3f}" for name, p in probabilities)
    return f"{predictions.classes[predictions.predicted[row]]} ({shown})"


def figures_of(predictions: Predictions, majority: str) -> dict[str, Any]:
    """`metrics.figures` of the rows with a label, those without features included; `majority` as there.

    Raises `UsageError` for labels that are no class of the runs."""
    classes = predictions.classes
    foreign = sorted(set(predictions.rows.tags.counts()) - {"", *classes})
    if foreign:
        raise UsageError(f"labels {', '.join(foreign)} in the {predictions.split} data; expected {', '.join(classes)}")
    labels = predictions.rows.tags.numbers(classes)
    known = labels >= 0
    probabilities, predicted = predictions.probabilities, predictions.predicted
    if not known.all():
        labels, probabilities, predicted = labels[known], probabilities[known], predicted[known]
    other = np.flatnonzero(probabilities.argmax(1) != predicted)  # ties of votes; metrics.figures takes the first
    if len(other):
        probabilities = probabilities.copy()
        probabilities[other, predicted[other]] = probabilities[other].max(1) + 1e-9
        probabilities[other] /= probabilities[other].sum(1, keepdims=True)
    return metrics.figures(labels, probabilities, classes, majority)


def figures_table(figures: dict[str, Any], predictions: Predictions) -> str:
    """Figures of `figures_of` with their 95 % intervals and the majority baseline; of probabilities, also log-loss and
    ECE, called as a run's own tables call those of calibrated ones."""
    rows = text_tables.figure_rows(figures, predictions.split)
    tables = [text_tables.format_table(rows, ["rows", "n", *metrics.AVERAGES])]
    if predictions.vote == "soft":
        calibration = {f"{name}_calibrated": figures[name] for name in ("log_loss", "ece")}
        tables.append(text_tables.format_table([{"rows": predictions.split, **calibration}], ["rows", *calibration]))
    return "\n\n".join(tables)


def known_rows(runs: Sequence[Run], predictions: Predictions) -> int:
    """How many labelled rows a run was trained on, or chosen by, judging by their ids."""
    known = np.zeros(len(predictions), bool)
    for ids in (ids for run in runs for split in run.splits for ids in (split.train, split.val)):
        rows = predictions.rows.ids.positions(ids)
        known[rows[rows >= 0]] = True
    return int((known & predictions.rows.tags.known).sum())
