"""The run's records: `metrics.jsonl`, TensorBoard and other loggers; knows no models or optimizers."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np

from fcmae.config import Section, to_yaml
from fcmae.errors import UserError
from fcmae.files import fsync, write_text
from fcmae.training.run_folder import HARMLESS, RunFolder, read_records
from fcmae.training.trackers import Tracker, flatten

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def quiet_tensorboard() -> Iterator[None]:
    """Let TensorBoard's thread end without a traceback: its error is raised where something is recorded next."""
    usual = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            usual(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


@contextmanager
def writing(run: RunFolder) -> Iterator[None]:
    """Turn what a disk refuses inside into a `UserError` that names the run.

    Raises:
        UserError: such as for a full disk, or a folder that was removed.
    """
    try:
        yield
    except OSError as error:
        gone = not run.metrics.exists()
        reason = "they were removed or moved meanwhile" if gone else error.strerror or error
        remedy = "put them back" if gone else "checkpoints are intact: free some space"
        raise UserError(
            f"{run.path}: its records are not written, {reason}; {remedy}, then start the same command with "
            "resume=auto"
        ) from error


Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""By page and title, regular expressions of the names of values that share a chart."""


def record_start(run: RunFolder, step: int, facts: Mapping[str, object]) -> None:
    """Add a line to `RUN/starts.jsonl`: when, after which step, by what command and on what a run was started.

    Raises:
        UserError: as `writing`.
    """
    with writing(run), run.starts.open("a", encoding="utf-8") as file:
        print(json.dumps({"time": time.time(), "step": step, **facts}), file=file)


class MetricsLog:
    """Writes each record to `RUN/metrics.jsonl` and the loggers; nothing of a step is recorded twice.

    Opened at step `start`, it first drops what an interrupted run recorded beyond it; at the start, everything.

    Args:
        loggers: see `log.with`.
        config: of the run, to be shown.
        charts: pages of TensorBoard's Custom Scalars.
        watch: takes each record, also those of before an interruption; returns warnings, which are said.
        say: prints a line.
    """

    def __init__(
        self,
        run: RunFolder,
        start: int,
        *,
        loggers: Sequence[str] = ("tensorboard",),
        config: Section | None = None,
        charts: Charts | None = None,
        watch: Callable[[Mapping[str, float]], Sequence[str]] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run, self.watch, self.say = run, watch, say
        self.config = config
        self.tensorboard: SummaryWriter | None = None
        self.last: dict[str, float] = {}
        """Values by name, as recorded last."""
        with writing(run), ExitStack() as stack:
            if run.metrics.exists():
                lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _step(line) <= (start or -1)]
                write_text(run.metrics, "".join(f"{line}\n" for line in kept))
                for record in read_records("\n".join(kept)):
                    self._look_at(record, again=True)
            stack.enter_context(quiet_tensorboard())
            self.file = stack.enter_context(run.metrics.open("a", encoding="utf-8"))
            fsync(run.metrics.parent)  # its name; its content is synced before each checkpoint gets its own
            if "tensorboard" in loggers:
                self.tensorboard = open_tensorboard(run, start, config, charts)
                stack.callback(self.tensorboard.close)
            values = config.model_dump(mode="json") if config else {}
            self.trackers: list[Tracker] = []
            for name in loggers:
                if name != "tensorboard":
                    tracker = Tracker(name, run, resumed=start > 0, settings=values, say=say)
                    stack.callback(tracker.close)
                    self.trackers.append(tracker)
            self.stack = stack.pop_all()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line, and each value but the time, which they note themselves, to the loggers.

        Raises:
            UserError: as `writing`.
        """
        timeless = {name: value for name, value in values.items() if name != "time"}
        with writing(self.run):
            self.run.metrics.stat()  # what is written to a removed file is lost without an error
            print(json.dumps({"step": step, **values}), file=self.file, flush=True)
            if self.tensorboard is not None:
                for name, value in timeless.items():
                    self.tensorboard.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.record(step, timeless)
        self._look_at({"step": step, **values})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an uint8 image (h, w, 3) wherever pictures can be seen.

        Raises:
            UserError: as `writing`.
        """
        if self.tensorboard is not None:
            with writing(self.run):
                self.tensorboard.add_image(name, image, step, dataformats="HWC")
                self.tensorboard.flush()
        for tracker in self.trackers:
            tracker.picture(name, image, step)

    def conclude(self, step: int, names: Iterable[str]) -> None:
        """Show the last values of a finished run, and its settings, in TensorBoard's HParams.

        They are a run of their own there, as HParams takes every scalar of a run for a result.

        Raises:
            UserError: as `writing`.
        """
        if self.tensorboard is None or self.config is None:
            return
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        values = flatten(self.config.model_dump(mode="json"))
        settings = {name: value for name, value in values if not name.startswith(HARMLESS)}
        # the first says what is compared, for all runs in a folder; without it, that is what differs between them
        _, *session = hparams(settings, {})
        with writing(self.run), SummaryWriter(str(self.run.tensorboard / "final"), purge_step=0) as writer:
            for part in session:
                writer._get_file_writer().add_summary(part)
            for name in names:
                if name in self.last:
                    writer.add_scalar(f"final/{name}", self.last[name], step)

    def _look_at(self, record: Mapping[str, float], *, again: bool = False) -> None:
        self.last.update(record)
        for warning in self.watch(record) if self.watch else ():
            if not again:
                self.say(f"warning: {warning}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.run):
            self.stack.close()


def open_tensorboard(run: RunFolder, start: int, config: Section | None, charts: Charts | None) -> "SummaryWriter":
    """Go on with `RUN/tensorboard` at step `start`: drop what lies beyond, add what describes the run."""
    from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

    writer = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else 0)
    if charts:
        layout = {
            page: {title: ["Multiline", [*names]] for title, names in titles.items()}
            for page, titles in charts.items()
        }
        writer.add_custom_scalars(layout)
    if config is not None:
        writer.add_text("configuration", f"```yaml\n{to_yaml(config)}```", start)
    return writer


def _step(line: str) -> float:
    """Return the step of a record, or infinity for a line that a kill cut short or a disk damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
