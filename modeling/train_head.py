"""Train a light head on cached features and save it as a run."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.errors import UsageError
from feats.source import SIDES
from modeling.command_line.messages import command_line, guarded, print_lines, progress_bar, say
from modeling.command_line.options import (
    absence_of,
    add_ablation_options,
    add_corrections_option,
    add_feature_options,
    add_label_column_options,
    add_run_options,
    add_split_options,
    add_stream_option,
    experiment_settings,
    new_parser,
    refuse_absent,
)
from modeling.command_line.training import Grid, add_training_options, grid_from, print_recipe, print_unread
from modeling.heads.config import HeadConfig
from modeling.training.config import with_seeds

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment
    from modeling.experiments.fitting import Told
    from modeling.features.joined import FeatureSource
    from modeling.training.problem import Epoch


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/train_head.py --vtype efficientnet --ttype minilm",
        "python modeling/train_head.py --head mlp --lr 1e-3 --seeds 3 --folds 5",
    )
    add_feature_options(parser)
    add_split_options(parser)
    add_corrections_option(parser)
    add_label_column_options(parser)
    add_stream_option(parser)
    add_training_options(parser)
    add_run_options(parser)
    parser.add_argument("--verbose", action="store_true", help="show every epoch as it ends (default: best and last)")
    parser.add_argument(
        "--history-batches", action="store_true", help="also write the loss of every batch into the run"
    )
    add_ablation_options(parser, weights=True)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files into the run")
    parser.add_argument("--report", action="store_true", help="also write the run's report.html, see make_report.py")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    same_bits = hasattr(args, "deterministic")
    return guarded(lambda: work(args, command_line(argv)), "nothing was saved", same_bits=same_bits, given=args.given)


def work(args: Namespace, command: str) -> int:
    """Train one configuration, show its figures, save it; returns the exit status."""
    from modeling.experiments.experiment import load_experiment

    refuse_absent(args)
    grid, settings = grid_from(args), experiment_settings(args)
    print_unread(args, [head.head for head in grid.heads])
    print_recipe(args, [head.head for head in grid.heads])
    with load_experiment(settings, grid.heads) as experiment:
        return train(args, command, grid, experiment)


def train(args: Namespace, command: str, grid: Grid, experiment: Experiment) -> int:
    """Train the one configuration of the grid, show its figures, save it; returns the exit status."""
    from modeling.experiments.experiment import on_features
    from modeling.experiments.fitting import total_epochs, train_run
    from modeling.prediction.ablation import with_ablation_eval
    from modeling.runs.folder import run_name, save_run, write_tensorboard
    from modeling.runs.tables import ablation_tables, collapse_notes, cost_line, epochs_shown, head_line, report_tables

    print_lines(experiment.lines(), args.quiet)
    [config] = grid.configs(experiment.classes)
    configs = with_seeds(on_features(config, experiment.features), args.seeds or 1)
    absent_of = None
    if args.ablation_eval:
        experiment.require_in_memory("`ablation_eval`")
        absent_of = absence_of(args, experiment, sides_read(experiment.features.source, configs[0].head))
    elif args.weights:
        raise UsageError("--weights is for --ablation-eval: cached features are read as they are")
    batches: list[dict[str, Any]] = []
    told = listener(args, batches, named=len(configs) * len(experiment.splits) > 1)
    with progress_bar("train", total_epochs(configs, experiment), "epoch") as progress:
        trained = train_run(configs, experiment, progress, told)
    assert trained.report is not None and trained.cost is not None
    cost = cost_line(trained.cost)
    trained = replace(trained, report=replace(trained.report, batches=in_order(batches)))
    if not args.verbose:
        print_lines(epochs_shown(trained), args.quiet)
    print(f"{head_line(trained)}\n{cost}")
    print(report_tables(trained))
    if absent_of is not None:
        trained = with_ablation_eval(trained, experiment, absent_of)
        print(f"\n{ablation_tables(trained)}")
    print_lines(collapse_notes(trained))
    run = save_run(trained, args.runs / run_name(trained), numbered=True, command=command, options=args.given)
    if args.tensorboard:
        write_tensorboard(run)
    print(f"run of {len(run.members)} head{'s' if len(run.members) > 1 else ''} -> {run.path}")
    if args.report:
        from modeling.report.making import make_report  # matplotlib, jinja2: slow to import

        print("\n".join(make_report(run.folder).lines()))
    return EXIT_DONE


def listener(args: Namespace, batches: list[dict[str, Any]], named: bool) -> Told | None:
    """What hears of every epoch, as the options ask: a line on the terminal, `named` by its training, and rows for
    `batches`. None where nothing is asked."""
    from modeling.runs.tables import epoch_line

    if not args.verbose and not args.history_batches:
        return None

    def told(epoch: Epoch, fold: int | None) -> None:
        whose = {"fold": fold or "", "seed": epoch.config.seed}
        if args.verbose:
            say(epoch_line({**(whose if named else {}), **epoch.row}, "best so far" if epoch.best else ""))
        if args.history_batches:
            batches.extend(
                {**whose, "epoch": epoch.row["epoch"], "batch": number, "train_loss": loss}
                for number, loss in enumerate(epoch.batch_losses, 1)
            )

    return told


def in_order(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of trainings side by side, one training after the other."""
    return sorted(batches, key=lambda row: (row["fold"] or 0, row["seed"], row["epoch"], row["batch"]))


def sides_read(source: FeatureSource, head: HeadConfig) -> FeatureSource:
    """The caches of the sides that a head reads."""
    image, text = (source.of(side) if side in head.sides else () for side in SIDES)
    return replace(source, image=image, text=text)


if __name__ == "__main__":
    sys.exit(main())
