"""Image files below a folder or in a tar file, in an order and with classes of their own; opens no image."""

import io
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile, SharedFile

ARRAYS = ("images.npy", "labels.npy", "sizes.npy", "masks.npy")
"""Of data.name=arrays: no images, but arrays of them."""

VISITS = 1000
"""Ways that lead to one folder, at most: links to folders of links multiply."""


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return what sorts names with numbers in them by these, as timm does, and different names always alike."""
    parts: list[int | str] = [*re.split(r"(\d{1,4000})", name.lower())]
    for place in range(1, len(parts), 2):
        parts[place] = int(parts[place])
    return parts, name


class Classes(NamedTuple):
    """What the folders of images say of their classes."""

    labels: np.ndarray | None
    """int64 (n,); None where an image lies in no folder."""
    names: tuple[str, ...] | None
    """By label."""

    @classmethod
    def of(cls, folders: Sequence[str]) -> "Classes":
        """Number the names of each image's folder; "" is for none."""
        if "" in folders:
            return cls(None, None)
        names = tuple(sorted(set(folders), key=natural_key))
        number = {name: label for label, name in enumerate(names)}
        return cls(np.array([number[folder] for folder in folders], np.int64), names)


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root` with the names of what is in it but folders; links are followed, once around.

    Raises:
        UserError: if links lead to a folder in over `VISITS` ways.
    """
    visits: Counter[tuple[int, int]] = Counter()
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for folder, inside, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        visits[here] += 1
        if visits[here] > VISITS:
            raise UserError(f"{folder}: links lead there in over {VISITS:,} ways; remove those that make a loop")
        passed = above.pop(folder, frozenset())
        if here in passed:  # a link to a folder that it lies in
            inside.clear()
            continue
        above |= dict.fromkeys((os.path.join(folder, name) for name in inside), passed | {here})
        yield folder, names


def extension(name: str) -> str:
    """Return the end of a file's name that says what it is, in small letters: ".jpg", ".nii.gz"."""
    stem, end = posixpath.splitext(name.lower())
    return posixpath.splitext(stem)[1] + end if end == ".gz" else end


def images_below(root: str, extensions: Collection[str]) -> Iterator[str]:
    """Yield the path of each image file, by its extension, at any depth below a folder."""
    for folder, names in walk(root):
        for name in names:
            if extension(name) in extensions and name not in ARRAYS:
                yield os.path.join(folder, name)


class FolderFiles:
    """Image files at any depth below a folder, classes named for the folder that each lies in."""

    def __init__(self, root: str, extensions: Collection[str]) -> None:
        self.names = sorted(images_below(root, extensions), key=natural_key)
        folders = [os.path.dirname(name) for name in self.names]
        outside = root.rstrip(os.path.sep)
        self.labels, self.class_names = Classes.of(
            ["" if folder.rstrip(os.path.sep) == outside else os.path.basename(folder) for folder in folders]
        )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def open(self, index: int) -> IO[bytes]:
        return BoundedFile(self.names[index])


class Member(NamedTuple):
    """A file inside of a tar file, and where its content lies there."""

    name: str
    folder: str
    start: int
    size: int
    sparse: bool


def _members(file: IO[bytes], size: int, extensions: Collection[str], within: str = "") -> Iterator[Member]:
    """Yield the image files in a tar file, and in those inside of it that lie there whole.

    Args:
        file: uncompressed.
        size: of it, in bytes.
        extensions: of images.
        within: the name, without its end, of the tar file that this one is inside of.

    Raises:
        ValueError: if it is damaged.
    """
    before = -1
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not before < member.offset < member.offset_data:  # or it would go round for ever
                raise ValueError(f"damaged at {member.name!r}")
            before = member.offset
            if not member.isreg():
                continue
            sparse = member.sparse is not None
            if not sparse and not 0 <= member.size <= size - member.offset_data:
                raise ValueError(f"damaged or cut off in {member.name!r}")
            folder, base = posixpath.split(member.name)
            end = extension(base)
            if end in extensions:
                label = posixpath.basename(posixpath.normpath(posixpath.join(within, folder)))
                yield Member(
                    member.name, "" if label in (".", "/") else label, member.offset_data, member.size, sparse
                )
            elif end == ".tar" and not (within or sparse):
                part = tar.extractfile(member)
                assert part is not None
                for inner in _members(part, member.size, extensions, base[: -len(end)]):
                    yield inner._replace(start=member.offset_data + inner.start)
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # after the last member there are zeros, or nothing
            raise ValueError(f"damaged at byte {tar.offset:,}; make it anew")


class TarFiles:
    """Image files in a tar file, classes named for the folder that each lies in; nothing of it is extracted.

    Only plain files in it count, wherever their names seem to lead; links and devices do not.
    """

    def __init__(self, path: str, extensions: Collection[str]) -> None:
        self.path = path
        self.file = SharedFile(Path(path))
        try:
            with BoundedFile(path) as file:
                members = sorted(_members(file, file.size, extensions), key=lambda m: natural_key(m.name))
        except Exception as error:  # tarfile raises anything for what is none
            raise ValueError(f"not a readable .tar of images ({brief(error)})") from error
        self.names = [member.name for member in members]
        self.starts = np.array([-1 if member.sparse else member.start for member in members], np.int64)
        self.sizes = np.array([member.size for member in members], np.int64)
        labels, names = Classes.of([member.folder for member in members])
        self.labels, self.class_names = (labels, names) if names and len(names) > 1 else (None, None)
        """One folder in a tar file wraps it all."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    def open(self, index: int) -> IO[bytes]:
        if self.starts[index] < 0:
            raise ValueError("stored as a sparse file; pack it anew without --sparse")
        return io.BytesIO(self.file.read(int(self.starts[index]), int(self.sizes[index])))
