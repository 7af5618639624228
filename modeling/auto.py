"""A search over heads, normalisation and regularisation, and an ensemble of what it finds: `sweep_heads.py --auto`.

Everything is decided on held-out predictions within the training rows: each candidate's normalisation and
regularisation, and the logistic regression that stacks the candidates. Candidates differ most in what they read: beside
the joined caches every cache alone, since an ensemble gains from errors that differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from feats.errors import UsageError
from modeling import metrics
from modeling.closed_form import MAX_KERNEL_ROWS, fit_logistic
from modeling.experiment import Experiment, needed_caches
from modeling.features import DATASETS
from modeling.heads import HEADS
from modeling.inputs import Preprocessing
from modeling.runs import Member, Run, Stacking, opinion
from modeling.splits import Split
from modeling.training import Problem, TrainConfig, Trained, fit

HEAD_NORMS = {"kernel": ("l2", "standard"), "linear": ("standard",)}
OTHER_NORMS = ("standard",)  # of heads trained by gradient descent
LINEAR_COLUMNS = 2048  # logistic regression to its optimum takes time with the cube of the columns
# A cache of a few columns holds scores, not an embedding: rows of length 1 would make it as loud as the others. Its
# share in squared distances is a tenth of theirs.
FEW_COLUMNS, FEW_COLUMNS_SCALE = 16, 0.1**0.5
STACKING_C = 0.1


@dataclass(frozen=True)
class Candidate:
    """A head on some caches, normalised somehow. Those of one `family` compete, the best of each is stacked."""

    config: TrainConfig
    caches: dict[str, list[str]]
    norm: str

    @property
    def family(self) -> tuple[str, str]:
        named = [f"{side} {name}" for side, names in self.caches.items() for name in names]
        return self.config.head.head, " + ".join(named)


def most_rows(experiment: Experiment) -> int:
    """Of the largest search: on the training rows, after folds on all rows."""
    first = experiment.splits[0]
    return len(first.train) + (len(first.val) if len(experiment.splits) > 1 else 0)


def default_heads(n_rows: int, n_columns: int) -> tuple[str, ...]:
    """What is searched unless heads are named: what is exact, as long as that is affordable."""
    if n_rows > MAX_KERNEL_ROWS:
        return ("linear", "mlp") if n_columns <= LINEAR_COLUMNS else ("mlp",)
    return ("kernel", "linear") if n_columns <= LINEAR_COLUMNS else ("kernel",)


def candidates(experiment: Experiment, configs: Sequence[TrainConfig]) -> list[Candidate]:
    """Each configuration on the joined caches, in each normalisation; and the first head on every cache alone (a kernel
    of middling width and penalty: what the stack makes of it hardly depends on them)."""
    features = experiment.features

    def caches_of(config: TrainConfig) -> dict[str, list[str]]:
        return {side: list(getattr(features, side)) if side in config.head.sides else [] for side in DATASETS}

    found = [
        Candidate(config, caches_of(config), norm)
        for config in configs
        for norm in HEAD_NORMS.get(config.head.head, OTHER_NORMS)
    ]
    first = configs[0]
    parts = [(side, name) for side, names in caches_of(first).items() for name in names]
    if len(parts) > 1 and not HEADS[first.head.head].tokens:
        for side, name in parts:
            caches = {other: [name] if other == side else [] for other in DATASETS}
            alone = replace(first, head=replace(first.head, ablation=1 if side == "text" else 2))
            if first.head.head == "kernel":
                alone = replace(alone, gamma=first.gamma or 2.0, penalty=first.penalty or 1.0)
            if caches not in [other.caches for other in found]:
                found.append(Candidate(alone, caches, found[0].norm))
    return found


@dataclass(frozen=True)
class Searched:
    """The ensemble found on one split's training rows, and how each candidate did on them, held out."""

    members: list[Member]
    stacking: Stacking
    table: list[dict[str, Any]]


