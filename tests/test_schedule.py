"""The schedule: the learning rate as a function of the step, and how many updates a run makes."""

import math
from typing import Any

import pytest

from fcmae.config import PretrainConfig, parse_config
from fcmae.training.schedule import Plan, learning_rate


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


def plan(**sections: Any) -> Plan:
    values = {
        "output": "run",
        "model": {"variant": "atto"},
        "data": {"root": "images", "batch_size": 10},
    } | sections
    return Plan.of(parse_config(PretrainConfig, values, "test"), 100, 2)


def test_a_plan_counts_updates_of_all_processes_and_scales_the_rate_by_their_images() -> None:
    found = plan(optim={"accumulate": 2, "base_lr": 0.128, "warmup_epochs": 4}, train={"epochs": 10})
    assert (found.images_per_step, found.total_steps, found.warmup_steps) == (40, 25, 10)
    assert found.peak_lr == pytest.approx(0.128 * 40 / 256)
    assert found.total_epochs == 10
    assert [found.steps_in(epochs) for epochs in (0.01, 1, 2)] == [1, 2, 5]


def test_max_steps_ends_a_plan_and_its_schedule() -> None:
    found = plan(optim={"warmup_epochs": 0, "min_lr": 0.25}, train={"epochs": 10, "max_steps": 7})
    assert found.total_steps == 7
    assert found.lr(7) == pytest.approx(0.25)
