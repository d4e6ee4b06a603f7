"""Views: drawn as before anything is decoded, cut and resized wherever it is cheapest, the same pixels."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import same, write_images
from torchvision.transforms import v2

from fcmae import sample_visible_ids
from fcmae.data import (
    CroppedBatch,
    IndexStream,
    MaskedBatch,
    PretrainDataset,
    RandomView,
    load_batches,
    open_source,
    prefetch,
    resize_crops,
    save_arrays,
    seeded,
)
from fcmae.data.batches import LARGEST_CROP
from fcmae.data.sources import decode, decode_part
from fcmae.data.views import Part

CPU = torch.device("cpu")
SHAPES = [(40, 32), (1, 1), (1, 90), (70, 1), (7, 300), (64, 64), (129, 65)]


def smooth(*shape: int) -> torch.Tensor:
    """Return random uint8 (*, h, w) with the low frequencies of photographs."""
    coarse = torch.rand(*shape[:-2], shape[-2] // 8 + 2, shape[-1] // 8 + 2)
    pixels = torch.nn.functional.interpolate(
        coarse[None] if coarse.ndim == 3 else coarse, shape[-2:], mode="bicubic"
    )
    return (pixels.reshape(shape) * 255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_a_view_is_torchvisions_random_resized_crop_and_flip_from_the_same_draws(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic, antialias=True)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip(0.5)])
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    for key in range(20):
        with seeded(key):
            expected = theirs(image), torch.rand(1)
        with seeded(key):
            assert torch.equal(RandomView(size, (0.2, 1.0), 0.5)(image), expected[0])
            assert torch.equal(torch.rand(1), expected[1])


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "transparent"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_part_of_a_file_is_that_part_of_the_whole_image(tmp_path: Path, mode: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image, suffix = Image.fromarray(pixels), ".png"
    options: dict[str, Any] = {}
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "transparent":
        image, options = image.convert("P"), {"transparency": 3}
    else:
        image, suffix = image.convert(mode), ".tif" if mode == "CMYK" else ".png"
    image.save(tmp_path / f"image{suffix}", **options)
    source = open_source("folder", str(tmp_path), "train", channels)
    part = source.load_part(0, lambda height, width: Part(height // 4, width // 3, 30, 31, (8, 8)))
    assert torch.equal(part, source.load(0)[:, 15:45, 30:61])


def test_a_jpeg_is_decoded_at_the_least_resolution_that_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.open(ROOT / "docs" / "photos" / "bird.jpg").resize((1001, 700)).save(path, quality=95)
    with Image.open(path) as image:
        full = decode(image, 3)
    for divisor, enough in {1: (300, 300), 2: (160, 150), 4: (75, 80), 8: (40, 50)}.items():
        with Image.open(path) as image:
            found = decode_part(image, lambda *_: Part(104, 208, 400, 600, enough), 3)  # noqa: B023
        assert found.shape[1:] == (400 // divisor, 600 // divisor)
        assert all(side >= wanted for side, wanted in zip(found.shape[1:], enough, strict=True))
        expected = v2.functional.resize(full[:, 104:504, 208:808], list(found.shape[1:]), antialias=True)
        print((found.int() - expected.int()).abs().float().mean())
        assert (found.int() - expected.int()).abs().float().mean() < 1.5
    assert torch.equal(open_source("folder", str(tmp_path), "train", 3).load(0), full)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (17, 19)])
def test_jpegs_of_odd_shapes_give_views_too(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "odd.jpg")
    source = open_source("folder", str(tmp_path), "train", 3)
    view = RandomView((2, 2), (0.2, 1.0), 0.5)
    for key in range(30):
        with seeded(key):
            found = view.finish(source.load_part(0, view.part))
        assert found.shape == (3, 2, 2)
        assert (found.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_a_jpeg_that_breaks_off_has_the_substitute_of_one_that_never_opened(tmp_path: Path) -> None:
    for path in write_images(tmp_path, 9, (300, 200)):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    broken = tmp_path / "004.jpg"
    chosen = []
    for content in (broken.read_bytes()[:2000], b"junk"):  # a whole header; none
        broken.write_bytes(content)
        samples = [pretraining(open_source("folder", str(tmp_path), "train", 3))[epoch, 4] for epoch in range(5)]
        assert all(sample.bad[0].index == 4 for sample in samples)
        chosen.append([(sample.index, sample.image.float().sum()) for sample in samples])
    assert chosen[0] == chosen[1]


# Resizing on the device


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resizing_a_batch_agrees_with_torchvision_within_two_levels(size: tuple[int, int], channels: int) -> None:
    shapes = SHAPES * 12  # more than a chunk
    crops = torch.randint(0, 256, (len(shapes), channels, 130, 310), dtype=torch.uint8)  # noise beyond the crops
    expected = []
    flipped = torch.arange(len(shapes)) % 3 == 0
    for crop, (height, width), flip in zip(crops, shapes, flipped, strict=True):
        if height % 2:
            crop[:, :height, :width] = smooth(channels, height, width)
        image = crop[:, :height, :width]
        bicubic = v2.InterpolationMode.BICUBIC
        view = v2.functional.resize(image, list(size), interpolation=bicubic, antialias=True)
        expected.append(view.flip(-1) if flip else view)
    found = resize_crops(crops, torch.tensor(shapes, dtype=torch.int32), flipped, size)
    difference = (found.int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-4
    assert difference.float().mean() < 0.01
    assert difference.any()  # two kernels were compared


def test_resizing_a_batch_keeps_crops_of_the_size_as_they_are() -> None:
    crops = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8)
    extents = torch.tensor([[32, 40]] * 3, dtype=torch.int32)
    found = resize_crops(crops, extents, torch.tensor([False, True, False]), (32, 40))
    assert torch.equal(found, torch.stack([crops[0], crops[1].flip(-1), crops[2]]))


def pretraining(source: object, **kwargs: bool) -> PretrainDataset:
    view = RandomView((32, 48), (0.2, 1.0), 0.5)
    return PretrainDataset(source, view=view, draw_ids=lambda: sample_visible_ids(1, 24, 0.6), seed=0, **kwargs)  # pyright: ignore[reportArgumentType]


def take(dataset: PretrainDataset, number: int, num_workers: int = 0) -> list[MaskedBatch]:
    stream = IndexStream(len(dataset), batch_size=5, seed=0)
    return list(islice(load_batches(dataset, stream, num_workers=num_workers, pin_memory=False), number))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_resized_on_the_device_are_those_of_the_workers_within_a_level(
    tmp_path: Path, num_workers: int
) -> None:
    images = smooth(12, 3, 64, 80).permute(0, 2, 3, 1).numpy()
    save_arrays(tmp_path, images)
    source = open_source("arrays", str(tmp_path), "train", 3)
    done = take(pretraining(source), 6)
    crops = take(pretraining(source, resize_on_device=True), 6, num_workers)
    for a, b in zip(done, crops, strict=True):
        assert isinstance(b, CroppedBatch)
        there = b.to(CPU)
        assert type(there) is MaskedBatch
        assert (there.indices, there.bad) == (a.indices, a.bad)
        assert torch.equal(there.visible_ids, a.visible_ids)
        assert (there.images.int() - a.images.int()).abs().max() <= 1


def test_crops_far_larger_than_the_view_are_resized_before_they_travel(tmp_path: Path) -> None:
    save_arrays(tmp_path, smooth(4, 3, 400, 300).permute(0, 2, 3, 1).numpy())
    source = open_source("arrays", str(tmp_path), "train", 3)
    (done,), (crops,) = take(pretraining(source), 1), take(pretraining(source, resize_on_device=True), 1)
    assert isinstance(crops, CroppedBatch)
    assert crops.images.shape[2] <= LARGEST_CROP * 32
    assert crops.images.shape[3] <= LARGEST_CROP * 48
    assert torch.equal(crops.to(CPU).images, done.images)


# Copying ahead


def test_without_a_gpu_batches_pass_in_their_order_and_none_is_read_ahead(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    expected = take(pretraining(open_source("folder", str(tmp_path), "train", 3)), 4)
    read = []

    def batches() -> Iterator[MaskedBatch]:
        for number, batch in enumerate(expected):
            read.append(number)
            yield batch

    for number, batch in enumerate(prefetch(batches(), CPU)):
        assert read == list(range(number + 1))
        assert same(batch, expected[number])
    assert len(read) == 4
