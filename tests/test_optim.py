"""The schedule as a function of the step, and who takes weight decay."""

import math

import pytest
import torch

from fcmae import FCMAE
from fcmae.optim import build_adamw, exempt_from_decay, learning_rate


def lr(step: int) -> float:
    return learning_rate(step, peak=2.0, floor=0.5, warmup_steps=10, total_steps=110)


def test_the_rate_rises_linearly_from_zero_then_falls_along_half_a_cosine() -> None:
    assert [lr(step) for step in range(11)] == pytest.approx([0.2 * step for step in range(11)])
    expected = [0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) for step in range(10, 111)]
    assert [lr(step) for step in range(10, 111)] == pytest.approx(expected)
    assert lr(10) == 2.0
    assert lr(110) == pytest.approx(0.5)


def test_the_rate_without_warmup_starts_at_the_peak_and_never_rises() -> None:
    rates = [learning_rate(s, peak=1.0, floor=0.0, warmup_steps=0, total_steps=50) for s in range(50)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert all(rate > 0 for rate in rates)


def test_a_run_shorter_than_its_warmup_stays_on_the_ramp() -> None:
    rates = [learning_rate(s, peak=1.0, floor=0.0, warmup_steps=100, total_steps=20) for s in range(20)]
    assert rates == pytest.approx([s / 100 for s in range(20)])


def test_only_matrices_and_kernels_take_weight_decay() -> None:
    model = FCMAE(((1, 1, 1, 1), (8, 8, 16, 16)), decoder_dim=16)
    exempt = {name for name, parameter in model.named_parameters() if exempt_from_decay(name, parameter)}
    decayed = {name for name, _ in model.named_parameters()} - exempt
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert "decoder.mask_token" in exempt
    assert "encoder.stages.0.0.grn.gamma" in exempt
    assert "encoder.downsample_layers.0.0.weight" in decayed
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {named[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {0.05: decayed, 0.0: exempt}
    assert isinstance(optimizer, torch.optim.AdamW)
