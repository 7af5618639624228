"""Write a run's report: one page that opens from disk, with every figure as SVG and PNG beside it. It reads the run's
folder and caches; pictures and texts come from the raw pairs, where they are still there."""

import importlib
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import feats.threads  # noqa: F401

# isort: split

from feats.cli import EXIT_DONE, positive
from feats.errors import UsageError
from modeling import cli
from modeling.runs.folder import load_run, newest_run

NEWEST = "newest"


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--run", default=NEWEST, metavar="RUN", help=f"a path, a name in --runs, or {NEWEST} (default: {NEWEST})"
    )
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="also compare the heads of a sweep's folder")
    parser.add_argument("--feats", type=Path, metavar="DIR", help="folder of caches (default: the run's)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR|FILE",
        help="the pairs, for pictures and texts (default: where the caches say)",
    )
    parser.add_argument(
        "--learning-curve", action="store_true", help="also train on shares of the training rows: minutes"
    )
    parser.add_argument("--explain", type=positive, metavar="N", help="also explain N validation pairs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="(default: report.html in the run's folder); figures beside it"
    )
    cli.add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return cli.guarded(lambda: work(args, cli.command_line(argv)), "nothing was written")


def work(args: Namespace, command: str) -> int:
    """Gather, draw, write; returns the exit status."""
    from modeling.report.page import PAGE, check_page

    start = time.perf_counter()
    path = chosen_run(args.runs, args.run)
    out = args.out or path / PAGE
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: expected a name that ends in .html")
    check_page(out)
    print(f"run {path}")
    figures = make(path, out, command, args)
    size = out.stat().st_size / 1e6
    print(f"{len(figures) // 2} figures as SVG and PNG -> {out.with_suffix('')}/")
    print(f"report of {size:.1f} MB in {time.perf_counter() - start:.0f} s -> {out}")
    return EXIT_DONE


def chosen_run(runs: Path, name: str) -> Path:
    """The run's folder. Raises `UsageError` when there is none."""
    if name == NEWEST:
        return newest_run(runs)
    return Path(name) if Path(name).is_dir() else runs / name


def make(path: Path, out: Path, command: str, args: Namespace) -> list[Path]:
    """Write the page and its figures; returns the figures' files."""
    from modeling.report.building import sections_of
    from modeling.report.material import gather
    from modeling.report.page import write_page

    run = load_run(path)
    material = gather(run, args.feats, args.data, command)
    for what, why in (("caches", material.no_features), ("raw pairs", material.no_records)):
        if why:
            print(f"note: the report goes without the {what}: {why}")
            break
    found = sections_of(material)
    sections = [found[name] for name in ("headline", "data", "training", "results")]
    comparison: Any = optional("modeling.report.comparison")
    if comparison is not None and args.sweep is not None:
        sections += comparison.comparison_sections(args.sweep)
    if comparison is not None and args.learning_curve:
        sections.append(comparison.learning_curve_section(run))
    sections += [found["embeddings"], found["errors"]]
    explained: Any = optional("modeling.report.explained_pairs") if args.explain else None
    if explained is not None:
        sections.append(explained.explanations(material, args.explain, args.device))
    return write_page(out, f"Report of {path.name}", [*sections, found["label-audit"]])


def optional(name: str) -> Any:
    """A module, or None where this version hasn't got it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name.rsplit(".", 1)[0]):
            raise
        return None


if __name__ == "__main__":
    sys.exit(main())
