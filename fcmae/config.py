"""Configuration: YAML into frozen, typed sections, dotted overrides last; knows no models, data or devices."""

import copy
import difflib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from fcmae.errors import UserError, blame, named, shown
from fcmae.plain_yaml import MOST_CHARACTERS, MOST_DEEP, read_yaml, write_yaml


def _one_line(text: str) -> str:
    """Refuse a zero byte, line breaks and other control characters, which no name of a run, file or class needs."""
    if wrong := [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")]:
        raise ValueError(f"{shown(text)} has the control character {shown(wrong[0])}")
    return text


def _nameable(path: str) -> str:
    """Refuse what file systems cannot name."""
    if long := [name for name in path.split("/") if len(name.encode()) > 255]:
        raise ValueError(f"{shown(long[0])} is longer than the 255 bytes that a name of a file has")
    return path


# Bounds are far above what any run needs, and keep sums finite and what is listed countable. What is too large for
# this machine is another question: fcmae.training.memory.
Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_one_line)]
Place = Annotated[str, Field(min_length=1, max_length=4000), AfterValidator(_one_line), AfterValidator(_nameable)]
MOST_CHANNELS = 4096
MOST_UPDATES = 99_999_999
"""Of a run: what the eight digits of a checkpoint's name count."""
Channel = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Band = Annotated[int, Field(ge=0, lt=MOST_CHANNELS)]
Depth = Annotated[int, Field(ge=1, le=300)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Side = Annotated[int, Field(ge=1, le=65_536)]
Batch = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Epochs = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Sizes = tuple[Side, Side]
Variant = Text | tuple[tuple[Depth, Depth, Depth, Depth], tuple[Width, Width, Width, Width]]
Pair = tuple[float, float]
Channels = Annotated[
    tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1, max_length=MOST_CHANNELS)
]
Deviations = Annotated[
    tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(min_length=1, max_length=MOST_CHANNELS)
]
Limits = FiniteFloat | Channels
Auto = Literal["auto"]
AUTO: Auto = "auto"


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )
    command: ClassVar[str | None] = None
    """The command whose shipped configurations `load_config` finds by name; None for all."""

    @classmethod
    def kind_of(cls, values: Mapping[str, Any]) -> type[Self]:
        """Return the class that `values` are a configuration of: this one, or the one for their task."""
        return cls

    @classmethod
    def place_of(cls, key: str) -> str:
        """Say what an unknown dotted key is for, if it is known elsewhere; empty if not."""
        return ""


class GRNSection(Section):
    """The parts of GRN, arguments of `fcmae.encoder.responses.GRN` by the same names (paper, table 2)."""

    aggregation: Literal["l2", "l1", "average"] = "l2"
    """How a channel's sites become one number."""
    normalization: Literal["mean", "sum", "none", "standardize"] = "mean"
    """What each channel's number is divided by."""
    residual: bool = True
    """Whether the input is added to what GRN makes of it."""


class EncoderSection(Section):
    """The encoder, of pretraining and fine-tuning alike."""

    variant: Variant
    """The network: a size such as `tiny`, its own [[depths], [widths]], `timm/NAME`, or `roadmap/STEP`."""
    version: Literal[1, 2] = 2
    """1 for ConvNeXt V1, with LayerScale; 2 for V2, with GRN."""
    response: Literal["auto", "none", "grn", "lrn", "batch_norm", "layer_norm", "squeeze_excite", "cbam"] = AUTO
    """What stands at GRN's place; `auto` is GRN in version 2, none in version 1."""
    grn: GRNSection = GRNSection()
    """Parts of GRN, for ablations."""
    in_chans: Channel = 3
    """Channels of the images."""
    stem_stride: Literal[1, 2, 4] = 4
    """Pixels of a site's side after the stem; a patch is 8 times that."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: the probability that the last block is left out, rising from 0 at the first."""

    @property
    def network(self) -> dict[str, Any]:
        """Arguments of `fcmae.ConvNeXt`."""
        return self.model_dump(include=set(EncoderSection.model_fields))

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        parts = self.grn.model_dump(exclude_defaults=True) if isinstance(self.grn, GRNSection) else {}
        if parts and (self.response not in ("grn", AUTO) or (self.response == AUTO and self.version == 1)):
            raise ValueError(f"grn.{next(iter(parts))} is of GRN alone: set model.response=grn, or leave it out")
        return self


