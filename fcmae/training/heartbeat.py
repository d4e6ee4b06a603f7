"""Whether the other processes of a run still live, heard through their store; knows nothing of what they compute.

A process that is killed closes its connections, and those that talk with it end at once. One whose machine or network
is gone does not: the others would wait for it as long as a collective may take, half an hour.
"""

import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import Store, TCPStore

from fcmae.errors import UserError, report

BEAT_S = 5.0
"""Time between two beats."""

SILENT_BEATS = 24
"""So many of its own beats a process waits for one of another: two minutes, or more if it is stopped itself."""

ENDED = b"ended"


def key(rank: int) -> str:
    return f"fcmae/heartbeat/{rank}"


def end(error: UserError) -> None:
    """End this process, whose main thread may wait in C++ for ever."""
    os._exit(report(error))


@contextmanager
def heartbeat(rank: int, num_processes: int, *, lost: Callable[[UserError], None] = end) -> Iterator[None]:
    """Let others know that this process lives, and watch the next one, as long as the block lasts.

    Args:
        lost: called, in another thread, when nothing more is heard of it.
    """
    if num_processes == 1:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(rank, num_processes, over, lost), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * BEAT_S)
    with suppress(RuntimeError):  # the process that has the store may have ended already
        _store().set(key(rank), ENDED)  # not after an error: others that wait on are to miss this process


def _store() -> Store:
    """Connect to what all processes of the run met at; raises a RuntimeError if it does not answer."""
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(place, port, is_master=False, timeout=timedelta(seconds=BEAT_S), wait_for_workers=False)


def _beat(rank: int, num_processes: int, over: threading.Event, lost: Callable[[UserError], None]) -> None:
    next_rank, store, last, silent = (rank + 1) % num_processes, None, b"", 0
    for number in range(2**63):
        said = last
        try:
            store = store or _store()
            store.set(key(rank), f"{platform.node()}, beat {number}")
            said = store.get(key(next_rank))
        except RuntimeError:
            store = None  # a late answer would be taken for that to the next question
        silent = silent + 1 if said == last != ENDED else 0
        last = said
        if silent == SILENT_BEATS:
            missed = f"process {next_rank} ({last.decode()})" if store else f"{os.environ['MASTER_ADDR']}, at which all meet,"
            lost(
                UserError(
                    f"{missed} has not been heard of for {SILENT_BEATS * BEAT_S:.0f} s: it hangs, or its machine or "
                    "network is gone; see to that machine, then start the same command again with resume=auto",
                    everywhere=False,
                )
            )
            return
        if over.wait(BEAT_S):
            return
