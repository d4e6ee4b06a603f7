"""fcmae.load: the model that a run, a checkpoint, an exported folder or a file stands for."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise, small_encoder
from safetensors.torch import save_file
from small_runs import rehash
from timm.models._manipulate import adapt_input_conv
from weight_files import MEAN, NAMES, STD, same, save_run

from fcmae import FCMAE, ConvNeXt, load_encoder
from fcmae.config import PretrainConfig, parse_config
from fcmae.errors import UserError
from fcmae.load import adapt_channels, load_fcmae, load_tensors, load_weights
from fcmae.training.checkpoint import EMA, MODEL
from fcmae.weights.base import Preprocessing, build_encoder


def test_a_run_its_checkpoint_and_its_file_give_the_same_weights(tmp_path: Path) -> None:
    model = randomise(FCMAE(TINY, stem_stride=1, in_chans=3, decoder_dim=16))
    step = save_run(tmp_path, model)
    for path in (tmp_path, step, tmp_path / "checkpoints" / "last", step / "model.safetensors", str(tmp_path)):
        weights = load_weights(path)
        assert weights.path.samefile(step / "model.safetensors")
        assert (weights.kind, weights.step, weights.ema) == ("FCMAE run", 7, False)
        assert weights.description == "FCMAE run, step 7, raw weights"
        assert same(model.encoder.state_dict(), weights.tensors)
        assert weights.preprocessing == Preprocessing(MEAN, STD, (64, 96))
    assert load_encoder(tmp_path).stem_stride == 1


def test_a_fine_tuned_run_knows_its_classes_and_keeps_its_ema_apart(tmp_path: Path) -> None:
    model, average = small_encoder(num_classes=3).float(), small_encoder(num_classes=3).float()
    step = save_run(tmp_path, model, average, class_names=list(NAMES))
    raw, ema = load_weights(tmp_path, ema=False), load_weights(tmp_path, ema=True)
    assert raw.kind == ema.kind == "fine-tuned run"
    assert (raw.description, ema.description) == (
        "fine-tuned run, step 7, raw weights",
        "fine-tuned run, step 7, EMA",
    )
    assert raw.preprocessing.class_names == ema.preprocessing.class_names == NAMES
    assert same(model.state_dict(), raw.tensors)
    assert same(average.state_dict(), ema.tensors)
    assert same(load_encoder(step, ema=True).state_dict(), ema.tensors)
    assert same(load_encoder(step / EMA).state_dict(), ema.tensors)
    assert same(load_encoder(step / MODEL).state_dict(), raw.tensors)
    (step / EMA).unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: missing"):  # and not silently the raw ones
        load_weights(tmp_path)


def test_a_run_stands_for_its_best_evaluated_weights(tmp_path: Path) -> None:
    networks = [small_encoder(num_classes=3).float() for _ in range(4)]
    best, best_ema, last, last_ema = (network.state_dict() for network in networks)
    save_run(tmp_path, networks[0], networks[1], step=5, best=5)
    save_run(tmp_path, networks[2], networks[3], step=10, best=5)
    for path in (tmp_path, tmp_path / "checkpoints" / "best"):
        weights = load_weights(path)
        assert (weights.step, weights.ema) == (5, True)
        assert same(weights.tensors, best_ema)
        assert same(load_encoder(path, ema=False).state_dict(), best)
    assert same(load_encoder(tmp_path, last=True).state_dict(), last_ema)
    assert same(load_encoder(tmp_path, last=True, ema=False).state_dict(), last)
    assert load_tensors(tmp_path)[0] == tmp_path / "checkpoints" / "best" / EMA


def test_a_run_that_evaluated_its_raw_weights_stands_for_them(tmp_path: Path) -> None:
    raw, average = small_encoder(num_classes=3).float(), small_encoder(num_classes=3).float()
    config = {"data": {"mean": MEAN, "std": STD, "image_size": 64, "crop_pct": 0.9}, "eval": {"ema": False}}
    save_run(tmp_path, raw, average, best=7, config=config)
    weights = load_weights(tmp_path)
    assert weights.description == "fine-tuned run, step 7, raw weights"
    assert same(weights.tensors, raw.state_dict())
    assert weights.preprocessing == Preprocessing(MEAN, STD, (64, 64), 0.9)
    assert same(load_encoder(tmp_path, ema=True).state_dict(), average.state_dict())


def test_tensors_are_found_in_runs_checkpoints_and_files(tmp_path: Path) -> None:
    model = randomise(FCMAE(TINY, decoder_dim=16))
    path = save_run(tmp_path, model)
    for source in (tmp_path, path, path / "model.safetensors"):
        file, tensors = load_tensors(source)
        assert file == path / "model.safetensors"
        assert same(tensors, model.state_dict())
    both = {"model": model.encoder.state_dict(), "model_ema": small_encoder().state_dict()}
    torch.save(both, tmp_path / "both.pth")
    for ema, key in {None: "model", False: "model", True: "model_ema"}.items():
        assert same(load_tensors(tmp_path / "both.pth", ema=ema)[1], both[key])
        assert load_weights(tmp_path / "both.pth", ema=ema).ema is bool(ema)
    with pytest.raises(UserError, match="no such file or folder"):
        load_tensors(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such file or folder"):
        load_weights(tmp_path / "elsewhere")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    path = save_run(tmp_path, small_encoder())
    state = json.loads((path / "state.json").read_text())
    for damage in ({}, {"data": {"mean": "abc"}}, {"data": 5}, {"data": {}, "model": "atto"}):
        (path / "state.json").write_text(json.dumps(state | {"config": damage}))
        rehash(path)
        with pytest.raises(UserError, match=f"{path}.*: damaged"):
            load_weights(path)


def test_a_pretraining_run_comes_back_with_its_decoder_and_configuration(tmp_path: Path) -> None:
    shape = {"variant": TINY, "stem_stride": 1, "decoder_dim": 16}
    values = {
        "output": str(tmp_path),
        "model": shape | {"layout": "minkowski"},
        "data": {"root": "x", "image_size": 32},
    }
    config = parse_config(PretrainConfig, values, "a test")
    model = randomise(FCMAE(TINY, stem_stride=1, decoder_dim=16))
    path = save_run(tmp_path, model, config=config.model_dump(mode="json"))
    for source in (tmp_path, path, path / "model.safetensors"):
        found, its_config = load_fcmae(source)
        assert same(found.state_dict(), model.state_dict())
        assert its_config == config
        assert found.layout == "auto"


def test_what_has_no_decoder_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "fine-tuned", small_encoder(num_classes=3))
    torch.save(FCMAE(TINY, decoder_dim=16).state_dict(), tmp_path / "no-run.pth")
    for name in ("fine-tuned", "no-run.pth"):
        with pytest.raises(UserError, match=f"{name}: holds no decoder to reconstruct with"):
            load_fcmae(tmp_path / name)
    with pytest.raises(UserError, match="no such file or folder"):
        load_fcmae(tmp_path / "elsewhere")


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 4), (3, 7), (1, 3), (5, 2)])
def test_a_first_layer_fits_other_channels_and_sees_equal_ones_as_before(
    tmp_path: Path, before: int, after: int
) -> None:
    save_file(
        {n: x.float() for n, x in small_encoder(in_chans=before).state_dict().items()}, tmp_path / "it.safetensors"
    )
    weights = load_weights(tmp_path / "it.safetensors")
    network = ConvNeXt(TINY, in_chans=after)
    tensors, how = adapt_channels(weights, network)
    assert how.startswith(f"first layer adapted from {before} to {after} channels")
    stem = "downsample_layers.0.0.weight"
    if before == 3:
        torch.testing.assert_close(tensors[stem], adapt_input_conv(after, weights.tensors[stem]))
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, weights.tensors[name])}
    assert changed == {stem}
    network.load_state_dict(tensors)
    gray = torch.rand(2, 1, 64, 64)
    original = build_encoder(weights)
    assert isinstance(original, ConvNeXt)
    expected = original.features(gray.expand(-1, before, -1, -1))
    if before >= after == 1 or after % before == 0:
        torch.testing.assert_close(network.features(gray.expand(-1, after, -1, -1)), expected, rtol=1e-4, atol=1e-4)
    assert adapt_channels(weights, build_encoder(weights)) == (weights.tensors, "")
