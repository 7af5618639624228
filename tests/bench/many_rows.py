"""Memory and speed over many rows: caches of synthetic pairs are written, a head is trained on them, and predictions
are made, each in a process of its own.

    python -m tests.bench.many_rows --rows 1000000 --heads mlp

Labels follow a planted linear rule with noise; one row in a thousand has the picture of the row before it. Prints
seconds, rows per second and peak resident memory of every step, and removes what it made.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feats.cache_reader import DONE
from feats.store import FeatureStore
from feats.strings import Labels, Strings

if TYPE_CHECKING:
    from limits import Figure, Settings

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("negative", "neutral", "positive")
SIDES = {"image": "picture", "text": "words"}  # caches
BLOCK_ROWS = 1 << 16
TWINS = 1000  # one row in so many has another's picture
# A process's peak counts what it was before it became another program: the one that starts it must be small.
WATCH = """
import os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(f"\\n{time.perf_counter() - began} {usage.ru_maxrss} {os.waitstatus_to_exitcode(status)}")
"""
TESTED = 10  # one row in so many is in the split that is predicted


def build_parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the training split")
    parser.add_argument("--width", type=int, default=16, help="of each side's features")
    parser.add_argument("--out", type=Path, default=Path("saved/many_rows"), help="folder of caches and runs")
    parser.add_argument("--processes", type=int, default=1, help="that write caches")
    parser.add_argument("--heads", nargs="*", default=["mlp"], help="heads to train, one after the other")
    parser.add_argument("--options", default="--bs 4096 --lr 0.01", help="of train_head.py, besides --ep 1")
    parser.add_argument("--keep", action="store_true", help="leave the caches and runs there")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    found: list[dict[str, Any]] = []
    try:
        caches = [(side, split, n) for split, n in splits(args.rows) for side in SIDES]
        with ProcessPoolExecutor(args.processes) as pool:
            jobs = [pool.submit(measured, cache_command(args, *cache)) for cache in caches]
            for (side, split, n), job in zip(caches, jobs, strict=True):
                found.append(shown(f"write {SIDES[side]}_{split}", n, job.result()))
        for head in args.heads:
            found.append(shown(f"train {head}", args.rows, measured(train_command(args, head))))
            tested = dict(splits(args.rows))["test"]
            found.append(shown(f"predict {head}, test", tested, measured(predict_command(args, "test"))))
            found.append(shown(f"predict {head}, train", args.rows, measured(predict_command(args, "train"))))
    finally:
        if not args.keep:
            shutil.rmtree(args.out, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "width": args.width, "steps": found}, indent=1) + "\n")
    return max(step["status"] for step in found)


def measure(settings: "Settings") -> "list[Figure]":
    """How often the memory of training and predicting many rows goes into 2 GB."""
    from limits import Figure

    rows = 100_000 if settings.quick else 1_000_000
    args = build_parser().parse_args(["--rows", str(rows), "--out", str(settings.work)])
    for split, n in splits(rows):
        for side in SIDES:
            write_cache(args.out / "feats", side, split, n, args.width)
    steps = {"training": train_command(args, "mlp"), "predicting": predict_command(args, "train")}
    peaks = {name: measured(command)["peak"] for name, command in steps.items()}
    note = f"{rows:,} rows x {2 * args.width}"
    return [Figure(f"2 GB / peak of {name}", [2e9 / peak], "bytes", note=note) for name, peak in peaks.items()]


# -- steps ------------------------------------------------------------------------------------------------------


def splits(rows: int) -> list[tuple[str, int]]:
    """Name and size of each split."""
    return [("train", rows), ("test", max(10, rows // TESTED))]


def cache_command(args: argparse.Namespace, side: str, split: str, n: int) -> list[str]:
    """Writes one cache."""
    code = (
        "import sys; from pathlib import Path; from tests.bench.many_rows import write_cache; "
        "write_cache(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]), int(sys.argv[5]))"
    )
    return [sys.executable, "-c", code, str(args.out / "feats"), side, split, str(n), str(args.width)]


def train_command(args: argparse.Namespace, head: str) -> list[str]:
    """Trains a head for one epoch, as a user would."""
    caches = ["--vtype", SIDES["image"], "--ttype", SIDES["text"], "--feats", str(args.out / "feats")]
    epochs = ["--ep", "1", *args.options.split()] if head != "linear" else ["--C", "1"]
    script = str(ROOT / "modeling/train_head.py")
    return [sys.executable, script, *caches, "--head", head, "--device", "cpu", "--runs", runs(args), *epochs]


def predict_command(args: argparse.Namespace, split: str) -> list[str]:
    """Predicts a split with the newest run."""
    script = str(ROOT / "modeling/inference_head.py")
    return [sys.executable, script, "--split", split, "--runs", runs(args), "--device", "cpu"]


def runs(args: argparse.Namespace) -> str:
    """The folder of runs."""
    return str(args.out / "runs")


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Seconds, peak resident bytes and exit status of a command; the end of what it wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    watched = [sys.executable, "-c", WATCH, *command]
    done = subprocess.run(watched, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    *output, told = done.stdout.splitlines()
    seconds, peak, status = map(float, told.split())
    kilobytes = peak / (1024 if sys.platform == "darwin" else 1)
    return {"seconds": seconds, "peak": kilobytes * 1024, "status": int(status), "output": "\n".join(output)[-2000:]}


def shown(name: str, n: int, step: dict[str, Any]) -> dict[str, Any]:
    """A step's figures, after they were printed."""
    rate = n / step["seconds"]
    print(f"{name:24}{step['seconds']:9.1f} s {rate:12,.0f} rows/s {step['peak'] / 1e9:7.2f} GB", flush=True)
    if step["status"]:
        print(step["output"], file=sys.stderr)
    return {"step": name, "rows": n, "rows_per_second": rate, **{k: v for k, v in step.items() if k != "output"}}


