"""The command line of this stage: the options that scripts share, the typed settings that they fill, and how messages
are shown. Defaults live in the dataclasses; help shows them."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feats.command_line.exit_status import EXIT_INTERRUPTED, EXIT_UNUSABLE
from feats.command_line.messages import refuse, refuse_without_extra, show_warning, with_messages
from feats.command_line.options import add_columns_option, columns_from, positive
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from feats.interrupts import interruptible
from feats.terminal import progress
from modeling import choices
from modeling.choices import ABSENT, NORMS, SHARE, STREAMING, SplitSettings
from modeling.finetuning.augment import TextAugmentation
from modeling.finetuning.settings import AUGMENTED, DTYPES, TuneSettings
from modeling.finetuning.studies import TUNING_RECIPES, tuning_recipe, with_one_rate
from modeling.heads.config import (
    ABLATIONS,
    ATTENTION_NORMS,
    IMAGE_POOLINGS,
    IMAGE_POSITIONS,
    HeadConfig,
    ablation_words,
)
from modeling.heads.registry import HEADS
from modeling.training.config import (
    CLASS_WEIGHTS,
    MONITORS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    Epochs,
    TrainConfig,
    flat,
    from_flat,
    settings_read,
)
from modeling.training.recipes import (
    END_TO_END,
    OF_FIXED_FOLDS,
    RECIPES,
    SPLIT_SETTINGS,
    cached_recipe,
    recipe_settings,
)

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment, ExperimentSettings
    from modeling.features.joined import FeatureSource
    from modeling.finetuning.pairs import DataPlace
    from modeling.prediction.ablation import AbsentOf
    from modeling.runs.run import Run


OWN = "own"
TUNING_GRID = ("lr", "dropout", "bs", "ep")  # what a grid of finetunings varies
HEAD_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # of single heads: help and keywords
    "layers": ("gated_transformer: Transformer layers (default: the head's own, 3)", {"type": int}),
    "attention_norm": ("coattention: behind its self-attentions", {"choices": ATTENTION_NORMS}),
    "image_positions": ("coattention: positions added to image tokens", {"choices": IMAGE_POSITIONS}),
    "image_pooling": ("coattention: image tokens to one vector", {"choices": IMAGE_POOLINGS}),
}
ALIASES = {"ep": "--epochs", "bs": "--batch-size", "D": "--hidden", "ablation": "--modality"}
MODALITIES = ("both", "text", "image")  # as ABLATIONS
BY_METHODS = ("tune", "lora", "soup", "wise_ft")  # what methods decide there
RUN_HELP = "a path, a name in --runs, newest, or best: by its validation figure, of those on the newest's rows"
# Settings that the command line knows by another name.
OPTION_OF = {"sides": "ablation", "image": "vtype", "text": "ttype"}


def new_parser(doc: str, *examples: str) -> ScriptParser:
    """A script's parser, see there; `doc` describes the script, `examples` are commands that its help ends with."""
    return ScriptParser(doc, examples=examples)


def add_feature_options(parser: ScriptParser) -> None:
    """Which caches of each side, their normalisations and scales."""
    group = parser.add_argument_group("features")
    group.add_argument("--feats", type=Path, default=choices.FEATS, metavar="DIR", help="folder of caches")
    group.add_argument(
        "--vtype", nargs="*", metavar="CACHE", help="caches of the image side (default: clip; none with --ttype alone)"
    )
    group.add_argument(
        "--ttype", nargs="*", metavar="CACHE", help="caches of the text side (default: those of --vtype that have one)"
    )
    group.add_argument(
        "--norm",
        nargs="+",
        metavar="KIND|CACHE=KIND",
        help=f"normalisation of each cache: {', '.join(NORMS)} (default: none, or the recipe's)",
    )
    group.add_argument("--scale", nargs="+", metavar="CACHE=FACTOR", help="factor behind a normalisation")
    parser.fill_in(features_in_use)


def add_split_options(parser: ScriptParser) -> None:
    """Options for every field of `SplitSettings`; ratios and seed that weren't typed are absent from the namespace."""
    group = parser.add_argument_group("split")
    defaults = SplitSettings()
    for name, kind, field, text in (
        ("--val-ratio", float, "val_ratio", "share of rows for validation"),
        ("--test-ratio", float, "test_ratio", "share of rows for testing"),
        ("--split-seed", int, "seed", "seed of the split"),
    ):
        shown = f"{text} (default: {getattr(defaults, field)}, or the recipe's)"
        group.add_argument(name, type=kind, default=SUPPRESS, help=shown)
    group.add_argument("--folds", type=positive, metavar="K", help="k-fold cross-validation instead of one split")
    group.add_argument(
        "--split-file",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="ids of train, val and test: one file, e.g. a run's split.json, or three lists; folds: a pattern of lists "
        "such as 'splits/{part}_{fold}.txt'",
    )
    group.add_argument(
        "--duplicates",
        choices=("together", "apart"),
        default="together",
        help="pairs with the same picture or text: on one side of a split, or wherever they fall",
    )


