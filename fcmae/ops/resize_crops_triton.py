"""The Triton side of `resize_crops`: a warp computes a square of a channel, across from the crop or down from that.

Where a square reaches beyond the end, the last pixels or the first ones are computed again, and the same is stored.
"""

# How a kernel of Triton is launched, pyright does not know.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.ops.resize_crops import MOST_UNKNOWN

TILE = 32
"""Sides of the square: across, each thread has a column, whose pixels have the same weights; not yet tuned."""


@triton.jit
def _aim(place, length, size):
    """Where the filter of pixel `place` has its centre, how far it is stretched, its first pixel and how many."""
    scale = tl.div_rn(length.to(tl.float32), size * 1.0)  # exactly 1 where there is nothing to resize
    stretch = tl.maximum(scale, 1.0)
    centre = (place + 0.5) * scale
    first = tl.floor(centre - 2 * stretch + 0.5).to(tl.int32)
    return centre, stretch, first, tl.ceil(4 * stretch).to(tl.int32)


@triton.jit
def _weigh(source, centre, stretch, length):
    """The weight of pixel `source`, 0 beyond the end, and the nearest pixel that is there."""
    x = tl.abs(source + 0.5 - centre) / stretch
    cubic = tl.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = tl.where((source >= 0) & (source < length) & (x < 2), cubic, 0.0)
    return weight, tl.minimum(tl.maximum(source, 0), length - 1)


@triton.jit
def _as_pixels(values, MOST: tl.constexpr):
    """The nearest whole numbers from 0 to MOST, the even ones of two, in the low bits; without MOST as they are."""
    if MOST is not None:
        clamped = tl.minimum(tl.maximum(values, 0.0), MOST)
        values = (clamped + 8388608.0).to(tl.int32, bitcast=True)  # floats from 2^23 on are whole
    return values


# What differs from batch to batch is not specialised: that would compile a kernel for each way it can be divided.
@triton.jit(do_not_specialize=["rows", "stride_b", "stride_h"])
def _across_kernel(
    crops, extents, flipped, narrow, channels, rows, width, stride_b, stride_c, stride_h, stride_w,
    HOLES: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // channels
    channel = tl.program_id(0) % channels
    height = tl.load(extents + 2 * image)
    length = tl.load(extents + 2 * image + 1)
    if tl.program_id(1) * TILE >= height:
        return
    y = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    x = tl.minimum(tl.program_id(2) * TILE + tl.arange(0, TILE)[None, :], width - 1)
    line = crops + image.to(tl.int64) * stride_b + channel * stride_c + tl.minimum(y, height - 1) * stride_h
    seen = tl.where(tl.load(flipped + image), width - 1 - x, x)
    centre, stretch, first, taps = _aim(seen, length, width)
    total = tl.zeros((TILE, TILE), tl.float32)
    unknown = tl.zeros((TILE, TILE), tl.float32)
    weights = 0 * centre
    for tap in range(taps):
        weight, source = _weigh(first + tap, centre, stretch, length)
        value = tl.load(line + source * stride_w).to(tl.float32)
        if HOLES:
            unknown += tl.where(value == value, 0.0, weight)
            value = tl.where(value == value, value, 0.0)
        total += weight * value
        weights += weight
    planes = 2 * channels if HOLES else channels
    to = narrow + ((image.to(tl.int64) * planes + channel) * rows + y) * width + x
    tl.store(to, _as_pixels(total * (1 / weights), MOST), y < height)
    if HOLES:
        tl.store(to + channels * rows * width, unknown * (1 / weights), y < height)


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    narrow, extents, out, channels, rows, height, width,
    HOLES: tl.constexpr, MOST_UNKNOWN: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // channels
    channel = tl.program_id(0) % channels
    length = tl.load(extents + 2 * image)
    y = tl.minimum(tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None], height - 1)
    x = (tl.program_id(2) * TILE + tl.arange(0, TILE)[None, :]) % width
    planes = 2 * channels if HOLES else channels
    column = narrow + (image.to(tl.int64) * planes + channel) * rows * width + x
    centre, stretch, first, taps = _aim(y, length, height)
    total = tl.zeros((TILE, TILE), tl.float32)
    unknown = tl.zeros((TILE, TILE), tl.float32)
    weights = 0 * centre
    for tap in range(taps):
        weight, source = _weigh(first + tap, centre, stretch, length)
        total += weight * tl.load(column + source * width).to(tl.float32)
        if HOLES:
            unknown += weight * tl.load(column + channels * rows * width + source * width)
        weights += weight
    total *= 1 / weights
    if HOLES:
        unknown *= 1 / weights
        total /= tl.where(unknown > MOST_UNKNOWN, float("nan"), 1 - unknown)
    to = out + (tl.program_id(0).to(tl.int64) * height + y) * width + x
    tl.store(to, _as_pixels(total, MOST))


def resize_crops(crops: Tensor, extents: Tensor, flipped: Tensor, size: Sequence[int]) -> Tensor:
    """As the operation of this name."""
    b, c, rows, _ = crops.shape
    height, width = size
    whole = crops.dtype == torch.uint8  # between the axes, too
    holes = crops.dtype == torch.float32  # shares of what is unknown lie behind the channels
    most = None if holes else torch.iinfo(crops.dtype).max
    kept = torch.uint8 if whole else torch.float32
    narrow = crops.new_empty(b, 2 * c if holes else c, rows, width, dtype=kept)
    out = crops.new_empty(b, c, height, width)
    extents = extents.contiguous()
    _across_kernel[b * c, triton.cdiv(rows, TILE), triton.cdiv(width, TILE)](
        crops, extents, flipped.contiguous(), narrow, c, rows, width, *crops.stride(),
        HOLES=holes, MOST=most if whole else None, TILE=TILE, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    _down_kernel[b * c, triton.cdiv(height, TILE), triton.cdiv(width, TILE)](
        narrow, extents, out, c, rows, height, width,
        HOLES=holes, MOST_UNKNOWN=MOST_UNKNOWN, MOST=most, TILE=TILE, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out
