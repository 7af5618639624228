"""What a finetuning begins with: the very encoders and head of a run, or new ones from the registries."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from feats.acceleration import resolve_device, resolve_dtype
from feats.encoders.base import Encoder, Features
from feats.encoders.registry import ENCODERS, OFFLINE, load_encoder
from feats.errors import NoWeightsError, Remedy, UsageError
from feats.records import Pairs
from feats.source import SIDES
from feats.text import clean
from modeling.choices import SplitSettings
from modeling.experiments.experiment import Experiment, experiment_of_run
from modeling.features.inputs import Inputs, Preprocessing
from modeling.features.joined import FeatureSource, Ragged
from modeling.features.normalizer import Normalizer
from modeling.features.splits import make_splits
from modeling.features.stored_splits import Split
from modeling.finetuning.data import rows_as_features
from modeling.finetuning.model import PairModel, checked_side
from modeling.finetuning.scratch import untrained_text, untrained_vit
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.studies import EncoderChoice
from modeling.heads.config import HeadConfig
from modeling.heads.registry import build_head, head_class
from modeling.runs.encoders import check_weights, encoder_of
from modeling.runs.pairs import DataPlace, records_of
from modeling.runs.run import Member, Run, single_split

UNTRAINED = {"roberta": untrained_text, "vit": untrained_vit}  # encoders that can begin with random weights


@dataclass(frozen=True)
class Start:
    """A model before its first step, and the rows it is for. Tuning changes the model: a start serves once.

    `records` are all of the split that holds the labelled rows, `experiment` says which are for training and for
    validation. `member` is the head as stage 2 keeps it, `run` where it comes from (None: it is new). `cleaning` is the
    cleaning level of texts by cache.
    """

    model: PairModel
    member: Member
    records: Pairs
    experiment: Experiment
    cleaning: dict[str, str]
    run: Run | None = None

    @property
    def split(self) -> Split:
        """The rows of each part."""
        return self.experiment.splits[0]


def contents_of(start: Start) -> str:
    """A digest of the labelled rows: ids, labels, pictures and texts, as far as caches know them."""
    rows, corrections = start.experiment.features.dataset, start.experiment.features.corrections
    of = hashlib.sha256(json.dumps([rows.ids, rows.tags], default=list).encode())
    if corrections:
        of.update(json.dumps(corrections, sort_keys=True).encode())
    for values in (rows.image_hash, rows.text_key):
        of.update(values.tobytes())
    return of.hexdigest()


# -- from a run -------------------------------------------------------------------------------------------------


def start_from_run(
    run: Run,
    settings: TuneSettings,
    *,
    device: torch.device | str = "auto",
    folder: Path | None = None,
    place: DataPlace = DataPlace(),
    weights: Mapping[str, str] = {},
    new_head: bool = False,
    dropout: float | None = None,
) -> Start:
    """The encoders of the caches a run was trained on, as their fingerprints say, and the run's head: the model gives
    the run's own logits (to the rounding of cached features), so that tuning begins where the cached head ended (LP-FT:
    Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022). `folder` is that of the caches, where they
    don't lie where they did. With `new_head` the head has the run's shape, but begins anew; `dropout` replaces
    the run's.

    Raises `UsageError` for a run of several heads, an encoder without gradients or whose weights can't be had, and
    pairs that aren't those the caches were made of.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    if len(run.members) > 1:
        raise UsageError(
            f"{run.named} has {len(run.members)} heads; tuning begins with one: give a run of train_head.py without "
            "`seeds` and `folds`"
        )
    single_split(run)
    check_weights(weights, run.source.names)
    source = replace(run.source, folder=run.feature_folder(folder))
    experiment = without_features(experiment_of_run(run, source, "cpu"))
    records = records_of(source, place)
    [member] = run.members
    tokens = {key.partition("/")[2] for key in member.preprocessing.normalizers if "_tokens/" in key}
    encoders = {}
    for name in source.names:
        chosen = weights.get(name) or run.encoder_weights(name)
        fingerprint = run.source.fingerprints[name]
        _check_gradients(fingerprint["encoder"], name)
        encoders[name] = encoder_of(
            name, fingerprint, chosen, device=device, tokens=name in tokens, trainable=True, trained_by=run.named
        )
    if new_head or dropout is not None:
        member = _rebuilt(member, len(run.classes), settings.seed, new_head, dropout)
    own = member.to(device)
    model = PairModel(encoders, own.preprocessing, own.head, _autocast(encoders, settings.dtype, device))
    model.new_head = new_head
    cleaning = {name: run.source.fingerprints[name]["text_clean"] or "none" for name in source.names}
    return Start(model, member, records, experiment, cleaning, run)


