"""The Triton side of `patch_loss`: a program holds one hidden patch in registers, so each pixel is read once."""

# How a kernel of Triton is launched, pyright does not know.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_WARP = 512
"""Values of a patch that a warp holds, 16 registers of each thread; not yet tuned on a GPU."""


@triton.jit
def _errors_kernel(
    pred, images, hidden, errors, difference, m, gw, stride_b, stride_c, stride_h, stride_w,
    PATCH: tl.constexpr, C: tl.constexpr, VALUES: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = PATCH * PATCH * C
    patch = tl.program_id(0)
    place = tl.load(hidden + patch)
    values = tl.arange(0, VALUES)
    inside = values < N
    y = place // gw * PATCH + values // (PATCH * C)
    x = place % gw * PATCH + values // C % PATCH
    image = images + (patch // m).to(tl.int64) * stride_b
    pixels = image + values % C * stride_c + y * stride_h + x * stride_w
    target = tl.load(pixels, inside, other=0.0).to(DTYPE)
    if NORM:
        centred = tl.where(inside, target - tl.sum(target, 0) / N, 0.0)
        target = centred / tl.sqrt(tl.sum(centred * centred, 0) / (N - 1) + EPS)
    at = patch.to(tl.int64) * N + values
    d = tl.load(pred + at, inside, other=0.0).to(DTYPE) - target
    tl.store(difference + at, d.to(difference.dtype.element_ty), inside)
    tl.store(errors + patch, tl.sum(d * d, 0))


def patch_errors(
    pred: Tensor, images: Tensor, hidden: Tensor, patch: int, norm_pix_loss: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """As the operation of this name."""
    b, m, n = pred.shape
    values = triton.next_power_of_2(n)
    errors = pred.new_empty(b, m, dtype=torch.promote_types(pred.dtype, torch.float32))
    difference = pred.new_empty(pred.shape)
    _errors_kernel[b * m,](
        pred.contiguous(),
        images,
        hidden.contiguous(),
        errors,
        difference,
        m,
        images.shape[3] // patch,
        *images.stride(),
        PATCH=patch,
        C=images.shape[1],
        VALUES=values,
        NORM=norm_pix_loss,
        EPS=eps,
        DTYPE=tl.float64 if pred.dtype == torch.float64 else tl.float32,
        num_warps=min(max(values // VALUES_PER_WARP, 1), 16),
        enable_fp_fusion=True,
    )
    return errors, difference
