"""Images that are not 8-bit RGB, from files to predictions as a new user would: each command on another's work."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tifffile
import timm
import torch
from conftest import run_main
from PIL import Image
from torch import Tensor

import fcmae
from fcmae.__main__ import run
from fcmae.data import PixelNormalizer, Reading, cover
from fcmae.encoder.convnext import ConvNeXt
from fcmae.evaluation.inference import Picture, read_images
from fcmae.load import load_weights
from fcmae.weights.base import Preprocessing
from fcmae.weights.timm import write_timm_folder
from fcmae.weights.transformers import PREPROCESSOR

Command = Callable[..., tuple[int, str, str]]

SIDE, CROP, CHANNELS = 32, 0.875, 5
MEAN, STD = (0.02, 0.021, 0.022, 0.023, 0.024), (0.012, 0.012, 0.012, 0.012, 0.012)
CLASSES = ("crop", "water")
SMALL = (
    "model.variant=[[1,1,1,1],[8,8,16,16]]",
    "model.stem_stride=1",
    f"data.image_size={SIDE}",
    "data.batch_size=4",
    "optim.images_per_update=8",
    "optim.accumulate=auto",
    "data.num_workers=0",
    "train.max_steps=2",
    "train.precision=no",
)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_main(run, *map(str, arguments))
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def succeed(command: Command) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """The one line on standard error, but for what names the weights."""

    def call(*arguments: object) -> str:
        code, _, err = command(*arguments)
        lines = [line for line in err.splitlines() if "ConvNeXt V2" not in line and "FCMAE run" not in line]
        assert (code, len(lines)) == (2, 1), err
        return lines[0]

    return call


def scene(label: int, number: int, bands: int) -> np.ndarray:
    """A field of waves in [0, 1], slower for class 0, and a little noise: float64 (40, 48, bands)."""
    y, x = np.mgrid[:40, :48]
    rng = np.random.default_rng([label, number])
    waves = [0.5 + 0.4 * np.sin((x * (1 + 3 * label) + band + number) / 6) * np.cos(y / 7) for band in range(bands)]
    return np.clip(np.stack(waves, axis=2) + 0.02 * rng.standard_normal((40, 48, bands)), 0, 1)


def make_folder(root: Path, suffix: str, save: Callable[[Path, np.ndarray, int], object], bands: int) -> Path:
    """Write class folders of training and validation images."""
    for split, number in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                save(root / split / name / f"{i}{suffix}", scene(label, i, bands), i)
    return root


def save_tiff(path: Path, pixels: np.ndarray, number: int) -> None:
    """Reflectances up to 3000 of 65535, as satellites have them; band by band, or pixel by pixel."""
    values = (pixels * 3000).astype(np.uint16)
    order, values = ("separate", values.transpose(2, 0, 1)) if number % 2 else ("contig", values)
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig=order)


@pytest.fixture(scope="module")
def satellite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("satellite"), ".tif", save_tiff, CHANNELS)


def train(images: Path, place: Path, channels: int, *keys: str) -> tuple[Path, Path]:
    """Pretrain, then fine-tune from it, to a classifier sure enough to be compared: the two run folders."""
    pretrained, finetuned = place / "pretrained", place / "finetuned"
    decoder = ("model.decoder_dim=16", f"model.in_chans={channels}")
    found = run_main(
        run,
        *("pretrain", "--config", "tiny", f"data.root={images}", f"output={pretrained}", *SMALL, *decoder, *keys),
    )
    assert found == 0
    plain = ("data.auto_augment=null", "data.mixup=0", "data.cutmix=0", "optim.layer_decay=1")
    found = run_main(
        run,
        *("finetune", "--config", "tiny", f"init_from={pretrained}", f"data.root={images}", f"output={finetuned}"),
        *(
            *SMALL[2:],
            *plain,
            "model.variant=auto",
            "train.ema_decay=null",
            f"data.crop_pct={CROP}",
            "model.head_init_scale=30",
        ),
    )
    assert found == 0
    return pretrained, finetuned


@pytest.fixture(scope="module")
def runs(satellite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    keys = f"data.mean={list(MEAN)}", f"data.std={list(STD)}", "visualize.bands=[3,2,1]"
    return train(satellite, tmp_path_factory.mktemp("runs"), CHANNELS, *keys)


def predictions(succeed: Callable[..., str], *arguments: object) -> dict[str, list[dict[str, Any]]]:
    found = json.loads(succeed("predict", *arguments, "--json"))
    return {entry["image"]: entry["classes"] for entry in found}


def run_card(folder: Path, pixels: Tensor) -> Tensor:
    """What the Python in a folder's card makes of pixels."""
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {"pixels": pixels}
    with torch.no_grad():
        exec(code.replace("PATH/OF/THIS/FOLDER", str(folder)), names)
    return names["out"]


