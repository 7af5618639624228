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

from feats.errors import UsageError
from feats.source import SIDES
from modeling.evaluation import metrics
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import Progress, needed_source
from modeling.experiments.measuring import report_of
from modeling.features.inputs import Preprocessing
from modeling.features.stored_splits import Split
from modeling.heads.registry import head_class
from modeling.runs.run import Member, Run, Stacking, opinion
from modeling.training.closed_form import MAX_KERNEL_ROWS, fit_logistic
from modeling.training.config import TrainConfig
from modeling.training.fit import fit
from modeling.training.problem import Problem, Trained

# Logistic regression to its optimum takes time with the cube of the columns, or of the rows where these are fewer.
LINEAR_COLUMNS = 2048
# A cache of a few columns holds scores, not an embedding: rows of length 1 would make it as loud as the others. Its
# share in squared distances is a tenth of theirs.
FEW_COLUMNS, FEW_COLUMNS_SCALE = 16, 0.1**0.5
STACKING_C = 0.1
HELD_OUT_FOLDS, EPOCH_FOLDS = 5, 10  # of heads trained by gradient descent


@dataclass(frozen=True)
class Candidate:
    """A head on some caches, normalised somehow. Those of one `family` compete, the best of each is stacked."""

    config: TrainConfig
    caches: dict[str, list[str]]
    norm: str

    @property
    def family(self) -> tuple[str, str]:
        """Its head, and the caches it reads in words."""
        named = [f"{side} {name}" for side, names in self.caches.items() for name in names]
        return self.config.head.head, " + ".join(named)


def searches(experiment: Experiment) -> list[Sequence[str]]:
    """The training ids of each search: of every split, and after folds of all of them together, with what they
    validate."""
    splits = experiment.splits
    everything = sorted({i for split in splits for i in (*split.train, *split.val)})
    return [split.train for split in splits] + ([everything] if len(splits) > 1 else [])


def most_rows(experiment: Experiment) -> int:
    """Of the largest search."""
    return max(map(len, searches(experiment)))


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
        return {side: list(getattr(features, side)) if side in config.head.sides else [] for side in SIDES}

    found = [
        Candidate(config, caches_of(config), norm) for config in configs for norm in head_class(config.head.head).norms
    ]
    first = configs[0]
    parts = [(side, name) for side, names in caches_of(first).items() for name in names]
    if len(parts) > 1 and not head_class(first.head.head).tokens:
        for side, name in parts:
            caches = {other: [name] if other == side else [] for other in SIDES}
            alone = replace(first, head=replace(first.head, sides=(side,)))
            if first.head.head == "kernel":
                alone = replace(alone, gamma=first.gamma or 2.0, ridge=first.ridge or 1.0)
            if caches not in [other.caches for other in found]:
                found.append(Candidate(alone, caches, found[0].norm))
    return found


@dataclass(frozen=True)
class Searched:
    """The ensemble found on some rows, how each candidate did on them, held out, and the epochs of its members."""

    members: list[Member]
    stacking: Stacking
    table: list[dict[str, Any]]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class _Fitted:
    """A candidate's members, each one's epochs (none in closed form), and its held-out logits (n, C) of the rows."""

    members: list[Member]
    histories: list[list[dict[str, Any]]]
    held_out: np.ndarray


def search(experiment: Experiment, ids: Sequence[str], configs: Sequence[TrainConfig], progress: Progress) -> Searched:
    """Fit every candidate on the rows `ids`, choose by held-out log-loss, stack the best of each family."""
    labels = experiment.labels(ids)
    best: dict[tuple[str, str], tuple[_Fitted, dict[str, Any]]] = {}
    table = []
    for candidate in candidates(experiment, configs):
        fitted = _fit(experiment, ids, candidate)
        probabilities = metrics.softmax(fitted.held_out)
        confusion = metrics.confusion_matrix(labels, probabilities.argmax(1), len(experiment.classes))
        figures, collapsed = metrics.scores(confusion), metrics.collapsed_class(confusion, experiment.classes)
        facts = fitted.members[0].facts
        row: dict[str, Any] = {
            "head": candidate.family[0],
            "caches": candidate.family[1],
            "norm": candidate.norm,
            **{name: f"{facts[name]:.3g}" for name in ("gamma", "ridge", "C") if name in facts},
            "log_loss": metrics.log_loss(labels, probabilities),
            **{name: float(figures[name]) for name in metrics.AVERAGES},
            **({"collapsed": f"always {collapsed}"} if collapsed else {}),
            "stacked": "",
        }
        table.append(row)
        if candidate.family not in best or row["log_loss"] < best[candidate.family][1]["log_loss"]:
            best[candidate.family] = fitted, row
        progress(1)
    opinions = torch.from_numpy(np.concatenate([opinion(fitted.held_out) for fitted, _ in best.values()], 1))
    [stack] = fit_logistic(opinions, torch.from_numpy(labels), len(experiment.classes), [STACKING_C])
    members: list[Member] = []
    history: list[dict[str, Any]] = []
    for group, (fitted, row) in enumerate(best.values()):
        row["stacked"] = "yes"
        held_out = {"epoch": None, "val_loss": row["log_loss"], **{name: row[name] for name in metrics.AVERAGES}}
        for member, epochs in zip(fitted.members, fitted.histories, strict=True):
            history += [
                {"member": len(members), "head": row["head"], "caches": row["caches"], **e}
                for e in epochs or [held_out]
            ]
            members.append(replace(member, group=group))
    return Searched(members, Stacking(stack.weight, stack.bias), table, history)


