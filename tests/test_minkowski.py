"""The MinkowskiEngine layout in training, and its traps: what the engine cannot do is done around it or refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, small_encoder, smooth_images, some_ids
from torch import Tensor, nn

from fcmae import FCMAE, ConvNeXt
from fcmae.encoder.minkowski import MinkowskiSites, import_engine
from fcmae.ops.grn_mlp import grn_mlp
from fcmae.training.optim import build_adamw

needs_engine = pytest.mark.minkowski


def train(model: FCMAE, layout: Any, steps: int, *, seed: int = 0) -> list[float]:
    """Train on the same images under other masks for some steps; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images = smooth_images(8, 3, 64, 96, torch.float32)
    model.layout = layout
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for _ in range(steps):
        loss = model(images, generator=generator).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@needs_engine
def test_twenty_steps_of_training_have_the_losses_of_packed() -> None:
    losses = {}
    for layout in ("packed", "minkowski"):
        torch.manual_seed(0)
        losses[layout] = train(FCMAE(TINY, stem_stride=2, decoder_dim=64), layout, 20)
    assert losses["minkowski"] == pytest.approx(losses["packed"], rel=1e-4)
    assert losses["packed"][-1] < 0.99 * losses["packed"][0]


@needs_engine
def test_the_same_training_gives_the_same_losses_to_the_bit() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(train(FCMAE(TINY, stem_stride=2, decoder_dim=64), "minkowski", 3))
    assert losses[0] == losses[1]


@needs_engine
def test_under_autocast_convolutions_run_in_float32_and_the_rest_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = small_encoder(stem_stride=1).float()
    images, ids = smooth_images(2, 3, 32, 32, torch.float32), some_ids(2, 16, 6)
    seen: dict[str, set[torch.dtype]] = {"depthwise": set(), "downsample": set(), "linear": set()}

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(MinkowskiSites, name)

        def method(self: MinkowskiSites, x: Tensor, conv: nn.Conv2d) -> Any:
            out = original(self, x, conv)
            seen[name].add((out[0] if name == "downsample" else out).dtype)
            return out

        return method

    for name in ("depthwise", "downsample"):
        monkeypatch.setattr(MinkowskiSites, name, spy(name))

    def mlp(x: Tensor, *args: Any) -> Tensor:
        out = grn_mlp(x, *args)
        seen["linear"].add(out.dtype)
        return out

    monkeypatch.setattr("fcmae.encoder.responses.grn_mlp", mlp)

    def projection(layout: Any) -> tuple[Tensor, Tensor]:
        encoder.zero_grad()
        features = encoder.features(images, ids, layout)
        features.float().square().mean().backward()
        grads = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        return features.detach().float(), torch.cat(grads)

    exact = projection("masked")
    seen["linear"].clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = projection("minkowski")
    assert seen == {"depthwise": {torch.float32}, "downsample": {torch.float32}, "linear": {torch.bfloat16}}
    for a, b in zip(half, exact, strict=True):
        assert (a - b).norm() <= 3e-2 * b.norm()  # bfloat16 keeps 8 bits


@needs_engine
def test_a_bfloat16_encoder_computes_convolutions_in_float32() -> None:
    encoder = small_encoder(stem_stride=1)
    images, ids = smooth_images(2, 3, 32, 32), some_ids(2, 16, 6)
    exact = encoder.features(images, ids, "masked")
    half = encoder.bfloat16().features(images.bfloat16(), ids, "minkowski")
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() <= 5e-2 * exact.norm()


@needs_engine
def test_the_engine_leaves_torch_its_threads() -> None:
    encoder = small_encoder(stem_stride=1)
    images, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), some_ids(2, 16, 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        features = encoder.features(images, ids, "minkowski")
        assert torch.get_num_threads() == 3
        features.sum().backward()
        assert torch.get_num_threads() == 3
        assert torch.equal(encoder.features(images, ids, "minkowski"), features)
    finally:
        torch.set_num_threads(threads)


@needs_engine
def test_an_empty_batch_is_refused_before_it_ends_the_process() -> None:
    encoder = small_encoder(stem_stride=1)
    with pytest.raises(ValueError, match=r"needs an image and a visible patch, got \(0, 6\)"):
        encoder.features(torch.empty(0, 3, 32, 32).double(), torch.empty(0, 6, dtype=torch.int64), "minkowski")


@needs_engine
def test_sites_come_from_the_ids_and_not_from_features() -> None:
    ids = torch.tensor([[0, 3], [1, 2]])
    sites = MinkowskiSites.of_patches((2, 2), ids, sites_per_patch=2)
    zeros = sites.gather(torch.zeros(2, 4, 4, 3))
    assert zeros.shape == (2, 8, 3)
    ones = sites.scatter(zeros + 1)[..., 0]
    assert ones.sum((1, 2)).tolist() == [8, 8]
    assert ones[0, :2, :2].all()
    assert not ones[0, :2, 2:].any()


@needs_engine
def test_kernel_maps_are_made_once_for_all_blocks_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = import_engine()
    made = []
    original = engine.CoordinateManager.kernel_map

    def kernel_map(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(engine.CoordinateManager, "kernel_map", kernel_map)
    encoder = ConvNeXt(((3, 2, 2, 1), (4, 4, 4, 4)), stem_stride=1)
    encoder.features(torch.randn(2, 3, 32, 32), some_ids(2, 16, 6), "minkowski")
    assert len(made) == 4


@pytest.mark.any_cpu
@needs_engine
def test_the_engine_sets_no_number_of_threads_on_large_machines() -> None:
    program = (
        "import os; os.cpu_count = lambda: 64\n"
        "from fcmae.encoder.minkowski import import_engine; import_engine()\n"
        "assert 'OMP_NUM_THREADS' not in os.environ"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)


def test_without_the_engine_the_layout_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    with pytest.raises(
        ValueError, match=r"not installed: run make minkowski \(python -m fcmae.encoder.install_minkowski\)"
    ):
        FCMAE(TINY, layout="minkowski")
    with pytest.raises(ValueError, match="layout 'minkowski' needs MinkowskiEngine"):
        small_encoder(stem_stride=1).features(torch.zeros(1, 3, 8, 8).double(), some_ids(1, 1, 1), "minkowski")
    model = FCMAE(TINY, stem_stride=1)
    assert model(torch.randn(2, 3, 32, 32)).loss.isfinite()


def test_an_engine_of_another_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("_C.so: undefined symbol: _ZN2at")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        ValueError, match=r"does not load with torch \S+ \(_C.so: undefined symbol: _ZN2at\): run make"
    ):
        import_engine()
