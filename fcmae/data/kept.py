"""Arrays that take long to make, kept on disk for the next process; knows nothing of what they are of."""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from fcmae.data.npy import read_header
from fcmae.data.shared_memory import say_once
from fcmae.errors import brief, one_line
from fcmae.files import atomic_folder, remove_folder

FORMAT = "fcmae listing 1"
"""What `format` says in `FACTS`."""

FACTS = "facts.json"
"""Beside the arrays: what else there is to know, and a checksum of each file."""

STAMPS = "stamps"
"""The array that tells whether the others are still right."""

UNUSED_DAYS = 7
"""After which what is kept is deleted; not as soon as it is outdated: a process elsewhere may have it mapped."""

PIECE = 1 << 24
"""Bytes that are read at once."""

SILENT_S = 2.0
"""How long another process that makes the same is waited for without a word."""


def cache_folder() -> Path:
    """Return the folder of what is kept.

    Raises:
        OSError: if the user has no folder.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(f"{error}; set XDG_CACHE_HOME") from error
    return home / "fcmae" / "listings"


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, and facts: in memory, or mapped from a folder, so that all processes share their memory."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], folder: Path | None = None
    ) -> None:
        self.arrays = arrays
        self.facts = facts
        self.folder = folder

    @classmethod
    def mapped(cls, folder: Path) -> "Arrays":
        """Map the arrays in a folder; raises anything where they are not all there."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}, this version reads {FORMAT!r}")
        arrays: dict[str, np.ndarray] = {}
        for name in facts["checksums"]:
            header = read_header(path := folder / name)
            # "c": nobody writes into them, but torch warns of arrays that are read-only
            mapped = np.memmap(path, header.dtype, "c", header.start, header.shape) if header.shape[0] else []
            arrays[Path(name).stem] = np.asarray(mapped, header.dtype)
        return cls(arrays, facts["facts"], folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Arrays.mapped, (self.folder,)) if self.folder else (Arrays, (self.arrays, self.facts))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, which is read: if it were mapped, its memory would count as this process's."""
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            found = zlib.crc32(piece, found)
    return found


def _check(folder: Path) -> None:
    """Check that files are as they were written; raises anything where they are not."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    for name, expected in facts["checksums"].items():
        if _checksum(folder / name) != expected:
            raise ValueError(f"{name} is not as it was written")


def _write(folder: Path, made: Arrays) -> None:
    with atomic_folder(folder) as temporary:
        for name, array in made.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        checksums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        facts = {"format": FORMAT, "facts": made.facts, "checksums": checksums}
        (temporary / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _last_used(folder: Path) -> float:
    with suppress(OSError):  # deleted by another process
        return folder.stat().st_mtime
    return 0.0


class Shelf:
    """The place of one thing's arrays in the user's cache.

    Args:
        what: how messages name the thing.
        key: what tells it from others.
        changed: given arrays, says what is different since they were made; or nothing.
    """

    def __init__(self, what: str, key: str, changed: Callable[[Arrays], str | None]) -> None:
        self.what = one_line(what)
        self.stem = hashlib.sha256(f"{FORMAT}\n{key}".encode(errors="surrogatepass")).hexdigest()[:16]
        self.changed = changed

    def find(self) -> Arrays | None:
        """Return the arrays that are kept and still right; others are named, and deleted if damaged."""
        change = None
        try:
            folders = sorted(cache_folder().glob(f"{self.stem}-*"), key=_last_used, reverse=True)
        except OSError:
            folders = []
        for folder in folders:
            try:
                found = Arrays.mapped(folder)
                if changed := self.changed(found):
                    change = change or changed
                    continue
                _check(folder)
            except Exception as error:  # whatever damaged files make of it
                say_once(f"{self.what}: listed again, as {folder} is damaged ({brief(error)})")
                with suppress(OSError):
                    remove_folder(folder)
                continue
            with suppress(OSError):
                os.utime(folder)
            say_once(f"{self.what}: unchanged since it was listed, in {folder}")
            return found
        if change:
            say_once(f"{self.what}: listed again, as {one_line(change)} has changed")
        return None

    @contextmanager
    def turn(self) -> Iterator[Arrays | None]:
        """Keep other processes from making the same meanwhile; gives what one of them kept just before."""
        try:
            (folder := cache_folder()).mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{self.stem}.lock")
            try:
                lock.acquire(SILENT_S)
            except Timeout:
                say_once(f"{self.what}: another process lists it; waiting for that")
                lock.acquire()
        except (OSError, NotImplementedError):  # then each process makes its own
            yield None
            return
        try:
            yield self.find()
        finally:
            lock.release()

    def keep(self, made: Arrays) -> Arrays:
        """Write arrays, and return them mapped; where that fails, it says so and returns them as they are."""
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            oldest = time.time() - UNUSED_DAYS * 24 * 3600
            for other in folder.iterdir():
                if other.is_dir() and _last_used(other) < oldest:
                    with suppress(OSError):  # another process does the same
                        remove_folder(other)
            place = folder / f"{self.stem}-{hashlib.sha256(made[STAMPS].tobytes()).hexdigest()[:16]}"
            if not place.exists():  # or a process has written it that no lock kept out
                _write(place, made)
            return Arrays.mapped(place)
        except OSError as error:
            say_once(f"{self.what}: its list cannot be kept for the next start ({brief(error)})")
            return made
