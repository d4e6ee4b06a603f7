"""The MinkowskiEngine layout in training, and its traps: what the engine cannot do is done around it or refused."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, randomise, relative_error, small_encoder, smooth_images, some_ids
from torch import Tensor, nn

from fcmae import FCMAE, ConvNeXtV2
from fcmae.encoder.minkowski import MinkowskiSites, import_engine
from fcmae.ops.grn_mlp import grn_mlp
from fcmae.training.optim import build_adamw
from fcmae.weights.convert import dense_to_official_sparse, official_sparse_to_dense

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

    monkeypatch.setattr("fcmae.encoder.convnext.grn_mlp", mlp)

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
    encoder = ConvNeXtV2(((3, 2, 2, 1), (4, 4, 4, 4)), stem_stride=1)
    encoder.features(torch.randn(2, 3, 32, 32), some_ids(2, 16, 6), "minkowski")
    assert len(made) == 4


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


# The official code's sparse encoder, of the engine's own modules


class OfficialBlock(nn.Module):
    """A block as the official code has it over MinkowskiEngine, of the engine's modules where it has them."""

    def __init__(self, engine: Any, dim: int) -> None:
        super().__init__()
        self.dwconv = engine.MinkowskiChannelwiseConvolution(dim, kernel_size=7, bias=True, dimension=2)
        self.norm = Rowwise("ln", nn.LayerNorm(dim, eps=1e-6))
        self.pwconv1 = engine.MinkowskiLinear(dim, 4 * dim)
        self.grn = RowwiseGRN(4 * dim)
        self.pwconv2 = engine.MinkowskiLinear(4 * dim, dim)
        self.engine = [engine]

    def forward(self, x: Any) -> Any:
        h = self.pwconv1(self.norm(self.dwconv(x)))
        h = self.grn(self.engine[0].MinkowskiFunctional.gelu(h))
        return x + self.pwconv2(h)


