"""Inference on image files: classes, numbers, masks, reconstructions; knows no command line or files of weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.config import PretrainConfig
from fcmae.data.images import extensions, open_pixels
from fcmae.data.listing import images_below
from fcmae.data.pixels import AS_STORED, FULL, Reading, as_kind, holds, kind_name
from fcmae.data.views import PixelNormalizer, cover, resample, whole
from fcmae.encoder.base import Network
from fcmae.errors import brief
from fcmae.files import BoundedFile
from fcmae.heads.windows import Strip, Windows, pixel_logits
from fcmae.model import FCMAE
from fcmae.visualize import draw_mask_ratios
from fcmae.weights.base import Preprocessing

BATCH = 32
"""Images that are computed at once."""


class Unreadable(NamedTuple):
    """A file that is no image, or none that can be read."""

    path: Path
    reason: str


class Picture(NamedTuple):
    """An image file's content."""

    path: Path
    pixels: Tensor
    """(c, h, w)."""


class LikelyClass(NamedTuple):
    """A class of an image, with its probability: softmax of one class for each image, sigmoid of any number."""

    name: str
    index: int
    probability: float


def best_device() -> torch.device:
    """Return the accelerator (CUDA, MPS and so on) where there is one that works, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def image_files(path: Path) -> list[Path]:
    """Return the image files in a folder at any depth, sorted; of a file, itself."""
    return sorted(map(Path, images_below(str(path), extensions()))) if path.is_dir() else [path]


def kind_for(trained: Reading, found: torch.dtype) -> torch.dtype:
    """Return the kind as which a network sees pixels: that of its training, or deeper whole numbers as they are.

    Args:
        trained: how the images were read that it was trained on; without a kind, as those of 8 bits.
        found: the kind of the pixels now.

    Raises:
        ValueError: for floats where it was trained on whole numbers.
    """
    kind = trained.kind(torch.uint8)
    if holds(kind, found):
        return kind
    if found == torch.float32:
        raise ValueError(
            f"float32 pixels for a network trained on {kind_name(kind)}, of which {FULL[kind]:.0f} is the most; "
            "save them as uint8 or uint16"
        )
    return found


def as_deep(trained: Reading) -> Reading:
    """Return how a source is read for a network, so that whole numbers deeper than 8 bits keep their depth."""
    return trained._replace(dtype=None) if trained.dtype == torch.uint8 else trained


def read_images(
    paths: Iterable[str | Path], channels: int, reading: Reading = AS_STORED
) -> Iterator[Picture | Unreadable]:
    """Read image files, and those in folders at any depth, as a person sees them (turned as EXIF says).

    Args:
        paths: of files and folders.
        channels: that the network wants.
        reading: as the images were read that it was trained on, see `kind_for`.
    """
    for path in map(Path, paths):
        files = image_files(path)
        if not files:
            yield Unreadable(path, "no images in this folder")
        for file in files:
            try:
                with BoundedFile(file) as opened:
                    found, read = open_pixels(opened, reading)
                    kind = kind_for(reading, found)
                    pixels = np.array(read(whole, channels), order="C")
                yield Picture(file, as_kind(torch.from_numpy(pixels), kind).permute(2, 0, 1))
            except FileNotFoundError:
                yield Unreadable(file, "no such file")
            except Exception as error:  # a broken file can make a decoder raise anything
                yield Unreadable(file, brief(error))


def require_finite(outputs: Tensor) -> None:
    """Check what a network computed.

    Raises:
        FloatingPointError: if it is not finite.
    """
    if not all(end.isfinite() for end in outputs.aminmax()):  # without copies of what may be large
        raise FloatingPointError("finite weights that compute what is not; they are damaged, get them again")


# Outputs, and what they say


@torch.inference_mode()
def compute_outputs(
    network: Network, images: Iterable[Picture], *, preprocessing: Preprocessing
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image's path and what the network gives for it, (outputs,), in turn.

    Args:
        network: in evaluation mode, on any device.
        images: from `read_images`.
        preprocessing: that the network was trained for, `completed`.

    Raises:
        FloatingPointError: if they are not finite.
    """
    device = next(network.parameters()).device
    normalize = PixelNormalizer(preprocessing.mean, preprocessing.std, preprocessing.clip).to(device)
    use = preprocessing.image_size, preprocessing.crop_pct, preprocessing.interpolation
    views = (image._replace(pixels=cover(image.pixels, *use)) for image in images)
    while batch := list(islice(views, BATCH)):
        normalised = torch.stack([normalize(view.pixels.to(device)) for view in batch])
        outputs = network(normalised).float().cpu()
        require_finite(outputs)
        yield from zip((view.path for view in batch), outputs, strict=True)


