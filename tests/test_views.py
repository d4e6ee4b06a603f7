"""Views: drawn as before anything is decoded, cut and resized wherever it is cheapest, the same pixels."""

from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_sources import labelled, write_images
from torch._subclasses import FakeTensorMode
from torchvision.transforms import v2

from fcmae import sample_visible_ids
from fcmae.data import (
    AugmentedView,
    CroppedBatch,
    IndexStream,
    LabelledDataset,
    MaskedBatch,
    PixelNormalizer,
    PretrainDataset,
    RandomView,
    cover,
    load_batches,
    open_source,
    resize_crops,
    save_arrays,
    seeded,
)
from fcmae.data.batches import LARGEST_CROP
from fcmae.data.images import decode, decode_part
from fcmae.data.views import Part, resample
from fcmae.ops import resize_crops as formulas

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
        full = torch.from_numpy(decode(image, 3)).permute(2, 0, 1)
    for divisor, enough in {1: (300, 300), 2: (160, 150), 4: (75, 80), 8: (40, 50)}.items():
        with Image.open(path) as image:
            pixels = decode_part(image, lambda *_: Part(104, 208, 400, 600, enough), 3)  # noqa: B023
        found = torch.from_numpy(pixels).permute(2, 0, 1)
        assert found.shape[1:] == (400 // divisor, 600 // divisor)
        assert all(side >= wanted for side, wanted in zip(found.shape[1:], enough, strict=True))
        expected = v2.functional.resize(full[:, 104:504, 208:808], list(found.shape[1:]), antialias=True)
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


Resize = Callable[..., torch.Tensor]


@pytest.fixture(params=["formulas", "triton"])
def resize(request: pytest.FixtureRequest) -> Resize:
    """`resize_crops` by its formulas, and by Triton's kernels, in its interpreter where there is no GPU."""
    if request.param == "formulas":
        return resize_crops
    pytest.importorskip("triton", reason="needs Triton")
    kernels = import_module("fcmae.ops.resize_crops_triton")
    if not torch.cuda.is_available():
        return kernels.resize_crops
    return lambda *given: kernels.resize_crops(*(t.cuda() for t in given[:3]), given[3]).cpu()


def test_resizing_a_batch_keeps_crops_of_the_size_as_they_are(resize: Resize) -> None:
    crops = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8)
    extents = torch.tensor([[32, 40]] * 3, dtype=torch.int32)
    found = resize(crops, extents, torch.tensor([False, True, False]), (32, 40))
    assert torch.equal(found, torch.stack([crops[0], crops[1].flip(-1), crops[2]]))


