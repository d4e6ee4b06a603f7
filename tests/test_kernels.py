"""Fused operations agree with the obvious ones beside them, forward and gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor

from fcmae.encoder.kernels.gather_depthwise import gather_depthwise, gather_depthwise_reference
from fcmae.encoder.kernels.mlp import grn_mlp, grn_mlp_reference

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


def neighbour_table(b: int, h: int, w: int, k: int) -> Tensor:
    """The table (k * k, n) of a k x k kernel over a random two thirds of the sites of b maps, in torch's order."""
    active = torch.rand(b, h, w) < 2 / 3
    active[0, 0, 0] = True
    n = int(active.sum())
    rows = torch.full(active.shape, n)
    rows[active] = torch.arange(n)
    around = F.pad(rows, [k // 2] * 4, value=n).unfold(1, k, 1).unfold(2, k, 1)
    return around[active].flatten(1).t().contiguous()


def convolve_by_triton(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """`gather_depthwise` by its Triton kernels on any device: in Triton's interpreter on a CPU."""
    pytest.importorskip("triton", reason="needs Triton")
    from fcmae.encoder.kernels import gather_depthwise_triton as kernels

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return kernels.convolve(x, weight, bias, neighbours)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return *kernels.differentiate(x, weight, grads[0].contiguous(), neighbours), grads[0].sum(0)

    return Function.apply(x, weight, bias)


@pytest.mark.parametrize("version", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 1), (2, 5, 4, 3, 8), (1, 7, 9, 7, 37)])
def test_gather_depthwise_equals_its_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, version: str
) -> None:
    device = "cuda" if torch.cuda.is_available() and version == "triton" else "cpu"
    b, h, w, k, c = shape
    neighbours = neighbour_table(b, h, w, k)
    n = neighbours.shape[1]
    drawn = [torch.randn(size, dtype=torch.float64).to(device, dtype) for size in ((n, c), (k * k, c), (c,))]
    weight = torch.randn(n, c, dtype=torch.float64).to(device, dtype)
    neighbours = neighbours.to(device)
    fast = gather_depthwise if version == "torch" else convolve_by_triton
    results = []
    for function, precision in ((fast, dtype), (gather_depthwise_reference, torch.float64)):
        tensors = [tensor.to(precision).requires_grad_() for tensor in drawn]
        out = function(tensors[0], tensors[1], tensors[2], neighbours)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, weight.to(precision))])
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.double(), reference) <= TOLERANCE[dtype]


def test_gather_depthwise_is_a_depthwise_convolution_where_all_sites_are_there() -> None:
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    conv = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4).double()
    rows = torch.arange(60).view(2, 5, 6)
    neighbours = F.pad(rows, (3, 3, 3, 3), value=60).unfold(1, 7, 1).unfold(2, 7, 1).reshape(60, 49).t()
    assert conv.bias is not None
    out = gather_depthwise(x.flatten(0, 2), conv.weight.flatten(1).t(), conv.bias, neighbours)
    assert relative_error(out.view(2, 5, 6, 4), conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) <= 1e-12
