"""State dicts between our names (the official dense ones) and others'; knows names and shapes, not training."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import EinopsError, rearrange
from safetensors.torch import save_file
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXtV2, variant_name
from fcmae.patches import grid_shape

TIMM_NAMES = (
    # ours (official dense)               timm
    ("downsample_layers.0.{layer}.{p}", "stem.{layer}.{p}"),
    ("downsample_layers.{later}.{layer}.{p}", "stages.{later}.downsample.{layer}.{p}"),
    ("stages.{stage}.{block}.dwconv.{p}", "stages.{stage}.blocks.{block}.conv_dw.{p}"),
    ("stages.{stage}.{block}.norm.{p}", "stages.{stage}.blocks.{block}.norm.{p}"),
    ("stages.{stage}.{block}.pwconv{n}.{p}", "stages.{stage}.blocks.{block}.mlp.fc{n}.{p}"),
    ("stages.{stage}.{block}.grn.gamma", "stages.{stage}.blocks.{block}.mlp.grn.weight"),
    ("stages.{stage}.{block}.grn.beta", "stages.{stage}.blocks.{block}.mlp.grn.bias"),
    ("norm.{p}", "head.norm.{p}"),
    ("head.{p}", "head.fc.{p}"),
)
"""Every name there is; besides, GRN is (1, 1, 1, c) here and (c,) there, and `CONV_MLP` reshapes pwconv."""

TRANSFORMERS_NAMES = (
    # ours (official dense)               transformers' ConvNextV2Model; with a classifier under "convnextv2."
    ("downsample_layers.0.0.{p}", "embeddings.patch_embeddings.{p}"),
    ("downsample_layers.0.1.{p}", "embeddings.layernorm.{p}"),
    ("downsample_layers.{later}.{layer}.{p}", "encoder.stages.{later}.downsampling_layer.{layer}.{p}"),
    ("stages.{stage}.{block}.dwconv.{p}", "encoder.stages.{stage}.layers.{block}.dwconv.{p}"),
    ("stages.{stage}.{block}.norm.{p}", "encoder.stages.{stage}.layers.{block}.layernorm.{p}"),
    ("stages.{stage}.{block}.pwconv{n}.{p}", "encoder.stages.{stage}.layers.{block}.pwconv{n}.{p}"),
    ("stages.{stage}.{block}.grn.gamma", "encoder.stages.{stage}.layers.{block}.grn.weight"),
    ("stages.{stage}.{block}.grn.beta", "encoder.stages.{stage}.layers.{block}.grn.bias"),
    ("norm.{p}", "layernorm.{p}"),
    ("head.{p}", "classifier.{p}"),
)
"""Every name there is; the shapes are ours."""

OFFICIAL_SPARSE_NAMES = (
    # ours (official dense)               official encoder over MinkowskiEngine
    ("downsample_layers.0.{layer}.{p}", "downsample_layers.0.{layer}.{p}"),
    ("downsample_layers.{later}.0.{p}", "downsample_layers.{later}.0.ln.{p}"),
    ("downsample_layers.{later}.1.weight", "downsample_layers.{later}.1.kernel"),
    ("downsample_layers.{later}.1.bias", "downsample_layers.{later}.1.bias"),
    ("stages.{stage}.{block}.dwconv.weight", "stages.{stage}.{block}.dwconv.kernel"),
    ("stages.{stage}.{block}.dwconv.bias", "stages.{stage}.{block}.dwconv.bias"),
    ("stages.{stage}.{block}.norm.{p}", "stages.{stage}.{block}.norm.ln.{p}"),
    ("stages.{stage}.{block}.pwconv{n}.{p}", "stages.{stage}.{block}.pwconv{n}.linear.{p}"),
    ("stages.{stage}.{block}.grn.gamma", "stages.{stage}.{block}.grn.gamma"),
    ("stages.{stage}.{block}.grn.beta", "stages.{stage}.{block}.grn.beta"),
)
"""Every name there is; it has no final norm and no classifier. `_kernel_to_weight` and (1, c) tell the shapes."""

PLACEHOLDERS = {
    "stage": "[0-3]",
    "later": "[1-3]",
    "block": "[0-9]+",
    "layer": "[01]",
    "n": "[12]",
    "p": "weight|bias",
}

CONV_MLP = ("atto", "femto", "pico", "nano")
"""The variants whose pwconv1 and pwconv2 timm holds as 1x1 convolutions (out, in, 1, 1)."""

TIMM_STEM_ENLARGEMENT = {4: 1, 2: 2, 1: 1}
"""How much larger timm has to see the images, by our stem_stride.

