"""What a run folder says of its run: settings, records, starts, scores, the log to compare with; only reads."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from fcmae.config import (
    FinetuneConfig,
    FinetuneRecipe,
    PretrainConfig,
    PretrainRecipe,
    find_shipped,
    load_config,
    reference_logs,
)
from fcmae.errors import UserError
from fcmae.plain_yaml import read_yaml
from fcmae.tasks.base import Scores
from fcmae.tasks.known import TASKS
from fcmae.training.checkpoint import State
from fcmae.training.run_folder import RunFolder, changed_keys, newest_state, read_records
from fcmae.training.schedule import Plan
from fcmae.training.watch import Watch

Config = PretrainConfig | FinetuneConfig
Record = Mapping[str, Any]


class Curve(NamedTuple):
    """A figure of the records, where it is finite."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Return the values at other steps, on straight lines between those that are known."""
        return np.interp(steps, self.steps, self.values)


def curve(records: Sequence[Mapping[str, float]], key: str) -> Curve:
    """Return a figure of records by step."""
    points = {record["step"]: record[key] for record in records if key in record}
    steps = sorted(points)
    return Curve(np.array(steps, float), np.array([points[step] for step in steps], float))


@dataclass(frozen=True)
class Reference:
    """The log of a shipped configuration, as measured."""

    name: str
    records: list[Mapping[str, float]]
    differences: list[str]
    """What of the run's settings are others; none where the curves should be alike."""


@dataclass(frozen=True)
class Run:
    """A run, as far as it went."""

    folder: RunFolder
    config: Config
    records: list[Mapping[str, float]]
    starts: list[Record]
    """By which commands, and on what; the first first. None before fcmae 0.2."""
    state: State | None
    """Of the newest checkpoint; None where there is none that can be read."""
    evaluation: Record
    """What `fcmae finetune --evaluate` found; empty before."""
    reference: Reference | None

    @property
    def scores(self) -> type[Scores] | None:
        """What a fine-tuning run is scored by; None for pretraining."""
        return TASKS[self.config.task].scores if isinstance(self.config, FinetuneConfig) else None

    @property
    def step(self) -> int:
        """Updates made, as far as is recorded."""
        return max([*(int(record["step"]) for record in self.records), self.state.step if self.state else 0])

    @property
    def plan(self) -> Plan | None:
        """What was planned; None before the first record, when the number of images is not known."""
        timed = [record for record in self.records if {"epoch", "seen_images"} <= record.keys() and record["step"]]
        if not timed:
            return None
        config, last = self.config, timed[-1]
        images = config.data.batch_size * config.optim.accumulate
        processes = self.state.num_processes if self.state else round(last["seen_images"] / last["step"] / images)
        return Plan.of(config, round(last["seen_images"] / last["epoch"]), max(1, processes))

    @property
    def watch(self) -> Watch | None:
        """What the run itself found in its records; None where `plan` is."""
        if self.plan is None:
            return None
        noted = self.starts[-1].get("cores") if self.starts else None
        used = self.config.data.num_workers  # all that is known of runs from before 0.2
        cores = noted if isinstance(noted, int) else used
        watch = Watch(self.config, self.plan, cores=cores)
        for record in self.records:
            watch.see(record)
        return watch

    def curve(self, key: str) -> Curve:
        return curve(self.records, key)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: if it is none.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path}: no run folder, it has no {folder.config.name}; name the output of a run")
    config = load_config(_kind(folder), folder.config)
    try:
        state = newest_state(folder)
    except UserError:  # damaged checkpoints do not keep the rest from being shown
        state = None
    return Run(
        folder=folder,
        config=config,
        records=read_figures(folder.metrics),
        starts=_read_lines(folder.starts),
        state=state,
        evaluation=_read_evaluation(folder),
        reference=find_reference(config),
    )


def _kind(folder: RunFolder) -> type[Config]:
    """Return what a run's configuration is of: only pretraining hides patches."""
    try:
        values = read_yaml(folder.config.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{folder.config}: {error}; is it a run's?") from error
    model = values.get("model") if isinstance(values, dict) else None
    return PretrainConfig if isinstance(model, dict) and "mask_ratio" in model else FinetuneConfig


def _read_lines(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    lines = read_records(path.read_text(encoding="utf-8", errors="replace"))
    return [line for line in lines if isinstance(line, dict)]


def read_figures(path: Path) -> list[Mapping[str, float]]:
    """Read the records of a metrics.jsonl as far as they are finite numbers; none of a file that is not there."""
    figures: list[Mapping[str, float]] = [
        {key: value for key, value in line.items() if isinstance(value, int | float) and math.isfinite(value)}
        for line in _read_lines(path)
    ]
    return [record for record in figures if "step" in record]


def damaged(folder: RunFolder, reason: object) -> str:
    """Say that evaluation.json is damaged, and what writes it anew."""
    return f"{folder.evaluation}: damaged: {reason}; write it anew: fcmae finetune --evaluate {folder.path}"


def _read_evaluation(folder: RunFolder) -> Record:
    try:
        found = json.loads(folder.evaluation.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(damaged(folder, error)) from error
    return found if isinstance(found, dict) else {}


SAME = ("model.", "data.image_size", "data.batch_size", "optim.accumulate")
"""Keys that losses to compare have in common: the same network and masks, size, and images of an update."""


def find_reference(config: Config) -> Reference | None:
    """Return the log of the shipped configuration that is most like a run's, of those that have `SAME`."""
    kind = PretrainRecipe if isinstance(config, PretrainConfig) else FinetuneRecipe
    own = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    found: list[Reference] = []
    for name, path in reference_logs().items():
        try:  # what is `auto` there is what the run has
            shipped = load_config(kind, find_shipped(name, config.command)).resolve(own, name)
        except UserError:  # of another command
            continue
        if type(shipped) is not type(config):  # of another task
            continue
        differences = [*changed_keys(shipped, config)]
        if not _same_root(shipped.data.root, config.data.root):
            differences.append(f"data.root: {shipped.data.root} -> {config.data.root}")
        if not any(difference.startswith(SAME) for difference in differences):
            found.append(Reference(name, read_figures(path), differences))
    return min(found, key=lambda reference: len(reference.differences), default=None)


def _same_root(shipped: str, given: str) -> bool:
    """Whether a folder is the one that a shipped configuration names from the repository's root."""
    parts = PurePath(shipped).parts
    return PurePath(given).parts[-len(parts) :] == parts