class ModelSection(EncoderSection):
    """The network: arguments of `fcmae.FCMAE`, by the same names."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the patches that are hidden."""
    mask_shape: Literal["random", "block", "grid"] = "random"
    """How they are drawn: each patch for itself, in blocks, or regularly over the grid."""
    mask_group: Literal[1, 2, 4] = 1
    """Side of the squares of patches that are hidden or shown together."""
    sparse: bool = True
    """Hidden patches are as if they were not there; false for patches of zeros and a dense encoder."""
    decoder: Literal["convnext", "unet", "unet_no_skips", "transformer"] = "convnext"
    """What reconstructs the hidden patches."""
    decoder_dim: Width = 512
    """Width of the decoder."""
    decoder_depth: Depth = 1
    """Number of its blocks."""
    norm_pix_loss: bool = True
    """Pixels as a target are normalised patch by patch."""
    target: Literal["pixels", "hog"] = "pixels"
    """What is predicted of hidden patches: pixels, or histograms of oriented gradients."""
    layout: Literal["auto", "masked", "packed", "minkowski"] = "auto"
    """How the encoder computes: all give the same numbers; `auto` is packed."""


class OutputsSection(EncoderSection):
    """The network of fine-tuning: arguments of `fcmae.ConvNeXt`, by the same names."""

    num_classes: Batch | None = None
    """Outputs; null for as many as the training set has classes."""


class ClassifierSection(OutputsSection):
    """As for all fine-tuning, with outputs for whole images."""

    head_init_scale: NotNegative = 0.001
    """Factor on a new classifier's first weights."""


class SegmenterSection(OutputsSection):
    """As for all fine-tuning, with outputs for each pixel: arguments of `Segmenter`."""

    head: Literal["fpn", "upernet"] = "fpn"
    """A feature pyramid network, light; or UPerNet, the paper's."""
    head_dim: Width | None = None
    """Channels of the head's maps; null for 128 of fpn, 512 of upernet."""
    auxiliary: bool = False
    """Whether a second head on the third stage is trained, too, as in UPerNet's recipes."""


class DataSection(Section):
    """Where images come from and how they become batches."""

    name: Text = "folder"
    """`folder` (also a .tar), `arrays` (from `fcmae prepare`), or a map-style name of timm's `create_dataset`."""
    root: Place
    """The folder, `.tar` or arrays with the images, or the folder or URL of shards (`fcmae shard`)."""
    split: Text = "train"
    """A folder of this name in `root`, where there is one."""
    dtype: Literal["uint8", "uint16", "float32"] | None = None
    """Of the pixels, from the file to the model; null for the deepest of some images."""
    nodata: FiniteFloat | Literal["nan"] | None = None
    """Value of pixels that are not known, kept out of loss and statistics: a number of the files', besides NaN and
    what a GeoTIFF names, or `nan` for these two alone; null refuses images that have such."""
    window: bool = False
    """Whether a DICOM image's own window (VOI LUT) is applied, onto 0 to 1; its rescaled values otherwise."""
    image_size: Side | Sizes = 224
    """Pixels: a side, or [height, width]."""
    batch_size: Batch = 64
    """Images per process and micro-batch; `auto` for as many as fit."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 8
    """Processes that load images, of each training process; 0 loads in that itself."""
    max_bad: Count = 100
    """Images that may fail to decode before the run ends."""
    mean: Channels = (0.485, 0.456, 0.406)
    """Of pixels by channel, 1.0 standing for 255 (uint8) or 65535 (uint16); float32 as it is."""
    std: Deviations = (0.229, 0.224, 0.225)
    """Standard deviation, likewise."""
    clip: tuple[Limits, Limits] | None = None
    """Least and most that pixels are clipped to, in the units of `mean`: a number, or one per channel."""
    stats: Place | None = None
    """`stats.json` of `fcmae stats`, which `mean`, `std` and `clip` are taken from where they are `auto`."""
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        if AUTO not in (self.clip, self.mean) and self.clip is not None:
            least, most = (x if isinstance(x, tuple) else (x,) * len(self.mean) for x in self.clip)
            if {len(least), len(most)} != {len(self.mean)} or any(a >= b for a, b in zip(least, most, strict=True)):
                raise ValueError(
                    "clip must be [least, most], least below most, each a number or, as mean, "
                    f"{len(self.mean)}: one per channel"
                )
        return self


class CroppedDataSection(DataSection):
    """As for all runs; what is seen of an image is a random crop of any size."""

    crop_scale: Pair = (0.2, 1.0)
    """Share of the image's area that a random crop covers, least and most."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two shares of the area, 0 < least <= most <= 1")
        return self


class PretrainDataSection(CroppedDataSection):
    """As for all runs; large images may be cut."""

    tile: Side | Sizes | None = None
    """Side, or [height, width], of the tiles that images are cut into, each an image of its own; null for none."""


