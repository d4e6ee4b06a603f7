"""What of a run's records needs a look while there is time, said once; knows no models, files or devices."""

import os
from collections import deque
from collections.abc import Mapping

from fcmae.config import DataSection, RunConfig
from fcmae.training.schedule import Plan

IN_A_ROW = 5
"""Records that must be alike, for one alone says little."""
FLAT = 0.02
"""How far from `flat_loss` a loss is no better than it."""
SETTLED = 100
"""Updates, at least, before loss and score count."""
MOST_WAIT = 0.2
"""Share of the time that may go by waiting for data."""
SCORES = 3
"""Evaluations, at least, before a score is called no better than the first."""


def faster_data(data: DataSection, num_processes: int) -> str:
    """Say what makes data come faster."""
    cores = os.cpu_count() or 1
    if data.num_workers * num_processes < cores:
        return f"raise data.num_workers={data.num_workers}, there are {cores} cores"
    if data.name != "arrays":
        return "decode and shrink them once, with fcmae prepare, for data.name=arrays"
    return f"this takes more than {cores} cores, or a faster disk"


class Watch:
    """Finds in the records of a run what is wrong with it.

    Loss and score count once the warm-up, a tenth of the run and `SETTLED` updates are over.

    Args:
        flat_loss: what a network has that has learnt nothing; None if that is not known.
        score: name in the records of one that should rise above its first value; empty for none.
    """

    def __init__(
        self, config: RunConfig, plan: Plan, num_processes: int, *, flat_loss: float | None = None, score: str = ""
    ) -> None:
        self.config, self.num_processes = config, num_processes
        self.flat_loss, self.score = flat_loss, score
        self.settled = max(plan.warmup_steps, plan.total_steps // 10, SETTLED)
        self.losses: deque[float] = deque(maxlen=IN_A_ROW)
        self.waits: deque[float] = deque(maxlen=IN_A_ROW)
        self.scores: list[float] = []
        self.found: dict[str, str] = {}
        """What was found so far, by what it is about."""

    def see(self, record: Mapping[str, float]) -> list[str]:
        """Take note of a record; returns what is found now, and was not before."""
        known = set(self.found)
        if "data_wait" in record:
            self.waits.append(record["data_wait"])
            self._check_waits()
        if record["step"] > self.settled and "loss" in record:
            self.losses.append(record["loss"])
            self._check_losses()
        if self.score in record:
            self.scores.append(record[self.score])
            if record["step"] > self.settled:
                self._check_scores()
        return [text for about, text in self.found.items() if about not in known]

    def _check_waits(self) -> None:
        if len(self.waits) == IN_A_ROW and min(self.waits) > MOST_WAIT:
            share = sum(self.waits) / IN_A_ROW
            self.found.setdefault(
                "data_wait",
                f"{share:.0%} of the time goes by waiting for images: "
                f"{faster_data(self.config.data, self.num_processes)}",
            )

    def _check_losses(self) -> None:
        flat = self.flat_loss
        if flat is not None and len(self.losses) == IN_A_ROW and min(self.losses) > flat - FLAT:
            self.found.setdefault(
                "loss",
                f"the loss has stayed at {flat:.1f}, as if each patch were predicted by its mean: try a higher or "
                f"lower optim.base_lr={self.config.optim.base_lr:g}, and see in the pictures whether there is "
                "anything to predict",
            )

    def _check_scores(self) -> None:
        first, *others = self.scores
        if len(others) >= SCORES and max(others) <= first:
            self.found.setdefault(
                self.score,
                f"{self.score} has not risen above its first value, {first:.2%}, but was {max(others):.2%} at "
                "best: see whether the loss falls, and whether the labels are of what the images show",
            )
