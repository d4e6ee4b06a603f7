"""Networks to look into and their images, ours and timm's alike; knows neither statistics nor a command line."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from fcmae.data.arrays import IMAGES
from fcmae.data.batches import NOT_COUNTED, EvaluationDataset, load_batches, spread
from fcmae.data.pixels import Reading
from fcmae.data.sampling import one_pass
from fcmae.data.shards import INDEX, PLAN
from fcmae.data.sources import Subset, open_source
from fcmae.data.views import PixelNormalizer, cover
from fcmae.encoder.convnext import ConvNeXt, resolve_response
from fcmae.encoder.responses import OWN_PARTS
from fcmae.errors import UserError, blame, brief
from fcmae.evaluation.inference import as_deep, kind_for
from fcmae.heads.segmentation import Segmenter
from fcmae.load import load_weights
from fcmae.masking import count_visible, sample_visible_ids
from fcmae.patches import grid_shape
from fcmae.seeding import seeded
from fcmae.tensors import load_strictly
from fcmae.weights.base import (
    PIXELS,
    Preprocessing,
    Weights,
    build_encoder,
    describe_encoder,
    description,
    report_damage,
)
from fcmae.weights.read import find_weights, read_tensors

TIMM = re.compile("timm[:/]")
"""What timm's networks begin with."""


class Subject(NamedTuple):
    """A network, and how images are prepared for it."""

    network: nn.Module
    encode: Callable[[Tensor], object]
    """Runs the network on normalised images (b, c, h, w); raises ValueError if their size does not fit."""
    description: str
    preprocessing: Preprocessing
    """Completed."""
    in_chans: int


def _timm_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a classifier of another number of classes than the network's: only features are looked at."""
    own = network.state_dict()
    prefix = f"{network.default_cfg.get('classifier', '')}."  # pyright: ignore
    other = any(n.startswith(prefix) and n in own and own[n].shape != t.shape for n, t in tensors.items())
    kept = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    if other or len(kept) == len(tensors):
        return kept | {n: t for n, t in own.items() if n.startswith(prefix)}
    return tensors


def _numbers(values: object) -> Iterator[int]:
    """Yield the integers in what JSON holds."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers(value)
    elif isinstance(values, int):
        yield values


def _require_arguments(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Check that timm's arguments in a folder ask for no more blocks or channels than its tensors can be of.

    Raises:
        UserError: if they do, before anything is built.
    """
    most = max(len(tensors), *(max(tensor.shape, default=1) for tensor in tensors.values()), 0)
    with description(folder) as config:
        if wrong := next((number for number in _numbers(config.get("model_args")) if abs(number) > most), None):
            raise ValueError(f"its model_args hold {wrong}, more than its weights have of anything")


def open_timm(source: str) -> Subject:
    """Build timm's network NAME, untrained, NAME@FILE with the weights of a file, or that of a folder.

    Nothing is downloaded.

    Raises:
        UserError: if timm knows no such network, or the file or folder does not fit.
    """
    name, _, file = TIMM.sub("", source, count=1).partition("@")
    folder = Path(name) if Path(name).is_dir() else None
    path = find_weights(folder or Path(file)) if folder or file else None
    tensors = read_tensors(path) if path else {}
    if folder:
        _require_arguments(folder, tensors)
    try:
        with seeded(0):
            network: Any = timm.create_model(f"local-dir:{name}" if folder else name)
    except Exception as error:  # whatever timm raises for an unknown name, or a folder that is not its own
        raise UserError(
            f"{source}: timm cannot build it ({brief(error)}); give timm:NAME of timm.list_models(), "
            "timm:NAME@FILE or timm:FOLDER with config.json and model.safetensors"
        ) from error
    shown = f"timm's {network.default_cfg.get('architecture') or name}, untrained"
    if folder:
        shown = f"timm's {network.default_cfg.get('architecture')}"
    elif file:
        shown = f"timm's {name} with {path}"
    if path:
        load_strictly(network, _timm_tensors(network, tensors), path)

    def encode(images: Tensor) -> object:
        try:
            return network.forward_features(images)
        except (AssertionError, RuntimeError) as error:  # whatever timm and torch raise for sizes
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(brief(error)) from error

    with report_damage(path or Path(source)):
        known = resolve_model_data_config(network)
        channels, *size = known["input_size"]
        known |= {"image_size": size, "value_range": (0.0, 1.0)}
        if folder:
            with description(folder) as config:
                known |= config.get(PIXELS, {})
        preprocessing = Preprocessing.of(known)
    return Subject(network, encode, shown, preprocessing, channels)


def _describe(network: nn.Module, weights: Weights) -> str:
    if not isinstance(network, ConvNeXt):
        return str(weights.network.get("variant"))
    name = f"ConvNeXt V{network.version} {describe_encoder(weights.tensors)}"
    parts = [network.response, *(f"{key} {value}" for key, value in network.grn.items())]
    own = resolve_response(network.version, "auto") == network.response and network.grn in ({}, OWN_PARTS)
    return name if own else f"{name} with {', '.join(parts)} at GRN's place"


