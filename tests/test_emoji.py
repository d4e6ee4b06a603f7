"""The emoji benchmark's data set: exact masks, no emoji and no photograph in two splits, the same every time."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data.masks import open_segmentation

COLOURS = [*((20 * i, 0, 255) for i in range(5)), *((0, 20 * i, 9) for i in range(5, 10))]
BEHIND = (200, 220, 240)
"""Green of the photographs."""
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("emoji")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two groups of five emoji, each a disk of a colour of its own; and three photographs."""
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
