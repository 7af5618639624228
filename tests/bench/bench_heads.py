"""Training, sweeping and predicting on cached features: whole processes against a usual training loop on the same
device, the import of torch, the speed of reading, and the device's matrix-product limit, all in one run.

    python tests/bench/bench_heads.py [--parts train grid predict million] [--rounds 3]

On a machine with a GPU, where each takes two minutes or less:

    python tests/bench/bench_heads.py --device cuda --parts grid --rounds 1 --loop-epochs 10
    python tests/bench/bench_heads.py --device cuda --parts train predict --rounds 1

Features are random and shaped as the reference study's: 4000 x (512 + 512), a tenth for validation. Processes are
timed from start to end, when their device has nothing left to do.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import h5py
import numpy as np

if TYPE_CHECKING:
    import torch
    from limits import Figure, Settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

N, WIDTH, CLASSES, TRAIN = 4000, 512, ("negative", "neutral", "positive"), 3600
GRID = {"--D": [128, 256], "--lr": [2e-5, 1e-4], "--bs": [32, 512], "--ablation": [0, 1, 2]}
SEEDS = 5
PRECISIONS = ("fp32", "bf16")
PARTS = ("train", "grid", "predict", "million")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--epochs", type=int, default=100, help="of every training")
    parser.add_argument(
        "--loop-epochs", type=int, help="of the grid's usual loops; what more of them take is computed (default: all)"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the part million")
    parser.add_argument(
        "--yardstick", nargs=6, metavar=("CACHE", "DEVICE", "D", "BS", "ABLATION", "EPOCHS"), help="internal"
    )
    args = parser.parse_args(argv)
    from feats.acceleration import resolve_device

    if args.yardstick:
        cache, device, *numbers = args.yardstick
        usual_loop(Path(cache), resolve_device(device), *map(int, numbers))
        return 0
    from limits import device_name

    device = resolve_device(args.device)
    args.device = str(device)
    print(f"{device_name(device)}, {args.epochs} epochs")
    with tempfile.TemporaryDirectory() as folder:
        feats = Path(folder) / "feats"
        make_caches(feats, N)
        for part in args.parts:
            print(f"\n== {part}", flush=True)
            globals()[part](Path(folder), feats, args)
    return 0


# -- the yardstick ----------------------------------------------------------------------------------------------


def usual_loop(cache: Path, device: "torch.device", D: int, bs: int, ablation: int, epochs: int) -> None:
    """How such heads are usually trained: a Dataset of numpy rows, a DataLoader, one configuration, Adam. Prints the
    seconds of the loop."""
    import torch
    from limits import synchronise
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    with h5py.File(cache) as file:
        image, text = file["image_feats"][:].astype(np.float32), file["text_feats"][:].astype(np.float32)
        labels = np.array([CLASSES.index(tag.decode()) for tag in file["tag"][:]])

    class Pairs(Dataset):
        def __init__(self, low: int, high: int):
            self.low, self.high = low, high

        def __len__(self) -> int:
            return self.high - self.low

        def __getitem__(self, i: int) -> tuple:
            return image[self.low + i], text[self.low + i], labels[self.low + i]

    def projection() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.3))

    sides = {0: (0, 1), 1: (1,), 2: (0,)}[ablation]
    projections = nn.ModuleList([projection() for _ in sides]).to(device)
    out = nn.Linear(D * len(sides), len(CLASSES)).to(device)
    optimizer = torch.optim.Adam([*projections.parameters(), *out.parameters()], lr=1e-4)
    train = DataLoader(Pairs(0, TRAIN), batch_size=bs, shuffle=True)
    val = DataLoader(Pairs(TRAIN, N), batch_size=bs)
    best = 0.0
    synchronise(device)
    start = time.perf_counter()
    for _ in range(epochs):
        for module in (projections, out):
            module.train()
        for batch in train:
            *pair, y = (part.to(device) for part in batch)
            logits = out(torch.cat([p(pair[side]) for p, side in zip(projections, sides, strict=True)], 1))
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for module in (projections, out):
            module.eval()
        right = 0
        with torch.no_grad():
            for batch in val:
                *pair, y = (part.to(device) for part in batch)
                logits = out(torch.cat([p(pair[side]) for p, side in zip(projections, sides, strict=True)], 1))
                right += int((logits.argmax(1) == y).sum())
        best = max(best, right / (N - TRAIN))
    synchronise(device)
    print(f"best validation accuracy {best:.3f}, seconds {time.perf_counter() - start}")


def yardstick(feats: Path, device: str, D: int, bs: int, ablation: int, epochs: int) -> tuple[float, float]:
    """Wall time of the usual loop's process, and that of the loop in it."""
    command = ("--yardstick", feats / "bench_train.h5", device, D, bs, ablation, epochs)
    start = time.perf_counter()
    out = run(__file__, *command)
    return time.perf_counter() - start, float(out.split()[-1])


