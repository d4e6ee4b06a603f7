"""Class labels: as files beside the images, and numbered by another's class names; knows no pixels."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fcmae.data.npy import read_array, write_array
from fcmae.errors import UserError
from fcmae.files import write_text

LABELS, CLASSES = "labels.npy", "classes.txt"
"""Files beside an array of images: whole numbers (n,) from 0 on, and a class name per line.

Of tasks other than classification 0 and 1 (n, classes), or floats (n,) or (n, targets), and a name per column.
"""


MAX_CLASSES = 1 << 20
"""Classes at most; a larger label is a mistake, for which a classifier would take gigabytes."""


class Labelled(Protocol):
    """What has a class, or other labels, for each image."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,), each image's class from 0 on, or what else `LABELS` holds; None where images have none."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By label, or by column; None without labels, or where nothing names them."""
        ...


def check_labels(labels: np.ndarray, what: str) -> None:
    """Check that labels, whole numbers (n,), count classes from 0 on.

    Raises:
        UserError: if one is negative or beyond `MAX_CLASSES`; begins with `what`.
    """
    for extreme, image in ((labels.min(), labels.argmin()), (labels.max(), labels.argmax())):
        if not 0 <= extreme < MAX_CLASSES:
            raise UserError(f"{what}: label {extreme} of image {image}: classes count from 0 to {MAX_CLASSES:,}")


def are_classes(labels: np.ndarray) -> bool:
    """Whether labels are one class for each image: whole numbers (n,)."""
    return labels.ndim == 1 and labels.dtype.kind in "iu"


def num_columns(labels: np.ndarray) -> int:
    """Return how many numbers each image has in labels (n,) or (n, columns)."""
    return 1 if labels.ndim == 1 else labels.shape[1]


def are_named(labels: np.ndarray, number: int) -> bool:
    """Whether so many names do for labels: one for each class that occurs, or exactly one for each column."""
    return labels.max(initial=-1) < number if are_classes(labels) else num_columns(labels) == number


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(re.split("\r\n|\r|\n", text.rstrip()))


def check_class_names(names: Sequence[str]) -> None:
    """Check that class names can be written a line each, and read again as they were.

    Raises:
        ValueError: if one cannot.
    """
    for name in names:
        if not name or _names_in(name) != (name,) or name.encode(errors="replace") != name.encode(errors="ignore"):
            raise ValueError(
                f"class {name!r}: a class name must be one line of UTF-8 without spaces at its end; rename it"
            )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, a line each.

    Raises:
        UserError: if it is no text file.
    """
    try:
        return _names_in(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; write one class name per line") from error


def read_labels(folder: Path, num_images: int) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Read the labels and class names in a folder of `num_images` images; None for each file that is missing.

    Raises:
        UserError: if they are damaged or do not fit the images or each other.
    """
    path, names_path = folder / LABELS, folder / CLASSES
    if not path.is_file():
        return None, None
    labels = read_array(path)
    if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2) or 0 in labels.shape[1:]:
        raise UserError(f"{path}: expected numbers (n,) or (n, columns), found {labels.dtype} {labels.shape}")
    if len(labels) != num_images:
        raise UserError(f"{path}: {len(labels)} labels for the {num_images} images beside it; give one per image")
    if are_classes(labels):
        check_labels(labels, str(path))
        labels = np.asarray(labels, np.int64)
    if not names_path.is_file():
        return labels, None
    names = read_class_names(names_path)
    if not are_named(labels, len(names)):
        has = f"label {labels.max()}" if are_classes(labels) else f"{num_columns(labels)} columns"
        raise UserError(f"{names_path}: {len(names)} names, but {path} has {has}; one name per line")
    return labels, names


def write_labels(folder: Path, labels: np.ndarray | None, class_names: Sequence[str] | None) -> None:
    """Write what there is of labels and class names, to be read by `read_labels`."""
    if labels is not None:
        write_array(folder / LABELS, labels.astype(np.int64) if are_classes(labels) else labels)
    if class_names is not None:
        write_text(folder / CLASSES, "\n".join(class_names) + "\n")


def labels_by(source: Labelled, class_names: Sequence[str] | None, what: str) -> np.ndarray:
    """Return the labels of a source, int64 (n,), as numbers of another's `class_names`, where both have names.

    Args:
        source: such as the validation split, which may lack some of the classes.
        class_names: such as the training split's; None leaves the source's numbers.
        what: how messages name the source, such as "data.root=pets, split val".

    Raises:
        UserError: if it has no labels, or a class that is not among `class_names`.
    """
    if source.labels is None:
        raise UserError(
            f"{what}: no labels; put the images of each class into a sub-folder named for it and none beside them, "
            "or a labels.npy beside images.npy"
        )
    if not are_classes(source.labels):
        found = f"{source.labels.dtype} {source.labels.shape}"
        raise UserError(
            f"{what}: {LABELS} has {found}, but classes are whole numbers (n,); task=multilabel takes 0 and 1 "
            "(n, classes), task=regression floats (n, targets)"
        )
    if class_names is None or source.class_names is None or source.class_names == tuple(class_names):
        return source.labels
    number = {name: i for i, name in enumerate(class_names)}
    numbers = np.array([number.get(name, -1) for name in source.class_names], np.int64)
    labels = numbers[source.labels]
    if labels.min() < 0:
        name = source.class_names[source.labels[labels.argmin()]]
        raise UserError(f"{what}: class {name!r} is not among the {len(number)} classes of training")
    return labels
