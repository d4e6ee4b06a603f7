"""Programs, ONNX and torch.export: they compute what the network does, for any batch and size."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import TINY, relative_error, small_encoder, smooth_images
from torch import Tensor
from weight_files import NAMES, classifier

from fcmae.weights.export import export


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
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["class_names"] == list(NAMES)
    assert described["network"]["dims"] == list(TINY[1])
    assert (described["interpolation"], described["value_range"]) == ("bicubic", [0, 1])
