"""Start and end of a run: devices, precision and threads of its processes, its folder; knows no model or data."""

import ctypes
import functools
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from fcmae.config import RunConfig
from fcmae.errors import UserError
from fcmae.training.checkpoint import Best, Checkpoint, read_checkpoint
from fcmae.training.lock import Lock, held
from fcmae.training.run_folder import RunFolder, claim_run_folder, require_run_folder
from fcmae.training.stop import Stopped

T = TypeVar("T")

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


def start_accelerator(precision: str) -> Accelerator:
    """Return the Accelerator of this process, computing in `precision` ("auto": as launched).

    Raises:
        UserError: if this device cannot compute so.
    """
    asked_for_more = "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    if asked_for_more and not any(name in os.environ for name in PROCESS_COUNTS):
        raise UserError(
            "accelerate launch starts a single process on CPU, whatever --num_processes says; for N processes: "
            "torchrun --nproc_per_node N SCRIPT --config FILE key=value ..."
        )
    # DDP on CPU otherwise warns of the strides of depthwise kernels' gradients, which it copies
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # float32 is float32: TF32, which cuDNN takes unasked, keeps 10 of its 23 bits, bf16 keeps 7 at twice the speed
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=None if precision == "auto" else precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of them
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"train.precision={precision}: {error}") from error
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        if accelerator.mixed_precision == "fp16":
            raise UserError("train.precision=fp16: needs a GPU; on CPU use bf16 or no")
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
        if launched and os.environ.get("OMP_NUM_THREADS") == "1":  # what launchers set by default
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    return accelerator


def describe_device(accelerator: Accelerator) -> str:
    """Say what a run computes on, and in what, such as "NVIDIA H200, bf16"."""
    device, precision = accelerator.device, accelerator.mixed_precision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    each = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    processes = f"{accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    computed = ("float32 without TF32" if device.type == "cuda" else "float32") if precision == "no" else precision
    return ", ".join(filter(None, [name, processes, each, computed]))


def decide_once(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on the main process, in all processes; what it raises there is raised in all.

    Raises:
        UserError: as `decide`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return decide()
    outcome: list[Any] = [None]
    if PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
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
    if claimed or decided is None:
        return claimed[0] if claimed else None
    path, best = decided
    checkpoint = read_checkpoint(path)
    return checkpoint._replace(state=checkpoint.state.model_copy(update={"best": best}))


@contextmanager
def start_run(config: RunConfig, *, dry_run: bool) -> Iterator[tuple[Accelerator, Checkpoint | None, Lock | None]]:
    """Begin a run, and end it with the block.

    Gives this process's Accelerator, the checkpoint to resume from (None for a new run, or a dry one), and the lock
    of the run folder on the process that holds it, the main one. A dry run takes none.

    Raises:
        UserError: as `start_accelerator`, `require_run_folder`, `held` and `claim_run_folder`.
    """
    accelerator = start_accelerator(config.train.precision)
    with ExitStack() as stack:
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