def add_corrections_option(parser: ScriptParser) -> None:
    """Labels in place of the caches'."""
    parser.add_argument(
        "--corrections",
        type=Path,
        metavar="FILE",
        help="labels in place of the caches': CSV of id and label, or audit_labels.py's with its column corrected",
    )


def add_label_column_options(parser: ScriptParser) -> None:
    """Another target than the caches' labels."""
    group = parser.add_argument_group("another target")
    group.add_argument(
        "--label-column",
        metavar="COLUMN",
        help="the labels in this column of the table the caches came from, in place of the caches'",
    )
    group.add_argument(
        "--data", type=Path, metavar="DIR|FILE", help="the table of --label-column (default: where the caches say)"
    )


def add_data_options(group: ArgumentParser | _ArgumentGroup, text: str) -> None:
    """Where raw pairs lie, and how; `data_place` reads them. `text` is the help of --data."""
    group.add_argument("--data", type=Path, metavar="DIR|FILE", help=text)
    group.add_argument("--layout", help="how they lie on disk (default: detected)")
    add_columns_option(group, "as the caches were made, or else by usual names")


def data_place(args: Namespace) -> DataPlace:
    """From the options of `add_data_options`; of scripts without --layout it is detected. Raises `UsageError` as
    `columns_from`."""
    from modeling.finetuning.pairs import DataPlace  # slow to import

    return DataPlace(args.data, getattr(args, "layout", None), columns_from(args))


def add_csv_option(parser: ScriptParser) -> None:
    """CSV for spreadsheets."""
    parser.add_argument(
        "--csv-safe",
        action="store_true",
        help="put a ' before texts in CSV that a spreadsheet would take for formulas (= + - @ tab CR first); such a "
        "file's ids and labels may differ from the data's",
    )


def add_stream_option(parser: ScriptParser) -> None:
    """Features in memory or streamed."""
    parser.add_argument(
        "--stream",
        choices=STREAMING,
        default=STREAMING[0],
        help="read features in blocks as they are needed, for caches larger than memory (auto: where they would take "
        f"more than {SHARE:g} of what is available)",
    )


def add_run_options(parser: ScriptParser) -> None:
    """The folder of runs, and the device."""
    group = parser.add_argument_group("output and compute")
    group.add_argument("--runs", type=Path, default=choices.RUNS, metavar="DIR", help="folder of runs")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_ablation_options(parser: ScriptParser, weights: bool = False) -> None:
    """Scoring with an absent side; with `weights` also where encoders' weights lie."""
    group = parser.add_argument_group("test-time ablation")
    group.add_argument(
        "--ablation-eval",
        action="store_true",
        help="also score with a black picture (text only) and with an empty text (image only)",
    )
    group.add_argument(
        "--absent",
        choices=ABSENT,
        default=ABSENT[0],
        help="what stands in for an absent side: blank, a black picture or an empty text, encoded once by the encoder "
        "of the cache; or the mean of the training rows' features",
    )
    if weights:
        group.add_argument(
            "--weights", nargs="+", default=[], metavar="CACHE=PATH", help="weights of an encoder that aren't found"
        )