def _rebuilt(member: Member, n_classes: int, seed: int, new: bool, dropout: float | None) -> Member:
    """The member with another dropout, or a new head of the same shape."""
    shape = member.config.head if dropout is None else replace(member.config.head, dropout=dropout)
    head = build_head(shape, member.widths, n_classes, [seed])
    if not new:
        head.load_state_dict(member.head.state_dict())
        head.eval()
    return replace(member, head=head, config=replace(member.config, head=shape))


def without_features(experiment: Experiment) -> Experiment:
    """Its rows without their features, which may be large."""
    kinds = ("image", "text", "views", "image_tokens", "text_tokens")
    return replace(experiment, features=experiment.features.only(dict.fromkeys(kinds, ())))


def _check_gradients(encoder: str, name: str) -> None:
    if encoder in ENCODERS and not ENCODERS[encoder].trainable:
        raise UsageError(
            f"the run reads {name}, and encoder {encoder} has no gradients: there is nothing in it to tune; give a run "
            "of encoders that have some"
        )


# -- from the registries ----------------------------------------------------------------------------------------


def start_from_encoders(
    image: EncoderChoice | None,
    text: EncoderChoice | None,
    head: HeadConfig,
    settings: TuneSettings,
    split: SplitSettings,
    *,
    device: torch.device | str = "auto",
    place: DataPlace = DataPlace(),
    weights: Mapping[str, str] = {},
    norm: str = "none",
    tokens: bool = False,
    scratch: Path | None = None,
    sizes: Mapping[str, Mapping[str, int]] = {},
) -> Start:
    """Encoders of stage 1's registry, one a side (one for both where both name it), and a new head of stage 2's.

    With `tokens` a head that can do without reads token features, too. `weights` (by encoder) give files or folders.
    `scratch` is the folder for untrained encoders, `sizes` (by side) theirs: layers, width, heads, patch.
    What the data set's reader remarks is a warning. Raises `UsageError` for whatever doesn't fit, and when weights
    can't be had.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    if head.head == "kernel":
        raise UsageError("a new kernel head has no rows to compare with; train one on caches first and name its `run`")
    choices = {side: choice for side, choice in (("image", image), ("text", text)) if choice and side in head.sides}
    if not choices:
        raise UsageError("no encoder for the sides the head reads; give `image_encoder`, `text_encoder` or both")
    names = [choice.name for choice in choices.values()]
    if len(set(names)) < len(set(map(repr, choices.values()))):
        raise UsageError(f"both sides name encoder {names[0]}, but in two ways; one encoder serves both: name it alike")
    head = replace(head, sides=tuple(side for side in SIDES if side in choices))
    caches = {side: [choices[side].name] if side in choices else [] for side in SIDES}
    tokens = tokens or bool(head_class(head.head).tokens)
    for choice in choices.values():
        if choice.name not in ENCODERS:
            raise UsageError(f"unknown encoder {choice.name!r}; there are {', '.join(ENCODERS)}")
        if not ENCODERS[choice.name].trainable:
            raise UsageError(f"encoder {choice.name} has no gradients: there is nothing in it to tune; name another")
    check_weights(weights, names)
    found = place.read()
    for remark in found.warnings:
        warnings.warn(remark, stacklevel=1)
    data = found["train"]
    source = FeatureSource(Path("."), tuple(caches["image"]), tuple(caches["text"]), tokens)
    rows = rows_as_features(data, source, "train")
    splits = make_splits(rows, split)
    if len(splits) > 1:
        raise UsageError(
            f"`split_file` holds {len(splits)} folds, and one model is tuned on one split; name the lists of one fold"
        )
    experiment = Experiment.of(rows, splits, device="cpu", duplicates_together=split.duplicates_together)
    encoders: dict[str, Encoder] = {}
    for side, choice in choices.items():
        if choice.name not in encoders:
            try:
                encoders[choice.name] = _load(choice, settings, tokens, device, weights, scratch, sizes.get(side, {}))
            except NoWeightsError as error:
                raise error.named(choice.name, _offline(choices, choice.name)) from None
    inputs, preprocessing = _measured(encoders, caches, head, tokens, norm, data)
    new = build_head(head, inputs.widths, len(experiment.classes), [settings.seed], device)
    model = PairModel(encoders, preprocessing.to(device), new, _autocast(encoders, settings.dtype, device))
    member = Member(settings.as_train_config(head), new, preprocessing, inputs.widths)
    cleaning = {name: encoder.text_clean for name, encoder in encoders.items()}
    return Start(model, member, data, experiment, cleaning)


def _load(
    choice: EncoderChoice,
    settings: TuneSettings,
    tokens: bool,
    device: torch.device,
    weights: Mapping[str, str],
    scratch: Path | None,
    sizes: Mapping[str, int],
) -> Encoder:
    chosen, model = weights.get(choice.name), choice.model
    if choice.untrained and chosen is None:
        if scratch is None:
            raise ValueError("untrained encoders need a folder for their weights")
        chosen = str(UNTRAINED[choice.name](scratch / f"{choice.name}_scratch", seed=settings.seed, **sizes))
        model = chosen
    options: dict[str, Any] = dict(choice.options)
    return load_encoder(
        choice.name, model, chosen, device=device, dtype="fp32", tokens=tokens, trainable=True, **options
    )


def _offline(choices: Mapping[str, EncoderChoice], name: str) -> Remedy:
    """Encoders that need no hub in place of encoder `name`, for all sides it is chosen for."""
    nearest = {side: next(other for other in OFFLINE[side] if ENCODERS[other].trainable) for side in SIDES}
    chosen = {side: nearest[side] for side, choice in choices.items() if choice.name == name}
    return Remedy(
        f"offline: {', '.join(chosen.values())}", settings={f"{side}_encoder": other for side, other in chosen.items()}
    )


@torch.no_grad()
def _measured(
    encoders: Mapping[str, Encoder],
    caches: Mapping[str, Sequence[str]],
    head: HeadConfig,
    tokens: bool,
    norm: str,
    data: Pairs,
) -> tuple[Inputs, Preprocessing]:
    """One pair as the head will read it, for its widths, and how features are normalised."""
    found: dict[str, torch.Tensor | Ragged] = {}
    for side in head.sides:
        [name] = caches[side]
        checked_side(encoders[name], side)
        out = _features_of_one(encoders[name], side, data)
        found[side] = out["feats"]
        if tokens and f"{side}_tokens" in head_class(head.head).read_features(head.sides):
            lengths = torch.tensor([0, out["tokens"].shape[1]])
            found[f"{side}_tokens"] = out["tokens"] if side == "image" else Ragged(out["tokens"][0], lengths)
    kinds = {f"{kind}/{caches[kind.removesuffix('_tokens')][0]}": _normalizer(norm) for kind in found}
    preprocessing = Preprocessing({side: list(names) for side, names in caches.items()}, {}, kinds)
    return Inputs(**found), preprocessing  # type: ignore[arg-type]


def _features_of_one(encoder: Encoder, side: str, data: Pairs) -> Features:
    if side == "image":
        image = encoder.image_side()
        return image.forward(encoder.to_pixels(image.blank()[None]))
    text = clean(next((record.text for record in data if record.text), "a"), encoder.text_clean)
    return encoder.text_side().forward([t.ids for t in encoder.text_side().tokenize([text])])


def _normalizer(norm: str) -> Normalizer:
    if norm == "standard":
        raise UsageError(
            "`norm` standard needs statistics of features; train a head on caches with it and name that run with `run`"
        )
    return Normalizer.fit(norm, torch.empty(0, 1))


# -- dtypes -----------------------------------------------------------------------------------------------------


def _autocast(encoders: Mapping[str, Encoder], dtype: str, device: torch.device) -> dict[str, torch.dtype]:
    """What each encoder multiplies in: under auto what extraction would choose for it."""
    chosen = {}
    for name, encoder in encoders.items():
        usual = ENCODERS[encoder.identity["encoder"]].auto_dtype
        chosen[name] = resolve_dtype(usual if dtype == "auto" and usual else dtype, device)
    return chosen
