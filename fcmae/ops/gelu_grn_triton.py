"""The Triton side of `gelu_grn`: passes over the map, a program for some sites of an image and some channels, and
between them a kernel for the vectors of an image. Memory bounds each but the first, not arithmetic."""

# How a kernel of Triton is launched, pyright does not know.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes of the work, from code compiled for a Hopper and not yet tuned on a GPU; what has been measured on a kind of
# GPU belongs here. They say in which order sums are taken, so that they may depend on shapes and the kind of GPU,
# but not on a measurement at a run's start: resumed, the run would differ.
VALUES = 1024
"""Values of a turn of a program, of four warps: a load of 128 bits for each thread and map of bfloat16."""
CHANNELS = (256, 128, 64)
"""Channels of a program: what wastes fewest values at an image's edge, and the widest of those."""
PROGRAMS = 4096
"""Programs that keep a GPU busy: with fewer images and channels than that, the sites of an image are split."""
IMAGES = 65535
"""What CUDA takes along the grid's third axis. Along the first, images would cost a division and registers."""
VECTOR = 2048
"""Channels of a turn of a program over an image's vectors, of four warps."""


@triton.jit
def _gelu(h, DTYPE: tl.constexpr):
    """GELU and its derivative, from the probability that a standard normal number is below h, and its density.

    In float32, of -|h| that probability is 2 to the power of a polynomial of seventh degree, which costs half of
    tl.erf and, unlike 1 + erf, keeps its digits where it is small. Its relative error is below 2e-4 down to -8,
    beyond which it falls to 0; GELU's absolute error is below 5e-7, that of the derivative below 2e-6. In float64
    all is exact.
    """
    if DTYPE == tl.float64:  # noqa: SIM300
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        y = h * below
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        size = tl.abs(h)
        exponent = size * -1.4356855e-6 + 5.3463595e-5
        exponent = size * exponent - 8.6841173e-4
        exponent = size * exponent + 8.2867350e-3
        exponent = size * exponent - 5.3583305e-2
        exponent = size * exponent - 0.45875210
        exponent = size * exponent - 1.1511703
        tail = tl.exp2(size * exponent - 1.0)
        below = tl.where(h > 0, 1.0 - tail, tail)
        y = tl.maximum(h, 0.0) - size * tail
        density = tl.exp2(-0.7213475204 * h * h - 1.325748065)
    return y, below + h * density