def add_training_options(parser: ScriptParser, grid: bool = False) -> None:
    """Options for every field of `TrainConfig` and `HeadConfig`. With `grid` they take several values. Options that
    weren't typed are absent from the namespace, so that a recipe can tell them from typed ones."""
    defaults = {**flat(TrainConfig()), "ablation": 0}
    several = {"nargs": "+"} if grid else {}
    group = parser.add_argument_group("head and training")
    group.add_argument(
        "--recipe",
        choices=(*RECIPES, OWN),
        help=f"settings of a reference study; {OWN}: of the one the head comes from, on cached features, the split "
        "aside. Typed options win",
    )

    def add(name: str, text: str, **keywords: Any) -> None:
        default = defaults[name]
        shown = "" if default is None or default is False else f" (default: {default})"
        group.add_argument(*option_names(name), default=SUPPRESS, help=text + shown, **keywords)

    add("head", f"{'all, or some' if grid else 'one'} of {', '.join(HEADS)}", **several)
    add("D", "width of the common space or hidden layer", type=int, **several)
    add("dropout", "(default: the head's own)", type=float, **several)
    words = ", ".join(f"{number} {ablation_words(sides)}" for number, sides in enumerate(ABLATIONS))
    words += f"; or {', '.join(MODALITIES)}"
    add("ablation", words, type=modality, choices=range(len(ABLATIONS)), **several)
    for name, (text, keywords) in HEAD_OPTIONS.items():
        add(name, text, **keywords, **several)
    add("optimizer", ", ".join(OPTIMIZERS), **several)
    add("lr", "learning rate, or its peak", type=float, **several)
    add("weight_decay", "of the optimiser", type=float, **several)
    add("schedule", ", ".join(SCHEDULES), **several)
    add("ep", "epochs", type=int, **several)
    add("bs", "batch size", type=int, **several)
    add("label_smoothing", "share of the target spread over all classes", type=float, **several)
    add("class_weights", "none, balanced, sqrt, or NAME=VALUE,NAME=VALUE", **several)
    add("balanced_sampler", "draw every class equally often", action="store_true")
    ranks = "; ranks the table too (of several the first; accuracy in place of loss)" if grid else ""
    add("monitor", f"what decides the best epoch: {', '.join(MONITORS)}{ranks}", **several)
    add("patience", "epochs without a better one before stopping", type=int, **several)
    add("min_gain", "of the monitored figure, to count as better", type=float, **several)
    add("precision", "of the products in training: " + ", ".join(PRECISIONS), **several)
    add("seed", "of weights, batches and dropout", type=int)
    add("deterministic", "the same to the bit each time, on one device with the same versions", action="store_true")
    by_folds = "chosen by inner folds where not given"
    add("C", f"linear: inverse strength of the penalty; {by_folds}", type=float, **several)
    add("ridge", f"kernel: strength of the penalty; {by_folds}", type=float, **several)
    add("gamma", f"kernel: gamma of the RBF times the mean squared distance; {by_folds}", type=float, **several)
    group.add_argument("--seeds", type=positive, metavar="N", help="train with N seeds, from --seed up (default: 1)")
    parser.fill_in(training_in_use)


def option_names(name: str) -> list[str]:
    """A setting's option, and another name of it where there is one."""
    return [_typed(name), *([ALIASES[name]] if name in ALIASES else [])]


def modality(text: str) -> int:
    """The number of an ablation, also from what it leaves: both, text, image."""
    return MODALITIES.index(text) if text in MODALITIES else int(text)


modality.__name__ = "modality"  # as argparse shows it


def add_tuning_options(parser: ScriptParser, grid: bool = False) -> None:
    """Options for every field of `TuneSettings`. With `grid` those of `TUNING_GRID` take several values. Those that
    weren't typed are absent from the namespace, so that a recipe can tell them from typed ones."""
    defaults = asdict(TuneSettings())
    group = parser.add_argument_group("finetuning")
    group.add_argument(
        "--recipe",
        choices=tuple(TUNING_RECIPES),
        help="settings of a reference study's end-to-end training; typed options win",
    )

    def add(name: str, text: str, **keywords: Any) -> None:
        default = defaults[name]
        shown = "" if default in (None, False, ()) else f" (default: {default})"
        several: dict[str, Any] = {"nargs": "+"} if grid and name in TUNING_GRID else {}
        group.add_argument(*option_names(name), default=SUPPRESS, help=text + shown, **several, **keywords)

    add("tune", "which weights: all, head, or last-N, the last N blocks of every encoder and the head")
    add("lora", "adapters of this rank on attention projections, in place of the encoders' weights", type=int)
    add("lora_alpha", "adapters count alpha / rank (default: the rank)", type=float)
    add("ep", "epochs", type=int)
    add("bs", "rows of a step, of all processes together", type=int)
    add(
        "micro_bs",
        "rows at a time (default: a process's share of --bs): less memory; dropout goes by them",
        type=int,
    )
    add("optimizer", ", ".join(OPTIMIZERS))
    add("lr", "peak learning rate of the encoders' last layers", type=float)
    add("head_lr", "of the head (default: ten times --lr)", type=float)
    add("layer_decay", "the rate of each block is this times the rate of the one above", type=float)
    add("weight_decay", "of matrices", type=float)
    add("schedule", ", ".join(SCHEDULES))
    add("warmup", "share of the steps in which the rate rises", type=float)
    add("clip_grad", "largest norm of a step's gradient, 0 for any", type=float)
    add("train_batch_norm", "let encoders' batch norms follow the training rows", action="store_true")
    add("label_smoothing", "share of the target spread over all classes", type=float)
    add("class_weights", "none, balanced, sqrt, or NAME=VALUE,NAME=VALUE")
    add("monitor", f"what decides which weights are kept: {', '.join(MONITORS)}")
    add("patience", "epochs without a better one before stopping", type=int)
    add("min_gain", "of the monitored figure, to count as better", type=float)
    add("augment", "sides whose training rows are augmented anew in each epoch", nargs="+", choices=AUGMENTED)
    group.add_argument("--particles", action="store_true", help="text augmentation also adds mood particles (study B)")
    add("soup", "try greedy soups of this many best epochs", type=int)
    add("wise_ft", "try weights between the start and the tuned ones", action="store_true")
    add("dtype", f"of the encoders' products: {', '.join(DTYPES)}; auto as in extraction")
    add("seed", "of new heads, data order, augmentation and dropout", type=int)
    add("deterministic", "the same to the bit each time, on one device with the same versions", action="store_true")
    add("checkpoint_steps", "checkpoints after so many steps, besides those at each epoch's end", type=int)
    if not grid:  # of whose folds each holds out some of the rows
        group.add_argument(
            "--bad-cases", type=Path, metavar="FILE", help="bad_cases.csv: its training rows come once more, augmented"
        )
    group.add_argument(
        "--live-trunk", action="store_true", help="with --tune last-N compute the frozen blocks in every epoch"
    )
    parser.fill_in(partial(tuning_in_use, grid=grid))


