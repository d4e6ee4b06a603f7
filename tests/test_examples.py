"""The examples run, made short; an exported encoder gives other frameworks the pyramid that it gives ours."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fcmae
from fcmae.encoder.networks import build_network
from fcmae.weights.base import Preprocessing
from fcmae.weights.export import write_folder

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


@pytest.fixture
def detection() -> Any:
    spec = importlib.util.spec_from_file_location("detection", EXAMPLES / "detection.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The folder that a pretraining leaves, of a small network."""
    torch.manual_seed(0)
    encoder = build_network(((1, 1, 1, 1), (16, 24, 32, 48)))
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, (64, 64))
    write_folder(encoder, preprocessing, tmp_path / "encoder")
    return tmp_path / "encoder"


def test_detectors_learn_from_an_exported_encoder(detection: Any, exported: Path) -> None:
    sizes = ["--side=64", "--dim=16", "--batch-size=2", "--device=cpu"]
    for name, losses in detection.main([str(exported), "--steps=16", *sizes]).items():
        assert all(map(math.isfinite, losses))
        assert sum(losses[-4:]) / 4 < 0.7 * losses[0], name


def test_drawn_boxes_are_those_of_the_masks(detection: Any) -> None:
    images, targets = detection.draw_shapes(20, 48, torch.Generator().manual_seed(0))
    assert images[0].shape == (3, 48, 48)
    for target in targets:
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"].bool(), strict=True):
            left, top, right, bottom = box
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()
        assert target["masks"].sum(0).max() <= 1


def test_timms_features_only_gives_the_pyramid_of_an_exported_encoder(exported: Path) -> None:
    ours = fcmae.load_encoder(exported).eval()
    theirs: Any = timm.create_model(f"local-dir:{exported}", pretrained=True, features_only=True).eval()
    images = torch.randn(2, 3, 64, 96)
    maps = theirs(images)
    assert tuple(theirs.feature_info.channels()) == ours.dims
    assert theirs.feature_info.reduction() == [4, 8, 16, 32]
    for found, expected in zip(maps, ours.pyramid(images), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
