"""Depthwise convolution of rows through a neighbour table, for sites that lie anywhere.

    out[i] = bias + sum_j weight[j] * x[neighbours[j, i]]        (absent neighbours count as zero)
    grad_x[i] = sum_j weight[j] * grad[neighbours[k - 1 - j, i]]
    grad_weight[j] = sum_i x[i] * grad[neighbours[k - 1 - j, i]]

The table is of an odd kernel between the same sites, so offset k - 1 - j leads back where offset j came from:
both gradients gather, nothing is scattered or added atomically, and sums have one order.
"""

from typing import Any

import torch
from torch import Tensor


def gather_depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """As `gather_depthwise`, every neighbour of every row at once, gradients left to autograd."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return torch.einsum("knc,kc->nc", padded[neighbours], weight) + bias


def gather_depthwise(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """Return the depthwise convolution (n, c), in x's dtype; on CUDA by Triton kernels.

    Args:
        x: (n, c), n at least 1.
        weight: (k, c), k odd.
        bias: (c,).
        neighbours: int64 (k, n), the row that offset j of row i reads, n where there is none; the offsets of an
            odd centred kernel in an order that the centre mirrors, so that neighbours[k - 1 - j] undoes j.
    """
    return _GatherDepthwise.apply(x, weight, bias, neighbours)


class _GatherDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, neighbours)
        if x.is_cuda:
            from fcmae.encoder.kernels.gather_depthwise_triton import convolve  # Triton is not everywhere

            return convolve(x, weight, bias, neighbours)
        return _convolve(x, weight, bias, neighbours)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, neighbours = ctx.saved_tensors
        grad = grads[0].contiguous()
        if x.is_cuda:
            from fcmae.encoder.kernels.gather_depthwise_triton import differentiate

            grad_x, grad_weight = differentiate(x, weight, grad, neighbours)
        else:
            grad_x, grad_weight = _differentiate(x, weight, grad, neighbours)
        return grad_x, grad_weight, grad.sum(0), None


def _padded(rows: Tensor) -> Tensor:
    """Rows with one of zeros after the last, where absent neighbours point."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    padded = _padded(x)
    out = bias.expand_as(x).clone()
    for row_weight, rows in zip(weight, neighbours, strict=True):
        out.addcmul_(padded.index_select(0, rows), row_weight)
    return out


def _differentiate(x: Tensor, weight: Tensor, grad: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    padded = _padded(grad)
    grad_x = torch.zeros_like(x)
    grad_weight = torch.empty_like(weight)
    for j, rows in enumerate(neighbours.flip(0)):
        gathered = padded.index_select(0, rows)
        grad_x.addcmul_(gathered, weight[j])
        torch.sum(gathered.mul_(x), 0, out=grad_weight[j])
    return grad_x, grad_weight
