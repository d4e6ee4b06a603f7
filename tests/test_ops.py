"""Fused operations agree with plain formulas in each of their versions, forward and gradient, and compile."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, randomise, relative_error, some_ids
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import CustomOpDef, opcheck  # pyright: ignore[reportPrivateImportUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcmae.loss import hidden_patch_loss, patch_statistics
from fcmae.masking import hidden_ids
from fcmae.model import FCMAE
from fcmae.ops import gather_depthwise, gelu_grn, grn_mlp, patch_depthwise, patch_loss
from fcmae.patches import patchify

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Sums have another order than the reference; bfloat16 keeps 8 bits, and the reference rounds nowhere."""

GATHER_TOLERANCE = TOLERANCE | {torch.bfloat16: 5e-2}
"""Its formulas on a CPU accumulate in bfloat16."""

MLP_TOLERANCE = TOLERANCE | {torch.bfloat16: 5e-2}
"""Each version rounds to bfloat16 in other places."""

EPS = 1e-6

OPERATIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": op
    for module in (gather_depthwise, gelu_grn, grn_mlp, patch_depthwise, patch_loss)
    for name, op in vars(module).items()
    if isinstance(op, CustomOpDef)
}


def triton_side(path: str) -> Callable[..., Any]:
    """The function that runs an operation on CUDA."""
    module, name = path.split(".")
    return getattr(import_module(f"fcmae.ops.{module}_triton"), name)


@pytest.fixture(params=["formulas", "cpu", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where to compute: by the formulas, as on a CPU, and by Triton's kernels, in its interpreter if need be.

    Sums are split among a few programs only, so that each has more than one turn of its loop even here.
    """
    with ExitStack() as stack:
        if request.param == "formulas":
            library = stack.enter_context(torch.library._scoped_library("fcmae", "IMPL"))
            for op in OPERATIONS.values():
                library.impl(op._name, op._init_fn, "CPU", allow_override=True)
        if request.param == "triton":
            pytest.importorskip("triton", reason="needs Triton")
            kernels = "fcmae.ops"
            monkeypatch.setattr(f"{kernels}.patch_depthwise_triton.WEIGHT_PROGRAMS", 3)
            monkeypatch.setattr(f"{kernels}.gelu_grn_triton.PROGRAMS", 4)
            monkeypatch.setattr(f"{kernels}.gelu_grn_triton.VALUES", 256)
            if not torch.cuda.is_available():
                library = stack.enter_context(torch.library._scoped_library("fcmae", "IMPL"))
                for path, op in OPERATIONS.items():
                    library.impl(op._name, triton_side(path), "CPU", allow_override=True)
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def neighbour_table(b: int, h: int, w: int, k: int) -> Tensor:
    """The table (k * k, n) of a k x k kernel over a random two thirds of the sites of b maps, in torch's order."""
    active = torch.rand(b, h, w) < 2 / 3
    active[0, 0, 0] = True
    n = int(active.sum())
    rows = torch.full(active.shape, n)
    rows[active] = torch.arange(n)
    around = F.pad(rows, [k // 2] * 4, value=n).unfold(1, k, 1).unfold(2, k, 1)
    return around[active].flatten(1).t().contiguous()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 5, 4, 3, 8), dtype) for dtype in TOLERANCE]
    + [(shape, torch.float64) for shape in ((1, 1, 1, 3, 1), (1, 7, 9, 7, 37))],
)
def test_gather_depthwise_equals_its_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    b, h, w, k, c = shape
    neighbours = neighbour_table(b, h, w, k)
    n = neighbours.shape[1]
    drawn = [torch.randn(size, dtype=torch.float64).to(dtype) for size in ((n, c), (k * k, c), (c,), (n, c))]
    results = []
    for function, place, precision in (
        (gather_depthwise.gather_depthwise, device, dtype),
        (gather_depthwise.gather_depthwise_reference, "cpu", torch.float64),
    ):
        tensors = [tensor.to(place, precision).requires_grad_() for tensor in drawn[:3]]
        out = function(tensors[0], tensors[1], tensors[2], neighbours.to(place))
        results.append([out.detach(), *torch.autograd.grad(out, tensors, drawn[3].to(place, precision))])
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.double().cpu(), reference) <= GATHER_TOLERANCE[dtype]