def search(experiment: Experiment, split: Split, configs: Sequence[TrainConfig], bar: tqdm) -> Searched:
    """Fit every candidate on `split.train`, choose by held-out log-loss, stack the best of each family."""
    labels = experiment.labels(split.train)
    best: dict[tuple[str, str], tuple[list[Member], np.ndarray, dict[str, Any]]] = {}
    table = []
    for candidate in candidates(experiment, configs):
        members, held_out = _fit(experiment, split, candidate)
        probabilities = metrics.softmax(held_out)
        figures = metrics.scores(metrics.confusion_matrix(labels, probabilities.argmax(1), len(experiment.classes)))
        facts = members[0].facts
        row = {
            "head": candidate.family[0],
            "caches": candidate.family[1],
            "norm": candidate.norm,
            **{name: f"{facts[name]:.3g}" for name in ("gamma", "penalty", "C") if name in facts},
            "log_loss": metrics.log_loss(labels, probabilities),
            **{name: float(figures[name]) for name in metrics.AVERAGES},
            "stacked": "",
        }
        table.append(row)
        if candidate.family not in best or row["log_loss"] < best[candidate.family][2]["log_loss"]:
            best[candidate.family] = members, held_out, row
        bar.update()
    opinions = np.concatenate([opinion(held_out) for _, held_out, _ in best.values()], 1)
    fitted = fit_logistic(torch.from_numpy(opinions), torch.from_numpy(labels), len(experiment.classes), [STACKING_C])[
        0
    ]
    for group, (members, _, row) in enumerate(best.values()):
        row["stacked"] = "yes"
        best[row["head"], row["caches"]] = [replace(m, group=group) for m in members], None, row
    members = [m for of_family, _, _ in best.values() for m in of_family]
    return Searched(members, Stacking(fitted.weight, fitted.bias), table)


def _fit(experiment: Experiment, split: Split, candidate: Candidate) -> tuple[list[Member], np.ndarray]:
    """The candidate's members, and its held-out logits (n, C) of the training rows. A closed-form head is fitted on all
    of them; of one trained by gradient descent, the heads of the inner folds are the members."""
    features = replace(
        experiment.features,
        views={} if not candidate.caches["image"] else experiment.features.views,
        **{
            side: {name: x for name, x in getattr(experiment.features, side).items() if name in names}
            for side, names in candidate.caches.items()
        },
    )
    part = replace(experiment, features=features, **_preparation(candidate, features))
    if HEADS[candidate.config.head.head].solver != "sgd":
        problem, preprocessing = part.problem(split, [candidate.config.head.head])
        trained = _trained(candidate.config, problem)
        return [_member(trained, preprocessing)], trained.held_out
    members, held_out = [], np.zeros((len(split.train), len(experiment.classes)))
    row_of = {name: row for row, name in enumerate(split.train)}
    for fold in experiment.folds_of(split.train, 5):
        problem, preprocessing = part.problem(fold, [candidate.config.head.head])
        trained = _trained(candidate.config, problem)
        held_out[[row_of[name] for name in fold.val]] = trained.val_logits
        members.append(_member(trained, preprocessing))
    return members, held_out


def _trained(config: TrainConfig, problem: Problem) -> Trained:
    [trained] = fit([config], problem)
    if trained.failure:
        raise UsageError(trained.failure)
    return trained


def _member(trained: Trained, preprocessing: Preprocessing) -> Member:
    own = preprocessing.for_head(trained.config.head).to("cpu")
    return Member(trained.config, trained.head, own, trained.widths, best_epoch=trained.best_epoch, facts=trained.facts)


def _preparation(candidate: Candidate, features: Any) -> dict[str, Any]:
    """Norms and scales: every cache as loud as another in squared distances, those of few columns a tenth as loud."""
    norms, scales = {}, {}
    for side, names in candidate.caches.items():
        for name in names:
            columns = getattr(features, side)[name].shape[1]
            few = columns <= FEW_COLUMNS
            norms[name] = "none" if few and candidate.norm == "l2" else candidate.norm
            if candidate.config.head.head == "kernel":
                scales[name] = (FEW_COLUMNS_SCALE if few else 1.0) / (
                    columns**0.5 if norms[name] == "standard" else 1.0
                )
    return {"norms": norms, "scales": scales}


def auto(experiment: Experiment, configs: Sequence[TrainConfig]) -> tuple[Run, np.ndarray, list[dict[str, Any]]]:
    """The run of an automatic search, the probabilities (n, C) of the validation rows of all splits, and the table of
    candidates.

    With one split, the run is what its training rows gave. With folds, each fold's rows are predicted by a search that
    never saw them (nested cross-validation), and the run is a last search on all rows.
    """
    splits = experiment.splits
    everything = [i for split in splits for i in split.val]
    rounds = list(splits) if len(splits) == 1 else [*splits, Split(train=sorted(everything), val=splits[0].val)]
    probabilities = []
    at_home = experiment.features.to("cpu")
    with tqdm(total=len(rounds) * len(candidates(experiment, configs)), desc="search", unit="fit", disable=None) as bar:
        for number, split in enumerate(rounds):
            found = search(experiment, split, configs, bar)
            run = Run(
                experiment.classes,
                found.members,
                needed_caches(found.members, experiment.source),
                splits if len(splits) > 1 else splits[0],
                found.stacking,
            )
            if number < len(splits):
                probabilities.append(run.probabilities(at_home, experiment.features.positions(split.val)))
    return run, np.concatenate(probabilities), found.table
