"""The official code's formats, dense and sparse (MinkowskiEngine), and the dense one in safetensors, "plain"."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXtV2
from fcmae.tensors import read_safetensors, write_safetensors
from fcmae.weights.base import (
    MODEL,
    OUR_NAMES,
    OURS,
    Format,
    Names,
    Preprocessing,
    Weights,
    build_encoder,
    inverse,
    read_description,
    translate,
    without_idle_norm,
    write_description,
)

TORCH_FILE = "model.pth"

SPARSE_NAMES: Names = {
    # ours (official dense)                  official encoder over MinkowskiEngine
    "downsample_layers.0.{layer}.{p}": "downsample_layers.0.{layer}.{p}",
    "downsample_layers.{later}.0.{p}": "downsample_layers.{later}.0.ln.{p}",
    "downsample_layers.{later}.1.weight": "downsample_layers.{later}.1.kernel",
    "downsample_layers.{later}.1.bias": "downsample_layers.{later}.1.bias",
    "stages.{stage}.{block}.dwconv.weight": "stages.{stage}.{block}.dwconv.kernel",
    "stages.{stage}.{block}.dwconv.bias": "stages.{stage}.{block}.dwconv.bias",
    "stages.{stage}.{block}.norm.{p}": "stages.{stage}.{block}.norm.ln.{p}",
    "stages.{stage}.{block}.pwconv{n}.{p}": "stages.{stage}.{block}.pwconv{n}.linear.{p}",
    "stages.{stage}.{block}.grn.gamma": "stages.{stage}.{block}.grn.gamma",
    "stages.{stage}.{block}.grn.beta": "stages.{stage}.{block}.grn.beta",
}
"""Every name there is; it has no final norm and no classifier. `_kernel_to_weight` and (1, c) are its shapes."""


def _without_decoder(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take the encoder's tensors, prefix stripped, out of a whole FCMAE, official or ours; others stay."""
    if not any(name.startswith("encoder.") for name in state):
        return state
    decoder = ("decoder.", "proj.", "pred.", "mask_token")
    return {name.removeprefix("encoder."): v for name, v in state.items() if not name.startswith(decoder)}


def from_official_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder, with its classifier if there is one, out of a state dict in official dense names.

    Those are our names. A decoder beside the encoder is left out; GRN becomes (1, 1, 1, c) whatever it was.

    Raises:
        ValueError: if a key is unknown.
    """
    state = _without_decoder(state)
    translate(state, OUR_NAMES, OURS)
    out = {name: v.reshape(1, 1, 1, -1) if ".grn." in name else v for name, v in state.items()}
    return without_idle_norm(out)


def _kernel_to_weight(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's kernel (k * k, c) or (k * k, i, o), rows fastest, as (c, 1, k, k) or (o, i, k, k)."""
    k = math.isqrt(len(kernel))
    if k * k != len(kernel) or kernel.ndim not in (2, 3):
        raise ValueError(f"a kernel of shape {tuple(kernel.shape)} is none of a square window")
    if kernel.ndim == 2:
        return rearrange(kernel, "(w h) c -> c 1 h w", w=k).contiguous()
    return rearrange(kernel, "(w h) i o -> o i h w", w=k).contiguous()


def _weight_to_kernel(weight: Tensor, *, depthwise: bool) -> Tensor:
    """Undo `_kernel_to_weight`."""
    pattern = "c 1 h w -> (w h) c" if depthwise else "o i h w -> (w h) i o"
    return rearrange(weight, pattern).contiguous()


