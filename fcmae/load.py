"""The model that a path stands for: a run's, or a file's of any format; joins `training` and `weights`."""

from pathlib import Path

from torch import Tensor

from fcmae.tensors import read_safetensors
from fcmae.training.run_folder import stored_model
from fcmae.weights.read import Weights, find_weights, read_tensors, read_weights


def load_tensors(
    path: str | Path, *, last: bool = False, ema: bool | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that `path` stands for and its tensors, a decoder's too, by their own names."""
    stored = stored_model(Path(path), last=last, ema=ema)
    if stored is not None:
        return stored.file, read_safetensors(stored.file)
    file = find_weights(Path(path))
    return file, read_tensors(file, ema=bool(ema))


def load_weights(path: str | Path, *, last: bool = False, ema: bool | None = None) -> Weights:
    """Return the weights of a ConvNeXt V2 from a run or from a file of any format, recognised by content."""
    stored = stored_model(Path(path), last=last, ema=ema)
    if stored is None:
        return read_weights(path, ema=bool(ema))
    weights = read_weights(stored.file)
    return weights._replace(kind=f"{weights.kind}, {stored.description}")