def tuning_settings(args: Namespace, classes: Sequence[str] | None = None) -> TuneSettings:
    """From the options of `add_tuning_options`; class weights only when the `classes` are known."""
    names = {f.name for f in fields(TuneSettings)} - {"text_augmentation", "class_weights"}
    recipe = tuning_recipe(args.recipe, getattr(args, "model", None))
    given = {name: value for name, value in {**recipe, **vars(args)}.items() if name in names}
    given = with_one_rate(given) if recipe else given
    weights: str = getattr(args, "class_weights", "none")
    return TuneSettings(
        **{**given, "augment": tuple(given.get("augment", ()))},
        text_augmentation=TextAugmentation(particles=args.particles),
        class_weights=parse_class_weights(weights, classes) if classes else "none",
    )


def tuning_command(settings: TuneSettings) -> list[str]:
    """The options of `add_tuning_options` that give these settings; those that are no field of them aside."""
    usual, words = TuneSettings(), []
    for name in (f.name for f in fields(TuneSettings)):
        value = getattr(settings, name)
        if value is None or value == getattr(usual, name) or name == "text_augmentation":
            continue
        if name == "class_weights" and not isinstance(value, str):
            value = ",".join(f"{of}={weight!r}" for of, weight in dict(value).items())
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        words += [_typed(name), *map(str, values)]
    return [*words, *(["--particles"] if settings.text_augmentation.particles else [])]


# -- from options to settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The trainings a command line asks for: the settings of each, flat, with class weights as they were typed."""

    points: tuple[dict[str, Any], ...]
    monitor: str = TrainConfig.monitor  # one figure for all: typed, or of the one recipe of all

    @property
    def heads(self) -> list[HeadConfig]:
        """The head of each training."""
        return [config.head for config in self._configs(lambda weights: "none")]

    def configs(self, classes: Sequence[str]) -> list[TrainConfig]:
        """The trainings on data of `classes`. Raises `UsageError` for class weights of others."""
        return self._configs(lambda weights: parse_class_weights(weights, classes))

    def _configs(self, weights: Callable[[str], Any]) -> list[TrainConfig]:
        of_default = TrainConfig.class_weights
        return [from_flat({**p, "class_weights": weights(p.get("class_weights", of_default))}) for p in self.points]


