"""Start and end of a run: devices, precision and threads of its processes, its folder; knows no model or data."""

import ctypes
import functools
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from fcmae import __version__
from fcmae.config import RunConfig, TrainSection
from fcmae.errors import UserError, blame
from fcmae.training.agree import agree, in_all
from fcmae.training.batch import Footprint, Room, Run, Step, with_batch
from fcmae.training.checkpoint import SUMS, Best, Checkpoint, read_checkpoint, read_sums
from fcmae.training.heartbeat import heartbeat
from fcmae.training.lock import Lock, held
from fcmae.training.memory import free_and_total
from fcmae.training.run_folder import RunFolder, claim_run_folder, require_run_folder
from fcmae.training.sharding import FSDP, Sharding
from fcmae.training.stop import Stopped
from fcmae.training.trackers import require_trackers

T = TypeVar("T")

MOST_BYTES = 2**60
"""Of memory, in place of infinity, as processes tell each other whole numbers."""

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and the MPI launchers say how many processes there are."""

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: large tensors given back to the system at once cost page faults in every step.

    Without effect where the C library is another one. A process keeps its peak of memory until it ends.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MALLOC_MMAP_MAX, 0)
        libc.mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def without_gpu() -> bool:
    """Whether there is no GPU, or `accelerate launch --cpu` leaves it alone."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def launched_precision() -> str | None:
    """Return the precision that accelerate was launched or configured with; None also for "no", its default."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return None if asked == "no" else asked


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU is known to compute bf16 by instructions of its own, which nobody says of Apple's."""
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu}
    return device.type in kinds and kinds[device.type].is_bf16_supported(including_emulation=False)


def start_processes() -> None:
    """Let the processes of a run talk to each other, where there are several.

    Raises:
        UserError: for an engine that is none of ours.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed: its engine makes the update and writes pickles; FSDP2 divides weights as ZeRO-3 does, and "
            "DDP is enough up to Base: launch with one of configs/accelerate, or without --use_deepspeed"
        )
    PartialState(cpu=without_gpu())


def start_accelerator(precision: str, *, bf16_exchange: bool = False) -> Accelerator:
    """Return the Accelerator of this process, computing in `precision` ("auto": as launched, else as suits it).

    With `bf16_exchange` DDP sends gradients as bf16.

    Raises:
        UserError: if this device cannot compute so.
    """
    asked_for_more = "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    if asked_for_more and not any(name in os.environ for name in PROCESS_COUNTS):
        raise UserError(
            "accelerate launch starts a single process on CPU, whatever --num_processes says; for N processes: "
            "torchrun --nproc_per_node N SCRIPT --config FILE key=value ..."
        )
    start_processes()
    # DDP on CPU otherwise warns of the strides of depthwise kernels' gradients, which it copies
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        if (chosen := precision) == "auto":
            device: Any = PartialState(cpu=without_gpu()).device
            chosen = launched_precision() or decide_once(lambda: "bf16" if has_bf16(device) else "no")
        accelerator = Accelerator(
            cpu=without_gpu(),
            mixed_precision=chosen,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,  # no second copy of them
                    comm_hook=DDPCommunicationHookType.BF16 if bf16_exchange else DDPCommunicationHookType.NO,
                )
            ],
            # the trainer's own, whatever was launched: accelerate would divide losses by its number once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"train.precision={precision}: {error}") from error
    # float32 is float32, whatever accelerate or the environment said: TF32, which cuDNN takes unasked, keeps 10 of
    # its 23 bits, bf16 keeps 7 at twice the speed
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        if accelerator.mixed_precision == "fp16":
            raise UserError("train.precision=fp16: needs a GPU; on CPU use bf16 or no")
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
        if launched and os.environ.get("OMP_NUM_THREADS") == "1":  # what launchers set by default
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    return accelerator


UNITS = ("Block",)
"""Names of the classes of modules that FSDP divides each by itself, unless accelerate was told of others."""


def asked_sharding(train: TrainSection) -> Sharding | None:
    """Return how parameters are divided among processes, if accelerate was launched with FSDP; None for not.

    Raises:
        UserError: for what of it cannot be done.
    """
    if not (parse_flag_from_env(FSDP) and torch.distributed.is_initialized()):
        return None
    with blame("FSDP, as accelerate was asked for it"):
        plugin: Any = FullyShardedDataParallelPlugin()
    refused = {
        "of version 1: set fsdp_version: 2 in accelerate's configuration": plugin.fsdp_version != 2,
        "with parameters on the CPU: set fsdp_offload_params: false": isinstance(
            plugin.cpu_offload, CPUOffloadPolicy
        ),
        "with its own checkpointing of activations: set train.gradient_checkpointing=true, and "
        "fsdp_activation_checkpointing: false": plugin.activation_checkpointing,
        "with train.compile=true: leave that out": train.compile,
        "with train.precision=fp16: take bf16": train.precision == "fp16",
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"FSDP {what}")
    return Sharding(
        units=tuple(plugin.transformer_cls_names_to_wrap or UNITS),
        reshard_after_forward=plugin.reshard_after_forward,
        bf16_exchange=train.bf16_exchange,
    )


def command_line() -> str:
    """Return the command that this process was started by, without the folders of Python and `fcmae`."""
    words = sys.orig_argv[1:]
    if words and Path(words[0]).stem == "fcmae":
        return shlex.join(["fcmae", *words[1:]])
    return shlex.join(["python", *words])


def cores_per_process() -> int:
    """Return how many processor cores each process of the run has on this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def describe_device(accelerator: Accelerator) -> str:
    """Say what a run computes on, such as "8 x NVIDIA H200 of 151 GB"."""
    device, processes = accelerator.device, accelerator.num_processes
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cpu":
        return f"{times}cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    name = getattr(torch, device.type).get_device_name(device) if device.type in ("cuda", "xpu") else device.type
    memory = free_and_total(device)[1]
    return f"{times}{name}" + ("" if memory == float("inf") else f" of {memory / 1e9:.0f} GB")


