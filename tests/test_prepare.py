"""`fcmae prepare`: images decoded once, whole and with their labels, whatever happens on the way."""

import errno
import functools
import json
import os
import pickle
import shutil
import tarfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, run_main
from PIL import Image
from processes import Processes, fork_server
from test_batches import same
from test_sources import write_images
from torch.utils.data import DataLoader

import fcmae.__main__
import fcmae.data.making
from fcmae import sample_visible_ids
from fcmae.__main__ import run
from fcmae.data import IndexStream, PretrainDataset, RandomView, Reading, load_batches, open_source, save_arrays
from fcmae.data.shards import PreparedSource
from fcmae.data.shared_memory import say_once
from fcmae.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of 3 classes: 2 owls of 40 x 32, 5 class10 of 90 x 60, 70 class9 of 30 x 50."""
    root = tmp_path / "images"
    write_images(root / "train" / "owl", 2)
    write_images(root / "train" / "class10", 5, (90, 60))
    write_images(root / "train" / "class9", 70, (30, 50))
    return root


def prepare(*arguments: object) -> int:
    return run_main(run, "prepare", *map(str, arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stamp(NamedTuple):
    inode: int
    changed: int


def stamps(folder: Path) -> dict[str, Stamp]:
    """Return what changes when a shard is written again."""
    return {p.name: Stamp(p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shards/*.bin")}


@pytest.mark.parametrize("workers", [0, 2])
def test_prepared_images_have_the_pixels_labels_and_names_of_their_files(
    images: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(images, tmp_path / "out", "--size", 48, "--workers", workers) == 0
    assert f"{tmp_path / 'out' / 'train'}: 77 images, 0 MB, written" in capsys.readouterr().out
    loose = open_source("folder", str(images), "train", 3)
    packed = open_source("arrays", str(tmp_path / "out"), "train", 3)
    assert isinstance(packed, PreparedSource)
    assert packed.class_names == loose.class_names == ("class9", "class10", "owl")
    assert packed.labels is not None
    assert packed.labels.tolist() == [0] * 70 + [1] * 5 + [2] * 2
    for index in range(77):
        if 70 <= index < 75:  # 90 x 60, shrunk to 72 x 48
            assert packed.load(index).shape == (3, 48, 72)
        else:
            assert torch.equal(packed.load(index), loose.load(index))
    assert len(list((tmp_path / "out" / "train" / "shards").glob("*.bin"))) > 30


def test_shrunk_images_look_as_before(tmp_path: Path) -> None:
    photos = ROOT / "docs" / "photos"
    assert prepare(photos, tmp_path, "--size", 100, "--workers", 0) == 0
    loose = open_source("folder", str(photos), "train", 3)
    packed = open_source("arrays", str(tmp_path), "train", 3)
    assert len(packed) == 13
    for index in range(13):
        found, image = packed.load(index), loose.load(index)
        assert min(found.shape[1:]) == 100
        assert found.shape[1] / found.shape[2] == pytest.approx(image.shape[1] / image.shape[2], rel=0.02)
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (found.shape[2], found.shape[1]), Image.Resampling.BICUBIC
        )
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
        assert difference.mean() < 2


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_gray_and_transparent_images_keep_their_channels(tmp_path: Path, channels: int, mode: str) -> None:
    write_images(tmp_path / "images", 3, mode=mode)
    assert prepare(tmp_path / "images", tmp_path / "out", "--channels", channels, "--workers", 0) == 0
    loose = open_source("folder", str(tmp_path / "images"), "train", channels)
    packed = open_source("arrays", str(tmp_path / "out"), "train", channels)
    assert packed.labels is None
    assert all(torch.equal(packed.load(i), loose.load(i)) for i in range(3))
    with pytest.raises(UserError, match=f"have {channels} channels, but model.in_chans is 3"):
        open_source("arrays", str(tmp_path / "out"), "train", 3)


def test_arrays_of_many_channels_and_tiny_images_are_prepared_too(tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 6), dtype=np.uint8)
    save_arrays(tmp_path / "many", many)
    out = tmp_path / "out"
    assert prepare(tmp_path / "many", out, "--name", "arrays", "--channels", 6, "--workers", 0) == 0
    assert np.array_equal(open_source("arrays", str(out), "train", 6).load(4).permute(1, 2, 0).numpy(), many[4])
    for size in [(1, 1), (1, 70), (300, 1)]:
        write_images(tmp_path / "tiny" / f"{size[0]}-{size[1]}", 1, size)
    assert prepare(tmp_path / "tiny", tmp_path / "out2", "--size", 8, "--workers", 0) == 0
    tiny = open_source("arrays", str(tmp_path / "out2"), "train", 3)
    assert sorted(tuple(tiny.load(i).shape) for i in range(3)) == [(3, 1, 1), (3, 1, 300), (3, 70, 1)]
    view = RandomView((8, 16), (0.2, 1.0), 0.5)
    assert all(view.finish(tiny.load_part(i, view.part)).shape == (3, 8, 16) for i in range(3))


def test_processes_that_start_anew_prepare_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "few", 2)
    anew = functools.partial(DataLoader, multiprocessing_context=fork_server())
    monkeypatch.setattr(fcmae.data.making, "DataLoader", anew)
    assert prepare(tmp_path / "few", tmp_path / "out", "--workers", 1) == 0
    loose = open_source("folder", str(tmp_path / "few"), "train", 3)
    packed = open_source("arrays", str(tmp_path / "out"), "train", 3)
    assert all(torch.equal(packed.load(i), loose.load(i)) for i in range(2))


def test_a_tar_file_is_prepared_as_its_folder_is(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images / "train", "images")
    assert prepare(tmp_path / "images.tar", tmp_path / "packed", "--workers", 1) == 0
    assert prepare(images, tmp_path / "loose", "--workers", 0) == 0
    a, b = (open_source("arrays", str(tmp_path / name), "train", 3) for name in ("packed", "loose"))
    assert a.class_names == b.class_names
    assert np.array_equal(a.labels, b.labels)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert all(torch.equal(a.load(i), b.load(i)) for i in range(77))


def batches(root: Path, workers: int) -> list[Any]:
    dataset = PretrainDataset(
        open_source("arrays", str(root), "train", 3),
        view=RandomView((32, 48), (0.2, 1.0), 0.5),
        draw_ids=lambda: sample_visible_ids(1, 24, 0.6),
        seed=0,
    )
    stream = IndexStream(len(dataset), batch_size=8, seed=0)
    return list(islice(load_batches(dataset, stream, num_workers=workers, pin_memory=False), 12))


def test_workers_and_other_layouts_show_the_same_views(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (77, 40, 52, 3), dtype=np.uint8)
    save_arrays(tmp_path / "plain", pixels)
    assert prepare(tmp_path / "plain", tmp_path / "out", "--name", "arrays", "--workers", 0) == 0
    plain = batches(tmp_path / "plain", 0)
    for workers in (0, 2):
        assert all(same(a, b) for a, b in zip(plain, batches(tmp_path / "out", workers), strict=True))
    source = open_source("arrays", str(tmp_path / "out"), "train", 3)
    message = pickle.dumps(source)
    assert len(message) < 1000
    assert torch.equal(pickle.loads(message).load(76), source.load(76))


def test_images_that_do_not_decode_are_left_out_and_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = sorted((images / "train").rglob("*.png"))
    for path in (broken[0], broken[-1]):
        path.write_bytes(path.read_bytes()[:100])
    Image.new("RGB", (8, 8)).save(broken[5], save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    assert prepare(images, tmp_path / "out", "--workers", 2) == 0
    printed = capsys.readouterr()
    assert f"left out {broken[5]}: 2 frames, an animation; save " in printed.err
    assert "74 images, " in printed.out
    assert "3 left out that do not decode" in printed.out
    for path in (broken[0], broken[5], broken[-1]):
        assert f"left out {path}: " in printed.err
    loose = open_source("folder", str(images), "train", 3)
    packed = open_source("arrays", str(tmp_path / "out"), "train", 3)
    assert packed.labels is not None
    assert loose.labels is not None
    kept = [i for i in range(77) if Path(loose.describe(i)) not in (broken[0], broken[5], broken[-1])]
    assert packed.labels.tolist() == loose.labels[kept].tolist()
    assert all(torch.equal(packed.load(i), loose.load(index)) for i, index in enumerate(kept))
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0  # named again, though nothing is done
    printed = capsys.readouterr()
    assert "complete and intact, 3 left out" in printed.out
    assert f"left out {broken[5]}: " in printed.err


def test_nothing_but_junk_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        tmp_path.joinpath(f"{i}.jpg").write_text("junk")
    line = error_line(run, capsys, "prepare", str(tmp_path), str(tmp_path / "out"), "--workers", "0")
    assert "none of 3 images decodes, the first" in line
    assert "0.jpg" in line


# Other kinds of pixels


def deep_images(root: Path, dtype: str) -> np.ndarray:
    """Write 70 arrays of 5 bands as files, floats with NaN in them, and return them all."""
    pixels = np.random.default_rng(0).integers(0, 4096, (70, 20, 30, 5)).astype(dtype)
    if dtype == "float32":
        pixels[:, 3:7, 4:9, 1] = np.nan
    root.mkdir()
    for number, image in enumerate(pixels):
        np.save(root / f"{number:03d}.npy", image)
    return pixels


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pixels_of_every_kind_are_prepared_as_they_are_and_found_intact(
    tmp_path: Path, dtype: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = deep_images(tmp_path / "images", dtype)
    arguments = (tmp_path / "images", tmp_path / "out", "--channels", 5, "--workers", workers, "--nodata", "nan")
    arguments = arguments if dtype == "float32" else arguments[:-2]
    assert prepare(*arguments) == 0
    advice = capsys.readouterr().out.splitlines()[-1]
    assert advice.endswith(" data.nodata=nan") == (dtype == "float32")
    reading = Reading(nodata=float("nan") if dtype == "float32" else None)
    source = open_source("arrays", str(tmp_path / "out"), "train", 5, reading=reading)
    assert source.dtype == getattr(torch, dtype)
    for index in range(70):
        assert np.array_equal(source.load(index).permute(1, 2, 0).numpy(), pixels[index], equal_nan=True)
    before = stamps(tmp_path / "out" / "train")
    assert prepare(*arguments) == 0
    assert "complete and intact" in capsys.readouterr().out
    assert stamps(tmp_path / "out" / "train") == before


def test_no_data_is_nan_in_prepared_images_which_are_refused_without_the_key(tmp_path: Path) -> None:
    pixels = deep_images(tmp_path / "images", "uint16")
    arguments = (tmp_path / "images", tmp_path / "out", "--channels", 5, "--workers", 0, "--nodata")
    assert prepare(*arguments, pixels[0, 0, 0, 0]) == 0
    source = open_source("arrays", str(tmp_path / "out"), "train", 5, reading=Reading(nodata=float("nan")))
    expected = np.where(pixels == pixels[0, 0, 0, 0], np.nan, pixels / np.float32(65535))
    for index in range(70):
        found = source.load(index).permute(1, 2, 0).numpy()
        assert np.allclose(found, expected[index], equal_nan=True)
    with pytest.raises(ValueError, match=r"set data\.nodata=nan"):
        open_source("arrays", str(tmp_path / "out"), "train", 5).load(0)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (("--dtype", "uint16"), "dtype uint8 -> uint16"),
        (("--nodata", "0"), "dtype uint8 -> float32, nodata None -> 0.0"),
        (("--window",), "window False -> True"),
    ],
)
def test_images_read_in_another_way_do_not_mix_with_what_is_there(
    images: Path, tmp_path: Path, options: tuple[str, ...], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0
    line = error_line(run, capsys, "prepare", str(images), str(tmp_path / "out"), "--workers", "0", *options)
    assert f"was written differently ({change}); name another folder" in line


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(3, 20, 30), (3, 20, 30, 1), (3, 20, 30, 5)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_saved_arrays_are_read_as_they_were(tmp_path: Path, shape: tuple[int, ...], dtype: str, order: Any) -> None:
    pixels = np.asarray(np.random.default_rng(0).integers(0, 4096, shape).astype(dtype), order=order)
    save_arrays(tmp_path, pixels)
    source = open_source("arrays", str(tmp_path), "train", None)
    assert source.dtype == getattr(torch, dtype)
    for index in range(3):
        assert np.array_equal(source.load(index).permute(1, 2, 0).numpy(), pixels[index].reshape(20, 30, -1))


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30), (2, 20, 30, 3, 1)])
def test_what_may_be_a_single_image_is_not_saved_as_many(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"looks like one image; give|images must be"):
        save_arrays(tmp_path, np.zeros(shape, np.uint8))


def test_folders_of_older_versions_are_read_and_found_intact(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0
    out = tmp_path / "out" / "train"
    expected, before = open_source("arrays", str(tmp_path / "out"), "train", 3), stamps(out)
    for name in ("prepare.json", "index.json"):  # which said nothing of this
        said = json.loads((out / name).read_text())
        old = {key: value for key, value in said.items() if key not in ("dtype", "tile", "nodata", "window")}
        assert len(old) < len(said)
        (out / name).write_text(json.dumps(old))
    source = open_source("arrays", str(tmp_path / "out"), "train", 3)
    assert source.dtype == torch.uint8
    assert all(torch.equal(source.load(index), expected.load(index)) for index in range(77))
    capsys.readouterr()
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0
    assert "complete and intact" in capsys.readouterr().out
    assert stamps(out) == before


# Interruptions and damage


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(images: Path, tmp_path: Path) -> None:
    for path in (images / "train" / "class9").glob("*.png"):  # work for a second or two
        Image.open(path).resize((600, 600)).save(path, compress_level=1)
    assert prepare(images, tmp_path / "whole", "--size", 40, "--workers", 0) == 0
    out = tmp_path / "out" / "train"
    words = ["prepare", str(images), str(out.parent), "--size", "40", "--workers", "2"]
    process = Processes(fcmae.__main__.main, ["fcmae", *words], tmp_path)
    deadline = time.monotonic() + 250
    while len(list(out.glob("shards/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = stamps(out)
    assert 5 <= len(list(out.glob("shards/*.json"))) < 39
    with pytest.raises(UserError, match=r"out/train: unfinished; the same fcmae prepare again goes on"):
        open_source("arrays", str(out.parent), "train", 3)
    finished = {path.stem for path in out.glob("shards/*.json")}
    (out / "shards" / "00003.bin.1234.tmp").write_bytes(b"what a killed process leaves")
    assert prepare(images, out.parent, "--size", 40, "--workers", 2) == 0
    after = stamps(out)
    assert all(after[name] == stamp for name, stamp in before.items() if Path(name).stem in finished)
    assert contents(out) == contents(tmp_path / "whole" / "train")


def test_a_complete_folder_is_checked_and_left_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0
    before = contents(tmp_path / "out"), stamps(tmp_path / "out" / "train")
    moved = images.rename(tmp_path / "moved")
    assert prepare(moved, tmp_path / "out", "--workers", 2) == 0
    assert "complete and intact" in capsys.readouterr().out
    assert (contents(tmp_path / "out"), stamps(tmp_path / "out" / "train")) == before


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "flipped", "record", "sizes", "no sizes", "index"])
def test_damage_is_found_and_fixed_and_nothing_else_touched(images: Path, tmp_path: Path, damage: str) -> None:
    assert prepare(images, tmp_path, "--workers", 0) == 0
    out = tmp_path / "train"
    before, marks = contents(out), stamps(out)
    shard = out / "shards" / "00007.bin"
    content = shard.read_bytes()
    named = str(shard)
    if damage == "cut":
        shard.write_bytes(content[:-1])
    elif damage == "longer":
        shard.write_bytes(content + b"x")
    elif damage == "gone":
        shard.unlink()
    elif damage == "flipped":
        shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "record":
        shard.with_suffix(".json").write_text("{")
    elif damage == "sizes":
        named = str(out / "sizes.npy")
        np.save(out / "sizes.npy", np.zeros((3, 2), np.int32))
    elif damage == "no sizes":
        named = str(out / "sizes.npy")
        (out / "sizes.npy").unlink()
    else:
        named = str(out / "index.json")
        (out / "index.json").write_text("[1]")
    if damage not in ("flipped", "record"):
        with pytest.raises(UserError, match=r"fcmae prepare again") as caught:
            open_source("arrays", str(tmp_path), "train", 3)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
    assert prepare(images, tmp_path, "--workers", 0) == 0
    assert contents(out) == before
    changed = {name for name, mark in stamps(out).items() if mark != marks[name]}
    assert changed <= {"00007.bin"}


def test_a_shard_cut_off_under_a_running_training_is_an_unreadable_image(images: Path, tmp_path: Path) -> None:
    assert prepare(images, tmp_path, "--workers", 0) == 0
    source = open_source("arrays", str(tmp_path), "train", 3)
    shard = tmp_path / "train" / "shards" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(OSError, match=r"00000\.bin: cut off"):
        source.load(0)
    dataset = PretrainDataset(
        source, view=RandomView((8, 8), (0.2, 1.0), 0.5), draw_ids=lambda: sample_visible_ids(1, 4, 0.6), seed=0
    )
    assert dataset[0, 1].bad[0].name == f"{tmp_path / 'train'}[1]"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(
    images: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync
    arguments = ["prepare", str(images), str(tmp_path / "out"), "--workers", str(workers)]

    def full(file: int) -> None:
        if len(list((tmp_path / "out").rglob("*.bin"))) > 10:
            raise OSError(errno.ENOSPC, "No space left on device", "out")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in error_line(run, capsys, *arguments)
    kept = {path.stem for path in (tmp_path / "out").rglob("0*.json")}
    assert len(kept) > 5
    before = stamps(tmp_path / "out" / "train")
    assert run_main(run, *arguments) == 0
    after = stamps(tmp_path / "out" / "train")
    assert all(after[name] == stamp for name, stamp in before.items() if Path(name).stem in kept)


def test_too_small_a_disk_is_reported_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    line = error_line(run, capsys, "prepare", str(images), str(tmp_path / "out"), "--workers", "0")
    assert "GB free, but 77 images take about" in line
    assert "lower --size" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "record",
    [
        [[[32, 40], [32, 40]], [], ""],
        [[["x", 40]], [], ""],
        [[[32.5, 40]], [], ""],
        [[], [[9, "a", "b"], [9, "a", "b"]], ""],
        [[[32, 40]], [["0", "a", "b"]], ""],
        {"sizes": 1},
    ],
)
def test_a_record_that_does_not_fit_its_shard_is_made_anew(images: Path, tmp_path: Path, record: list[Any]) -> None:
    assert prepare(images, tmp_path, "--workers", 0) == 0
    before = contents(tmp_path / "train")
    path = tmp_path / "train" / "shards" / "00007.json"
    if isinstance(record, list):
        record[2] = json.loads(path.read_text())[2]
    path.write_text(json.dumps(record))
    assert prepare(images, tmp_path, "--workers", 0) == 0
    assert contents(tmp_path / "train") == before


@pytest.mark.parametrize(
    "index",
    [
        {"channels": 0},
        {"channels": 3.0},
        {"channels": True},
        {"channels": 10**30},
        {"shards": [77]},
        {"shards": [-1] * 77},
        {"shards": "many"},
        {"shards": [[1]] * 77},
        {"shards": []},
        {"format": "fcmae images 2"},
    ],
)
def test_an_index_that_lies_is_refused(images: Path, tmp_path: Path, index: dict[str, Any]) -> None:
    assert prepare(images, tmp_path, "--workers", 0) == 0
    path = tmp_path / "train" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(UserError, match=r"fcmae prepare") as caught:
        open_source("arrays", str(tmp_path), "train", None)
    assert str(tmp_path / "train") in str(caught.value)


def test_sizes_that_no_image_has_are_refused(images: Path, tmp_path: Path) -> None:
    assert prepare(images, tmp_path, "--workers", 0) == 0
    for value in (0, -1, 2**31 - 1):
        np.save(tmp_path / "train" / "sizes.npy", np.full((77, 2), value, np.int32))
        with pytest.raises(UserError, match=r"sizes\.npy: no heights and widths"):
            open_source("arrays", str(tmp_path), "train", 3)


# Refusals


def test_a_class_that_cannot_be_written_in_a_line_is_named_before_any_work(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(images / "train" / "barn\nowl", 1)
    line = error_line(run, capsys, "prepare", str(images), str(tmp_path / "out"), "--workers", "0")
    assert r"class 'barn\nowl': a class name must be one line" in line
    assert "rename it" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_plan_of_a_folder_beside_it_is_no_obstacle(images: Path, tmp_path: Path) -> None:
    for name, content in {"a": b"[]", "b": b"\xff", "c": b"[" * 10_000}.items():
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "prepare.json").write_bytes(content)
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0


def test_a_small_shared_memory_prepares_in_one_process(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcmae.data.making, "free_shared_bytes", lambda: 4096)
    say_once.cache_clear()
    assert prepare(images, tmp_path, "--workers", 3) == 0
    assert "they load here, slower; docker run --shm-size=1g" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--size", "40"], "short_side 256 -> 40"),
        (["--channels", "1"], "channels 3 -> 1"),
        ("more", "num_images 77 -> 78"),
        ("renamed", "other files or labels"),
    ],
)
def test_another_source_or_setting_does_not_mix_with_what_is_there(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str] | str, named: str
) -> None:
    assert prepare(images, tmp_path / "out", "--workers", 0) == 0
    before = contents(tmp_path / "out")
    if change == "more":
        write_images(images / "train" / "owl", 3)
    elif change == "renamed":
        (images / "train" / "owl" / "000.png").rename(images / "train" / "owl" / "100.png")
    extra = change if isinstance(change, list) else []
    arguments = ["prepare", str(images), str(tmp_path / "out"), "--workers", "0", *extra]
    line = error_line(run, capsys, *arguments)
    assert f"was written differently ({named}" in line
    assert "name another folder" in line
    assert contents(tmp_path / "out") == before


def test_foreign_folders_and_bad_numbers_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign" / "train"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("precious")

    def line(*arguments: object) -> str:
        return error_line(run, capsys, "prepare", *map(str, arguments))

    assert "holds files that fcmae prepare did not write" in line(images, foreign.parent)
    assert contents(foreign.parent) == {"train/thesis.txt": b"precious"}
    (foreign / "prepare.json").write_text("[]")
    assert "prepare.json: not written by fcmae prepare" in line(images, foreign.parent)
    assert "--size 0: must be at least 1" in line(images, tmp_path / "out", "--size", 0)
    assert "--workers -1: must be at least 0" in line(images, tmp_path / "out", "--workers", -1)
    assert "no such folder or file" in line(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_images_are_never_prepared_under_another_splits_name(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(images, 1)

    def line(*arguments: object) -> str:
        return error_line(run, capsys, "prepare", *map(str, arguments), "--workers", "0")

    refusal = line(images, tmp_path / "out", "--split", "val")
    assert f"SOURCE={images}: no split 'val' in it (found: train)" in refusal
    assert "the folder of these images as SOURCE" in refusal
    flat = images / "train" / "owl"
    assert prepare(flat, tmp_path / "out", "--workers", 0) == 0
    assert "out/train holds these images already" in line(flat, tmp_path / "out", "--split", "val")
    assert not (tmp_path / "out" / "val").exists()
    write_images(images / "val" / "owl", 4)
    assert prepare(images, tmp_path / "out", "--split", "val", "--workers", 0) == 0
    assert len(open_source("arrays", str(tmp_path / "out"), "val", 3)) == 4


@pytest.mark.parametrize(
    ("split", "key"), [("train", "data.split"), ("unlabelled", "data.split"), ("val", "data.val_split")]
)
def test_the_last_line_says_how_to_train_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, key: str
) -> None:
    write_images(tmp_path / "images" / split, 2)
    assert prepare(tmp_path / "images", tmp_path / "out", "--split", split, "--workers", 0) == 0
    advice = capsys.readouterr().out.splitlines()[-1]
    assert f"with data.name=arrays data.root={tmp_path / 'out'} {key}={split}" in advice