def test_gather_depthwise_is_a_depthwise_convolution_where_all_sites_are_there() -> None:
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    conv = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4).double()
    rows = torch.arange(60).view(2, 5, 6)
    neighbours = F.pad(rows, (3, 3, 3, 3), value=60).unfold(1, 7, 1).unfold(2, 7, 1).reshape(60, 49).t()
    assert conv.bias is not None
    out = gather_depthwise.gather_depthwise(x.flatten(0, 2), conv.weight.flatten(1).t(), conv.bias, neighbours)
    assert relative_error(out.view(2, 5, 6, 4), conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) <= 1e-12


def patches(b: int, grid: tuple[int, int], p: int, k: int, c: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Random x, weight, bias and a weighting of the output in float64, and visible ids."""
    shapes = [(b, p, k, k, c), (c, 1, size, size), (c,), (b, p, k, k, c)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], some_ids(b, grid[0] * grid[1], p)


def depthwise_of_images(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """The plain version: each patch is put where it belongs in an image of zeros, convolved and taken out again."""
    b, p, k, _, c = x.shape
    out = []
    for image_x, image_ids in zip(x, ids.tolist(), strict=True):
        image = x.new_zeros(c, grid[0] * k, grid[1] * k)
        corners = [(i // grid[1] * k, i % grid[1] * k) for i in image_ids]
        for patch, (top, left) in zip(image_x, corners, strict=True):
            image[:, top : top + k, left : left + k] = patch.permute(2, 0, 1)
        conv = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=c)
        out += [conv[:, top : top + k, left : left + k].permute(1, 2, 0) for top, left in corners]
    return torch.stack(out).view(b, p, k, k, c)


PATCHES = {
    # what is odd: (b, grid, p, k, c, K)
    "1x1 sites, 3 channels": (2, (2, 4), 3, 1, 3, 7),
    "2x2 sites, 100 channels": (1, (2, 3), 2, 2, 100, 7),
    "4x4 sites, 40 channels": (1, (1, 2), 1, 4, 40, 7),
    "8x8 sites": (1, (2, 1), 1, 8, 3, 7),
    "1 channel, one patch": (1, (1, 1), 1, 2, 1, 7),
    "all visible": (1, (2, 2), 4, 2, 5, 7),
    "small kernel": (2, (3, 2), 3, 2, 4, 3),
    "more channels than a program": (1, (1, 2), 1, 1, 200, 3),
}


@pytest.mark.parametrize(
    ("case", "norm", "dtype"),
    [(case, True, torch.float64) for case in PATCHES if "1 channel" not in case]  # of which the norm is 0
    + [(case, False, torch.float64) for case in ("1 channel, one patch", "more channels than a program")]
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
        expected = F.layer_norm(expected, expected.shape[-1:], eps=EPS)
    expected_grads = torch.autograd.grad(expected, reference, drawn[3].double())

    tensors = [tensor.to(device).requires_grad_() for tensor in drawn[:3]]
    on_device = ids.to(device)
    slots = patch_depthwise.patch_slots(on_device, grid[0] * grid[1])
    if norm:
        out = patch_depthwise.patch_depthwise_norm(tensors[0], tensors[1], tensors[2], on_device, slots, grid, EPS)
    else:
        out = patch_depthwise.patch_depthwise(tensors[0], tensors[1], tensors[2], on_device, slots, grid)
    grads = torch.autograd.grad(out, tensors, drawn[3].to(device))
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.double().cpu(), theirs) <= TOLERANCE[dtype]


GELU_SHAPES = [(1, 1, 1), (2, 3, 5), (1, 19, 70), (3, 8, 100)]


def maps(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Random h and gradient (b, n, c), gamma and beta (c,); parameters are at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        (2 * torch.randn(size, dtype=torch.float64)).to(kind)
        for size, kind in ((shape, dtype), (shape, dtype), (shape[2:], wide), (shape[2:], wide))
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", GELU_SHAPES)
def test_gelu_and_grn_equal_their_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    tensors = maps(shape, dtype)
    h, g, gamma, beta = (tensor.double().requires_grad_() for tensor in tensors)
    out = gelu_grn.gelu_grn_reference(h, gamma, beta, EPS)
    grad_h, *grads = torch.autograd.grad(out, (h, gamma, beta), g)
    norm = F.gelu(h).square().sum(1).sqrt()
    expected = [out, norm, grad_h, out, torch.stack([*grads, grad_h.sum((0, 1))])]

    h, g, gamma, beta = (tensor.to(device) for tensor in tensors)
    ours = [*gelu_grn.gelu_grn(h, gamma, beta, EPS)]
    ours += gelu_grn.gelu_grn_backward(g, h, ours[1], gamma, beta, EPS)
    assert [result.dtype for result in ours] == [dtype, beta.dtype, dtype, dtype, beta.dtype]
    for result, reference in zip(ours, expected, strict=True):
        assert relative_error(result.double().cpu(), reference.detach()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_the_kernels_gelu_has_the_stated_errors(device: str) -> None:
    """In the interpreter the same formula in float32, on a GPU with its own power of 2; against erfc in float64."""
    far = torch.tensor([-1e12, -1e4, -100, -12, 12, 100, 1e4, 1e12])
    h = torch.cat([far, torch.linspace(-8, 8, 64 * 64 - len(far))]).view(1, 64, 64)
    exact = h.double()
    below = torch.special.erfc(-exact * 0.5**0.5) / 2
    y = exact * below
    slope = below + exact * torch.exp(-exact.square() / 2) / (2 * torch.pi) ** 0.5
    h = h.to(device)
    nothing = h.new_zeros(64)  # gamma and beta with which GRN leaves its input as it is
    out, norm = gelu_grn.gelu_grn(h, nothing, nothing, EPS)
    grad, again, _ = gelu_grn.gelu_grn_backward(torch.ones_like(h), h, norm, nothing, nothing, EPS)
    low = (exact >= -8) & (exact < 0)
    for result in (out.double().cpu(), again.double().cpu()):
        assert ((result - y).abs() - 1.2e-7 * y.abs()).max() <= 5e-7  # and what float32 rounds off
        assert (result / y - 1).abs()[low].max() <= 2e-4
    assert (grad.double().cpu() - slope).abs().max() <= 2e-6


class AsOnCUDA(torch.autograd.Function):
    """GELU and GRN by the operations that run on CUDA."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        out, norm = gelu_grn.gelu_grn(h, gamma, beta, eps)
        ctx.save_for_backward(h, norm, gamma, beta)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, norm, gamma, beta = ctx.saved_tensors
        grad_h, _, sums = gelu_grn.gelu_grn_backward(grads[0], h, norm, gamma, beta, ctx.eps)
        return grad_h, sums[0], sums[1], None


LOSSES = {
    # what is odd: (b, channels, grid, patch, visible patches)
    "one hidden patch": (1, 3, (1, 2), 4, 1),
    "one channel": (2, 1, (3, 2), 8, 2),
    "four channels": (1, 4, (2, 4), 5, 3),
}


def hidden_patches(b: int, c: int, grid: tuple[int, int], patch: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random predictions of hidden patches, images that are NaN where visible, and hidden ids."""
    num_patches = grid[0] * grid[1]
    visible = some_ids(b, num_patches, p)
    images = 3 + torch.randn(b, c, grid[0] * patch, grid[1] * patch, dtype=torch.float64)
    cells = images.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))
    for image, row in enumerate(visible.tolist()):
        for i in row:
            cells[image, :, i // grid[1], :, i % grid[1]] = torch.nan
    pred = torch.randn(b, num_patches - p, patch * patch * c, dtype=torch.float64)
    return pred, images, hidden_ids(visible, num_patches)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_equals_its_formula(case: str, norm_pix_loss: bool, dtype: torch.dtype, device: str) -> None:
    b, c, grid, patch, p = LOSSES[case]
    drawn, images, hidden = hidden_patches(b, c, grid, patch, p)
    drawn, images = drawn.to(dtype), images.float().contiguous(memory_format=torch.channels_last)
    pred = drawn.double().requires_grad_()
    target = patchify(images.double(), patch)[torch.arange(b)[:, None], hidden]
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    expected = F.mse_loss(pred, target)
    (expected_grad,) = torch.autograd.grad(3 * expected, pred)

    pred = drawn.to(device).requires_grad_()
    loss = hidden_patch_loss(pred, images.to(device), hidden.to(device), patch, norm_pix_loss=norm_pix_loss)
    (grad,) = torch.autograd.grad(3 * loss, pred)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    assert relative_error(loss.double().cpu(), expected) <= min(TOLERANCE[dtype], 1e-4)  # pred is the same
    assert relative_error(grad.double().cpu(), expected_grad) <= TOLERANCE[dtype]


def mlp_tensors(b: int, n: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of `grn_mlp`: x (b, n, c) in this dtype, parameters in at least float32."""
    wide, full = 2 * c + 1, torch.promote_types(dtype, torch.float32)
    shapes = [(c,), (c,), (wide, c), (wide,), (wide,), (wide,), (c, wide), (c,)]
    x = torch.randn(b, n, c, dtype=torch.float64).to(dtype)
    return [tensor.requires_grad_() for tensor in (x, *(torch.randn(shape, dtype=full) for shape in shapes))]


@pytest.mark.parametrize("dtype", MLP_TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 8), (3, 7, 5), (2, 304, 40), (1, 49, 33)])
def test_grn_mlp_equals_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = mlp_tensors(*shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]  # what both versions round
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = grn_mlp.grn_mlp(*tensors, EPS)  # pyright: ignore[reportArgumentType, reportCallIssue]
    reference = grn_mlp.grn_mlp_reference(*exact, EPS)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert out.dtype == dtype
    fast = [out.detach(), *torch.autograd.grad(out, tensors, weight)]
    slow = [reference.detach(), *torch.autograd.grad(reference, exact, weight.double())]
    assert [tensor.dtype for tensor in fast[1:]] == [tensor.dtype for tensor in tensors]
    for ours, theirs in zip(fast, slow, strict=True):
        assert relative_error(ours.double(), theirs) <= MLP_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("c", [1, 5, 300])
