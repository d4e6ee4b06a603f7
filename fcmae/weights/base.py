"""What formats of ConvNeXt weights share: weights, preprocessing, names, the interface; knows no one of them."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from fcmae.config import TaskName
from fcmae.encoder.base import Network
from fcmae.encoder.convnext import ConvNeXt, Version, variant_name
from fcmae.encoder.networks import build_network
from fcmae.encoder.responses import OWN_PARTS
from fcmae.errors import UserError, one_line
from fcmae.files import write_json
from fcmae.heads.segmentation import AUXILIARY, Segmenter, read_head
from fcmae.tensors import load_strictly, misfits

CONFIG, MODEL = "config.json", "model.safetensors"
"""What timm, transformers and we call the description and the weights in a folder."""


# What is known of the images


def evaluation_crop(size: tuple[int, int]) -> float:
    """Share of the side that evaluation at `size` crops out: the official one; all at 384 px and on thumbnails."""
    return 0.875 if 64 < min(size) < 384 else 1.0


LARGEST_SIDE = 2**14
"""In pixels of an image, of what files may ask for."""


def _side(value: Any) -> int:
    if type(value) is not int or not 0 < value <= LARGEST_SIDE:
        raise ValueError(f"{value!r} is no side of an image in pixels")
    return value


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return _side(height), _side(width)


def _mask_value(value: Any) -> int:
    if type(value) is not int or not abs(value) < 2**31:
        raise ValueError(f"{value!r} is no value in masks")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(_number, values))


def _deviations(values: Any) -> tuple[float, ...]:
    if min(_numbers(values)) <= 0:
        raise ValueError("a standard deviation is not positive")
    return _numbers(values)


def _share(value: Any) -> float:
    if not 0.01 <= _number(value) <= 1:
        raise ValueError(f"{value!r} is no share of a side")
    return float(value)


def _range(values: Any) -> tuple[float, float]:
    low, high = _numbers(values)
    if not low < high:
        raise ValueError(f"value_range from {low} to {high}")
    return low, high


def _limits(values: Any) -> "tuple[Limit, Limit]":
    low, high = (_numbers(value) if isinstance(value, list | tuple) else _number(value) for value in values)
    return low, high


def _nodata(value: Any) -> float | str:
    return value if value == "nan" else _number(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _kind(value: Any) -> str:
    if value not in KINDS:
        raise ValueError(f"{value!r} is no kind of pixels, which are {', '.join(KINDS)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError("class names are no list")
    return tuple(map(_text, values))


KINDS = ("uint8", "uint16", "float32")
"""Of pixels, by the names that configurations have for them."""

Limit = float | tuple[float, ...]
"""Of all channels, or one of each."""


SEGMENTATION = "segmentation"
"""The task whose network has a head."""


def _task(value: Any) -> str:
    if value not in get_args(TaskName):
        raise ValueError(f"{value!r} is no task")
    return value


UNKNOWN: Any = None
"""Stands for a field of `Preprocessing` that no file gives; typed so that what is `completed` needs no checks."""


class Preprocessing(NamedTuple):
    """How files become images of a network, and what its classes are called; None where that is unknown.

    What a configuration's section `data` has, too, means the same.
    """

    mean: tuple[float, ...] = UNKNOWN
    """Per channel, of pixels in `value_range`."""
    std: tuple[float, ...] = UNKNOWN
    image_size: tuple[int, int] = UNKNOWN
    """Height and width in pixels; of the windows, in segmentation."""
    crop_pct: float = UNKNOWN
    """Share of the resized image's side that is cropped out of its centre."""
    interpolation: str = UNKNOWN
    """Of resizing, in timm's words: "bicubic"."""
    value_range: tuple[float, float] = UNKNOWN
    """Black and white, before `mean` and `std` are applied."""
    class_names: tuple[str, ...] | None = None
    """Of classes, or of what other tasks have outputs for."""
    dtype: str | None = None
    """Kind of the pixels, one of `KINDS`: whole numbers count as shares of the largest, floats as they are."""
    nodata: float | str | None = None
    """Value in files of pixels that are not known; "nan" for NaN and what files name, None where all are known."""
    window: bool = False
    """Whether a DICOM image's own window is applied."""
    clip: tuple[Limit, Limit] | None = None
    """Least and most that pixels are clipped to, in [0, 1] for whole numbers; None for no clipping."""
    task: str | None = None
    """What the outputs are, as a configuration's `task`."""
    short_side: int | None = None
    """Of segmentation: pixels that the shorter side of images is resized to; None leaves them as they are."""
    stride: tuple[int, int] | None = None
    """Of segmentation: from window to window, down and across; None gives the network whole images."""
    ignore_index: int | None = None
    """Of segmentation: value in masks of pixels without a class."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Take the fields out of what JSON or a configuration holds; others are ignored, None is unknown.

        Raises:
            ValueError, TypeError: for a value that is of another type, not finite or out of range.
        """
        checked: dict[str, Callable[[Any], Any]] = {
            "mean": _numbers,
            "std": _deviations,
            "image_size": _pair,
            "crop_pct": _share,
            "interpolation": _text,
            "value_range": _range,
            "class_names": _texts,
            "dtype": _kind,
            "nodata": _nodata,
            "window": _flag,
            "clip": _limits,
            "task": _task,
            "short_side": _side,
            "stride": _pair,
            "ignore_index": _mask_value,
        }
        return cls(**{key: check(values[key]) for key, check in checked.items() if values.get(key) is not None})

    @property
    def task_name(self) -> str:
        """What the outputs are, classes where nothing says so."""
        return self.task or "classification"

    def completed(self, encoder: Network) -> "Preprocessing":
        """Fill in what is unknown as the released weights have it (ImageNet's), for pixels in [0, 1].

        Only task and class names, and what files hold (from `dtype` on), may stay unknown.

        Raises:
            ValueError: if mean, std, clip or class names do not fit `encoder`, mean and std are unknown for other
                than 3 channels, no-data is of pixels that hold none, windows leave gaps, or Pillow has no such
                interpolation.
        """
        low, high = self.value_range or IMAGENET.value_range
        mean, std, size = IMAGENET.mean, IMAGENET.std, self.image_size or IMAGENET.image_size
        interpolation = self.interpolation or IMAGENET.interpolation
        if interpolation.upper() not in Image.Resampling.__members__:
            known = ", ".join(Image.Resampling.__members__).lower()
            raise ValueError(f"no interpolation is called {interpolation!r}; known are {known}")
        if self.mean:
            mean = tuple((value - low) / (high - low) for value in self.mean)
        if self.std:
            std = tuple(value / (high - low) for value in self.std)
        if not len(mean) == len(std) == encoder.in_chans:
            whose = "mean and std" if self.mean else "its mean and std are unknown, and ImageNet's"
            raise ValueError(
                f"a network for {encoder.in_chans} channels, but {whose} have {len(mean)} and {len(std)}; "
                "give the run or an exported folder, which hold its own"
            )
        if self.clip is not None:
            lows, highs = (side if isinstance(side, tuple) else (side,) * encoder.in_chans for side in self.clip)
            if not len(lows) == len(highs) == encoder.in_chans:
                raise ValueError(f"clip has {len(lows)} and {len(highs)} values for {encoder.in_chans} channels")
            if any(least >= most for least, most in zip(lows, highs, strict=True)):
                raise ValueError(f"clip from {lows} to {highs}, which leaves nothing")
        if self.nodata is not None and self.dtype not in (None, "float32"):
            raise ValueError(f"{self.dtype} pixels with no-data, which makes them float32")
        if self.stride is not None and (self.stride[0] > size[0] or self.stride[1] > size[1]):
            raise ValueError(f"stride {self.stride} leaves gaps between windows of {size}")
        if self.class_names is not None and len(self.class_names) != encoder.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {encoder.num_classes} classes")
        return self._replace(
            mean=mean,
            std=std,
            image_size=size,
            crop_pct=self.crop_pct or evaluation_crop(size),
            interpolation=interpolation,
            value_range=IMAGENET.value_range,
        )


