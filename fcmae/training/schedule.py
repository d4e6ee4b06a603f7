"""How many updates a run makes and their learning rates, as pure functions; knows no models, data or files."""

import dataclasses
import math
from typing import Self

from fcmae.config import RunConfig


def learning_rate(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `floor` (official main_pretrain.py).

    Args:
        step: the update that is about to be made, from 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many updates of how many images, and the learning rate of each."""

    num_samples: int
    images_per_step: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @classmethod
    def of(cls, config: RunConfig, num_samples: int, num_processes: int) -> Self:
        images_per_step = config.data.batch_size * config.optim.accumulate * num_processes
        total_steps = max(1, math.ceil(config.train.epochs * num_samples / images_per_step))
        if config.train.max_steps is not None:
            total_steps = min(total_steps, config.train.max_steps)
        return cls(
            num_samples=num_samples,
            images_per_step=images_per_step,
            total_steps=total_steps,
            warmup_steps=round(config.optim.warmup_epochs * num_samples / images_per_step),
            peak_lr=config.optim.base_lr * images_per_step / 256,
            min_lr=config.optim.min_lr,
        )

    def lr(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.peak_lr,
            floor=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def steps_in(self, epochs: float) -> int:
        """Updates, at least one, that come nearest to a number of epochs."""
        return max(1, round(epochs * self.num_samples / self.images_per_step))

    @property
    def total_epochs(self) -> float:
        """Epochs of the whole run."""
        return self.total_steps * self.images_per_step / self.num_samples
