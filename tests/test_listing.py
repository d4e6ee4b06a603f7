"""Lists of images: in one order, without an object for each image, kept, and made anew when something changed."""

import io
import os
import pickle
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from fcmae.data import kept, listing, open_source, share_of_each_class
from fcmae.data.listing import Folder, FolderFiles, TarFiles, images_below, walk
from fcmae.data.names import Names, natural_key, natural_keys, natural_order
from fcmae.data.shared_memory import say_once
from fcmae.seeding import derive_seed

JPEG = frozenset({".jpg"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for lists of any length, also of folders that have changed just now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    monkeypatch.setattr(listing, "SETTLED_S", -60)
    say_once.cache_clear()
    return tmp_path / "cache" / "fcmae" / "listings"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of five images in three classes."""
    return touch(tmp_path / "images", "owl/1.jpg", "owl/10.jpg", "owl/9.jpg", "cat/1.jpg", "old/cat10/1.jpg")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def below(root: Path) -> FolderFiles:
    return FolderFiles(str(root), JPEG)


def names_of(files: FolderFiles | TarFiles) -> list[str]:
    return [files.name(index) for index in range(len(files))]


def pretend(monkeypatch: pytest.MonkeyPatch, paths: Sequence[str]) -> None:
    """Let there be these files, where nothing is."""
    inside: dict[str, list[str]] = {"": []}
    for path in paths:
        folder, name = os.path.split(path)
        inside.setdefault(folder, []).append(name)
    folders = [Folder(folder, [], names, (1, 1), (0, 0)) for folder, names in inside.items()]
    monkeypatch.setattr(listing, "walk", lambda root: iter(folders))
    monkeypatch.setattr(listing, "changed_folder", lambda root, kept: None)


@pytest.fixture
def scanned(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that have been read, but that of the cache."""
    found: list[str] = []
    scandir = os.scandir

    def counting(path: str) -> object:
        found.extend([path] if isinstance(path, str) and not path.startswith(str(cache)) else [])
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", counting)
    return found


# The order


PIECES = ("a", "A", "b", "0", "01", "1", "10", "9", " ", "-", ".", "/", "_", "é", "\u0663", "\udce9")


@fuzzed(100, 10_000)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), max_size=12))
def test_names_are_ordered_as_by_the_reference_and_packed_without_loss(names: list[str]) -> None:
    assert [names[place] for place in natural_order(names)] == sorted(names, key=natural_key)
    by_key = dict(zip(map(str, range(len(names))), natural_keys(names) if names else [], strict=True))
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            assert (by_key[str(i)] < by_key[str(j)]) == (natural_key(one)[0] < natural_key(other)[0])
    packed = Names.joined([Names.of(names[:3]), Names.of(names[3:])])
    assert [packed[index] for index in range(len(packed))] == names


FOLDER = st.lists(st.sampled_from(("a", "A", "a b", "a1", "a01", "a10", "a.", "b", "é")), max_size=3)
FILE = st.tuples(FOLDER, st.sampled_from(("a", "A", "1", "01", "9", "10", "b/", "é", "a1x", " "))).map(
    lambda parts: "/".join([*parts[0], parts[1].rstrip("/") + ".jpg"])
)


