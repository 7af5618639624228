"""What a trained run is worth: figures of its validation and test rows, and how they came about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from feats.strings import Strings
from modeling.evaluation import metrics
from modeling.experiments.experiment import Experiment
from modeling.features.corrections import corrected_words
from modeling.features.joined import FeatureSet
from modeling.features.stored_splits import Split
from modeling.runs.run import FoldTest, Member, Report, Run
from modeling.training.config import OF_CLOSED_FORM, settings_read
from modeling.training.problem import Trained

TEMPERATURES = (0.1, 10.0)  # a validation set of a few rows can be fitted perfectly, which asks for a temperature of 0


@dataclass(frozen=True)
class Outcome:
    """A member and what it said of the validation rows of its split."""

    member: Member
    split: Split
    trained: Trained

    @property
    def calibrated(self) -> np.ndarray:
        """Probabilities (len(split.val), C)."""
        return metrics.softmax(self.trained.val_logits, self.member.temperature)


def measure(outcomes: Sequence[Outcome], experiment: Experiment, run: Run) -> Report:
    """Validation figures of the ensemble (of each split's members, all splits pooled), mean and standard deviation over
    the members, and figures on the test part where the split has one; where several splits have, mean and standard
    deviation of the figures of each split's own members on its own."""
    raw, calibrated = [], []
    for split in experiment.splits:
        own = [o for o in outcomes if o.split is split]
        raw.append(np.mean([metrics.softmax(o.trained.val_logits) for o in own], axis=0))
        calibrated.append(np.mean([o.calibrated for o in own], axis=0))
    report = report_of(experiment, run, np.concatenate(calibrated), np.concatenate(raw))
    singles = [
        split_figures(experiment, o.split.val, metrics.softmax(o.trained.val_logits), o.calibrated) for o in outcomes
    ]
    collapsed = [
        {"fold": o.member.fold, "seed": o.member.config.seed, "class": found["collapsed"]}
        for o, found in zip(outcomes, singles, strict=True)
        if found["collapsed"]
    ]
    members = {"count": len(outcomes), "mean_std": metrics.mean_std(singles), "collapsed": collapsed}
    report.figures["members"] = members
    folds = enumerate(experiment.splits, 1) if len(experiment.splits) > 1 else ()
    tested = [test_of_fold(experiment, run, split, fold) for fold, split in folds if split.test]
    if tested:
        figures = metrics.mean_std([of_fold for _, of_fold in tested])
        report.figures["test_folds"] = {"count": len(tested), "mean_std": figures}
        report.test_folds.extend(predictions for predictions, _ in tested)
    report.figures["protocol"] = f"{protocol(experiment)}; {_chosen(run.members)}"
    report.history.extend(
        {"fold": o.member.fold or "", "seed": o.member.config.seed, **row}
        for o in outcomes
        for row in o.trained.history
    )
    return report


def report_of(experiment: Experiment, run: Run, calibrated: np.ndarray, raw: np.ndarray) -> Report:
    """Figures of probabilities (n, C) on the validation rows of all splits, and on the test part where there is one."""
    ids = Strings.concatenate([Strings.of(split.val) for split in experiment.splits])
    majority = experiment.majority(experiment.splits[0])
    figures: dict[str, Any] = {"val": split_figures(experiment, ids, raw, calibrated, majority)}
    tested = None
    if len(experiment.splits) == 1 and experiment.splits[0].test:
        test = experiment.splits[0].test
        final = raw_test = experiment.predicted(test, run.probabilities)
        if run.stacking is None:  # what stacks the members also calibrates them
            raw_test = experiment.predicted(test, partial(_uncalibrated, run.members))
        figures["test"] = split_figures(experiment, test, raw_test, final, majority)
        tested = (test, experiment.features.tags_of(test), final)
    figures["protocol"] = protocol(experiment)
    figures["training_rows"] = experiment.training_rows()
    figures["validation_rows"] = experiment.validation_rows()
    figures["leaks"] = experiment.leaks.as_json()
    return Report(ids, experiment.features.tags_of(ids), calibrated, figures, [], tested)


def test_of_fold(experiment: Experiment, run: Run, split: Split, fold: int) -> tuple[FoldTest, dict[str, Any]]:
    """What the members trained on a fold (from 1) say of its own test part, and the figures of that."""
    own = replace(run, members=[m for m in run.members if m.fold == fold])
    calibrated = experiment.predicted(split.test, own.probabilities)
    raw = experiment.predicted(split.test, partial(_uncalibrated, own.members))
    figures = split_figures(experiment, split.test, raw, calibrated, experiment.majority(split))
    return FoldTest(fold, split.test, experiment.features.tags_of(split.test), calibrated), figures


def _uncalibrated(members: Sequence[Member], features: FeatureSet, rows: torch.Tensor | None) -> np.ndarray:
    return np.asarray(np.mean([metrics.softmax(m.logits(features, rows)) for m in members], axis=0))


def split_figures(
    experiment: Experiment, ids: Sequence[str], raw: np.ndarray, calibrated: np.ndarray, majority: str | None = None
) -> dict[str, Any]:
    """`metrics.figures` of the calibrated predictions; log-loss and ECE before calibration beside those after."""
    labels = experiment.labels(ids)
    figures = metrics.figures(labels, calibrated, experiment.classes, majority)
    after = {f"{name}_calibrated": figures[name] for name in ("log_loss", "ece")}
    before = {
        "log_loss": metrics.log_loss(labels, raw),
        "ece": metrics.expected_calibration_error(labels, raw),
    }
    return {**figures, **before, **after}


def protocol(experiment: Experiment) -> str:
    """One line on how the figures came about."""
    how = experiment.splits[0].how
    if not how:
        split = f"{len(experiment.splits)} splits as given" if len(experiment.splits) > 1 else "split as given"
    elif "files" in how:
        folds = f"{len(experiment.splits)} folds" if len(experiment.splits) > 1 else "split"
        split = f"{folds} from {', '.join(how['files'])}"
    elif len(experiment.splits) > 1:
        split = f"{len(experiment.splits)}-fold cross-validation, stratified, seed {how['seed']}"
    else:
        split = f"stratified split, {how['val_ratio']:g} for validation, seed {how['seed']}"
    together = (
        "" if not how or "files" in how else ", duplicates together" if experiment.group_of else ", duplicates anywhere"
    )
    corrected = corrected_words(experiment.features, experiment.splits)
    target = experiment.features.target
    told = [target.words()] if target else []
    return "; ".join([f"{split}{together}", *told, *([corrected] if corrected else [])])


def _chosen(members: Sequence[Member]) -> str:
    """What was chosen by data in training the members, and on which rows."""
    epoch = "best epoch and " if any(m.best_epoch is not None for m in members) else ""
    by_folds = [
        name
        for name in OF_CLOSED_FORM
        if any(name in settings_read(m.config.head.head) and getattr(m.config, name) is None for m in members)
    ]
    folds = f", {' and '.join(by_folds)} by inner folds of the training rows" if by_folds else ""
    return f"{epoch}temperature chosen on the validation rows{folds}"
