"""Atomic writes, links and free disk space: everything that touches a disk; knows no formats."""

import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

WRITING = ".writing-"
"""What names of unfinished files and folders begin with; a kill may leave some behind."""


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which gets the name `path`, replacing what is there, when it is on disk.

    Whatever ends the block early, an exception or a kill, leaves what was under that name before.
    """
    handle, name = tempfile.mkstemp(prefix=f"{WRITING}{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as open() would have made it
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that gets the name `path` when it is complete and on disk; as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that under its name there is never a part of it."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that under its name there is never a part of it."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file so that under its name there is never a part of it."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that gets the name `path`, which must be free or an empty folder, when all in it is on disk.

    Yields the folder to fill. An exception deletes it; a kill leaves it beside `path` under a name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{WRITING}{path.name}-", dir=path.parent.absolute()))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for inside in (*temporary.rglob("*"), temporary):
            fsync(inside)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(path.parent)


def point_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its sibling `target`, replacing what is there in one instant."""
    temporary = link.with_name(f"{WRITING}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # a copy of a run that followed the link
    os.replace(temporary, link)
    fsync(link.parent)


AT_ONCE = 1 << 26
"""Bytes that are asked for at once: a file may hold less than a header says, and memory is taken before."""


def require_regular(path: str | Path) -> None:
    """Check that a path leads to a file: opening a FIFO waits for ever, opening a device may do anything.

    Raises:
        OSError: if it does not, or nothing is there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")


class BoundedFile(io.BufferedReader):
    """A file opened for reading, of which no more is asked for than there is: memory is taken before it is read.

    Raises:
        OSError: if it is not a regular file, or none.
    """

    def __init__(self, path: str | Path) -> None:
        require_regular(path)
        super().__init__(io.FileIO(path))
        self.size = os.path.getsize(path)

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size <= AT_ONCE else min(size, self.size))


class SharedFile:
    """A file of which parts are read, at the same time in processes that were forked while it was open.

    A part that is not there, as where the file has been cut off meanwhile, is an error; mapped memory would end the
    process.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path)
        self.path = path
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (as long as this lives)

    def __reduce__(self) -> tuple[type["SharedFile"], tuple[Path]]:
        return SharedFile, (self.path,)

    def _read(self, length: int, start: int) -> bytes:
        if hasattr(os, "pread"):  # which leaves the position alone that forked processes share
            return os.pread(self.file.fileno(), length, start)
        self.file.seek(start)
        return self.file.read(length)

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start` on.

        Raises:
            OSError: if the file is shorter.
        """
        parts: list[bytes] = []
        missing = length
        while missing:
            parts.append(self._read(min(missing, AT_ONCE), start + length - missing))
            if not parts[-1]:
                raise OSError(f"{self.path}: cut off")
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)


def free_bytes(path: Path) -> int:
    """Return the free space of the disk on which `path` is, or would be."""
    absolute = path.absolute()
    return shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists())).free
