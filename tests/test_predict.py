"""`fcmae predict` with a segmenter: masks that the network gives, in files of their own, whatever images come."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Command, state_of
from PIL import Image
from torch import Tensor

from fcmae import ConvNeXt
from fcmae.config import FinetuneConfig, parse_config
from fcmae.data import PixelNormalizer
from fcmae.data.masks import as_classes, open_mask
from fcmae.evaluation.inference import Picture, class_shares, segment_images
from fcmae.heads.segmentation import Segmenter
from fcmae.heads.windows import Windows, pixel_logits
from fcmae.training.checkpoint import MODEL, OPTIMIZER, save_checkpoint
from fcmae.weights.base import Preprocessing
from fcmae.weights.export import write_folder

PHOTOS = ROOT / "docs" / "photos"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("sky", "sea", "land")
USE = Preprocessing(
    MEAN,
    STD,
    (64, 64),
    1.0,
    "bicubic",
    (0.0, 1.0),
    class_names=NAMES,
    dtype="uint8",
    task="segmentation",
    stride=(48, 48),
    ignore_index=255,
)


def small_segmenter(in_chans: int = 3, num_classes: int = 3) -> Segmenter:
    """A segmenter of random weights whose classes all occur."""
    torch.manual_seed(0)
    segmenter = Segmenter(ConvNeXt(TINY, in_chans=in_chans), num_classes, dim=16).eval()
    torch.nn.init.normal_(segmenter.classifier_layer.weight)  # pyright: ignore[reportArgumentType]
    return segmenter


def save_model(folder: Path, use: Preprocessing = USE, **kwargs: int) -> Path:
    """A folder as a run of task=segmentation leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(small_segmenter(**kwargs), use, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("segmenter") / "model")


def read_mask(path: Path, ignored: int | None = 255) -> np.ndarray:
    with open(path, "rb") as file:
        mask = open_mask(file)
        return as_classes(mask.read((0, 0, mask.height, mask.width)), ignored)


def save_noise(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=100)
    return path


# The classes of pixels


@torch.no_grad()
def expected_classes(network: Segmenter, pixels: Tensor, use: Preprocessing) -> Tensor:
    """The most likely class of each pixel, from all logits of the whole image as floats."""
    images = PixelNormalizer(use.mean, use.std, use.clip)(pixels)[None]
    windows = Windows(use.image_size, use.stride) if use.stride else None
    logits = torch.cat([strip.logits for strip in pixel_logits(network, images, windows, use.short_side)], 2)
    return logits[0].argmax(0)


