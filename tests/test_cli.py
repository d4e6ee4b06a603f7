"""The fcmae command: results on standard output, everything else on standard error, exit code 2 for bad input."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, randomise, small_encoder
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae import FCMAE, ConvNeXtV2
from fcmae.commands import cli
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import PixelNormalizer, cover
from fcmae.evaluation.inference import fit_to_patches
from fcmae.load import load_weights
from fcmae.training.checkpoint import save_checkpoint
from fcmae.weights.base import Preprocessing
from fcmae.weights.timm import write_timm_folder

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "docs" / "photos"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ["cat", "dog", "kite"]


def fcmae(*arguments: Any) -> int:
    """Run the command in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fcmae", *map(str, arguments)])
        return cli.main()


@pytest.fixture(scope="module")
def network() -> ConvNeXtV2:
    torch.manual_seed(0)
    return small_encoder(num_classes=3).float().eval()


@pytest.fixture(scope="module")
def model(network: ConvNeXtV2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as fine-tuning leaves it."""
    folder = tmp_path_factory.mktemp("model")
    write_timm_folder(network, Preprocessing(MEAN, STD, (64, 64), 0.9, class_names=tuple(NAMES)), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run of patches of 8 px, trained at 32 px."""
    folder = tmp_path_factory.mktemp("run")
    model = {"variant": TINY, "stem_stride": 1, "decoder_dim": 16}
    values = {"output": str(folder), "model": model, "data": {"root": "x", "image_size": 32}}
    config = parse_config(PretrainConfig, values, "a test").model_dump(mode="json")
    torch.manual_seed(0)
    fcmae_model = randomise(FCMAE(TINY, stem_stride=1, decoder_dim=16), std=0.1)
    save_checkpoint(
        folder / "checkpoints",
        step=3,
        model=fcmae_model.state_dict(),
        optimizer={},
        state={"config": config},
        keep=1,
    )
    return folder


def test_predictions_are_those_of_the_network_on_the_evaluated_crop(
    model: Path, network: ConvNeXtV2, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))
    assert fcmae("predict", model, PHOTOS, "--top", 2, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == [str(photo) for photo in photos]
    for photo, result in zip(photos, results, strict=True):
        pixels = cover(pil_to_tensor(Image.open(photo)), (64, 64), 0.9)
        with torch.no_grad():
            wanted = network(PixelNormalizer(MEAN, STD)(pixels)[None]).softmax(1)[0]
        likeliest = wanted.argsort(descending=True)[:2].tolist()
        assert [guess["index"] for guess in result["classes"]] == likeliest
        assert [guess["name"] for guess in result["classes"]] == [NAMES[i] for i in likeliest]
        found = torch.tensor([guess["probability"] for guess in result["classes"]])
        assert torch.allclose(found, wanted[likeliest], atol=1e-5)


def test_the_table_names_images_and_classes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fcmae("predict", model, PHOTOS / "fig.jpg", "--top", 99, PHOTOS / "bird.jpg") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert (lines[0], lines[4]) == (str(PHOTOS / "fig.jpg"), str(PHOTOS / "bird.jpg"))
    assert sorted(line.split()[1] for line in lines[1:4]) == NAMES
    assert sum(float(line.split()[0].rstrip("%")) for line in lines[1:4]) == pytest.approx(100, abs=0.02)
    assert "timm, ConvNeXt V2 depths [1, 1, 2, 1]" in captured.err


def test_unreadable_images_are_named_and_the_others_done(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((PHOTOS / "fig.jpg").read_bytes()[:5000])
    images = [
        tmp_path / "cut.jpg",
        tmp_path / "gone.jpg",
        PHOTOS / "fig.jpg",
        tmp_path / "text.jpg",
        tmp_path / "empty",
    ]
    assert fcmae("predict", model, *images, "--json") == 2
    captured = capsys.readouterr()
    assert [result["image"] for result in json.loads(captured.out)] == [str(PHOTOS / "fig.jpg")]
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    for name in (
        "cut.jpg: image file is truncated",
        "gone.jpg: no such file",
        "text.jpg: not an image",
        "empty: no images",
    ):
        assert sum(name in line for line in errors) == 1, name


def test_photographs_are_turned_as_their_camera_says(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.open(PHOTOS / "bird.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert fcmae("predict", model, tmp_path / "upright.png", tmp_path / "turned.png", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["classes"] == second["classes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{run}", "x.jpg"], "holds an encoder without a classifier; fine-tune it"),
        (["predict", "{model}", "x.jpg", "--top", "0"], "--top 0: must be at least 1"),
        (["predict", "{model}", "x.jpg", "--ema"], "holds no EMA weights"),
        (["predict", "nothing", "x.jpg"], "nothing: no such file or folder"),
        (["reconstruct", "{model}", "x.jpg"], "holds no decoder to reconstruct with"),
        (
            ["reconstruct", "{run}", str(PHOTOS / "fig.jpg"), "--mask-ratios", "1.5"],
            "--mask-ratios: mask_ratio must",
        ),
        (["export", "{model}", "--to", "plain", "--output", "{model}"], "exists already; name another folder"),
        (["export", "{run}", "--to", "timm", "--output", "{model}/../a/b", "--ema"], "holds no EMA weights"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fcmae(*(argument.format(run=run, model=model) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert message in captured.err.splitlines()[-1]
    assert captured.err.count("error") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["predict"], ["predict", "m"], ["export", "s", "--to", "word"], ["paint"]]
)
def test_wrong_arguments_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fcmae(*arguments)
    assert "usage: fcmae" in capsys.readouterr().err


def test_an_export_says_what_it_wrote_and_how_to_load_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fcmae("export", run, "--to", "timm", "--output", tmp_path / "new" / "folder") == 0
    captured = capsys.readouterr()
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == [
        str(tmp_path / "new" / "folder" / name) for name in ("config.json", "model.safetensors")
    ]
    assert "FCMAE run, step 3, raw weights, ConvNeXt V2" in captured.err
    assert "checked on random images in float64" in captured.err
    assert f'timm.create_model("local-dir:{tmp_path / "new" / "folder"}", pretrained=True)' in captured.err
    stored, written = load_weights(run), load_weights(tmp_path / "new" / "folder")
    assert all(torch.equal(stored.tensors[name], written.tensors[name]) for name in stored.tensors)


def test_what_had_to_be_assumed_is_said(
    network: ConvNeXtV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network.state_dict(), tmp_path / "x.pth")
    assert fcmae("predict", tmp_path / "x.pth", PHOTOS / "fig.jpg") == 0
    captured = capsys.readouterr()
    assert "tells no mean, std, image_size: taken from ImageNet at 224 px" in captured.err
    assert sorted(line.split()[1] for line in captured.out.splitlines()[1:]) == ["0", "1", "2"]


def test_reconstructions_of_any_size_are_drawn_at_each_ratio(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name, size in {"wide/a": (30, 90), "tall/a": (200, 50), "line": (2, 300)}.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "out"
    images = [tmp_path / "wide", tmp_path / "tall" / "a.png", tmp_path / "line.png", tmp_path / "gone.png"]
    assert fcmae("reconstruct", run, *images, "--mask-ratios", 0.25, 0.5, "--output", out) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"{out / 'a.png'}  resized from 90 x 30 to 56 x 16",
        f"{out / 'a-2.png'}  resized from 50 x 200 to 16 x 64",
        f"{out / 'line.png'}  resized from 300 x 2 to 392 x 8",
    ]
    assert captured.err.splitlines() == [f"error: {tmp_path / 'gone.png'}: no such file"]
    with Image.open(out / "a.png") as picture:
        width, height = picture.size
    assert height == 2 * (128 + 4) + 4 + 15 + 2 * 4  # a row for each ratio, 16 px enlarged to 128, and titles
    assert width > 3 * (56 * 8 + 4) + 4  # and room for labels


def test_reconstruct_repeats_itself(run: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        assert fcmae("reconstruct", run, PHOTOS / "fig.jpg", "--output", tmp_path / name) == 0
    first, again = (np.asarray(Image.open(tmp_path / name / "fig.png")) for name in ("first", "again"))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (320, 427), (32, 32), (3000, 4000)])
def test_images_become_whole_patches_of_about_the_same_area(size: tuple[int, int]) -> None:
    height, width = fit_to_patches(*size, patch=16, area=96 * 96)
    assert height % 16 == width % 16 == 0
    assert height * width >= 2 * 16 * 16
    if max(size) < 20 * min(size):
        assert 0.7 < height * width / 96**2 < 1.4
        assert 0.7 < (height / width) / (size[0] / size[1]) < 1.4


def test_gray_images_go_through_a_gray_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gray = small_encoder(num_classes=3, in_chans=1).float()
    write_timm_folder(gray, Preprocessing((0.5,), (0.5,), (64, 64)), tmp_path)
    assert fcmae("predict", tmp_path, PHOTOS / "fig.jpg") == 0
    many = small_encoder(num_classes=3, in_chans=5).float()
    write_timm_folder(many, Preprocessing((0.5,) * 5, (0.5,) * 5, (64, 64)), tmp_path)
    assert fcmae("predict", tmp_path, PHOTOS / "fig.jpg") == 2
    assert "the network wants 5 channels; image files have 1, 3 or 4" in capsys.readouterr().err


def test_the_command_is_installed_by_that_name() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["fcmae"].partition(":")
    assert getattr(import_module(module), function) is cli.main


def test_a_reader_that_has_seen_enough_gets_no_traceback(model: Path) -> None:
    command = f"{sys.executable} -m fcmae.commands.cli predict {model} {PHOTOS} {PHOTOS} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == f"{PHOTOS / 'aitzgorri.jpg'}\n"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
