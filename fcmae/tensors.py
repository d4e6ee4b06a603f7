"""Tensors by name: safetensors files, and loading into a module strictly; knows no network's names."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.files import atomic_path

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of the numbers that training computes with."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        UserError: if it is missing, truncated or of another kind.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


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


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with an infinity or NaN in it; None where all are finite."""
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel())
    return next((name for name, x in floats if not all(end.isfinite() for end in torch.aminmax(x))), None)


def kind(tensor: Tensor) -> str:
    """Describe dtype and shape, such as "float32 (3, 4)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def differences(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    describe: Callable[[Tensor], object] = lambda tensor: tuple(tensor.shape),
) -> list[str]:
    """List how tensors differ, by name and by what `describe` says of them, from those that are wanted."""
    missing = [f"missing {name}" for name in wanted if name not in tensors]
    unexpected = [f"unexpected {name}" for name in tensors if name not in wanted]
    others = [
        f"{name} is {describe(tensors[name])}, not {describe(value)}"
        for name, value in wanted.items()
        if name in tensors and describe(tensors[name]) != describe(value)
    ]
    return missing + unexpected + others


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """List how tensors differ, by name and shape, from those of `module`."""
    return differences(tensors, module.state_dict())


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Load tensors into `module`, each name and shape exactly as it has them.

    Raises:
        UserError: naming `source` and up to ten tensors that differ.
    """
    problems = misfits(module, tensors)
    if problems:
        raise UserError(
            f"{source}: does not fit the model: {len(problems)} tensors differ: {'; '.join(problems[:10])}"
        )
    module.load_state_dict(dict(tensors))
