"""Image files below a folder or in a tar file, in an order and with classes of their own; opens no image."""

import functools
import io
import os
import posixpath
import sys
import tarfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from fcmae.data.kept import STAMPS, Arrays, Shelf
from fcmae.data.names import Names, natural_key, natural_keys, natural_order
from fcmae.data.shared_memory import say_once
from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile, SharedFile, real_path

ARRAYS = ("images.npy", "labels.npy", "sizes.npy", "masks.npy")
"""Of data.name=arrays: no images, but arrays of them."""

VISITS = 1000
"""Ways that lead to one folder, at most: links to folders of links multiply."""

AT_ONCE = 16
"""Folders that are read at once: a network disk makes each wait."""

STAMPED = 256
"""Folders of which one thread after the other looks whether they have changed."""

KEPT_FROM = 20_000
"""Images from which on a list of them is kept; of fewer it is made as quickly."""

SETTLED_S = 2.0
"""Time in which a folder may change again without another time of change: clocks of file systems are coarse."""

PROGRESS_S = 3.0
"""Time after which listing shows how far it is."""

NO_FOLDER = ""
"""Name of the folder, as a class, of an image that lies in none."""


def number_classes(folders: Sequence[str], numbers: np.ndarray) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels, int64 (n,), and class names, of images for whose folders' names `numbers` (n,) stand.

    Of several folders of one name the images are of one class. None where an image lies in no folder.
    """
    held = np.bincount(numbers, minlength=len(folders)) > 0
    names = sorted({folder for folder, holds in zip(folders, held, strict=True) if holds}, key=natural_key)
    if NO_FOLDER in names:
        return None, None
    label = {name: label for label, name in enumerate(names)}
    return np.array([label.get(folder, -1) for folder in folders], np.int64)[numbers], names


class Folder(NamedTuple):
    """What a folder holds."""

    path: str
    """Below the root; "" for that itself."""
    inside: list[str]
    """Names of the folders in it."""
    names: list[str]
    """Of what else is in it."""
    stamp: tuple[int, int]
    """Its times of change, of what is in it and of itself, in ns; before it was read."""
    identity: tuple[int, int]
    """Of its place on disk, by whatever names."""


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_ctime_ns


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # as `os.walk` does
        return False


def walk(root: str) -> Iterator[Folder]:
    """Yield each folder below `root`, and that; links are followed, once around, and what is unreadable is empty.

    Several folders are read at once, those nearer to `root` first.

    Raises:
        UserError: if links lead to a folder in over `VISITS` ways.
    """
    ended = Event()

    def read(path: str) -> Folder | None:
        place = os.path.join(root, path)
        inside: list[str] = []
        names: list[str] = []
        try:
            status = os.stat(place)
        except OSError:  # deleted meanwhile
            return None
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if ended.is_set():
                        break
                    (inside if _is_folder(entry) else names).append(entry.name)
        except OSError:
            inside, names = [], []
        return Folder(path, inside, names, _stamp(status), (status.st_dev, status.st_ino))

    visits: Counter[tuple[int, int]] = Counter()
    pool = ThreadPoolExecutor(AT_ONCE, "listing")
    try:
        to_come: deque[tuple[Future[Folder | None], frozenset[tuple[int, int]]]] = deque()
        to_come.append((pool.submit(read, ""), frozenset()))
        while to_come:
            future, passed = to_come.popleft()
            folder = future.result()
            if folder is None:
                continue
            visits[folder.identity] += 1
            if visits[folder.identity] > VISITS:
                place = os.path.join(root, folder.path)
                raise UserError(f"{place}: links lead there in over {VISITS:,} ways; remove those that make a loop")
            if folder.identity in passed:  # a link to a folder that it lies in
                continue
            yield folder
            around = passed | {folder.identity}
            to_come += [(pool.submit(read, os.path.join(folder.path, name)), around) for name in folder.inside]
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def extension(name: str) -> str:
    """Return the end of a file's name that says what it is, in small letters: ".jpg", ".nii.gz"."""
    stem, end = posixpath.splitext(name.lower())
    return posixpath.splitext(stem)[1] + end if end == ".gz" else end


def images_below(root: str, extensions: Collection[str]) -> Iterator[str]:
    """Yield the path of each image file, by its extension, at any depth below a folder."""
    for folder in walk(root):
        for name in folder.names:
            if extension(name) in extensions and name not in ARRAYS:
                yield os.path.join(root, folder.path, name)


class Reader(Protocol):
    """What lists images."""

    def read(self) -> Generator[int, None, None]:
        """Read all there is, saying again and again how many images more have been found."""
        ...

    def arrays(self) -> Arrays:
        """Return what was read."""
        ...


