"""The schedule: the learning rate as a function of the step, and how many updates a run makes."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from fcmae.config import FinetuneConfig, FinetuneRecipe, PretrainConfig, PretrainRecipe, load_config, parse_config
from fcmae.errors import UserError
from fcmae.training.schedule import Plan, is_due, learning_rate, times_due


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


def test_a_linear_decline_loses_as_much_with_each_step_down_to_the_floor() -> None:
    rates = [
        learning_rate(s, peak=2.0, floor=0.5, warmup_steps=10, total_steps=110, decline="linear")
        for s in range(111)
    ]
    assert rates[:11] == pytest.approx([0.2 * s for s in range(11)])
    assert rates[10:] == pytest.approx([2.0 - 1.5 * s / 100 for s in range(101)])


def test_the_configuration_says_how_the_rate_of_fine_tuning_declines() -> None:
    path = ROOT / "configs/finetune/atto.yaml"
    cosine, linear = (
        Plan.of(configuration(path, f"optim.schedule={how}", "optim.warmup_epochs=0"), 1_000_000, 1)
        for how in ("cosine", "linear")
    )
    quarter = cosine.total_steps // 4
    assert linear.lr(quarter) == pytest.approx(0.75 * linear.peak_lr, rel=1e-2)
    assert cosine.lr(quarter) == pytest.approx(0.5 * (1 + math.sqrt(0.5)) * cosine.peak_lr, rel=1e-2)


def test_upernets_recipes_make_160000_updates_of_16_images_after_a_warm_up_of_1500() -> None:
    for size in ("base", "large", "huge"):
        found = Plan.of(configuration(ROOT / f"configs/finetune/upernet-{size}.yaml"), 20_210, 8)
        assert (found.images_per_step, found.total_steps, found.warmup_steps) == (16, 160_000, 1500)
        assert found.peak_lr == pytest.approx(1e-4)
        assert (found.min_lr, found.decline) == (0.0, "linear")


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


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [
        (31, 250, [31, 62, 93, 124, 155, 186, 217, 250]),  # 248 would be the end's twice
        (5, 12, [5, 10, 12]),
        (4, 12, [4, 8, 12]),
        (8, 10, [8, 10]),
        (9, 10, [10]),
        (20, 10, [10]),
        (1, 3, [1, 2, 3]),
    ],
)
def test_an_interval_that_ends_just_before_the_end_is_left_out(every: int, total: int, expected: list[int]) -> None:
    assert [step for step in range(1, total + 1) if is_due(step, every, total)] == expected
    for step in range(total + 1):
        assert times_due(step, every, total) == sum(due > step for due in expected)


# What is far from recipes


CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("ablations", "accelerate")
)
IMAGES = {
    "cifar10": 50_000,
    "few-labels": 10_000,
    "quickstart": 13,
    "small-": 2_000,
    "multilabel": 2_000,
    "segmentation": 2_000,
    "upernet": 20_210,
    "regression": 2_000,
    "continue": 2_000,
}
"""How many images a configuration is for, by a part of its name; ImageNet's for others."""


def configuration(path: Path, *overrides: str) -> PretrainConfig | FinetuneConfig:
    finetuning = "val_split" in path.read_text().split("optim:")[0]
    if finetuning:
        return load_config(FinetuneRecipe, path, ["data.root=images", *overrides]).resolve(
            {"model.variant": "atto"}, str(path)
        )
    return load_config(PretrainRecipe, path, ["data.root=images", *overrides])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_shipped_configuration_is_warned_of_on_its_own_hardware(path: Path) -> None:
    config = configuration(path)
    images = next((number for part, number in IMAGES.items() if part in path.stem), 1_281_167)
    processes = 8 if "8 GPUs" in path.read_text() else 1
    assert Plan.of(config, images, processes).concerns(config) == []


def test_a_rate_far_from_those_of_recipes_is_warned_of_with_one_that_would_do() -> None:
    def concerns(*overrides: str) -> str:
        config = configuration(ROOT / "configs/pretrain/atto.yaml", "optim.images_per_update=64", *overrides)
        return "\n".join(Plan.of(config, 1_281_167, 1).concerns(config))

    found = concerns()  # the paper's base_lr at 64 images per update
    assert "a peak learning rate of 3.75e-05, low for 64 images per update; " in found
    assert "optim.base_lr=0.0064 would give 0.0016" in found
    assert concerns("optim.base_lr=0.0064") == ""
    assert "high for 64 images" in concerns("optim.base_lr=0.1")
    assert concerns("optim.base_lr=0") == "", "which is nobody's mistake"


def test_fine_tuning_has_bounds_of_its_own() -> None:
    def concerns(name: str, *overrides: str) -> str:
        config = configuration(ROOT / "configs" / "finetune" / f"{name}.yaml", *overrides)
        return "\n".join(Plan.of(config, 50_000, 1).concerns(config))

    assert concerns("tiny") == ""
    assert "would give 0.001" in concerns("tiny", "optim.base_lr=1e-5")
    assert "high" in concerns("tiny", "optim.base_lr=0.02")
    assert "high" not in concerns("tiny", "optim.base_lr=0.02", "train.freeze_encoder=true")


def test_few_updates_and_a_warmup_without_end_are_warned_of_with_the_remedy() -> None:
    def concerns(images: int, *overrides: str) -> list[str]:
        config = configuration(ROOT / "configs/pretrain/cifar10.yaml", *overrides)
        return Plan.of(config, images, 1).concerns(config)

    (few,) = concerns(100)
    assert "79 updates are few to learn from; train.epochs=1536 would make 300" in few
    assert (
        "train.max_steps=300 would make 300" in concerns(50_000, "train.max_steps=40", "optim.warmup_epochs=0")[0]
    )
    (warmup,) = concerns(50_000, "train.epochs=10")
    assert "optim.warmup_epochs=0.5 would be a twentieth" in warmup


def test_more_updates_than_checkpoints_can_be_numbered_are_refused() -> None:
    with pytest.raises(UserError, match=r"^train\.epochs=1e\+09: makes 5,000,000,000 updates"):
        plan(train={"epochs": 1e9})
    assert plan(train={"epochs": 1e9, "max_steps": 5}).total_steps == 5
