"""GELU followed by GRN over sites that are all active, fused: two passes and one stored map instead of many.

With y = gelu(h), n = ||y|| over the sites of an image, r = n / (mean_c n + eps):

    out = beta + s y,    s = 1 + gamma r

and backward, with g the gradient of out, t = sum_sites g y, u = gamma t:

    dn = u / (mean n + eps) - mean_c(u n) / (mean n + eps)^2
    dy = s g + (dn / n) y,    dn / n taken as 0 where n = 0
    dgamma = sum_images r t,    dbeta = sum g
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_grn_reference(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """GRN(GELU(h)) of h (b, n, c) over the n sites of each image (paper, Algorithm 1); gamma, beta (c,)."""
    y = F.gelu(h)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return gamma * (y * response) + beta + y


def gelu_grn_forward(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (out, norm): `gelu_grn_reference` in h's dtype, and ||y|| (b, c) in at least float32."""
    y = F.gelu(h)
    squares = y.to(torch.promote_types(h.dtype, torch.float32)).square()
    norm = squares.sum(1).sqrt()
    scale = 1 + gamma * norm / (norm.mean(dim=-1, keepdim=True) + eps)
    out = squares if squares.dtype == h.dtype else None  # on a CPU, fresh memory costs more than arithmetic
    return torch.addcmul(beta.to(h.dtype), y, scale[:, None].to(h.dtype), out=out), norm


def gelu_grn_backward(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return grad_h, out once more, and grad_gamma, grad_beta and the sum of grad_h over images and sites: each (c,).

    Args:
        grad: of out, (b, n, c); used as a buffer.
        h: (b, n, c).
        norm: (b, c), as `gelu_grn_forward` returned it; a gradient through it is 0 where it is 0.
        gamma, beta: (c,).
        eps: of GRN.
    """
    mean = norm.mean(dim=-1, keepdim=True) + eps
    response = norm / mean
    y = F.gelu(h)
    buffer = grad * y
    t = buffer.sum(1, dtype=norm.dtype)  # (b, c)
    u = gamma * t
    grad_norm = u / mean - (u * norm).mean(dim=-1, keepdim=True) / mean**2
    along = torch.where(norm > 0, grad_norm / norm, 0.0)[:, None].to(y.dtype)
    scale = (1 + gamma * response)[:, None].to(y.dtype)
    grad_beta = grad.sum((0, 1), dtype=norm.dtype)
    out = torch.addcmul(beta.to(y.dtype), y, scale, out=buffer)
    grad_y = grad.mul_(scale).addcmul_(y, along)
    grad_h = torch.ops.aten.gelu_backward.grad_input(grad_y, h, grad_input=grad_y)
    return grad_h, out, (response * t).sum(0), grad_beta, grad_h.sum((0, 1), dtype=norm.dtype)
