"""Pictures: what is hidden is shown as predicted, what is visible as it is."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fcmae import FCMAE, patchify, sample_visible_ids
from fcmae.data import PixelNormalizer
from fcmae.hog import hog
from fcmae.loss import TARGETS, patch_statistics
from fcmae.masking import hidden_ids
from fcmae.visualize import (
    HATCH,
    display_range,
    draw_captioned,
    draw_confusion,
    draw_panels,
    draw_reconstructions,
    draw_segments,
    reconstruct,
    write_figure,
)

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


def test_unknown_pixels_are_hatched_in_all_columns_and_change_no_others() -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_dim=16, in_chans=5, nodata=True)
    pixels = 300 + torch.randn(1, 5, 32, 32)
    unknown = pixels.clone()
    unknown[..., :10, :12] = torch.nan  # in visible and hidden patches
    normalize, ids = PixelNormalizer((300.0,) * 5, (1.0,) * 5), torch.tensor([[0, 2, 7, 9, 12]])
    picture = draw_reconstructions(model, normalize, unknown, ids, bands=(4, 2, 0))
    columns = [picture[-132:-4, left : left + 128].astype(int) for left in (4, 136, 268)]
    hatched = [np.all(np.isin(column, [round(255 * gray) for gray in HATCH]), axis=2) for column in columns]
    for i, found in enumerate(hatched):
        known_gray = found[40:].mean() + found[:, 48:].mean()
        assert known_gray < 0.01
        assert found[:32, :32].all()  # patch 0, visible
        assert found[:40, 32:48].all() == (i != 1)  # patches 1 and 5, hidden
    assert len(np.unique(columns[0][:40, :48])) == len(HATCH)


def test_panels_of_one_band_that_is_not_known_are_hatched_in_its_colour() -> None:
    image = torch.rand(1, 3, 128, 128)
    image[:, 1, :64] = torch.nan
    body = draw_panels({"original": image, "masked": image})[-132:-4, 4:132]
    assert set(np.unique(body[:64, :, 1])) == {round(255 * gray) for gray in HATCH}
    assert np.array_equal(body[..., [0, 2]], (image[0, [0, 2]] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_deep_pixels_are_shown_between_their_percentiles_and_bytes_as_they_are(dtype: torch.dtype) -> None:
    pixels = torch.arange(1000, 2024).reshape(1, 1, 32, 32).repeat(1, 2, 1, 1)
    low, high = display_range(pixels.to(dtype))
    full = 65535 if dtype == torch.uint16 else 1
    assert low.shape == high.shape == (1, 2, 1, 1)
    assert torch.allclose(low * full, torch.tensor(1000 + 0.02 * 1023), rtol=1e-5)
    assert torch.allclose(high * full, torch.tensor(1000 + 0.98 * 1023), rtol=1e-5)
    assert [x.unique().tolist() for x in display_range((pixels // 10).to(torch.uint8))] == [[0], [1]]


def test_unknown_pixels_leave_the_shown_range_to_the_others() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    holed = torch.cat([pixels, torch.full((2, 3, 32, 8), torch.nan)], 3)
    assert all(map(torch.allclose, display_range(holed), display_range(pixels)))


@pytest.mark.parametrize("value", [0.0, 1e-9, 500.0, -3e8, math.nan])
def test_a_flat_band_is_shown_as_gray_and_one_without_any_known_pixel_has_a_range(value: float) -> None:
    pixels = torch.full((1, 1, 8, 8), value)
    low, high = display_range(pixels)
    assert low.isfinite().all()
    assert high.isfinite().all()
    assert low < high
    if not math.isnan(value):
        assert torch.allclose((pixels - low) / (high - low), torch.tensor(0.5))


def test_a_perfect_prediction_of_what_is_known_reconstructs_it() -> None:
    images = 7 + torch.randn(2, 3, 32, 48)
    images[:, :, 3:20, 5:30] = torch.nan
    target = patchify(images, 8)
    mean, std = patch_statistics(target)
    ids = torch.arange(24).expand(2, 24)
    pred = ((target - mean) / std).nan_to_num(5.0)
    reconstruction, _ = reconstruct(images, pred, ids, 8, norm_pix_loss=True)
    known = ~images.isnan()
    assert torch.allclose(reconstruction[known], images[known], atol=1e-5)
    assert reconstruction.isfinite().all()


def test_a_dollar_in_a_figure_is_a_dollar(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 1))
    figure.suptitle("runs/$a_b$ and $")
    write_figure(figure, tmp_path / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert not figure._suptitle.get_parse_math()  # pyright: ignore


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


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, torch.uint8), (3, torch.uint8), (5, torch.uint16), (3, torch.float32)]
)
def test_images_of_any_kind_get_their_captions(channels: int, dtype: torch.dtype) -> None:
    pixels = (200 * torch.rand(5, channels, 32, 32)).to(dtype)
    picture = draw_captioned(pixels, [(f"cat {'long ' * 50}", "taken for $dog$, 97%")] * 5)
    height, width = 128 + 2 * 14 + 3 * 6, 128 + 2 * 6
    assert picture.shape == (2 * height, 4 * width, 3)
    assert picture[6 + 128 : height, :width].min() < 100  # text
    assert (picture[height:, width:] == 255).all()  # the last row has one