@fuzzed(100, 10_000)
@given(paths=st.lists(FILE, min_size=1, max_size=14, unique=True))
def test_images_of_folders_in_folders_are_in_the_order_of_their_whole_paths(paths: list[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch, paths)
        monkeypatch.setattr(listing, "KEPT_FROM", 1000)
        files = below(Path("/data/set 7"))
    expected = sorted((f"/data/set 7/{path}" for path in paths), key=natural_key)
    assert names_of(files) == expected
    folders = [os.path.basename(os.path.dirname(path)) for path in expected]
    classes = tuple(sorted(set(folders), key=natural_key))
    if any("/" not in path for path in paths):
        assert (files.labels, files.class_names) == (None, None)
    else:
        assert files.labels is not None
        assert files.class_names == classes
        assert [classes[label] for label in files.labels] == folders


def test_a_tar_file_has_the_order_and_the_classes_of_its_names(tmp_path: Path, cache: Path) -> None:
    names = ["b/10.jpg", "b/9.jpg", "B/9.jpg", "a10/1.jpg", "a9/1.jpg", "b/9.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(bytes([number])))
    order = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
    for _ in range(2):
        files = TarFiles(str(tmp_path / "x.tar"), JPEG)
        assert names_of(files) == [f"{tmp_path}/x.tar/{names[i]}" for i in order]
        assert [files.open(i).read()[0] for i in range(len(files))] == order
        classes = ("a9", "a10", "B", "b")
        assert files.class_names == classes
        assert files.labels is not None
        assert [classes[label] for label in files.labels] == [names[i].split("/")[0] for i in order]
    assert len(list(cache.glob("*-*"))) == 1


def test_shares_of_classes_are_those_of_choosing_class_by_class(root: Path) -> None:
    source = open_source("folder", str(root), ".", 3)
    assert source.labels is not None
    chosen = [
        np.random.default_rng(derive_seed(5, label)).permutation(np.flatnonzero(source.labels == label))[:1]
        for label in range(3)
    ]
    share = share_of_each_class(source, 0.4, 5)
    expected = sorted(np.concatenate(chosen))
    assert [share.describe(i) for i in range(len(share))] == [source.describe(i) for i in expected]


# Memory


MANY = [f"n{folder:08d}/n{folder:08d}_{i * 7919}.jpg" for folder in range(400) for i in range(500)]


def test_a_list_of_two_hundred_thousand_images_has_no_object_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, MANY)
    before = sys.getallocatedblocks()
    source = open_source("folder", str(Path(__file__).parent), ".", 3)
    assert len(source) == len(MANY)
    assert sys.getallocatedblocks() - before < len(MANY) / 10
    assert len(pickle.dumps(source)) < 10_000  # other processes map it themselves
    assert pickle.loads(pickle.dumps(source)).describe(199_999) == source.describe(199_999)


def test_opening_looks_at_the_names_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, MANY)
    asked: list[int] = []
    monkeypatch.setattr(FolderFiles, "name", lambda self, index: asked.append(index) or "x.jpg")
    open_source("folder", str(Path(__file__).parent), ".", 3)
    assert len(asked) < 100


