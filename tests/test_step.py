"""A training step on CUDA, counted where there is no GPU: tensors that are fake, with CUDA's rules of autocast.

Fake tensors have shapes, dtypes and a device, and no numbers. Operations of `fcmae::` run the Python around their
Triton kernels, whose launches are counted; whatever would wait for the GPU to know a number cannot go on.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from small_runs import batches, small_config, small_trainer
from test_ops import OPERATIONS, triton_side
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcmae.data import PixelNormalizer
from fcmae.encoder.base import Layout, Version
from fcmae.encoder.convnext import Block, ConvNeXt
from fcmae.model import FCMAE
from fcmae.training.optim import build_adamw
from fcmae.training.trainer import Window

PATHS = {op._opoverload: path for path, op in OPERATIONS.items()}
"""Names of our operations in `test_ops`, by what is dispatched."""


DEPTHS = {depth: ((1, 1, depth, 1), (40, 80, 160, 320)) for depth in (1, 2)}
"""Networks by the number of blocks in their third stage."""


class WaitsForGPUError(AssertionError):
    """The processor would wait for the GPU."""


class Launches(TorchDispatchMode):
    """Counts what would be launched on CUDA, by name: our kernels, and PyTorch's operations that are no views.

    Raises `WaitsForGPUError` for what needs a number that the GPU computes, or copies between it and the processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PATHS:
            with self:
                return triton_side(PATHS[func])(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._fused_adamw_:  # which gives nothing, and has no fake version
            self.counted["aten._fused_adamw_"] += 1
            return None
        try:
            out = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WaitsForGPUError(str(func)) from error
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        changes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if len({tensor.device for tensor in (*given, *made) if tensor.ndim or changes or not given}) > 1:
            raise WaitsForGPUError(f"{func} of several devices")
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = not changes and all(tensor.untyped_storage()._cdata in memory for tensor in made)
        if not is_view and "empty" not in func.name():
            self.counted[str(func.overloadpacket)] += 1
        return out


@contextmanager
def fake_cuda(*, autocast: bool = True) -> Iterator[Counter[str]]:
    """Inside, tensors are fake and may be of CUDA, on which autocast to bfloat16 is on; gives what is launched.

    `torch.autocast` itself turns off where there is no GPU.
    """
    if torch.__version__ < "2.10":
        pytest.skip("fake tensors of CUDA want its driver before PyTorch 2.10")
    dtype = torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), Launches() as launches, pytest.MonkeyPatch.context() as patch:
        interface = pytest.importorskip("triton.runtime.jit", reason="needs Triton").KernelInterface

        def only_count(kernel: Any, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.counted.update([kernel.fn.__name__])

        patch.setattr(interface, "__getitem__", only_count)
        try:
            torch.set_autocast_enabled("cuda", autocast)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.autocast_increment_nesting()
            yield launches.counted
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_dtype("cuda", dtype)
            torch.set_autocast_enabled("cuda", False)


def on_fake_cuda(build: Callable[[], nn.Module]) -> Any:
    """Build a network, and give it fake tensors."""
    with unset_fake_temporarily(), torch.device("meta"):  # where nothing is drawn
        network = build()
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = type(tensor)(torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))  # pyright: ignore[reportArgumentType]
    return network


def backward(loss: Tensor) -> None:
    """As `loss.backward()`, whose own threads want a GPU: one node of autograd after the other."""
    root = loss.grad_fn
    assert root is not None
    edges, nodes = Counter(), {root}
    waiting = [root]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                edges[node] += 1
                if node not in nodes:
                    nodes.add(node)
                    waiting.append(node)
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready: list[Any] = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = [gradients[node].get(i) for i in range(len(node._input_metadata))]
            del gradients[node]
            if hasattr(node, "variable"):
                (node.variable.grad,) = given
                continue
            found = (
                node.apply(*given) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*given)
            )
            found = found if isinstance(found, tuple) else (found,)
            wanted = [edge for edge in node.next_functions if edge[0] is not None]
            found = [gradient for gradient in found if gradient is not None]
            for (below, i), gradient in zip(wanted, found, strict=True):
                held = gradients.setdefault(below, {})
                expected = below._input_metadata[i]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                held[i] = held[i] + gradient if i in held else gradient
                edges[below] -= 1
                if not edges[below]:
                    ready.append(below)