def _fit(experiment: Experiment, ids: Sequence[str], candidate: Candidate) -> _Fitted:
    """A closed-form head is fitted on all rows. Of one trained by gradient descent, the heads of inner folds are the
    members; their epoch is chosen on a share of the other rows, as the fold itself would no longer be held out."""
    caches = candidate.caches
    features = experiment.features.only(caches if caches["image"] else {**caches, "views": ()})
    part = replace(experiment, features=features, **_preparation(candidate, features))
    head = candidate.config.head.head
    if head_class(head).closed_form():
        problem, preprocessing = part.problem(Split(train=list(ids), val=[]), [head])
        trained = _trained(candidate.config, problem)
        if trained.held_out is None:
            raise ValueError(f"the solver of {head} gives no held-out logits")
        return _Fitted([_member(trained, preprocessing)], [[]], trained.held_out)
    members, histories, held_out = [], [], np.zeros((len(ids), len(experiment.classes)))
    row_of = {name: row for row, name in enumerate(ids)}
    for fold in experiment.folds_of(ids, HELD_OUT_FOLDS):
        problem, preprocessing = part.problem(experiment.folds_of(fold.train, EPOCH_FOLDS)[0], [head])
        trained = _trained(candidate.config, problem)
        members.append(_member(trained, preprocessing))
        histories.append(trained.history)
        held_out[[row_of[i] for i in fold.val]] = members[-1].logits(features, features.positions(fold.val))
    return _Fitted(members, histories, held_out)


def _trained(config: TrainConfig, problem: Problem) -> Trained:
    [trained] = fit([config], problem)
    if trained.failure:
        raise UsageError(trained.failure)
    return trained


def _member(trained: Trained, preprocessing: Preprocessing) -> Member:
    own = preprocessing.for_head(trained.config.head).to("cpu")
    return Member(
        trained.config,
        trained.head,
        own,
        trained.widths,
        best_epoch=trained.best_epoch,
        facts=trained.facts,
        epochs=None if trained.best_epoch is None else len(trained.history),
    )


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


def n_fits(experiment: Experiment, configs: Sequence[TrainConfig]) -> int:
    """What `auto` reports in all."""
    return len(searches(experiment)) * len(candidates(experiment, configs))


def auto(
    experiment: Experiment, configs: Sequence[TrainConfig], progress: Progress = lambda fits: None
) -> tuple[Run, list[dict[str, Any]]]:
    """The run of an automatic search, with its report, and a table of how each candidate of the search that the run
    comes from did.

    With one split, the run is what its training rows gave. With folds, each fold's rows are predicted by a search that
    never saw them (nested cross-validation), and the run is a last search on all rows.
    """
    splits, rounds = experiment.splits, searches(experiment)
    at_home = experiment.features.to("cpu")
    probabilities = []
    for number, ids in enumerate(rounds):
        found = search(experiment, ids, configs, progress)
        run = Run(
            experiment.classes,
            found.members,
            needed_source(found.members, experiment.features.source),
            splits if len(splits) > 1 else splits[0],
            experiment.training_rows(),
            found.stacking,
            corrections=dict(experiment.features.corrections),
            target=experiment.features.target,
        )
        if number < len(splits):
            probabilities.append(run.probabilities(at_home, experiment.features.positions(splits[number].val)))
    held_out = np.concatenate(probabilities)
    report = report_of(experiment, run, held_out, held_out)
    report.figures["protocol"] += "; everything chosen by inner folds of the training rows (nested)"
    report.figures["candidates"] = found.table
    return replace(run, report=replace(report, history=found.history)), found.table
