"""finetune.py for segmentation, from end to end: learnt, drawn, resumed, counted once, plain about bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, records, run_main
from PIL import Image
from processes import run_story
from safetensors.torch import load_file
from test_segmentation import draw_shapes

from fcmae import finetune, load_encoder
from fcmae.data import save_arrays
from fcmae.heads.segmentation import Segmenter

CLASSES = ("ground", "disk", "square")
RECIPES = [
    path
    for path in sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
    if "\ntask: segmentation\n" in path.read_text()
]
SECTIONS = """
task: segmentation
model: {variant: [[1,1,1,1],[16,24,32,48]], stem_stride: 2, head_dim: 32, drop_path: 0.1}
data: {image_size: 32, batch_size: 8, num_workers: 0, scale: [0.8, 1.25], mean: [0.3, 0.3, 0.3],
       std: [0.25, 0.25, 0.25]}
optim: {base_lr: 0.2, warmup_epochs: 1, layer_decay: 0.95, clip_grad: 5, schedule: linear}
train: {max_steps: 8, ema_decay: 0.8, dice: 1, class_weights: balanced}
eval: {every_epochs: 10}
checkpoint: {every_steps: 3}
log: {every_steps: 1}
visualize: {num_images: 2}
"""


def write_pairs(folder: Path, images: np.ndarray, masks: np.ndarray) -> None:
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for kind, pixels in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{i:02}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Disks and squares of 40 px, 32 images to train on and 9, of two sizes, to evaluate."""
    root = tmp_path_factory.mktemp("shapes")
    write_pairs(root / "train", *draw_shapes(32, 40, seed=1))
    images, masks = draw_shapes(9, 40, seed=2)
    masks[0, :5] = 255
    write_pairs(root / "val", images, masks)
    for kind in ("images", "masks"):
        path = root / "val" / kind / "03.png"
        Image.open(path).crop((0, 0, 36, 30)).save(path)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    """A run of 8 steps of 8 images, recording every step, evaluating at the end."""
    (tmp_path / "config.yaml").write_text(f"output: {tmp_path / 'run'}\n{SECTIONS}")
    return ["--config", str(tmp_path / "config.yaml"), f"data.root={data}"]