def with_rows(x: Any, rows: Tensor) -> Any:
    """A sparse tensor of other rows at the coordinates of x."""
    return type(x)(rows, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


class Rowwise(nn.Module):
    """A dense module on the rows of a sparse tensor, under the name the official code gives it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        (module,) = self.children()
        return with_rows(x, module(x.F))


class RowwiseGRN(nn.Module):
    """The official sparse GRN, whose norms are over all rows: of the whole batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))

    def forward(self, x: Any) -> Any:
        norm = x.F.norm(dim=0, keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return with_rows(x, self.gamma * (x.F * response) + self.beta + x.F)


class OfficialSparseEncoder(nn.Module):
    """The official pretraining encoder: a dense stem, then sparse tensors."""

    def __init__(self, engine: Any, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.engine = [engine]
        stem = nn.Conv2d(3, dims[0], kernel_size=4, stride=4)
        layers = [nn.Sequential(stem, nn.LayerNorm(dims[0], eps=1e-6))]
        for fine, coarse in itertools.pairwise(dims):
            conv = engine.MinkowskiConvolution(fine, coarse, kernel_size=2, stride=2, bias=True, dimension=2)
            layers.append(nn.Sequential(Rowwise("ln", nn.LayerNorm(fine, eps=1e-6)), conv))
        self.downsample_layers = nn.ModuleList(layers)
        self.stages = nn.ModuleList(
            nn.Sequential(*(OfficialBlock(engine, dim) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """Features (b, h, w, c) of images whose sites (b, h, w) are active after the stem, where hidden zero."""
        stem, norm = self.downsample_layers[0].children()
        dense = norm(stem(images).permute(0, 2, 3, 1))
        x = self.engine[0].SparseTensor(dense[active], coordinates=active.nonzero().int().contiguous())
        for i in range(4):
            if i:
                x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        image, row, col = x.C.long().unbind(1)
        out = dense.new_zeros(len(images), active.shape[1] // 8, active.shape[2] // 8, x.F.shape[1])
        out[image, row // 8, col // 8] = x.F
        return out


@needs_engine
def test_the_official_sparse_encoder_computes_the_same_after_conversion() -> None:
    depths, dims = TINY
    official = randomise(OfficialSparseEncoder(import_engine(), depths, dims)).double()
    state = {f"encoder.{name}": value for name, value in official.state_dict().items()}
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, dims[0])
    assert state["encoder.downsample_layers.1.1.kernel"].shape == (4, dims[0], dims[1])
    assert state["encoder.stages.0.0.pwconv1.linear.weight"].shape == (4 * dims[0], dims[0])

    ours = ConvNeXtV2(TINY, grn_scope="batch").double()
    ours.load_state_dict(official_sparse_to_dense(state), strict=True)
    images, ids = torch.randn(2, 3, 96, 128, dtype=torch.float64), some_ids(2, 12, 5)
    sites = ours.sites(images, ids, "masked")
    active = sites.scatter(torch.ones(2, 24, 32, 1))[..., 0] > 0
    with torch.no_grad():
        expected = official(images, active)
        for layout in ("masked", "packed", "minkowski"):
            assert relative_error(ours.features(images, ids, layout), expected) <= 1e-10

    back = dense_to_official_sparse(ours.state_dict())
    official.load_state_dict(back, strict=True)
    with torch.no_grad():
        assert relative_error(official(images, active), expected) <= 1e-12  # its kernel maps vary in order


@pytest.mark.parametrize("variant", ["atto", TINY])
def test_sparse_and_dense_there_and_back_is_the_identity(variant: Any) -> None:
    dense = dict(randomise(ConvNeXtV2(variant)).state_dict())
    sparse = dense_to_official_sparse(dense)
    assert sparse.keys() != dense.keys()
    for result in (official_sparse_to_dense(sparse), official_sparse_to_dense(dense)):
        assert result.keys() == dense.keys()
        assert all(torch.equal(result[name], dense[name]) for name in dense)  # shapes too: twice is once
    again = dense_to_official_sparse(official_sparse_to_dense(sparse))
    assert again.keys() == sparse.keys()
    assert all(torch.equal(again[name], sparse[name]) for name in sparse)


def test_kernels_lie_as_the_engine_counts_columns_before_rows() -> None:
    kernel = torch.arange(49 * 3.0).view(49, 3)
    weight = official_sparse_to_dense({"stages.0.0.dwconv.kernel": kernel})["stages.0.0.dwconv.weight"]
    assert weight.shape == (3, 1, 7, 7)
    assert weight[2, 0, 1, 5] == kernel[5 * 7 + 1, 2]
    kernel = torch.arange(4 * 3 * 5.0).view(4, 3, 5)
    weight = official_sparse_to_dense({"downsample_layers.1.1.kernel": kernel})["downsample_layers.1.1.weight"]
    assert weight.shape == (5, 3, 2, 2)
    assert weight[4, 2, 0, 1] == kernel[1 * 2 + 0, 2, 4]


def test_a_decoder_beside_the_sparse_encoder_is_left_out_and_nothing_else() -> None:
    encoder = dense_to_official_sparse(ConvNeXtV2(TINY).state_dict())
    state = {f"encoder.{name}": value for name, value in encoder.items()}
    decoder = ("proj.weight", "mask_token", "decoder.0.dwconv.weight", "pred.bias")
    assert (
        official_sparse_to_dense(state | dict.fromkeys(decoder, torch.zeros(1))).keys()
        == ConvNeXtV2(TINY).state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"unknown keys 'stages\.0\.0\.projection\.weight'"):
        official_sparse_to_dense(state | {"encoder.stages.0.0.projection.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("stages.0.0.dwconv.kernel", (48, 8)),
        ("stages.0.0.grn.gamma", (1, 1, 32)),
        ("stages.0.0.grn.gamma", (2, 32)),
        ("stages.0.0.dwconv.bias", (2, 8)),
    ],
)
def test_shapes_that_are_not_the_official_codes_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}: a shape of \({', '.join(map(str, shape))}\) is not the official"
    ):
        official_sparse_to_dense({name: torch.zeros(shape)})


def test_the_official_sparse_encoder_has_no_classifier() -> None:
    with pytest.raises(
        ValueError, match=r"bare of norm and head: unknown keys 'norm\.weight', 'norm\.bias', 'head"
    ):
        dense_to_official_sparse(ConvNeXtV2(TINY, num_classes=3).state_dict())
