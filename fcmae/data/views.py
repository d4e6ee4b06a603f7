"""Crops, flips, augmentation and normalisation of pixels (c, h, w) of any kind, mostly of any channel count.

Pixels that are not known are NaN, of float32 alone: they take no part in what is resized, and are 0 to a network.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor, nn
from torchvision.transforms import v2

from fcmae.data.pixels import FULL
from fcmae.ops.resize_crops import reweigh, rounded, split_unknown


class Part(NamedTuple):
    """A box of an image, in its pixels, and how much resolution is wanted of it."""

    top: int
    left: int
    height: int
    width: int
    enough: tuple[int, int]
    """(height, width) that the box may be decoded to, at least, where that is cheaper than all of its pixels."""


def whole(height: int, width: int) -> Part:
    """Return all of an image, in all its pixels."""
    return Part(0, 0, height, width, (height, width))


def _resize_known(pixels: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Resize pixels (c, h, w) by a linear filter; unknown ones, NaN, leave their weight to the others."""
    if pixels.dtype != torch.float32 or not pixels.isnan().any():
        exact = pixels if pixels.dtype == torch.uint8 else pixels.float()  # of 8 bits it takes whole numbers
        return rounded(resize(exact), pixels.dtype)
    return reweigh(resize(split_unknown(pixels)))


def resample(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels (c, h, w) to `size` (height, width) by torch's antialiased bicubic filter; NaN as unknown."""
    bicubic = v2.InterpolationMode.BICUBIC
    return _resize_known(
        pixels, lambda exact: v2.functional.resize(exact, list(size), interpolation=bicubic, antialias=True)
    )


class View(ABC):
    """An augmentation in two stages: what part of an image is seen, then what becomes of its pixels.

    The first needs the image's size alone, so that no more is read and decoded than is seen. Both draw from the
    default generators.
    """

    size: tuple[int, int]
    """Height and width of the view."""

    @abstractmethod
    def part(self, height: int, width: int) -> Part:
        """Draw the part of an image of `height` x `width` pixels."""

    @abstractmethod
    def finish(self, pixels: Tensor) -> Tensor:
        """Turn a part, pixels (c, h, w) of any size, into the view."""

    def __call__(self, image: Tensor) -> Tensor:
        """Return a view of a whole image, pixels (c, h, w)."""
        top, left, height, width, _ = self.part(*image.shape[-2:])
        return self.finish(image[..., top : top + height, left : left + width])


class RandomView(View):
    """The pretraining augmentation: random resized crop (bicubic) to `size` pixels, horizontal flip.

    Args:
        size: height and width of the view.
        crop_scale: share of the image's area that the crop covers, least and most.
        hflip: probability of the flip.
    """

    def __init__(self, size: tuple[int, int], crop_scale: tuple[float, float], hflip: float) -> None:
        self.size = size
        self.crop = v2.RandomResizedCrop(size, scale=crop_scale)
        self.hflip = hflip

    def part(self, height: int, width: int) -> Part:
        return Part(**self.crop.make_params([torch.empty(()).expand(height, width)]), enough=self.size)

    def flips(self) -> bool:
        """Draw whether the view is flipped, which comes after the part."""
        return bool(torch.rand(1) < self.hflip)

    def finish(self, pixels: Tensor) -> Tensor:
        resized = resample(pixels, self.size)
        return resized.flip(-1) if self.flips() else resized


def covering_size(image: tuple[int, int], around: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) to which an image of such a size is resized so that it covers `around`.

    Its shape is kept up to rounding, which is timm's: for squares torchvision's `Resize` to a short side, which
    truncates the long one; for others timm's `ResizeKeepRatio`, which rounds.
    """
    height, width = image
    if around[0] == around[1]:
        short, long = around[0], int(around[0] * max(image) / min(image))
        return (short, long) if height <= width else (long, short)
    ratio = min(height / around[0], width / around[1])
    return round(height / ratio), round(width / ratio)


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resize pixels (c, h, w) by Pillow, antialiased, channel by channel: the numbers are those of whole images.

    NaN is unknown, as in `resample`.
    """
    resample = Image.Resampling[interpolation.upper()]
    height, width = size

    def by_pillow(exact: Tensor) -> Tensor:
        channels = [Image.fromarray(channel).resize((width, height), resample) for channel in exact.numpy()]
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))

    return _resize_known(image, by_pillow)


def cover(image: Tensor, size: tuple[int, int], crop_pct: float = 1.0, interpolation: str = "bicubic") -> Tensor:
    """Resize an image (c, h, w) so that `crop_pct` of it covers `size` (height, width), and crop the centre.

    The view of evaluation: the same pixels as `timm.data.create_transform` with PIL images.
    """
    around = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    resized = resize(image, covering_size((image.shape[1], image.shape[2]), around), interpolation)
    return v2.functional.center_crop(resized, list(size))


