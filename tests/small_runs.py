"""Runs of a real Trainer on a network of a few numbers, in this process, to be broken and resumed."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from conftest import records
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, parse_config
from fcmae.files import sha256
from fcmae.training.checkpoint import SUMS, Checkpoint
from fcmae.training.launch import claim_checkpoint
from fcmae.training.log import MetricsLog
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

SAMPLES = 8
SCORES = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.4, 10: 0.3}
"""What is evaluated: best at step 4."""


class Numbers(NamedTuple):
    """A batch for `Trainer`."""

    indices: tuple[int, ...]
    values: Tensor
    bad: tuple[tuple[int, str, str], ...] = ()

    def to(self, device: torch.device) -> Self:
        return self

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self._replace(values=change(self.values))


def small_config(output: Path, **sections: Mapping[str, Any]) -> FinetuneConfig:
    """Ten updates of two images each, saved and evaluated every two, three checkpoints kept."""
    values: dict[str, Any] = {
        "model": {"variant": "atto"},
        "data": {"root": "x", "batch_size": 2},
        "optim": {"base_lr": 1.0, "warmup_epochs": 0},
        "train": {"max_steps": 10, "ema_decay": 0.9},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "log": {"every_steps": 1},
    }
    for name, section in sections.items():
        values[name] = values[name] | dict(section)
    return parse_config(FinetuneConfig, values | {"output": str(output), "resume": "auto"}, "a test")


def small_trainer(config: FinetuneConfig, network: nn.Module | None = None) -> Trainer:
    """A trainer of `network`, or of a linear layer, from its first weights on."""
    torch.manual_seed(0)
    network = network or nn.Linear(3, 2)
    return Trainer(
        accelerator=Accelerator(cpu=True),
        model=network,
        optimizer=build_adamw(network, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=lambda model, batch: model(batch.values).square().mean(),
        plan=Plan.of(config, SAMPLES, 1),
        config=config,
        ema_decay=config.train.ema_decay,
        facts={"class_names": ("a", "b")},
    )


def batches(trainer: Trainer, shape: tuple[int, ...] = (3,)) -> Iterator[Numbers]:
    """Endless batches that depend on how many images were seen alone."""
    size = trainer.config.data.batch_size
    for start in range(trainer.seen_images, 2**31, size):
        generator = torch.Generator().manual_seed(start)
        yield Numbers(tuple(range(start, start + size)), torch.randn(size, *shape, generator=generator))


def small_run(config: FinetuneConfig, checkpoint: Checkpoint | None = None) -> Trainer:
    """Train to the end, from where the run folder's checkpoints say."""

    def evaluate(step: int, log: MetricsLog | None) -> float:
        return SCORES.get(step, 0.0)

    checkpoint = checkpoint or claim_checkpoint(config)
    trainer = small_trainer(config)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.fit(batches(trainer), evaluate=evaluate, evaluate_every=2)
    return trainer


def outcome(run: Path) -> dict[str, Any]:
    """What a run has come to: the newest tensors, file by file, and the records but for the clock."""
    last = run / "checkpoints" / "last"
    clock = ("time", "images_per_s", "data_wait", "memory_gb")
    kept = [{key: value for key, value in record.items() if key not in clock} for record in records(run)]
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))} | {"records": kept}


def stop_after(run: Path, step: int, copy: Path) -> Path:
    """Make a copy of a finished run as if a kill had ended it right after a step was saved."""
    shutil.copytree(run, copy, symlinks=True)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (copy / "checkpoints" / "last").unlink()
    (copy / "checkpoints" / "last").symlink_to(f"step-{step:08d}")
    return copy


def rehash(folder: Path) -> None:
    """Write the hashes of a checkpoint's files as they are now, as whoever forges one would."""
    files = [path for path in sorted(folder.iterdir()) if path.name != SUMS]
    (folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