def _likely(probabilities: Tensor, number: int, names: tuple[str, ...]) -> list[LikelyClass]:
    values, indices = probabilities.topk(number)
    return [LikelyClass(names[i], i, value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


def top_classes(logits: Tensor, names: tuple[str, ...], top: int) -> list[LikelyClass]:
    """Return the `top` classes, or all there are, of logits (classes,), the most likely first."""
    return _likely(logits.softmax(0), min(top, len(logits)), names)


def classes_above(logits: Tensor, names: tuple[str, ...], threshold: float) -> list[LikelyClass]:
    """Return the classes of logits (classes,) of a higher probability, each by itself, the most likely first."""
    probabilities = logits.sigmoid()
    return _likely(probabilities, int((probabilities > threshold).sum()), names)


# Masks


class Segmentation(NamedTuple):
    """An image, and the class of each of its pixels."""

    path: Path
    pixels: Tensor
    """(c, h, w)."""
    classes: Tensor
    """int16 (h, w)."""


def _classes_of(strip: Strip) -> Tensor:
    """Return the classes of an image's rows: int16 (rows, w), on the CPU."""
    require_finite(strip.logits)
    return strip.logits[0].argmax(0).to(torch.int16).cpu()


@torch.inference_mode()
def segment_images(
    network: Network, images: Iterable[Picture], *, preprocessing: Preprocessing
) -> Iterator[Segmentation]:
    """Yield the class of each pixel of images, in their own size, in turn; as the network was evaluated.

    Args:
        network: in evaluation mode, on any device; images of any size -> logits (b, num_classes, h, w).
        images: from `read_images`; what is not known of them, NaN, is the mean, as in training.
        preprocessing: that the network was trained for, `completed`: windows, or whole images.

    Raises:
        FloatingPointError: if logits are not finite.
    """
    device = next(network.parameters()).device
    normalize = PixelNormalizer(preprocessing.mean, preprocessing.std, preprocessing.clip).to(device)
    window, stride, short_side = preprocessing.image_size, preprocessing.stride, preprocessing.short_side
    at_once = 1 if device.type == "cpu" else 8  # a processor gains nothing by more
    windows = Windows(window, stride, at_once) if stride else None
    for path, pixels in images:
        batch = pixels[None].to(device)
        strips = pixel_logits(network, batch, windows, short_side, normalize)
        classes = torch.cat([*map(_classes_of, strips)])  # each strip for as long as that takes
        yield Segmentation(path, pixels, classes)


class ClassShare(NamedTuple):
    """A class of a mask, and its share of the pixels."""

    name: str
    index: int
    share: float


def class_shares(classes: Tensor, names: tuple[str, ...]) -> list[ClassShare]:
    """Return the classes that occur among those of pixels (h, w), int16 from 0 on, that of most pixels first."""
    counts = [some.bincount(minlength=len(names)) for some in classes.flatten().split(1 << 20)]  # as int64 each
    shares = torch.stack(counts).sum(0) / classes.numel()
    found = shares.argsort(descending=True, stable=True)[: int((shares > 0).sum())].tolist()
    return [ClassShare(names[i], i, shares[i].item()) for i in found]


# Reconstructions


def fit_to_patches(height: int, width: int, *, patch: int, area: int) -> tuple[int, int]:
    """Return the size of about `area` pixels, in whole patches, whose shape is most like (height, width)."""
    scale = math.sqrt(area / (height * width)) / patch
    grid = max(1, round(height * scale)), max(1, round(width * scale))
    return grid[0] * patch, max(grid[1], 2 if grid[0] == 1 else 1) * patch  # of one patch nothing could be masked


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
    images: Iterable[Picture],
    *,
    config: PretrainConfig,
    mask_ratios: Sequence[float],
) -> Iterator[Reconstruction]:
    """Yield panels of each image in turn.

    Images are resized to about as many pixels as the model was trained on, keeping their shape as far as whole
    patches allow; nothing is padded or cut off.

    Raises:
        ValueError: if a mask ratio is not inside (0, 1).
    """
    device = next(model.parameters()).device
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(device)
    for image in images:
        before = image.pixels.shape[1], image.pixels.shape[2]
        masked_together = model.patch_size * model.mask_group
        after = fit_to_patches(*before, patch=masked_together, area=math.prod(config.data.size))
        picture = draw_mask_ratios(
            model, normalize, resample(image.pixels, after), mask_ratios, bands=config.visualize.bands
        )
        yield Reconstruction(image.path, picture, before, after)