def test_an_encoder_of_16_bit_images_of_five_bands_says_how_it_wants_them(runs: tuple[Path, Path]) -> None:
    encoder = runs[0] / "encoder"
    for use in (load_weights(encoder).preprocessing, load_weights(runs[0]).preprocessing):
        assert (use.dtype, use.mean, use.std, use.image_size) == ("uint16", MEAN, STD, (SIDE, SIDE))
    theirs: Any = timm.create_model(f"local-dir:{encoder}", pretrained=True)
    assert theirs.stem[0].in_channels == CHANNELS
    pixels = torch.randint(0, 3000, (2, CHANNELS, SIDE, SIDE)).to(torch.uint16)
    with torch.no_grad():
        ours = fcmae.load_encoder(encoder).eval()(PixelNormalizer(MEAN, STD)(pixels))
    torch.testing.assert_close(run_card(encoder, pixels.float()), ours, rtol=1e-4, atol=1e-5)


def test_files_and_folders_are_classified_as_they_were_evaluated(
    runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str]
) -> None:
    files = sorted((satellite / "val").rglob("*.tif"))
    together = predictions(succeed, runs[1], satellite / "val")
    assert list(together) == list(map(str, files))
    network = fcmae.load_encoder(runs[1]).eval()
    for file in files:
        (alone,) = predictions(succeed, runs[1] / "model", file).values()
        assert [entry["name"] for entry in alone] == [entry["name"] for entry in together[str(file)]]
        pixels = torch.from_numpy(tifffile.imread(file))
        pixels = pixels if len(pixels) == CHANNELS else pixels.permute(2, 0, 1)
        with torch.no_grad():
            wanted = network(PixelNormalizer(MEAN, STD)(cover(pixels, (SIDE, SIDE), CROP))[None]).softmax(1)[0]
        for entry in together[str(file)]:
            assert entry["probability"] == pytest.approx(float(wanted[entry["index"]]), abs=1e-6)