def run(*command: object) -> str:
    """What a process prints. What it says of errors goes to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *map(str, command)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment).stdout


def seconds(*command: object) -> float:
    """Wall time of a whole process."""
    start = time.perf_counter()
    run(*command)
    return time.perf_counter() - start


def alternate(rounds: int, **work: Callable[[], float]) -> dict[str, float]:
    """Median of each of `in_turns`."""
    return {name: median(times) for name, times in in_turns(rounds, **work).items()}


def in_turns(rounds: int, **work: Callable[[], float]) -> dict[str, list[float]]:
    """Each round's, measured in turn so that a noisy machine is noisy for all of them."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            found[name].append(run())
    return found


def make_caches(folder: Path, rows: int, splits: Sequence[str] = ("train", "test"), width: int = WIDTH) -> None:
    """A cache "bench" of both sides: random features in which the classes can be told apart, not perfectly."""
    from feats.store import FeatureStore

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centres = {side: rng.normal(0, 0.06, (len(CLASSES), width)) for side in ("image_feats", "text_feats")}
    for split in splits:
        count = rows if split == "train" or rows > N else 511
        labels = rng.choice(len(CLASSES), count, p=[0.3, 0.1, 0.6])
        tags = [CLASSES[k] if split == "train" else "" for k in labels]
        ids = [str(i) for i in range(count)]
        fingerprint = {"encoder": "bench", "data": split}
        shapes = {"image_feats": (width,), "text_feats": (width,)}
        with FeatureStore.create(
            folder / f"bench_{split}.h5", ids, tags, fingerprint, shapes, block_rows=1024
        ) as store:
            for low in range(0, count, 1 << 14):
                block = np.arange(low, min(low + (1 << 14), count))
                arrays = {
                    side: (rng.standard_normal((len(block), width), np.float32) + centres[side][labels[block]]).astype(
                        np.float16
                    )
                    for side in centres
                }
                store.write(block, np.ones(len(block), np.uint8), arrays, {})
            store.finish()


def product_limit(device: str, precision: str) -> float:
    """FLOP/s of large matrix products in "fp32" or "bf16"."""
    import torch
    from limits import Product

    return Product(torch.device(device), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).limit()


def flops(D: int, ablation: int) -> float:
    """Multiply-adds times two of one epoch's projections: forward, and gradients of their weights; validation forward."""
    sides = 2 if ablation == 0 else 1
    return 2 * sides * WIDTH * D * (2 * TRAIN + N - TRAIN)


# -- parts ------------------------------------------------------------------------------------------------------


def train(folder: Path, feats: Path, args: Namespace) -> None:
    """One training, whole process, against the usual loop; and what no such process can do without."""
    ours = ("modeling/train_head.py", "--vtype", "bench", "--feats", feats, "--runs", folder / "runs", "--D", 256)
    ours = (*ours, "--ep", args.epochs, "--device", args.device)
    on_device = f"import torch; torch.zeros(1, device={args.device!r})"
    times = alternate(
        args.rounds,
        loop=lambda: yardstick(feats, args.device, 256, 512, 0, args.epochs)[0],
        **{precision: partial(seconds, *ours, "--precision", precision) for precision in args.precisions},
        torch=lambda: seconds("-c", on_device),
    )
    print(
        f"usual loop {times['loop']:.1f} s, of which importing torch, and starting the device, {times['torch']:.1f} s"
    )
    for precision in args.precisions:
        bare = times["torch"] + flops(256, 0) * args.epochs / product_limit(args.device, precision)
        print(
            f"train_head.py {precision} {times[precision]:.1f} s: {times['loop'] / times[precision]:.1f} x; importing "
            f"torch and the products at the limit take {bare:.1f} s: {times['loop'] / bare:.1f} x"
        )


def grid(folder: Path, feats: Path, args: Namespace) -> None:
    """The sweep, whole process, against the usual loop one configuration after another: timed once on each shape, since
    its learning rate and seed don't change the time."""
    epochs = min(args.loop_epochs or args.epochs, args.epochs)
    total = 0.0
    for D, bs, ablation in product(GRID["--D"], GRID["--bs"], GRID["--ablation"]):
        whole, loop = yardstick(feats, args.device, D, bs, ablation, epochs)
        total += len(GRID["--lr"]) * SEEDS * (whole + loop * (args.epochs / epochs - 1))
    options = [item for name, values in GRID.items() for item in (name, *values)]
    sweep = ["modeling/sweep_heads.py", "--vtype", "bench", "--feats", feats, "--seeds", SEEDS, *options]
    sweep += ["--ep", args.epochs, "--device", args.device]
    points = list(product(*GRID.values()))
    work = sum(flops(D, a) * args.epochs for D, _, _, a in points) * SEEDS
    print(
        f"{len(points)} configurations x {SEEDS} seeds: usual loop {total:.0f} s (one of each shape, {epochs} of its "
        f"{args.epochs} epochs, times {len(GRID['--lr']) * SEEDS})"
    )
    for precision in args.precisions:
        taken = [
            seconds(*sweep, "--precision", precision, "--runs", folder / f"{precision}{round_}")
            for round_ in range(args.rounds)
        ]
        ours, limit = median(taken), product_limit(args.device, precision)
        print(
            f"sweep_heads.py {precision} {ours:.1f} s: {total / ours:.1f} x; {work / ours / 1e9:.0f} GFLOP/s of "
            f"{limit / 1e9:.0f} in a matrix product: {work / ours / limit:.4f} of it"
        )


