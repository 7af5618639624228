"""Explain what a run says of one pair (--image, --text): which words and which cells of the picture speak for a class,
what each side contributes, which training rows are nearest. Every explanation is scored against random orders; --check
N tells how often those of validation pairs are better."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import feats.threads  # noqa: F401

# isort: split


from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.options import positive
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from modeling.command_line.messages import guarded, print_note, progress_bar
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_data_options,
    add_run_options,
    add_weights_option,
    chosen_runs,
    data_place,
    named_texts,
    new_parser,
)
from modeling.explanations.methods import METHODS

if TYPE_CHECKING:
    from modeling.runs.run import Run


if TYPE_CHECKING:
    from feats.records import Pairs
    from modeling.explanations.evidence import TrainingRows
    from modeling.explanations.explained import ExplainedModel

OUT = "explanation.png"
NEIGHBOURS, ORDERS = 5, 10


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        'python modeling/explain.py --image cat.jpg --text "what a day"',
        "python modeling/explain.py --run best --check 50",
    )
    pair = parser.add_argument_group("the pair, and what is explained")
    pair.add_argument("--image", type=Path, metavar="FILE", help="its picture")
    pair.add_argument("--text", help="its text")
    pair.add_argument("--target", metavar="CLASS", help="whose probability (default: the most probable class's)")
    pair.add_argument(
        "--method",
        nargs="+",
        default=[],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; each encoder is explained by the first that can (default: grad-cam for "
        "convolutional nets, attention for ViTs, integrated-gradients for texts, occlusion where there are no "
        "gradients)",
    )
    pair.add_argument(
        "--neighbours", type=positive, default=NEIGHBOURS, metavar="K", help="nearest training rows shown"
    )
    pair.add_argument("--orders", type=positive, default=ORDERS, metavar="N", help="random orders to compare with")
    pair.add_argument("--seed", type=int, default=0, help="of random orders, and of the pairs of --check")
    pair.add_argument("--check", type=positive, metavar="N", help="score explanations of N validation pairs, too")
    which = parser.add_argument_group("the run and its data")
    which.add_argument("--run", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    add_caches_of_run_option(which)
    add_data_options(which, "the pairs (default: where the caches say)")
    add_weights_option(which)
    add_run_options(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help=f"(default: {OUT} in the run's folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "nothing was written", named={}, given=args.given)


def work(args: Namespace) -> int:
    """Explain the pair, check the methods, or both; returns the exit status."""
    from feats.acceleration import resolve_device

    one_pair = args.image is not None or args.text is not None
    if not one_pair and not args.check:
        raise UsageError("nothing to explain: give `image`, `text` or both, or `check` and a number of pairs")
    [run] = chosen_runs(args)
    if args.target is not None and args.target not in run.classes:
        raise UsageError(f"--target {args.target}: no class of {run.named}; there are {', '.join(run.classes)}")
    from modeling.explanations.explained import load_explained  # encoders, captum, matplotlib: slow to import
    from modeling.explanations.explanation import choose_methods

    if one_pair:
        check_pair(args, run)
    model = load_explained(run, resolve_device(args.device), named_texts(args.weights, "--weights"))
    methods = choose_methods(model, args.method)
    print(f"run {run.path}")
    if one_pair:
        explain(args, model, methods)
    if args.check:
        check(args, model, methods)
    return EXIT_DONE


def check_pair(args: Namespace, run: Run) -> None:
    """Refuse what can't be explained or written before anything slow is done."""
    from modeling.explanations.drawing import check_png
    from modeling.prediction.raw_pairs import one_pair

    one_pair(args.image, args.text, [run])
    check_png(args.out or run.folder / OUT)
    for side, given in (("image", args.image), ("text", args.text)):
        if given is not None and not run.source.of(side):
            print_note(f"--{side} does nothing: the run reads no {side}")


def explain(args: Namespace, model: ExplainedModel, methods: Mapping[str, str]) -> None:
    """Explain the one pair: print it, draw it."""
    from modeling.explanations.drawing import draw, save
    from modeling.explanations.explained import read_picture
    from modeling.explanations.explanation import explain_pair
    from modeling.explanations.telling import explanation_lines

    run = model.run
    picture = read_picture(args.image) if args.image is not None and run.source.image else None
    rows = training_rows(args, run)
    found = explain_pair(
        model,
        picture,
        args.text,
        target=args.target,
        methods=methods,
        rows=rows,
        neighbours=args.neighbours,
        orders=args.orders,
        seed=args.seed,
    )
    print("\n".join(explanation_lines(found, neighbour_texts(args, run) if rows else {})))
    out: Path = args.out or run.folder / OUT
    save(draw(found), out)
    print(f"picture -> {out}")


def training_rows(args: Namespace, run: Run) -> TrainingRows | None:
    """The run's cached training rows; None, with a note, where they aren't there."""
    from modeling.explanations.evidence import TrainingRows

    try:
        return TrainingRows.of(run, args.feats)
    except UsageError as error:
        if args.feats is not None:
            raise
        print_note(f"no sides and no neighbours without the training rows' caches ({as_typed(error)})")
        return None


def neighbour_texts(args: Namespace, run: Run) -> dict[str, str]:
    """The training rows' texts by id, where the data are still there."""
    try:
        return {record.id: record.text or "" for record in records(args, run)}
    except (UsageError, OSError) as error:
        print_note(f"neighbours without their texts ({as_typed(error)})")
        return {}


def records(args: Namespace, run: Run) -> Pairs:
    """The raw pairs of the run's caches."""
    from modeling.runs.pairs import records_of_run

    return records_of_run(run, args.feats, data_place(args))


def check(args: Namespace, model: ExplainedModel, methods: Mapping[str, str]) -> None:
    """Explain validation pairs, and print how often that beats random orders."""
    import numpy as np

    from modeling.explanations.explained import read_picture
    from modeling.explanations.explanation import check_methods
    from modeling.explanations.telling import check_lines

    run = model.run
    ids = list(dict.fromkeys(name for split in run.splits for name in split.val))
    chosen = {ids[k] for k in np.random.default_rng(args.seed).permutation(len(ids))[: args.check]}
    pairs = (
        (read_picture(record.image_path) if run.source.image else None, record.text)
        for record in records(args, run)
        if record.id in chosen
    )
    with progress_bar("check", len(chosen), "pair") as progress:
        checks = check_methods(model, pairs, methods, orders=args.orders, seed=args.seed, progress=progress)
    print("\n".join(check_lines(checks, len(chosen))))


if __name__ == "__main__":
    sys.exit(main())
