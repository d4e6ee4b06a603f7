"""Kinds of pixels (uint8, uint16, float32): range, no-data, conversion to floats; knows no files or views."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.errors import UserError

FULL: dict[torch.dtype, float] = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
"""What stands for 1.0 in `data.mean` and `data.std`, by kind; floats are taken as they are."""

EXACT = 2**24
"""Whole numbers up to it are float32 without rounding."""


class Reading(NamedTuple):
    """How pixels of files and arrays become those of a source: `data.dtype`, `data.nodata` and `data.window`."""

    dtype: torch.dtype | None = None
    """uint8, uint16 or float32; None for what is needed."""
    nodata: float | None = None
    """What stands for pixels that are not known, besides NaN and the value that a file names; NaN for these alone,
    None refuses images that have such."""
    window: bool = False
    """Whether a DICOM image's own window is applied, onto 0 to 1."""

    @classmethod
    def of(cls, data: Any) -> "Reading":
        """Take what a configuration's `data` section says.

        Raises:
            UserError: if its dtype has no NaN, which stands for no-data.
        """
        if data.nodata is not None and data.dtype not in (None, "float32"):
            raise UserError(f"data.dtype={data.dtype}: with data.nodata pixels are float32; set data.dtype=null")
        dtype = None if data.dtype is None else getattr(torch, data.dtype)
        return cls(dtype, None if data.nodata is None else float(data.nodata), data.window)

    def kind(self, found: torch.dtype) -> torch.dtype:
        """Return the kind of a source's pixels, where the files' is `found`."""
        return torch.float32 if self.nodata is not None else self.dtype or found


AS_STORED = Reading()
"""Pixels of the kind that files have, none of them no-data."""


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
    with np.errstate(over="ignore"):  # beyond float32 it is infinite, which is no-data or refused
        return numbers.astype(np.float32)


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether pixels of a kind hold all those of another."""
    return [*FULL].index(dtype) >= [*FULL].index(other)


def as_kind(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels as another kind that holds the same, full range onto full range: 255 becomes 65535 or 1.0.

    Raises:
        ValueError: if it does not.
    """
    if pixels.dtype == dtype:
        return pixels
    if not holds(dtype, pixels.dtype):
        name = kind_name(pixels.dtype)
        raise ValueError(f"{name} pixels among {kind_name(dtype)} ones; set data.dtype={name}")
    if dtype == torch.uint16:
        return (pixels.int() * 257).to(torch.uint16)
    return pixels.float() / FULL[pixels.dtype]


def without_nodata(pixels: np.ndarray, reading: Reading, tagged: float | None = None) -> np.ndarray:
    """Return pixels of which those that are not known are NaN, as float32; as they are where there is no no-data.

    Args:
        pixels: as they are in the file: uint8, uint16 or float32.
        reading: says what is not known, see `Reading.nodata`.
        tagged: the value that the file itself names as no-data.

    Raises:
        ValueError: if there are such, and `reading.nodata` is None.
    """
    finite = np.isfinite(pixels).all() if pixels.dtype.kind == "f" else True
    values = [np.float64(value) for value in (reading.nodata, tagged) if value is not None]
    with np.errstate(over="ignore"):  # a float64's lowest, which float32 does not have, is -inf
        values = [value.astype(np.float32) for value in values if np.isfinite(value)]
    unknown = np.logical_or.reduce([pixels == value for value in values]) if values else np.False_
    if reading.nodata is None:
        if not finite or unknown.any():
            what = f"pixels of {tagged:g}, which the file says are no-data" if finite else "NaN or infinite pixels"
            raise ValueError(f"{what}; set data.nodata=nan, which keeps them out")
        return pixels
    numbers = pixels.astype(np.float32) / np.float32(FULL[kind_of(pixels.dtype)])
    numbers[unknown | ~np.isfinite(numbers)] = np.nan
    return numbers
