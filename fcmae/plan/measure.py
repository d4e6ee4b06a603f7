"""This machine as a plan takes it: its step, its loading and its exchange, each timed by itself; writes nothing.

Steps are the Trainer's, of noise; images are loaded as a run loads them. GPUs are taken to be joined as the table's
of the same name, else as those without NVLink. On a CPU all processes of a plan are of this computer, and two
threads exchange as two processes would, by gloo.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist

from fcmae.config import PretrainConfig, PretrainRecipe
from fcmae.data import (
    IndexStream,
    MaskedBatch,
    PixelNormalizer,
    PretrainDataset,
    RandomView,
    Reading,
    cut,
    load_batches,
    open_source,
)
from fcmae.data.batches import PREFETCH_FACTOR
from fcmae.errors import UserError
from fcmae.plan.forecast import require_forecast
from fcmae.plan.machines import (
    GRADIENT_BYTES,
    ISSUE_S,
    LINK_SHARE,
    MESSAGE_S,
    PCIE_GB,
    RECOMPUTED,
    Machines,
    Pace,
    known_gpu,
)
from fcmae.plan.work import Work, build
from fcmae.story import cores_per_process
from fcmae.training.dry_run import loading_rate
from fcmae.training.launch import start_accelerator
from fcmae.training.memory import free_and_total
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

TIMED, TIMED_S = 5, 5.0
"""Calls of each kind, at least, of which the median counts, and seconds of all kinds together."""
MOST_PROCESSES = 10**9
"""Of one computer: all."""
MOST_SENT = 2**26
"""Bytes of a timed exchange, at most: more take as long a byte."""


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, to the end of what the device does for it."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def build_updates(config: PretrainConfig, images: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a micro-batch of so many images of noise, and an update of one, both warmed up, of a Trainer."""
    accelerator = start_accelerator(config.train.precision)
    device = accelerator.device
    torch.manual_seed(config.train.seed)
    model, draw_ids = build(config)
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(device)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=config.optim.weight_decay, betas=config.optim.betas),
        compute_loss=lambda model, batch: model(normalize(batch.images), batch.visible_ids).loss,
        plan=Plan.of(config, 10**6, 1),
        config=config,
    )
    pixels = torch.randint(256, (images, config.model.in_chans, *config.data.size), dtype=torch.uint8)
    batch = MaskedBatch(images=pixels, indices=(), bad=(), visible_ids=draw_ids(images)).to(device)
    batches = repeat(batch)

    def micro_batch() -> None:
        trainer.accumulate(batches, 0)

    def update() -> None:
        trainer.update(batches)

    for _ in range(1 + trainer.work.warm_up):
        update()
    return micro_batch, update


