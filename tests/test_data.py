"""Data: what is shown depends on (seed, epoch, index) alone, and bad input is named."""

import pickle
import random
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae import sample_visible_ids
from fcmae.data import (
    AugmentedView,
    Cover,
    EvaluationDataset,
    IndexStream,
    LabelledBatch,
    LabelledDataset,
    MaskedBatch,
    PixelNormalizer,
    PretrainDataset,
    RandomView,
    Source,
    cover,
    derive_seed,
    fixed_images,
    labels_by,
    load_batches,
    one_pass,
    open_source,
    save_arrays,
    seeded,
    share_of_each_class,
    shares_images,
    unreadable,
)
from fcmae.data.sampling import PADDING
from fcmae.data.sources import Subset
from fcmae.errors import UserError


def write_images(folder: Path, number: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    paths = []
    for i in range(number):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"{i:03d}.png")
        Image.fromarray(pixels).convert(mode).save(paths[-1])
    return paths


def dataset_of(root: Path, *, seed: int = 0) -> PretrainDataset:
    return PretrainDataset(
        open_source("folder", str(root), "train", 3),
        view=RandomView((32, 32), (0.2, 1.0), 0.5),
        draw_ids=lambda: sample_visible_ids(1, 16, 0.6),
        seed=seed,
    )


