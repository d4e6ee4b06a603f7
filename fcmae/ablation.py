"""Ablation grids: arms of settings, trained by our own commands and compared over seeds; knows no network or image.

A grid's stages (a pretraining or fine-tuning of one seed) are subprocesses. One that has finished is a line of the
results file, and is not run again by whichever grid with the same `output` wants it; what was stopped goes on.
"""

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from fcmae.config import (
    FinetuneRecipe,
    Place,
    PretrainRecipe,
    RunConfig,
    Section,
    Seed,
    Text,
    load_config,
    parse_config,
)
from fcmae.errors import UserError, blame, shown
from fcmae.files import write_text
from fcmae.plain_yaml import write_value
from fcmae.training.run_folder import RunFolder

Kind = Literal["pretrain", "finetune"]
KINDS: dict[Kind, type[RunConfig]] = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
PLACES = (
    "output",
    "resume",
    "init_from",
    "data.root",
    "data.val_root",
    "data.num_workers",
    "checkpoint.",
    "log.",
    "visualize.",
)
"""Keys, or what they begin with, that may differ between runs that are the same."""


# The grid


def flatten(values: Any, prefix: str = "") -> Any:
    """{"model": {"version": 1}, "data.root": "x"} -> {"model.version": 1, "data.root": "x"}."""
    if not isinstance(values, Mapping):
        return values
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


Settings = Annotated[dict[str, Any], BeforeValidator(flatten)]
"""Values of a configuration by dotted key, which may also be given as sections."""


Configs = dict[Kind, Place]
"""The configurations that arms change: shipped ones by name, or files."""


ArmName = Annotated[Text, Field(max_length=100)]
MOST_RUNS = 1000
"""Arms and seeds of a grid."""


class Arm(Section):
    """One of what is compared."""

    configs: Configs = Field(default_factory=dict)
    """Others than the grid's."""
    both: Settings = Field(default_factory=dict)
    """Settings of pretraining and fine-tuning alike."""
    pretrain: Settings | Literal[False] = Field(default_factory=dict)
    """Settings of the pretraining; false to train from scratch."""
    finetune: Settings = Field(default_factory=dict)
    """Settings of the fine-tuning."""
    paper: float | None = None
    """The paper's figure for the first of `measure`; null where it has none."""


class Grid(Section):
    """Everything `fcmae ablate` needs to know."""

    command: ClassVar[str | None] = "ablate"
    title: Text
    """Of the table and the plot."""
    source: Text
    """The paper and table that it repeats."""
    output: Place
    """Where the run folders and results.jsonl go; grids that share it share runs."""
    configs: Configs = Field(default_factory=dict)
    """The configurations of `pretrain` and `finetune` that arms change."""
    both: Settings = Field(default_factory=dict)
    """Settings of every arm, as in an arm."""
    pretrain: Settings = Field(default_factory=dict)
    """Settings of every arm's pretraining."""
    finetune: Settings = Field(default_factory=dict)
    """Settings of every arm's fine-tuning."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Each arm is run with each."""
    measure: Annotated[tuple[Literal["top1", "knn", "loss", "collapse"], ...], Field(min_length=1)] = ("top1",)
    """Columns of the table; the first is compared and drawn."""
    reference: Text | None = None
    """The arm that others are compared to, seed by seed; null for the first."""
    arms: Annotated[dict[ArmName, Arm], Field(min_length=1)]
    """What is compared, by name."""

    @property
    def baseline(self) -> str:
        return self.reference or next(iter(self.arms))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline not in self.arms:
            arms = ", ".join(list(self.arms)[:10])
            raise ValueError(f"reference: there is no arm {shown(self.reference)}; arms are {arms}")
        if len(self.arms) * len(self.seeds) > MOST_RUNS:
            number = f"{len(self.arms)} arms and {len(self.seeds)} seeds"
            raise ValueError(f"seeds: {number} are more than {MOST_RUNS} runs; make several grids of them")
        places: dict[str, str] = {}
        for arm in self.arms:
            if (other := places.setdefault(folder_name(arm), arm)) != arm:
                raise ValueError(f"arms: {other!r} and {arm!r} would share the folder {folder_name(arm)!r}")
        return self