def time_pace(config: PretrainConfig, device: torch.device, images: int) -> Pace:
    """Time micro-batches of so many images and of a quarter as many, with a line between them, and updates.

    They take turns, so that a busy machine disturbs them alike.
    """
    alone = config.model_copy(update={"optim": config.optim.model_copy(update={"accumulate": 1})})
    many = max(images, 2)
    few = max(many // 4, 1)
    calls = [*build_updates(alone, many), build_updates(alone, few)[0]]
    rounds = list[list[float]]()
    while len(rounds) < TIMED or sum(map(sum, rounds)) < TIMED_S:
        rounds.append([seconds_of(call, device) for call in calls])
    many_s, update_s, few_s = map(statistics.median, zip(*rounds, strict=True))
    each = (many_s - few_s) / (many - few)
    if not 0 < each * many < many_s:  # less than the noise of this machine
        each = many_s / many
    times = RECOMPUTED if config.train.gradient_checkpointing else 1.0  # which a plan multiplies by
    return Pace(
        image={"computing": each / times},
        kernels=(many_s - many * each) / times,
        issue=0.0,
        optimizer=max(0.0, update_s - many_s),
    )


def time_loading(config: PretrainConfig, *, on_gpu: bool) -> float:
    """Return the images/s that the loaders of a process give while nothing is computed.

    Raises:
        UserError: if data.root cannot be opened.
    """
    data = config.data
    source = open_source(data.name, data.root, data.split, config.model.in_chans, reading=Reading.of(data))
    if data.tile is not None:
        source = cut(source, data.tile, data.num_workers)
    with torch.device("meta"):
        _, draw_ids = build(config)
    dataset = PretrainDataset(
        source,
        view=RandomView(data.size, data.crop_scale, data.hflip),
        draw_ids=draw_ids,
        seed=config.train.seed,
        resize_on_device=on_gpu,
    )
    stream = IndexStream(len(dataset), batch_size=data.batch_size, seed=config.train.seed)
    batches = load_batches(dataset, stream, num_workers=data.num_workers, pin_memory=on_gpu)
    return loading_rate(batches, data.num_workers, data.num_workers * PREFETCH_FACTOR)


def time_gloo(sent: int) -> float:
    """Return the seconds in which two threads sum float32 of so many bytes, as processes do on a CPU.

    Raises:
        UserError: if they cannot.
    """
    store, found = dist.HashStore(), list[float]()  # pyright: ignore[reportPrivateImportUsage]

    def take_part(rank: int) -> None:
        group: Any = dist.ProcessGroupGloo(store, rank, 2, timedelta(minutes=1))
        values = torch.zeros(max(1, sent // GRADIENT_BYTES))
        calls = [seconds_of(lambda: group.allreduce([values]).wait(), values.device) for _ in range(1 + TIMED)]
        found.append(statistics.median(calls[1:]))

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < 2:  # what is wrong a thread has printed
        raise UserError(
            "--measure: gloo cannot exchange on this machine; GLOO_SOCKET_IFNAME=lo names a network card"
        )
    return max(found)


def measured(
    config: PretrainConfig, recipe: PretrainRecipe, processes: int, *, per_machine: int, network: float
) -> tuple[Machines, Work]:
    """Return machines like this one and the work as it is here; on a CPU, processes share the cores of this one.

    Args:
        processes: whose batches are timed.
        network: bytes/s of each machine.

    Raises:
        UserError: if this device cannot compute in train.precision, data.root cannot be opened, or as
            `require_forecast`.
    """
    accelerator = start_accelerator(config.train.precision)
    device = accelerator.device
    on_gpu = device.type != "cpu"
    work = Work.count(config, device, accelerator.mixed_precision)
    cores = cores_per_process()
    here = Machines(
        name="cpu",
        source="measured here",
        memory=free_and_total(device)[1],
        pace=Pace(image={}, kernels=1.0, issue=0.0, optimizer=0.0),
        link=math.inf,
        message_s=0.0,
        network=math.inf,
        per_machine=MOST_PROCESSES,
        records=False,
        overlaps=on_gpu,
        load_rate=math.inf,
        core_rate=math.inf,
        cores=math.inf if on_gpu else cores,
        threads=torch.get_num_threads(),
        on_gpu=on_gpu,
    )
    batch = require_forecast(config, recipe, work, here, images=1, processes=processes).batch
    config = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch})})
    load_rate = time_loading(config, on_gpu=on_gpu)
    pace = time_pace(config, device, batch)
    core_rate = load_rate / min(max(config.data.num_workers, 1), cores)
    here = here._replace(load_rate=load_rate, core_rate=core_rate, pace=pace)
    if on_gpu:
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        known = known_gpu(name)
        return here._replace(
            name=name,
            pace=pace._replace(
                issue=work.tensors * ISSUE_S
            ),  # of steps that are not recorded, as this one's may be
            link=LINK_SHARE * 1e9 * (known.link_gb if known else PCIE_GB),
            message_s=MESSAGE_S,
            network=LINK_SHARE * network,
            per_machine=per_machine,
            records=known is not None and known.nvlink,
        ), work
    sent = min(GRADIENT_BYTES * work.parameters, MOST_SENT)
    message_s = time_gloo(4)
    return here._replace(link=sent / max(time_gloo(sent) - message_s, 1e-9), message_s=message_s), work
