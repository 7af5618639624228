"""The command-line options that the scripts of this stage share, and the studies' recipes. Defaults live in the
dataclasses they fill; help shows them."""

import math
import shlex
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import torch

from feats.cli import EXIT_INTERRUPTED, EXIT_UNUSABLE, HelpFormatter, positive
from feats.errors import UsageError
from feats.interrupts import interruptible
from modeling.features import joined as features
from modeling.features.splits import make_split
from modeling.heads.registry import ABLATIONS, HEADS, HeadConfig
from modeling.runs import folder as runs
from modeling.training.fit import MONITORS, OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig

# What each study trained its heads with; what a study doesn't tell is left at the default. C has no recipe: it tuned
# its encoders. "neutral" of A counts where there is such a class.
RECIPES: dict[str, dict[str, Any]] = {
    "A": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr": 1e-4,
        "schedule": "onecycle",
        "bs": 64,
        "ep": 10,
        "patience": 2,
        "monitor": "weighted_f1",
        "label_smoothing": 0.1,
        "class_weights": "neutral=1.2",
        "val_ratio": 0.1,
        "test_ratio": 0.1,
    },
    "B": {"optimizer": "adamw", "weight_decay": 0.01, "bs": 8, "ep": 10, "val_ratio": 0.1},
    "D": {"optimizer": "adam", "lr": 1e-4, "bs": 512, "ep": 100, "val_ratio": 0.1, "split_seed": 42},
    "E": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr": 1e-5,
        "bs": 16,
        "ep": 6,
        "dropout": 0.5,
        "patience": 3,
        "monitor": "macro_f1",
        "val_ratio": 0.2,
    },
}
OWN = "own"
# What heads don't read of what the others of their kind do.
UNREAD = {"late_512": {"D"}, "query_attention": {"D"}, "attention_linear": {"dropout"}}
READ_IN_CLOSED_FORM = {"logistic": {"class_weights", "penalty"}, "kernel": {"class_weights", "penalty", "gamma"}}


def new_parser(doc: str) -> ArgumentParser:
    return ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def add_feature_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("features")
    group.add_argument("--feats", type=Path, default=features.DEFAULT_FOLDER, metavar="DIR", help="folder of caches")
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
        help=f"normalisation of each cache: {', '.join(features.NORMS)} (default: none)",
    )
    group.add_argument("--scale", nargs="+", metavar="CACHE=FACTOR", help="factor behind a normalisation")


def add_split_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("split")
    defaults = {name: parameter.default for name, parameter in signature(make_split).parameters.items()}
    for name, kind, parameter, text in (
        ("--val-ratio", float, "val_ratio", "share of rows for validation"),
        ("--test-ratio", float, "test_ratio", "share of rows for testing"),
        ("--split-seed", int, "seed", "seed of the split"),
    ):
        shown = f"{text} (default: {defaults[parameter]}, or the recipe's)"
        group.add_argument(name, type=kind, default=SUPPRESS, help=shown)
    group.add_argument("--folds", type=positive, metavar="K", help="k-fold cross-validation instead of one split")
    group.add_argument(
        "--split-file",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="ids of train, val and test: one file, e.g. a run's split.json, or three",
    )
    group.add_argument(
        "--duplicates",
        choices=("together", "apart"),
        default="together",
        help="pairs with the same picture or text: on one side of a split, or wherever they fall",
    )