def test_folded_parameters_and_their_gradients_equal_autograds(c: int, dtype: torch.dtype, device: str) -> None:
    """In bfloat16 the parameters are float32, as under autocast."""
    _, norm_weight, norm_bias, w1, b1, _, _, w2, b2 = mlp_tensors(1, 1, c, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (norm_weight, norm_bias, w1, b1)]
    expected = [exact[2] * exact[0], exact[3] + exact[2] @ exact[1]]
    grads = [torch.randn(tensor.shape, dtype=w1.dtype) for tensor in expected]
    expected += [w2, b2, *torch.autograd.grad(expected, exact[:3], [grad.double() for grad in grads])]

    given = [tensor.detach().to(device) for tensor in (norm_weight, norm_bias, w1, b1, w2, b2)]
    ours = [*grn_mlp.fold_norm(*given, dtype)]
    grad_w1, sums = grn_mlp.fold_norm_backward(*(grad.to(device) for grad in grads), *given[:3])
    for folded in ours:
        assert folded.dtype == dtype
    assert grad_w1.dtype == sums.dtype == w1.dtype
    for result, reference in zip([*ours, *sums, grad_w1], expected, strict=True):
        assert relative_error(result.double().cpu(), reference.detach().double()) <= TOLERANCE[dtype]


def test_grn_mlp_passes_gradcheck() -> None:
    tensors = mlp_tensors(2, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: grn_mlp.grn_mlp(*tensors, EPS), tensors)  # pyright: ignore[reportCallIssue]


