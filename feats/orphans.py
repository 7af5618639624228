"""No process that a command starts outlives it, however it ends: an orphan would keep its locks and its pipes."""

import os
import signal

import torch


def end_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process get the signal `number` when `parent`, which started it, ends; at once where it has ended."""
    # The stubs of torch lack the function.
    torch.multiprocessing._prctl_pr_set_pdeathsig(number)  # type: ignore[attr-defined]
    if os.getppid() != parent:  # it was killed before this was asked for, and nobody would tell any more
        os.kill(os.getpid(), number)
