"""The Triton side of `patch_depthwise`: the same formulas, accumulating in at least float32.

A program computes a strip, a row or two of sites of one patch, for a block of channels, and keeps its sums in
registers, as a tuple (written out in the loop: a function for each sum would double the time to compile): each site
it reads serves all the sums within the kernel's reach. Where a strip lies comes from visible_ids, where its
neighbours are stored from slots; a hidden neighbour is skipped with all its work.
"""

# What pyright does not know of Triton's language and launches:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes of the work, from code compiled for a Hopper and not yet tuned on a GPU; what has been measured on a kind of
# GPU belongs here. They are not measured at a run's start: there the first step may be recorded as a CUDA graph, in
# which nothing can be timed, and those of the weight's gradient say in which order is summed.
ROWS = {8: 1, 4: 1, 2: 2, 1: 1}
"""Rows of sites of a strip, by sites per patch side: two share what is read, four do not fit into registers."""
VALUES_PER_WARP = 1024
"""Sums that a warp holds: 32 registers of each thread."""
NORM_VALUES = 4096
"""Values of a program of the norm's backward pass, of four warps."""
WEIGHT_CHANNELS = 64
"""Channels of a program of the weight's gradient: one warp holds a sum for each and each value of the kernel. Twice
as many fit into registers where sites are few and of half precision."""
WEIGHT_PROGRAMS = 1056
"""Programs among which the sum over sites in the weight's gradient is split, eight for each multiprocessor of a
Hopper. It says in which order is summed, so that it is the same wherever a run is resumed."""


