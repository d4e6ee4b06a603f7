"""What a run's records are found to need a look at: said once, when it is so, and not before."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from small_runs import small_config

from fcmae.training.schedule import Plan
from fcmae.training.watch import IN_A_ROW, SETTLED, Watch


def watch(tmp_path: Path, *, total: int = 1000, warmup: int = 200) -> Watch:
    config = small_config(tmp_path, train={"max_steps": total}, data={"num_workers": 0})
    plan = Plan(num_samples=8, images_per_step=2, total_steps=total, warmup_steps=warmup, peak_lr=1e-3, min_lr=0.0)
    return Watch(config, plan, 1, flat_loss=1.0, score="knn_top1")


def warned_of(watched: Watch, name: str, values: Sequence[float], *, every: int = 20) -> list[int]:
    """The steps at which something is said, of one value in each record."""
    steps = range(0, every * len(values), every)
    found = [(step, watched.see({"step": step, name: value})) for step, value in zip(steps, values, strict=True)]
    return [step for step, texts in found if texts]


def test_a_loss_flat_at_one_is_said_once_after_the_warm_up(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    assert warned_of(watched, "loss", [1.0] * 50) == [200 + 20 * IN_A_ROW]
    assert "the loss has stayed at 1.0" in watched.found["loss"]
    assert "optim.base_lr=1" in watched.found["loss"]


@pytest.mark.parametrize(("total", "settled"), [(3000, 300), (200, SETTLED)])
def test_a_tenth_of_a_run_and_a_hundred_updates_may_pass_without_warm_up(
    tmp_path: Path, total: int, settled: int
) -> None:
    watched = watch(tmp_path, total=total, warmup=0)
    assert warned_of(watched, "loss", [1.0] * 50) == [settled + 20 * IN_A_ROW]


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0, 1.0, 0.97] * 10, [1 - 0.01 * i for i in range(50)]])
def test_a_loss_that_falls_is_fine(tmp_path: Path, losses: list[float]) -> None:
    assert not warned_of(watch(tmp_path), "loss", losses)


def test_other_losses_may_be_what_they_are(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    watched.flat_loss = None
    assert not warned_of(watched, "loss", [1.0] * 50)


@pytest.mark.parametrize(
    ("scores", "steps"),
    [
        ([0.4, 0.3, 0.3, 0.4, 0.39], [300]),
        ([0.4, 0.3, 0.2, 0.41, 0.3, 0.3], []),
        ([0.4, 0.1, 0.1], []),  # too few to say
    ],
)
def test_scores_not_above_the_first_are_said_once(tmp_path: Path, scores: list[float], steps: list[int]) -> None:
    watched = watch(tmp_path)
    assert warned_of(watched, "knn_top1", scores, every=100) == steps
    if steps:
        assert "knn_top1 has not risen above its first value, 40.00%" in watched.found["knn_top1"]


def test_waiting_for_data_is_said_once_when_it_has_lasted_with_what_helps(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    waits = [0.9, 0.5, 0.1, *[0.3] * 20]
    assert warned_of(watched, "data_wait", waits) == [20 * (2 + IN_A_ROW)]
    assert watched.found["data_wait"].startswith(
        "30% of the time goes by waiting for images: raise data.num_workers"
    )
