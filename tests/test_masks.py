"""Images with masks: pairing, reading by index and in parts, what is refused, classes that are counted."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from fcmae.data import save_arrays
from fcmae.data.masks import (
    MaskFiles,
    SegmentationSource,
    as_classes,
    as_values,
    count_pixels,
    open_mask,
    open_segmentation,
    save_masks,
)
from fcmae.data.views import Part
from fcmae.errors import UserError

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 4, (20, 30)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        mask = open_mask(file)
        return mask.read((0, 0, mask.height, mask.width))


def write_image(path: Path, size: tuple[int, int] = (20, 30), **kwargs: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path, **kwargs)


def write_values(path: Path, values: np.ndarray = VALUES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with three images and masks of four classes in its split train."""
    for name in ("a", "b", "deep/c"):
        write_image(tmp_path / f"train/images/{name}.jpg")
        write_values(tmp_path / f"train/masks/{name}.png")
    return tmp_path


def open_train(root: Path, **kwargs: Any) -> SegmentationSource:
    return open_segmentation("folder", str(root), "train", 3, **kwargs)


# One mask


def test_a_palette_is_read_by_index_whatever_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(VALUES)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(RNG.integers(0, 256, 768).astype(np.uint8).tobytes())
    for name in ("mask.png", "mask.tif", "mask.bmp"):
        image.save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), VALUES), name


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_few_bits_is_read_by_index(tmp_path: Path, bits: int) -> None:
    values = (VALUES % 2**bits).astype(np.uint8)
    image = Image.frombytes("P", (30, 20), values.tobytes())
    image.putpalette([255, 0, 0, 0, 0, 255] * 8)
    image.save(tmp_path / "mask.png", bits=bits)
    assert np.array_equal(read(tmp_path / "mask.png"), values)


def test_a_mask_of_one_bit_has_classes_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(VALUES > 1).save(tmp_path / "mask.png")
    assert np.array_equal(read(tmp_path / "mask.png").astype(int), VALUES > 1)


