"""Samples and batches: what is shown depends on (seed, epoch, index) alone; what does not decode is reported."""

import functools
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from test_sources import labelled, write_images
from test_views import view_of

import fcmae.data.batches
from fcmae import sample_visible_ids
from fcmae.data import (
    Cover,
    EvaluationDataset,
    IndexStream,
    LabelledBatch,
    LabelledDataset,
    MaskedBatch,
    PretrainDataset,
    RandomView,
    Reading,
    Source,
    cut,
    derive_seed,
    fixed_images,
    load_batches,
    one_pass,
    open_source,
    prefetch,
    save_arrays,
    seeded,
    unreadable,
)
from fcmae.data.prepare import shrink
from fcmae.data.sampling import PADDING
from fcmae.data.shared_memory import Piped, choose_transport, free_shared_bytes, say_once, unpacked
from fcmae.errors import UserError
from fcmae.evaluation.inference import Picture, read_images


def dataset_of(root: Path, *, seed: int = 0, resize_on_device: bool = False) -> PretrainDataset:
    return PretrainDataset(
        open_source("folder", str(root), "train", 3),
        view=RandomView((32, 32), (0.2, 1.0), 0.5),
        draw_ids=lambda: sample_visible_ids(1, 16, 0.6),
        seed=seed,
        resize_on_device=resize_on_device,
    )


def take(dataset: PretrainDataset, number: int, **kwargs: Any) -> list[MaskedBatch]:
    workers = kwargs.pop("num_workers", 0)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0} | kwargs
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


def test_more_workers_than_cores_give_no_warning(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    take(dataset_of(folder), 1, num_workers=(os.cpu_count() or 1) + 1)
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]


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


def test_a_tar_file_reads_like_its_folder_in_workers_too(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "cats", 5)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    packed = take(dataset_of(tmp_path / "images.tar"), 2, num_workers=2)
    loose = take(dataset_of(tmp_path / "images"), 2)
    assert all(same(a, b) for a, b in zip(packed, loose, strict=True))


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


def test_augmentation_is_the_same_for_any_number_of_workers_and_changes_with_the_epoch(tmp_path: Path) -> None:
    dataset = LabelledDataset(labelled(tmp_path), view=view_of(), seed=0)

    def batches(**kwargs: Any) -> list[LabelledBatch]:
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


# Shared memory


def free_bytes(patch: pytest.MonkeyPatch, number: float) -> None:
    patch.setattr(fcmae.data.batches, "free_shared_bytes", lambda: number)
    say_once.cache_clear()


@pytest.mark.parametrize("resize_on_device", [False, True])
def test_the_same_batches_come_through_pipes_where_shared_memory_is_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resize_on_device: bool
) -> None:
    dataset = dataset_of(folder, resize_on_device=resize_on_device)
    expected = take(dataset, 6, num_workers=2)
    assert capsys.readouterr().err == ""
    free_bytes(monkeypatch, 200_000 + resize_on_device)
    sent: list[object] = []
    monkeypatch.setattr(fcmae.data.batches, "unpacked", lambda batch: sent.append(batch) or unpacked(batch))
    found = take(dataset, 6, num_workers=2)
    assert all(isinstance(batch, Piped) for batch in sent)
    for batch, other in zip(found, expected, strict=True):
        assert type(batch) is type(other)
        assert same(batch, other)
        assert batch.images.stride() == other.images.stride()
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), other.tensors(), strict=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "MB needed for the batches of 2 processes: they come through pipes, a little slower; docker run --shm"
        in line
    )
    take(dataset, 1, num_workers=2)
    assert capsys.readouterr().err == ""  # said once


def test_images_are_loaded_here_where_shared_memory_holds_no_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = take(dataset_of(folder), 3)
    free_bytes(monkeypatch, 8192)
    monkeypatch.setattr(torch.multiprocessing, "get_context", None)  # as would be asked for a process
    assert all(same(a, b) for a, b in zip(take(dataset_of(folder), 3, num_workers=2), expected, strict=True))
    assert "none for processes that load images: they load here" in capsys.readouterr().err