def describe_precision(accelerator: Accelerator, asked: str) -> str:
    """Say what a run computes in, and why, such as "bf16 (auto: the GPU has it; train.precision=no is float32)".

    Args:
        asked: the value of train.precision.
    """
    device, computed = accelerator.device.type, accelerator.mixed_precision
    name = ("float32 without TF32" if device == "cuda" else "float32") if computed == "no" else computed
    if asked != "auto":
        return f"{name} (train.precision={asked})"
    if launched_precision():
        return f"{name} (auto: as launched)"
    if computed == "bf16":
        return f"{name} (auto: the GPU has it; train.precision=no is float32)"
    return f"{name} (auto: " + ("on a CPU)" if device == "cpu" else "nothing says that the GPU has bf16)")


def choose_batch(
    config: Run,
    recipe: RunConfig,
    outline: nn.Module,
    step: Step,
    *,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> tuple[Run, str]:
    """Put numbers where the recipe has `auto` for the size of batches, the same in all processes; says why, too.

    Args:
        outline: the network on the meta device.
        step: computes the loss of some images with it, as the run does.

    Raises:
        UserError: as `with_batch` and `Footprint.estimate`.
    """
    device, precision = accelerator.device, accelerator.mixed_precision
    return with_batch(
        config,
        recipe,
        lambda: Footprint.estimate(config, outline, step, device, precision),
        room=lambda: _room_of_all(accelerator),
        on_gpu=device.type != "cpu",
        processes=accelerator.num_processes,
        state=checkpoint and checkpoint.state,
    )


def _room_of_all(accelerator: Accelerator) -> Room:
    own = [min(size, MOST_BYTES) for size in free_and_total(accelerator.device)]
    rows = accelerator.gather(torch.tensor([own], dtype=torch.int64, device=accelerator.device))
    free, total = rows.amin(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return Room(*(float("inf") if size == MOST_BYTES else float(size) for size in (free, total)))


def decide_once(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on the main process, in all processes; what it raises there is raised in all.

    Raises:
        UserError: as `decide`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return decide()
    outcome: list[Any] = [None]
    if PartialState(cpu=without_gpu()).is_main_process:
        try:
            outcome = [decide()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def claim_checkpoint(config: RunConfig) -> Checkpoint | None:
    """Return what `claim_run_folder` does, decided on the main process and read by each.

    Raises:
        UserError: as `claim_run_folder`.
    """
    claimed: list[Checkpoint | None] = []

    def claim() -> tuple[Path, Best | None] | None:
        checkpoint = claim_run_folder(config)
        claimed.append(checkpoint)
        return checkpoint and (checkpoint.path, checkpoint.state.best)

    decided = decide_once(claim)
    if decided is None:
        return None
    path, best = decided
    checkpoint = in_all(lambda: next(filter(None, claimed), None) or read_checkpoint(path))
    facts = {f"{path}: its step": checkpoint.state.step, f"{path}: its {SUMS}": read_sums(path)}
    agree(facts, "all processes must see the same output folder")
    return checkpoint._replace(state=checkpoint.state.model_copy(update={"best": best}))


FREE = ("data.num_workers",)
"""Keys that may differ between processes."""


def require_same_settings(config: RunConfig, *, dry_run: bool) -> None:
    """Make sure that all processes were started alike, before they do anything together.

    Raises:
        UserError: if not, in all of them.
    """

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" not in FREE:
                yield f"{prefix}{name}", value

    packages = {"the version of fcmae": __version__, "the version of torch": torch.__version__}
    agree(packages, "install the same on all machines")
    facts = {"the kind of run": type(config).__name__, "--dry-run": dry_run, **dict(flat(config.model_dump()))}
    agree(facts, "start all processes by the same command, with the same configuration")


@contextmanager
def start_run(config: RunConfig, *, dry_run: bool) -> Iterator[tuple[Accelerator, Checkpoint | None, Lock | None]]:
    """Begin a run, and end it with the block.

    Gives this process's Accelerator, the checkpoint to resume from (None for a new run, or a dry one), and the lock
    of the run folder on the process that holds it, the main one. A dry run takes none.

    Raises:
        UserError: as `require_trackers`, `start_accelerator`, `require_run_folder`, `held` and `claim_run_folder`.
    """
    start_processes()
    require_same_settings(config, dry_run=dry_run)
    in_all(lambda: require_trackers(config.log.loggers))
    accelerator = start_accelerator(config.train.precision, bf16_exchange=config.train.bf16_exchange)
    with ExitStack() as stack:
        stack.enter_context(heartbeat(accelerator.process_index, accelerator.num_processes))
        checkpoint, locks = None, []

        def take() -> None:
            require_run_folder(config)
            say = functools.partial(print, flush=True)
            locks.append(stack.enter_context(held(RunFolder(config.output).lock, say=say)))

        if not dry_run:
            decide_once(take)
            checkpoint = claim_checkpoint(config)

        @stack.push
        def end(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None or issubclass(kind, Stopped):  # else others may still wait for this process
                accelerator.end_training()

        accelerator.wait_for_everyone()  # until every process has seen the folder as it was
        yield accelerator, checkpoint, locks[0] if locks else None
