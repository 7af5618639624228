"""Between host and GPU on streams of their own, so that neither copies nor the host hold up what computes."""

from collections.abc import Callable

import numpy as np
import torch

Fetched = Callable[[], np.ndarray]  # waits for a copy, and gives its values


class Transfer:
    """To and from a device that computes while the host waits for it, such as a CPU: nothing is copied or put off."""

    ahead = False  # whether work is queued on the device and goes on without the host

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """The values where they are computed with."""
        return values

    def fetch(self, values: torch.Tensor) -> Fetched:
        """What gives the values as an array, now or later."""
        array: np.ndarray = values.cpu().numpy()
        return lambda: array


class StreamTransfer(Transfer):
    """To and from a GPU. Copies run on streams of their own, one each way, beside the kernels of the current one: the
    next batch comes while one is computed, results go while the next block is computed. Neither call waits for the GPU,
    provided that what is sent lies in pinned memory and is contiguous.

    One stream waits for the other wherever values change hands, and `record_stream` keeps memory from being used again
    by the stream that made it while the other one still reads.
    """

    ahead = True

    def __init__(self, device: torch.device):
        self.device = device
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the GPU, for work of the current stream."""
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.up):
            there = values.to(self.device, non_blocking=True)
        computing.wait_stream(self.up)
        there.record_stream(computing)
        return there

    def fetch(self, values: torch.Tensor) -> Fetched:
        """What waits for the copy of the values, made by work queued so far on the current stream."""
        here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            here.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.down)
        values.record_stream(self.down)

        def arrived() -> np.ndarray:
            copied.synchronize()
            array: np.ndarray = here.numpy()
            return array

        return arrived


def transfer_for(device: torch.device) -> Transfer:
    """The one that suits the device."""
    return StreamTransfer(device) if device.type == "cuda" else Transfer()
