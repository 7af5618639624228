"""Stacked layers against torch.nn: model m of a stack is an ordinary module with the same weights."""

import math
from collections.abc import Iterable

import pytest
import torch
from stacked import give
from tensors import normal
from torch import Tensor, nn

from modeling.heads.layers import (
    BatchNorm,
    Conv2d,
    Dropout,
    LayerNorm,
    Linear,
    MaxPool2d,
    MultiheadAttention,
    Noise,
    TokenBatchNorm,
    TransformerEncoderLayer,
    attach_noise,
    initialise,
    set_product_dtype,
)

SEEDS = [5, 3, 8]  # neither sorted nor equal


def close(found: Tensor, expected: Iterable[Tensor] | Tensor) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.stack(list(expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def shake(stack: nn.Module) -> nn.Module:
    """Random numbers in every parameter: a fresh LayerNorm or BatchNorm would hide what its own do."""
    for i, parameter in enumerate(stack.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=100 + i) * 0.5)
    return stack


@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_parts_is_linear_of_them_side_by_side(bias: bool):
    layer = shake(Linear(3, 9, 4, bias))
    parts = [normal(3, 5, width, seed=width).requires_grad_() for width in (2, 3, 4)]
    joined = torch.cat([part.detach() for part in parts], -1).requires_grad_()
    close(layer(*parts), layer(joined))
    grad = normal(3, 5, 4, seed=1)
    of_parts = torch.autograd.grad(layer(*parts), [*parts, *layer.parameters()], grad)
    of_joined = torch.autograd.grad(layer(joined), [joined, *layer.parameters()], grad)
    close(torch.cat(of_parts[:3], -1), of_joined[0])
    for found, expected in zip(of_parts[3:], of_joined[1:], strict=True):
        close(found, expected)


def test_bf16_products_are_those_of_rounded_factors_and_only_in_training():
    layer, x, grad = shake(Linear(3, 24, 40)), normal(3, 7, 24), normal(3, 7, 40, seed=2)
    x.requires_grad_()
    exact = layer(x)
    set_product_dtype(nn.Sequential(layer), torch.bfloat16)
    rounded, weight = x.detach().bfloat16().double(), layer.weight.detach().bfloat16().double()
    y = layer(x)
    assert y.dtype == torch.float32 and not torch.equal(y, exact)
    close_to_rounding = {"rtol": 2**-7, "atol": 2**-7}  # of results handed over in bf16, sums of up to 40
    torch.testing.assert_close(y.double(), rounded @ weight.mT + layer.bias[:, None].double(), **close_to_rounding)
    of_x, of_weight, of_bias = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    assert of_x.dtype == of_weight.dtype == torch.float32
    g = grad.bfloat16().double()
    torch.testing.assert_close(of_x.double(), g @ weight, rtol=2**-7, atol=2**-5)
    torch.testing.assert_close(of_weight.double(), g.mT @ rounded, rtol=2**-7, atol=2**-5)
    close(of_bias, grad.sum(1))
    assert torch.equal(layer.eval()(x), exact)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-30, 1e6], ids=lambda size: f"{size:g}")
