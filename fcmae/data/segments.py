"""Views of an image and its mask together, samples and batches of them; knows no networks.

Both are cut, resized, flipped and padded alike: pixels by the filter of all views, classes by their nearest pixel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcmae.data.batches import NOT_COUNTED, BadImage, Batch, Sample, load_or_substitute, load_spread
from fcmae.data.deep import Box
from fcmae.data.masks import Pair, SegmentationSource
from fcmae.data.pixels import FULL
from fcmae.data.sampling import PADDING, Key
from fcmae.data.sources import Source
from fcmae.data.views import Part, cover, covering_size, resample
from fcmae.ops.resize_crops import rounded
from fcmae.seeding import seeded

TRIES = 10
"""Crops drawn, at most, for one in which no class has too large a share (mmsegmentation's)."""

JITTER = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
"""Of SSD, which UPerNet's recipes take over."""


def resize_classes(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize classes (h, w) to `size` (height, width), each pixel's that of the nearest.

    "nearest-exact" has its pixels' centres where the filters of images have theirs; "nearest", which torchvision
    takes for masks, is half a pixel off.
    """
    return F.interpolate(classes[None, None].float(), size, mode="nearest-exact")[0, 0].to(classes.dtype)


def padded(pixels: Tensor, size: tuple[int, int], corner: tuple[int, int], fill: Tensor) -> Tensor:
    """Return `fill` (c, 1, 1) of `size` (height, width) with pixels (c, h, w) from `corner` (top, left) on."""
    canvas = fill.expand(-1, *size).clone()
    canvas[:, corner[0] : corner[0] + pixels.shape[1], corner[1] : corner[1] + pixels.shape[2]] = pixels
    return canvas


def _corner(around: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Draw the upper left corner of a box of `sides` in one of sides `around`."""
    top, left = (int(torch.randint(most - side + 1, ())) for most, side in zip(around, sides, strict=True))
    return top, left


class SegmentationView:
    """The augmentation of UPerNet's recipes: random resize, crop, flip, jitter of colours, padding.

    Args:
        size: height and width of the view.
        mean: of the pixels per channel, in full ranges: the colour of what is padded, zero once normalised.
        scale: factor on the image's size, least and most, drawn uniformly.
        short_side: pixels of the image's shorter side at a factor of 1; None for those that it has.
        most_of_one: share of a crop's classified pixels that one class may have, else another is drawn, up to
            `TRIES` times; 1 takes the first.
        hflip: probability of the flip.
        jitter: probability with which brightness, contrast, saturation and hue change, each for itself; for RGB
            of 8 bits alone.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        most_of_one: float = 0.75,
        hflip: float = 0.5,
        jitter: float = 0.0,
    ) -> None:
        self.size = size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.scale, self.short_side, self.most_of_one = scale, short_side, most_of_one
        steps: list[v2.Transform] = [v2.RandomHorizontalFlip(hflip)]
        if jitter:
            steps += [v2.RandomApply([v2.ColorJitter(**{what: span})], jitter) for what, span in JITTER.items()]
        self.steps = v2.Compose(steps)

    def part(self, height: int, width: int, read: Callable[[Box], Tensor]) -> Part:
        """Draw the part of an image of `height` x `width` pixels, and the size that it is then resized to.

        That is `enough`: at most `size`, and less where the resized image is smaller.
        """
        base = self.short_side / min(height, width) if self.short_side else 1.0
        factor = base * float(torch.empty(()).uniform_(*self.scale))
        full = max(1, round(height * factor)), max(1, round(width * factor))
        enough = min(self.size[0], full[0]), min(self.size[1], full[1])
        # the crop's sides in the image's own pixels
        sides = min(height, max(1, round(enough[0] / factor))), min(width, max(1, round(enough[1] / factor)))
        for _ in range(TRIES):
            part = Part(*_corner((height, width), sides), *sides, enough)
            if self.most_of_one >= 1:
                break
            classes = read(part[:4])
            pixels = torch.bincount(classes[classes >= 0].int())
            if len(pixels) and pixels.max() < self.most_of_one * pixels.sum():
                break
        return part

    def finish(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Turn a part into the view: pixels (c, *size) and classes int16 (*size)."""
        pixels, classes = resample(pair.pixels, pair.part.enough), resize_classes(pair.classes, pair.part.enough)
        image, mask = self.steps(tv_tensors.Image(pixels), tv_tensors.Mask(classes))
        pixels, classes = image.as_subclass(Tensor), mask.as_subclass(Tensor)
        if pair.part.enough == self.size:
            return pixels, classes
        fill = rounded(self.mean * FULL[pixels.dtype], pixels.dtype)
        nothing = torch.full((1, 1, 1), NOT_COUNTED, dtype=classes.dtype)
        corner = _corner(self.size, pair.part.enough)
        return padded(pixels, self.size, corner, fill), padded(classes[None], self.size, corner, nothing)[0]


# Samples and batches


@dataclass(frozen=True)
class SegmentationSample(Sample):
    """An image and its classes."""

    labels: Tensor
    """int16 (h, w)."""


@dataclass(frozen=True)
class SegmentationBatch(Batch):
    """What a step of training for segmentation sees, or an evaluation, whose images may differ in size."""

    labels: Tensor
    """int16 (b, h, w); `NOT_COUNTED` where nothing is to be predicted."""
    extents: Tensor
    """int32 (b, 2): height and width of each image, which lies in the upper left corner; 0 where there is none."""

    @classmethod
    def collate(cls, samples: Sequence[SegmentationSample]) -> Self:
        extents = torch.tensor([sample.image.shape[1:] for sample in samples], dtype=torch.int32)
        height, width = extents.amax(0).tolist()
        first = samples[0].image
        images = torch.zeros(len(samples), first.shape[0], height, width, dtype=first.dtype)
        labels = torch.full((len(samples), height, width), NOT_COUNTED, dtype=torch.int16)
        for image, label, sample in zip(images, labels, samples, strict=True):
            h, w = sample.labels.shape
            image[:, :h, :w], label[:h, :w] = sample.image, sample.labels
        return cls(
            images=images,
            indices=tuple(sample.index for sample in samples),
            bad=tuple(bad for sample in samples for bad in sample.bad),
            labels=labels,
            extents=extents,
        )


class SegmentationDataset(Dataset[Any]):
    """Samples by (epoch, index); their augmentation depends on (seed, epoch, index) alone."""

    collate = staticmethod(SegmentationBatch.collate)

    def __init__(self, source: SegmentationSource, *, view: SegmentationView, seed: int) -> None:
        self.source, self.view, self.seed = source, view, seed

    @property
    def images(self) -> Source:
        return self.source.images

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sample_bytes(self) -> int:
        """Of a sample's tensors."""
        return math.prod(self.view.size) * (self.source.channels * self.source.dtype.itemsize + 2) + 8

    def __getitem__(self, key: Key) -> SegmentationSample:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            pair, index, bad = load_or_substitute(
                self.source, index, lambda i: self.source.load_part(i, self.view.part)
            )
            pixels, classes = self.view.finish(pair)
            return SegmentationSample(pixels, index, bad, classes)


class SegmentationEvaluation(Dataset[Any]):
    """Whole images by index, for counting, in their own size; `PADDING` and what does not decode are empty."""

    collate = staticmethod(SegmentationBatch.collate)

    def __init__(self, source: SegmentationSource) -> None:
        self.source, self.class_names = source, source.class_names

    @property
    def images(self) -> Source:
        return self.source.images

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sample_bytes(self) -> int:
        """Of a sample's tensors, as far as the first image tells."""
        height, width = self.source.load(0).classes.shape
        return height * width * (self.source.channels * self.source.dtype.itemsize + 2) + 8

    def __getitem__(self, index: int) -> SegmentationSample:
        bad: tuple[BadImage, ...] = ()
        if index != PADDING:
            try:
                pair = self.source.load(index)
            except Exception as error:  # a broken file can make a decoder raise anything
                bad = (BadImage.of(index, self.source, error),)
            else:
                return SegmentationSample(pair.pixels, index, bad, pair.classes)
        nothing = torch.empty(self.source.channels, 0, 0, dtype=self.source.dtype)
        return SegmentationSample(nothing, index, bad, torch.empty(0, 0, dtype=torch.int16))


def cover_pair(pair: Pair, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image and its classes so that they cover `size` (height, width), and crop the centre of both."""
    around = covering_size((pair.classes.shape[0], pair.classes.shape[1]), size)
    classes = resize_classes(pair.classes, around)
    return cover(pair.pixels, size), v2.functional.center_crop(classes[None], list(size))[0]


def fixed_pairs(source: SegmentationSource, number: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return `number` readable images spread evenly over the source, and their classes, always the same.

    Returns:
        Pixels (n, c, *size) and int16 (n, *size); n is 0 where none can be read.
    """
    found = load_spread(source, number, lambda pair: cover_pair(pair, size))
    if not found:
        return torch.empty(0, source.channels, *size), torch.empty(0, *size, dtype=torch.int16)
    return torch.stack([pixels for pixels, _ in found]), torch.stack([classes for _, classes in found])