def run(*arguments: str) -> int:
    return run_main(finetune.main, *arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return error_line(finetune.main, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learnt something."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(f"output: {folder / 'run'}\n{SECTIONS}")
    settings = ["train.max_steps=60", "data.stride=16"]
    assert run("--config", str(folder / "config.yaml"), f"data.root={data}", *settings) == 0
    return folder / "run"


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if "val_miou" in record]


def tensors(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / f"{name}.safetensors")


# What a run leaves


def test_a_network_learns_to_segment_and_its_evaluation_is_that_of_training(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = evaluations(trained)[-1]
    assert last["ema_miou"] > 0.5  # the ground alone would be below a third
    assert last["val_miou"] > 0.5
    best = max(record["ema_miou"] for record in evaluations(trained))
    capsys.readouterr()
    assert run("--evaluate", str(trained)) == 0
    out = capsys.readouterr().out
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["miou"] == pytest.approx(best, abs=1e-4)
    assert found["images"] == 9
    assert found["classes"]["names"] == list(CLASSES)
    assert sum(found["classes"]["pixels"]) == 8 * 40 * 40 - 5 * 40 + 30 * 36
    assert np.nanmean(found["classes"]["iou"]) == pytest.approx(found["miou"])
    assert all(name in out for name in ("mIoU", "pixel accuracy", *CLASSES))
    assert Image.open(trained / "iou.png").mode == "RGB"


def test_pictures_of_fixed_images_are_drawn_with_every_evaluation(trained: Path) -> None:
    steps = {record["step"] for record in evaluations(trained)}
    drawn = {int(path.stem.removeprefix("step-")): path for path in (trained / "predictions").glob("*.png")}
    assert steps <= drawn.keys()
    first, last = (np.asarray(Image.open(drawn[step])) for step in (min(drawn), max(drawn)))
    assert first.shape[1] == last.shape[1] > 4 * 32
    assert (first[:32] != last[:32]).any()


def test_the_model_of_a_run_is_a_segmenter_that_knows_its_classes(trained: Path, data: Path) -> None:
    network = load_encoder(trained).eval()
    assert isinstance(network, Segmenter)
    again = load_encoder(trained / "model").eval()
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.allclose(network(images), again(images), atol=1e-5)
    assert network(images).shape == (1, 3, 24, 40)
    config = json.loads((trained / "model" / "config.json").read_text())
    assert "square" in json.dumps(config)
    encoder = load_encoder(trained, num_classes=0)
    assert not isinstance(encoder, Segmenter)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 48)


# Exact


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(arguments: list[str], tmp_path: Path) -> None:
    settings = ["model.head=upernet", "model.auxiliary=true", "train.class_weights=balanced", "data.jitter=0.5"]
    settings = [
        *arguments,
        *settings,
        "optim.accumulate=2",
        "data.batch_size=4",
        "train.gradient_checkpointing=true",
    ]
    assert run(*settings) == 0
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    expected = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    assert len(expected) == 3
    shutil.rmtree(last)
    assert run(*settings, "resume=auto") == 0
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == expected


def test_two_processes_count_and_train_as_one(arguments: list[str], tmp_path: Path) -> None:
    still = ["model.drop_path=0", "train.dice=0", "train.max_steps=3", "optim.base_lr=1.0e-6"]
    assert run(*arguments, *still, f"output={tmp_path / 'one'}") == 0
    done = run_story("finetune", *arguments, *still, f"output={tmp_path / 'two'}", "data.batch_size=4", number=2)
    assert done.codes == [0, 0], done.errors
    (first,), (second,) = (evaluations(tmp_path / name) for name in ("one", "two"))
    scores = {key: value for key, value in first.items() if key.startswith(("val_", "ema_"))}
    assert len(scores) == 6
    assert scores == pytest.approx({key: second[key] for key in scores}, abs=2e-3)
    pixels = 8 * 40 * 40 - 5 * 40 + 30 * 36  # each once, in both
    for record in (first, second):
        right = record["val_pixel_accuracy"] * pixels
        assert right == pytest.approx(round(right), abs=1e-3)


def test_a_compiled_run_is_traced_whole_and_gives_the_losses_of_an_eager_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*arguments, "train.max_steps=2"]
    assert run(*settings, f"output={tmp_path / 'eager'}") == 0
    compile_module = torch.nn.Module.compile

    def trace(self: torch.nn.Module, **kwargs: Any) -> None:
        compile_module(self, backend="aot_eager", **kwargs)  # without minutes of code generation

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    assert run(*settings, f"output={tmp_path / 'compiled'}", "train.compile=true") == 0
    losses = [
        [record["loss"] for record in records(tmp_path / name) if "loss" in record]
        for name in ("eager", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# What it starts from, and what it trains


def test_a_frozen_encoder_stays_and_the_head_is_trained(
    arguments: list[str], trained: Path, tmp_path: Path
) -> None:
    start = [*arguments, f"init_from={trained}", "train.freeze_encoder=true", "train.ema_decay=null"]
    assert run(*start, "train.max_steps=2") == 0
    best = load_file(trained / "checkpoints" / "best" / "ema.safetensors")
    after = tensors(tmp_path / "run")
    for name, value in after.items():
        if name.startswith("encoder."):
            assert torch.equal(value, best[name]), name
    assert not torch.equal(after["head.classifier.1.weight"], best["head.classifier.1.weight"])
    assert not any("encoder." in name for name in tensors(tmp_path / "run", "optimizer"))


def test_the_head_of_other_weights_is_kept_where_it_is_for_the_same_classes(
    arguments: list[str], trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = [*arguments, f"init_from={trained}", "optim.base_lr=0", "optim.min_lr=0", "train.max_steps=1"]
    still += ["data.stride=16", "train.ema_decay=null"]
    assert run(*still) == 0
    assert "its head of 3 classes" in capsys.readouterr().out
    (found,) = evaluations(tmp_path / "run")
    best = max(evaluations(trained), key=lambda record: record["ema_miou"])
    assert found["val_miou"] == pytest.approx(best["ema_miou"], abs=1e-4)
    other = shutil.copytree(data, tmp_path / "data")
    (other / "classes.txt").write_text("a\nb\nc\n")
    assert run(*still, f"data.root={other}", f"output={tmp_path / 'other'}") == 0
    assert "a new head of 3 classes" in capsys.readouterr().out


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "data.label_fraction=0.25", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "batch          8 of 8 images an update\n" in out
    assert "classes        3" in out
    assert "data           8 of 8 images tried, 0 unreadable" in out
    assert "validation     9 of 9 images tried, 0 unreadable" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs_dry(
    path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model.variant=[[1,1,1,1],[8,16,24,32]]", "model.stem_stride=1", "model.head_dim=16", "init_from=null"]
    small += ["data.image_size=32", "data.num_workers=0", "data.batch_size=2"]
    root = data
    if path.stem.startswith("upernet"):  # as ADE20K has it
        for split, ours in (("training", "train"), ("validation", "val")):
            shutil.copytree(data / ours / "images", tmp_path / "images" / split)
            shutil.copytree(data / ours / "masks", tmp_path / "annotations" / split)
            for mask in (tmp_path / "annotations" / split).iterdir():
                Image.fromarray(np.asarray(Image.open(mask)) + 1).save(mask)  # 0 is no class, of 255 become so
        root = tmp_path / "images"
        small += [f"data.mask_root={tmp_path / 'annotations'}", "model.num_classes=null", "data.stride=16"]
    assert run("--config", str(path), *small, f"data.root={root}", f"output={tmp_path / 'run'}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "classes        3" in out
    assert "validation     9 of 9 images tried, 0 unreadable" in out
    assert not (tmp_path / "run").exists()


def test_arrays_of_five_channels_are_segmented(arguments: list[str], tmp_path: Path) -> None:
    from fcmae.data.masks import save_masks

    images, masks = draw_shapes(8, 40, seed=3)
    for split in ("train", "val"):
        save_arrays(tmp_path / "arrays" / split, np.concatenate([images, images[..., :2]], -1))
        save_masks(tmp_path / "arrays" / split, masks, CLASSES)
    settings = ["data.name=arrays", f"data.root={tmp_path / 'arrays'}", "model.in_chans=5", "train.max_steps=1"]
    settings += ["data.mean=[0,0,0,0,0]", "data.std=[1,1,1,1,1]", "visualize.bands=[4,3,2]"]
    assert run(*arguments, *settings) == 0
    assert len(evaluations(tmp_path / "run")) == 1


# Bad input


def without_a_mask(root: Path) -> None:
    for name in ("01", "02"):
        (root / "train" / "masks" / f"{name}.png").unlink()


def without_an_image(root: Path) -> None:
    (root / "train" / "images" / "05.png").unlink()


def with_a_picture(root: Path) -> None:
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[..., None].repeat(3, -1) * 70).save(path)


def with_a_class_too_many(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(root / "train" / "masks" / "04.png")


def with_another_class_in_validation(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 3, np.uint8)).save(root / "val" / "masks" / "04.png")


def with_a_name_too_many(root: Path) -> None:
    (root / "classes.txt").write_text("\n".join([*CLASSES, "triangle"]))


def of_other_sizes(root: Path) -> None:
    for path in (root / "train" / "masks").iterdir():
        Image.open(path).resize((20, 40)).save(path)


def without_masks(root: Path) -> None:
    shutil.rmtree(root / "train" / "masks")


def of_nothing_but_what_is_ignored(root: Path) -> None:
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (without_a_mask, ["2 images without a mask, the first ", "01.png"]),
        (without_an_image, ["1 masks without an image, the first ", "05.png"]),
        (with_a_picture, ["mode RGB", "save masks as gray or palette PNG"]),
        (with_a_class_too_many, ["04.png has class 7, but there are 3, counted from 0"]),
        (with_another_class_in_validation, ["val", "04.png has class 3, but there are 3"]),
        (with_a_name_too_many, ["1 of 4 classes never occur: 3 (triangle)"]),
        (of_other_sizes, ["40 x 40 pixels, but its mask", "has 20 x 40"]),
        (without_masks, ["no folder ", "masks"]),
        (of_nothing_but_what_is_ignored, ["classes"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_masks_that_do_not_fit_are_reported_in_one_line(
    arguments: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    parts: list[str],
) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    spoil(root)
    line = failure(capsys, *arguments, f"data.root={root}", "data.max_bad=3")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("data.mixup=0.8", ["data.mixup: is for whole images"]),
        ("data.labels=x.csv", ["data.labels: is for whole images"]),
        ("model.num_classes=2", ["model.num_classes=2", "names 3 classes"]),
        ("data.mask_root=nowhere", ["data.mask_root=nowhere: no such folder"]),
        ("data.image_size=36", ["data.image_size", "multiple"]),
        ("data.name=torch/cifar10", ["images with masks are of data.name=folder or arrays"]),
        ("data.ignore_index=0", ["1 of 3 classes never occur: 2 (square)"]),
        ("data.val_split=train2", ["train2"]),
        ("visualize.bands=[0,1,3]", ["visualize.bands=[0, 1, 3]: the images have 3 channels"]),
        ("task=classification", ["is for task=segmentation"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_reported_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], setting: str, parts: list[str]
) -> None:
    line = failure(capsys, *arguments, setting)
    assert all(part in line for part in parts), line


def test_runs_of_other_tasks_are_not_gone_on_with_nor_evaluated(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.yaml"
    whole.write_text(
        f"output: {trained}\nmodel: {{variant: [[1,1,1,1],[16,24,32,48]], stem_stride: 2}}\n"
        f"data: {{root: {data}, image_size: 32, num_workers: 0}}\n"
    )
    assert "of task=segmentation, not task=classification" in failure(capsys, "--config", str(whole), "resume=auto")
    line = failure(capsys, "--evaluate", str(trained), "--config", str(whole), f"output={tmp_path / 'elsewhere'}")
    assert "was trained for task=segmentation, not task=classification" in line
