"""Images in a dataset of Hugging Face's that lies on a disk as Arrow files; knows the columns, no pixels."""

import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from fcmae.data.labels import MAX_CLASSES
from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile

STATE, INFO = "state.json", "dataset_info.json"
"""The files that `Dataset.save_to_disk` writes beside those of the rows."""

IMAGE, LABEL = "image", "label"
"""The columns that are taken where several could be meant."""


def holds_arrow(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (STATE, INFO))


def _choose(columns: list[str], usual: str) -> str | None:
    return usual if usual in columns else columns[0] if len(columns) == 1 else None


class ArrowFiles:
    """The image files in the rows of a dataset that `Dataset.save_to_disk` wrote, mapped into memory as they are.

    Raises:
        UserError: if it cannot be read, or no column of images is meant.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"{folder}: a dataset of Hugging Face's needs a package that is missing: pip install datasets"
            ) from error
        try:
            dataset: Any = datasets.load_from_disk(folder)
            features: dict[str, Any] = dict(dataset.features)
        except Exception as error:  # what datasets and pyarrow raise for a damaged one
            raise UserError(f"{folder}: not a readable dataset of Hugging Face's ({brief(error)})") from error
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        self.column = _choose(images, IMAGE)
        if self.column is None:
            found = f"columns of images: {', '.join(images)}" if images else f"columns: {', '.join(features)}"
            raise UserError(f"{folder}: no one column of images in it ({found}); rename or cast one to {IMAGE}")
        self.rows = dataset.cast_column(self.column, datasets.Image(decode=False))
        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        column = _choose(classes, LABEL) or (LABEL if LABEL in features else None)
        labels = np.asarray([] if column is None else dataset.with_format("numpy")[column][:])
        are_classes = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) > 0
        self.labels = None
        self.class_names: tuple[str, ...] | None = None
        if are_classes and 0 <= labels.min() <= labels.max() < MAX_CLASSES:  # -1 is for those kept secret
            self.labels = labels.astype(np.int64)
            names = getattr(features[str(column)], "names", None)
            self.class_names = tuple(names) if names else None

    @property
    def ends(self) -> Collection[str]:
        """None: rows have no names."""
        return ()

    def __reduce__(self) -> tuple[type["ArrowFiles"], tuple[str]]:
        return ArrowFiles, (self.folder,)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.folder}[{index}]"

    def open(self, index: int) -> IO[bytes]:
        image = self.rows[int(index)][self.column]
        if image is None:
            raise ValueError("a row without an image")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else BoundedFile(Path(image["path"]))
