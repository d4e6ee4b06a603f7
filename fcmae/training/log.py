"""The run's records, `metrics.jsonl` and TensorBoard; knows no models or optimizers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Writes each record to `RUN/metrics.jsonl` and `RUN/tensorboard`; nothing of a step is recorded twice.

    Opened at step `start`, it first drops what an interrupted run recorded beyond it; at the start, everything.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            self._keep_until(start or -1)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)

    def _keep_until(self, step: int) -> None:
        kept: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                pass  # the line that a kill cut short
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

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