@pytest.mark.parametrize(
    ("dtype", "channels", "size", "shapes"),
    [
        (torch.uint8, 3, (16, 24), [(40, 30), (1, 1), (7, 60), (16, 24)]),
        (torch.uint8, 4, (48, 34), [(1, 20), (33, 1)]),  # more than a program's square
        (torch.uint16, 1, (40, 12), [(11, 35)]),
        (torch.uint16, 7, (3, 5), [(4, 9)]),
        (torch.float32, 1, (5, 36), [(35, 40), (5, 36)]),
        (torch.float32, 4, (24, 20), [(30, 3), (12, 20)]),
    ],
    ids=str,
)
def test_the_kernel_gives_each_crop_what_the_formulas_give_it_alone_whatever_lies_beyond(
    dtype: torch.dtype, channels: int, size: tuple[int, int], shapes: list[tuple[int, int]], resize: Resize
) -> None:
    height, width = np.max(shapes, axis=0).tolist()
    full = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1.0}[dtype]
    crops = (torch.rand(len(shapes), height, width + 3, channels) * full).to(dtype).permute(0, 3, 1, 2)
    if dtype == torch.float32:
        crops[torch.rand(crops.shape) < 0.3] = torch.nan
    extents, flipped = torch.tensor(shapes, dtype=torch.int32), torch.arange(len(shapes)) % 2 == 0
    found = resize(crops, extents, flipped, size)
    for crop, extent, flip, view in zip(crops, extents, flipped, found, strict=True):
        alone = crop[None, :, : extent[0], : extent[1]]
        (expected,) = resize_crops(alone, extent[None], flip[None], size)
        assert view.dtype == dtype
        if dtype == torch.float32:
            assert torch.allclose(view, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
        else:
            difference = (view.int() - expected.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() <= 0.01


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


# Pixels that are not known


def with_holes(*shape: int) -> torch.Tensor:
    """Random float32 (*, h, w) far from zero, NaN in a corner, in single pixels and in some of a channel's rows."""
    pixels = 100 + torch.randn(shape)
    height, width = shape[-2:]
    pixels[..., : height // 2, : width // 3] = torch.nan
    pixels[torch.rand(shape) < 0.05] = torch.nan
    pixels[..., 0, -(height // 4 + 1) :, :] = torch.nan
    return pixels


def bicubic_weights(length: int, size: int) -> np.ndarray:
    """What each of `size` pixels takes of each of `length`, one by one: (size, length)."""
    weights = np.zeros((size, length))
    scale = length / size
    for i in range(size):
        for j in range(length):
            x = abs(j + 0.5 - (i + 0.5) * scale) / max(scale, 1.0)
            if x < 1:
                weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights[i] /= weights[i].sum()
    return weights


def resized_by_loops(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The weighted mean of the pixels (c, h, w) that are known, pixel by pixel; NaN of those with under a half."""
    down, across = bicubic_weights(image.shape[1], size[0]), bicubic_weights(image.shape[2], size[1])
    found = np.full((len(image), *size), np.nan)
    for channel, y, x in np.ndindex(*found.shape):
        weights = np.outer(down[y], across[x])
        known = ~np.isnan(image[channel])
        weight = weights[known].sum()
        if weight > 0.5 - 1e-3:
            found[channel, y, x] = (weights[known] * image[channel][known]).sum() / weight
    return found


@pytest.mark.parametrize("size", [(12, 12), (33, 20), (40, 64)])
def test_unknown_pixels_leave_their_weight_to_the_others(size: tuple[int, int]) -> None:
    image = with_holes(2, 24, 36)
    expected = torch.from_numpy(resized_by_loops(image.double().numpy(), size)).float()
    assert 0 < expected.isnan().float().mean() < 1
    assert torch.allclose(resample(image, size), expected, rtol=2e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(16, 16), (24, 10)])
def test_a_batch_with_unknown_pixels_is_resized_as_each_crop_is_alone(
    size: tuple[int, int], resize: Resize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "CHUNK", 3)
    shapes = [(24, 20), (5, 30), (16, 10), (1, 1), (31, 7)]
    crops = torch.full((len(shapes), 2, 31, 30), torch.nan)  # beyond the crops, too
    flipped = torch.arange(len(shapes)) % 3 == 0
    expected = []
    for crop, (height, width), flip in zip(crops, shapes, flipped, strict=True):
        image = with_holes(2, height, width)
        crop[:, :height, :width] = image
        view = torch.from_numpy(resized_by_loops(image.double().numpy(), size)).float()
        expected.append(view.flip(-1) if flip else view)
    found = resize(crops, torch.tensor(shapes, dtype=torch.int32), flipped, size)
    assert torch.allclose(found, torch.stack(expected), rtol=2e-5, atol=0, equal_nan=True)


def test_resizing_a_batch_reads_no_number_back_from_the_device() -> None:
    """Not even by the formulas, which take devices other than CUDA."""
    with FakeTensorMode():  # whose tensors have no numbers: reading one raises an error
        extents, flipped = torch.empty(2, 2, dtype=torch.int32), torch.empty(2, dtype=torch.bool)
        found = resize_crops._init_fn(torch.empty(2, 3, 24, 30), extents, flipped, (16, 16))
        assert found.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_resizing_a_batch_takes_cuda_two_launches_and_nothing_that_waits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    kernels = import_module("fcmae.ops.resize_crops_triton")
    launched: list[str] = []
    for name in ("_across_kernel", "_down_kernel"):
        launch = lambda *_given, name=name, **_options: launched.append(name)  # noqa: E731
        monkeypatch.setattr(kernels, name, defaultdict(lambda launch=launch: launch))  # by any grid
    with FakeTensorMode():
        crops = torch.empty(200, 24, 30, 3, dtype=dtype).permute(0, 3, 1, 2)
        extents, flipped = torch.empty(200, 2, dtype=torch.int32), torch.empty(200, dtype=torch.bool)
        assert kernels.resize_crops(crops, extents, flipped, (16, 20)).shape == (200, 3, 16, 20)
    assert launched == ["_across_kernel", "_down_kernel"]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_evaluation_view_leaves_unknown_pixels_out_too(interpolation: str) -> None:
    image = torch.full((2, 40, 60), 7.0)
    image[0, :20] = torch.nan
    found = cover(image, (20, 20), 1.0, interpolation)
    assert found[0, :9].isnan().all()
    assert torch.allclose(found[0, 10:], torch.tensor(7.0))
    assert torch.allclose(found[1], torch.tensor(7.0))


def test_where_all_is_known_resizing_gives_the_numbers_that_it_gives_without_unknown_pixels_elsewhere() -> None:
    image = torch.randn(1, 30, 40)
    holed = image.clone()
    holed[:, :5, :5] = torch.nan
    for change in (lambda pixels: resample(pixels, (15, 20)), lambda pixels: cover(pixels, (15, 15))):
        assert torch.equal(change(holed)[:, 8:, 8:], change(image)[:, 8:, 8:])
    extents, flipped = torch.tensor([[30, 40]], dtype=torch.int32), torch.tensor([False])
    plain, holed = (resize_crops(pixels[None], extents, flipped, (15, 20))[0] for pixels in (image, holed))
    assert torch.equal(holed[:, 8:, 8:], plain[:, 8:, 8:])
    assert torch.allclose(plain, resample(image, (15, 20)), atol=1e-5)


@pytest.mark.parametrize("fill", [-1e30, 0.0, 3.0])
def test_what_is_written_to_unknown_pixels_before_they_are_marked_never_matters(fill: float) -> None:
    image = torch.full((1, 30, 40), fill)
    image[:, :, 10:] = torch.randn(1, 30, 30, generator=torch.Generator().manual_seed(0))
    image[:, :, :10] = torch.nan
    expected = resized_by_loops(image.double().numpy(), (15, 20))
    assert np.allclose(resample(image, (15, 20)).numpy(), expected, atol=1e-5, equal_nan=True)


# Resizing and normalisation


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (100, 20)])
@pytest.mark.parametrize("shape", [(40, 32), (7, 300), (64, 64), (31, 33)])
def test_cover_fills_any_size_from_any_image(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert cover(image, size).shape == (3, *size)


def test_the_evaluation_crop_keeps_its_share_of_the_middle() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 8:56, 8:56] = 255
    assert (cover(image, (48, 48), 0.75) == 255).all()
    assert (cover(image, (64, 64), 1.0) == image).all()
    assert (cover(image, (64, 64), 0.5) == 255).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_each_channel_is_resized_as_pillow_resizes_it(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 61, 47), dtype=torch.uint8)
    resized = cover(image, (40, 24))
    assert resized.shape == (channels, 40, 24)
    for channel, found in zip(image.numpy(), resized.numpy(), strict=True):
        wanted = Image.fromarray(channel).resize((31, 40), Image.Resampling.BICUBIC).crop((4, 0, 28, 40))
        assert np.array_equal(np.asarray(wanted), found)


def test_pixel_normalisation_inverts() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalize = PixelNormalizer((0.1, 0.5, 0.9), (0.3, 0.2, 0.1))
    images = normalize(pixels)
    expected = (pixels[:, 2].double() / 255 - 0.9) / 0.1
    assert torch.allclose(images[:, 2].double(), expected, atol=1e-5)
    assert torch.allclose(normalize.invert(images) * 255, pixels.float(), atol=1e-3)


def test_a_network_sees_the_mean_where_pixels_are_not_known() -> None:
    pixels = torch.tensor([0.1, torch.nan, 0.9]).expand(2, 1, 3)
    normalize = PixelNormalizer((0.1, 0.5), (0.2, 0.4))
    assert torch.allclose(normalize(pixels)[1], torch.tensor([-1.0, 0.0, 1.0]))
    marked = normalize(pixels, unknown=torch.nan)
    assert torch.equal(marked.isnan(), pixels.isnan())
    assert torch.equal(marked.nan_to_num(0.0), normalize(pixels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("clip", [(0.25, 0.75), ((0.25, 0.25), (0.75, 0.75)), (0.25, (0.75, 0.75)), (0, 1)])
def test_clipping_comes_before_normalisation_in_the_units_of_the_mean(clip: Any, dtype: torch.dtype) -> None:
    full = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1.0}[dtype]
    pixels = (torch.rand(3, 2, 8, 8) * full).to(dtype)
    expected = PixelNormalizer((0.5, 0.1), (0.2, 0.3))(pixels)
    if clip != (0, 1):
        values = (pixels.float() / full).clamp(0.25, 0.75)
        expected = PixelNormalizer((0.5, 0.1), (0.2, 0.3))(values)
    assert torch.allclose(PixelNormalizer((0.5, 0.1), (0.2, 0.3), clip)(pixels), expected)


def test_each_channel_may_be_clipped_to_limits_of_its_own_and_unknown_pixels_stay_so() -> None:
    normalize = PixelNormalizer((0.0, 0.0), (1.0, 1.0), ((-1.0, 0.0), (1.0, 10.0)))
    pixels = torch.tensor([-5.0, 5.0, torch.nan]).expand(2, 1, 3)
    expected = torch.tensor([[[-1.0, 1.0, torch.nan]], [[0.0, 5.0, torch.nan]]])
    assert torch.allclose(normalize(pixels, unknown=torch.nan), expected, equal_nan=True)


# The augmentation of fine-tuning


def view_of(channels: int = 3, **changes: Any) -> AugmentedView:
    options: dict[str, Any] = {
        "crop_scale": (0.3, 1.0),
        "crop_padding": None,
        "hflip": 0.5,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "erase_prob": 0.5,
        "mean": [0.5] * channels,
        "std": [0.2] * channels,
    }
    return AugmentedView((32, 32), **options | changes)


@pytest.mark.parametrize("changes", [{}, {"crop_padding": 4}, {"auto_augment": "augmix-m3-w2"}])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_are_pixels_of_the_size_asked_for(
    tmp_path: Path, channels: int, changes: dict[str, Any]
) -> None:
    dataset = LabelledDataset(labelled(tmp_path, channels=channels), view=view_of(channels, **changes), seed=0)
    images = torch.stack([dataset[epoch, index].image for epoch in range(5) for index in range(10)])
    assert images.dtype == torch.uint8
    assert images.shape == (50, channels, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("crop_padding", [None, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_augmentation_gives_pixels_of_any_kind_what_it_gives_floats(
    dtype: torch.dtype, crop_padding: int | None, channels: int
) -> None:
    full = {torch.uint8: 255, torch.uint16: 65535}[dtype]
    image = ((0.3 + 0.4 * torch.rand(channels, 40, 50)) * full).to(dtype)  # where no kernel and no noise overshoots
    view = view_of(channels, crop_padding=crop_padding, auto_augment=None, std=[0.05] * channels)
    for key in range(20):
        with seeded(key):
            found = view(image)
        with seeded(key):
            floats = view(image.float() / full)
        assert found.dtype == dtype
        assert floats.dtype == torch.float32
        assert torch.allclose(found.float() / full, floats, atol=1.01 / full if dtype == torch.uint16 else 2 / full)


@pytest.mark.parametrize("crop_padding", [None, 4])
def test_augmentation_keeps_what_is_unknown_so_or_erases_it(crop_padding: int | None) -> None:
    image = torch.rand(5, 40, 50)
    holed = image.clone()
    holed[:, :20, :25] = torch.nan
    view = view_of(5, crop_padding=crop_padding, auto_augment=None, erase_prob=0.0)
    erasing = view_of(5, crop_padding=crop_padding, auto_augment=None, erase_prob=1.0)
    unknown = 0
    for key in range(20):
        with seeded(key):
            plain = view(image)
        with seeded(key):
            found = view(holed)
        with seeded(key):
            erased = erasing(holed)
        border = torch.nn.functional.max_pool2d(found.isnan().float(), 7, 1, 3) > 0  # where a filter sees both
        assert torch.allclose(found[~border], plain[~border])
        assert not (erased.isnan() & ~found.isnan()).any()
        unknown += found.isnan().float().mean().item() / 20
    assert 0.1 < unknown < 0.4


def test_a_padded_crop_is_the_image_moved_by_at_most_the_padding(tmp_path: Path) -> None:
    source = labelled(tmp_path)
    view = view_of(crop_padding=2, hflip=0.0, auto_augment=None, erase_prob=0.0)
    image = source.load(0)
    bordered = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    places = [(y, x) for y in range(5) for x in range(5)]
    seen = set()
    for _ in range(60):
        moved = view(image).numpy()
        seen |= {(y, x) for y, x in places if np.array_equal(moved, bordered[:, y : y + 32, x : x + 32])}
    assert len(seen) > 15


def test_random_erasing_leaves_the_rest_and_fills_a_rectangle_with_noise_of_the_images_scale() -> None:
    view = view_of(crop_padding=1, hflip=0.0, auto_augment=None, erase_prob=0.25)
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    views = torch.stack([view(image) for _ in range(400)])
    changed = (views != 200).any(1)  # (n, h, w)
    share = changed.flatten(1).any(1).float().mean()
    assert 0.17 < share < 0.33
    noise = views.permute(0, 2, 3, 1)[changed].float() / 255
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert noise.std() == pytest.approx(0.2, abs=0.02)
    for erased in changed[changed.flatten(1).any(1)][:20]:
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.float().mean() > 0.95  # noise may hit 200 by chance


@pytest.mark.parametrize("name", ["rand-x9", "strong", ""])
def test_a_policy_that_timm_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"rand-m9-mstd0\.5-inc1|null is for none"):
        view_of(auto_augment=name)


@pytest.mark.parametrize("name", ["rand-m10-n15-inc1", "v0", "original", "3a", "augmix-m10-w3"])
def test_the_strongest_augmentation_does_not_fail(name: str) -> None:
    view = view_of(auto_augment=name)
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).to(torch.uint8)
    for index in range(150):
        with seeded(0, index):
            assert view(image).shape == (3, 32, 32)
