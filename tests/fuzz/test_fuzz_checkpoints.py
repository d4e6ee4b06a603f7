"""Checkpoint folders that a disk or a person changed: an older one is taken, or one line says why not."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import fuzzed
from hypothesis import example, given
from hypothesis import strategies as st
from small_runs import outcome, small_config, small_run, stop_after

from fcmae.errors import UserError
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, STATE, SUMS
from fcmae.training.run_folder import stored_model

pytestmark = pytest.mark.timeout(3600)

NAMES = (MODEL, OPTIMIZER, EMA, STATE, SUMS)
STEPS = (2, 4, 6)
T = TypeVar("T")
Change = Callable[[Path], None]
"""Takes the folder of checkpoints."""


def flip(step: int, name: str, place: float, bit: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / f"step-{step:08d}" / name
        content = bytearray(path.read_bytes())
        if content:
            content[int(place * len(content))] ^= 1 << bit
        path.write_bytes(content)

    return change


def truncate(step: int, name: str, place: float) -> Change:
    def change(folder: Path) -> None:
        path = folder / f"step-{step:08d}" / name
        os.truncate(path, int(place * path.stat().st_size))

    return change


def delete(step: int, name: str) -> Change:
    return lambda folder: (folder / f"step-{step:08d}" / name).unlink()


def swap(steps: list[int], names: list[str]) -> Change:
    def change(folder: Path) -> None:
        first, second = (folder / f"step-{step:08d}" / name for step, name in zip(steps, names, strict=True))
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

    return change


def put(source: int, target: int) -> Change:
    """A folder under the name of another step."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / f"step-{target:08d}", ignore_errors=True)
        shutil.copytree(folder / f"step-{source:08d}", folder / f"step-{target:08d}")

    return change


def empty(step: int) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / f"step-{step:08d}")
        (folder / f"step-{step:08d}").mkdir()

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


steps, names, places = st.sampled_from(STEPS), st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True)
changes = st.one_of(
    st.builds(flip, steps, names, places, st.integers(0, 7)),
    st.builds(truncate, steps, names, places),
    st.builds(delete, steps, names),
    st.builds(swap, st.lists(steps, min_size=2, max_size=2), st.lists(names, min_size=2, max_size=2)),
    st.builds(put, steps, st.sampled_from((*STEPS, 9, 10**9))),
    st.builds(empty, steps),
    st.builds(link, st.sampled_from(("last", "best")), st.sampled_from(("step-00000002", "nowhere", "last"))),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, with a checkpoint at each of its evaluations."""
    folder = tmp_path_factory.mktemp("undisturbed")
    small_run(small_config(folder, checkpoint={"keep": 9}))
    return folder


@contextmanager
def stopped(undisturbed: Path) -> Iterator[Path]:
    """The run as a kill left it after step 6."""
    with tempfile.TemporaryDirectory() as folder:
        yield stop_after(undisturbed, STEPS[-1], Path(folder) / "run")


def applied(change: list[Change], folder: Path) -> None:
    for one in change:
        try:
            one(folder)
        except (FileNotFoundError, NotADirectoryError):  # what it would have changed has gone already
            continue


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what a call does, or the one line in which it ends."""
    try:
        return call(), None
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return None, line


def listing(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@fuzzed(30, 500)
@given(st.lists(changes, min_size=1, max_size=4))
def test_a_run_with_changed_checkpoints_ends_as_the_undisturbed_one_or_in_one_line(
    undisturbed: Path, change: list[Change]
) -> None:
    with stopped(undisturbed) as run:
        applied(change, run / "checkpoints")
        before = listing(run / "checkpoints")
        _, refused = attempt(lambda: small_run(small_config(run, checkpoint={"keep": 9})))
        if refused is not None:
            assert listing(run / "checkpoints") == before, "nothing renamed, nothing overwritten"
        else:
            assert outcome(run) == outcome(undisturbed)
            for name in ("last", "best"):
                assert stored_model(run / "checkpoints" / name) is not None


@fuzzed(30, 500)
@given(st.lists(changes, min_size=1, max_size=4))
@example([link("last", "last"), link("best", "last")])  # a loop, at which Path.resolve fails
def test_the_model_of_changed_checkpoints_is_one_that_was_saved_or_refused_in_one_line(
    undisturbed: Path, change: list[Change]
) -> None:
    with stopped(undisturbed) as run:
        applied(change, run / "checkpoints")
        before = listing(run)
        found, refused = attempt(lambda: stored_model(run))
        tensors, unread = attempt(found.read) if found else ({}, None)
        if found is not None and unread is None:
            whole = stored_model(undisturbed / "checkpoints" / f"step-{found.step:08d}", ema=found.ema)
            assert whole is not None
            expected = whole.read()
            assert tensors is not None
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
        assert refused is not None or found is not None
        assert listing(run) == before, "readers rename nothing"
