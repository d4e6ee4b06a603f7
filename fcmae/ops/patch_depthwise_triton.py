"""The Triton side of `patch_depthwise`: the same formulas, accumulating in at least float32.

A program computes one line, the k sites side by side in one row of one patch, for a block of channels, and keeps
the k sums in registers: each site it reads serves all the sums within the kernel's reach. Where a line lies comes
from visible_ids, where its neighbours are stored from slots; a hidden neighbour is skipped with all its work.
"""

# What pyright does not know of Triton's language and launches:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes of the work, guessed from registers and not yet tuned on a GPU.
VALUES_PER_WARP = 1024
"""Sums that a warp holds: 32 registers of each thread."""
NORM_VALUES = 4096
"""Values of a program of the norm's backward pass, of four warps."""
CHANNELS = 128
"""Channels of a program, where it need not hold all of them."""
WEIGHT_PROGRAMS = 4096
"""Programs among which the sum over sites in the weight's gradient is split."""


@triton.jit
def _load_line(x, line, channels, SITES: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """The SITES sites of a stored line, as a tuple of blocks of channels; those not used cost nothing."""
    sites = ()
    for i in tl.static_range(SITES):
        address = x + (line * SITES + i) * C + channels
        sites += (tl.load(address, channels < C, other=0.0).to(DTYPE),)
    return sites


@triton.jit
def _add(sums, i: tl.constexpr, value):
    """The tuple `sums` with value added to its i-th."""
    return sums[:i] + (sums[i] + value,) + sums[i + 1 :]  # noqa: RUF005  (Triton knows no unpacking)


@triton.jit
def _place(visible_ids, line, p, gw, SITES: tl.constexpr):
    """The image of a stored line, its row of sites in that image, and its column of patches."""
    patch = line // SITES
    place = tl.load(visible_ids + patch).to(tl.int32)
    return patch // p, place // gw * SITES + line % SITES, place % gw


@triton.jit
def _find_line(slots, image, y, gx, p, gh, gw, SITES: tl.constexpr):
    """The stored line in row y of sites and column gx of patches, int64, or -1 where there is none."""
    inside = (y >= 0) & (y < gh * SITES) & (gx >= 0) & (gx < gw)
    slot = tl.load(slots + (image * gh + y // SITES) * gw + gx, inside, other=-1)
    line = (image.to(tl.int64) * p + slot) * SITES + y % SITES
    return tl.where(slot >= 0, line, -1)


@triton.jit
def _convolve_kernel(
    x, weight, bias, visible_ids, slots, out, rstd, p, gh, gw,
    C: tl.constexpr, SITES: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """weight is (SIZE, SIZE, C); with NORM, CHANNELS covers all C."""
    REACH: tl.constexpr = SIZE // 2
    PATCHES: tl.constexpr = (REACH + SITES - 1) // SITES  # within reach to either side
    line = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < C
    image, y, gx = _place(visible_ids, line, p, gw, SITES)
    start = tl.zeros((CHANNELS,), DTYPE)
    if BIAS:
        start += tl.load(bias + channels, inside, other=0.0).to(DTYPE)
    sums = (start,) * SITES
    for i in range(SIZE):
        for side in tl.static_range(-PATCHES, PATCHES + 1):
            source = _find_line(slots, image, y + i - REACH, gx + side, p, gh, gw, SITES)
            if source >= 0:
                sites = _load_line(x, source, channels, SITES, C, DTYPE)
                for shift in tl.static_range(1 - SITES, SITES):  # from a site to one of this patch that it reads
                    if shift + side * SITES >= -REACH and shift + side * SITES <= REACH:
                        offset = i * SIZE + shift + side * SITES + REACH
                        w = tl.load(weight + offset * C + channels, inside, other=0.0).to(DTYPE)
                        for site in tl.static_range(SITES):
                            if site + shift >= 0 and site + shift < SITES:
                                sums = _add(sums, site, sites[site + shift] * w)
    first = line.to(tl.int64) * SITES
    for site in tl.static_range(SITES):
        value = sums[site]
        if NORM:
            centred = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
            r = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + EPS)
            tl.store(rstd + first + site, r)
            value = centred * r
        tl.store(out + (first + site) * C + channels, value.to(out.dtype.element_ty), inside)


@triton.jit
def _weight_grads_kernel(
    grad, x, visible_ids, slots, partial, lines, p, gh, gw,
    C: tl.constexpr, SITES: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Row i of the weight, and the bias, summed over some lines into partial (splits, SIZE * SIZE + 1, C)."""
    REACH: tl.constexpr = SIZE // 2
    PATCHES: tl.constexpr = (REACH + SITES - 1) // SITES
    i = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    grad_bias = tl.zeros((CHANNELS,), DTYPE)
    sums = (tl.zeros((CHANNELS,), DTYPE),) * SIZE
    for line in range(split, lines, splits):
        image, y, gx = _place(visible_ids, line, p, gw, SITES)
        g = _load_line(grad, tl.cast(line, tl.int64), channels, SITES, C, DTYPE)
        for site in tl.static_range(SITES):
            grad_bias += g[site]
        for side in tl.static_range(-PATCHES, PATCHES + 1):
            source = _find_line(slots, image, y + i - REACH, gx + side, p, gh, gw, SITES)
            if source >= 0:
                sites = _load_line(x, source, channels, SITES, C, DTYPE)
                for j in tl.static_range(SIZE):
                    for site in tl.static_range(SITES):
                        if site + j - REACH >= side * SITES and site + j - REACH < (side + 1) * SITES:
                            sums = _add(sums, j, g[site] * sites[site + j - REACH - side * SITES])
    first = partial + split.to(tl.int64) * (SIZE * SIZE + 1) * C + channels
    for j in tl.static_range(SIZE):
        tl.store(first + (i * SIZE + j) * C, sums[j], channels < C)
    if i == 0:
        tl.store(first + SIZE * SIZE * C, grad_bias, channels < C)


@triton.jit
def _norm_backward_kernel(
    grad, out, rstd, grad_in, n, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    inside = (rows < n)[:, None] & (channels < C)[None, :]
    address = rows[:, None] * C + channels[None, :]
    g = tl.load(grad + address, inside, other=0.0).to(DTYPE)
    normed = tl.load(out + address, inside, other=0.0).to(DTYPE)
    r = tl.load(rstd + rows, rows < n, other=0.0)
    along = tl.sum(g * normed, 1) / C
    value = r[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - normed * along[:, None])
    tl.store(grad_in + address, value.to(grad_in.dtype.element_ty), inside)


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _warps(values: int) -> int:
    return min(max(values // VALUES_PER_WARP, 1), 8)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible_ids: Tensor,
    slots: Tensor,
    grid: Sequence[int],
    channels: int,
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The convolution in blocks of `channels`; with rstd, which it fills, the norm too."""
    b, p, k, _, c = x.shape
    out = x.new_empty(x.shape)
    _convolve_kernel[b * p * k, triton.cdiv(c, channels)](
        x.contiguous(),
        weight.flatten(1).t().contiguous(),
        None if bias is None else bias.contiguous(),
        visible_ids.contiguous(),
        slots.contiguous(),
        out,
        rstd,
        p,
        *grid,
        C=c,
        SITES=k,
        SIZE=weight.shape[-1],
        CHANNELS=channels,
        BIAS=bias is not None,
        NORM=rstd is not None,
        EPS=eps,
        DTYPE=_accumulator(x),
        num_warps=_warps(k * channels),
        enable_fp_fusion=True,
    )
    return out


def patch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, visible_ids: Tensor, slots: Tensor, grid: Sequence[int]
) -> Tensor:
    """As the operation of this name."""
    channels = min(triton.next_power_of_2(x.shape[-1]), CHANNELS)
    return _convolve(x, weight, bias, visible_ids, slots, grid, channels)


def patch_depthwise_norm_rstd(
    x: Tensor, weight: Tensor, bias: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    channels = triton.next_power_of_2(x.shape[-1])
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return _convolve(x, weight, bias, visible_ids, slots, grid, channels, rstd, eps), rstd


def patch_norm_backward(grad: Tensor, out: Tensor, rstd: Tensor) -> Tensor:
    """As the operation of this name."""
    c = grad.shape[-1]
    channels = triton.next_power_of_2(c)
    rows = max(NORM_VALUES // channels, 1)
    n = rstd.numel()
    grad_in = grad.new_empty(grad.shape)
    _norm_backward_kernel[triton.cdiv(n, rows),](
        grad.contiguous(),
        out.contiguous(),
        rstd.contiguous(),
        grad_in,
        n,
        C=c,
        ROWS=rows,
        CHANNELS=channels,
        DTYPE=_accumulator(grad),
    )
    return grad_in


def patch_depthwise_weight_grads(
    grad: Tensor, x: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    b, p, k, _, c = x.shape
    channels = min(triton.next_power_of_2(c), CHANNELS)
    blocks = triton.cdiv(c, channels)
    lines = b * p * k
    splits = min(max(WEIGHT_PROGRAMS // (size * blocks), 1), lines)
    dtype = torch.promote_types(x.dtype, torch.float32)
    partial = x.new_empty(splits, size * size + 1, c, dtype=dtype)
    _weight_grads_kernel[size, splits, blocks](
        grad.contiguous(),
        x.contiguous(),
        visible_ids.contiguous(),
        slots.contiguous(),
        partial,
        lines,
        p,
        *grid,
        C=c,
        SITES=k,
        SIZE=size,
        CHANNELS=channels,
        DTYPE=_accumulator(x),
        num_warps=_warps(k * channels),
        enable_fp_fusion=True,
    )
    sums = partial.sum(0)
    return sums[:-1].t().contiguous().view(c, 1, size, size), sums[-1].clone()
