"""A dry run: times a micro-batch and the loading of data, each by itself, and describes the run they predict."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fcmae.config import RunConfig
from fcmae.training.launch import cores_per_process
from fcmae.training.progress import duration
from fcmae.training.run_folder import checkpoint_bytes
from fcmae.training.trainer import TrainBatch, Trainer
from fcmae.training.watch import faster_data

SLOW_S = 60.0
"""A first micro-batch that takes longer on a processor is not repeated, so what it takes to compile is counted."""

MEASURED_S = 1.0
"""For how long micro-batches are computed, and batches are loaded, at least one of each."""


def peak_memory(device: torch.device) -> str | None:
    """Describe the most memory that this process has taken so far; None where the system does not say."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


def loading_rate(batches: Iterator[TrainBatch], num_workers: int, in_queues: int) -> float:
    """Return how many images per second a loader gives by itself, once the batches in its queues are used up."""
    next(batches)  # by which its workers have started
    started = time.perf_counter()
    for _ in range(in_queues):
        next(batches)
        if time.perf_counter() - started > 5:  # so slow that little lay ready
            break
    images = 0
    started = time.perf_counter()
    while images == 0 or time.perf_counter() - started < MEASURED_S:
        for _ in range(max(num_workers, 1)):  # a batch of each, as they come in bursts
            images += len(next(batches).indices)
    return images / (time.perf_counter() - started)


def name_bottleneck(step_rate: float, data_rate: float, config: RunConfig, cores: int) -> str:
    """Say whether the step or the data will hold the run up, and what helps; cores are of each process."""
    data = config.data
    if data_rate > step_rate:
        return f"the step; the data come {data_rate / step_rate:.1f} times as fast"
    slow = f"the data; the step could take {step_rate / data_rate:.1f} times as many"
    return f"{slow}: {faster_data(data, cores)}"


def rehearse(trainer: Trainer, load: Callable[..., Iterator[Any]], *, queue: int) -> str:
    """Time a micro-batch and the loading of data, each by itself, and describe the run that they predict.

    Writes nothing.

    Args:
        trainer: at the beginning of its plan.
        load: called with `num_workers=`, returns batches.
        queue: batches that each worker has ready, at most.

    Raises:
        UserError: if the first loss is not finite.
    """
    accelerator = trainer.accelerator
    device = accelerator.device
    plan = trainer.plan
    micro_batches = trainer.config.optim.accumulate
    trainer.warn()
    trainer.say(
        f"dry run: computing {trainer.config.data.batch_size} of the {plan.images_per_step} images of an update, "
        "then loading some; about a minute where that is slow"
    )
    batches = itertools.repeat(next(load(num_workers=0)).to(device))  # in training it is copied meanwhile

    def timed(call: Callable[[], None], times: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        mean = torch.tensor((time.perf_counter() - started) / times, device=device)
        return float(accelerator.gather(mean[None]).max())  # pyright: ignore[reportAttributeAccessIssue]

    def micro_batch() -> None:
        trainer.accumulate(batches, micro_batches - 1)

    micro_s = timed(micro_batch)  # kernels are compiled
    loss = trainer.check(write=False)
    apply_s = timed(trainer.apply)  # the optimizer's state is made
    slow = device.type == "cpu" and micro_s > SLOW_S
    if not slow:
        for _ in range(trainer.work.warm_up):
            micro_batch()
            micro_batch()  # which adds to the gradient of the first
            trainer.apply()
        micro_s = timed(micro_batch)
        if micro_s < MEASURED_S / 2:
            micro_s = timed(micro_batch, min(int(MEASURED_S / micro_s), 50))
        apply_s = timed(trainer.apply)
    step_s = micro_s * micro_batches + apply_s
    memory = peak_memory(device)
    num_workers = trainer.config.data.num_workers
    step_rate = plan.images_per_step / step_s
    loader = load(num_workers=num_workers)
    data_rate = loading_rate(loader, num_workers, num_workers * queue) * accelerator.num_processes
    data_s = plan.images_per_step / data_rate
    update_s = max(step_s, data_s) if num_workers else step_s + data_s  # without workers, one after the other
    parameters = sum(parameter.numel() for parameter in trainer.bare_model.parameters())
    epochs = trainer.config.checkpoint.keep_every_epochs
    megabytes = checkpoint_bytes(trainer.bare_model, ema=trainer.ema is not None) / 1e6
    return "\n".join(
        [
            *(f"{name:14} {text}" for name, text in trainer.first_lines.items()),
            f"parameters     {parameters:,}",
            f"updates        {plan.total_steps:,} ({plan.total_epochs:.1f} epochs, "
            f"warm-up {plan.warmup_steps:,}), peak learning rate {plan.peak_lr:.2e}",
            f"first loss     {loss:.4f}",
            f"step alone     {step_s:.2f} s an update, {step_rate:.0f} images/s"
            + (f", from one of its {micro_batches} micro-batches" if micro_batches > 1 else "")
            + (", compilation of kernels included" if slow else ""),
            f"data alone     {data_rate:.0f} images/s with data.num_workers={num_workers}",
            f"bottleneck     {name_bottleneck(step_rate, data_rate, trainer.config, cores_per_process())}",
            f"whole run      about {duration(update_s * plan.total_steps)}, "
            "without evaluation, pictures and checkpoints",
            *([f"peak memory    {memory} per process"] if memory else []),
            f"checkpoint     {megabytes:.0f} MB each, {trainer.config.checkpoint.keep} kept"
            + (f", and one every {epochs:g} epochs" if epochs else ""),
        ]
    )
