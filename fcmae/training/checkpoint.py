"""Checkpoint folders: safetensors and JSON, so that at no instant there is none; knows no run folder or network.

RUN/checkpoints/step-00001000/
    model.safetensors       parameters by their dense names
    optimizer.safetensors   AdamW's state, as `state.NAME.exp_avg` and so on
    ema.safetensors         the EMA of the parameters, where the run keeps one
    state.json              step, images seen, configuration, versions
RUN/checkpoints/last        a link to the newest
RUN/checkpoints/best        a link to the one with the highest score, where the run has scores; never deleted
"""

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fcmae.errors import UserError
from fcmae.files import WRITING, atomic_folder, point_link, write_json
from fcmae.tensors import read_safetensors, write_safetensors

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
EMA = "ema.safetensors"
LAST, BEST = "last", "best"


class Checkpoint(NamedTuple):
    """A checkpoint read from disk."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    ema: dict[str, Tensor] | None


# The optimizer's state

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `state.PARAMETER.KIND`; none before the first update."""
    if not optimizer.state:  # for which torch would make a step of its own
        return {}
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def _current_name(name: str) -> str:
    """Name a tensor of the optimizer as today; fcmae 0.1.0 wrote `KIND.PARAMETER`."""
    kind, _, parameter = name.partition(".")
    return name if kind == "state" else f"state.{parameter}.{kind}"


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: Path | str
) -> None:
    """Put `optimizer_tensors` back, each on its parameter's device; the groups keep their own rates and decays.

    Raises:
        UserError: naming `source`, if they are another optimizer's.
    """
    if not tensors:
        return
    tensors = {_current_name(name): value for name, value in tensors.items()}
    own = get_optimizer_state_dict(model, optimizer, options=FLAT)
    differing = {name for name, value in own.items() if isinstance(value, Tensor)} ^ tensors.keys()
    if differing:
        raise UserError(
            f"{source}: {len(differing)} tensors are not those of this optimizer, such as {min(differing)}; "
            "resume with the configuration of the run, or start a new run with init_from"
        )
    merged: dict[str, Any] = {**own, **tensors}
    set_optimizer_state_dict(model, optimizer, merged, options=FLAT)


# Folders


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is among those in `folder`."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


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

    The checkpoint of step `best` is pointed at by `folder/best` and never deleted. A kill at any instant leaves the
    older ones. A step that is there already stays as it is: a run has one state at a step.

    Raises:
        UserError: if it could not be written, such as for a full disk; older checkpoints are untouched.
    """
    final = step_folder(folder, step)
    if final.exists():
        return final
    try:
        for leftover in folder.glob(f"{WRITING}*"):  # of a kill
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
        with atomic_folder(final) as temporary:
            for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer), (EMA, ema)):
                if tensors is not None:
                    write_safetensors(temporary / name, tensors)
            write_json(temporary / STATE, {"step": step, **state})
        point_link(folder / LAST, final.name)
        if best is not None:
            point_link(folder / BEST, step_folder(folder, best).name)
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        raise UserError(
            f"{final}: not written, {'the disk is full' if full else error}; earlier checkpoints are intact: "
            "free some space and start the same command with resume=auto"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if best is None or old != step_folder(folder, best):
            shutil.rmtree(old)
    return final


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint folder holds besides tensors.

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