@pytest.mark.parametrize("bias", [True, False])
def test_fp16_products_keep_gradients_of_any_size(bias: bool, size: float):
    """float16 holds 6e-8 to 65504; each model of the stack has gradients of another size still."""
    layer, x = shake(Linear(3, 24, 40, bias)), normal(3, 7, 24).requires_grad_()
    grad = size * normal(3, 7, 40, seed=2) * torch.tensor([1.0, 1e-4, 30.0])[:, None, None]
    set_product_dtype(layer, torch.float16)
    rounded, weight = x.detach().half().double(), layer.weight.detach().half().double()
    y = layer(x)
    assert y.dtype == torch.float32
    expected = rounded @ weight.mT + (layer.bias[:, None].double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    of_x, of_weight, *of_bias = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    assert of_x.dtype == of_weight.dtype == torch.float32
    for found, wanted in ((of_x, grad.double() @ weight), (of_weight, grad.double().mT @ rounded)):
        of_each = wanted.abs().amax((1, 2), keepdim=True)  # float16 keeps 11 bits of a gradient
        torch.testing.assert_close(found / of_each, wanted / of_each, rtol=0, atol=2**-10, check_dtype=False)
    assert [torch.equal(found, grad.sum(1)) for found in of_bias] == [True] * bias
    alone = Linear(1, 24, 40, bias)
    set_product_dtype(alone, torch.float16)
    for m in range(3):
        alone.load_state_dict({name: tensor[m : m + 1] for name, tensor in layer.state_dict().items()})
        own = x.detach()[m : m + 1].requires_grad_()
        of_own = torch.autograd.grad(alone(own), [own, alone.weight], grad[m : m + 1])
        for found, wanted in zip(of_own, (of_x, of_weight), strict=True):
            torch.testing.assert_close(found[0], wanted[m], rtol=1e-5, atol=1e-6 * float(wanted[m].abs().max()))


def test_fp16_sums_that_float16_does_not_hold():
    layer, x = Linear(1, 64, 32, bias=False), torch.full((1, 2, 64), 200.0)
    with torch.no_grad():
        layer.weight.fill_(100.0)
    set_product_dtype(layer, torch.float16)
    assert layer(x).unique().tolist() == [64 * 200 * 100]
    layer(x).backward(torch.zeros(1, 2, 32))
    assert layer.weight.grad.unique().tolist() == [0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(6,), (1,), (4, 3), (2, 3, 4)])
def test_linear(rows: tuple[int, ...], bias: bool):
    stack = shake(Linear(3, 5, 7, bias))
    x = normal(3, *rows, 5).requires_grad_()
    y = stack(x)
    y.square().sum().backward()
    for m in range(3):
        reference, own = nn.Linear(5, 7, bias), x.detach()[m].requires_grad_()
        give(stack, m, reference)
        expected = reference(own)
        expected.square().sum().backward()
        close(y[m], expected)
        close(x.grad[m], own.grad)
        close(stack.weight.grad[m], reference.weight.grad)
        if bias:
            close(stack.bias.grad[m], reference.bias.grad)


def test_linear_of_rows_shared_by_all_models():
    stack, x = shake(Linear(3, 5, 7)), normal(1, 6, 5)
    close(stack(x.expand(3, 6, 5)), stack(x.repeat(3, 1, 1)))


