"""Weights of segmenters: from runs, folders and files into networks, programs and cards; what is refused."""

import json
import re
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
from conftest import TINY, randomise, relative_error, run_main, smooth_images
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from weight_files import MEAN, NAMES, STD, little_memory, same, save_run

from fcmae.commands import export as export_command
from fcmae.data import PixelNormalizer
from fcmae.encoder.base import Variant
from fcmae.encoder.networks import build_network
from fcmae.errors import UserError
from fcmae.evaluation.subjects import open_subject
from fcmae.heads.segmentation import HeadName, Segmenter
from fcmae.heads.windows import Windows, pixel_logits
from fcmae.load import adapt_channels, known_of, load_encoder, load_weights, require_network
from fcmae.weights.base import Preprocessing, Weights, build_encoder
from fcmae.weights.export import export, write_folder
from fcmae.weights.networks import PLAIN
from fcmae.weights.programs import prepend_preprocessing

USE = Preprocessing(MEAN, STD, (64, 96), class_names=NAMES, task="segmentation", stride=(32, 48), ignore_index=255)


def segmenter(
    head: HeadName = "fpn", variant: Variant = TINY, *, auxiliary: bool = False, dim: int = 16, **kwargs: Any
) -> Segmenter:
    """A randomised segmenter, in evaluation."""
    encoder = build_network(variant, **kwargs)
    return randomise(Segmenter(encoder, 3, head=head, dim=dim, auxiliary=auxiliary), std=0.1).eval()


def finished(model: Segmenter) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if not name.startswith("auxiliary.")}


def weights_of(model: Segmenter, folder: Path, use: Preprocessing = USE) -> Weights:
    write_folder(model, use, folder)
    return load_weights(folder)


def run_of(model: Segmenter, folder: Path, ema: Segmenter | None = None) -> Path:
    data = {"mean": MEAN, "std": STD, "image_size": [64, 96], "stride": 48, "short_side": 80, "ignore_index": 255}
    config = {"task": "segmentation", "data": data, "model": model.arguments}
    save_run(folder, model, ema, config=config, class_names=list(NAMES))
    return folder


KINDS: list[tuple[Variant, dict[str, Any]]] = [
    (TINY, {}),
    (TINY, {"version": 1, "stem_stride": 2, "in_chans": 5}),
    (TINY, {"response": "grn", "grn": {"aggregation": "l1"}}),
    ("timm/test_resnet", {}),
    ("roadmap/convnext-tiny", {"in_chans": 1, "stem_stride": 2}),
]


@pytest.mark.parametrize(
    ("variant", "kwargs", "head"), [(*KINDS[0], "fpn"), *((*kind, "upernet") for kind in KINDS)], ids=str
)
def test_runs_and_folders_give_the_segmenter_back_without_its_second_head(
    variant: Variant, kwargs: dict[str, Any], head: HeadName, tmp_path: Path
) -> None:
    model = segmenter(head, variant, auxiliary=True, **kwargs)
    channels = model.in_chans
    use = USE._replace(mean=MEAN[:1] * channels, std=STD[:1] * channels)
    write_folder(model, use, tmp_path / "model")
    assert not any(name.startswith("auxiliary.") for name in load_file(tmp_path / "model" / "model.safetensors"))
    for source in (run_of(model, tmp_path / "run"), tmp_path / "model"):
        weights = load_weights(source)
        assert same(weights.state_dict, finished(model))
        assert (weights.num_classes, weights.classifier) == (3, model.classifier)
        assert weights.head
        assert all(name.startswith("head.") for name in weights.head)
        found = load_encoder(source).eval()
        assert isinstance(found, Segmenter)
        assert found.arguments == model.arguments
        images = torch.randn(1, channels, 50, 70)
        with torch.no_grad():
            assert torch.allclose(found(images), model(images), rtol=0, atol=1e-5)
        assert load_encoder(source, drop_path=0.3).arguments == model.arguments
        encoder = load_encoder(source, num_classes=0)
        assert encoder.num_classes == 0
        assert same(dict(encoder.state_dict()), dict(model.encoder.state_dict()))
        classifier = load_encoder(source, num_classes=3).eval()
        assert classifier(images).shape == (1, 3)
        for x, wanted in zip(classifier.pyramid(images), model.pyramid(images), strict=True):
            assert torch.allclose(x, wanted, atol=1e-5)
    assert load_weights(tmp_path / "run").preprocessing == Preprocessing(
        MEAN,
        STD,
        (64, 96),
        class_names=NAMES,
        task="segmentation",
        short_side=80,
        stride=(48, 48),
        ignore_index=255,
    )
    assert load_weights(tmp_path / "model").preprocessing == use.completed(model)


