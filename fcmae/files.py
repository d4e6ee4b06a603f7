"""Atomic writes, links and free disk space: everything that touches a disk; knows no formats."""

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fcmae.errors import UserError

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


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files and folders that kills left in a folder, not in folders below."""
    for path in folder.glob(f"{WRITING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name beside it, which must be free, and wait until that is on disk."""
    os.rename(path, new)
    fsync(new.parent)


def _unfinished(path: Path) -> Path:
    """Return a name beside `path`, of no other file or folder, for what is to become it."""
    start = path.name.encode(errors="replace")[:100].decode(errors="ignore")  # names have 255 bytes at most
    return path.with_name(f"{WRITING}{start}-{secrets.token_hex(8)}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which gets the name `path`, replacing what is there, when it is on disk.

    Whatever ends the block early, an exception or a kill, leaves what was under that name before. A link of that
    name is replaced, and what it leads to left alone.
    """
    temporary = _unfinished(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # which nobody asked for
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that gets the name `path` when it is complete and on disk; as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that under its name there is never a part of it."""
    with atomic_file(path) as file:
        file.write(content)


def create_bytes(path: Path, content: bytes) -> None:
    """Write a file that must be new: of several processes that try, one succeeds.

    Raises:
        FileExistsError: if there is something of that name.
    """
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            error.filename = str(path)
            raise


def write_by(save: Callable[[BinaryIO], object], path: Path) -> None:
    """Write what `save` writes into a file, by way of memory: on a full disk PyTorch's archives end the process."""
    file = io.BytesIO()
    save(file)
    write_bytes(path, file.getbuffer())


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
    temporary = _unfinished(path.absolute())
    temporary.mkdir()
    try:
        yield temporary
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


def require_new_folder(folder: Path, subject: str) -> None:
    """Check that `atomic_folder` can make a folder: that it is not there, or empty and no more than a folder.

    Raises:
        UserError: beginning with `subject`, if not.
    """
    require_folder(folder, subject)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{subject}: exists already; name another folder")
    if folder.is_dir() and (folder.is_mount() or folder.is_symlink() or folder.samefile(os.curdir)):
        raise UserError(f"{subject}: cannot be replaced as a whole; name a new folder in it")


def require_free(path: Path, *, overwrite: bool = False) -> None:
    """Check that a file may be written at `path`: that nothing is there, not even a link that leads nowhere.

    Args:
        overwrite: whether a file there may be replaced.

    Raises:
        UserError: naming `path`, if not.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name another place")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: exists already; name another place, or add --overwrite")


def require_folder(folder: Path, subject: str, *, inputs: Iterable[str | Path] = ()) -> None:
    """Check that files may be written into a folder, there or yet to be made.

    Args:
        subject: what an error begins with, such as the option that names the folder.
        inputs: what is read; the folder may not be one of these, nor in one, whatever they are called by.

    Raises:
        UserError: if not.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:  # which libraries that write cannot open
        raise UserError(f"{subject}: not UTF-8; name another folder") from error
    places = [place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place)]
    if not places[0].is_dir():
        raise UserError(f"{subject}: {places[0]} exists already; name another folder")
    if not os.access(places[0], os.W_OK):
        raise UserError(f"{subject}: {places[0]} cannot be written; name another folder")
    for read in filter(os.path.isdir, inputs):
        if any(os.path.samefile(read, place) for place in places):
            raise UserError(f"{subject}: in {read}, whose images are read; name a folder elsewhere")


def require_distinct(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no file to write is a file to read, under another name or through a link either.

    Raises:
        UserError: naming the file, if one is.
    """
    read = {(found.st_dev, found.st_ino) for path in inputs if path.exists() for found in [path.stat()]}
    for path in outputs:
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in read:
            raise UserError(f"{path}: is read, so it cannot be written; name another folder")


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
