"""All benchmarks, and one table of their ratios: how near this program is to what binds it, and how far from the usual way.

    python -m tests.bench                        # all, half an hour on two cores
    python -m tests.bench extract heads --quick  # some of them, a minute each
    python -m tests.bench --data DIR --device cuda --json saved/gpu.json

A benchmark is a module beside this one with `measure(settings: Settings) -> list[Figure]`, see limits.py. Without --data
the pairs are MVSA-Single's, from the folder that MVSA_SINGLE names or from ../shared/mvsa_single, else synthetic ones.
Ratios are of speeds or times measured in turns in one run, larger is better. They say more than rates do where a machine
is shared or its clock drifts.
"""

import json
import os
import platform
import re
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # the benchmarks are scripts, too, and import what lies beside them

if TYPE_CHECKING:
    from limits import Figure

WIDTHS = (10, 38, 7, 10, 3)  # of the table's columns; the limits come last


def build_parser() -> ArgumentParser:
    parser = ArgumentParser("python -m tests.bench", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks())} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: two minutes on two cores")
    parser.add_argument("--data", type=Path, metavar="DIR", help="pairs (default: see above)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--threads", type=int, help="of torch, here and in processes (default: torch's own)")
    parser.add_argument("--json", type=Path, default=Path("saved/bench.json"), help="default: saved/bench.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(benchmarks()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(benchmarks())}")
    if args.data and not args.data.is_dir():
        parser.error(f"no folder {args.data}; give one with pairs, or leave --data out")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from limits import REAL, Settings

    from feats.acceleration import resolve_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    data = args.data or (REAL if REAL.is_dir() else None)
    found: dict[str, list[Figure]] = {}
    for name in args.names or benchmarks():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            found[name] = module_of(name).measure(Settings(Path(work), device, data, args.quick))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    facts = {**hardware(device), "pairs": "synthetic" if data is None else data.name, "quick": args.quick}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(as_json(facts, found), indent=1) + "\n", encoding="utf-8")
    print(table(facts, found))
    return 0


def benchmarks() -> dict[str, str]:
    """Names of the benchmarks, and their modules': those that can `measure`."""
    files = sorted(file for file in HERE.glob("*.py") if "\ndef measure(" in file.read_text(encoding="utf-8"))
    return {file.stem.removeprefix("bench_"): file.stem for file in files}


def module_of(name: str) -> Any:
    return import_module(benchmarks()[name])


def hardware(device: Any) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """As Linux tells it, else what Python knows."""
    file = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def table(facts: Mapping[str, Any], found: Mapping[str, "Sequence[Figure]"]) -> str:
    """The figures in lines of 80 columns at most."""
    gpu = facts["gpu"] or "no GPU"
    lines = [
        f"{facts['cpu'][:34]}, {facts['cores']} cores, {gpu[:26]}",
        f"torch {facts['torch']}, {facts['threads']} threads, {facts['pairs']} pairs"
        f"{', quick' if facts['quick'] else ''}, load {facts['load']} at the end",
        "",
        row("", "ratio", "median", "quartiles", "n", "limit"),
    ]
    for name, figures in found.items():
        for figure in figures:
            low, high = (number(value) for value in figure.quartiles)
            n = str(len(figure.samples))
            lines.append(row(name, figure.name, number(figure.median), f"{low}-{high}", n, figure.limit))
    return "\n".join(lines)


def row(*cells: str) -> str:
    name, ratio, *numbers, limit = cells
    left = [f"{name:<{WIDTHS[0]}}", f"{ratio:<{WIDTHS[1]}}"]
    right = [f"{cell:>{width}}" for cell, width in zip(numbers, WIDTHS[2:], strict=True)]
    return ("".join([*left, *right]) + f" {limit}").rstrip()


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def as_json(facts: Mapping[str, Any], found: Mapping[str, "Sequence[Figure]"]) -> dict[str, Any]:
    """All there is to the figures."""
    figures = [
        {
            "benchmark": name,
            "name": figure.name,
            "unit": figure.unit,
            "median": figure.median,
            "quartiles": list(figure.quartiles),
            "samples": list(figure.samples),
            "limit": figure.limit,
            "note": figure.note,
        }
        for name, figures in found.items()
        for figure in figures
    ]
    return {"hardware": dict(facts), "figures": figures}


if __name__ == "__main__":
    sys.exit(main())