@triton.jit
def _tile(start, n, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where row `start` of this program's image begins, offsets (ROWS, CHANNELS) from there, and which exist."""
    rows = tl.arange(0, ROWS)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = (tl.program_id(2).to(tl.int64) * n + start) * c
    return first, rows[:, None] * c + channels[None, :], (start + rows < n)[:, None] & (channels < c)[None, :]


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
        first, at, inside = _tile(start, n, c, ROWS, CHANNELS)
        y, _ = _gelu(tl.load(h + first + at, inside, other=0.0).to(DTYPE), DTYPE)
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
        first, at, inside = _tile(start, n, c, ROWS, CHANNELS)
        y, _ = _gelu(tl.load(h + first + at, inside, other=0.0).to(DTYPE), DTYPE)
        tl.store(out + first + at, (shift + s * y).to(out.dtype.element_ty), inside)


@triton.jit
def _grad_sums_kernel(
    h, grad, along_sums, grad_sums, n, c, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    along = tl.zeros((ROWS, CHANNELS), DTYPE)
    total = tl.zeros((ROWS, CHANNELS), DTYPE)
    stop = tl.minimum((tl.program_id(1) + 1) * rows, n)
    for start in range(tl.program_id(1) * rows, stop, ROWS):
        first, at, inside = _tile(start, n, c, ROWS, CHANNELS)
        y, _ = _gelu(tl.load(h + first + at, inside, other=0.0).to(DTYPE), DTYPE)
        g = tl.load(grad + first + at, inside, other=0.0).to(DTYPE)
        along += g * y
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
        first, at, inside = _tile(start, n, c, ROWS, CHANNELS)
        g = tl.load(grad + first + at, inside, other=0.0).to(DTYPE)
        y, slope = _gelu(tl.load(h + first + at, inside, other=0.0).to(DTYPE), DTYPE)
        d = (s * g + a * y) * slope
        total += d
        tl.store(grad_h + first + at, d.to(grad_h.dtype.element_ty), inside)
        tl.store(out + first + at, (shift + s * y).to(out.dtype.element_ty), inside)
    _store_sums(sums, total, c, CHANNELS)


@triton.jit
def _sum_splits(sums, splits, c, channels, DTYPE: tl.constexpr):
    """Of (b, splits, c), the sum over splits of these channels of this program's image."""
    total = tl.zeros(channels.shape, DTYPE)
    for split in range(splits):
        row = tl.program_id(0).to(tl.int64) * splits + split
        total += tl.load(sums + row * c + channels, channels < c, other=0.0)
    return total


@triton.jit
def _image_forward_kernel(
    squares, gamma, norm, scale, splits, c, CHANNELS: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """n and s of an image, from partial sums of squares (b, splits, c)."""
    first = tl.program_id(0).to(tl.int64) * c
    total = tl.zeros((CHANNELS,), DTYPE)
    for start in range(0, c, CHANNELS):
        total += tl.sqrt(_sum_splits(squares, splits, c, start + tl.arange(0, CHANNELS), DTYPE))
    mean = tl.sum(total, 0) / c + EPS
    for start in range(0, c, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < c
        n = tl.sqrt(_sum_splits(squares, splits, c, channels, DTYPE))
        g = tl.load(gamma + channels, inside, other=0.0).to(DTYPE)
        tl.store(norm + first + channels, n, inside)
        tl.store(scale + first + channels, 1.0 + g * n / mean, inside)


@triton.jit
def _image_backward_kernel(
    sums, norm, gamma, scale, along, grad_gamma, splits, c,
    CHANNELS: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """s, dn / n and r t of an image, r t in parts as t is, from partial sums of t (b, splits, c)."""
    first = tl.program_id(0).to(tl.int64) * c
    total = tl.zeros((CHANNELS,), DTYPE)
    total_along = tl.zeros((CHANNELS,), DTYPE)
    for start in range(0, c, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        n = tl.load(norm + first + channels, channels < c, other=0.0)
        g = tl.load(gamma + channels, channels < c, other=0.0).to(DTYPE)
        total += n
        total_along += g * _sum_splits(sums, splits, c, channels, DTYPE) * n
    mean = tl.sum(total, 0) / c + EPS
    mean_along = tl.sum(total_along, 0) / c / (mean * mean)
    for start in range(0, c, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < c
        n = tl.load(norm + first + channels, inside, other=0.0)
        g = tl.load(gamma + channels, inside, other=0.0).to(DTYPE)
        grad_norm = g * _sum_splits(sums, splits, c, channels, DTYPE) / mean - mean_along
        r = n / mean
        tl.store(scale + first + channels, 1.0 + g * r, inside)
        tl.store(along + first + channels, tl.where(n > 0, grad_norm / tl.where(n > 0, n, 1.0), 0.0), inside)
        for split in range(splits):
            at = (tl.program_id(0).to(tl.int64) * splits + split) * c + channels
            tl.store(grad_gamma + at, tl.load(sums + at, inside, other=0.0) * r, inside)


def _accumulator(h: Tensor) -> tl.dtype:
    return tl.float64 if h.dtype == torch.float64 else tl.float32


def _turn(h: Tensor) -> tuple[int, int]:
    """Sites and channels of a turn of a program over h (b, n, c)."""
    _, n, c = h.shape

    def values(channels: int) -> int:
        return triton.cdiv(c, channels) * triton.cdiv(n, VALUES // channels)

    channels = min(CHANNELS, key=values)
    return VALUES // channels, channels


def _rows(h: Tensor) -> int:
    """Sites of h (b, n, c) that a program walks down, whole turns: all, if that makes programs enough."""
    b, n, c = h.shape
    rows, channels = _turn(h)
    splits = triton.cdiv(PROGRAMS, max(b, 1) * triton.cdiv(c, channels))
    return rows * triton.cdiv(n, rows * splits)


def _over_map(kernel: triton.JITFunction, h: Tensor, *tensors: Tensor) -> None:
    """Run a pass over h (b, n, c)."""
    b, n, c = h.shape
    if b > IMAGES:
        raise ValueError(f"a GPU takes at most {IMAGES:,} images at once, got {b:,}: make the batch smaller")
    turn, channels = _turn(h)
    rows = _rows(h)
    grid = (triton.cdiv(c, channels), triton.cdiv(n, rows), b)
    sizes = {"ROWS": turn, "CHANNELS": channels, "DTYPE": _accumulator(h)}
    kernel[grid](h, *tensors, n, c, rows, **sizes, num_warps=4, enable_fp_fusion=True)


def _over_images(kernel: triton.JITFunction, sums: Tensor, *tensors: Tensor, eps: float) -> None:
    """Run a kernel over the vectors of each image, from partial sums (b, splits, c)."""
    b, splits, c = sums.shape
    channels = min(triton.next_power_of_2(c), VECTOR)
    sizes = {"CHANNELS": channels, "EPS": eps, "DTYPE": _accumulator(sums)}
    kernel[b,](sums, *tensors, splits, c, **sizes, num_warps=4, enable_fp_fusion=True)


def _partial_sums(h: Tensor, *, maps: int) -> Tensor:
    """Memory for sums over sites (maps, b, splits, c)."""
    b, n, c = h.shape
    return h.new_empty(maps, b, triton.cdiv(n, _rows(h)), c, dtype=torch.promote_types(h.dtype, torch.float32))


def gelu_grn(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    h = h.contiguous()
    (squares,) = _partial_sums(h, maps=1)
    norm, scale, out = torch.empty_like(squares[:, 0]), torch.empty_like(squares[:, 0]), torch.empty_like(h)
    _over_map(_square_sums_kernel, h, squares)
    _over_images(_image_forward_kernel, squares, gamma.contiguous(), norm, scale, eps=eps)
    _over_map(_scale_kernel, h, scale, beta.contiguous(), out)
    return out, norm


def gelu_grn_backward(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation of this name."""
    grad, h, norm, gamma, beta = (tensor.contiguous() for tensor in (grad, h, norm, gamma, beta))
    (t,) = _partial_sums(h, maps=1)
    sums = _partial_sums(h, maps=3)  # of r t, of g, of dh
    scale, along = torch.empty_like(norm), torch.empty_like(norm)
    grad_h, out = torch.empty_like(h), torch.empty_like(h)
    _over_map(_grad_sums_kernel, h, grad, t, sums[1])
    _over_images(_image_backward_kernel, t, norm, gamma, scale, along, sums[0], eps=eps)
    _over_map(_backward_kernel, h, grad, scale, along, beta, grad_h, out, sums[2])
    return grad_h, out, sums.sum((1, 2))
