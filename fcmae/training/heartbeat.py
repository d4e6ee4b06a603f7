"""Whether the other processes of a run still live, heard through their store; knows nothing of what they compute.

A process that is killed closes its connections, and those that talk with it end at once. One whose machine or
network is gone does not: others would wait for it as long as a collective may take, half an hour.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from fcmae.errors import UserError, report

BEAT_S = 5.0
"""Time between two beats."""

SILENT_BEATS = 24
"""So many of its own beats a process waits for one of another: two minutes, or more if it is stopped itself."""

ENDED = "ended"


def end(error: UserError) -> None:
    """End this process, whose main thread may wait in C++ for ever."""
    os._exit(report(error))


class Heartbeat:
    """Tells others that this process lives, and listens to the next one, in two threads, as one may wait for ever.

    Args:
        lost: called, in a thread, when nothing more is heard.
    """

    def __init__(self, rank: int, num_processes: int, lost: Callable[[UserError], None]) -> None:
        self.rank, self.next_rank = rank, (rank + 1) % num_processes
        self.lost = lost
        self.heard = 0, ""
        """Number of this process's last beat, and what the next one said then."""
        self.over, self.ended_well = threading.Event(), False
        self.threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self._talk, self._watch)
        ]

    def _talk(self) -> None:
        with suppress(RuntimeError):  # then nothing more is heard
            # a connection of its own, as that of the process group may be waiting
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
            own, other = (f"fcmae/heartbeat/{rank}" for rank in (self.rank, self.next_rank))
            for number in count(1):
                store.set(own, f"{socket.gethostname()}, beat {number}")
                self.heard = number, store.get(other).decode()
                if self.over.wait(BEAT_S):
                    break
            if self.ended_well:  # else others that wait on are to miss this process
                store.set(own, ENDED)

    def _watch(self) -> None:
        news, silent = self.heard, 0
        while silent < SILENT_BEATS:
            if self.over.wait(BEAT_S):
                return
            silent += 1
            now = self.heard
            if now[1] != news[1] or now[1] in (ENDED, ""):  # without a store to meet at nobody is missed
                news, silent = now, 0
        answers = self.heard[0] - news[0]
        who = f"process {self.next_rank} ({news[1]})"
        if answers < SILENT_BEATS / 2:
            who = f"{os.environ['MASTER_ADDR']}, at which all processes meet,"
        self.lost(
            UserError(
                f"{who} has not been heard of for {SILENT_BEATS * BEAT_S:.0f} s: it hangs, or its machine or "
                "network is gone; see to that machine, then start the same command again with resume=auto",
                everywhere=False,
            )
        )


@contextmanager
def heartbeat(rank: int, num_processes: int, *, lost: Callable[[UserError], None] = end) -> Iterator[None]:
    """Let others know that this process lives, and end it if the next one does not, as long as the block lasts."""
    if num_processes == 1:
        yield
        return
    beats = Heartbeat(rank, num_processes, lost)
    for thread in beats.threads:
        thread.start()
    try:
        yield
        beats.ended_well = True
    finally:
        beats.over.set()
        for thread in beats.threads:
            thread.join(2 * BEAT_S)
