"""What pretraining and fine-tuning share: batches and rates of a run, dry run; knows no loss or arguments."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fcmae.config import OptimSection, RunConfig
from fcmae.data import (
    IndexStream,
    LabelledDataset,
    PixelNormalizer,
    PretrainDataset,
    Source,
    load_batches,
    unreadable,
)
from fcmae.data.batches import PREFETCH_FACTOR, Loadable
from fcmae.data.pixels import kind_name
from fcmae.data.sampling import spread
from fcmae.data.segments import SegmentationDataset
from fcmae.data.views import Part
from fcmae.encoder.base import Network
from fcmae.errors import UserError
from fcmae.training.agree import agree, in_all
from fcmae.training.dry_run import rehearse
from fcmae.training.launch import cores_per_process
from fcmae.training.optim import layer_scales
from fcmae.training.trainer import Trainer


def layer_rates(network: Network, optim: OptimSection) -> dict[str, float]:
    """Return the factors on the learning rate that `optim.layer_decay` means, by parameter; none where it is 1.

    Raises:
        UserError: if nobody knows the layers of `network`.
    """
    if optim.layer_decay == 1:
        return {}
    if network.layer_depths is None:
        raise UserError(
            f"optim.layer_decay={optim.layer_decay}: layers are counted in our ConvNeXt, not in {network.variant}; "
            "set optim.layer_decay=1"
        )
    names = (name for name, _ in network.named_parameters())
    return layer_scales(names, network.layer_depths, decay=optim.layer_decay, decay_type=optim.layer_decay_type)


Run = TypeVar("Run", bound=RunConfig)
Opened = TypeVar("Opened")


def with_kind(config: Run, source: Source) -> Run:
    """Put the kind of pixels that the images turned out to have into the configuration, which outlives them."""
    data = config.data.model_copy(update={"dtype": kind_name(source.dtype)})
    return config.model_copy(update={"data": data})


COMPARED = 1000
"""Images, spread over a source, whose names and labels are compared between processes."""


def open_in_all(what: str, open_images: Callable[[], Opened], source_of: Callable[[Opened], Source]) -> Opened:
    """Open images in all processes of a run, and make sure that these are the same in all.

    Args:
        what: they are called in messages: the key that names them.
        open_images: opens them, or raises as `open_source`.
        source_of: what it returns -> the images.

    Raises:
        UserError: in all processes, if they cannot be opened in one, or differ.
    """
    opened = in_all(open_images)
    source = source_of(opened)
    facts: dict[str, object] = {f"the number of images of {what}": len(source)}
    for index in spread(len(source), COMPARED):
        label = None if source.labels is None else source.labels[index].tolist()
        facts[f"image {index:,} of {what}"] = [source.describe(index), *([] if label is None else [label])]
    agree(facts, f"give all processes the same {what}")
    return opened


TRIED = 64
"""Images of each source that a dry run tries to read."""


LOOKED_AT, LOOKED_INTO = 8, 512
"""Images that a run looks at before it starts, and the side of the middle of each, in pixels."""
FAR = 20
"""Standard deviations from the mean beyond which no pixel lies, and by a part of which pixels vary at least."""


def warn_of_units(trainer: Trainer, source: Source) -> None:
    """Say where pixels of some images, normalised, lie so far out or so close that mean and std are not theirs."""
    data = trainer.config.data
    normalize = PixelNormalizer(data.mean, data.std, data.clip)

    def middle(height: int, width: int) -> Part:
        tall, wide = min(height, LOOKED_INTO), min(width, LOOKED_INTO)
        return Part((height - tall) // 2, (width - wide) // 2, tall, wide, (tall, wide))

    furthest, widest = 0.0, 0.0
    for index in spread(len(source), LOOKED_AT):
        try:
            images = normalize(source.load_part(index, middle))
        except Exception:  # training names the images that do not decode
            continue
        furthest = max(furthest, float(images.abs().max()))
        widest = max(widest, float(images.std(dim=(1, 2), correction=0).max()))
    far, flat = furthest > FAR, 0 < widest < 1 / FAR
    if far or flat:
        what = (
            f"lie up to {furthest:.3g} of data.std from data.mean"
            if far
            else f"vary by only {widest:.2g} of data.std"
        )
        trainer.say(
            f"warning: pixels {what}, as if these were in another unit; fcmae stats {data.root} computes them"
        )


def training_batches(
    trainer: Trainer, dataset: PretrainDataset | LabelledDataset | SegmentationDataset
) -> Callable[..., Iterator[Any]]:
    """Return a function of `num_workers=` that gives this process's batches, from where the run stands on.

    Says what of the settings is odd for these images and this machine.
    """
    accelerator, config = trainer.accelerator, trainer.config
    if accelerator.is_main_process:
        warn_of_units(trainer, dataset.images)
    cores = cores_per_process()
    if config.data.num_workers > cores:
        trainer.say(f"data.num_workers={config.data.num_workers}: more than the {cores} cores of each process here")
    stream = IndexStream(
        len(dataset),
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        start=trainer.seen_images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        shards=dataset.images.shards,
    )
    return functools.partial(load_batches, dataset, stream, pin_memory=accelerator.device.type == "cuda")


def try_run(
    trainer: Trainer, load: Callable[..., Iterator[Any]], sources: Mapping[str, Loadable], **facts: object
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
