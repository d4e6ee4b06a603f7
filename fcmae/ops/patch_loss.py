"""Squared errors of predicted patches against an image's own, cut out and normalised on the way.

With x the n values of a hidden patch in the image, in (p, q, c) order, and pred the predicted ones:

    target = (x - mean(x)) / sqrt(var(x) + eps)        (unbiased variance; just x without norm_pix_loss)
    error = sum((pred - target)^2),    grad_pred = 2 g (pred - target) with g the gradient of error
"""

from typing import Any

import torch
from torch import Tensor

from fcmae.ops.operation import operation
from fcmae.patches import pick_patches


def _fake_errors(pred: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty(pred.shape[:-1], dtype=dtype), pred.new_empty(pred.shape)


@operation(fake=_fake_errors)
def patch_errors(
    pred: Tensor, images: Tensor, hidden: Tensor, patch: int, norm_pix_loss: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Return each hidden patch's error (b, m), at least float32, and pred - target (b, m, n) in pred's dtype.

    The error is differentiable in pred.

    Args:
        pred: (b, m, patch * patch * c), the hidden patches predicted, values in (p, q, c) order.
        images: (b, c, H, W), in any order of memory; visible patches are never read.
        hidden: int64 (b, m), ids of the hidden patches in pred's order.
        patch: pixels per patch side; H and W are multiples.
        norm_pix_loss: compare against each patch's pixels minus their mean, over their standard deviation.
        eps: added to a patch's variance.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    target = pick_patches(images, hidden, patch).to(dtype)
    if norm_pix_loss:
        target = target - target.mean(-1, keepdim=True)
        squares = target.square().sum(-1, keepdim=True)  # on a CPU much faster than torch.var
        target = target / (squares / (target.shape[-1] - 1) + eps).sqrt()
    difference = pred.to(dtype) - target
    return difference.square().sum(-1), difference.to(pred.dtype).contiguous()


def _keep_difference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (difference,) = ctx.saved_tensors
    return (2 * grad[..., None] * difference).to(difference.dtype), None, None, None, None, None


patch_errors.register_autograd(_backward, setup_context=_keep_difference)
