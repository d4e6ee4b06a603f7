"""What a pretraining takes on so many machines: simple models of a step, its exchange and its loading.

An update takes, on each of n processes with a share of images in `accumulate` micro-batches,

    max(accumulate * micro-batch + AdamW + exposed exchange, share / images that its loaders give in a second)

or, where data.num_workers is 0, the sum of both. Processes that share cores take at least what all of them ask
of these cores. **Exchange.** A ring all-reduce sends 2 (n - 1) / n of the gradients' bytes from each process,
float32, or bf16 with train.bf16_exchange; the slowest link of the ring counts, which between machines is the
network of a machine; every message of `BUCKET` bytes takes `message_s` for each doubling of n. DDP exchanges
while the backward pass of the last micro-batch, two thirds of it, goes on, but for the last message; recorded
steps exchange after it. FSDP sends 2 (n - 1) / n of the weights' bytes for each micro-batch (they are gathered
forward and backward), and half of that of gradients for each update, meanwhile computing the rest. **Memory**
is `Work`'s; FSDP divides weights, gradients and moments by n, and gathers two `units` with their gradients;
between micro-batches gradients are whole.
Evaluation, pictures, checkpoints and failures are left out.
"""

import math
from typing import NamedTuple

from fcmae.config import PretrainConfig, PretrainRecipe
from fcmae.errors import UserError
from fcmae.plan.machines import GRADIENT_BYTES, Machines
from fcmae.plan.work import Work
from fcmae.training.batch import Footprint, Room, with_batch
from fcmae.training.schedule import Plan

BUCKET = 25 * 2**20
"""Bytes that DDP sends in one message."""
BACKWARD_SHARE = 2 / 3
"""Of a micro-batch's time."""


class Way(NamedTuple):
    """How memory is saved."""

    checkpointing: bool
    sharded: bool = False

    def __str__(self) -> str:
        names = ["FSDP" if self.sharded else "DDP", *["gradient checkpointing"] * self.checkpointing]
        return " with ".join(names)

    def footprint(self, work: Work, processes: int) -> Footprint | None:
        """Return the memory of one of the processes; None where the network cannot be computed so."""
        footprint = work.checkpointed if self.checkpointing else work.footprint
        if footprint is None or not self.sharded:
            return footprint
        gathered = 2 * 2 * work.unit_bytes
        state = min(work.state_bytes / processes + gathered, work.state_bytes)
        return footprint._replace(fixed=footprint.fixed - work.state_bytes + state)


