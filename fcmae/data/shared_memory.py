"""How batches come from the processes that load them where shared memory is small; knows no images."""

import math
import os
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux has the memory through which processes pass tensors; containers give it 64 MB."""

PAGE = 4096
SEMAPHORE_PAGES, WORKER_PAGES = 16, 4
"""Pages of shared memory that a loader's queues take, and those of each of its processes: 8 and 3, and some."""

IN_HAND = 4
"""Batches that may be in shared memory besides those in queues: received, but not yet copied or done with."""

Held = TypeVar("Held")


def free_shared_bytes() -> float:
    """Return this process's share of the shared memory that is free; infinity where the system has no limit."""
    if sys.platform != "linux":
        return math.inf
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Transport(NamedTuple):
    """How a loader's batches come to this process."""

    num_workers: int
    """Processes that load; 0 loads in this one."""
    piped: bool
    """Whether they come through pipes, as arrays, and not through shared memory, as tensors."""
    line: str
    """For the user, where that is not as asked; or empty."""


def choose_transport(num_workers: int, queued_bytes: int, free_bytes: float) -> Transport:
    """Choose how batches travel, so that shared memory is enough for the processes and all batches at once.

    Args:
        num_workers: processes that are asked for.
        queued_bytes: of all batches that may lie in shared memory; 0 where none do.
        free_bytes: of shared memory.
    """
    overhead = PAGE * (SEMAPHORE_PAGES + WORKER_PAGES * num_workers)
    if not num_workers or overhead + queued_bytes <= free_bytes:
        return Transport(num_workers, False, "")
    enough = f"docker run --shm-size={math.ceil((overhead + queued_bytes) / 2**30)}g or --ipc=host gives enough"
    lack = f"{SHARED_MEMORY}: {free_bytes / 1e6:,.1f} MB of shared memory free"
    if overhead > free_bytes:
        return Transport(0, False, f"{lack}, none for processes that load images: they load here, slower; {enough}")
    needed = f"{queued_bytes / 1e6:,.0f} MB needed for the batches of {num_workers} processes"
    return Transport(num_workers, True, f"{lack}, {needed}: they come through pipes, a little slower; {enough}")


@cache
def say_once(line: str) -> None:
    """Print a line on standard error: once, and by one process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class _Pixels(NamedTuple):
    """A tensor without its memory: contiguous values, and the order in which memory had the axes."""

    values: np.ndarray
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Pixels":
        order = tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        return cls(np.ascontiguousarray(tensor.permute(order).numpy()), order)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.values).permute([self.order.index(axis) for axis in range(len(self.order))])


@dataclass(frozen=True)
class Piped(Generic[Held]):
    """A dataclass of tensors on its way through a pipe, as arrays."""

    kind: type[Held]
    values: dict[str, Any]

    @classmethod
    def of(cls, held: Any) -> "Piped[Any]":
        values = {field.name: getattr(held, field.name) for field in fields(held)}
        return cls(type(held), {name: _Pixels.of(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    def unpack(self) -> Held:
        """Return it as it was, strides and all."""
        return self.kind(**{name: v.tensor() if isinstance(v, _Pixels) else v for name, v in self.values.items()})

    def pin_memory(self) -> Any:
        """Return it as it was, in pinned memory: what a DataLoader does with a batch on its arrival."""
        return self.unpack().pin_memory()  # pyright: ignore[reportAttributeAccessIssue]


def unpacked(batch: Any) -> Any:
    """Return a batch as it was before it was sent."""
    return batch.unpack() if isinstance(batch, Piped) else batch
