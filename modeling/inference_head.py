"""Predict with trained runs: the rows of a cached split, one raw pair (--image, --text), or a manifest of raw pairs
(--csv). Writes CSV of guid and tag in the data set's order."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import feats.threads  # noqa: F401

# isort: split


from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import rows_bar
from feats.command_line.options import add_columns_option, columns_from
from feats.command_line.wording import as_typed, remark
from feats.errors import UsageError
from feats.escapes import one_line
from feats.leftovers import temporary_folder
from modeling import choices
from modeling.choices import VoteSettings
from modeling.command_line.messages import guarded
from modeling.command_line.options import (
    RUN_HELP,
    absence_of,
    add_ablation_options,
    add_csv_option,
    add_run_options,
    add_weights_option,
    chosen_runs,
    data_place,
    named_texts,
    new_parser,
    refuse_absent,
)

if TYPE_CHECKING:
    import torch

    from modeling.prediction.cached import Predictions
    from modeling.runs.run import Run


STREAM = Path("-")  # standard input, standard output
SHOWN = 50  # left out rows named on stderr


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/inference_head.py --run best --proba",
        'python modeling/inference_head.py --image cat.jpg --text "what a day"',
    )
    cached = parser.add_argument_group("cached rows")
    cached.add_argument(
        "--feats", type=Path, metavar="DIR", help="folder of caches (default: of each run, the one it was trained from)"
    )
    cached.add_argument("--split", default="test", help="which caches: <name>_<split>.h5")
    cached.add_argument(
        "--data", type=Path, metavar="DIR|FILE", help="the pairs of a finetuned run (default: where they lay)"
    )
    raw = parser.add_argument_group("raw pairs, encoded as the run's caches were")
    raw.add_argument("--image", type=Path, metavar="FILE", help="one pair's picture")
    raw.add_argument("--text", help="one pair's text")
    raw.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="a table, CSV, TSV, JSONL or Parquet: image, text or both, perhaps id; - is standard input, CSV or JSONL, "
        "with paths from here",
    )
    add_columns_option(raw)
    add_weights_option(raw)
    which = parser.add_argument_group("runs")
    which.add_argument("--run", nargs="+", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    which.add_argument(
        "--vote",
        choices=choices.VOTES,
        default=VoteSettings.vote,
        help="several runs: mean of their calibrated probabilities, or most votes",
    )
    which.add_argument(
        "--tie",
        metavar="CLASS",
        help=f"who gets a tie, if among the tied; else, or without such a class, the tied class of the highest mean "
        f"probability (default: {choices.TIE})",
    )
    add_ablation_options(parser)
    add_run_options(parser)
    output = parser.add_argument_group("predictions")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="(default: submission_<split>.csv in the run, of several in --runs); - is standard output",
    )
    output.add_argument("--format", choices=choices.FORMATS, help="(default: what the suffix of --out says, else csv)")
    output.add_argument("--no-header", action="store_true", help="leave out the line of the columns' names")
    output.add_argument("--proba", action="store_true", help="add a column of probabilities for each class")
    add_csv_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    said = "nothing was written"
    if args.csv and args.out != STREAM:
        said += "; the pairs that are encoded are kept, the same command goes on with them"
    return guarded(lambda: work(args), said, named={}, given=args.given)


def work(args: Namespace) -> int:
    """Predict cached rows or raw pairs, show how they are distributed, write them; returns the exit status."""
    if args.out != STREAM:
        return predict(args, None)
    stream = sys.stdout
    with redirect_stdout(sys.stderr):
        return predict(args, stream)


def predict(args: Namespace, stream: TextIO | None) -> int:
    """As `work`; with `stream` the predictions go there."""
    from feats.acceleration import resolve_device
    from modeling.prediction import cached as prediction

    one_pair = args.image is not None or args.text is not None
    if one_pair and args.csv:
        raise UsageError("--csv together with --image or --text; give a manifest or one pair")
    refuse_absent(args)
    if args.ablation_eval:
        return score_without_sides(args)
    form = format_of(args)
    check_inputs(args)
    if args.weights and not one_pair and not args.csv:
        raise UsageError("--weights is for raw pairs; cached rows are read as they are")
    runs = chosen_runs(args)
    device = resolve_device(args.device)
    voting = VoteSettings(args.vote, args.tie)
    out = output_file(args, runs, form)
    if out and stream is None:
        prediction.check_submission(out, form, own=args.out is None)
    print("\n".join(f"run {run.path}" for run in runs))
    if one_pair or args.csv:
        predictions = predict_raw(args, runs, voting, device, None if stream else out)
    else:
        encode_own_caches(args, runs, device)
        predictions = prediction.predict_caches(runs, args.feats, args.split, voting, device)
        print("\n".join(f"caches {folder}" for folder in predictions.folders))
    warn_of_gaps(predictions)
    if one_pair:
        print(prediction.row_line(predictions, 0))
    else:
        print(prediction.distribution_table(predictions))
        print_figures(predictions, runs)
    header = not args.no_header
    if stream is not None:
        prediction.write_predictions(stream, predictions, args.proba, header=header, form=form, safe=args.csv_safe)
        stream.flush()
    elif out:
        own, safe = args.out is None, args.csv_safe
        prediction.write_submission(out, predictions, args.proba, header=header, own=own, form=form, safe=safe)
        print(f"{len(predictions)} predictions -> {out}")
    return EXIT_DONE


def score_without_sides(args: Namespace) -> int:
    """Show each run's figures with one side absent: on its own validation rows, its test part, and the labelled rows of
    --split; returns the exit status."""
    from feats.acceleration import resolve_device
    from modeling.experiments.experiment import experiment_of_run
    from modeling.features.cache_facts import are_complete
    from modeling.features.loading import load_features
    from modeling.prediction.ablation import ablation_eval, ablation_of_rows
    from modeling.runs.tables import ablation_table

    idle = [
        f"--{name}" for name in ("image", "text", "csv", "out", "format", "proba", "no_header") if getattr(args, name)
    ]
    if idle:
        raise UsageError(
            f"--ablation-eval with {', '.join(idle).replace('_', '-')}: it scores cached rows that have labels and "
            "writes no predictions; leave it out"
        )
    device = resolve_device(args.device)
    for run in chosen_runs(args):
        encode_own_caches(args, [run], device, ("train",))
        source = replace(run.source, folder=run.feature_folder(args.feats))
        print(f"run {run.path}\ncaches {source.folder}")
        experiment = experiment_of_run(run, source, args.device)
        own = {name: weights for name in source.names if (weights := run.encoder_weights(name))}
        absent_of = absence_of(args, experiment, source, own)
        tables = ablation_eval(run, experiment, absent_of)
        if args.split != "train" and are_complete(source.folder, args.split, source.names):
            features = load_features(
                source.folder, args.split, source.image, source.text, tokens=source.tokens, views=False
            )
            features = run.with_own_labels(features)
            if any(features.tags):
                absent = absent_of(sorted({i for split in run.splits for i in split.train}))
                tables[f"{args.split} caches"] = ablation_of_rows(run, features, absent)
        for part, figures in tables.items():
            print(f"\n{ablation_table(figures, part)}\n")
    return EXIT_DONE


def format_of(args: Namespace) -> str:
    """The format of the predictions. Raises `UsageError` for a suffix that tells none, and what the format hasn't."""
    from modeling.prediction import cached as prediction

    suffix = "" if args.out is None or args.out.exists() and not args.out.is_file() else args.out.suffix.lower()
    if args.format is None and suffix and suffix[1:] not in prediction.FORMATS:
        known = ", ".join(f".{form}" for form in choices.FORMATS)
        raise UsageError(
            f"--out {args.out}: {suffix} tells no format, known are {known}; give another file with --out, or name "
            "the format with --format"
        )
    form: str = args.format or suffix[1:] or "csv"
    if args.no_header and form != "csv":
        raise UsageError(f"--no-header with format {form}, which has no line of columns; leave it out")
    return form