def folder_name(arm: str) -> str:
    """V2 + FCMAE -> v2-fcmae."""
    return re.sub(r"[^a-z0-9.=]+", "-", arm.lower()).strip("-.") or "arm"


def as_argument(key: str, value: Any) -> str:
    """Write a setting as the commands take it."""
    return f"{key}={write_value(value)}"


# Its stages


class Stage(NamedTuple):
    """A pretraining or fine-tuning of one seed."""

    kind: Kind
    base: str
    """The configuration that it changes."""
    changes: dict[str, Any]
    place: str
    """Its run folder, below the grid's output."""
    start: "Stage | None"
    """The pretraining that a fine-tuning begins from."""
    config: RunConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What makes it the run that it is: all that is not as by default, but for where things are."""
        flat = flatten(self.config.model_dump(mode="json", exclude_defaults=True))
        return {key: value for key, value in flat.items() if not key.startswith(PLACES)}

    @property
    def identity(self) -> dict[str, Any]:
        """What two stages that are the same have in common, as a line of the results file has it."""
        return {"stage": self.kind, "settings": self.settings, "start": self.start and self.start.settings}

    @property
    def key(self) -> str:
        return json.dumps(self.identity, sort_keys=True)


def stages_of(grid: Grid, name: str, arm: str, seed: int) -> list[Stage]:
    """Return what an arm takes for a seed, in order; `name` is the grid's.

    Raises:
        UserError: naming the arm, if its settings are none.
    """
    given = grid.arms[arm]

    def stage(kind: Kind, own: dict[str, Any], start: Stage | None = None) -> Stage:
        changes = grid.both | getattr(grid, kind) | given.both | own | {"train.seed": seed}
        try:
            base = (grid.configs | given.configs).get(kind)
            if base is None:
                raise UserError(f"configs.{kind}: missing; it is the configuration that the arm changes")
            config = load_config(KINDS[kind], base, [as_argument(key, value) for key, value in changes.items()])
        except UserError as error:
            raise UserError(f"arm {arm!r}, {kind}: {error}") from error
        return Stage(kind, base, changes, f"{name}/{folder_name(arm)}/seed-{seed}/{kind}", start, config)

    if given.pretrain is False:
        return [stage("finetune", given.finetune)]
    first = stage("pretrain", given.pretrain)
    for measure in grid.measure:
        needs = MEASURES[measure].needs
        if needs and reduce(getattr, needs.split("."), first.config) is None:
            raise UserError(f"arm {arm!r}: measure: {measure} needs pretrain.{needs}, which is null")
    return [first, stage("finetune", given.finetune, first)]


Task = tuple[int, str, list[Stage]]
"""(seed, arm, stages)."""


def tasks_of(grid: Grid, name: str) -> list[Task]:
    """Return the stages of all arms, seed by seed, so that what there is after a while is of all arms.

    Equal stages have the place of the first of them.

    Raises:
        UserError: as `stages_of`.
    """
    places: dict[str, str] = {}

    def shared(stage: Stage) -> Stage:
        start = shared(stage.start) if stage.start else None
        return stage._replace(place=places.setdefault(stage.key, stage.place), start=start)

    return [
        (seed, arm, [shared(stage) for stage in stages_of(grid, name, arm, seed)])
        for seed in grid.seeds
        for arm in grid.arms
    ]


# What they came to

Records = Sequence[Mapping[str, Any]]
"""Of a run's metrics."""


def last(records: Records, *names: str) -> float | None:
    """Return the last value under the first of the names that there is."""
    return next((record[name] for name in names for record in reversed(records) if name in record), None)


def tail_mean(records: Records, name: str, number: int = 20) -> float | None:
    """Return the mean of the last values under a name."""
    values = [record[name] for record in records if name in record][-number:]
    return statistics.mean(values) if values else None


