"""The run's records, `metrics.jsonl` and TensorBoard; knows no models or optimizers."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Self

import numpy as np

from fcmae.errors import UserError
from fcmae.files import fsync, write_text
from fcmae.training.run_folder import RunFolder


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


def record_start(run: RunFolder, step: int, facts: Mapping[str, str]) -> None:
    """Add a line to `RUN/starts.jsonl`: when, after which step, by what command and on what a run was started.

    Raises:
        UserError: as `writing`.
    """
    with writing(run), run.starts.open("a", encoding="utf-8") as file:
        print(json.dumps({"time": time.time(), "step": step, **facts}), file=file)


class MetricsLog:
    """Writes each record to `RUN/metrics.jsonl` and `RUN/tensorboard`; nothing of a step is recorded twice.

    Opened at step `start`, it first drops what an interrupted run recorded beyond it; at the start, everything.
    """

    def __init__(self, run: RunFolder, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        self.run = run
        with writing(run), ExitStack() as stack:
            if run.metrics.exists():
                lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                write_text(run.metrics, "".join(f"{line}\n" for line in lines if _step(line) <= (start or -1)))
            stack.enter_context(quiet_tensorboard())
            self.file = stack.enter_context(run.metrics.open("a", encoding="utf-8"))
            fsync(run.metrics.parent)  # its name; its content is synced before each checkpoint gets its own
            self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else 0)
            stack.callback(self.tensorboard.close)
            self.stack = stack.pop_all()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line, and a TensorBoard scalar for each value.

        Raises:
            UserError: as `writing`.
        """
        with writing(self.run):
            self.run.metrics.stat()  # what is written to a removed file is lost without an error
            print(json.dumps({"step": step, **values}), file=self.file, flush=True)
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an uint8 image (h, w, 3) in TensorBoard.

        Raises:
            UserError: as `writing`.
        """
        with writing(self.run):
            self.tensorboard.add_image(name, image, step, dataformats="HWC")
            self.tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.run):
            self.stack.close()


def _step(line: str) -> float:
    """Return the step of a record, or infinity for a line that a kill cut short or a disk damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
