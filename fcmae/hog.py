"""Histograms of oriented gradients (HOG) of images, channel by channel; knows no patches, masks or losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ORIENTATIONS = 9
"""Bins of a histogram over half a turn, in which a gradient and its opposite are the same."""
EPS = 0.01
"""Added, squared, to a histogram's squared norm: noise of half a level of 255, where images have unit variance."""


@torch.no_grad()
def hog(images: Tensor, cell: int) -> Tensor:
    """Histogram of oriented gradients of each cell of `cell` x `cell` pixels (Dalal and Triggs, CVPR 2005).

    Gradients are centred differences, [-1, 0, 1], and zero across the image's border. Each pixel votes, weighted by
    its gradient's magnitude, for the two orientations nearest to its gradient's in proportion; that of bin k is
    k / 9 of half a turn, 0 for a gradient along x. Each channel has histograms of its own, divided by their L2 norm
    (MaskFeat, 2112.09133); they are near zero where there is next to no gradient. Pixels that are NaN make those NaN
    of the channel's cells that have them, or have one beside them.

    Args:
        images: (b, c, h, w), of about unit variance; h and w multiples of `cell`.

    Returns:
        (b, c * 9, h / cell, w / cell), at least float32: nine bins of each channel in turn.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    dy = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
    dx = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    magnitude = (dx.square() + dy.square()).sqrt()
    angle = torch.atan2(dy, dx) * (ORIENTATIONS / math.pi)
    angle = torch.where(angle < 0, angle + ORIENTATIONS, angle)  # 0 to 9, and 9 is 0 again
    bins: list[Tensor] = []
    for k in range(ORIENTATIONS + 1):  # one by one: together they would take ten times the memory
        votes = (1 - (angle - k).abs()).clamp_(min=0).mul_(magnitude)
        bins.append(votes.unflatten(-1, (-1, cell)).mean(-1).unflatten(-2, (-1, cell)).mean(-2))
    histograms = torch.stack([bins[0] + bins[-1], *bins[1:-1]], dim=2)  # (b, c, 9, h / cell, w / cell)
    norm = (histograms.square().sum(2, keepdim=True) + EPS**2).sqrt()
    return (histograms / norm).flatten(1, 2)
