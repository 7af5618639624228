"""Train a grid of heads, remember what is finished, and compare: options of train_head.py, several values each."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.errors import UsageError
from feats.names import checked_name
from modeling.command_line.messages import command_line, guarded, print_lines, progress_bar, training_bar
from modeling.command_line.options import (
    add_corrections_option,
    add_csv_option,
    add_feature_options,
    add_label_column_options,
    add_run_options,
    add_split_options,
    add_stream_option,
    experiment_settings,
    new_parser,
)
from modeling.command_line.training import Grid, add_training_options, grid_from, print_recipe, print_unread, unread
from modeling.training.config import TrainConfig, as_read, settings_read, with_seeds
from modeling.training.recipes import RECIPES

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment


NAME = "sweep"


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/sweep_heads.py --head fusion mlp linear --lr 1e-3 1e-4",
        "python modeling/sweep_heads.py --vtype efficientnet --ttype minilm --auto",
    )
    add_feature_options(parser)
    add_split_options(parser)
    add_corrections_option(parser)
    add_label_column_options(parser)
    add_stream_option(parser)
    add_training_options(parser, grid=True)
    add_run_options(parser)
    parser.add_argument(
        "--auto",
        action="store_true",
        help="search heads, normalisation and regularisation by inner folds and leave a stacked ensemble as a run",
    )
    parser.add_argument(
        "--search-on",
        metavar="HEAD",
        help="train the grid on this one of --head only, and the others at its best settings",
    )
    parser.add_argument("--name", help=f"folder of the sweep's runs and tables, inside --runs (default: {NAME})")
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args, command = build_parser().parse_args(argv), command_line(argv)
    same_bits = hasattr(args, "deterministic")
    if args.auto:
        return guarded(lambda: search(args, command), "nothing was saved", same_bits=same_bits)
    again = "what is finished is kept, run the same command to go on"
    return guarded(lambda: compare(args, command), again, same_bits=same_bits)


def compare(args: Namespace, command: str) -> int:
    """Train what isn't finished of a grid, and write and show its tables; returns the exit status."""
    from modeling.experiments.experiment import load_experiment

    checked_name(args.name or NAME, "name")
    grid, settings = grid_from(args), experiment_settings(args)
    searched = varied(grid, args.search_on) if args.search_on is not None else []
    print_unread(args, [head.head for head in grid.heads], besides=["--monitor"])
    print_recipe(args, [head.head for head in grid.heads])
    with load_experiment(settings, grid.heads) as experiment:
        return compare_on(experiment, args, grid, searched, command)


def compare_on(experiment: Experiment, args: Namespace, grid: Grid, searched: Sequence[str], command: str) -> int:
    """As `compare`, on joined caches; `searched` are the settings to choose on one head."""
    from modeling.search import sweep

    print_lines(experiment.lines(), args.quiet)
    folder = args.runs / (args.name or NAME)
    data = sweep.data_digest(experiment)
    earlier = sweep.read_earlier(folder, experiment, data)
    chosen, names, diverged = "", dict[TrainConfig, str](), dict[str, str]()
    if searched:
        point, names, diverged = best_point(args, grid, experiment, data, folder, command)
        others = [p for p in grid.points if p["head"] != args.search_on]
        grid = replace(grid, points=tuple(p for p in others if all(p[name] == point[name] for name in searched)))
        chosen = chosen_line(args.search_on, grid, {name: point[name] for name in searched})
    more, failed = train(distinct(grid, experiment), args, experiment, data, folder, command)
    names, diverged = names | more, diverged | failed
    kept = {config: name for config, name in earlier.names.items() if config not in names}
    lost = {config: why for config, why in earlier.diverged.items() if config not in names}
    names, own = {**names, **kept, **{config: sweep.name_of(config, data) for config in lost}}, len(names)
    diverged |= {names[config]: why for config, why in lost.items()}
    tables = sweep.compare(folder, list(names), list(names.values()), experiment, grid.monitor, diverged)
    notes = dict.fromkeys(filter(None, [tables.notes, *earlier.notes, chosen]))
    tables = replace(tables, notes="\n".join(notes))
    print_lines(tables.text.splitlines())
    tables.write(folder, safe=args.csv_safe)
    best = folder / tables.best
    sweep.write_diverged(folder, {config: diverged[name] for config, name in names.items() if name in diverged})
    before = f" ({len(names) - own} of earlier sweeps)" if len(names) > own else ""
    print(f"{len(names)} runs{before}, table.csv and table.md -> {folder}")
    print(f"best by validation {tables.by}: python modeling/inference_head.py --run {best}")
    return EXIT_DONE


