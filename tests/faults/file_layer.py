"""Stands between a process and its disk: names each change, lets it fail, models a disk; knows no training.

What Python asks of the system to change files below a folder passes through here: `FileLayer` replaces functions
of `os`, `open`, and the one by which safetensors writes, until the process ends. Each write is cut into two halves,
so that what is between two operations includes torn files.
"""

import _pyio
import builtins
import dataclasses
import io
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import safetensors.torch

TEMPORARY = re.compile(r"(\.writing-[^/]+)-[0-9a-f]{16}(?=/|$)")
"""Names of unfinished files, whose last part is random."""

BEST_EFFORT = re.compile(r"(^|/)tensorboard(/|$)")
"""What no promise is made of."""

TAKES_SPACE = ("create", "write", "folder", "link")


class Operation(NamedTuple):
    """A change of the disk, under a name that is the same in each run of one configuration."""

    kind: str
    path: str
    """Below the folder that is watched; of two, the new one."""
    number: int
    """Of those before it of that kind and path."""


class Watcher(Protocol):
    """Sees each operation before it happens; what it raises, the operation raises."""

    def watch(self, disk: "Disk", operation: Operation) -> None: ...


class FileLayer:
    """Lets `watcher` see each operation below `root` of this process, then performs it on the disk and on `disk`.

    Processes forked from this one pass unseen.
    """

    def __init__(self, root: Path, watcher: Watcher) -> None:
        self.root = os.path.realpath(root)
        self.watcher = watcher
        self.disk = Disk(Path(self.root))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lock = threading.RLock()
        self.process = os.getpid()
        self.real = {name: getattr(os, name) for name in REPLACED}

    # Names

    def place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return where a path or file handle points below the root; None for elsewhere, and in other processes."""
        if os.getpid() != self.process:
            return None
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
            if full.endswith(" (deleted)"):
                return None
        else:
            folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            parent, name = os.path.split(os.path.normpath(os.path.join(folder, os.fsdecode(path))))
            full = os.path.join(os.path.realpath(parent), name)
        return full[len(self.root) + 1 :] if f"{full}/".startswith(f"{self.root}/") else None

    def perform(self, kind: str, path: str, change: Callable[[], Any], model: Callable[[], None]) -> Any:
        with self.lock:
            name = TEMPORARY.sub(r"\1", path)
            number = self.counts[kind, name]
            self.counts[kind, name] += 1
            self.watcher.watch(self.disk, Operation(kind, name, number))
            done = change()
            if not BEST_EFFORT.search(path):
                model()
            return done

    # Operations

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self.place(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None

        def change() -> int:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)

        if place is None:
            return change()
        full = os.path.join(self.root, place)
        if flags & os.O_CREAT and not os.path.lexists(full):
            return self.perform("create", place, change, lambda: self.disk.put(place, File()))
        if flags & os.O_TRUNC and os.path.getsize(full):
            return self.perform("truncate", place, change, lambda: self.disk.file(place).content.clear())
        return change()

    def write(self, handle: int, data: Any) -> int:
        place = self.place(handle)
        if place is None:
            return self.real["write"](handle, data)
        whole = bytes(data)
        half = len(whole) // 2
        for part in filter(None, (whole[:half], whole[half:])):
            self.perform("write", place, lambda part=part: self._write_all(handle, part), lambda: None)
        return len(whole)

    def _write_all(self, handle: int, data: bytes) -> None:
        place = self.place(handle)
        assert place is not None
        written = 0
        while written < len(data):
            written += self.real["write"](handle, data[written:])
        if not BEST_EFFORT.search(place):
            end = os.lseek(handle, 0, os.SEEK_CUR)
            self.disk.file(place).content[end - len(data) : end] = data

    def fsync(self, handle: int) -> None:
        place = self.place(handle)
        if place is None:
            return self.real["fsync"](handle)
        return self.perform("sync", place, lambda: self.real["fsync"](handle), lambda: self.disk.sync(place))

    def ftruncate(self, handle: int, length: int) -> None:
        place = self.place(handle)
        if place is None:
            return self.real["ftruncate"](handle, length)

        def cut() -> None:
            content = self.disk.file(place).content
            content[:] = content[:length].ljust(length, b"\0")

        return self.perform("truncate", place, lambda: self.real["ftruncate"](handle, length), cut)

    def rename(self, old: Any, new: Any, **where: Any) -> None:
        source, target = self.place(old, where.get("src_dir_fd")), self.place(new, where.get("dst_dir_fd"))
        if source is None or target is None:
            return self.real["rename"](old, new, **where)
        return self.perform(
            "rename", target, lambda: self.real["rename"](old, new, **where), lambda: self.disk.move(source, target)
        )

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._change(
            "folder", "mkdir", path, mode, dir_fd=dir_fd, model=lambda place: self.disk.put(place, Folder())
        )

    def symlink(self, target: Any, path: Any, *_: Any, dir_fd: int | None = None) -> None:
        place = self.place(path, dir_fd)
        if place is None:
            return self.real["symlink"](target, path, dir_fd=dir_fd)
        return self.perform(
            "link",
            place,
            lambda: self.real["symlink"](target, path, dir_fd=dir_fd),
            lambda: self.disk.put(place, os.fspath(target)),
        )

    def link(self, source: Any, path: Any, **where: Any) -> None:
        old, new = self.place(source, where.get("src_dir_fd")), self.place(path, where.get("dst_dir_fd"))
        if old is None or new is None:
            return self.real["link"](source, path, **where)
        return self.perform(
            "link",
            new,
            lambda: self.real["link"](source, path, **where),
            lambda: self.disk.put(new, self.disk.file(old)),
        )

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._change("remove", "unlink", path, dir_fd=dir_fd, model=self.disk.remove)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._change("remove", "rmdir", path, dir_fd=dir_fd, model=self.disk.remove)

    def _change(
        self, kind: str, name: str, path: Any, *rest: Any, dir_fd: int | None, model: Callable[[str], None]
    ) -> None:
        place = self.place(path, dir_fd)
        if place is None or (kind == "remove" and not os.path.lexists(os.path.join(self.root, place))):
            return self.real[name](path, *rest, dir_fd=dir_fd)
        return self.perform(kind, place, lambda: self.real[name](path, *rest, dir_fd=dir_fd), lambda: model(place))

    # In place of the real ones

    def install(self) -> None:
        """Replace what Python's library calls, for the rest of this process."""
        for name, method in REPLACED.items():
            replacement, real = getattr(self, method), self.real[name]
            for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
                if real in able:
                    able.add(replacement)
            setattr(os, name, replacement)
        real_open = io.open

        def open_in_python(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            writes = set(mode) & set("wax+") and self.place(file) is not None
            return (_pyio.open if writes else real_open)(file, mode, *args, **options)

        io.open = builtins.open = open_in_python

        def serialize_file(tensors: Any, path: Any, metadata: dict[str, str] | None = None) -> None:
            try:  # as the real one: no fsync, and its own words for what the system said
                with open(path, "wb") as file:
                    file.write(safetensors.serialize(tensors, metadata))
            except OSError as error:
                raise safetensors.SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from error

        setattr(safetensors.torch, "serialize_file", serialize_file)  # noqa: B010


REPLACED = {
    "open": "open", "write": "write", "fsync": "fsync", "fdatasync": "fsync", "ftruncate": "ftruncate",
    "rename": "rename", "replace": "rename", "mkdir": "mkdir", "symlink": "symlink", "link": "link",
    "unlink": "unlink", "remove": "unlink", "rmdir": "rmdir",
}  # fmt: skip
"""Function of `os` -> method of `FileLayer` in its place."""


# A disk, and what is on it after the power has failed


class File:
    """Content as the process sees it, and as it was when it was last synced; None for never."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.synced: bytes | None = None


class Folder:
    """Entries as the process sees them; those on the disk, and the changes since, each of which may be there."""

    def __init__(self) -> None:
        self.entries: dict[str, Node] = {}
        self.synced: dict[str, Node] = {}
        self.changes: list[dict[str, Node | None]] = []

    def change(self, names: "Mapping[str, Node | None]") -> None:
        self.changes.append(dict(names))
        _apply(self.entries, names)


Node = File | Folder | str
"""A string is a link's target."""

Tree = dict[str, bytes | str | None]
"""Path -> content of a file, target of a link, or None for a folder."""

Key = frozenset[tuple[str, bytes | str | None]]
"""Of a tree."""


def _apply(entries: dict[str, Node], change: "Mapping[str, Node | None]") -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """A folder as processes see it, and what may be left of it when the power fails: what was synced, at least."""

    def __init__(self, folder: Path) -> None:
        """Begin with what is in `folder`, all of it synced."""
        self.root = Folder()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if BEST_EFFORT.search(name):
                continue
            self.put(name, os.readlink(path) if path.is_symlink() else Folder() if path.is_dir() else File())
            if path.is_file() and not path.is_symlink():
                self.file(name).content[:] = path.read_bytes()
                self.sync(name)
        for path in (folder, *folder.rglob("*")):
            name = "" if path == folder else path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink() and not BEST_EFFORT.search(name):
                self.sync(name)

    def _find(self, path: str) -> Node:
        node: Node = self.root
        for name in filter(None, path.split("/")):
            assert isinstance(node, Folder)
            node = node.entries[name]
        return node

    def _folder_of(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._find(parent)
        assert isinstance(folder, Folder)
        return folder, name

    def file(self, path: str) -> File:
        file = self._find(path)
        assert isinstance(file, File)
        return file

    def put(self, path: str, node: Node) -> None:
        folder, name = self._folder_of(path)
        folder.change({name: node})

    def remove(self, path: str) -> None:
        folder, name = self._folder_of(path)
        folder.change({name: None})

    def move(self, old: str, new: str) -> None:
        (source, name), (target, final) = self._folder_of(old), self._folder_of(new)
        node = source.entries[name]
        if source is target:
            return source.change({name: None, final: node})
        target.change({final: node})
        return source.change({name: None})

    def sync(self, path: str) -> None:
        node = self._find(path)
        if isinstance(node, File):
            node.synced = bytes(node.content)
        elif isinstance(node, Folder):
            node.synced = dict(node.entries)
            node.changes.clear()

    def seen(self) -> Tree:
        """Return what processes see, and what a kill leaves."""
        return _tree(self.root, lambda folder: folder.entries, lambda file: bytes(file.content))

    def survivors(self, fate: "Fate") -> Tree:
        """Return what a power failure leaves."""
        return _tree(self.root, fate.entries, fate.content)


def _tree(
    folder: Folder, entries: Callable[[Folder], Mapping[str, Node]], content: Callable[[File], bytes]
) -> Tree:
    tree: Tree = {}
    for name, node in sorted(entries(folder).items(), key=lambda entry: entry[0]):
        if isinstance(node, Folder):
            tree[name] = None
            tree |= {f"{name}/{path}": value for path, value in _tree(node, entries, content).items()}
        else:
            tree[name] = node if isinstance(node, str) else content(node)
    return tree


class Fate:
    """Decides what survives of what was not synced: a change of names or not, none, a part or all of a content."""

    def __init__(self, names: Callable[[], bool], share: Callable[[], float]) -> None:
        self.names = names
        self.share = share

    def entries(self, folder: Folder) -> Mapping[str, Node]:
        entries = dict(folder.synced)
        for change in folder.changes:
            if self.names():
                _apply(entries, change)
        return entries

    def content(self, file: File) -> bytes:
        synced, now = file.synced or b"", bytes(file.content)
        if now.startswith(synced):
            return synced + now[len(synced) : len(synced) + int(self.share() * (len(now) - len(synced)))]
        return now if self.share() == 1 else synced


def fates(seed: str, number: int) -> list[Fate]:
    """Return the two extremes, nothing unsynced and empty files under all names, and `number` drawn ones."""
    rng = random.Random(seed)
    drawn = Fate(lambda: rng.random() < 0.5, lambda: rng.choice([0, rng.random(), 1]))
    return [Fate(lambda: False, lambda: 0), Fate(lambda: True, lambda: 0), *[drawn] * number]


# What happens at an operation


class Recorder:
    """Keeps what a kill and what a power failure before each operation would leave; each different tree once."""

    def __init__(self, seed: int, fates_drawn: int) -> None:
        self.seed = seed
        self.fates_drawn = fates_drawn
        self.operations: list[Operation] = []
        self.killed: dict[Key, tuple[Operation, Tree]] = {}
        self.unpowered: dict[Key, tuple[Operation, Tree]] = {}
        self.history: list[tuple[Operation, list[Key]]] = []
        """Each operation, and what a power failure before it may leave: first what was synced, alone."""
        self.contents: dict[bytes, bytes] = {}

    def watch(self, disk: Disk, operation: Operation) -> None:
        if BEST_EFFORT.search(operation.path):
            return
        self.operations.append(operation)
        self._note(self.killed, operation, disk.seen())
        left = [disk.survivors(fate) for fate in fates(f"{self.seed} {operation}", self.fates_drawn)]
        self.history.append((operation, [self._note(self.unpowered, operation, tree) for tree in left]))

    def _note(self, found: dict[Key, tuple[Operation, Tree]], operation: Operation, tree: Tree) -> Key:
        tree = {
            TEMPORARY.sub(r"\1-0123456789abcdef", path): self.contents.setdefault(v, v)
            if isinstance(v, bytes)
            else v
            for path, v in tree.items()
        }
        key = frozenset(tree.items())
        found.setdefault(key, (operation, tree))
        return key


@dataclasses.dataclass
class Fault:
    """Something that goes wrong at an operation; with `lasting`, at all after it that take space, too."""

    where: Operation
    number: int
    """Of an error, from `errno`, or of the signal that this process gets."""
    is_signal: bool = False
    lasting: bool = False
    met: list[Operation] = dataclasses.field(default_factory=list)

    def watch(self, disk: Disk, operation: Operation) -> None:
        again = self.lasting and self.met and operation.kind in TAKES_SPACE
        if operation != self.where and not again:
            return
        self.met.append(operation)
        if not self.is_signal:
            raise OSError(self.number, os.strerror(self.number), operation.path)
        if self.number == signal.SIGKILL:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # with all that it started
        os.kill(os.getpid(), self.number)
