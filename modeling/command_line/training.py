"""Options of heads and their training, and the trainings they ask for."""

from __future__ import annotations

import math
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from feats.command_line.options import positive
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import as_option
from feats.errors import UsageError
from modeling.command_line.messages import OPTION_OF, print_note
from modeling.command_line.options import feature_source, split_in_use
from modeling.heads.config import (
    ABLATIONS,
    ATTENTION_NORMS,
    IMAGE_POOLINGS,
    IMAGE_POSITIONS,
    HeadConfig,
    ablation_words,
)
from modeling.heads.registry import HEADS, head_class
from modeling.training.config import (
    CLASS_WEIGHTS,
    MONITORS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    TrainConfig,
    flat,
    from_flat,
    settings_read,
)
from modeling.training.recipes import END_TO_END, OF_FIXED_FOLDS, RECIPES, cached_recipe, recipe_settings

if TYPE_CHECKING:
    from modeling.features.joined import FeatureSource

OWN = "own"
HEAD_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # of single heads: help and keywords
    "layers": ("gated_transformer: Transformer layers (default: the head's own, 3)", {"type": int}),
    "attention_norm": ("coattention: behind its self-attentions", {"choices": ATTENTION_NORMS}),
    "image_positions": ("coattention: positions added to image tokens", {"choices": IMAGE_POSITIONS}),
    "image_pooling": ("coattention: image tokens to one vector", {"choices": IMAGE_POOLINGS}),
}
ALIASES = {"ep": "--epochs", "bs": "--batch-size", "D": "--hidden", "ablation": "--modality"}
MODALITIES = ("both", "text", "image")  # as ABLATIONS


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
    return [as_option(name), *([ALIASES[name]] if name in ALIASES else [])]


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


def unread(args: Namespace, heads: Sequence[str]) -> list[str]:
    """The typed options of `add_training_options`, and of what is shown of epochs, that nothing reads when `heads` are
    trained, as one types them."""
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
    return [as_option(OPTION_OF.get(name, name)) for name in idle]


def print_unread(args: Namespace, heads: Sequence[str], besides: Sequence[str] = ()) -> None:
    """Say which typed options do nothing for any of `heads`; `besides`: those that the caller reads."""
    idle = [option for option in unread(args, heads) if option not in besides]
    if idle:
        do = "does" if len(idle) == 1 else "do"
        print_note(f"{', '.join(idle)} {do} nothing for {', '.join(dict.fromkeys(heads))}")


def modality(text: str) -> int:
    """The number of an ablation, also from what it leaves: both, text, image."""
    return MODALITIES.index(text) if text in MODALITIES else int(text)


modality.__name__ = "modality"  # as argparse shows it