def train(
    points: Sequence[TrainConfig], args: Namespace, experiment: Experiment, data: str, folder: Path, command: str
) -> tuple[dict[TrainConfig, str], dict[str, str]]:
    """Train what isn't finished of some configurations, with all seeds, on data of the digest `data`; returns the run
    of each training by name, and why those diverged that did."""
    from modeling.experiments.fitting import measured, run_of, train_all
    from modeling.runs.config import is_whole
    from modeling.runs.folder import save_run
    from modeling.runs.tables import cost_line
    from modeling.search import sweep

    configs = [c for config in points for c in with_seeds(config, args.seeds or 1)]
    names = [sweep.name_of(config, data) for config in configs]
    waiting = [i for i, name in enumerate(names) if not is_whole(folder / name)]
    print_lines([f"{len(configs)} trainings, {len(configs) - len(waiting)} of them finished before"], args.quiet)
    failed: dict[int, str] = {}
    missing = [configs[i] for i in waiting]
    bar = training_bar(missing, experiment)
    with measured(experiment.device, experiment.stream) as cost, bar as progress:
        for k, outcomes in train_all(missing, experiment, progress, failed):
            run = run_of(outcomes, experiment)
            save_run(run, folder / names[waiting[k]], overwrite=True, command=command, options=args.given)
    if missing:
        print(cost_line(cost))
    diverged = {names[waiting[k]]: reason for k, reason in failed.items()}
    return dict(zip(configs, names, strict=True)), diverged


# -- search on one head -----------------------------------------------------------------------------------------


def varied(grid: Grid, searched_on: str) -> list[str]:
    """The settings of which a grid has several values, for a search on one head. Raises `UsageError` when there are
    none, when that head isn't of the grid or reads one of them not, and without other heads."""
    heads = list(dict.fromkeys(head.head for head in grid.heads))
    if searched_on not in heads:
        raise UsageError(f"`search_on` {searched_on}: the heads here are {', '.join(heads)}; name it in `head`, too")
    if len(heads) == 1:
        raise UsageError(f"`search_on` {searched_on}: no other head gets its best settings; name more in `head`")
    points = [point for point in grid.points if point["head"] == searched_on]
    names = [name for name in points[0] if any(point[name] != points[0][name] for point in points)]
    if not names:
        raise UsageError(
            f"`search_on` {searched_on}: nothing to search, each setting has one value; give several, e.g. of `lr`"
        )
    unsearchable = [name for name in names if name == "sides" or name not in settings_read(searched_on)]
    if unsearchable:
        raise UsageError(
            f"`search_on` {searched_on} doesn't choose among values of `{'`, `'.join(unsearchable)}`; give one"
        )
    return names


def best_point(
    args: Namespace, grid: Grid, experiment: Experiment, data: str, folder: Path, command: str
) -> tuple[dict[str, Any], dict[TrainConfig, str], dict[str, str]]:
    """The point of the grid at which the searched head is best by its validation figures, and all of that head's
    trainings as `train` tells of them."""
    from modeling.search import sweep

    own = replace(grid, points=tuple(point for point in grid.points if point["head"] == args.search_on))
    names, diverged = train(distinct(own, experiment), args, experiment, data, folder, command)
    best = sweep.compare(folder, list(names), list(names.values()), experiment, grid.monitor, diverged).best
    return (
        next(p for p, c in zip(own.points, fitted(own, experiment), strict=True) if names[c] == best),
        names,
        diverged,
    )


