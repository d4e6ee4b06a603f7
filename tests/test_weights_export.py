"""What is exported computes the same where it is meant to be used, or is not written at all."""

import dataclasses
import json
import math
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
from conftest import ROOT, TINY, randomise, small_encoder, smooth_images
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms.v2.functional import pil_to_tensor
from weight_files import MEAN, NAMES, STD, classifier, same, weights_of

from fcmae import load_encoder
from fcmae.data import PixelNormalizer, cover
from fcmae.encoder.convnext import ConvNeXt
from fcmae.encoder.responses import RESPONSES
from fcmae.errors import UserError
from fcmae.evaluation.inference import Picture, compute_outputs
from fcmae.weights.base import Weights, build_encoder
from fcmae.weights.export import FORMATS, export, write_folder
from fcmae.weights.read import read_weights

LIGHT = ("timm", "transformers", "official", "plain")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("to", LIGHT)
def test_a_classifier_comes_back_whole(to: str, version: int, tmp_path: Path) -> None:
    weights = classifier(version=version)
    written = export(weights, to, tmp_path / "out")
    assert written.difference <= 1e-10
    back = read_weights(tmp_path / "out")
    assert same(back.tensors, weights.tensors)
    assert back.preprocessing.class_names == NAMES
    encoder = small_encoder(num_classes=3)
    assert back.preprocessing.completed(encoder) == weights.preprocessing.completed(encoder)


@pytest.mark.parametrize(
    ("to", "version"), [*((to, version) for to in LIGHT for version in (1, 2)), ("official-sparse", 2)]
)
def test_an_encoder_comes_back_whole(to: str, version: int, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"in_chans": 5, "stem_stride": 1, "version": version}
    weights = weights_of(small_encoder(**kwargs), mean=(0.5,) * 5, std=(0.2,) * 5, image_size=(16, 16))
    export(weights, to, tmp_path / "out")
    assert same(read_weights(tmp_path / "out").tensors, weights.tensors)
    assert load_encoder(tmp_path / "out").stem_stride == 1


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to timm: timm has no ConvNeXt with a stem of stride 2"):
        export(classifier(stem_stride=2), "timm", tmp_path / "out")
    with pytest.raises(UserError, match=r"--to official-sparse: the official sparse code has no classifier"):
        export(classifier(), "official-sparse", tmp_path / "out")
    assert not list(tmp_path.iterdir())


UNUSUAL = [
    # arguments of ConvNeXt, the words for it
    *(({"response": name}, f"V2 with response={name}") for name in RESPONSES if name not in ("none", "grn")),
    ({"version": 1, "response": "layer_norm"}, "V1 with response=layer_norm"),
    ({"grn": {"aggregation": "l1"}}, "V2 with grn.aggregation=l1"),
    ({"grn": {"residual": False}}, "V2 with grn.residual=False"),
]


@pytest.mark.parametrize(("kwargs", "words"), UNUSUAL, ids=[words for _, words in UNUSUAL])
def test_what_stands_at_grns_place_is_held_by_programs_and_plain_files_alone(
    kwargs: dict[str, Any], words: str, tmp_path: Path
) -> None:
    weights = unusual(**kwargs)
    for to in ("timm", "transformers", "official", "official-sparse"):
        with pytest.raises(UserError) as caught:
            export(weights, to, tmp_path / "out")
        held = f"--to {to}: cannot hold a ConvNeXt {words}; choose from plain, onnx, torch-export"
        assert str(caught.value) == held
    assert export(weights, "plain", tmp_path / "out").difference <= 1e-10
    assert_reads_back(tmp_path / "out", weights)


def unusual(**kwargs: Any) -> Weights:
    """A classifier's weights that say what network it is, as a run's do."""
    network = {key: value for key, value in kwargs.items() if key in ("response", "grn")}
    return classifier(**kwargs)._replace(network=network)


def assert_reads_back(folder: Path, weights: Weights) -> None:
    back, wanted = read_weights(folder), build_encoder(weights)
    assert same(back.tensors, weights.tensors)
    assert back.preprocessing == weights.preprocessing.completed(wanted)
    found = build_encoder(back).eval()
    assert found.arguments == wanted.arguments
    images = smooth_images(1, 3, 64, 64).float()
    with torch.no_grad():
        assert torch.equal(found(images), wanted.eval()(images))


