"""What a run has come to, from its records, as a few lines; knows no models, images or commands."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fcmae.training.progress import duration
from fcmae.training.run_folder import read_records
from fcmae.training.trainer import Trainer

WIDTH = 17
"""Of the column of names."""


def updates_s(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that all updates took together, those before an interruption too."""
    seconds, seen = 0.0, 0
    for record in records:
        if "loss" in record:
            seconds += (record["seen_images"] - seen) / max(record["images_per_s"], 1e-9)
            seen = record["seen_images"]
    return seconds


def summarize(
    trainer: Trainer,
    *,
    scores: Mapping[str, str],
    places: Mapping[str, object],
    commands: Sequence[str],
    form: str = ".2%",
) -> str:
    """Describe a run that has ended: how far its loss fell, its scores, how long it took, where what is, what next.

    Warnings of its records, which a terminal may have scrolled past, are said again. All of the run counts, what
    was before an interruption too, but for the time between updates.

    Args:
        scores: name to show -> name in metrics.jsonl of scores of which more is better.
        places: name -> what lies where.
        commands: to type next, after what shows the run.
        form: how scores are written.
    """
    run, plan = trainer.run, trainer.plan
    records = read_records(run.metrics.read_text(encoding="utf-8"))
    rows: dict[str, object] = {}
    if losses := [record["loss"] for record in records if "loss" in record]:
        rows["loss"] = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    for name, key in scores.items():
        if values := [record[key] for record in records if key in record]:
            best = f" (best {max(values):{form}})" if max(values) > values[-1] else ""
            rows[name] = f"{values[0]:{form}} -> {values[-1]:{form}}{best}"
    seconds = updates_s(records)
    epochs = trainer.seen_images / plan.num_samples
    rows["updates"] = f"{trainer.step:,} ({epochs:.1f} epochs, {trainer.seen_images:,} images)"
    between = sum(occasion.seconds for occasion in trainer.progress.occasions.values())
    rows["duration"] = f"{duration(seconds)} at {trainer.seen_images / max(seconds, 1e-9):.0f} images/s, and " + (
        f"{duration(between)} for {', '.join(trainer.progress.occasions)}" if between else "nothing else"
    )
    if waits := [record["data_wait"] for record in records if "data_wait" in record]:
        rows["data wait"] = f"{sum(waits) / len(waits):.0%} of the updates' time"
    if taken := [record["memory_gb"] for record in records if "memory_gb" in record]:
        where = "on the GPU" if trainer.accelerator.device.type in ("cuda", "xpu") else "without loaders"
        rows["memory"] = f"{max(taken):.1f} GB {where}"
    rows |= places
    loggers = trainer.config.log.loggers
    rows["records"] = ", ".join([str(run.metrics), *loggers])
    lines = [f"{name:{WIDTH}}{value}" for name, value in rows.items()]
    lines += [f"{'warning':{WIDTH}}{text}" for text in trainer.found.values()]
    path = shlex.quote(str(run.path))
    shown = [f"fcmae report {path}"] + ([f"tensorboard --logdir {path}"] if "tensorboard" in loggers else [])
    return "\n".join(["", *lines, "", "next:", *(f"  {command}" for command in (*shown, *commands))])