def test_weights_of_a_segmenter_are_called_what_they_are(tmp_path: Path) -> None:
    run = run_of(segmenter("upernet"), tmp_path / "run", segmenter("upernet"))
    weights = load_weights(run)
    assert weights.description == "fine-tuned run, step 7, EMA"
    assert re.fullmatch(r"ConvNeXt V2 depths .* with head upernet", weights.network_name)
    (tmp_path / "alone").mkdir()
    save_file(finished(segmenter()), tmp_path / "alone" / "x.safetensors")
    weights = load_weights(tmp_path / "alone" / "x.safetensors")
    assert (weights.description, weights.preprocessing) == ("plain", Preprocessing(task="segmentation"))
    torch.save({"model": {f"module.{n}": x for n, x in finished(segmenter()).items()}}, tmp_path / "x.pth")
    assert load_weights(tmp_path / "x.pth").num_classes == 3


def test_a_new_run_begins_from_a_segmenters_encoder_as_from_any_other(tmp_path: Path) -> None:
    weights = weights_of(segmenter(), tmp_path)
    require_network(build_network(TINY), weights, tmp_path)
    with pytest.raises(UserError, match="with variant depths"):
        require_network(build_network("atto"), weights, tmp_path)
    gray = build_network(TINY, in_chans=1)
    tensors, how = adapt_channels(weights, gray)
    assert how == "first layer adapted from 3 to 1 channels (summed)"
    gray.load_state_dict(tensors)
    keys = ["model.variant", "data.mean", "data.image_size", "data.ignore_index", "data.short_side"]
    assert known_of(weights, keys) == {
        "model.variant": TINY,
        "data.mean": MEAN,
        "data.image_size": (64, 96),
        "data.ignore_index": 255,
    }


@pytest.mark.parametrize("variant", [TINY, "timm/test_resnet"])
def test_what_looks_into_a_network_looks_into_a_segmenters_encoder(variant: Variant, tmp_path: Path) -> None:
    model = segmenter(variant=variant)
    subject = open_subject(str(run_of(model, tmp_path)))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        network: Any = subject.network.eval()
        found = network.pyramid(images)
        assert torch.allclose(found[-1], model.pyramid(images)[-1], atol=1e-5)
    assert "fine-tuned run, step 7" in subject.description