def autocast_off() -> None:
    """As it is outside of the forward pass."""
    torch.clear_autocast_cache()
    torch.set_autocast_enabled("cuda", False)


IDS = (2, 19)
"""Visible patches of two images of 224 pixels per side."""


def fake_batch() -> tuple[Tensor, Tensor]:
    """Pixels and visible ids, as the step gets them."""
    pixels = torch.empty(2, 3, 224, 224, dtype=torch.uint8, device="cuda")
    return pixels, torch.empty(IDS, dtype=torch.int64, device="cuda")


def numbers() -> Tensor:
    return torch.empty(4, device="cuda")


@pytest.mark.parametrize(
    "wait",
    [
        lambda: numbers().sum().item(),
        lambda: bool(numbers().isnan().any()),
        lambda: numbers().nonzero(),
        lambda: numbers()[numbers() > 0],
        lambda: torch.where(numbers() > 0),
        lambda: numbers().masked_select(numbers() > 0),
        lambda: numbers().unique(),
        lambda: numbers().repeat_interleave(numbers().long()),
        lambda: torch.equal(numbers(), numbers()),
        lambda: numbers().tolist(),
        lambda: numbers().cpu(),
        lambda: numbers().to("cpu", non_blocking=True),
        lambda: torch.ones(4).cuda(),
        lambda: numbers().copy_(torch.ones(4)),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
    ],
)
def test_what_waits_for_the_gpu_is_found(wait: Callable[[], Any]) -> None:
    with fake_cuda(), pytest.raises(WaitsForGPUError):
        wait()


STEPS: dict[str, dict[str, Any]] = {
    "packed": {},
    "masked": {"layout": "masked"},
    "version 1": {"version": 1, "drop_path": 0.2},
    "unet, pixels as they are": {"decoder": "unet", "norm_pix_loss": False},
    "transformer, HOG": {"decoder": "transformer", "decoder_depth": 1, "target": "hog"},
    "no-data": {"nodata": True},
}