def test_batch_norm_and_its_running_statistics():
    stack, references = shake(BatchNorm(3, 4)), [nn.BatchNorm1d(4) for _ in range(3)]
    for m, reference in enumerate(references):
        give(stack, m, reference)
    for step, rows in enumerate((6, 2, 9)):
        x = (normal(3, rows, 4, seed=step) * 3 + 1).requires_grad_()
        stack.zero_grad()
        y = stack(x)
        (y**3).sum().backward()
        for m, reference in enumerate(references):
            own = x.detach()[m].requires_grad_()
            reference.zero_grad()
            expected = reference(own)
            (expected**3).sum().backward()
            close(y[m], expected)
            torch.testing.assert_close(x.grad[m], own.grad, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(stack.weight.grad[m], reference.weight.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(stack.bias.grad[m], reference.bias.grad, rtol=1e-4, atol=1e-4)
        close(stack.running_mean, [reference.running_mean for reference in references])
        close(stack.running_var, [reference.running_var for reference in references])
    stack.eval()
    close(stack(x), [reference.eval()(own) for reference, own in zip(references, x, strict=True)])


def test_batch_norm_of_a_single_row_uses_the_running_statistics():
    """The last batch of an epoch may be one row, which torch's refuses."""
    stack = shake(BatchNorm(2, 4))
    stack(normal(2, 8, 4) * 2 + 1)
    before = {name: buffer.clone() for name, buffer in stack.named_buffers()}
    x = normal(2, 1, 4, seed=1).requires_grad_()
    y = stack(x)
    y.sum().backward()
    assert x.grad.abs().min() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in stack.named_buffers())
    close(stack.eval()(x), y)


def test_batch_norm_of_tokens_is_that_of_the_real_ones_alone():
    stack, references = shake(TokenBatchNorm(3, 4)), [nn.BatchNorm1d(4) for _ in range(3)]
    for m, reference in enumerate(references):
        give(stack, m, reference)
    for step, masked in enumerate((True, False, True)):
        x = (normal(3, 5, 6, 4, seed=step) * 3 + 1).requires_grad_()
        lengths = torch.tensor([[6, 1, 3, 0, 2], [2, 5, 6, 1, 1], [1, 0, 0, 0, 1]]) if masked else torch.full((3, 5), 6)
        real = torch.arange(6) < lengths[..., None]
        stack.zero_grad()
        y = stack(x, real if masked else None)
        (y[real] ** 3).sum().backward()
        for m, reference in enumerate(references):
            own = x.detach()[m].requires_grad_()
            reference.zero_grad()
            expected = reference(own[real[m]])
            (expected**3).sum().backward()
            close(y[m][real[m]], expected)
            torch.testing.assert_close(x.grad[m], own.grad, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(stack.weight.grad[m], reference.weight.grad, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(stack.bias.grad[m], reference.bias.grad, rtol=1e-4, atol=1e-3)
        close(stack.running_mean, [reference.running_mean for reference in references])
        close(stack.running_var, [reference.running_var for reference in references])
    stack.eval()
    close(stack(x)[:, 0], [reference.eval()(own) for reference, own in zip(references, x[:, 0], strict=True)])


def test_batch_norm_of_a_single_token_uses_the_running_statistics():
    """Of one model; the other, which has more, goes by its own."""
    stack = shake(TokenBatchNorm(2, 4))
    stack(normal(2, 8, 3, 4) * 2 + 1)
    before = {name: buffer.clone() for name, buffer in stack.named_buffers()}
    x, real = normal(2, 2, 2, 4, seed=1), torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])
    y = stack(x, real)
    for name, buffer in stack.named_buffers():
        assert torch.equal(buffer[0], before[name][0]) and not torch.equal(buffer[1], before[name][1])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters())
    close(stack.eval()(x)[0], y[0])


@pytest.mark.parametrize("rows", [(6,), (4, 3)])
def test_layer_norm(rows: tuple[int, ...]):
    stack, x = shake(LayerNorm(3, 5)), normal(3, *rows, 5) * 3 + 1
    references = [nn.LayerNorm(5) for _ in range(3)]
    for m, reference in enumerate(references):
        give(stack, m, reference)
    close(stack(x), [reference(own) for reference, own in zip(references, x, strict=True)])


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("width, heads", [(8, 1), (8, 4), (5, 5)])
def test_attention(width: int, heads: int, masked: bool):
    stack = shake(MultiheadAttention(2, width, heads))
    query, key, value = normal(2, 3, 4, width), normal(2, 3, 6, width, seed=1), normal(2, 3, 6, width, seed=2)
    lengths = torch.tensor([[6, 1, 3], [2, 5, 6]])
    mask = torch.arange(6) < lengths[..., None] if masked else None
    found, weights = stack(query, key, value, mask)
    assert found.shape == (2, 3, 4, width) and weights.shape == (2, 3, heads, 4, 6)
    for m in range(2):
        reference = nn.MultiheadAttention(width, heads, batch_first=True)
        give(stack, m, reference)
        expected = reference(query[m], key[m], value[m], None if mask is None else ~mask[m], average_attn_weights=False)
        close(found[m], expected[0])
        close(weights[m], expected[1])