# What is refused


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith(name)]:
            del state[key]

    return change


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("head.fuse.0.weight"), "no head that is known: head.fuse.0.weight is missing"),
        (drop("head.classifier"), "no head that is known: head.classifier.1.weight is missing"),
        (put("head.fuse.0.weight", torch.ones(16)), "head.fuse.0.weight is missing, or no convolution's"),
        (drop("head.fpn.layer_blocks.1"), "missing head.fpn.layer_blocks.1"),
        (drop("head.norms"), "missing head.norms.norms.0.weight"),
        (drop("encoder.stages.2.1.dwconv"), "stages.2.1.dwconv.weight missing"),
        (put("head.norms.norms.0.weight", torch.ones(9)), r"head.norms.norms.0.weight is (9,), not (8,)"),
        (put("head.classifier.1.bias", torch.ones(4)), r"head.classifier.1.bias is (4,), not (3,)"),
        (put("head.fuse.0.weight", torch.ones(17, 16, 3, 3)), "tensors differ"),
        (put("head.pooled.0.0.weight", torch.ones(16, 32, 1, 1)), "missing head.pooled.0.1.weight"),
        (put("head.weight", torch.ones(3, 32)), "unexpected head.weight"),
        (put("head.classifier.1.bias", torch.tensor([0.0, torch.nan, 0.0])), "numbers that are not finite"),
        (put("decoder.pred.weight", torch.ones(3)), "an encoder with a head, and besides decoder.pred.weight"),
        (put("stray", torch.ones(3)), "an encoder with a head, and besides stray"),
        (drop("head."), "no head that segments, but what describes it says task=segmentation"),
        (drop("encoder."), "no ConvNeXt"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_in_a_line(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    PLAIN.write(segmenter(), USE.completed(segmenter()), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(said)) as caught, little_memory():
        load_encoder(tmp_path)
    line = str(caught.value)
    assert str(tmp_path) in line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"task": "classification"}, "a head that segments, but what describes it says task=classification"),
        ({"class_names": ["a"]}, "3 classes, but the files beside it name 1"),
        ({"short_side": 0}, "damaged"),
        ({"short_side": "512"}, "damaged"),
        ({"stride": [32]}, "damaged"),
        ({"stride": [32, -1]}, "damaged"),
        ({"ignore_index": 255.0}, "damaged"),
        ({"ignore_index": True}, "damaged"),
        ({"ignore_index": 10**12}, "damaged"),
    ],
    ids=str,
)
def test_a_description_that_is_not_of_a_segmenter_is_refused(
    known: dict[str, Any], said: str, tmp_path: Path
) -> None:
    PLAIN.write(segmenter(), USE.completed(segmenter()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["stride"] == [32, 48]
    (tmp_path / "config.json").write_text(json.dumps(config | known))
    with pytest.raises(UserError, match=said):
        load_encoder(tmp_path)


def test_windows_that_leave_gaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stride \(64, 97\) leaves gaps between windows of \(64, 96\)"):
        write_folder(segmenter(), USE._replace(stride=(64, 97)), tmp_path / "out")


def test_statistics_of_targets_beside_a_segmenter_are_refused(tmp_path: Path) -> None:
    config = {"task": "segmentation", "data": {"mean": MEAN, "std": STD, "image_size": 64}}
    save_run(tmp_path, segmenter(), config=config, target_mean=[1.0], target_std=[2.0])
    with pytest.raises(UserError, match="statistics of 1 targets for 0 outputs"):
        load_weights(tmp_path)


@pytest.mark.parametrize("variant", [TINY, "timm/test_resnet"])
def test_formats_without_a_place_for_a_head_name_those_that_have_one(
    variant: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(segmenter(variant=variant), USE, tmp_path / "model")
    for to in ("timm", "transformers", "official", "official-sparse"):
        arguments = (str(tmp_path / "model"), "--to", to, "--output", str(tmp_path / "out"))
        capsys.readouterr()
        assert run_main(export_command.main, *arguments) == 2
        assert capsys.readouterr().err.endswith(
            f"error: --to {to}: has no place for a head; take plain, onnx, torch-export\n"
        )
    assert not (tmp_path / "out").exists()


# Programs


def load_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, "height", "width"])
    assert (result.name, result.shape) == ("logits", ["batch", 3, "height", "width"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def load_program(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


LOAD = {"onnx": load_onnx, "torch-export": load_program}
SMALLEST = ((1, 1, 1, 1), (8, 8, 16, 16))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HeadName, Variant, str], tuple[Weights, Path]]:
    """The weights of a segmenter and the folder of its program, which is made when it is first asked for."""

    @cache
    def make(head: HeadName, variant: Variant, to: str) -> tuple[Weights, Path]:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("exported")
        weights = weights_of(segmenter(head, variant), folder / "model")
        export(weights, to, folder / "out")
        return weights, folder / "out"

    return make


Exported = Callable[[HeadName, Variant, str], tuple[Weights, Path]]


@pytest.mark.parametrize(
    ("head", "variant", "to"),
    [
        ("fpn", "timm/test_resnet", "onnx"),
        ("upernet", SMALLEST, "onnx"),
        ("upernet", SMALLEST, "torch-export"),
    ],
    ids=str,
)
def test_a_program_segments_any_batch_and_size(
    head: HeadName, variant: Variant, to: str, exported: Exported
) -> None:
    weights, folder = exported(head, variant, to)
    model = build_encoder(weights).eval()
    program = LOAD[to](folder)
    sizes = [(2, 3, 64, 96), (1, 3, 101, 77), (3, 3, 130, 66), *([(1, 3, 5, 40)] if to == "onnx" else [])]
    for shape in sizes:
        images = smooth_images(*shape).float()
        with torch.no_grad():
            assert relative_error(program(images), model(images)) <= 1e-4
    described = json.loads((folder / "config.json").read_text())
    assert described["input"] == "float32 (batch, 3, height, width): the caller clips and normalises"
    assert (described["output"], described["task"], described["stride"]) == ("logits", "segmentation", [32, 48])


def test_a_plain_export_is_the_segmenter(tmp_path: Path) -> None:
    weights = load_weights(run_of(segmenter("upernet"), tmp_path / "run"))
    written = export(weights, "plain", tmp_path / "out")
    assert written.difference <= 1e-10
    back = load_weights(tmp_path / "out")
    assert same(back.state_dict, weights.state_dict)
    assert back.preprocessing == weights.preprocessing.completed(build_encoder(weights))


@pytest.mark.parametrize("known", [{}, {"dtype": "float32", "nodata": "nan", "clip": (0.2, 0.6)}], ids=str)
def test_a_program_with_preprocessing_gives_probabilities_of_each_pixel(
    known: dict[str, Any], exported: Exported, tmp_path: Path
) -> None:
    weights, folder = exported("fpn", "timm/test_resnet", "onnx")
    network = build_encoder(weights).eval()
    shutil.copytree(folder, tmp_path / "out")
    prepend_preprocessing(network, weights.preprocessing._replace(**known), tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert given.shape == ["batch", "height", "width", 3]
    assert (result.name, result.shape) == ("probabilities", ["batch", 3, "height", "width"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(NAMES)
    normalize = PixelNormalizer(MEAN, STD, known.get("clip"))
    for size in ((70, 101), (33, 64)):
        pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        images = pixels
        if "dtype" in known:
            images = pixels = (pixels.float() / 255).masked_fill(torch.rand(pixels.shape) < 0.1, torch.nan)
        found = session.run(None, {"images": images.permute(0, 2, 3, 1).numpy()})[0]
        with torch.no_grad():
            wanted = network(normalize(pixels)).softmax(1)
        assert np.abs(np.asarray(found) - wanted.numpy()).max() <= 1e-4
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["input"].endswith("(batch, height, width, 3): the program clips and normalises")


def test_a_short_side_is_not_put_into_a_program(tmp_path: Path) -> None:
    weights = weights_of(segmenter(), tmp_path / "model", USE._replace(short_side=128))
    with pytest.raises(
        UserError, match="images resized to a short side of 128 pixels, which is not in the program"
    ):
        export(weights, "onnx", tmp_path / "out", with_preprocessing=True)
    assert not (tmp_path / "out").exists()


# The card


@pytest.mark.parametrize(
    "known",
    [
        {"stride": None},
        {},
        {"stride": None, "short_side": 48},
        {"dtype": "uint16", "clip": (0.2, 0.6)},
        {"dtype": "float32", "nodata": "nan", "stride": None},
    ],
    ids=str,
)
def test_the_code_on_the_card_segments_images(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = USE._replace(**known)
    model = segmenter()
    write_folder(model, use, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "\n# ConvNeXt V2 (1, 1, 2, 1), (8, 16, 24, 32): 3 classes of each pixel\n" in card
    assert "| images | 3 channels, of any size" in card
    assert ("seen in windows 32 x 48 apart" in card) == (use.stride is not None)
    pixels = torch.rand(3, 75, 110)
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg")
    if "dtype" not in known:
        pixels = pil_to_tensor(Image.open(tmp_path / "photo.jpg"))
    elif use.dtype == "uint16":
        pixels = (pixels * 65535).to(torch.uint16)
    else:
        pixels[:, 5:9] = torch.nan
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {"pixels": pixels[None].float()}
    exec(code.replace("PATH/OF/THIS/FOLDER", str(tmp_path / "model")), names)
    images = PixelNormalizer(MEAN, STD, use.clip)(pixels[None])
    windows = Windows(use.image_size, use.stride) if use.stride else None
    with torch.no_grad():
        (logits,) = [torch.cat([strip.logits for strip in pixel_logits(model, images, windows, use.short_side)], 2)]
    assert names["classes"].shape == (1, 75, 110)
    assert (names["classes"] == logits.argmax(1)).float().mean() > 0.999