def open_subject(source: str, size: tuple[int, int] | None = None) -> Subject:
    """Return the network of a run or a file of weights of any format, or with "timm:" before it one of timm's.

    Of a segmenter that is the encoder.

    Args:
        size: of the images, in place of the network's own.

    Raises:
        UserError: if there is none.
    """
    if TIMM.match(source) and not Path(source).exists():
        subject = open_timm(source)
        return subject._replace(preprocessing=subject.preprocessing._replace(image_size=size)) if size else subject
    weights = load_weights(source)
    network = build_encoder(weights, num_classes=0 if weights.head else None)
    preprocessing = weights.preprocessing
    if weights.head:
        preprocessing = preprocessing._replace(class_names=None)
    if size:
        preprocessing = preprocessing._replace(image_size=size)
    with blame(str(weights.path)):
        preprocessing = preprocessing.completed(network)
    if isinstance(network, Segmenter):
        network = network.encoder
    return Subject(
        network,
        getattr(network, "features", network),  # with no work for a classifier where that can be left out
        f"{_describe(network, weights)}, {weights.description}",
        preprocessing,
        network.in_chans,
    )


class Images(NamedTuple):
    """The images of a folder for one network."""

    dataset: EvaluationDataset
    normalize: PixelNormalizer
    device: torch.device

    def first(self) -> Tensor:
        """Return the first image that decodes, normalised, (1, c, h, w).

        Raises:
            UserError: if none does.
        """
        for index in range(len(self.dataset)):
            sample = self.dataset[index]
            if sample.label != NOT_COUNTED:
                return self.normalize(sample.image[None].to(self.device))
        first = self.dataset[0].bad[0]
        raise UserError(f"{first.name}: does not decode ({first.reason}), nor do the other {len(self.dataset) - 1}")

    def batches(self, batch_size: int, num_workers: int) -> Iterator[Tensor]:
        """Yield all that decode, normalised, (b, c, h, w)."""
        keys = one_pass(len(self.dataset), batch_size=min(batch_size, len(self.dataset)))
        loaded = load_batches(self.dataset, keys, num_workers=num_workers, pin_memory=self.device.type == "cuda")
        with seeded(0):
            for batch in loaded:
                decoded = batch.images[batch.labels != NOT_COUNTED]
                if len(decoded):
                    yield self.normalize(decoded.to(self.device))


def open_images(root: str, split: str | None, number: int, subject: Subject, device: torch.device) -> Images:
    """Open `number` images, evenly chosen, of a folder, a .tar or what `fcmae prepare` wrote, for a network.

    Args:
        root: the folder.
        split: a folder of that name in it; None for all images, and of arrays for the training images.
        number: of images, at most.
        subject: whose preprocessing they get.
        device: on which they end.

    Raises:
        UserError: if there are none.
    """
    known = subject.preprocessing
    reading = Reading.of(known)
    arrays = any(next(Path(root).glob(f"{up}{name}"), None) for name in (IMAGES, INDEX, PLAN) for up in ("", "*/"))
    source = open_source(
        "arrays" if arrays else "folder",
        root,
        split or ("train" if arrays else "."),
        subject.in_chans,
        reading=as_deep(reading),
        key="--data",
        remedy="name one that is there with --split NAME",
    )
    with blame(f"--data {root}"):
        kind_for(reading, source.dtype)
    chosen = np.array(spread(len(source), min(number, len(source))))
    dataset = EvaluationDataset(
        Subset(source, chosen),
        np.zeros(len(chosen), np.int64),
        class_names=(),
        view=functools.partial(
            cover, size=known.image_size, crop_pct=known.crop_pct, interpolation=known.interpolation
        ),
        shape=(subject.in_chans, *known.image_size),
    )
    return Images(dataset, PixelNormalizer(known.mean, known.std, known.clip).to(device), device)


def mask_images(subject: Subject, mask_ratio: float) -> Callable[[Tensor], object]:
    """Return a function that runs the network on some patches of each image, in a pass always the same ones.

    Raises:
        UserError: if the network is not our ConvNeXt.
        ValueError: if the ratio or the images' size does not fit.
    """
    network = subject.network
    if not isinstance(network, ConvNeXt):
        raise UserError(f"--masked: {subject.description} cannot leave out patches; only our own ConvNeXt can")
    grid = grid_shape(subject.preprocessing.image_size, network.patch_size)
    num_patches = grid[0] * grid[1]
    count_visible(num_patches, mask_ratio)
    generator = torch.Generator().manual_seed(0)

    def encode(images: Tensor) -> object:
        ids = sample_visible_ids(len(images), num_patches, mask_ratio, generator)
        return network.features(images, ids.to(images.device))

    return encode
