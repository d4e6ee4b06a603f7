"""Checkpoints on disk: safetensors and JSON, written so that at no instant there is none; nothing is unpickled.

RUN/checkpoints/step-00001000/
    model.safetensors       parameters by their dense names
    optimizer.safetensors   AdamW's state, as `exp_avg.NAME` and so on
    ema.safetensors         the EMA of the parameters, where the run keeps one
    state.json              step, images seen, configuration, versions
RUN/checkpoints/last        a link to the newest
RUN/checkpoints/best        a link to the one with the highest score, where the run has scores; never deleted
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.tensors import read_safetensors

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
EMA = "ema.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint read from disk."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    ema: dict[str, Tensor] | None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: str) -> None:
    """Point `link` at its sibling `target`, replacing what is there in one instant."""
    temporary = link.with_name(f".writing-{link.name}")
    os.symlink(target, temporary)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # a copy of the run that followed the link
    os.replace(temporary, link)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `KIND.PARAMETER`, such as `exp_avg.encoder.norm.weight`."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back, each on its parameter's device."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    ema: Mapping[str, Tensor] | None = None,
    best: int | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX`, point `folder/last` at it, then delete all but the newest `keep`.

    The checkpoint of step `best` is pointed at by `folder/best` and never deleted. Each is written under another
    name, synced to disk and renamed: a kill at any instant leaves the older ones.
    A step that is there already stays as it is: a run has one state at a step.

    Raises:
        UserError: if it could not be written, such as for a full disk; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / f".writing-{final.name}"
    try:
        for leftover in folder.glob(".writing-*"):
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer), (EMA, ema)):
            if tensors is not None:
                save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        os.rename(temporary, final)
        _link(folder / "last", final.name)
        if best is not None:
            _link(folder / "best", f"step-{best:08d}")
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise UserError(
            f"{final}: not written, {'the disk is full' if full else error}; earlier checkpoints are intact: "
            "free some space and start the same command with resume=auto"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if best is None or old.name != f"step-{best:08d}":
            shutil.rmtree(old)
    return final


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint folder of a run folder, or None."""
    complete = [path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file()]
    return max(complete, default=None)


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint folder tells besides tensors.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / STATE}: damaged or missing ({error}); delete {path} to use an older one"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: if a file is missing or damaged.
    """
    state = read_state(path)
    ema = read_safetensors(path / EMA) if (path / EMA).is_file() else None
    return Checkpoint(path, read_safetensors(path / MODEL), read_safetensors(path / OPTIMIZER), state, ema)
