"""The roadmap: its ends are timm's networks, its steps cost what the paper says, and each trains and is stored."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, error_line, gradients, records, relative_error, run_main
from torch import nn

import fcmae.__main__
from fcmae import finetune
from fcmae.config import FinetuneRecipe, load_config, shipped_configs
from fcmae.data import save_arrays
from fcmae.encoder.networks import build_network
from fcmae.encoder.roadmap import ROADMAP, Design, Roadmap
from fcmae.weights.roadmap import from_timm_convnext_tiny, from_timm_resnet50

KEPT = [step for step in ROADMAP if step not in ("kernel-5", "kernel-9", "kernel-11")]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("roadmap")


# The steps


def turned(before: str, after: str) -> list[str]:
    """The switches that differ."""
    names = [field.name for field in dataclasses.fields(Design)]
    return [name for name in names if getattr(ROADMAP[before], name) != getattr(ROADMAP[after], name)]


def test_each_step_turns_one_switch_of_the_step_before() -> None:
    assert ROADMAP["training-recipe"] == ROADMAP["resnet50"], "which changes the recipe alone"
    for before, after in zip(KEPT[1:-1], KEPT[2:], strict=True):
        assert len(turned(before, after)) == 1, after
    for step in ROADMAP.keys() - KEPT:
        assert turned("depthwise-up", step) == ["kernel"]


def test_each_step_costs_what_the_paper_says_in_every_digit(benchmark: Any) -> None:
    assert benchmark.PAPER.keys() == ROADMAP.keys()
    counted = {step: round(benchmark.count(step).gflops, 2) for step in ROADMAP}
    published = {step: paper.gflops for step, paper in benchmark.PAPER.items()}
    unlike = {step: (counted[step], published[step]) for step in ROADMAP if counted[step] != published[step]}
    assert unlike == {  # docs/roadmap.md has more on these
        "layernorm": (4.15, 4.46),
        "separate-downsampling": (4.46, 4.49),
        "convnext-tiny": (4.46, 4.49),
    }


def randomised(network: nn.Module) -> nn.Module:
    """In float64, with noise on all weights and on BatchNorm's statistics."""
    network = network.double()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.copy_(1 + torch.rand_like(value) if "running_var" in name else value.mul_(1 + 0.3 * torch.randn_like(value)).add_(0.02 * torch.randn_like(value)))
    return network


@pytest.mark.parametrize(
    ("name", "step", "converted"),
    [
        ("resnet50", "resnet50", from_timm_resnet50),
        ("convnext_tiny", "convnext-tiny", from_timm_convnext_tiny),
    ],
)
def test_the_ends_are_timms_resnet50_and_convnext_tiny(
    name: str, step: str, converted: Callable[[Any], dict[str, torch.Tensor]]
) -> None:
    theirs = randomised(timm.create_model(name, num_classes=5))
    ours = Roadmap(step, num_classes=5).double()
    ours.load_state_dict(converted(theirs.state_dict()))
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours.eval()(images), theirs.eval()(images)) < 1e-13
    out, expected = ours.train()(images), theirs.train()(images)  # where BatchNorm takes the batch's statistics
    assert relative_error(out, expected) < 1e-11
    found, wanted = gradients(out, ours), converted(gradients(expected, theirs))
    assert found.keys() == wanted.keys()
    assert max(relative_error(found[key], wanted[key]) for key in found) < 1e-8
    for key, value in converted(theirs.state_dict()).items():
        assert torch.allclose(ours.state_dict()[key].double(), value.double(), rtol=1e-10), key


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="not timm's resnet50: unknown keys 'stem.0.weight'"):
        from_timm_resnet50(timm.create_model("convnext_atto").state_dict())