def fork(work: Callable[[], object]) -> int:
    """Start a process that does this, and return its number; it ends with 0 if nothing was raised."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def copied_bytes(visit: Callable[[], object]) -> int:
    """Return the memory that a forked process has of its own after a visit, and did not before."""

    def own() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))

    def tell() -> None:
        before = own()
        visit()
        os.write(writing, str(own() - before).encode())

    reading, writing = os.pipe()
    os.waitpid(fork(tell), 0)
    os.close(writing)
    with open(reading) as file:
        return int(file.read())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which says what is shared")
@pytest.mark.parametrize("mapped", [True, False])
def test_workers_that_read_all_names_copy_none_of_the_list(monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    number = 80_000
    pretend(monkeypatch, MANY[:number])
    monkeypatch.setattr(listing, "KEPT_FROM", 1 if mapped else 10**9)
    files = below(Path(__file__).parent)
    assert (files.arrays.folder is not None) == mapped
    names = names_of(files)

    def visit(name: Callable[[int], str]) -> None:
        for index in range(number):
            name(index)

    objects = copied_bytes(lambda: visit(names.__getitem__))
    assert objects > 80 * number  # the pages that hold the counts of references to so many names
    assert copied_bytes(lambda: visit(files.name)) < 40 * number


# What is kept


def test_a_list_that_is_kept_is_opened_without_reading_a_folder(
    root: Path, scanned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = below(root)
    assert len(scanned) == 5
    assert f"{root}: 5 images, listed in 0 s; kept in {first.arrays.folder}" in capsys.readouterr().err
    (root.parent / "link").symlink_to(root)
    for place in (root, root.parent / "link"):
        again = below(place)
        assert len(scanned) == 5
        assert names_of(again) == [name.replace(str(root), str(place)) for name in names_of(first)]
        assert again.labels is not None
        assert first.labels is not None
        assert again.labels.tolist() == first.labels.tolist() == [0, 1, 2, 2, 2]
        assert again.class_names == ("cat", "cat10", "owl")
        assert again.ends == {".jpg"}
    assert f"{root}: unchanged since it was listed, in {first.arrays.folder}" in capsys.readouterr().err
    assert len(FolderFiles(str(root), {".png"})) == 0  # of other files it is another list


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda root: touch(root, "old/cat10/2.jpg"),
    "removed": lambda root: (root / "owl/1.jpg").unlink(),
    "renamed": lambda root: (root / "owl/1.jpg").rename(root / "owl/2.jpg"),
    "a folder added": lambda root: touch(root, "old/dog/1.jpg"),
    "a folder renamed": lambda root: (root / "cat").rename(root / "dog"),
    "a folder replaced": lambda root: ((root / "cat").rename(root.parent / "cat"), touch(root, "cat/7.jpg")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_has_changed_is_listed_again_and_said_so(
    root: Path, change: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    below(root)
    time.sleep(0.02)  # of which clocks of file systems see something
    change(root)
    assert names_of(below(root)) == sorted(images_below(str(root), JPEG), key=natural_key)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "listed again" in line]
    assert said.startswith(f"{root}: listed again, as {root}")
    assert said.endswith(" has changed")
    assert names_of(below(root)) == sorted(images_below(str(root), JPEG), key=natural_key)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "names.npy", 130)


def flip(folder: Path) -> None:
    content = bytearray((folder / "folder_of.npy").read_bytes())
    content[-1] ^= 1
    (folder / "folder_of.npy").write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": cut_off,
    "a bit": flip,
    "a file": lambda folder: (folder / "stamps.npy").unlink(),
    "no facts": lambda folder: (folder / "facts.json").unlink(),
    "other facts": lambda folder: (folder / "facts.json").write_text('{"format": "fcmae listing 0"}'),
    "no text": lambda folder: (folder / "facts.json").write_bytes(b"\xff\0"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_list_is_made_again_and_said_so(
    root: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str], scanned: list[str]
) -> None:
    first = below(root)
    assert first.arrays.folder is not None
    expected = names_of(first)
    damage(first.arrays.folder)
    assert names_of(below(root)) == expected
    assert f"{root}: listed again, as {first.arrays.folder} is damaged" in capsys.readouterr().err
    assert len(scanned) == 10
    assert names_of(below(root)) == expected
    assert len(scanned) == 10


def test_without_a_place_to_keep_it_a_list_is_made_each_time_and_said_so(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(cache.parents[1].parent, "cache")
    assert len(below(root)) == 5
    assert f"{root}: its list cannot be kept for the next start" in capsys.readouterr().err
    assert pickle.loads(pickle.dumps(below(root))).name(4) == f"{root}/owl/10.jpg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(below(root)) == 5
    assert "no home; set XDG_CACHE_HOME" in capsys.readouterr().err


def test_a_folder_that_changed_just_now_is_not_kept_as_its_clock_may_not_tell_the_next_change(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "SETTLED_S", 60)
    below(root)
    assert "has changed just now" in capsys.readouterr().err
    assert not list(cache.glob("*-*"))


def test_short_lists_leave_nothing_in_the_cache(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_FROM", 6)
    below(root)
    assert not cache.exists()


def test_what_nobody_used_for_a_week_is_deleted_with_the_next_list(root: Path, tmp_path: Path, cache: Path) -> None:
    old, recent = below(root).arrays.folder, below(root / "owl").arrays.folder
    assert old is not None
    assert recent is not None
    (cache / ".writing-x").mkdir()
    for path, days in ((old, 8), (recent, 8), (cache / ".writing-x", 8)):
        used = time.time() - days * 86_400
        os.utime(path, (used, used))
    below(root / "owl")
    new = below(root / "cat").arrays.folder
    assert {path for path in cache.iterdir() if path.is_dir()} == {recent, new}


def test_of_several_processes_one_makes_the_list(
    root: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    def slow_walk(root: str) -> Generator[Folder, None, None]:
        yield from walk(root)
        time.sleep(0.5)  # the others are here by then
        with log.open("a") as file:
            file.write("listed\n")

    monkeypatch.setattr(listing, "walk", slow_walk)
    monkeypatch.setattr(kept, "SILENT_S", 0.1)
    children = [fork(lambda: names_of(below(root))) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(list(cache.glob("*-*"))) == 1
    assert log.read_text() == "listed\n"


# Reading folders


def test_what_stops_early_leaves_no_thread_reading(root: Path) -> None:
    folders = walk(str(root))
    assert next(folders).path == ""
    folders.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("listing")]


def test_a_folder_that_may_not_be_read_is_passed_over_and_looked_into_when_it_may(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("owl"):
            raise PermissionError(path)
        return scandir(path)

    with monkeypatch.context() as refused:
        refused.setattr(listing.os, "scandir", refusing)
        assert len(below(root)) == 2
    assert len(below(root)) == 2
    (root / "owl").chmod(0o700)
    assert len(below(root)) == 5