def predict(folder: Path, feats: Path, args: Namespace) -> None:
    """inference_head.py on 511 rows, whole process, against importing torch."""
    one_epoch(folder, feats)
    ours = ("modeling/inference_head.py", "--feats", feats, "--runs", folder / "runs", "--out", folder / "out.csv")
    ours = (*ours, "--device", args.device)
    times = alternate(max(5, args.rounds), torch=lambda: seconds("-c", "import torch"), ours=lambda: seconds(*ours))
    print(
        f"import torch {times['torch']:.2f} s, inference_head.py {times['ours']:.2f} s: {times['ours'] / times['torch']:.2f} x"
    )


def one_epoch(folder: Path, feats: Path) -> None:
    """The newest run of the folder `runs`, for predicting."""
    run("modeling/train_head.py", "--vtype", "bench", "--feats", feats, "--runs", folder / "runs", "--ep", 1)


def read_through(folder: Path, rows: int) -> float:
    """Seconds of plainly reading all features of the cache there."""
    start = time.perf_counter()
    with h5py.File(folder / "bench_test.h5") as file:
        for low in range(0, rows, 1 << 16):
            for name in ("image_feats", "text_feats"):
                file[name][low : low + (1 << 16)]
    return time.perf_counter() - start


def million(folder: Path, feats: Path, args: Namespace) -> None:
    """Many cached rows: predicting them against reading them, and the memory it takes."""
    import resource

    big = folder / "big"
    make_caches(big, args.rows, ["test"])
    one_epoch(folder, feats)

    ours = ("modeling/inference_head.py", "--feats", big, "--runs", folder / "runs", "--out", folder / "big.csv")
    ours = (*ours, "--device", args.device)
    times = alternate(args.rounds, read=lambda: read_through(big, args.rows), ours=lambda: seconds(*ours))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{args.rows:,} rows: read {times['read']:.1f} s, predicted {times['ours']:.1f} s (whole process), "
        f"{times['ours'] / times['read']:.1f} x; peak memory {peak:.2f} GiB"
    )


def measure(settings: "Settings") -> "list[Figure]":
    """Whole processes of training and predicting, of reading many rows, and, unless quick, of a sweep."""
    from limits import Figure, ratios

    epochs, rows = (30, 50_000) if settings.quick else (100, 1_000_000)
    device = str(settings.device)
    feats, runs = settings.work / "feats", settings.work / "runs"
    make_caches(feats, N)
    folders = ("--feats", feats, "--runs", runs, "--device", device)
    ours = ("modeling/train_head.py", "--vtype", "bench", *folders, "--D", 256, "--ep", epochs)
    guess = ("modeling/inference_head.py", *folders, "--out", settings.work / "out.csv")
    times = in_turns(
        settings.rounds,
        loop=lambda: yardstick(feats, device, 256, 512, 0, epochs)[0],
        ours=lambda: seconds(*ours),
        torch=lambda: seconds("-c", "import torch"),
        guess=lambda: seconds(*guess),
    )
    big = settings.work / "big"
    make_caches(big, rows, ["test"])
    many = ("modeling/inference_head.py", "--feats", big, "--runs", runs, "--out", settings.work / "big.csv")
    times |= in_turns(
        settings.rounds, read=lambda: read_through(big, rows), many=lambda: seconds(*many, "--device", device)
    )
    figures = [
        Figure("training / usual loop", ratios(times, "loop", "ours"), "import", note=f"{TRAIN} rows, {epochs} epochs"),
        Figure("predicting / importing torch", ratios(times, "torch", "guess"), "import", note="511 rows"),
        Figure("predicting many / reading them", ratios(times, "read", "many"), "bytes", note=f"{rows:,} rows"),
    ]
    return figures if settings.quick else [*figures, _sweep(feats, settings)]


def _sweep(feats: Path, settings: "Settings") -> "Figure":
    """The grid once, against one usual loop of a tenth of its epochs on each shape."""
    from limits import Figure

    usual = 0.0
    for D, bs, ablation in product(GRID["--D"], GRID["--bs"], GRID["--ablation"]):
        whole, loop = yardstick(feats, str(settings.device), D, bs, ablation, 10)
        usual += len(GRID["--lr"]) * SEEDS * (whole + 9 * loop)
    options = [item for name, values in GRID.items() for item in (name, *values)]
    command = ("modeling/sweep_heads.py", "--vtype", "bench", "--feats", feats, "--seeds", SEEDS, *options)
    taken = seconds(*command, "--ep", 100, "--device", settings.device, "--runs", settings.work / "swept")
    return Figure("sweep / usual loops", [usual / taken], "FLOPs", note=f"24 x {SEEDS} trainings, {taken:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