@pytest.mark.parametrize("name", ["mask.png", "mask.tif", "mask.npy"])
def test_16_bits_keep_classes_beyond_255(tmp_path: Path, name: str) -> None:
    values = VALUES.astype(np.uint16) * 300
    if name == "mask.npy":
        np.save(tmp_path / name, values)
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), values)
    assert as_classes(read(tmp_path / name), None).max() == 900


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "float32"])
def test_arrays_of_any_whole_numbers_are_masks(tmp_path: Path, dtype: str) -> None:
    values = VALUES % 2 if dtype == "bool" else VALUES
    np.save(tmp_path / "mask.npy", values.astype(dtype))
    found = read(tmp_path / "mask.npy")
    assert np.array_equal(as_classes(found // 255 if dtype == "bool" else found, 255), values)


def test_a_part_of_a_tiled_tiff_is_that_part(tmp_path: Path) -> None:
    values = RNG.integers(0, 900, (100, 130)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "mask.tif", values, tile=(32, 32))
    with open(tmp_path / "mask.tif", "rb") as file:
        part = open_mask(file).read((20, 40, 50, 60))
    assert np.array_equal(part, values[20:70, 40:100])


def test_colours_in_place_of_classes_are_refused_by_name(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2] = 255, 0, 0
    picture[2:, :1] = 0, 128, 0
    for mode in ("RGB", "RGBA"):
        Image.fromarray(picture).convert(mode).save(tmp_path / "mask.png")
        with pytest.raises(
            ValueError, match=rf"mode {mode} with 3 colours \(\(255, 0, 0\), \(0, 0, 0\), \(0, 128,"
        ):
            read(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("mask.jpg", VALUES, "a JPEG, which changes class numbers"),
        ("mask.npy", VALUES[..., None].repeat(2, 2), "2 bands in place of one"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, name: str, values: np.ndarray, says: str) -> None:
    path = tmp_path / name
    np.save(path, values) if name.endswith("npy") else Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=says):
        read(path)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.5, r"0\.5 in place of a class number"),
        (np.nan, "nan in place of a class number"),
        (-2, "-2 in place of a class number, from 0"),
        (70000, "70000 in place of a class number, from 0 to 32,767"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(value: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_classes(np.array([[0, value]], np.float32), 255)


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        (255, [0, 1, 2, -1, 255]),  # the classes above close the gap
        (0, [-1, 0, 1, 254, 255]),  # as in ADE20K, where 0 is no class
        (None, [0, 1, 2, 255, 256]),
        (-1, [0, 1, 2, 255, 256]),
    ],
)
def test_classes_are_the_values_in_order_without_the_ignored_one(ignored: int | None, expected: list[int]) -> None:
    values = np.array([[0, 1, 2, 255, 256]], np.uint16)
    classes = as_classes(values, ignored)
    assert classes.tolist() == [expected]
    assert np.array_equal(as_values(classes, ignored), values)


def test_a_negative_value_can_be_ignored_too() -> None:
    assert as_classes(np.array([[-1, 0, 3]], np.int32), -1).tolist() == [[-1, 0, 3]]
    with pytest.raises(ValueError, match="pixels without a class"):
        as_values(np.array([[-1, 0]], np.int16), -1)


# Pairs


def test_images_and_masks_are_paired_by_name_at_any_depth(pairs: Path) -> None:
    np.save(pairs / "train/masks/a.npy", VALUES.T[:20, :20].repeat(2, 1)[:, :30])
    (pairs / "train/masks/a.png").unlink()
    source = open_train(pairs)
    assert len(source) == 3
    assert source.class_names == ("0", "1", "2", "3")
    assert np.array_equal(source.load(0).classes, VALUES.T[:20, :20].repeat(2, 1)[:, :30])
    for index in (1, 2):
        pixels, classes, _ = source.load(index)
        assert pixels.shape == (3, 20, 30)
        assert np.array_equal(classes, VALUES)
    assert source.describe(2).endswith("deep/c.jpg")


def test_masks_may_lie_in_a_root_of_their_own(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        write_image(tmp_path / f"images/{split}/a.png")
        write_values(tmp_path / f"annotations/{split}/a.png")
    root, masks = str(tmp_path / "images"), str(tmp_path / "annotations")
    for split in ("train", "val"):
        source = open_segmentation("folder", root, split, 3, mask_root=masks)
        assert np.array_equal(source.load(0).classes, VALUES)


def test_arrays_are_read_in_parts(tmp_path: Path) -> None:
    images = RNG.integers(0, 65536, (4, 12, 10, 5)).astype(np.uint16)
    masks = RNG.integers(0, 3, (4, 12, 10)).astype(np.int32)
    save_arrays(tmp_path / "train", images)
    save_masks(tmp_path / "train", masks, ["sky", "sea", "land"])
    source = open_segmentation("arrays", str(tmp_path), "train", 5)
    assert source.class_names == ("sky", "sea", "land")
    assert (source.dtype, source.channels) == (torch.uint16, 5)
    assert source.class_pixels().tolist() == np.bincount(masks.ravel()).tolist()
    pixels, classes, _ = source.load_part(2, lambda height, width, _: Part(3, 2, 6, 7, (6, 7)))
    assert np.array_equal(pixels.permute(1, 2, 0), images[2, 3:9, 2:9])
    assert np.array_equal(classes, masks[2, 3:9, 2:9])


def test_what_chooses_a_part_may_look_at_its_classes(pairs: Path) -> None:
    seen = []

    def choose(height: int, width: int, look: Any) -> Part:
        seen.append((height, width, look((5, 6, 7, 8))))
        return Part(1, 2, 3, 4, (3, 4))

    pair = open_train(pairs).load_part(0, choose)
    ((height, width, classes),) = seen
    assert (height, width) == VALUES.shape
    assert np.array_equal(classes, VALUES[5:12, 6:14])
    assert np.array_equal(pair.classes, VALUES[1:4, 2:6])
    assert pair.pixels.shape == (3, 3, 4)


def test_a_turned_image_has_the_classes_that_a_person_sees(tmp_path: Path) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "train/images/a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    write_values(tmp_path / "train/masks/a.png", (upright[..., 0] > 0).astype(np.uint8))
    pixels, classes, _ = open_train(tmp_path).load(0)
    assert np.array_equal(pixels[0] > 0, classes == 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_a_person_sees_it_whole_and_in_parts(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(VALUES).save(tmp_path / "a.png", exif=exif)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    deep, tag = tmp_path / "a.tif", [(274, "H", 1, orientation, True)]
    tifffile.imwrite(deep, VALUES.astype(np.uint16), extratags=tag)
    tifffile.imwrite(tmp_path / "b.tif", VALUES, extratags=tag)
    for path in (tmp_path / "a.png", deep, tmp_path / "b.tif"):
        assert np.array_equal(read(path), seen), path.name
        with open(path, "rb") as file:
            assert np.array_equal(open_mask(file).read((3, 5, 9, 7)), seen[3:12, 5:12]), path.name


def test_a_share_of_the_images_is_within_every_larger_one(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.zeros((20, 4, 4, 3), np.uint8))
    save_masks(tmp_path, np.arange(20)[:, None, None].repeat(4, 1).repeat(4, 2).astype(np.uint8))
    source = open_segmentation("arrays", str(tmp_path), "train", 3)
    shares = [source.share(fraction, seed=1) for fraction in (0.01, 0.1, 0.5, 1.0)]
    assert [len(share) for share in shares] == [1, 2, 10, 20]
    found = [{int(share.load(i).classes[0, 0]) for i in range(len(share))} for share in shares]
    assert found[0] < found[1] < found[2] < found[3]
    assert source.share(0.5, seed=2).rows.tolist() != shares[2].rows.tolist()


# What is refused


def test_images_without_masks_and_masks_without_images_are_counted_and_named(pairs: Path) -> None:
    for name in ("x", "y"):
        write_image(pairs / f"train/images/{name}.png")
    write_values(pairs / "train/masks/z.png")
    with pytest.raises(UserError) as error:
        open_train(pairs)
    says = str(error.value)
    assert f"2 images without a mask, the first {pairs}/train/images/x.png" in says
    assert f"1 masks without an image, the first {pairs}/train/masks/z.png" in says
    assert "\n" not in says


def test_two_files_of_one_name_are_refused(pairs: Path) -> None:
    write_values(pairs / "train/masks/a.tif")
    with pytest.raises(UserError, match=r"a\.png and .*a\.tif have one name"):
        open_train(pairs)


def test_a_mask_of_another_size_is_named_where_it_is_read(pairs: Path) -> None:
    write_values(pairs / "train/masks/b.png", VALUES[:10])
    source = open_train(pairs)
    source.load(0)
    with pytest.raises(ValueError, match=r"30 x 20 pixels, but its mask .*b\.png has 30 x 10"):
        source.load(1)


def test_a_class_beyond_those_that_are_named_is_refused(pairs: Path) -> None:
    (pairs / "classes.txt").write_text("sky\nsea\nland\n")
    with pytest.raises(UserError, match=r"a\.png has class 3, but there are 3, counted from 0; name each class in"):
        open_train(pairs)
    with pytest.raises(UserError, match=r"model\.num_classes=7: .* names 3 classes"):
        open_train(pairs, num_classes=7)


def test_validation_is_held_to_the_classes_of_training(pairs: Path) -> None:
    names = ("sky", "sea", "land", "ice", "fire")
    assert open_train(pairs, class_names=names).class_names == names  # of which one does not occur
    with pytest.raises(UserError, match="has class 3, but there are 2"):
        open_train(pairs, class_names=names[:2])


def test_a_class_that_never_occurs_in_training_is_named(pairs: Path) -> None:
    (pairs / "train/classes.txt").write_text("sky\nsea\nland\nice\nfire\nsmoke\n")
    with pytest.raises(UserError, match=r"2 of 6 classes never occur: 4 \(fire\), 5 \(smoke\)"):
        open_train(pairs)
    (pairs / "train/classes.txt").unlink()
    with pytest.raises(UserError, match=r"2 of 6 classes never occur: 4, 5;"):
        open_train(pairs, num_classes=6)


def test_masks_of_0_and_255_say_what_255_is(pairs: Path) -> None:
    for name in ("a", "b", "deep/c"):
        write_values(pairs / f"train/masks/{name}.png", np.where(VALUES > 1, 255, 0).astype(np.uint8))
    with pytest.raises(UserError, match="masks of class 0 alone, and 255, which is no class: write 1 in its place"):
        open_train(pairs)


def test_a_class_that_is_ignored_is_none(pairs: Path) -> None:
    source = open_train(pairs, ignored=0)
    assert source.num_classes == 3
    assert np.array_equal(source.load(0).classes, VALUES.astype(int) - 1)
    assert source.class_pixels().tolist() == (3 * np.bincount(VALUES.ravel())[1:]).tolist()


def test_masks_that_are_all_pictures_end_the_run_at_once_and_single_ones_are_left_to_training(pairs: Path) -> None:
    write_image(pairs / "train/masks/a.png")
    with pytest.raises(ValueError, match="an image of mode RGB"):
        open_train(pairs).load(0)
    for name in ("b", "deep/c"):
        write_image(pairs / f"train/masks/{name}.png")
    with pytest.raises(UserError, match=r"no mask can be read, the first .*a\.png: an image of mode RGB with"):
        open_train(pairs)


def test_folders_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*: no such folder"):
        open_train(tmp_path / "nowhere")
    write_image(tmp_path / "train/images/a.png")
    with pytest.raises(UserError, match=r"no folder .*train/masks; images go into images/ and masks into masks/"):
        open_train(tmp_path)
    (tmp_path / "train/masks").mkdir()
    with pytest.raises(UserError, match=r"no masks in .*train/masks"):
        open_train(tmp_path)
    with pytest.raises(UserError, match=r"data\.name=hfds/x: images with masks are of data\.name=folder or arrays"):
        open_segmentation("hfds/x", str(tmp_path), "train", 3)


def test_arrays_of_masks_must_fit_the_images(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"masks\.npy"):
        open_segmentation("arrays", str(tmp_path), "train", 3)
    save_masks(tmp_path, np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="3 masks for the 4 images beside it"):
        open_segmentation("arrays", str(tmp_path), "train", 3)
    np.save(tmp_path / "masks.npy", np.zeros((4, 8, 8), np.float32))
    with pytest.raises(UserError, match="expected class numbers, whole ones"):
        open_segmentation("arrays", str(tmp_path), "train", 3)
    with pytest.raises(ValueError, match="masks must be whole numbers"):
        save_masks(tmp_path, np.zeros((4, 8, 8)))


def test_pixels_are_counted_as_a_plain_loop_counts_them(pairs: Path) -> None:
    masks = MaskFiles([str(pairs / f"train/masks/{name}.png") for name in ("a", "b", "deep/c")])
    counted = count_pixels(masks, 255)
    assert counted.pixels.tolist() == [3 * int(np.equal(VALUES, label).sum()) for label in range(4)]
    assert counted.highest == {0: 3, 1: 3, 2: 3}
    assert counted.complete
    assert not count_pixels(masks, 255, most=2).complete


def test_a_gray_png_of_few_bits_has_the_values_that_every_reader_sees(tmp_path: Path) -> None:
    """Of two bits a sample, PNG's 3 is white, 255, to all that read PNG; a palette is what keeps indices."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes([0, 0b00011011])))
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    assert read(tmp_path / "mask.png").tolist() == [[0, 85, 170, 255]]
