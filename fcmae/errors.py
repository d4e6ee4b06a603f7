"""User-facing errors in one line, and exit codes; knows nothing of what was asked for."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can fix; the message is one line that names the file or key and the remedy.

    `everywhere` says that every process of a launch meets the same error, so that one of them may report it.
    """

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def one_line(text: str, *, longest: int = 2000) -> str:
    """Return text with what a terminal would not show as it is, line breaks first of all, as escapes."""
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def blame(subject: str) -> Iterator[None]:
    """Turn a ValueError inside into a `UserError` that begins with `subject`, a file or key."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{subject}: {error}") from error


PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
"""Operating system errors about a place that only the user can fix."""


def run_script(main: Callable[[list[str]], int]) -> int:
    """Run `main` on the command line; bad input ends in one line on standard error and exit code 2."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not error.everywhere:
            print(f"error in process {rank}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in PLACES:
            raise
        print(
            f"error: {error.filename or 'writing'}: {error.strerror}; free or name another place", file=sys.stderr
        )
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
            raise
        print(
            "error: out of GPU memory: lower data.batch_size and raise optim.accumulate by the same factor, "
            "or set train.precision=bf16 or train.gradient_checkpointing=true",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
