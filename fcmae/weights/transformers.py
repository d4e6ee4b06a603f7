"""transformers' format: names of its ConvNext and ConvNextV2 models, and folders that `from_pretrained` loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXt, Version
from fcmae.weights.base import (
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
    full_range,
    idle_norm,
    response_of,
    without_idle_norm,
)

PREPROCESSOR = "preprocessor_config.json"

NAMES: Names = {
    # ours (official dense)                  transformers; with a classifier under "convnext." or "convnextv2."
    "downsample_layers.0.0.{p}": "embeddings.patch_embeddings.{p}",
    "downsample_layers.0.1.{p}": "embeddings.layernorm.{p}",
    "downsample_layers.{later}.{layer}.{p}": "encoder.stages.{later}.downsampling_layer.{layer}.{p}",
    "stages.{stage}.{block}.dwconv.{p}": "encoder.stages.{stage}.layers.{block}.dwconv.{p}",
    "stages.{stage}.{block}.norm.{p}": "encoder.stages.{stage}.layers.{block}.layernorm.{p}",
    "stages.{stage}.{block}.pwconv{n}.{p}": "encoder.stages.{stage}.layers.{block}.pwconv{n}.{p}",
    "stages.{stage}.{block}.gamma": "encoder.stages.{stage}.layers.{block}.layer_scale_parameter",
    "stages.{stage}.{block}.grn.gamma": "encoder.stages.{stage}.layers.{block}.grn.weight",
    "stages.{stage}.{block}.grn.beta": "encoder.stages.{stage}.layers.{block}.grn.bias",
    "norm.{p}": "layernorm.{p}",
    "head.{p}": "classifier.{p}",
}
"""Every name there is; the shapes are ours."""


KINDS: dict[tuple[Version, str], tuple[str, dict[str, Any]]] = {
    # (version, response): what transformers calls it, arguments of its configuration
    (1, "none"): ("ConvNext", {}),
    (2, "none"): ("ConvNext", {"layer_scale_init_value": 0.0}),  # which leaves LayerScale out
    (2, "grn"): ("ConvNextV2", {}),
}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `ConvNeXt` for transformers.

    With a classifier it is one of `ConvNextV2ForImageClassification`, without of `ConvNextV2Model`, or of
    `ConvNext...` where there is no GRN; a state without final norm gets one of weight 1 and bias 0. Their
    configuration must say `layer_norm_eps=1e-6`: its default is another number.

    Raises:
        ValueError: if a key is unknown, or the four stages are not all there.
    """
    encoder_shape(state)
    out = convert(state, NAMES, OURS) | idle_norm(state, "layernorm")
    if "head.weight" not in state:
        return out
    inner = "convnextv2" if response_of(state) == "grn" else "convnext"
    return {name if name.startswith("classifier.") else f"{inner}.{name}": value for name, value in out.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of transformers' `ConvNext...` or `ConvNextV2...` for a `ConvNeXt`.

    That is a `...ForImageClassification` or a `...Model`.

    Without classifier, a final norm of weight 1 and bias 0 is left out: a `ConvNeXt` without classes has none.

    Raises:
        ValueError: if a key is unknown.
    """
    plain = {re.sub(r"^convnext(v2)?\.", "", name): value for name, value in state.items()}
    table = {theirs: ours for ours, theirs in NAMES.items()}
    return without_idle_norm(convert(plain, table, "a transformers ConvNext or ConvNextV2"))


PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls our tasks."""


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = config.get("id2label")
    if not names or list(names.values()) == [f"LABEL_{i}" for i in range(len(names))]:  # which stand for none
        return None
    return tuple(str(names[index]) for index in sorted(names, key=int))


def _preprocessing(processor: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    size, crop = processor.get("size", {}), processor.get("crop_size", {})
    if isinstance(size, int):  # of older files
        size = {"shortest_edge": size}
    if processor.get("do_center_crop") and "height" in crop:
        values["image_size"] = [crop["height"], crop["width"]]
        values["crop_pct"] = max(values["image_size"]) / size["shortest_edge"] if "shortest_edge" in size else None
    elif "shortest_edge" in size:  # ConvNextImageProcessor's
        values |= {"image_size": size["shortest_edge"], "crop_pct": processor.get("crop_pct")}
    if processor.get("resample") is not None:
        values["interpolation"] = Image.Resampling(processor["resample"]).name.lower()
    if PIXELS in processor:  # ours, whose unit is that of the whole range
        values |= processor[PIXELS]
    elif processor.get("do_rescale") is False:
        values["value_range"] = (0.0, 255.0)
    elif processor.get("rescale_factor") is not None:
        values["value_range"] = (0.0, round(255 * processor["rescale_factor"], 9))
    return Preprocessing.of(values)


def read(state: Mapping[str, Tensor], folder: Path | None) -> tuple[dict[str, Tensor], Preprocessing]:
    """Read transformers' tensors, and what the configurations of model and images in `folder` say of them."""
    tensors = from_transformers(state)
    with description(folder) as config:
        if "hidden_sizes" not in config:
            return tensors, Preprocessing()
        class_names = _class_names(config)
        task = next((task for task, problem in PROBLEMS.items() if problem == config.get("problem_type")), None)
    with description(folder, PREPROCESSOR) as processor:
        return tensors, _preprocessing(processor)._replace(class_names=class_names, task=task)


def write(encoder: ConvNeXt, preprocessing: Preprocessing, folder: Path) -> None:
    """Write the configuration, weights and image processor, for `AutoModel...from_pretrained(FOLDER)`.

    Raises:
        ValueError: if preprocessing does not fit the encoder.
    """
    import transformers

    use = preprocessing.completed(encoder)
    height, width = use.image_size
    transformers.utils.logging.disable_progress_bar()
    names = use.class_names or tuple(f"LABEL_{i}" for i in range(encoder.num_classes))
    kind, arguments = KINDS[encoder.version, encoder.response]
    config = getattr(transformers, f"{kind}Config")(
        num_channels=encoder.in_chans,
        patch_size=encoder.stem_stride,
        hidden_sizes=list(encoder.dims),
        depths=list(encoder.depths),
        layer_norm_eps=1e-6,  # of the final norm: the default is not the network's
        image_size=min(height, width),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=PROBLEMS.get(use.task or ""),
        **arguments,
    )
    model = getattr(transformers, f"{kind}{'ForImageClassification' if encoder.num_classes else 'Model'}")(config)
    model.load_state_dict(to_transformers(encoder.state_dict()))
    model.save_pretrained(folder)
    # resizes and crops as we do, of pixels in full ranges too, but neither clips nor knows no-data;
    # ConvNextImageProcessor would squash images at 384 px and above
    transformers.BitImageProcessor(
        size={"shortest_edge": int(max(height, width) / use.crop_pct)},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[use.interpolation.upper()],
        image_mean=list(use.mean),
        image_std=list(use.std),
        do_convert_rgb=encoder.in_chans == 3 and use.dtype in (None, "uint8"),
        do_rescale=use.dtype != "float32",
        rescale_factor=1 / full_range(use),
        **describe_pixels(use),
    ).save_pretrained(folder)


CODE = """import transformers

folder = {{folder}}
model = transformers.{kind}.from_pretrained(folder).eval()"""
PREPARE = """processor = transformers.AutoImageProcessor.from_pretrained(folder)
images = processor(photo, return_tensors="pt")["pixel_values"]"""


def _class_of(encoder: ConvNeXt) -> str:
    return f"AutoModel{'ForImageClassification' if encoder.num_classes else ''}"


def loading(encoder: ConvNeXt, use: Preprocessing) -> Loading:
    run = f"out = model(images).{'logits' if encoder.num_classes else 'pooler_output'}"
    return Loading("transformers", CODE.format(kind=_class_of(encoder)), hub="{}", prepare=PREPARE, run=run)


def compute(folder: Path, images: Tensor) -> Tensor:
    import transformers

    with description(folder) as config:
        (name,) = config["architectures"]
    model = getattr(transformers, name).from_pretrained(folder, dtype=images.dtype).eval()
    out = model(pixel_values=images)
    return out.logits if "logits" in out else out.pooler_output


TRANSFORMERS = Format(
    name="transformers",
    kind="transformers",
    networks=KINDS.keys(),
    recognises=lambda names: any(
        f"{prefix}embeddings.patch_embeddings.weight" in names for prefix in ("", "convnext.", "convnextv2.")
    ),
    read=read,
    write=write,
    compute=compute,
    how=lambda encoder, folder: f'transformers.{_class_of(encoder)}.from_pretrained("{folder}")',
    loading=loading,
)
