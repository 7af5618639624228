"""The rows of joined caches, split, and ready to train heads on."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from feats.acceleration import resolve_device
from feats.errors import UsageError
from feats.names import cache_path
from feats.parts import is_cache
from feats.source import SIDES
from feats.strings import Labels
from modeling.choices import SplitSettings
from modeling.features.corrections import corrected_words, read_corrections
from modeling.features.dealing import deal_folds, fold_numbers
from modeling.features.duplicates import Duplicates
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource
from modeling.features.leaks import Leaks, find_leaks
from modeling.features.loading import load_features
from modeling.features.splits import duplicates_of, make_splits
from modeling.features.stored_splits import PARTS, Split, check_split
from modeling.features.stream import Stream, StreamedInputs, streams
from modeling.features.target import read_target
from modeling.heads.config import HeadConfig
from modeling.heads.registry import head_class
from modeling.runs.run import Run
from modeling.training.config import TrainConfig
from modeling.training.problem import Problem

INNER_FOLDS = 5
INNER_SEED = 0  # of all folds of training rows
EACH_TRIED = 16  # numbers of folds that are tried one by one where duplicates of several classes forbid the most

Dealt = TypeVar("Dealt")


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

    def inner_folds(self, ids: Sequence[str]) -> torch.Tensor:
        """Fold number of each id, (len(ids),) int8 where that holds them: stratified, duplicates in one, as many as
        the rarest class allows up to five."""
        return torch.from_numpy(self._fewer_folds(fold_numbers, ids, INNER_FOLDS))

    def folds_of(self, ids: Sequence[str], k: int) -> list[Split]:
        """`k` folds of training rows, or as many as the rarest class allows. Raises `UsageError` when that is none."""
        return self._fewer_folds(deal_folds, ids, k)

    def _fewer_folds(self, deal: Callable[..., Dealt], ids: Sequence[str], k: int) -> Dealt:
        """What `deal` makes of `k` folds or of as many as it doesn't refuse."""
        tags, groups = self.features.tags_of(ids), self.groups(ids)
        alone = _rows_apart(tags, groups)
        name, most = min(alone.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        # Every fold validates a row of each class, and duplicates lie in one: more can't be dealt.
        for fewer in _downwards(max(min(k, most), 2)):
            try:
                return deal(ids, tags, fewer, INNER_SEED, groups)
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
    if own := [name for name in source.names if is_cache(cache_path(source.folder, name, "val"))]:
        notes.append(
            f"note: the data's own part val ({', '.join(own)}) isn't read: validation rows are some of train's; "
            "modeling/inference_head.py `split` val scores it"
        )
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