class Cover(v2.Transform):
    """`cover` as a transform."""

    def __init__(self, size: tuple[int, int], crop_pct: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.crop_pct = crop_pct

    def forward(self, image: Tensor) -> Tensor:
        return cover(image, self.size, self.crop_pct)


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's, with at least one bit: its strongest level keeps none, which Pillow 13 refuses."""
    return posterize(image, max(bits, 1), **kwargs)


class AutoAugment(v2.Transform):
    """timm's policy `name`, which works on PIL images of one or three channels.

    Raises:
        ValueError: if timm does not know such a policy.
    """

    def __init__(self, name: str, size: tuple[int, int], mean: Sequence[float]) -> None:
        super().__init__()
        if not name:
            raise ValueError("an empty name; null is for none")
        try:
            stages = transforms_imagenet_train(
                size, auto_augment=name, interpolation="bicubic", mean=tuple(mean), separate=True
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"timm knows no such policy ({error}); the paper's is rand-m9-mstd0.5-inc1") from error
        assert isinstance(stages, tuple)
        self.policy = stages[1]  # between the crop and the tensor
        for stage in self.policy.transforms:
            sequences = getattr(stage, "policy", [getattr(stage, "ops", [])])
            for operation in itertools.chain(*sequences):
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize

    def forward(self, image: Tensor) -> Tensor:
        return v2.functional.pil_to_tensor(self.policy(v2.functional.to_pil_image(image)))


class ErasePixels(v2.Transform):
    """timm's random erasing before normalisation: normal values, as pixels, in one rectangle of some images.

    Unknown pixels in it are erased, too.
    """

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.probability = probability
        self.erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self.normalizer = PixelNormalizer(tuple(mean), tuple(std))

    def forward(self, image: Tensor) -> Tensor:
        if random.random() >= self.probability:
            return image
        noise = self.erase(torch.full(image.shape, torch.nan))
        pixels = self.normalizer.invert(noise).nan_to_num() * FULL[image.dtype]
        return torch.where(noise.isnan(), image, rounded(pixels, image.dtype))


class AugmentedView(View):
    """The augmentation of fine-tuning: crop to `size` pixels, flip, timm's policy, random erasing.

    The crop is a random resized one or, with `crop_padding`, one of `size` out of the image with a mirrored border.

    Raises:
        ValueError: if timm does not know the policy.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        crop_scale: tuple[float, float],
        crop_padding: int | None,
        hflip: float,
        auto_augment: str | None,
        erase_prob: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.size = size
        self.crop = RandomView(size, crop_scale, hflip) if crop_padding is None else None
        steps: list[nn.Module] = []
        if crop_padding is not None:
            crop = v2.RandomCrop(size, padding=crop_padding, padding_mode="reflect")
            steps += [Cover(size), crop, v2.RandomHorizontalFlip(hflip)]
        if auto_augment is not None:
            steps.append(AutoAugment(auto_augment, size, mean))
        if erase_prob:
            steps.append(ErasePixels(erase_prob, mean, std))
        self.steps = steps

    def part(self, height: int, width: int) -> Part:
        return self.crop.part(height, width) if self.crop else whole(height, width)

    def finish(self, pixels: Tensor) -> Tensor:
        pixels = self.crop.finish(pixels) if self.crop else pixels
        for step in self.steps:
            pixels = step(pixels)
        return pixels


Limits = float | tuple[float, ...]
"""A number for all channels, or one for each."""


class PixelNormalizer(nn.Module):
    """Normalise pixels by mean and std per channel, (pixel / 255 - mean) / std, and back; on any device.

    65535 in place of 255 for uint16; float32 is as it is.

    Args:
        mean: of each channel.
        std: of each channel.
        clip: least and most that pixels are clipped to before, in units of the mean; numbers, or one per channel.
    """

    mean: Tensor
    std: Tensor
    clip: Tensor | None

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], clip: tuple[Limits, Limits] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        limits = clip and torch.stack([torch.tensor(limit).expand(len(mean)) for limit in clip])  # (2, c)
        self.register_buffer("clip", None if limits is None else limits[..., None, None], persistent=False)

    def forward(self, pixels: Tensor, unknown: float = 0.0) -> Tensor:
        """Turn pixels (..., c, h, w) into float32; unknown ones, NaN, into `unknown`: 0, the mean, for networks."""
        values = pixels.float() / FULL[pixels.dtype]
        if self.clip is not None:
            values = values.clamp(*self.clip)
        images = (values - self.mean) / self.std
        if pixels.dtype != torch.float32 or math.isnan(unknown):
            return images
        return images.masked_fill(images.isnan(), unknown)

    def invert(self, images: Tensor) -> Tensor:
        """Turn normalised images (..., c, h, w) back into pixels, 1.0 for 255 or 65535."""
        return images.float() * self.std + self.mean