def listed(reader: Reader, shelf: Shelf) -> Arrays:
    """Return the list of images as it is kept, if it is still right; else read it, and keep it if it is long.

    Of several processes one reads it.
    """
    if found := shelf.find():
        return found
    started, number, long = time.time(), 0, False
    hidden = not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0"
    with (
        ExitStack() as stack,
        closing(reader.read()) as counts,
        tqdm(desc="listing", unit=" images", delay=PROGRESS_S, disable=hidden, dynamic_ncols=True) as bar,
    ):
        for count in counts:
            number += count
            bar.update(count)
            if number >= KEPT_FROM and not long:
                long = True
                if found := stack.enter_context(shelf.turn()):
                    return found
        made = reader.arrays()
        if not long:
            return made
        changed_ns = made[STAMPS][:, :2].max(1)
        if not 0 < changed_ns.min() <= changed_ns.max() < (started - SETTLED_S) * 1e9:
            say_once(f"{shelf.what}: has changed just now, or its disk does not tell when; its list is not kept")
            return made
        kept = shelf.keep(made)
        if kept.folder:
            say_once(
                f"{shelf.what}: {number:,} images, listed in {time.time() - started:.0f} s; kept in {kept.folder}"
            )
        return kept


class FolderReader:
    """Lists the image files below a folder."""

    def __init__(self, root: str, extensions: Collection[str]) -> None:
        self.root = root
        self.extensions = extensions
        self.ends: set[str] = set()
        self.found: list[tuple[str, str, tuple[int, int]]] = []
        """Of each folder its path, the names of its images with slashes between, and its stamp."""

    def read(self) -> Generator[int, None, None]:
        for folder in walk(self.root):
            names: list[str] = []
            for name in folder.names:
                end = extension(name)
                if end in self.extensions and name not in ARRAYS:
                    names.append(name)
                    self.ends.add(end)
            self.found.append((folder.path, "/".join(names), folder.stamp))
            yield len(names)

    def arrays(self) -> Arrays:
        prefixes = [path and path + os.sep for path, *_ in self.found]
        order = natural_order(prefixes)
        prefixes = [prefixes[i] for i in order]
        paths, files, stamps = ([self.found[i][part] for i in order] for part in range(3))
        self.found.clear()
        # Folders of which one lies in the other, or whose names differ in case or zeros alone, have their images
        # among each other's; of others all images come before or after
        groups: list[list[int]] = []
        keys = natural_keys(prefixes)
        for number, key in enumerate(keys):
            if not files[number]:
                continue
            if groups and key.startswith(keys[groups[-1][0]]):
                groups[-1].append(number)
            else:
                groups.append([number])
        parts: list[Names] = []
        folder_of: list[np.ndarray] = []
        for group in groups:
            inside = [files[number].split("/") for number in group]
            files[group[0] : group[-1] + 1] = [""] * (group[-1] + 1 - group[0])  # no longer needed
            names = [name for names in inside for name in names]
            numbers = np.repeat(np.array(group, np.int32), [len(names) for names in inside])
            below = [prefixes[n] + name for n, name in zip(numbers, names, strict=True)] if group[1:] else names
            places = natural_order(below)
            parts.append(Names.of([names[i] for i in places]))
            folder_of.append(numbers[places])
        numbers = np.concatenate([np.empty(0, np.int32), *folder_of])
        labels, class_names = number_classes([os.path.basename(path) for path in paths], numbers)
        return Arrays(
            Names.of(paths).arrays("folders")
            | Names.joined(parts).arrays("names")
            | {"folder_of": numbers, STAMPS: np.array(stamps, np.int64)}
            | ({} if labels is None else {"labels": labels}),
            {"ends": sorted(self.ends), "class_names": class_names},
        )


def changed_folder(root: str, kept: Arrays) -> str | None:
    """Return the first folder below `root` in which something was added, removed or renamed since it was listed."""
    folders = Names.of_arrays(kept, "folders")

    def changed(start: int) -> str | None:
        for number in range(start, min(start + STAMPED, len(folders))):
            place = os.path.join(root, folders[number])
            try:
                same = _stamp(os.stat(place)) == tuple(kept[STAMPS][number])
            except OSError:
                same = False
            if not same:
                return place
        return None

    pool = ThreadPoolExecutor(AT_ONCE, "listing")
    try:
        return next(filter(None, pool.map(changed, range(0, len(folders), STAMPED))), None)
    finally:
        pool.shutdown(cancel_futures=True)


