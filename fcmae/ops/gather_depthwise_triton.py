"""The Triton side of `gather_depthwise`: the same formulas, rows in blocks; accumulates in at least float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
CHANNELS = 32


@triton.jit
def _convolve_kernel(
    x, weight, bias, neighbours, out, n, c, K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (rows < n)[:, None] & (channels < c)[None, :]
    start = tl.load(bias + channels, channels < c, other=0.0).to(DTYPE)
    total = tl.zeros((ROWS, CHANNELS), DTYPE) + start[None, :]
    for j in range(K):
        source = tl.load(neighbours + j * n + rows, rows < n, other=n)
        there = inside & (source < n)[:, None]
        value = tl.load(x + source[:, None] * c + channels[None, :], there, other=0.0).to(DTYPE)
        w = tl.load(weight + j * c + channels, channels < c, other=0.0).to(DTYPE)
        total += value * w[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * c + channels[None, :], total, inside)


@triton.jit
def _grad_weight_kernel(
    x, grad, neighbours, partial, n, c, blocks, K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Each program sums one offset over every `splits`-th block of rows; the caller sums the partial sums."""
    j = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), DTYPE)
    for block in range(split, blocks, splits):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & (channels < c)[None, :]
        source = tl.load(neighbours + (K - 1 - j) * n + rows, rows < n, other=n)
        there = inside & (source < n)[:, None]
        value = tl.load(x + rows[:, None].to(tl.int64) * c + channels[None, :], inside, other=0.0).to(DTYPE)
        g = tl.load(grad + source[:, None] * c + channels[None, :], there, other=0.0).to(DTYPE)
        total += tl.sum(value * g, 0)
    tl.store(partial + (split * K + j) * c + channels, total, channels < c)


def _constants(x: Tensor, weight: Tensor) -> dict[str, Any]:
    accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
    sizes = {"K": len(weight), "ROWS": ROWS, "CHANNELS": CHANNELS}
    return sizes | {"DTYPE": accumulator, "enable_fp_fusion": True}


def gather_depthwise(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """As the operation of this name."""
    n, c = x.shape
    out = x.new_empty(x.shape)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(c, CHANNELS))
    x, weight, bias, neighbours = (tensor.contiguous() for tensor in (x, weight, bias, neighbours))
    _convolve_kernel[grid](x, weight, bias, neighbours, out, n, c, **_constants(x, weight))
    return out


def gather_depthwise_backward(x: Tensor, weight: Tensor, grad: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    n, c = x.shape
    grad_x = gather_depthwise(grad, weight.flip(0), torch.zeros_like(weight[0]), neighbours)
    blocks = triton.cdiv(n, ROWS)
    splits = min(blocks, 64)
    dtype = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(splits, len(weight), c, dtype=dtype, device=x.device)
    grid = (len(weight), splits, triton.cdiv(c, CHANNELS))
    x, grad, neighbours = (tensor.contiguous() for tensor in (x, grad, neighbours))
    _grad_weight_kernel[grid](x, grad, neighbours, partial, n, c, blocks, **_constants(x, weight))
    return grad_x, partial.sum(0).to(weight.dtype)