timm's ConvNeXt with patch_size 2 has one more downsampling in its first stage, so it cannot be our
stem_stride 2. The same function on images enlarged twice has patch_size 4, which timm can be.
"""


Names = Sequence[tuple[str, str]]


def _translate(names: Sequence[str], table: Names, what: str) -> dict[str, str]:
    """Map each name by the (from, to) templates of `table`; names that fit none are told as those of no `what`."""
    patterns = []
    for source, target in table:
        pattern = re.escape(source)
        for key, choices in PLACEHOLDERS.items():
            pattern = pattern.replace(re.escape(f"{{{key}}}"), f"(?P<{key}>{choices})")
        patterns.append((re.compile(pattern), target))

    translated, unknown = {}, []
    for name in names:
        matches = ((pattern.fullmatch(name), target) for pattern, target in patterns)
        found = next(((match, target) for match, target in matches if match), None)
        if found is None:
            unknown.append(name)
        else:
            match, target = found
            translated[name] = target.format(**match.groupdict())
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"not {what}: unknown keys {', '.join(map(repr, unknown[:10]))}{more}")
    return translated


def _reversed(table: Names) -> Names:
    return [(theirs, ours) for ours, theirs in table]


OURS = "a ConvNeXt V2 encoder in official dense names"
OFFICIAL_SPARSE = "an official ConvNeXt V2 encoder over MinkowskiEngine"


def encoder_shape(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read (depths, dims) off the names and shapes of one of our state dicts.

    Raises:
        ValueError: if the stem, a downsampling or a whole stage is missing, or no convolution.
    """
    convs = ["downsample_layers.0.0.weight", *(f"downsample_layers.{i}.1.weight" for i in (1, 2, 3))]
    blocks = [{int(k.split(".")[2]) for k in state if k.startswith(f"stages.{i}.")} for i in range(4)]
    missing = [name for name in convs if name not in state]
    missing += [f"stages.{i}.0" for i in range(4) if not blocks[i]]
    if missing:
        raise ValueError(f"not a whole ConvNeXt V2 encoder: {', '.join(missing)} missing")
    for name in convs:
        if state[name].ndim != 4:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, no convolution's weight")
    return tuple(1 + max(numbers) for numbers in blocks), tuple(state[name].shape[0] for name in convs)


