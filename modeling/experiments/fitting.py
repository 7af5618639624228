"""Heads trained on the splits of an experiment: one from a notebook, or every configuration on every split."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from feats.acceleration import deterministic, peak_bytes
from feats.errors import UsageError
from feats.source import SIDES
from modeling.evaluation import metrics
from modeling.experiments.experiment import Experiment, class_numbers, on_features, with_fitting_tokens
from modeling.experiments.measuring import TEMPERATURES, Outcome, measure
from modeling.features.cache_facts import cached_widths
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource
from modeling.features.stored_splits import Split
from modeling.features.stream import Stream
from modeling.heads.config import HeadConfig
from modeling.runs.run import Member, Run
from modeling.training.config import TrainConfig, changed, with_seeds
from modeling.training.fit import epoch_seconds, n_epochs, stacks
from modeling.training.problem import Epoch, Problem, Trained
from modeling.training.workers import LARGEST_COPY, run_jobs

Progress = Callable[[int], Any]  # is told epochs as they are done
Told = Callable[[Epoch, int | None], Any]  # hears what each epoch came to, and of which fold it is, from 1


def fit_head(
    data: FeatureSet,
    split: Split | Sequence[Split],
    head: HeadConfig | str = "fusion",
    *,
    norm: str | Mapping[str, str] = "none",
    scale: Mapping[str, float] = {},
    seeds: int = 1,
    device: str = "auto",
    progress: Progress = lambda epochs: None,
    **settings: Any,
) -> Run:
    """Train a head on the training rows of `split`; its best epoch and temperature are chosen on the validation rows.

    `norm` is one normalisation (none, l2, standard) for all caches, or by cache; `scale` a factor behind it, by cache.
    `settings` are fields of `HeadConfig` and `TrainConfig`: D, lr, ep, bs, optimizer, ... Several `seeds`, or several
    splits (folds), give an ensemble. What the training said of the validation rows is the run's `report`.
    Raises `UsageError` for whatever doesn't fit.
    """
    config = changed(TrainConfig(HeadConfig(head) if isinstance(head, str) else head), settings)
    splits = [split] if isinstance(split, Split) else list(split)
    norms = dict.fromkeys(data.source.names, norm) if isinstance(norm, str) else norm
    data = with_fitting_tokens(data, [config.head])[0]
    with deterministic(config.deterministic):
        experiment = Experiment.of(data, splits, norms, scale, device)
        return train_run(with_seeds(on_features(config, data), seeds), experiment, progress)


def evaluate(run: Run, data: FeatureSet, ids: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of a run on the labelled rows of `ids` (of all without): accuracy, weighted and macro averages, per
    class, confusion, log-loss and ECE of the calibrated probabilities, their intervals, and what the majority class of
    the run's training rows would score.

    See `metrics.figures`. Raises `UsageError` for labels that are no class of the run, and when no row has a label.
    """
    kept, tags = run.with_own_labels(data).labelled(ids)
    labels = class_numbers(tags, run.classes)
    return metrics.figures(labels, run.predict_proba(data, kept), run.classes, run.majority)


def train_run(
    configs: Sequence[TrainConfig],
    experiment: Experiment,
    progress: Progress = lambda epochs: None,
    told: Told | None = None,
) -> Run:
    """The ensemble of all configurations on all splits, with its report and what it cost. Raises `UsageError` when one
    diverges."""
    with measured(experiment.device, experiment.stream) as cost:
        outcomes = [outcome for _, found in train_all(configs, experiment, progress, told=told) for outcome in found]
    return replace(run_of(outcomes, experiment), cost=cost)


