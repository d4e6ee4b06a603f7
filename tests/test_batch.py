"""How many images at once: as many as fit by an estimate that real steps bear out; an update's stay the same."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, error_line, run_main
from torch import Tensor, nn

from fcmae import finetune, pretrain
from fcmae.config import FinetuneRecipe, PretrainRecipe, RunConfig, parse_config
from fcmae.data import save_arrays
from fcmae.errors import UserError
from fcmae.model import FCMAE
from fcmae.tasks.known import TASKS
from fcmae.training.batch import SHARE, TRIED, Footprint, LiveBytes, Room, Step, fitting, step_bytes, with_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TASK_NAMES = ["classification", "multilabel", "regression", "segmentation"]
PLENTY = Room(1e12, 1e12)


class Training(NamedTuple):
    """What is to be trained, and how."""

    recipe: Any
    config: RunConfig
    build: Callable[[], nn.Module]
    step: Step

    @property
    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    def footprint(self, device: torch.device = CPU, precision: str = "no") -> Footprint:
        return Footprint.estimate(self.config, self.outline, self.step, device, precision)


def training(task: str = "pretraining", **sections: Any) -> Training:
    values: dict[str, Any] = {
        "output": "run",
        "model": {"variant": TINY, "stem_stride": 2},
        "data": {"root": "images", "image_size": 64, "batch_size": "auto"},
        "optim": {"images_per_update": 96, "accumulate": "auto"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    if task == "pretraining":
        recipe = parse_config(PretrainRecipe, values, "a test")
        config = recipe.resolve({}, "a test")

        def step(model: nn.Module, number: int, device: torch.device) -> Tensor:
            images = torch.zeros(number, 3, 64, 64, device=device)
            return model(images, torch.arange(6, device=device).expand(number, 6)).loss

        return Training(recipe, config, lambda: FCMAE(**config.model.model_dump()), step)
    train = {"label_smoothing": 0.0} if task == "regression" else {}
    values |= {"task": task, "train": values.get("train", {}) | train}
    recipe = parse_config(FinetuneRecipe, values, "a test")
    config = recipe.resolve({}, "a test")
    made = TASKS[task](config, tuple("abcde"))
    return Training(recipe, config, made.build, functools.partial(made.blank_step, made.loss()))


def resized(
    made: Training, room: Room = PLENTY, *, processes: int = 1, before: int | None = None, on_gpu: bool = True
) -> tuple[int, int]:
    """batch_size and accumulate that are chosen."""

    class State(NamedTuple):
        config: dict[str, Any]

    state: Any = None if before is None else State({"data": {"batch_size": before}})
    config, _ = with_batch(
        made.config,
        made.recipe,
        lambda: Footprint(1e6, 1e6),
        room=lambda: room,
        on_gpu=on_gpu,
        processes=processes,
        state=state,
    )
    return config.data.batch_size, config.optim.accumulate


# What a training takes


@pytest.mark.parametrize("task", ["pretraining", *TASK_NAMES])
def test_a_real_step_takes_about_what_was_estimated(task: str) -> None:
    """Forward and backward, of a batch beyond those that were tried."""
    made = training(task)
    few, more = (step_bytes(made.outline, made.step, number, CPU, None) for number in TRIED)
    estimate = few + (16 - TRIED[0]) * (more - few) / (TRIED[1] - TRIED[0])
    model = made.build()
    with LiveBytes() as counted:
        made.step(model, 16, CPU).backward()
    taken = counted.most - sum(p.nbytes for p in model.parameters())
    assert 0.6 * estimate < taken < estimate / SHARE


def test_the_memory_of_a_gpu_is_estimated_without_one() -> None:
    made = training(model={"variant": "atto"})
    full, half = (made.footprint(GPU, precision).image for precision in ("no", "bf16"))
    assert 0.45 * full < half < 0.8 * full
    assert not torch.is_autocast_enabled("cuda")
    assert torch.get_autocast_dtype("cuda") == torch.float16, "PyTorch's own"


def test_what_takes_less_memory_is_estimated_at_less() -> None:
    made = training("classification")
    usual = made.footprint()

    def outline_of(change: Callable[[Any], object]) -> nn.Module:
        model = made.outline
        change(model)
        return model

    checkpointing = outline_of(lambda model: setattr(model, "gradient_checkpointing", True))
    frozen = outline_of(lambda model: model.freeze())
    assert Footprint.estimate(made.config, checkpointing, made.step, CPU, "no").image < 0.9 * usual.image
    probe = Footprint.estimate(made.config, frozen, made.step, CPU, "no")
    assert probe.image < usual.image
    assert probe.fixed < 0.5 * usual.fixed, "without gradients and moments"
    ema = training("classification", train={"ema_decay": 0.9}).footprint()
    weights = sum(p.nbytes for p in made.build().parameters())
    assert ema.fixed - usual.fixed == pytest.approx(weights)


def test_a_network_that_reads_numbers_is_no_network_to_estimate() -> None:
    made = training()

    def step(model: nn.Module, number: int, device: torch.device) -> Tensor:
        loss = made.step(model, number, device)
        return loss if loss.item() > 0 else -loss

    with pytest.raises(UserError, match=r"^data\.batch_size=auto: the memory of this network cannot be estimated"):
        Footprint.estimate(made.config, made.outline, step, CPU, "no")


# What is chosen


def test_the_largest_divisor_that_fits_is_chosen_preferably_a_power_of_two() -> None:
    each = Footprint(100.0, 10.0)
    assert fitting(4096, each, 1e9, 512) == 512
    assert fitting(4096, each, 100 + 10 * 300, 512) == 256
    assert fitting(96, each, 1e9, 512) == 96, "three times the power of two in it"
    assert fitting(48, each, 100 + 10 * 30, 512) == 16, "better than 24"
    assert fitting(341, each, 1e9, 100) == 31
    assert fitting(64, each, 0, 512) == 1
    assert fitting(64, each, 0, 512, pairs=True) == 2
    assert fitting(15, each, 1e9, 512, pairs=True) == 15


def test_images_of_an_update_stay_the_same_whatever_the_memory_and_the_processes() -> None:
    made = training(optim={"images_per_update": 4096})
    for room, processes, expected in (
        (PLENTY, 1, (512, 8)),
        (PLENTY, 8, (512, 1)),
        (PLENTY, 64, (64, 1)),
        (Room(100e6, 1e12), 1, (64, 64)),
        (Room(0.0, 1e12), 2, (1, 2048)),
        (Room(math.inf, math.inf), 1, (32, 128)),  # nobody knows
    ):
        assert resized(made, room, processes=processes) == expected
    assert resized(made, on_gpu=False) == (32, 128)


def test_what_is_given_stays_and_the_rest_follows() -> None:
    assert resized(training(data={"batch_size": 8}), processes=3) == (8, 4)
    assert resized(training(optim={"accumulate": 4}), processes=3) == (8, 4)
    both: dict[str, Any] = {"data": {"batch_size": 8}, "optim": {"accumulate": 4}}
    assert resized(training(**both), processes=3) == (8, 4)
    without = training(data={"batch_size": 8}, optim={"accumulate": 4, "images_per_update": None})
    assert resized(without, processes=7) == (8, 4)


def test_a_run_that_goes_on_keeps_its_batch_where_that_fits_at_all() -> None:
    made, small = training(optim={"images_per_update": 4096}), Room(40e6, 100e6)
    assert resized(made, small) == (16, 256)
    assert resized(made, small, before=64) == (64, 64), "more than is free at present, as before"
    assert resized(made, small, before=128) == (16, 256), "more than there is"
    assert resized(made, before=3) == (512, 8), "which does not divide"
    assert resized(made, before=64, processes=8) == (64, 8)


@pytest.mark.parametrize(
    ("sections", "processes", "line"),
    [
        ({}, 5, "optim.images_per_update=96: cannot be divided among 5 processes; 95 can"),
        ({}, 97, "optim.images_per_update=96: cannot be divided among 97 processes; 97 can"),
        ({"data": {"batch_size": 7}}, 1, "data.batch_size=7: does not divide 96, the share of each of 1 process"),
        ({"optim": {"accumulate": 5}}, 2, "optim.accumulate=5: does not divide 48"),
        (
            {"data": {"batch_size": 8}, "optim": {"accumulate": 2}},
            2,
            "optim.images_per_update=96: is not data.batch_size=8 x optim.accumulate=2 x 2 processes; make one of "
            "them auto, or set optim.images_per_update=null",
        ),
        ({"model": {"layout": "minkowski"}}, 1, "data.batch_size=auto: nobody knows what MinkowskiEngine takes"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(sections: dict[str, Any], processes: int, line: str) -> None:
    with pytest.raises(UserError) as caught:
        resized(training(**sections), processes=processes)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_batches_that_are_mixed_are_even() -> None:
    mixed: dict[str, Any] = {"mixup": 0.8}
    assert resized(training("classification", data=mixed), Room(0.0, 0.0)) == (2, 48)
    with pytest.raises(
        UserError, match=r"^optim\.images_per_update=96: makes batches of 3 for 32 processes, but mixup"
    ):
        resized(training("classification", data=mixed), processes=32)


# Runs


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    save_arrays(tmp_path / "data" / "train", pixels, labels=np.arange(40) % 4)
    save_arrays(tmp_path / "data" / "val", pixels[:8], labels=np.arange(8) % 4)
    given = [f"data.root={tmp_path / 'data'}", "data.name=arrays", "data.image_size=32", "data.num_workers=0"]
    return [*given, f"model.variant={[*map(list, TINY)]}", "model.stem_stride=1", f"output={tmp_path / 'run'}"]


SHORT = ["optim.images_per_update=24", "train.max_steps=2", "resume=auto"]


def sizes(path: Path) -> tuple[int, int, int]:
    """batch_size, accumulate and images_per_update that a run wrote into its configuration."""
    values = yaml.safe_load((path / "run" / "config.yaml").read_text())
    return values["data"]["batch_size"], values["optim"]["accumulate"], values["optim"]["images_per_update"]


@pytest.mark.parametrize("story", [pretrain, finetune])
def test_a_run_writes_down_what_it_chose_and_goes_on_with_it(
    story: Any,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = ["model.decoder_dim=16", "visualize.num_images=0"] if story is pretrain else ["init_from=null"]
    assert run_main(story.main, "--config", "atto", *words, *more, *SHORT) == 0
    assert "\nbatch            24 of 40 images an update (auto: takes about " in capsys.readouterr().out
    assert sizes(tmp_path) == (24, 1, 24)
    monkeypatch.setattr("fcmae.training.batch.MOST_ON_CPU", 8)  # another machine
    assert run_main(story.main, "--config", "atto", *words, *more, *SHORT, "train.max_steps=4") == 0
    out = capsys.readouterr().out
    assert "(auto: as before)" in out
    assert "not the same run any more: train.max_steps: 2 -> 4\n" in out, "and no other change"
    other = [*words, *more, *SHORT, "train.max_steps=4", f"output={tmp_path / 'other'}"]
    assert run_main(story.main, "--config", "atto", *other) == 0
    assert "24 of 40 images an update = 8 x 3 accumulated (auto: takes" in capsys.readouterr().out


def test_numbers_that_contradict_each_other_are_refused_before_anything_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "atto", *words, *SHORT, "data.batch_size=5", "optim.accumulate=5"]
    assert "is not data.batch_size=5 x optim.accumulate=5 x 1 process;" in error_line(pretrain.main, capsys, *given)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", ["pretraining", "classification", "segmentation"])
def test_a_step_on_cuda_takes_about_what_was_estimated(task: str) -> None:
    made = training(task, model={"variant": "atto"})
    estimate = made.footprint(GPU, "bf16")
    model = made.build().to(GPU)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = made.step(model, 256, GPU)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0.5 * estimate.of(256) < torch.cuda.max_memory_allocated() < estimate.of(256) / SHARE
