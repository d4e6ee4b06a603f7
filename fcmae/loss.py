"""The FCMAE loss: mean squared error on hidden patches, optionally against patch-normalised pixels."""

import torch
from torch import Tensor

from fcmae.ops.patch_loss import patch_errors

PATCH_NORM_EPS = 1e-6


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (unbiased variance + 1e-6) of each patch of (b, L, n): each (b, L, 1)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + PATCH_NORM_EPS).sqrt()


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
