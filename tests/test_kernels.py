"""Fused operations agree with the obvious ones beside them, forward and gradient."""

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from fcmae.encoder.kernels.gelu_grn import gelu_grn, gelu_grn_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""bfloat16 keeps 8 bits, and each version rounds in other places."""


def inputs(b: int, n: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    h = torch.randn(b, n, c, dtype=torch.float64).to(dtype)
    parameters = [torch.randn(c, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (h, *parameters)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 8), (3, 7, 5), (2, 304, 160), (1, 49, 33)])
def test_gelu_grn_equals_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype)
    weight = torch.randn(shape, dtype=dtype)
    results = []
    for function in (gelu_grn, gelu_grn_reference):
        out = function(tensors[0], tensors[1], tensors[2], 1e-6)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, weight.to(out.dtype))])
    for fast, reference in zip(*results, strict=True):
        assert relative_error(fast.double(), reference.double()) <= TOLERANCE[dtype]


def test_gelu_grn_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(
        lambda h, gamma, beta: gelu_grn(h, gamma, beta, 1e-6), inputs(2, 3, 4, torch.float64)
    )


def test_gelu_grn_has_zero_gradients_along_channels_of_zeros() -> None:
    h, gamma, beta = inputs(2, 5, 4, torch.float64)
    with torch.no_grad():
        h[0, :, 1] = 0
        h[1] = 0
    grads = torch.autograd.grad(gelu_grn(h, gamma, beta, 1e-6).sum(), (h, gamma, beta))
    assert all(grad.isfinite().all() for grad in grads)
