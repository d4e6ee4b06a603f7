"""Programs, ONNX and torch.export: they compute what the network does, for any batch and size."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import TINY, relative_error, small_encoder, smooth_images
from torch import Tensor
from weight_files import MEAN, NAMES, STD, classifier

from fcmae.weights.export import export


def run_onnx(folder: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, result.name) == ("images", "logits")
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def run_program(folder: Path, images: Tensor) -> Tensor:
    return torch.export.load(folder / "model.pt2").module()(images).detach()


@pytest.mark.parametrize("stem_stride", [4, 1])
@pytest.mark.parametrize(("to", "compute"), [("onnx", run_onnx), ("torch-export", run_program)])
def test_a_program_takes_any_batch_and_size(to: str, compute: Any, stem_stride: int, tmp_path: Path) -> None:
    weights = classifier(stem_stride=stem_stride)
    export(weights, to, tmp_path / "out")
    encoder = small_encoder(num_classes=3, stem_stride=stem_stride).float().eval()
    encoder.load_state_dict(weights.tensors)
    sizes = [(1, 3, 64, 64), (3, 3, 96, 70), (2, 3, 65, 224), (5, 3, 101, 160)]
    if stem_stride == 1:
        sizes.append((1, 3, 36, 44))
    if to == "onnx":
        patch = encoder.patch_size
        sizes += [(1, 3, patch, patch), (2, 3, patch + 3, 3 * patch)]
    for shape in sizes:
        images = smooth_images(*shape).float()
        with torch.no_grad():
            assert relative_error(compute(tmp_path / "out", images), encoder(images)) <= 1e-4
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["class_names"] == list(NAMES)
    assert described["network"]["dims"] == list(TINY[1])
    assert (described["interpolation"], described["value_range"]) == ("bicubic", [0, 1])
    assert (described["image_size"], described["crop_pct"]) == ([64, 64], 0.8)
    assert (described["mean"], described["std"]) == (list(MEAN), list(STD))
