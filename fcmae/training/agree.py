"""Processes that disagree end, all of them, with a line that says in what; knows no configuration or data."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed

from fcmae.errors import UserError, describe, shown

T = TypeVar("T")

NAMED = 3
"""Differences that are named, of many."""


def _everyones(value: Any) -> list[Any]:
    """Return what each process gives, the same list in all; called by all."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def agree(facts: Mapping[str, object], remedy: str) -> None:
    """Make sure that facts are the same in all processes, which all ask at the same place.

    Args:
        facts: what JSON can hold, by what it is called.
        remedy: what to do about a difference.

    Raises:
        UserError: in all of them, naming what differs first, and a process where it does.
    """
    if not torch.distributed.is_initialized():
        return
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    if len(set(_everyones(digest))) == 1:
        return
    first, *others = _everyones(texts)
    rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    different = [
        f"{name} is {shown(json.loads(first.get(name, 'null')))} in process 0, but "
        f"{shown(json.loads(other.get(name, 'null')))} in process {rank}"
        for name in names[:NAMED]
    ]
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise UserError(f"processes disagree: {'; '.join(different)}{more}; {remedy}")


def in_all(do: Callable[[], T]) -> T:
    """Return what `do` returns in this process; if it fails in any, all end with what is said there.

    Raises:
        UserError: what the first of those says where it failed, and where it did not.
    """
    if not torch.distributed.is_initialized():
        return do()
    result: list[T] = []
    said = None
    try:
        result.append(do())
    except Exception as error:
        if (said := describe(error)) is None:
            raise
    errors: list[str | None] = _everyones(said)
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return result[0]
    line = str(errors[failed[0]])
    if len(failed) < len(errors):
        fine = next(rank for rank in range(len(errors)) if rank not in failed)
        line += f" (in process {failed[0]}, but not in process {fine}: all processes must see the same files)"
    raise UserError(line)
