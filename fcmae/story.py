"""What pretraining and fine-tuning share: arguments, batches of a run, dry run; knows no network or loss."""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fcmae.data import IndexStream, LabelledDataset, PretrainDataset, Source, load_batches, unreadable
from fcmae.data.batches import PREFETCH_FACTOR
from fcmae.training.dry_run import rehearse
from fcmae.training.trainer import Trainer

TRIED = 64
"""Images of each source that a dry run tries to read."""


def training_parser(name: str, description: str, *, config_required: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the arguments that both stories take; `name` is that of the folder of their configs."""
    parser = argparse.ArgumentParser(description=description)
    example = f"such as configs/{name}/atto.yaml"
    parser.add_argument("--config", metavar="FILE", required=config_required, help=example)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, check the data, estimate time and memory; write nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.base_lr=3e-4")
    return parser


def training_batches(trainer: Trainer, dataset: PretrainDataset | LabelledDataset) -> Callable[..., Iterator[Any]]:
    """Return a function of `num_workers=` that gives this process's batches, from where the run stands on."""
    accelerator, config = trainer.accelerator, trainer.config
    stream = IndexStream(
        len(dataset),
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        start=trainer.seen_images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return functools.partial(load_batches, dataset, stream, pin_memory=accelerator.device.type == "cuda")


def dry_run(
    trainer: Trainer, load: Callable[..., Iterator[Any]], sources: Mapping[str, Source], **facts: object
) -> None:
    """Print what a run would take, other `facts` of it, and whether some images of each source can be read."""
    trainer.say(rehearse(trainer, load, queue=PREFETCH_FACTOR))
    for name, fact in facts.items():
        trainer.say(f"{name:14} {fact}")
    for name, source in sources.items():
        tried, bad = unreadable(source, TRIED)
        trainer.say(f"{name:14} {tried} of {len(source):,} images tried, {len(bad)} unreadable")
        for image in bad:
            trainer.say(f"               {image.name}: {image.reason}")
