"""The layouts compute the same network, and hidden pixels have no part in it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    assert_same,
    features_and_gradients,
    randomise,
    relative_error,
    small_encoder,
    smooth_images,
    some_ids,
)
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fcmae.encoder.convnext import Block, ConvNeXt, DropPath, Layout, set_fused
from fcmae.encoder.layouts import DenseSites, MaskedSites, Sites
from fcmae.encoder.minkowski import MinkowskiSites
from fcmae.encoder.packed import PackedSites
from fcmae.encoder.responses import GRN, Response
from fcmae.masking import count_visible, ids_to_booleans

MINKOWSKI = pytest.param("minkowski", marks=pytest.mark.minkowski)
SPARSE = ("masked", "packed", MINKOWSKI)
GEOMETRIES = {
    # (height, width), stem stride
    "224/4": ((224, 224), 4),
    "64/2": ((64, 64), 2),
    "32/1": ((32, 32), 1),
    "96x160/4": ((96, 160), 4),
}


def make_sites(layout: Layout, grid: tuple[int, int], ids: Tensor, k: int) -> Sites:
    if layout == "masked":
        return MaskedSites((grid[0] * k, grid[1] * k), ids, sites_per_patch=k)
    if layout == "minkowski":
        return MinkowskiSites.of_patches(grid, ids, sites_per_patch=k)
    return PackedSites.of_patches(grid, ids, sites_per_patch=k)


def pixels_of(ids: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Booleans (b, 1, H, W), True at visible pixels."""
    visible = ids_to_booleans(ids, grid[0] * grid[1]).view(-1, 1, *grid)
    return visible.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.6, 0.9])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", ["packed", MINKOWSKI])
def test_every_layout_agrees_with_masked(
    layout: Layout, geometry: str, mask_ratio: float, batch: int, in_chans: int
) -> None:
    (h, w), stem_stride = GEOMETRIES[geometry]
    encoder = small_encoder(variant=((1, 1, 1, 1), (4, 6, 8, 12)), in_chans=in_chans, stem_stride=stem_stride)
    num_patches = (h // encoder.patch_size) * (w // encoder.patch_size)
    ids = some_ids(batch, num_patches, count_visible(num_patches, mask_ratio))
    images = torch.randn(batch, in_chans, h, w, dtype=torch.float64)
    masked = features_and_gradients(encoder, images, ids, "masked")
    assert_same(features_and_gradients(encoder, images, ids, layout), masked)
    assert all(grad.abs().max() > 0 for grad in masked.values())


@pytest.mark.parametrize("stem_stride", [4, 1])
@pytest.mark.parametrize("layout", SPARSE)
def test_every_layout_computes_version_1_alike(layout: Layout, stem_stride: int) -> None:
    encoder = small_encoder(version=1, stem_stride=stem_stride)
    patch = encoder.patch_size
    images = torch.randn(2, 3, 2 * patch, 3 * patch, dtype=torch.float64)
    some, all_ids = some_ids(2, 6, 3), torch.arange(6).expand(2, 6)
    masked = features_and_gradients(encoder, images, some, "masked")
    assert_same(features_and_gradients(encoder, images, some, layout), masked)
    dense = features_and_gradients(encoder, images, None, "dense")
    assert_same(features_and_gradients(encoder, images, all_ids, layout), dense)
    assert all(dense[name].abs().max() > 0 for name in dense)
    assert dense["stages.2.1.gamma"].shape == (24,)


@pytest.mark.parametrize("filling", [1e3, float("nan")])
@pytest.mark.parametrize("layout", SPARSE)
def test_hidden_pixels_never_reach_the_encoder(layout: Layout, filling: float) -> None:
    encoder = small_encoder(stem_stride=2)
    images = torch.randn(3, 3, 64, 80, dtype=torch.float64)
    ids = some_ids(3, 20, 8)
    visible = pixels_of(ids, (4, 5), 16)
    clean = features_and_gradients(encoder, images, ids, layout)
    changed = features_and_gradients(encoder, torch.where(visible, images, filling), ids, layout)
    assert_same(changed, clean, tolerance=0.0)
    assert not clean["images"][~visible.expand_as(images)].any()


@pytest.mark.parametrize("layout", SPARSE)
def test_hidden_cells_of_the_features_are_exactly_zero(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    ids = some_ids(2, 12, 5)
    features = encoder.features(torch.randn(2, 3, 24, 32, dtype=torch.float64), ids, layout)
    visible = ids_to_booleans(ids, 12).view(2, 3, 4)
    assert torch.equal(features.abs().amax(-1) > 0, visible)
    assert not features[~visible].any()


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_permuting_the_batch_permutes_the_features(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10])[:, None, None, None]
    ids = None if layout == "dense" else some_ids(4, 16, 6)
    order = torch.tensor([2, 0, 3, 1])
    permuted = encoder.features(images[order], None if ids is None else ids[order], layout)
    assert relative_error(permuted, encoder.features(images, ids, layout)[order]) <= 1e-10


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_an_image_has_the_same_features_alone_as_in_a_batch(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64) * torch.tensor([0.1, 1, 10])[:, None, None, None]
    ids = None if layout == "dense" else some_ids(3, 16, 6)
    together = encoder.features(images, ids, layout)
    for i in range(3):
        alone = encoder.features(images[i : i + 1], None if ids is None else ids[i : i + 1], layout)
        assert relative_error(alone, together[i : i + 1]) <= 1e-10


@pytest.mark.parametrize("layout", SPARSE)
def test_one_images_hidden_patches_do_not_depend_on_another_images(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 5, 9], [2, 3, 6, 15]])
    other = torch.tensor([[0, 1, 5, 9], [0, 4, 8, 12]])
    first = encoder.features(images, ids, layout)[0]
    assert torch.equal(first, encoder.features(images, other, layout)[0])


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_black_images_have_finite_gradients(layout: Layout) -> None:
    encoder = ConvNeXt(TINY, stem_stride=1).double()
    for module in encoder.modules():
        if isinstance(module, GRN):
            nn.init.ones_(module.gamma)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    ids = None if layout == "dense" else some_ids(2, 16, 6)
    result = features_and_gradients(encoder, images, ids, layout)
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert not result["features"].any()


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_a_channel_of_zeros_in_grn_has_finite_gradients(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, Block):
                module.pwconv1.weight[0] = 0
                module.pwconv1.bias[0] = 0
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = None if layout == "dense" else some_ids(2, 16, 6)
    result = features_and_gradients(encoder, images, ids, layout)
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert not result["stages.0.0.grn.gamma"][..., 0].any()