@pytest.mark.parametrize(("kwargs", "words"), UNUSUAL[-2:], ids=[words for _, words in UNUSUAL[-2:]])
def test_a_run_leaves_a_plain_folder_of_a_network_that_timm_lacks(
    kwargs: dict[str, Any], words: str, tmp_path: Path
) -> None:
    weights = unusual(**kwargs)
    ordinary = classifier()
    write_folder(build_encoder(ordinary), ordinary.preprocessing, tmp_path)
    assert "timm.create_model(" in (tmp_path / "README.md").read_text()
    write_folder(build_encoder(weights), weights.preprocessing, tmp_path)  # in place of the other
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert_reads_back(tmp_path, weights)
    card = (tmp_path / "README.md").read_text()
    assert f"**fcmae alone computes this network**, a ConvNeXt {words}: timm" in card
    assert 'fcmae.load_encoder("' in card
    assert "create_model" not in card


def test_grn_or_nothing_at_the_other_versions_place_is_refused_where_there_is_no_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="official-sparse: cannot hold a ConvNeXt V1; choose from timm, transf"):
        export(weights_of(small_encoder(version=1)), "official-sparse", tmp_path / "out")
    for to in ("transformers", "official"):
        with pytest.raises(
            UserError, match=f"{to}: cannot hold a ConvNeXt V1 with response=grn; choose from timm,"
        ):
            export(classifier(version=1, response="grn"), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(encoder: ConvNeXt, preprocessing: Any, folder: Path) -> None:
        with torch.no_grad():
            encoder.stages[3][0].grn.gamma[..., 0] += 1e-3  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        sound.write(encoder, preprocessing, folder)
        encoder.load_state_dict(weights.tensors)

    weights, sound = classifier(), FORMATS["plain"]
    monkeypatch.setitem(FORMATS, "plain", dataclasses.replace(sound, write=damaged))
    with pytest.raises(UserError, match=r"--to plain: what was written differs from the network by \d"):
        export(weights, "plain", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = classifier()
    weights.tensors["head.bias"][0] = np.nan
    with pytest.raises(UserError, match="are the weights finite"):
        export(weights, "plain", tmp_path / "out")


@pytest.mark.parametrize(("to", "package"), [("transformers", "transformers"), ("onnx", "onnxruntime")])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    to: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"--to {to}: {package} is missing: pip install transformers onnx onnxruntime onnxscript"
    ):
        export(classifier(), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    for output in (tmp_path, tmp_path / "note"):
        with pytest.raises(UserError, match="exists already; name another folder"):
            export(classifier(), "plain", output)
    assert (tmp_path / "note").read_text() == "mine"


def test_a_disk_too_full_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="out: takes 1 MB, more than is free"):
        export(classifier(), "plain", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_folder_by_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "plain", dataclasses.replace(FORMATS["plain"], write=killed))
        with pytest.raises(KeyboardInterrupt):
            export(classifier(), "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(classifier(), "plain", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".writing-out").mkdir()
    (tmp_path / ".writing-out" / "half").write_text("not ours")
    export(classifier(), "plain", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-out", "out"]
    assert (tmp_path / ".writing-out" / "half").read_text() == "not ours"


def test_folders_that_0_1_0_exported_are_read(tmp_path: Path) -> None:
    weights = classifier(stem_stride=2)
    export(weights, "plain", tmp_path / "out")
    network = {"depths": TINY[0], "dims": TINY[1], "in_chans": 3, "num_classes": 3, "stem_stride": 2}
    config = {"network": network, "mean": MEAN, "std": STD, "image_size": [64, 64], "crop_pct": 0.8}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"class_names": NAMES}, indent=2))
    assert read_weights(tmp_path / "out").preprocessing == weights.preprocessing


def test_pixels_of_another_range_are_exported_for_pixels_from_0_to_1(tmp_path: Path) -> None:
    known = {"mean": (127.5, 51.0, 0.0), "std": (51.0, 25.5, 255.0), "value_range": (0.0, 255.0)}
    export(weights_of(small_encoder(), **known), "plain", tmp_path / "out")
    written = read_weights(tmp_path / "out").preprocessing
    assert written.mean == pytest.approx((0.5, 0.2, 0.0))
    assert written.std == pytest.approx((0.2, 0.1, 1.0))
    assert written.value_range == (0, 1)


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_the_interpolation_travels(to: str, tmp_path: Path) -> None:
    weights = weights_of(small_encoder(), interpolation="bilinear")
    export(weights, to, tmp_path / "out")
    assert read_weights(tmp_path / "out").preprocessing.interpolation == "bilinear"


