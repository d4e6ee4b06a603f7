"""Labels of images from a CSV file, a row for each image: classes or numbers; knows no pixels and no task."""

import csv
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fcmae.data.images import extensions
from fcmae.data.labels import check_class_names
from fcmae.data.listing import images_below
from fcmae.data.names import natural_key
from fcmae.data.sources import Source
from fcmae.errors import UserError, blame

FILE, LABELS = "file", "labels"
"""Names of columns: of the images' files, and of names of classes with `SEPARATOR` between them."""

SEPARATOR = "|"

ZERO_OR_ONE = {"0": 0, "0.0": 0, "False": 0, "false": 0, "1": 1, "1.0": 1, "True": 1, "true": 1}
"""How spreadsheets and pandas write them."""


class Row(NamedTuple):
    """The labels of an image, as they are written."""

    line: int
    """Of the file, from 1 on."""
    cells: list[str]
    """By column, without the file."""


class Table(NamedTuple):
    """A CSV file."""

    path: Path
    columns: tuple[str, ...]
    """Without the file."""
    rows: dict[str, Row]
    """By what they call the image."""


def read_table(path: Path) -> Table:
    """Read a CSV file with a line of names of columns, of which the first is `file`.

    Raises:
        UserError: if it is no such file, or has a column, or a file's row, twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            if header[:1] != [FILE] or len(header) < 2:
                found = ",".join(header)[:100] or "nothing"
                raise UserError(f"{path}: the first line must be {FILE},NAME,... with commas, but is {found}")
            if twice := [name for i, name in enumerate(header) if name in header[:i]]:
                raise UserError(f"{path}: two columns are called {twice[0]!r}; remove or rename one")
            with blame(str(path)):
                check_class_names(header)
            rows: dict[str, Row] = {}
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells for {len(header)} columns; put text "
                        "with commas into double quotes"
                    )
                name = cells[0].strip().removeprefix("./")
                if name in rows:
                    raise UserError(
                        f"{path}: lines {rows[name].line} and {lines.line_num} are both of {name}; remove one"
                    )
                rows[name] = Row(lines.line_num, cells[1:])
    except OSError as error:
        raise UserError(f"data.labels={path}: {error.strerror}; name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV file in UTF-8 ({error}); save it as one") from error
    return Table(path, tuple(header[1:]), rows)


def _ends(name: str) -> Iterator[str]:
    """Yield a path and what remains of it folder by folder: a/b/c.png, b/c.png, c.png."""
    while name:
        yield name
        name = name.partition("/")[2]


def match_rows(table: Table, source: Source, roots: Collection[str], what: str) -> list[Row]:
    """Return the row of each image of a source, in their order.

    An image is called by its path, or the end of it: cat/1.png or 1.png for images/train/cat/1.png. Rows of images
    that lie elsewhere below `roots` are those of other splits.

    Args:
        table: of all images, and maybe of more.
        source: whose images have names.
        roots: folders of all splits.
        what: how messages name the source, such as "data.root=pets, split train".

    Raises:
        UserError: if an image has no row, a row has several images, or its image is nowhere.
    """
    found: list[Row] = []
    missing: list[str] = []
    taken: dict[str, str] = {}
    for index in range(len(source)):
        name = source.describe(index)
        key = next((end for end in _ends(name.replace(os.sep, "/")) if end in table.rows), None)
        if key is None:
            missing.append(name)
            continue
        if key in taken:
            raise UserError(
                f"{table.path}, line {table.rows[key].line}: {key} is the end of {taken[key]} and of {name}; write "
                "their folders, too"
            )
        taken[key] = name
        found.append(table.rows[key])
    left = table.rows.keys() - taken.keys()
    if left and not found:
        raise UserError(
            f"{table.path}: has no row of any of the {len(missing):,} images of {what}: they are called such as "
            f"{missing[0]}, the rows such as {min(left, key=natural_key)}"
        )
    if missing:
        raise UserError(
            f"{table.path}: no row of {len(missing):,} of the {len(source):,} images of {what}, the first "
            f"{missing[0]}; add rows, or move the images elsewhere"
        )
    if left:
        elsewhere = (name for root in roots for name in images_below(root, extensions()))
        left = left.difference(*(_ends(name.replace(os.sep, "/")) for name in elsewhere))
    if left:
        first = min(left, key=lambda name: table.rows[name].line)
        raise UserError(
            f"{table.path}: {len(left):,} rows are of files that are not below {' or '.join(roots)}, the first "
            f"{first} (line {table.rows[first].line}); remove the rows, or put the files there"
        )
    return found


def _numbers(
    table: Table, rows: Sequence[Row], convert: Callable[[str], float | None], wanted: str, dtype: type[np.generic]
) -> np.ndarray:
    """Convert the cells of rows, (n, columns); the one for which `convert` gives None is named."""
    values = np.empty((len(rows), len(table.columns)), dtype)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row.cells):
            value = convert(cell.strip())
            if value is None:
                found = f"{table.columns[j]} is {cell.strip()[:50]!r}"
                raise UserError(f"{table.path}, line {row.line}: {found}, but must be {wanted}")
            values[i, j] = value
    return values


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < np.finfo(np.float32).max else None


def as_numbers(table: Table, rows: Sequence[Row]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the numbers of images, float64 (n, columns), and the names of the columns.

    Raises:
        UserError: if a cell is not a finite number.
    """
    return _numbers(table, rows, _finite, "a finite number", np.float64), table.columns


def as_classes(table: Table, rows: Sequence[Row]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return which classes each image is of, 0 or 1 as int8 (n, classes), and their names.

    Classes are the columns, or the names in the only column where that is called `labels`.

    Raises:
        UserError: if a cell is neither 0 nor 1, or names are missing between separators.
    """
    if table.columns != (LABELS,):
        return _numbers(table, rows, ZERO_OR_ONE.get, "0 or 1", np.int8), table.columns
    named = [
        [name.strip() for name in row.cells[0].split(SEPARATOR)] if row.cells[0].strip() else [] for row in rows
    ]
    for row, names in zip(rows, named, strict=True):
        with blame(f"{table.path}, line {row.line}"):
            check_class_names(names)
    classes = tuple(sorted({name for names in named for name in names}, key=natural_key))
    number = {name: i for i, name in enumerate(classes)}
    values = np.zeros((len(rows), len(classes)), np.int8)
    for i, names in enumerate(named):
        values[i, [number[name] for name in names]] = 1
    return values, classes
