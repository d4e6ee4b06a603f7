"""HOG as a target: the histograms of a slow loop over pixels, and what a loss against them must hold."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, gradients, randomise, relative_error, smooth_images, some_ids

from fcmae import FCMAE
from fcmae.config import ModelSection
from fcmae.hog import EPS, hog
from fcmae.loss import TARGETS, HOGTarget, hidden_patch_loss
from fcmae.masking import hidden_ids


def hog_of_the_papers(image: np.ndarray, cell: int) -> np.ndarray:
    """HOG of one channel (h, w), pixel by pixel: (h / cell, w / cell, 9)."""
    height, width = image.shape
    histograms = np.zeros((height // cell, width // cell, 9))
    for y in range(height):
        for x in range(width):
            dx = image[y, x + 1] - image[y, x - 1] if 0 < x < width - 1 else 0.0
            dy = image[y + 1, x] - image[y - 1, x] if 0 < y < height - 1 else 0.0
            place = math.degrees(math.atan2(dy, dx)) % 180 / 20  # bins of 20 degrees
            lower, share = math.floor(place), place % 1
            votes = histograms[y // cell, x // cell]
            votes[lower % 9] += (1 - share) * math.hypot(dx, dy) / cell**2
            votes[(lower + 1) % 9] += share * math.hypot(dx, dy) / cell**2
    return histograms / np.sqrt((histograms**2).sum(-1, keepdims=True) + EPS**2)


def small_model(**kwargs: Any) -> FCMAE:
    return randomise(FCMAE(TINY, **{"stem_stride": 2, "decoder_dim": 20, "target": "hog"} | kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "cell"), [((2, 3, 16, 24), 8), ((1, 1, 8, 8), 8), ((2, 5, 8, 12), 4)])
def test_the_histograms_are_those_of_a_loop_over_pixels(
    shape: tuple[int, int, int, int], cell: int, dtype: torch.dtype
) -> None:
    images = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = hog(images, cell)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    expected = [[hog_of_the_papers(channel, cell) for channel in image] for image in images.double().numpy()]
    stacked = torch.from_numpy(np.array(expected)).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (b, c * 9, h, w)
    assert relative_error(out.double(), stacked) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_brightness_and_contrast_do_not_change_hog_and_a_mirror_moves_its_bins() -> None:
    images = smooth_images(2, 1, 32, 32)
    histograms = hog(images, 8)
    assert relative_error(hog(5 * images + 3, 8), histograms) < 0.02  # but for what keeps noise down
    mirrored = hog(images.flip(-1), 8).flip(-1)
    assert relative_error(mirrored[:, [0, *range(8, 0, -1)]], histograms) < 1e-10


def test_flat_images_and_noise_below_a_level_have_next_to_no_histogram() -> None:
    assert not hog(torch.full((1, 3, 16, 16), 0.7), 8).any()
    assert hog(1e-4 * torch.randn(1, 3, 16, 16), 8).abs().max() < 0.02


def test_a_step_votes_for_the_one_orientation_across_it() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[..., 4:] = 1
    assert torch.allclose(hog(images, 8)[0, :, 0, 0], torch.eye(9)[0], atol=1e-2)


@pytest.mark.parametrize(("stem_stride", "cell", "num_values"), [(4, 8, 432), (2, 8, 108), (1, 4, 108)])
def test_the_decoder_predicts_as_many_values_as_the_target_has(
    stem_stride: int, cell: int, num_values: int
) -> None:
    model = small_model(stem_stride=stem_stride)
    patch = model.patch_size
    out = model(torch.randn(2, 3, 3 * patch, 2 * patch))
    assert HOGTarget().cell(patch) == cell
    assert out.pred.shape == (2, 4, num_values)
    assert model.decoder.get_parameter("pred.bias").shape == (num_values,)


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_the_loss_is_the_mean_squared_error_on_hidden_patches(in_chans: int) -> None:
    model = small_model(in_chans=in_chans).double()
    images = smooth_images(2, in_chans, 32, 48)
    out = model(images)
    errors = []
    for i in range(2):
        channels = np.stack([hog_of_the_papers(channel, 8) for channel in images[i].numpy()], 2)  # (4, 6, c, 9)
        for j, k in enumerate(out.hidden_ids[i].tolist()):
            y, x = divmod(k, 3)
            target = channels[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1)
            errors.append(((out.pred[i, j].detach().numpy() - target) ** 2).mean())
    assert out.loss.item() == pytest.approx(float(np.mean(errors)), rel=1e-10)
    grad = torch.autograd.grad(out.loss, [out.pred])[0]
    assert grad.isfinite().all()
    assert grad.abs().min() > 0


def test_patches_that_touch_no_hidden_one_never_reach_the_loss() -> None:
    images, ids = torch.randn(1, 3, 32, 64), torch.tensor([[0, 1, 4, 5, 6]])  # 2 x 4; visible but for 2, 3 and 7
    pred, hidden = torch.randn(1, 3, 108), hidden_ids(ids, 8)
    loss = HOGTarget().loss(pred, images, hidden, 16)
    changed = images.clone()
    changed[..., :31] = torch.nan  # all but the pixels next to the hidden patches
    assert torch.equal(HOGTarget().loss(pred, changed, hidden, 16), loss)


def test_pixels_remain_as_they_were() -> None:
    pred, images, hidden = torch.randn(2, 5, 768), torch.randn(2, 3, 48, 48), hidden_ids(some_ids(2, 9, 4), 9)
    for norm_pix_loss in (True, False):
        target = TARGETS["pixels"](norm_pix_loss, False)
        expected = hidden_patch_loss(pred, images, hidden, 16, norm_pix_loss=norm_pix_loss)
        assert torch.equal(target.loss(pred, images, hidden, 16), expected)
        assert target.num_values(16, 3) == 768


def test_norm_pix_loss_is_of_pixels_alone() -> None:
    assert TARGETS["hog"](True, False) == TARGETS["hog"](False, False) == HOGTarget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_target_and_loss_in_float32(dtype: torch.dtype) -> None:
    model = small_model()
    images, ids = smooth_images(2, 3, 48, 48, torch.float32), some_ids(2, 9, 4)
    with torch.autocast("cpu", dtype=dtype):
        out = model(images, ids)
        assert hog(images, 8).dtype == torch.float32
    assert out.pred.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, HOGTarget().loss(out.pred.float(), images, out.hidden_ids, 16))
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


def test_compile_traces_the_loss_and_changes_nothing() -> None:
    torch.compiler.reset()
    images, hidden = smooth_images(2, 3, 32, 48), some_ids(2, 6, 4)
    pred = torch.randn(2, 4, 108, dtype=torch.float64, requires_grad=True)
    results = []
    for loss in (HOGTarget().loss, torch.compile(HOGTarget().loss, fullgraph=True, backend="aot_eager")):
        out = loss(pred, images, hidden, 16)
        results.append({"loss": out, "grad": torch.autograd.grad(out, pred)[0]})
    assert_same(results[1], results[0])


def test_an_unknown_target_is_refused_by_the_choices() -> None:
    assert set(get_args(ModelSection.model_fields["target"].annotation)) == set(TARGETS)
    with pytest.raises(ValueError, match="unknown target 'sift': choose from pixels, hog"):
        FCMAE(TINY, target="sift")