@pytest.mark.parametrize("size", [(20, 30), (64, 64), (65, 200), (150, 40), (1, 1)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": None}, {"short_side": 48}, {"short_side": 48, "stride": None}, {"clip": (0.2, 0.7)}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_classes_are_those_that_an_evaluation_finds_in_an_images_own_size(
    size: tuple[int, int], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    network, use = small_segmenter(), USE._replace(**settings)
    full = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    pixels = (torch.rand(3, *size) * full).to(dtype)
    (found,) = segment_images(network, [Picture(Path("x"), pixels)], preprocessing=use)
    wanted = expected_classes(network, pixels, use)
    assert found.classes.dtype == torch.int16
    assert found.classes.shape == size
    assert (found.classes == wanted).float().mean() > 0.999  # but for ties that rounding decides
    assert len(wanted.unique()) > 1 or size == (1, 1)


@pytest.mark.parametrize("size", [(50, 50), (100, 90)])  # less than a window, and more
def test_pixels_that_are_not_known_are_the_mean(size: tuple[int, int]) -> None:
    network, known = small_segmenter(), torch.rand(3, *size)
    unknown = known.clone()
    unknown[:, 10:30, 5:40] = torch.nan
    known[:, 10:30, 5:40] = torch.tensor(MEAN).view(3, 1, 1)
    images = [Picture(Path("x"), pixels) for pixels in (known, unknown)]
    first, second = segment_images(network, images, preprocessing=USE)
    assert (first.classes == second.classes).float().mean() > 0.999


def test_weights_that_compute_what_is_not_finite_are_refused() -> None:
    network = small_segmenter()
    torch.nn.init.constant_(network.classifier_layer.weight, 3e38)  # pyright: ignore[reportArgumentType]
    images = [Picture(Path("x"), torch.zeros(3, 80, 80, dtype=torch.uint8))]
    with pytest.raises(FloatingPointError, match="damaged, get them again"):
        list(segment_images(network, images, preprocessing=USE))


def test_shares_are_of_the_classes_that_occur_the_largest_first() -> None:
    classes = torch.tensor([[2, 2, 0, 2], [2, 0, 2, 2]], dtype=torch.int16)
    assert class_shares(classes, NAMES) == [("land", 2, 0.75), ("sky", 0, 0.25)]


# fcmae predict


def test_masks_and_overlays_are_written_for_each_image(model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "masks"
    photos = [PHOTOS / "fig.jpg", PHOTOS / "bird.jpg"]
    code, printed, err = command("predict", model, *photos, "--output", out, "--json")
    assert code == 0, err
    results = json.loads(printed)
    assert [result["image"] for result in results] == list(map(str, photos))
    assert {path.name for path in out.iterdir()} == {
        "fig.png",
        "fig-overlay.png",
        "bird.png",
        "bird-overlay.png",
    }
    for photo, result in zip(photos, results, strict=True):
        image = Image.open(photo)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        wanted = expected_classes(small_segmenter(), pixels, USE).numpy()
        mask = read_mask(Path(result["mask"]))
        assert (mask == wanted).mean() > 0.999
        assert Image.open(result["mask"]).mode == "P"
        shares = {entry["name"]: entry["share"] for entry in result["classes"]}
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert shares["sky"] == pytest.approx((mask == 0).mean(), abs=1e-6)
        with Image.open(result["overlay"]) as overlay:
            assert overlay.width == image.width
            assert overlay.height > image.height


def test_a_line_names_each_image_and_its_classes(model: Path, tmp_path: Path, command: Command) -> None:
    images = [save_noise(tmp_path / f"{i}.png", 70, 80, i) for i in range(3)]
    code, printed, _ = command("predict", model, *images, "--output", tmp_path / "out")
    assert code == 0
    lines = printed.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(map(str, images))
    for line in lines:
        shares = line.split("  ")[1].split(", ")
        assert sum(float(share.split("% ")[0]) for share in shares) == pytest.approx(100, abs=0.05)
        assert {share.split("% ")[1] for share in shares} <= set(NAMES)


@pytest.mark.parametrize("ignored", [0, None])
def test_values_are_those_of_trainings_masks(ignored: int | None, tmp_path: Path, command: Command) -> None:
    model = save_model(tmp_path / "model", USE._replace(ignore_index=ignored))
    image = save_noise(tmp_path / "x.png", 70, 70)
    assert command("predict", model, image, "--output", tmp_path / "out")[0] == 0
    values = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    wanted = expected_classes(small_segmenter(), pixels, USE).numpy()
    assert (values == wanted + (ignored == 0)).mean() > 0.999


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folders_keep_their_arrangement_and_no_two_files_one_name(
    model: Path, tmp_path: Path, command: Command
) -> None:
    for name in ("in/a.png", "in/a.jpg", "in/A.bmp", "in/a-overlay.png", "in/deep/er/a.png", "other/a.png"):
        save_noise(tmp_path / name, 20, 20)
    out = tmp_path / "out"
    code, printed, err = command("predict", model, tmp_path / "in", tmp_path / "other", "--output", out, "--json")
    assert code == 0, err
    results = json.loads(printed)
    masks = {str(Path(entry["image"]).relative_to(tmp_path)): entry["mask"] for entry in results}
    assert len({name.lower() for entry in results for name in (entry["mask"], entry["overlay"])}) == 12
    assert files_below(out) == sorted(
        str(Path(entry[what]).relative_to(out)) for entry in results for what in ("mask", "overlay")
    )
    assert masks["in/deep/er/a.png"] == str(out / "deep" / "er" / "a.png")
    assert {Path(masks[name]).parent for name in masks if name != "in/deep/er/a.png"} == {out}
    for name, mask in masks.items():
        with Image.open(tmp_path / name) as image, Image.open(mask) as found:
            assert image.size == found.size


def test_nothing_is_overwritten_without_being_told(model: Path, tmp_path: Path, command: Command) -> None:
    image, out = save_noise(tmp_path / "in" / "x.png", 20, 20), tmp_path / "out"
    out.mkdir()
    (out / "x-overlay.png").write_text("mine")
    code, printed, err = command("predict", model, image, "--output", out)
    assert (code, printed) == (2, "")
    assert err.splitlines() == [
        f"error: {out / 'x-overlay.png'}: exists already; name another place, or add --overwrite"
    ]
    assert files_below(out) == ["x-overlay.png"]
    assert command("predict", model, image, "--output", out, "--overwrite")[0] == 0
    assert files_below(out) == ["x-overlay.png", "x.png"]
    before = image.read_bytes()
    for folder, reason in ((image.parent, "is read, so it cannot be written"), (out / "x.png", "exists already")):
        code, _, err = command("predict", model, image, "--output", folder, "--overwrite")
        assert code == 2
        assert reason in err
    code, _, err = command("predict", model, image.parent, "--output", image.parent / "new")
    assert code == 2
    assert "whose images are read" in err
    assert image.read_bytes() == before
    assert files_below(image.parent) == ["x.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "of task=segmentation, whose masks are files; add --output DIR for them"),
        (["--top", "3", "--output", "{out}"], "--top 3: is not for {model}"),
        (["--threshold", "0", "--output", "{out}"], "--threshold 0.0: is not for {model}"),
    ],
)
def test_options_that_do_not_fit_a_segmenter_get_one_line(
    options: list[str], message: str, model: Path, tmp_path: Path, command: Command
) -> None:
    places = {"out": tmp_path / "out", "model": model}
    image = save_noise(tmp_path / "x.png", 20, 20)
    code, printed, err = command("predict", model, image, *(option.format(**places) for option in options))
    assert (code, printed) == (2, "")
    assert err.count("\n") == 1
    assert message.format(**places) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{out}"], "--output {out}: is not for {model}"),
        (["--overwrite"], "--overwrite: is not for {model}"),
    ],
)
def test_only_segmenters_have_masks(options: list[str], message: str, tmp_path: Path, command: Command) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_folder(ConvNeXt(TINY, num_classes=3), USE._replace(task=None), model)
    places = {"out": tmp_path / "out", "model": model}
    image = save_noise(tmp_path / "x.png", 20, 20)
    code, printed, err = command("predict", model, image, *(option.format(**places) for option in options))
    assert (code, printed) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {message.format(**places)}")
    assert err.splitlines()[-1].endswith("of task=classification")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_named_and_counted_and_the_others_done(
    model: Path, tmp_path: Path, command: Command
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        save_noise(folder / f"{i}.png", 30, 40, i)
    (folder / "0-text.png").write_text("no image")
    (folder / "9-cut.jpg").write_bytes((PHOTOS / "fig.jpg").read_bytes()[:5000])
    np.save(folder / "float.npy", np.zeros((30, 40, 3), np.float32))
    np.save(folder / "bands.npy", np.zeros((30, 40, 5), np.uint8))
    code, printed, err = command("predict", model, folder, tmp_path / "gone.png", "--output", out)
    assert code == 2
    assert files_below(out) == [f"{i}{end}.png" for i in range(3) for end in ("-overlay", "")]
    assert len(printed.splitlines()) == 3
    assert err.splitlines()[-1] == "5 of 8 images could not be read"
    for name, reason in {
        "0-text.png": "not an image",
        "9-cut.jpg": "truncated",
        "float.npy": "float32 pixels for a network trained on uint8",
        "bands.npy": "5 bands where 3 are wanted",
        "gone.png": "no such file",
    }.items():
        (line,) = (line for line in err.splitlines() if name in line)
        assert line.startswith("error: ")
        assert reason in line


def test_deep_images_of_many_bands_have_masks_and_overlays(tmp_path: Path, command: Command) -> None:
    use = USE._replace(mean=(0.5,) * 5, std=(0.2,) * 5, dtype="float32", nodata="nan")
    model = save_model(tmp_path / "model", use, in_chans=5)
    pixels = np.random.default_rng(0).random((70, 90, 5), np.float32)
    pixels[:20, :30] = np.nan
    np.save(tmp_path / "x.npy", pixels)
    assert command("predict", model, tmp_path / "x.npy", "--output", tmp_path / "out")[0] == 0
    assert read_mask(tmp_path / "out" / "x.png").shape == (70, 90)
    assert Image.open(tmp_path / "out" / "x-overlay.png").width == 270  # enlarged three times


# What other commands take of a segmenter


def test_an_encoder_is_diagnosed_without_its_head(model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    code, _, err = command("diagnose", model, "--data", PHOTOS, "--images", 2, "--output", out)
    assert code == 0, err
    assert "ConvNeXt V2 depths [1, 1, 2, 1], dims [8, 16, 24, 32], plain; of 5 layers" in err


def test_masks_are_no_classes_of_images(tmp_path: Path, command: Command) -> None:
    values = {
        "task": "segmentation",
        "output": str(tmp_path / "run"),
        "model": {"variant": TINY},
        "data": {"root": str(tmp_path / "data"), "image_size": 64, "mean": MEAN, "std": STD},
    }
    config = parse_config(FinetuneConfig, values, "a test").model_dump(mode="json")
    state = state_of(1, config=config, class_names=list(NAMES))
    files = {MODEL: small_segmenter().state_dict(), OPTIMIZER: {}}
    save_checkpoint(tmp_path / "run" / "checkpoints", state, files, keep=1)
    for split in ("train", "val"):
        for kind in ("images", "masks"):  # folders that look like classes
            save_noise(tmp_path / "data" / split / kind / "1.png", 20, 20)
    code, printed, err = command("evaluate", tmp_path / "run", "--knn")
    assert (code, printed) == (2, "")
    assert "data.root: missing" in err
