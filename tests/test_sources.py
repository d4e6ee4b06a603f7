"""Sources: the images, labels and class names of folders, tar files and arrays; what is not there is refused."""

import io
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import ROOT
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import fcmae.data.deep
from fcmae.data import (
    RandomView,
    Reading,
    Source,
    labels_by,
    open_source,
    overlap,
    save_arrays,
    share_of_each_class,
    unreadable,
)
from fcmae.data.sources import Subset
from fcmae.data.views import Part
from fcmae.errors import UserError
from fcmae.evaluation.inference import Unreadable, read_images


def write_images(folder: Path, number: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    paths = []
    for i in range(number):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"{i:03d}.png")
        Image.fromarray(pixels).convert(mode).save(paths[-1])
    return paths


def class_folders(root: Path) -> Path:
    for name, number in {"owl": 2, "class10": 1, "class9": 3}.items():
        write_images(root / name, number)
    return root


def error_of(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*arguments, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_folders_give_the_channels_that_are_asked_for(tmp_path: Path, channels: int, mode: str) -> None:
    write_images(tmp_path, 1, mode=mode)
    image = open_source("folder", str(tmp_path), "train", channels).load(0)
    assert image.dtype == torch.uint8
    assert image.shape == (channels, 32, 40)
    stored = np.asarray(Image.open(tmp_path / "000.png")).reshape(32, 40, channels)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


# Pixels of more than eight bits, and of more bands


def write_tiff(path: Path, values: np.ndarray, **options: Any) -> None:
    tifffile.imwrite(path, values, photometric="minisblack", **options)


def write_dicom(path: Path, values: np.ndarray, **tags: Any) -> None:
    """A CT slice as scanners write it: 12 of 16 bits."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


BANDS = np.random.default_rng(0).integers(0, 4096, (50, 70, 12), dtype=np.uint16)

DEEP: dict[str, tuple[str, Callable[[Path], object], np.ndarray]] = {
    "gray PNG": ("a.png", lambda p: Image.fromarray(BANDS[..., 0]).save(p), BANDS[..., :1]),
    "RGB PNG": ("a.png", lambda p: p.write_bytes(imagecodecs.png_encode(BANDS[..., :3].copy())), BANDS[..., :3]),
    "gray TIFF": ("a.tif", lambda p: write_tiff(p, BANDS[..., 0]), BANDS[..., :1]),
    "12 bands": ("a.tif", lambda p: write_tiff(p, BANDS, planarconfig="contig"), BANDS),
    "12 bands one by one": (
        "a.tif",
        lambda p: write_tiff(p, BANDS.transpose(2, 0, 1).copy(), planarconfig="separate", rowsperstrip=7),
        BANDS,
    ),
    "tiles": (
        "a.tiff",
        lambda p: write_tiff(p, BANDS, planarconfig="contig", tile=(16, 32), compression="lzw", predictor=True),
        BANDS,
    ),
    "tiles of bands": (
        "a.tif",
        lambda p: write_tiff(
            p, BANDS.transpose(2, 0, 1).copy(), planarconfig="separate", tile=(32, 16), compression="zlib"
        ),
        BANDS,
    ),
    "five bands of eight bits": (
        "a.tif",
        lambda p: write_tiff(p, (BANDS[..., :5] >> 4).astype(np.uint8), planarconfig="contig"),
        (BANDS[..., :5] >> 4).astype(np.uint8),
    ),
    "float TIFF": ("a.tif", lambda p: write_tiff(p, BANDS[..., 0] / 4095), (BANDS[..., :1] / 4095).astype("f4")),
    "signed TIFF": (
        "a.tif",
        lambda p: write_tiff(p, BANDS[..., 0].astype(np.int16) - 1000),
        BANDS[..., :1].astype(np.float32) - 1000,
    ),
    "OME channels": (
        "a.ome.tif",
        lambda p: write_tiff(p, BANDS[..., :4].transpose(2, 0, 1).copy(), ome=True, metadata={"axes": "CYX"}),
        BANDS[..., :4],
    ),
    "npy": ("a.npy", lambda p: np.save(p, BANDS.astype(">u2")), BANDS),
    "gray npy": ("a.npy", lambda p: np.save(p, BANDS[..., 0].astype(np.float64)), BANDS[..., :1].astype("f4")),
    "DICOM": ("a.dcm", lambda p: write_dicom(p, BANDS[..., 0]), BANDS[..., :1]),
    "DICOM, rescaled": (
        "a.dcm",
        lambda p: write_dicom(p, BANDS[..., 0], RescaleSlope="0.5", RescaleIntercept="-1024"),
        (BANDS[..., :1] * 0.5 - 1024).astype("f4"),
    ),
    "DICOM, low is bright": (
        "a.dcm",
        lambda p: write_dicom(p, BANDS[..., 0], PhotometricInterpretation="MONOCHROME1"),
        4095 - BANDS[..., :1],
    ),
}
"""What an image file is -> its name, what writes it, its pixels (h, w, bands)."""


@pytest.mark.parametrize("what", DEEP)
def test_pixels_arrive_as_they_are_in_the_file(what: str, tmp_path: Path) -> None:
    name, write, expected = DEEP[what]
    write(tmp_path / name)
    source = open_source("folder", str(tmp_path), "train", expected.shape[2])
    whole = source.load(0)
    assert whole.dtype == source.dtype == torch.from_numpy(expected[:1].copy()).dtype
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), expected)
    part = source.load_part(0, lambda height, width: Part(height // 3, width // 5, 23, 41, (4, 4)))
    assert torch.equal(part, whole[:, 16:39, 14:55])


def test_a_folder_of_both_depths_is_as_deep_as_its_deepest_and_loses_nothing(tmp_path: Path) -> None:
    shallow = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(shallow).save(tmp_path / "a.png")
    Image.fromarray(BANDS[:8, :8, 0]).save(tmp_path / "b.png")
    source = open_source("folder", str(tmp_path), "train", 1)
    assert source.dtype == torch.uint16
    assert np.array_equal(source.load(0)[0].numpy(), shallow.astype(np.uint16) * 257)
    assert np.array_equal(source.load(1)[0].numpy(), BANDS[:8, :8, 0])
    shallower = open_source("folder", str(tmp_path), "train", 1, reading=Reading(torch.uint8))
    assert np.array_equal(shallower.load(0)[0].numpy(), shallow)
    with pytest.raises(ValueError, match=r"uint16 pixels among uint8 ones; set data\.dtype=uint16"):
        shallower.load(1)


def test_whole_numbers_among_floats_are_refused_unless_floats_are_asked_for(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.full((8, 8), -7.0))
    source = open_source("folder", str(tmp_path), "train", 1)
    assert source.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"uint8 pixels among floats; set data\.dtype=float32 to take them as 0 to 1"
    ):
        source.load(0)
    asked = open_source("folder", str(tmp_path), "train", 1, reading=Reading(torch.float32))
    assert [float(asked.load(index).unique()) for index in (0, 1)] == pytest.approx([0.2, -7])


def test_bands_that_do_not_fit_are_reported_when_the_images_are_opened(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", BANDS, planarconfig="contig")
    assert error_of("folder", str(tmp_path), "train", 3) == (
        f"{tmp_path}/a.tif: 12 bands, but model.in_chans is 3; set model.in_chans=12, and data.mean and data.std "
        "with 12 values, which fcmae stats computes"
    )
    assert open_source("folder", str(tmp_path), "train", None).channels == 12


def test_images_of_other_bands_than_most_are_bad_images(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    write_tiff(tmp_path / "a.tif", BANDS, planarconfig="contig")
    source = open_source("folder", str(tmp_path), "train", 3)
    assert source.load(0).shape == (3, 32, 40)
    with pytest.raises(ValueError, match=r"12 bands where 3 are wanted"):
        source.load(1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says_whole_and_in_part(orientation: int, tmp_path: Path) -> None:
    image = Image.open(ROOT / "docs" / "photos" / "bird.jpg").resize((160, 96))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.jpg", exif=exif, quality=95)
    source = open_source("folder", str(tmp_path), "train", 3)
    for index, name in enumerate(("a.png", "b.jpg")):
        with Image.open(tmp_path / name) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored))
        whole = source.load(index)
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), expected)
        part = source.load_part(index, lambda height, width: Part(10, 20, 60, 50, (60, 50)))
        assert torch.equal(part, whole[:, 10:70, 20:70])
    coarse = source.load_part(1, lambda height, width: Part(8, 16, 64, 48, (16, 12)))
    assert coarse.shape == (3, 16, 12)
    mean = whole[:, 8:72, 16:64].float().unflatten(1, (16, 4)).unflatten(3, (12, 4)).mean((2, 4))
    assert (coarse.float() - mean).abs().mean() < 8


def write_pages(path: Path, number: int = 3) -> None:
    pages = [Image.new("RGB", (40, 30), (40 * i, 0, 90)) for i in range(number)]
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("stack.tif", "3 pages; split it into one file per page"),
        ("animated.gif", "3 frames, an animation; save the frames that are wanted"),
        ("animated.png", "3 frames, an animation"),
        ("animated.webp", "3 frames, an animation"),
    ],
)
def test_images_of_several_pages_are_refused(tmp_path: Path, name: str, line: str) -> None:
    write_pages(tmp_path / name)
    source = open_source("folder", str(tmp_path), "train", 3)
    with pytest.raises(ValueError, match=line):
        source.load(0)
    with pytest.raises(ValueError, match=line):
        source.load_part(0, RandomView((8, 8), (0.2, 1.0), 0.5).part)
    tried, (bad,) = unreadable(source, 1)
    assert (tried, bad.name) == (1, str(tmp_path / name))
    assert bad.reason.startswith(line)
    (unread,) = read_images([tmp_path], 3)
    assert isinstance(unread, Unreadable)
    assert (unread.path, unread.reason) == (tmp_path / name, bad.reason)


@pytest.mark.parametrize("name", ["one.tif", "one.gif", "one.png", "one.webp"])
def test_a_single_page_is_an_image(tmp_path: Path, name: str) -> None:
    write_pages(tmp_path / name, 1)
    assert open_source("folder", str(tmp_path), "train", 3).load(0).shape == (3, 30, 40)


def test_previews_beside_an_image_are_not_pages(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo, preview = Image.fromarray(pixels), Image.new("RGB", (20, 15))
    options = {"save_all": True, "append_images": [preview.copy()]}
    photo.copy().save(tmp_path / "a.mpo", quality=100, subsampling=0, **options)
    preview.encoderinfo = {"tiffinfo": {254: 1}}  # pyright: ignore[reportAttributeAccessIssue]
    photo.save(tmp_path / "b.tif", save_all=True, append_images=[preview])
    assert [getattr(Image.open(tmp_path / name), "n_frames", 1) for name in ("a.mpo", "b.tif")] == [2, 2]
    source = open_source("folder", str(tmp_path), "train", 3)
    jpeg, tiff = (source.load(i).permute(1, 2, 0).numpy() for i in range(2))
    assert np.abs(jpeg.astype(int) - pixels).max() < 40  # of a JPEG of noise; the preview is black
    assert np.array_equal(tiff, pixels)


def test_a_program_in_postscript_is_not_run_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **_: started.append(arguments))
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "x.jpg").symlink_to("../x.jpg")
    for name, root in (("folder", tmp_path), ("torch/folder", tmp_path)):
        source = open_source(name, str(root), ".", 3)
        with pytest.raises(UnidentifiedImageError, match="not an image of a type that is read"):
            source.load(0)
    (read, _) = read_images([tmp_path], 3)
    assert isinstance(read, Unreadable)
    assert not started


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 1)
    source = open_source("folder", str(tmp_path), "train", 3)
    monkeypatch.setattr(fcmae.data.deep, "MAX_PIXELS", 40 * 32)
    assert source.load(0).shape == (3, 32, 40)
    monkeypatch.setattr(fcmae.data.deep, "MAX_PIXELS", 40 * 32 - 1)
    with pytest.raises(ValueError, match=r"40 x 32 pixels, over 1,279; cut it into tiles or shrink it"):
        source.load(0)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_that_eight_bits_do_not_hold_are_kept_or_refused_not_clipped(tmp_path: Path, kind: type) -> None:
    values = np.linspace(-3, 70_000, 64).reshape(8, 8).astype(kind)
    Image.fromarray(values).save(tmp_path / "0.tif")
    np.save(tmp_path / "1.npy", values.astype(np.int64) << 30)
    source = open_source("folder", str(tmp_path), "train", 1)
    assert source.load(0).dtype == torch.float32
    assert np.array_equal(source.load(0)[0].numpy(), values.astype(np.float32))
    with pytest.raises(ValueError, match=r"whole numbers from -3,221,225,472 to .* which float32 does not hold"):
        source.load(1)


def test_what_is_no_file_among_images_is_a_bad_image_and_links_in_a_circle_end(tmp_path: Path) -> None:
    write_images(tmp_path / "owl", 1)
    os.mkfifo(tmp_path / "owl" / "fifo.png")
    (tmp_path / "owl" / "device.png").symlink_to("/dev/zero")
    (tmp_path / "owl" / "gone.png").symlink_to("nowhere")
    (tmp_path / "owl" / "empty.png").touch()
    (tmp_path / "owl" / "up").symlink_to("..")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "other").symlink_to("../owl")
    source = open_source("folder", str(tmp_path), "train", 3)
    names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert [name for name in names if name.endswith("000.png")] == ["cat/other/000.png", "owl/000.png"]
    tried, bad = unreadable(source, 64)
    assert (tried, len(bad)) == (10, 8)
    reasons = {Path(image.name).name: image.reason for image in bad}
    assert reasons["fifo.png"] == reasons["device.png"] == "not a regular file"
    assert "No such file" in reasons["gone.png"]
    assert [type(read).__name__ for read in read_images([tmp_path / "owl"], 3)].count("Unreadable") == 4


def test_folders_that_links_multiply_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for level in range(12):  # 4,096 ways to the last
        (tmp_path / f"{level:02}").mkdir()
        for link in "ab":
            (tmp_path / f"{level:02}" / link).symlink_to(f"../{level + 1:02}")
    write_images(tmp_path / "12", 1)
    assert "links lead there in over 1,000 ways" in error_of("folder", str(tmp_path / "00"), "train", 3)


def test_names_that_are_no_utf8_work_and_are_named_so_that_they_can_be_printed(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    content = (write_images(tmp_path / "a\nb", 1)[0]).read_bytes()
    for name, written in ((b"\xff.png", content), (b"bad\n\xff.png", b"junk")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(written)
    source = open_source("folder", str(tmp_path), "train", 3)
    tried, (bad,) = unreadable(source, 64)
    assert tried == 3
    assert bad.name == rf"{tmp_path}/caf\udce9/bad\n\udcff.png"
    with tarfile.open(tmp_path / "names.tar", "w") as tar:
        tar.add(os.fsdecode(folder), "images")
    packed = open_source("folder", str(tmp_path / "names.tar"), "train", 3)
    assert len(packed) == 2
    assert unreadable(packed, 64)[1][0].name.isprintable()


def test_classes_that_differ_in_case_or_zeros_alone_are_numbered_the_same_in_every_process(tmp_path: Path) -> None:
    for name in ("Cat", "cat", "CAT", "a1", "a01", "a001"):
        write_images(tmp_path / name, 1)
    source = open_source("folder", str(tmp_path), "train", 3)
    assert source.class_names == ("a001", "a01", "a1", "CAT", "Cat", "cat")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 5]


# Splits


def test_split_folders_and_other_file_types_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cats", 2)
    write_images(tmp_path / "val" / "cats", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "one.webp")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "two.tif")
    assert len(open_source("folder", str(tmp_path), "train", 3)) == 4
    assert len(open_source("folder", str(tmp_path), "val", 3)) == 1


@pytest.mark.parametrize("name", ["folder", "arrays"])
def test_a_split_is_found_by_every_name_that_timm_knows_it_by(tmp_path: Path, name: str) -> None:
    for split, number in {"training": 2, "validation": 1}.items():
        write_images(tmp_path / split, number)
        save_arrays(tmp_path / split, np.zeros((number, 4, 4, 3), np.uint8))
    for number, splits in {2: ("train", "training"), 1: ("val", "valid", "validation", "eval")}.items():
        assert [len(open_source(name, str(tmp_path), split, 3)) for split in splits] == [number] * len(splits)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for split in ("train", "a-test", "Test"):
        class_folders(tmp_path / "images" / split)
        save_arrays(tmp_path / "arrays" / split, np.zeros((2, 4, 4, 3), np.uint8))
    images, arrays = str(tmp_path / "images"), str(tmp_path / "arrays")
    for split in ("val", "trian", "train[:10]"):
        for whole_root in (False, True):
            options = {"whole_root": whole_root, "key": "data.val_root", "remedy": "do something"}
            line = error_of("folder", images, split, 3, **options)
            meant = "" if split == "val" else "; did you mean train?"
            assert line == (
                f"data.val_root={images}: no split '{split}' in it (found: Test, train{meant}); do something"
            )
            line = error_of("arrays", arrays, split, 3, **options)
            assert line.startswith(f"data.val_root={arrays}: holds no {split}/images.npy (")
            assert line.endswith(f"(found: Test, a-test, train{meant}); do something")
    assert "data.split=NAME" in error_of("folder", images, "val", 3)
    assert len(open_source("folder", images, "a-test", 3)) == len(open_source("folder", images, "Test", 3)) == 6


def test_a_root_without_splits_is_the_training_set_or_the_split_that_it_is_named_for(tmp_path: Path) -> None:
    class_folders(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    save_arrays(tmp_path / "arrays", np.zeros((6, 4, 4, 3), np.uint8))
    for name, root in (("folder", "images"), ("folder", "images.tar"), ("arrays", "arrays")):
        assert [len(open_source(name, str(tmp_path / root), split, 3)) for split in ("train", ".")] == [6, 6]
        assert "(found: none)" in error_of(name, str(tmp_path / root), "val", 3)
        assert len(open_source(name, str(tmp_path / root), "val", 3, whole_root=True)) == 6


def test_images_of_other_splits_are_never_quietly_among_those_of_training(tmp_path: Path) -> None:
    class_folders(tmp_path)
    write_images(tmp_path / "Validation" / "owl", 2)
    line = error_of("folder", str(tmp_path), "train", 3)
    assert f"data.root={tmp_path}: no split 'train' in it (found: Validation)" in line
    assert "data.split=." in line
    assert len(open_source("folder", str(tmp_path), ".", 3)) == 8
    save_arrays(tmp_path / "val", np.zeros((2, 4, 4, 3), np.uint8))
    save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8))  # a file holds nothing of what lies beside it
    assert len(open_source("arrays", str(tmp_path), "train", 3)) == 3


def test_a_misspelt_split_of_a_torchvision_set_never_means_other_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        class_folders(tmp_path / split)
    line = error_of("torch/image_folder", str(tmp_path), "trian", 3)
    assert line.startswith(f"data.root={tmp_path}: no split 'trian' in it (found: train, val; did you mean train?)")
    assert "no split 'vla' of torch/cifar10 (known: train, " in error_of("torch/cifar10", str(tmp_path), "vla", 3)
    train, val = (open_source("torch/folder", str(tmp_path), split, 3) for split in ("train", "val"))
    assert (len(train), overlap(train, val)) == (6, False)
    loose = open_source("folder", str(tmp_path), "train", 3)
    assert train.class_names == ("class10", "class9", "owl")  # torchvision's order
    assert torch.equal(train.load(0), loose.load(3))


def test_sources_overlap_where_one_lies_in_the_other(tmp_path: Path) -> None:
    for split in ("train", "val"):
        class_folders(tmp_path / split)
        save_arrays(tmp_path / split, np.zeros((2, 4, 4, 3), np.uint8))
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / split, "images")
    save_arrays(tmp_path, np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "link").symlink_to("train")
    root = str(tmp_path)
    train, val, everything = (open_source("folder", root, split, 3) for split in ("train", "val", "."))
    again, owls = (open_source("folder", str(tmp_path / part), "train", 3) for part in ("link", "train/owl"))
    tar, other_tar, same_tar = (
        open_source("folder", str(tmp_path / name), "train", 3) for name in ("train.tar", "val.tar", "train.tar")
    )
    array, val_array, root_array = (open_source("arrays", root, split, 3) for split in ("train", "val", "."))
    apart = [(train, val), (owls, val), (tar, other_tar), (array, val_array), (array, root_array)]
    assert not any(overlap(a, b) or overlap(b, a) for a, b in apart)
    shared = [
        (train, train),
        (train, everything),
        (val, everything),
        (train, again),
        (train, owls),
        (tar, same_tar),
    ]
    assert all(overlap(a, b) and overlap(b, a) for a, b in shared)
    assert overlap(Subset(train, np.array([4, 5])), everything)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    for name in ("folder", "arrays"):
        assert f"data.root={tmp_path / 'none'}: no such folder" in error_of(
            name, str(tmp_path / "none"), "train", 3
        )
    assert "no images in it" in error_of("folder", str(tmp_path), "train", 3)
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images in it" in error_of("folder", str(tmp_path), "train", 3)


def test_sets_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    assert "no sample index" in error_of("wds/set", str(tmp_path), "train", 3)
    assert "no sample index" in error_of("hfids/set", str(tmp_path), "train", 3)
    assert "unknown; use folder" in error_of("foldr", str(tmp_path), "train", 3)
    assert "data.root=" in error_of("torch/cifar10", str(tmp_path), "train", 3)
    assert "data.name=folder reads" in error_of("arrays", str(tmp_path), "train", 3)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.int32))
    assert "expected uint8, uint16 or float32 images" in error_of("arrays", str(tmp_path), "train", 3)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    assert "have 3 channels, but model.in_chans is 4" in error_of("arrays", str(tmp_path), "train", 4)
    (tmp_path / "images.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    assert "not a readable .npy" in error_of("arrays", str(tmp_path), "train", 3)


def test_files_of_the_other_kind_are_named_with_the_name_that_reads_them(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 5), np.uint8))
    line = error_of("folder", str(tmp_path), "train", 3)
    assert f"no images in it but arrays, such as {tmp_path / 'images.npy'}" in line
    assert "data.name=arrays reads what fcmae prepare or fcmae.data.save_arrays wrote" in line
    (tmp_path / "images.npy").unlink()
    assert "from save_arrays" in error_of("arrays", str(tmp_path), "train", 5)
    save_arrays(tmp_path / "arrays" / "train", np.zeros((2, 4, 4, 3), np.uint8))
    assert "data.name=arrays reads" in error_of("folder", str(tmp_path / "arrays"), "train", 3)
    (path,) = write_images(tmp_path / "images", 1)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    for root, file in ((tmp_path / "images", path), (tmp_path / "images.tar", tmp_path / "images.tar")):
        assert f"such as {file}: data.name=folder reads" in error_of("arrays", str(root), "train", 3)


# Arrays


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays_of_any_channel_count_are_read_and_cropped(tmp_path: Path, channels: int, dtype: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 24, channels), dtype=np.uint8).astype(dtype)
    save_arrays(tmp_path / "train", images)
    source = open_source("arrays", str(tmp_path), "train", channels)
    assert np.array_equal(source.load(4).permute(1, 2, 0).numpy(), images[4])
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.load(5), source.load(5))
    assert len(pickle.dumps(source)) < 1000
    assert RandomView((8, 16), (0.2, 1.0), 0.5)(source.load(0)).shape == (channels, 8, 16)


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
    [([0, 1], None), ([0, 1, -1], None), ([[[0]], [[1]], [[2]]], None), ([0, 1, 2], ["a", "b"]), (None, ["a"])]
    + [([0, 0, 0], [name]) for name in ("", "two\nlines", "two\rlines", "spaced ", "\udcff")],
)
def test_arrays_with_labels_that_do_not_fit_are_not_written(
    tmp_path: Path, labels: list[Any] | None, names: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=r"label|class name"):
        save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), labels, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "names", "parts"),
    [
        (np.arange(2), None, ["labels.npy", "2 labels for the 3 images"]),
        (np.array([0, -1, 2]), None, ["labels.npy", "label -1 of image 1"]),
        (np.zeros((3, 1, 1), np.int64), None, ["expected numbers (n,) or (n, columns), found int64 (3, 1, 1)"]),
        (np.zeros((3, 2), np.int64), b"cat\n", ["classes.txt", "1 names", "labels.npy has 2 columns"]),
        (np.array([0, 10**9, 1]), None, ["labels.npy", "label 1000000000 of image 1", "classes count from 0 to"]),
        (np.array([0, 2**64 - 1, 1], np.uint64), None, ["labels.npy", "label 18446744073709551615 of image 1"]),
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


def test_an_array_that_shrinks_under_a_running_training_is_an_error_not_a_crash(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.zeros((400, 64, 64, 3), np.uint8))
    source = open_source("arrays", str(tmp_path), "train", 3)
    os.truncate(tmp_path / "images.npy", 300_000)
    assert source.load(0).shape == (3, 64, 64)
    with pytest.raises(OSError, match=r"images\.npy: cut off"):
        source.load(399)
    line = error_of("arrays", str(tmp_path), "train", 3)
    assert "images.npy: not a readable .npy array (cut off: 299,872 bytes of uint8 (400, 64, 64, 3), which" in line


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (np.asfortranarray(np.zeros((3, 4, 5, 3), np.uint8)), "in Fortran order"),
        (np.zeros((3, 4, 5), object), "it holds object"),
        (np.zeros((3, 4, 5), [("r", "u1"), ("g", "u1")]), "not plain numbers"),
        (np.zeros((3, 4, 5, 3), ">i4"), "expected uint8, uint16 or float32 images (n, h, w, c), found >i4"),
        (np.zeros((0, 4, 5, 3), np.uint8), "found uint8 (0, 4, 5, 3)"),
    ],
)
def test_arrays_of_anything_but_pixels_of_images_in_a_row_are_refused(
    tmp_path: Path, images: np.ndarray, part: str
) -> None:
    np.save(tmp_path / "images.npy", images, allow_pickle=True)
    assert part in error_of("arrays", str(tmp_path), "train", 3)


def test_a_header_that_promises_more_than_memory_is_refused_by_the_files_size(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8), [0, 1, 2])
    for name, dtype, shape in (("labels.npy", "<i8", (10**15,)), ("images.npy", "|u1", (10**15, 4, 4, 3))):
        with open(tmp_path / name, "wb") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        line = error_of("arrays", str(tmp_path), "train", 3)
        assert f"{name}: not a readable .npy array (cut off: 0 bytes of " in line


@pytest.mark.parametrize("dtype", [">i4", "<u2", "|i1", ">u8"])
def test_labels_of_any_whole_numbers_are_read_as_they_are(tmp_path: Path, dtype: str) -> None:
    save_arrays(tmp_path, np.zeros((3, 4, 4, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([2, 0, 1], dtype))
    source = open_source("arrays", str(tmp_path), "train", 3)
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 1]


def test_class_names_with_other_separators_of_lines_keep_their_places(tmp_path: Path) -> None:
    names = ["form\x0cfeed", "next\x85line", " spaced", "para\u2029graph"]
    save_arrays(tmp_path, np.zeros((4, 4, 4, 3), np.uint8), range(4), names)  # pyright: ignore[reportArgumentType]
    assert open_source("arrays", str(tmp_path), "train", 3).class_names == tuple(names)
    (tmp_path / "classes.txt").write_bytes(b"a\r\nb\r\nc\r\nd\r\n\r\n")
    assert open_source("arrays", str(tmp_path), "train", 3).class_names == ("a", "b", "c", "d")


# Tar files


def write_tar(path: Path, members: dict[str, bytes], **kinds: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    return path


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    """Return a PNG."""
    return write_images(tmp_path / "images", 1)[0].read_bytes()


def test_a_tar_files_members_are_read_in_place_wherever_their_names_lead(tmp_path: Path, image: bytes) -> None:
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    names = ("../../up/0.png", "/abs/1.png", "./here/2.png")
    path = write_tar(tmp_path / "x.tar", dict.fromkeys(names, image), **kinds)
    before = sorted(tmp_path.rglob("*"))
    source = open_source("folder", str(path), "train", 3)
    assert {source.describe(i) for i in range(3)} == {f"{path}/{name}" for name in names}
    assert source.class_names == ("abs", "here", "up")
    assert all(source.load(i).shape == (3, 32, 40) for i in range(3))
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_files_in_a_tar_file_are_read_too(tmp_path: Path, image: bytes) -> None:
    inner = write_tar(tmp_path / "owl.tar", {"0.png": image, "deep/1.png": image}).read_bytes()
    source = open_source(
        "folder", str(write_tar(tmp_path / "x.tar", {"cat/2.png": image, "owl.tar": inner})), "train", 3
    )
    assert source.class_names == ("cat", "deep", "owl")
    assert all(torch.equal(source.load(i), source.load(0)) for i in range(3))


def test_a_tar_file_that_was_read_before_its_processes_start_gives_them_the_same_images(
    tmp_path: Path, image: bytes
) -> None:
    source = open_source(
        "folder", str(write_tar(tmp_path / "x.tar", {"0.png": image, "1.png": b"junk"})), "train", 3
    )
    source.load(0)
    position = source.files.file.file.tell()  # pyright: ignore[reportAttributeAccessIssue]
    source.load(0)
    assert source.files.file.file.tell() == position == 0  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(pickle.loads(pickle.dumps(source)).load(0), source.load(0))


def test_tar_files_without_images_or_with_damage_are_refused_in_one_line(tmp_path: Path, image: bytes) -> None:
    empty = write_tar(tmp_path / "empty.tar", {"notes.txt": b"x"})
    assert f"data.root={empty}: no images in it" in error_of("folder", str(empty), "train", 3)
    whole = write_tar(tmp_path / "x.tar", {f"{i}.png": image for i in range(5)}).read_bytes()
    damaged = tmp_path / "damaged.tar"
    second = -(-(512 + len(image)) // 512) * 512
    contents = {
        "cut off in '1.png'": whole[: second + 600],
        f"damaged at byte {second:,}": whole[:second] + b"x" * 512 + whole[second + 512 :],
        "truncated header": whole[:100],
        "empty file": b"",
        "invalid header": b"junk" * 500,
    }
    for part, content in contents.items():
        damaged.write_bytes(content)
        line = error_of("folder", str(damaged), "train", 3)
        assert line.startswith(f"data.root={damaged}: not a readable .tar of images (")
        assert part in line
    damaged.write_bytes(whole[: 5 * second])  # without the zeros at its end, as tar itself takes it
    assert len(open_source("folder", str(damaged), "train", 3)) == 5


# Labels


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


def labelled(root: Path, number: int = 40, channels: int = 3) -> Source:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (number, 4, 4, channels), dtype=np.uint8)
    save_arrays(root, coarse.repeat(8, 1).repeat(8, 2), np.arange(number) % 4)
    return open_source("arrays", str(root), "train", channels)


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
