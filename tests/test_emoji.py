"""The emoji benchmark: its data set, and the runs that benchmarks/segmentation.py compares on it."""

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae import ConvNeXtV2
from fcmae.config import PretrainConfig, load_config
from fcmae.data.masks import open_segmentation

COLOURS = [*((20 * i, 0, 255) for i in range(5)), *((0, 20 * i, 9) for i in range(5, 10))]
BEHIND = (200, 220, 240)
"""Green of the photographs."""
ROOT = Path(__file__).parents[1]


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("emoji")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two groups of five emoji, each a disk of a colour of its own; and three photographs, one of them
    in eight files.
    """
    package = tmp_path / "package"
    (package / "img/google/64").mkdir(parents=True)
    entries = []
    rows, columns = np.mgrid[:64, :64] - 32
    for number in range(10):
        picture = np.zeros((64, 64, 4), np.uint8)
        picture[rows**2 + columns**2 < 900] = (*COLOURS[number], 255)
        name = f"{number}.png"
        Image.fromarray(picture).save(package / "img/google/64" / name)
        group = "Flags" if number < 5 else "Objects"
        entries.append({"category": group, "image": name, "has_img_google": True})
    entries.append({"category": "Component", "image": "none.png", "has_img_google": True})
    entries.append({"category": "Flags", "image": "none.png", "has_img_google": False})
    (package / "emoji.json").write_text(json.dumps(entries))
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (80, 60), (250, BEHIND[number], 250)).save(tmp_path / f"photos/{number}.png")
    for number in range(7):
        shutil.copy(tmp_path / "photos/0.png", tmp_path / f"photos/again-{number}.png")
    return package


def prepared(emoji: Any, package: Path, output: Path, *more: str) -> Path:
    photos = f"{package.parent}/photos"
    sizes = ["--size=32", "--train=20", "--val=10", "--test=10"]
    emoji.prepare(emoji.parse_arguments(["prepare", str(package), str(output), "--photos", photos, *sizes, *more]))
    return output


def test_the_splits_share_no_emoji_and_no_photograph(emoji: Any, package: Path, tmp_path: Path) -> None:
    data = prepared(emoji, package, tmp_path / "data")
    colours: list[set[tuple[int, ...]]] = []
    backgrounds: list[int] = []
    for split in ("train", "val", "test"):
        source = open_segmentation("arrays", str(data), split, 3)
        assert source.class_names == ("background", "Flags", "Objects")
        seen: Counter[tuple[int, ...]] = Counter()
        behind: Counter[int] = Counter()
        for index in range(len(source)):
            pixels, classes, _ = source.load(index)
            emoji_pixels = pixels[:, classes > 0].T.int()
            for colour in COLOURS:  # which resizing changes by one or two, and at an edge by more
                seen[colour] += int(((emoji_pixels - torch.tensor(colour)).abs() <= 2).all(1).sum())
            behind.update(pixels[1][classes == 0].tolist())
        colours.append({colour for colour in COLOURS if seen[colour] > 100})
        backgrounds.append(max(BEHIND, key=lambda green: behind[green]))
    train, val, test = colours
    assert len(train) > len(val) >= 2 <= len(test)
    assert not train & val | train & test | val & test
    assert sorted(backgrounds) == sorted(BEHIND)


def test_a_pixel_has_the_class_of_the_emoji_that_is_seen_there(emoji: Any, package: Path, tmp_path: Path) -> None:
    source = open_segmentation("arrays", str(prepared(emoji, package, tmp_path / "data")), "train", 3)
    for index in range(len(source)):
        pixels, classes, _ = source.load(index)
        flags, objects = pixels[2] > 254, (pixels[0] == 0) & (pixels[2] == 9)
        assert (classes[objects] == 2).all()
        assert (classes[flags & (pixels[1] == 0)] == 1).all()
        assert (classes[(pixels == 250).sum(0) == 2] == 0).all()


def test_with_one_class_the_images_are_the_same_and_all_emoji_are_alike(
    emoji: Any, package: Path, tmp_path: Path
) -> None:
    groups, alike = (prepared(emoji, package, tmp_path / f"data{more}", *more) for more in ([], ["--one-class"]))
    by_group, by_one = (open_segmentation("arrays", str(data), "train", 3) for data in (groups, alike))
    assert by_one.class_names == ("background", "emoji")
    for index in range(len(by_group)):
        assert torch.equal(by_group.load(index).pixels, by_one.load(index).pixels)
        assert torch.equal(by_group.load(index).classes > 0, by_one.load(index).classes == 1)


def test_the_same_seed_makes_the_same_files(emoji: Any, package: Path, tmp_path: Path) -> None:
    made = [prepared(emoji, package, tmp_path / f"{i}", f"--seed={seed}") for i, seed in enumerate((0, 0, 1))]
    first, again, other = ((folder / "train/images.npy").read_bytes() for folder in made)
    assert first == again != other
    assert (made[0] / "samples.png").is_file()


def test_a_package_that_is_not_there_is_named(emoji: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no emoji\.json"):
        emoji.read_emoji(tmp_path)
    with pytest.raises(SystemExit, match="fewer than three photographs"):
        emoji.read_photos([tmp_path])


# What is learned from it


@pytest.fixture
def segmentation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with trainings of two updates, from an encoder that stands for a pretrained one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    segmentation = importlib.import_module("segmentation")
    torch.manual_seed(0)
    encoder = ConvNeXtV2(segmentation.VARIANT, stem_stride=segmentation.STEM_STRIDE, num_classes=0)

    def load_encoder(path: Path, num_classes: int) -> ConvNeXtV2:
        copy = ConvNeXtV2(segmentation.VARIANT, stem_stride=segmentation.STEM_STRIDE, num_classes=num_classes)
        copy.load_state_dict(encoder.state_dict())
        return copy

    def train(script: str, config: str, run: Path, keys: Sequence[str]) -> None:
        assert script == "pretrain.py"
        pretraining = load_config(PretrainConfig, config, [f"output={run}", *keys])
        assert pretraining.data.size == (segmentation.SIDE, segmentation.SIDE)
        assert pretraining.model.variant == segmentation.VARIANT
        run.mkdir(parents=True, exist_ok=True)

    small = {"SIDE": 32, "UPDATES": 2, "BATCH_SIZE": 2, "SHOWN": 2, "SEEDS": (0, 1), "FRACTIONS": (0.1, 1.0)}
    small |= {"PRETRAINING": (*segmentation.PRETRAINING, "data.image_size=32")}
    for name, value in (small | {"load_encoder": load_encoder, "train": train}).items():
        monkeypatch.setattr(segmentation, name, value)
    return segmentation


def test_every_start_is_trained_at_its_own_best_rate_on_val_and_nothing_runs_twice(
    emoji: Any, segmentation: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(emoji, package, tmp_path / "data", "--one-class")
    shared = [str(data), f"--runs={tmp_path / 'runs'}", f"--json={tmp_path / 'results.jsonl'}"]
    args = segmentation.parse_arguments(["run", *shared])
    segmentation.run_all(args)
    lines = segmentation.read_lines(args.json)
    chosen = [line for line in lines if line["split"] == "val"]
    assert {(line["start"], line["rate"]) for line in chosen} == {
        (start, rate) for start in segmentation.STARTS for rate in segmentation.RATES
    }
    assert {line["seed"] for line in chosen}.isdisjoint(segmentation.SEEDS)
    reported = [line for line in lines if line["split"] == "test"]
    assert {(line["start"], line["fraction"], line["seed"]) for line in reported} == {
        (start, fraction, seed)
        for start in segmentation.STARTS
        for fraction in segmentation.FRACTIONS
        for seed in segmentation.SEEDS
    }
    for line in reported:
        others = [other for other in chosen if other["start"] == line["start"]]
        assert line["rate"] == max(others, key=lambda other: other["miou"])["rate"]
        assert 0 <= line["miou"] <= line["accuracy"] <= 100

    picture = str(tmp_path / "picture.png")
    segmentation.plot(args.json, Path(picture))
    segmentation.draw(segmentation.parse_arguments(["draw", *shared, picture, "--fraction=0.1"]))
    assert Image.open(picture).width > 5 * 32  # image, truth, and three predictions
    monkeypatch.setattr(segmentation, "fit", None)
    segmentation.run_all(args)
    assert segmentation.read_lines(args.json) == lines


def test_a_frozen_encoder_stays_as_it_was_and_all_starts_see_the_same_images(
    emoji: Any, segmentation: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_segmentation("arrays", str(prepared(emoji, package, tmp_path / "data")), "train", 3)
    seen: dict[str, list[torch.Tensor]] = {}
    moved: dict[str, bool] = {}
    loss = segmentation.segmentation_loss
    for start in segmentation.STARTS:

        def watch(logits: torch.Tensor, labels: torch.Tensor, start: str = start) -> torch.Tensor:
            seen.setdefault(start, []).append(labels)
            return loss(logits, labels)

        monkeypatch.setattr(segmentation, "segmentation_loss", watch)
        model = segmentation.build(segmentation.Run(start, 1.0, 0, 1e-2), source.num_classes, tmp_path)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        segmentation.fit(model, source, segmentation.Run(start, 1.0, 0, 1e-2))
        after = model.state_dict()
        assert not torch.equal(after["head.fuse.0.weight"], before["head.fuse.0.weight"])
        moved[start] = any(not torch.equal(after[n], t) for n, t in before.items() if n.startswith("encoder."))
    assert moved == {start: start != "FCMAE, frozen" for start in segmentation.STARTS}
    for labels in zip(*seen.values(), strict=True):
        assert all(torch.equal(labels[0], other) for other in labels)


def test_no_results_are_an_error(segmentation: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results"):
        segmentation.table(tmp_path / "none.jsonl")


def test_the_shipped_results_are_what_the_documents_show(
    segmentation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    results = ROOT / "benchmarks/results/segmentation-cpu.jsonl"
    reported = [line for line in segmentation.read_lines(results) if line["split"] == "test"]
    assert [(line["start"], line["fraction"], line["seed"]) for line in reported] == [
        (start, fraction, seed)
        for start in segmentation.STARTS
        for seed in segmentation.SEEDS
        for fraction in segmentation.FRACTIONS
    ]
    text = (ROOT / "docs/results.md").read_text()
    assert all(table in text for table in segmentation.table(results).split("\n\n"))
