"""Train a light head on cached features and save it as a run."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import feats.threads  # noqa: F401

# isort: split

from feats.cli import EXIT_DONE
from modeling import cli
from modeling.experiment import load_experiment, on_features, total_epochs, train_run
from modeling.runs.folder import run_name, save_run, write_tensorboard
from modeling.runs.tables import head_line, report_tables
from modeling.training.config import with_seeds


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = cli.new_parser(__doc__)
    cli.add_feature_options(parser)
    cli.add_split_options(parser)
    cli.add_corrections_option(parser)
    cli.add_training_options(parser)
    cli.add_run_options(parser)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files into the run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return cli.guarded(lambda: work(args, cli.command_line(argv)), "nothing was saved")


def work(args: Namespace, command: str) -> int:
    """Train one configuration, show its figures, save it; returns the exit status."""
    grid, settings = cli.grid_from(args), cli.experiment_settings(args)
    cli.print_unread(args, [head.head for head in grid.heads])
    experiment = load_experiment(settings, grid.heads)
    print("\n".join(experiment.notes))
    [config] = grid.configs(experiment.classes)
    configs = with_seeds(on_features(config, experiment.features), args.seeds or 1)
    with cli.progress_bar("train", total_epochs(configs, experiment), "epoch") as progress:
        trained = train_run(configs, experiment, progress)
    print(head_line(trained))
    print(report_tables(trained))
    run = save_run(trained, args.runs / run_name(trained), numbered=True, command=command)
    if args.tensorboard:
        write_tensorboard(run)
    print(f"run of {len(run.members)} head{'s' if len(run.members) > 1 else ''} -> {run.path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
