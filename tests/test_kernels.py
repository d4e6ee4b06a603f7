"""Fused operations agree with the obvious ones beside them, forward and gradient."""

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from fcmae.ops.grn_mlp import grn_mlp, grn_mlp_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""bfloat16 keeps 8 bits, and each version rounds in other places."""


def inputs(b: int, n: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of `grn_mlp`: x (b, n, c) in this dtype, parameters in at least float32."""
    wide, full = 2 * c + 1, torch.promote_types(dtype, torch.float32)
    shapes = [(c,), (c,), (wide, c), (wide,), (wide,), (wide,), (c, wide), (c,)]
    x = torch.randn(b, n, c, dtype=torch.float64).to(dtype)
    return [tensor.requires_grad_() for tensor in (x, *(torch.randn(shape, dtype=full) for shape in shapes))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 8), (3, 7, 5), (2, 304, 40), (1, 49, 33)])
def test_grn_mlp_equals_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]  # what both versions round
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = grn_mlp(*tensors, 1e-6)  # pyright: ignore[reportArgumentType, reportCallIssue]
    reference = grn_mlp_reference(*exact, 1e-6)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert out.dtype == dtype
    fast = [out.detach(), *torch.autograd.grad(out, tensors, weight)]
    slow = [reference.detach(), *torch.autograd.grad(reference, exact, weight.double())]
    assert [tensor.dtype for tensor in fast[1:]] == [tensor.dtype for tensor in tensors]
    for ours, theirs in zip(fast, slow, strict=True):
        assert relative_error(ours.double(), theirs) <= TOLERANCE[dtype]


def test_grn_mlp_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *tensors: grn_mlp(*tensors, 1e-6), inputs(2, 3, 4, torch.float64))  # pyright: ignore[reportCallIssue]


def test_grn_mlp_has_finite_gradients_where_channels_are_zero() -> None:
    x, norm_weight, norm_bias, w1, b1, *others = inputs(2, 5, 4, torch.float64)
    with torch.no_grad():
        b1.zero_()
        norm_bias.zero_()
        w1[1] = 0  # a channel of zeros, everywhere
        x[1] = 0  # an image of zeros
    tensors = [x, norm_weight, norm_bias, w1, b1, *others]
    grads = torch.autograd.grad(grn_mlp(*tensors, 1e-6).sum(), tensors)  # pyright: ignore[reportCallIssue]
    assert all(grad.isfinite().all() for grad in grads)
