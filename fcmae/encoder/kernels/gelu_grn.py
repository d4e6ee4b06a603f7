"""GELU followed by GRN over sites that are all active, fused: two passes and one stored map instead of many.

With y = gelu(h), n = ||y|| over the sites of an image, r = n / (mean_c n + eps):

    out = beta + s y,    s = 1 + gamma r

and backward, with g the gradient of out, t = sum_sites g y, u = gamma t:

    dn = u / (mean n + eps) - mean_c(u n) / (mean n + eps)^2
    dy = s g + (dn / n) y,    dn / n taken as 0 where n = 0
    dgamma = sum_images r t,    dbeta = sum g

The passes over h that this takes are also there one by one, for who fuses them with the linear layers around
them: they compute y again rather than store it, on CUDA by Triton kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.encoder.kernels.operation import operation


def gelu_grn_reference(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """GRN(GELU(h)) of h (b, n, c) over the n sites of each image (paper, Algorithm 1); gamma, beta (c,)."""
    y = F.gelu(h)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return gamma * (y * response) + beta + y


def gelu_grn(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The same as `gelu_grn_reference`, computing norms in at least float32; gradient 0 where a norm is 0."""
    return _GeluGRN.apply(h, gamma, beta, eps)


class _GeluGRN(torch.autograd.Function):
    """Keeps h and the norms; GELU is computed again in the backward pass, which saves a map of c channels.

    Buffers are used again where they can be: on a CPU, fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        y = F.gelu(h)
        squares = y.to(torch.promote_types(h.dtype, torch.float32)).square()
        norm = squares.sum(1).sqrt()  # (b, c)
        ctx.save_for_backward(h, norm, gamma)
        ctx.eps = eps
        scale = 1 + gamma * norm / (norm.mean(dim=-1, keepdim=True) + eps)
        out = squares if squares.dtype == h.dtype else None
        return torch.addcmul(beta.to(h.dtype), y, scale[:, None].to(h.dtype), out=out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad = grads[0]
        h, norm, gamma = ctx.saved_tensors
        mean = norm.mean(dim=-1, keepdim=True) + ctx.eps
        response = norm / mean
        y = F.gelu(h)
        buffer = grad * y
        t = buffer.sum(1, dtype=norm.dtype)  # (b, c)
        u = gamma * t
        grad_norm = u / mean - (u * norm).mean(dim=-1, keepdim=True) / mean**2
        along = torch.where(norm > 0, grad_norm / norm, 0.0)
        scale = 1 + gamma * response
        grad_y = torch.mul(y, along[:, None].to(y.dtype), out=buffer).addcmul_(grad, scale[:, None].to(y.dtype))
        grad_h = torch.ops.aten.gelu_backward.grad_input(grad_y, h, grad_input=grad_y)
        grad_gamma = (response * t).sum(0).to(gamma.dtype)
        return grad_h, grad_gamma, grad.sum((0, 1), dtype=norm.dtype).to(gamma.dtype), None


def _sums_like(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[2], dtype=torch.promote_types(h.dtype, torch.float32))


def _wide_gelu(h: Tensor) -> Tensor:
    return F.gelu(h.to(torch.promote_types(h.dtype, torch.float32)))


@operation(fake=lambda h: _sums_like(h))
def gelu_square_sums(h: Tensor) -> Tensor:
    """Return sum_n y^2 (b, c), at least float32, of h (b, n, c)."""
    return _wide_gelu(h).square().sum(1)


@operation(fake=lambda h, *_: h.new_empty(h.shape))
def gelu_scale(h: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """Return beta + scale y (b, n, c) in h's dtype; h (b, n, c), scale (b, c) at least float32, beta (c,)."""
    return (beta + scale[:, None] * _wide_gelu(h)).to(h.dtype).contiguous()


@operation(fake=lambda h, _: (_sums_like(h), _sums_like(h)))
def gelu_grad_sums(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return t = sum_n g y and sum_n g, (b, c) each, at least float32; h and grad (b, n, c) of one dtype."""
    y = _wide_gelu(h)
    g = grad.to(y.dtype)
    return (g * y).sum(1), g.sum(1)


@operation(fake=lambda h, *_: (h.new_empty(h.shape), h.new_empty(h.shape), _sums_like(h)))
def gelu_grn_backward(
    h: Tensor, grad: Tensor, scale: Tensor, along: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh = dy gelu'(h) with dy = scale g + along y, once more out = beta + scale y, and sum_n dh.

    dh and out are (b, n, c) in h's dtype, the sums (b, c) at least float32.

    Args:
        h, grad: (b, n, c), of one dtype; grad is the gradient of out.
        scale, along: s and dn / n above, (b, c), at least float32.
        beta: (c,).
    """
    y = _wide_gelu(h)
    grad_y = scale[:, None] * grad + along[:, None] * y
    grad_h = torch.ops.aten.gelu_backward(grad_y, h.to(y.dtype))
    out = beta + scale[:, None] * y
    return grad_h.to(h.dtype).contiguous(), out.to(h.dtype).contiguous(), grad_h.sum(1)
