"""Whatever ends a program early ends in one line, which says what to do, and an exit code that says whose it is."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, run_main

from fcmae import errors
from fcmae.errors import REMEDIES, UserError, one_line
from fcmae.training.log import MetricsLog
from fcmae.training.run_folder import RunFolder

Fail = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """End a program by an exception: (exit code, standard error)."""
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    def call(error: BaseException) -> tuple[int, str]:
        def main(_: list[str]) -> int:
            raise error

        return run_main(main), capsys.readouterr().err

    return call


def wrapped(kind: str, line: str) -> str:
    """The message of an exception that a worker process passes on."""
    return (
        f"Caught {kind} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n{line}\n"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("x: wrong; do right"), "x: wrong; do right"),
        (MemoryError(), "out of memory: lower data.batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: lower data.batch_size"),
        (torch.OutOfMemoryError("tried to allocate"), "out of GPU memory: lower data.batch_size"),
        (RuntimeError("CUDA error: out of memory"), "out of GPU memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of GPU memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "out of mem",
        ),
        (RuntimeError("not enough memory: you tried to allocate 8 bytes"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (
            RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "),
            "a process that loads images was",
        ),
        (
            RuntimeError("[gloo/pair.cc:544] Connection closed by peer [::1]:6"),
            "another process of this run has ended",
        ),
        (
            RuntimeError("[gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"),
            "another process of this run does not answer",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device; free some space"),
        (
            OSError("I/O error: No space left on device (os error 28)"),
            "No space left on device (os error 28); free",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", b"x"),
            "x: Too many open files; raise the limit on open files",
        ),
        (
            OSError(wrapped("OSError", "OSError: [Errno 5] Input/output error: 'x'")),
            "[Errno 5] Input/output error: 'x'",
        ),
        (OSError(wrapped("OSError", "OSError: [Errno 5] Input/output error: 'x'")), REMEDIES[errno.EIO]),
        (
            OSError(errno.EILSEQ, "Illegal byte sequence"),
            "reading or writing: Illegal byte sequence; start the same",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "another process has ended"),
        (
            UnicodeEncodeError("utf-8", "runs/\udcff/x", 5, 6, "surrogates not allowed"),
            "runs/\\udcff/x: a name that",
        ),
    ],
)
def test_what_is_the_users_or_the_machines_gets_one_line_and_exit_code_2(
    error: Exception, said: str, fail: Fail
) -> None:
    code, err = fail(error)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_an_error_of_the_system_names_the_file_the_reason_and_a_remedy(number: int, fail: Fail) -> None:
    assert fail(OSError(number, os.strerror(number), "a")) == (
        2,
        f"error: a: {os.strerror(number)}; {REMEDIES[number]}\n",
    )


@pytest.mark.parametrize(
    "error",
    [
        KeyError("\n\x1b[31m" + 5000 * "x"),
        RecursionError("too deep"),
        RuntimeError("CUDA error: assert"),
        IndexError(),
    ],
    ids=repr,
)
def test_a_bug_of_ours_gets_one_line_and_its_traceback_a_file(error: Exception, fail: Fail, tmp_path: Path) -> None:
    code, err = fail(error)
    (file,) = tmp_path.iterdir()
    assert code == 1
    assert err.startswith(f"error: {type(error).__name__}")
    assert err.endswith(f"; a bug in fcmae: please report it with the whole traceback, which is in {file}\n")
    assert len(err) < 600
    assert err.count("\n") == 1
    text = file.read_text()
    assert "Traceback (most recent call last):" in text
    assert "raise error" in text
    assert text.startswith("fcmae ")


def test_a_traceback_is_printed_where_it_cannot_be_kept(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path / "gone"))
    assert "Traceback (most" in fail(IndexError())[1]
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # as where no folder for such can be written: these may be anybody's images
    code, err = fail(IndexError())
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert err.splitlines()[-1].endswith("with the whole traceback, which is above")


def test_what_a_terminal_would_obey_is_shown_as_escapes(fail: Fail) -> None:
    name = "a\nb\x1b[31m\r\udcff\u202e é"
    assert one_line(name) == "a\\nb\\x1b[31m\\r\\udcff\\u202e é"
    assert fail(UserError(name)) == (2, f"error: {one_line(name)}\n")
    assert len(one_line("x" * 10**7)) < 3000


def test_an_interrupt_says_nothing_more(fail: Fail) -> None:
    assert fail(KeyboardInterrupt()) == (130, "")


# Processes of a launch


def test_of_several_processes_one_reports_and_all_tell_the_launcher(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(rank: int, error: Exception, attempt: int = 0) -> tuple[str, str]:
        """What process `rank` prints, and tells the launcher."""
        file = tmp_path / f"attempt_{attempt}" / str(rank) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        printed = fail(error)[1]
        return printed, json.loads(file.read_text())["message"]["message"]

    line = "error: x: wrong"
    assert end(1, UserError("x: wrong")) == ("", line)
    assert end(0, UserError("x: wrong")) == (f"{line}\n", line)
    assert end(2, RuntimeError("Connection closed by peer"))[0] == ""  # the first was the cause
    assert end(1, UserError("x: wrong", everywhere=False), 1) == ("error in process 1: x: wrong\n", line)
    assert end(0, MemoryError(), 1)[0] == ""
    assert end(2, KeyError("x"), 1)[0] == ""


def test_torchruns_summary_ends_with_our_line(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom fcmae.errors import run_script\nsys.exit(run_script(lambda _: {}['x']))\n")
    command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", environment["MASTER_PORT"]]
    done = launch([*command, str(script)], environment | {"TMPDIR": str(tmp_path)})
    lines = done.stderr.splitlines()
    ours = [line for line in lines if line.startswith("error")]
    assert len(ours) == 1, done.stderr
    assert "KeyError: 'x'; a bug in fcmae: please report it with the whole traceback" in ours[0]
    *_, last, _ = lines
    assert "traceback : error: KeyError: 'x'; a bug in fcmae" in last
    assert len(list(tmp_path.glob("fcmae-traceback-*"))) == 1


# Standard streams


def shell(line: str, **environment: str) -> tuple[int, str, str]:
    """Run a shell line, in which PY -c is a Python program that `run_script` runs: (exit code, output, errors)."""
    program = "import sys; from fcmae.errors import *; sys.exit(run_script(lambda argv: exec(argv[0]) or 0))"
    python = f"{sys.executable} -c '{program}'"
    done = subprocess.run(
        ["bash", "-c", line.replace("PY", python)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="of POSIX shells")
def test_streams_that_are_closed_full_or_no_longer_read_end_in_a_line_at_most(tmp_path: Path) -> None:
    assert shell("PY 'print(chr(120))' >&-") == (0, "", "")
    assert shell("PY 'raise UserError(chr(120))' 2>&-") == (2, "", "")
    assert shell("PY 'print(1); raise UserError(chr(120))' > /dev/full") == (2, "", "error: x\n")
    full = "error: reading or writing: No space left on device; free some space, or name another place\n"
    assert shell("PY 'print(1)' > /dev/full") == (2, "", full)
    assert shell("PY 'for i in range(100000): print(i)' | head -n 1; exit ${PIPESTATUS[0]}") == (0, "0\n", "")
    first = f'PY \'open("{tmp_path / "file"}", "w").fileno() > 2 or 1 / 0\' 0<&- >&- 2>&-'
    assert shell(first)[0] == 0  # nothing that prints into number 1 prints into a file of ours


def test_any_name_is_printed_whatever_the_encoding() -> None:
    program = 'PY \'print("é\\udcff"); raise UserError("é\\udcff")\''
    assert shell(program, PYTHONIOENCODING="utf-8") == (2, "é\\udcff\n", "error: é\\udcff\n")
    assert shell(program, PYTHONIOENCODING="ascii") == (2, "\\xe9\\udcff\n", "error: \\xe9\\udcff\n")


# TensorBoard


@pytest.mark.skipif(os.name == "nt", reason="limits on files are POSIX's")
def test_a_full_disk_under_tensorboard_is_one_error_that_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    def fill(log: MetricsLog) -> None:
        with log:
            for step in range(2, 1000):
                assert log.tensorboard
                log.tensorboard.add_scalar("loss", 1.0, step)
                log.tensorboard.flush()

    hook, limits = threading.excepthook, resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(RunFolder(tmp_path), 0)
    log.record(1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # of each file, as if the disk were full
    try:
        with pytest.raises(UserError, match=rf"{tmp_path}: its records are not written, File too large; checkpoi"):
            fill(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert threading.excepthook is hook
    assert not printed


def test_records_of_a_removed_folder_are_not_lost_silently(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with MetricsLog(RunFolder(folder), 0) as log:
        log.record(1, {"loss": 1.0})
        assert log.tensorboard
        log.tensorboard.flush()  # by a thread, which must not find the folder gone
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"not written, they were removed or moved meanwhile; put them back"):
            log.record(2, {"loss": 1.0})
        (tmp_path / "elsewhere").rename(folder)
