"""What training a network asks for, whoever computes it, counted on tensors without numbers; knows no machine."""

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fcmae.config import PretrainConfig
from fcmae.errors import blame
from fcmae.masking import MaskSampler
from fcmae.model import FCMAE
from fcmae.patches import grid_shape
from fcmae.training.batch import Footprint, move
from fcmae.training.memory import training_bytes

COUNTED = 8
"""Images whose arithmetic is counted, which is the same for each."""


def build(config: PretrainConfig) -> tuple[FCMAE, MaskSampler]:
    """Return the network of a pretraining, on the device that is set, and what draws its masks.

    Raises:
        UserError: naming the section or key that does not fit.
    """
    with blame("model"):
        model = FCMAE(**config.model.model_dump(), nodata=config.data.nodata is not None)
    with blame("data.image_size"):
        draw_ids = model.mask_sampler(grid_shape(config.data.size, model.patch_size))
    with blame("train.gradient_checkpointing"):
        model.encoder.gradient_checkpointing = config.train.gradient_checkpointing
    return model, draw_ids


def units(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what FSDP gathers one after the other: blocks, which are members of lists and hold no lists."""
    lists = (nn.Sequential, nn.ModuleList)
    for group in model.modules():
        for member in group.children() if isinstance(group, lists) else ():
            if not any(isinstance(module, lists) for module in member.modules()):
                yield member


class Work(NamedTuple):
    """What a training asks for in memory, arithmetic and traffic."""

    parameters: int
    tensors: int
    """Parameters, as tensors: for each of them a step launches a few kernels."""
    flop: float
    """Of an image, forward and backward; a multiplication with an addition is two."""
    state_bytes: float
    """Weights, gradients and moments: what FSDP divides among the processes."""
    unit_bytes: float
    """Weights of the largest of `units`."""
    footprint: Footprint
    """All memory of a process, with the activations that are kept for the backward pass."""
    checkpointed: Footprint | None
    """The same with gradient checkpointing; None where the network's blocks cannot be computed twice."""

    @classmethod
    def count(cls, config: PretrainConfig, device: torch.device, precision: str) -> Self:
        """Count what a pretraining asks for on a device, which need not be there.

        The backward pass has twice the arithmetic of the forward pass.

        Args:
            precision: "no", "bf16" or "fp16".

        Raises:
            UserError: if the network does not fit its images, or cannot be computed without numbers.
        """
        with torch.device("meta"):
            outline, draw_ids = build(config)

        def step(model: nn.Module, number: int, device: torch.device) -> Tensor:
            images = torch.empty(number, config.model.in_chans, *config.data.size, device=device)
            ids = torch.empty(number, draw_ids.num_visible, dtype=torch.int64, device=device)
            return model(images, ids).loss

        def footprint(again: bool) -> Footprint:
            outline.encoder.gradient_checkpointing = again
            return Footprint.estimate(config, outline, step, device, precision)

        plain = footprint(False)
        checkpointed = None if outline.encoder.why_not_twice else footprint(True)
        parameters = list(outline.parameters())
        sizes = [sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in units(outline)]
        state_bytes = training_bytes(config, outline)
        outline.encoder.gradient_checkpointing = False
        with FakeTensorMode():
            move(outline, torch.device("cpu"))
            with FlopCounterMode(display=False) as counted:
                step(outline, COUNTED, torch.device("cpu"))
        return cls(
            parameters=sum(parameter.numel() for parameter in parameters),
            tensors=len(parameters),
            flop=3 * counted.get_total_flops() / COUNTED,
            state_bytes=state_bytes,
            unit_bytes=max(sizes),
            footprint=plain,
            checkpointed=checkpointed,
        )
