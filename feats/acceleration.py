"""Which device and dtype to compute on, when compiling a forward pass pays, and how much memory was used."""

import feats.threads  # noqa: F401

# isort: split

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from feats.errors import UsageError, first_line

T = TypeVar("T")
PROCESS_STATUS = Path("/proc/self/status")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Compiling takes tens of seconds and saves about an eighth of a ViT's forward time (measured: ViT-B/32 in bf16 on two
# cores, 36 -> 41 images/s at 0.38 TFLOP/s; 30 s to compile). It pays from about this much work on. The amount of work
# decides, never a stopwatch: a resumed run must compute exactly as the run it continues.
COMPILE_PAYS_FLOPS = {"cpu": 2.5e14, "cuda": 2e16}

# cuBLAS gives the same to the bit with a fixed workspace only: 8 of 4096 KiB, or of 16 (torch's notes on randomness).
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
NOT_DETERMINISTIC = ("does not have a deterministic implementation", "is not deterministic because")  # torch's words


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the first GPU if there is one; of several, `auto` and `cuda` are the one of `local_rank`, the process's
    number on this machine. Raises `UsageError` for a device torch doesn't know or reach."""
    if local_rank is not None and name in ("auto", "cuda") and torch.cuda.device_count() > 1:
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError, of the meta device, is a RuntimeError
        raise UsageError(
            f"device {name!r} can't be used ({first_line(error)}); use `device` auto, cpu or cuda"
        ) from None
    return device


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); without, bf16 is slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is fp16 on a GPU, bf16 on a CPU with units for it, fp32 elsewhere.

    Raises `UsageError` for an unknown name, and for fp16 on a CPU: layers lack kernels for it, or emulate it slowly.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_bf16_units() else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise UsageError("`dtype` fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if name not in DTYPES:
        raise UsageError(f"unknown `dtype` {name!r}; there are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype of `DTYPES`."""
    return next(name for name, value in DTYPES.items() if value is dtype)


def compiling_pays(forward: Callable[[torch.Tensor], object], example: torch.Tensor, rows: int) -> bool:
    """Whether `rows` more images are enough work to win back the time that compiling takes.

    `example` (1, 3, H, W) is one image as `forward` takes it.
    """
    threshold = COMPILE_PAYS_FLOPS.get(example.device.type)
    if threshold is None or example.dtype is torch.float32:
        return False
    from torch.utils.flop_counter import FlopCounterMode  # slow to import: triton

    with FlopCounterMode(display=False) as counter:
        forward(example)
    return int(counter.get_total_flops()) * rows > threshold


def compiled(
    forward: Callable[[torch.Tensor], T], example: torch.Tensor
) -> tuple[Callable[[torch.Tensor], T] | None, str]:
    """`forward` compiled for the shape of `example`, and tried on it; None and the reason where that can't be done
    (no C++ compiler, say). What the compiler makes is kept for later runs."""
    kept = Path(torch.hub.get_dir()).parent / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    try:
        fast = torch.compile(forward, dynamic=False)
        fast(example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of compilers, which raise anything at all
        return None, first_line(error)
    return fast, ""


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: the GPU's, or on a CPU all of it, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What getrusage tells includes the peak of the process that started this one: Linux keeps it across an exec.
    if PROCESS_STATUS.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", PROCESS_STATUS.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def full_products(dtype: torch.dtype) -> Iterator[None]:
    """In here a GPU multiplies float32 in full, where `dtype` is that. Torch's default lets cuDNN round what
    convolutions multiply to TF32, of 10 bits: as few as fp16 has, and not what features that call themselves fp32 are
    made of."""
    if dtype is not torch.float32:
        yield
        return
    backends: Any = torch.backends  # whose types lack some
    full: tuple[str, Any] = "allow_tf32", False
    places = backends.cuda.matmul, backends.cudnn
    try:
        before = [getattr(place, full[0]) for place in places]
    except RuntimeError:  # somebody set what replaces it, and torch doesn't tell it any longer
        full, places = ("fp32_precision", "ieee"), (backends.cuda.matmul, backends.cudnn.conv)
        before = [getattr(place, full[0]) for place in places]
    try:
        for place in places:
            setattr(place, *full)
        yield
    finally:
        for place, usual in zip(places, before, strict=True):
            setattr(place, full[0], usual)


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """In here torch computes with algorithms that give the same to the bit each time, on the same device and versions:
    no other choice of kernels (cuDNN's benchmark), full float32 products (no TF32). With `on` False nothing changes.

    Enter it before anything is done on a GPU, whose libraries read their settings once. Raises `UsageError` where that
    is too late, and, when it comes up, for an operation that has no such algorithm.
    """
    if not on:
        yield
        return
    _fix_workspace()
    before = _settings()
    _set(True, False, False, False, False)
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NOT_DETERMINISTIC):
            raise
        raise UsageError(
            f"`deterministic`: {first_line(error).split(', but you set')[0]}; use another head or device, or do "
            "without it"
        ) from None
    finally:
        _set(*before)


def _fix_workspace() -> None:
    if os.environ.get(WORKSPACE) in WORKSPACES:
        return
    if torch.cuda.is_initialized():
        raise UsageError(
            f"`deterministic` comes too late: the GPU is in use, and {WORKSPACE} isn't set; enter "
            f"feats.acceleration.deterministic before, or set {WORKSPACE}={WORKSPACES[0]} for the process"
        )
    os.environ[WORKSPACE] = WORKSPACES[0]


def _settings() -> tuple[bool, bool, bool, bool, bool]:
    """As `_set` takes them."""
    algorithms, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return algorithms, warn, torch.backends.cudnn.benchmark, products, convolutions


def _set(algorithms: bool, warn: bool, benchmark: bool, tf32_products: bool, tf32_convolutions: bool) -> None:
    torch.use_deterministic_algorithms(algorithms, warn_only=warn)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.matmul.allow_tf32 = tf32_products
    torch.backends.cudnn.allow_tf32 = tf32_convolutions