@pytest.mark.parametrize("layout", SPARSE)
def test_the_gradient_of_the_norm_is_zero_where_the_norm_is(layout: Layout) -> None:
    sites = make_sites(layout, (2, 2), torch.tensor([[0, 3]]), 2)
    x = sites.gather(torch.randn(1, 4, 4, 3, dtype=torch.float64))
    x = (x * torch.tensor([0.0, 1.0, 1.0])).requires_grad_()
    (grad,) = torch.autograd.grad(sites.norm(x).sum(), x)
    assert not grad[..., 0].any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("layout", ["packed", MINKOWSKI])
def test_last_row_and_column_may_be_hidden_in_every_image(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    inner = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10])
    ids = torch.stack([inner[[0, 4, 8]], inner[[1, 2, 3]]])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    masked = features_and_gradients(encoder, images, ids, "masked")
    assert masked["features"].shape == (2, 4, 4, 32)
    assert_same(features_and_gradients(encoder, images, ids, layout), masked)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("layout", SPARSE)
def test_all_patches_visible_is_dense(layout: Layout, stem_stride: int) -> None:
    encoder = small_encoder(stem_stride=stem_stride)
    patch = encoder.patch_size
    images = torch.randn(2, 3, 2 * patch, 3 * patch, dtype=torch.float64)
    ids = torch.arange(6).expand(2, 6)
    dense = features_and_gradients(encoder, images, None, "dense")
    assert_same(features_and_gradients(encoder, images, ids, layout), dense)