def test_grn_mlp_has_finite_gradients_where_channels_are_zero() -> None:
    x, norm_weight, norm_bias, w1, b1, *others = mlp_tensors(2, 5, 4, torch.float64)
    with torch.no_grad():
        b1.zero_()
        norm_bias.zero_()
        w1[1] = 0  # a channel of zeros, everywhere
        x[1] = 0  # an image of zeros
    tensors = [x, norm_weight, norm_bias, w1, b1, *others]
    grads = torch.autograd.grad(grn_mlp.grn_mlp(*tensors, EPS).sum(), tensors)  # pyright: ignore[reportCallIssue]
    assert all(grad.isfinite().all() for grad in grads)


def examples(device: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each differentiable function with float32 tensors: all of floating type are to be differentiated by."""
    grid, p = (2, 2), 2
    (x, weight, bias, _), ids = patches(2, grid, p, 2, 3, 3)
    slots = patch_depthwise.patch_slots(ids, 4)
    h, _, gamma, beta = maps((2, 3, 5), torch.float32)
    pred, images, hidden = hidden_patches(2, 3, grid, 4, p)
    neighbours = neighbour_table(1, 2, 3, 3)
    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "rows": (
            gather_depthwise.gather_depthwise,
            [torch.randn(neighbours.shape[1], 5), torch.randn(9, 5), torch.randn(5), neighbours],
        ),
        "mlp": (lambda *tensors: grn_mlp.grn_mlp(*tensors, EPS), mlp_tensors(2, 3, 4, torch.float32)),  # pyright: ignore[reportCallIssue]
        "errors": (
            lambda pred, hidden: patch_loss.patch_errors(pred, images.to(device), hidden, 4, True, EPS)[0],
            [pred, hidden],
        ),
        "depthwise": (
            lambda x, weight, ids, slots: patch_depthwise.patch_depthwise(x, weight, None, ids, slots, grid),
            [x, weight, ids, slots],
        ),
        "depthwise and norm": (
            lambda x, weight, bias, ids, slots: patch_depthwise.patch_depthwise_norm(
                x, weight, bias, ids, slots, grid, EPS
            ),
            [x, weight, bias, ids, slots],
        ),
        "gelu and grn": (lambda h, gamma, beta: AsOnCUDA.apply(h, gamma, beta, EPS), [h, gamma, beta]),
        "loss": (
            lambda pred, hidden: hidden_patch_loss(pred, images.float().to(device), hidden, 4, norm_pix_loss=True),
            [pred, hidden],
        ),
    }
    for _, tensors in cases.values():
        for i, tensor in enumerate(tensors):
            wide = tensor.is_floating_point()
            tensors[i] = tensor.detach().to(device, torch.float32 if wide else None).requires_grad_(wide)
    return cases


@pytest.mark.parametrize("name", ["depthwise", "depthwise and norm", "gelu and grn", "loss"])
def test_every_differentiable_function_compiles(name: str, device: str) -> None:
    function, tensors = examples(device)[name]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    results = []
    torch._dynamo.reset()
    for version in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = (version(*tensors) ** 2).sum()
        results.append((out, *torch.autograd.grad(out, wanted)))
    for compiled, eager in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-5  # the same kernels and formulas on the same numbers


def test_gelu_and_grn_are_differentiated_as_their_reference(device: str) -> None:
    function, tensors = examples(device)["gelu and grn"]
    results = []
    for version in (function, lambda h, gamma, beta: gelu_grn.gelu_grn_reference(h, gamma, beta, EPS)):
        out = version(*tensors)
        results.append((out, *torch.autograd.grad((out**2).sum(), tensors)))
    for ours, reference in zip(*results, strict=True):
        assert relative_error(ours, reference) <= TOLERANCE[torch.float32]


def test_the_whole_model_gives_the_loss_and_gradients_of_the_reference(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(FCMAE(((1, 1, 1, 1), (4, 6, 8, 10)), stem_stride=1, decoder_dim=8)).to(device)
    images, ids = torch.randn(1, 3, 8, 16, device=device), torch.tensor([[1]], device=device)
    model.layout = "masked"
    reference = model(images, ids)  # its encoder has none of the operations
    expected = [reference.loss, *gradients(reference.loss, model).values()]
    monkeypatch.setattr(grn_mlp, "gelu_grn_forward", gelu_grn.gelu_grn)  # as on CUDA
    monkeypatch.setattr(grn_mlp, "gelu_grn_gradients", gelu_grn.gelu_grn_backward)
    monkeypatch.setattr(grn_mlp, "folded", grn_mlp.fold_norm)
    monkeypatch.setattr(grn_mlp, "folded_gradients", grn_mlp.fold_norm_backward)
    model.layout = "packed"
    out = model(images, ids)
    for ours, theirs in zip([out.loss, *gradients(out.loss, model).values()], expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def arguments(name: str, device: str) -> tuple[Any, ...]:
    """Small arguments of an operation; parameters require gradients where it is differentiable."""
    (x, weight, bias, grad), ids = patches(2, (2, 2), 2, 2, 3, 3)
    slots = patch_depthwise.patch_slots(ids, 4)
    h, g, gamma, beta = maps((2, 3, 5), torch.bfloat16)
    pred, images, hidden = hidden_patches(2, 3, (2, 2), 4, 2)
    neighbours = neighbour_table(1, 2, 3, 3)
    rows = torch.randn(neighbours.shape[1], 5)
    gather_weight = torch.randn(5, 9).t()
    mlp = [tensor.detach() for tensor in mlp_tensors(1, 1, 5, torch.float32)]
    given: dict[str, tuple[Any, ...]] = {
        "gather_depthwise": (
            rows.requires_grad_(), gather_weight.requires_grad_(), rows[0].clone().requires_grad_(), neighbours
        ),
        "gather_depthwise_backward": (rows.detach(), gather_weight.detach(), rows.detach() + 1, neighbours),
        "patch_depthwise": (
            x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids, slots, [2, 2]
        ),
        "patch_depthwise_norm_rstd": (
            x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids, slots, [2, 2], EPS
        ),
        "patch_norm_backward": (grad, x.detach(), x.detach()[..., 0]),
        "patch_depthwise_weight_grads": (grad, x.detach(), ids, slots, [2, 2], 3),
        "gelu_grn": (h, gamma, beta, EPS),
        "gelu_grn_backward": (g, h, gamma.abs().expand(2, 5), gamma, beta, EPS),
        "fold_norm": (*mlp[1:5], *mlp[7:], torch.bfloat16),
        "fold_norm_backward": (mlp[3] + 1, mlp[4] + 1, *mlp[1:4]),
        "patch_errors": (pred.requires_grad_(), images, hidden, 4, True, EPS),
    }  # fmt: skip
    return tuple(
        a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in given[name]
    )


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, the first axis innermost in memory."""
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def expanded(tensor: Tensor) -> Tensor:
    """The last position of all axes but the last, everywhere."""
    return tensor[(slice(-1, None),) * (tensor.ndim - 1)].expand(tensor.shape)


@pytest.mark.parametrize("stored", [transposed, expanded])
@pytest.mark.parametrize("path", OPERATIONS)
def test_every_operation_takes_tensors_however_they_are_stored(
    path: str, stored: Callable[[Tensor], Tensor], device: str
) -> None:
    """As the gradients are that a sum, a mean or a transposition sends back."""
    given = [
        stored(a.detach().nan_to_num()) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments(path.partition(".")[2], device)
    ]
    plain = [a.contiguous() if isinstance(a, Tensor) else a for a in given]
    ours, reference = (tree_leaves(OPERATIONS[path](*a)) for a in (given, plain))
    for one, other in zip(ours, reference, strict=True):
        assert one.is_contiguous()
        assert relative_error(one.double(), other.double()) <= 1e-6


@pytest.mark.parametrize("stored", [transposed, expanded])
@pytest.mark.parametrize("name", ["rows", "mlp", "errors", "depthwise", "depthwise and norm", "gelu and grn"])
def test_gradients_are_the_same_however_that_of_the_output_is_stored(
    name: str, stored: Callable[[Tensor], Tensor], device: str
) -> None:
    function, tensors = examples(device)[name]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    out = function(*tensors)
    grad = stored(torch.randn_like(out))
    assert not grad.is_contiguous()
    ours, plain = (torch.autograd.grad(out, wanted, g, retain_graph=True) for g in (grad, grad.contiguous()))
    for one, other in zip(ours, plain, strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's, of nothing
@pytest.mark.parametrize("path", [path for path in OPERATIONS if not path.startswith(("gather", "grn_mlp"))])
def test_every_operation_takes_a_batch_of_no_images(path: str, device: str) -> None:
    given = arguments(path.partition(".")[2], device)
    images = given[1 if path == "gelu_grn.gelu_grn_backward" else 0].shape[0]
    empty = [a.detach()[:0] if isinstance(a, Tensor) and a.shape[:1] == (images,) else a for a in given]
    results, expected = (tree_leaves(OPERATIONS[path](*a)) for a in (empty, given))
    for result, one in zip(results, expected, strict=True):
        assert result.shape[1:] == one.shape[1:]
        assert not result.any()  # a sum over no images is zero


def test_grn_mlp_is_differentiated_in_its_own_dtype_also_inside_of_autocast() -> None:
    tensors = mlp_tensors(2, 3, 4, torch.float32)
    expected = torch.autograd.grad(grn_mlp.grn_mlp(*tensors, EPS).sum(), tensors)  # pyright: ignore[reportCallIssue]
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(grn_mlp.grn_mlp(*tensors, EPS).sum(), tensors)  # pyright: ignore[reportCallIssue]
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= 1e-6


def test_more_images_than_a_gpu_takes_are_refused_in_a_line() -> None:
    kernels = pytest.importorskip("fcmae.ops.gelu_grn_triton", reason="needs Triton")
    h, vector = torch.empty(65536, 1, 4), torch.empty(4)
    with pytest.raises(ValueError, match="at most 65,535 images at once, got 65,536: make the batch smaller"):
        kernels.gelu_grn(h, vector, vector, EPS)


class WeightGradients(TorchDispatchMode):
    """Notes the dtype of every product of two matrices that has this shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.dtypes = shape, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and out.shape in (self.shape, self.shape[::-1]):
            self.dtypes.append(out.dtype)
        return out


class Context(SimpleNamespace):
    """What autograd hands to a function: its engine itself wants a GPU before it differentiates anything of one."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.skipif(not grn_mlp._MM_HAS_OUT_DTYPE, reason="needs torch 2.10")
def test_weight_gradients_on_cuda_come_from_the_product_in_float32() -> None:
    context = Context()
    with FakeTensorMode(), WeightGradients((33, 16)) as products:
        tensors = [tensor.detach().to("cuda") for tensor in mlp_tensors(2, 76, 16, torch.bfloat16)]
        out = grn_mlp._GRNMLP.forward(context, *tensors, EPS)  # pyright: ignore[reportArgumentType, reportCallIssue]
        grn_mlp._GRNMLP.backward(context, torch.empty_like(out))
    assert products.dtypes == [torch.float32] * 2


@pytest.mark.parametrize("path", OPERATIONS)
def test_every_operation_is_registered_soundly(path: str, device: str) -> None:
    opcheck(OPERATIONS[path], arguments(path.partition(".")[2], device))
