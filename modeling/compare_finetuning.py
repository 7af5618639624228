"""Say whether finetuning is worth it: the frozen head of a run against finetunings that begin with it, under one budget
on the same folds, with intervals, paired tests, costs, and a last line that says plainly which to use. Several values
of --lr, --dropout, --bs and --ep make a grid, from which validation rows alone choose."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.options import positive
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from feats.names import checked_name
from modeling.choices import METHODS, SplitSettings
from modeling.command_line.messages import OPTION_OF, command_line, guarded, progress_bar
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_data_options,
    add_run_options,
    chosen_runs,
    new_parser,
)
from modeling.command_line.tuning import BY_METHODS, TUNING_GRID, add_tuning_options, tuning_command, tuning_settings
from modeling.training.config import TrainConfig, settings_read

if TYPE_CHECKING:
    from modeling.experiments.experiment import Experiment
    from modeling.finetuning.comparison import Candidate, Cell
    from modeling.runs.run import Run


FINETUNE = Path(__file__).with_name("finetune.py")
USUAL_GRID = {"lr": [1e-5, 2e-5], "dropout": [0.3, 0.5]}  # study E's


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/compare_finetuning.py --run newest --methods frozen lp_ft",
        "python modeling/compare_finetuning.py --grid --only 1 --ep 2",
    )
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--run",
        metavar="RUN",
        help=f"its head is trained anew on each fold: {RUN_HELP} (default: newest; both with one head)",
    )
    add_caches_of_run_option(group)
    add_data_options(group, "the pairs (default: where the caches say)")
    group.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="weights of a cache's encoder")
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help="frozen; lp_ft: all weights, from the frozen head on; last-N blocks; lora-R; full: as lp_ft, with a new "
        "head; soup: lp_ft with a soup of its epochs and WiSE-FT",
    )
    group.add_argument("--folds", type=positive, default=5, metavar="K", help="outer folds; each is tested once")
    group.add_argument("--only", type=positive, metavar="N", help="do the first N folds (default: all)")
    group.add_argument(
        "--val-ratio", type=float, default=SplitSettings.val_ratio, help="share of a fold's other rows for validation"
    )
    group.add_argument("--split-seed", type=int, default=SplitSettings.seed, help="seed of the folds")
    group.add_argument("--dropout", type=float, nargs="+", help="of the tuned heads (default: the run's)")
    group.add_argument(
        "--grid", action="store_true", help="study E's values of --lr and --dropout, where these aren't typed"
    )
    add_tuning_options(parser, grid=True)
    add_run_options(parser)
    parser.add_argument("--name", help="folder of the comparison, inside --runs (default: finetuning_<run>)")
    parser.add_argument("--history", action="store_true", help="list past finetunings and verdicts in --runs, and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    if args.history:
        return guarded(lambda: history(args.runs), "nothing was changed")
    again = "finished cells and checkpoints are kept, run the same command to go on"
    return guarded(lambda: work(args, command_line(argv)), again, same_bits=hasattr(args, "deterministic"))


def work(args: Namespace, command: str) -> int:
    """Train what isn't finished, show and write the tables and the verdict; returns the exit status."""
    from modeling.experiments.experiment import experiment_of_run
    from modeling.finetuning import comparison, verdict

    if args.name is not None:
        checked_name(args.name, "name")
    run = run_to_compare(args)
    source = replace(run.source, folder=run.feature_folder(args.feats))
    experiment = experiment_of_run(run, source, args.device)
    experiment = comparison.outer_folds(experiment, args.folds, args.val_ratio, args.split_seed)
    config = replace(run.members[0].config, deterministic=hasattr(args, "deterministic"))
    folder = args.runs / (args.name or f"finetuning_{run.folder.name}")
    points = points_of(args, config.head.head)
    candidates = candidates_of(args, points, experiment.classes)
    cells = comparison.cells_of(candidates, min(args.only or args.folds, args.folds), folder)
    protocol = {"folds": args.folds, "val_ratio": args.val_ratio, "split_seed": args.split_seed}
    comparison.claim(folder, experiment, config, **protocol)
    train(args, cells, experiment, config, command)
    monitor = tuning_settings(Namespace(**{**vars(args), **points[0]})).monitor
    scored = [
        verdict.read_scored([cell for cell in cells if cell.candidate is candidate], experiment, monitor)
        for candidate in candidates
    ]
    done = experiment.splits[: cells[-1].fold]
    found = verdict.compare(
        scored[0],
        scored[1:],
        experiment.labels([i for split in done for i in split.test]),
        experiment.classes,
        experiment.majority(done[0]),
        monitor,
        protocol_line(args, len(done)),
    )
    found.write(folder)
    print(f"{len(cells)} cells, table.csv and table.md -> {folder}\n")
    print(as_typed(found.text(), OPTION_OF))
    return EXIT_DONE


