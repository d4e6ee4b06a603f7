"""One's own image files through a trained network: classes, or reconstructions; knows no command line."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fcmae.checkpoint import Preprocessing
from fcmae.data.sources import PIL_MODES, decode
from fcmae.data.transforms import PixelNormalizer, cover
from fcmae.encoder.convnextv2 import ConvNeXtV2
from fcmae.errors import UserError

BATCH = 32
"""Images that are classified at once."""


class Unreadable(NamedTuple):
    """A file that is no image, or none that can be read."""

    path: Path
    reason: str


class Picture(NamedTuple):
    """An image file's content."""

    path: Path
    pixels: Tensor
    """uint8 (c, h, w)."""


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    index: int
    probability: float


class Prediction(NamedTuple):
    """The likeliest classes of an image, likeliest first."""

    path: Path
    guesses: tuple[Guess, ...]


def read_images(paths: Iterable[str | Path], channels: int) -> Iterator[Picture | Unreadable]:
    """Read image files, and those in folders at any depth, as a person sees them (turned as EXIF says).

    Raises:
        UserError: if image files cannot have so many channels.
    """
    if channels not in PIL_MODES:
        raise UserError(f"the network wants {channels} channels; image files have 1, 3 or 4")
    extensions = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in extensions and p.is_file())
            if not files:
                yield Unreadable(path, "no images in this folder")
        for file in files:
            try:
                with Image.open(file) as image:
                    yield Picture(file, decode(ImageOps.exif_transpose(image), channels))
            except FileNotFoundError:
                yield Unreadable(file, "no such file")
            except Exception as error:  # a broken file can make a decoder raise anything
                yield Unreadable(file, " ".join(str(error).split()) or type(error).__name__)


@torch.inference_mode()
def classify(
    network: ConvNeXtV2,
    images: Iterable[Picture | Unreadable],
    *,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None,
    top: int,
) -> Iterator[Prediction | Unreadable]:
    """Yield the `top` likeliest classes of each image in turn, and what could not be read.

    Args:
        network: a classifier in evaluation mode, on any device.
        images: from `read_images`.
        preprocessing: that the network was trained for.
        class_names: of its outputs; their numbers where None.
        top: classes to yield, at most all.
    """
    device = network.downsample_layers[0][0].weight.device  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    normalize = PixelNormalizer(preprocessing.mean, preprocessing.std).to(device)
    names = class_names or [str(i) for i in range(network.num_classes)]

    def classify_batch(batch: list[Picture]) -> Iterator[Prediction]:
        pixels = [cover(image.pixels, preprocessing.image_size, preprocessing.crop_pct) for image in batch]
        likeliest = network(normalize(torch.stack(pixels).to(device))).softmax(1).topk(min(top, len(names)))
        for image, values, ids in zip(batch, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            yield Prediction(image.path, tuple(Guess(names[i], i, p) for i, p in zip(ids, values, strict=True)))

    batch: list[Picture] = []
    for image in images:
        if isinstance(image, Unreadable):
            yield image
            continue
        batch.append(image)
        if len(batch) == BATCH:
            yield from classify_batch(batch)
            batch = []
    if batch:
        yield from classify_batch(batch)