def test_attention_to_nothing_is_finite():
    """A text without a token leaves attention no key at all."""
    stack = shake(MultiheadAttention(1, 4, 2))
    x, mask = normal(1, 2, 3, 4), torch.tensor([[[True, True, False], [False, False, False]]])
    found, _ = stack(x, x, x, mask)
    found.sum().backward()
    assert found.isfinite().all() and all(p.grad.isfinite().all() for p in stack.parameters())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_transformer_encoder_layer(activation: str):
    stack = shake(TransformerEncoderLayer(2, 8, 4, 0.0, {"gelu": nn.GELU, "relu": nn.ReLU}[activation]))
    x = normal(2, 5, 3, 8).requires_grad_()
    y = stack(x)
    (y**3).sum().backward()
    for m in range(2):
        reference = nn.TransformerEncoderLayer(8, 4, 32, dropout=0.0, activation=activation, batch_first=True)
        give(stack, m, reference)
        own = x.detach()[m].requires_grad_()
        expected = reference(own)
        (expected**3).sum().backward()
        close(y[m], expected)
        torch.testing.assert_close(x.grad[m], own.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (5, 1), (3, 2), (5, 3)])
def test_convolution(kernel: int, stride: int):
    stack = shake(Conv2d(3, 4, 6, kernel, stride))
    x = normal(3, 5, 4, 7, 8).requires_grad_()
    y = stack(x)
    y.square().sum().backward()
    for m in range(3):
        reference, own = nn.Conv2d(4, 6, kernel, stride, padding=kernel // 2), x.detach()[m].requires_grad_()
        give(stack, m, reference)
        expected = reference(own)
        expected.square().sum().backward()
        torch.testing.assert_close(y[m], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad[m], own.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stack.weight.grad[m], reference.weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stack.bias.grad[m], reference.bias.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 6), (2, 2), (1, 1)])
def test_max_pooling(height: int, width: int):
    x = normal(2, 3, 5, height, width)
    expected = [[x[..., i : i + 3, j : j + 3].amax((-1, -2)) for j in range(0, width, 3)] for i in range(0, height, 3)]
    assert torch.equal(MaxPool2d(3)(x), torch.stack([torch.stack(row, -1) for row in expected], -2))


# -- initial weights --------------------------------------------------------------------------------------------


def mixed(n_models: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(n_models, 4, 6),
        LayerNorm(n_models, 6),
        Linear(n_models, 6, 2, bias=False),
        MultiheadAttention(n_models, 2, 1),
        Linear(n_models, 2, 2),
    )


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    stack = mixed(3)
    initialise(stack, SEEDS)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for m, seed in enumerate(SEEDS):
        alone = mixed(1)
        initialise(alone, [seed])
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter[0], stack.get_parameter(name)[m])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({stack[2].weight[m, 0, 0].item() for m in range(3)}) == 3


@pytest.mark.parametrize(
    "ours, theirs, sizes",
    [(Linear, nn.Linear, (200, 300)), (Conv2d, nn.Conv2d, (20, 300, 3))],
    ids=["linear", "convolution"],
)
def test_initial_weights_are_distributed_as_torch_s(
    ours: type[nn.Module], theirs: type[nn.Module], sizes: tuple[int, ...]
):
    stack, reference = ours(2, *sizes), theirs(*sizes)
    initialise(stack, [0, 1])
    for ours, theirs in ((stack.weight, reference.weight), (stack.bias, reference.bias)):
        for own in ours.detach():
            largest = theirs.abs().max().item()
            assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
            assert own.max().item() == pytest.approx(largest, rel=0.03)
            assert own.min().item() == pytest.approx(-largest, rel=0.03)


