"""timm's format: its names and shapes, and folders that `timm.create_model("local-dir:FOLDER")` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.encoder.convnext import ConvNeXt, Version, resolve_response, variant_name
from fcmae.files import make_folder, write_json
from fcmae.patches import grid_shape
from fcmae.tensors import write_safetensors
from fcmae.weights.base import (
    CONFIG,
    MODEL,
    OURS,
    PIXELS,
    Format,
    Loading,
    Names,
    Preprocessing,
    convert,
    describe_pixels,
    description,
    encoder_shape,
    idle_norm,
    without_idle_norm,
)

NAMES: Names = {
    # ours (official dense)                  timm
    "downsample_layers.0.{layer}.{p}": "stem.{layer}.{p}",
    "downsample_layers.{later}.{layer}.{p}": "stages.{later}.downsample.{layer}.{p}",
    "stages.{stage}.{block}.dwconv.{p}": "stages.{stage}.blocks.{block}.conv_dw.{p}",
    "stages.{stage}.{block}.norm.{p}": "stages.{stage}.blocks.{block}.norm.{p}",
    "stages.{stage}.{block}.pwconv{n}.{p}": "stages.{stage}.blocks.{block}.mlp.fc{n}.{p}",
    "stages.{stage}.{block}.gamma": "stages.{stage}.blocks.{block}.gamma",
    "stages.{stage}.{block}.grn.gamma": "stages.{stage}.blocks.{block}.mlp.grn.weight",
    "stages.{stage}.{block}.grn.beta": "stages.{stage}.blocks.{block}.mlp.grn.bias",
    "norm.{p}": "head.norm.{p}",
    "head.{p}": "head.fc.{p}",
}
"""Every name there is; besides, GRN is (1, 1, 1, c) here and (c,) there, and `CONV_MLP` reshapes pwconv."""

CONV_MLP = ("atto", "femto", "pico", "nano")
"""The variants, of both versions, whose pwconv1 and pwconv2 timm holds as 1x1 convolutions (out, in, 1, 1)."""

FAMILIES: dict[Version, tuple[str, str]] = {1: ("convnext", "2201.03545"), 2: ("convnextv2", "2301.00808")}
"""How timm's names of a version begin, and its paper."""

LACKING = ("convnext_huge", "convnextv2_xlarge")
"""Variants of ours that timm has no name for."""

OTHERS = {
    # a name in timm's ConvNeXts that are other networks: what they have
    "stem.2.weight": "an overlapping stem (timm's convnext_*_ols)",
    "norm_pre.weight": "the norm before the pooling (timm's convnext_*_hnf)",
    "head.pre_logits.fc.weight": "a hidden layer in its classifier (timm's convnext_*_mlp)",
}

XXLARGE, XXLARGE_SHAPE = "convnext_xxlarge", ((3, 4, 30, 3), (384, 768, 1536, 3072))
"""The one variant of timm's whose norms have another eps."""

STEM_ENLARGEMENT = {4: 1, 2: 2, 1: 1}
"""How much larger timm has to see the images, by our stem_stride.

timm's ConvNeXt with patch_size 2 has one more downsampling in its first stage, so it cannot be our
stem_stride 2. The same function on images enlarged twice has patch_size 4, which timm can be.
"""


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the state dict of a `ConvNeXt` for timm's model of the same depths and dims.

    A state without final norm gets one of weight 1 and bias 0, which is what our norm without parameters does.

    Raises:
        ValueError: if a key is unknown, or the four stages are not all there.
    """
    conv_mlp = variant_name(*encoder_shape(state)) in CONV_MLP

    def reshape(name: str, tensor: Tensor) -> Tensor:
        if ".grn." in name:
            return tensor.flatten()
        return tensor[:, :, None, None] if conv_mlp and ".pwconv" in name and tensor.ndim == 2 else tensor

    return convert(state, NAMES, OURS, reshape) | idle_norm(state, "head.norm")


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the state dict of a timm convnext or convnextv2 for a `ConvNeXt`.

    Without classifier, a final norm of weight 1 and bias 0 is left out: a `ConvNeXt` without classes has none.

    Raises:
        ValueError: if a key is unknown, as those of timm's patch_size 2 are, or one of `OTHERS`.
    """
    if found := next((what for name, what in OTHERS.items() if name in state), None):
        raise ValueError(f"a network with {found}, which fcmae lacks")

    def reshape(name: str, tensor: Tensor) -> Tensor:
        if ".grn." in name:
            return tensor.reshape(1, 1, 1, -1)
        return tensor[:, :, 0, 0] if ".mlp.fc" in name and tensor.ndim == 4 else tensor

    table = {theirs: ours for ours, theirs in NAMES.items()}
    return without_idle_norm(convert(state, table, "a timm convnext or convnextv2", reshape))


