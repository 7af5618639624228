"""What can be told of the code for GPUs without one: that every tensor lies on the right device, and what is asked of
torch's own functions.

Torch's fake tensors have a device, a shape and a dtype, and no values. Operations on them check what a GPU's would:
that all tensors lie on one device, and that their dtypes fit.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import SGD, make_problem, moved
from test_gpu import NETWORKS, TEXTS, weights  # noqa: F401 - a fixture
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from feats.acceleration import compiled
from feats.encoders import base
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from modeling.features.joined import Ragged
from modeling.finetuning import distributed
from modeling.finetuning.predicting import seeded
from modeling.heads.config import HeadConfig
from modeling.heads.layers import _Product, attach_noise, set_product_dtype
from modeling.heads.registry import build_head
from modeling.training.gradient import cross_entropy
from modeling.training.graphs import CudaRecorder
from modeling.training.problem import predict_stack

CUDA = torch.device("cuda")
LONGEST = 4  # tokens of the problem's texts


class FakeGPU:
    """Modules that are sent to the GPU become fake ones there; from the first on whatever is made is fake."""

    def __init__(self, stack: ExitStack):
        self.mode, self.stack, self.on = FakeTensorMode(allow_non_fake_inputs=True), stack, False

    def enter(self) -> None:
        if not self.on:
            self.stack.enter_context(self.mode)
            self.on = True

    def to(self, module: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
        """In place of `nn.Module.to`."""
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **keywords)
        if device is not None and device.type == "cuda":
            self.enter()
        for own in module.modules():
            for tensors in (own._parameters, own._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        changed = self._sent(tensor.detach(), device, dtype, memory_format)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(changed, tensor.requires_grad) if is_parameter else changed
        return module

    def _sent(self, x: Tensor, device: Any, dtype: Any, memory_format: Any) -> Tensor:
        if self.on and not isinstance(x, FakeTensor):
            x = self.mode.from_tensor(x)
        x = x.to(device=device or x.device, dtype=dtype if x.is_floating_point() else None)
        return x if memory_format is None or x.dim() != 4 else x.to(memory_format=memory_format)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with ExitStack() as stack:
        fake = FakeGPU(stack)
        monkeypatch.setattr(nn.Module, "to", lambda module, *args, **keywords: fake.to(module, *args, **keywords))
        monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
        monkeypatch.setattr(base, "_per_channel", base._per_channel.__wrapped__)  # keeps tensors for later
        monkeypatch.setattr(torch, "equal", lambda one, other: one.device == other.device)  # there are no values
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        yield fake


def test_fake_tensors_tell_devices_apart(gpu: FakeGPU):
    gpu.enter()
    with pytest.raises(RuntimeError, match="devices"):
        torch.ones(2, device=CUDA) + torch.ones(2)


# -- heads ------------------------------------------------------------------------------------------------------


class Masks:
    """As `Noise`, whose generators take a GPU."""

    def keep_mask(self, shape: Any, p: float) -> Tensor:
        return torch.ones(*shape, device=CUDA)


def padded(texts: Ragged, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `Ragged.padded`, which asks for the length of the longest."""
    shape = len(rows), LONGEST
    values = texts.values.index_select(0, rows.new_zeros(len(rows) * LONGEST)).view(*shape, -1)
    return values, torch.ones(*shape, dtype=torch.bool, device=rows.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SGD)
