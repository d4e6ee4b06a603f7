"""Runs that cannot be lost: killed at any operation on files or at any time, on disks and machines that fail.

In the default suite a sample of each; `make faults` takes all. What is drawn is drawn by `SEED`.
"""

import errno
import random
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import psutil
import pytest
from file_layer import TAKES_SPACE, Disk, Fault, Operation, Tree
from trainings import STEPS, TRAININGS, differences, intact, outcome, read_tree, without_clocks, write_tree
from workshop import LARGE, PARTS, SEED, Tally, Workshop, drawn

Report = Callable[[str, object], None]

ALONE = [name for name, training in TRAININGS.items() if training.num_processes == 1]
SAMPLED = {name: (2, 10_000) if name in ALONE else (1, 60) for name in TRAININGS}
"""How many states of the disk are gone on from: in the default suite, and by `make faults`, of one process all."""

parts = pytest.mark.parametrize("part", PARTS)
each = pytest.mark.parametrize("name", TRAININGS if LARGE else ALONE)
each_alone = pytest.mark.parametrize("name", ALONE)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("faults"))


@each
@pytest.mark.parametrize("place", ["recorded", "resumed"])
def test_the_file_layer_changes_nothing_and_misses_nothing(name: str, place: str, workshop: Workshop) -> None:
    recorder, seen = (workshop.recording if place == "recorded" else workshop.resumption)(name)
    left = read_tree(workshop.folder / name / place / "work")
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
@pytest.mark.parametrize("resumed", [False, True])
def test_once_there_is_an_intact_checkpoint_there_always_is_one(
    name: str, resumed: bool, workshop: Workshop
) -> None:
    recorder, _ = (workshop.resumption if resumed else workshop.recording)(name)
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
    states = workshop.states(name, lambda recorder: recorder.killed.values())
    tally = Tally()
    for operation, tree in drawn(states, *SAMPLED[name], part=part, what="killed"):
        tally.attempt(operation, partial(workshop.resume, name, f"killed-{tally.tried}", tree))
    tally.end(record_property, f"{name}: killed at an operation on files")


