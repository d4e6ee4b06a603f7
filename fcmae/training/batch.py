"""How many images a process computes at once, as many as fit by a forward pass without numbers; knows no model."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fcmae.config import AUTO, PretrainConfig, RunConfig
from fcmae.errors import UserError, brief
from fcmae.training.checkpoint import State
from fcmae.training.memory import loaded_bytes, training_bytes

MOST_ON_GPU, MOST_ON_CPU = 512, 32
"""Images at once, at most: more would keep a GPU hardly busier, but fill the memory of those who load images, and
leave the cache of a CPU."""
SHARE = 0.8
"""Of the memory that is free: the rest is for what evaluation and the allocator take, and for errors of this."""
BACKWARD = 3
"""Tensors as large as the largest that the backward pass of a block makes while all that was kept is there."""
TRIED = 32, 64
"""Images computed without numbers: even, as for pairs, and so many that no weight is the largest tensor."""

Step = Callable[[nn.Module, int, torch.device], Tensor]
"""(network, number of images, device) -> the loss of so many images, whatever they show."""


class LiveBytes(TorchDispatchMode):
    """Inside, count the bytes of tensors that operations make and that are still there: `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = self.largest = 0
        self.sizes: dict[int, int] = {}
        """Of storages, by their address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self.sizes:
            self.sizes[place] = storage.nbytes()
            self.live += storage.nbytes()
            self.most, self.largest = max(self.most, self.live), max(self.largest, storage.nbytes())
            weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self.live -= self.sizes.pop(place)


def move(model: nn.Module, device: torch.device) -> None:
    """Give a network uninitialised tensors on a device."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)


def step_bytes(outline: nn.Module, step: Step, images: int, device: torch.device, dtype: torch.dtype | None) -> int:
    """Return about the most bytes that a step takes besides weights and their gradients.

    These are those of a forward pass, with what it keeps, and `BACKWARD`. Nothing is computed: tensors have shapes
    and no numbers, and the device need not be there.

    Args:
        outline: the network on the meta device.
        dtype: of autocast; None for none.
    """
    kind = device.type
    before = torch.get_autocast_dtype(kind)
    model = copy.deepcopy(outline)
    try:
        with FakeTensorMode():
            move(model, device)
            with LiveBytes() as counted:
                if dtype is not None:  # by hand: torch.autocast does nothing for a device that is not there
                    torch.set_autocast_dtype(kind, dtype)
                    torch.set_autocast_enabled(kind, True)
                step(model, images, device)
    finally:
        torch.set_autocast_enabled(kind, False)
        torch.set_autocast_dtype(kind, before)
        torch.clear_autocast_cache()
    return counted.most + BACKWARD * counted.largest


class Footprint(NamedTuple):
    """Bytes of memory that a training takes: estimated, not measured."""

    fixed: float
    image: float
    """For each image of a batch."""

    def of(self, images: int) -> float:
        return self.fixed + images * self.image

    @classmethod
    def estimate(
        cls, config: RunConfig, outline: nn.Module, step: Step, device: torch.device, precision: str
    ) -> "Footprint":
        """Count weights, gradients, moments and EMA, a step, and two batches of images as they are loaded.

        Args:
            outline: the network on the meta device.
            precision: "no", "bf16" or "fp16".

        Raises:
            UserError: if the network cannot be computed without numbers.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        try:
            few, more = (step_bytes(outline, step, images, device, dtype) for images in TRIED)
        except Exception as error:  # whatever a network of others does with numbers
            raise UserError(
                f"data.batch_size=auto: the memory of this network cannot be estimated ({brief(error)}); set "
                "data.batch_size to a number"
            ) from error
        each = (more - few) / (TRIED[1] - TRIED[0])
        loaded = 2 * loaded_bytes(config.data) * config.model.in_chans * config.data.size[0] * config.data.size[1]
        return cls(training_bytes(config, outline) + max(few - TRIED[0] * each, 0), each + loaded)


class Room(NamedTuple):
    """Bytes of memory that each process has, the least of all; infinity where nobody says."""

    free: float
    total: float


Run = TypeVar("Run", bound=RunConfig)


def with_batch(
    config: Run,
    recipe: RunConfig,
    estimate: Callable[[], Footprint],
    *,
    room: Callable[[], Room],
    on_gpu: bool,
    processes: int,
    state: State | None,
) -> tuple[Run, str]:
    """Return the configuration with numbers where the recipe has `auto` for batch_size or accumulate, and why.

    A run that goes on keeps its batch, if that makes up the images of an update and fits at all.

    Args:
        estimate: says what the training takes.
        room: says what there is.
        state: of the checkpoint that the run goes on from.

    Raises:
        UserError: if images_per_update cannot be divided so, or is not what numbers make.
    """
    update, batch, accumulate = recipe.optim.images_per_update, recipe.data.batch_size, recipe.optim.accumulate
    if update is None:
        return config, ""
    key, among = f"optim.images_per_update={update}", f"{processes} process{'es' * (processes > 1)}"
    share, reason = update // processes, ""
    if share * processes != update or not share:
        raise UserError(f"{key}: cannot be divided among {among}; {max(share, 1) * processes} can")
    if AUTO not in (batch, accumulate):
        if batch * accumulate != share:
            raise UserError(
                f"{key}: is not data.batch_size={batch} x optim.accumulate={accumulate} x {among}; make one of "
                "them auto, or set optim.images_per_update=null"
            )
        return config, ""
    for name, given in (("data.batch_size", batch), ("optim.accumulate", accumulate)):
        if given != AUTO and share % given:
            raise UserError(f"{name}={given}: does not divide {share}, the share of each of {among} in {key}")
    if batch == AUTO and accumulate == AUTO:
        if isinstance(config, PretrainConfig) and config.model.layout == "minkowski":
            raise UserError("data.batch_size=auto: nobody knows what MinkowskiEngine takes; set it to a number")
        footprint, there = estimate(), room()
        before = state.config["data"]["batch_size"] if state else None
        if before and share % before == 0 and footprint.of(before) <= there.total:
            batch, reason = before, "auto: as before"
        else:
            known = there.free < float("inf")
            most = MOST_ON_GPU if on_gpu and known else MOST_ON_CPU
            batch = fitting(share, footprint, SHARE * there.free, most, pairs=config.mixes_pairs)
            reason = f"auto: takes about {footprint.of(batch) / 1e9:.1f} GB"
            reason += f" of {there.free / 1e9:.0f}" if known else ""
    elif batch == AUTO:
        batch = share // accumulate
    if config.mixes_pairs and batch % 2:
        raise UserError(f"{key}: makes batches of {batch} for {among}, but mixup and cutmix mix pairs")
    data = config.data.model_copy(update={"batch_size": batch})
    optim = config.optim.model_copy(update={"accumulate": share // batch})
    return cast(Run, config.model_copy(update={"data": data, "optim": optim})), reason


def fitting(share: int, footprint: Footprint, available: float, most: int, *, pairs: bool = False) -> int:
    """Return the largest divisor of `share` that fits; a power of two wins over others less than twice as large.

    Where none fits, the smallest; with `pairs` an even one, if there is any.
    """
    divisors = [n for n in range(1, min(share, most) + 1) if share % n == 0]
    if pairs:
        divisors = [n for n in divisors if n % 2 == 0] or divisors
    fit = [n for n in divisors if footprint.of(n) <= available] or divisors[:1]
    return max(fit, key=lambda n: n if n & (n - 1) else 2 * n)