def check_inputs(args: Namespace) -> None:
    """Raise `UsageError` for typed files that aren't there, before anything is loaded."""
    for option, path in (("--image", args.image), ("--csv", args.csv)):
        if path is not None and path != STREAM and not path.exists():
            raise UsageError(f"{option}: cannot read {path} (no such file); give the file's path")


def output_file(args: Namespace, runs: Sequence[Run], form: str) -> Path | None:
    """Where the predictions go; one raw pair's to the screen only, unless --out says otherwise."""
    chosen: Path | None = args.out
    if chosen or args.image is not None or args.text is not None:
        return chosen
    name = args.split if args.csv is None else "stdin" if args.csv == STREAM else args.csv.stem
    folder: Path = runs[0].folder if len(runs) == 1 else args.runs
    return folder / f"submission_{name}.{form}"


def predict_raw(
    args: Namespace, runs: Sequence[Run], voting: VoteSettings, device: torch.device, out: Path | None
) -> Predictions:
    """Predictions of the pair or the manifest that was typed, encoded into caches that are gone afterwards. Those of a
    manifest lie beside `out`, where they outlast an interruption: the same command goes on with them."""
    from feats.records import manifest_records
    from modeling.prediction import (
        cached as prediction,
        raw_pairs,  # encoders and their libraries: slow to import, for raw pairs only
    )

    weights = named_texts(args.weights, "--weights")
    remarks: list[str] = []
    if args.csv is None:
        records = raw_pairs.one_pair(args.image, args.text, runs)
    elif args.csv == STREAM:
        records, remarks = manifest_records(sys.stdin.buffer.read(), Path(), "standard input", columns_from(args))
    else:
        records, remarks = raw_pairs.read_manifest(args.csv, columns_from(args))
    for told in remarks:
        print(remark(as_typed(told)), file=sys.stderr)
    raw_pairs.check_pictures(runs, records)
    kept = None if args.csv is None or out is None or not is_plain(out) else out.with_name(f".{out.name}.encoding")
    with nullcontext(kept) if kept else temporary_folder() as folder:
        if kept:
            kept.mkdir(parents=True, exist_ok=True)
        bar = partial(rows_bar, passing=True)
        raw_pairs.encode(runs, records, folder, weights=weights, device=device, bar=bar)
        try:
            predictions = prediction.predict_caches(runs, folder, raw_pairs.SPLIT, voting, device)
        except UsageError:  # nothing that a second time would go on with
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if kept:
            shutil.rmtree(kept, ignore_errors=True)
        return predictions


