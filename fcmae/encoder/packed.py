"""The packed layout, the fast path: only visible patches are stored, as (b, p, k, k, c).

Pointwise work and memory shrink to the visible share, and everything on the last axis stays a plain matmul.
Only the depthwise convolution looks across patch borders, through a table of where each patch is stored.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.encoder.layouts import SITES_PER_PATCH, Sites, as_autocast
from fcmae.ops.patch_depthwise import patch_depthwise, patch_depthwise_norm, patch_slots
from fcmae.patches import as_cells, pick_cells


def _place(x: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, k, _, c = x.shape
    canvas = x.new_zeros(b, grid[0] * k, grid[1] * k, c)
    image = torch.arange(b, device=ids.device)[:, None]
    as_cells(canvas, grid)[image, ids // grid[1], ids % grid[1]] = x
    return canvas


class _Place(torch.autograd.Function):
    """Patches (b, p, k, k, c) onto a zero canvas (b, h, w, c).

    A Function because autograd's own derivative of indexing accumulates (slow, on CUDA non-deterministic),
    where ids do not repeat and `pick_cells` and `_place` are simply each other's transposes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.grid = grid
        return _place(x, ids, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return _Pick.apply(grads[0], ids, ctx.grid), None, None


class _Pick(torch.autograd.Function):
    """The patches (b, p, k, k, c) of a canvas (b, h, w, c): the transpose of `_Place`."""

    @staticmethod
    def forward(ctx: Any, canvas: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.grid = grid
        return pick_cells(canvas, ids, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return _Place.apply(grads[0], ids, ctx.grid), None, None


def gather_patches(dense: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Take the patches `ids` (b, p), without repeats, of maps (b, h, w, c): (b, p, k, k, c); differentiable."""
    return _Pick.apply(dense, ids, grid)


@dataclass(frozen=True)
class PackedSites(Sites):
    """Visible patches only, stored as (b, p, k, k, c) with k sites per patch side."""

    grid: tuple[int, int]
    """Patches (gh, gw)."""
    visible_ids: Tensor
    """Visible patches (b, p), int64, without repeats."""
    slots: Tensor
    """Where each patch is among the visible ones, int32 (b, L), -1 for hidden ones."""
    sites_per_patch: int

    @classmethod
    def of_patches(cls, grid: tuple[int, int], visible_ids: Tensor, sites_per_patch: int = SITES_PER_PATCH) -> Self:
        """Return the layout of these visible patches (b, p), in the first stage unless said otherwise."""
        return cls(grid, visible_ids, patch_slots(visible_ids, grid[0] * grid[1]), sites_per_patch)

    def gather(self, dense: Tensor) -> Tensor:
        return gather_patches(dense, self.visible_ids, self.grid)

    def scatter(self, x: Tensor) -> Tensor:
        return _Place.apply(x, self.visible_ids, self.grid)

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        c_out, c_in, s, _ = conv.weight.shape
        pixels = self.gather(images.permute(0, 2, 3, 1))  # (b, p, P, P, c_in)
        k = self.sites_per_patch
        windows = pixels.unflatten(3, (k, s)).unflatten(2, (k, s)).transpose(3, 4)  # (b, p, k, k, s, s, c_in)
        weight = conv.weight.permute(0, 2, 3, 1).reshape(c_out, s * s * c_in)
        return F.linear(windows.flatten(4), weight, conv.bias)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        assert conv.bias is not None
        return patch_depthwise(as_autocast(x), conv.weight, conv.bias, self.visible_ids, self.slots, self.grid)

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, eps: float) -> Tensor:
        assert conv.bias is not None
        x = as_autocast(x)
        return patch_depthwise_norm(x, conv.weight, conv.bias, self.visible_ids, self.slots, self.grid, eps)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        k = self.sites_per_patch // 2
        windows = x.unflatten(3, (k, 2)).unflatten(2, (k, 2)).transpose(3, 4)  # (b, p, k, k, 2, 2, c)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(windows.flatten(4), weight, conv.bias), replace(self, sites_per_patch=k)

    @property
    def num_active(self) -> int:
        return self.visible_ids.shape[1] * self.sites_per_patch**2
