"""The processes that load batches: how they start, end and die; knows nothing of what they load."""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from fcmae.errors import UserError
from fcmae.signals import stop_signals_held

DEATHS = {
    "SIGKILL": "as the system does when memory runs out: lower data.num_workers or data.batch_size",
    "SIGBUS": "as happens when shared memory (/dev/shm) is full, or a file shrinks while it is read: "
    "enlarge the first (docker run --shm-size=8g), or lower data.num_workers",
}
"""By which signal a process died -> what may have sent it, and what helps."""

ENDING_S = 2.0
"""How long a process may take from the loss of its connections to its end."""


def describe_death(exitcode: int) -> str:
    """Say how a process ended, what may have ended it, and what helps."""
    how = f"exit code {exitcode}" if exitcode > 0 else signal.Signals(-exitcode).name
    likely = "data.num_workers=0 shows what happens, and other images whether it is one of them"
    return f"a process that loads images was ended by {how}, {DEATHS.get(how, likely)}"


@contextmanager
def starting() -> Iterator[list[BaseProcess]]:
    """Give the processes that are started inside, once they are; each is to call `serve_parent`.

    What terminates them kills them, and so does this process's exit: they ignore SIGTERM, so that it would wait for
    them for ever. Their deaths are met where they are asked for something (`serving`): torch would have them raise
    wherever this process happens to be.
    """
    started: list[BaseProcess] = []
    others = set(multiprocessing.active_children())
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") and in_main_thread else None
    with stop_signals_held():
        yield started
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    started += set(multiprocessing.active_children()) - others
    for process in started:
        process.terminate = process.kill
        atexit.register(process.kill)


@contextmanager
def serving(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Turn what comes inside of the death of one of these processes into one line.

    Raises:
        UserError: saying how it died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # of whatever was waited for, or half received
        if processes:  # connections close before the one that had them has ended
            wait([process.sentinel for process in processes], ENDING_S)
        if dead := [process.exitcode for process in processes if process.exitcode]:
            line = f"data.num_workers={len(processes)}: {describe_death(dead[0])}"
            raise UserError(line, everywhere=False) from error
        raise
    finally:
        for process in processes:  # the living are killed at the exit: an interrupt may keep torch from ending them
            if not process.is_alive():
                atexit.unregister(process.kill)