@pytest.mark.parametrize("step", STEPS)
def test_a_pretraining_step_never_waits_for_the_gpu(step: str) -> None:
    with fake_cuda() as launched:
        normalize = on_fake_cuda(lambda: PixelNormalizer((0.5,) * 3, (0.2,) * 3))
        model = on_fake_cuda(lambda: FCMAE(DEPTHS[1], **STEPS[step]))
        optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
        window = Window.new(torch.device("cuda"))
        for group in optimizer.param_groups:
            group["capturable"], group["lr"] = True, torch.zeros((), device="cuda")
        pixels, ids = fake_batch()
        loss = model(normalize(pixels, unknown=math.nan), ids).loss
        autocast_off()
        backward(loss)
        assert all(parameter.grad is not None for parameter in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        window.add(loss.detach(), 1, (0, 1))
    assert launched["aten._fused_adamw_"] == 2  # with weight decay, and without


@pytest.mark.parametrize("version", [1, 2])
def test_a_fine_tuning_step_never_waits_for_the_gpu(version: Version) -> None:
    with fake_cuda() as launched:
        model = on_fake_cuda(lambda: ConvNeXt(DEPTHS[1], version=version, num_classes=5, drop_path=0.2))
        targets = torch.empty(2, 5, device="cuda")
        loss = F.cross_entropy(model(fake_batch()[0].float()), targets)
        autocast_off()
        backward(loss)
    assert launched["aten.convolution_backward"] == 8  # the stem, four blocks and three downsamplings


BUDGET = {
    # (layout, version): launches of a block, forward and backward, and of all the rest of a step
    ("packed", 2): (9, 20, 140),
    ("packed", 1): (15, 26, 140),
    ("dense", 2): (11, 17, 70),
    ("dense", 1): (16, 23, 70),
}
"""At most. A block of version 2, packed, forward: its parameters folded and cast, the depthwise weight transposed,
the convolution, two matrix products, three passes of GELU and GRN, the residual. Backward: four passes of GELU and
GRN, four matrix products and the sum of a bias, two of the folded parameters, the norm, seven of the convolution,
the residual."""


def launches_of_a_step(layout: Layout, version: Version, depth: int) -> tuple[int, int]:
    """How much the forward and the backward pass launch; without the optimizer, which is one for all blocks."""
    with fake_cuda() as launched:
        if layout == "dense":
            network = on_fake_cuda(lambda: ConvNeXt(DEPTHS[depth], version=version, num_classes=5))
        else:
            network = on_fake_cuda(lambda: FCMAE(DEPTHS[depth], layout=layout, version=version))
        pixels, ids = fake_batch()
        images = pixels.float()
        launched.clear()
        loss = network(images).sum() if layout == "dense" else network(images, ids).loss
        forward = launched.total()
        autocast_off()
        backward(loss)
    return forward, launched.total() - forward


@pytest.mark.parametrize(("layout", "version"), BUDGET)
def test_a_block_and_the_rest_of_a_step_launch_no_more_than_their_budget(layout: Layout, version: Version) -> None:
    one, two = (launches_of_a_step(layout, version, depth) for depth in DEPTHS)
    block = [more - less for more, less in zip(two, one, strict=True)]
    blocks = 4 if layout == "dense" else 5  # the decoder has one
    for counted, most in zip([*block, sum(one) - blocks * sum(block)], BUDGET[layout, version], strict=True):
        assert 0 < counted <= most


def residuals(network: nn.Module, compute: Callable[[], Any]) -> list[torch.dtype]:
    """Dtypes of what goes into the blocks of a network, and of what comes out of them."""
    found: list[torch.dtype] = []
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    hooks = [
        block.register_forward_hook(lambda _, given, made: found.extend((given[0].dtype, made.dtype)))
        for block in blocks
    ]
    compute()
    for hook in hooks:
        hook.remove()
    assert len(found) == 2 * len(blocks) > 8
    return found


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "masked"])
@pytest.mark.parametrize("decoder", ["convnext", "unet"])
def test_the_residual_stream_is_of_autocasts_dtype_on_cuda(decoder: str, layout: Layout, version: Version) -> None:
    with fake_cuda():
        model = on_fake_cuda(lambda: FCMAE(DEPTHS[1], layout=layout, version=version, decoder=decoder))
        pixels, ids = fake_batch()
        assert {*residuals(model, lambda: model(pixels.float(), ids))} == {torch.bfloat16}


@pytest.mark.parametrize("version", [1, 2])
def test_the_residual_stream_of_a_dense_network_is_of_autocasts_dtype_on_cuda(version: Version) -> None:
    with fake_cuda():
        model = on_fake_cuda(lambda: ConvNeXt(DEPTHS[2], version=version, num_classes=5))
        assert {*residuals(model, lambda: model(fake_batch()[0].float()))} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["packed", "masked", pytest.param("minkowski", marks=pytest.mark.minkowski)])
def test_the_residual_stream_is_of_autocasts_dtype_on_a_cpu(layout: Layout) -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_dim=8, layout=layout)
    images, ids = torch.randn(2, 3, 16, 16), torch.tensor([[0], [2]])
    with torch.autocast("cpu", torch.bfloat16):
        assert {*residuals(model, lambda: model(images, ids))} == {torch.bfloat16}
    assert {*residuals(model, lambda: model(images, ids))} == {torch.float32}
    assert {*residuals(model.double(), lambda: model(images.double(), ids))} == {torch.float64}


def test_a_compiled_step_takes_no_kernel_because_it_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sums in another order than that which the process before it had taken."""
    inductor = import_module("torch._inductor.config")
    if not hasattr(inductor, "deterministic"):
        pytest.skip("PyTorch 2.8 has no such mode")
    found: list[bool] = []

    def lower(graph: Any, *inputs: Any) -> None:
        found.append(inductor.deterministic)
        raise NotImplementedError("without code generation")

    monkeypatch.setattr("torch._inductor.graph.GraphLowering.run", lower)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    trainer = small_trainer(small_config(tmp_path, train={"compile": True}))
    with pytest.raises(BackendCompilerFailed, match="without code generation"):
        trainer.update(batches(trainer))
    assert found == [True]
