"""AdamW's parameter groups and the learning rate as a pure function of the step; knows no config or files."""

import math

import torch
from torch import nn

NO_DECAY = ("grn.gamma", "grn.beta", "mask_token")
"""Scales and offsets stored with more than one axis; the official pretraining decays them by accident."""


def exempt_from_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter takes no weight decay: 1-D, GRN's, or the mask token."""
    return parameter.ndim <= 1 or name.endswith(NO_DECAY)


def build_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable parameters, in two groups: decayed and exempt."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[exempt_from_decay(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[False], "weight_decay": weight_decay},
            {"params": groups[True], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


def learning_rate(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `floor` (official main_pretrain.py).

    Args:
        step: the update that is about to be made, from 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