class LabelledDataSection(DataSection):
    """Where labelled images come from, and those to evaluate on."""

    val_split: Text | None = "val"
    """The images to evaluate on; null for none."""
    val_root: Place | None = None
    """Where they are; null for `root`."""
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each class, or without classes of the images, that is trained on, at least one image; chosen by
    `train.seed`, smaller within larger."""


class ImageDataSection(LabelledDataSection, CroppedDataSection):
    """Images with labels for the whole of each, and how they are augmented and evaluated."""

    labels: Place | None = None
    """A CSV file of the images' labels, for tasks other than classification: `file`, then a column per class with 0
    and 1, or `labels` with names such as cat|dog; or a column per number. Null for labels.npy beside arrays."""
    val_labels: Place | None = None
    """The same of the images to evaluate on; null for `labels`."""
    crop_scale: Pair = (0.08, 1.0)
    crop_padding: Side | None = None
    """Pixels of mirrored border for a plain random crop; null for the random resized crop."""
    auto_augment: Text | None = "rand-m9-mstd0.5-inc1"
    """A policy of timm's `auto_augment`, for one or three channels; null for none."""
    erase_prob: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of random erasing, with a normal value for each pixel."""
    mixup: NotNegative = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix; 0 for none. With both, each batch takes one of them."""
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] = 0.875
    """Share of the side that the center crop of evaluation keeps."""

    @model_validator(mode="after")
    def _check_border(self) -> Self:
        if self.crop_padding is not None and self.image_size != AUTO and self.crop_padding >= min(self.size):
            raise ValueError(
                f"crop_padding={self.crop_padding} must be less than image_size={min(self.size)}, of which it is "
                "the mirror"
            )
        return self


class MaskDataSection(LabelledDataSection):
    """Images with a mask of classes for each, and how both are augmented and evaluated."""

    mask_root: Place | None = None
    """A folder of the masks of all splits, `root` having nothing but images; null for SPLIT/images and SPLIT/masks
    in `root`, or masks.npy beside arrays."""
    val_mask_root: Place | None = None
    """The same of the images to evaluate on; null for `mask_root`, or with `val_root` for masks in that."""
    ignore_index: Annotated[int, Field(ge=-1, le=65_535)] | None = 255
    """The value of masks that is no class; null for none."""
    scale: Pair = (0.5, 2.0)
    """Factor on the image's size, least and most, before a random crop of `image_size`."""
    short_side: Side | None = None
    """Pixels of the image's shorter side at a factor of 1, in evaluation and prediction, too; null for its own."""
    most_of_one: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of a crop that one class may have, else another is drawn, up to ten times; 1 takes the first."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that brightness, contrast, saturation and hue change, each for itself; for RGB of 8 bits."""
    stride: Side | Sizes | None = None
    """Pixels between windows of `image_size` in evaluation and prediction; null for whole images at once."""

    @property
    def steps(self) -> tuple[int, int] | None:
        """Pixels between windows, down and across."""
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 100:
            raise ValueError("scale must be two factors, 0 < least <= most <= 100")
        if self.steps is not None and self.image_size != AUTO:
            for step, side in zip(self.steps, self.size, strict=True):
                if step > side:
                    raise ValueError(f"stride={step} leaves gaps between windows of {side}; it is at most that")
        if self.mask_root is None and self.val_mask_root is not None and self.val_root is None:
            raise ValueError("val_mask_root is for masks apart from images: set mask_root, or val_root, too")
        if self.name == "arrays" and (self.mask_root or self.val_mask_root):
            raise ValueError("mask_root is for image files: arrays have masks.npy beside them")
        return self


class OptimSection(Section):
    """AdamW, warm-up and cosine; the rate is base_lr * images per update / 256."""

    images_per_update: Batch | None = None
    """Of all processes, from which follows what is `auto` of `data.batch_size` and `accumulate`; null for
    data.batch_size * accumulate * processes."""
    base_lr: NotNegative = 1.5e-4
    """Peak learning rate for 256 images an update."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end, not scaled."""
    weight_decay: NotNegative = 0.05
    """Of AdamW; not of norms, biases, GRN and the mask token."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Of AdamW."""
    warmup_epochs: Annotated[float, Field(ge=0, le=1e9)] = 40
    """Epochs in which the rate rises from 0."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient, or null for no clipping."""
    accumulate: Batch = 1
    """Micro-batches per update; `auto` for as many as make up `images_per_update`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate from each layer to the one below it."""
    layer_decay_type: Literal["single", "group"] = "single"
    """What counts as a layer: each block, or three blocks of the third stage and each other stage."""


class PretrainOptimSection(OptimSection):
    """As for all runs, with a decoder that may be ahead of the encoder."""

    decoder_first_epochs: NotNegative = 0.0
    """Epochs in which the decoder alone is trained, for an encoder from `init_from` that has none."""


class FinetuneOptimSection(OptimSection):
    """As in pretraining, with a smaller least rate, longer memory and shorter warm-up."""

    min_lr: NotNegative = 1e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup_epochs: NotNegative = 5
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from `base_lr` to `min_lr` after the warm-up."""


class TrainSection(Section):
    """How long and how to compute."""

    epochs: Epochs = 800
    """Passes over the images."""
    max_steps: Annotated[int, Field(ge=1, le=MOST_UPDATES)] | None = None
    """End, schedule included, after this many updates if `epochs` would take more."""
    max_hours: Epochs | None = None
    """Save and stop, to be resumed, when the process has run for so long; null for never."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast; `no` is float32, without TF32; `auto` is bf16 or fp16 if accelerate was launched with that, else
    bf16 on GPUs that have it, else float32."""
    bf16_exchange: bool = False
    """Send gradients between processes as bf16: half the traffic, and 8 of float32's 24 bits."""
    compile: bool = False
    """Whether the step goes through torch.compile."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass: less memory, more time."""
    seed: Seed = 0
    """Of weights, order, crops and masks."""


