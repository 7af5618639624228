"""Train a grid of heads, remember what is finished, and compare: options of train_head.py, several values each."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import feats.threads  # noqa: F401

# isort: split

import numpy as np

from feats.cli import EXIT_DONE
from feats.errors import UsageError
from modeling import cli as options
from modeling import experiment as ex
from modeling.evaluation.metrics import format_table
from modeling.runs.folder import is_whole, run_name, save_run
from modeling.search import auto, sweep
from modeling.training.fit import TrainConfig

NAME = "sweep"


def build_parser() -> ArgumentParser:
    parser = options.new_parser(__doc__)
    options.add_feature_options(parser)
    options.add_split_options(parser)
    options.add_training_options(parser, grid=True)
    options.add_run_options(parser)
    parser.add_argument(
        "--auto",
        action="store_true",
        help="search heads, normalisation and regularisation by inner folds and leave a stacked ensemble as a run",
    )
    parser.add_argument("--name", help=f"folder of the sweep's runs and tables, inside --runs (default: {NAME})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.auto:
        return options.guarded(lambda: run_auto(args, options.command_line(argv)), "nothing was saved")
    again = "what is finished is kept, run the same command to go on"
    return options.guarded(lambda: run_sweep(args, options.command_line(argv)), again)


def run_sweep(args: Namespace, command: str) -> int:
    values = options.with_recipe(args)
    grid = [options.config_from(point) for point in options.grid_points(values)]
    heads = [config.head.head for config in grid]
    options.print_unread(args, heads, besides=["--monitor"])
    experiment = ex.load_experiment(args, values, heads)
    configs = [c for config in distinct(grid, args, experiment) for c in options.with_seeds(config, args.seeds)]
    folder = args.runs / (args.name or NAME)
    data = sweep.data_digest(experiment)
    names = [sweep.run_name(config, data) for config in configs]
    waiting = [i for i, name in enumerate(names) if not is_whole(folder / name)]
    print(f"{len(configs)} trainings, {len(configs) - len(waiting)} of them finished before")
    failed: dict[int, str] = {}
    for k, outcomes in ex.train([configs[i] for i in waiting], experiment, failed):
        run = ex.make_run(outcomes, experiment)
        report = ex.measure(outcomes, experiment, run)
        save_run(
            run,
            folder,
            names[waiting[k]],
            metrics=report.figures,
            history=report.history,
            predictions=(report.ids, report.tags, report.probabilities),
            command=command,
            exact_name=True,
        )
    diverged = {names[waiting[k]]: reason for k, reason in failed.items()}
    # One figure for all, whichever head stands first: typed, or of the one recipe of all. Under --recipe own every head
    # has another.
    [monitor, *_] = np.atleast_1d(values.get("monitor", TrainConfig.monitor)).tolist()
    tables = sweep.compare(folder, configs, names, experiment, monitor, diverged)
    print(tables.text)
    tables.write(folder)
    best = folder / tables.best
    print(f"{len(configs)} runs, table.csv and table.md -> {folder}")
    print(f"best by validation {tables.by}: python modeling/inference_head.py --run {best}")
    return EXIT_DONE


def distinct(grid: Sequence[TrainConfig], args: Namespace, experiment: ex.Experiment) -> list[TrainConfig]:
    """The trainings of a grid on these data. A head that doesn't read what varies is trained once."""
    fitted = [options.fit_to_data(config, args.recipe, experiment.classes, experiment.source) for config in grid]
    return list(dict.fromkeys(map(options.as_read, fitted)))


def run_auto(args: Namespace, command: str) -> int:
    values = options.with_recipe(args)
    chosen = [f"--{name}" for name in ("norm", "scale", "seeds", "name") if getattr(args, name)]
    if chosen:
        raise UsageError(
            f"--auto with {', '.join(chosen)}: it chooses normalisation and scales by itself, trains one seed and leaves "
            "a run beside the sweeps; leave these out, or compare heads without --auto"
        )
    typed = options.grid_points(values) if "head" in values else []
    experiment = ex.load_experiment(args, values, [options.config_from(point).head.head for point in typed])
    n_columns = sum(width for of_side in experiment.features.widths.values() for width in of_side.values())
    heads = auto.default_heads(auto.most_rows(experiment), n_columns)
    points = typed or options.grid_points({**values, "head": list(heads)})
    grid = [options.config_from(point) for point in points]
    heads = list(dict.fromkeys(config.head.head for config in grid))
    idle = options.unread(args, heads)
    if idle:
        raise UsageError(
            f"--auto with {', '.join(idle)}: does nothing for the heads it searches ({', '.join(heads)}); leave it out, or "
            "name heads that read it with --head"
        )
    configs = distinct(grid, args, experiment)
    run, probabilities, found = auto.auto(experiment, configs)
    print(format_table(found.table, list(dict.fromkeys(name for row in found.table for name in row))))
    print("log-loss and figures of each candidate on training rows it hadn't seen\n")
    report = ex.report_of(experiment, run, probabilities, probabilities)
    report.figures["protocol"] += "; everything chosen by inner folds of the training rows (nested)"
    report.figures["candidates"] = found.table
    ex.print_report(report, run)
    path = save_run(
        run,
        args.runs,
        run_name(run, label="auto"),
        metrics=report.figures,
        history=found.history,
        predictions=(report.ids, report.tags, report.probabilities),
        command=command,
    )
    print(f"ensemble of {len(run.members)} heads -> {path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