def add_run_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("output and compute")
    group.add_argument("--runs", type=Path, default=runs.DEFAULT_FOLDER, metavar="DIR", help="folder of runs")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_training_options(parser: ArgumentParser, grid: bool = False) -> None:
    """Options for every field of `TrainConfig` and `HeadConfig`. With `grid` they take several values. Options that
    weren't typed are absent from the namespace, so that a recipe can tell them from typed ones."""
    defaults = flat(TrainConfig())
    several = {"nargs": "+"} if grid else {}
    group = parser.add_argument_group("head and training")
    group.add_argument(
        "--recipe",
        choices=(*RECIPES, OWN),
        help=f"settings of a reference study; {OWN}: of the one the head comes from, the split aside. Typed options win",
    )

    def add(name: str, text: str, **keywords: Any) -> None:
        default = defaults[name]
        shown = "" if default is None or default is False else f" (default: {default})"
        group.add_argument(_typed(name), default=SUPPRESS, help=text + shown, **keywords)

    add("head", f"{'all, or some' if grid else 'one'} of {', '.join(HEADS)}", **several)
    add("D", "width of the common space or hidden layer", type=int, **several)
    add("dropout", "(default: the head's own)", type=float, **several)
    add("ablation", ", ".join(f"{k} {v}" for k, v in ABLATIONS.items()), type=int, choices=tuple(ABLATIONS), **several)
    add("image_positions", "coattention: learnable positions of image tokens", action="store_true")
    add("optimizer", ", ".join(OPTIMIZERS), **several)
    add("lr", "learning rate, or its peak", type=float, **several)
    add("weight_decay", "of the optimiser", type=float, **several)
    add("schedule", ", ".join(SCHEDULES), **several)
    add("ep", "epochs", type=int, **several)
    add("bs", "batch size", type=int, **several)
    add("label_smoothing", "share of the target spread over all classes", type=float, **several)
    add("class_weights", "none, balanced, sqrt, or NAME=VALUE,NAME=VALUE", **several)
    add("balanced_sampler", "draw every class equally often", action="store_true")
    add("monitor", f"what decides the best epoch: {', '.join(MONITORS)}", **several)
    add("patience", "epochs without a better one before stopping", type=int, **several)
    add("precision", "of the products in training: " + ", ".join(PRECISIONS), **several)
    add("seed", "of weights, batches and dropout", type=int)
    add(
        "penalty",
        "linear: C, smaller is stronger; kernel: the ridge, larger is stronger; chosen by inner folds where not given",
        type=float,
        **several,
    )
    add(
        "gamma",
        "kernel: gamma of the RBF times the mean squared distance; chosen by inner folds where not given",
        type=float,
        **several,
    )
    group.add_argument("--seeds", type=positive, metavar="N", help="train with N seeds, from --seed up (default: 1)")


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from flat values; the fields of `HeadConfig` and `TrainConfig` that are absent keep defaults."""
    of_head = {f.name for f in fields(HeadConfig)}
    of_train = {f.name for f in fields(TrainConfig)} - {"head"}
    head = HeadConfig(**{name: value for name, value in values.items() if name in of_head})
    return replace(TrainConfig(head), **{name: value for name, value in values.items() if name in of_train})


def fit_to_data(
    config: TrainConfig, recipe: str | None, classes: Sequence[str], source: Mapping[str, Any]
) -> TrainConfig:
    """One-sided where the caches are; without the recipe's class weights for classes the data don't have."""
    named = {part.partition("=")[0] for part in config.class_weights.split(",")}
    of_recipes = {settings.get("class_weights") for settings in RECIPES.values()}
    if recipe and config.class_weights in of_recipes and not named <= set(classes):
        config = replace(config, class_weights="none")
    if not source["vtype"] or not source["ttype"]:
        only = 1 if source["ttype"] else 2
        if config.head.ablation not in (0, only):
            raise UsageError(
                f"ablation {config.head.ablation} leaves nothing of the caches; name one of the other side"
            )
        config = replace(config, head=replace(config.head, ablation=only))
    return config


def grid_points(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the training options that have several values. Head `all` is every head that needs no token
    features; with recipe `own` each head gets its own study's settings, the split aside."""
    of_config = flat(TrainConfig())
    axes = {name: value for name, value in values.items() if name in of_config and isinstance(value, list)}
    if "all" in axes.get("head", ()):
        axes["head"] = [name for name, head in HEADS.items() if not head.tokens]
    points = [{**values, **dict(zip(axes, point, strict=True))} for point in product(*axes.values())]
    if values.get("recipe") != OWN:
        return points
    heads = [HeadConfig(**{"head": point["head"]} if "head" in point else {}).head for point in points]
    return [{**RECIPES.get(HEADS[head].study, {}), **point} for head, point in zip(heads, points, strict=True)]