@pytest.mark.parametrize("form", ["timm", "transformers", "official", "plain"])
def test_an_exported_folder_predicts_the_same(
    form: str, runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str], tmp_path: Path
) -> None:
    succeed("export", runs[1], "--to", form, "--output", tmp_path / "out")
    before, after = (predictions(succeed, source, satellite / "val") for source in (runs[1], tmp_path / "out"))
    for file, classes in before.items():
        for one, other in zip(classes, after[file], strict=True):
            assert one["name"] == other["name"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    assert load_weights(tmp_path / "out").preprocessing.dtype == "uint16"


def test_the_image_processor_of_transformers_prepares_16_bits_as_we_do(
    runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    succeed("export", runs[1], "--to", "transformers", "--output", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    (picture,) = read_images([satellite / "val" / "crop" / "0.tif"], CHANNELS, Reading(torch.uint16))
    assert isinstance(picture, Picture)
    pixels = picture.pixels[..., :40]  # a square, whose crop needs no rounding
    ours = PixelNormalizer(MEAN, STD)(cover(pixels, (SIDE, SIDE), CROP))
    theirs = processor(pixels.numpy(), input_data_format="channels_first", return_tensors="pt")
    assert float((theirs["pixel_values"][0] - ours).abs().max()) < 2e-3  # a 65535th is 1.3e-3 of these deviations
    assert "rescale_factor" in (tmp_path / "out" / PREPROCESSOR).read_text()


def onnx_probabilities(folder: Path, file: Path, use: Preprocessing) -> np.ndarray:
    """What an ONNX model with preprocessing inside makes of a file."""
    (picture,) = read_images([file], len(use.mean), Reading.of(use))
    assert isinstance(picture, Picture)
    pixels = picture.pixels.float() / (65535 if use.dtype == "uint16" else 1)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    outputs: Any = session.run(None, {"images": pixels.permute(1, 2, 0)[None].numpy()})
    return outputs[0][0]


def assert_onnx_predicts_the_same(run_folder: Path, images: Path, succeed: Callable[..., str], out: Path) -> None:
    succeed("export", run_folder, "--to", "onnx", "--with-preprocessing", "--output", out)
    use = load_weights(run_folder / "model").preprocessing
    described = json.loads((out / "config.json").read_text())
    assert described["input"].endswith(f"{len(use.mean)}): the program resizes, clips and normalises")
    assert described["input"].startswith("float32")
    assert described["output"] == "probabilities"
    for file, classes in predictions(succeed, run_folder, images).items():
        found = onnx_probabilities(out, Path(file), use)
        for entry in classes:
            assert entry["probability"] == pytest.approx(float(found[entry["index"]]), abs=2e-3)


def test_onnx_with_preprocessing_inside_takes_shares_of_16_bits(
    runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str], tmp_path: Path
) -> None:
    assert_onnx_predicts_the_same(runs[1], satellite / "val", succeed, tmp_path / "out")


def test_a_program_takes_what_the_caller_normalised(
    runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str], tmp_path: Path
) -> None:
    succeed("export", runs[1], "--to", "torch-export", "--output", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["input"] == "float32 (batch, 5, height, width): the caller resizes, clips and normalises"
    assert (described["output"], described["dtype"]) == ("logits", "uint16")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    file = satellite / "val" / "water" / "1.tif"
    view = cover(torch.from_numpy(tifffile.imread(file)), (SIDE, SIDE), CROP)
    with torch.no_grad():
        found = program(PixelNormalizer(MEAN, STD)(view)[None]).softmax(1)[0]
    (classes,) = predictions(succeed, runs[1], file).values()
    for entry in classes:
        assert entry["probability"] == pytest.approx(float(found[entry["index"]]), abs=1e-5)


def test_five_bands_are_reconstructed_evaluated_and_diagnosed(
    runs: tuple[Path, Path], satellite: Path, succeed: Callable[..., str], tmp_path: Path
) -> None:
    succeed("reconstruct", runs[0], satellite / "val" / "crop", "--output", tmp_path / "panels")
    for picture in (runs[0] / "reconstructions").glob("*.png"), (tmp_path / "panels").glob("*.png"):
        with Image.open(next(iter(picture))) as shown:
            assert np.asarray(shown).reshape(-1, 3).std(0).min() > 20  # none of the three bands is flat
    for source in (runs[0], runs[0] / "encoder"):
        keys = [f"data.root={satellite}", "data.num_workers=0", "eval.val_split=val"]
        found = json.loads(succeed("evaluate", source, "--json", *keys))
        assert found["val_images"] == 4
        assert found["linear"]["top1"] == 1.0
    models = [f"run={runs[0]}", f"folder={runs[0] / 'encoder'}", f"timm=timm:{runs[0] / 'encoder'}"]
    options = ("--data", satellite, "--output", tmp_path / "diagnosis", "--num-workers", 0)
    succeed("diagnose", *models, *options)
    report = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    ours, folder, theirs = (
        [layer["cosine_distance"] for layer in model["layers"].values()] for model in report["models"].values()
    )
    assert folder == pytest.approx(ours, abs=1e-5)
    assert theirs == pytest.approx(ours, abs=1e-4)


# Other kinds


def save_depth(path: Path, pixels: np.ndarray, number: int) -> None:
    """Metres, with a hole, and a point that is far too far."""
    metres = (pixels[..., 0] * 50 - 10).astype(np.float32)
    metres[:9, :13] = np.nan
    metres[20, 30] = 1e6
    np.save(path, metres)


def test_floats_with_unknown_pixels_and_clipping_from_end_to_end(
    succeed: Callable[..., str], command: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    images = make_folder(tmp_path / "images", ".npy", save_depth, 1)
    keys = ("data.mean=[15]", "data.std=[14]", "data.nodata=nan", "data.clip=[-5,60]")
    pretrained, finetuned = train(images, tmp_path, 1, *keys)
    use = load_weights(finetuned / "model").preprocessing
    assert (use.dtype, use.nodata, use.clip) == ("float32", "nan", (-5.0, 60.0))
    found = predictions(succeed, finetuned, images / "val")
    for form in ("timm", "transformers", "plain"):
        succeed("export", finetuned, "--to", form, "--output", tmp_path / form)
        again = load_weights(tmp_path / form).preprocessing
        assert (again.dtype, again.nodata, again.clip) == (use.dtype, use.nodata, use.clip)
        again = predictions(succeed, tmp_path / form, images / "val")
        for file, classes in found.items():
            assert [entry["name"] for entry in again[file]] == [entry["name"] for entry in classes]
    pixels = torch.full((1, 1, SIDE, SIDE), 20.0)
    pixels[..., :4], pixels[..., 5] = torch.nan, 1e6
    normalize = PixelNormalizer((15.0,), (14.0,), (-5.0, 60.0))
    with torch.no_grad():
        ours = fcmae.load_encoder(finetuned).eval()(normalize(pixels))
    torch.testing.assert_close(run_card(finetuned / "model", pixels), ours, rtol=1e-4, atol=1e-5)
    succeed("reconstruct", pretrained, images / "val" / "crop" / "0.npy", "--output", tmp_path / "panels")
    keys = (f"data.root={images}", "data.num_workers=0", "eval.val_split=val")
    assert "unreadable_images" not in json.loads(succeed("evaluate", pretrained, "--json", "--knn", *keys))
    options = ("--data", images, "--output", tmp_path / "diagnosis", "--num-workers", 0)
    succeed("diagnose", pretrained, *options)


def save_gray(path: Path, pixels: np.ndarray, number: int) -> None:
    """12 bits in 16."""
    Image.fromarray((pixels[..., 0] * 4095).astype(np.uint16)).save(path)


def test_12_bits_in_16_from_end_to_end(succeed: Callable[..., str], tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", ".png", save_gray, 1)
    pretrained, finetuned = train(images, tmp_path, 1, "data.mean=[0.03]", "data.std=[0.018]")
    file = images / "val" / "crop" / "0.png"
    (classes,) = predictions(succeed, finetuned, file).values()
    with Image.open(file) as opened:
        pixels = torch.from_numpy(np.asarray(opened).astype(np.uint16))[None]
    view = PixelNormalizer((0.03,), (0.018,))(cover(pixels, (SIDE, SIDE), CROP))
    with torch.no_grad():
        wanted = fcmae.load_encoder(finetuned).eval()(view[None]).softmax(1)[0]
    assert classes[0]["probability"] == pytest.approx(float(wanted.max()), abs=1e-6)
    succeed("reconstruct", pretrained, file, "--output", tmp_path / "panels")
    with Image.open(tmp_path / "panels" / "0.png") as shown:
        assert len(np.unique(np.asarray(shown)[..., 0])) > 100  # not the 16 levels that 8 of these 12 bits had


def test_a_network_of_rgb_images_is_adapted_to_five_bands_and_predicts_them(
    satellite: Path, command: Command, succeed: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    variant = ((1, 1, 1, 1), (8, 8, 16, 16))
    write_timm_folder(ConvNeXt(variant, stem_stride=1), Preprocessing(image_size=(SIDE, SIDE)), tmp_path / "rgb")
    keys = [f"init_from={tmp_path / 'rgb'}", f"data.root={satellite}", f"output={tmp_path / 'run'}", *SMALL[2:]]
    keys += ["data.auto_augment=null", "data.mixup=0", "data.cutmix=0", "optim.layer_decay=1", "model.variant=auto"]
    keys += ["model.in_chans=5"]
    assert "data.mean has 3 values, but model.in_chans is 5" in refused("finetune", "--config", "tiny", *keys)
    keys += [f"data.mean={list(MEAN)}", f"data.std={list(STD)}"]
    line = refused("finetune", "--config", "tiny", *keys, "model.stem_stride=2", "--dry-run")
    assert "weights with stem_stride 1; set model.stem_stride to that" in line
    said = succeed("finetune", "--config", "tiny", *keys)
    assert said.count("first layer adapted from 3 to 5 channels (repeated in turn)") == 1
    assert len(predictions(succeed, tmp_path / "run", satellite / "val")) == 4


def test_networks_of_others_see_16_bits_in_full_and_no_floats(
    succeed: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    deep, shallow = tmp_path / "deep" / "x.png", tmp_path / "shallow" / "x.png"
    floats = tmp_path / "floats" / "x.npy"
    for file in (deep, shallow, floats):
        file.parent.mkdir()
    levels = (scene(0, 0, 1)[..., 0] * 255).astype(np.uint8)
    Image.fromarray(levels).save(shallow)
    Image.fromarray(levels.astype(np.uint16) * 257).save(deep)
    np.save(floats, levels.astype(np.float32))
    out = ("--output", tmp_path / "out", "--overwrite", "--num-workers", 0)
    found = []
    for file in (deep, shallow):
        succeed("diagnose", "timm:test_convnext", "--data", file.parent, *out)
        report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
        (model,) = report["models"].values()
        found.append([layer["cosine_distance"] for layer in model["layers"].values()])
    assert found[0] == pytest.approx(found[1], rel=0.01)  # but for what resizing rounds
    line = refused("diagnose", "timm:test_convnext", "--data", floats.parent, *out)
    assert line.startswith(f"error: --data {floats.parent}: float32 pixels for a network trained on uint8")


# What is refused


def test_what_is_no_image_of_the_networks_is_refused_in_one_line(
    runs: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "x"
    Image.new("RGB", (40, 40)).save(file, "png")
    for command in (("predict", runs[1]), ("reconstruct", runs[0])):
        line = refused(*command, file, *(["--output", tmp_path] if command[0] == "reconstruct" else []))
        assert line == f"error: {file}: 3 bands where 5 are wanted"
    tifffile.imwrite(
        file, np.zeros((CHANNELS, 40, 40), np.float32), photometric="minisblack", planarconfig="separate"
    )
    assert "float32 pixels for a network trained on uint16, of which 65535 is the most" in refused(
        "predict", runs[1], file
    )
    tifffile.imwrite(file, np.zeros((3, 40, 40, CHANNELS), np.uint16), photometric="minisblack")
    assert "pages; split it into one file per page" in refused("predict", runs[1], file)
    (tmp_path / "floats").mkdir()
    np.save(tmp_path / "floats" / "x.npy", np.zeros((40, 40, CHANNELS), np.float32))
    options = ("--output", tmp_path / "diagnosis", "--num-workers", 0)
    line = refused("diagnose", runs[0], "--data", tmp_path / "floats", *options)
    assert "float32 pixels among uint16 ones" in line


def test_a_reader_whose_library_is_missing_is_named_by_its_extra(
    runs: tuple[Path, Path], satellite: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    file = satellite / "val" / "crop" / "0.tif"
    line = refused("predict", runs[1], file)
    assert line.startswith(f"error: {file}: ")
    assert line.endswith("needs tifffile: pip install 'fcmae[deep]'")