@contextmanager
def measured(device: torch.device, stream: Stream | None = None) -> Iterator[dict[str, Any]]:
    """What the block costs, filled in at its end: seconds, peak_bytes (on a CPU of this process since its start, and
    without processes that it starts), device, and of a `stream` its rates, see `Tally.rates`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began, cost = time.perf_counter(), dict[str, Any]()
    yield cost
    cost |= {
        "seconds": round(time.perf_counter() - began, 2),
        "peak_bytes": peak_bytes(device),
        "device": str(device),
    }
    if stream is not None:
        cost["streamed"] = stream.tally.rates()


def total_epochs(configs: Sequence[TrainConfig], experiment: Experiment) -> int:
    """What `train_all` and `train_run` report in all."""
    return n_epochs(configs) * len(experiment.splits)


def epoch_weights(configs: Sequence[TrainConfig], experiment: Experiment) -> dict[TrainConfig, float]:
    """About how long an epoch of each takes in `train_all`, in seconds of one core: by which time left is told."""
    widths = cached_widths(experiment.features.source, "train")
    n_classes, rows = len(experiment.classes), len(experiment.splits[0].train)

    def seconds(config: TrainConfig) -> float:
        try:
            return epoch_seconds(config, widths, n_classes, rows)
        except UsageError:  # no head for these caches: training says why
            return 1.0

    return {config: seconds(config) for config in configs}


def train_all(
    configs: Sequence[TrainConfig],
    experiment: Experiment,
    progress: Progress = lambda epochs: None,
    failed: dict[int, str] | None = None,
    told: Told | None = None,
) -> Iterator[tuple[int, list[Outcome]]]:
    """Train every configuration on every split. As soon as one is through, its number and an outcome for each split.

    Numbers and reasons of those that diverge go into `failed`; without it the first raises `UsageError`. `told` hears
    of every epoch as it ends, of trainings side by side in any order.
    """
    if not configs:
        return
    splits = experiment.splits
    problems = {0: experiment.problem(splits[0], {config.head.head for config in configs})}
    first = problems[0][0]
    groups = list(stacks(configs, first))
    jobs = [(members, k) for members in groups for k in range(len(splits))]
    # Every split has features of its own. Where they are too large to lie side by side they are made for one job at a
    # time, which costs a fraction of an epoch.
    side_by_side = len(splits) == 1 or first.inputs.n_bytes * len(splits) <= LARGEST_COPY
    batches = [jobs] if side_by_side else [[job] for job in jobs]
    del first
    found: dict[int, list[Outcome]] = {i: [] for i in range(len(configs))}
    for batch in batches:
        wanted = sorted({k for _, k in batch})
        heads = {configs[i].head.head for members, _ in batch for i in members}
        problems = {k: problem for k, problem in problems.items() if k in wanted}
        problems |= {k: experiment.problem(splits[k], heads) for k in wanted if k not in problems}
        tasks = [([configs[i] for i in members], wanted.index(k)) for members, k in batch]
        folds = [k + 1 if len(splits) > 1 else None for k in wanted]
        hear = None if told is None else partial(_told_of_fold, told, folds)
        for number, results in run_jobs(tasks, [problems[k][0] for k in wanted], progress, hear):
            members, k = batch[number]
            for i, trained in zip(members, results, strict=True):
                if trained.failure:
                    if failed is None:
                        raise UsageError(trained.failure)
                    failed.setdefault(i, trained.failure)
                    continue
                fold = k + 1 if len(splits) > 1 else None
                found[i].append(_outcome(trained, *problems[k], splits[k], fold))
            for i in members:
                if len(found.get(i, ())) == len(splits):
                    yield i, sorted(found.pop(i), key=lambda o: o.member.fold or 0)


def _told_of_fold(told: Told, folds: Sequence[int | None], k: int, epoch: Epoch) -> None:
    told(epoch, folds[k])


def _outcome(
    trained: Trained, problem: Problem, preprocessing: Preprocessing, split: Split, fold: int | None
) -> Outcome:
    labels = problem.labels[problem.val].cpu().numpy()
    member = Member(
        trained.config,
        trained.head,
        preprocessing.for_head(trained.config.head).to("cpu"),
        trained.widths,
        temperature=metrics.fit_temperature(trained.val_logits, labels, TEMPERATURES),
        best_epoch=trained.best_epoch,
        facts=trained.facts,
        fold=fold,
        epochs=None if trained.best_epoch is None else len(trained.history),
    )
    return Outcome(member, split, trained)


def run_of(outcomes: Sequence[Outcome], experiment: Experiment) -> Run:
    """The ensemble of all outcomes, equally weighted, with its report."""
    members = [o.member for o in outcomes]
    splits = experiment.splits
    source = needed_source(members, experiment.features.source)
    counts = experiment.training_rows()
    split = splits if len(splits) > 1 else splits[0]
    features = experiment.features
    corrections = dict(features.corrections)
    run = Run(experiment.classes, members, source, split, counts, corrections=corrections, target=features.target)
    return replace(run, report=measure(outcomes, experiment, run))


def needed_source(members: Sequence[Member], source: FeatureSource) -> FeatureSource:
    """`source` without the caches that no member reads."""
    read = {side: {c for m in members for c in m.preprocessing.caches[side]} for side in SIDES}
    image, text = (tuple(name for name in source.of(side) if name in read[side]) for side in SIDES)
    fingerprints = {name: fingerprint for name, fingerprint in source.fingerprints.items() if name in (*image, *text)}
    contents = {name: digest for name, digest in source.contents.items() if name in (*image, *text)}
    tokens = any(key.split("/")[0].endswith("_tokens") for m in members for key in m.preprocessing.normalizers)
    counted = {name: counts for name, counts in source.parameters.items() if name in (*image, *text)}
    return FeatureSource(source.folder, image, text, tokens, fingerprints, contents, counted)
