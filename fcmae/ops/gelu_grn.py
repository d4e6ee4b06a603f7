"""GELU followed by GRN over sites that are all active, in a few passes over the map.

With y = gelu(h), n = ||y|| over the sites of an image, r = n / (mean_c n + eps):

    out = beta + s y,    s = 1 + gamma r

and backward, with g the gradient of out, t = sum_sites g y, u = gamma t:

    dn = u / (mean n + eps) - mean_c(u n) / (mean n + eps)^2
    dy = s g + (dn / n) y,    dn / n taken as 0 where n = 0
    dgamma = sum_images r t,    dbeta = sum g,    dh = dy gelu'(h)

On CUDA each pass is a Triton kernel that computes y again rather than read it. Elsewhere PyTorch's own operations
are fast enough once their buffers are used again: on a CPU, fresh memory costs more than the arithmetic.
"""

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


def forward_by_passes(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `gelu_grn_forward`, pass by pass."""
    norm = gelu_square_sums(h).sqrt()
    return gelu_scale(h, _scale(norm, gamma, eps), beta), norm


def gradients_by_passes(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `gelu_grn_gradients`, pass by pass."""
    t, grad_beta = gelu_grad_sums(h, grad)
    scale, along = _scale(norm, gamma, eps), _along(t, norm, gamma, eps)
    grad_h, out, sums = gelu_grn_backward(h, grad, scale, along, beta)
    return grad_h, out, _grad_gamma(t, norm, eps), grad_beta.sum(0), sums.sum(0)


@composition(cuda=forward_by_passes)
def gelu_grn_forward(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (out, n): `gelu_grn_reference` in h's dtype, and the norms (b, c) in at least float32."""
    y = F.gelu(h)
    squares = y.to(torch.promote_types(h.dtype, torch.float32)).square()
    norm = squares.sum(1).sqrt()
    out = squares if squares.dtype == h.dtype else None
    return torch.addcmul(beta.to(h.dtype), y, _scale(norm, gamma, eps)[:, None].to(h.dtype), out=out), norm


@composition(cuda=gradients_by_passes)
def gelu_grn_gradients(
    grad: Tensor, h: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dh, out once more, and dgamma, dbeta and the sum of dh over images and sites: each (c,).

    Args:
        grad: of out, (b, n, c); may be overwritten.
        h: (b, n, c).
        norm: (b, c), as `gelu_grn_forward` returned it.
        gamma, beta: (c,).
        eps: of GRN.
    """
    y = F.gelu(h)
    buffer = grad * y
    t = buffer.sum(1, dtype=norm.dtype)  # (b, c)
    grad_beta = grad.sum((0, 1), dtype=norm.dtype)
    scale = _scale(norm, gamma, eps)[:, None].to(y.dtype)
    along = _along(t, norm, gamma, eps)[:, None].to(y.dtype)
    out = torch.addcmul(beta.to(y.dtype), y, scale, out=buffer)
    grad_y = grad.mul_(scale).addcmul_(y, along)
    grad_h = torch.ops.aten.gelu_backward.grad_input(grad_y, h, grad_input=grad_y)
    return grad_h, out, _grad_gamma(t, norm, eps), grad_beta, grad_h.sum((0, 1), dtype=norm.dtype)
