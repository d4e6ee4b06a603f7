"""Weights of any origin: recognised by content, described by what lies beside them, refused in one line."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY, randomise, relative_error, small_encoder
from safetensors.torch import save_file
from weight_files import MEAN, NAMES, STD, same, weights_of

from fcmae import FCMAE, ConvNeXt, load_encoder
from fcmae.encoder.convnext import Version
from fcmae.encoder.networks import build_network
from fcmae.encoder.responses import RESPONSES
from fcmae.errors import UserError
from fcmae.weights.base import IMAGENET, Preprocessing, describe_encoder, load_network, version_of
from fcmae.weights.export import export, write_folder
from fcmae.weights.official import dense_to_official_sparse
from fcmae.weights.read import FORMATS, find_weights, interpret, read_weights
from fcmae.weights.timm import to_timm, write_timm_folder
from fcmae.weights.transformers import to_transformers


def test_every_format_is_recognised_whatever_the_file_is_called(tmp_path: Path) -> None:
    classifier, encoder = small_encoder(num_classes=3).float(), small_encoder().float()
    written = {
        "official dense": ({"model": classifier.state_dict(), "args": argparse.Namespace(lr=1)}, classifier),
        "timm": (
            {"state_dict": {f"module.{k}": v for k, v in to_timm(classifier.state_dict()).items()}},
            classifier,
        ),
        "transformers": (to_transformers(classifier.state_dict()), classifier),
        "official sparse (MinkowskiEngine)": ({"model": dense_to_official_sparse(encoder.state_dict())}, encoder),
    }
    for kind, (content, network) in written.items():
        torch.save(content, tmp_path / "weights")
        weights = read_weights(tmp_path / "weights")
        assert (weights.description, weights.preprocessing) == (kind, Preprocessing())
        assert same(network.state_dict(), weights.tensors), kind
        assert same(load_encoder(tmp_path / "weights").state_dict(), weights.tensors)
    for name in ("x.bin", "x.pth", "x"):
        save_file(to_timm(encoder.state_dict()), tmp_path / name)
        assert read_weights(str(tmp_path / name)).kind == "timm"


@pytest.mark.parametrize("version", [1, 2])
def test_each_format_recognises_its_own_names_only(version: Version) -> None:
    state = small_encoder(version=version).state_dict()
    states = {"timm": to_timm(state), "transformers": to_transformers(state), "official": state}
    if version == 2:
        states["official-sparse"] = dense_to_official_sparse(state)
    for name, tensors in states.items():
        assert version_of(tensors) == version
        assert [form.name for form in FORMATS.values() if form.recognises(tensors)] == [name]


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    encoder = small_encoder().float()
    torch.save(encoder.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(encoder.state_dict(), read_weights(tmp_path / "old.pth").tensors)


def test_the_ema_of_timms_and_the_official_training_is_found(tmp_path: Path) -> None:
    raw, average = small_encoder().float().state_dict(), small_encoder().float().state_dict()
    for keys in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        torch.save(dict(zip(keys, (raw, average), strict=True)), tmp_path / "both.pth")
        for ema, state in ((False, raw), (True, average)):
            weights = read_weights(tmp_path / "both.pth", ema=ema)
            assert same(weights.tensors, state)
            assert weights.description == ("official dense, EMA" if ema else "official dense")
    torch.save({"model": raw}, tmp_path / "raw.pth")
    with pytest.raises(UserError, match=r"raw\.pth: holds no EMA weights"):
        read_weights(tmp_path / "raw.pth", ema=True)


def test_a_wrapped_or_whole_model_is_unwrapped() -> None:
    encoder = small_encoder().state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in to_timm(encoder).items()}
    found = interpret(Path("x"), wrapped)
    assert (same(found.tensors, encoder), found.kind) == (True, "timm")
    model = randomise(FCMAE(TINY, decoder_dim=16))
    assert same(interpret(Path("x"), model.state_dict()).tensors, model.encoder.state_dict())


@pytest.mark.parametrize("response", sorted(RESPONSES))
@pytest.mark.parametrize("version", [1, 2])
def test_a_bare_file_tells_its_version_and_whether_it_has_grn(
    version: Version, response: str, tmp_path: Path
) -> None:
    encoder = small_encoder(version=version, response=response).float()
    torch.save(encoder.state_dict(), tmp_path / "x.pth")
    if response in ("none", "grn", "lrn"):
        found = load_encoder(tmp_path / "x.pth")
        assert found.version == version
        assert found.response == {"lrn": "none"}.get(response, response)  # LRN has no parameters to tell it by
        assert same(found.state_dict(), encoder.state_dict())
    else:
        with pytest.raises(UserError, match=r"x\.pth .*grn\.\w.*, of another response than GRN.*; give the run or"):
            read_weights(tmp_path / "x.pth")


def test_a_network_of_timm_is_built_once_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(build_network("timm/test_resnet", num_classes=3))
    write_folder(network, Preprocessing(MEAN, STD, (64, 64), class_names=NAMES), tmp_path)
    built: list[str] = []
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: built.append(name) or build(name, **kwargs))
    weights = read_weights(tmp_path)
    assert built == ["test_resnet"]
    assert (weights.classifier, weights.num_classes) == (network.classifier, 3)


def test_half_a_version_is_refused() -> None:
    state = small_encoder(version=1).state_dict()
    for odd in (
        {name: value for name, value in state.items() if name != "stages.0.0.gamma"},
        small_encoder(version=2).state_dict() | {"stages.1.0.gamma": torch.zeros(16)},
        state | {"stages.0.0.grn.gamma": torch.zeros(1, 1, 1, 32)},
    ):
        with pytest.raises(UserError, match=r"^x: official dense weights of ConvNeXt V1 .* tensors differ: "):
            interpret(Path("x"), odd)


def test_other_networks_are_refused_with_a_glimpse_of_their_names() -> None:
    with pytest.raises(UserError, match=r"^x: no ConvNeXt in .*it holds 2 tensors: 'conv1\.weight', 'fc\.bias'"):
        interpret(Path("x"), {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"^x: .*it holds no tensors"):
        interpret(Path("x"), {})


def test_what_is_unknown_is_completed_as_the_released_weights_have_it() -> None:
    encoder = small_encoder(num_classes=3)
    assert Preprocessing().completed(encoder) == IMAGENET
    assert IMAGENET[:6] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), 0.875, "bicubic", (0, 1))
    assert set(IMAGENET[6:]) == {None, False}
    assert Preprocessing(image_size=(32, 64)).completed(encoder).crop_pct == 1.0
    known = Preprocessing(MEAN, STD, (64, 96), 0.9, "bilinear", (0.0, 1.0), NAMES)
    assert known.completed(encoder) == known
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        Preprocessing(class_names=NAMES[:2]).completed(encoder)
    with pytest.raises(ValueError, match="for 3 channels, but mean and std have 3 and 1"):
        Preprocessing(MEAN, (0.5,)).completed(encoder)
    with pytest.raises(ValueError, match="for 5 channels, but its mean and std are unknown, and ImageNet's have 3"):
        Preprocessing().completed(small_encoder(in_chans=5))


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"clip": ((0.0, 0.0), 1.0)}, "clip has 2 and 3 values for 3 channels"),
        ({"clip": (0.5, (1.0, 0.5, 1.0))}, "leaves nothing"),
        ({"dtype": "uint16", "nodata": 0.0}, "uint16 pixels with no-data, which makes them float32"),
    ],
    ids=str,
)
def test_what_is_said_of_pixels_has_to_fit_together(known: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**known).completed(small_encoder())


@pytest.mark.parametrize("form", ["timm", "transformers", "official", "plain"])
def test_every_format_keeps_what_is_said_of_pixels(form: str, tmp_path: Path) -> None:
    clip = (-1.0, (2.0, 3.0, 4.0))
    known = {"dtype": "float32", "nodata": -9999.0, "window": True, "clip": clip}
    weights = weights_of(small_encoder(), **known)
    export(weights, form, tmp_path / "out")
    found = read_weights(tmp_path / "out").preprocessing.completed(small_encoder())
    assert found == weights.preprocessing.completed(small_encoder())


def test_folders_that_say_nothing_of_pixels_are_read(tmp_path: Path) -> None:
    write_timm_folder(small_encoder().float(), Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pixels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_weights(tmp_path).preprocessing
    assert (found.dtype, found.nodata, found.window, found.clip) == (None, None, False, None)


def test_mean_and_std_are_completed_for_pixels_from_0_to_1() -> None:
    pixels, encoder = torch.rand(3), small_encoder()
    for low, high in ((0.0, 255.0), (-1.0, 1.0)):
        use = Preprocessing(MEAN, STD, value_range=(low, high)).completed(encoder)
        wanted = (pixels * (high - low) + low - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose((pixels - torch.tensor(use.mean)) / torch.tensor(use.std), wanted, rtol=1e-4)
        assert use.value_range == (0, 1)
    assert Preprocessing(value_range=(0.0, 255.0)).completed(encoder) == IMAGENET


def test_the_classifier_can_be_kept_dropped_or_replaced(tmp_path: Path) -> None:
    classifier = small_encoder(num_classes=3).float().eval()
    torch.save(classifier.state_dict(), tmp_path / "x.pth")
    images = torch.randn(2, 3, 64, 64)
    features = load_encoder(tmp_path / "x.pth", num_classes=0)
    with torch.no_grad():
        assert relative_error(load_encoder(tmp_path / "x.pth")(images), classifier(images)) == 0
        assert relative_error(classifier.head(features(images)), classifier(images)) <= 1e-6
    other = load_encoder(tmp_path / "x.pth", num_classes=9, drop_path=0.5)
    assert other.state_dict()["head.weight"].shape == (9, 32)
    assert torch.equal(other.state_dict()["norm.weight"], classifier.state_dict()["norm.weight"])
    torch.save(features.state_dict(), tmp_path / "features.pth")
    assert same(load_encoder(tmp_path / "features.pth").state_dict(), features.state_dict())


class Bomb:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    bomb = {"model": small_encoder().state_dict(), "hook": Bomb(tmp_path / "crater")}
    torch.save(bomb, tmp_path / "new.pth")
    torch.save(bomb, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "crater")))
    torch.save(small_encoder(), tmp_path / "module.pth")
    for name, culprit in {"new": "mkdir", "old": "mkdir", "bare": "code", "module": "ConvNeXt"}.items():
        path = tmp_path / f"{name}.pth"
        with pytest.raises(UserError, match=rf"{name}\.pth: a pickle that holds code.*was not run") as caught:
            read_weights(path)
        assert culprit in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_truncated_file_is_named(kind: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    state = small_encoder().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(
        UserError, match=r"cut: (a damaged|neither a|not a readable|a pickle that holds code)"
    ) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_what_holds_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("weights, honestly")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"epoch": 3}, tmp_path / "none")
    for name, message in {
        "text": "neither a safetensors nor a PyTorch file",
        "list": "holds a list, not tensors by name",
        "none": "it holds no tensors",
        "absent": "no such file or folder",
        ".": "holds no weights",
    }.items():
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / name)


def test_missing_and_unexpected_keys_are_listed_up_to_ten_with_the_likely_variant(tmp_path: Path) -> None:
    state = ConvNeXt("atto").state_dict()
    missing = [name for name in state if ".norm." in name][:12]
    for name in missing:
        del state[name]
    torch.save(state, tmp_path / "atto.pth")
    with pytest.raises(UserError, match=r"atto\.pth: official dense weights of ConvNeXt V2 atto") as caught:
        read_weights(tmp_path / "atto.pth")
    assert "but 12 tensors differ" in str(caught.value)
    assert str(caught.value).count("missing stages.") == 10
    path = tmp_path / "x.pth"
    torch.save(small_encoder().state_dict() | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"x\.pth \(most like .*dims \[8, 16.*unknown keys 'extra\.weight'"):
        read_weights(tmp_path / "x.pth")
    for rename in (to_timm, to_transformers, dense_to_official_sparse):
        with torch.device("meta"):
            atto = rename(ConvNeXt("atto").state_dict())
        torch.save({name: torch.zeros(value.shape) for name, value in atto.items()} | {"y": torch.zeros(1)}, path)
        with pytest.raises(UserError, match=r"x\.pth \(most like atto\): not .*unknown keys 'y'"):
            read_weights(path)
    torch.save(small_encoder().state_dict() | {"stages.0.0.norm.weight": torch.zeros(9)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"1 tensors differ: stages\.0\.0\.norm\.weight is \(9,\), not \(8,\)"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["downsample_layers.0.0.weight", "downsample_layers.1.1.weight", "head.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (8, 3, 5, 5)])
def test_tensors_of_a_senseless_shape_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(small_encoder(num_classes=3).state_dict() | {name: torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_weights(tmp_path / "x.pth")


def test_files_beside_weights_are_checked_too(tmp_path: Path) -> None:
    encoder = small_encoder(num_classes=3).float()
    write_timm_folder(encoder, Preprocessing(MEAN, STD, (64, 64), class_names=NAMES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = ["cat"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="3 classes, but the files beside it name 1"):
        read_weights(tmp_path)
    damages = ['"pretrained_cfg": 3', '"stem_stride": 7', '"mean": "abc"', '"input_size": 224', '"crop_pct": "x"']
    for damage in ("{", *(f'{{"architecture": "convnextv2_atto", {damage}}}' for damage in damages)):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(UserError, match=r"config\.json: damaged"):
            read_weights(tmp_path)


def test_files_of_other_networks_beside_a_file_of_weights_are_not_its_own(tmp_path: Path) -> None:
    write_timm_folder(small_encoder().float(), Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    torch.save(small_encoder().state_dict(), tmp_path / "other.pth")
    assert read_weights(tmp_path / "other.pth").preprocessing.mean is None
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"


def test_weights_of_another_variant_are_refused_with_both_names() -> None:
    with torch.device("meta"):
        pico = ConvNeXt("pico").state_dict()
        atto = ConvNeXt("atto")
    with pytest.raises(UserError, match=r"x: does not fit the model \(atto\): it holds pico") as caught:
        load_network(atto, pico, Path("x"))
    assert str(caught.value).count(";") <= 11


@pytest.mark.parametrize("name", ["atto", "tiny", "huge"])
def test_a_variant_is_recognised_by_its_tensors(name: str) -> None:
    with torch.device("meta"):
        for version in (1, 2):
            state = FCMAE(name, version=version).state_dict()
            assert (describe_encoder(state), version_of(state)) == (name, version)
    assert describe_encoder({"weight": torch.zeros(1)}) == "no ConvNeXt"
    assert "dims [8, 8, 16, 16]" in describe_encoder(ConvNeXt(((1, 1, 1, 1), (8, 8, 16, 16))).state_dict())


@pytest.mark.any_cpu
def test_a_package_is_imported_only_for_the_format_that_needs_it() -> None:
    code = "import sys, fcmae.load, fcmae.weights.export; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True)
    assert not {"timm", "transformers", "onnx", "onnxscript", "onnxruntime"} & set(done.stdout.split())
