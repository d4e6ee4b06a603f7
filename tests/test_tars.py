"""`fcmae shard` and what it writes: the files' own bytes, in tars that others read, whole whatever happens."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, flip
from PIL import Image
from test_sources import error_of, write_images

import fcmae.data.pack
from fcmae.data import open_source
from fcmae.data.images import ImageSource
from fcmae.data.pack import key_of, pack
from fcmae.data.sources import Subset
from fcmae.data.tars import LostShard, ShardSource
from fcmae.data.tiles import cut
from fcmae.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """3 classes, 37 images; names with dots, spaces and letters beyond ASCII, and two that differ in their ends."""
    root = tmp_path / "images"
    write_images(root / "train" / "owl.s", 20)
    write_images(root / "train" / "cats and dogs", 10)
    paths = write_images(root / "train" / "äffchen", 7)
    paths[0].rename(paths[0].with_name("a.b.png"))
    paths[1].rename(paths[1].with_name("a_b.png"))
    shutil.copy(paths[2], paths[2].with_suffix(".bmp"))
    paths[3].unlink()
    return root


def shard(images: Path, out: Path, **options: int) -> ShardSource:
    settings = {"shard_images": 5, "window": 3} | options
    source = open_source("folder", str(images), "train", None)
    pack(source, out / "train", root=str(images), **settings)
    found = open_source("folder", str(out), "train", 3)
    assert isinstance(found, ShardSource)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_name(source: ImageSource) -> dict[str, tuple[bytes, str]]:
    """The last part of each image's name -> its file's content, and class."""
    assert source.labels is not None
    assert source.class_names is not None
    found = {}
    for index in range(len(source)):
        content = source.files.open(index)
        assert not hasattr(content, "number")
        name = "/".join(source.describe(index).split("/")[-2:])
        found[name] = content.read(), source.class_names[source.labels[index]]  # pyright: ignore
    return found


def test_shards_hold_the_bytes_names_and_classes_of_all_files(images: Path, tmp_path: Path) -> None:
    loose = open_source("folder", str(images), "train", 3)
    packed = shard(images, tmp_path / "out")
    assert isinstance(loose, ImageSource)
    assert len(packed) == len(loose) == 37
    assert packed.class_names == loose.class_names
    assert by_name(packed) == by_name(loose)
    names = {loose.describe(index).removeprefix(str(images)): index for index in range(37)}
    for index in range(37):
        shard_name, _, name = packed.describe(index).partition(".tar/")
        other = names[f"/{name}"]
        assert torch.equal(packed.load(index), loose.load(other))
        assert packed.size(index) == loose.size(other)
        assert Path(f"{shard_name}.tar").is_file()


def test_images_of_a_class_are_spread_over_the_shards(images: Path, tmp_path: Path) -> None:
    packed = shard(images, tmp_path / "out")
    assert packed.labels is not None
    assert sum(len({*labels}) > 1 for labels in np.split(packed.labels[:35], 7)) > 4


def test_the_same_images_make_the_same_shards_wherever_and_by_however_many(images: Path, tmp_path: Path) -> None:
    shard(images, tmp_path / "a")
    moved = tmp_path / "elsewhere"
    shutil.copytree(images, moved)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    shard(moved, tmp_path / "b", num_workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_webdataset_reads_the_shards_with_their_labels(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    packed = shard(images, tmp_path / "out")
    assert packed.class_names is not None
    files = sorted(map(str, (tmp_path / "out" / "train").glob("*.tar")))
    read = webdataset.WebDataset(files, shardshuffle=False, empty_check=False)
    found = sorted((sample.get("png", sample.get("bmp")), int(sample["cls"])) for sample in read)
    assert found == sorted((content, packed.class_names.index(name)) for content, name in by_name(packed).values())


def test_a_tar_of_shards_is_a_plain_tar_with_a_key_for_each_sample(images: Path, tmp_path: Path) -> None:
    packed = shard(images, tmp_path / "out", shard_images=37)
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 2 * 37
    keys = [member.name[: -len(Path(member.name).suffix)] for member in members]
    assert len({*keys}) == 37
    assert keys[::2] == keys[1::2]
    assert not any("." in key.rpartition("/")[2] for key in keys)
    assert {"train/äffchen/a_b", "train/äffchen/a_b-2", "train/äffchen/002", "train/äffchen/002-2"} <= {*keys}
    assert packed.files.members.starts.tolist() == [member.offset_data for member in members[::2]]  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "key"),
    [("cats/a.b.jpg", "cats/a_b"), ("cats/.jpg", "cats/_jpg"), ("x[3]", "x[3]"), ("/a/b.PNG", "a/b")],
)
def test_a_key_has_no_dots_after_its_folder(name: str, key: str) -> None:
    assert key_of(name) == key


def test_the_command_goes_on_fixes_what_is_damaged_and_is_then_done(
    images: Path, tmp_path: Path, command: Command
) -> None:
    words = ["shard", images, tmp_path / "out", "--images", 5, "--window", 2, "--workers", 0]
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert "37 images in 8 tar files, 0 MB, written" in out
    assert f"train with data.root={tmp_path / 'out'} data.split=train" in out
    folder = tmp_path / "out" / "train"
    before = contents(folder)
    flip(folder / "00001.tar", 700)
    (folder / "00002.tar").unlink()
    (folder / "records" / "00003.json").write_text("{")
    (folder / "shards.json").unlink()
    (folder / ".writing-00004.tar-1").write_bytes(b"killed")
    kept = (folder / "00000.tar").stat().st_mtime_ns
    assert "written" in command(*words)[1]
    assert contents(folder) == before
    assert (folder / "00000.tar").stat().st_mtime_ns == kept
    assert "complete and intact" in command(*words)[1]


def test_a_killed_run_leaves_no_shards_that_could_be_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = fcmae.data.pack._Tars.write

    def killed(work: fcmae.data.pack._Tars, number: int) -> object:
        if number == 3:
            raise KeyboardInterrupt
        return written(work, number)

    monkeypatch.setattr(fcmae.data.pack._Tars, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        shard(images, tmp_path / "out")
    assert "no images in it" in error_of("folder", str(tmp_path / "out"), "train", 3)
    monkeypatch.undo()
    assert len(shard(images, tmp_path / "out")) == 37


def test_other_images_or_settings_do_not_go_into_the_same_folder(
    images: Path, tmp_path: Path, command: Command
) -> None:
    words = ["shard", images, tmp_path / "out", "--workers", 0]
    assert command(*words, "--images", 5)[0] == 0
    assert "shard_images 5 -> 6" in command(*words, "--images", 6)[2]
    assert "holds these images already" in command(*words, "--images", 5, "--split", "training")[2]
    write_images(images / "train" / "new", 1)
    assert "other files or labels" in command(*words, "--images", 5)[2]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train").write_text("")
    assert "exists already" in command("shard", images, tmp_path / "full" / "train")[2]
    assert "--images 0: must be at least 1" in command(*words, "--images", 0)[2]
    assert "in " in command("shard", images, images / "out")[2]


def test_what_is_no_image_file_is_refused_and_what_cannot_be_read_left_out(
    images: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    assert "decoded images" in command("shard", tmp_path / "arrays", tmp_path / "a", "--name", "arrays")[2]
    (images / "train" / "owl.s" / "gone.png").symlink_to(tmp_path / "nowhere")
    code, out, err = command("shard", images, tmp_path / "b", "--images", 5, "--workers", 0)
    assert code == 0
    assert "37 images in 8 tar files" in out
    assert "1 left out" in out
    assert "left out" in err
    assert "gone.png" in err
    assert len(open_source("folder", str(tmp_path / "b"), "train", 3)) == 37


def test_splits_are_found_as_those_of_folders_and_never_taken_for_each_other(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(images, out)
    source = open_source("folder", str(images), "train", None)
    (tmp_path / "other").mkdir()
    assert len(open_source("", str(out / "train"), "train", 3)) == 37
    assert len(open_source("folder", str(out), "training", 3)) == 37
    assert len(open_source("folder", str(out / "train" / "shards.json"), "train", 3)) == 37
    assert len(open_source("folder", str(out / "train"), "val", 3, whole_root=True)) == 37
    error = error_of("folder", str(out), "val", 3)
    assert "no val/shards.json, of fcmae shard, in it (found: train)" in error
    assert "no split 'val'" in error_of("folder", str(out / "train"), "val", 3)
    assert source.shards is None


def test_some_images_tiles_and_copies_for_other_processes_are_the_same(images: Path, tmp_path: Path) -> None:
    packed = shard(images, tmp_path / "out")
    chosen = np.array([1, 7, 8, 30])
    some = Subset(packed, chosen)
    assert some.shards is not None
    assert some.shards.counts.tolist() == [1, 2, 0, 0, 0, 0, 1, 0]
    tiles = cut(packed, 20, 0)
    assert tiles.shards is not None
    assert tiles.shards.counts.sum() == len(tiles) == 37 * 4
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.load(9), packed.load(9))
    assert again.describe(9) == packed.describe(9)


@pytest.mark.parametrize("damage", ["missing", "cut off", "longer"])
def test_a_damaged_shard_is_one_that_is_lost_and_others_are_read(images: Path, tmp_path: Path, damage: str) -> None:
    packed = shard(images, tmp_path / "out")
    path = tmp_path / "out" / "train" / "00002.tar"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-600] if damage == "cut off" else content + b"more")
    for index in range(10, 15):
        with pytest.raises(LostShard) as caught:
            packed.load(index)
        assert (caught.value.name, caught.value.first) == (str(path), 10)
    assert packed.load(9).shape == packed.load(15).shape


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_or_hostile_index_is_refused_in_one_line(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "train"
    shard(images, tmp_path / "out")
    before = (folder / "shards.json").read_text()
    shards = json.loads(before)["shards"]
    for changes in (
        {"shards": []},
        {"window": 0},
        {"more": 1},
        {"format": "fcmae shards 2"},
        {"shards": [shards[0] | {"file": "../00000.tar"}]},
        {"shards": [shards[0] | {"images": -1}]},
        {"shards": shards[1:]},
        {"shards": [shards[0] | {"bytes": 10}, *shards[1:]]},
        {"class_names": ["a"]},
    ):
        rewrite(folder, **changes)
        line = error_of("folder", str(tmp_path / "out"), "train", 3)
        assert line.startswith(str(folder))
        assert "copy it anew" in line
        (folder / "shards.json").write_text(before)
    for content in (b"", b"junk", (folder / "index.npz").read_bytes()[:-30]):
        (folder / "index.npz").write_bytes(content)
        assert "index.npz: cannot be read" in error_of("folder", str(tmp_path / "out"), "train", 3)
    file = io.BytesIO()
    np.savez(file, starts=np.array([{}]), allow_pickle=True)
    (folder / "index.npz").write_bytes(file.getvalue())
    assert "index.npz: cannot be read" in error_of("folder", str(tmp_path / "out"), "train", 3)


def test_the_index_knows_each_shards_checksum(images: Path, tmp_path: Path) -> None:
    packed = shard(images, tmp_path / "out")
    for found in packed.files.contents.shards:  # pyright: ignore
        content = (tmp_path / "out" / "train" / found.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (found.bytes, found.sha256)


def test_a_disk_too_small_is_said_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcmae.data.pack, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"0\.0 GB free, but 37 images take"):
        shard(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Tar files of others


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def image_bytes(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 48, 3), number, np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tar files as webdataset's: images with classes, texts and masks."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, name in enumerate(("set-000.tar", "set-001.tar")):
        files = {}
        for i in range(3):
            key = f"./a.b/{number}{i}"
            files |= {f"{key}.png": image_bytes(10 * number + i), f"{key}.cls": str(2 - i).encode()}
            files |= {f"{key}.json": b"{}", f"{key}.mask.png": image_bytes(99)}
        write_tar(folder / name, files)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_of_others_get_an_index_and_stay_as_they_are(tars: Path, command: Command, workers: int) -> None:
    before = contents(tars)
    code, out, err = command("shard", tars, "--workers", workers)
    assert (code, err) == (0, "")
    assert "6 images with classes in 2 tar files, indexed; 6 files that are not a sample's image left out" in out
    assert f"train with data.root={tars}" in out
    source = open_source("folder", str(tars), "train", 3)
    assert isinstance(source, ShardSource)
    assert source.labels is not None
    pixels = [int(source.load(index)[0, 0, 0]) for index in range(6)]
    assert sorted(pixels) == [0, 1, 2, 10, 11, 12]
    assert source.labels.tolist() == [2 - pixel % 10 for pixel in pixels]
    assert source.describe(0) == f"{tars}/set-000.tar/./a.b/00.png"
    after = contents(tars)
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} == {"shards.json", "index.npz"}
    assert "shards.json: exists already" in command("shard", tars)[2]


def test_tar_files_without_classes_are_indexed_without_and_some_without_refused(
    tars: Path, command: Command
) -> None:
    write_tar(tars / "set-001.tar", {"a.png": image_bytes(0)})
    assert "1 of 4 images have no .cls, the others do" in command("shard", tars, "--workers", 0)[2]
    write_tar(tars / "set-000.tar", {"b.jpeg": image_bytes(1), "b.txt": b"words"})
    assert "2 images without classes" in command("shard", tars, "--workers", 0)[1]
    assert open_source("folder", str(tars), "train", 3).labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_that_cannot_be_indexed_say_why_in_one_line(tars: Path, command: Command, workers: int) -> None:
    def line() -> str:
        code, _, err = command("shard", tars, "--workers", workers)
        assert (code, err.count("\n")) == (2, 1)
        assert not (tars / "shards.json").exists()
        return err

    write_tar(tars / "set-002.tar", {"a.png": image_bytes(0), "a.cls": b"cat"})
    assert "set-002.tar: a.cls holds b'cat', and no class" in line()
    (tars / "set-002.tar").write_bytes((tars / "set-001.tar").read_bytes()[:3000])
    assert "set-002.tar: not a readable .tar" in line()
    (tars / "set-002.tar").rename(tars / "set 2.tar")
    assert "set 2.tar: the name has other than letters" in line()
    for path in tars.iterdir():
        path.unlink()
    assert "no tar files in it" in line()
    write_tar(tars / "texts.tar", {"a.txt": b"words"})
    assert "no images in its 1 tar files" in line()
    assert "--images: is of tar files that are made" in command("shard", tars, "--images", 3)[2]
