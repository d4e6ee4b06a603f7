"""GELU followed by GRN over sites that are all active, in a few passes over the map.

With y = gelu(h), n = ||y|| over the sites of an image, r = n / (mean_c n + eps):

    out = beta + s y,    s = 1 + gamma r

and backward, with g the gradient of out, t = sum_sites g y, u = gamma t:

    dn = u / (mean n + eps) - mean_c(u n) / (mean n + eps)^2
    dy = s g + (dn / n) y,    dn / n taken as 0 where n = 0
    dgamma = sum_images r t,    dbeta = sum g,    dh = dy gelu'(h)

On CUDA both are one operation each, of a few Triton kernels that compute y again rather than read it. Elsewhere
PyTorch's own operations are fast enough once their buffers are used again: on a CPU, fresh memory costs more than
the arithmetic, and `torch.compile` fuses what it can see.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.ops.operation import composition, operation


def gelu_grn_reference(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """GRN(GELU(h)) of h (b, n, c) over the n sites of each image (paper, Algorithm 1); gamma, beta (c,)."""
    y = F.gelu(h)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return gamma * (y * response) + beta + y


def _scale(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """s (b, c)."""
    return 1 + gamma * norm / (norm.mean(-1, keepdim=True) + eps)


def _along(t: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """dn / n (b, c)."""
    mean = norm.mean(-1, keepdim=True) + eps
    u = gamma * t
    grad_norm = u / mean - (u * norm).mean(-1, keepdim=True) / mean**2
    return torch.where(norm > 0, grad_norm / norm, 0.0)


def _grad_gamma(t: Tensor, norm: Tensor, eps: float) -> Tensor:
    return (norm / (norm.mean(-1, keepdim=True) + eps) * t).sum(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_forward(h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[0], h.shape[-1], dtype=_wide(h.dtype))


@operation(fake=_fake_forward)
def gelu_grn(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (out, n): `gelu_grn_reference` in h's dtype, and the norms (b, c) in at least float32."""
    y = F.gelu(h.to(_wide(h.dtype)))
    norm = y.square().sum(1).sqrt()
    return (beta + _scale(norm, gamma, eps)[:, None] * y).to(h.dtype).contiguous(), norm


def _fake_backward(grad: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(3, h.shape[-1], dtype=_wide(h.dtype))


@operation(fake=_fake_backward)
def gelu_grn_backward(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, out once more, and (dgamma, dbeta, the sum of dh over images and sites) as (3, c).

    Args:
        grad: of out, (b, n, c), of h's dtype.
        h: (b, n, c).
        norm: (b, c), as `gelu_grn` returned it.
        gamma, beta: (c,).
        eps: of GRN.
    """
    wide = h.to(norm.dtype)
    y, g = F.gelu(wide), grad.to(norm.dtype)
    t = (g * y).sum(1)
    scale, along = (vector[:, None] for vector in (_scale(norm, gamma, eps), _along(t, norm, gamma, eps)))
    grad_h = torch.ops.aten.gelu_backward(scale * g + along * y, wide)
    sums = torch.stack([_grad_gamma(t, norm, eps), g.sum((0, 1)), grad_h.sum((0, 1))])
    return grad_h.to(h.dtype).contiguous(), (beta + scale * y).to(h.dtype).contiguous(), sums


@composition(cuda=gelu_grn)
def gelu_grn_forward(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `gelu_grn`, in buffers that are used again."""
    y = F.gelu(h)
    squares = y.to(_wide(h.dtype)).square()
    norm = squares.sum(1).sqrt()
    out = squares if squares.dtype == h.dtype else None
    return torch.addcmul(beta.to(h.dtype), y, _scale(norm, gamma, eps)[:, None].to(h.dtype), out=out), norm


@composition(cuda=gelu_grn_backward)
def gelu_grn_gradients(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gelu_grn_backward`, in buffers that are used again: grad may be overwritten."""
    y = F.gelu(h)
    buffer = grad * y
    t = buffer.sum(1, dtype=norm.dtype)  # (b, c)
    grad_beta = grad.sum((0, 1), dtype=norm.dtype)
    scale = _scale(norm, gamma, eps)[:, None].to(y.dtype)
    along = _along(t, norm, gamma, eps)[:, None].to(y.dtype)
    out = torch.addcmul(beta.to(y.dtype), y, scale, out=buffer)
    grad_y = grad.mul_(scale).addcmul_(y, along)
    grad_h = torch.ops.aten.gelu_backward.grad_input(grad_y, h, grad_input=grad_y)
    sums = torch.stack([_grad_gamma(t, norm, eps), grad_beta, grad_h.sum((0, 1), dtype=norm.dtype)])
    return grad_h, out, sums
