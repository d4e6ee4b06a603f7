"""Weights of any origin, recognised by content; a pickle's code is never run."""

import argparse
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fcmae.encoder.convnext import ConvNeXtV2, variant_name
from fcmae.errors import UserError, blame
from fcmae.tensors import load_strictly, misfits, read_safetensors
from fcmae.training.checkpoint import EMA, MODEL, STATE, read_state
from fcmae.training.run_folder import newest_checkpoint
from fcmae.weights.convert import TIMM_STEM_ENLARGEMENT, encoder_shape, evaluation_crop, from_any, shrink_stem

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHT_FILES = (MODEL, EMA, "pytorch_model.bin", "model.pth")
"""What weights are called in folders whose other files describe them."""


def describe_encoder(tensors: Mapping[str, Tensor]) -> str:
    """Guess the variant whose encoder these tensors hold, by any names we know: its name, or depths and dims."""
    blocks: list[dict[int, int]] = [{}, {}, {}, {}]
    for name, value in tensors.items():
        found = re.search(
            r"stages\.([0-3])\.(?:blocks\.|layers\.)?(\d+)\.(?:dwconv|conv_dw)\.(weight|kernel)$", name
        )
        if found and value.ndim > 1:
            blocks[int(found[1])][int(found[2])] = value.shape[1 if found[3] == "kernel" else 0]
    if not all(blocks):
        return "no ConvNeXt V2"
    depths, dims = [len(stage) for stage in blocks], [next(iter(stage.values())) for stage in blocks]
    return variant_name(tuple(depths), tuple(dims)) or f"depths {depths}, dims {dims}"


class Weights(NamedTuple):
    """A ConvNeXt V2 read from a file, and what is known of its use; None where the file does not tell."""

    path: Path
    """The file."""
    tensors: dict[str, Tensor]
    """By our names: the encoder, with `norm` and `head` where there is a classifier."""
    kind: str
    """Where it comes from, for people."""
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    """Per channel, of the training images in [0, 1]."""
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    """Height and width in pixels."""
    crop_pct: float | None = None
    """Share of the resized image's side that evaluation crops out."""


class Preprocessing(NamedTuple):
    """What a network wants done to images before it classifies them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    """Height and width in pixels."""
    crop_pct: float
    """Share of the resized image's side that is cropped out."""


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), 0.875)
"""What the released weights want."""


def preprocessing(weights: Weights) -> Preprocessing:
    """Return how images are prepared for `weights`; what the file does not tell is as for the released weights.

    Raises:
        UserError: if mean and std do not fit the network's channels, or are not told for other than three.
    """
    in_chans = weights.tensors["downsample_layers.0.0.weight"].shape[1]
    mean, std = weights.mean or IMAGENET.mean, weights.std or IMAGENET.std
    if len(mean) != in_chans or len(std) != in_chans:
        what = "the files beside it tell" if weights.mean else "it tells no mean and std, and ImageNet's have"
        raise UserError(
            f"{weights.path}: a network for {in_chans} channels, but {what} {len(mean)} and {len(std)}; give the "
            "run or an exported folder, which tell them"
        )
    size = weights.image_size or IMAGENET.image_size
    return Preprocessing(mean, std, size, weights.crop_pct or evaluation_crop(size))


def find_weights(path: Path) -> Path:
    """Return the file of weights that a run folder, checkpoint folder, exported folder or file stands for.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return path
    newest = newest_checkpoint(path)
    folders = [path / name for name in WEIGHT_FILES if name != EMA]
    for candidate in (*folders, *([newest / MODEL] if newest else [])):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{path}: {'holds no weights' if path.is_dir() else 'no such file or folder'}; "
        "give a run folder, a checkpoint folder, an exported folder or a file of weights"
    )


def _load_torch(path: Path) -> Any:
    """Read a file of torch.save without running code from it; argparse's namespaces of settings may be in it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles: they are read or refused, nothing between
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise almost anything for damaged files
        if "Weights only load failed" not in str(error):
            raise UserError(f"{path}: a damaged or truncated PyTorch file; get it again") from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: a pickle that holds code{f' ({code[1]})' if code else ''}, which was not run; ask for "
            "safetensors, or, if you trust its author, save its state dict alone with torch.save"
        ) from error