@triton.jit
def _load_sites(strip, inside, COUNT: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """The COUNT sites from a pointer on, as a tuple of blocks of channels; those not used cost nothing."""
    sites = ()
    for i in tl.static_range(COUNT):
        sites += (tl.load(strip + i * C, inside, other=0.0).to(DTYPE),)
    return sites


@triton.jit
def _place(visible_ids, strip, p, gw, STRIPS: tl.constexpr):
    """The image of a stored strip, of STRIPS in a patch, its row of strips there, and its column of patches."""
    patch = strip // STRIPS
    place = tl.load(visible_ids + patch).to(tl.int32)
    return patch // p, place // gw * STRIPS + strip % STRIPS, place % gw


@triton.jit
def _row_of_slots(slots, image, y, gx, gh, gw, STRIPS: tl.constexpr):
    """Where the slots of row y of strips are, a pointer to column gx of patches, and whether the row exists."""
    inside = (y >= 0) & (y < gh * STRIPS)
    return slots + ((image * gh + y // STRIPS) * gw + gx), inside


@triton.jit
def _convolve_kernel(
    x, weight, bias, visible_ids, slots, out, rstd, p, gh, gw,
    C: tl.constexpr, SITES: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """weight is (SIZE, SIZE, C); with NORM, CHANNELS covers all C."""
    REACH: tl.constexpr = SIZE // 2
    STRIPS: tl.constexpr = SITES // ROWS
    ABOVE: tl.constexpr = (REACH + ROWS - 1) // ROWS  # strips within reach above and below
    BESIDE: tl.constexpr = (REACH + SITES - 1) // SITES  # patches within reach to either side
    strip = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channels < C) | (C % CHANNELS == 0)  # all, as the compiler sees
    image, y, gx = _place(visible_ids, strip, p, gw, STRIPS)
    start = tl.zeros((CHANNELS,), DTYPE)
    if BIAS:
        start += tl.load(bias + channels, inside, other=0.0).to(DTYPE)
    sums = (start,) * (ROWS * SITES)
    x += channels
    weight += channels
    for above in range(-ABOVE, ABOVE + 1):
        row_of_slots, row_inside = _row_of_slots(slots, image, y + above, gx, gh, gw, STRIPS)
        for side in tl.static_range(-BESIDE, BESIDE + 1):
            slot = tl.load(row_of_slots + side, row_inside & (gx + side >= 0) & (gx + side < gw), other=-1)
            if slot >= 0:
                source = ((image * p + slot) * STRIPS + (y + above) % STRIPS).to(tl.int64)
                sites = _load_sites(x + source * (ROWS * SITES * C), inside, ROWS * SITES, C, DTYPE)
                for down in tl.static_range(1 - ROWS, ROWS):  # from a row to one that it reads, in their strips
                    i = above * ROWS + down + REACH
                    if (ROWS == 1) | ((i >= 0) & (i < SIZE)):
                        weight_row = weight + i * (SIZE * C)
                        for right in tl.static_range(1 - SITES, SITES):
                            if right + side * SITES >= -REACH and right + side * SITES <= REACH:
                                at = weight_row + (right + side * SITES + REACH) * C
                                w = tl.load(at, inside, other=0.0).to(DTYPE)
                                for s in tl.static_range(ROWS * SITES):
                                    if (
                                        (s // SITES + down >= 0 and s // SITES + down < ROWS)
                                        and (s % SITES + right >= 0 and s % SITES + right < SITES)
                                    ):  # fmt: skip
                                        value = sums[s] + sites[s + down * SITES + right] * w
                                        sums = sums[:s] + (value,) + sums[s + 1 :]  # noqa: RUF005
    first = strip.to(tl.int64) * (ROWS * SITES)
    for site in tl.static_range(ROWS * SITES):
        value = sums[site]
        if NORM:
            centred = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
            r = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + EPS)
            tl.store(rstd + first + site, r)
            value = centred * r
        tl.store(out + (first + site) * C + channels, value.to(out.dtype.element_ty), inside)


@triton.jit
def _weight_grads_kernel(
    grad, x, visible_ids, slots, partial, strips, turns, p, gh, gw,
    C: tl.constexpr, SITES: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias, summed over `turns` strips into partial (splits, SIZE * SIZE + 1, C)."""
    REACH: tl.constexpr = SIZE // 2
    STRIPS: tl.constexpr = SITES // ROWS
    ABOVE: tl.constexpr = (REACH + ROWS - 1) // ROWS
    BESIDE: tl.constexpr = (REACH + SITES - 1) // SITES
    split = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channels < C) | (C % CHANNELS == 0)  # all, as the compiler sees
    grad += channels
    x += channels
    grad_bias = tl.zeros((CHANNELS,), DTYPE)
    sums = (tl.zeros((CHANNELS,), DTYPE),) * (SIZE * SIZE)
    for strip in range(split * turns, tl.minimum((split + 1) * turns, strips)):
        image, y, gx = _place(visible_ids, strip, p, gw, STRIPS)
        first = grad + tl.cast(strip, tl.int64) * (ROWS * SITES * C)
        g = _load_sites(first, inside, ROWS * SITES, C, DTYPE)
        for site in tl.static_range(ROWS * SITES):
            grad_bias += g[site]
        for above in tl.static_range(-ABOVE, ABOVE + 1):
            row_of_slots, row_inside = _row_of_slots(slots, image, y + above, gx, gh, gw, STRIPS)
            for side in tl.static_range(-BESIDE, BESIDE + 1):
                slot = tl.load(row_of_slots + side, row_inside & (gx + side >= 0) & (gx + side < gw), other=-1)
                if slot >= 0:
                    source = ((image * p + slot) * STRIPS + (y + above) % STRIPS).to(tl.int64)
                    strip_there = x + source * (ROWS * SITES * C)
                    # Rows and columns are counted from the first site here.
                    for row in tl.static_range(above * ROWS, above * ROWS + ROWS):
                        for column in tl.static_range(side * SITES, side * SITES + SITES):
                            at = strip_there + ((row - above * ROWS) * SITES + column - side * SITES) * C
                            read = tl.load(at, inside, other=0.0).to(DTYPE)
                            for i in tl.static_range(SIZE):
                                if row + REACH - i >= 0 and row + REACH - i < ROWS:
                                    for j in tl.static_range(SIZE):
                                        if column + REACH - j >= 0 and column + REACH - j < SITES:
                                            value = g[(row + REACH - i) * SITES + column + REACH - j] * read
                                            value += sums[i * SIZE + j]
                                            sums = (
                                                sums[: i * SIZE + j] + (value,) + sums[i * SIZE + j + 1 :]  # noqa: RUF005
                                            )
    partial += split.to(tl.int64) * (SIZE * SIZE + 1) * C + channels
    for offset in tl.static_range(SIZE * SIZE):
        tl.store(partial + offset * C, sums[offset], inside)
    tl.store(partial + SIZE * SIZE * C, grad_bias, inside)


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
    return min(triton.next_power_of_2(max(values // VALUES_PER_WARP, 1)), 8)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible_ids: Tensor,
    slots: Tensor,
    grid: Sequence[int],
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The convolution; with rstd, which it fills, the norm too."""
    b, p, k, _, c = x.shape
    rows = ROWS.get(k, 1)
    channels = triton.next_power_of_2(c)
    if rstd is None:
        channels = min(channels, triton.next_power_of_2(VALUES_PER_WARP // (rows * k)))
    out = x.new_empty(x.shape)
    _convolve_kernel[b * p * k // rows, triton.cdiv(c, channels)](
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
        ROWS=rows,
        SIZE=weight.shape[-1],
        CHANNELS=channels,
        BIAS=bias is not None,
        NORM=rstd is not None,
        EPS=eps,
        DTYPE=_accumulator(x),
        num_warps=_warps(rows * k * channels),
        enable_fp_fusion=True,
    )
    return out


def patch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, visible_ids: Tensor, slots: Tensor, grid: Sequence[int]
) -> Tensor:
    """As the operation of this name."""
    return _convolve(x, weight, bias, visible_ids, slots, grid)


def patch_depthwise_norm_rstd(
    x: Tensor, weight: Tensor, bias: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return _convolve(x, weight, bias, visible_ids, slots, grid, rstd, eps), rstd


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
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_in


def patch_depthwise_weight_grads(
    grad: Tensor, x: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    b, p, k, _, c = x.shape
    rows = ROWS.get(k, 1)
    widest = 2 * WEIGHT_CHANNELS if k < 8 and x.dtype.itemsize == 2 else WEIGHT_CHANNELS
    channels = min(triton.next_power_of_2(c), widest)
    blocks = triton.cdiv(c, channels)
    strips = b * p * k // rows
    turns = max(triton.cdiv(strips, max(WEIGHT_PROGRAMS // blocks, 1)), 1)
    splits = triton.cdiv(strips, turns)
    dtype = torch.promote_types(x.dtype, torch.float32)
    partial = x.new_empty(splits, size * size + 1, c, dtype=dtype)
    _weight_grads_kernel[splits, blocks](
        grad.contiguous(),
        x.contiguous(),
        visible_ids.contiguous(),
        slots.contiguous(),
        partial,
        strips,
        turns,
        p,
        *grid,
        C=c,
        SITES=k,
        ROWS=rows,
        SIZE=size,
        CHANNELS=channels,
        DTYPE=_accumulator(x),
        num_warps=1,
        enable_fp_fusion=True,
    )
    sums = partial.sum(0)
    return sums[:-1].t().contiguous().view(c, 1, size, size), sums[-1].clone()
