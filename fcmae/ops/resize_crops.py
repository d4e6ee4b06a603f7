"""Crops of different sizes resized to one, antialiased bicubic, along each row and then along each column.

With s = extent / size along an axis, pixel i of the result takes of the crop's pixel j, up to a common factor,

    k((j + 0.5 - (i + 0.5) s) / max(s, 1)),    k(x) = 1.5 |x|^3 - 2.5 |x|^2 + 1          where |x| < 1
                                                      -0.5 |x|^3 + 2.5 |x|^2 - 4 |x| + 2  where |x| < 2

which is Pillow's and torch's filter: Keys' kernel with a = -0.5, stretched where pixels get fewer. Between the axes
uint8 is rounded, as they do. NaN is unknown, of float32 alone: with u the share of such in a pixel's weight, it is
sum(weight * known) / (1 - u), or NaN where u is more than a half.

On CUDA each axis is a launch of a Triton kernel, which reads the few pixels that have a weight. The formulas are
products with all weights, most of them 0: on a CPU torchvision, crop by crop, is many times as fast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcmae.ops.operation import operation

MOST_UNKNOWN = 0.501
"""Share of a resized pixel's weight up to which the rest makes it up: a half, however that is rounded."""

CHUNK = 64
"""Crops that the formulas resize at once, which bounds the memory for float32 copies."""


def split_unknown(pixels: Tensor) -> Tensor:
    """Return pixels (..., c, h, w) with 0 for what is not known, and then whether it is not: (..., 2 c, h, w)."""
    unknown = pixels.isnan()
    return torch.cat([pixels.masked_fill(unknown, 0), unknown.to(pixels.dtype)], dim=-3)


def reweigh(resized: Tensor) -> Tensor:
    """Turn what `split_unknown` gave, resized, into the weighted mean of known pixels; NaN where they are few.

    Where all are known the values stay as they are.
    """
    values, unknown = resized.chunk(2, dim=-3)
    return torch.where(unknown > MOST_UNKNOWN, torch.nan, values / (1 - unknown))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float values as pixels of a kind: whole numbers within its range, floats as they are."""
    if dtype == torch.float32:
        return values
    return values.round().clamp(0, torch.iinfo(dtype).max).to(dtype)


def _cubic_weights(lengths: Tensor, longest: int, size: int, flipped: Tensor | None = None) -> Tensor:
    """Return what each of `size` pixels takes of the first `lengths` (b,) of `longest`, (b, size, longest)."""
    device = lengths.device
    places = torch.arange(size, device=device).expand(len(lengths), size)
    if flipped is not None:
        places = torch.where(flipped[:, None], size - 1 - places, places)
    scale = lengths[:, None] / size
    centres = (places + 0.5) * scale  # (b, size), in pixels of the source
    sources = torch.arange(longest, device=device) + 0.5
    x = ((sources - centres[..., None]) / scale.clamp(min=1)[..., None]).abs()  # (b, size, longest)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0)) * (sources < lengths[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


@operation(fake=lambda crops, _extents, _flipped, size: crops.new_empty(*crops.shape[:2], *size))
def resize_crops(crops: Tensor, extents: Tensor, flipped: Tensor, size: Sequence[int]) -> Tensor:
    """Resize and flip crops of different sizes, all of a batch together, on whatever device they are.

    The same antialiased bicubic filter as `RandomView` applies one by one. Nearly all pixels are the same; some
    differ by a level of 255, one in 10,000 at most by two, as torch's CPU kernel rounds its weights. Without a wait
    for the device, whether there are unknown pixels or not.

    Args:
        crops: pixels (b, c, h, w), uint8, uint16 or float32, each crop in the upper left corner, in any order of
            memory; what lies beyond a crop never matters.
        extents: int (b, 2), height and width of each crop.
        flipped: bool (b,).
        size: height and width of the result.

    Returns:
        Pixels (b, c, *size).
    """
    done: list[Tensor] = []
    for some, extent, flip in zip(*(t.split(CHUNK) for t in (crops, extents, flipped)), strict=True):
        heights, widths = extent.unbind(1)
        across = _cubic_weights(widths, some.shape[3], size[1], flip)
        down = _cubic_weights(heights, some.shape[2], size[0])
        exact = split_unknown(some) if crops.dtype == torch.float32 else some.float()
        narrow = torch.einsum("bchw,bjw->bchj", exact, across)
        if crops.dtype == torch.uint8:
            narrow = narrow.round_().clamp_(0, 255)
        resized = torch.einsum("bih,bchj->bcij", down, narrow)
        done.append(reweigh(resized) if crops.dtype == torch.float32 else rounded(resized, crops.dtype))
    return torch.cat(done).contiguous()