def grid_from(args: Namespace, **fixed: Any) -> Grid:
    """Every combination of the typed training options that have several values, over the recipe's settings. Head `all`
    is every head that the caches in use suit (`_all_heads`); with recipe `own` each head gets its own study's settings,
    the split aside. `fixed` stand in for options that weren't typed. Raises `UsageError` for values out of range."""
    known = set(flat(TrainConfig()))
    typed = {name: value for name, value in _training_settings(args).items() if name in known}
    recipe = "" if args.recipe in (None, OWN) else args.recipe
    values = {"head": RECIPES[recipe].get("head", HeadConfig.head) if recipe else HeadConfig.head, **fixed, **typed}
    axes = {name: value for name, value in values.items() if isinstance(value, list)}
    if "all" in axes.get("head", ()):
        axes["head"] = _all_heads(feature_source(args), axes.get("sides", [HeadConfig.sides]))
    points = [{**values, **dict(zip(axes, point, strict=True))} for point in product(*axes.values())]
    of_head = {head: own_recipe(head) if args.recipe == OWN else recipe for head in {p["head"] for p in points}}
    points = [{**_recipe_settings(args, of_head[p["head"]], p["head"]), **p} for p in points]
    monitor = values.get("monitor", RECIPES.get(recipe, {}).get("monitor", TrainConfig.monitor))
    grid = Grid(tuple(points), monitor[0] if isinstance(monitor, list) else monitor)
    _ = grid.heads  # says now, before any data are read, what is out of range
    return grid


def _all_heads(source: FeatureSource, ablations: Sequence[tuple[str, ...]]) -> list[str]:
    """The heads that need no token features, and those whose needs the caches meet under each of the `ablations`."""
    from modeling.features.cache_facts import cached_widths
    from modeling.heads.base import head_class

    widths = cached_widths(source, "train")

    def suits(name: str, sides: Sequence[str]) -> bool:
        there = tuple(side for side in sides if source.of(side))
        try:
            head_class(name).require(HeadConfig(name, sides=there or tuple(sides)), widths)
        except UsageError:
            return False
        return True

    return [name for name, head in HEADS.items() if not head.tokens or all(suits(name, sides) for sides in ablations)]


def own_recipe(head: str) -> str:
    """The recipe of the study a head comes from, on cached features; '' where there is none."""
    from modeling.heads.base import head_class

    return cached_recipe(head_class(head).study)


def _recipe_settings(args: Namespace, recipe: str, head: str) -> dict[str, Any]:
    """What a recipe has for a head and its training; it multiplies in fp16 on a GPU only."""
    from feats.acceleration import resolve_device

    known = flat(TrainConfig())
    settings = {field: value for field, value in recipe_settings(recipe, head).items() if field in known}
    if "precision" in settings and resolve_device(args.device).type == "cpu":
        del settings["precision"]
    return settings


def print_recipe(args: Namespace, heads: Sequence[str]) -> None:
    """Say where a recipe isn't made for what is trained, or can't be followed to the letter, for any of `heads`."""
    from feats.acceleration import resolve_device
    from modeling.heads.base import head_class

    trained = [head for head in heads if not head_class(head).closed_form()]
    typed = vars(args)
    if trained and args.recipe in END_TO_END and not {"lr", "ep"} <= typed.keys():
        print_note(
            f"rate and epochs of --recipe {args.recipe} belong to end-to-end tuning: heads on cached features "
            f"hardly leave the majority class with them; --recipe {cached_recipe(args.recipe)} has those for such heads"
        )
    if args.recipe in OF_FIXED_FOLDS and not args.split_file:
        print_note(f"--recipe {args.recipe} belongs to fixed folds, with --split-file; this is another split")
    used = {own_recipe(head) if args.recipe == OWN else args.recipe or "" for head in trained}
    low = {RECIPES[name]["precision"] for name in used if "precision" in RECIPES.get(name, {})}
    if low and "precision" not in typed and resolve_device(args.device).type == "cpu":
        print_note(f"{', '.join(low)} of --recipe {args.recipe} is for a GPU, here it is {TrainConfig.precision}")


def _training_settings(args: Namespace) -> dict[str, Any]:
    """What was typed, by the settings' names."""
    typed = dict(vars(args))
    if "ablation" in typed:
        given = typed.pop("ablation")
        typed["sides"] = [ABLATIONS[k] for k in given] if isinstance(given, list) else ABLATIONS[given]
    return typed


def experiment_settings(args: Namespace) -> ExperimentSettings:
    """From the options of `add_feature_options`, `add_split_options`, `add_corrections_option` and `add_run_options`.

    Raises `UsageError` as `split_settings`, and for norms or scales of caches that aren't named."""
    from modeling.experiments.experiment import ExperimentSettings

    source = feature_source(args)
    recipe = RECIPES.get(args.recipe or "", {})
    norms = named_norms(args.norm or [recipe.get("norm", "none")], source.names)
    split = split_settings(args, recipe)
    scales = named_values(args.scale or [], "--scale")
    stream = getattr(args, "stream", ExperimentSettings.stream)
    column, table = getattr(args, "label_column", None), getattr(args, "data", None)
    if hasattr(args, "label_column") and table is not None and column is None:
        raise UsageError("--data is the table of --label-column: name the column, or leave it out")
    labels = (column, table) if column is not None else (None, None)
    return ExperimentSettings(source, split, norms, scales, args.device, args.corrections, stream, *labels)