def take(dataset: PretrainDataset, number: int, **kwargs: int) -> list[MaskedBatch]:
    workers = kwargs.pop("num_workers", 0)
    options = {"batch_size": 4, "seed": 0} | kwargs
    stream = IndexStream(len(dataset), **options)
    return list(islice(load_batches(dataset, stream, num_workers=workers, pin_memory=False), number))


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return a.indices == b.indices and torch.equal(a.images, b.images) and torch.equal(a.visible_ids, b.visible_ids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", 11)
    return tmp_path / "images"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_masks_and_crops_are_the_same_for_any_number_of_workers(folder: Path, num_workers: int) -> None:
    alone = take(dataset_of(folder), 7)
    helped = take(dataset_of(folder), 7, num_workers=num_workers)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_see_together_what_one_sees(folder: Path, world_size: int) -> None:
    whole = take(dataset_of(folder), 6)
    parts = [
        take(dataset_of(folder), 6, batch_size=4 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
        assert torch.equal(batch.visible_ids, torch.cat([part[step].visible_ids for part in parts]))


def test_a_stream_started_later_goes_on_where_the_first_would_be(folder: Path) -> None:
    whole = take(dataset_of(folder), 8)
    rest = take(dataset_of(folder), 3, start=5 * 4)
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_every_image_is_seen_exactly_once_per_epoch_in_a_new_order() -> None:
    keys = [key for batch in islice(IndexStream(11, batch_size=4, seed=0), 11) for key in batch]
    assert [epoch for epoch, _ in keys] == [i // 11 for i in range(44)]
    orders = [[index for epoch, index in keys if epoch == e] for e in range(4)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_set_smaller_than_a_batch_fills_it() -> None:
    (batch,) = islice(IndexStream(3, batch_size=10, seed=0), 1)
    assert Counter(epoch for epoch, _ in batch) == {0: 3, 1: 3, 2: 3, 3: 1}


def test_epochs_seeds_and_indices_each_change_crop_and_mask(folder: Path) -> None:
    dataset = dataset_of(folder)
    reference = dataset[0, 0]
    others = [dataset[1, 0], dataset_of(folder, seed=1)[0, 0], dataset[0, 1]]
    assert all(not torch.equal(reference.image, other.image) for other in others)
    drawn = {tuple(dataset[epoch, 0].visible_ids.tolist()) for epoch in range(20)}
    assert len(drawn) > 15


def test_order_depends_on_the_seed() -> None:
    a, b = (next(iter(IndexStream(1000, batch_size=100, seed=seed))) for seed in (0, 1))
    assert a != b


def test_drawing_samples_leaves_the_callers_generators_alone(folder: Path) -> None:
    dataset = dataset_of(folder)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    dataset[0, 0]
    assert [torch.rand(1).item(), np.random.rand(), random.random()] == expected  # noqa: NPY002


def test_seeded_seeds_torch_numpy_and_random() -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random()]  # noqa: NPY002

    with seeded(1, 2):
        first = draw()
    with seeded(1, 2):
        again = draw()
    with seeded(2, 1):
        other = draw()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert derive_seed(0, 1) != derive_seed(1, 0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_folders_give_the_channels_that_are_asked_for(tmp_path: Path, channels: int, mode: str) -> None:
    write_images(tmp_path, 1, mode=mode)
    image = open_source("folder", str(tmp_path), "train", channels).load(0)
    assert image.dtype == torch.uint8
    assert image.shape == (channels, 32, 40)
    stored = np.asarray(Image.open(tmp_path / "000.png")).reshape(32, 40, channels)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_source("folder", str(tmp_path), "train", 1).load(0)
    assert np.array_equal(image[0].numpy(), (values >> 8).astype(np.uint8))


def test_split_folders_and_other_file_types_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cats", 2)
    write_images(tmp_path / "val" / "cats", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "one.webp")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "two.tif")
    assert len(open_source("folder", str(tmp_path), "train", 3)) == 4
    assert len(open_source("folder", str(tmp_path), "val", 3)) == 1


def test_a_tar_file_reads_like_its_folder_in_workers_too(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "cats", 5)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    packed = take(dataset_of(tmp_path / "images.tar"), 2, num_workers=2)
    loose = take(dataset_of(tmp_path / "images"), 2)
    assert all(same(a, b) for a, b in zip(packed, loose, strict=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays_of_any_channel_count_are_mapped_and_cropped(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 24, channels), dtype=np.uint8)
    save_arrays(tmp_path / "train", images)
    source = open_source("arrays", str(tmp_path), "train", channels)
    assert np.array_equal(source.load(4).permute(1, 2, 0).numpy(), images[4])
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.load(5), source.load(5))
    assert len(pickle.dumps(source)) < 1000
    assert RandomView((8, 16), (0.2, 1.0), 0.5)(source.load(0)).shape == (channels, 8, 16)


def class_folders(root: Path) -> Path:
    for name, number in {"owl": 2, "class10": 1, "class9": 3}.items():
        write_images(root / name, number)
    return root


def test_sub_folders_are_classes_numbered_as_timm_does(tmp_path: Path) -> None:
    source = open_source("folder", str(class_folders(tmp_path)), "train", 3)
    assert source.class_names == ("class9", "class10", "owl")
    assert source.labels is not None
    assert source.class_names is not None
    assert source.labels.dtype == np.int64
    assert np.bincount(source.labels).tolist() == [3, 1, 2]
    for index, label in enumerate(source.labels):
        assert Path(source.describe(index)).parent.name == source.class_names[label]


def test_a_tar_file_has_the_labels_of_its_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    loose = open_source("folder", str(tmp_path / "images"), "train", 3)
    packed = open_source("folder", str(tmp_path / "images.tar"), "train", 3)
    assert packed.class_names == loose.class_names
    assert packed.labels is not None
    assert np.array_equal(packed.labels, loose.labels)  # pyright: ignore[reportArgumentType]
    assert packed.labels.dtype == np.int64
    assert packed.describe(0) == f"{tmp_path / 'images.tar'}/images/class9/000.png"


def test_tar_files_of_the_same_names_share_no_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "images")
    for name in ("train.tar", "val.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(tmp_path / "images", "images")
    train, val, again = (
        open_source("folder", str(tmp_path / name), "any", 3) for name in ("train.tar", "val.tar", "train.tar")
    )
    assert not shares_images(train, val)
    assert shares_images(train, again)


def test_images_outside_of_class_folders_leave_a_set_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 3)
    flat = open_source("folder", str(tmp_path / "flat"), "train", 3)
    assert (flat.labels, flat.class_names) == (None, None)
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(tmp_path / "flat", "flat")
    packed = open_source("folder", str(tmp_path / "flat.tar"), "train", 3)
    assert (packed.labels, packed.class_names) == (None, None)
    mixed = class_folders(tmp_path / "mixed")
    write_images(mixed, 1)
    source = open_source("folder", str(mixed), "train", 3)
    assert (len(source), source.labels, source.class_names) == (7, None, None)


def test_arrays_have_labels_and_class_names_where_they_were_saved(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    save_arrays(tmp_path, images, [2, 0, 2], ["ant", "bee", "café au lait"])
    source = open_source("arrays", str(tmp_path), "train", 3)
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 2]
    assert source.labels.dtype == np.int64
    assert source.class_names == ("ant", "bee", "café au lait")
    save_arrays(tmp_path, images, np.array([1, 1, 0], np.uint8))
    source = open_source("arrays", str(tmp_path), "train", 3)
    assert source.labels is not None
    assert source.labels.tolist() == [1, 1, 0]
    assert source.class_names is None
    save_arrays(tmp_path, images)
    source = open_source("arrays", str(tmp_path), "train", 3)
    assert (source.labels, source.class_names) == (None, None)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([0, 1], None), ([0, 1, -1], None), ([0.5, 1, 2], None), ([0, 1, 2], ["a", "b"]), (None, ["a"])]
    + [([0, 0, 0], [name]) for name in ("", "two\nlines", " spaced")],
)
def test_arrays_with_labels_that_do_not_fit_are_not_written(
    tmp_path: Path, labels: list[int] | None, names: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=r"label|class name"):
        save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), labels, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "names", "parts"),
    [
        (np.arange(2), None, ["labels.npy", "2 labels for the 3 images"]),
        (np.array([0, -1, 2]), None, ["labels.npy", "label -1 of image 1"]),
        (np.zeros(3), None, ["labels.npy", "expected whole numbers (n,), found float64 (3,)"]),
        (np.zeros((3, 1), np.int64), None, ["labels.npy", "(3, 1)"]),
        (np.array([0, 5, 1]), b"a\nb\n", ["classes.txt", "2 names", "label 5"]),
        (np.zeros(3, np.int64), b"\xff\xfe", ["classes.txt", "not a text file"]),
    ],
)
def test_wrong_label_files_are_named_in_one_line(
    tmp_path: Path, labels: np.ndarray, names: bytes | None, parts: list[str]
) -> None:
    save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8))
    np.save(tmp_path / "labels.npy", labels)
    if names is not None:
        (tmp_path / "classes.txt").write_bytes(names)
    message = error_of("arrays", str(tmp_path), "train", 3)
    assert str(tmp_path) in message
    assert all(part in message for part in parts), message
    (tmp_path / "labels.npy").write_bytes(b"junk")
    assert "labels.npy: not a readable .npy array" in error_of("arrays", str(tmp_path), "train", 3)


