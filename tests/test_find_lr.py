"""--find-lr: what it suggests trains well, nothing but its picture is left, bad input is refused in a line."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import error_line, records, run_main
from PIL import Image

from fcmae import find_lr, finetune, pretrain
from fcmae.data import save_arrays
from fcmae.errors import UserError
from fcmae.find_lr import LOWEST, PER_DECADE, RateSweep, find, has_diverged, smooth
from fcmae.seeding import cpu_states
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

TINY = "[[1,1,1,1],[8,8,16,16]]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 32 px, waves of one patch's length, with labels that say to which side of the middle."""
    root = tmp_path_factory.mktemp("data")
    phases = np.random.default_rng(0).integers(8, size=40)
    waves = 128 + 100 * np.sin(2 * np.pi / 8 * (np.arange(32) + phases[:, None]))
    images = np.broadcast_to(waves[:, None, :, None], (40, 32, 32, 3)).astype(np.uint8)
    for split in ("train", "val"):
        save_arrays(root / split, images, phases // 4)
    return root


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    """Pretraining of a tiny network, 8 images an update."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: {TINY}, stem_stride: 1, decoder_dim: 16}}
data: {{name: arrays, root: {data}, image_size: 32, crop_scale: [1, 1], hflip: 0, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.03, warmup_epochs: 2}}
train: {{max_steps: 60, epochs: 100}}
log: {{every_steps: 1}}
visualize: {{num_images: 0}}
"""
    )
    return ["--config", str(config)]


