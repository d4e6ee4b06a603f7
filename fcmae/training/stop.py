"""When a run stops before its end: signals, hours, and its processes' agreement on the step; knows no training."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

import psutil
import torch
import torch.distributed

from fcmae.signals import STOP_SIGNALS

OUT_OF_TIME = 75
"""Exit code after `train.max_hours`: EX_TEMPFAIL of BSD's sysexits.h, "the user is invited to retry"."""

AGAIN_S = 2.0
"""A signal this long after the first is a second one; schedulers and launchers both send what is one request."""


class Stopped(SystemExit):
    """The run has saved its state and stopped, as it was asked to; its exit code says by whom."""


def describe(code: int) -> str:
    """Say by what a run was stopped that ends with this exit code."""
    return "train.max_hours" if code == OUT_OF_TIME else signal.Signals(code - 128).name


class Agreement:
    """The largest of what the processes say once per update, known to all an update later, so that none waits.

    It goes from processor to processor (gloo): no process waits for its GPU.
    """

    def __init__(self, num_processes: int) -> None:
        self.group: Any = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None
        self.number = torch.zeros((), dtype=torch.int32)
        self.work: Any = None

    def said(self) -> int:
        """Return what was said last, once all have."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.number)

    def largest(self, number: int) -> int:
        """Say a number, on all processes; returns the largest of the last update's, or of one process its own."""
        if self.group is None:
            return number
        before = self.said()
        self.number.fill_(number)
        most = torch.distributed.ReduceOp.MAX
        self.work = torch.distributed.all_reduce(self.number, most, group=self.group, async_op=True)
        return before


class StopRequests:
    """Takes signals, and the end of the run's hours, as requests to stop, as long as its block lasts.

    A second signal ends the process at once, whatever it computes or waits for. Signals that were ignored stay so,
    as by nohup; outside Python's main thread none can be taken.

    Args:
        say: takes a line about the first signal.
        max_hours: of this process, from its start; None for no end.
        num_processes: that are to agree.
    """

    def __init__(self, *, say: Callable[[str], None], max_hours: float | None, num_processes: int) -> None:
        self.say = say
        self.code = 0
        """Exit code that the first signal to this process asks for."""
        self.deadline = float("inf")
        if max_hours is not None:
            self.deadline = psutil.Process().create_time() + 3600 * max_hours - time.time() + time.monotonic()
        self.agreement = Agreement(num_processes)
        self.before: Mapping[int, Any] = {}

    def asked(self) -> int:
        """Return the exit code to stop with, or 0; called on all processes once per update, the same on all."""
        return self.agreement.largest(self.code or OUT_OF_TIME * (time.monotonic() > self.deadline))

    # A thread hears the signals: the main one may wait for others in C++, which Python's handlers would wait for.

    def _listen(self) -> None:
        first = 0.0
        while number := self.reader.recv(1)[0]:
            if number not in self.before:  # of a child's end, for instance
                continue
            if self.code and time.monotonic() - first > AGAIN_S:
                os._exit(128 + number)
            if not self.code:
                first = time.monotonic()
                self.code = 128 + number
                with suppress(OSError, ValueError):  # whoever read the output has gone, or it was closed
                    _leave_terminal(number)
                    self.say(
                        f"{describe(self.code)}: stopping after this update; a second signal ends the run at once"
                    )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            others = signal.SIG_IGN, None  # None: a handler of another library's, not in Python
            self.before = {number: handler for number, handler in handlers.items() if handler not in others}
        if self.before:
            self.reader, self.writer = socket.socketpair()  # for a pipe waits on Windows
            self.writer.setblocking(False)
            self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self.thread.start()
            self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            for number in self.before:
                signal.signal(number, _do_nothing)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.before:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.wakeup)
            self.writer.send(b"\0")
            self.thread.join()
            self.reader.close()
            self.writer.close()
            self.before = {}
        if kind is None or issubclass(kind, Stopped):
            self.agreement.said()  # or it would go on while the processes end


def _do_nothing(*_: object) -> None:
    """Handle a signal in Python, so that its number is written for the thread that listens."""


def _leave_terminal(number: int) -> None:
    """Write nowhere after the terminal has gone, which SIGHUP says: a line would raise, and nothing be saved."""
    if describe(128 + number) == "SIGHUP":
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and os.isatty(stream.fileno()):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
