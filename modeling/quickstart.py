"""From nothing to predictions: draw a synthetic sample (or take --data), encode it, compare heads, predict.

Every step is an ordinary command of this project and is printed before it runs. No model hub is needed with the default
encoders.
"""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import hashlib
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from feats.command_line.exit_status import EXIT_DONE, EXIT_INTERRUPTED
from feats.command_line.options import add_columns_option, columns_from
from feats.csv_files import read_csv
from feats.errors import UsageError
from modeling.command_line.messages import guarded
from modeling.command_line.options import new_parser
from modeling.heads.config import HeadConfig

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path("data/sample")
OUT = Path("saved/quickstart")
SAMPLER = "data/make_sample.py"  # knows no options of messages
HEADS = ("fusion", "concat", "weighted_sum", "mlp", "linear", "kernel")


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/quickstart.py",
        "python modeling/quickstart.py --data my/pairs.csv --columns label=mood --vtype pixels --ttype ngrams",
    )
    parser.add_argument("--data", type=Path, metavar="DIR|FILE", help="your own pairs (default: a synthetic sample)")
    parser.add_argument("--layout", help="how they lie on disk (default: detected)")
    add_columns_option(parser)
    parser.add_argument(
        "--vtype", nargs="*", default=["efficientnet"], metavar="ENCODER", help="of the image side; alone: none"
    )
    parser.add_argument(
        "--ttype", nargs="*", default=["minilm", "vader"], metavar="ENCODER", help="of the text side; alone: none"
    )
    parser.add_argument("--head", nargs="+", default=list(HEADS), help="heads to compare")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where all of it goes (default: a folder for each data set, {OUT / SAMPLE.name} or {OUT}/<name of "
        "--data>-<hash of its path>)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: quickstart(args), "run the same command to go on where it was")


def quickstart(args: Namespace) -> int:
    """Run the commands one after the other and say where everything lies; returns the exit status."""
    from modeling.search.sweep import best_run

    start = time.perf_counter()
    out, data = args.out or default_out(args.data), args.data or SAMPLE
    feats, runs = out / "feats", out / "runs"
    folders = ["--feats", feats, "--runs", runs]
    check_options(args)
    if args.data is None:
        step(args, "draw a small synthetic sample of image-text pairs", SAMPLER, "--out", data)
    place = ["--data", data]
    place += ["--layout", args.layout] if args.layout else []
    place += ["--columns", *args.table_columns] if args.table_columns else []
    encoders = list(dict.fromkeys([*args.vtype, *args.ttype]))
    for encoder in encoders:
        script = f"feats/{encoder}_extract_feats.py"
        step(args, f"encode every pair once with {encoder}", script, *place, "--out", feats)
    caches = ["--vtype", *args.vtype] if args.vtype else []
    caches += ["--ttype", *args.ttype] if args.ttype else []
    grid = ["--head", *args.head, "--norm", "standard", "--lr", "1e-3", "--ep", "60", "--bs", "64", "--folds", "5"]
    step(args, "compare heads on the cached features", "modeling/sweep_heads.py", *caches, *folders, *grid)
    best, predictions = best_run(runs / "sweep"), out / "predictions.csv"
    predicts = (feats / f"{encoders[0]}_test.h5").is_file()
    if predicts:
        step(
            args,
            "predict the unlabelled pairs with the best of them",
            *("modeling/inference_head.py", *folders, "--run", best, "--out", predictions),
        )
    report = best / "report.html"
    step(args, "show what the best of them learned", "modeling/make_report.py", "--run", best, "--feats", feats)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; nothing is encoded or trained twice if you run it again:")
    print(f"  caches       {feats}/  (look into one: python feats/inspect_feats.py {feats / encoders[0]}_train.h5)")
    print(f"  comparison   {runs / 'sweep' / 'table.md'}")
    print(f"  best run     {best}")
    print(f"  report       {report}  (open it in a browser)")
    if predicts:
        print(f"  predictions  {predictions}")
    if args.data is None:
        print_score(predictions, data / "test_labels.csv")
    return EXIT_DONE


def default_out(data: Path | None) -> Path:
    """One folder for each data set: caches of different pairs have the same names."""
    if data is None:
        return OUT / SAMPLE.name
    path = data.resolve()
    return OUT / f"{path.name[:60]}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def check_options(args: Namespace) -> None:
    """Raise `UsageError` for encoders and heads that there aren't, and for columns that can't be, before anything is
    encoded."""
    if args.data is None and (args.layout or args.table_columns):
        raise UsageError("`layout` and `columns` are of your own pairs; name these with `data`")
    columns_from(args)
    known = sorted(p.stem.removesuffix("_extract_feats") for p in ROOT.glob("feats/*_extract_feats.py"))
    if not [*args.vtype, *args.ttype]:
        raise UsageError(f"`vtype` and `ttype` name no encoder; there are {', '.join(known)}")
    for encoder in (*args.vtype, *args.ttype):
        if encoder not in known:
            raise UsageError(f"no encoder {encoder!r}; there are {', '.join(known)}")
    for head in args.head:
        HeadConfig(head)


def step(args: Namespace, what: str, *command: object) -> None:
    """Say what comes, print the command as one would type it, run it, with this script's options of messages. Raises
    `UsageError` when it fails."""
    script, *options = map(str, command)
    if script != SAMPLER:
        options += ["--quiet"] if args.quiet else []
        options += ["--log-file", str(args.log_file)] if args.log_file else []
    typed = shlex.join(["python", script, *options])
    if not args.quiet:
        print(f"\n# {what}\n$ {typed}", flush=True)
    status = subprocess.run([sys.executable, ROOT / script, *options], check=False).returncode
    if status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        said = typed if args.quiet else "that command"
        raise UsageError(f"{said} ended with status {status}; what it says above is what to mend")


def print_score(predictions: Path, truth: Path) -> None:
    """How the predictions of the synthetic sample fare against the labels its generator kept aside."""
    predicted, true = (dict(read_csv(path)) for path in (predictions, truth))
    right = sum(predicted[name] == true[name] for name in true if name != "guid")
    print(
        f"of the sample's {len(true) - 1} unlabelled pairs {right} are predicted right (drawn data: only a "
        "demonstration)"
    )


if __name__ == "__main__":
    sys.exit(main())