def test_a_head_s_step_and_prediction_stay_on_the_gpu(
    name: str, dtype: torch.dtype, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Ragged, "padded", padded)
    config, problem = HeadConfig(name, D=32), make_problem()
    head = build_head(config, problem.inputs.for_head(config).widths, 3, [1, 2], CUDA)
    problem = moved(problem, CUDA)
    inputs = problem.inputs.for_head(config)
    set_product_dtype(head, dtype)
    attach_noise(head, Masks())  # type: ignore[arg-type]
    rows, views = torch.zeros(2, 16, dtype=torch.int64, device=CUDA), None
    if inputs.image_views is not None:
        views = torch.zeros(2, len(inputs), dtype=torch.int64, device=CUDA)
    logits = head.train()(inputs.batch(rows, views))
    loss = cross_entropy(logits, problem.labels[rows], torch.ones(2, 3, device=CUDA), torch.zeros(2, device=CUDA))
    said = predict_stack(head, inputs, problem.val)
    for values, shape in ((logits, (2, 16, 3)), (loss, (2,)), (said, (2, len(problem.val), 3))):
        assert (values.device.type, values.dtype, values.shape) == ("cuda", torch.float32, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_s_gradients_are_float32_on_the_gpu(dtype: torch.dtype, gpu: FakeGPU):
    """Backward passes themselves take a GPU: autograd has a thread for each."""
    gpu.enter()
    x, weight, grad = (torch.empty(2, *shape, device=CUDA) for shape in ((9, 8), (5, 8), (9, 5)))
    context = SimpleNamespace(saved_tensors=(x.to(dtype), weight.to(dtype)), needs_input_grad=(True, True, True, False))
    found = _Product.backward(context, grad)[:3]
    assert [tuple(g.shape) for g in found] == [(2, 9, 8), (2, 5, 8), (2, 5)]
    assert {(g.device.type, g.dtype) for g in found} == {("cuda", torch.float32)}


# -- encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "trainable"), [(torch.float32, True), (torch.float16, False)], ids=["tuned", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_encoder_computes_on_the_gpu(
    name: str,
    dtype: torch.dtype,
    trainable: bool,
    weights: Any,  # noqa: F811
    gpu: FakeGPU,
):
    """Whole, and cut before its last block; trainable ones as they are tuned, under autocast."""
    encoder, model, path = weights(name)
    loaded = load_encoder(encoder, model, path, device=CUDA, dtype=dtype, tokens=True, trainable=trainable)
    assert gpu.on
    casting = torch.autocast("cuda", torch.float16) if trainable else nullcontext()
    with torch.no_grad(), casting:
        for side in filter(None, (loaded.image, loaded.text)):
            assert side.blocks is not None
            if side is loaded.image:
                blank = side.blank()
                given: Any = loaded.to_pixels(blank.expand(3, *blank.shape))
            else:
                given = [tokens.ids for tokens in side.tokenize(TEXTS)]
            last = len(side.blocks.modules) - 1
            for out in (side.forward(given), side.blocks.above(side.blocks.below(given, last), given, last)):
                assert out.keys() == {"feats", "tokens"} and len(out["feats"]) == len(given)
                assert {x.device.type for x in out.values()} == {"cuda"}


# -- torch's functions --------------------------------------------------------------------------------------------


def test_random_numbers_are_seeded_on_the_model_s_gpu(monkeypatch: pytest.MonkeyPatch):
    """Which needn't be the current one."""
    current, asked = ["cuda:0"], []

    @contextmanager
    def chosen(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: asked.append((current[-1], seed)))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append((str(device), "as before")))
    with seeded(7, torch.device("cuda:1")):
        assert asked == [("cuda:1", 7)]
    assert asked[1:] == [("cuda:1", "as before")]


def test_a_failed_recording_leaves_the_current_stream(monkeypatch: pytest.MonkeyPatch):
    """Torch's own `graph` doesn't, where ending the recording fails."""
    current = ["usual"]

    class Streams:
        def __init__(self, stream: str):
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    class Graph(Streams):
        def __init__(self, graph: object, stream: str, capture_error_mode: str):
            super().__init__(stream)

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "of recordings")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", Streams)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    recorder, seen = CudaRecorder(CUDA), []
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorder.record(lambda: seen.append(current[0]))  # type: ignore[func-returns-value]
    assert (seen, current) == (["of recordings"], ["usual"])


@pytest.mark.parametrize("error", [CalledProcessError(1, ["gcc"]), NotImplementedError("no such target")])
def test_whatever_a_compiler_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch):
    """Triton builds its driver with the C compiler, which fails where Python's headers aren't installed."""

    def fails(x: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: fails)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    fast, why_not = compiled(lambda x: x, torch.zeros(1))
    assert fast is None and why_not == str(error)


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (4, 4)])
def test_more_processes_than_gpus(rank: int, count: int, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(distributed, "resolve_device", lambda name, local_rank=None: CUDA)
    with pytest.raises(
        UsageError, match=f"started process {rank + 1} on a machine of {count} GPU.*start {count} there"
    ):
        with distributed.team("cuda"):
            raise AssertionError("no process of this kind may begin")
