"""One .npy file: its header checked against its size, read and written whole; knows not what its numbers mean."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from fcmae.errors import UserError, brief
from fcmae.files import atomic_file, require_regular

READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


class Header(NamedTuple):
    """What a .npy file says of its numbers, and where they begin."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int
    """In bytes."""


def read_header(path: Path, remedy: str = "") -> Header:
    """Read what a .npy file holds, and check that it holds all of that.

    Raises:
        UserError: if it is missing, damaged, cut off or holds anything but numbers; ends in `remedy`.
    """
    try:
        require_regular(path)
        with open(path, "rb") as file:
            read = READERS.get(npy_format.read_magic(file))
            if read is None:
                raise ValueError("its header is of a version for other than plain numbers")
            header = Header(*read(file), file.tell())
        if header.dtype.kind not in "biuf":
            raise ValueError(f"it holds {header.dtype}, not plain numbers")
        if any(length < 0 for length in header.shape):
            raise ValueError(f"its shape is {header.shape}")
        expected, found = math.prod(header.shape) * header.dtype.itemsize, path.stat().st_size - header.start
        if found < expected:
            raise ValueError(f"cut off: {found:,} bytes of {header.dtype} {header.shape}, which takes {expected:,}")
    except Exception as error:  # numpy evaluates the header as Python: a damaged one can raise anything
        raise UserError(f"{path}: not a readable .npy array ({brief(error)}){remedy}") from error
    return header


def read_array(path: Path, remedy: str = "") -> np.ndarray:
    """Read a .npy file whole, in whatever order of bytes and axes it was written.

    Raises:
        UserError: as `read_header`.
    """
    header = read_header(path, remedy)
    order = "F" if header.fortran_order else "C"
    numbers = np.fromfile(path, header.dtype, math.prod(header.shape), offset=header.start)
    if len(numbers) != math.prod(header.shape):
        raise UserError(f"{path}: not a readable .npy array (cut off){remedy}")
    return numbers.reshape(header.shape, order=order)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file atomically: under its name there is never a part of it."""
    with atomic_file(path) as file:
        np.save(file, values, allow_pickle=False)
