"""The official code's formats, dense and sparse (MinkowskiEngine)."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXt, Version
from fcmae.files import write_by
from fcmae.weights.base import (
    OUR_NAMES,
    OURS,
    Format,
    Loading,
    Names,
    Preprocessing,
    Weights,
    build_encoder,
    convert,
    read_description,
    read_network,
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
"""Every name there is, of version 2 alone; it has no final norm and no classifier.

`_kernel_to_weight` and (1, c) are its shapes."""


DECODER = ("decoder.", "proj.", "pred.", "mask_token")
"""How names of the decoder's tensors begin in the official code's whole FCMAE."""


def decoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the decoder out of a whole FCMAE, ours or the official code's, by our names; empty without one."""
    if any(name.startswith("decoder.pred.") for name in state):
        return {name.removeprefix("decoder."): v for name, v in state.items() if name.startswith("decoder.")}
    if "pred.weight" in state:
        return {name: v for name, v in state.items() if name.startswith(DECODER)}
    return {}


def _without_decoder(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take the encoder's tensors, prefix stripped, out of a whole FCMAE, official or ours; others stay."""
    if not any(name.startswith("encoder.") for name in state):
        return state
    return {name.removeprefix("encoder."): v for name, v in state.items() if not name.startswith(DECODER)}


def from_official_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder, with its classifier if there is one, out of a state dict in official dense names.

    Those are our names. A decoder beside the encoder is left out; GRN becomes (1, 1, 1, c) whatever it was.

    Raises:
        ValueError: if a key is unknown.
    """
    grn = (".grn.gamma", ".grn.beta")
    out = convert(_without_decoder(state), OUR_NAMES, OURS)
    return without_idle_norm({name: v.reshape(1, 1, 1, -1) if name.endswith(grn) else v for name, v in out.items()})


def _kernel_to_weight(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's kernel (k * k, c) or (k * k, i, o), rows fastest, as (c, 1, k, k) or (o, i, k, k)."""
    k = math.isqrt(len(kernel))
    if k * k != len(kernel) or kernel.ndim not in (2, 3):
        raise ValueError(f"a kernel of shape {tuple(kernel.shape)} is none of a square window")
    if kernel.ndim == 2:
        return rearrange(kernel, "(w h) c -> c 1 h w", w=k).contiguous()
    return rearrange(kernel, "(w h) i o -> o i h w", w=k).contiguous()


def official_sparse_to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder out of a state dict of the official code over MinkowskiEngine, by our names and shapes.

    The numbers stay exactly the same; a decoder beside the encoder is left out, and what is dense already stays.

    Raises:
        ValueError: if a key is unknown, or a shape is none of that code's.
    """

    def reshape(name: str, tensor: Tensor) -> Tensor:
        try:
            if name.endswith(".kernel"):
                return _kernel_to_weight(tensor)
            if ".grn." in name and tensor.ndim != 4:
                return rearrange(tensor, "1 c -> 1 1 1 c")
            return rearrange(tensor, "1 c -> c") if name.endswith(".bias") and tensor.ndim != 1 else tensor
        except (ValueError, EinopsError) as error:
            raise ValueError(
                f"{name}: a shape of {tuple(tensor.shape)} is not the official sparse code's"
            ) from error

    table = {sparse: ours for ours, sparse in SPARSE_NAMES.items()} | dict(OUR_NAMES)
    return convert(_without_decoder(state), table, "an official ConvNeXt encoder over MinkowskiEngine", reshape)


def dense_to_official_sparse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and shape the state dict of a `ConvNeXt` without classifier as the official sparse encoder has it.

    Raises:
        ValueError: if there is a classifier, or a key is unknown there, as those of a final norm are.
    """
    if "head.weight" in state:
        raise ValueError("the official sparse code has no classifier; take official, or export an encoder")

    def reshape(name: str, tensor: Tensor) -> Tensor:
        if ".grn." in name:
            return tensor.flatten()[None]
        if not re.fullmatch(r"(.*\.dwconv|downsample_layers\.[1-3]\.1)\.(weight|bias)", name):
            return tensor
        if name.endswith(".bias"):
            return tensor[None]
        pattern = "c 1 h w -> (w h) c" if ".dwconv." in name else "o i h w -> (w h) i o"
        return rearrange(tensor, pattern).contiguous()

    return convert(state, SPARSE_NAMES, f"{OURS}, without norm and head", reshape)


def is_sparse(names: Collection[str]) -> bool:
    return any(name.endswith(".dwconv.kernel") for name in names)


def is_dense(names: Collection[str]) -> bool:
    stem = "downsample_layers.0.0.weight"
    return (stem in names or f"encoder.{stem}" in names) and not is_sparse(names)


def _compute(tensors: dict[str, Tensor], folder: Path, images: Tensor) -> Tensor:
    weights = Weights(folder, tensors, "", network=read_network(folder))
    return build_encoder(weights).to(images.dtype).eval()(images)


LOADING = Loading(
    "fcmae",
    "import fcmae\n\nmodel = fcmae.load_encoder({folder}).eval()",
    warning=f"\n`{TORCH_FILE}` is a file as the official code saves them, which its `--finetune` takes.\n",
)


def _official(
    name: str,
    kind: str,
    recognises: Callable[[Collection[str]], bool],
    to_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    from_ours: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    networks: Collection[tuple[Version, str]],
) -> Format:
    """A file as the official scripts save and load them, our description beside it."""

    def write(encoder: ConvNeXt, preprocessing: Preprocessing, folder: Path) -> None:
        state = {"model": from_ours(encoder.state_dict())}
        write_by(lambda file: torch.save(state, file), folder / TORCH_FILE)
        write_description(encoder, preprocessing, folder)

    def compute(folder: Path, images: Tensor) -> Tensor:
        return _compute(to_ours(torch.load(folder / TORCH_FILE, weights_only=True)["model"]), folder, images)

    return Format(
        name=name,
        kind=kind,
        networks=networks,
        recognises=recognises,
        read=lambda state, folder: (to_ours(state), read_description(folder)),
        write=write,
        compute=compute,
        how=lambda encoder, folder: f'torch.load("{folder / TORCH_FILE}")["model"]',
        loading=lambda encoder, use: LOADING,
    )


DENSE = _official(
    "official",
    "official dense",
    is_dense,
    from_official_dense,
    dict,
    networks=((1, "none"), (2, "none"), (2, "grn")),
)
SPARSE = _official(
    "official-sparse",
    "official sparse (MinkowskiEngine)",
    is_sparse,
    official_sparse_to_dense,
    dense_to_official_sparse,
    networks=((2, "grn"),),
)
