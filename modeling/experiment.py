"""What lies between settings and a trained run: load, split, train, measure. Scripts and notebooks compose these."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from feats.acceleration import deterministic, peak_bytes, resolve_device
from feats.errors import UsageError
from feats.source import SIDES
from feats.strings import Labels, Strings
from modeling.evaluation import metrics
from modeling.features.corrections import corrected_words, read_corrections
from modeling.features.duplicates import Duplicates
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource, cached_widths, load_features
from modeling.features.leaks import Leaks, find_leaks
from modeling.features.splits import (
    PARTS,
    Split,
    SplitSettings,
    check_split,
    deal_folds,
    duplicates_of,
    fold_numbers,
    make_splits,
)
from modeling.features.stream import Stream, StreamedInputs, streams
from modeling.features.target import read_target
from modeling.heads.base import HeadConfig, head_class
from modeling.runs.run import FoldTest, Member, Report, Run
from modeling.training.config import TrainConfig, changed, settings_read, with_seeds
from modeling.training.fit import epoch_seconds, n_epochs, stacks
from modeling.training.problem import Epoch, Problem, Trained
from modeling.training.workers import LARGEST_COPY, run_jobs

INNER_FOLDS = 5
EACH_TRIED = 16  # numbers of folds that are tried one by one where duplicates of several classes forbid the most
TEMPERATURES = (0.1, 10.0)  # a validation set of a few rows can be fitted perfectly, which asks for a temperature of 0

Progress = Callable[[int], Any]  # is told epochs as they are done
Dealt = TypeVar("Dealt")
Told = Callable[[Epoch, int | None], Any]  # hears what each epoch came to, and of which fold it is, from 1


@dataclass(frozen=True)
class ExperimentSettings:
    """Which features, how they are split and normalised, and where training takes place. `norms` and `scales` are by
    cache, "none" and 1 where not named; `corrections` is a file of other labels, see `read_corrections`; `stream` says
    whether features are read block by block as needed, see `modeling.features.stream.streams`. `label_column`
    is another target than the caches' labels, in the table `label_data`, see `read_target`."""

    source: FeatureSource
    split: SplitSettings = SplitSettings()
    norms: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    device: str = "auto"
    corrections: Path | None = None
    stream: str = "never"
    label_column: str | None = None
    label_data: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """The rows of joined caches, their splits, and how features are made from them.

    With a `stream` the `features` have shapes only, and it reads the values: close the experiment in the end, or use it
    as a context manager."""

    features: FeatureSet
    classes: list[str]  # of the rows in the splits; others may have others
    splits: list[Split]
    group_of: Duplicates | None  # duplicate group of each labelled row; None when duplicates may part
    norms: dict[str, str]
    scales: dict[str, float]
    device: torch.device
    notes: tuple[str, ...] = ()  # on how it came about
    stream: Stream | None = field(default=None, repr=False, compare=False)

    def require_in_memory(self, what: str) -> None:
        """Raise `UsageError` where features are streamed: `what` needs all of them."""
        if self.stream is not None:
            raise UsageError(
                f"{what} needs all features in memory, and they are streamed; leave it out, or give `stream` never"
            )

    def close(self) -> None:
        """Close what it reads from; without a stream there is nothing to close."""
        if self.stream is not None:
            self.stream.close()

    def __enter__(self) -> "Experiment":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @classmethod
    def of(
        cls,
        data: FeatureSet,
        splits: Sequence[Split],
        norms: Mapping[str, str] = {},
        scales: Mapping[str, float] = {},
        device: str = "auto",
        *,
        duplicates_together: bool = True,
        notes: Sequence[str] = (),
        stream: Stream | None = None,
    ) -> "Experiment":
        """An experiment on `splits` of `data`. Warns of test rows whose class no training or validation row has: they
        are left out, since nothing could predict them. Raises `UsageError` for splits that can't be trained on, see
        `check_split`."""
        if not splits:
            raise UsageError("there is no split to train on; make one with make_split, or several with make_folds")
        for split in splits:
            check_split(split)
        on = resolve_device(device)
        classes, kept = _known_classes(data, splits)
        group_of = duplicates_of(data) if duplicates_together else None
        data = data.to(on) if stream is None else data
        return cls(data, classes, kept, group_of, dict(norms), dict(scales), on, tuple(notes), stream)

    def problem(self, split: Split, heads: Iterable[str]) -> tuple[Problem, Preprocessing]:
        """One split, ready for training `heads` on it, and the preprocessing fitted on its training rows."""
        train, val = (self.features.positions(ids).to(self.device) for ids in (split.train, split.val))
        if self.stream is not None and any(head_class(head).solver == "kernel" for head in heads):
            raise UsageError(
                "the kernel head computes with all training rows at once and can't stream them; take linear or a head "
                "trained by gradient descent, or give `stream` never"
            )
        labels = torch.full((len(self.features),), -1, device=self.device)
        for ids, rows in ((split.train, train), (split.val, val)):
            labels[rows] = torch.from_numpy(self.labels(ids)).to(self.device)
        closed_form = sorted(head for head in heads if head_class(head).closed_form())
        if closed_form and (lacking := set(self.classes) - set(self.features.tags_of(split.train).counts())):
            raise UsageError(
                f"class {min(lacking)!r} has no training row, and {', '.join(closed_form)} can't learn it; move some "
                "there, extract again what is in quarantine, or leave that class out"
            )
        folds = self.inner_folds(split.train).to(self.device) if closed_form else None
        if self.stream is None:
            preprocessing = Preprocessing.fit(self.features, train, self.norms, self.scales)
            return Problem(preprocessing.apply(self.features), labels, train, val, self.classes, folds), preprocessing
        preprocessing = self.stream.preprocessing(np.sort(train.cpu().numpy()), self.norms, self.scales)
        streamed = StreamedInputs(self.stream, preprocessing, self.device)
        return Problem(streamed.shapes, labels, train, val, self.classes, folds, streamed), preprocessing

    def predicted(self, ids: Sequence[str], of: Callable[[FeatureSet, torch.Tensor | None], np.ndarray]) -> np.ndarray:
        """What `of` makes (N, C) of the features of `ids`, in their order, from features and row numbers (None: all of
        them); block by block where they are streamed."""
        rows = self.features.positions(ids)
        if self.stream is not None:
            return self.stream.over(rows, lambda block: of(block, None))
        return of(self.features.to("cpu"), rows)

    def inner_folds(self, ids: Sequence[str], seed: int = 0) -> torch.Tensor:
        """Fold number of each id, (len(ids),) int8 where that holds them: stratified, duplicates in one, as many as
        the rarest class allows up to five."""
        return torch.from_numpy(self._fewer_folds(fold_numbers, ids, INNER_FOLDS, seed))

    def folds_of(self, ids: Sequence[str], k: int, seed: int = 0) -> list[Split]:
        """`k` folds of training rows, or as many as the rarest class allows. Raises `UsageError` when that is none."""
        return self._fewer_folds(deal_folds, ids, k, seed)

    def _fewer_folds(self, deal: Callable[..., Dealt], ids: Sequence[str], k: int, seed: int) -> Dealt:
        """What `deal` makes of `k` folds or of as many as it doesn't refuse."""
        tags, groups = self.features.tags_of(ids), self.groups(ids)
        alone = _rows_apart(tags, groups)
        name, most = min(alone.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        # Every fold validates a row of each class, and duplicates lie in one: more can't be dealt.
        for fewer in _downwards(max(min(k, most), 2)):
            try:
                return deal(ids, tags, fewer, seed, groups)
            except UsageError as error:
                refusal = error
        counts = tags.counts()
        if most != 1:
            raise refusal
        raise UsageError(
            f"class {name!r} has {counts[name]} training row{'s' if counts[name] > 1 else ''}, expected at "
            "least 2 that are no duplicates: folds of the training rows hold some out and learn from the others; add "
            "rows of it, leave it out, or do without such folds (of the heads only linear and kernel need them)"
        )

    def groups(self, ids: Sequence[str]) -> np.ndarray | None:
        """The duplicate group of each id, (len(ids),) int64; None when duplicates may part."""
        return None if self.group_of is None else self.group_of.of(ids)

    def labels(self, ids: Sequence[str]) -> np.ndarray:
        """(len(ids),) int64, positions in `classes`. Raises `UsageError` for a label that is none of them: it must not
        become one of them."""
        return class_numbers(self.features.tags_of(ids), self.classes)

    def class_counts(self, ids: Sequence[str]) -> dict[str, int]:
        """How many of the rows are of each class."""
        counts = np.bincount(self.labels(ids), minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def training_rows(self) -> dict[str, int]:
        """How many training rows, of all folds, are of each class."""
        return self._counts_of_all([split.train for split in self.splits])

    def validation_rows(self) -> dict[str, int]:
        """How many validation rows, of all folds, are of each class."""
        return self._counts_of_all([split.val for split in self.splits])

    def _counts_of_all(self, parts: Sequence[Sequence[str]]) -> dict[str, int]:
        """`class_counts` of the rows that any of `parts` names, each counted once."""
        named = np.zeros(len(self.features), bool)
        for ids in parts:
            named[self.features.positions(ids).numpy()] = True
        return self.class_counts(self.features.ids[named])

    @cached_property
    def leaks(self) -> Leaks:
        """What the parts of the splits have in common."""
        return find_leaks(self.features, self.splits)

    def lines(self) -> list[str]:
        """What a user should hear of it: the notes, the rows of each class, and what the parts have in common."""
        return [*self.notes, *self.rows_lines()]

    def rows_lines(self) -> list[str]:
        """How many rows of each class there are, and what the parts have in common: a line each."""
        parts = (("training", self.training_rows()), ("validation", self.validation_rows()))
        counted = [
            f"{sum(counts.values())} for {part} ({', '.join(f'{name} {n}' for name, n in counts.items())})"
            for part, counts in parts
        ]
        folds = f" in {len(self.splits)} folds" if len(self.splits) > 1 else ""
        return [f"rows{folds}: {', '.join(counted)}", self.leaks.line()]

    def majority(self, split: Split) -> str:
        """The most common class of the split's training rows."""
        counts = self.class_counts(split.train)
        return max(counts, key=counts.__getitem__)


def class_numbers(tags: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(len(tags),) int64, positions in `classes`. Raises `UsageError` for a label that is none of them."""
    labels = Labels.of(tags)
    foreign = sorted(tag or "(none)" for tag in labels.counts() if tag not in classes)
    if foreign:
        raise UsageError(f"labels {', '.join(foreign)} in the data, expected {', '.join(classes)}; train again")
    return labels.numbers(classes)


# -- from a notebook --------------------------------------------------------------------------------------------


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
    class, confusion, log-loss, ECE, their intervals, and what the majority class of the run's training rows would
    score.

    See `metrics.figures`. Raises `UsageError` for labels that are no class of the run, and when no row has a label.
    """
    kept, tags = run.with_own_labels(data).labelled(ids)
    labels = class_numbers(tags, run.classes)
    return metrics.figures(labels, run.predict_proba(data, kept), run.classes, run.majority)


# -- loading and splitting --------------------------------------------------------------------------------------


def load_experiment(settings: ExperimentSettings, heads: Sequence[HeadConfig]) -> Experiment:
    """Join the caches, take the rows with a label, and split them. `heads` decides whether token features are read.

    Raises `UsageError` for whatever doesn't fit.
    """
    source = settings.source
    tokens = any(head_class(head.head).tokens or head_class(head.head).optional_tokens for head in heads)
    stream = None
    if streams(settings.stream, replace(source, tokens=tokens), "train", resolve_device(settings.device)):
        stream = Stream(replace(source, tokens=tokens), "train")
        data = stream.shell
    else:
        data = load_features(source.folder, "train", source.image, source.text, tokens=tokens)
    data, notes = with_fitting_tokens(data, heads)
    notes.append(data.summary())
    if stream is not None:
        notes.append(f"features are read in blocks of {stream.block_rows} rows as they are needed")
    together = settings.split.duplicates_together
    if together and data.told_by:
        notes.append(f"duplicates are also told by {', '.join(data.told_by)}")
    if settings.label_column is not None:
        cache = source.folder / f"{source.names[0]}_train.h5"
        target = read_target(settings.label_column, settings.label_data, cache, data.dataset.ids)
        data = data.with_target(target)
        notes.append(f"{target.words()} of {target.data} in place of the caches'")
    splits = make_splits(data, settings.split)  # of the caches' labels: corrections move no row
    if settings.corrections is not None:
        data = data.corrected(read_corrections(settings.corrections, data.dataset))
        words = corrected_words(data, splits)
        told = f"{words}; the caches keep theirs" if words else "no label differs from the caches'"
        notes.append(f"{settings.corrections}: {told}")
    return Experiment.of(
        data,
        splits,
        settings.norms,
        settings.scales,
        settings.device,
        duplicates_together=together,
        notes=notes,
        stream=stream,
    )


def experiment_of_run(run: Run, source: FeatureSource, device: str = "auto") -> Experiment:
    """The experiment a saved run came from, on the caches of `source` with the run's corrections, for training its
    configuration again on other parts of its rows. Raises `UsageError` when the caches aren't those it was trained on.
    """
    data = load_features(source.folder, "train", source.image, source.text, tokens=source.tokens)
    run.check(data, same_rows=True)
    data = run.with_own_labels(data)
    first = run.members[0].preprocessing
    group_of = duplicates_of(data) if run.splits[0].how.get("duplicates_together", True) else None
    norms = {key.partition("/")[2]: kind for key, kind in first.kinds.items()}
    on = resolve_device(device)
    return Experiment(data.to(on), run.classes, run.splits, group_of, norms, first.scales, on)


def with_fitting_tokens(data: FeatureSet, heads: Sequence[HeadConfig]) -> tuple[FeatureSet, list[str]]:
    """The features without the tokens of a side of which several caches have some, where `heads` can do without; and a
    note on that.

    Raises `UsageError` when a head needs tokens of a side it reads and no cache of that side has them."""
    read = {side for head in heads for side in head.sides}
    needed = {side for head in heads for side in head_class(head.head).tokens} & read
    notes = []
    for side in SIDES:
        tokens = f"{side}_tokens"
        owners = getattr(data, tokens)
        if side in needed and getattr(data, side):  # without any cache the head is trained on the other side alone
            data.require_tokens(side)
        elif len(owners) > 1:
            notes.append(
                f"note: {', '.join(owners)} all hold {side} tokens, none are used; name one such cache to use its own"
            )
            data = data.only({tokens: ()})
    return data, notes


def _known_classes(data: FeatureSet, splits: Sequence[Split]) -> tuple[list[str], list[Split]]:
    """The classes of the training and validation rows, and the splits less the test rows of others."""
    of_part = [{part: data.tags_of(getattr(split, part)) for part in PARTS} for split in splits]
    classes = {name for tags in of_part for part in ("train", "val") for name in tags[part].counts()} - {""}
    tested = [zip(split.test, tags["test"], strict=True) for split, tags in zip(splits, of_part, strict=True)]
    foreign = {i: tag for pairs in tested for i, tag in pairs if tag not in classes}
    if foreign:
        warnings.warn(
            f"{len(foreign)} test rows are of classes that no training or validation row has "
            f"({', '.join(sorted(set(foreign.values())))}): left out",
            stacklevel=2,
        )
    return sorted(classes), [split.without(foreign) for split in splits]


def on_features(config: TrainConfig, data: FeatureSet) -> TrainConfig:
    """The same training, of one side where the data have no other. Raises `UsageError` when nothing is left to read."""
    there = tuple(side for side in SIDES if getattr(data, side))
    read = tuple(side for side in config.head.sides if side in there)
    if not read:
        raise UsageError(
            f"head {config.head.head} is to read {', '.join(config.head.sides)}, and the caches give "
            f"{', '.join(there)}: nothing is left; name a cache of that side"
        )
    return replace(config, head=replace(config.head, sides=read))


# -- training ---------------------------------------------------------------------------------------------------


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


# -- measuring --------------------------------------------------------------------------------------------------


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
        for name in ("C", "ridge", "gamma")
        if any(name in settings_read(m.config.head.head) and getattr(m.config, name) is None for m in members)
    ]
    folds = f", {' and '.join(by_folds)} by inner folds of the training rows" if by_folds else ""
    return f"{epoch}temperature chosen on the validation rows{folds}"


def _rows_apart(tags: Labels, groups: np.ndarray | None) -> dict[str, int]:
    """How many rows of each class may lie in different folds: of those of one group (N,) only one."""
    counts = tags.counts()
    if groups is None:
        return dict(counts)
    names = sorted(counts)
    several = int(groups.max(initial=0)) + 1
    pairs = np.unique(tags.numbers_as(names).astype(np.int64) * several + groups)
    return dict(zip(names, np.bincount(pairs // several, minlength=len(names)).tolist(), strict=True))


def _downwards(most: int) -> Iterator[int]:
    """Numbers of folds to try from `most` to 2: at first each, then by tenths, so that a thousand take no square of
    it."""
    few = max(1, most - EACH_TRIED)
    yield from range(most, few, -1)
    while few > 1:
        yield few
        few = min(few - 1, few * 9 // 10)
