"""The Triton side of `grn_mlp`: what its parameters cost, in one pass over them each way."""

# How a kernel of Triton is launched, pyright does not know.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes of the work, not yet tuned on a GPU.
FOLD_ROWS, FOLD_CHANNELS = 8, 256
"""Of a program's turn; it makes whole rows."""
BACKWARD_ROWS, BACKWARD_CHANNELS = 32, 128
"""Of a program."""


@triton.jit
def _fold_kernel(
    norm_weight, norm_bias, w1, b1, w2, b2, w, b, w2_out, b2_out, o, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """w2 and b2 are copied on the way: w2 has as many numbers as w1, b2 as many as a row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), DTYPE)
    for start in range(0, c, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        there = channels < c
        at = rows[:, None].to(tl.int64) * c + channels[None, :]
        inside = (rows < o)[:, None] & there[None, :]
        value = tl.load(w1 + at, inside, other=0.0).to(DTYPE)
        scale = tl.load(norm_weight + channels, there, other=0.0).to(DTYPE)
        shift = tl.load(norm_bias + channels, there, other=0.0).to(DTYPE)
        tl.store(w + at, (value * scale[None, :]).to(w.dtype.element_ty), inside)
        total += tl.sum(value * shift[None, :], 1)
        tl.store(w2_out + at, tl.load(w2 + at, inside).to(w2_out.dtype.element_ty), inside)
        if tl.program_id(0) == 0:
            tl.store(b2_out + channels, tl.load(b2 + channels, there).to(b2_out.dtype.element_ty), there)
    total += tl.load(b1 + rows, rows < o, other=0.0).to(DTYPE)
    tl.store(b + rows, total.to(b.dtype.element_ty), rows < o)


@triton.jit
def _fold_backward_kernel(
    grad_w, grad_b, norm_weight, norm_bias, w1, grad_w1, partial, o, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The sums over some rows go into partial (splits, 2, c)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < c
    at = rows[:, None].to(tl.int64) * c + channels[None, :]
    inside = (rows < o)[:, None] & there[None, :]
    value = tl.load(w1 + at, inside, other=0.0).to(DTYPE)
    g = tl.load(grad_w + at, inside, other=0.0).to(DTYPE)
    along = tl.load(grad_b + rows, rows < o, other=0.0).to(DTYPE)[:, None]
    scale = tl.load(norm_weight + channels, there, other=0.0).to(DTYPE)[None, :]
    shift = tl.load(norm_bias + channels, there, other=0.0).to(DTYPE)[None, :]
    tl.store(grad_w1 + at, (g * scale + along * shift).to(grad_w1.dtype.element_ty), inside)
    sums = partial + tl.program_id(0).to(tl.int64) * 2 * c + channels
    tl.store(sums, tl.sum(value * g, 0), there)
    tl.store(sums + c, tl.sum(value * along, 0), there)


def _accumulator(w1: Tensor) -> tl.dtype:
    return tl.float64 if w1.dtype == torch.float64 else tl.float32


def fold_norm(
    norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operation of this name."""
    given = [tensor.contiguous() for tensor in (norm_weight, norm_bias, w1, b1, w2, b2)]
    w, b, w2_out, b2_out = (torch.empty_like(tensor, dtype=dtype) for tensor in given[2:])
    o, c = w1.shape
    sizes = {"ROWS": FOLD_ROWS, "CHANNELS": FOLD_CHANNELS, "DTYPE": _accumulator(w1)}
    grid = (triton.cdiv(o, FOLD_ROWS),)
    _fold_kernel[grid](*given, w, b, w2_out, b2_out, o, c, **sizes, num_warps=4, enable_fp_fusion=True)
    return w, b, w2_out, b2_out


def fold_norm_backward(
    grad_w: Tensor, grad_b: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    given = [tensor.contiguous() for tensor in (grad_w, grad_b, norm_weight, norm_bias, w1)]
    o, c = w1.shape
    grad_w1 = torch.empty_like(given[-1])
    grid = (triton.cdiv(o, BACKWARD_ROWS), triton.cdiv(c, BACKWARD_CHANNELS))
    partial = w1.new_empty(grid[0], 2, c, dtype=torch.promote_types(w1.dtype, torch.float32))
    sizes = {"ROWS": BACKWARD_ROWS, "CHANNELS": BACKWARD_CHANNELS, "DTYPE": _accumulator(w1)}
    _fold_backward_kernel[grid](*given, grad_w1, partial, o, c, **sizes, num_warps=4, enable_fp_fusion=True)
    return grad_w1, partial.sum(0).to(w1.dtype)
