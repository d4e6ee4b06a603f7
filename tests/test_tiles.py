"""Tiles of large images: which there are, that they are what the image has there, and that no more is decoded."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, error_line, fuzzed, run_main
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from test_batches import same, take
from test_sources import DEEP, write_dicom, write_images
from torch import Tensor

import fcmae.data.deep
import fcmae.data.images
from fcmae import pretrain, sample_visible_ids
from fcmae.__main__ import run as command
from fcmae.data import PretrainDataset, RandomView, fixed_images, open_source, save_arrays, seeded, unreadable
from fcmae.data.order import Shards
from fcmae.data.sources import Source, Subset
from fcmae.data.tiles import cut, image_sizes
from fcmae.data.views import Part

sides = st.integers(1, 40)


class Sizes:
    """A source of nothing but sizes and labels; pixels count along rows, image after image."""

    place: Path | None = None
    dtype = torch.float32
    channels = 1
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    shards: Shards | None = None

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def load(self, index: int) -> Tensor:
        height, width = self.sizes[index]
        return 1e4 * index + torch.arange(height * width, dtype=torch.float32).view(1, height, width)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        top, left, height, width, _ = choose(*self.sizes[index])
        return self.load(index)[:, top : top + height, left : left + width]

    def describe(self, index: int) -> str:
        return f"image {index}"


@fuzzed(100, 5000)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4), st.tuples(sides, sides))
def test_tiles_are_whole_within_their_image_and_cover_all_of_it(
    sizes: list[tuple[int, int]], tile: tuple[int, int]
) -> None:
    source = Sizes(*sizes)
    tiles = cut(source, tile, 0)
    assert len(tiles) == sum(math.ceil(h / tile[0]) * math.ceil(w / tile[1]) for h, w in sizes)
    seen: list[set[float]] = [set() for _ in sizes]
    for index in range(len(tiles)):
        image = tiles.locate(index).image
        height, width = sizes[image]
        pixels = tiles.load(index)
        assert pixels.shape[1:] == tiles.size(index) == (min(tile[0], height), min(tile[1], width))
        seen[image] |= set(pixels.flatten().tolist())
    assert seen == [set(source.load(i).flatten().tolist()) for i in range(len(sizes))]


def test_tiles_are_numbered_row_by_row_the_last_ones_moved_inward() -> None:
    tiles = cut(Sizes((10, 25), (5, 5)), (4, 10), 0)
    boxes = [tiles.locate(index)[3:] for index in range(len(tiles))]
    assert boxes[:4] == [(0, 0, 4, 10), (0, 10, 4, 10), (0, 15, 4, 10), (4, 0, 4, 10)]
    assert boxes[8:] == [(6, 15, 4, 10), (0, 0, 4, 5), (1, 0, 4, 5)]
    assert tiles.describe(5) == "image 0[tile 1,2]"
    assert cut(Sizes((5, 5)), (8, 8), 0).describe(0) == "image 0"  # as it is


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_are_looked_up_once_by_any_number_of_processes(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path / "a", 70, (40, 32))
    write_images(tmp_path / "b", 5, (30, 50))
    (tmp_path / "a" / "007.png").write_bytes(b"damaged")
    source = open_source("folder", str(tmp_path), "train", 3)
    expected = [(32, 40)] * 70 + [(50, 30)] * 5
    expected[7] = (0, 0)
    assert [tuple(size) for size in image_sizes(source, workers)] == expected


def test_a_view_of_a_tile_is_that_of_the_tile_as_an_image_of_its_own(tmp_path: Path) -> None:
    image = Image.open(ROOT / "docs" / "photos" / "bird.jpg").resize((160, 96))
    image.save(tmp_path / "a.png")
    tiles = cut(open_source("folder", str(tmp_path), "train", 3), (64, 64), 0)
    view = RandomView((32, 32), (0.2, 1.0), 0.5)
    for index in range(len(tiles)):
        with seeded(index):
            found = view.finish(tiles.load_part(index, view.part))
        with seeded(index):
            expected = view(tiles.load(index))
        torch.testing.assert_close(found, expected, rtol=0, atol=1)  # laid out otherwise, and rounded


# What is carried, and what goes wrong


def test_labels_and_names_are_those_of_the_image(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 1, (40, 32))
    write_images(tmp_path / "train" / "dog", 1, (16, 16))
    source = open_source("folder", str(tmp_path), "train", 3)
    tiles = cut(source, (16, 16), 0)
    assert tiles.labels is not None
    assert tiles.labels.tolist() == [0] * 6 + [1]
    assert tiles.class_names == ("cat", "dog")
    assert (tiles.place, tiles.dtype, tiles.channels) == (source.place, source.dtype, 3)
    assert [Path(tiles.describe(index)).name for index in (4, 6)] == ["000.png[tile 1,1]", "000.png"]


def test_an_image_that_does_not_open_is_one_tile_that_is_reported_and_replaced(tmp_path: Path) -> None:
    write_images(tmp_path, 3, (40, 32))
    (tmp_path / "001.png").write_bytes(b"damaged")
    tiles = cut(open_source("folder", str(tmp_path), "train", 3), (16, 16), 0)
    assert len(tiles) == 6 + 1 + 6
    (bad,) = unreadable(tiles, len(tiles))[1]
    assert (bad.index, bad.name) == (6, str(tmp_path / "001.png"))
    dataset = PretrainDataset(
        tiles, view=RandomView((8, 8), (0.2, 1.0), 0.5), draw_ids=lambda: sample_visible_ids(1, 4, 0.6), seed=0
    )
    sample = dataset[0, 6]
    assert sample.index != 6
    assert sample.bad[0] == bad
    assert fixed_images(tiles, 13, (16, 16)).shape == (12, 3, 16, 16)


def test_an_image_that_changed_since_its_tiles_were_counted_is_unreadable(tmp_path: Path) -> None:
    write_images(tmp_path, 1, (40, 32))
    tiles = cut(open_source("folder", str(tmp_path), "train", 3), (16, 16), 0)
    write_images(tmp_path, 1, (48, 32))
    with pytest.raises(ValueError, match="48 x 32 pixels, not what it had when its tiles were counted"):
        tiles.load(0)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_tiles_are_the_same_for_any_number_of_workers(tmp_path: Path, num_workers: int) -> None:
    write_images(tmp_path, 3, (70, 50))
    dataset = PretrainDataset(
        cut(open_source("folder", str(tmp_path), "train", 3), (32, 48), 0),
        view=RandomView((32, 32), (0.2, 1.0), 0.5),
        draw_ids=lambda: sample_visible_ids(1, 16, 0.6),
        seed=0,
    )
    alone, helped = take(dataset, 5), take(dataset, 5, num_workers=num_workers)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


# Sizes of every source, and how much is decoded


@pytest.mark.parametrize("what", DEEP)
def test_the_size_of_any_file_is_that_of_its_pixels(what: str, tmp_path: Path) -> None:
    name, write, expected = DEEP[what]
    write(tmp_path / name)
    source = open_source("folder", str(tmp_path), "train", expected.shape[2])
    assert source.size(0) == source.load(0).shape[1:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_as_a_person_sees_the_image_and_nothing_is_decoded(
    orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "b.jpg", "c.webp", "d.tif", "e.avif"):
        Image.new("RGB", (50, 30)).save(tmp_path / name, exif=exif)
    source = open_source("folder", str(tmp_path), "train", 3)
    expected = [source.load(index).shape[1:] for index in range(5)]
    assert set(expected) == {(50, 30) if orientation > 4 else (30, 50)}
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert [source.size(index) for index in range(5)] == expected


def test_exif_after_the_pixels_of_a_png_turns_it_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 30)).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    length = 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, rest = content[start : start + length], content[:start] + content[start + length :]
    (tmp_path / "a.png").write_bytes(rest[:-12] + chunk + rest[-12:])  # before IEND
    source = open_source("folder", str(tmp_path), "train", 3)
    assert source.size(0) == source.load(0).shape[1:] == (50, 30)


def test_arrays_prepared_images_parts_of_sources_and_other_datasets_know_sizes(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train" / "cat", 2, (40, 32))
    write_images(tmp_path / "images" / "train" / "dog", 1, (30, 50))
    assert run_main(command, "prepare", str(tmp_path / "images"), str(tmp_path / "out"), "--workers", "0") == 0
    save_arrays(tmp_path / "plain" / "train", np.zeros((3, 5, 7, 3), np.uint8))
    sources: list[Source] = [
        open_source("arrays", str(tmp_path / "out"), "train", 3),
        open_source("arrays", str(tmp_path / "plain"), "train", 3),
        open_source("torch/folder", str(tmp_path / "images" / "train"), ".", 3),
    ]
    for source in [*sources, Subset(sources[0], np.array([2, 0]))]:
        assert [source.size(i) for i in range(len(source))] == [
            source.load(i).shape[1:] for i in range(len(source))
        ]


SCENE = np.random.default_rng(0).integers(0, 256, (200, 310, 3), dtype=np.uint8)


def write_scene(path: Path, pixels: np.ndarray = SCENE, **options: Any) -> None:
    tifffile.imwrite(path, pixels, photometric="rgb" if pixels.shape[-1] == 3 else "minisblack", **options)


SCENES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tiled": ("a.tif", lambda p: write_scene(p, tile=(64, 64), compression="deflate", predictor=True)),
    "tiled, 12 bands of 16 bits": (
        "a.tif",
        lambda p: write_scene(
            p, np.repeat(SCENE, 4, 2).astype(np.uint16) * 257, tile=(64, 64), planarconfig="contig"
        ),
    ),
    "striped": ("a.tif", lambda p: write_scene(p, rowsperstrip=8, compression="lzw")),
    "one strip, uncompressed": ("a.tif", lambda p: write_scene(p)),
    "big": ("a.tif", lambda p: write_scene(p, bigtiff=True, tile=(64, 64))),
    "array": ("a.npy", lambda p: np.save(p, SCENE)),
}


@pytest.mark.parametrize("what", SCENES)
def test_images_too_large_to_decode_are_read_tile_by_tile_where_the_format_allows(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write = SCENES[what]
    write(tmp_path / name)
    channels = 12 if "12" in what else 3
    open_it = functools.partial(open_source, "folder", str(tmp_path), "train", channels)
    whole = open_it().load(0)
    assert np.array_equal(whole.permute(1, 2, 0).numpy()[..., :1] / (257 if channels == 12 else 1), SCENE[..., :1])
    monkeypatch.setattr(fcmae.data.deep, "MAX_PIXELS", 30_000)
    source = open_it()
    with pytest.raises(ValueError, match=r"310 x 200 pixels.*, over 30,000; cut it into tiles"):
        source.load(0)
    tiles = cut(source, (100, 90), 0)
    assert len(tiles) == 2 * 4
    assert torch.equal(tiles.load(7), whole[:, 100:, 220:])
    assert torch.equal(tiles.load(1), whole[:, :100, 90:180])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "b.tif", "a.dcm", "deep.png"])
def test_images_too_large_that_are_decoded_whole_are_one_tile_that_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "a.dcm":
        write_dicom(tmp_path / name, SCENE[..., 0])
    elif name == "deep.png":
        DEEP["RGB PNG"][1](tmp_path / name)
    elif name == "a.tif":  # a strip of all rows, compressed
        write_scene(tmp_path / name, compression="deflate", rowsperstrip=200)
    elif name == "b.tif":  # colours of a table, which Pillow looks up
        Image.fromarray(SCENE[..., 0]).convert("P").save(tmp_path / name)
    else:
        Image.fromarray(SCENE).save(tmp_path / name)
    monkeypatch.setattr(fcmae.data.deep, "MAX_PIXELS", 3_000)
    tiles = cut(open_source("folder", str(tmp_path), "train", 1 if name == "a.dcm" else 3), (16, 16), 0)
    with pytest.raises(ValueError, match=r"over 3,000"):
        tiles.load(0)


def test_a_tile_of_a_large_tiff_decodes_no_more_than_its_own_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path / "a.tif", tile=(16, 16), compression="deflate")
    monkeypatch.setattr(fcmae.data.images, "CUT_PIXELS", 1_000)
    tiles = cut(open_source("folder", str(tmp_path), "train", 3), (32, 32), 0)
    decoded: list[int] = []
    decode = fcmae.data.deep._read_page
    monkeypatch.setattr(fcmae.data.deep, "_read_page", lambda page, *rest: decode(counting(page, decoded), *rest))
    assert torch.equal(tiles.load(1), torch.from_numpy(SCENE[:32, 32:64]).permute(2, 0, 1))
    assert len(decoded) == 4


def counting(page: Any, decoded: list[int]) -> Any:
    """The page of a TIFF, which notes the tiles that it decodes."""
    decode = page.decode

    def noting(content: bytes, index: int, **options: Any) -> Any:
        decoded.append(index)
        return decode(content, index, **options)

    page.decode = noting
    return page


# Through a pretraining and a preparation


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of two classes of two large images each, one of them damaged."""
    for number, name in enumerate(("farm", "farm", "town", "town")):
        path = tmp_path / "scenes" / name / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_scene(path, np.roll(SCENE, 50 * number, 1), tile=(64, 64))
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "scenes"


