"""User-facing errors in one line, and exit codes; knows nothing of what was asked for."""

import contextlib
import errno
import io
import json
import os
import platform
import re
import reprlib
import select
import shlex
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fcmae import __version__


class UserError(Exception):
    """Something only the user can fix; the message is one line that names the file or key and the remedy.

    `everywhere` says that every process of a launch meets the same error, so that one of them may report it.
    """

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def one_line(text: str, *, longest: int = 2000) -> str:
    """Return text with what a terminal would not show as it is, line breaks first of all, as escapes.

    Of what is longer than `longest` characters the middle is left out.
    """
    text = text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


LONGEST_REASON = 300
"""Characters of what another library says, which may quote a file."""


def brief(error: BaseException) -> str:
    """Return what an error says, as part of a line."""
    return one_line(" ".join(str(error).split()), longest=LONGEST_REASON) or type(error).__name__


@contextmanager
def blame(subject: str) -> Iterator[None]:
    """Turn a ValueError inside into a `UserError` that begins with `subject`, a file or key."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{subject}: {error}") from error


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel = 3


def shown(value: object) -> str:
    """Write any value in a line of some hundred characters at most, as Python does, its middle left out."""
    return SHORT.repr(value)


def named(text: str) -> str:
    """Write a name, key or path as it is, or as `shown` where that is no line of readable length."""
    return text if len(text) <= 300 and text.isprintable() else shown(text)


# What is said of errors that are not ours

FREE_MEMORY = (
    "out of memory: lower data.batch_size and raise optim.accumulate by the same factor, lower data.num_workers, "
    "or end other programs"
)
REMEDIES = {
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.EFBIG: "name another place, or raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower data.num_workers",
    errno.ENFILE: "end other programs, or lower data.num_workers",
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or lower data.num_workers",
    errno.ENOENT: "it is misspelt, or was removed meanwhile",
    errno.ENAMETOOLONG: "give shorter names",
    errno.ELOOP: "its links lead in a circle; name the place itself",
    errno.EIO: "the disk, or the connection to it, fails; copy what is there, then start the same command again",
    errno.EPIPE: "another process has ended: its own line says why",
    errno.ECONNRESET: "another process has ended: its own line says why",
    errno.ESTALE: "the network file system has lost it; start the same command again",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
        "free or name another place",
    ),
}
"""By number, what to do about an error of the operating system."""

KNOWN = {
    r"(?i)\b(cuda|hip|mps|xpu)\b.*out of memory|ALLOC_FAILED": (
        "out of GPU memory: lower data.batch_size and raise optim.accumulate by the same factor, "
        "or set train.precision=bf16 or train.gradient_checkpointing=true"
    ),
    r"(?i)out of memory|not enough memory|can('|no)t allocate memory|bad.alloc": FREE_MEMORY,
    r"DataLoader worker .*(exited unexpectedly|is killed)": (
        "a process that loads images was killed, often for memory: lower data.num_workers, or end other programs"
    ),
    r"PytorchStreamWriter failed|No space left on device": "a file was not written: free some space",
    r"ancdata|(?i:too many open files)": f"too many open files: {REMEDIES[errno.EMFILE]}",
    r"(?i)connection (was )?(closed|reset)|remote process exited|broken pipe": (
        "another process of this run has ended: its own line says why; if it has none it was killed, as for memory "
        "or with its machine: start the same command again with resume=auto"
    ),
    r"(?i)timed out waiting \d+ ?ms|wait timeout after \d+": (
        "another process of this run does not answer: end all of them, then start the same command again with "
        "resume=auto"
    ),
}
"""Patterns in messages of RuntimeErrors of other libraries, and what we say; a GPU's before the computer's."""


def _said(error: BaseException) -> str:
    """Return an error's message; that of a worker process arrives with a traceback, its own line last."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _describe_system(error: OSError) -> str:
    said = _said(error)
    number = error.errno or next((n for n in REMEDIES if os.strerror(n) in said), None)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    what = (
        f"{' to '.join(dict.fromkeys(names)) or 'reading or writing'}: {error.strerror}" if error.strerror else said
    )
    return f"{what}; {REMEDIES.get(number or 0, 'start the same command again, or name another place')}"


def describe(error: BaseException) -> str | None:
    """Return what to tell a user of an error that is the user's, or the machine's; None if it is a bug of ours."""
    match error:
        case UserError():
            return str(error)
        case MemoryError() | OSError(errno=errno.ENOMEM):
            return FREE_MEMORY
        case OSError():
            return _describe_system(error)
        case UnicodeEncodeError(object=text, start=start, end=end, encoding=encoding):
            return f"{text[max(0, start - 80) : end + 20]}: a name that {encoding} cannot write; rename it"
        case RuntimeError() if not isinstance(error, RecursionError | NotImplementedError):
            is_gpus = type(error).__name__ == "OutOfMemoryError"  # torch's, which this module does not import
            said = "CUDA out of memory" if is_gpus else str(error)
            return next((ours for pattern, ours in KNOWN.items() if re.search(pattern, said)), None)
    return None


# How it is said


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reads may have gone
        print(line, file=sys.stderr, flush=True)


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback of a bug into the system's folder for such; returns where it is."""
    text = "".join(traceback.format_exception(error))
    about = f"fcmae {__version__}, Python {platform.python_version()}, {platform.platform()}"
    try:
        folder = tempfile.gettempdir()
        if folder == os.getcwd():  # where nothing else can be written: it may be anybody's images
            raise OSError
        handle, name = tempfile.mkstemp(prefix="fcmae-traceback-", suffix=".txt", dir=folder)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{about}\n{shlex.join(sys.argv)}\n\n{text}")
    except OSError:
        _say(text)
        return "above"
    return f"in {name}"


def _tell_launcher(line: str) -> None:
    """Write an error to where torchrun and accelerate launch look for it, so that their summary ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": more}}), encoding="utf-8")


def _reports_first() -> bool:
    """Whether no other process of a launch has reported: the first error is the cause, others often follow."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return True
    try:  # in the folder of all processes' files for errors
        os.close(os.open(Path(own).parent.parent / "fcmae-reported", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def report(error: BaseException) -> int:
    """Print an error in one line, to standard error and to the launcher; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    line = describe(error)
    code = 1 if line is None else 2
    if line is None:
        what = ": ".join(filter(None, (type(error).__name__, _said(error))))
        what = textwrap.shorten(what, 300, placeholder=" ...")
        line = f"{what}; a bug in fcmae: please report it with the whole traceback"
    line = one_line(line)
    everywhere = isinstance(error, UserError) and error.everywhere
    if (rank == 0 or not everywhere) and (_reports_first() or everywhere):
        if code == 1:
            line += f", which is {_keep_traceback(error)}"
        _say(f"error{f' in process {rank}' if rank else ''}: {line}")
    _tell_launcher(f"error: {line}")
    return code


def _has_readers() -> bool:
    """Whether both standard streams are read on: a pipe to `head` that has seen enough is not."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            poll.register(stream, 0)
    return not poll.poll(0)


def _end_output() -> None:
    """Drop what could not be printed, which Python would try again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _begin_output() -> None:
    """Make sure that any name can be printed, and that no file gets the number of a closed standard stream."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_script(main: Callable[[list[str]], int]) -> int:
    """Run `main` on the command line; whatever ends it early ends in one line on standard error.

    Returns the exit code: 2 for what the user or the machine is to blame for, 1 for a bug of ours, whose traceback
    is kept in a file.
    """
    _begin_output()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return 0 if isinstance(error, BrokenPipeError) and not _has_readers() else report(error)
    finally:
        _end_output()
