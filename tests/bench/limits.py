"""What the benchmarks share: their figures, a stopwatch that waits for the device, and what the device can do at most."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("MVSA_SINGLE", ROOT.parent / "shared" / "mvsa_single"))  # real pairs, where they are had


@dataclass(frozen=True)
class Settings:
    """How `measure` of a benchmark measures: `quick` in about half a minute, on pairs in `data` (None: synthetic ones),
    in the existing folder `work`."""

    work: Path
    device: torch.device
    data: Path | None = None
    quick: bool = False

    @property
    def rounds(self) -> int:
        """Of everything that takes turns."""
        return 3 if self.quick else 5


@dataclass(frozen=True)
class Figure:
    """One ratio of times measured in turns: `samples` of it, one a round. `limit` says what binds (bytes, FLOPs, JPEG
    decoding, ...), `note` sizes and whatever else there is to say."""

    name: str
    samples: Sequence[float]
    limit: str
    unit: str = "x"
    note: str = ""

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one of the samples, those of `statistics.quantiles`, inclusive."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def ratios(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    """Seconds of `above` over those of `below`, round by round."""
    return [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, and of all that it has the device do."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing left to do: what a GPU is told to do, it does later."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device as its maker calls it, "cpu" for any CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Product:
    """Products of square matrices in `dtype`: what no network is faster than. They are 4096 wide on a CPU, 8192 and ten of
    them in a row on a GPU, which has done a single one before a stopwatch can tell."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.width, self.count = (8192, 10) if device.type == "cuda" else (4096, 1)
        self.a, self.b = (torch.randn(self.width, self.width, device=device).to(dtype) for _ in range(2))
        self()  # the first one also loads libraries

    def __call__(self) -> None:
        for _ in range(self.count):
            self.a @ self.b

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return 2 * self.width**3 * self.count

    def limit(self, rounds: int = 5) -> float:
        """FLOP/s, the median of some rounds."""
        return self.flops / statistics.median(seconds_of(self, self.device) for _ in range(rounds))
