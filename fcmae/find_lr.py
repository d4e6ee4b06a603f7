"""Find a learning rate: loss against rate from a short exponential sweep (Smith 2017); knows no model or images.

The sweep is training as configured, but for the rate, which grows by the same factor from each update to the next
until the loss diverges: the LR range test (arXiv 1506.01186, section 3.3) on a logarithmic axis. It writes a
picture and nothing else.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from fcmae.data import prefetch
from fcmae.errors import UserError
from fcmae.files import make_folder
from fcmae.training.progress import duration
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer, Window
from fcmae.visualize import write_figure

LOWEST, HIGHEST = 1e-6, 10.0
"""Rates of updates: far below what trains anything, far above what AdamW bears."""
PER_DECADE = 20
"""Updates in which the rate grows tenfold; slopes are of lines through as many losses."""
SMOOTHING = 0.9
"""Of the exponential moving average of the loss: half a decade of updates."""
RISEN = 0.5
"""Of the lowest smoothed loss, or of what it fell by where that is more: what it rises by when it has diverged."""
MARGIN = 10
"""Times the suggested rate, at least: where the loss diverges."""
FALLEN = 0.01
"""Of the first loss: what it falls by at least if anything was learnt."""
TIMED = 3
"""Updates, after the first, by which is said how long the sweep takes at most."""


@dataclasses.dataclass(frozen=True)
class RateSweep(Plan):
    """A plan whose rate grows from `LOWEST` to `HIGHEST`, by the same factor from each update to the next."""

    @classmethod
    def instead_of(cls, plan: Plan) -> Self:
        """Return the sweep that makes updates like those of a plan."""
        total = round(PER_DECADE * math.log10(HIGHEST / LOWEST)) + 1
        return cls(
            num_samples=plan.num_samples,
            images_per_step=plan.images_per_step,
            total_steps=total,
            warmup_steps=0,
            peak_lr=HIGHEST,
            min_lr=LOWEST,
        )

    def lr(self, step: int) -> float:
        return LOWEST * 10 ** (step / PER_DECADE)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the moving average of losses, weighted exponentially, its bias corrected as Adam's is."""
    smoothed, mean = list[float](), 0.0
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**number))
    return smoothed


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the smoothed one far above its lowest."""
    smoothed = smooth(losses)
    lowest = min(smoothed)
    return not math.isfinite(losses[-1]) or smoothed[-1] - lowest > RISEN * max(lowest, smoothed[0] - lowest)


class Found(NamedTuple):
    """What a sweep has found, as rates of updates."""

    steepest: float
    """Where the loss falls fastest: of lines through the losses of a decade, the middle of the steepest."""
    flat: float
    """Where the loss stops falling: the middle of the first line after that which does not fall."""
    diverged: float | None
    """Where the smoothed loss diverges; None where it does not."""

    @property
    def suggested(self) -> float:
        """Where the loss stops falling, but at most a tenth of where it diverges."""
        return self.flat if self.diverged is None else min(self.flat, self.diverged / MARGIN)


def find(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """Return what the losses of a sweep say; the last alone may have diverged.

    Raises:
        UserError: if the loss fell at no rate.
    """
    diverged = has_diverged(losses)
    good = losses[:-1] if diverged else losses
    smoothed = smooth(good)
    if len(good) <= PER_DECADE or min(smoothed) > (1 - FALLEN) * smoothed[0]:
        raise UserError(
            f"--find-lr: at no rate from {rates[0]:.0e} to {rates[-1]:.0e} does the loss fall (smoothed, it is "
            f"{smoothed[0]:.4g} at first, {min(smoothed):.4g} at its lowest): look at the images by fcmae stats, "
            "or raise data.batch_size"
        )
    middle = np.arange(PER_DECADE + 1) - PER_DECADE / 2
    slopes = np.correlate(good, middle / (middle @ middle), "valid")
    steepest = int(slopes.argmin())
    rising = np.flatnonzero(slopes[steepest:] >= 0)
    flat = steepest + int(rising[0]) if len(rising) else len(slopes) - 1
    return Found(
        steepest=rates[steepest + PER_DECADE // 2],
        flat=rates[flat + PER_DECADE // 2],
        diverged=rates[len(losses) - 1] if diverged else None,
    )


def sweep(trainer: Trainer, batches: Iterator[Any]) -> list[float]:
    """Make the updates of a `RateSweep` until the loss diverges; returns the losses, means over all processes.

    Raises:
        UserError: if the first is not finite, or too many images cannot be read.
    """
    for group in trainer.optimizer.param_groups:
        group["first_step"] = 0  # all that learns, from the first
    losses: list[float] = []
    started = 0.0
    with trainer.progress:
        while len(losses) < trainer.plan.total_steps:
            trainer.update(batches)
            trainer.progress.advance_bar()
            window = trainer.window
            everyone = trainer.accelerator.gather(window.loss_sum[None] / window.num_losses)
            losses.append(float(everyone.mean()))  # pyright: ignore[reportAttributeAccessIssue]
            if len(losses) == 1 or math.isfinite(losses[-1]):
                trainer.check(write=False)
            trainer.window = Window.new(trainer.accelerator.device)
            if has_diverged(losses):
                break
            if len(losses) == 1:  # in which kernels were compiled and workers started
                started = time.perf_counter()
            elif len(losses) == 1 + TIMED:
                update_s = (time.perf_counter() - started) / TIMED
                trainer.say(f"at most          {duration(update_s * trainer.plan.total_steps)}")
    return losses


def tabulate(trainer: Trainer, rates: Sequence[float], losses: Sequence[float], found: Found) -> str:
    """Write the smoothed loss at some rates and what was found, with the rule that it was found by."""
    images = trainer.plan.images_per_step

    def base(rate: float) -> str:
        return f"{rate * 256 / images:.2g}"

    notes = {found.steepest: "falls fastest", found.flat: "stops falling"}
    if found.diverged is not None:
        notes[found.diverged] = "diverges"
    shown = {rate for i, rate in enumerate(rates) if i % (PER_DECADE // 2) == 0} | notes.keys()
    rows = [f"{'rate':>8}  {'optim.base_lr':>13}  {'loss, smoothed':>14}"]
    rows += [
        f"{rate:8.1e}  {base(rate):>13}  {loss:14.4g}  {notes.get(rate, '')}".rstrip()
        for rate, loss in zip(rates, smooth(losses), strict=True)
        if rate in shown
    ]
    why = "where the loss stops falling" if found.suggested == found.flat else "a tenth of where the loss diverges"
    return "\n".join(
        [
            *rows,
            "",
            f"suggested        optim.base_lr={base(found.suggested)}, a peak rate of {found.suggested:.2g} for "
            f"{images:,} images an update",
            f"rule             {why}: range test (Smith 2017, arXiv 1506.01186), for a run with a warm-up",
        ]
    )


def draw(rates: Sequence[float], losses: Sequence[float], found: Found, images: int, path: Path) -> None:
    """Draw loss against rate, with what was found."""
    from matplotlib.figure import Figure  # here: it takes a second to import

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    smoothed = smooth(losses)
    axes.plot(rates, losses, ".", ms=3.5, color="#9db4c0", label="of an update")
    axes.plot(rates, smoothed, color="#2a6f97", lw=1.8, label="smoothed")
    marks = {"falls fastest": (found.steepest, ":"), "stops falling": (found.flat, "--")}
    for label, (rate, style) in marks.items():
        if rate != found.suggested:
            axes.axvline(rate, color="#7d8597", ls=style, lw=1.2, label=f"{label}: {rate:.2g}")
    base = f"{found.suggested * 256 / images:.2g}"
    axes.axvline(
        found.suggested, color="#c8553d", lw=1.6, label=f"suggested: {found.suggested:.2g} (base_lr {base})"
    )
    low, high = np.nanmin(losses), max(smoothed[0], (1 + RISEN) * np.nanmin(smoothed))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.set_xlabel(f"learning rate of an update of {images:,} images")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    make_folder(path.parent)
    write_figure(figure, path)


def find_lr(trainer: Trainer, load: Callable[..., Iterator[Any]], path: Path) -> None:
    """Sweep the rate, print a table and a suggestion, and draw the loss against the rate.

    Args:
        trainer: at the beginning of a `RateSweep`.
        load: called with `num_workers=`, returns batches.
        path: of the picture.

    Raises:
        UserError: as `sweep` and `find`.
    """
    plan, accelerator = trainer.plan, trainer.accelerator
    for name, text in trainer.first_lines.items():
        trainer.say(f"{name:16} {text}")
    trainer.say(
        f"sweep            up to {plan.total_steps} updates of {plan.images_per_step:,} images, the rate from "
        f"{LOWEST:.0e} tenfold in {PER_DECADE}, until the loss diverges"
    )
    losses = sweep(trainer, prefetch(load(num_workers=trainer.config.data.num_workers), accelerator.device))
    rates = [plan.lr(step) for step in range(len(losses))]
    found = find(rates, losses)
    if accelerator.is_main_process:
        trainer.say(f"\n{tabulate(trainer, rates, losses, found)}")
        draw(rates, losses, found, plan.images_per_step, path)
        trainer.say(f"picture          {path}")
