"""Tensors by name: safetensors files, and loading into a module strictly; knows no network's names."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.files import atomic_path


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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from any device, as a safetensors file with the header that transformers and timm ask for.

    Under its name there is never a part of it.

    Raises:
        OSError: if it cannot be written, such as for a full disk.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # its own words for what the system said
        raise OSError(str(error)) from error


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """List how tensors differ, by name and shape, from those of `module`."""
    wanted = module.state_dict()
    missing = [f"missing {name}" for name in wanted if name not in tensors]
    unexpected = [f"unexpected {name}" for name in tensors if name not in wanted]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    return missing + unexpected + shapes


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