def test_a_validation_set_that_lacks_a_class_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    train = open_source("folder", str(class_folders(tmp_path / "train")), "train", 3)
    write_images(tmp_path / "val" / "owl", 2)
    write_images(tmp_path / "val" / "class9", 1)
    val = open_source("folder", str(tmp_path), "val", 3)
    assert labels_by(val, train.class_names, "val").tolist() == [0, 2, 2]
    assert labels_by(val, None, "val").tolist() == [0, 1, 1]
    write_images(tmp_path / "val" / "emu", 1)
    val = open_source("folder", str(tmp_path), "val", 3)
    with pytest.raises(UserError, match=r"data\.root=x, split val: class 'emu' is not among the 3 classes"):
        labels_by(val, train.class_names, "data.root=x, split val")


def test_classes_of_one_name_keep_their_numbers(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), [0, 1, 2], ["crane", "lizard", "crane"])
    source = open_source("arrays", str(tmp_path), "train", 3)
    assert labels_by(source, source.class_names, "it").tolist() == [0, 1, 2]


def test_asking_for_labels_that_are_not_there_says_how_to_give_them(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    with pytest.raises(
        UserError, match=r"it: no labels; put the images of each class into a sub-folder .*labels\.npy"
    ):
        labels_by(open_source("folder", str(tmp_path), "train", 3), None, "it")


def test_a_split_that_is_the_whole_root_shares_images_with_every_other(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "a-test")
    class_folders(tmp_path / "val")
    train, test, val, whole = (
        open_source("folder", str(tmp_path), split, 3) for split in ("train", "a-test", "val", "none")
    )
    assert not shares_images(train, val)
    assert not shares_images(test, train)
    for split in (train, test, val):
        assert shares_images(split, whole)
        assert shares_images(whole, split)
    assert shares_images(Subset(train, np.array([4, 5])), whole)


def error_of(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*arguments)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    assert f"data.root={tmp_path / 'none'}: no such folder" in error_of(
        "folder", str(tmp_path / "none"), "train", 3
    )
    assert "no images in it" in error_of("folder", str(tmp_path), "train", 3)
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images in it" in error_of("folder", str(tmp_path), "train", 3)


def test_sets_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    assert "use data.name=arrays" in error_of("folder", str(tmp_path), "train", 5)
    assert "no sample index" in error_of("wds/set", str(tmp_path), "train", 3)
    assert "no sample index" in error_of("hfids/set", str(tmp_path), "train", 3)
    assert "unknown; use folder" in error_of("foldr", str(tmp_path), "train", 3)
    assert "data.root=" in error_of("torch/cifar10", str(tmp_path), "train", 3)
    assert "images.npy" in error_of("arrays", str(tmp_path), "train", 3)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.float32))
    assert "expected uint8" in error_of("arrays", str(tmp_path), "train", 3)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    assert "have 3 channels, but model.in_chans is 4" in error_of("arrays", str(tmp_path), "train", 4)
    (tmp_path / "images.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    assert "not a readable .npy" in error_of("arrays", str(tmp_path), "train", 3)


def test_an_image_that_does_not_decode_is_replaced_and_reported(folder: Path) -> None:
    broken = folder / "004.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "005.png").write_text("not an image at all")
    (folder / "006.png").write_bytes(b"")
    for workers in (0, 2):
        batches = take(dataset_of(folder), 11, num_workers=workers)
        bad = {image.index: image for batch in batches for image in batch.bad}
        assert sorted(bad) == [4, 5, 6]
        assert bad[4].name == str(broken)
        assert bad[4].reason
        assert not {4, 5, 6} & {index for batch in batches for index in batch.indices}
        assert all(batch.images.shape == (4, 3, 32, 32) for batch in batches)
    assert unreadable(open_source("folder", str(folder), "train", 3), 64)[0] == 11
    assert len(unreadable(open_source("folder", str(folder), "train", 3), 64)[1]) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_of_nothing_but_broken_images_ends_in_one_line(tmp_path: Path, num_workers: int) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("junk")
    with pytest.raises(UserError, match="did not decode") as caught:
        take(dataset_of(tmp_path), 1, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_fixed_images_are_spread_over_the_set_and_skip_broken_ones(folder: Path) -> None:
    (folder / "000.png").write_text("junk")
    source = open_source("folder", str(folder), "train", 3)
    images = fixed_images(source, 4, (32, 64))
    assert images.shape == (3, 3, 32, 64)
    assert torch.equal(images, fixed_images(source, 4, (32, 64)))
    assert fixed_images(source, 0, (32, 64)).numel() == 0
    assert len(fixed_images(source, 100, (32, 64))) == 10


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (100, 20)])
@pytest.mark.parametrize("shape", [(40, 32), (7, 300), (64, 64), (31, 33)])
def test_cover_fills_any_size_from_any_image(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert cover(image, size).shape == (3, *size)


def test_pixel_normalisation_inverts() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalize = PixelNormalizer((0.1, 0.5, 0.9), (0.3, 0.2, 0.1))
    images = normalize(pixels)
    expected = (pixels[:, 2].double() / 255 - 0.9) / 0.1
    assert torch.allclose(images[:, 2].double(), expected, atol=1e-5)
    assert torch.allclose(normalize.invert(images) * 255, pixels.float(), atol=1e-3)


# Labelled images


def labelled(root: Path, number: int = 40, channels: int = 3) -> Source:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (number, 4, 4, channels), dtype=np.uint8)
    save_arrays(root, coarse.repeat(8, 1).repeat(8, 2), np.arange(number) % 4)
    return open_source("arrays", str(root), "train", channels)


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


