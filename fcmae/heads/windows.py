"""Sliding-window inference: logits of large images, averaged over windows; knows no networks or files."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin that cover `length`: every `stride`, and the last at the end."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


class Windows(NamedTuple):
    """How large images are cut for a network."""

    window: tuple[int, int]
    """Height and width."""
    stride: tuple[int, int]
    """From window to window, down and across; at most the window's sides."""
    batch_size: int = 8
    """Windows that are given to the network at once."""


class Strip(NamedTuple):
    """Rows of an image's logits that are complete."""

    top: int
    logits: Tensor
    """(b, num_classes, rows, w)."""


def as_it_is(images: Tensor) -> Tensor:
    """Return images that are normalised already."""
    return images


def slide(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    windows: Windows,
    normalize: Callable[[Tensor], Tensor] = as_it_is,
) -> Iterator[Strip]:
    """Yield the logits of images strip by strip, from the top: the mean over all windows that see a pixel.

    Logits of one row of windows are in memory at a time, however large the images are.

    Args:
        network: (b, c, *window) -> logits (b, num_classes, *window).
        images: (b, c, h, w).
        windows: their size and distance.
        normalize: what the network sees of a window; zeros are then put below and on the right of a smaller image.

    Raises:
        ValueError: if windows would leave gaps.
    """
    window, stride, batch_size = windows
    if not all(0 < step <= side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"stride {stride} leaves gaps between windows of {window}; it is from 1 to these")
    height, width = images.shape[-2:]
    around = max(height, window[0]), max(width, window[1])
    missing = (0, around[1] - width, 0, around[0] - height)
    tops, lefts = (
        window_starts(length, side, step) for length, side, step in zip(around, window, stride, strict=True)
    )
    across = images.new_zeros(around[1], dtype=torch.float32)
    for left in lefts:
        across[left : left + window[1]] += 1
    places = [(left, i) for left in lefts for i in range(len(images))]  # of a row's windows
    sums, down = None, across.new_zeros(window[0])  # of the rows from `top` on
    for top, following in zip(tops, [*tops[1:], around[0]], strict=True):
        band = images[..., top : top + window[0], :]
        for first in range(0, len(places), batch_size):
            some = places[first : first + batch_size]
            seen = normalize(torch.stack([band[i, :, :, left : left + window[1]] for left, i in some]))
            logits = network(F.pad(seen, missing)).float()
            if sums is None:
                sums = logits.new_zeros(len(images), logits.shape[1], window[0], around[1])
            for (left, i), found in zip(some, logits, strict=True):
                sums[i, :, :, left : left + window[1]] += found
        assert sums is not None
        down += 1
        rows = following - top
        yield Strip(top, (sums[..., :rows, :] / (down[:rows, None] * across))[..., : height - top, :width])
        for kept in (sums, down[:, None]):  # in place, as all classes are a lot of memory
            kept[..., :-rows, :] = kept[..., rows:, :].clone()
            kept[..., -rows:, :] = 0


ROWS = 64
"""That are resized at a time."""


def resize_rows(logits: Tensor, size: tuple[int, int]) -> Iterator[Strip]:
    """Resize logits (b, num_classes, h, w) bilinearly to `size` (height, width), strip by strip from the top."""
    (height, width), least = size, logits.shape[2]
    for top in range(0, height, ROWS):
        places = torch.arange(top, min(top + ROWS, height), device=logits.device)
        rows = ((places + 0.5) * (least / height) - 0.5).clamp(0, least - 1)  # of pixels' centres
        above = rows.long()
        below = (above + 1).clamp(max=least - 1)
        tall = torch.lerp(logits[:, :, above].float(), logits[:, :, below].float(), (rows - above)[:, None])
        yield Strip(top, F.interpolate(tall, (len(places), width), mode="bilinear"))


def pixel_logits(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    windows: Windows | None = None,
    short_side: int | None = None,
    normalize: Callable[[Tensor], Tensor] = as_it_is,
) -> Iterator[Strip]:
    """Yield the logits of each pixel of images (b, c, h, w) strip by strip from the top.

    Args:
        network: images of any size -> logits (b, num_classes, h, w).
        images: (b, c, h, w), normalised, or what `normalize` takes: then of windows alone, one after another.
        windows: how to cut them; None gives the network whole images.
        short_side: of the images that the network sees, in pixels, to and from which all is resized; None leaves
            images as they are.
        normalize: from `images` to what the network sees.
    """
    height, width = images.shape[-2:]
    factor = short_side / min(height, width) if short_side else 1.0
    if factor != 1.0:
        size = round(height * factor), round(width * factor)
        images, normalize = F.interpolate(normalize(images), size, mode="bicubic", antialias=True), as_it_is
    if windows is None:
        strips = iter([Strip(0, network(normalize(images)))])
    else:
        strips = slide(network, images, windows, normalize)
    if factor == 1.0:
        yield from strips
    else:
        yield from resize_rows(torch.cat([strip.logits for strip in strips], 2), (height, width))
