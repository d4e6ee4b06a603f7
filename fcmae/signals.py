"""The signals that ask a run to stop, and processes beside it that leave them to it; knows no runs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)
)
"""Of schedulers, launchers and terminals; Windows has some of them."""


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold back these signals from this thread; a process started inside begins so, until `ignore_stop_signals`."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(*_: object) -> None:
    """Leave these signals, which schedulers send to all processes, to the one that this one works for."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
