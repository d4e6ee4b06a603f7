"""FSDP2: each process keeps some rows of each parameter, of its gradient and moments; knows no network or files.

PyTorch's `fully_shard` does it. A unit of the network is whole while it is computed; with autocast, so that numbers
are those of DDP. All of it is whole in `whole`, the one place where that is asked for.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fcmae.errors import UserError

FSDP = "ACCELERATE_USE_FSDP"
"""What accelerate tells processes by that it was asked for FSDP."""


def num_shares() -> int:
    """Return among how many processes parameters are divided; 1 where each has all of them."""
    asked = os.environ.get(FSDP, "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return int(os.environ.get("WORLD_SIZE", "1")) if asked else 1


class Sharding(NamedTuple):
    """How parameters are divided."""

    units: tuple[str, ...]
    """Names of the classes of modules that become whole by themselves; what is outside of them does together."""
    reshard_after_forward: bool
    """Whether a unit is divided again between its forward and its backward pass."""
    bf16_exchange: bool
    """Whether gradients travel as bf16."""

    def divide(self, model: nn.Module) -> None:
        """Leave each process its rows of a network on its device, which is the same in all.

        Raises:
            UserError: if it has what cannot be divided.
        """
        if not hasattr(FSDPModule, "reset_iter_state"):
            raise UserError(f"FSDP: needs a newer PyTorch than {torch.__version__}; update it, or train with DDP")
        if any(buffer.is_floating_point() for buffer in model.buffers()):
            raise UserError(
                "FSDP: this network has running statistics, such as batch norm's, which nobody divides; train it "
                "with DDP (accelerate launch --multi_gpu)"
            )
        mesh = init_device_mesh(next(model.parameters()).device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if self.bf16_exchange else None)
        units = [module for module in model.modules() if type(module).__name__ in self.units]
        if not units:
            raise UserError(
                f"FSDP: this network has no {' or '.join(self.units)}; name its blocks' class where accelerate is "
                "configured: fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_transformer_layer_cls_to_wrap"
            )
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        fully_shard.state(model)._lazy_init()  # pyright: ignore[reportFunctionMemberAccess]
        # or the first unit that is called would be taken for the whole, where an evaluation comes first
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def divide_with(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """As `divide`; an optimizer that has no state yet takes over the parameters that come of it."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.divide(model)
        new = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [new[names[parameter]] for parameter in group["params"]]

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """Inside, each process has the whole of divided networks; begun by all, they may be computed by any.

        No gradient may be left from before, and none is computed inside.
        """
        roots = [model for model in models if isinstance(model, FSDPModule)]
        units = [unit for root in roots for unit in root.modules() if isinstance(unit, FSDPModule)]
        for unit in units:
            if unit not in roots:
                unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for root in roots:
                root.reset_iter_state()  # or what one process alone computed would count as its next forward pass
            for unit in units:
                if unit not in roots:
                    unit.set_reshard_after_forward(self.reshard_after_forward, recurse=False)


def divided(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors, the same in all processes, divided as those of the same names in `like` are."""

    def share(tensor: Tensor, pattern: Tensor | None) -> Tensor:
        if not isinstance(pattern, DTensor) or not tensor.ndim:
            return tensor
        own = tensor.to(pattern.device)
        return distribute_tensor(own, pattern.device_mesh, pattern.placements, src_data_rank=None)

    return {name: share(tensor, like.get(name)) for name, tensor in tensors.items()}


def norm_of_all(norm: Tensor) -> Tensor:
    """Return the norm of a gradient, divided or not, as a number on this process's device."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Rows(NamedTuple):
    """What a process has of a tensor."""

    tensor: Tensor
    start: int
    """Rows of the whole before its own."""
    shape: tuple[int, ...]
    """Of the whole."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Rows":
        """Return a process's own rows: of a tensor that is not divided, all in the first process alone."""
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            mine = torch.distributed.get_rank() == 0
            return cls(tensor.detach() if mine else tensor.detach().new_empty(0), 0, shape)
        each = -(-shape[0] // tensor.device_mesh.size())  # as torch.chunk divides
        return cls(tensor.to_local().detach(), min(tensor.device_mesh.get_rank() * each, shape[0]), shape)
