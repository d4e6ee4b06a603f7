"""The lock of a folder into which one process writes: held, refused, taken over from the dead; knows no run.

The file names its holder. On one machine the list of processes says whether that one lives; elsewhere the file
does, whose time of change its holder renews. Clocks of two machines are never compared.
"""

import os
import platform
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import psutil
from pydantic import BaseModel, Field

from fcmae.errors import UserError
from fcmae.files import create_bytes, make_folder

RENEWED_S = 10.0
"""Time between two renewals of a lock."""

WATCHED_S = 30.0
"""How long a lock of another machine is watched; if it is not renewed meanwhile, its holder has ended."""

LARGEST = 4096
"""Bytes of a lock that are read."""

SAME_START_S = 1.0
"""Two processes of one number that started further apart than this are two."""


def _read_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def started_s(process: psutil.Process) -> float:
    """Return when a process started, in seconds from the machine's start: no change of its clock changes it."""
    return process.create_time() - psutil.boot_time()


class Holder(BaseModel, frozen=True, extra="forbid"):
    """Who holds a lock."""

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=255)]
    boot: str | None
    """Of the machine's present start, where it has such a name: it tells hosts of one name apart."""
    pid_namespace: str | None
    """In which the number counts, where there are such: containers have their own."""
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    started_s: float
    since: datetime
    """Of the lock, by the holder's clock."""

    @classmethod
    def this_process(cls) -> Self:
        try:
            pid_namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            pid_namespace = None
        return cls(
            host=re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:255] or platform.system(),
            boot=_read_line("/proc/sys/kernel/random/boot_id"),
            pid_namespace=pid_namespace,
            pid=os.getpid(),
            started_s=started_s(psutil.Process()),
            since=datetime.now(),
        )

    @property
    def machine(self) -> tuple[str | None, ...]:
        return self.host, self.boot, self.pid_namespace

    def lives(self) -> bool | None:
        """Return whether this process still runs; None where this process cannot know."""
        if self.machine != Holder.this_process().machine:
            return None
        if not psutil.pid_exists(self.pid):
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:  # killed, and its parent has not asked yet
                return False
            return abs(started_s(process) - self.started_s) < SAME_START_S
        except psutil.Error:  # it is another user's and hidden, or it ends just now
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Seen(NamedTuple):
    """A lock as it is at a moment."""

    content: bytes
    changed_ns: int
    """By the clock of the disk."""

    @classmethod
    def at(cls, path: Path) -> Self | None:
        """Read a lock; None if there is none.

        Raises:
            UserError: if it is no ordinary file.
        """
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"{path}: is not a file that a run wrote; delete it, or name another folder")
            with open(path, "rb") as file:  # which makes network file systems ask for its present state
                return cls(file.read(LARGEST), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    @property
    def holder(self) -> Holder | None:
        """Who wrote it; None if it is damaged."""
        try:
            return Holder.model_validate_json(self.content)
        except ValueError:
            return None


class Lock:
    """A lock that this process holds, as long as `check` does not raise."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self.content = holder.model_dump_json(indent=1).encode() + b"\n"

    @property
    def is_ours(self) -> bool:
        seen = Seen.at(self.path)
        return seen is not None and seen.content == self.content

    def check(self) -> None:
        """Make sure that the lock is still this process's, before something is written.

        Raises:
            UserError: if it is not.
        """
        if not self.is_ours:
            seen = Seen.at(self.path)
            what = f"has been taken over by {seen.holder or 'another run'}" if seen else "is gone"
            raise UserError(
                f"{self.path}: this run's lock {what}, so nothing more is written into that folder; see who uses "
                "the folder, then go on with resume=auto"
            )

    def renew(self) -> None:
        """Show that this process lives."""
        if self.is_ours:
            os.utime(self.path)


def _take(lock: Lock, *, say: Callable[[str], None], watched_s: float) -> None:
    """Make the file of a lock, at once or after one that nobody holds any more.

    Raises:
        UserError: if another process holds it.
    """
    folder = lock.path.parent
    while True:
        with suppress(FileExistsError):
            create_bytes(lock.path, lock.content)
            return
        seen = Seen.at(lock.path)
        if seen is None:  # released just now
            continue
        holder = seen.holder
        lives = holder.lives() if holder else None
        now: Seen | None = seen
        if lives is None:
            who = f"{holder} has used this folder" if holder else "another run seems to have used this folder"
            say(f"output={folder}: {who}; watching for {watched_s:.0f} s whether it still does")
            deadline = time.monotonic() + watched_s
            while now == seen and time.monotonic() < deadline:
                time.sleep(min(1.0, watched_s / 10))
                now = Seen.at(lock.path)
        if lives or (now is not None and now != seen and now.content == seen.content):
            since = f" since {holder.since:%Y-%m-%d %H:%M:%S}" if holder else ""
            raise UserError(
                f"output={folder}: in use by {holder or 'another run'}{since}; wait for its end, stop it, or name "
                "another folder"
            )
        if now == seen:
            _remove(lock.path, seen.content)


def _remove(path: Path, content: bytes) -> None:
    """Delete the lock of a process that has ended, unless another process has just done so and made its own."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # where files cannot be locked, two that come at once may meet
            import fcntl

            file = stack.enter_context(open(path, "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
        seen = Seen.at(path)
        if seen is not None and seen.content == content:
            path.unlink()


@contextmanager
def held(
    path: Path, *, say: Callable[[str], None], renewed_s: float = RENEWED_S, watched_s: float = WATCHED_S
) -> Iterator[Lock]:
    """Hold the lock `path`, making its folder where there is none; in the end that goes too, if it is empty.

    Args:
        say: takes the line that says for what is waited.

    Raises:
        UserError: if another process holds it, as far as can be known.
    """
    folder = path.parent
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(renewed_s):
            with suppress(OSError, UserError):  # the next check says what is wrong
                lock.renew()

    try:
        lock = Lock(path, Holder.this_process())
        _take(lock, say=say, watched_s=watched_s)
        thread = threading.Thread(target=renew, name="lock", daemon=True)
        thread.start()
        try:
            yield lock
        finally:
            over.set()
            thread.join()
            with suppress(OSError, UserError):
                if lock.is_ours:
                    path.unlink()
    finally:
        with suppress(OSError):  # what is not empty stays
            for place in made:
                place.rmdir()
