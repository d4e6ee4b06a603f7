"""Crops, flips and pixel normalisation on uint8 tensors (c, h, w) of any number of channels."""

import math

import torch
from torch import Tensor, nn
from torchvision.transforms import v2


def random_view(size: tuple[int, int], crop_scale: tuple[float, float], hflip: float) -> v2.Transform:
    """Return the pretraining augmentation: random resized crop (bicubic) to `size` pixels, horizontal flip."""
    crop = v2.RandomResizedCrop(size, scale=crop_scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(hflip)])


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (c, h, w) so that it just covers `size` (height, width) in pixels, and crop the centre."""
    scale = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    resized = [max(side, math.ceil(scale * old)) for side, old in zip(size, image.shape[-2:], strict=True)]
    image = v2.functional.resize(image, resized, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, list(size))


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