class FinetuneTrainSection(TrainSection):
    """How long and how to compute, and what is trained."""

    epochs: Epochs = 100
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the exponential moving average (EMA) of the weights, which is evaluated beside them; null for none."""
    freeze_encoder: bool = False
    """Train the head alone: of a classifier, a linear probe."""


class ImageTrainSection(FinetuneTrainSection):
    """As for all fine-tuning, with a loss for whole images."""

    loss: Literal["auto", "cross_entropy", "binary_cross_entropy", "mse", "smooth_l1"] = AUTO
    """`auto` is the first of the task's: cross-entropy, binary cross-entropy or, of standardised targets, mean
    squared error (or smooth L1)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the label that is spread over all classes."""


class MaskTrainSection(FinetuneTrainSection):
    """As for all fine-tuning, with cross-entropy of pixels."""

    dice: NotNegative = 0.0
    """Weight of the Dice loss, besides cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """Of the classes in cross-entropy; `balanced` is the median of the classes' pixels over its own."""


class EvalSection(Section):
    """When to evaluate, and which weights."""

    every_epochs: Epochs = 1.0
    """Epochs between evaluations."""
    ema: bool | None = None
    """Whether `best`, RUN/model and --evaluate take the EMA weights; null for "where there are any"."""


class CheckpointSection(Section):
    """When to save the state of a run."""

    every_steps: Positive = 1000
    """Updates between checkpoints."""
    keep: Positive = 2
    """How many of the newest stay."""
    keep_every_epochs: Epochs | None = None
    """Save then, too, and keep these for good; null for none."""


Logger = Literal["tensorboard", "wandb", "mlflow", "trackio", "aim", "clearml", "comet_ml", "dvclive", "swanlab"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LogSection(Section):
    """When to write metrics, and where to."""

    every_steps: Positive = 20
    """Updates between lines of the terminal and of metrics.jsonl."""
    loggers: Annotated[tuple[Logger, ...], BeforeValidator(_listed)] = Field(default=("tensorboard",), alias="with")
    """Besides metrics.jsonl: `tensorboard`, in the run folder, or packages that accelerate has a tracker for, which
    send metrics, pictures and this configuration wherever they are set up to."""


class PicturesSection(Section):
    """Pictures of fixed images, at each evaluation."""

    num_images: Annotated[int, Field(ge=0, le=10_000)] = 8
    """How many; 0 for none."""
    bands: tuple[Band, Band, Band] | None = None
    """Channels, from 0, shown as red, green and blue; null for the first three, or gray."""


class VisualizeSection(PicturesSection):
    """Reconstructions of fixed images, at start, at an interval and at the end."""

    every_steps: Positive = 5000
    """Updates between reconstructions."""


class ProbeSection(Section):
    """Labelled images to evaluate frozen features on; classes are learnt from those of `data`."""

    val_split: Text | None = "val"
    """The images to classify; null holds out a fifth of `data.split`."""
    val_root: Place | None = None
    """Where they are; null for `data.root`."""
    num_images: Positive | None = None
    """Images taken of each, at most; null for all."""


class OnlineProbeSection(ProbeSection):
    """k-NN accuracy and feature collapse during pretraining, which neither changes; labels never reach it."""

    knn_every_epochs: Epochs | None = None
    """Also before the first and after the last step; null for never."""
    collapse_every_epochs: Epochs | None = None
    """When to log the cosine distance of each stage's channels, likewise; needs no labels."""
    num_images: Positive | None = 10000


class RunConfig(Section):
    """What any training run needs to know; each kind of run narrows the sections."""

    output: Place
    """The run folder."""
    resume: Literal["auto", "never"] = "never"
    """`auto` goes on, exactly, where the run in `output` stopped; `never` refuses a folder that is in use."""
    init_from: Place | None = None
    """A run folder, checkpoint folder, exported folder or file of weights, to start a new run from."""
    model: EncoderSection
    """The network."""
    data: DataSection
    """The images."""
    optim: OptimSection = OptimSection()
    """AdamW and its schedule."""
    train: TrainSection = TrainSection()
    """How long and how to compute."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save."""
    log: LogSection = LogSection()
    """When to write metrics."""

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        for key in ("mean", "std"):
            known = AUTO not in (getattr(self.data, key), self.model.in_chans)
            if known and len(getattr(self.data, key)) != self.model.in_chans:
                raise ValueError(
                    f"data.{key} has {len(getattr(self.data, key))} values, but model.in_chans is "
                    f"{self.model.in_chans}: give one value per channel, as fcmae stats prints them"
                )
        return self

    @property
    def mixes_pairs(self) -> bool:
        """Whether batches must be even, as mixup and cutmix mix pairs."""
        return False

    @model_validator(mode="after")
    def _check_update(self) -> Self:
        sizes = {"data.batch_size": self.data.batch_size, "optim.accumulate": self.optim.accumulate}
        for key, value in sizes.items():
            if value == AUTO and self.optim.images_per_update is None:
                raise ValueError(
                    f"{key}=auto: follows from optim.images_per_update, which is null; set that, such as "
                    f"optim.images_per_update=1024, or a number for {key}"
                )
        return self


def _require_bands(bands: tuple[int, int, int] | None, in_chans: Any) -> None:
    if bands and in_chans != AUTO and max(bands) >= in_chans:
        raise ValueError(f"visualize.bands={list(bands)}: the images have {in_chans} channels, counted from 0")


class PretrainConfig(RunConfig):
    """Everything `pretrain.py` needs to know."""

    command: ClassVar[str | None] = "pretrain"
    model: ModelSection
    data: PretrainDataSection
    optim: PretrainOptimSection = PretrainOptimSection()
    eval: OnlineProbeSection = OnlineProbeSection()
    """Evaluation of frozen features during pretraining."""
    visualize: VisualizeSection = VisualizeSection()
    """Reconstructions of fixed images."""

    @model_validator(mode="after")
    def _check_bands(self) -> Self:
        _require_bands(self.visualize.bands, self.model.in_chans)
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.train.compile and self.model.layout == "minkowski":
            raise ValueError("train.compile=true: MinkowskiEngine cannot be traced; take model.layout=packed")
        return self


TaskName = Literal["classification", "multilabel", "regression", "segmentation"]


class TaskConfig(Section):
    """What is trained, which comes first in a configuration."""

    task: TaskName = "classification"
    """One class for each image, any number of classes, one or more numbers, or a class for each pixel."""


LOSSES = {
    "classification": ("cross_entropy",),
    "multilabel": ("binary_cross_entropy",),
    "regression": ("mse", "smooth_l1"),
}
"""By task of whole images; the first is its own."""


class FinetuneConfig(RunConfig, TaskConfig):
    """What `finetune.py` needs to know for any task; the rest is `ImageConfig`'s or `SegmentationConfig`'s."""

    command: ClassVar[str | None] = "finetune"
    model: OutputsSection
    data: LabelledDataSection
    optim: FinetuneOptimSection = FinetuneOptimSection()
    train: FinetuneTrainSection = FinetuneTrainSection()
    eval: EvalSection = EvalSection()
    """When to evaluate, and which weights."""

    @classmethod
    def kind_of(cls, values: Mapping[str, Any]) -> type[Self]:
        kinds = {
            FinetuneConfig: (ImageConfig, SegmentationConfig),
            FinetuneRecipe: (ImageRecipe, SegmentationRecipe),
        }
        of_images, of_pixels = kinds.get(cls, (cls, cls))
        return cast(type[Self], of_pixels if values.get("task") == "segmentation" else of_images)

    @classmethod
    def place_of(cls, key: str) -> str:
        pixels = issubclass(cls, SegmentationConfig)
        if "." not in key or key not in _keys(ImageConfig if pixels else SegmentationConfig):
            return ""
        if pixels:
            return "is for whole images; leave it out with task=segmentation, see --config segmentation"
        return "is for task=segmentation, see --config segmentation"

    @property
    def evaluates_ema(self) -> bool:
        """Whether `best` and RUN/model are of the EMA weights."""
        return self.train.ema_decay is not None if self.eval.ema is None else self.eval.ema

    @model_validator(mode="after")
    def _check_finetuning(self) -> Self:
        if self.eval.ema and self.train.ema_decay is None:
            raise ValueError("eval.ema=true needs an EMA of the weights: set train.ema_decay=0.9999")
        return self


class ImageConfig(FinetuneConfig):
    """Everything `finetune.py` needs to know for a task of whole images."""

    model: ClassifierSection
    data: ImageDataSection
    train: ImageTrainSection = ImageTrainSection()

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.data.mixup or self.data.cutmix)

    @property
    def loss(self) -> str:
        """What is minimised, the task's own for `auto`."""
        return LOSSES[self.task][0] if self.train.loss == AUTO else self.train.loss

    @model_validator(mode="after")
    def _check_augmentation(self) -> Self:
        if self.data.auto_augment is not None and self.model.in_chans not in (1, 3, AUTO):
            raise ValueError(
                f"data.auto_augment={self.data.auto_augment} is for images of 1 or 3 channels, but model.in_chans "
                f"is {self.model.in_chans}: set data.auto_augment=null"
            )
        if self.mixes_pairs and self.data.batch_size != AUTO and self.data.batch_size % 2:
            raise ValueError(f"data.batch_size={self.data.batch_size} is odd, but mixup and cutmix mix pairs")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.loss not in LOSSES[self.task]:
            raise ValueError(
                f"train.loss={self.loss} is not for task={self.task}: take {' or '.join(LOSSES[self.task])}"
            )
        for key in ("labels", "val_labels"):
            if getattr(self.data, key) is not None and (
                self.task == "classification" or self.data.name == "arrays"
            ):
                raise ValueError(
                    f"data.{key} is for image files of task=multilabel or task=regression: arrays have labels.npy "
                    "beside them, and classes of task=classification are folders"
                )
        if self.task == "regression":
            values = {f"data.{key}": getattr(self.data, key) for key in ("mixup", "cutmix")}
            for key, value in (values | {"train.label_smoothing": self.train.label_smoothing}).items():
                if value:
                    raise ValueError(f"{key}={value} is for classes: set {key}=0 for task=regression")
        return self


