"""FCMAE: the loss of the paper, masks that are what they say, the same numbers however it runs."""

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, gradients, randomise, relative_error, smooth_images, some_ids
from torch import Tensor, nn

from fcmae.data import PixelNormalizer, Reading
from fcmae.data.pixels import without_nodata
from fcmae.encoder.convnext import Block, Layout, set_fused
from fcmae.encoder.packed import PackedSites
from fcmae.loss import hidden_patch_loss
from fcmae.masking import count_visible, hidden_ids, ids_to_booleans, sample_visible_ids
from fcmae.model import FCMAE
from fcmae.patches import grid_shape, patchify, pick_patches, unpatchify

SPARSE: tuple[Layout, ...] = ("masked", "packed")


def small_model(**kwargs: Any) -> FCMAE:
    """A randomised FCMAE of patch 16 with a small decoder."""
    defaults: dict[str, Any] = {"variant": TINY, "stem_stride": 2, "decoder_dim": 20}
    return randomise(FCMAE(**defaults | kwargs))


class OfEachKind(nn.Module):
    """One of each layer of the encoder: inductor takes a minute of C++ for the whole model, seconds for this."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel_size=1)
        self.block = Block(8)
        self.downsample = nn.Conv2d(8, 12, kernel_size=2, stride=2)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        sites = PackedSites.of_patches((images.shape[2] // 8, images.shape[3] // 8), ids)
        x = self.block(sites.stem(images, self.stem), sites)
        x, sites = sites.downsample(x, self.downsample)
        return sites.scatter(x)


# Patches


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 1, 16, 16), (2, 5, 48, 16)])
def test_unpatchify_undoes_patchify(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    patches = patchify(images, 16)
    assert patches.shape == (shape[0], shape[2] * shape[3] // 256, 256 * shape[1])
    assert torch.equal(unpatchify(patches, 16, (shape[2] // 16, shape[3] // 16)), images)


def test_patch_values_come_in_p_q_c_order_and_patches_row_by_row() -> None:
    b, c, gh, gw, patch = 2, 3, 2, 3, 4
    images = torch.randn(b, c, gh * patch, gw * patch)
    patches = patchify(images, patch)
    for y in range(gh):
        for x in range(gw):
            for p in range(patch):
                for q in range(patch):
                    values = patches[:, y * gw + x, (p * patch + q) * c : (p * patch + q + 1) * c]
                    assert torch.equal(values, images[:, :, y * patch + p, x * patch + q])


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"height 40 .* 32 and 48"):
        patchify(torch.zeros(1, 3, 40, 32), 16)
    with pytest.raises(ValueError, match="5 patches do not fill a grid of 2 x 3"):
        unpatchify(torch.zeros(1, 5, 48), 4, (2, 3))
    with pytest.raises(ValueError, match="no whole channels"):
        unpatchify(torch.zeros(1, 6, 47), 4, (2, 3))
    assert grid_shape((96, 160), 32) == (3, 5)


# Masks


def test_the_visible_count_is_the_official_one() -> None:
    assert count_visible(49, 0.6) == 19
    assert count_visible(16, 0.6) == 6
    assert count_visible(4, 0.999) == 1
    assert count_visible(4, 0.001) == 3
    assert count_visible(2, 0.5) == 1
    for num_patches in range(2, 60):
        for mask_ratio in np.linspace(0.01, 0.99, 30):
            p = count_visible(num_patches, mask_ratio)
            assert 1 <= p <= num_patches - 1
            assert p == min(max(int(num_patches * (1 - mask_ratio)), 1), num_patches - 1)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_mask_ratio_outside_0_1_is_refused(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        sample_visible_ids(2, 16, mask_ratio)
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        FCMAE(TINY, mask_ratio=mask_ratio)


@pytest.mark.parametrize("num_patches", [0, 1])
def test_fewer_than_two_patches_are_refused(num_patches: int) -> None:
    with pytest.raises(ValueError, match="at least two patches per image"):
        sample_visible_ids(2, num_patches, 0.6)


def test_an_image_of_one_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two patches per image, got 1"):
        FCMAE(TINY)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(("num_patches", "p"), [(49, 19), (16, 6)])
def test_sampled_ids_are_sorted_unique_and_in_range(num_patches: int, p: int) -> None:
    ids = sample_visible_ids(200, num_patches, 0.6)
    assert ids.shape == (200, p)
    assert ids.dtype == torch.int64
    assert (ids.diff(dim=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < num_patches


def test_sampling_is_determined_by_the_generator() -> None:
    first, again, other = (
        sample_visible_ids(8, 49, 0.6, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    before = torch.rand(3)
    torch.manual_seed(0)
    sample_visible_ids(8, 49, 0.6, torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(3), before)


def test_every_patch_is_visible_equally_often() -> None:
    n = 20_000
    ids = sample_visible_ids(n, 16, 0.6)
    frequency = torch.bincount(ids.flatten(), minlength=16) / n
    p = 6 / 16
    assert (frequency - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    visible = ids_to_booleans(ids, 16).double()
    together = (visible.T @ visible / n)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 6 * 5 / (16 * 15)).abs().max() < 0.02


def test_visible_and_hidden_ids_partition_the_patches() -> None:
    ids = some_ids(5, 15, 4)[:, torch.randperm(4)]
    hidden = hidden_ids(ids, 15)
    visible = ids_to_booleans(ids, 15)
    assert visible.dtype == torch.bool
    assert torch.equal(torch.cat([ids, hidden], 1).sort(1).values, torch.arange(15).expand(5, 15))
    assert (hidden.diff(dim=1) > 0).all()
    assert visible.gather(1, ids).all()
    assert not visible.gather(1, hidden).any()


# The loss


def loss_of_the_paper(pred: np.ndarray, images: np.ndarray, ids: np.ndarray, patch: int, normalise: bool) -> float:
    """Mean over hidden patches of the mean squared error between prediction and (normalised) pixels."""
    b, _, height, width = images.shape
    errors = []
    for i in range(b):
        hidden = [k for k in range(height // patch * (width // patch)) if k not in ids[i]]
        for j, k in enumerate(hidden):
            y, x = divmod(k, width // patch)
            target = images[i, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            if normalise:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            predicted = pred[i, j].reshape(patch, patch, -1).transpose(2, 0, 1)
            errors.append(((predicted - target) ** 2).mean())
    return float(np.mean(errors))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_the_loss_is_the_papers(in_chans: int, norm_pix_loss: bool) -> None:
    model = small_model(in_chans=in_chans, norm_pix_loss=norm_pix_loss).double()
    images = smooth_images(3, in_chans, 48, 80) + 1
    out = model(images)
    assert out.pred.shape == (3, 9, 256 * in_chans)
    assert out.visible_ids.shape == (3, 6)
    assert out.hidden_ids.shape == (3, 9)
    expected = loss_of_the_paper(
        out.pred.detach().numpy(), images.numpy(), out.visible_ids.numpy(), 16, norm_pix_loss
    )
    assert out.loss.item() == pytest.approx(expected, rel=1e-10)


def test_a_flat_patch_has_a_finite_loss() -> None:
    out = small_model()(torch.full((2, 3, 32, 48), 0.7))
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.loss, [out.pred]))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_visible_patches_never_reach_the_loss(norm_pix_loss: bool) -> None:
    ids = some_ids(2, 12, 5)
    hidden = hidden_ids(ids, 12)
    pred, images = torch.randn(2, 7, 48), torch.randn(2, 3, 12, 16)
    visible = ids_to_booleans(ids, 12).view(2, 1, 3, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    loss = hidden_patch_loss(pred, images, hidden, 4, norm_pix_loss=norm_pix_loss)
    changed = torch.where(visible, torch.nan, images)
    assert torch.equal(hidden_patch_loss(pred, changed, hidden, 4, norm_pix_loss=norm_pix_loss), loss)


# Pixels that are not known


def with_holes(b: int, c: int, height: int, width: int, patch: int = 16) -> Tensor:
    """Images with unknown pixels here and there, with patches of one known value, of two and of none."""
    images = smooth_images(b, c, height, width) + 1
    images[torch.rand(images.shape) < 0.2] = torch.nan
    for i, few in enumerate((0, 1, 2)):
        corner = images[..., :patch, i * patch : (i + 1) * patch]  # a view
        corner.fill_(torch.nan)
        corner[:, 0].flatten(1)[:, :few] = 0
        corner[:, 0, 3, :few] = torch.arange(1.0, few + 1, dtype=images.dtype)
    return images


def loss_of_what_is_known(
    pred: np.ndarray, images: np.ndarray, ids: np.ndarray, patch: int, normalise: bool
) -> float:
    """As `loss_of_the_paper`, of known values alone, value by value."""
    errors = []
    for i in range(len(images)):
        hidden = [k for k in range(images.shape[2] // patch * (images.shape[3] // patch)) if k not in ids[i]]
        for j, k in enumerate(hidden):
            y, x = divmod(k, images.shape[3] // patch)
            target = images[i, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            predicted = pred[i, j].reshape(patch, patch, -1).transpose(2, 0, 1)
            known = [place for place in np.ndindex(target.shape) if not np.isnan(target[place])]
            if len(known) < (2 if normalise else 1):
                continue
            values = np.array([target[place] for place in known])
            if normalise:
                values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
            errors.append(np.mean([(predicted[place] - v) ** 2 for place, v in zip(known, values, strict=True)]))
    return float(np.mean(errors))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_the_loss_is_that_of_what_is_known(in_chans: int, norm_pix_loss: bool) -> None:
    model = small_model(in_chans=in_chans, norm_pix_loss=norm_pix_loss, nodata=True).double()
    images, ids = with_holes(3, in_chans, 48, 80), torch.tensor([[5, 6, 9, 14]] * 3)
    out = model(images, ids)
    expected = loss_of_what_is_known(out.pred.detach().numpy(), images.numpy(), ids.numpy(), 16, norm_pix_loss)
    assert out.loss.item() == pytest.approx(expected, rel=1e-10)
    (grad,) = torch.autograd.grad(out.loss, out.pred, retain_graph=True)
    unknown = patchify(images, 16)[torch.arange(3)[:, None], out.hidden_ids].isnan()
    assert not grad[unknown].any()
    assert (grad[:, 3:][~unknown[:, 3:]] != 0).all()
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_where_all_is_known_the_loss_is_the_one_without_nodata(norm_pix_loss: bool) -> None:
    model = small_model(norm_pix_loss=norm_pix_loss, nodata=True).double()
    plain = small_model(norm_pix_loss=norm_pix_loss).double()
    plain.load_state_dict(model.state_dict())
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    results = []
    for network in (plain, model):
        out = network(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, network))
    assert_same(results[1], results[0])


def test_without_nodata_the_loss_is_bit_for_bit_that_of_the_fused_operation() -> None:
    images, ids = smooth_images(2, 3, 48, 64, torch.float32), some_ids(2, 12, 5)
    out = small_model()(images, ids)
    assert torch.equal(out.loss, hidden_patch_loss(out.pred, images, out.hidden_ids, 16, norm_pix_loss=True))


@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_pixels_were_before_they_were_unknown_never_matters(sparse: bool, target: str) -> None:
    model = small_model(target=target, sparse=sparse, nodata=True)
    normalize = PixelNormalizer((0.5,) * 3, (0.2,) * 3)
    unknown, ids = torch.rand(2, 3, 48, 64) < 0.01, some_ids(2, 12, 5)
    pixels = torch.rand(2, 3, 48, 64)
    results = []
    for fill in (0.0, 1e9, torch.inf):
        read = without_nodata(torch.where(unknown, fill, pixels).numpy(), Reading(nodata=fill))
        out = model(normalize(torch.from_numpy(read), unknown=math.nan), ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    for result in results[1:]:
        assert all(torch.equal(result[name], tensor) for name, tensor in results[0].items())
    assert results[0]["loss"] > 0


def test_the_encoder_sees_zeros_where_pixels_are_unknown() -> None:
    model = small_model(nodata=True)
    images, ids = smooth_images(2, 3, 48, 64, torch.float32), some_ids(2, 12, 5)
    images[:, 1:, :20, ::3] = torch.nan
    assert torch.equal(model(images, ids).pred, model(images.nan_to_num(0.0), ids).pred)


@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_images_of_which_nothing_is_known_have_no_loss_and_no_gradient(norm_pix_loss: bool, target: str) -> None:
    model = small_model(norm_pix_loss=norm_pix_loss, target=target, nodata=True)
    out = model(torch.full((2, 3, 48, 48), torch.nan))
    assert out.loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(out.loss, model).values())


def test_an_image_of_which_nothing_is_known_changes_nothing_for_the_others() -> None:
    model = small_model(nodata=True).double()
    images, ids = smooth_images(3, 3, 48, 64), some_ids(3, 12, 5)
    images[1] = torch.nan
    losses = [model(images[chosen], ids[chosen]).loss for chosen in ([0, 1, 2], [0, 2])]
    assert relative_error(*losses) < 1e-12


@pytest.mark.any_cpu
@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_compile_traces_the_model_with_unknown_pixels_whatever_is_known(norm_pix_loss: bool, target: str) -> None:
    torch.compiler.reset()
    model = small_model(
        variant=((1, 1, 1, 1), (8, 16, 24, 32)), norm_pix_loss=norm_pix_loss, target=target, nodata=True
    ).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = some_ids(2, 15, 5)
    holes, whole = with_holes(2, 3, 48, 80), smooth_images(2, 3, 48, 80)
    for images in (holes, whole, torch.full_like(whole, math.nan)):
        results = []
        with torch.compiler.set_stance("default" if images is holes else "fail_on_recompile"):
            for run in (model, compiled):
                out = run(images, ids)
                results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
        assert_same(results[1], results[0])


def test_picked_patches_are_those_of_patchify() -> None:
    images, ids = torch.randn(2, 5, 12, 16), some_ids(2, 12, 5)
    assert torch.equal(pick_patches(images, ids, 4), patchify(images, 4)[torch.arange(2)[:, None], ids])


@pytest.mark.parametrize("layout", SPARSE)
def test_hidden_pixels_never_reach_the_prediction(layout: Layout) -> None:
    model = small_model(layout=layout)
    images, ids = torch.randn(2, 3, 48, 48), some_ids(2, 9, 4)
    pixels = ids_to_booleans(ids, 9).view(2, 1, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    clean, changed = model(images, ids), model(torch.where(pixels, images, torch.nan), ids)
    assert torch.equal(clean.pred, changed.pred)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_starts_near_one(norm_pix_loss: bool) -> None:
    model = FCMAE(TINY, stem_stride=2, norm_pix_loss=norm_pix_loss)
    images = smooth_images(16, 3, 96, 96, torch.float32)
    images = (images - images.mean()) / images.std()
    assert model(images).loss.item() == pytest.approx(1.0, abs=0.06)


def test_layouts_give_the_same_loss_and_gradients() -> None:
    model = small_model(decoder_depth=2).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    results = []
    for layout in SPARSE:
        model.layout = layout
        out = model(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    assert_same(results[1], results[0])
    assert all(tensor.abs().max() > 0 for tensor in results[0].values())


def test_a_model_without_fused_operations_gives_the_same_loss_and_gradients() -> None:
    model = small_model(decoder_depth=2).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    fired: list[nn.Module] = []
    model.decoder.get_submodule("decoder.0.grn").register_forward_hook(lambda module, *_: fired.append(module))
    results = []
    for fused in (True, False):
        set_fused(model, fused)
        out = model(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
        assert bool(fired) is not fused
    assert_same(results[1], results[0])


def test_the_encoders_output_does_not_change_hidden_cells_of_the_decoder_input() -> None:
    decoder = small_model().decoder
    features, ids = torch.randn(2, 3, 4, 32), some_ids(2, 12, 5)
    is_hidden = ids_to_booleans(ids, 12).view(2, 3, 4, 1)
    assert torch.equal(decoder([features], ids), decoder([features.masked_fill(is_hidden, torch.nan)], ids))


def test_masks_are_reproducible_and_new_each_time() -> None:
    model = small_model()
    images = torch.randn(4, 3, 64, 64)
    first, again, other = (
        model(images, generator=torch.Generator().manual_seed(seed)).visible_ids for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(model(images).visible_ids, model(images).visible_ids)


def test_images_that_do_not_fit_are_refused_by_the_nearest_sizes() -> None:
    for ids in (None, some_ids(2, 12, 12)):
        with pytest.raises(ValueError, match=r"height 40 .* 16: the nearest sizes that are: 32 and 48"):
            small_model()(torch.randn(2, 3, 40, 64), ids)


def test_given_ids_are_used_and_returned() -> None:
    ids = some_ids(2, 9, 7)
    assert torch.equal(small_model()(torch.randn(2, 3, 48, 48), ids).visible_ids, ids)


def test_all_patches_visible_is_refused() -> None:
    with pytest.raises(ValueError, match="all 9 patches are visible"):
        small_model()(torch.randn(2, 3, 48, 48), torch.arange(9).expand(2, 9))


@pytest.mark.parametrize(
    "kwargs", [{"decoder_depth": 0}, {"decoder_dim": 0}, {"variant": "nona"}, {"stem_stride": 8}]
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        FCMAE(kwargs.pop("variant", TINY), **kwargs)


# Ways of running


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precisions_run(dtype: torch.dtype, layout: Layout) -> None:
    model = small_model(layout=layout).to(dtype)
    out = model(torch.randn(2, 3, 64, 64, dtype=dtype))
    assert out.loss.dtype == out.pred.dtype == dtype
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_with_the_loss_in_float32(dtype: torch.dtype, layout: Layout) -> None:
    model = small_model(layout=layout)
    images, ids = smooth_images(2, 3, 64, 64, torch.float32), some_ids(2, 16, 6)
    expected = model(images, ids).loss
    with torch.autocast("cpu", dtype=dtype):
        out = model(images, ids)
    assert out.loss.dtype == torch.float32
    assert out.pred.dtype == dtype
    assert relative_error(out.loss, expected) < 0.05
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


@pytest.mark.any_cpu
@pytest.mark.parametrize("layout", SPARSE)
def test_compile_traces_the_whole_model_and_changes_nothing(layout: Layout) -> None:
    torch.compiler.reset()
    model = small_model(variant=((1, 1, 1, 1), (8, 16, 24, 32)), layout=layout, drop_path=0.5).double()
    images, ids = smooth_images(4, 3, 48, 64), some_ids(4, 12, 5)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)  # the same branches dropped
        out = run(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    assert_same(results[1], results[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPU")
def test_inductor_agrees_with_eager() -> None:
    torch.compiler.reset()
    module = randomise(OfEachKind())
    images, ids = smooth_images(2, 3, 24, 32, torch.float32), some_ids(2, 12, 5)
    results = []
    for run in (module, torch.compile(module, fullgraph=True)):
        out = run(images, ids)
        results.append({"out": out} | gradients(out, module))
    assert_same(results[1], results[0], tolerance=1e-4)


def test_a_dense_encoder_on_masked_input_sees_zeros_where_patches_are_hidden() -> None:
    model = small_model(sparse=False).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    visible = ids_to_booleans(ids, 12).view(2, 1, 3, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    zeroed = torch.where(visible, images, 0.0)
    (seen,) = model._encode(torch.where(visible, images, torch.nan), ids)
    assert relative_error(seen, model.encoder.features(zeroed)) < 1e-12
    assert relative_error(seen, model.encoder.features(images, ids)) > 1e-3
    assert seen[~ids_to_booleans(ids, 12).view(2, 3, 4)].any()
    out = model(images, ids)
    expected = hidden_patch_loss(out.pred, images, hidden_ids(ids, 12), 16, norm_pix_loss=True)
    assert relative_error(out.loss, expected) < 1e-12
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(images, ids).loss, out.loss) < 1e-10