def test_attention_starts_as_torch_s():
    """Xavier-uniform over the joint matrix of queries, keys and values, as any linear layer behind them, no bias."""
    width, reference = 240, nn.MultiheadAttention(240, 8)
    stack = MultiheadAttention(2, width, 8)
    initialise(stack, [0, 1])
    bound = {"in": math.sqrt(6 / (4 * width)), "out": 1 / math.sqrt(width)}
    assert reference.in_proj_weight.abs().max().item() == pytest.approx(bound["in"], rel=0.01)
    assert reference.out_proj.weight.abs().max().item() == pytest.approx(bound["out"], rel=0.01)
    for m in range(2):
        for layer, largest in ((stack.query, "in"), (stack.key, "in"), (stack.value, "in"), (stack.out, "out")):
            weight = layer.weight.detach()[m]
            assert bound[largest] * 0.99 < weight.abs().max().item() <= bound[largest]
            assert weight.std().item() == pytest.approx(bound[largest] / math.sqrt(3), rel=0.02)  # uniform
            assert weight.mean().item() == pytest.approx(0, abs=0.02 * bound[largest])
            assert not layer.bias[m].any()
    assert not reference.in_proj_bias.any() and not reference.out_proj.bias.any()
    drawn = [layer.weight[m] for layer in (stack.query, stack.key, stack.value) for m in range(2)]
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


def test_attention_drops_weights():
    """Of what is kept, nothing is lost: a query gets the sum of kept values, each 1 / (1 - p) of its weight."""
    stack = MultiheadAttention(1, 4, 1, dropout=0.5)
    initialise(stack, [0])
    attach_noise(stack, Noise([1]))
    x = normal(1, 50, 3, 4)
    mixed, weights = stack(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 50, 1, 3))
    values, kept = stack.value(x)[0], Noise([1]).keep_mask((1, 50, 1, 3, 3), 0.5)
    assert 0 < (kept == 0).sum() < kept.numel()
    close(mixed[0], stack.out((weights[0, :, 0] * kept[0, :, 0] @ values)[None])[0])
    assert not torch.equal(stack.eval()(x, x, x)[0], mixed)


# -- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_zeroes_p_and_scales_the_rest(p: float):
    layer = Dropout(p)
    attach_noise(layer, Noise(SEEDS))
    y = layer(torch.ones(3, 200, 101))
    for own in y:
        kept = own != 0
        torch.testing.assert_close(own[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
        sigma = (p * (1 - p) / own.numel()) ** 0.5
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * sigma)
        for step in (1, 2, 3, 4):  # four elements share a random word
            both = (kept.flatten()[step:] & kept.flatten()[:-step]).float().mean().item()
            assert both == pytest.approx((1 - p) ** 2, abs=10 * sigma)


def test_dropout_without_effect():
    x = normal(2, 5, 3)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_dropout_s_gradient_is_its_mask():
    layer = Dropout(0.4)
    attach_noise(layer, Noise([1]))
    x = normal(1, 20, 3).requires_grad_()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), x.detach() * x.grad)
    assert 0 < (x.grad == 0).sum() < 60


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_a_dropout_near_its_bounds_leaves_nearly_all_or_nothing(p: float):
    mask = Noise([1]).keep_mask((1, 20_000), p)
    assert abs(float((mask > 0).float().mean()) - (1 - p)) < 1e-3


@pytest.mark.parametrize("seeds", [SEEDS, [5, 3, 5, 8, 3], [1, 2], [4, 4]], ids=str)
def test_a_model_s_mask_is_the_same_alone_and_in_a_stack(seeds: list[int]):
    shapes = [(6, 5), (1, 3), (7, 2, 3)]  # sizes that don't fill the random words
    together = Noise(seeds)
    masks = [together.keep_mask((len(seeds), *shape), 0.5) for shape in shapes]
    for m, seed in enumerate(seeds):
        alone = Noise([seed])
        for shape, mask in zip(shapes, masks, strict=True):
            assert torch.equal(alone.keep_mask((1, *shape), 0.5)[0], mask[m])
    first = masks[0].flatten(1).unique(dim=0)
    assert len(first) == len(set(seeds))


def test_each_dropout_of_a_model_draws_anew():
    stack = nn.Sequential(Dropout(0.5), nn.Sequential(Dropout(0.5)))
    attach_noise(stack, Noise([0]))
    x = torch.ones(1, 30, 30)
    first, second, again = stack[0](x), stack[1](x), stack[0](x)
    assert not torch.equal(first, second) and not torch.equal(first, again)
