"""Two runs never write into one folder: locks are held, refused, taken over from the dead, and lost in time."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import error_line, run_main

from fcmae import pretrain
from fcmae.data.views import PixelNormalizer
from fcmae.errors import UserError
from fcmae.training import lock
from fcmae.training.lock import Holder, Lock, held

WATCHED_S = 1.0


@contextmanager
def take(path: Path, *, renewed_s: float = 100.0) -> Iterator[tuple[Lock, list[str]]]:
    """Hold a lock; gives it, and the lines that were said."""
    lines: list[str] = []
    with held(path, say=lines.append, renewed_s=renewed_s, watched_s=WATCHED_S) as own:
        yield own, lines


def leave(path: Path, **other: object) -> None:
    """Write a lock of this process, but for what is given."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(Holder.this_process().model_copy(update=other).model_dump_json())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock.json"


@pytest.fixture
def dead() -> Iterator[int]:
    """The number of a process that was killed and that its parent, this one, has not waited for."""
    process = subprocess.Popen(["sleep", "100"])
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def test_a_second_holder_is_refused_with_host_process_and_time(path: Path) -> None:
    with take(path), pytest.raises(UserError) as refused, take(path):
        pass
    assert str(refused.value).startswith(f"output={path.parent}: in use by process {os.getpid()} on ")
    assert f" since {Holder.this_process().since:%Y-%m-%d }" in str(refused.value)
    assert not path.parent.exists(), "the folder was made for the lock alone"
    path.parent.mkdir()
    with take(path):
        (path.parent / "more").touch()
    assert [file.name for file in path.parent.iterdir()] == ["more"]


def test_the_lock_of_a_process_that_has_ended_here_is_taken_over_at_once(path: Path, dead: int) -> None:
    own = Holder.this_process()
    for ended in ({"pid": dead}, {"pid": 2**31 - 1}, {"started_s": own.started_s - 5}):
        leave(path, **ended)
        with take(path) as (mine, lines):
            mine.check()
        assert not lines, "nothing was watched"


def test_the_lock_of_a_process_that_was_killed_at_its_work_is_taken_over(path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from fcmae.training.lock import held
with held(Path({str(path)!r}), say=print):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert path.exists()
    with take(path) as (_, lines):
        assert not lines


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_the_lock_of_another_machine_is_taken_over_if_it_is_not_renewed(
    path: Path, other: dict[str, object]
) -> None:
    leave(path, **other)
    with take(path) as (mine, lines):
        mine.check()
    (line,) = lines
    assert line.startswith(f"output={path.parent}: process {os.getpid()} on ")
    assert "watching for 1 s whether it still does" in line


def test_the_lock_of_another_machine_is_respected_while_it_is_renewed(path: Path) -> None:
    leave(path, host="elsewhere")
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process \d+ on elsewhere since"), take(path):
            pass
    finally:
        over.set()
        thread.join()
    assert path.exists()


def test_a_lock_is_renewed_by_its_holder(path: Path) -> None:
    with take(path, renewed_s=0.01) as (mine, _):
        os.utime(path, (0, 0))
        for _ in range(1000):
            if path.stat().st_mtime > 1:
                break
            threading.Event().wait(0.01)
        assert path.stat().st_mtime > 1
        mine.check()


def test_of_many_that_find_a_dead_lock_one_gets_it(path: Path, dead: int) -> None:
    leave(path, pid=dead)
    together, done = threading.Barrier(16), threading.Barrier(16)

    def contend(_: int) -> str:
        together.wait()
        try:
            with take(path) as taken:
                done.wait()
                taken[0].check()
                return "held"
        except UserError as error:
            done.wait()
            return str(error).partition(" on ")[0]

    with ThreadPoolExecutor(16) as pool:
        outcomes = sorted(pool.map(contend, range(16)))
    assert outcomes == ["held"] + [f"output={path.parent}: in use by process {os.getpid()}"] * 15


def test_a_dead_lock_that_another_has_taken_over_meanwhile_is_left_to_it(path: Path, dead: int) -> None:
    leave(path, pid=dead)
    content = path.read_bytes()
    leave(path, host="elsewhere")
    lock._remove(path, content)
    assert "elsewhere" in path.read_text()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"host": "a\\nb", "pid": -1}', b"\xff\0"])
def test_a_damaged_lock_is_watched_and_then_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with take(path) as (mine, lines):
        mine.check()
    assert len(lines) == 1
    assert lines[0].startswith(f"output={path.parent}: another run seems to have used this folder; watching")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_lock_that_is_no_file_is_named(path: Path, make: object) -> None:
    assert callable(make)
    path.parent.mkdir()
    make(path)
    with pytest.raises(UserError, match=r"lock\.json: is not a file that a run wrote; delete it"), take(path):
        pass


def test_a_lock_that_another_process_took_is_noticed_and_left_to_it(path: Path) -> None:
    with take(path) as (mine, _):
        leave(path, host="elsewhere")
        os.utime(path, (0, 0))
        mine.renew()
        with pytest.raises(UserError, match=r"has been taken over by process \d+ on elsewhere, so nothing more is"):
            mine.check()
    assert path.stat().st_mtime == 0
    path.unlink()
    with take(path) as (mine, _):
        path.unlink()
        with pytest.raises(UserError, match=r"lock\.json: this run's lock is gone"):
            mine.check()


def test_on_a_full_disk_no_lock_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path.parent.mkdir()
    monkeypatch.setattr("fcmae.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error, take(path):
        pass
    assert error.value.filename == str(path)
    assert not list(path.parent.iterdir())


# Of a run


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    import numpy as np

    from fcmae.data import save_arrays

    save_arrays(tmp_path / "data", np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16}}
data: {{name: arrays, root: {tmp_path / "data"}, image_size: 32, batch_size: 4, num_workers: 0}}
train: {{max_steps: 8}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1}}
visualize: {{num_images: 0}}
"""
    )
    return ["--config", str(config)]


def test_a_run_refuses_a_folder_in_use_and_a_dry_run_does_not_look(
    arguments: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with take(path):
        for resume in ("never", "auto"):
            line = error_line(pretrain.main, capsys, *arguments, f"resume={resume}")
            assert line.startswith(f"error: output={path.parent}: in use by process {os.getpid()} on ")
        assert run_main(pretrain.main, *arguments, "--dry-run") == 0
        assert [file.name for file in path.parent.iterdir()] == ["lock.json"]


def test_a_run_that_lost_its_lock_ends_before_it_writes(
    arguments: list[str],
    path: Path,
    dead: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normalize, calls = PixelNormalizer.forward, iter(range(100))

    def steal(self: PixelNormalizer, pixels: object, **how: float) -> object:
        if how and next(calls) == 3:  # of those in training
            leave(path, host="elsewhere")
        return normalize(self, pixels, **how)  # pyright: ignore[reportArgumentType]

    leave(path, pid=dead)  # a folder with nothing but what a run leaves that was killed at its start is unused
    (path.parent / ".writing-config.yaml-abc").touch()
    monkeypatch.setattr(PixelNormalizer, "forward", steal)
    line = error_line(pretrain.main, capsys, *arguments)
    assert "lock.json: this run's lock has been taken over by process" in line
    assert len((path.parent / "metrics.jsonl").read_text().splitlines()) == 3
    assert [p.name for p in sorted((path.parent / "checkpoints").iterdir())] == ["last", "step-00000002"]
    assert "elsewhere" in path.read_text(), "which is not removed"


def test_the_intervals_leave_room_for_a_slow_disk() -> None:
    assert lock.WATCHED_S >= 3 * lock.RENEWED_S