def official_sparse_to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder out of a state dict of the official code over MinkowskiEngine, by our names and shapes.

    The numbers stay exactly the same; a decoder beside the encoder is left out, and what is dense already stays.

    Raises:
        ValueError: if a key is unknown, or a shape is none of that code's.
    """
    state = _without_decoder(state)
    what = "an official ConvNeXt V2 encoder over MinkowskiEngine"
    out: dict[str, Tensor] = {}
    for name, ours in translate(state, {**inverse(SPARSE_NAMES), **OUR_NAMES}, what).items():
        tensor = state[name]
        try:
            if name.endswith(".kernel"):
                tensor = _kernel_to_weight(tensor)
            elif ".grn." in name and tensor.ndim != 4:
                tensor = rearrange(tensor, "1 c -> 1 1 1 c")
            elif name.endswith(".bias") and tensor.ndim != 1:
                tensor = rearrange(tensor, "1 c -> c")
        except (ValueError, EinopsError) as error:
            raise ValueError(
                f"{name}: a shape of {tuple(tensor.shape)} is not the official sparse code's"
            ) from error
        out[ours] = tensor
    return out


def dense_to_official_sparse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and shape the state dict of a `ConvNeXtV2` without classifier as the official sparse encoder has it.

    Raises:
        ValueError: if a key is unknown there, as those of a final norm and a classifier are.
    """
    out: dict[str, Tensor] = {}
    for ours, name in translate(state, SPARSE_NAMES, f"{OURS}, without norm and head").items():
        tensor = state[ours]
        if name.endswith(".kernel"):
            tensor = _weight_to_kernel(tensor, depthwise=".dwconv." in name)
        elif ".grn." in name:
            tensor = tensor.flatten()[None]
        elif re.fullmatch(r".*\.dwconv\.bias|downsample_layers\.[1-3]\.1\.bias", name):
            tensor = tensor[None]
        out[name] = tensor
    return out


def is_sparse(names: Collection[str]) -> bool:
    return any(name.endswith(".dwconv.kernel") for name in names)


def is_dense(names: Collection[str]) -> bool:
    stem = "downsample_layers.0.0.weight"
    return (stem in names or f"encoder.{stem}" in names) and not is_sparse(names)


def write_dense(encoder: ConvNeXtV2, preprocessing: Preprocessing, folder: Path) -> None:
    torch.save({"model": encoder.state_dict()}, folder / TORCH_FILE)
    write_description(encoder, preprocessing, folder)


def write_sparse(encoder: ConvNeXtV2, preprocessing: Preprocessing, folder: Path) -> None:
    if encoder.num_classes:
        raise ValueError("the official sparse code has no classifier; take official, or export an encoder")
    torch.save({"model": dense_to_official_sparse(encoder.state_dict())}, folder / TORCH_FILE)
    write_description(encoder, preprocessing, folder)


def write_plain(encoder: ConvNeXtV2, preprocessing: Preprocessing, folder: Path) -> None:
    write_safetensors(folder / MODEL, encoder.state_dict())
    write_description(encoder, preprocessing, folder)


def _run(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    return build_encoder(Weights(Path(TORCH_FILE), tensors, "")).to(images.dtype).eval()(images)


def compute(folder: Path, images: Tensor) -> Tensor:
    state = torch.load(folder / TORCH_FILE, weights_only=True)["model"]
    return _run(official_sparse_to_dense(state) if is_sparse(state) else from_official_dense(state), images)


def compute_plain(folder: Path, images: Tensor) -> Tensor:
    return _run(from_official_dense(read_safetensors(folder / MODEL)), images)


def how(encoder: ConvNeXtV2, folder: Path) -> str:
    return f'torch.load("{folder / TORCH_FILE}")["model"]'


DENSE = Format(
    name="official",
    kind="official dense",
    recognises=is_dense,
    read=lambda state, folder: (from_official_dense(state), read_description(folder)),
    write=write_dense,
    compute=compute,
    how=how,
)
SPARSE = Format(
    name="official-sparse",
    kind="official sparse (MinkowskiEngine)",
    recognises=is_sparse,
    read=lambda state, folder: (official_sparse_to_dense(state), read_description(folder)),
    write=write_sparse,
    compute=compute,
    how=how,
)
PLAIN = Format(
    name="plain",
    write=write_plain,
    compute=compute_plain,
    how=lambda encoder, folder: f'safetensors.torch.load_file("{folder / MODEL}")',
)
"""Read as `DENSE` is, whose names it has."""
