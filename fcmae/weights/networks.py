"""Formats of other networks than our ConvNeXt and of segmenters, and "plain" of all; knows no name of a tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fcmae.encoder.base import Network
from fcmae.encoder.networks import classifier_name, is_other
from fcmae.files import write_json
from fcmae.heads.segmentation import AUXILIARY, Segmenter
from fcmae.patches import grid_shape
from fcmae.tensors import read_safetensors, write_safetensors
from fcmae.weights import timm
from fcmae.weights.base import (
    CONFIG,
    MODEL,
    Format,
    Loading,
    Preprocessing,
    Weights,
    build_encoder,
    describe_pixels,
    description,
    read_description,
    read_network,
    require_arguments,
    split_head,
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
        use = Preprocessing.of(config) if "network" in config else timm.read_preprocessing(config)
        return without_decoder(state), use


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
    """Write our `config.json` and `model.safetensors`, without a segmenter's second head, which is for training."""
    folder.mkdir(parents=True, exist_ok=True)
    second = AUXILIARY if isinstance(network, Segmenter) else ()
    tensors = {name: x for name, x in network.state_dict().items() if not name.startswith(second)}
    write_safetensors(folder / MODEL, tensors)
    write_description(network, preprocessing, folder)


def compute_plain(folder: Path, images: Tensor) -> Tensor:
    network = read_variant(folder) or read_network(folder)
    tensors, head = split_head(read_safetensors(folder / MODEL))
    classifier = classifier_name(network.get("variant"))
    weights = Weights(folder, dict(tensors), "", network=network, classifier=classifier, head=head)
    return build_encoder(weights).to(images.dtype).eval()(images)


def load_plain(network: Network, use: Preprocessing) -> Loading:
    """Say how fcmae loads a folder, and how its segmenters run on images of any size."""
    imports, run = "import fcmae", "out = model(images)"
    if isinstance(network, Segmenter):
        logits = "model(images)"
        given = [f"Windows({use.image_size}, {use.stride})"] if use.stride is not None else []
        given += [f"short_side={use.short_side}"] if use.short_side is not None else []
        if given:
            imports += "\nfrom fcmae.heads.windows import Windows, pixel_logits"
            arguments = ", ".join(["model", "images", *given])
            logits = f"torch.cat([strip.logits for strip in pixel_logits({arguments})], 2)"
        run = f"with torch.inference_mode():\n    classes = {logits}.argmax(1)  # (b, height, width)"
    return Loading("fcmae", f"{imports}\n\nmodel = fcmae.load_encoder({{folder}}).eval()", run=run)


TIMM = Format(
    name="timm",
    kind="timm",
    read=read_timm,
    write=write_timm,
    compute=timm.compute,
    how=timm.TIMM.how,
    loading=lambda network, use: timm.LOADING,
)
PLAIN = Format(
    name="plain",
    kind="plain",
    read=lambda state, folder: (without_decoder(state), read_description(folder)),
    write=write_plain,
    compute=compute_plain,
    how=lambda network, folder: f'fcmae.load_encoder("{folder}")',
    loading=load_plain,
)
PROGRAMS = {"onnx": ONNX, "torch-export": TORCH_EXPORT}

OTHER_FORMATS: dict[str, dict[str, Format]] = {
    "timm": {"timm": TIMM, "plain": PLAIN} | PROGRAMS,
    "roadmap": {"plain": PLAIN} | PROGRAMS,
}
"""By family and name: what `fcmae export --to` takes; the first is that of the folder a run leaves."""

SEGMENTER_FORMATS: dict[str, Format] = {"plain": PLAIN} | PROGRAMS
"""Likewise, of segmenters over any encoder."""


def folder_format(variant: str) -> Format:
    """Return the format of the folder that a run of another network leaves."""
    return next(iter(OTHER_FORMATS[variant.partition("/")[0]].values()))
