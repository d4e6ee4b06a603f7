"""What is exported computes the same where it is meant to be used, or is not written at all."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from conftest import TINY, randomise, relative_error, small_encoder, smooth_images
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

import fcmae.weights.export
from fcmae import ConvNeXtV2, load_encoder
from fcmae.data import PixelNormalizer, cover
from fcmae.errors import UserError
from fcmae.weights.export import FORMATS, Format, export
from fcmae.weights.read import Weights, preprocessing, read_weights

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("cat", "dog", "kite")
LIGHT = ("timm", "transformers", "official", "plain")


def weights_of(encoder: ConvNeXtV2, **use: Any) -> Weights:
    """The encoder's weights in float32, as if read from a file."""
    use = {"mean": MEAN, "std": STD, "image_size": (64, 64), "crop_pct": 0.8} | use
    return Weights(Path("x"), dict(encoder.float().state_dict()), "a test's", **use)


def classifier(**kwargs: Any) -> Weights:
    return weights_of(small_encoder(num_classes=3, **kwargs), class_names=NAMES)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("to", LIGHT)
def test_a_classifier_comes_back_whole(to: str, tmp_path: Path) -> None:
    weights = classifier()
    written = export(weights, to, tmp_path / "out")
    assert written.difference <= 1e-10
    back = read_weights(tmp_path / "out")
    assert same(back.tensors, weights.tensors)
    assert back.class_names == NAMES
    assert preprocessing(back) == preprocessing(weights)


@pytest.mark.parametrize("to", [*LIGHT, "official-sparse"])
def test_an_encoder_comes_back_whole(to: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"in_chans": 5, "stem_stride": 1}
    weights = weights_of(small_encoder(**kwargs), mean=(0.5,) * 5, std=(0.2,) * 5, image_size=(16, 16))
    export(weights, to, tmp_path / "out")
    assert same(read_weights(tmp_path / "out").tensors, weights.tensors)
    assert load_encoder(tmp_path / "out").stem_stride == 1


def test_timm_loads_it_by_folder_and_by_file(tmp_path: Path) -> None:
    encoder = randomise(ConvNeXtV2("atto", num_classes=3), std=0.3)
    export(weights_of(encoder, class_names=NAMES), "timm", tmp_path / "out")
    images = smooth_images(2, 3, 64, 96)
    folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, dtype=torch.float64).eval()
    file = timm.create_model(
        "convnextv2_atto",
        num_classes=3,
        checkpoint_path=str(tmp_path / "out" / "model.safetensors"),
        dtype=torch.float64,
    ).eval()
    with torch.no_grad():
        ours = encoder.double().eval()(images)
        assert relative_error(folder(images), ours) <= 1e-10
        assert relative_error(file(images), ours) <= 1e-10
    cfg: Any = folder.pretrained_cfg
    assert (cfg["label_names"], cfg["crop_pct"], cfg["input_size"]) == (list(NAMES), 0.8, [3, 64, 64])


def test_transformers_loads_it_with_names_and_the_same_pixels(tmp_path: Path) -> None:
    weights = classifier(stem_stride=2)
    export(weights, "transformers", tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model, transformers.ConvNextV2ForImageClassification)
    assert model.config.id2label == dict(enumerate(NAMES))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = (smooth_images(1, 3, 100, 150)[0].sigmoid() * 255).round().byte().permute(1, 2, 0).numpy()
    theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    pixels = cover(pil_to_tensor(Image.fromarray(image)), (64, 64), 0.8)
    ours = PixelNormalizer(MEAN, STD)(pixels)
    assert theirs.shape == (1, 3, 64, 64)
    assert float((theirs[0] - ours).abs().max()) <= 1.01 / 255 / min(STD)  # a step of 8 bits, from rounding


def test_the_official_code_finds_its_state_under_model(tmp_path: Path) -> None:
    weights = classifier()
    export(weights, "official", tmp_path / "out")
    assert same(torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"], weights.tensors)


def run_onnx(folder: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, result.name) == ("images", "logits")
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def run_program(folder: Path, images: Tensor) -> Tensor:
    return torch.export.load(folder / "model.pt2").module()(images).detach()


@pytest.mark.parametrize(("to", "compute"), [("onnx", run_onnx), ("torch-export", run_program)])
def test_a_program_takes_any_batch_and_size(to: str, compute: Any, tmp_path: Path) -> None:
    weights = classifier()
    export(weights, to, tmp_path / "out")
    encoder = small_encoder(num_classes=3).float().eval()
    encoder.load_state_dict(weights.tensors)
    for shape in ((1, 3, 64, 64), (3, 3, 96, 64), (2, 3, 64, 224), (5, 3, 160, 160)):
        images = smooth_images(*shape).float()
        with torch.no_grad():
            assert relative_error(compute(tmp_path / "out", images), encoder(images)) <= 1e-4
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["class_names"] == list(NAMES)
    assert told["network"]["dims"] == list(TINY[1])


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to timm: timm has no ConvNeXt with a stem of stride 2"):
        export(classifier(stem_stride=2), "timm", tmp_path / "out")
    with pytest.raises(UserError, match=r"--to official-sparse: the official sparse code has no classifier"):
        export(classifier(), "official-sparse", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(encoder: ConvNeXtV2, use: Any, folder: Path) -> None:
        with torch.no_grad():
            encoder.stages[3][0].grn.gamma[..., 0] += 1e-3  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        sound.write(encoder, use, folder)
        encoder.load_state_dict(weights.tensors)

    weights, sound = classifier(), FORMATS["plain"]
    monkeypatch.setitem(fcmae.weights.export.FORMATS, "plain", Format(damaged, *sound[1:]))
    with pytest.raises(UserError, match=r"--to plain: what was written differs from the network by \d"):
        export(weights, "plain", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = classifier()
    weights.tensors["head.bias"][0] = np.nan
    with pytest.raises(UserError, match="are the weights finite"):
        export(weights, "plain", tmp_path / "out")


@pytest.mark.parametrize(("to", "package"), [("transformers", "transformers"), ("onnx", "onnxruntime")])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    to: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"--to {to}: {package} is missing: pip install 'fcmae\[export\]'"):
        export(classifier(), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    for output in (tmp_path, tmp_path / "note"):
        with pytest.raises(UserError, match="exists already; name another folder"):
            export(classifier(), "plain", output)
    assert (tmp_path / "note").read_text() == "mine"


def test_a_disk_too_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="out: takes 1 MB, more than is free"):
        export(classifier(), "plain", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_folder_by_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".writing-out").mkdir()
    (tmp_path / ".writing-out" / "half").write_text("left by a kill")
    with monkeypatch.context() as patch:
        patch.setitem(fcmae.weights.export.FORMATS, "plain", Format(killed, *FORMATS["plain"][1:]))
        with pytest.raises(KeyboardInterrupt):
            export(classifier(), "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(classifier(), "plain", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
