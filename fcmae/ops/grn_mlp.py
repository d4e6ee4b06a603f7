"""The pointwise half of a block, fused: the norm's weight and bias, expand, GELU, GRN, project.

With v, s weight and bias of the LayerNorm whose normalised x comes in:

    W = W1 diag(v),    h = x W' + b1 + W1 s,    a = grn(gelu(h)) (gelu_grn.py),    out = a W2' + b2

and backward, with g the gradient of out:

    grad_a = g W2,    grad_h as in gelu_grn.py,    grad_x = grad_h W,    grad_b1 = sum grad_h
    grad_W = grad_h' x,    grad_W1 = grad_W diag(v) + grad_b1 s'
    grad_v = columns' sums of W1 * grad_W,    grad_s = W1' grad_b1
    grad_W2 = g' a with a computed again from h,    grad_b2 = sum g

So of the maps of width 4c only h is kept, and the norm's weight and bias cost work on parameters, none on maps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.ops.gelu_grn import gelu_grn_forward, gelu_grn_gradients, gelu_grn_reference


def grn_mlp_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
) -> Tensor:
    """As `grn_mlp`, one operation after the other, gradients left to autograd."""
    h = F.linear((x * norm_weight + norm_bias).to(x.dtype), w1.to(x.dtype), b1.to(x.dtype))
    return F.linear(gelu_grn_reference(h, gamma, beta, eps).to(x.dtype), w2.to(x.dtype), b2.to(x.dtype))


def grn_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
) -> Tensor:
    """Return linear(GRN(GELU(linear(x * norm_weight + norm_bias)))) (b, n, c), computed and returned in x's dtype.

    Args:
        x: (b, n, c), normalised over c; all n sites of an image are active.
        norm_weight, norm_bias: (c,).
        w1, b1: (4c, c) and (4c,).
        gamma, beta: (4c,).
        w2, b2: (c, 4c) and (c,).
        eps: of GRN.
    """
    with torch.autocast(x.device.type, enabled=False):  # x's dtype says what is computed in
        return _GRNMLP.apply(x, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2, eps)


_MM_HAS_OUT_DTYPE = torch.__version__ >= "2.10"
"""Since torch 2.8, but before 2.10 neither for `torch.compile` nor for fake tensors."""


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad' x (o, i) in dtype, of rows grad (n, o) and x (n, i).

    On CUDA, half precision is summed and returned in float32: what several multiprocessors sum in parts is not
    rounded in between, and needs no cast.
    """
    if grad.is_cuda and grad.dtype.itemsize == 2 and _MM_HAS_OUT_DTYPE:
        return torch.mm(grad.t(), x, out_dtype=torch.float32).to(dtype)
    return (grad.t() @ x).to(dtype)


class _GRNMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w2: Tensor,
        b2: Tensor,
        eps: float,
    ) -> Tensor:
        w = (w1 * norm_weight).to(x.dtype)
        h = F.linear(x, w, torch.addmv(b1, w1, norm_bias).to(x.dtype))
        a, norm = gelu_grn_forward(h, gamma, beta, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, w1, gamma, beta, w2, w, h, norm)
        ctx.eps = eps
        return F.linear(a, w2.to(x.dtype), b2.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):  # of a loss.backward() inside of it, too
            return _gradients(ctx, grads[0])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, w1, gamma, beta, w2, w, h, norm = ctx.saved_tensors
    grad = grad.flatten(0, 1)
    grad_a = (grad @ w2.to(grad.dtype)).view_as(h)
    grad_h, a, sums = gelu_grn_gradients(grad_a, h, norm, gamma, beta, ctx.eps)
    grad_gamma, grad_beta, grad_b1 = sums.to(w1.dtype).unbind()
    rows = grad_h.flatten(0, 1)
    grad_w = _weight_gradient(rows, x.flatten(0, 1), w1.dtype)
    return (
        (rows @ w).view_as(x),
        (w1 * grad_w).sum(0),
        grad_b1 @ w1,
        torch.addr(grad_w * norm_weight, grad_b1, norm_bias),
        grad_b1,
        grad_gamma,
        grad_beta,
        _weight_gradient(grad, a.flatten(0, 1), w2.dtype),
        grad.sum(0, dtype=w2.dtype),
        None,
    )
