"""Files from elsewhere kept on this machine's disk, for all its processes and within bounds; knows no images."""

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from filelock import FileLock

from fcmae.data.remote import NoParts, read_pieces
from fcmae.errors import UserError, brief
from fcmae.files import WRITING, atomic_path, free_bytes

FOLDER, GIGABYTES = "FCMAE_CACHE", "FCMAE_CACHE_GB"
"""Variables of the environment: the folder, and how much it may hold; a configuration is not one machine's."""
CONNECTIONS = 4
"""Files that a process fetches ahead at once."""
FORGET_S = 600.0
"""After which a file that could not be had is tried again."""
USED_S = 30.0
"""By which the time of a file's last use may be wrong."""


class Lost(OSError):
    """A file that cannot be had, or is not what it should be."""


class Garbled(Lost):
    """A file that did not arrive as it should be, and may the next time."""


class File(NamedTuple):
    """A file elsewhere, as it should be."""

    url: str
    size: int
    sha256: str


class Cache:
    """A folder of files that processes fetch for each other: each file once, the longest unused ones making room.

    They are called by their checksums: a file that changes elsewhere is another one.

    Args:
        folder: may be there, with files from before.
        most_bytes: that they may take together.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.coming: SimpleQueue[File] = SimpleQueue()
        self.asked: set[str] = set()
        self.threads: list[Thread] = []

    @classmethod
    def of_this_machine(cls) -> "Cache":
        """Return the cache that the environment names, by default in the folder for temporary files.

        Raises:
            UserError: if it cannot be.
        """
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        folder = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir(), f"fcmae-cache-{user}"))
        given = os.environ.get(GIGABYTES)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError("cannot be written")
            if given is None:
                there = sum(file.stat().st_size for file in folder.iterdir())
                most_bytes = (there + free_bytes(folder)) // 2
            else:
                most_bytes = int(float(given) * 1e9)
        except OSError as error:
            raise UserError(f"{FOLDER}={folder}: {brief(error)}; name another folder for remote shards") from error
        except ValueError as error:
            raise UserError(f"{GIGABYTES}={given}: must be a number of gigabytes") from error
        return cls(folder, most_bytes)

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path, int]]:
        return Cache, (self.folder, self.most_bytes)

    def _path(self, file: File) -> Path:
        return self.folder / file.sha256

    def _lock(self, file: File) -> Path:
        return self.folder / f"{file.sha256}.lock"

    def _lost(self, file: File) -> Path:
        return self.folder / f"{file.sha256}.lost"

    def find(self, file: File) -> Path | None:
        """Return where a file is, if it is here.

        Raises:
            Lost: if it could not be had a short time ago.
        """
        path, now = self._path(file), time.time()
        with suppress(FileNotFoundError):
            if now - path.stat().st_mtime > USED_S:
                os.utime(path)
            return path
        with suppress(FileNotFoundError):
            if now - self._lost(file).stat().st_mtime < FORGET_S:
                raise Lost(self._lost(file).read_text(encoding="utf-8"))
        return None

    def is_coming(self, file: File) -> bool:
        """Whether a process of this machine fetches a file, or will."""
        return self._lock(file).exists()

    def fetch(self, file: File) -> Path:
        """Return where a file is, once it is here.

        Raises:
            Lost: if it cannot be had.
            OSError: if there is no room for it.
        """
        with FileLock(self._lock(file)):
            if path := self.find(file):
                return path
            try:
                try:
                    self._download(file)
                except Garbled:
                    self._download(file)
            except Lost as error:
                self._lost(file).write_text(str(error), encoding="utf-8")
                raise
        return self._path(file)

    def _download(self, file: File) -> None:
        digest, size = hashlib.sha256(), 0
        pieces = read_pieces(file.url)
        with atomic_path(self._path(file)) as path:
            self._make_room(path, file.size)
            with open(path, "r+b") as copy:
                while True:
                    try:
                        piece = next(pieces, None)
                    except NoParts as error:  # of a server whose connection broke
                        raise Garbled(brief(error)) from error
                    except OSError as error:
                        raise Lost(brief(error)) from error
                    if piece is None or size > file.size:
                        break
                    copy.write(piece)
                    digest.update(piece)
                    size += len(piece)
            if size != file.size:
                raise Garbled(f"{size:,} bytes or more, should have {file.size:,}")
            if digest.hexdigest() != file.sha256:
                raise Garbled("its content is not what the index says")

    def _make_room(self, copy: Path, size: int) -> None:
        """Make a new file as long as it will be, once what was not used for longest has made room for it."""
        with FileLock(self.folder / "room.lock"):
            files: list[tuple[float, int, Path]] = []
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
            excess = sum(size for _, size, _ in files) + size - self.most_bytes
            for used, size_there, path in sorted(files):
                writing = path.name.startswith(WRITING) and time.time() - used < FORGET_S
                if excess > 0 and size_there and not writing:
                    path.unlink(missing_ok=True)
                    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
                    excess -= size_there
            os.truncate(copy, size)

    def expect(self, files: Sequence[File]) -> None:
        """Begin to fetch files, in this order and a few at once, in threads that end with this process."""
        for file in files:
            if file.sha256 not in self.asked:
                self._lock(file).touch()
                self.coming.put(file)
        self.asked = {file.sha256 for file in files}
        while len(self.threads) < CONNECTIONS:
            self.threads.append(Thread(target=self._fetch_ahead, name="fetches shards", daemon=True))
            self.threads[-1].start()

    def _fetch_ahead(self) -> None:
        while True:
            file = self.coming.get()
            with suppress(OSError, UserError):  # which whoever reads the file meets, and names
                self.fetch(file)
