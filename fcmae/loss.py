"""The FCMAE loss: mean squared error on hidden patches, against pixels, patch-normalised or not, or HOG.

Where images may have pixels that are not known, which are NaN, these are left out of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.hog import ORIENTATIONS, hog
from fcmae.ops.patch_loss import patch_errors
from fcmae.patches import pick_patches

PATCH_NORM_EPS = 1e-6


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (unbiased variance + 1e-6) of each patch of (b, L, n): each (b, L, 1).

    Values that are not known, NaN, are left out; of a patch with one or none the variance is 0.
    """
    number = (~patches.isnan()).sum(-1, keepdim=True)
    mean = patches.nansum(-1, keepdim=True) / number.clamp(min=1)
    squares = (patches - mean).square().nansum(-1, keepdim=True)
    return mean, (squares / (number - 1).clamp(min=1) + PATCH_NORM_EPS).sqrt()


def hidden_patch_loss(pred: Tensor, images: Tensor, hidden: Tensor, patch: int, *, norm_pix_loss: bool) -> Tensor:
    """Mean over hidden patches of the patch's mean squared error, in at least float32 (paper, section 3.1).

    Args:
        pred: predictions of the hidden patches (b, m, patch * patch * c), values in (p, q, c) order.
        images: (b, c, H, W); visible pixels are never read.
        hidden: int64 ids (b, m) of the hidden patches, without repeats.
        patch: pixels per patch side.
        norm_pix_loss: compare against each patch's pixels minus their mean, over their standard deviation.
    """
    errors, _ = patch_errors(pred, images, hidden, patch, norm_pix_loss, PATCH_NORM_EPS)
    return errors.sum() / pred.numel()


def known_mean_error(pred: Tensor, target: Tensor, least: int = 1) -> Tensor:
    """Mean over patches of the mean squared error of a patch's known values: `F.mse_loss` where all are known.

    A patch counts the same however much of it is known, and not at all with fewer than `least` known values; without
    any that counts the error is 0, and so is its gradient. Each process and micro-batch has a mean of its own.

    Args:
        pred: (b, m, n).
        target: (b, m, n), NaN where it is not known.
        least: known values of a patch that counts.
    """
    known = ~target.isnan()
    number = known.sum(-1)
    difference = torch.where(known, pred.to(target.dtype) - target, 0)
    errors = difference.square().sum(-1) / number.clamp(min=1)  # (b, m)
    counts = number >= least
    return (errors * counts).sum() / counts.sum().clamp(min=1)


# Targets: what of a hidden patch is predicted


class Target(Protocol):
    """What is predicted of a hidden patch, and how far off a prediction is."""

    def side(self, patch: int) -> int:
        """Return how many vectors are predicted along a side of a patch of `patch` pixels per side."""
        ...

    def num_values(self, patch: int, in_chans: int) -> int:
        """Return how many values are predicted of a patch: side * side vectors, row by row."""
        ...

    def loss(self, pred: Tensor, images: Tensor, hidden: Tensor, patch: int) -> Tensor:
        """Return the mean squared error of pred (b, m, num_values), the hidden patches; as `hidden_patch_loss`."""
        ...


@dataclass(frozen=True)
class PixelTarget:
    """The patch's pixels, with `norm_pix_loss` minus their mean and over their standard deviation (MAE).

    Of the known ones with `nodata`, which a patch has two of at least where it is normalised.
    """

    norm_pix_loss: bool
    nodata: bool = False
    """Whether images may have pixels that are not known, NaN."""

    def side(self, patch: int) -> int:
        return patch

    def num_values(self, patch: int, in_chans: int) -> int:
        return patch * patch * in_chans

    def loss(self, pred: Tensor, images: Tensor, hidden: Tensor, patch: int) -> Tensor:
        if not self.nodata:
            return hidden_patch_loss(pred, images, hidden, patch, norm_pix_loss=self.norm_pix_loss)
        target = pick_patches(images, hidden, patch).to(torch.promote_types(pred.dtype, torch.float32))
        if not self.norm_pix_loss:
            return known_mean_error(pred, target)
        mean, std = patch_statistics(target)
        return known_mean_error(pred, (target - mean) / std, least=2)


@dataclass(frozen=True)
class HOGTarget:
    """Histograms of oriented gradients of the patch's cells (MaskFeat, 2112.09133): no brightness, no contrast.

    A cell has 8 x 8 pixels, or as many as give a small patch four cells. Gradients at a patch's border reach one
    pixel into its neighbours. With `nodata` a channel's histogram of a cell that has, or reaches, a pixel that is not
    known is left out.
    """

    nodata: bool = False
    """Whether images may have pixels that are not known, NaN."""

    def cell(self, patch: int) -> int:
        """Return the pixels per side of a cell."""
        return min(8, patch // 2)

    def side(self, patch: int) -> int:
        return patch // self.cell(patch)

    def num_values(self, patch: int, in_chans: int) -> int:
        return self.side(patch) ** 2 * in_chans * ORIENTATIONS

    def loss(self, pred: Tensor, images: Tensor, hidden: Tensor, patch: int) -> Tensor:
        cell = self.cell(patch)
        target = pick_patches(hog(images, cell), hidden, self.side(patch))
        return (known_mean_error if self.nodata else F.mse_loss)(pred.to(target.dtype), target)


TARGETS: dict[str, Callable[[bool, bool], Target]] = {
    "pixels": PixelTarget,
    "hog": lambda norm_pix_loss, nodata: HOGTarget(nodata),  # histograms are normalised in any case
}
"""By name, as `model.target`; called with `norm_pix_loss` and `nodata`."""