def test_augmentation_is_the_same_for_any_number_of_workers_and_changes_with_the_epoch(tmp_path: Path) -> None:
    dataset = LabelledDataset(labelled(tmp_path), view=view_of(), seed=0)

    def batches(**kwargs: int) -> list[LabelledBatch]:
        workers = kwargs.pop("num_workers", 0)
        stream = IndexStream(len(dataset), batch_size=8, seed=0, **kwargs)
        return list(islice(load_batches(dataset, stream, num_workers=workers, pin_memory=False), 6))

    alone, helped = batches(), batches(num_workers=2)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.labels.tolist() == [index % 4 for index in a.indices]
    assert not torch.equal(dataset[0, 3].image, dataset[1, 3].image)
    assert torch.equal(batches(start=16)[0].images, alone[2].images)


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


def test_a_share_of_each_class_is_exact_nested_and_chosen_by_the_seed(tmp_path: Path) -> None:
    source = labelled(tmp_path, number=42)  # 11, 11, 10, 10
    chosen: dict[float, set[str]] = {}
    for fraction in (0.01, 0.1, 0.5, 0.9, 1.0):
        part = share_of_each_class(source, fraction, seed=3)
        assert part.labels is not None
        counts = np.bincount(part.labels).tolist()
        assert counts == [max(1, round(fraction * n)) for n in (11, 11, 10, 10)]
        chosen[fraction] = {part.describe(i) for i in range(len(part))}
        for i in range(len(part)):
            index = int(part.describe(i).split("[")[1][:-1])
            assert part.labels[i] == index % 4
            assert torch.equal(part.load(i), source.load(index))
    assert chosen[0.01] <= chosen[0.1] < chosen[0.5] < chosen[0.9] < chosen[1.0]
    again = share_of_each_class(source, 0.5, seed=3)
    assert {again.describe(i) for i in range(len(again))} == chosen[0.5]
    other = share_of_each_class(source, 0.5, seed=4)
    assert {other.describe(i) for i in range(len(other))} != chosen[0.5]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 7, 8, 37])
