"""Folders of shards made in parallel, by a plan that says whose they are; knows not what a shard is made of."""

import hashlib
import json
import math
import sys
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fcmae.data.shared_memory import choose_transport, free_shared_bytes, say_once
from fcmae.data.sources import Source
from fcmae.errors import UserError
from fcmae.files import WRITING, write_text

Record = TypeVar("Record")
"""What is known of a finished shard."""


class Work(Dataset[Any], Generic[Record]):
    """Shards by number, checked where they are there and else made: the work that processes share."""

    unit = " images"

    def __init__(self, num_images: int, shard_images: int) -> None:
        self.num_images = num_images
        self.shard_images = shard_images

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.shard_images)

    def indices(self, shard: int) -> range:
        """Return which of all images a shard is to hold."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.num_images))

    @abstractmethod
    def intact(self, shard: int) -> Record | None:
        """Return the record of a shard that is there, whole and undamaged."""

    @abstractmethod
    def write(self, shard: int) -> Record:
        """Make a shard."""

    def __getitem__(self, shard: int) -> tuple[int, Record | OSError | UserError, bool]:
        """Return the shard's number, its record, and whether it was made just now."""
        try:
            record = self.intact(shard)
            return shard, record or self.write(shard), record is None
        except (
            OSError,
            UserError,
        ) as error:  # as it is: a DataLoader's has lost its number and file
            return shard, error, False

    def make_all(self, num_workers: int) -> tuple[list[Record], int]:
        """Make what is missing or damaged in so many processes; returns all records, and how many were made.

        Raises:
            OSError: as writing does; or `UserError`.
        """
        records: dict[int, Record] = {}
        written = 0
        transport = choose_transport(num_workers, 0, free_shared_bytes())
        if transport.line:
            say_once(transport.line)
        loader: Any = DataLoader(  # tuple: what it holds stays as it is
            self, batch_size=None, num_workers=transport.num_workers, in_order=False, collate_fn=tuple
        )
        hidden = not sys.stderr.isatty()
        with tqdm(total=self.num_images, unit=self.unit, dynamic_ncols=True, disable=hidden) as bar:
            for shard, record, fresh in loader:
                if isinstance(record, OSError | UserError):
                    raise record
                records[shard] = record
                written += fresh
                bar.update(len(self.indices(shard)))
        return [records[shard] for shard in range(len(self))], written


def fingerprint(source: Source, root: str) -> str:
    """Hash the names, below `root`, and labels of all images: what distinguishes one source from another."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.describe(index).removeprefix(root)}\n".encode(errors="surrogateescape"))
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    digest.update("\n".join(source.class_names or ()).encode())
    return digest.hexdigest()


def read_plan(path: Path) -> dict[str, Any]:
    """Return what was asked for in a folder; nothing where that is not what the file says."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def claim(path: Path, plan: dict[str, Any], *, command: str, before: Mapping[str, Any] | None = None) -> None:
    """Make a folder this plan's, or find that it is.

    Args:
        path: of the plan in the folder.
        plan: what is asked for, among that the "source" of the images.
        command: that writes such folders.
        before: what older plans do not say.

    Raises:
        UserError: if it is another's, or the images are already in a folder beside it.
    """
    folder = path.parent
    for other in sorted(folder.parent.glob(f"*/{path.name}")):
        if other != path and read_plan(other).get("source") == plan["source"]:
            raise UserError(f"{folder}: {other.parent} holds these images already; give each split its own")
    if path.is_file():
        found = read_plan(path)
        found = found and {**(before or {}), **found}
        if not plan.keys() <= found.keys():
            raise UserError(f"{path}: not written by {command}; name another folder")
        changes = [f"{name} {found[name]} -> {value}" for name, value in plan.items() if found[name] != value]
        if changes:
            named = ["other files or labels" if change.startswith("source") else change for change in changes]
            raise UserError(f"{folder}: was written differently ({', '.join(named)}); name another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files that {command} did not write; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.rglob(f"{WRITING}*"), *folder.rglob("*.tmp")):  # by a killed run; .tmp by 0.1.0
        left.unlink()
    write_text(path, json.dumps(plan, indent=1))
