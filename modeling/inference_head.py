"""Predict with trained runs: the rows of a cached split, one raw pair (--image, --text), or a manifest of raw pairs
(--csv). Writes CSV of guid and tag in the data set's order."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import feats.threads  # noqa: F401

# isort: split

import torch

from feats.acceleration import resolve_device
from feats.cli import EXIT_DONE
from feats.errors import UsageError
from modeling import cli as options
from modeling.evaluation import prediction as pr
from modeling.runs.files import check_replaceable
from modeling.runs.folder import Run

SHOWN = 50  # left out rows named on stderr


def build_parser() -> ArgumentParser:
    parser = options.new_parser(__doc__)
    cached = parser.add_argument_group("cached rows")
    cached.add_argument(
        "--feats", type=Path, metavar="DIR", help="folder of caches (default: of each run, the one it was trained from)"
    )
    cached.add_argument("--split", default="test", help="which caches: <name>_<split>.h5")
    raw = parser.add_argument_group("raw pairs, encoded as the run's caches were")
    raw.add_argument("--image", type=Path, metavar="FILE", help="one pair's picture")
    raw.add_argument("--text", help="one pair's text")
    raw.add_argument("--csv", type=Path, metavar="FILE", help="a manifest: columns id and image, text or both")
    raw.add_argument(
        "--weights", nargs="+", default=[], metavar="CACHE=PATH", help="weights of an encoder, where they aren't found"
    )
    which = parser.add_argument_group("runs")
    which.add_argument("--run", nargs="+", metavar="RUN", help="a path, or a name in --runs (default: the newest)")
    which.add_argument(
        "--vote",
        choices=pr.VOTES,
        default="soft",
        help="several runs: mean of their calibrated probabilities, or most votes",
    )
    which.add_argument(
        "--tie",
        metavar="CLASS",
        help=f"who gets a tie, if among the tied; else, or without such a class, the tied class of the highest mean "
        f"probability (default: {pr.TIE})",
    )
    options.add_run_options(parser)
    output = parser.add_argument_group("predictions")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: submission_<split>.csv in the run, of several in --runs)"
    )
    output.add_argument("--proba", action="store_true", help="add a column of probabilities for each class")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    return options.guarded(lambda: predict(args), "nothing was written", parser)


def predict(args: Namespace) -> int:
    one_pair = args.image is not None or args.text is not None
    if one_pair and args.csv:
        raise UsageError("--csv together with --image or --text; give a manifest or one pair")
    if args.weights and not one_pair and not args.csv:
        raise UsageError("--weights is for raw pairs; cached rows are read as they are")
    runs = pr.open_runs(args.runs, args.run)
    device = resolve_device(args.device)
    out = output_file(args, runs)
    if out:
        check_replaceable(out, pr.SUBMISSION)
    print("\n".join(f"run {run.path}" for run in runs))
    if one_pair or args.csv:
        predictions = predict_raw(args, runs, device)
    else:
        predictions = pr.predict(runs, args.feats, args.split, vote=args.vote, tie=args.tie, device=device)
        print("\n".join(f"caches {folder}" for folder in predictions.folders))
    warn_of_gaps(predictions)
    if one_pair:
        print(pr.describe_row(predictions, 0))
    else:
        print(pr.distribution(predictions))
        print_figures(predictions, runs)
    if out:
        pr.write_submission(out, predictions, args.proba)
        print(f"{len(predictions)} predictions -> {out}")
    return EXIT_DONE


def output_file(args: Namespace, runs: Sequence[Run]) -> Path | None:
    """Where the predictions go; one raw pair's to the screen only, unless --out says otherwise."""
    if args.out or args.image is not None or args.text is not None:
        return args.out
    name = args.csv.stem if args.csv else args.split
    return (runs[0].path if len(runs) == 1 else args.runs) / f"submission_{name}.csv"


def predict_raw(args: Namespace, runs: Sequence[Run], device: torch.device) -> pr.Predictions:
    from modeling.evaluation import (
        raw_pairs,
    )  # encoders and their libraries: slow to import, and needed for raw pairs only

    weights = raw_pairs.named_weights(args.weights)
    records = raw_pairs.read_manifest(args.csv) if args.csv else raw_pairs.one_pair(args.image, args.text, runs)
    with TemporaryDirectory() as folder:
        raw_pairs.encode(runs, records, Path(folder), weights=weights, device=device)
        return pr.predict(runs, Path(folder), raw_pairs.SPLIT, vote=args.vote, tie=args.tie, device=device)


def warn_of_gaps(predictions: pr.Predictions) -> None:
    for rows, what in (
        (predictions.left_out, f"have no features and get the most common class, {predictions.fallback}"),
        (predictions.partly, "lack features of some runs and are left to the others"),
    ):
        if rows:
            print(f"warning: {len(rows)} of {len(predictions)} rows {what}:", file=sys.stderr)
            for name, reason in list(rows.items())[:SHOWN]:
                print(f"  {name}: {reason}", file=sys.stderr)
            if len(rows) > SHOWN:
                print(f"  ... and {len(rows) - SHOWN} more", file=sys.stderr)


def print_figures(predictions: pr.Predictions, runs: Sequence[Run]) -> None:
    """How good the predictions are, where the rows have labels."""
    if not any(predictions.rows.tags):
        return
    try:
        figures = pr.evaluate(predictions, pr.class_shares(runs[0])[0])
    except UsageError as error:
        print(f"warning: no figures ({error})", file=sys.stderr)
        return
    print("\n" + pr.figures_table(figures, predictions.split, calibrated=predictions.vote == "soft") + "\n")
    known = pr.known_rows(runs, predictions)
    if known:
        print(
            f"warning: {known} of these rows were trained on or validated with; figures on them flatter",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
