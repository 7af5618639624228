"""Train a light head on cached features and save it as a run."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace

import feats.threads  # noqa: F401

# isort: split

from feats.cli import EXIT_DONE
from feats.errors import UsageError
from feats.source import SIDES
from modeling import cli
from modeling.experiment import load_experiment, on_features, total_epochs, train_run
from modeling.features.joined import FeatureSource
from modeling.heads.base import HeadConfig
from modeling.prediction.ablation import with_ablation_eval
from modeling.runs.folder import run_name, save_run, write_tensorboard
from modeling.runs.tables import ablation_tables, head_line, report_tables
from modeling.training.config import with_seeds


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = cli.new_parser(__doc__)
    cli.add_feature_options(parser)
    cli.add_split_options(parser)
    cli.add_training_options(parser)
    cli.add_run_options(parser)
    cli.add_ablation_options(parser, weights=True)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files into the run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    same_bits = hasattr(args, "deterministic")
    return cli.guarded(lambda: work(args, cli.command_line(argv)), "nothing was saved", same_bits=same_bits)


def work(args: Namespace, command: str) -> int:
    """Train one configuration, show its figures, save it; returns the exit status."""
    grid, settings = cli.grid_from(args), cli.experiment_settings(args)
    cli.print_unread(args, [head.head for head in grid.heads])
    experiment = load_experiment(settings, grid.heads)
    print("\n".join(experiment.notes))
    [config] = grid.configs(experiment.classes)
    configs = with_seeds(on_features(config, experiment.features), args.seeds or 1)
    absent_of = None
    if args.ablation_eval:
        absent_of = cli.absence_of(args, experiment, sides_read(experiment.features.source, configs[0].head))
    elif args.weights:
        raise UsageError("--weights is for --ablation-eval: cached features are read as they are")
    with cli.progress_bar("train", total_epochs(configs, experiment), "epoch") as progress:
        trained = train_run(configs, experiment, progress)
    print(head_line(trained))
    print(report_tables(trained))
    if absent_of is not None:
        trained = with_ablation_eval(trained, experiment, absent_of)
        print(f"\n{ablation_tables(trained)}")
    run = save_run(trained, args.runs / run_name(trained), numbered=True, command=command, options=args.given)
    if args.tensorboard:
        write_tensorboard(run)
    print(f"run of {len(run.members)} head{'s' if len(run.members) > 1 else ''} -> {run.path}")
    return EXIT_DONE


def sides_read(source: FeatureSource, head: HeadConfig) -> FeatureSource:
    """The caches of the sides that a head reads."""
    image, text = (source.of(side) if side in head.sides else () for side in SIDES)
    return replace(source, image=image, text=text)


if __name__ == "__main__":
    sys.exit(main())