class FolderFiles:
    """Image files at any depth below a folder, classes named for the folder that each lies in.

    Args:
        root: the folder.
        extensions: of images.
        arrays: what `FolderReader` makes of it; None has it listed, where it was not before.
    """

    def __init__(self, root: str, extensions: Collection[str], arrays: Arrays | None = None) -> None:
        if arrays is None:
            key = "\n".join([str(real_path(Path(root))), *sorted(extensions)])
            shelf = Shelf(root, key, functools.partial(changed_folder, root))
            arrays = listed(FolderReader(root, extensions), shelf)
        self.root = root
        self.extensions = extensions
        self.arrays = arrays
        self.names, self.folders = Names.of_arrays(arrays, "names"), Names.of_arrays(arrays, "folders")
        self.folder_of = arrays["folder_of"]
        self.labels = arrays.get("labels")
        self.class_names = None if self.labels is None else tuple(arrays.facts["class_names"])
        self.ends = frozenset(arrays.facts["ends"])

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderFiles, (self.root, self.extensions, self.arrays)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.folders[self.folder_of[index]], self.names[index])

    def open(self, index: int) -> IO[bytes]:
        return BoundedFile(self.name(index))


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
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (or it would keep all of them)
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


def _tar_stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return *_stamp(status), status.st_size


def changed_tar(path: str, kept: Arrays) -> str | None:
    """Return what has changed since the tar file was listed: itself, or nothing."""
    return None if _tar_stamp(path) == tuple(kept[STAMPS][0]) else path


class TarReader:
    """Lists the image files in a tar file."""

    def __init__(self, path: str, extensions: Collection[str]) -> None:
        self.path = path
        self.extensions = extensions
        self.ends: set[str] = set()
        self.names: list[str] = []
        self.places = array("q")
        """Start and size of each, and the number of its folder."""
        self.folders: dict[str, int] = {}
        self.stamp = _tar_stamp(path)

    def read(self) -> Generator[int, None, None]:
        try:
            with BoundedFile(self.path) as file:
                for member in _members(file, file.size, self.extensions):
                    number = self.folders.setdefault(member.folder, len(self.folders))
                    self.names.append(member.name)
                    self.places.extend((-1 if member.sparse else member.start, member.size, number))
                    self.ends.add(extension(member.name))
                    yield 1
        except Exception as error:  # tarfile raises anything for what is none
            raise ValueError(f"not a readable .tar of images ({brief(error)})") from error

    def arrays(self) -> Arrays:
        order = natural_order(self.names)
        starts, sizes, numbers = np.array(self.places, np.int64).reshape(-1, 3)[order].T
        labels, class_names = number_classes(list(self.folders), numbers)
        whole = class_names is None or len(class_names) == 1  # one folder in a tar file wraps it all
        return Arrays(
            Names.of([self.names[i] for i in order]).arrays("names")
            | {"starts": starts, "sizes": sizes, STAMPS: np.array([self.stamp], np.int64)}
            | ({} if labels is None or whole else {"labels": labels}),
            {"ends": sorted(self.ends), "class_names": class_names},
        )


class TarFiles:
    """Image files in a tar file, classes named for the folder that each lies in; nothing of it is extracted.

    Only plain files in it count, wherever their names seem to lead; links and devices do not.

    Args:
        path: the tar file.
        extensions: of images.
        arrays: what `TarReader` makes of it; None has it listed, where it was not before.
    """

    def __init__(self, path: str, extensions: Collection[str], arrays: Arrays | None = None) -> None:
        if arrays is None:
            key = "\n".join([str(real_path(Path(path))), *sorted(extensions)])
            shelf = Shelf(path, key, functools.partial(changed_tar, path))
            arrays = listed(TarReader(path, extensions), shelf)
        self.path = path
        self.extensions = extensions
        self.arrays = arrays
        self.file = SharedFile(Path(path))
        self.names = Names.of_arrays(arrays, "names")
        self.starts, self.sizes = arrays["starts"], arrays["sizes"]
        self.labels = arrays.get("labels")
        self.class_names = None if self.labels is None else tuple(arrays.facts["class_names"])
        self.ends = frozenset(arrays.facts["ends"])

    def __reduce__(self) -> tuple[Any, ...]:
        return TarFiles, (self.path, self.extensions, self.arrays)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    def open(self, index: int) -> IO[bytes]:
        if self.starts[index] < 0:
            raise ValueError("stored as a sparse file; pack it anew without --sparse")
        return io.BytesIO(self.file.read(int(self.starts[index]), int(self.sizes[index])))
