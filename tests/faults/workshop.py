"""Undisturbed runs, to compare others with; how much is tried, and a count of it; knows no faults."""

import os
import random
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from file_layer import Operation, Recorder, Tree
from trainings import STEPS, TRAININGS, Run, differences, make_images, outcome, read_tree, write_tree

T = TypeVar("T")

States = Iterable[tuple[Operation, Tree]]

LARGE = "FCMAE_FAULTS" in os.environ
"""Whether `make faults` runs."""

SEED = int(os.environ.get("FCMAE_FAULTS") or 0)
"""Of all that is drawn; `make faults SEED=...` sets it."""

PARTS = range(8 if LARGE else 1)
"""In which the large tests are cut, for several processes of pytest."""


def drawn(things: Iterable[T], few: int, many: float = float("inf"), *, part: int = 0, what: str = "") -> list[T]:
    """Return `few` of the things, or by `make faults` this part of `many`."""
    pool = list(things)
    random.Random(f"{SEED} {what}").shuffle(pool)
    number = int(min(many if LARGE else few, len(pool)))
    return pool[:number][part :: len(PARTS)]


class Workshop:
    """Starts trainings, and has what undisturbed ones left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        make_images(self.data)
        self.undisturbed = cache(self._undisturbed)
        self.recording = cache(self._recording)
        self.resumption = cache(self._resumption)
        self.tensors = cache(self._tensors)
        self._seconds: dict[str, float] = {}

    def run(self, name: str, place: str, *words: str, **options: Any) -> Run:
        return Run(TRAININGS[name], self.folder / name / place, self.data, *words, **options)

    def finish(self, name: str, place: str, *words: str) -> Run:
        run = self.run(name, place, *words)
        codes = run.wait(300)
        assert (set(codes), run.errors()) == ({0}, []), run.place
        return run

    def _undisturbed(self, name: str) -> dict[str, Any]:
        started = time.monotonic()
        folder = self.finish(name, "undisturbed").folder
        self._seconds[name] = time.monotonic() - started
        return outcome(read_tree(folder))

    def _recording(self, name: str) -> tuple[Recorder, Tree]:
        return self._record(name, "recorded", {})

    def _resumption(self, name: str) -> tuple[Recorder, Tree]:
        """As `recording`, of a run that goes on after another was killed while it wrote its last checkpoint."""
        recorder, _ = self.recording(name)
        trees = [tree for _, tree in recorder.killed.values()]
        last = f"run/checkpoints/.writing-step-{STEPS:08d}-"
        (*_, unfinished) = (tree for tree in trees if any(path.startswith(last) for path in tree))
        return self._record(name, "resumed", unfinished)

    def states(self, name: str, of: Callable[[Recorder], States]) -> list[tuple[Operation, Tree]]:
        """What a run and its resumption may leave."""
        return [state for recorder, _ in (self.recording(name), self.resumption(name)) for state in of(recorder)]

    def _record(self, name: str, place: str, tree: Tree) -> tuple[Recorder, Tree]:
        write_tree(self.folder / name / place / "work", tree)
        run = self.run(name, place, watcher=Recorder(SEED, fates_drawn=2 if LARGE else 1))
        assert run.wait(600) == [0] * len(run.processes), run.errors()
        return run.seen()

    def seconds(self, name: str) -> float:
        """How long a run takes."""
        self.undisturbed(name)
        return self._seconds[name]

    def _tensors(self, name: str) -> dict[str, dict[str, bytes]]:
        """The tensors of each step's checkpoint as they were when it got its name, by folder and file."""
        recorder, _ = self.recording(name)
        found: dict[str, dict[str, bytes]] = {}
        for _, tree in recorder.killed.values():
            for path, content in tree.items():
                folder, _, file = path.rpartition("/")
                if "/checkpoints/step-" in path and file.endswith(".safetensors") and isinstance(content, bytes):
                    found.setdefault(folder, {}).setdefault(file, content)
        return found

    def resume(self, name: str, place: str, tree: Tree | None = None, *, but: Callable[[str], bool] = bool) -> None:
        """Hold that a run which goes on from `tree`, or as it lies there, ends as the undisturbed one.

        Args:
            but: names of files that need not be alike are those for which it is false.
        """
        if tree is not None:
            write_tree(self.folder / name / place / "work", tree)
        run = self.finish(name, place)
        found, expected = (
            {k: v for k, v in o.items() if but(k)} for o in (outcome(read_tree(run.folder)), self.undisturbed(name))
        )
        assert not differences(found, expected), f"{run.place}: {differences(found, expected)}"


class Tally:
    """Counts what was tried and survived, and keeps what was not, so that the first failure hides no other."""

    def __init__(self) -> None:
        self.tried = 0
        self.failed: list[str] = []

    def attempt(self, what: object, trial: Callable[[], object], *, times: int = 1) -> None:
        self.tried += times
        try:
            trial()
        except (AssertionError, TimeoutError) as error:
            self.failed += [f"{what}: {error}"] * times

    def end(self, report: Callable[[str, object], None], what: str) -> None:
        """Report the numbers to the summary; fail if something failed."""
        report("tally", (what, self.tried - len(self.failed), self.tried))
        assert not self.failed, f"seed {SEED}: {len(self.failed)} of {self.tried}\n" + "\n".join(self.failed)
