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

from fcmae.ops.operation import operation


def _padded(rows: Tensor) -> Tensor:
    """Rows with one of zeros after the last, where absent neighbours point."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def gather_depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """As `gather_depthwise`, every neighbour of every row at once, gradients left to autograd."""
    return torch.einsum("knc,kc->nc", _padded(x)[neighbours], weight) + bias


@operation(fake=lambda x, *_: x.new_empty(x.shape))
def gather_depthwise(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """Return the depthwise convolution (n, c), in x's dtype; differentiable in x, weight and bias.

    Args:
        x: (n, c), n at least 1.
        weight: (k, c), k odd.
        bias: (c,).
        neighbours: int64 (k, n), the row that offset j of row i reads, n where there is none; the offsets of an
            odd centred kernel in an order that the centre mirrors, so that neighbours[k - 1 - j] undoes j.
    """
    padded = _padded(x)
    out = bias.expand_as(x).clone()
    for row_weight, rows in zip(weight.contiguous(), neighbours, strict=True):
        out.addcmul_(padded.index_select(0, rows), row_weight)
    return out


@operation(fake=lambda x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
def gather_depthwise_backward(x: Tensor, weight: Tensor, grad: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, from that of the output."""
    padded, weight = _padded(grad), weight.contiguous()
    grad_x = x.new_zeros(x.shape)
    grad_weight = weight.new_empty(weight.shape)
    for j, rows in enumerate(neighbours.flip(0)):
        gathered = padded.index_select(0, rows)
        grad_x.addcmul_(gathered, weight[j])
        torch.sum(gathered.mul_(x), 0, out=grad_weight[j])
    return grad_x, grad_weight


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _, neighbours = inputs
    ctx.save_for_backward(x, weight, neighbours)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, neighbours = ctx.saved_tensors
    return *gather_depthwise_backward(x, weight, grad, neighbours), grad.sum(0), None


gather_depthwise.register_autograd(_backward, setup_context=_keep)