class Forecast(NamedTuple):
    """What a pretraining takes on so many processes."""

    processes: int
    way: Way
    batch: int
    accumulate: int
    updates: int
    memory: float
    """Bytes of each process."""
    parts: dict[str, float]
    """Seconds of an update's computing on each process, by what they go by for."""
    exchange_bytes: float
    """That each process sends in an update."""
    exchange_s: float
    """Of an update, hidden or not."""
    loading_s: float
    """Of an update on each process."""
    update_s: float
    images_per_s: float
    limit: str
    """What takes longest of all that happens at once."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.updates * self.update_s

    @property
    def hours(self) -> float:
        """Of all processes together, which is what is paid for."""
        return self.processes * self.seconds / 3600


def exchange(machines: Machines, processes: int, sent: float) -> float:
    """Return the seconds in which each process sends so many bytes around the ring of all."""
    if processes == 1:
        return 0.0
    link = machines.link if processes <= machines.per_machine else min(machines.link, machines.network)
    return sent / link + machines.message_s * math.log2(processes) * math.ceil(sent / BUCKET)


def divided(
    config: PretrainConfig,
    recipe: PretrainRecipe,
    footprint: Footprint,
    memory: float,
    *,
    on_gpu: bool,
    processes: int,
) -> PretrainConfig:
    """Return the configuration with the sizes of batches that a run chooses on processes of so much memory.

    Raises:
        UserError: if an update cannot be divided among them.
    """
    return with_batch(
        config,
        recipe,
        lambda: footprint,
        room=lambda: Room(memory, memory),
        on_gpu=on_gpu,
        processes=processes,
        state=None,
    )[0]


def forecast(
    config: PretrainConfig,
    recipe: PretrainRecipe,
    work: Work,
    machines: Machines,
    *,
    images: int,
    processes: int,
    way: Way,
) -> Forecast | None:
    """Return what the pretraining of so many images takes; None where it does not fit into the memory.

    Raises:
        UserError: if an update cannot be divided among the processes.
    """
    footprint = way.footprint(work, processes)
    if footprint is None:
        return None
    memory = machines.memory_of(processes)
    config = divided(config, recipe, footprint, memory, on_gpu=machines.on_gpu, processes=processes)
    batch, accumulate = config.data.batch_size, config.optim.accumulate
    around = (processes - 1) / processes * GRADIENT_BYTES * work.parameters
    taken = footprint.of(batch) + (around if way.sharded and accumulate > 1 else 0)
    if taken > memory:
        return None
    plan = Plan.of(config, images, processes)
    share = batch * accumulate
    recorded = machines.records and processes <= machines.per_machine and not (way.checkpointing or way.sharded)
    micro = machines.pace.micro_batch(batch, recorded=recorded, recomputed=way.checkpointing)
    micro_s = sum(micro.values())

    gradients = around / 2 if config.train.bf16_exchange else around
    sent = 2 * accumulate * around + gradients if way.sharded else 2 * gradients
    exchange_s = exchange(machines, processes, sent)
    hidden_s = 0.0
    if machines.overlaps and not recorded:
        hidden_s = accumulate * micro_s if way.sharded else BACKWARD_SHARE * micro_s
    last_s = exchange_s / max(1, math.ceil(sent / BUCKET))
    parts = {
        **{name: accumulate * seconds for name, seconds in micro.items()},
        "optimizer": machines.pace.optimizer / (processes if way.sharded else 1),
        "exchange": max(exchange_s - hidden_s, last_s),
    }

    step_s, loading_s = sum(parts.values()), share / machines.load_rate
    update_s = max(step_s, loading_s) if config.data.num_workers else step_s + loading_s
    limit = "loading" if loading_s > step_s else max(parts, key=lambda name: parts[name])
    shared_s = processes * (machines.threads * step_s + share / machines.core_rate) / machines.cores
    if shared_s > update_s:
        update_s, limit = shared_s, "cores"
    return Forecast(
        processes=processes,
        way=way,
        batch=batch,
        accumulate=accumulate,
        updates=plan.total_steps,
        memory=taken,
        parts=parts,
        exchange_bytes=sent,
        exchange_s=exchange_s,
        loading_s=loading_s,
        update_s=update_s,
        images_per_s=plan.images_per_step / update_s,
        limit=limit,
    )


def require_forecast(
    config: PretrainConfig,
    recipe: PretrainRecipe,
    work: Work,
    machines: Machines,
    *,
    images: int,
    processes: int,
) -> Forecast:
    """Return what the pretraining takes as it is configured.

    Raises:
        UserError: if it does not fit, naming what would; or if an update cannot be divided among the processes.
    """
    update = config.optim.images_per_update
    if update is not None and processes > update:
        raise UserError(
            f"--gpus {processes}: more than the {update} images of an update; give at most {update}, or raise "
            "optim.images_per_update"
        )
    own = Way(config.train.gradient_checkpointing)

    def look(way: Way) -> Forecast | None:
        return forecast(config, recipe, work, machines, images=images, processes=processes, way=way)

    found = look(own)
    if found is not None:
        return found
    footprint = own.footprint(work, processes)
    assert footprint is not None  # as the network was built so
    memory = machines.memory_of(processes)
    chosen = divided(config, recipe, footprint, memory, on_gpu=machines.on_gpu, processes=processes)
    batch = chosen.data.batch_size
    share = batch * chosen.optim.accumulate
    remedies = [str(way) for way in WAYS if way != own and look(way) is not None]
    smaller = [n for n in range(1, batch) if share % n == 0 and footprint.of(n) <= memory]
    if smaller:
        remedies.insert(0, f"data.batch_size={smaller[-1]} optim.accumulate={share // smaller[-1]}")
    raise UserError(
        f"--config: {config.model.variant} with {batch} image{'s' * (batch > 1)} at once takes about "
        f"{footprint.of(batch) / 1e9:.1f} GB for each process, and {machines.name} has "
        f"{memory / 1e9:.3g}; "
        + (f"what would fit: {', '.join(remedies)}" if remedies else "no way to save memory would make it fit")
    )


WAYS = [Way(checkpointing, sharded) for sharded in (False, True) for checkpointing in (False, True)]
"""All of them, what is least trouble first."""