def read_tensors(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or PyTorch file, by its own names, out of the entry scripts put them in.

    Raises:
        UserError: if it is damaged, a pickle with code in it, or has no average where `ema` asks for it.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        if ema:
            raise UserError(f"{path}: holds no EMA weights, only the raw ones")
        return read_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        raise UserError(f"{path}: neither a safetensors nor a PyTorch file, or a damaged one")
    found = _load_torch(path)
    keys = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    nested = [found[key] for key in keys if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
    if ema and not nested:
        raise UserError(f"{path}: holds no EMA weights, only the raw ones")
    tensors = nested[0] if nested else found
    if not isinstance(tensors, Mapping):
        raise UserError(f"{path}: holds a {type(tensors).__name__}, not tensors by name")
    return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    return values if isinstance(values, dict) else {}


def _strings(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


TOLD: Mapping[str, Callable[[Any], Any]] = {
    "class_names": _strings,
    "mean": _floats,
    "std": _floats,
    "image_size": _pair,
    "crop_pct": float,
}
"""What the files beside weights may tell of them, as in `Weights`."""


def _told_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    cfg = config.get("pretrained_cfg", config)
    told = {key: cfg.get(key) for key in ("mean", "std", "crop_pct")}
    told["class_names"] = config.get("label_names", cfg.get("label_names"))
    if "input_size" in cfg:
        told["image_size"] = [side // _enlargement(config) for side in cfg["input_size"][1:]]
    return told


def _told_by_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    told = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    size, crop = preprocessor.get("size", {}), preprocessor.get("crop_size", {})
    if isinstance(size, int):  # of older files
        size = {"shortest_edge": size}
    if preprocessor.get("do_center_crop") and "height" in crop:
        told["image_size"] = [crop["height"], crop["width"]]
        told["crop_pct"] = max(told["image_size"]) / size["shortest_edge"] if "shortest_edge" in size else None
    elif "shortest_edge" in size:  # ConvNextImageProcessor's
        told |= {"image_size": size["shortest_edge"], "crop_pct": preprocessor.get("crop_pct")}
    names = config.get("id2label")
    if names and list(names.values()) != [f"LABEL_{i}" for i in range(len(names))]:  # which stand for none
        told["class_names"] = [names[index] for index in sorted(names, key=int)]
    return told


def _enlargement(config: Mapping[str, Any]) -> int:
    """How much larger than ours the images are that the weights beside timm's `config` are for."""
    return TIMM_STEM_ENLARGEMENT[config.get("stem_stride", 4)]


def _describe_use(folder: Path) -> dict[str, Any]:
    """Read the fields of `Weights` that a checkpoint's, our, timm's or transformers' files beside weights tell."""
    config = _read_json(folder / CONFIG)
    told: Mapping[str, Any] = {}
    if (folder / STATE).is_file():
        state = read_state(folder)
        told = state["config"]["data"] | {"class_names": state.get("class_names")}
    elif "network" in config:  # ours, of an exported folder
        told = config
    elif "architecture" in config:
        told = _told_by_timm(config)
    elif "hidden_sizes" in config:
        told = _told_by_transformers(config, _read_json(folder / PREPROCESSOR))
    return {key: cast(told[key]) for key, cast in TOLD.items() if told.get(key) is not None}


def read_weights(path: str | Path, *, ema: bool = False) -> Weights:
    """Read the weights of any ConvNeXt V2, recognised by content; a pickle's code is never run.

    Args:
        path: a run folder, checkpoint folder, exported folder or file of weights (safetensors or PyTorch): ours,
            timm's, transformers' or the official code's.
        ema: take the running average of the weights, which fine-tuning keeps beside them.

    Raises:
        UserError: if there are none, or they are damaged or no whole ConvNeXt V2; the message names the file.
    """
    path = Path(path)
    file = find_weights(path)
    if ema and file.name == MODEL:
        file = file.with_name(EMA)
        if not file.is_file():
            raise UserError(f"{path}: holds no EMA weights, only the raw ones")
    stored = read_tensors(file, ema=ema and file.name != EMA)
    use: dict[str, Any] = {}
    enlargement = 1
    if file.name in WEIGHT_FILES:
        try:
            use, enlargement = _describe_use(file.parent), _enlargement(_read_json(file.parent / CONFIG))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            described = file.parent / (STATE if (file.parent / STATE).is_file() else CONFIG)
            raise UserError(f"{described}: damaged ({type(error).__name__}: {error})") from error
    like = describe_encoder(stored)
    with blame(str(file) if like == "no ConvNeXt V2" else f"{file} (most like {like})"):
        tensors, kind = from_any(stored)
        if kind == "timm" and enlargement != 1:
            name = "downsample_layers.0.0.weight"
            tensors[name] = shrink_stem(tensors[name], enlargement)
        with torch.device("meta"):
            problems = misfits(_network(tensors, num_classes=_num_classes(tensors)), tensors)
    names = use.get("class_names")
    if not _num_classes(tensors):
        use["class_names"] = None
    elif names and len(names) != _num_classes(tensors):
        raise UserError(f"{file}: {_num_classes(tensors)} classes, but the files beside it name {len(names)}")
    if problems:
        raise UserError(
            f"{file}: {kind} weights of a ConvNeXt V2 {describe_encoder(tensors)}, "
            f"but {len(problems)} tensors differ: {'; '.join(problems[:10])}"
        )
    if file.with_name(STATE).is_file():
        kind = "FCMAE run" if any(name.startswith("encoder.") for name in stored) else "fine-tuned run"
    return Weights(file, tensors, kind, **use)


def _network(tensors: Mapping[str, Tensor], *, num_classes: int, drop_path: float = 0.0) -> ConvNeXtV2:
    """Build the untrained network that has these tensors, by our names, and so many classes."""
    depths, dims = encoder_shape(tensors)
    stem = tensors["downsample_layers.0.0.weight"]
    encoder = ConvNeXtV2(
        (depths, dims),
        in_chans=stem.shape[1],
        num_classes=num_classes,
        stem_stride=stem.shape[-1],
        drop_path=drop_path,
    )
    if "norm.weight" in tensors and not num_classes:  # of a classifier whose head was taken off
        encoder.norm = nn.LayerNorm(dims[-1], eps=1e-6)
    return encoder


def _num_classes(tensors: Mapping[str, Tensor]) -> int:
    head = tensors.get("head.weight")
    return 0 if head is None or head.ndim != 2 else head.shape[0]


def build_encoder(weights: Weights, *, num_classes: int | None = None, drop_path: float = 0.0) -> ConvNeXtV2:
    """Build the network of `weights`, in float32, with them in it.

    Args:
        weights: from `read_weights`.
        num_classes: outputs of the classifier: None for the file's own classifier if it has one, 0 for none, any
            other number than the file's for a new, untrained one.
        drop_path: stochastic depth, see `ConvNeXtV2`.
    """
    tensors = dict(weights.tensors)
    if num_classes is None:
        num_classes = _num_classes(tensors)
    if num_classes != _num_classes(tensors):
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    encoder = _network(tensors, num_classes=num_classes, drop_path=drop_path)
    fresh = {name: value for name, value in encoder.state_dict().items() if name.startswith(("norm.", "head."))}
    load_strictly(encoder, fresh | tensors, weights.path)
    return encoder


def load_encoder(
    path: str | Path, *, ema: bool = False, num_classes: int | None = None, drop_path: float = 0.0
) -> ConvNeXtV2:
    """Return the ConvNeXt V2 in any file of weights: `build_encoder` of `read_weights`.

    Raises:
        UserError: as `read_weights`.
    """
    return build_encoder(read_weights(path, ema=ema), num_classes=num_classes, drop_path=drop_path)
