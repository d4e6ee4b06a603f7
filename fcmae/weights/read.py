"""Weights of any origin, recognised by content; a pickle's code is never run, and runs are not known here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.encoder.networks import classifier_name
from fcmae.errors import UserError, blame, one_line
from fcmae.heads.segmentation import Segmenter
from fcmae.tensors import misfits, read_safetensors, require_finite
from fcmae.weights.base import (
    MODEL,
    NO_CONVNEXT,
    SEGMENTATION,
    Format,
    Preprocessing,
    Weights,
    build_like,
    describe_encoder,
    read_network,
    split_head,
)
from fcmae.weights.networks import PLAIN, folder_format, read_variant
from fcmae.weights.official import DENSE, SPARSE
from fcmae.weights.programs import ONNX, TORCH_EXPORT
from fcmae.weights.timm import TIMM
from fcmae.weights.torch_files import read_torch
from fcmae.weights.transformers import TRANSFORMERS

FORMATS: dict[str, Format] = {
    form.name: form for form in (TIMM, TRANSFORMERS, DENSE, SPARSE, PLAIN, ONNX, TORCH_EXPORT)
}
"""By name: what `fcmae export --to` takes, and what is read where it recognises its tensors."""

WEIGHT_FILES = (MODEL, "pytorch_model.bin", "model.pth")
"""What weights are called in folders whose other files describe them."""


def find_weights(path: Path) -> Path:
    """Return the file of weights that an exported folder or file stands for.

    Raises:
        UserError: if there is none.
    """
    for candidate in (path, *(path / name for name in WEIGHT_FILES)):
        if candidate.is_file():
            return candidate
    what = (
        "holds no weights"
        if path.is_dir()
        else "neither file nor folder"
        if path.exists()
        else "no such file or folder"
    )
    raise UserError(
        f"{path}: {what}; give a run folder, a checkpoint folder, an exported folder or a file of weights"
    )


def read_tensors(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or PyTorch file, by its own names, out of the entry scripts put them in.

    Raises:
        UserError: if it is damaged, a pickle with code in it, or has no EMA where `ema` asks for it; or a tensor is
            no plain one of finite floats.
    """

    def choose(found: Any) -> Mapping[Any, Any]:
        keys = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
        nested = [found[key] for key in keys if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        if ema and not nested:
            raise UserError(f"{path}: holds no EMA weights, only the raw ones")
        if not nested and not isinstance(found, Mapping):
            raise UserError(f"{path}: holds a {type(found).__name__}, not tensors by name")
        return nested[0] if nested else found

    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        if ema:
            raise UserError(f"{path}: holds no EMA weights, only the raw ones")
        tensors = read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):
        tensors = read_torch(path, choose)
    else:
        raise UserError(f"{path}: neither a safetensors nor a PyTorch file, or a damaged one")
    require_finite(path, tensors)
    return tensors


def recognise(state: Mapping[str, Tensor]) -> Format:
    """Return the format of a state dict, by its names.

    Raises:
        ValueError: if it is none that we know.
    """
    found = next((form for form in FORMATS.values() if form.recognises(state.keys())), None)
    if found is None:
        names = ", ".join(one_line(repr(name), longest=80) for name in list(state)[:3])
        raise ValueError(
            "no ConvNeXt in our, timm's, transformers' or the official names; "
            + (f"it holds {len(state)} tensors: {names}, ..." if state else "it holds no tensors")
        )
    return found


def interpret(
    file: Path,
    state: Mapping[str, Tensor],
    *,
    folder: Path | None = None,
    preprocessing: Preprocessing | None = None,
    network: Mapping[str, Any] | None = None,
) -> Weights:
    """Return the ConvNeXt that is in tensors of any format.

    Args:
        file: where they come from, for messages.
        state: tensors by their own names.
        folder: that whose other files describe them, where there is one.
        preprocessing: if known, in place of what `folder` says.
        network: likewise, see `Weights`.

    Raises:
        UserError: if they are no whole ConvNeXt; the message names the file.
    """
    for prefix in ("module.", "_orig_mod.") * 2:  # left by DistributedDataParallel and torch.compile
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    like = describe_encoder(state)
    with blame(str(file) if like == NO_CONVNEXT else f"{file} (most like {like})"):
        network = read_variant(folder) or read_network(folder) if network is None else network
        state, head = split_head(state)
        form = folder_format(network["variant"]) if "variant" in network else recognise(state)
        assert form.read is not None
        tensors, described = form.read(state, folder)
        classifier = Segmenter.classifier if head else classifier_name(network.get("variant"))
        kind = "plain" if head else form.kind
        weights = Weights(file, tensors, kind, network=network, classifier=classifier, head=head)
        with torch.device("meta"):
            problems = misfits(build_like(weights), weights.state_dict)
    known = preprocessing or described
    if head and known.task is None:
        known = known._replace(task=SEGMENTATION)
    if (known.task == SEGMENTATION) != bool(head):
        holds = "a head that segments" if head else "no head that segments"
        raise UserError(f"{file}: holds {holds}, but what describes it says task={known.task}")
    if not weights.num_classes:
        known = known._replace(class_names=None, task=None)
    elif known.class_names and len(known.class_names) != weights.num_classes:
        raise UserError(
            f"{file}: {weights.num_classes} classes, but the files beside it name {len(known.class_names)}"
        )
    if problems:
        raise UserError(
            f"{file}: {kind} weights of {weights.network_name}, "
            f"but {len(problems)} tensors differ: {'; '.join(problems[:10])}"
        )
    return weights._replace(preprocessing=known)


def read_weights(path: str | Path, *, ema: bool = False) -> Weights:
    """Read the weights of a ConvNeXt in any format, recognised by content; a pickle's code is never run.

    Args:
        path: an exported folder or file of weights (safetensors or PyTorch): ours, timm's, transformers' or the
            official code's. A run is read by `fcmae.load`.
        ema: take the EMA of the weights, which scripts of timm and the official code keep beside them.

    Raises:
        UserError: if there are none, or they are damaged or no whole ConvNeXt; the message names the file.
    """
    file = find_weights(Path(path))
    folder = file.parent if file.name in WEIGHT_FILES else None
    return interpret(file, read_tensors(file, ema=ema), folder=folder)._replace(ema=ema)
