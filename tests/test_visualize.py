"""Pictures: what is hidden is shown as predicted, what is visible as it is."""

import math

import numpy as np
import pytest
import torch

from fcmae import FCMAE, patchify, sample_visible_ids
from fcmae.data import PixelNormalizer
from fcmae.hog import hog
from fcmae.loss import TARGETS, patch_statistics
from fcmae.masking import hidden_ids
from fcmae.visualize import draw_confusion, draw_panels, draw_reconstructions, draw_segments, reconstruct

TINY = ((1, 1, 1, 1), (8, 8, 16, 16))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss: bool) -> None:
    images = torch.randn(2, 3, 32, 48)
    target = patchify(images, 8)
    mean, std = patch_statistics(target)
    pred = (target - mean) / std if norm_pix_loss else target
    ids = sample_visible_ids(2, 24, 0.6)
    hidden = hidden_ids(ids, 24)
    pred = pred[torch.arange(2)[:, None], hidden]
    reconstruction, visible = reconstruct(images, pred, hidden, 8, norm_pix_loss=norm_pix_loss)
    assert torch.allclose(reconstruction, images, atol=1e-5)
    assert visible.float().mean().item() == pytest.approx(ids.shape[1] / 24)


def test_visible_patches_are_pasted_in_and_hidden_ones_get_their_own_mean() -> None:
    images = torch.randn(1, 3, 32, 32)
    ids = hidden_ids(torch.tensor([[0, 5]]), 16)
    reconstruction, visible = reconstruct(images, torch.zeros(1, 14, 192), ids, 8, norm_pix_loss=True)
    assert torch.equal(torch.where(visible, reconstruction, 0), torch.where(visible, images, 0))
    hidden = patchify(reconstruction, 8)[0, 1]
    assert torch.allclose(hidden, patchify(images, 8)[0, 1].mean().expand_as(hidden), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 160)])
def test_panels_are_rgb_rows_of_three(channels: int, height: int, width: int) -> None:
    images = torch.rand(2, channels, height, width)
    picture = draw_panels({"original": images, "masked": images, "reconstruction": images})
    factor = -(-128 // height)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (3 * (width * factor + 4) + 4, 3)
    body = picture[picture.shape[0] - 2 * (height * factor + 4) - 4 :]
    shown = body[4 : 4 + height * factor : factor, 4 : 4 + width * factor : factor]
    first = images[0, {1: [0, 0, 0], 2: [0, 1, 0]}.get(channels, [0, 1, 2])]
    assert np.array_equal(shown, (first * 255).round().byte().permute(1, 2, 0).numpy())


def test_columns_of_different_sizes_are_drawn_in_the_largest() -> None:
    small, large = torch.rand(1, 3, 40, 80), torch.rand(1, 1, 160, 320)
    picture = draw_panels({"small": small, "large": large})
    assert picture.shape[1] == 2 * (320 + 4) + 4
    body = picture[-164:-4]
    assert np.array_equal(body[::4, 4:324:4], (small[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert np.array_equal(body[:, 328:-4, 0], (large[0, 0] * 255).round().byte().numpy())


@pytest.mark.parametrize("k", range(9))
def test_a_segment_lies_along_the_edge_that_makes_it(k: int) -> None:
    angle = k * math.pi / 9  # of the gradient
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = torch.cos(0.7 * (x * math.cos(angle) + y * math.sin(angle)))[None, None]
    segments = draw_segments(hog(waves, 16), 33)[0, 0, 33:, 33:]
    assert segments.shape == (33, 33)
    assert 0 <= segments.min() <= segments.max() <= 1
    y, x = (segments > 0.6).nonzero().double().sub(16).unbind(1)
    along, across = y * math.cos(angle) - x * math.sin(angle), y * math.sin(angle) + x * math.cos(angle)
    assert across.abs().max() < 2
    assert along.amax() - along.amin() > 25


def test_predicted_histograms_are_pasted_in_where_patches_are_hidden() -> None:
    model = FCMAE(TINY, stem_stride=2, decoder_dim=16, target="hog")
    with torch.no_grad():
        model.decoder.get_parameter("pred.weight").zero_()
        model.decoder.get_parameter("pred.bias").zero_()  # no gradients are predicted
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    ids = torch.tensor([[0, 5, 10, 15]])
    picture = draw_reconstructions(model, PixelNormalizer((0.5,) * 3, (0.25,) * 3), pixels, ids)
    assert picture.shape[1] == 4 * (128 + 4) + 4  # original, masked, HOG, HOG predicted
    true, predicted = (picture[-132:-4, left : left + 128] for left in (4 + 2 * 132, 4 + 3 * 132))
    visible = np.kron(np.eye(4, dtype=bool), np.ones((32, 32), bool))
    assert np.array_equal(true[visible], predicted[visible])
    assert not predicted[~visible].any()
    assert true[~visible].any()


@pytest.mark.parametrize("target", TARGETS)
def test_drawing_neither_trains_nor_changes_the_model(target: str) -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_dim=16, drop_path=0.5, target=target)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = sample_visible_ids(2, 16, 0.6)
    normalize = PixelNormalizer((0.5,) * 3, (0.25,) * 3)
    first, again = (draw_reconstructions(model, normalize, pixels, ids) for _ in range(2))
    assert np.array_equal(first, again)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("number", [1, 2, 30, 31, 51, 1001])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(number: int) -> None:
    picture = draw_confusion(np.eye(number, dtype=np.int64) * 5, [f"class {i} " + "x" * i for i in range(number)])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert max(picture.shape) < 2100
    blue = (picture == [8, 48, 107]).all(2)
    assert blue.any()


def test_the_darkest_cell_is_where_the_guesses_are() -> None:
    picture = draw_confusion(np.array([[0, 4], [1, 0]]), ["a", "b"])
    rows, columns = np.nonzero((picture == [8, 48, 107]).all(2))
    upper, lower = rows < rows.mean(), rows > rows.mean()
    assert columns[upper].min() > columns[lower].max()