@pytest.mark.parametrize("step", ["resnet50", "depthwise", "one-activation", "separate-downsampling"])
def test_every_parameter_learns_and_is_stored_under_convnexts_names(step: str) -> None:
    model = build_network(f"roadmap/{step}", num_classes=3, drop_path=0.1)
    assert (model.variant, model.patch_size, model.classifier_layer) == (f"roadmap/{step}", 32, model.head)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert name.startswith(("downsample_layers.", "stages.", "norm.", "head."))
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("step", ["resnet50", "convnext-tiny"])
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_small_images_take_a_finer_stem(step: str, stem_stride: int) -> None:
    with torch.device("meta"):
        model = build_network(f"roadmap/{step}", in_chans=5, stem_stride=stem_stride)
        maps = model.pyramid(torch.empty(1, 5, 64, 96))
        assert model(torch.empty(1, 5, 64, 96)).shape == (1, model.dims[-1])
    assert model.patch_size == 8 * stem_stride
    assert [tuple(x.shape[1:]) for x in maps] == [
        (dim, 64 // (stem_stride * 2**i), 96 // (stem_stride * 2**i)) for i, dim in enumerate(model.dims)
    ]


def test_checkpointing_gradients_changes_none() -> None:
    model = randomised(Roadmap("convnext-tiny", num_classes=2))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain = gradients(model(images), model)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model(images), model).items():
        assert torch.allclose(gradient, plain[name]), name


# The configurations


def configuration(step: str) -> dict[str, Any]:
    recipe = load_config(FinetuneRecipe, f"roadmap/{step}")
    assert "roadmap/" + step in shipped_configs()
    return recipe.resolve({}, "a test").model_dump(mode="json")


def test_there_is_a_configuration_for_each_step_and_they_differ_in_the_step_alone() -> None:
    assert {name for name in shipped_configs() if name.startswith("roadmap/")} == {f"roadmap/{s}" for s in ROADMAP}
    first = configuration("training-recipe")
    for step in ROADMAP:
        config = configuration(step)
        assert (config["model"].pop("variant"), config.pop("output")) == (f"roadmap/{step}", f"runs/roadmap-{step}")
        if step != "resnet50":
            assert config == {key: value for key, value in first.items() if key != "output"} | {
                "model": {key: value for key, value in first["model"].items() if key != "variant"}
            }


def test_the_recipe_is_that_of_the_papers_table_5() -> None:
    config = configuration("convnext-tiny")
    data, optim, train = config["data"], config["optim"], config["train"]
    assert data["batch_size"] * optim["accumulate"] * 8 == 4096
    assert optim["base_lr"] * 4096 / 256 == 4e-3
    assert (optim["weight_decay"], optim["betas"], optim["layer_decay"]) == (0.05, [0.9, 0.999], 1)
    assert (train["epochs"], optim["warmup_epochs"], train["ema_decay"]) == (300, 20, 0.9999)
    assert (data["mixup"], data["cutmix"], data["erase_prob"]) == (0.8, 1, 0.25)
    assert (data["auto_augment"], train["label_smoothing"]) == ("rand-m9-mstd0.5-inc1", 0.1)
    assert (config["model"]["drop_path"], config["init_from"]) == (0.1, None)


# Training


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six updates of a narrow `one-norm`, which has BatchNorm and an EMA of its statistics, on small noise."""
    monkeypatch.setitem(ROADMAP, "one-norm", dataclasses.replace(ROADMAP["one-norm"], width=8, depths=(1, 1, 2, 1)))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        save_arrays(tmp_path / "data" / split, images, np.arange(12) % 3)
    small = ["data.name=arrays", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.batch_size=4"]
    small += ["data.num_workers=0", "optim.accumulate=1", "train.max_steps=6", "eval.every_epochs=1"]
    small += ["model.stem_stride=2", "checkpoint.every_steps=3", "log.every_steps=1"]
    return ["--config", "roadmap/one-norm", *small]


def test_a_step_is_fine_tuned_resumed_evaluated_and_predicts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = f"output={tmp_path / 'whole'}", f"output={tmp_path / 'broken'}"
    assert run_main(finetune.main, *arguments, whole) == 0
    assert run_main(finetune.main, *arguments, broken, "train.max_steps=3") == 0
    assert run_main(finetune.main, *arguments, broken, "resume=auto") == 0


def test_an_unknown_step_is_one_line_with_the_choices(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(finetune.main, *arguments, f"output={tmp_path / 'run'}", "model.variant=roadmap/kernel-8") == 2
    line = error_line(capsys)
    assert "kernel-8" in line
    assert "kernel-7, kernel-9" in line
