"""Images as one array, `images.npy`: mapped, cropped and saved; knows no image files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.data.labels import CLASSES, LABELS, read_labels, write_labels
from fcmae.data.npy import map_array, write_array
from fcmae.data.views import Part, whole
from fcmae.errors import UserError

IMAGES = "images.npy"


class ArraySource:
    """`FOLDER/images.npy`: uint8 (n, h, w, c) or (n, h, w), memory-mapped, with labels where they lie beside it."""

    def __init__(self, folder: Path) -> None:
        path = folder / IMAGES
        images = map_array(path)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(
                f"{path}: expected uint8 images (n, h, w, c), found {images.dtype} {images.shape}; "
                "fcmae.data.save_arrays writes them"
            )
        self.folder = folder
        self.place = path.resolve()
        self.images = images if images.ndim == 4 else images[..., None]
        self.channels = self.images.shape[-1]
        self.labels, self.class_names = read_labels(folder, len(images))

    def __reduce__(self) -> tuple[type["ArraySource"], tuple[Path]]:
        return ArraySource, (self.folder,)  # workers map the file again instead of copying it

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        top, left, height, width, _ = choose(*self.images.shape[1:3])
        part = self.images[index, top : top + height, left : left + width]
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.folder / IMAGES}[{index}]"


def save_arrays(
    folder: str | Path,
    images: np.ndarray,
    labels: np.ndarray | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write uint8 images (n, h, w, c) as `folder/images.npy`, to be read with `data.name=arrays`; returns its path.

    Labels, whole numbers (n,) from 0 on, go into `labels.npy` beside it, their names into `classes.txt`.

    Raises:
        ValueError: if shapes, types or numbers do not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (n, h, w, c), got {images.dtype} {images.shape}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min(initial=0) < 0:
            raise ValueError(f"labels must be whole numbers from 0 on, one for each of {len(images)} images")
    if class_names is not None:
        if labels is None or labels.max(initial=-1) >= len(class_names):
            raise ValueError(f"{len(class_names)} class names do not fit the labels")
        if any(name != name.strip() or len(name.splitlines()) != 1 for name in class_names):
            raise ValueError("a class name must be one line, without spaces around it")
    path = Path(folder, IMAGES)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (LABELS, CLASSES):
        path.with_name(stale).unlink(missing_ok=True)
    write_array(path, images)
    write_labels(path.parent, labels, class_names)
    return path