def split_settings(args: Namespace, recipe: Mapping[str, Any] = {}) -> SplitSettings:
    """From the options of `add_split_options`, over a recipe's. Raises `UsageError` for two typed ones that both make
    the split."""
    for option, others in (
        ("split_file", ("folds", "val_ratio", "test_ratio", "split_seed")),
        ("folds", ("val_ratio", "test_ratio")),
    ):
        idle = [_typed(name) for name in others if getattr(args, name, None) is not None]
        if getattr(args, option) and idle:
            raise UsageError(
                f"{_typed(option)} leaves no use for {', '.join(idle)}: both say how to split; give one or the other"
            )
    chosen = {**recipe, **vars(args)}
    given = {name.removeprefix("split_"): chosen[name] for name in SPLIT_SETTINGS if name in chosen}
    return SplitSettings(
        **given,
        folds=args.folds,
        files=tuple(args.split_file or ()),
        duplicates_together=args.duplicates == "together",
    )


def feature_source(args: Namespace) -> FeatureSource:
    """The caches of each side. With --ttype alone there is no image side; without it the text side comes from the image
    side's caches that have one; without both they are CLIP's."""
    from modeling.features.cache_facts import caches_with
    from modeling.features.joined import FeatureSource

    image = args.vtype if args.vtype is not None else [] if args.ttype else ["clip"]
    text = args.ttype if args.ttype is not None else caches_with("text", args.feats, "train", image)
    return FeatureSource(args.feats, tuple(image), tuple(text))


def named_norms(items: Sequence[str], caches: Sequence[str]) -> dict[str, str]:
    """{"clip": "l2", "vader": "none"} of ["l2", "vader=none"]."""
    norms = dict.fromkeys(caches, "none")
    targets = [item.rpartition("=")[0] for item in items]
    if len(set(targets)) < len(targets):
        raise UsageError(
            f"--norm {' '.join(items)}: expected one KIND for all caches, and at most one CACHE=KIND for each; run the "
            "command once for each kind to compare them"
        )
    for item in sorted(items, key=lambda item: "=" in item):  # a named one wins
        name, named, kind = item.rpartition("=")
        if kind not in NORMS or (named and name not in norms):
            raise UsageError(
                f"--norm {item}: expected one of {', '.join(NORMS)}, or CACHE=KIND with a cache in use "
                f"({', '.join(norms)})"
            )
        norms |= {name: kind} if named else dict.fromkeys(norms, kind)
    return norms


def parse_class_weights(text: str, classes: Sequence[str]) -> str | dict[str, float]:
    """none, balanced, sqrt, or {"a": 2.0, "b": 0.5} of "a=2,b=0.5". Raises `UsageError` for anything else."""
    if text in CLASS_WEIGHTS:
        return text
    weights: dict[str, float] = {}
    rest, more = text, ","
    while more:
        # A name may hold commas and equals signs: the longest class that fits is meant.
        name = max((c for c in classes if rest.startswith(f"{c}=")), key=len, default=rest.partition("=")[0])
        if name not in classes:
            raise UsageError(
                f"class weights {text!r}: {name!r} is no class (there are {', '.join(classes)}); expected none, "
                "balanced, sqrt or name=value"
            )
        value, more, rest = rest[len(name) + 1 :].partition(",")
        try:
            weights[name] = float(value)
        except ValueError:
            raise UsageError(f"class weights {text!r}: {value!r} of {name} is no number") from None
    if not all(0 < value < math.inf for value in weights.values()):
        raise UsageError(f"class weights {text!r}: every weight must be a finite number above 0")
    return weights


# -- what options come to that weren't given ----------------------------------------------------------------------


def features_in_use(args: Namespace) -> dict[str, Any]:
    """The image side and the normalisation."""
    recipe = RECIPES.get(getattr(args, "recipe", None) or "", {})
    # The automatic search chooses by itself.
    norm = {} if getattr(args, "auto", False) else {"norm": [recipe.get("norm", "none")]}
    return {"vtype": [] if args.ttype else ["clip"], **norm}


