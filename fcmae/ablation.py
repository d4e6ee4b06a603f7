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
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from fcmae.config import FinetuneRecipe, PretrainConfig, RunConfig, Section, load_config, parse_config
from fcmae.errors import UserError, blame
from fcmae.files import atomic_path, write_text
from fcmae.training.run_folder import HARMLESS, RunFolder

Kind = Literal["pretrain", "finetune"]
Measures = Literal["top1", "knn", "loss", "collapse"]
CONFIGS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneRecipe}


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


class Arm(Section):
    """One of what is compared."""

    both: Settings = {}
    """Settings of pretraining and fine-tuning alike."""
    pretrain: Settings | Literal[False] = {}
    """Settings of the pretraining; false to train from scratch."""
    finetune: Settings = {}
    paper: float | None = None
    """The paper's figure for the first of `measure`; null where it has none."""


class Bases(Section):
    """What the arms change: shipped configurations, or files."""

    pretrain: str
    finetune: str


class Grid(Section):
    """Everything `fcmae ablate` needs to know."""

    task: ClassVar[str | None] = "ablate"
    title: str
    source: str
    """The paper and table that it repeats."""
    output: str
    """Where the run folders and results.jsonl go; grids that share it share runs."""
    configs: Bases
    both: Settings = {}
    """Settings of every arm, as in an arm."""
    pretrain: Settings = {}
    finetune: Settings = {}
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    measure: Annotated[tuple[Measures, ...], Field(min_length=1)] = ("top1",)
    """Columns of the table; the first is drawn."""
    reference: str | None = None
    """The arm that others are compared to, seed by seed; null for the first."""
    arms: Annotated[dict[str, Arm], Field(min_length=1)]

    @property
    def baseline(self) -> str:
        return self.reference or next(iter(self.arms))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(f"reference: there is no arm {self.reference!r}; arms are {', '.join(self.arms)}")
        places = [folder_name(name) for name in self.arms]
        twice = next((name for name, place in zip(self.arms, places, strict=True) if places.count(place) > 1), None)
        if twice is not None:
            raise ValueError(f"arms: {twice!r} and another would share the folder {folder_name(twice)!r}")
        return self


def folder_name(arm: str) -> str:
    """V2 + FCMAE -> v2-fcmae."""
    return re.sub(r"[^\w.=]+", "-", arm.lower()).strip("-.") or "arm"


def as_argument(key: str, value: Any) -> str:
    """Write a setting as the commands take it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


# Its stages


class Stage(NamedTuple):
    """A pretraining or fine-tuning of one seed."""

    kind: Kind
    config: str
    settings: dict[str, Any]
    seed: int
    place: str
    """Its run folder, below the grid's output, unless an equal stage has one already."""
    start: "Stage | None" = None
    """The pretraining that a fine-tuning begins from."""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two stages the same one."""
        settings = {key: value for key, value in self.settings.items() if not key.startswith(HARMLESS)}
        start = self.start and {"config": self.start.config, "settings": self.start.identity["settings"]}
        return {"stage": self.kind, "config": self.config, "settings": settings, "seed": self.seed, "start": start}

    def assignments(self, output: Path, start: str) -> list[str]:
        """Return the KEY=VALUE of its command: its settings, and what places and seeds it."""
        own = {"output": str(output), "resume": "auto", "init_from": start, "train.seed": self.seed}
        return [as_argument(key, value) for key, value in (self.settings | own).items()]


def stages_of(grid: Grid, name: str, arm: str, seed: int) -> list[Stage]:
    """Return what an arm takes for a seed, in order; `name` is the grid's."""
    given = grid.arms[arm]

    def stage(kind: Kind, changes: Settings, start: Stage | None = None) -> Stage:
        settings = grid.both | getattr(grid, kind) | given.both | changes
        place = f"{name}/{folder_name(arm)}/seed-{seed}/{kind}"
        return Stage(kind, getattr(grid.configs, kind), settings, seed, place, start)

    if given.pretrain is False:
        return [stage("finetune", given.finetune)]
    first = stage("pretrain", given.pretrain)
    return [first, stage("finetune", given.finetune, first)]