@pytest.mark.parametrize("layout", SPARSE)
def test_a_single_patch_is_enough(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dense = features_and_gradients(encoder, images, None, "dense")
    ids = torch.zeros(2, 1, dtype=torch.int64)
    assert_same(features_and_gradients(encoder, images, ids, layout), dense)


@pytest.mark.parametrize("layout", SPARSE)
def test_the_order_of_visible_ids_does_not_matter(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ids = some_ids(3, 16, 7)
    shuffled = ids.gather(1, torch.rand(ids.shape).argsort(1))
    assert not torch.equal(ids, shuffled)
    expected = features_and_gradients(encoder, images, ids, layout)
    assert_same(features_and_gradients(encoder, images, shuffled, layout), expected)


def test_auto_is_packed_with_ids_and_dense_without() -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    ids = some_ids(1, 16, 7)
    assert isinstance(encoder.sites(images, ids, "auto"), PackedSites)
    assert type(encoder.sites(images, None, "auto")) is DenseSites
    assert torch.equal(encoder.features(images, ids), encoder.features(images, ids, "packed"))
    assert torch.equal(encoder.features(images), encoder.features(images, None, "dense"))


@pytest.mark.parametrize("k", [1, 2, 8])
def test_packed_gather_and_scatter_are_each_others_transpose(k: int) -> None:
    grid, ids = (3, 4), some_ids(2, 12, 5)
    sites = PackedSites.of_patches(grid, ids, sites_per_patch=k)
    dense = torch.randn(2, 3 * k, 4 * k, 6, dtype=torch.float64)
    x = torch.randn(2, 5, k, k, 6, dtype=torch.float64)
    left = (sites.gather(dense) * x).sum()
    assert relative_error(left, (dense * sites.scatter(x)).sum()) <= 1e-12


@pytest.mark.parametrize("layout", SPARSE)
def test_scatter_after_gather_keeps_active_sites_and_zeroes_the_rest(layout: Layout) -> None:
    ids = some_ids(2, 12, 5)
    sites = make_sites(layout, (3, 4), ids, 2)
    dense = torch.randn(2, 6, 8, 5)
    active = pixels_of(ids, (3, 4), 2).permute(0, 2, 3, 1)
    assert torch.equal(sites.scatter(sites.gather(dense)), dense * active)
    once = sites.scatter(sites.gather(dense))
    assert torch.equal(sites.scatter(sites.gather(once)), once)
    assert sites.num_active == 5 * 4


def test_packed_gather_undoes_scatter() -> None:
    sites = PackedSites.of_patches((3, 4), some_ids(2, 12, 5), sites_per_patch=2)
    x = torch.randn(2, 5, 2, 2, 7)
    assert torch.equal(sites.gather(sites.scatter(x)), x)


def test_packed_patches_lie_as_the_ids_say() -> None:
    dense = torch.arange(4 * 6).view(1, 4, 6, 1).double()
    sites = PackedSites.of_patches((2, 3), torch.tensor([[1, 5]]), sites_per_patch=2)
    packed = sites.gather(dense)
    assert torch.equal(packed[0, 0], dense[0, 0:2, 2:4])
    assert torch.equal(packed[0, 1], dense[0, 2:4, 4:6])


def test_packed_gather_and_scatter_pass_gradcheck() -> None:
    sites = PackedSites.of_patches((2, 3), some_ids(2, 6, 3), sites_per_patch=2)
    dense = torch.randn(2, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    for function, argument in ((sites.gather, dense), (sites.scatter, x)):
        assert torch.autograd.gradcheck(function, (argument,))
        assert torch.autograd.gradgradcheck(function, (argument,))


@pytest.mark.parametrize("layout", SPARSE)
def test_sum_and_norm_are_taken_over_active_sites_of_each_image(layout: Layout) -> None:
    ids = some_ids(2, 12, 5)
    sites = make_sites(layout, (3, 4), ids, 2)
    dense = torch.randn(2, 6, 8, 5, dtype=torch.float64)
    active = pixels_of(ids, (3, 4), 2)[:, 0]
    x = sites.gather(torch.where(active[..., None], dense, float("nan")))
    for i in range(2):
        rows = dense[i][active[i]]
        assert relative_error(sites.sum(x)[i], rows.sum(0)) <= 1e-12
        assert relative_error(sites.norm(x)[i], rows.square().sum(0).sqrt()) <= 1e-12


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_gradient_checkpointing_changes_no_gradient(layout: Layout, drop_path: float) -> None:
    encoder = small_encoder(stem_stride=1, drop_path=drop_path).train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ids = None if layout == "dense" else some_ids(4, 16, 6)
    results = []
    for checkpointing in (False, True):
        encoder.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        results.append(features_and_gradients(encoder, images, ids, layout))
    assert_same(results[1], results[0], tolerance=0.0)


def some_sites(layout: Layout, batch: int) -> Sites:
    """Sites of two of four patches, each 2 x 2 sites; all of them if dense."""
    if layout == "dense":
        return DenseSites((4, 4))
    return make_sites(layout, (2, 2), torch.tensor([[1, 2]]).expand(batch, 2), 2)


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_drop_path_drops_the_branch_of_whole_images_and_keeps_the_expectation(layout: Layout) -> None:
    batch, rate = 500, 0.3
    dropping, whole = (randomise(Block(3, drop_path=drop_path)).double() for drop_path in (rate, 0.0))
    dropping.load_state_dict(whole.state_dict())
    sites = some_sites(layout, batch)
    x = sites.gather(torch.randn(batch, 4, 4, 3, dtype=torch.float64))
    branch = whole(x, sites) - x
    torch.manual_seed(7)
    dropped = dropping(x, sites) - x
    torch.manual_seed(7)
    kept = torch.empty(batch, 1, dtype=torch.float64).bernoulli_(1 - rate)
    assert relative_error(dropped, branch * sites.spread(kept / (1 - rate), x)) <= 1e-12
    assert kept.mean().item() == pytest.approx(1 - rate, abs=0.1)
    assert torch.equal(dropping.eval()(x, sites), whole(x, sites))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 7, 5), (64, 3, 2, 5), (64, 3, 2, 2, 5)])