def split_in_use(args: Namespace, recipe: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Ratios and seed of the split, the recipe's or the defaults, where they have a say."""
    if args.split_file:
        return {}
    split = split_settings(args, recipe)
    ratios = {} if args.folds else {"val_ratio": split.val_ratio, "test_ratio": split.test_ratio}
    return {**ratios, "split_seed": split.seed}


def training_in_use(args: Namespace) -> dict[str, Any]:
    """What the heads read of training settings: the recipe's or the defaults, where they are the same for all."""
    found = split_in_use(args, RECIPES.get(args.recipe or "", {}))
    if getattr(args, "auto", False) and "head" not in vars(args):
        return found  # the data decide which heads are searched
    grid = grid_from(args)
    points = [flat(from_flat({**point, "class_weights": "none"})) for point in grid.points]
    weights = [point.get("class_weights", TrainConfig.class_weights) for point in grid.points]
    points = [{**point, "class_weights": of_point} for point, of_point in zip(points, weights, strict=True)]
    points = [{name: p[name] for name in p if name in settings_read(p["head"])} for p in points]
    for name in dict.fromkeys(name for point in points for name in point):
        values = [point[name] for point in points if name in point]
        unsaid = name == "monitor" and args.recipe == OWN  # typed, it ranks
        if not unsaid and all(value == values[0] for value in values):
            found[name] = values[0]
    sides = found.pop("sides", None)
    return found if sides is None else {**found, "ablation": ABLATIONS.index(sides)}


def tuning_in_use(args: Namespace, grid: bool = False) -> dict[str, Any]:
    """Finetuning's settings: the recipe's or the defaults."""
    recipe = tuning_recipe(args.recipe, getattr(args, "model", None))
    if recipe and not grid:  # which may try several rates
        recipe["head_lr"] = getattr(args, "lr", recipe["lr"])
    settings = {**asdict(TuneSettings()), **recipe}
    decided = (*BY_METHODS, *(("lr", "dropout") if args.grid else ())) if grid else ()
    return {name: value for name, value in settings.items() if name not in decided and not isinstance(value, Mapping)}


# -- test-time ablation -----------------------------------------------------------------------------------------


def refuse_absent(args: Namespace) -> None:
    """Raise `UsageError` for what stands in for an absent side when none is to be absent."""
    if args.absent != ABSENT[0] and not args.ablation_eval:
        raise UsageError(f"--absent {args.absent} is for --ablation-eval; give that, too, or leave it out")


def absence_of(args: Namespace, experiment: Experiment, source: FeatureSource, own: Mapping[str, str] = {}) -> AbsentOf:
    """What stands in for an absent side, from the options of `add_ablation_options`; `own` weights, by cache, are those
    of encoders that aren't named. Raises as `prediction.ablation.absence`."""
    from modeling.prediction.ablation import absence

    weights = named_texts(args.weights, "--weights")
    weights = weights if args.absent == "mean" else {**own, **weights}
    return absence(args.absent, experiment.features, source, weights, experiment.device)


# -- what heads read --------------------------------------------------------------------------------------------


def unread(args: Namespace, heads: Sequence[str]) -> list[str]:
    """The typed options of `add_training_options`, and of what is shown of epochs, that nothing reads when `heads` are
    trained, as one types them."""
    from modeling.heads.base import head_class

    read = set().union(*map(settings_read, heads))
    gradient = [head for head in heads if not head_class(head).closed_form()]
    idle = [name for name in _training_settings(args) if name in flat(TrainConfig()) and name not in read]
    if not gradient:
        idle += [name for name in ("seeds", "verbose", "history_batches") if getattr(args, name, None)]
    if args.recipe:
        recipes = [args.recipe] if args.recipe != OWN else map(own_recipe, heads)
        settings = set().union(*(RECIPES.get(recipe, {}) for recipe in recipes))
        alone = args.recipe == OWN or args.folds or args.split_file  # what makes the split without the recipe's ratios
        if not settings & (read if alone else read | {"val_ratio"}):
            idle.append("recipe")
    return [_typed(OPTION_OF.get(name, name)) for name in idle]


def print_unread(args: Namespace, heads: Sequence[str], besides: Sequence[str] = ()) -> None:
    """Say which typed options do nothing for any of `heads`; `besides`: those that the caller reads."""
    idle = [option for option in unread(args, heads) if option not in besides]
    if idle:
        do = "does" if len(idle) == 1 else "do"
        print_note(f"{', '.join(idle)} {do} nothing for {', '.join(dict.fromkeys(heads))}")


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# -- runs -------------------------------------------------------------------------------------------------------


def chosen_runs(args: Namespace, *, single_head: bool = False, told: bool = True) -> list[Run]:
    """The runs of --run, as `choosing.open_runs`; which one newest or best is, and a better one, is said where
    `told`."""
    from modeling.runs import choosing

    def say(line: str) -> None:
        if told:
            print(as_typed(line))

    names = [args.run] if isinstance(args.run, str) else args.run
    return choosing.open_runs(args.runs, names, single_head=single_head, say=say)


# -- small parts ------------------------------------------------------------------------------------------------


def named_values(items: Sequence[str], option: str) -> dict[str, float]:
    """{"vader": 0.5} of ["vader=0.5"], finite and above 0. Raises `UsageError` for anything else."""
    values = {}
    for item in items:
        name, _, value = item.rpartition("=")
        if name in values:
            raise UsageError(f"{option} names {name} twice; give one value")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        if not 0 < values[name] < math.inf:
            raise UsageError(f"{option} {item}: expected NAME=NUMBER, a finite number above 0")
    return values


def named_texts(items: Sequence[str], option: str) -> dict[str, str]:
    """{"clip": "x.pt"} of ["clip=x.pt"]. Raises `UsageError` for anything else."""
    for item in items:
        if not all(item.partition("=")):
            raise UsageError(f"{option} {item}: expected CACHE=PATH")
    return dict(item.split("=", 1) for item in items)


def command_line(argv: Sequence[str] | None) -> str:
    """What the user typed, for the run's records."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])


@contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """Progress on stderr while the block runs, and the function that moves it on by some steps; of epochs with the
    head whose they are."""
    with progress(what, total, unit) as shown:
        yield lambda steps: shown.add(steps, now=steps.config.head.head if isinstance(steps, Epochs) else "")


@contextmanager
def training_bar(configs: Sequence[TrainConfig], experiment: Experiment) -> Iterator[Callable[[int], Any]]:
    """As `progress_bar`, of the epochs of `train_all`: the time left goes by what an epoch of each head takes."""
    from modeling.experiments.fitting import epoch_weights, total_epochs

    takes = epoch_weights(configs, experiment)
    weight = sum(takes[config] * total_epochs([config], experiment) for config in configs)

    def add(epochs: int) -> None:
        assert isinstance(epochs, Epochs)
        shown.add(epochs, takes[epochs.config] * epochs, epochs.config.head.head)

    with progress("train", total_epochs(configs, experiment), "epoch", weight) as shown:
        yield add


def say(line: str) -> None:
    """Print a line while a bar is shown, which stays whole below it."""
    from tqdm import tqdm

    tqdm.write(line)


def print_note(text: str) -> None:
    """Say something that is no result, and no warning."""
    print(f"note: {text}", file=sys.stderr)


def print_lines(lines: Iterable[str], quiet: bool = False) -> None:
    """Print what libraries have to say, notes to stderr; nothing if `quiet`."""
    for line in lines:
        if not quiet:
            print(as_typed(line, OPTION_OF), file=sys.stderr if line.startswith("note:") else sys.stdout)


def guarded(
    work: Callable[[], int],
    interrupted: str,
    named: Mapping[str, str] = OPTION_OF,
    *,
    same_bits: bool = False,
    given: Mapping[str, Any] | None = None,
) -> int:
    """Run a script's work and show what libraries say. Unusable input ends with one line and status 2, an interruption
    with `interrupted` and 130. `named`: settings that the script knows by another name; `given`: its options, for the
    commands that help where weights are missing, see `feats.command_line.commands.no_weights_lines`.
    `same_bits`: from the beginning as `feats.acceleration.deterministic`."""
    import torch  # noqa: F401 - here Ctrl-C still ends the process at once: torch's import may swallow an exception

    with interruptible(signal.SIGINT):
        return with_messages(partial(_guarded, work, interrupted, named, same_bits, given))


def _guarded(
    work: Callable[[], int],
    interrupted: str,
    named: Mapping[str, str],
    same_bits: bool,
    given: Mapping[str, Any] | None,
) -> int:
    try:
        return _refusing(work, named, same_bits, given)
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _refusing(
    work: Callable[[], int], named: Mapping[str, str], same_bits: bool, given: Mapping[str, Any] | None
) -> int:
    import torch

    from feats.acceleration import deterministic

    with warnings.catch_warnings():
        warnings.showwarning = show_warning(named)
        try:
            with deterministic(same_bits):
                return work()
        except (UsageError, OSError) as error:  # what can't be read or written names its file
            return refuse(error, given, named)
        except ModuleNotFoundError as error:
            return refuse_without_extra(error)
        except torch.OutOfMemoryError:
            print("error: the GPU's memory is full; use --device cpu, or to train a smaller --bs", file=sys.stderr)
            return EXIT_UNUSABLE