def test_a_pass_gives_every_index_to_one_process_once(number: int, world_size: int) -> None:
    parts = [one_pass(number, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(keys) == 4 for part in parts for keys in part)
    seen = [index for part in parts for keys in part for index in keys if index != PADDING]
    assert sorted(seen) == list(range(number))


def test_padding_and_broken_images_do_not_count_in_an_evaluation(folder: Path) -> None:
    (folder / "004.png").write_text("not an image at all")
    source = open_source("folder", str(folder), "train", 3)
    dataset = EvaluationDataset(
        source, np.arange(11), class_names=[str(i) for i in range(11)], view=Cover((16, 16)), shape=(3, 16, 16)
    )
    batches: list[LabelledBatch] = list(
        load_batches(dataset, one_pass(11, batch_size=4), num_workers=0, pin_memory=False)
    )
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9, 10, -1]
    assert [bad.index for batch in batches for bad in batch.bad] == [4]
    assert all(batch.images.shape == (4, 3, 16, 16) for batch in batches)


def test_the_evaluation_crop_keeps_its_share_of_the_middle() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 8:56, 8:56] = 255
    assert (cover(image, (48, 48), 0.75) == 255).all()
    assert (cover(image, (64, 64), 1.0) == image).all()
    assert (cover(image, (64, 64), 0.5) == 255).all()
