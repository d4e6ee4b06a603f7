"""The roadmap: its ends are timm's networks, its steps cost what the paper says, and each trains and is stored."""

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Module, assert_same, error_line, gradients, relative_error, run_main
from PIL import Image

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


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the networks of all steps an eighth as wide, and five blocks deep."""
    for step, design in ROADMAP.items():
        monkeypatch.setitem(ROADMAP, step, dataclasses.replace(design, width=8, depths=(1, 1, 2, 1)))


# The steps


def turned(before: str, after: str) -> list[str]:
    """The switches that differ."""
    names = [field.name for field in dataclasses.fields(Design)]
    return [name for name in names if getattr(ROADMAP[before], name) != getattr(ROADMAP[after], name)]


def test_each_step_turns_one_switch_of_the_step_before() -> None:
    assert ROADMAP["training-recipe"] == ROADMAP["resnet50"], "which changes the recipe alone"
    for before, after in pairwise(KEPT[1:]):
        assert len(turned(before, after)) == 1, after
    for step in ROADMAP.keys() - KEPT:
        assert turned("depthwise-up", step) == ["kernel"]


@pytest.mark.any_cpu
def test_each_step_costs_what_the_paper_says_in_every_digit(benchmark: Any) -> None:
    assert benchmark.PAPER.keys() == ROADMAP.keys()
    counted = {step: round(benchmark.count(step).gflops, 2) for step in ROADMAP}
    published = {step: paper.gflops for step, paper in benchmark.PAPER.items()}
    document = (ROOT / "docs" / "roadmap.md").read_text()
    assert all(f"| {counted[step]:.2f} | {published[step]:.2f} |" in document for step in ROADMAP)
    unlike = {step: (counted[step], published[step]) for step in ROADMAP if counted[step] != published[step]}
    assert unlike == {  # docs/roadmap.md has more on these
        "layernorm": (4.15, 4.46),
        "separate-downsampling": (4.46, 4.49),
        "convnext-tiny": (4.46, 4.49),
    }


def randomised(network: Module) -> Module:
    """In float64, with noise on all weights and on BatchNorm's statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.double().state_dict().values():
            if value.is_floating_point():  # factors of 0.8 to 1.2, and 0.1 more for what is zero
                noise = torch.rand(value.shape, generator=generator)
                value.mul_(0.8 + 0.4 * noise).add_(0.1 * noise if value.ndim == 1 else 0)
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
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours.eval()(images), theirs.eval()(images)) < 1e-13
    out, expected = ours.train()(images), theirs.train()(images)  # where BatchNorm takes the batch's statistics
    assert relative_error(out, expected) < 1e-12
    assert_same(gradients(out, ours), converted(gradients(expected, theirs)))
    statistics = {key: value for key, value in theirs.state_dict().items() if "running" in key}
    assert_same({key: ours.state_dict()[key] for key in converted(statistics)}, converted(statistics))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not timm's resnet50: unknown keys 'stem.0.weight'"):
        from_timm_resnet50(timm.create_model("convnext_atto").state_dict())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("step", ROADMAP)
