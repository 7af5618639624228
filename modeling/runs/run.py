"""A trained classifier in memory: an ensemble of one head or more, each with how its features are made.

Its probabilities are the mean of its members' calibrated ones, or what a logistic regression makes of their opinions.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.cache_reader import fingerprint_difference
from feats.errors import UsageError
from feats.names import cache_path
from feats.parts import is_cache
from modeling.evaluation.metrics import softmax
from modeling.features.cache_facts import content_digests
from modeling.features.inputs import Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource, Ragged
from modeling.features.stored_splits import Split
from modeling.features.target import RAW, Target
from modeling.heads.base import Head, n_parameters
from modeling.training.config import TrainConfig
from modeling.training.problem import predict_stack

# What of a cache's fingerprint may differ between training and prediction: other rows, another machine. (The last two
# follow from the dtype.)
FREE_TO_DIFFER = ("data", "versions", "dtype", "views", "tokens", "image_dtype", "float32_blocks")
OWN_CACHES = "feats"  # in a finetuned run's folder
FLOAT64_DEVICES = ("cpu", "cuda")  # others (mps, some xpu) refuse double precision, or emulate it


@dataclass(frozen=True)
class Member:
    """One trained head (one model, on the CPU), with how its features are made and its probabilities calibrated."""

    config: TrainConfig
    head: Head
    preprocessing: Preprocessing
    widths: dict[str, int]
    temperature: float = 1.0
    group: int = 0  # stacking: members of one group (the folds of one head) speak with one voice
    best_epoch: int | None = None  # None: its head has no epochs
    facts: dict[str, Any] = field(default_factory=dict)
    fold: int | None = None  # which fold's split it was trained on, from 1
    epochs: int | None = None  # how many it was trained for; None: as `best_epoch`, or not told

    def parameters_with_encoders(self, source: FeatureSource) -> int | None:
        """Of its head and of the encoders of every cache it reads; None where a cache doesn't tell."""
        read = [(side, name) for side, names in self.preprocessing.caches.items() for name in names]
        counts = [source.parameters.get(name, {}).get(side) for side, name in read]
        known = [count for count in counts if count is not None]
        return n_parameters(self.head) + sum(known) if len(known) == len(counts) else None

    def logits(self, features: FeatureSet, rows: torch.Tensor | None = None) -> np.ndarray:
        """(N, C) float32, of all rows or of `rows` (N,) int64. More caches than the member's own do no harm, nor do
        features on another device than the head."""
        own = self._own(features, rows).to(next(self.head.parameters()).device)
        inputs = self.preprocessing.apply(own).for_head(self.config.head)
        return predict_stack(self.head, inputs)[0].cpu().numpy()

    def misfit(self, features: FeatureSet) -> str:
        """Why features aren't of the widths that the head and its statistics are of, '' where they are."""
        for key, normalizer in self.preprocessing.normalizers.items():
            kind, _, name = key.partition("/")
            x = getattr(features, kind)[name]
            width = (x.values if isinstance(x, Ragged) else x).shape[-1]
            if normalizer.mean is not None and len(normalizer.mean) != width:
                return f"the {kind} features of {name} have {width} columns, its statistics {len(normalizer.mean)}"
        for side, names in self.preprocessing.caches.items():
            width = sum(getattr(features, side)[name].shape[-1] for name in names)
            if width != self.widths.get(side, width):
                return f"the {side} features have {width} columns, its head reads {self.widths[side]}"
        return ""

    def _own(self, features: FeatureSet, rows: torch.Tensor | None) -> FeatureSet:
        """The tensors `logits` reads: of the member's caches and of `rows` only, without augmented views."""
        caches = self.preprocessing.caches
        own = features.only({"views": (), **caches, **{f"{side}_tokens": names for side, names in caches.items()}})
        return own if rows is None else own.with_tensors(lambda x: x[rows.to(x.device)], lambda x: x.take(rows))

    def to(self, device: torch.device | str) -> "Member":
        """A copy on `device`; on the CPU where the head computes in double precision and the device may not."""
        double = any(tensor.dtype == torch.float64 for tensor in self.head.state_dict().values())
        if double and torch.device(device).type not in FLOAT64_DEVICES:
            device = "cpu"
        head = copy.deepcopy(self.head).to(device)  # a module moves in place, and this member stays where it is
        return replace(self, head=head, preprocessing=self.preprocessing.to(device))


