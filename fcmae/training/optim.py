"""AdamW's parameter groups: weight decay and layer-wise learning rates; knows no schedule, config or files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

NO_DECAY = ("grn.gamma", "grn.beta", "mask_token")
"""Scales and offsets stored with more than one axis; the official pretraining decays them by accident."""

NO_SCALES: Mapping[str, float] = MappingProxyType({})


def exempt_from_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter takes no weight decay: 1-D, GRN's, or the mask token."""
    return parameter.ndim <= 1 or name.endswith(NO_DECAY)


def layer_scales(
    names: Iterable[str], depths: Sequence[int], *, decay: float, decay_type: Literal["single", "group"]
) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter of a network: decay ** (layers above it).

    "single": each block is a layer; the stem belongs to the first block, a downsampling to the block after it.
    "group": three blocks of the third stage are a layer, each other stage is one, and the stem; the last two
    downsamplings belong to the layer after them, as in the official optim_factory.py, whose fixed 12 layers for
    depths 3, 3, 27, 3 become as many as the third stage needs.

    Args:
        names: of the parameters, an encoder's with or without "encoder." before them; those of no block or
            downsampling are a classifier's or head's, with factor 1.
    """
    top = sum(depths) if decay_type == "single" else 3 + math.ceil(depths[2] / 3)
    scales: dict[str, float] = {}
    for name in names:
        kind, *place = name.removeprefix("encoder.").split(".")
        if kind not in ("downsample_layers", "stages"):
            layer = top + 1
        else:
            stage, block = int(place[0]), int(place[1]) if kind == "stages" else 0
            if decay_type == "single":
                layer = sum(depths[:stage]) + block + 1
            elif kind == "downsample_layers" and stage == 0:
                layer = 0
            else:
                layer = (1, 2, 3 + block // 3, top)[stage]
        scales[name] = decay ** (top + 1 - layer)
    return scales


def build_adamw(
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    scales: Mapping[str, float] = NO_SCALES,
    waiting: tuple[str, int] = ("", 0),
) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable parameters, grouped by weight decay, `lr_scale` and `first_step`.

    Args:
        scales: factors on the learning rate by parameter name, as `layer_scales` gives; 1 for others.
        waiting: what names of parameters begin with that stay as they are for a number of updates, and that number.
    """
    prefix, updates = waiting
    groups: dict[tuple[float, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first_step = updates if name.startswith(prefix) else 0
            key = scales.get(name, 1.0), first_step, exempt_from_decay(name, parameter)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[key],
                "lr_scale": key[0],
                "first_step": key[1],
                "weight_decay": 0.0 if key[2] else weight_decay,
            }
            for key in sorted(groups)
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )
