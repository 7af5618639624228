"""A ranked queue of suspect labels, from what heads say of rows they haven't seen, and from duplicates in conflict.

The model's side is confident learning: Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset
Labels, Journal of Artificial Intelligence Research 2021, as the package cleanlab has it.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from feats.csv_files import read_table, write_rows
from feats.errors import UsageError
from feats.records import Record, TarSlice
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import Progress
from modeling.features.splits import duplicates_of
from modeling.prediction.out_of_fold import labelled, of_folds, of_held_out, trained_folds, unseen_folds
from modeling.runs.files import user_file
from modeling.runs.run import Run, single_split

PARTS = {"train": "train", "val": "val (not for tuning)", "test": "test (not for tuning)", "": "unused"}
WHYS = ("model", "duplicates", "both")
HEADER = ("id", "given", "suggested", "confidence", "rank", "part", "why", "corrected", "text", "image")


@dataclass(frozen=True)
class Audited:
    """A labelled row. `confidence` is the probability of the given label, by heads that haven't seen the row; `why`
    says what makes it suspect: the model, duplicates, or both; '' where nothing does."""

    id: str
    given: str
    suggested: str
    confidence: float
    part: str
    why: str


# -- judging ----------------------------------------------------------------------------------------------------


def audit_experiment(run: Run, experiment: Experiment, folds: int) -> Experiment:
    """The experiment that `audit` trains: `folds` of the run's training rows, duplicates in one fold whether or not the
    run kept them together, since a copy of a row would bear out the row's own label. Raises `UsageError` as
    `single_split`, `labelled` and `unseen_folds`."""
    split = single_split(run)
    experiment = replace(experiment, group_of=duplicates_of(experiment.features))
    train = labelled(split.train, experiment, experiment.features.source.folder)
    val_ratio = len(split.val) / (len(split.train) + len(split.val))
    return replace(experiment, splits=unseen_folds(train, folds, experiment, val_ratio))


def audit(run: Run, experiment: Experiment, progress: Progress = lambda epochs: None) -> list[Audited]:
    """All labelled rows that have features, the most suspect first; `experiment` as `audit_experiment` makes it.

    A training row is predicted by heads trained on the folds without it, every other row by the mean of all folds'
    heads, none of which has seen it: no validation or test row has a say in what becomes of another label. Suspects
    come first, in the order of the probability of their label times its share among the row's duplicates; the others
    follow in the same order. Warns of labelled rows that are left out: without features, or of no class of the run.
    """
    train = [name for split in experiment.splits for name in split.test]
    others = _others(run, experiment, set(train))
    runs = trained_folds(run, experiment, progress)
    probabilities = of_folds(runs, experiment, train)
    if others:
        probabilities = np.concatenate([probabilities, of_held_out(runs, experiment, others)])
    ids = [*train, *others]
    return ranked(
        ids, experiment.labels(ids), probabilities, experiment.classes, experiment.group_of or {}, _parts(run)
    )


def _others(run: Run, experiment: Experiment, train: set[str]) -> list[str]:
    """The labelled rows that aren't training rows."""
    features = experiment.features
    tag_of = dict(zip(features.dataset.ids, features.dataset.tags, strict=True))
    lacking = [i for i in features.left_out if tag_of[i]]
    if lacking:
        warnings.warn(f"{len(lacking)} labelled rows have no features (e.g. {lacking[0]}): left out", stacklevel=3)
    pairs = [(i, tag) for i, tag in zip(features.ids, features.tags, strict=True) if tag and i not in train]
    foreign = [i for i, tag in pairs if tag not in run.classes]
    if foreign:
        warnings.warn(
            f"{len(foreign)} rows have labels that are no class of the run (e.g. {foreign[0]}): left out", stacklevel=3
        )
    return [i for i, tag in pairs if tag in run.classes]


def _parts(run: Run) -> dict[str, str]:
    split = single_split(run)
    return {name: PARTS[part] for part in ("train", "val", "test") for name in getattr(split, part)}


def ranked(
    ids: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    group_of: Mapping[str, int],
    part_of: Mapping[str, str],
) -> list[Audited]:
    """The queue of rows with `labels` (N,) and `probabilities` (N, C) of rows unseen. `group_of` numbers duplicates;
    rows that `part_of` doesn't know are in no part.

    Of a suspect by duplicates alone, that of its duplicates' labels is suggested which is the most probable over all of
    them; else the row's most probable class.
    """
    doubted = by_model(labels, probabilities)
    share, best = _among_duplicates(ids, labels, probabilities, group_of)
    given = probabilities[np.arange(len(ids)), labels]
    why = np.select([doubted & (share < 1), doubted, share < 1], ["both", "model", "duplicates"], "")
    suggested = np.where(why == "duplicates", best, probabilities.argmax(1))
    order = np.lexsort((np.array(ids), given * share, why == ""))
    return [
        Audited(
            ids[row],
            classes[labels[row]],
            classes[suggested[row]],
            float(given[row]),
            part_of.get(ids[row], PARTS[""]),
            str(why[row]),
        )
        for row in order.tolist()
    ]


def by_model(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) bool: the label issues of confident learning, of labels (N,) and probabilities (N, C)."""
    from cleanlab.filter import find_label_issues  # with it comes pandas: seconds to import

    found = find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    return np.asarray(found, bool)


def _among_duplicates(
    ids: Sequence[str], labels: np.ndarray, probabilities: np.ndarray, group_of: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The share of each row's label among its duplicates, the row included, (N,), 1 where they agree; and the most
    probable of their labels, (N,) int64."""
    members = defaultdict(list)
    for row, name in enumerate(ids):
        if name in group_of:
            members[group_of[name]].append(row)
    share, best = np.ones(len(ids)), labels.copy()
    for rows in members.values():
        counts = Counter(labels[rows].tolist())
        if len(counts) > 1:
            share[rows] = [counts[label] / len(rows) for label in labels[rows].tolist()]
            mean = probabilities[rows].mean(0)
            best[rows] = max(sorted(counts), key=mean.__getitem__)
    return share, best


# -- the file ---------------------------------------------------------------------------------------------------


def check_unedited(path: Path) -> None:
    """Raise `UsageError` when a queue that lies there has labels in its column corrected: a person's work."""
    try:
        edited = sum(bool(row.get("corrected", "").strip()) for row in read_table(path)) if path.is_file() else 0
    except (OSError, ValueError):  # what isn't such a file is refused when it is written to
        return
    if edited:
        raise UsageError(f"{path} holds {edited} corrected labels, which would be lost; give another file with `out`")


def write_queue(path: Path, queue: Sequence[Audited], records: Sequence[Record], *, safe: bool = False) -> None:
    """CSV of the queue, in its order, with an empty column for corrected labels; texts and pictures' paths from
    `records`, '' where these lack a row. For what is there already see `user_file`; `safe` as in
    `write_rows`."""
    record_of = {record.id: record for record in records}
    with user_file(path, HEADER) as file:
        write_rows(file, [HEADER])
        for rank, row in enumerate(queue, start=1):
            record = record_of.get(row.id)
            text, image = (record.text or "", _path_of(record)) if record else ("", "")
            cells = (
                row.id,
                row.given,
                row.suggested,
                f"{row.confidence:.4f}",
                rank,
                row.part,
                row.why,
                "",
                text,
                image,
            )
            write_rows(file, [cells], safe=safe)


def _path_of(record: Record) -> str:
    """Where the picture lies; '' for none, and for a name that is no text."""
    place = record.image_path
    if place is None:
        return ""
    path = f"{place.path.absolute()}::{place.name}" if isinstance(place, TarSlice) else str(place.absolute())
    return path if path.isprintable() else ""


def summary_rows(queue: Sequence[Audited]) -> list[dict[str, object]]:
    """For each part how many rows there are, and how many suspects of each kind."""
    of_part, of_why = Counter(row.part for row in queue), Counter((row.part, row.why) for row in queue)
    return [
        {"rows": part, "n": of_part[part], **{why: of_why[part, why] for why in WHYS}}
        for part in PARTS.values()
        if of_part[part]
    ]
