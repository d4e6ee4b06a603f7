"""Formats of networks other than our ConvNeXt, by their variant; knows no name of their tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fcmae.encoder.base import Network
from fcmae.encoder.networks import is_other
from fcmae.files import write_json
from fcmae.patches import grid_shape
from fcmae.tensors import load_strictly, read_safetensors, write_safetensors
from fcmae.weights import timm
from fcmae.weights.base import (
    CONFIG,
    MODEL,
    Format,
    Preprocessing,
    build_untrained,
    describe_pixels,
    description,
    read_description,
    require_arguments,
    write_description,
)
from fcmae.weights.programs import ONNX, TORCH_EXPORT

if TYPE_CHECKING:
    from fcmae.encoder.timm_networks import TimmNetwork

OURS = ("convnext_", "convnextv2_")
"""What timm's names of networks begin with that are read as our ConvNeXt, unless the folder says otherwise."""


def read_variant(folder: Path | None) -> Mapping[str, Any]:
    """Read from the description in a folder which other network's weights are in it.

    Returns:
        Arguments of `build_network`; none where they are of our ConvNeXt, or there is no description.
    """
    with description(folder) as config:
        if is_other(config.get("network", {}).get("variant")):
            network = {key: value for key, value in config["network"].items() if key != "num_classes"}
            return require_arguments(network)
        architecture = config.get("architecture", OURS[0])
        if "variant" not in config and architecture.startswith(OURS):
            return {}
        in_chans = config.get("model_args", {}).get("in_chans", 3)
        return require_arguments({"variant": config.get("variant", f"timm/{architecture}"), "in_chans": in_chans})


def without_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder's tensors out of a whole FCMAE of ours; others stay."""
    if not any(name.startswith("decoder.") for name in state):
        return dict(state)
    return {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}


def read_timm(state: Mapping[str, Tensor], folder: Path | None) -> tuple[dict[str, Tensor], Preprocessing]:
    with description(folder) as config:
        return without_decoder(state), timm.read_preprocessing(config)


def write_timm(network: "TimmNetwork", preprocessing: Preprocessing, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, for `timm.create_model("local-dir:FOLDER", ...)`."""
    use = preprocessing.completed(network)
    config = {
        "architecture": network.architecture,
        "variant": network.variant,
        "num_classes": network.num_classes,
        "num_features": network.dims[-1],
        **({"model_args": {"in_chans": network.in_chans}} if network.in_chans != 3 else {}),
        **describe_pixels(use),
        **({"task": use.task} if use.task is not None else {}),
        "pretrained_cfg": {
            "num_classes": network.num_classes,
            "input_size": [network.in_chans, *use.image_size],
            "pool_size": list(grid_shape(use.image_size, network.patch_size)),
            "first_conv": network.model.default_cfg.get("first_conv"),
            "classifier": network.classifier,
            **timm.describe_preprocessing(use),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / MODEL, network.state_dict())
    write_json(folder / CONFIG, config, indent=2)


def write_plain(network: Network, preprocessing: Preprocessing, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / MODEL, network.state_dict())
    write_description(network, preprocessing, folder)


def compute_plain(folder: Path, images: Tensor) -> Tensor:
    with description(folder) as config:
        num_classes = config["network"]["num_classes"]
    network = build_untrained({}, num_classes=num_classes, network=read_variant(folder))
    load_strictly(network, read_safetensors(folder / MODEL), folder)
    return network.to(images.dtype).eval()(images)


TIMM = Format(name="timm", kind="timm", read=read_timm, write=write_timm, compute=timm.compute, how=timm.TIMM.how)
PLAIN = Format(
    name="plain",
    kind="plain",
    read=lambda state, folder: (without_decoder(state), read_description(folder)),
    write=write_plain,
    compute=compute_plain,
    how=lambda network, folder: f'fcmae.load_encoder("{folder}")',
)
PROGRAMS = {"onnx": ONNX, "torch-export": TORCH_EXPORT}

OTHER_FORMATS: dict[str, dict[str, Format]] = {
    "timm": {"timm": TIMM, "plain": PLAIN} | PROGRAMS,
    "roadmap": {"plain": PLAIN} | PROGRAMS,
}
"""By family and name: what `fcmae export --to` takes; the first is that of the folder a run leaves."""


def folder_format(variant: str) -> Format:
    """Return the format of the folder that a run of another network leaves."""
    return next(iter(OTHER_FORMATS[variant.partition("/")[0]].values()))