def enlarge_stem(weight: Tensor, factor: int) -> Tensor:
    """Return the kernel that sees on images of repeated pixels what the stem `weight` sees on the originals."""
    return weight.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2


def shrink_stem(weight: Tensor, factor: int) -> Tensor:
    """Undo `enlarge_stem`."""
    return weight[:, :, ::factor, ::factor] * factor**2


def read_preprocessing(config: Mapping[str, Any], enlargement: int = 1) -> Preprocessing:
    """Read what timm's `config.json` says of images, whose sides are `enlargement` times ours."""
    cfg = config.get("pretrained_cfg", config)
    values = {key: cfg.get(key) for key in ("mean", "std", "crop_pct", "interpolation")}
    values |= config.get(PIXELS, {})
    values["task"] = config.get("task")
    values["class_names"] = config.get("label_names", cfg.get("label_names"))
    if "input_size" in cfg:
        values["image_size"] = [side // enlargement for side in cfg["input_size"][1:]]
    return Preprocessing.of(values)


def describe_preprocessing(use: Preprocessing) -> dict[str, Any]:
    """Return what timm's `config.json` says of images, but for their size."""
    described: dict[str, Any] = {
        "interpolation": use.interpolation,
        "crop_pct": use.crop_pct,
        "mean": list(use.mean),
        "std": list(use.std),
    }
    return described | ({"label_names": list(use.class_names)} if use.class_names is not None else {})


def read(state: Mapping[str, Tensor], folder: Path | None) -> tuple[dict[str, Tensor], Preprocessing]:
    """Read timm's tensors, and what `config.json` in `folder` says of them, if it is timm's.

    Raises:
        ValueError: as `from_timm`, and for networks that differ in what tensors do not show.
    """
    tensors = from_timm(state)
    with description(folder) as config:
        changed = {"act_layer", "norm_eps"} & dict(config.get("model_args", {})).keys()
        architecture = config.get("architecture", XXLARGE)
    if encoder_shape(tensors) == XXLARGE_SHAPE and architecture == XXLARGE:
        raise ValueError(f"timm's {XXLARGE}, whose norms have another eps than those of fcmae")
    if changed:
        raise ValueError(f"made with another {' and '.join(sorted(changed))}, which fcmae lacks")
    with description(folder) as config:
        if "architecture" not in config:
            return tensors, Preprocessing()
        enlargement = STEM_ENLARGEMENT[config.get("stem_stride", 4)]
        preprocessing = read_preprocessing(config, enlargement)
    if enlargement != 1:
        name = "downsample_layers.0.0.weight"
        tensors[name] = shrink_stem(tensors[name], enlargement)
    return tensors, preprocessing


def timm_config(encoder: ConvNeXt, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the `config.json` with which timm rebuilds `encoder` and prepares images for it.

    Raises:
        ValueError: if preprocessing does not fit the encoder.
    """
    use = preprocessing.completed(encoder)
    height, width = use.image_size
    enlargement = STEM_ENLARGEMENT[encoder.stem_stride]

    family, paper = FAMILIES[encoder.version]
    name = variant_name(encoder.depths, encoder.dims)
    name = None if f"{family}_{name}" in LACKING else name
    model_args: dict[str, Any] = {}
    if name is None:
        model_args |= {"depths": list(encoder.depths), "dims": list(encoder.dims)}
    if encoder.response != resolve_response(encoder.version, "auto"):
        model_args["use_grn"] = encoder.response == "grn"
    if encoder.in_chans != 3:
        model_args["in_chans"] = encoder.in_chans
    if encoder.stem_stride * enlargement != 4:
        model_args["patch_size"] = encoder.stem_stride * enlargement

    pretrained_cfg: dict[str, Any] = {
        "num_classes": encoder.num_classes,
        "input_size": [encoder.in_chans, height * enlargement, width * enlargement],
        "pool_size": list(grid_shape((height, width), encoder.patch_size)),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "paper_ids": f"arXiv:{paper}",
        **describe_preprocessing(use),
    }
    if enlargement != 1:
        pretrained_cfg["description"] = (
            f"Trained by fcmae at {height} x {width} with stem_stride {encoder.stem_stride}, which timm lacks: "
            f"the stem is rewritten for images {enlargement} times as large, {height * enlargement} x "
            f"{width * enlargement}; with pixels repeated the features are exactly the same."
        )
    return {
        "architecture": f"{family}_{name or 'tiny'}",
        "num_classes": encoder.num_classes,
        "num_features": encoder.dims[-1],
        "global_pool": "avg",
        **({"model_args": model_args} if model_args else {}),
        **({"stem_stride": encoder.stem_stride} if enlargement != 1 else {}),
        **describe_pixels(use),
        **({"task": use.task} if use.task is not None else {}),
        "pretrained_cfg": pretrained_cfg,
    }


LOADING = Loading(
    library="timm",
    code="import timm\n\nmodel = timm.create_model({folder}, pretrained=True).eval()",
    address="local-dir:{}",
    hub="hf-hub:{}",
    prepare="""from timm.data import create_transform, resolve_model_data_config

transform = create_transform(**resolve_model_data_config(model))
images = transform(photo)[None]""",
)


def enlargement_warning(encoder: ConvNeXt, image_size: tuple[int, int]) -> str:
    """Return what the card of a network for enlarged images has to say: nothing for others."""
    enlargement = STEM_ENLARGEMENT[encoder.stem_stride]
    if enlargement == 1:
        return ""
    height, width = image_size
    large = f"{height * enlargement} x\n{width * enlargement}"
    return f"""
**For images enlarged {enlargement} times.** It was trained at {height} x {width} with
stem_stride {encoder.stem_stride}, which timm lacks. Its stem is rewritten here: timm takes the image at {large}, \
{enlargement} times as large, and then computes the same (exactly, where the enlargement repeats pixels;
nearly, where it interpolates). Images of the original size give other, worse features.
`fcmae.load_encoder` undoes this, and takes images of the original size.
"""


def write_timm_folder(encoder: ConvNeXt, preprocessing: Preprocessing, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, for `timm.create_model("local-dir:FOLDER", ...)`.

    With stem_stride 2 timm's model takes images enlarged twice (see `STEM_ENLARGEMENT`).

    Raises:
        ValueError: as `timm_config`, or if timm does not hold the network.
    """
    config = timm_config(encoder, preprocessing)
    state = to_timm(encoder.state_dict())
    state["stem.0.weight"] = enlarge_stem(state["stem.0.weight"], STEM_ENLARGEMENT[encoder.stem_stride])
    make_folder(folder)
    write_safetensors(folder / MODEL, state)
    write_json(folder / CONFIG, config, indent=2)


def loading(encoder: ConvNeXt, use: Preprocessing) -> Loading:
    """Say how timm loads a folder that `write_timm_folder` wrote."""
    enlargement = STEM_ENLARGEMENT[encoder.stem_stride]
    return LOADING._replace(enlargement=enlargement, warning=enlargement_warning(encoder, use.image_size))


def write_same_size(encoder: ConvNeXt, preprocessing: Preprocessing, folder: Path) -> None:
    """Write as `write_timm_folder`, but only a network that takes images of the same size in timm.

    Raises:
        ValueError: as `timm_config`, and for stem_stride 2.
    """
    if STEM_ENLARGEMENT[encoder.stem_stride] != 1:
        raise ValueError(
            "timm has no ConvNeXt with a stem of stride 2 (its patch_size 2 downsamples once more); take another "
            "format, or RUN/encoder, which holds the network for images enlarged twice"
        )
    write_timm_folder(encoder, preprocessing, folder)


def compute(folder: Path, images: Tensor) -> Tensor:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=images.dtype).eval()(images)


TIMM = Format(
    name="timm",
    kind="timm",
    networks=((1, "none"), (1, "grn"), (2, "none"), (2, "grn")),
    recognises=lambda names: "stem.0.weight" in names,
    read=read,
    write=write_same_size,
    compute=compute,
    how=lambda encoder, folder: f'timm.create_model("local-dir:{folder}", pretrained=True)',
    loading=loading,
)
