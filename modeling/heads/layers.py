"""Layers that hold the weights of M models and compute all of them at once.

Every parameter and every activation has the models as its first dimension: x (M, B, ..., width). Model m of a stack
computes what it would compute alone; with M = 1 these are the layers of torch.nn. All weights start as those of their
namesakes in torch.nn do, each model's from a generator of its own seed, drawn on the CPU, so that the device changes
nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WIDTH = 32  # outputs for which a product in low precision is any faster


class Linear(nn.Module):
    """y = x Wᵀ + b: (M, B, ..., n_in) -> (M, B, ..., n_out). The weight is (M, n_out, n_in).

    Several x are what one of their widths together would give, without putting them side by side. `product_dtype` is
    set by `set_product_dtype`."""

    product_dtype = torch.float32

    def __init__(self, n_models: int, n_in: int, n_out: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_models, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_models, n_out)) if bias else None

    def reset(self, model: int, generator: torch.Generator) -> None:
        """Draw the weights of one model of the stack."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        self.weight[model].uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias[model].uniform_(-bound, bound, generator=generator)

    def forward(self, *parts: Tensor) -> Tensor:
        n_models, n_out, _ = self.weight.shape
        dtype = self.product_dtype if self.training and n_out >= LEAST_WIDTH else torch.float32
        pieces = self.weight.split([x.shape[-1] for x in parts], 2) if len(parts) > 1 else [self.weight]
        biases = [self.bias, *[None] * (len(parts) - 1)]  # added once
        first, *others = (
            _Product.apply(x.reshape(n_models, -1, x.shape[-1]), weight, bias, dtype)
            for x, weight, bias in zip(parts, pieces, biases, strict=True)
        )
        y: Tensor = sum(others, first)
        return y.view(*parts[0].shape[:-1], n_out)


class _Product(torch.autograd.Function):
    """x Wᵀ + b of x (M, B, n_in), multiplied in `dtype`, added up and returned in float32. The weight's gradient is
    formed as gᵀ x, in the weight's own layout: torch's own backward pass forms its transpose, which takes up to six
    times as long for a few classes, and copies it.

    In float16 gradients would vanish: each model's are scaled by a power of two, which rounds nothing, so that the
    largest lies just within what float16 holds, and scaled back afterwards. (Micikevicius et al. 2018, with the factor
    known rather than searched.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        if bias is None:
            return _bmm(x, weight.transpose(1, 2))
        if dtype == torch.float32:
            return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
        return _bmm(x, weight.transpose(1, 2)).add_(bias[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        unit = _power_of_two(grad) if x.dtype == torch.float16 else None
        scaled = grad if unit is None else grad / unit
        g = scaled.to(x.dtype, memory_format=torch.contiguous_format)
        of_x, of_weight = _bmm(g, weight) if needs_x else None, _bmm(g.transpose(1, 2), x)
        if unit is not None:
            of_x, of_weight = None if of_x is None else of_x * unit, of_weight * unit
        return of_x, of_weight, grad.sum(1) if needs_bias else None, None


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """The products of a (M, n, k) and b (M, k, m) in float32. Those of float16 factors are exact there, and their sums
    may be larger than float16 holds."""
    if a.dtype != torch.float16:
        return torch.bmm(a, b).float()
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _power_of_two(grad: Tensor) -> Tensor:
    """For each model, (M, 1, 1), what divides its gradients (M, B, n) so that the largest is 2^14 to 2^15. No value
    leaves the device."""
    largest = grad.abs().amax((1, 2), keepdim=True).clamp_min(2.0**-100)  # all may be 0
    return largest / torch.frexp(largest).mantissa * 2.0**-15


def set_product_dtype(stack: nn.Module, dtype: torch.dtype) -> None:
    """Multiply in `dtype` while training: the weights, the sums and everything else stay float32."""
    for layer in stack.modules():
        if isinstance(layer, Linear):
            layer.product_dtype = dtype


class Conv2d(nn.Module):
    """Convolution of maps (M, B, n_in, H, W) -> (M, B, n_out, H / stride, W / stride), rounded up: the kernel is odd,
    and half of it zeros are put around the maps. The weight is (M, n_out, n_in, kernel, kernel)."""

    def __init__(self, n_models: int, n_in: int, n_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(n_models, n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(n_models, n_out))

    def reset(self, model: int, generator: torch.Generator) -> None:
        """Draw the weights of one model of the stack."""
        bound = 1 / math.sqrt(self.weight[model, 0].numel())
        self.weight[model].uniform_(-bound, bound, generator=generator)
        self.bias[model].uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        # One group of channels for each model: a single kernel.
        y = F.conv2d(
            x.transpose(0, 1).flatten(1, 2),
            self.weight.flatten(0, 1),
            self.bias.flatten(),
            self.stride,
            self.weight.shape[-1] // 2,
            groups=len(self.weight),
        )
        return y.unflatten(1, self.bias.shape).transpose(0, 1)


class MaxPool2d(nn.Module):
    """The largest of each `size` x `size` square of maps (M, B, C, H, W), with what is left over at the edges."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.flatten(0, 1), self.size, ceil_mode=True).unflatten(0, x.shape[:2])


