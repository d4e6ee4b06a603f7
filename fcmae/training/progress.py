"""Progress of a run on the terminal, a bar or lines, by updates and by time; knows no training or devices."""

import dataclasses
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Self, TextIO

from tqdm import tqdm

from fcmae.training.schedule import times_due

QUIET_S = 30.0
"""Longest time without a word before the first record; ten times that after it."""


def fits_a_bar(stream: TextIO) -> bool:
    """Whether a stream is a terminal of some width: some, as of continuous integration, say that theirs is 0."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


@contextmanager
def unless_hung_up() -> Iterator[None]:
    """Write to a terminal that may have gone: no reason to end a run, which SIGHUP is about to ask to save."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def duration(seconds: float) -> str:
    """Write a time span as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


@dataclasses.dataclass
class Occasion:
    """What is done between updates now and then, such as evaluation, and the time it has taken so far."""

    every: int
    step: int
    """Up to which it has been done."""
    number: int = 0
    seconds: float = 0.0


class Progress:
    """A progress bar (tqdm) on standard error, or lines on standard output where that is no terminal.

    A thread says where the run stands when nothing has been printed for `QUIET_S`, whatever is computed meanwhile:
    it knows only the clock and what `reach` was given, so it waits for no device and no other process.

    Args:
        total: updates of the whole run.
        shown: whether this process prints at all.
        clock: seconds, from any start.
    """

    def __init__(self, total: int, *, shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.shown, self.clock = total, shown, clock
        self.done = 0.0
        """Updates made; within one, the share of its micro-batches."""
        self.pace_s: float | None = None
        """Seconds an update takes, without what is done between updates."""
        self.occasions: dict[str, Occasion] = {}
        self._bar: tqdm[Any] | None = None
        self._doing = ("the first update", clock())
        self._quiet_s = QUIET_S
        self._printed = clock()
        self._measured = False
        self._measure_from(0.0)
        self._over = threading.Event()

    # What the run reports

    def begin(self, step: int) -> None:
        """Start from an update on."""
        self._measure_from(float(step))
        self._doing = "the first update", self.clock()

    def reach(self, done: float) -> None:
        """Take note that so many updates are made, micro-batches counting in part."""
        now = self.clock()
        self.pace_s = (now - self._since - self._between_s) / (done - self._since_done)
        self._doing = "", now
        if self._measured:
            self.done = done
        else:  # the first includes the compilation of kernels and the start of workers
            self._measured = True
            self._measure_from(done)

    @contextmanager
    def between(self, what: str, every: int) -> Iterator[None]:
        """Measure what is done between updates, every so many of them."""
        before, started = self._doing, self.clock()
        self._doing = what, started
        yield
        self._doing = before
        seconds = self.clock() - started
        self._between_s += seconds
        occasion = self.occasions.setdefault(what, Occasion(every, 0))
        occasion.step = int(self.done)
        occasion.number += 1
        occasion.seconds += seconds

    def _measure_from(self, done: float) -> None:
        self.done = self._since_done = done
        self._since = self.clock()
        self._between_s = 0.0

    # What it says

    @property
    def left_s(self) -> float | None:
        """Seconds until the end: updates, and what will be done between them for as long as it took so far."""
        if self.pace_s is None:
            return None
        between = sum(
            occasion.seconds / occasion.number * times_due(occasion.step, occasion.every, self.total)
            for occasion in self.occasions.values()
        )
        return self.pace_s * (self.total - self.done) + between

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.shown:
            self._printed = self.clock()
            with unless_hung_up():
                tqdm.write(text)
                sys.stdout.flush()

    def record(self, place: Sequence[str], figures: Sequence[str]) -> None:
        """Show figures, in the bar or on a line that begins with `place`, and the time that is left."""
        left = self.left_s or 0.0
        finish = datetime.now() + timedelta(seconds=left)
        clock = finish.strftime("%H:%M" if left < 80_000 else "%a %d %b %H:%M")
        self._show(place, [*figures, f"{duration(left)} left", f"done {clock}"])
        self._quiet_s = 10 * QUIET_S
        self._measure_from(self.done)

    def tick(self) -> None:
        """Say where the run stands if nothing has been printed for long."""
        now = self.clock()
        if now - self._printed < self._quiet_s:
            return
        part = self.done % 1
        place = [f"step {int(self.done)}/{self.total}" + (f" and {part:.0%} of the next" if part else "")]
        figures = [f"{self.done / self.total:.2%} done"]
        what, since = self._doing
        if what:
            figures.append(f"{what} for {duration(now - since)}")
        if self.pace_s is not None and (left := self.left_s) is not None:
            figures += [f"{self.pace_s:.3g} s an update", f"{duration(left)} left"]
        self._show(place, figures)

    def _show(self, place: Sequence[str], figures: Sequence[str]) -> None:
        if self._bar is None:
            self.say(" · ".join([*place, *figures]))
        else:
            self._printed = self.clock()
            with unless_hung_up():
                self._bar.set_description_str(" ".join(figures))

    def advance_bar(self) -> None:
        """Move the bar, where there is one, to the updates made."""
        if self._bar is not None:
            with unless_hung_up():
                self._bar.update(int(self.done) - self._bar.n)

    # While the run goes on

    def _watch(self) -> None:
        with suppress(OSError):  # whoever read the output has gone, as the run itself will notice
            while not self._over.wait(1.0):
                self.tick()

    def __enter__(self) -> Self:
        if self.shown:
            if fits_a_bar(sys.stderr):
                self._bar = tqdm(
                    total=self.total,
                    initial=int(self.done),
                    bar_format="{desc} |{bar}|{n_fmt}/{total_fmt}",
                    dynamic_ncols=True,
                )
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._over.set()
            self._thread.join()
            if self._bar is not None:
                self._bar.close()
                self._bar = None
