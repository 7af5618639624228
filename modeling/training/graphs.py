"""Training steps recorded once and replayed: on a GPU a step of small heads is a hundred kernels of microseconds each,
and telling the GPU of them one by one takes several times as long as computing them.

A recording (a CUDA graph) repeats the same kernels on the same memory. So whatever changes from step to step lies in
fixed places, which are filled before: the batch's rows, the views, dropout's masks, the learning rates. The first steps
of each batch size aren't recorded but computed as they come, which is what warms up libraries; recording computes
nothing, and the replay that follows is the next step. Hence a training takes the same steps with and without.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from feats.errors import first_line
from modeling.heads.layers import Noise, attach_noise

Results = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor | None], Results]  # a batch's rows (M, B) and views -> its losses, logits, ...
WARM_STEPS = 3  # of each batch size, before it is recorded
LEAST_STEPS = 100  # of a training: recording takes about as long as some dozens of steps


class Recorder(Protocol):
    """What can record work on a device and replay it."""

    def beside(self) -> AbstractContextManager[None]:
        """In here work is computed as it comes, where it is to be recorded later."""

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        """Record `work` without computing it. What is returned computes it, into the same results each time.

        Raises `RuntimeError` for work that can't be recorded: whose host waits for values of the device."""


class CudaRecorder:
    """CUDA graphs. Work is recorded on a stream of its own, on which it also has to be warmed up."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream for recordings, in turn with the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # Torch leaves the recording's stream the current one where recording fails. Other threads may use the GPU
        # meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            results = work()

        def replay() -> Results:
            graph.replay()
            return results

        return replay


class HeldMasks(Noise):
    """The masks of one step in fixed places, drawn from `noise` in the order in which a step asks for them."""

    def __init__(self, noise: Noise):
        self.noise, self.asked = noise, 0
        self.places: list[tuple[Tensor, float]] = []

    def next_step(self) -> None:
        """Draw the masks of the next step, all but those that no step has asked for yet."""
        drawn = [self.noise.keep_mask(place.shape, p) for place, p in self.places]
        if drawn:
            torch._foreach_copy_([place for place, _ in self.places], drawn)

    def keep_mask(self, shape: Sequence[int], p: float) -> Tensor:
        """As `Noise.keep_mask`; the first step's masks are drawn here."""
        if self.asked == len(self.places):
            self.places.append((self.noise.keep_mask(shape, p).clone(), p))
        self.asked += 1
        return self.places[self.asked - 1][0]


class _OfOneSize:
    """The steps on batches of one size."""

    def __init__(
        self, step: Step, head: nn.Module, noise: Noise, recorder: Recorder, rows: Tensor, views: Tensor | None
    ):
        self.step, self.head, self.recorder = step, head, recorder
        self.masks = HeldMasks(noise)
        self.rows, self.views = torch.empty_like(rows), None if views is None else torch.empty_like(views)
        self.seen_views: Tensor | None = None
        self.warm = 0
        self.replay: Callable[[], Results] | None = None

    def __call__(self, rows: Tensor, views: Tensor | None) -> Results:
        self.rows.copy_(rows)
        if self.views is not None and views is not None and views is not self.seen_views:  # others each epoch
            self.views.copy_(views)
            self.seen_views = views
        self.masks.next_step()
        if self.replay is None and self.warm < WARM_STEPS:
            self.warm += 1
            with self.recorder.beside():
                return self._compute()
        if self.replay is None:
            self.replay = self._record()
        # The next replay overwrites its results.
        return tuple(result.clone() for result in self.replay())

    def _compute(self) -> Results:
        attach_noise(self.head, self.masks)
        self.masks.asked = 0
        return self.step(self.rows, self.views)

    def _record(self) -> Callable[[], Results]:
        try:
            return self.recorder.record(self._compute)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"training steps aren't recorded, which costs much speed ({first_line(error)})", stacklevel=1)
            for parameter in self.head.parameters():
                parameter.grad = None  # of a backward pass that was told of, and never took place
            return self._compute


def recorded(step: Step, head: nn.Module, noise: Noise, recorder: Recorder) -> Step:
    """`step` replayed from recordings, one for each size of its batches.

    `step` may do nothing but have the device work, on its arguments, on the head's parameters and on tensors that stay
    where they are; `noise` is what the head's dropout draws from. Warns of steps that can't be recorded: they are
    computed as they come.
    """
    sizes: dict[int, _OfOneSize] = {}

    def run(rows: Tensor, views: Tensor | None) -> Results:
        size = rows.shape[1]
        if size not in sizes:
            sizes[size] = _OfOneSize(step, head, noise, recorder, rows, views)
        return sizes[size](rows, views)

    return run


def recorder_for(device: torch.device, steps: int) -> Recorder | None:
    """What records a training of that many steps; None where that doesn't pay, or the device has no such thing."""
    return CudaRecorder(device) if device.type == "cuda" and steps >= LEAST_STEPS else None
