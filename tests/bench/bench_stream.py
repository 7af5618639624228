"""Training from caches block by block, against reading them and doing nothing, and against the same training in memory.

    python tests/bench/bench_stream.py [--rows 200000] [--rounds 3] [--device auto]

Random caches of rows x (512 + 512), a tenth for validation; each figure is the median of the rounds, whose order
changes. What was just written is in the page cache of the system, as what is trained on for some epochs is where it
fits; where it doesn't, reading is the disk's. The parts: `read` all blocks by the streaming reader with nothing done to
them; an epoch of a `fusion` head, `streamed` and `in memory`; and `linear` with one C to its optimum, both ways.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from limits import Figure, Settings

WIDTH, CLASSES, BLOCK = 512, ("negative", "neutral", "positive"), 4096
PARTS = ("read", "fusion", "linear")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--bs", type=int, default=512)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = timed(Path(folder), args.rows, args.rounds, args.device, args.parts, args.bs)
    print(f"{found.trained} training rows of {args.rows}, {2 * WIDTH} columns, on {found.device}")
    for name, of_part in found.seconds.items():
        rate = found.trained / median(of_part)
        spread = f"{min(of_part):.2f}-{max(of_part):.2f}"
        print(f"{name:20} {median(of_part):8.2f} s ({spread})  {rate:12,.0f} rows/s")
    print(f"waiting for blocks: {found.waiting:.0%} of what was streamed")
    return 0


def measure(settings: "Settings") -> "list[Figure]":
    """Streamed training against the same in memory, and against reading alone."""
    from limits import Figure, ratios

    rows = 10_000 if settings.quick else 100_000
    found = timed(settings.work, rows, settings.rounds, str(settings.device))
    times, note = found.seconds, f"{rows:,} rows x {2 * WIDTH}, waiting {found.waiting:.0%}"
    return [
        Figure(
            "streamed / in memory, fusion", ratios(times, "fusion, in memory", "fusion, streamed"), "FLOPs", note=note
        ),
        Figure(
            "streamed / in memory, linear", ratios(times, "linear, in memory", "linear, streamed"), "FLOPs", note=note
        ),
        Figure("streamed fusion / reading alone", ratios(times, "read", "fusion, streamed"), "FLOPs", note=note),
    ]


@dataclass
class Timed:
    """Seconds of each part, a number a round; training rows; which share of streamed training was waiting; and where."""

    seconds: dict[str, list[float]]
    trained: int
    waiting: float
    device: str


def timed(folder: Path, rows: int, rounds: int, device: str, wanted: Sequence[str] = PARTS, bs: int = 512) -> Timed:
    """Time the parts in turns, on new caches in `folder`."""
    from modeling.experiments.experiment import ExperimentSettings, load_experiment
    from modeling.features.joined import FeatureSource
    from modeling.heads.config import HeadConfig
    from modeling.training.config import TrainConfig
    from modeling.training.fit import fit

    make_caches(folder, rows)
    source = FeatureSource(folder, ("clip",), ("clip",))
    settings = ExperimentSettings(source, device=device)
    experiments = {c: load_experiment(replace(settings, stream=c), [HeadConfig()]) for c in ("always", "never")}
    problems = {choice: of.problem(of.splits[0], ["fusion", "linear"])[0] for choice, of in experiments.items()}
    with experiments["always"] as streamed:
        stream_of = streamed.stream
        assert stream_of is not None
        fusion = TrainConfig(HeadConfig("fusion", D=128), ep=1, bs=bs)
        linear = TrainConfig(HeadConfig("linear"), C=0.01)
        train = np.sort(problems["always"].train.cpu().numpy())

        def read() -> None:
            for _ in stream_of.read(stream_of.blocks(train)):
                pass

        parts: dict[str, Callable[[], object]] = {"read": read}
        for words, stream in (("streamed", "always"), ("in memory", "never")):
            parts[f"fusion, {words}"] = partial(fit, [fusion], problems[stream])
            parts[f"linear, {words}"] = partial(fit, [linear], problems[stream])
        parts = {name: work for name, work in parts.items() if name.split(",")[0] in wanted}
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(rounds):
            for name in list(parts) if number % 2 == 0 else list(parts)[::-1]:
                before = time.perf_counter()
                parts[name]()
                seconds[name].append(time.perf_counter() - before)
        waiting = stream_of.tally.rates()["waiting"]
    return Timed(seconds, len(train), waiting, str(streamed.device))


def make_caches(folder: Path, rows: int) -> None:
    """A cache of both sides, its features a little different for each class."""
    from feats.cache_reader import DONE
    from feats.store import FeatureStore

    rng = np.random.default_rng(0)
    labels = rng.integers(len(CLASSES), size=rows)
    centres = rng.normal(size=(len(CLASSES), WIDTH)).astype(np.float32) * 0.1
    shapes = {"image_feats": (WIDTH,), "text_feats": (WIDTH,)}
    ids, tags = [f"p{i}" for i in range(rows)], [CLASSES[k] for k in labels]
    made_by = {"encoder": "random", "data": {"rows": rows}}
    with FeatureStore.create(folder / "clip_train.h5", ids, tags, made_by, shapes, block_rows=BLOCK) as store:
        for low in range(0, rows, BLOCK):
            some = np.arange(low, min(low + BLOCK, rows))
            values = {
                name: (centres[labels[some]] + rng.normal(size=(len(some), WIDTH)).astype(np.float32)).astype(
                    np.float16
                )
                for name in shapes
            }
            facts = {fact: (some + 1).astype(np.uint64) for fact in ("image_hash", "text_hash", "text_key")}
            store.write(some, np.full(len(some), DONE), {**values, **facts})
        store.finish()


if __name__ == "__main__":
    sys.exit(main())
