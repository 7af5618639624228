"""Train a light head on cached features and save it as a run."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import feats.threads  # noqa: F401

# isort: split

from feats.cli import EXIT_DONE
from modeling import cli as options
from modeling import experiment as ex
from modeling.runs.folder import run_name, save_run, write_tensorboard


def build_parser() -> ArgumentParser:
    parser = options.new_parser(__doc__)
    options.add_feature_options(parser)
    options.add_split_options(parser)
    options.add_training_options(parser)
    options.add_run_options(parser)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files into the run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return options.guarded(lambda: train(args, options.command_line(argv)), "nothing was saved")


def train(args: Namespace, command: str) -> int:
    values = options.with_recipe(args)
    [point] = options.grid_points(values)
    config = options.config_from(point)
    options.print_unread(args, [config.head.head])
    experiment = ex.load_experiment(args, values, [config.head.head])
    config = options.fit_to_data(config, args.recipe, experiment.classes, experiment.source)
    configs = options.with_seeds(config, args.seeds)
    outcomes = [outcome for _, of_seed in ex.train(configs, experiment) for outcome in of_seed]
    run = ex.make_run(outcomes, experiment)
    print(ex.describe_heads(run.members))
    report = ex.measure(outcomes, experiment, run)
    ex.print_report(report, run)
    path = save_run(
        run,
        args.runs,
        run_name(run),
        metrics=report.figures,
        history=report.history,
        predictions=(report.ids, report.tags, report.probabilities),
        command=command,
    )
    if args.tensorboard:
        write_tensorboard(path, report.history)
    print(f"run of {len(run.members)} head{'s' if len(run.members) > 1 else ''} -> {path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