def test_pretraining_sees_tiles_and_knn_whole_images(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        *("--config", "quickstart", f"data.root={scenes}", f"output={tmp_path / 'run'}", "data.tile=[100, 155]"),
        *("data.image_size=32", "data.batch_size=4", "data.num_workers=1", "data.max_bad=9"),
        *("train.max_steps=4", "eval.knn_every_epochs=100", "eval.val_split=null", "visualize.num_images=1"),
    )
    assert run_main(pretrain.main, *settings) == 0
    printed = capsys.readouterr().out
    assert "tiles            13 of 4 images" in printed
    assert "3.tif: " in printed
    assert "k-NN top1" in printed


@pytest.mark.parametrize("workers", [0, 2])
def test_prepared_tiles_are_the_tiles(
    scenes: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("prepare", str(scenes), str(tmp_path / "out"), "--workers", str(workers), "--tile")
    assert run_main(command, *arguments, "64", "96") == 0
    printed = capsys.readouterr()
    assert "train: 48 tiles of 4 images, 1 MB, written, 1 left out" in printed.out
    assert "3.tif: " in printed.err
    tiles = cut(open_source("folder", str(scenes), "train", 3), (64, 96), 0)
    prepared = open_source("arrays", str(tmp_path / "out"), "train", 3)
    assert all(torch.equal(prepared.load(index), tiles.load(index)) for index in range(48))
    assert prepared.labels is not None
    assert prepared.labels.tolist() == [0] * 32 + [1] * 16
    assert prepared.class_names == ("farm", "town")
    assert run_main(command, *arguments, "64", "96") == 0
    assert "complete and intact" in capsys.readouterr().out
    assert "tile [64, 96] -> [96, 96]" in error_line(command, capsys, *arguments, "96")
    assert "tile [64, 96] -> None" in error_line(command, capsys, *arguments[:-1])
    assert "--tile 1 2 3: must be a side, or height and width" in error_line(command, capsys, *arguments, *"123")
    assert "--tile 0: must be at least 1" in error_line(command, capsys, *arguments, "0")


def test_prepared_tiles_are_shrunk_where_a_size_is_given(scenes: Path, tmp_path: Path) -> None:
    arguments = ("prepare", str(scenes), str(tmp_path), "--workers", "0", "--tile", "100", "--size", "50")
    assert run_main(command, *arguments) == 0
    prepared = open_source("arrays", str(tmp_path), "train", 3)
    assert {prepared.size(index) for index in range(len(prepared))} == {(50, 50)}
