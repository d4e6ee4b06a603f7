"""What DDP does between processes, in calls of their own, where its hooks would be in the way; knows no network."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

TOGETHER = 2**24
"""Values that travel together, 64 MB of float32: few messages, and the next is gathered while one travels."""


def is_fast(number: int) -> bool:
    """Whether so many processes exchange gradients in little of an update's time: on one machine, by NVLink.

    CUDA says only which GPUs read each other's memory: those without NVLink mostly do not.
    """
    here = number == int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    pairs = itertools.permutations(range(number), 2)
    return here and all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)


def share(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by the main process's."""
    _send(tensors, lambda flat: torch.distributed.broadcast(flat, src=0, async_op=True))


def average(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Overwrite tensors by their means over the processes, which all have them in the same order and shapes.

    As DDP does, each process divides its own before they are summed, in `dtype`, or else their own.
    """
    number = torch.distributed.get_world_size()
    _send(tensors, lambda flat: torch.distributed.all_reduce(flat.div_(number), async_op=True), dtype)


@torch.no_grad()
def _send(tensors: Iterable[Tensor], begin: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> None:
    sent: list[tuple[list[Tensor], Tensor, Any]] = []
    for part in _parts(tensors):
        flat = torch.cat([tensor.flatten() for tensor in part]).to(dtype or part[0].dtype)
        sent.append((part, flat, begin(flat)))
    for part, flat, message in sent:
        message.wait()  # for which a GPU waits, and no processor
        values = flat.split([tensor.numel() for tensor in part])
        received = [value.view_as(tensor) for value, tensor in zip(values, part, strict=True)]
        torch._foreach_copy_(part, received)  # pyright: ignore[reportPrivateImportUsage]


def _parts(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype, at a time about `TOGETHER` values."""
    ordered = sorted(tensors, key=lambda tensor: str(tensor.dtype))
    ends = itertools.accumulate(tensor.numel() for tensor in ordered)
    parts = itertools.groupby(zip(ordered, ends, strict=True), key=lambda p: (p[0].dtype, p[1] // TOGETHER))
    for _, part in parts:
        yield [tensor for tensor, _ in part]
