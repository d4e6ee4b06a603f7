"""The run's records, `metrics.jsonl` and TensorBoard; knows no models or optimizers."""

import json
from collections.abc import Mapping
from typing import Self

import numpy as np

from fcmae.files import fsync, write_text
from fcmae.training.run_folder import RunFolder


class MetricsLog:
    """Writes each record to `RUN/metrics.jsonl` and `RUN/tensorboard`; nothing of a step is recorded twice.

    Opened at step `start`, it first drops what an interrupted run recorded beyond it; at the start, everything.
    """

    def __init__(self, run: RunFolder, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        if run.metrics.exists():
            lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(run.metrics, "".join(f"{line}\n" for line in lines if _step(line) <= (start or -1)))
        self.file = run.metrics.open("a", encoding="utf-8")
        fsync(run.metrics.parent)  # its name; its content is synced before each checkpoint gets its own
        self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else 0)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line, and a TensorBoard scalar for each value."""
        print(json.dumps({"step": step, **values}), file=self.file, flush=True)
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an uint8 image (h, w, 3) in TensorBoard."""
        self.tensorboard.add_image(name, image, step, dataformats="HWC")
        self.tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.tensorboard.close()


def _step(line: str) -> float:
    """Return the step of a record, or infinity for a line that a kill cut short or a disk damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
