"""Tensors by name: safetensors files, and loading into a module strictly; knows no network's names."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcmae.errors import UserError, one_line
from fcmae.files import atomic_path

LONGEST_HEADER = 2**23
"""Bytes of what a file may say of its tensors: a hundred times those of the largest networks."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of the numbers that training computes with."""

DTYPES = (*FLOATS, torch.int64)
"""Of weights and, the last one, of what counts batches in them."""

MOST_AXES = 8


def require_plain(path: Path, tensors: Mapping[Any, tuple[torch.dtype | str, tuple[int, ...]]]) -> None:
    """Check that what a file says of its tensors is said of weights, and that it can hold them.

    Args:
        path: of the file.
        tensors: dtype, or the kind where it is not a dense one, and shape by name.

    Raises:
        UserError: naming the first tensor that is not.
    """
    total, size = 0, path.stat().st_size
    for name, (dtype, shape) in tensors.items():
        shown = f"{path}: {one_line(str(name), longest=80)}"
        if not isinstance(name, str):
            raise UserError(f"{shown} is a number that stands for a tensor's name; save a state dict")
        if isinstance(dtype, str) or dtype not in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{shown} is a {kind} tensor, not a dense one of floats; save its network as float32")
        if len(shape) > MOST_AXES or min(shape, default=1) < 1:
            raise UserError(f"{shown} has {len(shape)} axes, the smallest of {min(shape)}, which no weights have")
        total += math.prod(shape) * dtype.itemsize
        if total > size:
            raise UserError(f"{shown} has more numbers than are in the file; save its weights anew, each whole")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN, or what float32 takes for infinity; None without one."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel()}
    ends = ((name, *(end.item() for end in torch.aminmax(tensor))) for name, tensor in floats.items())
    largest = torch.finfo(torch.float32).max
    return next((name for name, low, high in ends if not -largest <= low <= high <= largest), None)


def require_finite(source: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all numbers are finite, as float32 too.

    Raises:
        UserError: naming `source` and the first tensor with a number that is not.
    """
    if (name := not_finite(tensors)) is not None:
        raise UserError(
            f"{source}: {one_line(name, longest=80)} holds numbers that are not finite, with which a network "
            "computes nothing; take earlier weights, or get the file again"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        UserError: if it is missing, truncated or of another kind, or a tensor is no plain one of floats.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LONGEST_HEADER:
            raise SafetensorError(f"a header of {header} bytes")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        said = one_line(str(error), longest=200)
        raise UserError(f"{path}: not a readable safetensors file ({said})") from error
    require_plain(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    return tensors


def fill_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from any device, as a safetensors file with the header that transformers and timm ask for.

    Where a part of it may lie under its name: in a folder that has none yet.

    Raises:
        OSError: if it cannot be written, such as for a full disk.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own words for what the system said
        raise OSError(str(error)) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As `fill_safetensors`, but under its name there is never a part of the file."""
    with atomic_path(path) as temporary:
        fill_safetensors(temporary, tensors)


def kind(tensor: Tensor) -> str:
    """Describe dtype and shape, such as "float32 (3, 4)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def differences(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    describe: Callable[[Tensor], object],
) -> list[str]:
    """List how tensors differ, by name and by what `describe` says of them, from those that are wanted."""
    missing = [f"missing {name}" for name in wanted if name not in tensors]
    unexpected = [f"unexpected {one_line(name, longest=80)}" for name in tensors if name not in wanted]
    others = [
        f"{name} is {describe(tensors[name])}, not {describe(value)}"
        for name, value in wanted.items()
        if name in tensors and describe(tensors[name]) != describe(value)
    ]
    return missing + unexpected + others


def shape_or_kind(tensor: Tensor) -> object:
    """Describe the shape, and where it is no floats, which loading converts, the dtype too."""
    return tuple(tensor.shape) if tensor.is_floating_point() else kind(tensor)


def misfits(
    module: nn.Module, tensors: Mapping[str, Tensor], describe: Callable[[Tensor], object] = shape_or_kind
) -> list[str]:
    """List how tensors differ, by name and by what `describe` says of them, from those of `module`."""
    return differences(tensors, module.state_dict(), describe)


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path | str,
    describe: Callable[[Tensor], object] = shape_or_kind,
) -> None:
    """Load tensors into `module`, each name, and what `describe` says of it, exactly as it has them.

    Raises:
        UserError: naming `source` and up to ten tensors that differ.
    """
    problems = misfits(module, tensors, describe)
    if problems:
        raise UserError(
            f"{source}: does not fit the model: {len(problems)} tensors differ: {'; '.join(problems[:10])}"
        )
    module.load_state_dict(dict(tensors))
