"""Images as one array, `images.npy`: read in parts, cropped and saved; knows no image files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.data.labels import (
    CLASSES,
    LABELS,
    are_classes,
    are_named,
    check_class_names,
    read_labels,
    write_labels,
)
from fcmae.data.npy import read_header, write_array
from fcmae.data.order import Shards
from fcmae.data.pixels import Reading, as_kind, is_pixels, kind_of, native, without_nodata
from fcmae.data.views import Part, whole
from fcmae.errors import UserError
from fcmae.files import SharedFile

IMAGES = "images.npy"

AT_ONCE = 1 << 18
"""Bytes that are read at once, which stay in the processor's cache until they are copied."""


class ArraySource:
    """`FOLDER/images.npy`: pixels (n, h, w, c) or (n, h, w), with labels where they lie beside it.

    Only the rows that are seen are read. The file is not mapped: one that is cut off meanwhile is an error, and not
    the end of the process.
    """

    shards: Shards | None = None

    def __init__(self, folder: Path, reading: Reading) -> None:
        path = folder / IMAGES
        header = read_header(path)
        if not is_pixels(header.dtype) or len(header.shape) not in (3, 4) or 0 in header.shape:
            raise UserError(
                f"{path}: expected uint8, uint16 or float32 images (n, h, w, c), found {header.dtype} "
                f"{header.shape}; fcmae.data.save_arrays writes them"
            )
        self.stored = header.dtype
        self.reading, self.dtype = reading, reading.kind(kind_of(header.dtype))
        if header.fortran_order:
            raise UserError(
                f"{path}: in Fortran order, which has each image all over the file; "
                "fcmae.data.save_arrays writes one after the other"
            )
        self.folder = folder
        self.place = path.resolve()
        self.file = SharedFile(path)
        self.start = header.start
        self.shape = (*header.shape, 1)[:4]
        """(n, h, w, c)."""
        self.channels = self.shape[3]
        self.labels, self.class_names = read_labels(folder, len(self))

    def __reduce__(self) -> tuple[type["ArraySource"], tuple[Path, Reading]]:
        return ArraySource, (self.folder, self.reading)  # workers open the file again

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, index: int) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        _, image_height, image_width, channels = self.shape
        top, left, height, width, _ = choose(image_height, image_width)
        row = image_width * channels * self.stored.itemsize
        start = self.start + (index * image_height + top) * row
        part = np.empty((height, width, channels), self.stored)
        at_once = max(1, AT_ONCE // row)
        for first in range(0, height, at_once):
            number = min(at_once, height - first)
            rows = np.frombuffer(self.file.read(start + first * row, number * row), self.stored)
            part[first : first + number] = rows.reshape(number, image_width, channels)[:, left : left + width]
        pixels = torch.from_numpy(without_nodata(native(part), self.reading))
        return as_kind(pixels, self.dtype).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.folder / IMAGES}[{index}]"


def save_arrays(
    folder: str | Path,
    images: np.ndarray,
    labels: np.ndarray | Sequence[int] | Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write images as `folder/images.npy`, to be read with `data.name=arrays`; returns its path.

    They are (n, h, w, c), or gray (n, h, w), of uint8, uint16 or float32, and stay so; NaN where nothing is known.

    Labels, whole numbers (n,) from 0 on, go into `labels.npy` beside it, their names into `classes.txt`; and so do
    those of task=multilabel, 0 and 1 (n, classes), and of task=regression, floats (n,) or (n, targets), with a name
    for each column.

    Raises:
        ValueError: if shapes, types or numbers do not fit.
    """
    if not is_pixels(images.dtype) or images.ndim not in (3, 4):
        raise ValueError(
            f"images must be uint8, uint16 or float32 (n, h, w, c) or (n, h, w), got {images.dtype} {images.shape}"
        )
    if images.ndim == 3 and images.shape[2] <= 4:
        raise ValueError(f"{images.shape} looks like one image; give (1, h, w, c), or gray as (n, h, w, 1)")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2):
            raise ValueError(f"labels must be numbers (n,) or (n, columns), got {labels.dtype} {labels.shape}")
        if len(labels) != len(images) or (are_classes(labels) and labels.min(initial=0) < 0):
            raise ValueError(f"labels must be whole numbers from 0 on, one for each of {len(images)} images")
    if class_names is not None:
        if labels is None or not are_named(labels, len(class_names)):
            raise ValueError(f"{len(class_names)} class names do not fit the labels")
        check_class_names(class_names)
    path = Path(folder, IMAGES)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (LABELS, CLASSES):
        path.with_name(stale).unlink(missing_ok=True)
    write_array(path, np.ascontiguousarray(images))  # one image after the other
    write_labels(path.parent, labels, class_names)
    return path
