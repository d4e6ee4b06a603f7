"""Views of an image and its mask together: what is cut, resized, flipped and padded alike; samples and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fcmae.data import load_batches, save_arrays
from fcmae.data.batches import NOT_COUNTED
from fcmae.data.masks import Pair, SegmentationSource, open_segmentation, save_masks
from fcmae.data.sampling import PADDING
from fcmae.data.segments import (
    SegmentationBatch,
    SegmentationDataset,
    SegmentationEvaluation,
    SegmentationView,
    cover_pair,
    fixed_pairs,
    resize_classes,
)
from fcmae.data.views import Part
from fcmae.seeding import seeded

FULL = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1.0}


def blocks(height: int, width: int, dtype: torch.dtype = torch.uint8, channels: int = 1) -> tuple[Tensor, Tensor]:
    """An image that is bright exactly where its class is 1: a few large rectangles."""
    classes = torch.zeros(height, width, dtype=torch.int16)
    classes[height // 4 : height // 2, width // 8 : width // 2] = 1
    classes[height // 2 :, 3 * width // 4 :] = 1
    pixels = (classes.float() * FULL[dtype]).to(dtype)
    return pixels.expand(channels, -1, -1).contiguous(), classes


def view_of(view: SegmentationView, pixels: Tensor, classes: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Part]:
    """What the view makes of an image, and the part that it drew."""

    def read(box: tuple[int, int, int, int]) -> Tensor:
        top, left, height, width = box
        return classes[top : top + height, left : left + width]

    with seeded(seed):
        part = view.part(classes.shape[0], classes.shape[1], read)
        top, left, height, width, _ = part
        box = pixels[:, top : top + height, left : left + width]
        return *view.finish(Pair(box, read(part[:4]), part)), part


def source_of(folder: Path, images: np.ndarray, masks: np.ndarray) -> SegmentationSource:
    save_arrays(folder, images)
    save_masks(folder, masks)
    return open_segmentation("arrays", str(folder), "train", None)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", FULL)
def test_classes_stay_where_their_pixels_are(dtype: torch.dtype, channels: int) -> None:
    view = SegmentationView((64, 80), mean=[0.0] * channels)
    shared = 0.0
    for seed in range(20):
        pixels, classes, _ = view_of(view, *blocks(96, 90, dtype, channels), seed=seed)
        assert pixels.shape == (channels, 64, 80)
        assert pixels.dtype == dtype
        assert classes.shape == (64, 80)
        bright = pixels[0].float() > FULL[dtype] / 2
        shared += float(((classes == 1) == bright).float().mean())
    assert shared / 20 > 0.99  # of the pixels; at edges a filter rounds otherwise than the nearest pixel


def test_a_view_depends_on_the_seed_alone() -> None:
    view = SegmentationView((32, 32), mean=[0.5] * 3, jitter=0.5)
    pixels, classes = blocks(50, 60, channels=3)
    first, again, other = (view_of(view, pixels, classes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_part_that_is_read_is_what_the_factor_leaves_of_the_crop() -> None:
    view = SegmentationView((32, 48), mean=[0.0], scale=(2.0, 2.0), most_of_one=1.0)
    *_, part = view_of(view, *blocks(100, 100))
    assert (part.height, part.width, part.enough) == (16, 24, (32, 48))
    view = SegmentationView((32, 48), mean=[0.0], scale=(0.5, 0.5), most_of_one=1.0)
    *_, part = view_of(view, *blocks(100, 100))
    assert (part.height, part.width, part.enough) == (64, 96, (32, 48))


def test_the_short_side_sets_the_size_at_a_factor_of_one() -> None:
    view = SegmentationView((32, 32), mean=[0.0], scale=(1.0, 1.0), short_side=32, most_of_one=1.0)
    *_, part = view_of(view, *blocks(128, 256))
    assert (part.height, part.width, part.enough) == (128, 128, (32, 32))


def test_what_a_small_image_lacks_is_the_mean_and_has_no_class() -> None:
    view = SegmentationView((40, 40), mean=[0.2], scale=(1.0, 1.0), hflip=0.0)
    image, mask = blocks(16, 24)
    places = set()
    for seed in range(8):
        pixels, classes, part = view_of(view, image, mask, seed)
        assert part[:4] == (0, 0, 16, 24)
        inside = classes != NOT_COUNTED
        assert int(inside.sum()) == 16 * 24
        assert torch.equal(classes[inside], mask.flatten())
        assert torch.equal(pixels[0][inside], image.flatten())
        assert (pixels[0][~inside] == 51).all()
        places.add(tuple(inside.nonzero()[0].tolist()))
    assert len(places) > 1


def test_a_crop_of_one_class_alone_is_drawn_again() -> None:
    pixels, classes = torch.zeros(1, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.int16)
    classes[:, 50:] = 1
    drawn = {1.0: 0, 0.75: 0}
    for most in drawn:
        view = SegmentationView((16, 16), mean=[0.0], scale=(1.0, 1.0), most_of_one=most)
        for seed in range(40):
            drawn[most] += int((view_of(view, pixels, classes, seed)[1] == 1).any())
    assert drawn[0.75] > 2 * drawn[1.0] > 0


def test_a_mask_without_classes_is_no_reason_to_stop() -> None:
    view = SegmentationView((16, 16), mean=[0.0])
    pixels, _ = blocks(32, 32)
    _, classes, _ = view_of(view, pixels, torch.full((32, 32), NOT_COUNTED, dtype=torch.int16))
    assert (classes == NOT_COUNTED).all()


def test_half_of_the_views_are_flipped_both_image_and_mask() -> None:
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    classes = pixels[0].short()
    view = SegmentationView((8, 8), mean=[0.0], scale=(1.0, 1.0), most_of_one=1.0)
    flipped = 0
    for seed in range(50):
        found, labels, _ = view_of(view, pixels, classes, seed)
        assert torch.equal(found[0].short(), labels)
        flipped += int(torch.equal(labels, classes.flip(1)))
    assert 10 < flipped < 40


def test_jitter_changes_colours_and_no_classes() -> None:
    pixels, classes = blocks(16, 16, channels=3)
    pixels[0] = 100
    plain = SegmentationView((16, 16), mean=[0.0] * 3, scale=(1.0, 1.0), most_of_one=1.0, hflip=0.0)
    jittered = SegmentationView((16, 16), mean=[0.0] * 3, scale=(1.0, 1.0), most_of_one=1.0, hflip=0.0, jitter=1.0)
    assert torch.equal(view_of(plain, pixels, classes)[0], pixels)
    found, labels, _ = view_of(jittered, pixels, classes)
    assert not torch.equal(found, pixels)
    assert torch.equal(labels, classes)


@pytest.mark.parametrize("size", [(3, 5), (16, 20), (31, 41)])
def test_resized_classes_are_those_of_the_nearest_pixels(size: tuple[int, int]) -> None:
    classes = torch.randint(-1, 30000, (12, 15), dtype=torch.int16)
    found = resize_classes(classes, size)
    for i in range(size[0]):
        for j in range(size[1]):
            down, across = int((i + 0.5) * 12 / size[0]), int((j + 0.5) * 15 / size[1])
            assert found[i, j] == classes[down, across]


def test_a_covered_pair_is_the_centre_of_both() -> None:
    pixels, classes = blocks(64, 96)
    found, labels = cover_pair(Pair(pixels, classes, Part(0, 0, 64, 96, (64, 96))), (32, 32))
    assert found.shape == (1, 32, 32)
    assert float(((found[0] > 127) == (labels == 1)).float().mean()) > 0.97


# Samples and batches


def dataset(tmp_path: Path, **view: Any) -> SegmentationDataset:
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3)).astype(np.uint8)
    source = source_of(tmp_path, images, images[..., 0] // 64)
    return SegmentationDataset(source, view=SegmentationView((16, 16), mean=[0.5] * 3, **view), seed=3)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path, jitter=0.5)
    torch.manual_seed(7)
    first = data[2, 5]
    torch.manual_seed(8)
    again, later = data[2, 5], data[3, 5]
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.image, later.image)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_from_workers_too(tmp_path: Path, num_workers: int) -> None:
    data = dataset(tmp_path)
    keys = [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    batches = list(load_batches(data, keys, num_workers=num_workers, pin_memory=False))
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3)]
    for batch in batches:
        assert isinstance(batch, SegmentationBatch)
        assert batch.images.shape == (2, 3, 16, 16)
        assert batch.labels.shape == (2, 16, 16)
        for place, index in enumerate(batch.indices):
            assert torch.equal(batch.images[place], data[0, index].image)
            assert torch.equal(batch.labels[place], data[0, index].labels)


def test_another_image_takes_the_place_of_one_whose_mask_is_bad(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data.source.class_names = data.source.class_names[:3]  # as if class 3 were none
    with open(tmp_path / "masks.npy", "r+b") as file:
        file.seek(-6 * 20 * 24, 2)
        file.write(bytes(5 * 20 * 24))  # all but the last are of class 0
    sample = data[0, 5]
    assert sample.index != 5
    assert "masks.npy[5]: class 3, but there are 3" in sample.bad[0].reason


def test_images_of_several_sizes_are_one_batch_of_an_evaluation(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    data = SegmentationEvaluation(source_of(tmp_path, images, images[..., 0] // 64))
    other = data[1]
    cut = type(other)(other.image[:, :7, :9], 1, (), other.labels[:7, :9])
    batch = data.collate([data[0], cut, data[PADDING]])
    assert batch.extents.tolist() == [[20, 24], [7, 9], [0, 0]]
    assert torch.equal(batch.images[1, :, :7, :9], cut.image)
    assert torch.equal(batch.labels[1, :7, :9], cut.labels)
    assert int((batch.labels[1] != NOT_COUNTED).sum()) == 63
    assert (batch.labels[2] == NOT_COUNTED).all()


def test_an_evaluation_names_what_does_not_decode(tmp_path: Path) -> None:
    source = source_of(tmp_path, np.zeros((2, 8, 8, 3), np.uint8), np.indices((2, 8, 8))[0].astype(np.uint8))
    source.class_names = ("0",)
    sample = SegmentationEvaluation(source)[1]
    assert sample.labels.numel() == 0
    assert "class 1" in sample.bad[0].reason


def test_the_images_that_are_shown_are_always_the_same(tmp_path: Path) -> None:
    source = dataset(tmp_path).source
    first, again = (fixed_pairs(source, 3, (16, 16)) for _ in range(2))
    assert first[0].shape == (3, 3, 16, 16)
    assert first[1].shape == (3, 16, 16)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