def tasks_of(grid: Grid, name: str) -> list[tuple[int, str, list[Stage]]]:
    """Return (seed, arm, stages), seed by seed, so that what there is after a while is of all arms."""
    return [(seed, arm, stages_of(grid, name, arm, seed)) for seed in grid.seeds for arm in grid.arms]


def check(grid: Grid, name: str) -> None:
    """Check every arm's configurations, before any is run.

    Raises:
        UserError: naming the arm.
    """
    for arm in grid.arms:
        for stage in stages_of(grid, name, arm, grid.seeds[0]):
            try:
                config = load_config(CONFIGS[stage.kind], stage.config, stage.assignments(Path(name), "null"))
            except UserError as error:
                raise UserError(f"arm {arm!r}, {stage.kind}: {error}") from error
            for measure in grid.measure:
                key = MEASURES[measure].key
                if MEASURES[measure].kind == stage.kind and key and get(config, key) is None:
                    raise UserError(f"measure: {measure} needs {stage.kind}.{key}, which is null")


def get(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


# What they came to

Records = Sequence[Mapping[str, Any]]
"""Of a run's metrics."""


def last(records: Records, *names: str) -> float | None:
    """Return the last value under the first of the names that there is."""
    found = (record[name] for name in names for record in reversed(records) if name in record)
    return next(found, None)


def tail_mean(records: Records, name: str, number: int = 20) -> float | None:
    """Return the mean of the last values under a name."""
    values = [record[name] for record in records if name in record][-number:]
    return statistics.mean(values) if values else None


class Measure(NamedTuple):
    """A figure of an arm."""

    title: str
    kind: Kind
    read: Callable[[Records], float | None]
    """From a run's metrics; None where they have none."""
    scale: float
    digits: int
    key: str = ""
    """What must not be null in the run's configuration."""

    def show(self, values: Iterable[float], sign: str = "") -> str:
        """The mean, and the least and greatest in brackets."""
        ordered = sorted(self.scale * value for value in values)
        if not ordered:
            return "-"
        mean, least, most = (f"{v:{sign}.{self.digits}f}" for v in (statistics.mean(ordered), ordered[0], ordered[-1]))
        return f"{mean} ({least} to {most})" if len(ordered) > 1 else mean


MEASURES: dict[str, Measure] = {
    "top1": Measure("top-1, %", "finetune", lambda records: last(records, "ema_top1", "val_top1"), 100, 1),
    "knn": Measure("k-NN, %", "pretrain", lambda records: last(records, "knn_top1"), 100, 1, "eval.knn_every_epochs"),
    "loss": Measure("loss", "pretrain", lambda records: tail_mean(records, "loss"), 1, 3),
}


class Record(Section):
    """A line of the results file: a stage that has begun or, with scores, finished."""

    stage: Kind
    config: str
    settings: dict[str, Any]
    seed: int
    start: dict[str, Any] | None
    run: str
    """Below the folder of the results file."""
    scores: dict[str, float] | None = None
    seconds: float | None = None
    """What it took; null where it was stopped in between."""

    @property
    def identity(self) -> dict[str, Any]:
        return self.model_dump(include={"stage", "config", "settings", "seed", "start"})


class Results:
    """The results file: a line for each stage, replaced as a whole, so that a kill leaves no part of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()

    def read(self) -> list[Record]:
        """Return the lines.

        Raises:
            UserError: if one is damaged.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
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
        return next((r for r in self.read() if r.scores is not None and r.identity == stage.identity), None)

    def of_place(self, place: str) -> Record | None:
        """Return the line of a run folder."""
        return next((record for record in self.read() if record.run == place), None)


Scores = dict[str, dict[int, dict[str, float]]]
"""Of arms, by name, seed and measure."""


def scores_of(grid: Grid, name: str, results: Results) -> Scores:
    """Return what the results file has of a grid's arms."""
    finished = [record for record in results.read() if record.scores is not None]
    scores: Scores = {arm: {} for arm in grid.arms}
    for seed, arm, stages in tasks_of(grid, name):
        for stage in stages:
            found = next((record for record in finished if record.identity == stage.identity), None)
            if found is not None:
                scores[arm].setdefault(seed, {}).update(found.scores or {})
    return scores


# Running them


class Runner:
    """Runs stages, each once, as subprocesses.

    Args:
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
        self.locks: dict[str, threading.Lock] = {}
        self.lock = threading.Lock()

    def folder(self, stage: Stage) -> Path:
        """Return the run folder of a stage: that of an equal one which has finished, else its own."""
        found = self.results.find(stage)
        return self.output / (found.run if found else stage.place)

    def command(self, stage: Stage) -> list[str]:
        start = str(self.folder(stage.start)) if stage.start else "null"
        words = stage.assignments(self.output / stage.place, start)
        return [*self.launcher, "-m", f"fcmae.{stage.kind}", "--config", stage.config, *words]

    def require_unchanged(self, stage: Stage) -> None:
        """Check that a run folder that is there was begun with the settings that are asked for.

        Raises:
            UserError: naming the folder and what has changed.
        """
        before, now = self.results.of_place(stage.place), stage.identity
        folder = self.output / stage.place
        if before is None or before.identity == now or not folder.exists():
            return
        old, new = (flatten({key: values[key] for key in ("config", "settings", "start")}) for values in (before.identity, now))
        changed = ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k))
        raise UserError(f"{folder}: was begun with other settings ({changed}); delete it, or give output=ANOTHER")

    def finish(self, stage: Stage) -> bool:
        """Run a stage if it has not finished; returns whether it has."""
        key = json.dumps(stage.identity, sort_keys=True)
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:  # who wants the same waits for it
            if self.results.find(stage):
                return True
            if key in self.failed or self.stopped:
                return False
            done = self.launch(stage)
            if not done:
                self.failed.add(key)
            return done

    def launch(self, stage: Stage) -> bool:
        folder, command = self.output / stage.place, self.command(stage)
        fresh = not folder.exists()
        record = Record(**stage.identity, run=stage.place)
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
        if code:
            if not self.stopped:
                lines = log.read_text(encoding="utf-8").splitlines() or ["no output"]
                self.say(f"failed ({code}): {lines[-1]}; its output is in {log}")
            return False
        lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found = {n: m.read(records) for n, m in MEASURES.items() if m.kind == stage.kind}
        scores = {measure: value for measure, value in found.items() if value is not None}
        seconds = round(time.monotonic() - begin, 1) if fresh else None
        self.results.put(record.model_copy(update={"scores": scores, "seconds": seconds}))
        return True

    def stop(self) -> None:
        """Begin nothing more, and end what runs."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def run(grid: Grid, name: str, runner: Runner, after_each: Callable[[], None]) -> list[str]:
    """Run all stages of a grid that have not finished; returns the arms and seeds that failed.

    Raises:
        UserError: before anything is run, if a run folder was begun with other settings.
    """
    tasks = tasks_of(grid, name)
    for _, _, stages in tasks:
        for stage in stages:
            if runner.results.find(stage) is None:
                runner.require_unchanged(stage)
    failures: list[str] = []

    def train(seed: int, arm: str, stages: list[Stage]) -> None:
        done = all(runner.finish(stage) for stage in stages)  # the second only after the first
        if runner.stopped:
            return
        if not done:
            failures.append(f"{arm}, seed {seed}")
            runner.say(f"seed {seed} · {arm}: failed")
            return
        found = scores_of(grid, name, runner.results)[arm][seed]
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


def pending(grid: Grid, name: str, results: Results) -> tuple[list[Stage], list[Record]]:
    """Return the stages to run, in order, and those that have finished; of equal ones the first."""
    wanted: dict[str, Stage] = {}
    for _, _, stages in tasks_of(grid, name):
        for stage in stages:
            wanted.setdefault(json.dumps(stage.identity, sort_keys=True), stage)
    found = {key: results.find(stage) for key, stage in wanted.items()}
    return [wanted[key] for key in wanted if found[key] is None], [record for record in found.values() if record]


def plan(grid: Grid, name: str, results: Results) -> str:
    """Say how many runs a grid takes and, as far as finished ones tell, how long."""
    to_run, finished = pending(grid, name, results)
    parts, total = [], 0.0
    for kind, what in (("pretrain", "pretraining"), ("finetune", "fine-tuning")):
        left = sum(stage.kind == kind for stage in to_run)
        done = [record for record in finished if record.stage == kind]
        times = [record.seconds for record in results.read() if record.stage == kind and record.seconds]
        total = total + left * statistics.mean(times) if times or not left else float("nan")
        parts.append(f"{left + len(done)} {what}s ({len(done)} finished)")
    shape = f"{len(grid.arms)} arms x {len(grid.seeds)} seeds"
    time_left = f"; about {total / 60:.0f} minutes to go, one at a time" if total > 0 else ""
    return f"{grid.title}: {shape}, {' and '.join(parts)}{time_left}"


# What it shows


def table(grid: Grid, scores: Scores) -> str:
    """Return a Markdown table: the paper's figure, means over seeds (least to greatest), and paired differences."""
    first = MEASURES[grid.measure[0]]
    others = [measure for measure in grid.measure[1:]]
    against = f"against {grid.baseline}, same seed"
    lines = [
        f"| arm | paper | {first.title} | {against} | " + "".join(f"{MEASURES[m].title} | " for m in others) + "seeds |",
        "|---|---:|---:|---:|" + "---:|" * len(others) + "---:|",
    ]
    base = scores[grid.baseline]
    for arm, by_seed in scores.items():
        values = {m: {seed: found[m] for seed, found in by_seed.items() if m in found} for m in grid.measure}
        own = values[grid.measure[0]]
        pairs = [own[s] - base[s][grid.measure[0]] for s in own if grid.measure[0] in base.get(s, {})]
        paper = "" if grid.arms[arm].paper is None else f"{grid.arms[arm].paper:g}"
        cells = [arm, paper, first.show(own.values()), "" if arm == grid.baseline else first.show(pairs, "+")]
        cells += [MEASURES[m].show(values[m].values()) for m in others]
        lines.append(f"| {' | '.join([*cells, str(len(own))])} |")
    return "\n".join(lines)


def plot(grid: Grid, scores: Scores, picture: Path) -> None:
    """Draw an arm a row: a dot for each seed and a line at their mean, and beside them the paper's figures.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from error
    measure = MEASURES[grid.measure[0]]
    arms = list(grid.arms)
    paper = {row: a.paper for row, a in enumerate(grid.arms.values()) if a.paper is not None}
    columns = 2 if paper else 1
    figure = Figure(figsize=(4 + 3.5 * columns, 1.4 + 0.34 * len(arms)), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for row, arm in enumerate(arms):
        colour = "tab:orange" if arm == grid.baseline else "tab:blue"
        values = [measure.scale * f[grid.measure[0]] for f in scores[arm].values() if grid.measure[0] in f]
        if values:
            axes[0].plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
            axes[0].scatter(values, [row] * len(values), color=colour, s=18, alpha=0.7)
        if row in paper:
            axes[1].plot(paper[row], row, "D", color=colour, markersize=5)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    axes[0].set_xlabel(f"ours: {measure.title}")
    axes[0].set_title(f"{grid.title}\n", loc="left", fontsize=11)
    if paper:
        axes[1].set_xlabel(f"the paper: {grid.source}", fontsize=9)
    for one in axes:
        one.grid(axis="x", alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