class BatchNorm(nn.Module):
    """Batch normalisation of (M, B, width) over B. Ioffe and Szegedy 2015; running statistics as torch.nn.BatchNorm1d,
    but a batch of a single row is left to the running statistics instead of failing."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n_models: int, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_models, width))
        self.bias = nn.Parameter(torch.zeros(n_models, width))
        self.register_buffer("running_mean", torch.zeros(n_models, width))
        self.register_buffer("running_var", torch.ones(n_models, width))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        n_models, rows, width = x.shape
        # One channel for each column of each model: a single kernel, forward and backward.
        y = F.batch_norm(
            x.transpose(0, 1).reshape(rows, n_models * width),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            self.training and rows > 1,
            self.momentum,
            self.eps,
        )
        return y.view(rows, n_models, width).transpose(0, 1)


class TokenBatchNorm(BatchNorm):
    """Batch normalisation of tokens (M, B, L, width) over all real tokens of the batch: what `torch.nn.BatchNorm1d`
    makes of those alone, (tokens, width). `mask` (M, B, L) says which are real, None that all are; the others count
    neither in a batch's statistics nor in the running ones. A model whose batch has one real token or none is left to
    the running statistics."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._statistics(x, torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype))
        mean, scale, bias = (y[:, None, None] for y in (mean, self.weight * (var + self.eps).rsqrt(), self.bias))
        return (x - mean) * scale + bias

    def _statistics(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (M, width) to normalise with; the running ones move."""
        count, real = real.sum((1, 2))[:, None], real[..., None]
        mean = (x * real).sum((1, 2)) / count.clamp(min=1)
        var = ((x - mean[:, None, None]).square() * real).sum((1, 2)) / count.clamp(min=1)
        enough = count > 1
        mean, var = torch.where(enough, mean, self.running_mean), torch.where(enough, var, self.running_var)
        with torch.no_grad():
            unbiased = torch.where(enough, var * count / (count - 1).clamp(min=1), var)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return mean, var


class LayerNorm(nn.Module):
    """Layer normalisation of (M, B, ..., width) over the last dimension. Ba, Kiros and Hinton 2016."""

    def __init__(self, n_models: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_models, width))
        self.bias = nn.Parameter(torch.zeros(n_models, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.view(shape) + self.bias.view(shape)


class Noise:
    """Random masks of M models: one stream of bits for each distinct seed, so that a model draws the same alone and in
    a stack. Bits are drawn for many steps at once."""

    ahead = 1 << 18  # elements of one model

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        distinct = list(dict.fromkeys(seeds))  # in the models' order: without shared seeds, mask m is model m's
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in distinct]
        self.stream = torch.tensor([distinct.index(seed) for seed in seeds], device=device)
        self.shared = len(distinct) < len(seeds)
        self.bits = torch.empty(len(distinct), 0, dtype=torch.int16, device=device)
        self.used = 0
        self.masks: dict[float, Tensor] = {}  # of all bits, by p

    def keep_mask(self, shape: Sequence[int], p: float) -> Tensor:
        """1/(1-p) with probability 1-p, else 0, float32 of `shape` (M, ...). p is met to within 2^-16."""
        size = math.prod(shape[1:])
        if self.used + size > self.bits.shape[1]:
            self._draw(max(size, self.ahead))
        if p not in self.masks:
            least = min(max(1, round(p * 2**16)), 2**16 - 1) - 2**15
            # bits >= least as 0 and 1; by comparing, it would take four times as long on a CPU
            mask = self.bits.clamp(least - 1, least).float().sub_(least - 1).mul_(1 / (1 - p))
            self.masks[p] = mask[self.stream] if self.shared else mask
        low, self.used = self.used, self.used + size
        return self.masks[p][:, low : self.used].view(*shape)

    def _draw(self, size: int) -> None:
        # 16 random bits for each element, four drawn at once: five times as fast as uniform floats on a CPU.
        words = torch.empty(len(self.generators), -(-size // 4), dtype=torch.int64, device=self.bits.device)
        for row, generator in zip(words, self.generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        self.bits, self.used, self.masks = words.view(torch.int16), 0, {}


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with each model's own mask; `noise` is set by `attach_noise`."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.noise: Noise | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.noise is None:
            raise RuntimeError("dropout without a source of noise; call `attach_noise` before training")
        return x * self.noise.keep_mask(x.shape, self.p)


class _InProjection(Linear):
    """Of the queries, keys or values of an attention. In `torch.nn.MultiheadAttention` the three are one matrix
    (3 width, width), which starts Xavier-uniform (Glorot and Bengio 2010) as a whole; the biases start at 0."""

    def reset(self, model: int, generator: torch.Generator) -> None:
        width = self.weight.shape[2]
        bound = math.sqrt(6 / (3 * width + width))
        self.weight[model].uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias[model].zero_()


class _OutProjection(Linear):
    """Of an attention's result: the weight starts as any linear layer's, the bias at 0."""

    def reset(self, model: int, generator: torch.Generator) -> None:
        super().reset(model, generator)
        if self.bias is not None:
            self.bias[model].zero_()


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) of queries (M, B, Lq, width) over keys and values
    (M, B, Lk, width), softmax(q kᵀ / √d) v in `n_heads` heads, with input and output projections, and `dropout` of the
    weights. The products are written out: our sequences are short, and fused kernels are slower there."""

    def __init__(self, n_models: int, width: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.query, self.key, self.value = (_InProjection(n_models, width, width) for _ in range(3))
        self.out = _OutProjection(n_models, width, width)
        self.drop = Dropout(dropout)
        self.n_heads = n_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The result (M, B, Lq, width) and the weights (M, B, heads, Lq, Lk), before dropout. `mask` (M, B, Lk): the
        keys there are."""
        q, k, v = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)  # (M, B, heads, L, d)
            for x in (self.query(query), self.key(key), self.value(value))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        mixed = (self.drop(weights) @ v).transpose(-2, -3).flatten(-2)
        return self.out(mixed), weights


class TransformerEncoderLayer(nn.Module):
    """Self-attention and an MLP of 4 width, each with residual and LayerNorm after it (Vaswani et al. 2017); `dropout`
    of the attention weights, inside the MLP and after either."""

    def __init__(self, n_models: int, width: int, n_heads: int, dropout: float, activation: type[nn.Module] = nn.GELU):
        super().__init__()
        self.attention = MultiheadAttention(n_models, width, n_heads, dropout)
        self.norm1, self.norm2 = LayerNorm(n_models, width), LayerNorm(n_models, width)
        self.mlp = nn.Sequential(
            Linear(n_models, width, 4 * width), activation(), Dropout(dropout), Linear(n_models, 4 * width, width)
        )
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout1(self.attention(x, x, x)[0]))
        return self.norm2(x + self.dropout2(self.mlp(x)))


@torch.no_grad()
def initialise(stack: nn.Module, seeds: Sequence[int]) -> None:
    """Draw the weights of model m from a generator of seeds[m], layer by layer in the order of definition."""
    for model, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for layer in stack.modules():
            if callable(reset := getattr(layer, "reset", None)):
                reset(model, generator)


def attach_noise(stack: nn.Module, noise: Noise | None) -> None:
    """Let every Dropout of `stack` draw from `noise`."""
    for layer in stack.modules():
        if isinstance(layer, Dropout):
            layer.noise = noise


# -- products of the RBF kernel -----------------------------------------------------------------------------------


def squared_distances(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """||x_i - other_j||², (N, M), of the rows of x (N, D) and other (M, D)."""
    squares = x.square().sum(1)[:, None] + other.square().sum(1)
    return squares.sub_(x @ other.T, alpha=2).clamp_min_(0)


def kernel_logits(
    x: torch.Tensor,
    support: torch.Tensor,
    dual: torch.Tensor,
    bias: torch.Tensor,
    gamma: float,
    block_rows: int = 4096,
) -> torch.Tensor:
    """exp(-gamma ||x_i - support_j||²) @ dual + bias, (M, K), for x (M, D); `block_rows` rows in memory at a time."""
    blocks = x.to(support.dtype).split(block_rows)
    return torch.cat([squared_distances(b, support).mul_(-gamma).exp_() @ dual + bias for b in blocks])