PIXELS = "pixels"
"""Where formats of others, which ignore it, have what is ours alone in `Preprocessing`."""


def describe_pixels(use: Preprocessing) -> dict[str, Any]:
    """Return what formats of others have no place for, to be put at the top of a description of theirs."""
    return {PIXELS: {key: getattr(use, key) for key in ("dtype", "nodata", "window", "clip")}}


def full_range(use: Preprocessing) -> float:
    """Return what stands for 1.0 in `mean`, `std` and `clip` of pixels of `use.dtype`."""
    return 1.0 if use.dtype == "float32" else torch.iinfo(getattr(torch, use.dtype or "uint8")).max


IMAGENET = Preprocessing(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), evaluation_crop((224, 224)), "bicubic", (0.0, 1.0)
)
"""What the released weights want."""


# Names and shapes

Names = Mapping[str, str]
"""Templates of parameter names, from -> to, with the placeholders below."""

PLACEHOLDERS = {
    "stage": "[0-3]",
    "later": "[1-3]",
    "block": "0|[1-9][0-9]{0,2}",
    "layer": "[01]",
    "n": "[12]",
    "p": "weight|bias",
    "part": "[a-z_0-9.]+",
}

OUR_NAMES: Names = {
    name: name
    for name in (
        "downsample_layers.{stage}.{layer}.{p}",
        "stages.{stage}.{block}.dwconv.{p}",
        "stages.{stage}.{block}.norm.{p}",
        "stages.{stage}.{block}.pwconv{n}.{p}",
        "stages.{stage}.{block}.grn.{part}",
        "stages.{stage}.{block}.gamma",
        "norm.{p}",
        "head.{p}",
    )
}
"""Every name of a `ConvNeXt`, which are the official dense ones."""