# -- synthetic caches -------------------------------------------------------------------------------------------


def write_cache(folder: Path, side: str, split: str, n: int, width: int) -> None:
    """The cache of one side, written block by block."""
    first = 0 if split == "train" else 500_000_000  # its ids
    ids = Strings.concatenate([numbered(first + low, min(BLOCK_ROWS, n - low)) for low in range(0, n, BLOCK_ROWS)])
    codes = np.concatenate([planted(split, low, min(BLOCK_ROWS, n - low), width)[1] for low in range(0, n, BLOCK_ROWS)])
    fingerprint = {"encoder": "synthetic", "model": side, "data": {"rows": n, "split": split}, "dtype": "fp16"}
    path = folder / f"{SIDES[side]}_{split}.h5"
    shapes = {f"{side}_feats": (width,)}
    how = {"block_rows": BLOCK_ROWS, "overwrite": True}
    with FeatureStore.create(path, ids, Labels(codes, CLASSES), fingerprint, shapes, **how) as store:
        for low in range(0, n, BLOCK_ROWS):
            rows = np.arange(low, min(low + BLOCK_ROWS, n))
            values = planted(split, low, len(rows), width)[0][side]
            store.write(rows, np.full(len(rows), DONE), {f"{side}_feats": values, **facts(side, first + rows)})
        store.finish()


def planted(split: str, low: int, n: int, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features (n, width) float16 of both sides and class numbers (n,) uint8 of the rows from `low`."""
    rule = np.random.default_rng(0).normal(size=(2 * width, len(CLASSES))) / np.sqrt(2 * width)
    rng = np.random.default_rng([low, split == "train"])
    x = rng.standard_normal((n, 2 * width), np.float32)
    codes = (2 * x @ rule + rng.gumbel(size=(n, len(CLASSES)))).argmax(1).astype(np.uint8)
    return {"image": x[:, :width].astype(np.float16), "text": x[:, width:].astype(np.float16)}, codes


def numbered(first: int, n: int) -> Strings:
    """`n` ids of eight digits from `first`."""
    digits = (np.arange(first, first + n)[:, None] // 10 ** np.arange(7, -1, -1)) % 10 + ord("0")
    return Strings(np.ascontiguousarray(digits, np.uint8).view("S8")[:, 0])


def facts(side: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Hashes of pictures, of which some are another row's, or of texts."""
    if side == "text":
        return {name: scattered(rows + 1) for name in ("text_hash", "text_key")}
    return {"image_hash": scattered(rows + 1 - (rows % TWINS == TWINS - 1))}


def scattered(numbers: np.ndarray) -> np.ndarray:
    """Numbers that look like hashes, one for each."""
    return numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


if __name__ == "__main__":
    sys.exit(main())
