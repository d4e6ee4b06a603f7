"""The smallest images, 28 pixels in gray, through all that is done with images, with a configuration or none."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line, run_main
from PIL import Image

from fcmae.__main__ import run
from fcmae.data import save_arrays
from fcmae.files import make_folder
from fcmae.load import load_encoder, load_weights

CLASSES = ("boot", "shirt")


def fcmae(*arguments: object) -> None:
    assert run_main(run, *map(str, arguments)) == 0


def clothes(root: Path, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Write images as PNGs in a folder for each class, and return them, uint8 (n, 28, 28), with their labels."""
    rng = np.random.default_rng(number)
    pixels = np.kron(rng.integers(0, 256, (number, 7, 7)), np.ones((1, 4, 4))).astype(np.uint8)
    for index, image in enumerate(pixels):
        folder = root / split / CLASSES[index % 2]
        make_folder(folder)
        Image.fromarray(image).save(folder / f"{index}.png")
    return pixels, np.arange(number) % 2


@pytest.fixture(params=["PNGs, no configuration", "arrays, quickstart"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], Path]:
    """A run of three updates: keys that name its images, and its folder."""
    folder = tmp_path / "run"
    short = (f"output={folder}", "train.max_steps=3", "data.num_workers=0", "visualize.num_images=1")
    for split, number in (("train", 16), ("val", 6)):
        pixels, labels = clothes(tmp_path / "clothes", split, number)
        save_arrays(tmp_path / "arrays" / split, pixels, labels, CLASSES)
    if request.param.startswith("PNGs"):
        fcmae("pretrain", tmp_path / "clothes", *short)
        return [f"data.root={tmp_path / 'clothes'}"], folder
    images = ["data.name=arrays", f"data.root={tmp_path / 'arrays'}"]
    gray = ("model.in_chans=1", "data.mean=[0.5]", "data.std=[0.25]")
    fcmae("pretrain", "--config", "quickstart", *images, *gray, "data.image_size=[16,32]", *short)
    return images, folder


def test_images_of_28_pixels_in_gray_go_through_everything(
    pretrained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, folder = pretrained
    encoder, preprocessing = load_encoder(folder), load_weights(folder).preprocessing
    stride, size = (1, (24, 24)) if len(images) == 1 else (2, (16, 32))
    assert (encoder.in_chans, encoder.stem_stride, preprocessing.image_size) == (1, stride, size)
    photo = tmp_path / "clothes" / "val" / "boot" / "0.png"
    fcmae("reconstruct", folder, photo, "--output", tmp_path / "panels")
    assert (tmp_path / "panels" / "0.png").is_file()
    fcmae("evaluate", folder, "--knn", "--linear", *images)
    tuned = tmp_path / "tuned"
    short = (f"output={tuned}", "train.max_steps=2", "data.num_workers=0")
    fcmae("finetune", "--config", "finetune/small-folder-cpu", f"init_from={folder}", *images, *short)
    fcmae("finetune", "--evaluate", tuned)
    capsys.readouterr()
    fcmae("predict", tuned, photo, "--json")
    (answer,) = json.loads(capsys.readouterr().out)
    assert {found["name"] for found in answer["classes"]} == set(CLASSES)
    fcmae("export", tuned, "--to", "plain", "--output", tmp_path / "plain")
    capsys.readouterr()
    fcmae("predict", tmp_path / "plain", photo, "--json")
    (again,) = json.loads(capsys.readouterr().out)
    expected = {found["name"]: found["probability"] for found in answer["classes"]}
    assert {found["name"]: found["probability"] for found in again["classes"]} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("stride", "fitting"), [(1, "24 and 32"), (2, "16 and 32")])
def test_a_size_that_patches_do_not_fill_is_refused_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stride: int, fitting: str
) -> None:
    clothes(tmp_path, "train", 2)
    settings = [f"data.root={tmp_path}", f"output={tmp_path / 'run'}", "model.in_chans=1", "data.image_size=28"]
    settings += ["data.mean=[0.5]", "data.std=[0.25]", f"model.stem_stride={stride}"]
    line = error_line(run, capsys, "pretrain", "--config", "quickstart", *settings)
    assert line == (
        f"error: data.image_size: image height 28 is not a multiple of the patch size {8 * stride}: "
        f"the nearest sizes that are: {fitting}"
    )
