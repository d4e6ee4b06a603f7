"""Shards at a URL: the same images as from a disk, fetched once, through every failure that a network has."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, records, run_main
from test_batches import same
from test_sources import error_of, write_images
from web import Fault, Web, serve

import fcmae.data.cache
import fcmae.data.remote
from fcmae import finetune, pretrain
from fcmae.data import IndexStream, MaskedBatch, PretrainDataset, RandomView, load_batches, open_source
from fcmae.data.cache import Cache, File, Lost
from fcmae.data.pack import pack
from fcmae.data.remote import NoParts, Refused, is_url, read
from fcmae.data.shared_memory import say_once
from fcmae.files import sha256
from fcmae.masking import sample_visible_ids
from fcmae.seeding import cpu_states

NUMBER, SHARD, WINDOW = 48, 4, 3
"""Images, those of a shard, and shards of a window."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let tries follow each other at once, and each test have a cache of its own."""
    monkeypatch.setattr(fcmae.data.remote, "FIRST_DELAY_S", 0.01)
    monkeypatch.setenv("FCMAE_CACHE", str(tmp_path / "cache"))
    say_once.cache_clear()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 shards of 4 images of two classes each."""
    root = tmp_path_factory.mktemp("shards")
    for name in ("cat", "dog"):
        write_images(root / "images" / name, NUMBER // 2)
    source = open_source("folder", str(root / "images"), "train", None)
    pack(source, root / "out" / "train", root=str(root / "images"), shard_images=SHARD, window=WINDOW)
    return root / "out"


@pytest.fixture
def web(shards: Path) -> Iterator[Web]:
    with serve(shards) as web:
        yield web


def some_fail(name: str, number: int) -> Fault:
    """Let every file fail the first times, in all ways."""
    ways: list[Fault] = ["500", "reset", 0.05, "cut", None, "503"]
    return ways[(number + len(name) + int("0" + "".join(filter(str.isdigit, name)))) % 6] if number < 3 else None


def samples(root: str, number: int, **options: int) -> list[MaskedBatch]:
    """The first batches of pretraining, of one of `world_size` processes."""
    source = open_source("folder", root, "train", 3)
    dataset = PretrainDataset(
        source,
        view=RandomView((32, 32), (0.2, 1.0), 0.5),
        draw_ids=lambda: sample_visible_ids(1, 16, 0.6),
        seed=0,
    )
    workers = options.pop("num_workers", 0)
    stream = IndexStream(len(source), shards=source.shards, **{"batch_size": 4, "seed": 0, **options})
    return list(islice(load_batches(dataset, stream, num_workers=workers, pin_memory=False), number))


# Files at URLs


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "site").mkdir()
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    (tmp_path / "site" / "file").write_bytes(content)
    with serve(tmp_path / "site") as site:
        yield site


@pytest.mark.parametrize("part", [(0, None), (0, 1000), (1_048_000, 2_900_001), (2_999_999, 3_000_000)])
@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "cut", 0.05])
def test_a_file_or_a_part_of_it_is_read_through_failures(
    site: Web, part: tuple[int, int | None], fault: Fault
) -> None:
    site.faults = lambda name, number: fault if number < 3 else None
    assert read(f"{site.url}/file", *part) == (site.root / "file").read_bytes()[slice(*part)]


def test_a_broken_transfer_goes_on_where_it_stopped(site: Web) -> None:
    site.faults = lambda name, number: "cut" if number < 4 else None
    assert read(f"{site.url}/file") == (site.root / "file").read_bytes()
    assert (site.whole["file"], site.asked["file"]) == (1, 5)


def test_a_server_that_does_not_answer_is_tried_again(site: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcmae.data.remote, "TIMEOUT_S", 0.2)
    site.faults = lambda name, number: 1.0 if number < 1 else None
    assert read(f"{site.url}/file", 5, 9) == (site.root / "file").read_bytes()[5:9]


def test_what_fails_for_good_ends_after_some_tries_and_what_is_not_there_at_once(site: Web) -> None:
    site.faults = lambda name, number: "500"
    with pytest.raises(OSError, match="HTTP 500 Internal Server Error, 6 times in a row"):
        read(f"{site.url}/file")
    assert site.asked["file"] == 6
    site.faults = lambda name, number: "403"
    with pytest.raises(Refused, match="HTTP 403"):
        read(f"{site.url}/file")
    site.faults = lambda name, number: None
    with pytest.raises(Refused, match="HTTP 404"):
        read(f"{site.url}/other")
    assert (site.asked["file"], site.asked["other"]) == (7, 1)


def test_waiting_between_tries_is_bounded_and_drawn_apart_from_the_samples_randomness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    before = cpu_states()
    delays = [max(fcmae.data.remote._delay_s(tries) for _ in range(50)) for tries in range(1, 9)]
    assert all(delay <= min(0.5 * 2**number, 16) for number, delay in enumerate(delays))
    assert cpu_states() == before


def test_a_server_without_parts_is_told_by_its_answer(tmp_path: Path, site: Web) -> None:
    site.parts = False
    with pytest.raises(NoParts):
        read(f"{site.url}/file", 5, 9)
    assert read(f"{site.url}/file", 0, 9) == (site.root / "file").read_bytes()[:9]


def test_fsspec_reads_what_is_no_http(site: Web) -> None:
    url, content = f"file://{site.root}/file", (site.root / "file").read_bytes()
    assert read(url) == content
    assert read(url, 100, 1_048_700) == content[100:1_048_700]
    with pytest.raises(Refused):
        read(f"{url}2")


@pytest.mark.parametrize(
    ("place", "answer"), [("https://a/b", True), ("s3://b", True), ("C:\\a", False), ("a/b", False)]
)
def test_a_url_is_told_from_a_path(place: str, answer: bool) -> None:
    assert is_url(place) is answer


# The cache


def file_of(site: Web, name: str = "file") -> File:
    path = site.root / name
    return File(f"{site.url}/{name}", path.stat().st_size, sha256(path))


def test_processes_that_want_the_same_file_fetch_it_once(site: Web, tmp_path: Path) -> None:
    site.faults = lambda name, number: 0.2
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(Cache(tmp_path / "cache", 10**9).fetch(file_of(site))))
        for _ in range(6)
    ]
    (tmp_path / "cache").mkdir()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*found}) == 1
    assert sha256(found[0]) == file_of(site).sha256
    assert site.asked["file"] == 1


def test_what_was_not_used_for_longest_makes_room(site: Web, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    cache = Cache(tmp_path / "cache", 2_500)
    files = []
    for number in range(4):
        (site.root / str(number)).write_bytes(os.urandom(1000))
        files.append(file_of(site, str(number)))
    for age, file in ((300, files[0]), (200, files[1])):
        path = cache.fetch(file)
        os.utime(path, (time.time() - age, time.time() - age))
    cache.find(files[0])  # used now
    cache.fetch(files[2])
    assert [cache.find(file) is not None for file in files] == [True, False, True, False]
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 2_500
    assert not list(cache.folder.glob(f"{files[1].sha256}*"))


@pytest.mark.parametrize("fault", ["404", "500", "garble", "shorter", "longer"])
def test_a_file_that_cannot_be_had_is_lost_for_all_processes_until_later(
    site: Web, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    file = file_of(site)
    if fault in ("shorter", "longer"):
        content = (site.root / "file").read_bytes()
        (site.root / "file").write_bytes(content[:-1] if fault == "shorter" else content + b"more")
    else:
        site.faults = lambda name, number: fault
    with pytest.raises(Lost):
        Cache(tmp_path / "cache", 10**9).fetch(file)
    asked = site.asked["file"]
    with pytest.raises(Lost):
        Cache(tmp_path / "cache", 10**9).find(file)
    assert site.asked["file"] == asked
    assert not list((tmp_path / "cache").glob(".writing*"))
    if fault in ("404", "500", "garble"):
        monkeypatch.setattr(fcmae.data.cache, "FORGET_S", 0.0)
        site.faults = lambda name, number: None
        assert sha256(Cache(tmp_path / "cache", 10**9).fetch(file)) == file.sha256


def test_one_garbled_transfer_is_made_good_by_another(site: Web, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    site.faults = lambda name, number: "garble" if number == 0 else None
    assert sha256(Cache(tmp_path / "cache", 10**9).fetch(file_of(site))) == file_of(site).sha256


# Images


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("parts", [True, False])
def test_remote_images_are_those_of_the_disk_through_failures(shards: Path, num_workers: int, parts: bool) -> None:
    with serve(shards, parts=parts) as web:
        web.faults = some_fail
        remote = samples(web.url, 24, num_workers=num_workers)
    local = samples(str(shards), 24, num_workers=num_workers)
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))
    assert not any(batch.bad for batch in remote)


def test_images_come_by_way_of_fsspec_into_workers(shards: Path) -> None:
    found, local = samples(f"file://{shards}", 15, num_workers=2), samples(str(shards), 15, num_workers=2)
    assert all(same(a, b) for a, b in zip(found, local, strict=True))
    assert len([*Path(os.environ["FCMAE_CACHE"]).glob("?" * 64)]) == NUMBER // SHARD + 1  # and the index


def test_a_shard_is_fetched_once_an_epoch_where_the_cache_holds_two_windows(
    web: Web, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(path.stat().st_size for path in (shards / "train").glob("*.tar"))
    monkeypatch.setenv("FCMAE_CACHE_GB", str((2 * WINDOW + 1.5) * size / 1e9))
    epochs = 3
    samples(web.url, epochs * NUMBER // 4)
    fetched = {name: times for name, times in web.whole.items() if name.endswith(".tar")}
    assert len(fetched) == NUMBER // SHARD
    assert sum(fetched.values()) <= (epochs + 1) * len(fetched)  # of the next epoch some are fetched ahead
    kept = sum(path.stat().st_size for path in Path(os.environ["FCMAE_CACHE"]).iterdir())
    assert kept <= (2 * WINDOW + 1.5) * size


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_of_a_machine_fetch_a_shard_once_for_all(web: Web, world_size: int) -> None:
    for rank in range(world_size):
        samples(web.url, 3 * NUMBER // 4 // world_size, rank=rank, world_size=world_size, num_workers=1)
    assert {times for name, times in web.whole.items() if name.endswith(".tar")} == {1}


def test_a_resumed_epoch_asks_for_no_shard_that_it_has_no_use_for(web: Web) -> None:
    start = 2 * WINDOW * SHARD  # two of four windows
    samples(web.url, 6, start=start)
    asked = {name: (times, web.whole[name]) for name, times in web.asked.items() if name.endswith(".tar")}
    source = open_source("folder", web.url, "train", 3)
    assert source.shards is not None
    stream = IndexStream(NUMBER, batch_size=1, seed=0, shards=source.shards, start=start)
    rest = {source.describe(index).split(".tar")[0][-5:] for ((_, index),) in islice(stream, NUMBER - start)}
    fetched = [name for name, (_, whole) in asked.items() if whole]
    assert {f"train/{name}.tar" for name in rest} <= {*fetched}
    assert len(fetched) <= len(rest) + WINDOW  # the first of the next epoch are fetched ahead
    assert all(whole <= 1 for _, whole in asked.values())
    looked_at, first_batch = 16, 4  # before the start, and before it is known what comes next
    assert sum(times - whole for times, whole in asked.values()) <= looked_at + first_batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_too_small_for_a_window_leaves_images_to_be_read_alone(
    web: Web, shards: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FCMAE_CACHE_GB", "1e-5")
    remote, local = samples(web.url, 15, num_workers=num_workers), samples(str(shards), 15)
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))
    assert "read one by one, slower" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [True, False])
def test_a_cache_on_a_full_disk_leaves_images_to_be_read_alone_where_they_can(
    shards: Path, parts: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(cache: Cache, copy: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with serve(shards, parts=parts) as web:
        source = open_source("folder", web.url, "train", 3)
        shutil.rmtree(os.environ["FCMAE_CACHE"])
        monkeypatch.setattr(Cache, "_make_room", full)
        if parts:
            assert all(source.load(0).shape == (3, 32, 40) for _ in range(8))
            (line,) = capsys.readouterr().err.splitlines()
            assert "No space left on device" in line
            assert "remote images are read one by one, slower" in line
        else:
            with pytest.raises(Lost, match="No space left"):
                source.load(0)


def test_a_cache_that_is_deleted_meanwhile_is_made_anew(web: Web, tmp_path: Path) -> None:
    source = open_source("folder", web.url, "train", 3)
    before = [source.load(0) for _ in range(6)]
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(source.load(0), before[0])


@pytest.mark.parametrize("fault", ["404", "cut", "garble"])
def test_a_lost_shard_is_skipped_named_and_counted_once(web: Web, fault: str) -> None:
    web.faults = lambda name, number: fault if name.endswith("00003.tar") else None
    batches = samples(web.url, 24, num_workers=1)
    bad = {image.index: image for batch in batches for image in batch.bad}
    assert [*bad] == [3 * SHARD]
    assert bad[12].name == f"{web.url}/train/00003.tar"
    assert "all its images are left out" in bad[12].reason
    assert not {12, 13, 14, 15} & {index for batch in batches for index in batch.indices}


def test_a_url_that_leads_nowhere_says_so_in_one_line(web: Web, tmp_path: Path) -> None:
    assert "no train/shards.json, of fcmae shard, in it; name" in error_of("folder", f"{web.url}/x", "train", 3)
    assert "no val/shards.json" in error_of("folder", web.url, "val", 3)
    assert "data.name=folder" in error_of("arrays", web.url, "train", 3)
    assert "name their folder" in error_of("folder", f"{web.url}/?key=1", "train", 3)
    assert "use https://, s3://" in error_of("folder", "nosuch://host/path", "train", 3)
    web.faults = lambda name, number: "500"
    assert "is the address right, and the network up?" in error_of("folder", web.url, "train", 3)
    assert "is the address right" in error_of("folder", "http://127.0.0.1:9/x", "train", 3)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with suppress(ImportError):
        import s3fs  # pyright: ignore[reportMissingImports]  # noqa: F401

        pytest.skip("s3fs is here")
    assert "pip install s3fs" in error_of("folder", "s3://bucket/path", "train", 3)


@pytest.mark.parametrize(("name", "value"), [("FCMAE_CACHE", "/dev/null/x"), ("FCMAE_CACHE_GB", "much")])
def test_a_cache_that_cannot_be_is_named(web: Web, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value}" in error_of("folder", web.url, "train", 3)


# Runs


def settings(root: str, output: Path, *more: str) -> list[str]:
    """A pretraining of a tiny network over two epochs, with a worker."""
    words = [
        *(
            "--config",
            "atto",
            "model.variant=[[1,1,1,1],[8,8,16,16]]",
            "model.stem_stride=1",
            "model.decoder_dim=16",
        ),
        *(
            "data.image_size=32",
            "data.batch_size=8",
            "data.num_workers=1",
            "optim.accumulate=1",
            "optim.images_per_update=null",
        ),
        *("train.max_steps=12", "log.every_steps=1", "visualize.num_images=0", f"data.root={root}"),
    ]
    return [*words, f"output={output}", *more]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def test_a_run_on_a_failing_network_has_the_losses_of_one_on_the_disk(
    web: Web, shards: Path, tmp_path: Path
) -> None:
    web.faults = some_fail
    assert run_main(pretrain.main, *settings(web.url, tmp_path / "remote")) == 0
    assert run_main(pretrain.main, *settings(str(shards), tmp_path / "local")) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "local")) == 12


def test_a_run_survives_lost_shards_up_to_max_bad(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.faults = lambda name, number: "404" if name.endswith(("00001.tar", "00007.tar")) else None
    assert run_main(pretrain.main, *settings(web.url, tmp_path / "run", "data.max_bad=2")) == 0
    said = "".join(capsys.readouterr())
    assert "00001.tar: HTTP 404 Not Found; all its images are left out" in said
    assert "(unreadable so far: 2)" in said
    line = error_line(pretrain.main, capsys, *settings(web.url, tmp_path / "other", "data.max_bad=1"))
    assert "2 images do not decode, more than data.max_bad=1" in line


def test_a_classifier_is_tuned_and_evaluated_on_remote_shards_as_on_the_disks(
    web: Web, shards: Path, tmp_path: Path
) -> None:
    for name, root in (("remote", web.url), ("local", str(shards))):
        words = [
            *("--config", "atto", "model.variant=[[1,1,1,1],[8,8,16,16]]", "model.stem_stride=1", "init_from=null"),
            *("data.image_size=32", "data.batch_size=8", "data.num_workers=0", "optim.accumulate=1"),
            *("optim.images_per_update=null", "optim.layer_decay=1", "train.max_steps=2", "log.every_steps=1"),
            *(f"data.root={root}", f"data.val_root={root}", "data.val_split=train", "optim.warmup_epochs=0"),
        ]
        assert run_main(finetune.main, *words, f"output={tmp_path / name}") == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert {record.get("val_top1") for record in records(tmp_path / "remote")} - {None}


def test_pretraining_without_a_configuration_takes_a_url(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(pretrain.main, f"{web.url}/train", "--print-config") == 0
    printed = capsys.readouterr().out
    assert f"root: {web.url}/train" in printed
    assert "output: runs/train" in printed
