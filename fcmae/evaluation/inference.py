"""One's own image files through a trained network: classes and reconstructions; knows no command line."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from fcmae.config import PretrainConfig
from fcmae.data.sources import PIL_MODES, decode
from fcmae.data.views import PixelNormalizer, cover
from fcmae.encoder.convnext import ConvNeXtV2
from fcmae.errors import UserError
from fcmae.model import FCMAE
from fcmae.visualize import draw_mask_ratios
from fcmae.weights.base import Preprocessing

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
            except UnidentifiedImageError:
                yield Unreadable(file, "not an image, or damaged")
            except Exception as error:  # a broken file can make a decoder raise anything
                yield Unreadable(file, " ".join(str(error).split()) or type(error).__name__)


# Classes


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
    device = next(network.parameters()).device
    normalize = PixelNormalizer(preprocessing.mean, preprocessing.std).to(device)
    names = class_names or tuple(str(i) for i in range(network.num_classes))

    def classify_batch(batch: list[Picture]) -> Iterator[Prediction]:
        pixels = torch.stack([image.pixels for image in batch])
        likeliest = network(normalize(pixels.to(device))).softmax(1).topk(min(top, network.num_classes))
        for image, ps, ids in zip(batch, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            yield Prediction(image.path, tuple(Guess(names[int(i)], i, p) for i, p in zip(ids, ps, strict=True)))

    batch: list[Picture] = []
    for image in images:
        if isinstance(image, Unreadable):
            yield image
            continue
        pixels = cover(image.pixels, preprocessing.image_size, preprocessing.crop_pct)
        batch.append(Picture(image.path, pixels))
        if len(batch) == BATCH:
            yield from classify_batch(batch)
            batch = []
    if batch:
        yield from classify_batch(batch)


# Reconstructions


def fit_to_patches(height: int, width: int, *, patch: int, area: int) -> tuple[int, int]:
    """Return the size of about `area` pixels, in whole patches, whose shape is most like (height, width)."""
    scale = math.sqrt(area / (height * width)) / patch
    grid = max(1, round(height * scale)), max(1, round(width * scale))
    return grid[0] * patch, max(grid[1], 2 if grid[0] == 1 else 1) * patch  # of one patch nothing could be hidden


class Reconstruction(NamedTuple):
    """Panels of an image, a row for each mask ratio."""

    path: Path
    picture: np.ndarray
    """uint8 (h, w, 3), see `draw_mask_ratios`."""
    before: tuple[int, int]
    """Height and width of the file's image."""
    after: tuple[int, int]
    """To which it was resized."""


def reconstruct_images(
    model: FCMAE,
    images: Iterable[Picture | Unreadable],
    *,
    config: PretrainConfig,
    mask_ratios: Sequence[float],
) -> Iterator[Reconstruction | Unreadable]:
    """Yield panels of each image in turn, and what could not be read.

    Images are resized to about as many pixels as the model was trained on, keeping their shape as far as whole
    patches allow; nothing is padded or cut off.

    Raises:
        ValueError: if a mask ratio is not inside (0, 1).
    """
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(model.decoder.mask_token.device)
    for image in images:
        if isinstance(image, Unreadable):
            yield image
            continue
        before = image.pixels.shape[1], image.pixels.shape[2]
        after = fit_to_patches(*before, patch=model.patch_size, area=math.prod(config.data.size))
        pixels = v2.functional.resize(
            image.pixels, list(after), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        yield Reconstruction(image.path, draw_mask_ratios(model, normalize, pixels, mask_ratios), before, after)
