"""One .npy file: mapped from disk and written whole; knows nothing of what its numbers mean."""

from pathlib import Path

import numpy as np

from fcmae.errors import UserError
from fcmae.files import atomic_file


def map_array(path: Path, remedy: str = "") -> np.ndarray:
    """Memory-map a .npy file.

    Raises:
        UserError: if it is missing, damaged or holds Python objects; ends in `remedy`.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy array ({error}){remedy}") from error


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file atomically: under its name there is never a part of it."""
    with atomic_file(path) as file:
        np.save(file, values, allow_pickle=False)
