"""Pictures of segmentations: colours that differ, masks written as they are read, panels with names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data.masks import as_classes, open_mask
from fcmae.segment_pictures import (
    ROWS,
    class_colours,
    draw_legend,
    draw_overlay,
    draw_segmentations,
    overlay,
    paint,
    write_mask,
)


def test_all_colours_differ_and_those_of_the_first_classes_clearly() -> None:
    colours = class_colours().astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(len(colours), dtype=int)
    assert len(colours) == 256
    assert distances.min() >= 32
    assert distances[:20, :20].min() >= 96
    assert (colours.sum(1) < 3 * 250).all()  # none is the white of pixels without a class


@pytest.mark.parametrize(("ignored", "most"), [(255, 255), (0, 255), (None, 256), (255, 900), (7, 20)])
def test_a_mask_is_read_as_it_was_written_and_has_the_colours_of_its_classes(
    tmp_path: Path, ignored: int | None, most: int
) -> None:
    classes = np.arange(most, dtype=np.int16).reshape(1, -1).repeat(3, 0)
    if ignored is not None:
        classes[1] = -1
    write_mask(tmp_path / "mask.png", classes, ignored)
    with open(tmp_path / "mask.png", "rb") as file:
        mask = open_mask(file)
        assert np.array_equal(as_classes(mask.read((0, 0, *classes.shape)), ignored), classes)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == ("P" if most <= 256 else "I;16")
        if most <= 256:
            seen = np.asarray(image.convert("RGB"))
            assert np.array_equal(seen[0], class_colours()[:most])
            assert ignored is None or (seen[1] == 255).all()


def test_pixels_without_a_class_need_a_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pixels without a class"):
        write_mask(tmp_path / "mask.png", np.full((2, 2), -1, np.int16))
    assert not list(tmp_path.iterdir())


def test_an_overlay_leaves_pixels_without_a_class() -> None:
    images, classes = torch.rand(1, 3, 4, 4), torch.randint(-1, 3, (1, 4, 4))
    laid = overlay(images, classes)
    unlabelled = (classes < 0)[:, None].expand_as(images)
    assert torch.equal(laid[unlabelled], images[unlabelled])
    assert torch.allclose(laid[~unlabelled], ((images + paint(classes)) / 2)[~unlabelled])


@pytest.mark.parametrize(("height", "width", "factor"), [(ROWS + 40, 300, 1), (2 * ROWS, 256, 1), (50, 100, 3)])
def test_a_drawn_overlay_has_the_images_own_size_or_a_multiple_and_names_below(
    height: int, width: int, factor: int
) -> None:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    classes = torch.randint(-1, 2, (height, width), dtype=torch.int16)
    drawn = draw_overlay(pixels, classes, ["sky", "sea", "never"])
    assert drawn.shape[1] == width * factor
    wanted = overlay(pixels[None] / 255, classes[None])[0].mul(255).round().permute(1, 2, 0)
    picture, legend = np.split(drawn, [height * factor])
    assert np.abs(picture[::factor, ::factor].astype(int) - wanted.numpy()).max() <= 1
    shown = [(legend == colour).all(-1).any() for colour in class_colours()[:3]]
    assert shown == [True, True, False]


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint16), (5, torch.float32)])
def test_an_overlay_of_deep_pixels_is_stretched_as_other_pictures(channels: int, dtype: torch.dtype) -> None:
    pixels = (torch.rand(channels, 300, 260) * 200 + 100).to(dtype)
    if dtype == torch.float32:
        pixels[:, :20] = torch.nan
    drawn = draw_overlay(pixels, torch.full((300, 260), -1, dtype=torch.int16), ["sky"])[20:300]
    assert drawn.std() > 50


@pytest.mark.parametrize(
    ("channels", "dtype"), [(3, torch.uint8), (1, torch.uint16), (5, torch.float32), (2, torch.uint8)]
)
def test_panels_show_image_truth_prediction_and_overlay(channels: int, dtype: torch.dtype) -> None:
    pixels = (torch.rand(2, channels, 32, 48) * 200).to(dtype)
    truth = torch.randint(-1, 3, (2, 32, 48), dtype=torch.int16)
    names = ["sky", "sea", "a land of a rather long name"]
    both = draw_segmentations(pixels, truth=truth, predicted=truth.clamp(min=0), class_names=names)
    one = draw_segmentations(pixels, predicted=truth, class_names=names)
    assert both.dtype == np.uint8
    assert both.shape[1] / one.shape[1] == pytest.approx(4 / 3, rel=0.02)
    for colour in class_colours()[:3]:
        assert (both == colour).all(-1).sum() > 500


def test_a_legend_breaks_its_lines() -> None:
    names = [f"class number {i}" for i in range(20)]
    legend = draw_legend(names, range(20), 300)
    assert legend.shape[1] == 300
    assert legend.shape[0] > 150
    assert draw_legend(["a name that is longer than all of the picture"], [0], 50).shape[1] == 50
