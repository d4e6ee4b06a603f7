"""The packed layout, the fast path: only visible patches are stored, as (b, p, k, k, c).

Pointwise work and memory shrink to the visible share, and everything on the last axis stays a plain matmul.
Only the depthwise convolution looks across patch borders: it lays the patches out on a canvas of zeros.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fcmae.encoder.layouts import SITES_PER_PATCH, conv2d_channels_last, l2_norm


def _place(x: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, k, _, c = x.shape
    canvas = x.new_zeros(b, grid[0], k, grid[1], k, c)
    image = torch.arange(b, device=ids.device)[:, None]
    canvas[image, ids // grid[1], :, ids % grid[1]] = x
    return canvas.view(b, grid[0] * k, grid[1] * k, c)


def _pick(canvas: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    b, h, w, c = canvas.shape
    canvas = canvas.reshape(b, grid[0], h // grid[0], grid[1], w // grid[1], c)
    image = torch.arange(b, device=ids.device)[:, None]
    return canvas[image, ids // grid[1], :, ids % grid[1]]


class _Place(torch.autograd.Function):
    """Patches (b, p, k, k, c) onto a zero canvas (b, h, w, c).

    A Function because autograd's own derivative of indexing accumulates (slow, on CUDA non-deterministic),
    where ids do not repeat and `_pick` and `_place` are simply each other's transposes.
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
        return _pick(canvas, ids, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return _Place.apply(grads[0], ids, ctx.grid), None, None


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of packed patches: onto the canvas, convolve, back.

    A Function so that the packed input is kept for the backward pass instead of the canvas, and because the
    gradient of the input is fastest as a forward convolution with the flipped kernel, that of the bias as a sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, grid: tuple[int, int], padding: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ids)
        ctx.grid, ctx.padding = grid, padding
        canvas = _place(x, ids, grid)
        out = conv2d_channels_last(canvas, weight, bias, padding=padding, groups=weight.shape[0])
        return _pick(out, ids, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, ids = ctx.saved_tensors
        grad = _place(grads[0], ids, ctx.grid)
        flipped = weight.flip(2, 3)
        grad_canvas = conv2d_channels_last(grad, flipped, None, padding=ctx.padding, groups=weight.shape[0])
        grad_weight = conv2d_weight(
            _place(x, ids, ctx.grid).permute(0, 3, 1, 2),
            weight.shape,
            grad.permute(0, 3, 1, 2),
            padding=ctx.padding,
            groups=weight.shape[0],
        )
        grad_x = _pick(grad_canvas, ids, ctx.grid)
        return grad_x, grad_weight, grads[0].sum((0, 1, 2, 3)), None, None, None


@dataclass(frozen=True)
class PackedSites:
    """Visible patches only, stored as (b, p, k, k, c) with k sites per patch side."""

    grid: tuple[int, int]
    """Patches (gh, gw)."""
    visible_ids: Tensor
    """Visible patches (b, p), int64, without repeats."""
    sites_per_patch: int = SITES_PER_PATCH

    def gather(self, dense: Tensor) -> Tensor:
        return _Pick.apply(dense, self.visible_ids, self.grid)

    def scatter(self, x: Tensor) -> Tensor:
        return _Place.apply(x, self.visible_ids, self.grid)

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        c_out, c_in, s, _ = conv.weight.shape
        pixels = _Pick.apply(images.permute(0, 2, 3, 1), self.visible_ids, self.grid)  # (b, p, P, P, c_in)
        k = self.sites_per_patch
        windows = pixels.unflatten(3, (k, s)).unflatten(2, (k, s)).transpose(3, 4)  # (b, p, k, k, s, s, c_in)
        weight = conv.weight.permute(0, 2, 3, 1).reshape(c_out, s * s * c_in)
        return F.linear(windows.flatten(4), weight, conv.bias)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        weight, bias = conv.weight, conv.bias
        assert bias is not None
        if torch.is_autocast_enabled(x.device.type):  # as a convolution would, but where its backward sees it
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return _Depthwise.apply(x, weight, bias, self.visible_ids, self.grid, conv.padding[0])

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        k = self.sites_per_patch // 2
        windows = x.unflatten(3, (k, 2)).unflatten(2, (k, 2)).transpose(3, 4)  # (b, p, k, k, 2, 2, c)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(windows.flatten(4), weight, conv.bias), replace(self, sites_per_patch=k)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))

    def norm(self, x: Tensor) -> Tensor:
        return l2_norm(x, (1, 2, 3))

    def spread(self, per_image: Tensor) -> Tensor:
        return per_image[:, None, None, None, :]

    @property
    def num_active(self) -> int:
        return self.visible_ids.shape[1] * self.sites_per_patch**2

    @property
    def all_active(self) -> bool:
        return True
