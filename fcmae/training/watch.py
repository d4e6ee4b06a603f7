"""What of a run's records needs a look, while it goes on and in its report; knows no models, files or devices."""

import statistics
from collections import deque
from collections.abc import Mapping

from fcmae.config import DataSection, PretrainConfig, RunConfig
from fcmae.training.schedule import Plan

IN_A_ROW = 5
"""The last records, of which a finding is, for one alone says little."""
FLAT = 0.02
"""How far from `Watch.flat_loss` a loss is no better than it."""
SETTLED = 100
"""Updates, at least, before loss and score count."""
MOST_WAIT = 0.2
"""Share of the time that may go by waiting for data."""
KNN = "knn_top1"
"""The score that should rise above its first value, that of features before training."""
SCORES = 3
"""Evaluations, at least, before it is called no better than the first."""


def faster_data(data: DataSection, cores: int) -> str:
    """Say what makes data come faster, where each process has so many cores."""
    if data.num_workers < cores:
        return f"raise data.num_workers={data.num_workers}, there are {cores} cores for each process"
    if data.name != "arrays":
        return "decode and shrink them once, with fcmae prepare, for data.name=arrays"
    return f"this takes more than {cores} cores for each process, or a faster disk"


class Watch:
    """Finds in the records of a run what is wrong with it, as it stands.

    What was found is forgotten when later records are better. Loss and k-NN count once the warm-up, a tenth of the
    run and `SETTLED` updates are over.

    Args:
        cores: of each process, where the run ran.
    """

    def __init__(self, config: RunConfig, plan: Plan, *, cores: int) -> None:
        self.config, self.cores = config, cores
        self.settled = max(plan.warmup_steps, plan.total_steps // 10, SETTLED)
        pretraining = isinstance(config, PretrainConfig)
        normalised = pretraining and config.model.target == "pixels" and config.model.norm_pix_loss
        self.flat_loss = 1.0 if normalised else None
        """What a network has that has learnt nothing, the variance of patches; None if that is not known."""
        self.first_loss: float | None = None
        self.losses: deque[float] = deque(maxlen=IN_A_ROW)
        self.waits: deque[float] = deque(maxlen=IN_A_ROW)
        self.scores: list[float] = []
        self.found: dict[str, str] = {}
        """What holds now, by the name in the records that it is about."""
        self.said: set[str] = set()

    def see(self, record: Mapping[str, float]) -> list[str]:
        """Take note of a record; returns what is found now, and was not before."""
        settled = record["step"] > self.settled
        if "data_wait" in record:
            self.waits.append(record["data_wait"])
            self._note("data_wait", self._waiting())
        if "loss" in record:
            self.first_loss = record["loss"] if self.first_loss is None else self.first_loss
            if settled:
                self.losses.append(record["loss"])
                self._note("loss", self._stuck())
        if KNN in record:
            self.scores.append(record[KNN])
            if settled:
                self._note(KNN, self._no_better())
        new = [text for about, text in self.found.items() if about not in self.said]
        self.said |= self.found.keys()
        return new

    def _note(self, about: str, text: str | None) -> None:
        self.found.pop(about, None)
        if text:
            self.found[about] = text

    def _waiting(self) -> str | None:
        share = statistics.median(self.waits)
        if len(self.waits) < IN_A_ROW or share <= MOST_WAIT:
            return None
        return f"{share:.0%} of the time goes by waiting for images: {faster_data(self.config.data, self.cores)}"

    def _stuck(self) -> str | None:
        if len(self.losses) < IN_A_ROW or self.first_loss is None:
            return None
        lowest, rate = min(self.losses), f"optim.base_lr={self.config.optim.base_lr:g}"
        if self.flat_loss is not None and lowest > self.flat_loss - FLAT:
            return (
                f"the loss stays at {statistics.mean(self.losses):.3f}, as if each patch were predicted by its "
                f"mean: try a higher or lower {rate}, and see in the pictures whether there is anything to predict"
            )
        if lowest >= self.first_loss:
            return f"the loss has not fallen, from {self.first_loss:.4f} to {lowest:.4f}: try a lower {rate}"
        return None

    def _no_better(self) -> str | None:
        first, *others = self.scores
        if len(others) < SCORES or max(others) > first:
            return None
        return (
            f"the accuracy of k-NN has not risen above its first value, {first:.2%}, but was {max(others):.2%} at "
            "best: see whether the loss falls, and whether the labels are of what the images show"
        )
