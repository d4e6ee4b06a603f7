"""Devices, precision and threads of the processes of a run; knows no model or data."""

import ctypes
import os
import platform
import warnings

import torch
from accelerate import Accelerator

from fcmae.errors import UserError

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
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=None if precision == "auto" else precision,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"train.precision={precision}: {error}") from error
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        if accelerator.mixed_precision == "fp16":
            raise UserError("train.precision=fp16: needs a GPU; on CPU use bf16 or no")
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
        if launched and os.environ.get("OMP_NUM_THREADS") == "1":  # what launchers set when not told otherwise
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))
    return accelerator
