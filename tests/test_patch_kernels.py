"""Operations with a Triton side agree with obvious formulas by either side, forward and gradient, and compile."""

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module

import pytest
import torch
from conftest import relative_error, some_ids
from torch import Tensor
from torch.library import CustomOpDef, opcheck

from fcmae.encoder.kernels import patch_depthwise as depthwise
from fcmae.encoder.kernels.patch_depthwise import patch_depthwise, patch_depthwise_norm, patch_slots

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Sums have another order than the reference; bfloat16 keeps 8 bits, and the reference rounds nowhere."""

EPS = 1e-6

OPERATIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": op
    for module in (depthwise,)
    for name, op in vars(module).items()
    if isinstance(op, CustomOpDef)
}


@pytest.fixture(params=["formulas", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to compute: by the formulas on the CPU, then by the kernels, in Triton's interpreter if need be."""
    with ExitStack() as stack:
        if request.param == "triton":
            pytest.importorskip("triton", reason="needs Triton")
            if not torch.cuda.is_available():
                library = stack.enter_context(torch.library._scoped_library("fcmae", "IMPL"))
                for path, op in OPERATIONS.items():
                    module, name = path.split(".")
                    kernels = import_module(f"fcmae.encoder.kernels.{module}_triton")
                    library.impl(op._name, getattr(kernels, name), "CPU")
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def patches(b: int, grid: tuple[int, int], p: int, k: int, c: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Random x, weight, bias and a weighting of the output in float64, and visible ids."""
    shapes = [(b, p, k, k, c), (c, 1, size, size), (c,), (b, p, k, k, c)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], some_ids(b, grid[0] * grid[1], p)


def depthwise_of_images(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """The obvious version: each patch put where it belongs in an image of zeros, convolved, taken out again."""
    b, p, k, _, c = x.shape
    out = []
    for image_x, image_ids in zip(x, ids.tolist(), strict=True):
        image = x.new_zeros(c, grid[0] * k, grid[1] * k)
        corners = [(i // grid[1] * k, i % grid[1] * k) for i in image_ids]
        for patch, (top, left) in zip(image_x, corners, strict=True):
            image[:, top : top + k, left : left + k] = patch.permute(2, 0, 1)
        conv = torch.nn.functional.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=c)
        out += [conv[:, top : top + k, left : left + k].permute(1, 2, 0) for top, left in corners]
    return torch.stack(out).view(b, p, k, k, c)


PATCHES = {
    # what is odd: (b, grid, p, k, c, K)
    "1x1 sites, 3 channels": (2, (2, 4), 3, 1, 3, 7),
    "2x2 sites, 100 channels": (1, (2, 3), 2, 2, 100, 7),
    "4x4 sites, 40 channels": (1, (1, 2), 1, 4, 40, 7),
    "8x8 sites, 1 channel, one patch": (1, (1, 1), 1, 8, 1, 7),
    "all visible": (1, (2, 2), 4, 2, 5, 7),
    "small kernel": (2, (3, 2), 3, 2, 4, 3),
    "more channels than a program": (1, (1, 2), 1, 1, 200, 3),
}


@pytest.mark.parametrize(
    ("case", "norm", "dtype"),
    [(case, True, torch.float64) for case in PATCHES]
    + [(case, False, torch.float64) for case in ("small kernel", "more channels than a program")]
    + [("small kernel", norm, dtype) for norm in (False, True) for dtype in (torch.float32, torch.bfloat16)],
)
def test_patch_depthwise_equals_a_convolution_of_images(
    case: str, norm: bool, dtype: torch.dtype, device: str
) -> None:
    grid = PATCHES[case][1]
    drawn, ids = patches(*PATCHES[case])
    drawn = [tensor.to(dtype) for tensor in drawn]
    reference = [tensor.double().requires_grad_() for tensor in drawn[:3]]
    expected = depthwise_of_images(reference[0], reference[1], reference[2], ids, grid)
    if norm:
        expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=EPS)
    expected_grads = torch.autograd.grad(expected, reference, drawn[3].double())

    tensors = [tensor.to(device).requires_grad_() for tensor in drawn[:3]]
    on_device = ids.to(device)
    slots = patch_slots(on_device, grid[0] * grid[1])
    if norm:
        out = patch_depthwise_norm(tensors[0], tensors[1], tensors[2], on_device, slots, grid, EPS)
    else:
        out = patch_depthwise(tensors[0], tensors[1], tensors[2], on_device, slots, grid)
    grads = torch.autograd.grad(out, tensors, drawn[3].to(device))
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.double().cpu(), theirs) <= TOLERANCE[dtype]