def history(runs: Path) -> int:
    """Show what was finetuned before; returns the exit status."""
    from modeling.evaluation.text_tables import format_table
    from modeling.finetuning import past

    rows = past.finetunings(runs)
    if not rows:
        raise UsageError(f"nothing was finetuned in {runs} yet; begin with python modeling/finetune.py")
    numbered = [{"#": number, **row} for number, row in enumerate(rows, 1)]
    print(format_table(numbered, [name for name in numbered[0] if name != "run"]))
    print("\nruns: " + "\n      ".join(f"{row['#']} {row['run']}" for row in numbered))
    print("\naccuracy and macro_f1 are of validation rows, which also chose the weights: test rows decide a comparison")
    for name, line in past.verdicts(runs).items():
        print(f"\n{name}\n{line}")
    return EXIT_DONE


def run_to_compare(args: Namespace) -> Run:
    """The run whose head is the frozen one. Raises `UsageError` for one of several heads, or with tuned encoders."""
    [run] = chosen_runs(args, single_head=True)
    if len(run.members) > 1 or run.finetuned is not None:
        what = "was finetuned" if run.finetuned is not None else f"has {len(run.members)} heads"
        raise UsageError(f"{run.named} {what}, expected one head on cached features; name such a run with `run`")
    return run


def protocol_line(args: Namespace, done: int) -> str:
    """How the figures came about."""
    folds = f"{args.folds} folds" if done == args.folds else f"{done} of {args.folds} folds"
    return (
        f"{folds}, stratified, duplicates together, seed {args.split_seed}: each is tested by models of the others, "
        f"{args.val_ratio:g} of whose rows chose epochs, soups and temperature"
    )


# -- what is trained --------------------------------------------------------------------------------------------


def points_of(args: Namespace, head: str) -> list[dict[str, Any]]:
    """Every combination of the values typed for a grid. Raises `UsageError` for a dropout that the head doesn't
    read."""
    reads = settings_read(head)
    if args.dropout and "dropout" not in reads:
        raise UsageError(f"`dropout` does nothing for the head {head}; leave it out")
    usual = {name: values for name, values in USUAL_GRID.items() if args.grid and (name != "dropout" or name in reads)}
    axes = {name: getattr(args, name, None) or usual.get(name) for name in TUNING_GRID}
    varied = {name: values for name, values in axes.items() if values}
    return [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]


def candidates_of(args: Namespace, points: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[Candidate]:
    """The frozen head, then each method at each point of the grid. Raises `UsageError` for values out of range, and
    for options that methods decide."""
    from modeling.finetuning import comparison
    from modeling.finetuning.comparison import FROZEN, Candidate

    typed = [f"`{name}`" for name in BY_METHODS if hasattr(args, name)]
    if typed:
        raise UsageError(f"{', '.join(typed)}: `methods` say what is tuned, and how; leave it out")
    varying = [name for name in points[0] if len({point[name] for point in points}) > 1]
    found = [Candidate(FROZEN)]
    for method in dict.fromkeys(name for name in args.methods if name != FROZEN):
        for point in points:
            common = tuning_settings(Namespace(**{**vars(args), **point}), classes)
            settings = comparison.settings_of(method, common)
            live = {"live_trunk": True} if args.live_trunk and settings.last_blocks else {}
            shown = {name: point[name] for name in varying}
            found.append(Candidate(method, settings, point.get("dropout"), shown, live))
    return found


def train(args: Namespace, cells: Sequence[Cell], experiment: Experiment, config: TrainConfig, command: str) -> None:
    """Every cell that isn't finished, one after the other, with a line on each."""
    from modeling.finetuning import comparison

    waiting = [cell for cell in cells if not cell.done]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished before")
    with progress_bar("compare", len(waiting), "cell") as progress:
        for cell in waiting:
            if cell.candidate.settings is None:
                comparison.train_frozen(cell, config, experiment, command=command, options=args.given)
            else:
                comparison.finetune(cell, finetuning(args, cell, experiment))
            progress(1)
            print(cell_line(cell))


def finetuning(args: Namespace, cell: Cell, experiment: Experiment) -> list[str]:
    """The command that makes a cell: finetune.py with its arguments."""
    from modeling.finetuning import comparison

    assert cell.candidate.settings is not None
    words = [FINETUNE, "--run", cell.frozen, "--runs", cell.path.parent, "--name", cell.path.name]
    words += ["--feats", experiment.features.source.folder, "--device", args.device]
    for option, value in (("--data", args.data), ("--layout", args.layout)):
        words += [] if value is None else [option, value]
    words += ["--columns", *args.table_columns] if args.table_columns else []
    words += ["--weights", *args.weights] if args.weights else []
    words += ["--dropout", cell.candidate.dropout] if cell.candidate.dropout is not None else []
    words += ["--new-head"] if comparison.begins_with_new_head(cell.candidate.method) else []
    words += ["--live-trunk"] if args.live_trunk else []
    return [*map(str, words), *tuning_command(cell.candidate.settings)]


def cell_line(cell: Cell) -> str:
    """What a finished cell came to on its validation rows."""
    from modeling.evaluation.metrics import collapsed_class, marked
    from modeling.runs.config import read_metrics

    figures = read_metrics(cell.path)["val"]
    shown = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.3f}" for name in ("accuracy", "macro_f1"))
    name = marked(cell.candidate.name, collapsed_class(figures["confusion"], figures["classes"]))
    return f"fold {cell.fold}, {name}: validation {shown}"


if __name__ == "__main__":
    sys.exit(main())
