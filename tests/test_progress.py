"""Progress on the terminal: by time where updates are long, as a bar only where one fits, what it counts."""

import fcntl
import os
import pty
import struct
import termios
import threading
from datetime import timedelta

import pytest

from fcmae.training.progress import QUIET_S, Progress, fits_a_bar


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(100, clock=clock)


def shown(progress: Progress, capsys: pytest.CaptureFixture[str]) -> str:
    progress.tick()
    return capsys.readouterr().out


def test_a_line_comes_after_every_half_minute_of_silence_within_the_first_update_too(
    progress: Progress, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.now += QUIET_S - 1
    assert shown(progress, capsys) == ""
    clock.now += 1
    assert shown(progress, capsys) == "step 0/100 · 0.00% done · the first update for 0:00:30\n"
    assert shown(progress, capsys) == ""
    progress.reach(1 / 8)
    clock.now += 30
    line = shown(progress, capsys)
    assert line.startswith("step 0/100 and 12% of the next · 0.12% done · 240 s an update · ")


def test_any_other_line_counts_as_a_sign_of_life(
    progress: Progress, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.now += QUIET_S
    progress.say("step 0 · k-NN")
    assert shown(progress, capsys) == "step 0 · k-NN\n"


def test_once_records_come_lines_by_time_are_rarer(
    progress: Progress, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.now += 5
    progress.reach(1)
    progress.record(["step 1/100"], ["loss 1.0000"])
    assert capsys.readouterr().out.startswith("step 1/100 · loss 1.0000 · 0:08:15 left · done ")
    clock.now += 9 * QUIET_S
    assert shown(progress, capsys) == ""
    clock.now += QUIET_S
    assert "5 s an update" in shown(progress, capsys)


def test_time_left_counts_what_is_done_between_updates_for_as_long_as_it_took(
    progress: Progress, clock: Clock
) -> None:
    assert progress.left_s is None
    with progress.between("pictures", 50):
        clock.now += 7
    for step in range(1, 41):
        clock.now += 2
        progress.reach(step)
        if step % 20 == 0:
            with progress.between("evaluation", 20):
                clock.now += 11
    # 60 updates, evaluations after 60, 80 and 100, pictures after 50 and 100
    assert progress.left_s == pytest.approx(60 * 2 + 3 * 11 + 2 * 7)
    progress.record([], [])
    clock.now += 3  # slower now
    progress.reach(41)
    assert progress.left_s == pytest.approx(59 * 3 + 3 * 11 + 2 * 7)


def test_the_compilation_in_the_first_update_is_no_measure_for_the_others(progress: Progress, clock: Clock) -> None:
    clock.now += 60
    progress.reach(1)
    clock.now += 2
    progress.reach(2)
    assert progress.pace_s == pytest.approx(2)


def test_a_resumed_run_measures_its_own_updates(progress: Progress, clock: Clock) -> None:
    progress.begin(90)
    clock.now += 4
    progress.reach(91)
    assert progress.left_s == pytest.approx(9 * 4)


def test_what_is_done_between_updates_is_named_while_it_lasts(
    progress: Progress, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.reach(1 + clock.now * 0)
    with progress.between("evaluation", 20):
        clock.now += 45
        assert f"evaluation for {timedelta(seconds=45)}" in shown(progress, capsys)


def test_a_process_beside_the_main_one_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    other = Progress(100, shown=False, clock=clock)
    with other:
        clock.now += 100
        other.say("a line")
        other.reach(1)
        other.record(["step"], ["loss"])
        other.tick()
    assert capsys.readouterr() == ("", "")


def test_a_run_that_computes_is_watched(progress: Progress, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ticked = threading.Event()
    monkeypatch.setattr(progress, "tick", ticked.set)
    with progress:
        assert ticked.wait(250)
    assert "progress" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("columns", "fits"), [(80, True), (0, False)])
def test_a_bar_is_for_terminals_that_have_a_width(columns: int, fits: bool) -> None:
    ends = pty.openpty()
    fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(ends[1], "w") as terminal:
        assert fits_a_bar(terminal) == fits
    os.close(ends[0])


def test_no_bar_is_for_files_and_what_is_closed(tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "log"), "w") as file:
        assert not fits_a_bar(file)
    assert not fits_a_bar(file)
