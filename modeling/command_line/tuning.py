"""Options of finetuning, and the settings they come to."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from feats.command_line.parser import ScriptParser
from feats.command_line.wording import as_option
from modeling.command_line.training import option_names, parse_class_weights
from modeling.finetuning.augment import TextAugmentation
from modeling.finetuning.settings import AUGMENTED, DTYPES, TuneSettings
from modeling.finetuning.studies import TUNING_RECIPES, tuning_recipe, with_one_rate
from modeling.training.config import MONITORS, OPTIMIZERS, SCHEDULES

TUNING_GRID = ("lr", "dropout", "bs", "ep")  # what a grid of finetunings varies
BY_METHODS = ("tune", "lora", "soup", "wise_ft")  # what methods decide there


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
        words += [as_option(name), *map(str, values)]
    return [*words, *(["--particles"] if settings.text_augmentation.particles else [])]


def tuning_in_use(args: Namespace, grid: bool = False) -> dict[str, Any]:
    """Finetuning's settings: the recipe's or the defaults."""
    recipe = tuning_recipe(args.recipe, getattr(args, "model", None))
    if recipe and not grid:  # which may try several rates
        recipe["head_lr"] = getattr(args, "lr", recipe["lr"])
    settings = {**asdict(TuneSettings()), **recipe}
    decided = (*BY_METHODS, *(("lr", "dropout") if args.grid else ())) if grid else ()
    return {name: value for name, value in settings.items() if name not in decided and not isinstance(value, Mapping)}
