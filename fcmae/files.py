"""Atomic writes, links and free disk space: everything that touches a disk; knows no formats."""

import errno
import hashlib
import json
import os
import shutil
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
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # as network file systems say that do not sync folders
            raise
    finally:
        os.close(handle)


def real_path(path: Path) -> Path:
    """Return a path without symbolic links; a loop of them is no error, as it is to `Path.resolve`."""
    return Path(os.path.realpath(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, reading it piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those around it where they are missing, and wait until their names are on disk."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        fsync(place.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder, which under its name is never there in part."""
    doomed = path.with_name(f"{WRITING}{path.name}")
    rename(path, doomed)
    doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name beside it, which must be free, and wait until that is on disk."""
    os.rename(path, new)
    fsync(new.parent)


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
    fsync(path.parent)


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
    make_folder(path.parent)
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


def free_bytes(path: Path) -> int:
    """Return the free space of the disk on which `path` is, or would be."""
    absolute = path.absolute()
    return shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists())).free
