"""Several processes that share one finetuning, as torchrun starts them: who does what, what they tell each other."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from feats.acceleration import resolve_device
from feats.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process's `rank` among `size` that work together; alone it is the first of one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th of the items, from this process's own on: all processes' shares together are all items."""
        return items[self.rank :: self.size]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up each tensor over all processes, in place. Tensors of one dtype travel together."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            joined = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.all_reduce(joined)
            for tensor, summed in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def team(device: str) -> Iterator[tuple[Team, torch.device]]:
    """The processes that torchrun started this one with, and this one's device; alone without torchrun.

    Gloo connects processes on CPUs, NCCL those on GPUs (one GPU each). Raises `UsageError` where there are more
    processes than GPUs, when a process dies while the others wait for it, and when torchrun, which may notice first,
    tells this one to end.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Team(), resolve_device(device)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    on = resolve_device(device, local_rank)
    if on.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UsageError(
                f"torchrun started process {local_rank + 1} on a machine of {count} GPU{'s' if count > 1 else ''}, and "
                f"each needs one of its own; let torchrun start {count} there, or give `device` cpu"
            )
        on = torch.device("cuda", local_rank)
        torch.cuda.set_device(on)
    # The first process may work alone for long, on a cached trunk; one that dies is noticed without a limit.
    dist.init_process_group("nccl" if on.type == "cuda" else "gloo", timeout=timedelta(days=1))
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        yield Team(dist.get_rank(), size), on
        signal.signal(signal.SIGTERM, before)
    except dist.DistError as error:
        raise _deserted() from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_of_a_connection(error):
            raise
        raise _deserted() from error
    finally:
        dist.destroy_process_group()


def _told_to_end(_number: int, _frame: FrameType | None) -> None:
    raise _deserted()


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Gloo's errors are plain RuntimeErrors; they name the file they come from."""
    return any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL", "Broken pipe"))


def _deserted() -> UsageError:
    # torchrun's signal must not cut off this process's last words; after half a minute it kills all the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return UsageError(
        "another process of this finetuning has ended; its last checkpoint is intact, run the same command to go on"
    )