@pytest.fixture
def finetuning(data: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "finetune.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: {TINY}, stem_stride: 1}}
data: {{name: arrays, root: {data}, image_size: 32, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.03, warmup_epochs: 1}}
"""
    )
    return ["--config", str(config)]


def run(*arguments: str) -> int:
    return run_main(pretrain.main, *arguments)


def suggestion(out: str) -> float:
    found = re.search(r"^suggested +optim\.base_lr=(\S+), a peak rate of (\S+) for 8 images an update$", out, re.M)
    assert found, out
    assert float(found[1]) * 8 / 256 == pytest.approx(float(found[2]), rel=0.05)
    return float(found[1])


def test_the_suggested_rate_trains_better_than_one_far_below_or_above_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--find-lr") == 0
    suggested = suggestion(capsys.readouterr().out)
    last: list[float] = []
    for number, factor in enumerate((1 / 16, 1, 16)):
        output = tmp_path / f"run-{number}"
        assert run(*arguments, f"optim.base_lr={factor * suggested}", f"output={output}") == 0
        last.append(float(np.mean([record["loss"] for record in records(output) if "loss" in record][-20:])))
    assert last[1] == min(last), last


@pytest.mark.parametrize("story", [pretrain, finetune], ids=["pretrain", "finetune"])
def test_a_picture_is_left_and_nothing_else_random_state_included(
    story: Any,
    arguments: list[str],
    finetuning: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(find_lr, "has_diverged", lambda losses: len(losses) == 100)  # no matter what is learnt
    before, states = {*tmp_path.rglob("*")}, cpu_states()
    chosen = arguments if story is pretrain else finetuning
    assert run_main(story.main, *chosen, "--find-lr") == 0
    picture = tmp_path / "run-find-lr.png"
    assert {*tmp_path.rglob("*")} - before == {picture}
    assert cpu_states() == states
    assert Image.open(picture).format == "PNG"
    out = capsys.readouterr().out
    assert "diverges" in out
    assert "falls fastest" in out
    assert f"picture          {picture}" in out


def test_an_update_has_all_its_micro_batches_at_the_rate_of_the_sweep(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[float, int]] = []
    apply, accumulate = Trainer.apply, Trainer.accumulate
    micro_batches = 0

    def count(self: Trainer, batches: Iterator[Any], micro: int) -> None:
        nonlocal micro_batches
        micro_batches += 1
        accumulate(self, batches, micro)

    def note(self: Trainer) -> None:
        apply(self)
        made.append((float(self.optimizer.param_groups[0]["lr"]), micro_batches))

    monkeypatch.setattr(Trainer, "apply", note)
    monkeypatch.setattr(Trainer, "accumulate", count)
    monkeypatch.setattr(find_lr, "has_diverged", lambda losses: len(losses) == 50)
    monkeypatch.setattr(find_lr, "FALLEN", -1.0)
    several = ["data.batch_size=2", "optim.accumulate=4", "optim.decoder_first_epochs=3", "--plot"]
    assert run(*arguments, *several, str(tmp_path / "lr.png"), "--find-lr") == 0
    assert (tmp_path / "lr.png").is_file()
    assert [number for _, number in made] == [4 * n for n in range(1, 51)]
    assert [rate for rate, _ in made] == pytest.approx([LOWEST * 10 ** (n / PER_DECADE) for n in range(50)])


def falling(diverging: float, rising: float = 1e-2) -> Iterator[tuple[float, float]]:
    """Rates and losses that fall from 1e-4 on, rise from `rising` on, and leap at `diverging`."""
    for step in range(1000):
        rate = LOWEST * 10 ** (step / PER_DECADE)
        fall = min(max(math.log10(rate / 1e-4), 0), math.log10(rising / 1e-4))
        rise = max(math.log10(rate / rising), 0)
        yield rate, 100.0 if rate >= diverging else 1 - 0.2 * fall + 0.3 * rise
        if rate >= diverging:
            return


def test_the_suggestion_is_where_the_loss_stops_falling_or_a_tenth_of_where_it_diverges() -> None:
    for diverging, expected in ((1.0, 1e-2), (2e-2, 2e-3)):
        rates, losses = zip(*falling(diverging), strict=True)
        found = find(rates, losses)
        assert found.diverged is not None
        assert 1e-4 < found.steepest < 1e-2
        assert found.suggested == pytest.approx(expected, rel=0.5), diverging


def test_losses_are_smoothed_without_a_bias_to_zero() -> None:
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    noise = np.random.default_rng(0).normal(1, 0.3, 200)
    assert np.std(smooth(noise.tolist())[50:]) < 0.4 * np.std(noise)


@pytest.mark.parametrize("last", [math.nan, math.inf, 1e4])
def test_a_loss_that_is_not_finite_or_leaps_has_diverged(last: float) -> None:
    assert has_diverged([1.0] * 20 + [last])
    assert not has_diverged([1.0, 1.2, 0.8] * 7)
    assert not has_diverged([1.0, 0.3, *[0.01] * 60, *[0.03] * 20]), "noise of a loss that is nearly 0"


def test_a_sweep_has_the_updates_of_its_plan_but_for_their_rate() -> None:
    plan = Plan(num_samples=9, images_per_step=4, total_steps=7, warmup_steps=3, peak_lr=0.1, min_lr=0.0)
    sweep = RateSweep.instead_of(plan)
    rates = [sweep.lr(step) for step in range(sweep.total_steps)]
    assert (sweep.num_samples, sweep.images_per_step) == (9, 4)
    assert rates[0] == LOWEST
    assert rates[-1] == pytest.approx(find_lr.HIGHEST)
    assert np.ptp(np.diff(np.log(rates))) < 1e-9


def test_a_loss_that_falls_at_no_rate_suggests_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [LOWEST * 10 ** (step / PER_DECADE) for step in range(60)]
    for losses in ([1.0] * 60, [1.0] * 5 + [math.nan]):
        with pytest.raises(UserError, match=r"at no rate from 1e-06 to .* does the loss fall"):
            find(rates[: len(losses)], losses)
    monkeypatch.setattr(find_lr, "FALLEN", 0.9)
    assert "raise data.batch_size" in error_line(pretrain.main, capsys, *arguments, "--find-lr")
    assert not (tmp_path / "run-find-lr.png").exists()


def test_a_first_loss_that_is_not_finite_is_an_error_of_the_data(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.PixelNormalizer, "forward", lambda _, pixels, **how: pixels * torch.nan)
    assert "the loss of step 1 is not finite" in error_line(pretrain.main, capsys, *arguments, "--find-lr")
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_there_or_cannot_be_written_is_refused_before_the_sweep(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "run-find-lr.png"
    mine.write_text("mine")
    assert "exists already; name another file" in error_line(pretrain.main, capsys, *arguments, "--find-lr")
    assert mine.read_text() == "mine"
    line = error_line(pretrain.main, capsys, *arguments, "--find-lr", "--plot", str(mine / "x.png"))
    assert f"--plot {mine}/x.png" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--find-lr", "--dry-run"], "--find-lr and --dry-run do different things"),
        (["--plot", "x.png"], "--plot is of --find-lr"),
    ],
)
def test_modes_that_do_not_go_together_show_the_usage(
    words: list[str], said: str, arguments: list[str], finetuning: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for story, own in ((pretrain, arguments), (finetune, finetuning)):
        assert run_main(story.main, *own, *words) == 2
        assert said in capsys.readouterr().err
    assert run_main(finetune.main, "--evaluate", "x", "--find-lr") == 2
    assert "--evaluate trains nothing" in capsys.readouterr().err