def test_what_batches_in_queues_take_decides_with_larger_crops_counted(folder: Path) -> None:
    plain, crops = (dataset_of(folder, resize_on_device=large).sample_bytes for large in (False, True))
    assert plain >= 3 * 32 * 32
    assert crops >= 4 * 3 * 32 * 32
    for dataset, sample_bytes in ((dataset_of(folder), plain), (dataset_of(folder, resize_on_device=True), crops)):
        for batch in take(dataset, 4):
            assert sum(tensor.nbytes for tensor in batch.tensors()) <= 4 * sample_bytes
    needed = 8 * 4 * 64 * 3 * 224 * 224
    assert choose_transport(8, needed, 64 << 20)[:2] == (8, True)  # Docker's
    assert "--shm-size=1g" in choose_transport(8, needed, 64 << 20).line
    assert choose_transport(8, needed, math.inf) == (8, False, "")
    assert choose_transport(8, needed, 24e9) == (8, False, "")
    assert choose_transport(0, needed, 0) == (0, False, "")
    assert choose_transport(8, 0, 64 << 10)[:2] == (0, False)
    assert choose_transport(2, 0, 1 << 20) == (2, False, "")


def test_processes_of_a_machine_share_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(sys, "platform", "linux")
    assert free_shared_bytes() == 4096_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_shared_bytes() == 1024_000
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert free_shared_bytes() == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert free_shared_bytes() == math.inf


SMALL = """
import pathlib, subprocess, sys, test_batches
for size in ("1m", "128k", "16k"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    batches = test_batches.take(test_batches.dataset_of(pathlib.Path(sys.argv[1])), 12, num_workers=2)
    print(sum(int(batch.images.sum()) for batch in batches))
"""


