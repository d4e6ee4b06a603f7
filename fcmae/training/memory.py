"""The memory that there is, what a run takes of it at the very least, and what it has taken; builds nothing."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fcmae.config import DataSection, FinetuneConfig, ModelSection, RunConfig
from fcmae.errors import UserError, shown
from fcmae.training.sharding import num_shares

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit is, of version 2 and 1."""
GROWS_WITH = {"decoder": ("decoder_dim",), "head": ("head", "num_classes")}
"""Keys of section `model`, the first that there is, by the part of a network that they make large; of others
`variant`."""
HOST = ("cpu", "mps")
"""Devices that compute in the memory of the computer."""
NORMALISED_BYTES = 4.0
"""Of a pixel as the network sees it, beside which there is the loaded one."""

Part = tuple[str, float, str]
"""A key, the bytes that it asks for beside those of the parts before it, and what to do."""


def ram_bytes() -> int | None:
    """Return the memory of this computer, or of the container; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [int(text) for path in CGROUP_LIMITS if (text := _read(path).strip()).isdigit()]
    return min(limits)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def most_bytes() -> float:
    """Return what no process of this computer can take more of: memory and swap, or `ulimit -v`."""
    ram = ram_bytes()
    swap = [int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if "SwapTotal" in line]
    limit = float("inf") if ram is None else float(ram + sum(swap))
    try:
        import resource
    except ImportError:  # on Windows
        return limit
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit if address_space == resource.RLIM_INFINITY else min(limit, address_space)


def _bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def training_bytes(config: RunConfig, model: nn.Module) -> int:
    """Return the bytes of weights, and of gradients, AdamW's moments and the EMA, where they have such.

    Where parameters are divided among processes, one's share of them.
    """
    ema = isinstance(config, FinetuneConfig) and config.train.ema_decay is not None
    parameters = list(model.parameters())
    whole = (1 + ema) * _bytes_of(parameters) + 3 * _bytes_of(p for p in parameters if p.requires_grad)
    return whole // num_shares()


def _kept_values(config: RunConfig, model: nn.Module) -> float:
    """Values of features that a ConvNeXt keeps of an image for the gradient: at least what goes into each block."""
    network: Any = getattr(model, "encoder", model)
    if network.layer_depths is None:
        return 0.0
    shares = 1 - config.model.mask_ratio if isinstance(config.model, ModelSection) else 1.0
    patches = int(shares * config.data.size[0] * config.data.size[1] / network.patch_size**2)
    widths = zip(network.layer_depths, network.dims, (64, 16, 4, 1), strict=True)
    return patches * sum(depth * dim * finer for depth, dim, finer in widths)


def free_and_total(device: torch.device) -> tuple[float, float]:
    """Return the bytes that this process may still take on a device, and could if it were alone there.

    Infinity where nobody says. Processes of a computer have equal parts of its memory.
    """
    if device.type in ("cuda", "xpu"):
        free, total = getattr(torch, device.type).mem_get_info(device)
        return float(free), float(total)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = _room(device, processes)[0]
    return room, room


def taken_bytes(device: torch.device) -> int:
    """Return the most bytes that tensors have taken on a GPU so far; elsewhere, what this process takes now."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _room(device: torch.device, processes: int) -> tuple[float, str]:
    """Return the bytes that each of so many processes has at most, and where; infinity where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "the GPU"
    if device.type not in HOST:
        return float("inf"), device.type
    where = "this machine" if processes == 1 else f"each of {processes} processes on this machine"
    return most_bytes() / processes, where


def loaded_bytes(data: DataSection) -> int:
    """Return the bytes of a pixel as it is loaded, at least: what kind it is may not be known yet."""
    return {"uint16": 2, "float32": 4}.get(data.dtype or "", 1 if data.nodata in (None, "auto") else 4)


def _images(data: DataSection, bytes_each: float) -> list[Part]:
    fewer = "lower it, and raise optim.accumulate by the same factor"
    return [
        (f"data.image_size={shown(data.image_size)}", bytes_each, "lower it"),
        (f"data.batch_size={data.batch_size}", bytes_each * (data.batch_size - 1), fewer),
    ]


def _require(parts: Iterable[Part], device: torch.device, processes: int = 1) -> None:
    available, where = _room(device, processes)
    needed = 0.0
    for setting, size, remedy in parts:
        needed += size
        if needed > available:
            raise UserError(
                f"{setting}: takes {needed / 1e9:,.1f} GB of memory at the very least, but {where} has "
                f"{available / 1e9:,.1f} GB: {remedy}"
            )


def require_memory(config: RunConfig, model: nn.Module, device: torch.device) -> None:
    """Refuse a training that surely cannot fit into the memory of `device` or of this computer.

    Counted are weights, gradients, AdamW's moments and the EMA, a micro-batch of pixels, of features what goes into
    each block, and a batch in each worker; what else there is, is not.

    Args:
        model: the network, as on the meta device, where it takes no memory.
        device: where it is to be trained.

    Raises:
        UserError: naming the key to lower.
    """
    data = config.data
    frozen = isinstance(config, FinetuneConfig) and config.train.freeze_encoder
    ema = isinstance(config, FinetuneConfig) and config.train.ema_decay is not None
    weights = _bytes_of(model.parameters())
    largest = max(model.named_children(), key=lambda child: _bytes_of(child[1].parameters()))[0]
    key = next((key for key in GROWS_WITH.get(largest, ()) if hasattr(config.model, key)), "variant")
    network = f"model.{key}={shown(getattr(config.model, key))}"
    pixels = config.model.in_chans * data.size[0] * data.size[1]
    kept = 0.0 if frozen else 2 * _kept_values(config, model)  # of two bytes each, in half precision
    share = weights * (1 + ema + 3 * (not frozen)) / num_shares()
    training: list[Part] = [(network, share, "choose a smaller one")]
    training += _images(data, (loaded_bytes(data) + NORMALISED_BYTES) * pixels + kept)
    if device.type in HOST:
        ready = loaded_bytes(data) * pixels * data.batch_size * data.num_workers
        training.append((f"data.num_workers={data.num_workers}", ready, "lower it"))
    else:  # where it is built before it is moved, perhaps by one process after the other
        _require([(network, weights, "choose a smaller one")], torch.device("cpu"))
    _require(training, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def require_batch(data: DataSection, channels: int, device: torch.device) -> None:
    """Refuse a batch whose pixels alone surely cannot fit into the memory of `device`, where no gradient is kept.

    Raises:
        UserError: naming the key to lower.
    """
    pixel_bytes = loaded_bytes(data) + NORMALISED_BYTES
    _require(_images(data, pixel_bytes * channels * data.size[0] * data.size[1]), device)