def _idle_norm(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A final norm of weight 1 and bias 0 where our `state` has none: what our norm without parameters does."""
    if "norm.weight" in state:
        return {}
    like = state["downsample_layers.3.1.weight"]
    return {f"{name}.weight": like.new_ones(len(like)), f"{name}.bias": like.new_zeros(len(like))}


def _without_idle_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a final norm of weight 1 and bias 0 where there is no classifier: a `ConvNeXtV2` has none then."""
    if "head.weight" not in state and "norm.weight" in state and "norm.bias" in state:
        weight, bias = state["norm.weight"], state["norm.bias"]
        if torch.equal(weight, torch.ones_like(weight)) and not bias.any():
            return {name: value for name, value in state.items() if not name.startswith("norm.")}
    return state


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the state dict of a `ConvNeXtV2` for timm's model of the same depths and dims.

    A state without final norm gets one of weight 1 and bias 0, which is what our norm without parameters does.

    Raises:
        ValueError: if a key is unknown, or the four stages are not all there.
    """
    names = _translate(list(state), TIMM_NAMES, OURS)
    conv_mlp = variant_name(*encoder_shape(state)) in CONV_MLP
    out: dict[str, Tensor] = {}
    for ours, timm in names.items():
        tensor = state[ours]
        if ".grn." in ours:
            tensor = tensor.flatten()
        elif conv_mlp and ".pwconv" in ours and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[timm] = tensor
    return out | _idle_norm(state, "head.norm")


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the state dict of a timm convnextv2 for a `ConvNeXtV2`.

    Without classifier, a final norm of weight 1 and bias 0 is left out: a `ConvNeXtV2` without classes has none.

    Raises:
        ValueError: if a key is unknown, as those of ConvNeXt V1 or of timm's patch_size 2 are.
    """
    out: dict[str, Tensor] = {}
    for timm, ours in _translate(list(state), _reversed(TIMM_NAMES), "a timm convnextv2").items():
        tensor = state[timm]
        if ".grn." in ours:
            tensor = tensor.reshape(1, 1, 1, -1)
        elif ".pwconv" in ours and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        out[ours] = tensor
    return _without_idle_norm(out)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `ConvNeXtV2` for transformers.

    With a classifier it is one of `ConvNextV2ForImageClassification`, without of `ConvNextV2Model`; a final norm
    is added as in `to_timm`. Their configuration must say `layer_norm_eps=1e-6`: its default is another number.

    Raises:
        ValueError: if a key is unknown, or the four stages are not all there.
    """
    names = _translate(list(state), TRANSFORMERS_NAMES, OURS)
    encoder_shape(state)
    out = {theirs: state[ours] for ours, theirs in names.items()} | _idle_norm(state, "layernorm")
    if "head.weight" not in state:
        return out
    return {name if name.startswith("classifier.") else f"convnextv2.{name}": value for name, value in out.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `ConvNextV2ForImageClassification` or `ConvNextV2Model` for a `ConvNeXtV2`.

    Without classifier, a final norm of weight 1 and bias 0 is left out, as in `from_timm`.

    Raises:
        ValueError: if a key is unknown.
    """
    bare = {name.removeprefix("convnextv2."): value for name, value in state.items()}
    names = _translate(list(bare), _reversed(TRANSFORMERS_NAMES), "a transformers ConvNextV2")
    return _without_idle_norm({ours: bare[theirs] for theirs, ours in names.items()})


def _without_decoder(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take the encoder's tensors, prefix stripped, out of a whole official FCMAE; anything else stays as it is."""
    if not any(name.startswith("encoder.") for name in state):
        return state
    decoder = ("decoder.", "proj.", "pred.", "mask_token")
    return {name.removeprefix("encoder."): v for name, v in state.items() if not name.startswith(decoder)}


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
    names = _translate(
        list(state), [*_reversed(OFFICIAL_SPARSE_NAMES), *((ours, ours) for ours, _ in TIMM_NAMES)], OFFICIAL_SPARSE
    )
    out: dict[str, Tensor] = {}
    for name, ours in names.items():
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
    for ours, name in _translate(list(state), OFFICIAL_SPARSE_NAMES, f"{OURS}, bare of norm and head").items():
        tensor = state[ours]
        if name.endswith(".kernel"):
            tensor = _weight_to_kernel(tensor, depthwise=".dwconv." in name)
        elif ".grn." in name:
            tensor = tensor.flatten()[None]
        elif re.fullmatch(r".*\.dwconv\.bias|downsample_layers\.[1-3]\.1\.bias", name):
            tensor = tensor[None]
        out[name] = tensor
    return out


def from_official_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder, with its classifier if there is one, out of a state dict in official dense names.

    Those are our names. A decoder beside the encoder is left out; GRN becomes (1, 1, 1, c) whatever it was.

    Raises:
        ValueError: if a key is unknown.
    """
    state = _without_decoder(state)
    _translate(list(state), TIMM_NAMES, OURS)
    out = {name: v.reshape(1, 1, 1, -1) if ".grn." in name else v for name, v in state.items()}
    return _without_idle_norm(out)


FORMATS: tuple[tuple[str, str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]], ...] = (
    # what only names of this format match                       kind              to our names
    (r".*\.dwconv\.kernel", "official sparse (MinkowskiEngine)", official_sparse_to_dense),
    (r"(encoder\.)?downsample_layers\.0\.0\.weight", "official dense", from_official_dense),
    (r"stem\.0\.weight", "timm", from_timm),
    (r"(convnextv2\.)?embeddings\.patch_embeddings\.weight", "transformers", from_transformers),
)


def from_any(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Recognise the format of a state dict by its names: (encoder by our names, the format's name for people).

    Raises:
        ValueError: if it is none that we know, a ConvNeXt V1, or a key is unknown.
    """
    for prefix in ("module.", "_orig_mod.") * 2:  # left by DistributedDataParallel and torch.compile
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    found = next(
        ((kind, convert) for marker, kind, convert in FORMATS if any(re.fullmatch(marker, name) for name in state)),
        None,
    )
    v1 = any(name.endswith((".gamma", ".layer_scale_parameter")) and ".grn." not in name for name in state)
    if v1 or (found and not any(".grn." in name for name in state)):
        raise ValueError("ConvNeXt V1 weights (no GRN), which fcmae cannot use yet; take a ConvNeXt V2")
    if found is None:
        names = ", ".join(map(repr, list(state)[:3]))
        raise ValueError(
            "no ConvNeXt V2 in our, timm's, transformers' or the official names; "
            + (f"it holds {len(state)} tensors: {names}, ..." if state else "it holds no tensors")
        )
    kind, convert = found
    return convert(state), kind


def enlarge_stem(weight: Tensor, factor: int) -> Tensor:
    """Return the kernel that sees on images of repeated pixels what the stem `weight` sees on the originals."""
    return weight.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2


def shrink_stem(weight: Tensor, factor: int) -> Tensor:
    """Undo `enlarge_stem`."""
    return weight[:, :, ::factor, ::factor] * factor**2


def evaluation_crop(size: tuple[int, int]) -> float:
    """Share of the side that evaluation at `size` crops out: the official one; all at 384 px and on thumbnails."""
    return 0.875 if 64 < min(size) < 384 else 1.0


def timm_config(
    encoder: ConvNeXtV2,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int],
    crop_pct: float | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the `config.json` with which timm rebuilds `encoder`, and the preprocessing it was trained with.

    Args:
        encoder: the encoder, with or without classifier.
        mean: of the training data, per channel.
        std: likewise.
        image_size: side or (height, width) in pixels it was trained at.
        crop_pct: share of the side that evaluation crops out; None for `evaluation_crop`.
        class_names: of the classifier's outputs.

    Raises:
        ValueError: if mean, std, image_size or class_names do not fit the encoder.
    """
    if len(mean) != encoder.in_chans or len(std) != encoder.in_chans:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must have {encoder.in_chans} channels each")
    if class_names is not None and len(class_names) != encoder.num_classes:
        raise ValueError(f"{len(class_names)} class names for {encoder.num_classes} classes")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    enlargement = TIMM_STEM_ENLARGEMENT[encoder.stem_stride]

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
        "interpolation": "bicubic",
        "crop_pct": evaluation_crop((height, width)) if crop_pct is None else crop_pct,
        "mean": list(mean),
        "std": list(std),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2301.00808",
    }
    if class_names is not None:
        pretrained_cfg["label_names"] = list(class_names)
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


def write_timm_folder(
    encoder: ConvNeXtV2,
    folder: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int],
    crop_pct: float | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    With stem_stride 2 timm's model takes images enlarged twice (see `TIMM_STEM_ENLARGEMENT`).

    Raises:
        ValueError: as `timm_config`.
    """
    config = timm_config(
        encoder, mean=mean, std=std, image_size=image_size, crop_pct=crop_pct, class_names=class_names
    )
    state = to_timm(encoder.state_dict())
    state["stem.0.weight"] = enlarge_stem(state["stem.0.weight"], TIMM_STEM_ENLARGEMENT[encoder.stem_stride])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