def is_plain(path: Path) -> bool:
    """Whether there is a regular file at `path`, or nothing yet."""
    return path.is_file() or not path.exists()


def encode_own_caches(
    args: Namespace, runs: Sequence[Run], device: torch.device, splits: Sequence[str] | None = None
) -> None:
    """Finetuned runs encode the rows of --split, or of `splits`, with encoders of their own, once."""
    finetuned = [run for run in runs if run.finetuned]
    if finetuned and args.feats is None:
        from modeling.prediction.raw_pairs import encode_split

        for run in finetuned:
            for split in splits or (args.split,):
                encode_split(run, split, data_place(args), device=device, bar=rows_bar)


def warn_of_gaps(predictions: Predictions) -> None:
    """Say on stderr which rows lack features, and what stands in for them."""
    for rows, what in (
        (predictions.left_out, f"have no features and get the most common class, {predictions.fallback}"),
        (predictions.partly, "lack features of some runs and are left to the others"),
    ):
        if rows:
            print(f"warning: {len(rows)} of {len(predictions)} rows {what}:", file=sys.stderr)
            for name, reason in list(rows.items())[:SHOWN]:
                print(f"  {one_line(name)}: {one_line(reason)}", file=sys.stderr)
            if len(rows) > SHOWN:
                print(f"  ... and {len(rows) - SHOWN} more", file=sys.stderr)


def print_figures(predictions: Predictions, runs: Sequence[Run]) -> None:
    """How good the predictions are, where the rows have labels."""
    from modeling.prediction import cached as prediction

    if not any(predictions.rows.tags):
        return
    try:
        figures = prediction.figures_of(predictions, runs[0].majority)
    except UsageError as error:
        print(f"warning: no figures ({error})", file=sys.stderr)
        return
    print(f"\n{prediction.figures_table(figures, predictions)}\n")
    if predictions.corrected:
        print(f"{predictions.corrected} labels corrected, as in the run; the caches keep theirs")
    known = prediction.known_rows(runs, predictions)
    if known:
        print(
            f"warning: {known} of these rows were trained on or validated with; figures on them flatter",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
