"""transformers' format: transformers computes the same from converted weights, and loads the folders we write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, randomise, relative_error, small_encoder, smooth_images
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor
from weight_files import MEAN, NAMES, STD, classifier, same

from fcmae.data import PixelNormalizer, cover
from fcmae.encoder.convnext import VARIANTS, ConvNeXt, Version
from fcmae.errors import UserError
from fcmae.weights.base import Preprocessing, build_encoder
from fcmae.weights.export import export
from fcmae.weights.read import read_weights
from fcmae.weights.transformers import from_transformers, to_transformers


def small_transformers(num_classes: int, *, version: Version = 2, **kwargs: Any) -> Any:
    """transformers' float64 network of variant `TINY`."""
    names = {i: str(i) for i in range(num_classes)}
    kind = {1: "ConvNext", 2: "ConvNextV2"}[version]
    config = getattr(transformers, f"{kind}Config")(
        depths=list(TINY[0]), hidden_sizes=list(TINY[1]), id2label=names, layer_norm_eps=1e-6, **kwargs
    )
    kind += "ForImageClassification" if num_classes else "Model"
    return getattr(transformers, kind)(config).double().eval()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_transformers_gives_the_same_logits(stem_stride: int, version: Version) -> None:
    ours = small_encoder(num_classes=10, stem_stride=stem_stride, version=version).eval()
    theirs = small_transformers(10, patch_size=stem_stride, version=version)
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images).logits) <= 1e-10
    assert same(from_transformers(theirs.state_dict()), ours.state_dict())


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_gives_the_same_features(version: Version) -> None:
    ours = small_encoder(in_chans=5, version=version).eval()
    theirs = small_transformers(0, num_channels=5, version=version)
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    images = torch.randn(2, 5, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images).pooler_output) <= 1e-10
        assert relative_error(ours.pyramid(images)[-1], theirs(images).last_hidden_state) <= 1e-10


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize(("version", "variant"), [(2, "atto"), (2, TINY), (1, "atto"), (1, TINY)])
def test_there_and_back_is_the_identity(version: Version, variant: Any, num_classes: int) -> None:
    state = randomise(ConvNeXt(variant, version=version, num_classes=num_classes)).state_dict()
    theirs = to_transformers(state)
    assert same(from_transformers(theirs), state)
    assert same(to_transformers(from_transformers(theirs)), theirs)


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


@pytest.mark.parametrize("version", [1, 2])
def test_every_variant_has_the_names_and_shapes_of_transformers(version: Version) -> None:
    kind = {1: "ConvNext", 2: "ConvNextV2"}[version]
    for depths, dims in VARIANTS.values():
        config = getattr(transformers, f"{kind}Config")(depths=list(depths), hidden_sizes=list(dims), num_labels=7)
        with torch.device("meta"):
            ours = to_transformers(ConvNeXt((depths, dims), version=version, num_classes=7).state_dict())
            theirs = getattr(transformers, f"{kind}ForImageClassification")(config).state_dict()
        assert {name: v.shape for name, v in ours.items()} == {name: v.shape for name, v in theirs.items()}


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_holds_networks_without_grn(version: Version, tmp_path: Path) -> None:
    weights = classifier(version=version, response="none")
    assert export(weights, "transformers", tmp_path / "out").difference <= 1e-10
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "ConvNextForImageClassification"
    ]
    back = build_encoder(read_weights(tmp_path / "out"))
    assert (back.version, back.response) == (version, "none")
    assert same(back.state_dict(), weights.tensors)


def save_folder(folder: Path, prepare: dict[str, Any]) -> None:
    """A classifier of two classes as transformers would leave it, with these settings of its image processor."""
    save_file(to_transformers(small_encoder(num_classes=2).float().state_dict()), folder / "model.safetensors")
    config = {"hidden_sizes": [8], "id2label": {"1": "dog", "0": "cat"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD} | prepare))


CROP = {"do_center_crop": True, "crop_size": {"height": 64, "width": 96}}


@pytest.mark.parametrize(
    ("prepare", "known"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.8}, {"image_size": (224, 224), "crop_pct": 0.8}),
        ({"size": {"shortest_edge": 384}}, {"image_size": (384, 384)}),
        ({"size": 224, "crop_pct": 0.8}, {"image_size": (224, 224), "crop_pct": 0.8}),
        ({"size": {"shortest_edge": 120}, **CROP}, {"image_size": (64, 96), "crop_pct": 0.8}),
        ({"size": {"height": 64, "width": 96}, **CROP}, {"image_size": (64, 96)}),
        ({"resample": 2, "rescale_factor": 1 / 255}, {"interpolation": "bilinear", "value_range": (0.0, 1.0)}),
        ({"do_rescale": False}, {"value_range": (0.0, 255.0)}),
    ],
    ids=str,
)
def test_transformers_own_preprocessing_is_understood(
    prepare: dict[str, Any], known: dict[str, Any], tmp_path: Path
) -> None:
    save_folder(tmp_path, prepare)
    assert read_weights(tmp_path).preprocessing == Preprocessing(MEAN, STD, class_names=("cat", "dog"), **known)


def test_a_damaged_file_of_the_image_processor_is_named(tmp_path: Path) -> None:
    for damage in (
        {"image_mean": "abc"},
        {"size": 3.5},
        {"size": {"shortest_edge": "x"}},
        {"resample": "soft"},
        {"rescale_factor": 0},
    ):
        save_folder(tmp_path, damage)
        with pytest.raises(UserError, match=r"preprocessor_config\.json: damaged \("):
            read_weights(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json: damaged"):
        read_weights(tmp_path)