@pytest.mark.any_cpu
def test_a_real_dev_shm_of_any_size_ends_no_loader(folder: Path) -> None:
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("not allowed to mount a /dev/shm of its own")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = ["unshare", "-m", sys.executable, "-c", SMALL, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    piped, here = done.stderr.splitlines()
    assert "come through pipes" in piped
    assert "load here" in here
    expected = sum(int(batch.images.sum()) for batch in take(dataset_of(folder), 12))
    assert [int(total) for total in done.stdout.split()] == [expected] * 3


# Kinds of pixels

KINDS = ("uint8", "uint16", "float32")


def pixels_of(root: Path, kind: str) -> Source:
    """Return a dozen labelled images of two bands, floats with NaN among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 50, 60, 2)).astype(kind)
    pixels *= pixels.dtype.type(257 if kind == "uint16" else 1)
    if kind == "float32":
        pixels[:, 10:30, 20:25] = np.nan
    save_arrays(root, pixels, np.arange(12) % 3)
    reading = Reading(nodata=math.nan if kind == "float32" else None)
    return open_source("arrays", str(root), "train", 2, reading=reading)


def datasets(source: Source) -> dict[str, Any]:
    assert source.labels is not None
    options: dict[str, Any] = {
        "view": RandomView((24, 32), (0.2, 1.0), 0.5),
        "draw_ids": lambda: sample_visible_ids(1, 12, 0.6),
        "seed": 0,
    }
    return {
        "pretraining": PretrainDataset(source, **options),
        "crops": PretrainDataset(source, **options, resize_on_device=True),
        "fine-tuning": LabelledDataset(source, view=view_of(source.channels, auto_augment=None), seed=0),
        "evaluation": EvaluationDataset(
            source, source.labels, class_names="abc", view=Cover((24, 32)), shape=(source.channels, 24, 32)
        ),
    }


def first_pixels(root: Path) -> dict[str, torch.Tensor]:
    """Return what sees images, with the pixels that it gets of the first in a folder."""
    source = open_source("folder", str(root), "train", 3)
    samples = datasets(source)
    (picture,) = read_images([root], 3)
    assert isinstance(picture, Picture)
    return {
        "pretraining": samples["pretraining"][0, 0].image,
        "pretraining on a GPU": samples["crops"][0, 0].image,
        "a tile": cut(source, 24, 0).load(3),
        "preparation": shrink(source, 0, 30),
        "fine-tuning": samples["fine-tuning"][0, 0].image,
        "evaluation": samples["evaluation"][0].image,
        "prediction": picture.pixels,
    }


@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_an_oriented_jpeg_gives_the_same_pixels_as_the_upright_image_wherever_it_is_seen(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("oriented", "upright"):
        (tmp_path / name / "train" / "a").mkdir(parents=True)
    path = tmp_path / "oriented" / "train" / "a" / "a.jpg"
    Image.open(ROOT / "docs" / "photos" / "bird.jpg").resize((56, 40)).save(path, exif=exif)
    with Image.open(path) as stored:
        ImageOps.exif_transpose(stored).save(tmp_path / "upright" / "train" / "a" / "a.png", exif=b"")
    oriented, upright = (first_pixels(tmp_path / name) for name in ("oriented", "upright"))
    for what, pixels in upright.items():
        assert torch.equal(oriented[what], pixels), what


def assert_same_tensors(found: list[Any], expected: list[Any]) -> None:
    """Compare batches: deep pixels but for the rounding of a process with other threads, all else bit by bit."""
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            assert a.stride() == b.stride()
            rounding = {torch.uint16: 1.0, torch.float32: 1e-3}.get(a.dtype, 0.0)  # of 65535, and of 255
            wide = (a.int(), b.int()) if a.dtype == torch.uint16 else (a, b)
            assert a.dtype == b.dtype
            torch.testing.assert_close(*wide, rtol=0, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["pretraining", "crops", "fine-tuning", "evaluation"])
def test_pixels_of_every_kind_are_the_same_from_any_number_of_workers_and_through_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: str
) -> None:
    dataset = datasets(pixels_of(tmp_path, kind))[what]
    keys = [[1, 2, 3, PADDING], [4, 5]] if what == "evaluation" else [[(0, 1), (0, 2), (1, 2), (0, 3)], [(2, 4)]]
    load = functools.partial(load_batches, dataset, keys, pin_memory=False)
    alone = list(load(num_workers=0))
    assert all(batch.images.dtype == getattr(torch, kind) for batch in alone)
    assert all(batch.images.isnan().any() for batch in alone) == (kind == "float32")
    assert_same_tensors(list(load(num_workers=1)), alone)
    assert_same_tensors(list(load(num_workers=3)), alone)
    free_bytes(monkeypatch, 100_000)
    assert_same_tensors(list(load(num_workers=2)), alone)


def test_bytes_of_samples_count_what_kind_their_pixels_are(tmp_path: Path) -> None:
    sizes = {kind: datasets(pixels_of(tmp_path / kind, kind)) for kind in KINDS}
    for what, dataset in sizes["uint8"].items():
        pixels = dataset.sample_bytes
        for kind, times in (("uint16", 2), ("float32", 4)):
            other = sizes[kind][what]
            assert times * (pixels - 200) < other.sample_bytes <= times * pixels
            keys = [[0, 1]] if what == "evaluation" else [[(0, 0), (0, 1)]]
            (batch,) = load_batches(other, keys, num_workers=0, pin_memory=False)
            assert sum(tensor.nbytes for tensor in batch.tensors()) <= 2 * other.sample_bytes


# Copying ahead


def test_without_a_gpu_batches_pass_in_their_order_and_none_is_read_ahead(folder: Path) -> None:
    expected = take(dataset_of(folder), 4)
    read = []

    def batches() -> Iterator[MaskedBatch]:
        for number, batch in enumerate(expected):
            read.append(number)
            yield batch

    for number, batch in enumerate(prefetch(batches(), torch.device("cpu"))):
        assert read == list(range(number + 1))
        assert same(batch, expected[number])
    assert len(read) == 4