# The pixels that each client sees, from photographs of odd sizes

PHOTOS = sorted((ROOT / "docs" / "photos").glob("*.jpg"))


def odd_photographs() -> list[Image.Image]:
    photos = [Image.open(path).convert("RGB") for path in PHOTOS]
    return [
        photo.crop((0, 0, photo.width - 7 * i, photo.height - 5 * (len(photos) - i)))
        for i, photo in enumerate(photos)
    ]


def predicted(weights: Weights, photo: Image.Image) -> torch.Tensor:
    """The probabilities that `fcmae predict` prints, by class."""
    network = build_encoder(weights).eval()
    pictures = [Picture(Path("photo"), pil_to_tensor(photo))]
    preprocessing = weights.preprocessing.completed(network)
    ((_, outputs),) = compute_outputs(network, pictures, preprocessing=preprocessing)
    return outputs.softmax(0)


def gentle_classifier(size: tuple[int, int], crop_pct: float) -> Weights:
    encoder = randomise(ConvNeXt(TINY, num_classes=3), std=0.1)
    return weights_of(encoder, class_names=NAMES, image_size=size, crop_pct=crop_pct)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "crop_pct"), [((64, 64), 0.8), ((96, 96), 0.875), ((64, 96), 0.9), ((64, 64), 1.0)]
)
def test_timm_predicts_what_we_predict(
    size: tuple[int, int], crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    weights = gentle_classifier(size, crop_pct)
    weights = weights._replace(preprocessing=weights.preprocessing._replace(interpolation=interpolation))
    export(weights, "timm", tmp_path / "out")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(model))
    for photo in odd_photographs():
        theirs = transform(photo)
        ours = PixelNormalizer(MEAN, STD)(cover(pil_to_tensor(photo), size, crop_pct, interpolation))
        assert (theirs - ours).abs().max() <= 1e-6
        with torch.no_grad():
            assert (model(theirs[None]).softmax(1)[0] - predicted(weights, photo)).abs().max() <= 1e-6


def test_transformers_predicts_what_we_predict_where_it_crops_the_same(tmp_path: Path) -> None:
    weights = gentle_classifier((64, 64), 0.8)
    export(weights, "transformers", tmp_path / "out")
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    compared = 0
    for photo in odd_photographs():
        long = int(80 * max(photo.size) / min(photo.size))
        if (long - 64) % 4 == 3:  # transformers truncates half a pixel of the margin, torchvision and timm round it
            continue
        compared += 1
        images = processor(photo, return_tensors="pt")["pixel_values"]
        ours = PixelNormalizer(MEAN, STD)(cover(pil_to_tensor(photo), (64, 64), 0.8))
        assert (images[0] - ours).abs().max() <= 1e-6
        with torch.no_grad():
            assert (model(images).logits.softmax(1)[0] - predicted(weights, photo)).abs().max() <= 1e-6
    assert compared >= len(PHOTOS) // 2


def test_a_client_of_onnx_that_follows_config_json_predicts_what_we_predict(tmp_path: Path) -> None:
    weights = gentle_classifier((64, 64), 0.8)
    export(weights, "onnx", tmp_path / "out")
    use = json.loads((tmp_path / "out" / "config.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    low, high = use["value_range"]
    for photo in odd_photographs():
        short = math.floor(min(use["image_size"]) / use["crop_pct"])
        width, height = (int(short * side / min(photo.size)) for side in photo.size)
        resized = photo.resize((width, height), Image.Resampling[use["interpolation"].upper()])
        left, top = (round((side - 64) / 2) for side in (width, height))
        pixels = np.asarray(resized.crop((left, top, left + 64, top + 64)), np.float32) / 255 * (high - low) + low
        images = ((pixels - use["mean"]) / use["std"]).transpose(2, 0, 1)[None].astype(np.float32)
        logits = torch.from_numpy(session.run(None, {"images": images})[0])
        assert (logits.softmax(1)[0] - predicted(weights, photo)).abs().max() <= 1e-6