class SegmentationConfig(FinetuneConfig):
    """Everything `finetune.py` needs to know for a class for each pixel."""

    model: SegmenterSection
    data: MaskDataSection
    train: MaskTrainSection = MaskTrainSection()
    visualize: PicturesSection = PicturesSection()
    """Pictures of fixed images."""

    @model_validator(mode="after")
    def _check_bands(self) -> Self:
        _require_bands(self.visualize.bands, self.model.in_chans)
        return self


Complete = TypeVar("Complete", bound=RunConfig)

CHOSEN = ("data.batch_size", "optim.accumulate")
"""Keys that, where they are `auto`, are chosen for the network and the device: `fcmae.training.batch`."""


class Recipe(RunConfig, Generic[Complete]):
    """What users give a story: a configuration in which `auto` is what `data.stats` or `init_from` says."""

    complete: ClassVar[type[RunConfig]] = RunConfig
    """What it becomes."""
    open_sections: ClassVar[tuple[str, ...]] = ("data",)
    """Where `auto` means that."""

    @property
    def automatic(self) -> list[str]:
        """The dotted keys that are `auto`."""
        sections = ((name, getattr(self, name)) for name in self.open_sections)
        keys = [f"{name}.{key}" for name, section in sections for key, value in section if value == AUTO]
        return [key for key in keys if key not in CHOSEN]

    def resolve(self, known: Mapping[str, Any], source: str) -> Complete:
        """Return the configuration with the values of `known`, by dotted key, in place of `auto`.

        What is not known takes its default; so do those of `CHOSEN`, until the network is there to choose by.

        Raises:
            UserError: naming `source`, if they do not fit the rest, or nothing says what network it is.
        """
        values = self.model_dump(mode="json")
        for dotted in [*self.automatic, *CHOSEN]:
            section, key = dotted.split(".")
            if values[section][key] == AUTO:
                del values[section][key]
                if dotted in known:
                    values[section][key] = known[dotted]
        if "variant" not in values["model"]:
            raise UserError(
                "model.variant=auto: takes the network of init_from, which is null; "
                "set model.variant, such as model.variant=atto"
            )
        return cast(Complete, parse_config(self.complete, values, source))


class PretrainDataRecipe(PretrainDataSection):
    """As `PretrainDataSection`, in which statistics and the size of batches may be `auto`."""

    batch_size: Batch | Auto = DataSection.model_fields["batch_size"].default  # pyright: ignore[reportIncompatibleVariableOverride]
    mean: Channels | Auto = DataSection.model_fields["mean"].default  # pyright: ignore[reportIncompatibleVariableOverride]
    std: Deviations | Auto = DataSection.model_fields["std"].default  # pyright: ignore[reportIncompatibleVariableOverride]
    clip: tuple[Limits, Limits] | Auto | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class PretrainOptimRecipe(PretrainOptimSection):
    """As `PretrainOptimSection`, in which `auto` follows from the size of batches."""

    accumulate: Batch | Auto = 1  # pyright: ignore[reportIncompatibleVariableOverride]


class PretrainRecipe(PretrainConfig, Recipe[PretrainConfig]):
    """What users give `pretrain.py`: a `PretrainConfig` in which statistics and batches may be `auto`."""

    complete: ClassVar[type[RunConfig]] = PretrainConfig
    data: PretrainDataRecipe  # pyright: ignore[reportIncompatibleVariableOverride]
    optim: PretrainOptimRecipe = PretrainOptimRecipe()  # pyright: ignore[reportIncompatibleVariableOverride]


class EncoderRecipe(EncoderSection):
    """As `EncoderSection`; `auto` is what `init_from` has."""

    variant: Variant = AUTO
    version: Literal[1, 2] | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    grn: GRNSection | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    in_chans: Channel | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    stem_stride: Literal[1, 2, 4] | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]


