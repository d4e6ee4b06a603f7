"""Labels of several columns for each image, classes or numbers, from CSV files or arrays; knows no network."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fcmae.config import ImageConfig
from fcmae.data import Source, derive_seed
from fcmae.data.labels import LABELS, num_columns
from fcmae.data.sources import Subset
from fcmae.data.tables import Row, Table, match_rows, read_table
from fcmae.errors import UserError

Labels = tuple[np.ndarray, tuple[str, ...] | None]
"""(n, columns), and what the columns are called."""


def read_targets(
    config: ImageConfig,
    source: Source,
    what: str,
    *,
    validation: bool,
    of_table: Callable[[Table, Sequence[Row]], Labels],
    dtypes: str,
    wanted: str,
) -> Labels:
    """Return the labels of a source's images from `data.labels`, or beside its arrays.

    Args:
        what: how messages name the source.
        validation: take `data.val_labels`, where there are any.
        of_table: converts rows of a CSV file.
        dtypes: kinds of NumPy's that arrays of labels may be of.
        wanted: what such arrays are, for messages.

    Raises:
        UserError: if there are none, or they are not of this task.
    """
    data = config.data
    path = data.val_labels or data.labels if validation else data.labels
    if path is not None:
        table = read_table(Path(path))
        return of_table(table, match_rows(table, source, {data.root, data.val_root or data.root}, what))
    if data.name != "arrays":
        raise UserError(
            f"{what}: no labels for task={config.task}; name a CSV file, whose first column is file, with "
            "data.labels=FILE.csv"
        )
    if source.labels is None:
        raise UserError(f"{what}: no {LABELS} for task={config.task}; save {wanted} with fcmae.data.save_arrays")
    if source.labels.dtype.kind not in dtypes:
        found = f"{source.labels.dtype} {source.labels.shape}"
        raise UserError(f"{what}: {LABELS} has {found}, but task={config.task} takes {wanted}")
    return source.labels.reshape(len(source), num_columns(source.labels)), source.class_names


def require_outputs(config: ImageConfig, names: Sequence[str], what: str) -> None:
    """Check that there are `model.num_classes` outputs, where that is given.

    Raises:
        UserError: if not.
    """
    if config.model.num_classes not in (None, len(names)):
        raise UserError(
            f"model.num_classes={config.model.num_classes}: {what} has {len(names)} columns of labels "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); null takes as many as there are"
        )


def columns_by(labels: Labels, names: Sequence[str], what: str) -> np.ndarray:
    """Return the columns of labels as `names` has them; those without names are in that order.

    Raises:
        UserError: if there are others.
    """
    values, own = labels
    if own is None:
        if values.shape[1] != len(names):
            raise UserError(f"{what}: {values.shape[1]} columns of labels, but training has {len(names)}")
        return values
    for first, second, problem in (
        (own, names, "is not among those of training"),
        (names, own, "of training is missing"),
    ):
        if other := [name for name in first if name not in second]:
            raise UserError(f"{what}: {len(other)} columns differ: {other[0]!r} {problem}")
    return values[:, [own.index(name) for name in names]]


def share(source: Source, labels: np.ndarray, fraction: float, seed: int) -> tuple[Source, np.ndarray]:
    """Return `fraction` of the images, at least one, and their labels; those of a smaller one are among them."""
    if fraction == 1.0:
        return source, labels
    order = np.random.default_rng(derive_seed(seed)).permutation(len(source))
    chosen = np.sort(order[: max(1, round(fraction * len(source)))])
    return Subset(source, chosen), labels[chosen]