OURS = "a ConvNeXt encoder in official dense names"


ENCODER = "encoder."
"""Before the names of the encoder in a whole FCMAE or segmenter."""


def split_head(state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """Take a segmenter's tensors apart: the encoder's by its own names, and the head's, without a second head.

    Tensors of other networks stay as they are, with none of a head.

    Raises:
        ValueError: if there are others beside a segmenter's.
    """
    if not any(name.startswith(ENCODER) for name in state) or not any(name.startswith("head.") for name in state):
        return state, {}
    if others := [name for name in state if not name.startswith((ENCODER, "head.", AUXILIARY))]:
        raise ValueError(f"an encoder with a head, and besides {one_line(others[0], longest=80)}")
    encoder = {name.removeprefix(ENCODER): x for name, x in state.items() if name.startswith(ENCODER)}
    return encoder, {name: x for name, x in state.items() if name.startswith("head.")}


def translate(names: Collection[str], table: Names, what: str) -> dict[str, str]:
    """Map each name by the templates of `table`.

    Raises:
        ValueError: naming those that fit no template, as not of `what`.
    """
    patterns = []
    for source, target in table.items():
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
        shown = ", ".join(one_line(repr(name), longest=80) for name in unknown[:10])
        raise ValueError(f"not {what}: unknown keys {shown}{more}")
    return translated


def convert(
    state: Mapping[str, Tensor],
    table: Names,
    what: str,
    reshape: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """Rename tensors by `table`, and reshape each as `reshape` does, given its old name; errors as `translate`."""
    return {new: reshape(old, state[old]) for old, new in translate(state, table, what).items()}


LEAST_TENSORS = 8
"""Of a block."""


def encoder_shape(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read (depths, dims) off the names and shapes of one of our state dicts.

    Raises:
        ValueError: if the stem, a downsampling, a whole stage or most of one is missing, or no convolution.
    """
    convs = ["downsample_layers.0.0.weight", *(f"downsample_layers.{i}.1.weight" for i in (1, 2, 3))]
    blocks = [{k.split(".")[2] for k in state if k.startswith(f"stages.{i}.")} for i in range(4)]
    depths = tuple(max(len(numbers), 1) for numbers in blocks)
    missing = [name for name in convs if name not in state]
    for i, depth in enumerate(depths):  # as many as there are, so that a number alone makes no network large
        wanted = (f"stages.{i}.{block}.dwconv.weight" for block in range(depth))
        missing += [name for name in wanted if name not in state][:1]
    if not missing and len(state) < LEAST_TENSORS * sum(depths):
        missing = ["most of its tensors"]
    if missing:
        raise ValueError(f"not a whole ConvNeXt encoder: {', '.join(missing)} missing")
    for name in convs:
        if state[name].ndim != 4:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, no convolution's weight")
    return depths, tuple(state[name].shape[0] for name in convs)


NO_CONVNEXT = "no ConvNeXt"


def describe_encoder(tensors: Mapping[str, Tensor]) -> str:
    """Guess the variant whose encoder these tensors hold, in any format's names: its name, or depths and dims."""
    blocks: list[dict[int, int]] = [{}, {}, {}, {}]
    for name, value in tensors.items():
        found = re.search(
            r"stages\.([0-3])\.(?:blocks\.|layers\.)?([0-9]{1,3})\.(?:dwconv|conv_dw)\.(weight|kernel)$", name
        )
        if found and value.ndim > 1:
            blocks[int(found[1])][int(found[2])] = value.shape[1 if found[3] == "kernel" else 0]
    if not all(blocks):
        return NO_CONVNEXT
    depths, dims = [len(stage) for stage in blocks], [next(iter(stage.values())) for stage in blocks]
    return variant_name(tuple(depths), tuple(dims)) or f"depths {depths}, dims {dims}"


def version_of(names: Collection[str]) -> Version:
    """Tell the version by the names of tensors in any format: the first has LayerScale."""
    scales = (name for name in names if name.endswith((".gamma", ".layer_scale_parameter")))
    return 1 if any(".grn." not in name for name in scales) else 2


def response_of(names: Collection[str]) -> str:
    """Tell what stands at GRN's place by our names: GRN as the paper has it, or nothing.

    Raises:
        ValueError: for another's parameters.
    """
    parts = {name.partition(".grn.")[2] for name in names if ".grn." in name}
    if other := sorted(parts - {"gamma", "beta"}):
        raise ValueError(
            f"its blocks hold grn.{one_line(other[0], longest=80)}, of another response than GRN, and nothing "
            "beside it says which; give the run or the exported folder"
        )
    return "grn" if parts else "none"


def idle_norm(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A final norm of weight 1 and bias 0 where our `state` has none: what our norm without parameters does."""
    if "norm.weight" in state:
        return {}
    like = state["downsample_layers.3.1.weight"]
    return {f"{name}.weight": like.new_ones(len(like)), f"{name}.bias": like.new_zeros(len(like))}


def without_idle_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a final norm of weight 1 and bias 0 where there is no classifier: a `ConvNeXt` has none then."""
    if "head.weight" not in state and "norm.weight" in state and "norm.bias" in state:
        weight, bias = state["norm.weight"], state["norm.bias"]
        if torch.equal(weight, torch.ones_like(weight)) and not bias.any():
            return {name: value for name, value in state.items() if not name.startswith("norm.")}
    return state


# Weights and networks


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Weights(NamedTuple):
    """The weights of a ConvNeXt, and what is known of their use."""

    path: Path
    """The file they were read from."""
    tensors: dict[str, Tensor]
    """By our names: the encoder, with `norm` and `head` where there is a classifier of images."""
    kind: str
    """The format or kind of run that they come from, for people."""
    preprocessing: Preprocessing = Preprocessing()
    step: int | None = None
    """Of a run: after how many updates."""
    ema: bool = False
    """Whether they are an EMA of the trained weights."""
    network: Mapping[str, Any] = NOTHING
    """What tensors do not show: `response` and `grn`, arguments of `ConvNeXt`; none where nothing says them. Of
    another network all arguments of `build_network`, `variant` among them, which says that it is another."""
    classifier: str = "head"
    """What the tensors of the classifier's last layer are called, see `Network`."""
    head: Mapping[str, Tensor] = NOTHING
    """Of a segmenter: its head's, by the names `head.*`; a second head, which only training has, is left out."""

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier or segmenter; 0 without one."""
        return read_head(self.head).num_classes if self.head else count_classes(self.tensors, self.classifier)

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """By the names of the network that `build_encoder` returns: a segmenter's encoder has its own behind
        `encoder.`."""
        if not self.head:
            return self.tensors
        return {f"{ENCODER}{name}": x for name, x in self.tensors.items()} | dict(self.head)

    @property
    def network_name(self) -> str:
        """The network for people, such as "ConvNeXt V2 atto", or "timm/resnet50 with head upernet"."""
        name = self.network.get("variant")
        name = name or f"ConvNeXt V{version_of(self.tensors)} {describe_encoder(self.tensors)}"
        return f"{name} with head {read_head(self.head).head}" if self.head else name

    @property
    def description(self) -> str:
        """Kind, step and EMA or raw, such as "fine-tuned run, step 250, EMA"."""
        if self.step is not None:
            return f"{self.kind}, step {self.step}, {'EMA' if self.ema else 'raw weights'}"
        return f"{self.kind}, EMA" if self.ema else self.kind


def count_classes(tensors: Mapping[str, Tensor], classifier: str = "head") -> int:
    """Outputs of the classifier in tensors by our names, or one called otherwise; 0 without one."""
    head = tensors.get(f"{classifier}.weight")
    return 0 if head is None or head.ndim != 2 else head.shape[0]


def build_untrained(
    tensors: Mapping[str, Tensor], *, num_classes: int, drop_path: float = 0.0, network: Mapping[str, Any] = NOTHING
) -> Network:
    """Build the untrained network that has these tensors, by our names, and so many classes.

    Args:
        network: what is known of it beside, see `Weights`.

    Raises:
        ValueError: if they are no whole encoder's.
    """
    if "variant" in network:
        return build_network(**network, num_classes=num_classes, drop_path=drop_path)
    depths, dims = encoder_shape(tensors)
    stem = tensors["downsample_layers.0.0.weight"]
    encoder = ConvNeXt(
        (depths, dims),
        version=version_of(tensors),
        response=network.get("response") or response_of(tensors),
        grn=network.get("grn"),
        in_chans=stem.shape[1],
        num_classes=num_classes,
        stem_stride=stem.shape[-1],
        drop_path=drop_path,
    )
    if "norm.weight" in tensors and not num_classes:  # of a classifier whose head was taken off
        encoder.norm = nn.LayerNorm(dims[-1], eps=1e-6)
    return encoder


def build_like(weights: Weights, *, drop_path: float = 0.0) -> Network:
    """Build the untrained network of `weights`, a segmenter where they have a head; errors as `build_untrained`."""
    num_classes = 0 if weights.head else weights.num_classes
    encoder = build_untrained(
        weights.tensors, num_classes=num_classes, drop_path=drop_path, network=weights.network
    )
    if not weights.head:
        return encoder
    head, dim, num_classes = read_head(weights.head)
    return Segmenter(encoder, num_classes, head=head, dim=dim)


def require_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Check that tensors are those of a ConvNeXt or what contains one, whose own numbers do not matter.

    Raises:
        UserError: naming `source`, both variants and up to ten tensors that differ.
    """
    if problems := misfits(module, tensors):
        ours = describe_encoder(module.state_dict())
        holds = "" if ours == NO_CONVNEXT else f" ({ours}): it holds {describe_encoder(tensors)}"
        raise UserError(
            f"{source}: does not fit the model{holds}; {len(problems)} tensors differ: {'; '.join(problems[:10])}"
        )


def load_network(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Load tensors strictly into a ConvNeXt or what contains one; errors as `require_fit`."""
    require_fit(module, tensors, source)
    load_strictly(module, tensors, source)


def build_encoder(weights: Weights, *, num_classes: int | None = None, drop_path: float = 0.0) -> Network:
    """Build the network of `weights`, in float32, with them in it.

    Args:
        weights: as read from any format.
        num_classes: outputs of a classifier of images: None for the file's own classifier, or its segmenter, if it
            has one, 0 for none, any other number than that of the file's classifier for a new, untrained one.
        drop_path: stochastic depth, see `ConvNeXt`.
    """
    if num_classes is None:
        network = build_like(weights, drop_path=drop_path)
        tensors = weights.state_dict
    else:
        own = 0 if weights.head else weights.num_classes
        left_out = () if num_classes == own else (f"{weights.classifier}.",)
        tensors = {name: value for name, value in weights.tensors.items() if not name.startswith(left_out)}
        network = build_untrained(tensors, num_classes=num_classes, drop_path=drop_path, network=weights.network)
    if not isinstance(network, Segmenter):
        fresh = {name: x for name, x in network.state_dict().items() if name.startswith(network.head_names)}
        tensors = fresh | tensors
    load_network(network, tensors, weights.path)
    return network


# Formats


class Loading(NamedTuple):
    """What the card of a folder says of using it; Python in lines."""

    library: str
    """As the Hugging Face Hub calls it."""
    code: str
    """Loads the network from `{folder}`, which is Python, too."""
    address: str = "{}"
    """What stands for a folder, in which `{}` is its path."""
    hub: str | None = None
    """What stands for a repository of the hub, in which `{}` is its name; None where it is downloaded before."""
    prepare: str | None = None
    """Makes `images` of `photo`, an image of Pillow's; None for timm's transform."""
    pixels: str | None = None
    """Makes them of what is no photograph of 8 bits; None for what does so with torch."""
    run: str = "out = model(images)"
    enlargement: int = 1
    """How much larger it takes images than the network of the run."""
    warning: str = ""
    """A paragraph."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to store a ConvNeXt: how it is recognised, read, written and checked against the network."""

    name: str
    """Of `fcmae export --to NAME`."""
    write: Callable[[Any, Preprocessing, Path], None]
    """(network in float32, its preprocessing, an existing folder) -> files with tensors and description in it.

    Raises ValueError for a network that the format cannot hold, ImportError for a missing package."""
    compute: Callable[[Path, Tensor], Tensor]
    """(folder, images) -> what the network in the folder gives, in the images' dtype."""
    how: Callable[[Any, Path], str]
    """(network, folder) -> the code that loads what was written."""
    loading: Callable[[Any, Preprocessing], Loading]
    """(network, its preprocessing, complete) -> the same for the card."""
    networks: Collection[tuple[Version, str]] | None = None
    """(version, response) of the networks that it can hold, whose GRN is the paper's; None for all there are."""
    dtype: torch.dtype = torch.float64
    """In which `compute` is compared with the network."""
    tolerance: float = 1e-10
    """Largest difference, relative to the largest output."""
    check_preprocessing: Callable[[Any, Preprocessing], None] | None = None
    """(network, its preprocessing): raises ValueError where preprocessing cannot be expressed, before anything is
    written; of formats that can."""
    prepend_preprocessing: Callable[[Any, Preprocessing, Path], None] | None = None
    """(network, its preprocessing, folder) -> what was written there takes images of any size and gives
    probabilities, which is checked; of the same formats.

    Raises ValueError where it computes something else."""
    loading_prepared: Callable[[Any, Preprocessing], Loading] | None = None
    """As `loading`, after `prepend_preprocessing`."""
    kind: str = ""
    """What weights of this format are called, for people; of those that are read."""
    recognises: Callable[[Collection[str]], bool] = lambda names: False
    """Whether these are the names of a network's tensors in this format."""
    read: Callable[[Mapping[str, Tensor], Path | None], tuple[dict[str, Tensor], Preprocessing]] | None = None
    """(tensors by its names, the folder whose files describe them) -> tensors by our names, and preprocessing.

    Raises ValueError for names or shapes that are not the format's, UserError for a damaged description."""

    def holds(self, encoder: ConvNeXt) -> bool:
        """Whether the format has what stands at GRN's place in this network."""
        own = (encoder.version, encoder.response)
        return self.networks is None or (own in self.networks and encoder.grn in ({}, OWN_PARTS))

    @torch.no_grad()
    def verify(self, encoder: Network, folder: Path) -> float:
        """Load what was written to `folder` and compute with it, on random images of two sizes and batch sizes.

        Returns:
            The largest difference from `encoder`, which is cast to `dtype`, relative to the largest output;
            infinity where shapes differ or results are not finite.
        """
        encoder = encoder.to(self.dtype)
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for b, grid_height, grid_width, rest in ((2, 2, 3, 0), (1, 4, 2, 3)):
            size = grid_height * encoder.patch_size + rest, grid_width * encoder.patch_size + rest
            images = torch.randn(b, encoder.in_chans, *size, generator=generator, dtype=self.dtype)
            ours, theirs = encoder(images), self.compute(folder, images)
            if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
                return float("inf")
            worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30)))
        return worst


@contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turn what reading a JSON file of unexpected content raises into a `UserError` that names it."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        said = one_line(str(error), longest=200)
        raise UserError(f"{path}: damaged ({type(error).__name__}: {said})") from error


LONGEST_DESCRIPTION = 2**24
"""In bytes; a hundred times that of 21,000 classes."""


@contextmanager
def description(folder: Path | None, name: str = CONFIG) -> Iterator[dict[str, Any]]:
    """Yield the object in a JSON file of `folder`, empty where there is none, to be read under `report_damage`."""
    path = (folder or Path()) / name
    with report_damage(path):
        values = {}
        if folder and path.exists():
            if not path.is_file():
                raise UserError(f"{path}: neither a file nor absent; remove it")
            if path.stat().st_size > LONGEST_DESCRIPTION:
                raise ValueError(f"longer than {LONGEST_DESCRIPTION} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
        yield values if isinstance(values, dict) else {}


def write_description(encoder: Network, preprocessing: Preprocessing, folder: Path, **facts: object) -> None:
    """Write our `config.json`, for formats that have no place for preprocessing and class names, and more facts."""
    network = encoder.arguments | {"num_classes": encoder.num_classes}
    if encoder.family == "convnext":
        network |= {"depths": encoder.layer_depths, "dims": encoder.dims}
    write_json(folder / CONFIG, {"network": network, **preprocessing._asdict(), **facts}, indent=2)


def read_description(folder: Path | None) -> Preprocessing:
    """Read what `write_description` wrote; all is unknown where there is no such file."""
    with description(folder) as config:
        return Preprocessing.of(config) if "network" in config else Preprocessing()


ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "variant": lambda value: isinstance(value, str) and len(value) <= 100,
    "in_chans": lambda value: type(value) is int and 0 < value < 2**16,
    "stem_stride": lambda value: type(value) is int,
    "response": lambda value: isinstance(value, str) and len(value) <= 100,
    "grn": lambda value: (
        isinstance(value, dict) and all(type(part) is type(OWN_PARTS.get(key)) for key, part in value.items())
    ),
}
"""What files may say of a network beside its tensors, arguments of `build_network`: whether a value is one."""


def require_arguments(network: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file says of a network, once its keys and types are known to be right.

    Raises:
        ValueError: naming the key that is not.
    """
    for key, value in network.items():
        if key not in ARGUMENTS or not ARGUMENTS[key](value):
            raise ValueError(one_line(f"its network has {key} {value!r}", longest=200))
    return network


def read_network(folder: Path | None) -> Mapping[str, Any]:
    """Read what `write_description` wrote of the network beside its tensors; empty without such a file."""
    with description(folder) as config:
        network = config.get("network", {})
        return require_arguments({key: network[key] for key in ("response", "grn") if key in network})