def with_seeds(config: TrainConfig, n: int | None) -> list[TrainConfig]:
    """`n` seeds (one unless given) from the configuration's own up; a closed-form head gives the same for all of them
    and gets one."""
    n = n or 1 if HEADS[config.head.head].solver == "sgd" else 1
    return [replace(config, seed=config.seed + k) for k in range(n)]


def with_recipe(args: Namespace) -> dict[str, Any]:
    """The typed options over those of the recipe. Raises `UsageError` for two typed ones that both make the split."""
    for option, others in (
        ("split_file", ("folds", "val_ratio", "test_ratio", "split_seed")),
        ("folds", ("val_ratio", "test_ratio")),
    ):
        idle = [_typed(name) for name in others if getattr(args, name, None) is not None]
        if getattr(args, option) and idle:
            raise UsageError(
                f"{_typed(option)} leaves no use for {', '.join(idle)}: both say how to split; give one or the other"
            )
    return {**RECIPES.get(args.recipe or "", {}), **vars(args)}


# -- what heads read --------------------------------------------------------------------------------------------


def reads(head: str) -> set[str]:
    """The fields of `HeadConfig` and `TrainConfig` that decide what becomes of a head."""
    solver = HEADS[head].solver
    if solver != "sgd":
        return {"head", "ablation"} | READ_IN_CLOSED_FORM[solver]
    idle = {"penalty", "gamma"} | UNREAD.get(head, set()) | (set() if head == "coattention" else {"image_positions"})
    return set(flat(TrainConfig())) - idle


def as_read(config: TrainConfig) -> TrainConfig:
    """The same training with what its head doesn't read at the defaults: so that equal trainings are equal."""
    read = reads(config.head.head)
    return config_from({name: value for name, value in flat(config).items() if name in read})


def flat(config: TrainConfig) -> dict[str, Any]:
    """The fields of a configuration and of its head by name, as `config_from` takes them."""
    return {**vars(config.head), **{name: value for name, value in vars(config).items() if name != "head"}}


def unread(args: Namespace, heads: Sequence[str]) -> list[str]:
    """The typed options of `add_training_options` that nothing reads when `heads` are trained, as one types them."""
    read = set().union(*map(reads, heads))
    idle = [name for name in vars(args) if name in flat(TrainConfig()) and name not in read]
    if args.seeds and not any(HEADS[head].solver == "sgd" for head in heads):
        idle.append("seeds")
    if args.recipe:
        recipes = [args.recipe] if args.recipe != OWN else [HEADS[head].study for head in heads]
        settings = set().union(*(RECIPES.get(recipe, {}) for recipe in recipes))
        alone = args.recipe == OWN or args.folds or args.split_file  # what makes the split without the recipe's ratios
        if not settings & (read if alone else read | {"val_ratio"}):
            idle.append("recipe")
    return [_typed(name) for name in idle]


def print_unread(args: Namespace, heads: Sequence[str], besides: Sequence[str] = ()) -> None:
    """Say which typed options do nothing for any of `heads`; `besides`: those that the caller reads."""
    idle = [option for option in unread(args, heads) if option not in besides]
    if idle:
        print(
            f"note: {', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing for {', '.join(dict.fromkeys(heads))}"
        )


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


def command_line(argv: Sequence[str] | None) -> str:
    """What the user typed, for the run's records."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if argv is None else argv)])


@interruptible(signal.SIGINT)
def guarded(work: Callable[[], int], interrupted: str) -> int:
    """Run a script's work: unusable input ends with one line and status 2, an interruption with `interrupted`, 130."""
    try:
        return work()
    except (UsageError, OSError) as error:  # what can't be read or written names its file
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; use --device cpu, or to train a smaller --bs", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
