"""Options that several scripts have, and what they come to. Defaults live in the dataclasses; help shows them."""

from __future__ import annotations

import math
from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feats.command_line.options import add_columns_option, columns_from, positive
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import as_option, as_typed
from feats.errors import UsageError
from modeling import choices
from modeling.choices import ABSENT, NORMS, SHARE, STREAMING, SplitSettings
from modeling.training.recipes import RECIPES, SPLIT_SETTINGS

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment, ExperimentSettings
    from modeling.features.joined import FeatureSource
    from modeling.prediction.ablation import AbsentOf
    from modeling.runs.pairs import DataPlace
    from modeling.runs.run import Run


RUN_HELP = "a path, a name in --runs, newest, or best: by its validation figure, of those on the newest's rows"


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


def add_caches_of_run_option(parser: ArgumentParser | _ArgumentGroup) -> None:
    """The folder of a run's caches."""
    parser.add_argument("--feats", type=Path, metavar="DIR", help="folder of caches (default: the run's)")


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
    from modeling.runs.pairs import DataPlace  # slow to import

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


def add_weights_option(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Where encoders' weights lie; `named_texts` reads it."""
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="CACHE=PATH", help="weights of an encoder, where they aren't found"
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
        add_weights_option(group)


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
        idle = [as_option(name) for name in others if getattr(args, name, None) is not None]
        if getattr(args, option) and idle:
            raise UsageError(
                f"{as_option(option)} leaves no use for {', '.join(idle)}: both say how to split; give one or the other"
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


def chosen_runs(args: Namespace, *, single_head: bool = False, told: bool = True) -> list[Run]:
    """The runs of --run, as `choosing.open_runs`; which one newest or best is, and a better one, is said where
    `told`."""
    from modeling.runs import choosing

    def say(line: str) -> None:
        if told:
            print(as_typed(line))

    names = [args.run] if isinstance(args.run, str) else args.run
    return choosing.open_runs(args.runs, names, single_head=single_head, say=say)


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
