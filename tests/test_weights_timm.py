"""timm's format: timm computes the same from converted weights, and loads the folders we write."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, randomise, relative_error, small_encoder, smooth_images
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from weight_files import MEAN, NAMES, STD, same, weights_of

from fcmae.encoder.convnext import VARIANTS, ConvNeXt, Version
from fcmae.errors import UserError
from fcmae.weights.base import Preprocessing, build_encoder
from fcmae.weights.export import export, write_folder
from fcmae.weights.read import interpret, read_weights
from fcmae.weights.timm import enlarge_stem, from_timm, shrink_stem, timm_config, to_timm, write_timm_folder


def timm_model(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


FAMILIES = {1: "convnext", 2: "convnextv2"}


@pytest.mark.parametrize(("version", "variant"), [(2, "atto"), (2, "pico"), (2, "tiny"), (1, "atto"), (1, "tiny")])
def test_timm_gives_the_same_logits(version: Version, variant: str) -> None:
    ours = randomise(ConvNeXt(variant, version=version, num_classes=10).double(), std=0.3).eval()
    theirs = timm_model(f"{FAMILIES[version]}_{variant}", num_classes=10, dtype=torch.float64).eval()
    state = ours.state_dict()
    theirs.load_state_dict(to_timm(state), strict=True)
    for size in ((64, 64), (70, 101)):  # also where windows of the stem and the downsampling are not filled
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(ours(images), theirs(images)) <= 1e-10
    assert same(from_timm(to_timm(state)), state)
    assert same(to_timm(from_timm(theirs.state_dict())), theirs.state_dict())


@pytest.mark.parametrize(("version", "variant"), [(2, "atto"), (2, "tiny"), (1, "femto")])
def test_an_encoder_without_classes_loads_strictly_into_timm_and_gives_the_same_features(
    version: Version, variant: str
) -> None:
    ours = randomise(ConvNeXt(variant, version=version).double(), std=0.3).eval()
    theirs = timm_model(f"{FAMILIES[version]}_{variant}", num_classes=0, dtype=torch.float64).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) <= 1e-10
        assert relative_error(ours.pyramid(images)[-1], theirs.forward_features(images)) <= 1e-10


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("variant", ["atto", TINY])
def test_there_and_back_is_the_identity(variant: Any, num_classes: int) -> None:
    state = randomise(ConvNeXt(variant, num_classes=num_classes)).state_dict()
    assert same(from_timm(to_timm(state)), state)
    assert same(to_timm(from_timm(to_timm(state))), to_timm(state))


@pytest.mark.any_cpu
@pytest.mark.parametrize("version", [1, 2])
def test_every_variant_has_the_names_and_shapes_of_timms(version: Version) -> None:
    for variant in VARIANTS:
        with torch.device("meta"):
            ours = ConvNeXt(variant, version=version, num_classes=1000)
        config = timm_config(ours, Preprocessing())
        named = config["architecture"] == f"{FAMILIES[version]}_{variant}"
        assert named == ("model_args" not in config) == ((version, variant) not in {(1, "huge"), (2, "xlarge")})
        theirs = timm_model(config["architecture"], device="meta", **config.get("model_args", {})).state_dict()
        shapes = {name: tensor.shape for name, tensor in to_timm(ours.state_dict()).items()}
        assert shapes == {name: tensor.shape for name, tensor in theirs.items()}, variant


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("response", ["none", "grn"])
def test_timm_holds_both_versions_with_and_without_grn(version: Version, response: str, tmp_path: Path) -> None:
    encoder = small_encoder(version=version, response=response, num_classes=3)
    weights = weights_of(encoder, class_names=NAMES)
    assert export(weights, "timm", tmp_path / "out").difference <= 1e-10
    back = build_encoder(read_weights(tmp_path / "out"))
    assert (back.version, back.response) == (version, response)
    assert same(back.state_dict(), weights.tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == f"{FAMILIES[version]}_tiny"
    paper = {1: "arXiv:2201.03545", 2: "arXiv:2301.00808"}[version]
    assert config["pretrained_cfg"]["paper_ids"] == paper
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n# ConvNeXt V{version} (1, 1, 2, 1), (8, 16, 24, 32): 3 classes\n" in card


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atto_ols", r"an overlapping stem \(timm's convnext_\*_ols\), which fcmae lacks"),
        ("convnext_nano_ols", "an overlapping stem"),
        ("convnext_tiny_hnf", r"the norm before the pooling \(timm's convnext_\*_hnf\), which fcmae lacks"),
        ("convnext_large_mlp", r"a hidden layer in its classifier \(timm's convnext_\*_mlp\), which fcmae lacks"),
        ("convnext_atto_rms", r"missing downsample_layers\.0\.1\.bias"),
        ("convnext_xxlarge", "timm's convnext_xxlarge, whose norms have another eps"),
    ],
)
def test_timms_other_convnexts_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        interpret(Path("x"), timm_model(name, device="meta").state_dict())
    assert "\n" not in str(caught.value)


def test_a_folder_of_timms_with_what_tensors_do_not_show_is_refused(tmp_path: Path) -> None:
    write_timm_folder(small_encoder(version=1).float(), Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] |= {"act_layer": "relu", "norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="made with another act_layer and norm_eps, which fcmae lacks"):
        read_weights(tmp_path)


def test_a_final_norm_that_does_something_is_kept() -> None:
    theirs = to_timm(small_encoder().state_dict())
    assert "norm.weight" not in from_timm(theirs)
    theirs["head.norm.bias"] = torch.full_like(theirs["head.norm.bias"], 0.1)
    assert {"norm.weight", "norm.bias"} <= from_timm(theirs).keys()


def test_unknown_keys_are_refused_by_name() -> None:
    state = small_encoder().state_dict()
    extra = {f"decoder.{i}.weight": torch.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"'decoder\.0\.weight'.*'decoder\.9\.weight' and 2 more$"):
        to_timm(state | extra)
    with pytest.raises(ValueError, match=r"unknown keys 'encoder\.norm\.weight'$"):
        to_timm(state | {"encoder.norm.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown keys 'stages\.0\.blocks\.0\.beta'$"):
        from_timm(to_timm(state) | {"stages.0.blocks.0.beta": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"unknown keys 'stages\.4\.0\.norm\.weight'$"):
        to_timm(state | {"stages.4.0.norm.weight": torch.zeros(8)})


def test_timms_patch_size_2_is_refused_since_it_is_another_network() -> None:
    theirs = timm_model("convnextv2_atto", patch_size=2, num_classes=0)
    with pytest.raises(ValueError, match=r"stages\.0\.downsample\.0\.weight"):
        from_timm(theirs.state_dict())


def test_an_incomplete_state_is_refused_by_name() -> None:
    state = small_encoder().state_dict()
    del state["downsample_layers.2.1.weight"]
    with pytest.raises(ValueError, match=r"downsample_layers\.2\.1\.weight missing"):
        to_timm(state)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"variant": "atto", "stem_stride": 4},
        {"variant": "atto", "stem_stride": 1},
        {"variant": "atto", "stem_stride": 2},
        {"variant": "atto", "stem_stride": 2, "in_chans": 1, "num_classes": 4},
        {"stem_stride": 4, "in_chans": 1},
        {"stem_stride": 1, "in_chans": 5},
        {"stem_stride": 2, "in_chans": 5, "num_classes": 3},
    ],
    ids=str,
)
def test_timm_loads_the_folder_and_gives_the_same_features(kwargs: dict[str, Any], tmp_path: Path) -> None:
    encoder = small_encoder(**kwargs).eval()
    in_chans, patch = encoder.in_chans, encoder.patch_size
    height, width = 2 * patch, 3 * patch
    write_timm_folder(encoder, Preprocessing((0.5,) * in_chans, (0.25,) * in_chans, (height, width)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    theirs = timm_model(f"local-dir:{tmp_path}", pretrained=True, dtype=torch.float64).eval()
    assert theirs.num_classes == encoder.num_classes
    assert theirs.num_features == encoder.dims[-1]
    images = torch.randn(2, in_chans, height, width, dtype=torch.float64)
    seen_by_timm = F.interpolate(images, scale_factor=2, mode="nearest") if encoder.stem_stride == 2 else images
    assert tuple(seen_by_timm.shape[1:]) == tuple(theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert relative_error(theirs(seen_by_timm), encoder(images)) <= 1e-10
        features = theirs.forward_features(seen_by_timm)
        assert features.shape[2:] == tuple(theirs.pretrained_cfg["pool_size"])
        assert relative_error(features, encoder.pyramid(images)[-1]) <= 1e-10


def test_timm_preprocesses_as_the_folder_says(tmp_path: Path) -> None:
    write_timm_folder(small_encoder(), Preprocessing(MEAN, STD, (224, 224)), tmp_path)
    model = timm_model(f"local-dir:{tmp_path}", pretrained=True)
    config = resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 224, 224)
    assert tuple(config["mean"]) == MEAN
    assert tuple(config["std"]) == STD
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)


def test_timm_can_put_a_new_head_and_other_channels_on_the_folder(tmp_path: Path) -> None:
    encoder = small_encoder().float()
    write_timm_folder(encoder, Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    model = timm_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model.forward_features(images), encoder.pyramid(images)[-1]) <= 1e-5
    gray = timm_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    assert gray(torch.randn(2, 1, 64, 64)).shape == (2, 32)


def test_the_config_names_only_what_differs_from_the_architecture() -> None:
    with torch.device("meta"):
        atto, other = ConvNeXt("atto", num_classes=7), ConvNeXt(TINY, in_chans=1, stem_stride=1)
    config = timm_config(atto, Preprocessing(MEAN, STD, (224, 224)))
    assert config["architecture"] == "convnextv2_atto"
    assert (config["num_classes"], config["num_features"]) == (7, 320)
    assert "model_args" not in config
    config = timm_config(other, Preprocessing((0.5,), (0.2,), (32, 48)))
    assert config["model_args"] == {
        "depths": [1, 1, 2, 1],
        "dims": [8, 16, 24, 32],
        "in_chans": 1,
        "patch_size": 1,
    }
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 48]
    assert config["pretrained_cfg"]["pool_size"] == [4, 6]
    assert json.loads(json.dumps(config)) == config


def test_preprocessing_that_does_not_fit_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match="for 3 channels, but mean and std have 1 and 1"):
        timm_config(small_encoder(), Preprocessing((0.5,), (0.5,), (64, 64)))
    with pytest.raises(ValueError, match="not a multiple"):
        timm_config(small_encoder(), Preprocessing(MEAN, STD, (65, 65)))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        timm_config(small_encoder(num_classes=3), Preprocessing(MEAN, STD, (64, 64), class_names=("a", "b")))


def test_every_folder_has_a_card_which_warns_of_a_network_for_enlarged_images(tmp_path: Path) -> None:
    preprocessing = Preprocessing(MEAN, STD, (64, 96))
    for stem_stride in (4, 2):
        folder = tmp_path / str(stem_stride)
        write_folder(small_encoder(stem_stride=stem_stride).float(), preprocessing, folder)
        card = (folder / "README.md").read_text()
        assert "timm.create_model(" in card
        assert f"mean, std | {list(MEAN)}, {list(STD)}" in card
        factor = 4 // stem_stride
        assert f"3 channels, {64 * factor} x {96 * factor} pixels" in card
        assert ("**For images enlarged 2 times.** It was trained at 64 x 96" in card) == (stem_stride == 2)


def test_an_enlarged_stem_sees_on_enlarged_images_what_the_stem_sees() -> None:
    weight, images = torch.randn(4, 3, 2, 2).double(), torch.randn(2, 3, 8, 12).double()
    enlarged = F.conv2d(F.interpolate(images, scale_factor=2, mode="nearest"), enlarge_stem(weight, 2), stride=4)
    assert relative_error(enlarged, F.conv2d(images, weight, stride=2)) <= 1e-14
    assert torch.equal(shrink_stem(enlarge_stem(weight, 2), 2), weight)


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_a_folder_written_for_timm_comes_back_whole(stem_stride: int, tmp_path: Path) -> None:
    encoder = small_encoder(num_classes=3, stem_stride=stem_stride).float()
    size = (4 * encoder.patch_size, 6 * encoder.patch_size)
    written = Preprocessing(MEAN, STD, size, crop_pct=0.9, interpolation="bilinear", class_names=NAMES)
    write_timm_folder(encoder, written, tmp_path)
    weights = read_weights(tmp_path)
    assert same(encoder.state_dict(), weights.tensors)
    assert weights.preprocessing == written


def test_timm_loads_it_by_folder_and_by_file(tmp_path: Path) -> None:
    encoder = randomise(ConvNeXt("atto", num_classes=3), std=0.3)
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


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    encoder = small_encoder().float()
    write_timm_folder(encoder, Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fcmae.tensors.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            write_timm_folder(small_encoder().float(), Preprocessing(MEAN, STD, (96, 96)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert same(read_weights(tmp_path).tensors, encoder.state_dict())
    assert read_weights(tmp_path).preprocessing.image_size == (64, 64)
