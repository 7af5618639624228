"""How many threads the steps of a training run on: as many as measured fastest.

A step of a small head is a hundred short operations, and at the end of each its threads wait for one another. Beside
another busy program one of them is late at every end, and a step takes many times as long on two threads as on one.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

ROUNDS = 3  # of a trial: in each, every number of threads has a turn
TURN = 3  # steps; the first, which wakes the threads, isn't counted
HOPELESS = 2.0  # times the fastest: left out of the rest of a trial
TRIALS_SHARE = 0.05  # of the time of all steps; trials are repeated, since other programs come and go


@contextmanager
def threads_kept() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class StepThreads:
    """Sets torch's number of threads for each step of one training on `device`, up to the present one.

    What is measured are steps of the training itself: nothing is computed twice, and what is computed stays the same up
    to the rounding of differently divided sums. On a GPU, and with `steady`, nothing is set.
    """

    def __init__(self, device: torch.device, steady: bool = False):
        most = torch.get_num_threads() if device.type == "cpu" and not steady else 1
        self.plan = _plan(sorted({*(2**k for k in range(most.bit_length())), most})) if most > 1 else None
        self.threads = next(self.plan) if self.plan else 1
        self.start = 0.0

    def resume(self) -> None:
        """Set the threads of what comes between steps: those of the next."""
        if self.plan:
            torch.set_num_threads(self.threads)

    def begin_step(self) -> None:
        """Set the threads of the step that begins."""
        if self.plan:
            torch.set_num_threads(self.threads)
            self.start = perf_counter()

    def end_step(self) -> None:
        """Learn from the seconds that the step took."""
        if self.plan:
            self.threads = self.plan.send(perf_counter() - self.start)


def _plan(numbers: Sequence[int]) -> Generator[int, float, None]:
    """Yields the number of threads of each step, and is sent the seconds it took."""
    yield 1  # the first step of all takes longer
    in_all = in_trials = 0.0
    while True:
        taken = dict.fromkeys(numbers, 0.0)
        for _ in range(ROUNDS):
            for threads in taken:
                turn = []
                for _ in range(TURN):
                    turn.append((yield threads))
                taken[threads] += sum(turn[1:])
                in_all += sum(turn)
                in_trials += sum(turn)
            least = min(taken.values())
            taken = {threads: seconds for threads, seconds in taken.items() if seconds <= HOPELESS * least}
        fastest = min(taken, key=taken.__getitem__)
        while in_trials > TRIALS_SHARE * in_all:
            in_all += yield fastest