class DataRecipe(DataSection):
    """As `DataSection`; `auto` is what `data.stats` says, or else what `init_from` was trained on, or what fits."""

    batch_size: Batch | Auto = DataSection.model_fields["batch_size"].default  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: Side | Sizes | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    mean: Channels | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    std: Deviations | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    clip: tuple[Limits, Limits] | Auto | None = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    nodata: FiniteFloat | Literal["nan"] | Auto | None = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    window: bool | Auto = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]


class ClassifierRecipe(EncoderRecipe, ClassifierSection):
    """As `ClassifierSection`, open in what `EncoderRecipe` is."""


class SegmenterRecipe(EncoderRecipe, SegmenterSection):
    """As `SegmenterSection`, open in what `EncoderRecipe` is."""


class ImageDataRecipe(DataRecipe, ImageDataSection):
    """As `ImageDataSection`, open in what `DataRecipe` is."""


class MaskDataRecipe(DataRecipe, MaskDataSection):
    """As `MaskDataSection`, open in what `DataRecipe` is."""


class FinetuneOptimRecipe(FinetuneOptimSection):
    """As `FinetuneOptimSection`, in which `auto` follows from the size of batches."""

    accumulate: Batch | Auto = 1  # pyright: ignore[reportIncompatibleVariableOverride]


class FinetuneRecipe(FinetuneConfig, Recipe[FinetuneConfig]):
    """What users give `finetune.py`: a `FinetuneConfig` in which `auto` (or nothing) is what `init_from` has."""

    complete: ClassVar[type[RunConfig]] = FinetuneConfig
    open_sections: ClassVar[tuple[str, ...]] = ("model", "data")


class ImageRecipe(ImageConfig, FinetuneRecipe):
    """What users give `finetune.py` for whole images."""

    model: ClassifierRecipe = ClassifierRecipe()  # pyright: ignore[reportIncompatibleVariableOverride]
    data: ImageDataRecipe  # pyright: ignore[reportIncompatibleVariableOverride]
    optim: FinetuneOptimRecipe = FinetuneOptimRecipe()  # pyright: ignore[reportIncompatibleVariableOverride]


class SegmentationRecipe(SegmentationConfig, FinetuneRecipe):
    """What users give `finetune.py` for a class for each pixel."""

    model: SegmenterRecipe = SegmenterRecipe()  # pyright: ignore[reportIncompatibleVariableOverride]
    data: MaskDataRecipe  # pyright: ignore[reportIncompatibleVariableOverride]
    optim: FinetuneOptimRecipe = FinetuneOptimRecipe()  # pyright: ignore[reportIncompatibleVariableOverride]


class EvaluateConfig(Section):
    """Everything `fcmae evaluate` needs to know beside the encoder."""

    data: DataSection
    """The labelled images."""
    eval: ProbeSection = ProbeSection()
    """What is taken of them."""


Config = TypeVar("Config", bound=Section)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for attribute, field in section.model_fields.items():
        name, inner = field.alias or attribute, field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")
            yield f"{prefix}{name}"
        else:
            yield prefix + name


ELSEWHERE = {"lr": "optim.base_lr", "blr": "optim.base_lr", "learning_rate": "optim.base_lr"}
"""What other projects call our keys."""


def _suggest(key: str, known: Sequence[str]) -> str:
    """The known dotted key most like `key`, as a question; empty when nothing is near."""
    meant = ELSEWHERE.get(key.rsplit(".", 1)[-1])
    if meant in known:
        return f": did you mean '{meant}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)]
    return f": did you mean '{near[0]}'?" if near else f": known are {', '.join(k for k in known if '.' not in k)}"


NULLS = ("null", "Null", "NULL", "~")


def override(values: dict[str, Any], assignment: str) -> str:
    """Put `key=value` into the nested `values`; returns the dotted key.

    Raises:
        UserError: if there is no key or no value, or it is not valid YAML.
    """
    key, equals, text = assignment.partition("=")
    argument = f"argument {shown(assignment)}"
    if not equals or not key:
        raise UserError(f"{argument}: expected key=value, such as optim.base_lr=3e-4")
    *sections, leaf = key.split(".")
    if len(sections) >= MOST_DEEP:
        raise UserError(f"{argument}: unknown key")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"{argument}: {shown(section)} is a value, not a section")
    with blame(argument):
        target[leaf] = read_yaml(text)
    if target[leaf] is None and text.strip() not in NULLS:  # as of KEY=$VARIABLE that is not set
        raise UserError(f"{argument}: has no value; {named(key)}=null for none")
    return key


def _known_key(location: Sequence[int | str], known: Sequence[str]) -> str:
    """The longest dotted prefix of pydantic's location that is a key: it may go on into list items and unions."""
    parts = [str(part) for part in location]
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in known), ".".join(parts))