@parts
@each
def test_a_run_goes_on_from_what_a_power_failure_at_any_operation_leaves(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    states = workshop.states(name, lambda recorder: recorder.unpowered.values())
    tally = Tally()
    for operation, tree in drawn(states, *SAMPLED[name], part=part, what="unpowered"):
        tally.attempt(operation, partial(workshop.resume, name, f"unpowered-{tally.tried}", tree))
    tally.end(record_property, f"{name}: power failed at an operation on files")


# Disks that fail


def survive_failure(workshop: Workshop, name: str, place: str, fault: Fault) -> None:
    """Hold that a run whose disk fails ends in one line, or properly, and goes on when the disk is well."""
    write_tree(workshop.folder / name / place / "work", {})
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
    for operation in drawn(operations, 1, 100, part=part, what=f"failing {number}"):
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
    seconds = workshop.seconds(name)
    tally = Tally()
    for number in drawn(range(1000), 1, 24, part=part, what=f"{name} moments"):
        rng = random.Random(f"{SEED} {name} {number}")
        delays = [rng.uniform(0, seconds) for _ in range(rng.randint(1, 3))]
        trial = partial(survive_kills, workshop, name, f"moments-{number}", delays)
        tally.attempt(delays, trial, times=len(delays))
    tally.end(record_property, f"{name}: killed at random moments")


def survive_kill_of_one(workshop: Workshop, name: str, place: str, rank: int, delay: float) -> None:
    run = workshop.run(name, place)
    time.sleep(delay)
    run.processes[rank].kill()
    run.wait()
    workshop.resume(name, place)


@pytest.mark.parametrize("rank", range(2) if LARGE else [1])
def test_a_run_of_two_processes_of_which_one_is_killed_goes_on(
    rank: int, workshop: Workshop, record_property: Report
) -> None:
    seconds = workshop.seconds("two-processes")
    tally = Tally()
    for number in drawn(range(1000), 1, 8, what=f"one of two {rank}"):
        delay = seconds * random.Random(f"{SEED} {rank} {number}").random()
        trial = partial(survive_kill_of_one, workshop, "two-processes", f"one-{rank}-{number}", rank, delay)
        tally.attempt(delay, trial)
    tally.end(record_property, f"two-processes: process {rank} killed alone")


# Requests to stop


def but_older_checkpoints(path: str) -> bool:
    """Whether a file is in no checkpoint: which are kept depends on where a run was stopped, and saved."""
    return "/checkpoints/step-" not in path


def survive_stop(workshop: Workshop, name: str, place: str, number: int, delay: float) -> None:
    """Hold that a run which a signal stops has saved its last update, says so by its exit code, and goes on."""
    run = workshop.run(name, place)
    time.sleep(delay)
    run.kill(number)
    codes = set(run.wait())
    tree = read_tree(run.folder)
    steps = [record["step"] for record in without_clocks(cast(bytes, tree.get("run/metrics.jsonl", b"")))]
    if not steps or steps[-1] in (0, STEPS):  # before the first update or after the last there is nothing to save
        assert codes <= {0, -number, 128 + number}, (codes, run.errors())
    else:
        assert (codes, run.errors()) == ({128 + number}, [])
        assert tree["run/checkpoints/last"] == f"step-{steps[-1]:08d}"
    workshop.resume(name, place, but=but_older_checkpoints)


@parts
@each
def test_a_run_that_a_signal_stops_at_any_moment_has_saved_its_last_update(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    seconds = workshop.seconds(name)
    tally = Tally()
    for number in drawn(range(1000), 1, 16, part=part, what=f"{name} stops"):
        rng = random.Random(f"{SEED} {name} {number} stop")
        asked = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
        delay = seconds * rng.uniform(0.3, 0.9)
        trial = partial(survive_stop, workshop, name, f"stop-{number}", asked, delay)
        tally.attempt((asked.name, delay), trial)
    tally.end(record_property, f"{name}: stopped by a signal")


# What else may happen to a run


def survive_flips(workshop: Workshop, name: str, place: str, tree: Tree, rng: random.Random) -> None:
    """Hold that a run whose newest checkpoint is damaged sets it aside and goes on from the one before."""
    checkpoints = sorted({path.split("/")[2] for path in tree if path.startswith("run/checkpoints/step-")})
    newest = checkpoints[-1]
    file = rng.choice([path for path in tree if f"/{newest}/" in path])
    content = bytearray(cast(bytes, tree[file]))
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    workshop.resume(name, place, {**tree, file: bytes(content)}, but=lambda path: "/damaged-" not in path)
    damaged = workshop.folder / name / place / "work" / "run" / "checkpoints" / f"damaged-{newest}"
    assert damaged.is_dir(), f"{file}: the flipped bit was not noticed"


@parts
@each_alone
def test_a_flipped_bit_in_the_newest_checkpoint_costs_that_checkpoint_alone(
    name: str, part: int, workshop: Workshop, record_property: Report
) -> None:
    recorder, _ = workshop.recording(name)
    tensors = workshop.tensors(name)
    several = [tree for _, tree in recorder.killed.values() if len(intact(tree, tensors)) >= 2]
    tally = Tally()
    for number in drawn(range(1000), 1, 40, part=part, what=f"{name} flips"):
        rng = random.Random(f"{SEED} {name} {number} flip")
        trial = partial(survive_flips, workshop, name, f"flip-{number}", rng.choice(several), rng)
        tally.attempt(number, trial)
    tally.end(record_property, f"{name}: a bit flipped in the newest checkpoint")


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(workshop: Workshop) -> None:
    first = workshop.run("pretraining", "shared")
    while not (first.folder / "run" / "metrics.jsonl").exists():
        assert first.processes[0].is_alive()
        time.sleep(0.01)
    second = workshop.run("pretraining", "shared", output="second")
    assert second.wait() == [2]
    (line,) = second.errors()
    assert line.startswith("error: output=run: in use by process ")
    assert first.wait() == [0]
    assert not differences(outcome(read_tree(first.folder)), workshop.undisturbed("pretraining"))


class KillWorkers:
    """Kills the loader's workers once three updates are recorded, each in two writes, and the run saves."""

    def watch(self, disk: Disk, operation: Operation) -> None:
        if (operation.kind, operation.path, operation.number) == ("write", "run/metrics.jsonl", 6):
            for worker in psutil.Process().children():
                worker.kill()


def test_a_run_whose_loader_worker_is_killed_ends_in_one_line_and_goes_on(workshop: Workshop) -> None:
    run = workshop.run("classification", "worker", watcher=KillWorkers())
    assert run.wait() == [2]
    (line,) = run.errors()
    assert line.startswith("error: data.num_workers=1: ")
    workshop.resume("classification", "worker")
