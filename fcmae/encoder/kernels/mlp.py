"""The pointwise half of a block, fused: expand, GELU, GRN, project; of the wide maps only one is kept.

    h = x W1' + b1,    a = grn(gelu(h)) (gelu_grn.py),    out = a W2' + b2

and backward, with g the gradient of out:

    grad_a = g W2,    grad_h as in gelu_grn.py,    grad_x = grad_h W1
    grad_W1 = grad_h' x,    grad_W2 = g' a    with a computed again from h
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.encoder.kernels.gelu_grn import gelu_grn_backward, gelu_grn_forward, gelu_grn_reference


def grn_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor, eps: float
) -> Tensor:
    """As `grn_mlp`, gradients left to autograd."""
    return F.linear(gelu_grn_reference(F.linear(x, w1, b1), gamma, beta, eps), w2, b2)


def grn_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor, eps: float
) -> Tensor:
    """Return linear(GRN(GELU(linear(x)))) of x (b, n, c), GRN over the n sites of each image, all of them active.

    Args:
        x: (b, n, c).
        w1, b1: (4c, c) and (4c,), of x's dtype.
        gamma, beta: (4c,), at least float32.
        w2, b2: (c, 4c) and (c,), of x's dtype.
        eps: of GRN.
    """
    return _GRNMLP.apply(x, w1, b1, gamma, beta, w2, b2, eps)


class _GRNMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w2: Tensor,
        b2: Tensor,
        eps: float,
    ) -> Tensor:
        h = F.linear(x, w1, b1)
        a, norm = gelu_grn_forward(h, gamma, beta, eps)
        ctx.save_for_backward(x, w1, gamma, beta, w2, h, norm)
        ctx.eps = eps
        return F.linear(a, w2, b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, gamma, beta, w2, h, norm = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        grad_a = (grad @ w2).view_as(h)
        grad_h, a, grad_gamma, grad_beta, grad_b1 = gelu_grn_backward(grad_a, h, norm, gamma, beta, ctx.eps)
        rows = grad_h.flatten(0, 1)
        return (
            (rows @ w1).view_as(x),
            rows.t() @ x.flatten(0, 1),
            grad_b1.to(w1.dtype),
            grad_gamma.to(gamma.dtype),
            grad_beta.to(beta.dtype),
            grad.t() @ a.flatten(0, 1),
            grad.sum(0),
            None,
        )
