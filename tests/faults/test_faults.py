"""Runs that cannot be lost: killed at any operation on files or at any time, on disks and machines that fail.

In the default suite a sample of each; `make faults` takes all. What is drawn is drawn by `SEED`.
"""

import errno
import random
import time
from collections.abc import Callable, Iterable
from functools import partial

import pytest
from file_layer import TAKES_SPACE, Fault
from trainings import TRAININGS, differences, intact, outcome, read_tree
from workshop import PARTS, SEED, Tally, Workshop, drawn

Report = Callable[[str, object], None]

ALONE = [name for name, training in TRAININGS.items() if training.num_processes == 1]
parts = pytest.mark.parametrize("part", PARTS)
each = pytest.mark.parametrize("name", TRAININGS)
each_alone = pytest.mark.parametrize("name", ALONE)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("faults"))


@each
def test_the_file_layer_changes_nothing_and_misses_nothing(name: str, workshop: Workshop) -> None:
    recorder, seen = workshop.recording(name)
    left = read_tree(workshop.folder / name / "recorded" / "work")
    assert not differences(outcome(left), workshop.undisturbed(name))
    assert not differences(seen, left), "something was written past the layer"
    assert {operation.kind for operation in recorder.operations} >= {
        "create",
        "write",
        "sync",
        "rename",
        "link",
        "remove",
    }


# States of the disk


@each
def test_once_there_is_an_intact_checkpoint_there_always_is_one(name: str, workshop: Workshop) -> None:
    recorder, _ = workshop.recording(name)
    tensors = workshop.tensors(name)
    seen = [(operation, bool(intact(tree, tensors))) for operation, tree in recorder.killed.values()]
    first = [has for _, has in seen].index(True)
    assert not [operation for operation, has in seen[first:] if not has], "seen by processes"

    left = {key: bool(intact(tree, tensors)) for key, (_, tree) in recorder.unpowered.items()}
    synced = [left[keys[0]] for _, keys in recorder.history]
    assert True in synced, "no checkpoint was ever synced"
    later = recorder.history[synced.index(True) :]
    assert not [operation for operation, keys in later if not all(left[key] for key in keys)], (
        "after a power failure"
    )


@parts
@each
def test_a_run_goes_on_from_what_a_kill_at_any_operation_leaves(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    recorder, _ = workshop.recording(name)
    tally = Tally()
    for operation, tree in drawn(recorder.killed.values(), 5 if name in ALONE else 1, part=part, what="killed"):
        tally.attempt(operation, partial(workshop.resume, name, f"killed-{tally.tried}", tree))
    tally.end(record_property, f"{name}: killed at an operation on files")


@parts
@each
def test_a_run_goes_on_from_what_a_power_failure_at_any_operation_leaves(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    recorder, _ = workshop.recording(name)
    tally = Tally()
    for operation, tree in drawn(
        recorder.unpowered.values(), 5 if name in ALONE else 1, part=part, what="unpowered"
    ):
        tally.attempt(operation, partial(workshop.resume, name, f"unpowered-{tally.tried}", tree))
    tally.end(record_property, f"{name}: power failed at an operation on files")


# Disks that fail


def survive_failure(workshop: Workshop, name: str, place: str, fault: Fault) -> None:
    """Hold that a run whose disk fails ends in one line, or properly, and goes on when the disk is well."""
    run = workshop.run(name, place, watcher=fault)
    codes = run.wait()
    fault, _ = run.seen()
    assert fault.met, "the operation never came"
    lines = run.errors()
    if codes == [0]:
        assert not lines, lines
    else:
        assert codes == [2], f"exit code {codes}: {lines}"
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
    workshop.resume(name, place)


@parts
@each_alone
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_operation_ends_the_run_in_one_line(
    name: str, number: int, part: int, workshop: Workshop, record_property: Report
) -> None:
    recorder, _ = workshop.recording(name)
    lasting = number == errno.ENOSPC
    operations = [found for found in recorder.operations if not lasting or found.kind in TAKES_SPACE]
    tally = Tally()
    for operation in drawn(operations, 2, part=part, what=f"failing {number}"):
        fault = Fault(operation, number, lasting=lasting)
        place = f"failing-{number}-{tally.tried}"
        tally.attempt(operation, partial(survive_failure, workshop, name, place, fault))
    tally.end(record_property, f"{name}: {errno.errorcode[number]} at an operation on files")


# Kills


def survive_kills(workshop: Workshop, name: str, place: str, delays: Iterable[float]) -> None:
    for delay in delays:
        run = workshop.run(name, place)
        time.sleep(delay)
        run.kill()
        run.wait()
    workshop.resume(name, place)


@parts
@each
def test_a_run_killed_at_any_moment_and_again_goes_on_as_if_nothing_had_happened(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    started = time.monotonic()
    workshop.finish(name, "timed")
    seconds = time.monotonic() - started
    tally = Tally()
    for number in drawn(range(1000), 2 if name in ALONE else 1, 24, part=part, what=f"{name} moments"):
        rng = random.Random(f"{SEED} {name} {number}")
        delays = [rng.uniform(0, seconds) for _ in range(rng.randint(1, 3))]
        trial = partial(survive_kills, workshop, name, f"moments-{number}", delays)
        tally.attempt(delays, trial, times=len(delays))
    tally.end(record_property, f"{name}: killed at random moments")