def test_every_parameter_learns_and_is_stored_under_convnexts_names(step: str) -> None:
    model = build_network(f"roadmap/{step}", num_classes=3, drop_path=0.1)
    assert (model.variant, model.patch_size, model.classifier_layer) == (f"roadmap/{step}", 32, model.head)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert name.startswith(("downsample_layers.", "stages.", "norm.", "head."))
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("step", ["resnet50", "convnext-tiny"])
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_small_images_take_a_finer_stem(step: str, stem_stride: int) -> None:
    with torch.device("meta"):
        model = build_network(f"roadmap/{step}", in_chans=5, stem_stride=stem_stride)
        assert isinstance(model, Roadmap)
        maps = model.pyramid(torch.empty(1, 5, 64, 96))
        assert model.forward(torch.empty(1, 5, 64, 96)).shape == (1, model.dims[-1])
    assert model.patch_size == 8 * stem_stride
    assert [tuple(x.shape[1:]) for x in maps] == [
        (dim, 64 // (stem_stride * 2**i), 96 // (stem_stride * 2**i)) for i, dim in enumerate(model.dims)
    ]


@pytest.mark.usefixtures("narrow")
def test_checkpointing_gradients_changes_none() -> None:
    model = randomised(Roadmap("convnext-tiny", num_classes=2))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain = gradients(model(images), model)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model(images), model).items():
        assert torch.allclose(gradient, plain[name]), name
    with pytest.raises(ValueError, match="BatchNorm in roadmap/gelu would count each batch twice"):
        Roadmap("gelu").gradient_checkpointing = True


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
def arguments(narrow: None, tmp_path: Path) -> list[str]:
    """Six updates of `one-norm`, which has BatchNorm and so an EMA of its statistics, on noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        save_arrays(tmp_path / "data" / split, images, np.arange(12) % 3, ("a", "b", "c"))
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    small = ["data.name=arrays", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.batch_size=4"]
    small += ["data.num_workers=0", "optim.accumulate=1", "train.max_steps=6", "eval.every_epochs=1"]
    small += ["model.stem_stride=2", "checkpoint.every_steps=3", "log.every_steps=1"]
    return ["--config", "roadmap/one-norm", *small]


def test_a_step_is_fine_tuned_resumed_evaluated_and_predicts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    settings = [*arguments, f"output={folder}"]
    assert run_main(finetune.main, *settings) == 0
    expected = {file: file.read_bytes() for file in folder.glob("checkpoints/step-00000006/*.safetensors")}
    assert {file.stem for file in expected} == {"model", "optimizer", "ema"}
    shutil.rmtree(folder / "checkpoints" / "step-00000006")  # which leaves that of step 3
    assert run_main(finetune.main, *settings, "resume=auto") == 0
    assert {file: file.read_bytes() for file in expected} == expected
    capsys.readouterr()
    assert run_main(finetune.main, "--evaluate", str(folder)) == 0
    assert "images           12" in capsys.readouterr().out
    for model in (folder, folder / "model"):
        assert fcmae.__main__.run(["predict", str(model), str(tmp_path / "image.png"), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert {entry["name"] for entry in found["classes"]} == {"a", "b", "c"}


def test_an_unknown_step_is_one_line_with_the_choices(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(
        finetune.main, capsys, *arguments, f"output={tmp_path / 'x'}", "model.variant=roadmap/kernel-8"
    )
    assert "unknown step 'kernel-8' of the roadmap: choose from resnet50, training-recipe" in line
    assert not (tmp_path / "x").exists()


# benchmarks/roadmap.py


def test_the_benchmark_runs_each_step_once_and_shows_what_it_came_to(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[list[str]] = []

    def launch(command: list[str], run: Path, threads: int) -> None:
        launched.append(command)
        run.mkdir(parents=True, exist_ok=True)
        accuracy = 0.6 if "train.seed=0" in command else 0.7
        line = {"step": 6, "val_top1": accuracy, "val_loss": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(benchmark, "launch", launch)
    monkeypatch.setattr(benchmark, "count", lambda step: benchmark.Cost(25_000_000, 4.09))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time everything is there
        settings = ["--name=tiny", "--steps", "stage-ratio", "gelu", "--seeds", "0", "1", "--", "data.root=x"]
        monkeypatch.setattr("sys.argv", ["roadmap.py", "run", "--results", "results", *settings])
        benchmark.main()
    assert [command[3] for command in launched] == [
        f"configs/roadmap/{s}.yaml" for s in ("stage-ratio", "gelu")
    ] * 2
    assert all("data.root=x" in command and "resume=auto" in command for command in launched)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("| top-1, tiny |")
    shown = {row.split("|")[1].strip(" `"): row.split("|")[-2].strip() for row in rows[2:]}
    assert {step for step, text in shown.items() if text and step in ROADMAP} == {"stage-ratio", "gelu"}
    assert shown["gelu"] == "65.00 ± 7.07 (2)"
    benchmark.plot(Path("results"), Path("docs/roadmap.png"))
    assert Path("docs/roadmap.png").stat().st_size > 20_000


def test_the_table_and_the_sizes_in_the_documents_are_those_of_the_benchmark(benchmark: Any) -> None:
    document = (ROOT / "docs" / "roadmap.md").read_text()
    for step, paper in benchmark.PAPER.items():
        (row,) = [line for line in document.splitlines() if line.startswith(f"| `{step}` |")]
        assert f"| {paper.change} |" in row
        assert f"| {paper.gflops:.2f} | {paper.top1:.2f}" in row
        config = (ROOT / "configs" / "roadmap" / f"{step}.yaml").read_text()
        assert f"{paper.top1:.2f} " in config or step == "convnext-tiny"
