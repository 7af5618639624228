"""Train a grid of heads, remember what is finished, and compare: options of train_head.py, several values each."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import feats.threads  # noqa: F401

# isort: split

from feats.cli import EXIT_DONE, as_typed
from feats.errors import UsageError
from modeling import cli
from modeling.evaluation.metrics import format_table
from modeling.experiment import Experiment, load_experiment, on_features, run_of, total_epochs, train_all
from modeling.runs.folder import is_whole, run_name, save_run
from modeling.runs.tables import report_tables
from modeling.search import auto, sweep
from modeling.training.config import TrainConfig, as_read, with_seeds

NAME = "sweep"


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = cli.new_parser(__doc__)
    cli.add_feature_options(parser)
    cli.add_split_options(parser)
    cli.add_corrections_option(parser)
    cli.add_training_options(parser, grid=True)
    cli.add_run_options(parser)
    parser.add_argument(
        "--auto",
        action="store_true",
        help="search heads, normalisation and regularisation by inner folds and leave a stacked ensemble as a run",
    )
    parser.add_argument("--name", help=f"folder of the sweep's runs and tables, inside --runs (default: {NAME})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args, command = build_parser().parse_args(argv), cli.command_line(argv)
    if args.auto:
        return cli.guarded(lambda: search(args, command), "nothing was saved")
    again = "what is finished is kept, run the same command to go on"
    return cli.guarded(lambda: compare(args, command), again)


def compare(args: Namespace, command: str) -> int:
    """Train what isn't finished of a grid, and write and show its tables; returns the exit status."""
    grid, settings = cli.grid_from(args), cli.experiment_settings(args)
    cli.print_unread(args, [head.head for head in grid.heads], besides=["--monitor"])
    experiment = load_experiment(settings, grid.heads)
    print("\n".join(experiment.notes))
    configs = [c for config in distinct(grid, experiment) for c in with_seeds(config, args.seeds or 1)]
    folder = args.runs / (args.name or NAME)
    data = sweep.data_digest(experiment)
    names = [sweep.name_of(config, data) for config in configs]
    waiting = [i for i, name in enumerate(names) if not is_whole(folder / name)]
    print(f"{len(configs)} trainings, {len(configs) - len(waiting)} of them finished before")
    failed: dict[int, str] = {}
    missing = [configs[i] for i in waiting]
    with cli.progress_bar("train", total_epochs(missing, experiment), "epoch") as progress:
        for k, outcomes in train_all(missing, experiment, progress, failed):
            save_run(run_of(outcomes, experiment), folder / names[waiting[k]], overwrite=True, command=command)
    diverged = {names[waiting[k]]: reason for k, reason in failed.items()}
    tables = sweep.compare(folder, configs, names, experiment, grid.monitor, diverged)
    print(as_typed(tables.text, cli.OPTION_OF))
    tables.write(folder)
    best = folder / tables.best
    print(f"{len(configs)} runs, table.csv and table.md -> {folder}")
    print(f"best by validation {tables.by}: python modeling/inference_head.py --run {best}")
    return EXIT_DONE


def distinct(grid: cli.Grid, experiment: Experiment) -> list[TrainConfig]:
    """The trainings of a grid on these data. A head that doesn't read what varies is trained once."""
    fitted = [on_features(config, experiment.features) for config in grid.configs(experiment.classes)]
    return list(dict.fromkeys(map(as_read, fitted)))


def search(args: Namespace, command: str) -> int:
    """Search by inner folds, show the candidates, save the ensemble; returns the exit status."""
    chosen = [f"--{name}" for name in ("norm", "scale", "seeds", "name") if getattr(args, name)]
    if chosen:
        raise UsageError(
            f"--auto with {', '.join(chosen)}: it chooses normalisation and scales by itself, trains one seed and "
            "leaves a run beside the sweeps; leave these out, or compare heads without --auto"
        )
    grid, settings = cli.grid_from(args), cli.experiment_settings(args)
    named = "head" in vars(args)
    experiment = load_experiment(settings, grid.heads if named else [])
    print("\n".join(experiment.notes))
    if not named:
        n_columns = sum(width for of_side in experiment.features.widths.values() for width in of_side.values())
        grid = cli.grid_from(args, head=list(auto.default_heads(auto.most_rows(experiment), n_columns)))
    heads = list(dict.fromkeys(head.head for head in grid.heads))
    idle = cli.unread(args, heads)
    if idle:
        raise UsageError(
            f"--auto with {', '.join(idle)}: does nothing for the heads it searches ({', '.join(heads)}); leave it "
            "out, or name heads that read it with --head"
        )
    configs = distinct(grid, experiment)
    with cli.progress_bar("search", auto.n_fits(experiment, configs), "fit") as progress:
        found, candidates = auto.auto(experiment, configs, progress)
    print(format_table(candidates, list(dict.fromkeys(name for row in candidates for name in row))))
    print("log-loss and figures of each candidate on training rows it hadn't seen\n")
    print(report_tables(found))
    run = save_run(found, args.runs / run_name(found, label="auto"), numbered=True, command=command)
    print(f"ensemble of {len(run.members)} heads -> {run.path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