def chosen_line(searched_on: str, others: Grid, settings: Mapping[str, Any]) -> str:
    """What was chosen on one head, and which others got it."""
    from modeling.search import sweep

    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    heads = ", ".join(dict.fromkeys(head.head for head in others.heads))
    return f"{sweep.SEARCHED}{searched_on} alone: {told}, its best by these rows, applied to {heads}."


def fitted(grid: Grid, experiment: Experiment) -> list[TrainConfig]:
    """The training of each point on these data, with what its head doesn't read at the defaults."""
    from modeling.experiments.experiment import on_features

    return [as_read(on_features(config, experiment.features)) for config in grid.configs(experiment.classes)]


def distinct(grid: Grid, experiment: Experiment) -> list[TrainConfig]:
    """The trainings of a grid on these data. A head that doesn't read what varies is trained once."""
    return list(dict.fromkeys(fitted(grid, experiment)))


def search(args: Namespace, command: str) -> int:
    """Search by inner folds, show the candidates, save the ensemble; returns the exit status."""
    from modeling.experiments.experiment import load_experiment

    own = ("norm", "scale", "seeds", "name", "search_on")
    chosen = [f"--{name.replace('_', '-')}" for name in own if getattr(args, name)]
    if "norm" in RECIPES.get(args.recipe or "", {}):
        chosen.append("--recipe")
    if chosen:
        raise UsageError(
            f"--auto with {', '.join(chosen)}: it chooses normalisation and scales by itself, trains one seed and "
            "leaves a run beside the sweeps; leave these out, or compare heads without --auto"
        )
    grid, settings = grid_from(args), experiment_settings(args)
    named = "head" in vars(args)
    with load_experiment(settings, grid.heads if named else []) as experiment:
        experiment.require_in_memory("`auto`")
        return search_on(experiment, args, grid, command)


def search_on(experiment: Experiment, args: Namespace, grid: Grid, command: str) -> int:
    """As `search`, on joined caches."""
    from modeling.evaluation.text_tables import format_table
    from modeling.runs.folder import run_name, save_run
    from modeling.runs.tables import collapse_notes, report_tables
    from modeling.search import auto

    named = "head" in vars(args)
    print_lines(experiment.lines(), args.quiet)
    if len(experiment.splits) > 1 and any(split.test for split in experiment.splits):
        raise UsageError(
            "--auto with folds that have test parts: it searches all rows in the end, those among them; leave the test "
            "parts out, or compare heads without --auto"
        )
    if not named:
        n_columns = sum(width for of_side in experiment.features.widths.values() for width in of_side.values())
        grid = grid_from(args, head=list(auto.default_heads(auto.most_rows(experiment), n_columns)))
    heads = list(dict.fromkeys(head.head for head in grid.heads))
    idle = unread(args, heads)
    if idle:
        raise UsageError(
            f"--auto with {', '.join(idle)}: does nothing for the heads it searches ({', '.join(heads)}); leave it "
            "out, or name heads that read it with --head"
        )
    print_recipe(args, heads)
    configs = distinct(grid, experiment)
    with progress_bar("search", auto.n_fits(experiment, configs), "fit") as progress:
        found, candidates = auto.auto(experiment, configs, progress)
    print(format_table(candidates, list(dict.fromkeys(name for row in candidates for name in row))))
    print("log-loss and figures of each candidate on training rows it hadn't seen\n")
    print(report_tables(found))
    print_lines(collapse_notes(found))
    path = args.runs / run_name(found, label="auto")
    run = save_run(found, path, numbered=True, command=command, options=args.given)
    print(f"ensemble of {len(run.members)} heads -> {run.path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