def test_drop_path_is_torchvisions_stochastic_depth_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    results = []
    for drop in (DropPath(0.3), StochasticDepth(0.3, mode="row")):
        torch.manual_seed(7)
        results.append((drop.train()(x), torch.rand(1)))
        assert drop.eval()(x) is x
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_drop_path_rises_linearly_from_zero() -> None:
    encoder = ConvNeXt(TINY, drop_path=0.4)
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_fused_blocks_compute_what_their_modules_compute(layout: Layout) -> None:
    encoder = small_encoder(stem_stride=1)
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    ids = None if layout == "dense" else some_ids(2, 20, 8)
    fused = features_and_gradients(encoder, images, ids, layout)
    set_fused(encoder, False)
    assert_same(features_and_gradients(encoder, images, ids, layout), fused)


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_hooks_on_a_blocks_modules_fire_unless_it_is_fused(layout: Layout) -> None:
    block = randomise(Block(3))
    sites = some_sites(layout, 2)
    x = sites.gather(torch.randn(2, 4, 4, 3))
    fired: list[str] = []
    for name, child in block.named_children():
        child.register_forward_hook(lambda *_, name=name: fired.append(name))
    block(x, sites)
    modules = ["dwconv", "norm", "pwconv1", "act", "grn", "pwconv2", "drop_path"]
    assert fired == (modules if layout == "masked" else ["drop_path"])
    fired.clear()
    set_fused(block, False)
    out = block(x, sites)
    assert fired == modules
    block.pwconv2.register_forward_hook(lambda *args: torch.zeros_like(x))
    assert torch.equal(block(x, sites), x)
    assert not torch.equal(out, x)


@pytest.mark.parametrize("layout", ["dense", *SPARSE])
def test_a_block_takes_any_response_and_runs_its_modules_if_there_is_no_operation_for_it(layout: Layout) -> None:
    class Mean(Response):
        """Adds each channel's mean over the active sites of the image."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim = dim

        def forward(self, x: Tensor, sites: Sites) -> Tensor:
            return x + sites.spread(sites.sum(x) / sites.num_active, x)

    block = randomise(Block(3, response=Mean)).double()
    assert isinstance(block.grn, Mean)
    assert block.grn.dim == 12
    assert block.fused
    sites = some_sites(layout, 2)
    dense = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    active = sites.scatter(sites.gather(torch.ones_like(dense)))[..., :1]
    conv = block.dwconv
    h = F.conv2d((dense * active).permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=3)
    h = F.gelu(block.pwconv1(block.norm(h.permute(0, 2, 3, 1))))
    h = h + (h * active).sum((1, 2), keepdim=True) / active.sum((1, 2), keepdim=True)
    expected = (dense + block.pwconv2(h)) * active
    assert relative_error(sites.scatter(block(sites.gather(dense), sites)), expected) <= 1e-12


@pytest.mark.parametrize("layout", SPARSE)
def test_smooth_images_in_float32_agree_within_float32(layout: Layout) -> None:
    encoder = small_encoder()
    images, ids = smooth_images(2, 3, 96, 96), some_ids(2, 9, 3)
    expected = features_and_gradients(encoder, images, ids, "masked")
    result = features_and_gradients(encoder.float(), images.float(), ids, layout)
    assert_same({k: v.double() for k, v in result.items()}, expected, tolerance=1e-4)
