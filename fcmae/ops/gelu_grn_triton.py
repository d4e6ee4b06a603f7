"""The Triton side of the passes in `gelu_grn`: a program walks down the sites of one image, some channels wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes of the work, not yet tuned on a GPU.
ROWS = 32
CHANNELS = 64
PROGRAMS = 4096
"""Programs that keep a GPU busy: with fewer images and channels than that, the sites of an image are split."""


@triton.jit
def _normal(h):
    """The probability that a standard normal number is below h."""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def _tile(start, n, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets (ROWS, CHANNELS) of this program's image and channels from row `start` on, and which are there."""
    rows = start + tl.arange(0, ROWS)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(2).to(tl.int64) * n
    return (first + rows)[:, None] * c + channels[None, :], (rows < n)[:, None] & (channels < c)[None, :]


@triton.jit
def _per_image(values, c, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """This program's block of (b, c)."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return tl.load(values + tl.program_id(2).to(tl.int64) * c + channels, channels < c, other=0.0).to(DTYPE)


@triton.jit
def _store_sums(sums, total, c, CHANNELS: tl.constexpr):
    """Store the columns' sums of total into this program's block of (b, splits, c)."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + row * c + channels, tl.sum(total, 0), channels < c)


@triton.jit
def _square_sums_kernel(
    h, sums, n, c, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    total = tl.zeros((ROWS, CHANNELS), DTYPE)
    stop = tl.minimum((tl.program_id(1) + 1) * rows, n)
    for start in range(tl.program_id(1) * rows, stop, ROWS):
        at, inside = _tile(start, n, c, ROWS, CHANNELS)
        value = tl.load(h + at, inside, other=0.0).to(DTYPE)
        y = value * _normal(value)
        total += y * y
    _store_sums(sums, total, c, CHANNELS)


@triton.jit
def _scale_kernel(
    h, scale, beta, out, n, c, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    shift = tl.load(beta + channels, channels < c, other=0.0).to(DTYPE)[None, :]
    s = _per_image(scale, c, CHANNELS, DTYPE)[None, :]
    stop = tl.minimum((tl.program_id(1) + 1) * rows, n)
    for start in range(tl.program_id(1) * rows, stop, ROWS):
        at, inside = _tile(start, n, c, ROWS, CHANNELS)
        value = tl.load(h + at, inside, other=0.0).to(DTYPE)
        tl.store(out + at, (shift + s * (value * _normal(value))).to(out.dtype.element_ty), inside)


@triton.jit
def _grad_sums_kernel(
    h, grad, along_sums, grad_sums, n, c, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    along = tl.zeros((ROWS, CHANNELS), DTYPE)
    total = tl.zeros((ROWS, CHANNELS), DTYPE)
    stop = tl.minimum((tl.program_id(1) + 1) * rows, n)
    for start in range(tl.program_id(1) * rows, stop, ROWS):
        at, inside = _tile(start, n, c, ROWS, CHANNELS)
        value = tl.load(h + at, inside, other=0.0).to(DTYPE)
        g = tl.load(grad + at, inside, other=0.0).to(DTYPE)
        along += g * (value * _normal(value))
        total += g
    _store_sums(along_sums, along, c, CHANNELS)
    _store_sums(grad_sums, total, c, CHANNELS)


@triton.jit
def _backward_kernel(
    h, grad, scale, along, beta, grad_h, out, sums, n, c, rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    shift = tl.load(beta + channels, channels < c, other=0.0).to(DTYPE)[None, :]
    s = _per_image(scale, c, CHANNELS, DTYPE)[None, :]
    a = _per_image(along, c, CHANNELS, DTYPE)[None, :]
    total = tl.zeros((ROWS, CHANNELS), DTYPE)
    stop = tl.minimum((tl.program_id(1) + 1) * rows, n)
    for start in range(tl.program_id(1) * rows, stop, ROWS):
        at, inside = _tile(start, n, c, ROWS, CHANNELS)
        value = tl.load(h + at, inside, other=0.0).to(DTYPE)
        g = tl.load(grad + at, inside, other=0.0).to(DTYPE)
        below = _normal(value)
        y = value * below
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        d = (s * g + a * y) * (below + value * density)
        total += d
        tl.store(grad_h + at, d.to(grad_h.dtype.element_ty), inside)
        tl.store(out + at, (shift + s * y).to(out.dtype.element_ty), inside)
    _store_sums(sums, total, c, CHANNELS)


def _rows(h: Tensor) -> int:
    """Sites of h (b, n, c) that a program walks down, a multiple of ROWS: all, if that makes programs enough."""
    b, n, c = h.shape
    splits = triton.cdiv(PROGRAMS, b * triton.cdiv(c, CHANNELS))
    return ROWS * triton.cdiv(n, ROWS * splits)


def _partial_sums(h: Tensor) -> Tensor:
    b, n, c = h.shape
    return h.new_empty(b, triton.cdiv(n, _rows(h)), c, dtype=torch.promote_types(h.dtype, torch.float32))


def _run(kernel: triton.JITFunction, h: Tensor, *tensors: Tensor) -> None:
    b, n, c = h.shape
    rows = _rows(h)
    grid = (triton.cdiv(c, CHANNELS), triton.cdiv(n, rows), b)
    dtype = tl.float64 if h.dtype == torch.float64 else tl.float32
    kernel[grid](
        h, *tensors, n, c, rows, ROWS=ROWS, CHANNELS=CHANNELS, DTYPE=dtype, num_warps=4, enable_fp_fusion=True
    )


def gelu_square_sums(h: Tensor) -> Tensor:
    """As the operation of this name."""
    sums = _partial_sums(h)
    _run(_square_sums_kernel, h.contiguous(), sums)
    return sums.sum(1)


def gelu_scale(h: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """As the operation of this name."""
    out = h.new_empty(h.shape)
    _run(_scale_kernel, h.contiguous(), scale.contiguous(), beta.contiguous(), out)
    return out


def gelu_grad_sums(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    along, total = _partial_sums(h), _partial_sums(h)
    _run(_grad_sums_kernel, h.contiguous(), grad.contiguous(), along, total)
    return along.sum(1), total.sum(1)


def gelu_grn_backward(
    h: Tensor, grad: Tensor, scale: Tensor, along: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation of this name."""
    grad_h, out, sums = h.new_empty(h.shape), h.new_empty(h.shape), _partial_sums(h)
    inputs = (tensor.contiguous() for tensor in (grad, scale, along, beta))
    _run(_backward_kernel, h.contiguous(), *inputs, grad_h, out, sums)
    return grad_h, out, sums.sum(1)
