"""How many updates a run makes, their learning rates, what happens between them; knows no models, data or files."""

import dataclasses
import math
from typing import Literal, Self

from fcmae.config import MOST_UPDATES, FinetuneConfig, RunConfig
from fcmae.errors import UserError

Decline = Literal["cosine", "linear"]
"""How the rate falls after the warm-up."""


def learning_rate(
    step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int, decline: Decline = "cosine"
) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine (official main_pretrain.py), or a line, down to `floor`.

    Args:
        step: the update that is about to be made, from 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    left = 1 - progress if decline == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * left


def peak_rate(images_per_update: int, variant: object) -> float:
    """Return a peak learning rate that suits pretraining with so many images per update.

    Small networks: between what served at 8 (8e-4, configs/quickstart.yaml), 64 and 512 (2e-3,
    configs/pretrain/cifar10*.yaml), growing with the cube root, up to the paper's 2.4e-3. From Tiny on: the
    paper's, which is for 4096, falling with the square root.
    """
    if variant in ("tiny", "base", "large", "huge"):
        return 2.4e-3 * min(images_per_update / 4096, 1) ** 0.5
    return min(8e-4 * (images_per_update / 8) ** (1 / 3), 2.4e-3)


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Whether what takes place every so many updates, and at the end, does so after update `step`.

    An interval that ends less than a quarter of itself before the end is left out: the end takes its place.
    """
    left = total_steps - step
    return left == 0 or (step % every == 0 and 4 * left >= every)


def times_due(step: int, every: int, total_steps: int) -> int:
    """Return how many updates after `step` are due: `is_due`, counted."""
    last = total_steps - 1  # what is due before the end, without those just before it
    last -= last % every
    last -= every * (4 * (total_steps - last) < every)
    return max(0, last // every - step // every) + (step < total_steps)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many updates of how many images, and the learning rate of each."""

    num_samples: int
    images_per_step: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    decline: Decline = "cosine"

    @classmethod
    def of(cls, config: RunConfig, num_samples: int, num_processes: int) -> Self:
        """Return the plan of a run on so many images.

        Raises:
            UserError: if it makes more updates than the names of checkpoints count.
        """
        images_per_step = config.optim.images_per_update
        if images_per_step is None:
            images_per_step = config.data.batch_size * config.optim.accumulate * num_processes
        total_steps = max(1, math.ceil(config.train.epochs * num_samples / images_per_step))
        if config.train.max_steps is not None:
            total_steps = min(total_steps, config.train.max_steps)
        if total_steps > MOST_UPDATES:
            raise UserError(
                f"train.epochs={config.train.epochs:g}: makes {total_steps:,} updates, and not up to "
                f"{MOST_UPDATES:,}: lower it, or set train.max_steps"
            )
        return cls(
            num_samples=num_samples,
            images_per_step=images_per_step,
            total_steps=total_steps,
            warmup_steps=round(config.optim.warmup_epochs * num_samples / images_per_step),
            peak_lr=config.optim.base_lr * images_per_step / 256,
            min_lr=config.optim.min_lr,
            decline=config.optim.schedule if isinstance(config, FinetuneConfig) else "cosine",
        )

    def lr(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.peak_lr,
            floor=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            decline=self.decline,
        )

    def steps_before(self, epochs: float) -> int:
        """Updates that come nearest to a number of epochs."""
        return round(epochs * self.num_samples / self.images_per_step)

    def steps_in(self, epochs: float) -> int:
        """Updates, at least one, that come nearest to a number of epochs."""
        return max(1, self.steps_before(epochs))

    def passes(self, epochs: float, seen_images: int) -> bool:
        """Whether an update, after which so many images are seen, passes a multiple of a number of epochs.

        It goes by images, not by steps, so that another batch size in the middle of a run changes nothing.
        """
        every = max(1, round(epochs * self.num_samples))
        return seen_images // every > (seen_images - self.images_per_step) // every

    @property
    def total_epochs(self) -> float:
        """Epochs of the whole run."""
        return self.total_steps * self.images_per_step / self.num_samples

    def concerns(self, config: RunConfig) -> list[str]:
        """Say, a line each, what of a plan is far from what recipes have, with the values that would do.

        Bounds: a fifth of `peak_rate` to five times it; for fine-tuning half of the lowest of configs/finetune
        to three times the highest, and ten times that for the classifier alone.
        """
        finetuning = isinstance(config, FinetuneConfig)
        images = self.images_per_step
        if finetuning:
            scale = 10 if config.train.freeze_encoder else 1
            usual, low, high, few = 1e-3 * scale, 5e-5 * scale, 1e-2 * scale, 50
        else:
            usual = peak_rate(images, config.model.variant)
            low, high, few = usual / 5, usual * 5, 300
        found: list[str] = []
        if not low <= self.peak_lr <= high and self.peak_lr > 0:
            found.append(
                f"optim.base_lr={config.optim.base_lr:g} * {images} images / 256 is a peak learning rate of "
                f"{self.peak_lr:.3g}, {'low' if self.peak_lr < low else 'high'} for {images} images per update; "
                f"optim.base_lr={usual * 256 / images:.2g} would give {usual:.2g}"
            )
        if self.total_steps < few:
            epochs = math.ceil(few * images / self.num_samples * 10) / 10
            capped = config.train.max_steps is not None and config.train.max_steps < few
            remedy = f"train.max_steps={few}" if capped else f"train.epochs={epochs:g}"
            found.append(
                f"{self.total_steps} updates are few to learn from; {remedy} would make {few}"
                + ("" if capped else ", and so would fewer images per update (data.batch_size, optim.accumulate)")
            )
        if self.warmup_steps >= self.total_steps:
            found.append(
                f"the warm-up of {self.warmup_steps} updates takes the whole run of {self.total_steps}, whose peak "
                f"rate is not reached; optim.warmup_epochs={self.total_epochs / 20:.2g} would be a twentieth of it"
            )
        return found