def _describe(error: ValidationError, kind: type[Section], source: str, overridden: Sequence[str]) -> str:
    known = list(_keys(kind))
    errors = error.errors(include_url=False)
    first = errors[0]
    key = _known_key(first["loc"], known)
    if first["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in first["loc"])
    place = f"argument {named(key)}" if key in overridden else f"{source}: {named(key)}" if key else source
    if first["type"] == "extra_forbidden":
        elsewhere = kind.place_of(key)
        return f"{place}: {elsewhere}" if elsewhere else f"{place}: unknown key{_suggest(key, known)}"
    if first["type"] == "missing":
        return f"{place}: missing; add it to the file or give {named(key)}=VALUE"
    if first["type"] == "value_error":
        return f"{place}: {named(first['msg'].removeprefix('Value error, '))}"
    # every way in which the value fits no branch of a union
    messages = dict.fromkeys(e["msg"].lower() for e in errors if _known_key(e["loc"], known) == key)
    return f"{place}: {', or '.join(messages)}, got {shown(first['input'])}"


def parse_config(
    kind: type[Config], values: Mapping[str, Any], source: str, overridden: Sequence[str] = ()
) -> Config:
    """Validate nested `values` as a configuration of `kind`.

    Raises:
        UserError: if a key is unknown (with a suggestion), missing or of a wrong value; `source` is named.
    """
    kind = kind.kind_of(values)
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_describe(error, kind, source, overridden)) from error


def override_config(kind: type[Config], values: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
    """Put `key=value` overrides over nested `values` and validate them as a configuration of `kind`.

    Raises:
        UserError: as `parse_config`.
    """
    values = copy.deepcopy(dict(values))
    overridden = [override(values, assignment) for assignment in overrides]
    return parse_config(kind, values, source, overridden)


LAUNCHES = "accelerate"
"""Folder beside the configurations of runs that has accelerate's own, for --config_file."""


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name, such as quickstart and pretrain/atto."""
    folder = _shipped()
    found = sorted(path for path in folder.rglob("*.yaml") if path.parent.name != LAUNCHES)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def reference_logs() -> dict[str, Path]:
    """Return the metrics.jsonl of runs of shipped configurations, as measured, by the configuration's name."""
    folder = _shipped() / "reference"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.jsonl"))}


def _shipped() -> Path:
    inside = Path(__file__).parent / "configs"  # where a wheel has them; in a clone they lie beside the package
    return inside if inside.is_dir() else inside.parent.parent / "configs"


COMMANDS = {"finetune": "finetune", "roadmap": "finetune", "ablations": "ablate"}
"""Commands by the folder of their configurations; others are of `pretrain`."""


def command_of(name: str) -> str:
    """Return the command that a shipped configuration is for, by its name."""
    return COMMANDS.get(name.partition("/")[0], "pretrain")


def find_shipped(name: str, command: str | None = None) -> Path:
    """Return a shipped configuration by its name, in which "COMMAND/" may be left out.

    Raises:
        UserError: if there is none, with names like it.
    """
    shipped = shipped_configs()
    fitting = [other for other in shipped if command in (None, command_of(other))]
    option = {None: "", "ablate": "GRID "}.get(command, "--config ")
    for other in fitting:
        if name in (other, other.rpartition("/")[2]) and (command or name == other):
            return shipped[other]
    if name in shipped:
        raise UserError(f"{option}{named(name)}: is not for fcmae {command}, but for fcmae {command_of(name)}")
    words = {word for other in fitting for word in (other, other.rpartition("/")[2])}
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    near = difflib.get_close_matches(wanted, sorted(words), n=3, cutoff=0.6)
    meant = dict.fromkeys(other for word in near for other in fitting if word in (other, other.rpartition("/")[2]))
    question = f": did you mean {' or '.join(meant)}?" if meant else ";"
    raise UserError(
        f"{option}{named(name)}: no file, nor a shipped configuration{question} 'fcmae configs' lists them"
    )


def find_config(kind: type[Section], name: str | Path) -> Path:
    """Return the file that `--config NAME` means: the file of that path, else a shipped one for this kind of run.

    Raises:
        UserError: if there is neither.
    """
    if os.path.isfile(name):  # a device or a pipe might never end
        return Path(name)
    if os.path.exists(name) and not os.path.isdir(name):
        raise UserError(f"--config {named(str(name))}: is no file of text, but a device, pipe or socket")
    return find_shipped(str(name), kind.command)


def load_config(kind: type[Config], name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a shipped one by its name, and `key=value` overrides, which win.

    Raises:
        UserError: if the file cannot be read, or as `parse_config`.
    """
    path = find_config(kind, name)
    source = named(str(path))
    try:
        with path.open("rb") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise UserError(f"--config {source}: {error.strerror}; 'fcmae configs' lists the shipped ones") from error
    with blame(f"--config {source}"):
        values = read_yaml(text) or {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections of 'key: value' lines, found a {type(values).__name__}")
    return override_config(kind, values, overrides, source)


def to_yaml(config: Section) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))
