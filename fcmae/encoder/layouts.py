"""The layouts of a feature map: the only code that knows where features lie in space.

A *layout* answers the questions of `Sites`; everything else in a ConvNeXt V2 works on the last axis and runs on any
of them unchanged. "Sites" are the positions at which features exist, "active" sites those of visible patches.

Invariants, on which every layout relies:

- Features at inactive sites are unspecified and never read.
- A patch is 8 -> 4 -> 2 -> 1 sites per side through the four stages, so each 2x2 downsampling window is wholly
  visible or wholly hidden. Divisibility is checked once, in `ConvNeXt.sites`; `dense` alone needs none.
- Visibility is `visible_ids` (b, p), int64, without repeats, p the same for every image: static shapes.
- Parameters are plain `nn.Conv2d`, `nn.Linear`, `nn.LayerNorm`; a layout reads `conv.weight` and owns nothing.
- Hidden pixels never reach a number that is kept: they may be NaN.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.masking import ids_to_booleans

SITES_PER_PATCH = 8
"""Sites per patch side in the first stage; each of the three downsamplings halves it."""


def normalise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis without weight and bias, in x's dtype, accumulated in at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=eps)


def as_autocast(x: Tensor) -> Tensor:
    """Cast to the dtype of the enabled autocast, if any, as an operation that autograd differentiates."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def conv2d_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
    """`F.conv2d` of x (b, h, w, c); returns (b, h', w', c')."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **kwargs).permute(0, 2, 3, 1)


class Sites(ABC):
    """A layout: what a ConvNeXt needs to know of space.

    x is a feature map in the layout's own storage, batch first and channels last. Only active sites are stored, so
    that sums over the middle axes are sums over them; `MaskedSites` stores all, and alone overrides what sums.
    """

    all_active: ClassVar[bool] = True
    """Whether storage holds active sites only."""

    @property
    @abstractmethod
    def num_active(self) -> int:
        """Active sites per image, the same for all."""

    @abstractmethod
    def gather(self, dense: Tensor) -> Tensor:
        """Take the active sites of a map (b, h, w, c) into the layout's storage."""

    @abstractmethod
    def scatter(self, x: Tensor) -> Tensor:
        """Lay x out as a map (b, h, w, c) with exact zeros at hidden sites."""

    @abstractmethod
    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        """Apply a non-overlapping convolution to images (b, c, H, W), reading visible pixels only."""

    @abstractmethod
    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Apply a depthwise convolution at active sites; hidden neighbours count as zero."""

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, eps: float) -> Tensor:
        """Apply `depthwise` and normalise each site over its channels, without a weight and bias of the norm."""
        return normalise(self.depthwise(x, conv), eps)

    @abstractmethod
    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        """Apply a 2x2 convolution of stride 2; returns the map and its coarser layout."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the active sites of each image: (b, c)."""
        return x.sum(tuple(range(1, x.ndim - 1)))

    def max(self, x: Tensor) -> Tensor:
        """Largest value over the active sites of each image: (b, c)."""
        return x.amax(tuple(range(1, x.ndim - 1)))

    def norm(self, x: Tensor) -> Tensor:
        """L2 norm over the active sites of each image: (b, c), at least float32; gradient 0 where it is 0."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), dtype=dtype)

    def spread(self, per_image: Tensor, x: Tensor) -> Tensor:
        """Shape (b, c) so that it broadcasts against x."""
        return per_image[:, *(None,) * (x.ndim - 2)]


@dataclass(frozen=True)
class DenseSites(Sites):
    """All sites active, stored as (b, h, w, c): fine-tuning, inference, the decoder."""

    grid: tuple[int, int]
    """Sites (h, w)."""

    def gather(self, dense: Tensor) -> Tensor:
        return dense

    def scatter(self, x: Tensor) -> Tensor:
        return x

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.conv2d(images, conv.weight, conv.bias, stride=conv.stride).permute(0, 2, 3, 1)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return conv2d_channels_last(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        coarser = replace(self, grid=(self.grid[0] // 2, self.grid[1] // 2))
        return conv2d_channels_last(x, conv.weight, conv.bias, stride=conv.stride), coarser

    @property
    def num_active(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class MaskedSites(DenseSites):
    """The reference: dense storage (b, h, w, c), hidden sites zeroed wherever they would be read."""

    all_active = False
    visible_ids: Tensor
    """Visible patches (b, p), int64."""
    sites_per_patch: int = SITES_PER_PATCH

    def active(self, sites_per_patch: int) -> Tensor:
        """Booleans (b, h, w, 1) at `sites_per_patch` sites (or pixels) per patch side."""
        gh, gw = self.grid[0] // self.sites_per_patch, self.grid[1] // self.sites_per_patch
        visible = ids_to_booleans(self.visible_ids, gh * gw).view(-1, gh, gw, 1)
        return visible.repeat_interleave(sites_per_patch, 1).repeat_interleave(sites_per_patch, 2)

    def scatter(self, x: Tensor) -> Tensor:
        return torch.where(self.active(self.sites_per_patch), x, 0.0)

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        pixels = self.active(self.sites_per_patch * conv.weight.shape[-1])
        return super().stem(torch.where(pixels.permute(0, 3, 1, 2), images, 0.0), conv)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return super().depthwise(self.scatter(x), conv)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        x, coarser = super().downsample(x, conv)
        return x, replace(coarser, sites_per_patch=self.sites_per_patch // 2)

    def sum(self, x: Tensor) -> Tensor:
        return super().sum(self.scatter(x))

    def max(self, x: Tensor) -> Tensor:
        return super().max(torch.where(self.active(self.sites_per_patch), x, -torch.inf))

    def norm(self, x: Tensor) -> Tensor:
        return super().norm(self.scatter(x))

    @property
    def num_active(self) -> int:
        return self.visible_ids.shape[1] * self.sites_per_patch**2
