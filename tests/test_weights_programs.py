"""Programs, ONNX and torch.export: they compute what the network does, for any batch and size."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, TINY, relative_error, small_encoder, smooth_images
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from weight_files import MEAN, NAMES, STD, classifier, weights_of

from fcmae.data import PixelNormalizer, cover
from fcmae.encoder.base import Network
from fcmae.errors import UserError
from fcmae.evaluation.inference import Picture, compute_outputs
from fcmae.weights.base import Preprocessing, Weights, build_encoder
from fcmae.weights.export import export
from fcmae.weights.programs import prepend_preprocessing


def load_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, result.name) == ("images", "logits")
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def load_program(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], tuple[Weights, Path]]:
    """A classifier's weights and the folder of its program, which is made when it is first asked for."""

    @cache
    def make(to: str, stem_stride: int, version: int) -> tuple[Weights, Path]:
        torch.manual_seed(0)
        weights = classifier(stem_stride=stem_stride, version=version)
        folder = tmp_path_factory.mktemp("exported") / "program"
        export(weights, to, folder)
        return weights, folder

    return make


Exported = Callable[[str, int, int], tuple[Weights, Path]]


@pytest.mark.parametrize(("stem_stride", "version"), [(4, 2), (1, 2), (4, 1)])
@pytest.mark.parametrize(("to", "load"), [("onnx", load_onnx), ("torch-export", load_program)])
def test_a_program_takes_any_batch_and_size(
    to: str, load: Any, stem_stride: int, version: int, exported: Exported
) -> None:
    weights, folder = exported(to, stem_stride, version)
    encoder = small_encoder(num_classes=3, stem_stride=stem_stride, version=version).float().eval()
    encoder.load_state_dict(weights.tensors)
    sizes = [(1, 3, 64, 64), (3, 3, 96, 70), (2, 3, 65, 224), (5, 3, 101, 160)]
    if stem_stride == 1:
        sizes.append((1, 3, 36, 44))
    if to == "onnx":
        patch = encoder.patch_size
        sizes += [(1, 3, patch, patch), (2, 3, patch + 3, 3 * patch)]
    compute = load(folder)
    for shape in sizes:
        images = smooth_images(*shape).float()
        with torch.no_grad():
            assert relative_error(compute(images), encoder(images)) <= 1e-4
    described = json.loads((folder / "config.json").read_text())
    assert described["input"] == "float32 (batch, 3, height, width): the caller resizes, clips and normalises"
    assert (described["output"], described["class_names"]) == ("logits", list(NAMES))
    assert described["network"]["dims"] == list(TINY[1])
    assert (described["interpolation"], described["value_range"]) == ("bicubic", [0, 1])
    assert (described["image_size"], described["crop_pct"]) == ([64, 64], 0.8)
    assert (described["mean"], described["std"]) == (list(MEAN), list(STD))


# With preprocessing inside

PHOTOS = sorted((ROOT / "docs" / "photos").glob("*.jpg"))


def prepended(exported: Exported, folder: Path, **known: Any) -> tuple[Network, Preprocessing]:
    """Put preprocessing into a copy of the ONNX model, in `folder`; returns the network and what it knows."""
    weights, original = exported("onnx", 4, 2)
    network = build_encoder(weights).eval()
    use = weights.preprocessing._replace(**known).completed(network)
    shutil.copytree(original, folder)
    prepend_preprocessing(network, use, folder)
    return network, use


@pytest.mark.parametrize(("size", "crop_pct"), [((64, 64), 0.8), ((64, 96), 1.0)])
def test_a_model_with_preprocessing_takes_photographs_and_gives_predictions(
    size: tuple[int, int], crop_pct: float, exported: Exported, tmp_path: Path
) -> None:
    network, preprocessing = prepended(exported, tmp_path / "out", image_size=size, crop_pct=crop_pct)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, given.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert result.name == "probabilities"
    model.graph.output.append(onnx.helper.make_tensor_value_info("prepared", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(NAMES)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["input"] == "uint8 (batch, height, width, 3): the program resizes, clips and normalises"
    assert described["output"] == "probabilities"
    for i, path in enumerate(PHOTOS):
        photo = Image.open(path).convert("RGB")
        photo = photo.crop((0, 0, photo.width - 7 * i, photo.height - 5 * i))  # of odd sizes
        outputs: Any = session.run(None, {"images": np.asarray(photo)[None]})
        found, prepared = outputs
        levels = PixelNormalizer(MEAN, STD).invert(torch.from_numpy(prepared[0])) * 255
        off = (levels - cover(pil_to_tensor(photo), size, crop_pct)).abs().round()
        assert off.max() <= 2
        assert off.count_nonzero() < 0.01 * off.numel()
        pictures = [Picture(path, pil_to_tensor(photo))]
        ((_, outputs),) = compute_outputs(network, pictures, preprocessing=preprocessing)
        assert abs(found[0] - outputs.softmax(0).numpy()).max() <= 1e-2  # of random weights, which amplify


@pytest.mark.parametrize(
    "known",
    [
        {"clip": (0.2, (0.5, 0.6, 0.7))},
        {"dtype": "uint16", "clip": (0.2, 0.6)},
        {"dtype": "float32"},
        {"dtype": "float32", "nodata": "nan", "clip": ((0.1, 0.2, 0.3), 0.7)},
    ],
    ids=str,
)
def test_pixels_of_every_kind_are_prepared_as_for_training(
    known: dict[str, Any], exported: Exported, tmp_path: Path
) -> None:
    _, use = prepended(exported, tmp_path / "out", **known)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    model.graph.output.append(onnx.helper.make_tensor_value_info("prepared", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    photo = pil_to_tensor(Image.open(PHOTOS[0]).convert("RGB"))
    pixels, given = photo, photo
    if known.get("dtype") == "uint16":
        pixels = (photo.int() * 257).to(torch.uint16)
        given = pixels.float() / 65535
    elif "dtype" in known:
        pixels = photo.float() / 255
        if "nodata" in known:
            pixels[:, :100, 50:90] = torch.nan
            pixels[1, 150::7, ::3] = torch.nan
        given = pixels
    outputs: Any = session.run(["prepared"], {"images": given.permute(1, 2, 0)[None].numpy()})
    wanted = PixelNormalizer(MEAN, STD, use.clip)(cover(pixels, use.image_size, use.crop_pct))
    found = torch.from_numpy(outputs[0][0])
    assert bool(found.isfinite().all())
    exact = 3 / 255 if "dtype" not in known else 1e-4
    off = (found - wanted).abs() > exact / min(STD)
    assert off.float().mean() < 0.002  # where a half of a pixel is not known, it may count either way


def test_what_cannot_have_preprocessing_inside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--with-preprocessing: not for --to plain, only for onnx"):
        export(classifier(), "plain", tmp_path / "out", with_preprocessing=True)
    with pytest.raises(UserError, match="--with-preprocessing is for classifiers"):
        export(weights_of(small_encoder()), "onnx", tmp_path / "out", with_preprocessing=True)
    weights = classifier()
    weights = weights._replace(preprocessing=weights.preprocessing._replace(interpolation="lanczos"))
    with pytest.raises(UserError, match="ONNX resizes bicubic or bilinear, not lanczos"):
        export(weights, "onnx", tmp_path / "out", with_preprocessing=True)
    assert not list(tmp_path.iterdir())
