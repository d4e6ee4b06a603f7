"""Crops, flips, augmentation and pixel normalisation of uint8 tensors (c, h, w), mostly of any channel count."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor, nn
from torchvision.transforms import v2


def random_view(size: tuple[int, int], crop_scale: tuple[float, float], hflip: float) -> v2.Transform:
    """Return the pretraining augmentation: random resized crop (bicubic) to `size` pixels, horizontal flip."""
    crop = v2.RandomResizedCrop(size, scale=crop_scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(hflip)])


def cover(image: Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Resize an image (c, h, w) so that `crop_pct` of it covers `size` (height, width), and crop the centre."""
    around = [math.floor(side / crop_pct) for side in size]
    scale = max(around[0] / image.shape[-2], around[1] / image.shape[-1])
    resized = [max(side, math.ceil(scale * old)) for side, old in zip(around, image.shape[-2:], strict=True)]
    image = v2.functional.resize(image, resized, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, list(size))


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
    """timm's random erasing before normalisation: normal values, as pixels, in one rectangle of some images."""

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.probability = probability
        self.erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self.normalizer = PixelNormalizer(tuple(mean), tuple(std))

    def forward(self, image: Tensor) -> Tensor:
        if random.random() >= self.probability:
            return image
        noise = self.erase(torch.full(image.shape, torch.nan))
        pixels = (self.normalizer.invert(noise) * 255).round()
        return torch.where(noise.isnan(), image, pixels.nan_to_num().to(torch.uint8))


def augmented_view(
    size: tuple[int, int],
    *,
    crop_scale: tuple[float, float],
    crop_padding: int | None,
    hflip: float,
    auto_augment: str | None,
    erase_prob: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> v2.Transform:
    """Return the augmentation of fine-tuning: crop to `size` pixels, flip, timm's policy, random erasing.

    The crop is a random resized one or, with `crop_padding`, one of `size` out of the image with a mirrored border.

    Raises:
        ValueError: if timm does not know the policy.
    """
    if crop_padding is None:
        steps: list[nn.Module] = [random_view(size, crop_scale, hflip)]
    else:
        crop = v2.RandomCrop(size, padding=crop_padding, padding_mode="reflect")
        steps = [Cover(size), crop, v2.RandomHorizontalFlip(hflip)]
    if auto_augment is not None:
        steps.append(AutoAugment(auto_augment, size, mean))
    if erase_prob:
        steps.append(ErasePixels(erase_prob, mean, std))
    return v2.Compose(steps)


class PixelNormalizer(nn.Module):
    """Between uint8 pixels and what the model sees: (pixel / 255 - mean) / std per channel, on any device."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn uint8 (..., c, h, w) into float32."""
        return (pixels.float() / 255 - self.mean) / self.std

    def invert(self, images: Tensor) -> Tensor:
        """Turn normalised images (..., c, h, w) back into pixels in [0, 1], clamped."""
        return (images.float() * self.std + self.mean).clamp(0, 1)