@dataclass(frozen=True)
class Stacking:
    """Logistic regression on the groups' opinions, fitted on rows they hadn't seen. Wolpert, Stacked Generalization,
    Neural Networks 1992. `weight` (groups * C, C) and `bias` (C,) float64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def probabilities(self, opinions: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) of each group's opinion (N, C), see `opinion`."""
        return softmax(np.concatenate(opinions, 1) @ self.weight.numpy() + self.bias.numpy())


def opinion(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities less their mean over the classes, (N, C) float64, of logits (N, C)."""
    logits = np.asarray(logits, np.float64)
    centred: np.ndarray = logits - logits.mean(1, keepdims=True)
    return centred


@dataclass(frozen=True)
class FoldTest:
    """What the members of one fold (from 1) said of its own test part."""

    fold: int
    ids: Sequence[str]
    tags: Sequence[str]
    probabilities: np.ndarray  # (N, C), calibrated


@dataclass(frozen=True)
class Report:
    """What a training said of its validation rows, each predicted by members that weren't trained on it; and of its
    test part, where the split has one, in `test`: ids, tags and probabilities; where several splits have one, of each
    in `test_folds`. `batches` has a row for each training batch, where these were asked for."""

    ids: Sequence[str]
    tags: Sequence[str]
    probabilities: np.ndarray  # (N, C), calibrated
    figures: dict[str, Any]  # what goes into metrics.json
    history: list[dict[str, Any]]
    test: tuple[Sequence[str], Sequence[str], np.ndarray] | None = None
    test_folds: list[FoldTest] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Finetuned:
    """How a run came by encoders of its own. `encoders` are their folders in the run's, by cache; `data`, `layout` and
    `columns`, those that were named, say where its pairs lie; `facts` are all settings of the finetuning, and what it
    came to."""

    encoders: dict[str, str]
    data: str
    layout: str
    facts: dict[str, Any]
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A trained classifier. `source` says which caches it reads, `report` what its training said, until it is saved,
    `cost` what it took: seconds, peak_bytes (see `feats.acceleration.peak_bytes`) and device; None where it wasn't
    measured for this run alone, as in a sweep.

    One that was `finetuned` reads what its own encoders make of pairs: its caches lie in its own folder, and are made
    when they are first asked for. `corrections` are labels, by id, that it was trained and measured with in place of
    its caches', `target` those of another column than these."""

    classes: list[str]
    members: list[Member]
    source: FeatureSource
    split: Split | list[Split]
    training_rows: dict[str, int]  # of each class, of all folds
    stacking: Stacking | None = None
    finetuned: Finetuned | None = None
    path: Path | None = None
    nearby: Path | None = None  # where the folder of caches lies if it moved along with the run
    report: Report | None = field(default=None, repr=False, compare=False)
    cost: dict[str, Any] | None = field(default=None, compare=False)
    corrections: Mapping[str, str] = field(default_factory=dict, repr=False)
    target: Target | None = field(default=None, repr=False)

    @property
    def splits(self) -> list[Split]:
        """The one split, or those of all folds."""
        return [self.split] if isinstance(self.split, Split) else self.split

    @property
    def majority(self) -> str:
        """The most common class of the training rows."""
        return max(self.classes, key=self.training_rows.__getitem__)

    # -- as scikit-learn's classifiers -------------------------------------------------------------------------

    def predict_proba(self, data: FeatureSet, ids: Sequence[str] | None = None) -> np.ndarray:
        """Calibrated class probabilities (N, C) float64 of the rows `ids`, of all without; columns as `classes`.

        Raises `UsageError` for features that another encoder made than those the run was trained on, and unknown ids.
        """
        self.check(data)
        return self.probabilities(data, None if ids is None else data.positions(ids))

    def predict(self, data: FeatureSet, ids: Sequence[str] | None = None) -> list[str]:
        """The most probable class of each row, as `predict_proba`."""
        return [self.classes[column] for column in self.predict_proba(data, ids).argmax(1).tolist()]

    def score(self, data: FeatureSet, ids: Sequence[str] | None = None) -> float:
        """Accuracy on the rows `ids` (all without) that have a label. Raises `UsageError` when none has."""
        kept, tags = self.with_own_labels(data).labelled(ids)
        return float(np.mean([a == b for a, b in zip(self.predict(data, kept), tags, strict=True)]))

    def save(self, path: Path | str, *, overwrite: bool = False) -> "Run":
        """Write the run folder `path`; returns the run as it lies there. Raises `UsageError` when there is something
        already (with `overwrite`: something that isn't a run) or it can't be written."""
        from modeling.runs.folder import save_run  # which is built on this module

        return save_run(self, path, overwrite=overwrite)

    # -- inside ------------------------------------------------------------------------------------------------

    def probabilities(self, features: FeatureSet, rows: torch.Tensor | None = None) -> np.ndarray:
        """As `predict_proba`, by row numbers (N,) int64, of features that were checked before."""
        logits = [m.logits(features, rows) for m in self.members]
        if self.stacking is None:
            calibrated = [softmax(z, m.temperature) for z, m in zip(logits, self.members, strict=True)]
            return np.asarray(np.mean(calibrated, axis=0))
        groups = sorted({m.group for m in self.members})
        of_group = [[opinion(z) for z, m in zip(logits, self.members, strict=True) if m.group == g] for g in groups]
        return self.stacking.probabilities([np.mean(opinions, axis=0) for opinions in of_group])

    def to(self, device: torch.device | str) -> "Run":
        """A copy with every head and its statistics on `device`."""
        return replace(self, members=[m.to(device) for m in self.members])

    def feature_folder(self, given: Path | None = None) -> Path:
        """`given`, or else the folder of the caches the run was trained on: of one that was finetuned, its own. Raises
        `UsageError` when that isn't found."""
        if given is not None:
            return given
        if self.finetuned is not None:
            return self.folder / OWN_CACHES
        # The working directory has no say: another project's caches have the same names. As long as the run and the
        # caches lie where they lay, they need no proof. After a move the project as a whole (then `nearby` is right) or
        # the run alone (then the absolute folder is) may have moved, and other caches may lie where these did: those
        # that still hold the run's own training rows are taken.
        trained_on = self.source.folder
        places = list(dict.fromkeys([self.nearby or trained_on, trained_on]))
        reasons = {}
        for place in places:
            reasons[place] = self._why_not(place, moved=len(places) > 1)
            if not reasons[place]:
                return place
        raise UsageError(
            f"the caches that {self.named} was trained on aren't found: "
            f"{', '.join(f'{place}: {reason}' for place, reason in reasons.items())}; name their folder with `feats`"
        )

    def _why_not(self, folder: Path, moved: bool) -> str:
        """Why `folder` doesn't hold the run's caches, '' if it does; where nothing `moved` it does if it exists."""
        if not folder.is_dir():
            return "no such folder"
        contents = self.source.contents
        lacking = [f"{name}_train.h5" for name in contents if not is_cache(cache_path(folder, name, "train"))]
        if moved and lacking:
            return f"no {lacking[0]} to know it by"
        try:
            others = moved and content_digests(folder, "train", contents) != contents
        except UsageError as error:
            return str(error)
        return "its training rows are others" if others else ""

    def own_labels(self, data: FeatureSet) -> Mapping[str, str]:
        """Its corrections where `data` are the rows it was trained on; none elsewhere: an id may be another pair's."""
        if data.split != "train":
            return {}
        for name in self.source.names:
            here, trained = (source.fingerprints.get(name, {}).get("data") for source in (data.source, self.source))
            if here != trained and trained is not None:  # a finetuned run's own caches are made after it
                return {}
        return self.corrections

    def with_own_labels(self, data: FeatureSet) -> FeatureSet:
        """`data` with the labels of its target and of `own_labels`, but for those that were corrected in `data`
        before. Raw pairs keep the labels they were given with."""
        if self.target is not None and data.target is None and data.split != RAW:
            data = data.with_target(self.target)
        return data.corrected({**own, **data.corrections}) if (own := self.own_labels(data)) else data

    def check(self, data: FeatureSet, *, same_rows: bool = False) -> None:
        """Raise `UsageError` when `data` lacks features that the run reads, when another encoder made them than the run
        was trained on, or, with `same_rows`, when they are of another data set."""
        folder = data.source.folder
        for key in {key for member in self.members for key in member.preprocessing.normalizers}:
            kind, _, name = key.partition("/")
            if name not in getattr(data, kind):
                side = kind.removesuffix("_tokens")
                what = f"the tokens of {name}" if kind != side else f"{name} as {side} features"
                remedy = "load that cache, too"
                if kind != side:
                    again = "extract it again with `tokens` `overwrite`"
                    remedy = again if data.source.tokens else "load the features with `tokens`"
                raise UsageError(f"{self.named} reads {what}, and the data from {folder} have none; {remedy}")
        misfit = next((told for member in self.members if (told := member.misfit(data))), "")
        if misfit:
            raise UsageError(f"{self.named} doesn't fit {folder}: {misfit}; name other caches, or train again")
        for name in self.source.names:
            cached, trained = (source.fingerprints.get(name, {}) for source in (data.source, self.source))
            if same_rows and cached.get("data") != trained.get("data"):
                raise UsageError(
                    f"the cache {name} in {folder} holds other rows than {self.named} was trained on ("
                    f"{fingerprint_difference(*({'data': f.get('data')} for f in (cached, trained)))}); name the "
                    "folder of that run's caches with `feats`, or train again on these"
                )
            free = FREE_TO_DIFFER if name in self.source.text else (*FREE_TO_DIFFER, "text_clean")
            kept = [{k: v for k, v in f.items() if k not in free} for f in (cached, trained)]
            difference = fingerprint_difference(*kept)
            if difference:
                raise UsageError(
                    f"the cache {name} in {folder} isn't what {self.named} was trained on ({difference}); extract it "
                    "again with the encoder of that run, or train a new head"
                )

    def encoder_weights(self, name: str) -> str | None:
        """The folder of the weights of the encoder of a cache, where the run has tuned it."""
        place = None if self.finetuned is None else self.finetuned.encoders.get(name)
        return None if place is None else str(self.folder / place)

    @property
    def folder(self) -> Path:
        """Where it was saved. Raises `UsageError` for a run that wasn't."""
        if self.path is None:
            raise UsageError("this run has no folder; save it first")
        return self.path

    @property
    def named(self) -> str:
        """How messages call it."""
        return str(self.path or "this run")


def single_split(run: Run) -> Split:
    """The run's split. Raises `UsageError` for a run whose parts aren't one configuration trained on one split."""
    remedy = "train with modeling/train_head.py, with `val_ratio`, and name that run as `run`"
    if run.stacking is not None:
        raise UsageError(
            f"{run.named} is an ensemble of `auto`, whose parts were chosen on all of its training rows: none is "
            f"unseen; {remedy}"
        )
    if run.finetuned is not None:
        raise UsageError(
            f"{run.named} was finetuned: there are no cached features of its training rows; extract some with its "
            "encoders, `weights` and its folder, train a head on these, and name that run"
        )
    if isinstance(run.split, list):
        raise UsageError(f"{run.named} is a cross-validation: each of its rows is validation in some fold; {remedy}")
    return run.split