def cosine_distance(records: Records) -> float | None:
    """Return the last mean over the stages of their channels' cosine distance; small where features collapse."""
    found = [last(records, f"cosine_distance/stage_{number}") for number in range(1, 5)]
    stages = [value for value in found if value is not None]
    return statistics.mean(stages) if stages else None


class Measure(NamedTuple):
    """A figure of an arm."""

    title: str
    kind: Kind
    read: Callable[[Records], float | None]
    """From a run's metrics; None where they have none."""
    scale: float
    digits: int
    needs: str = ""
    """What must not be null in the run's configuration."""

    def show(self, values: Iterable[float], sign: str = "") -> str:
        """The mean, and the least and greatest in brackets."""
        ordered = sorted(self.scale * value for value in values)
        if not ordered:
            return ""
        numbers = (statistics.mean(ordered), ordered[0], ordered[-1])
        mean, least, most = (f"{number:{sign}.{self.digits}f}" for number in numbers)
        return f"{mean} ({least} to {most})" if len(ordered) > 1 else mean


MEASURES: dict[str, Measure] = {
    "top1": Measure("top-1, %", "finetune", lambda found: last(found, "ema_top1", "val_top1"), 100, 1),
    "knn": Measure("k-NN, %", "pretrain", lambda found: last(found, "knn_top1"), 100, 1, "eval.knn_every_epochs"),
    "loss": Measure("loss", "pretrain", lambda found: tail_mean(found, "loss"), 1, 3),
    "collapse": Measure("cosine distance", "pretrain", cosine_distance, 1, 3, "eval.collapse_every_epochs"),
}


def read_scores(kind: Kind, run: Path) -> dict[str, float]:
    """Return the measures that a finished run has."""
    lines = RunFolder(run).metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    found = {name: measure.read(records) for name, measure in MEASURES.items() if measure.kind == kind}
    return {name: value for name, value in found.items() if value is not None}


class Record(Section):
    """A line of the results file: a stage that has begun or, with scores, finished."""

    stage: Kind
    settings: dict[str, Any]
    start: dict[str, Any] | None
    """The settings of the pretraining that a fine-tuning began from."""
    run: str
    """Its folder, below that of the results file."""
    scores: dict[str, float] | None = None
    seconds: float | None = None
    """What it took; null where it was stopped in between."""

    @property
    def identity(self) -> dict[str, Any]:
        return self.model_dump(include={"stage", "settings", "start"})


class Results:
    """The results file: a line for each stage, written as a whole, so that a kill leaves no part of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()

    def read(self) -> list[Record]:
        """Return the lines.

        Raises:
            UserError: if one is damaged.
        """
        with blame(f"{self.path}: not a text file"):
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        records = []
        for number, line in enumerate(lines, 1):
            with blame(f"{self.path}, line {number}"):
                records.append(parse_config(Record, json.loads(line), f"{self.path}, line {number}"))
        return records

    def put(self, record: Record) -> None:
        """Add a line, or replace the one of its run folder."""
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [other for other in self.read() if other.run != record.run] + [record]
            write_text(self.path, "".join(line.model_dump_json() + "\n" for line in lines))

    def find(self, stage: Stage) -> Record | None:
        """Return the line of a stage that has finished."""
        identity = stage.identity
        return next((r for r in self.read() if r.scores is not None and r.identity == identity), None)


Scores = dict[str, dict[int, dict[str, float]]]
"""Of arms, by name, seed and measure."""


def scores_of(tasks: Sequence[Task], results: Results) -> Scores:
    """Return what the results file has of a grid's arms."""
    finished = [record for record in results.read() if record.scores is not None]
    scores: Scores = {arm: {} for _, arm, _ in tasks}
    for seed, arm, stages in tasks:
        for identity in (stage.identity for stage in stages):
            for record in finished:
                if record.identity == identity:
                    scores[arm].setdefault(seed, {}).update(record.scores or {})
    return scores


