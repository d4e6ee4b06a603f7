"""timm's format: its names and shapes, and folders that `timm.create_model("local-dir:FOLDER")` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.encoder.convnext import ConvNeXt, variant_name
from fcmae.files import write_json, write_text
from fcmae.patches import grid_shape
from fcmae.tensors import write_safetensors
from fcmae.weights.base import (
    CONFIG,
    MODEL,
    OURS,
    Format,
    Names,
    Preprocessing,
    convert,
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
    "stages.{stage}.{block}.grn.gamma": "stages.{stage}.blocks.{block}.mlp.grn.weight",
    "stages.{stage}.{block}.grn.beta": "stages.{stage}.blocks.{block}.mlp.grn.bias",
    "norm.{p}": "head.norm.{p}",
    "head.{p}": "head.fc.{p}",
}
"""Every name there is; besides, GRN is (1, 1, 1, c) here and (c,) there, and `CONV_MLP` reshapes pwconv."""

CONV_MLP = ("atto", "femto", "pico", "nano")
"""The variants whose pwconv1 and pwconv2 timm holds as 1x1 convolutions (out, in, 1, 1)."""

CARD = "README.md"
"""What the Hugging Face Hub shows of a folder."""

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
    """Rename and reshape the state dict of a timm convnextv2 for a `ConvNeXt`.

    Without classifier, a final norm of weight 1 and bias 0 is left out: a `ConvNeXt` without classes has none.

    Raises:
        ValueError: if a key is unknown, as those of ConvNeXt V1 or of timm's patch_size 2 are.
    """

    def reshape(name: str, tensor: Tensor) -> Tensor:
        if ".grn." in name:
            return tensor.reshape(1, 1, 1, -1)
        return tensor[:, :, 0, 0] if ".mlp.fc" in name and tensor.ndim == 4 else tensor

    table = {theirs: ours for ours, theirs in NAMES.items()}
    return without_idle_norm(convert(state, table, "a timm convnextv2", reshape))


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
    """Read timm's tensors, and what `config.json` in `folder` says of them, if it is timm's."""
    tensors = from_timm(state)
    with description(folder) as config:
        if "architecture" not in config:
            return tensors, Preprocessing()
        enlargement = STEM_ENLARGEMENT[config.get("stem_stride", 4)]
        preprocessing = read_preprocessing(config, enlargement)
    if enlargement != 1:
        encoder_shape(tensors)
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

    name = variant_name(encoder.depths, encoder.dims)
    model_args: dict[str, Any] = {}
    if name is None:
        model_args |= {"depths": list(encoder.depths), "dims": list(encoder.dims)}
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
        "paper_ids": "arXiv:2301.00808",
        **describe_preprocessing(use),
    }
    if enlargement != 1:
        pretrained_cfg["description"] = (
            f"Trained by fcmae at {height} x {width} with stem_stride {encoder.stem_stride}, which timm lacks: "
            f"the stem is rewritten for images {enlargement} times as large, {height * enlargement} x "
            f"{width * enlargement}; with pixels repeated the features are exactly the same."
        )
    return {
        "architecture": f"convnextv2_{name or 'tiny'}",
        "num_classes": encoder.num_classes,
        "num_features": encoder.dims[-1],
        "global_pool": "avg",
        **({"model_args": model_args} if model_args else {}),
        **({"stem_stride": encoder.stem_stride} if enlargement != 1 else {}),
        "pretrained_cfg": pretrained_cfg,
    }


def model_card(encoder: ConvNeXt, config: Mapping[str, Any]) -> str:
    """Return what the folder of a network says of itself to people, as Markdown; `config` is its `timm_config`."""
    use = config["pretrained_cfg"]
    name = variant_name(encoder.depths, encoder.dims)
    what = f"{encoder.num_classes} classes" if encoder.num_classes else "features, without classifier"
    channels, height, width = use["input_size"]
    enlargement = STEM_ENLARGEMENT[encoder.stem_stride]
    warning = f"""
**For images enlarged {enlargement} times.** It was trained at {height // enlargement} x {width // enlargement} with
stem_stride {encoder.stem_stride}, which timm lacks. Its stem is rewritten here: timm takes the image at {height} x
{width}, {enlargement} times as large, and then computes the same (exactly, where the enlargement repeats pixels;
nearly, where it interpolates). Images of the original size give other, worse features.
`fcmae.load_encoder` undoes this, and takes images of the original size.
"""
    return f"""# ConvNeXt V2 {name.capitalize() if name else f"{encoder.depths}, {encoder.dims}"}: {what}
{warning if enlargement != 1 else ""}
| | |
|---|---|
| images | {channels} channels, {height} x {width} pixels |
| mean, std | {use["mean"]}, {use["std"]}, of pixels in [0, 1] |
| resizing | {use["interpolation"]}, the centre {use["crop_pct"]:g} of the side cropped out |
| total stride | {encoder.patch_size * enlargement} |

```python
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
```

Trained with fcmae (arXiv 2301.00808).
"""


def write_timm_folder(encoder: ConvNeXt, preprocessing: Preprocessing, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and README.md, for `timm.create_model("local-dir:FOLDER", ...)`.

    With stem_stride 2 timm's model takes images enlarged twice (see `STEM_ENLARGEMENT`).

    Raises:
        ValueError: as `timm_config`.
    """
    config = timm_config(encoder, preprocessing)
    state = to_timm(encoder.state_dict())
    state["stem.0.weight"] = enlarge_stem(state["stem.0.weight"], STEM_ENLARGEMENT[encoder.stem_stride])
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / MODEL, state)
    write_json(folder / CONFIG, config, indent=2)
    write_text(folder / CARD, model_card(encoder, config))


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
    recognises=lambda names: "stem.0.weight" in names,
    read=read,
    write=write_same_size,
    compute=compute,
    how=lambda encoder, folder: f'timm.create_model("local-dir:{folder}", pretrained=True)',
)
