"""Weights of any origin: recognised by content, described by what lies beside them, refused in one line."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise, relative_error, small_encoder
from safetensors.torch import save_file
from torch import Tensor

from fcmae import FCMAE, ConvNeXtV2, load_encoder
from fcmae.errors import UserError
from fcmae.training.checkpoint import EMA, save_checkpoint
from fcmae.weights.convert import dense_to_official_sparse, to_timm, to_transformers, write_timm_folder
from fcmae.weights.read import IMAGENET, find_weights, preprocessing, read_weights

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("cat", "dog", "kite")


def save_run(run: Path, model: Any, ema: Any = None, **state: Any) -> Path:
    """A run folder with one checkpoint, as training leaves it; returns the checkpoint's folder."""
    data = {"mean": MEAN, "std": STD, "image_size": [64, 96]}
    return save_checkpoint(
        run / "checkpoints",
        step=7,
        model=model.state_dict(),
        optimizer={},
        state={"config": {"data": data}, **state},
        keep=1,
        ema=None if ema is None else ema.state_dict(),
    )


def same(encoder: ConvNeXtV2, tensors: dict[str, Tensor]) -> bool:
    state = encoder.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


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
        assert (weights.kind, weights.class_names, weights.mean) == (kind, None, None)
        assert same(network, weights.tensors), kind
        assert same(load_encoder(tmp_path / "weights"), weights.tensors)
    for name in ("x.bin", "x.pth", "x"):
        save_file(to_timm(encoder.state_dict()), tmp_path / name)
        assert read_weights(str(tmp_path / name)).kind == "timm"


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    encoder = small_encoder().float()
    torch.save(encoder.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(encoder, read_weights(tmp_path / "old.pth").tensors)


def test_a_run_its_checkpoint_and_its_file_give_the_same_weights(tmp_path: Path) -> None:
    model = randomise(FCMAE(TINY, stem_stride=1, in_chans=3, decoder_dim=16))
    step = save_run(tmp_path, model)
    for path in (tmp_path, step, tmp_path / "checkpoints" / "last", step / "model.safetensors"):
        weights = read_weights(path)
        assert weights.kind == "FCMAE run"
        assert same(model.encoder, weights.tensors)
        assert (weights.mean, weights.std, weights.image_size) == (MEAN, STD, (64, 96))
    assert load_encoder(tmp_path).stem_stride == 1


def test_a_fine_tuned_run_tells_its_classes_and_keeps_its_average_apart(tmp_path: Path) -> None:
    model, average = small_encoder(num_classes=3).float(), small_encoder(num_classes=3).float()
    step = save_run(tmp_path, model, average, class_names=list(NAMES))
    raw, ema = read_weights(tmp_path), read_weights(tmp_path, ema=True)
    assert raw.kind == ema.kind == "fine-tuned run"
    assert raw.class_names == ema.class_names == NAMES
    assert same(model, raw.tensors)
    assert same(average, ema.tensors)
    assert same(load_encoder(step, ema=True), ema.tensors)
    (step / EMA).unlink()
    with pytest.raises(UserError, match="holds no EMA weights, only the raw ones"):
        read_weights(tmp_path, ema=True)


def test_the_average_of_timms_and_the_official_training_is_found(tmp_path: Path) -> None:
    raw, average = small_encoder().float().state_dict(), small_encoder().float().state_dict()
    for keys in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        torch.save(dict(zip(keys, (raw, average), strict=True)), tmp_path / "both.pth")
        for ema, state in ((False, raw), (True, average)):
            tensors = read_weights(tmp_path / "both.pth", ema=ema).tensors
            assert all(torch.equal(tensors[name], state[name]) for name in state)
    torch.save({"model": raw}, tmp_path / "raw.pth")
    with pytest.raises(UserError, match=r"raw\.pth: holds no EMA weights"):
        read_weights(tmp_path / "raw.pth", ema=True)


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_a_folder_written_for_timm_comes_back_whole(stem_stride: int, tmp_path: Path) -> None:
    encoder = small_encoder(num_classes=3, stem_stride=stem_stride).float()
    size = (4 * encoder.patch_size, 6 * encoder.patch_size)
    write_timm_folder(encoder, tmp_path, mean=MEAN, std=STD, image_size=size, crop_pct=0.9, class_names=list(NAMES))
    weights = read_weights(tmp_path)
    assert same(encoder, weights.tensors)
    assert weights.class_names == NAMES
    assert preprocessing(weights) == (MEAN, STD, size, 0.9)


def test_transformers_own_preprocessing_is_understood(tmp_path: Path) -> None:
    save_file(to_transformers(small_encoder(num_classes=2).float().state_dict()), tmp_path / "model.safetensors")
    config = {"hidden_sizes": [8], "id2label": {"1": "dog", "0": "cat"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prepare = {"size": {"shortest_edge": 224}, "crop_pct": 0.8, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepare))
    weights = read_weights(tmp_path)
    assert weights.class_names == ("cat", "dog")
    assert preprocessing(weights) == (MEAN, STD, (224, 224), 0.8)


def test_what_a_file_does_not_tell_is_taken_from_the_released_weights(tmp_path: Path) -> None:
    torch.save(small_encoder().state_dict(), tmp_path / "x.pth")
    assert preprocessing(read_weights(tmp_path / "x.pth")) == IMAGENET
    torch.save(small_encoder(in_chans=5).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="for 5 channels, but it tells no mean and std, and ImageNet's have 3"):
        preprocessing(read_weights(tmp_path / "x.pth"))


def test_the_classifier_can_be_kept_dropped_or_replaced(tmp_path: Path) -> None:
    classifier = small_encoder(num_classes=3).float().eval()
    torch.save(classifier.state_dict(), tmp_path / "x.pth")
    images = torch.randn(2, 3, 64, 64)
    features = load_encoder(tmp_path / "x.pth", num_classes=0)
    with torch.no_grad():
        assert relative_error(load_encoder(tmp_path / "x.pth")(images), classifier(images)) == 0
        assert relative_error(classifier.head(features(images)), classifier(images)) <= 1e-6
    other = load_encoder(tmp_path / "x.pth", num_classes=9, drop_path=0.5)
    assert other.head.weight.shape == (9, 32)
    assert torch.equal(other.state_dict()["norm.weight"], classifier.state_dict()["norm.weight"])
    torch.save(features.state_dict(), tmp_path / "features.pth")
    assert same(load_encoder(tmp_path / "features.pth"), dict(features.state_dict()))


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
    for name, culprit in {"new": "mkdir", "old": "mkdir", "bare": "code", "module": "ConvNeXtV2"}.items():
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


def test_what_holds_no_network_is_told(tmp_path: Path) -> None:
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
    state = ConvNeXtV2("atto").state_dict()
    missing = [name for name in state if ".norm." in name][:12]
    for name in missing:
        del state[name]
    torch.save(state, tmp_path / "atto.pth")
    with pytest.raises(UserError, match=r"atto\.pth: official dense weights of a ConvNeXt V2 atto") as caught:
        read_weights(tmp_path / "atto.pth")
    assert "but 12 tensors differ" in str(caught.value)
    assert str(caught.value).count("missing stages.") == 10
    path = tmp_path / "x.pth"
    torch.save(small_encoder().state_dict() | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"x\.pth \(most like .*dims \[8, 16.*unknown keys 'extra\.weight'"):
        read_weights(tmp_path / "x.pth")
    for rename in (to_timm, to_transformers, dense_to_official_sparse):
        with torch.device("meta"):
            atto = rename(ConvNeXtV2("atto").state_dict())
        torch.save({name: torch.zeros(value.shape) for name, value in atto.items()} | {"y": torch.zeros(1)}, path)
        with pytest.raises(UserError, match=r"x\.pth \(most like atto\): not .*unknown keys 'y'"):
            read_weights(path)
    torch.save(small_encoder().state_dict() | {"stages.0.0.norm.weight": torch.zeros(9)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"1 tensors differ: stages\.0\.0\.norm\.weight is \(9,\), not \(8,\)"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["downsample_layers.0.0.weight", "downsample_layers.1.1.weight", "head.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (8, 3, 5, 5)])
def test_tensors_of_a_senseless_shape_are_told(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(small_encoder(num_classes=3).state_dict() | {name: torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_weights(tmp_path / "x.pth")


def test_files_beside_weights_are_checked_too(tmp_path: Path) -> None:
    encoder = small_encoder(num_classes=3).float()
    write_timm_folder(encoder, tmp_path, mean=MEAN, std=STD, image_size=64, class_names=list(NAMES))
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
    write_timm_folder(small_encoder().float(), tmp_path, mean=MEAN, std=STD, image_size=64)
    torch.save(small_encoder().state_dict(), tmp_path / "other.pth")
    assert read_weights(tmp_path / "other.pth").mean is None
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"