# Running them


class Runner:
    """Runs stages, each once, as subprocesses.

    Args:
        output: the folder of the run folders.
        launcher: the words before `-m fcmae.pretrain`.
        jobs: how many may run at a time.
        say: prints a line.
    """

    def __init__(
        self, output: Path, results: Results, *, launcher: Sequence[str], jobs: int, say: Callable[[str], None]
    ) -> None:
        self.output, self.results = output, results
        self.launcher, self.jobs, self.say = launcher, jobs, say
        self.failed: set[str] = set()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def command(self, stage: Stage) -> list[str]:
        """Return what runs a stage."""
        start = self.results.find(stage.start) if stage.start else None
        begin = (start.run if start else stage.start.place) if stage.start else None
        own = {
            "output": str(self.output / stage.place),
            "resume": "auto",
            "init_from": None if begin is None else str(self.output / begin),
        }
        words = [as_argument(key, value) for key, value in (stage.changes | own).items()]
        return [*self.launcher, "-m", f"fcmae.{stage.kind}", "--config", stage.base, *words]

    def require_unchanged(self, stage: Stage) -> None:
        """Check that the run in a stage's folder, if any, was begun with the same settings.

        Raises:
            UserError: naming the folder and what has changed.
        """
        folder = self.output / stage.place
        begun = next((record for record in self.results.read() if record.run == stage.place), None)
        if begun is None or not folder.exists():
            return
        old, new = flatten(begun.identity), flatten(stage.identity)
        changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
        if changed:
            raise UserError(
                f"{folder}: was begun with other settings ({', '.join(changed)}); delete it, or give output=FOLDER"
            )

    def finish(self, stage: Stage) -> bool:
        """Run a stage unless it has finished; returns whether it has."""
        with self.locks[stage.place]:  # who wants the same waits for it
            if self.results.find(stage):
                return True
            if stage.place in self.failed or self.stopped:
                return False
            done = self.launch(stage)
            if not done:
                self.failed.add(stage.place)
            return done

    def launch(self, stage: Stage) -> bool:
        """Run a stage, its output in a file beside its folder; returns whether it ended well."""
        folder, command = self.output / stage.place, self.command(stage)
        record = Record(**stage.identity, run=stage.place)
        fresh = not folder.exists()
        self.results.put(record)
        self.say(shlex.join(command))
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        environment = dict(os.environ)
        if self.jobs > 1:  # waiting threads must not spin: they would take the cores of the runs beside
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} | environment
        begin = time.monotonic()
        with log.open("a", encoding="utf-8") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if code == 0:
            seconds = round(time.monotonic() - begin, 3) if fresh else None
            scores = read_scores(stage.kind, folder)
            self.results.put(record.model_copy(update={"scores": scores, "seconds": seconds}))
        elif not self.stopped:
            last_line = (log.read_text(encoding="utf-8").splitlines() or ["no output"])[-1]
            self.say(f"failed ({code}): {last_line}; its output is in {log}")
        return code == 0

    def stop(self) -> None:
        """Begin nothing more, and end what runs."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def run(grid: Grid, tasks: Sequence[Task], runner: Runner, after_each: Callable[[], object]) -> list[str]:
    """Run all stages that have not finished; returns the arms and seeds that failed.

    Raises:
        UserError: before anything is run, if a run folder was begun with other settings.
    """
    for stage in pending(tasks, runner.results):
        runner.require_unchanged(stage)
    failures: list[str] = []

    def train(seed: int, arm: str, stages: list[Stage]) -> None:
        done = all(runner.finish(stage) for stage in stages)  # the second only after the first
        if runner.stopped:
            return
        if not done:
            failures.append(f"{arm}, seed {seed}")
            return
        found = scores_of([(seed, arm, stages)], runner.results)[arm][seed]
        shown = (f"{MEASURES[m].title} {MEASURES[m].show([found[m]])}" for m in grid.measure if m in found)
        runner.say(f"seed {seed} · {arm}: {' · '.join(shown)}")
        after_each()

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)  # a killed grid must not leave a training behind
    pool = ThreadPoolExecutor(runner.jobs)
    try:
        for future in as_completed([pool.submit(train, *task) for task in tasks]):
            future.result()
    except BaseException:
        runner.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
    return failures


def pending(tasks: Sequence[Task], results: Results) -> list[Stage]:
    """Return the stages to run, in order; of equal ones the first."""
    first: dict[str, Stage] = {}
    for stage in (stage for *_, stages in tasks for stage in stages):
        first.setdefault(stage.place, stage)
    return [stage for stage in first.values() if results.find(stage) is None]


def plan(grid: Grid, tasks: Sequence[Task], results: Results) -> str:
    """Say how many runs a grid takes and, as far as finished ones tell, how long."""
    left = pending(tasks, results)
    numbers, seconds = [], 0.0
    for kind, what in (("pretrain", "pretrainings"), ("finetune", "fine-tunings")):
        number = sum(stage.kind == kind for stage in left)
        times = [record.seconds for record in results.read() if record.stage == kind and record.seconds]
        seconds += number * (statistics.mean(times) if times else float("nan") if number else 0)
        numbers.append(f"{number} {what}")
    time_left = f", about {seconds / 60:.0f} minutes one at a time" if seconds > 0 else ""
    shape = f"{len(grid.arms)} arms, {len(grid.seeds)} seeds"
    return f"{grid.title}: {shape}; to run: {' and '.join(numbers)}{time_left}"


# What it shows


def table(grid: Grid, scores: Scores) -> str:
    """Return a Markdown table: the paper's figure, means over seeds (least to greatest), and paired differences."""
    name, *others = grid.measure
    first = MEASURES[name]
    titles = ["arm", "paper", first.title, f"minus {grid.baseline}, same seed"]
    titles += [*(MEASURES[other].title for other in others), "seeds"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    base = {seed: found[name] for seed, found in scores[grid.baseline].items() if name in found}
    for arm, by_seed in scores.items():
        own = {seed: found[name] for seed, found in by_seed.items() if name in found}
        pairs = [own[seed] - base[seed] for seed in own.keys() & base.keys() if arm != grid.baseline]
        paper = grid.arms[arm].paper
        cells = [arm, "" if paper is None else f"{paper:g}", first.show(own.values()), first.show(pairs, "+")]
        cells += [MEASURES[m].show(found[m] for found in by_seed.values() if m in found) for m in others]
        lines.append(f"| {' | '.join([*cells, str(len(own))])} |")
    return "\n".join(lines)


def plot(grid: Grid, scores: Scores, picture: Path) -> None:
    """Draw an arm a row: a dot for each seed and a line at their mean, and beside them the paper's figures."""
    from matplotlib.figure import Figure  # here: they take seconds to import

    from fcmae.visualize import write_figure

    name = grid.measure[0]
    measure = MEASURES[name]
    columns = 1 + any(arm.paper is not None for arm in grid.arms.values())
    figure = Figure(figsize=(4 + 3.5 * columns, 1.4 + 0.34 * len(grid.arms)), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for row, (arm, given) in enumerate(grid.arms.items()):
        colour = "tab:orange" if arm == grid.baseline else "tab:blue"
        values = [measure.scale * found[name] for found in scores[arm].values() if name in found]
        if values:
            axes[0].plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
            axes[0].scatter(values, [row] * len(values), color=colour, s=18, alpha=0.7)
        if given.paper is not None:
            axes[1].plot(given.paper, row, "D", color=colour, markersize=5)
    axes[0].set_yticks(range(len(grid.arms)), list(grid.arms))
    axes[0].set_ylim(len(grid.arms) - 0.4, -0.6)
    for one, label in zip(axes, (f"ours: {measure.title}", grid.source), strict=False):
        one.set_xlabel(label)
        one.grid(axis="x", alpha=0.3)
    figure.suptitle(grid.title)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, picture)
