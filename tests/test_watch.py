"""What a run's records are found to need a look at: said once, when it is so, and not before."""

from collections.abc import Sequence

import pytest

from fcmae.config import PretrainConfig, load_config
from fcmae.training.schedule import Plan
from fcmae.training.watch import IN_A_ROW, KNN, SETTLED, Watch

CORES = 8


def watch(*overrides: str, total: int = 1000, warmup: int = 200) -> Watch:
    config = load_config(PretrainConfig, "quickstart", overrides)
    plan = Plan(num_samples=8, images_per_step=2, total_steps=total, warmup_steps=warmup, peak_lr=1e-3, min_lr=0.0)
    return Watch(config, plan, cores=CORES)


def warned_of(watched: Watch, name: str, values: Sequence[float], *, every: int = 20) -> list[int]:
    """The steps at which something is said, of one value in each record."""
    steps = range(0, every * len(values), every)
    found = [(step, watched.see({"step": step, name: value})) for step, value in zip(steps, values, strict=True)]
    return [step for step, texts in found if texts]


def test_a_loss_flat_at_one_is_said_once_after_the_warm_up() -> None:
    watched = watch()
    assert warned_of(watched, "loss", [1.002] * 50) == [200 + 20 * IN_A_ROW]
    assert "the loss stays at 1.002" in watched.found["loss"]
    assert "optim.base_lr=0.025" in watched.found["loss"]


@pytest.mark.parametrize(("total", "settled"), [(3000, 300), (200, SETTLED)])
def test_a_tenth_of_a_run_and_a_hundred_updates_may_pass_without_warm_up(total: int, settled: int) -> None:
    assert warned_of(watch(total=total, warmup=0), "loss", [1.0] * 50) == [settled + 20 * IN_A_ROW]


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0, 1.0, 0.97] * 10, [1 - 0.01 * i for i in range(50)]])
def test_a_loss_that_falls_is_fine(losses: list[float]) -> None:
    assert not warned_of(watch(), "loss", losses)


def test_a_loss_that_is_not_of_normalised_patches_may_be_at_one_if_it_fell() -> None:
    losses = [1.5 - 0.01 * i for i in range(50)]
    assert not warned_of(watch("model.norm_pix_loss=false"), "loss", losses)
    assert warned_of(watch(), "loss", losses)


def test_a_loss_not_below_its_first_is_said_whatever_it_is_of() -> None:
    watched = watch("model.norm_pix_loss=false")
    assert warned_of(watched, "loss", [0.3, *[0.35] * 50]) == [200 + 20 * IN_A_ROW]
    assert "has not fallen, from 0.3000 to 0.3500" in watched.found["loss"]


@pytest.mark.parametrize(
    ("scores", "steps"),
    [
        ([0.4, 0.3, 0.3, 0.4, 0.39], [300]),
        ([0.4, 0.3, 0.2, 0.41, 0.3, 0.3], []),
        ([0.4, 0.1, 0.1], []),  # too few to say
    ],
)
def test_k_nn_not_above_the_first_is_said_once(scores: list[float], steps: list[int]) -> None:
    watched = watch()
    assert warned_of(watched, KNN, scores, every=100) == steps
    if steps:
        assert "the accuracy of k-NN has not risen above its first value, 40.00%" in watched.found[KNN]


def test_waiting_for_data_is_said_once_when_it_has_lasted_with_what_helps() -> None:
    watched = watch("data.num_workers=2")
    waits = [0.9, 0.5, *[0.1] * 5, *[0.3] * 20]
    assert warned_of(watched, "data_wait", waits) == [20 * (6 + IN_A_ROW // 2 + 1)]
    said = "30% of the time goes by waiting for images: raise data.num_workers=2, there are 8 cores"
    assert watched.found["data_wait"].startswith(said)


@pytest.mark.parametrize(("name", "bad", "good"), [("loss", 1.0, 0.9), ("data_wait", 0.5, 0.1), (KNN, 0.3, 0.5)])
def test_what_has_become_better_is_no_longer_held_against_a_run(name: str, bad: float, good: float) -> None:
    watched = watch()
    assert warned_of(watched, name, [0.5 if name == KNN else 1.0, *[bad] * 30])
    assert name in watched.found
    warned_of(watched, name, [*[bad] * 15, *[good + 0.01] * 15])
    assert watched.found == {}
