"""Files are written whole or not at all, and none is written over that should stay."""

import os
import stat
import threading
from pathlib import Path

import pytest

from fcmae.errors import UserError
from fcmae.files import (
    WRITING,
    atomic_file,
    atomic_folder,
    atomic_path,
    require_distinct,
    require_folder,
    require_free,
    require_new_folder,
    write_by,
    write_bytes,
)


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full") as caught:
        fail()
    assert caught.value.filename == str(path)  # not that of the unfinished file
    assert path.read_text() == "old"
    assert [path] == list(tmp_path.iterdir())


def test_a_file_in_a_folder_that_is_gone_is_named_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_bytes(tmp_path / "gone" / "x", b"")
    assert caught.value.filename == str(tmp_path / "gone" / "x")


def test_a_link_is_replaced_and_what_it_leads_to_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "hard").hardlink_to(tmp_path / "mine")
    for name in ("link", "hard"):
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_names_as_long_as_a_disk_allows_are_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_bytes(tmp_path / name, b"x")
        with atomic_folder(tmp_path / name[1:]) as folder:
            (folder / "x").touch()
        assert (tmp_path / name[1:] / "x").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_modes_are_those_of_any_new_file_whatever_other_threads_write(tmp_path: Path) -> None:
    mask = os.umask(0o027)

    def write(number: int) -> None:
        for i in range(50):
            write_bytes(tmp_path / f"{number}-{i}", b"")

    try:
        threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        assert os.umask(mask) == 0o027
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_unfinished_files_of_others_are_left_alone(tmp_path: Path) -> None:
    mine = [tmp_path / f"{WRITING}x", tmp_path / f"{WRITING}y"]
    mine[0].mkdir()
    mine[1].write_text("mine")
    with atomic_folder(tmp_path / "x"), atomic_path(tmp_path / "y"):
        assert len(list(tmp_path.iterdir())) == 4
    assert mine[0].is_dir()
    assert mine[1].read_text() == "mine"


def test_a_file_is_free_where_nothing_is_not_even_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    require_free(tmp_path / "x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(UserError, match=f"{name}: exists already; name another place, or add --overwrite"):
            require_free(tmp_path / name)
        require_free(tmp_path / name, overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        require_free(tmp_path, overwrite=True)


def test_what_is_read_is_not_written_whatever_it_is_called_by(tmp_path: Path) -> None:
    (tmp_path / "read").touch()
    (tmp_path / "other").touch()
    (tmp_path / "link").symlink_to("read")
    require_distinct([tmp_path / "other", tmp_path / "new"], [tmp_path / "read", tmp_path / "gone"])
    for name in ("read", "link"):
        with pytest.raises(UserError, match=f"{name}: is read, so it cannot be written"):
            require_distinct([tmp_path / "other", tmp_path / name], [tmp_path / "read"])


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "file exists already; name another folder"),
        ("file/below", "file exists already"),
        ("dangling", "dangling exists already"),
        ("images", "in IMAGES, whose images are read"),
        ("images/new/below", "in IMAGES"),
        ("link", "in IMAGES"),
        ("link/../images/new", "in IMAGES"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_folder_to_write_is_one_and_none_that_is_read(tmp_path: Path, place: str, reason: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("images")
    for fine in (tmp_path, tmp_path / "new" / "below"):
        require_folder(fine, "--output x", inputs=[images, tmp_path / "file"])
    with pytest.raises(UserError) as caught:
        require_folder(tmp_path / place, "--output x", inputs=[images])
    assert str(caught.value).startswith("--output x: ")
    assert reason.replace("IMAGES", str(images)) in str(caught.value)


def test_a_new_folder_is_free_or_empty_and_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "full", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "here")
    for fine in ("new", "empty"):
        require_new_folder(tmp_path / fine, "x")
    for name, reason in {"full": "exists already", "link": "as a whole", "here": "as a whole"}.items():
        with pytest.raises(UserError, match=reason):
            require_new_folder(tmp_path / name, "x")
    with pytest.raises(UserError, match="as a whole"):
        require_new_folder(Path(), "x")


def test_what_a_library_writes_gets_its_name_whole(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise ValueError("not whole")

    write_by(lambda file: file.write(b"x" * 10), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x" * 10
    with pytest.raises(ValueError, match="not whole"):
        write_by(fail, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x" * 10
