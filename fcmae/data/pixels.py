"""The kinds of pixels, uint8, uint16 and float32: their range, in and out of floats; knows no files or views."""

import numpy as np
import torch
from torch import Tensor

FULL: dict[torch.dtype, float] = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
"""What stands for 1.0 in `data.mean` and `data.std`, by kind; floats are taken as they are."""

EXACT = 2**24
"""Whole numbers up to it are float32 without rounding."""


def kind_name(dtype: torch.dtype) -> str:
    """Return what a kind is called in a configuration, such as "uint16"."""
    return str(dtype).removeprefix("torch.")


def kind_of(dtype: np.dtype) -> torch.dtype:
    """Return the kind of pixels that numbers of a type become."""
    return {("b", 1): torch.uint8, ("u", 1): torch.uint8, ("u", 2): torch.uint16}.get(
        (dtype.kind, dtype.itemsize), torch.float32
    )


def is_pixels(dtype: np.dtype) -> bool:
    """Whether numbers of a type, in any order of bytes, are pixels as they are."""
    return (dtype.kind, dtype.itemsize) in (("u", 1), ("u", 2), ("f", 4))


def native(pixels: np.ndarray) -> np.ndarray:
    """Return pixels in this machine's order of bytes; without a copy where they are."""
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def as_pixels(numbers: np.ndarray) -> np.ndarray:
    """Return numbers of any type as pixels of one of the kinds, changing none but by the rounding of float32.

    uint8 and uint16 stay, bits become 0 and 255, all others float32.

    Raises:
        ValueError: if they are no numbers, or whole ones too large for float32.
    """
    if numbers.dtype.kind == "b":
        return numbers.astype(np.uint8) * 255
    if is_pixels(numbers.dtype):
        return native(numbers)
    if numbers.dtype.kind in "iu" and numbers.dtype.itemsize > 2 and numbers.size:
        least, most = int(numbers.min()), int(numbers.max())
        if not -EXACT <= least <= most <= EXACT:
            raise ValueError(f"whole numbers from {least:,} to {most:,}, which float32 does not hold; divide them")
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"{numbers.dtype} in place of pixels")
    return numbers.astype(np.float32)


def as_kind(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels as another kind that holds the same: uint8 as uint16, where 255 becomes 65535.

    Raises:
        ValueError: if it does not.
    """
    if pixels.dtype == dtype:
        return pixels
    if (pixels.dtype, dtype) == (torch.uint8, torch.uint16):
        return (pixels.int() * 257).to(torch.uint16)
    raise ValueError(
        f"{kind_name(pixels.dtype)} pixels among {kind_name(dtype)} ones; "
        + ("set data.dtype=uint16" if (pixels.dtype, dtype) == (torch.uint16, torch.uint8) else "take them apart")
    )


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float values as pixels of a kind: whole numbers within its range, floats as they are."""
    if dtype == torch.float32:
        return values
    return values.round().clamp(0, FULL[dtype]).to(dtype)
