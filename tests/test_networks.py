"""Networks other than our ConvNeXt: timm's, on visible patches exactly as SparK says, and through a whole run."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, error_line, randomise, relative_error, run_main, smooth_images, some_ids
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from fcmae import FCMAE, finetune, load_encoder, pretrain
from fcmae.commands import evaluate, predict
from fcmae.config import ModelSection
from fcmae.data import save_arrays
from fcmae.encoder.convnext import ConvNeXt
from fcmae.encoder.networks import build_network
from fcmae.encoder.timm_networks import Masking, TimmNetwork
from fcmae.errors import UserError
from fcmae.load import load_weights
from fcmae.masking import ids_to_booleans
from fcmae.training.trainer import Trainer
from fcmae.weights.base import Preprocessing
from fcmae.weights.export import export, write_folder
from fcmae.weights.timm import from_timm

SMALL = ("test_resnet", "test_efficientnet")
"""timm's smallest: a residual network with max and average pooling, and one with squeeze-and-excite and SiLU."""

GRID = (2, 3)
"""Patches of the images here, which are 64 x 96 pixels."""


def small(name: str = "test_resnet", **kwargs: int) -> TimmNetwork:
    """A randomised float64 network of timm, in evaluation, whose running statistics are not those of a new one."""
    network = randomise(TimmNetwork(name, **kwargs).double(), std=0.2).eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network


def images(b: int = 2, c: int = 3) -> Tensor:
    return smooth_images(b, c, 32 * GRID[0], 32 * GRID[1])


def features_and_gradients(network: nn.Module, x: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """The last map, and gradients of a fixed random projection of it to all parameters it comes from."""
    assert isinstance(network, TimmNetwork | ConvNeXt)
    features = network.features(x, ids, "auto" if ids is None else "masked")
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((features * weight).sum(), list(parameters.values()), allow_unused=True)
    found = zip(parameters, grads, strict=True)
    return {"features": features.detach()} | {name.removeprefix("model."): g for name, g in found if g is not None}


# Against an obvious reference


def shown(x: Tensor, ids: Tensor) -> Tensor:
    """Booleans (b, 1, h, w): the sites of x (b, c, h, w) in visible patches."""
    visible = ids_to_booleans(ids, GRID[0] * GRID[1]).view(-1, 1, *GRID).double()
    return F.interpolate(visible, x.shape[2:], mode="nearest").bool()


def spark(module: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """Compute modules one by one as SparK's layers do, hidden sites zero after each; `forward` runs no hooks."""
    mask = shown(x, ids)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        sites = x.permute(0, 2, 3, 1)[mask[:, 0]]  # (n, c) of all images
        var, mean = torch.var_mean(sites, 0, correction=0)
        if not module.training:
            assert module.running_mean is not None
            assert module.running_var is not None
            var, mean = module.running_var, module.running_mean
        out = (x - mean[:, None, None]) / (var + module.eps).sqrt()[:, None, None]
        out = out * module.weight[:, None, None] + module.bias[:, None, None]
        act = getattr(module, "act", None)
        return (F.silu(out) if isinstance(act, nn.SiLU) else out) * mask
    if isinstance(module, SqueezeExcite):
        gates = []
        for image, visible in zip(x, mask, strict=True):
            mean = image[:, visible[0]].mean(1)[None, :, None, None]
            hidden = F.silu(module.conv_reduce.forward(mean))
            gates.append(module.conv_expand.forward(hidden).sigmoid())
        return x * torch.cat(gates)
    children = dict(module.named_children())
    if not children:
        out = F.relu(x) if isinstance(module, nn.ReLU) else module.forward(x)
        return out * shown(out, ids)
    after = next((children.pop(name) for name in ("act2", "act3") if name in list(children)[-2:]), None)
    downsample = children.pop("downsample", None)
    out = x
    for child in children.values():
        out = spark(child, out, ids)
    residual = after is not None or getattr(module, "has_skip", False)
    if residual:
        out = out + (spark(downsample, x, ids) if downsample else x)
    return spark(after, out, ids) if after else out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_features_and_gradients_are_those_of_sparks_layers_one_by_one(name: str, training: bool) -> None:
    network, x, ids = small(name).train(training), images(), some_ids(2, 6, 3)
    found = features_and_gradients(network, x, ids)
    trunk = nn.Sequential(*[m for n, m in network.model.named_children() if n not in ("global_pool", "fc")])
    features = spark(trunk, x * shown(x, ids), ids).permute(0, 2, 3, 1)
    assert relative_error(found["features"], features) < 1e-10
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (features * weight).sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in found.values())
    for parameter_name, parameter in network.model.named_parameters():  # of a bias before batch norm it is zero
        assert parameter.grad is not None
        assert float((found[parameter_name] - parameter.grad).abs().max()) < 1e-10 * scale, parameter_name


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny", "convnext_atto", "convnext_tiny"])
def test_timms_convnext_is_ours_on_visible_patches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depths, dims = TINY
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depths=depths, dims=dims))
    network = randomise(TimmNetwork(name).double())
    ours = ConvNeXt(TINY, version=2 if "v2" in name else 1).double()
    ours.load_state_dict(from_timm({n: x for n, x in network.state_dict().items() if not n.startswith("head.")}))
    x, ids = images(), some_ids(2, 6, 3)
    theirs, found = (features_and_gradients(net, x, ids) for net in (network, ours))
    assert relative_error(theirs.pop("features"), found.pop("features")) < 1e-10
    theirs = from_timm(theirs)
    found = {name: gradient for name, gradient in found.items() if not name.startswith("norm.")}
    assert theirs.keys() == found.keys()
    assert all(relative_error(theirs[name], found[name]) < 1e-9 for name in found)


def test_a_module_of_maps_with_channels_last_is_given_visible_sites_too() -> None:
    norm = randomise(GlobalResponseNorm(5).double())
    masking = Masking()
    masking.attach(norm)
    x, ids = torch.randn(2, 4, 6, 5, dtype=torch.float64), some_ids(2, 6, 3)
    mask = shown(x.permute(0, 3, 1, 2), ids)[:, 0]
    masking.grid, masking.visible_ids = GRID, ids
    found = norm(x)
    alone = torch.stack([norm.forward(image[at][None, None])[0, 0] for image, at in zip(x, mask, strict=True)])
    assert relative_error(found[mask], alone.flatten(0, 1)) < 1e-12
    assert not found[~mask].any()


# Properties


@pytest.mark.parametrize("name", SMALL)
def test_hidden_pixels_never_reach_loss_or_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = FCMAE(f"timm/{name}", decoder_dim=16).double()
    x, ids = images(), some_ids(2, 6, 2)
    hidden = torch.where(shown(x, ids), x, torch.nan)
    grads = []
    for pixels in (x, hidden):
        encoded = model._encode(pixels, ids)[-1]
        model.zero_grad()
        encoded.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert model(x, ids).loss.isfinite()


def test_all_visible_is_timms_dense_network() -> None:
    for name in SMALL:
        network, x = small(name, num_classes=7), images()
        plain: Any = timm.create_model(name, num_classes=7).double().eval()
        plain.load_state_dict(network.state_dict())  # in timm's own names
        everything = torch.arange(6).repeat(2, 1)
        for ids in (None, everything):
            maps = network.feature_maps(x, ids)
            assert [m.shape[1] for m in maps] == [16, 8, 4, 2]
            assert tuple(m.shape[3] for m in maps) == network.dims
            assert relative_error(maps[-1].permute(0, 3, 1, 2), plain.forward_features(x)) < 1e-12
        assert relative_error(network(x), plain(x)) < 1e-12


def test_batch_norm_counts_visible_sites_alone() -> None:
    network, x, ids = small(), images(), some_ids(2, 6, 2)
    norm = network.model.bn1
    norm.momentum, norm.running_mean[:] = 1.0, 0.0
    seen: list[Tensor] = []
    network.train()
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    network.features(x, ids)
    assert seen[0].shape[2:] == (2 * 16 * 16, 1)  # the stem's sites of two patches
    assert relative_error(norm.running_mean, seen[0].mean((0, 2, 3))) < 1e-12


def test_a_copy_computes_by_its_own_visibility() -> None:
    network, x, ids = small(), images(), some_ids(2, 6, 3)
    other = copy.deepcopy(network)
    assert torch.equal(network.features(x, ids), other.features(x, ids))
    network.masking.visible_ids = ids  # as in the middle of a call
    assert torch.equal(other.features(x), small_dense := other.model.forward_features(x).permute(0, 2, 3, 1))
    assert not torch.equal(other.features(x, ids), small_dense)


def test_a_call_that_fails_leaves_no_mask_behind() -> None:
    network, x, ids = small(), images(), some_ids(2, 6, 3)
    before = network(x)
    handle = network.model.layer3.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.features(x, ids)
    handle.remove()
    assert torch.equal(network(x), before)


def test_hooks_are_traced_in_one_graph() -> None:
    stem, masking = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)).double(), Masking()
    masking.attach(stem)

    def features(x: Tensor, ids: Tensor) -> Tensor:
        masking.grid, masking.visible_ids = GRID, ids
        try:
            return masking.hide_sites(stem(x))
        finally:
            masking.visible_ids = None

    x, ids = images(), some_ids(2, 6, 2)
    traced = torch.compile(features, fullgraph=True, backend="eager")
    assert relative_error(traced(x, ids), features(x, ids)) < 1e-12


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "timm/resnet5o"}, "did you mean timm/resnet50"),
        ({"variant": "timm/vit_tiny_patch16_224"}, "total strides 4, 8, 16 and 32"),
        ({"variant": "timm/edgenext_xx_small"}, "attention or average over the whole map"),
        ({"variant": "timm/skresnet18"}, "attention or average over the whole map"),
        ({"variant": "timm/test_resnet", "version": 1}, "model.version"),
        ({"variant": "timm/test_resnet", "stem_stride": 2}, "model.stem_stride"),
        ({"variant": "timm/test_resnet", "response": "none"}, "model.response"),
        ({"variant": "timm/test_resnet", "grn": {"aggregation": "l1"}}, "model.grn"),
        ({"variant": "torchvision/resnet50"}, "timm/NAME"),
        ({"variant": "resnet50"}, "timm/NAME"),
    ],
)
def test_what_a_network_is_not_for_is_said_in_one_line(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        build_network(**arguments)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_layouts_and_checkpointing_that_timm_networks_lack_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'packed'.*auto or masked"):
        FCMAE("timm/test_resnet", layout="packed")
    with pytest.raises(ValueError, match="gradient checkpointing"):
        small().gradient_checkpointing = True


# Through a whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 8)):
        pixels = rng.integers(0, 256, (number, 64, 64, 3), dtype=np.uint8)
        save_arrays(root / split, pixels, np.arange(number) % 2, ("cat", "dog"))
    return root


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates of timm's smallest network, the second half of it resumed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = run.with_suffix(".yaml")
    config.write_text(
        f"""
output: {run}
resume: auto
model: {{variant: timm/test_resnet, decoder_dim: 16}}
data: {{name: arrays, root: {data}, image_size: 64, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.01, warmup_epochs: 0}}
train: {{max_steps: 3}}
checkpoint: {{every_steps: 2}}
visualize: {{num_images: 1}}
eval: {{knn_every_epochs: 100}}
"""
    )
    with pytest.MonkeyPatch.context() as patch:  # stopped after its first checkpoint
        patch.setattr("fcmae.training.trainer.Trainer.update", stop_at(3))
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(["--config", str(config)])
    assert run_main(pretrain.main, "--config", str(config)) == 0
    return run


def stop_at(calls: int) -> Callable[[Trainer, Iterator[Any]], None]:
    """`Trainer.update`, interrupted at this call."""
    update, made = Trainer.update, iter(range(1, calls))

    def stopping(self: Trainer, batches: Iterator[Any]) -> None:
        if next(made, None) is None:
            raise KeyboardInterrupt
        update(self, batches)

    return stopping


def test_a_pretrained_encoder_goes_into_timm(pretrained: Path) -> None:
    ours, x = load_encoder(pretrained).eval(), images().float()
    theirs = timm.create_model(f"local-dir:{pretrained / 'encoder'}", pretrained=True).eval()
    assert relative_error(theirs(x), ours(x)) < 1e-6
    again = load_encoder(pretrained / "encoder").eval()
    assert again.variant == "timm/test_resnet"
    assert torch.equal(again(x), ours(x))
    assert (pretrained / "reconstructions" / "step-00000003.png").is_file()


def test_a_pretrained_network_is_fine_tuned_evaluated_and_predicts(
    pretrained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "classifier"
    arguments = (
        *("--config", "finetune/small-folder-cpu", f"init_from={pretrained}", f"output={run}"),
        *("data.name=arrays", f"data.root={data}", "data.batch_size=8", "data.num_workers=0", "train.max_steps=2"),
        *("data.auto_augment=null", "eval.every_epochs=1"),
    )
    assert "optim.layer_decay" in error_line(finetune.main, capsys, *arguments, "optim.layer_decay=0.9")
    assert run_main(finetune.main, *arguments, "optim.layer_decay=1") == 0
    weights = load_weights(run)
    assert (weights.network["variant"], weights.num_classes) == ("timm/test_resnet", 2)
    classifier, x = load_encoder(run).eval(), images().float()
    theirs = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    assert relative_error(theirs(x), classifier(x)) < 1e-6
    assert load_weights(run / "model").preprocessing.class_names == ("cat", "dog")
    assert run_main(finetune.main, "--evaluate", str(run)) == 0
    capsys.readouterr()
    photo = Path("docs/photos/bird.jpg").resolve()
    assert run_main(predict.main, str(run), str(photo), "--json") == 0
    assert {c["name"] for c in json.loads(capsys.readouterr().out)[0]["classes"]} == {"cat", "dog"}
    assert "model.variant" in error_line(
        finetune.main, capsys, *arguments, "optim.layer_decay=1", "model.variant=atto", f"output={run}-2"
    )


def test_features_are_probed_beside_a_random_network(
    pretrained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, str(pretrained), "--knn", "--baseline", "--json") == 0
    assert "baseline" in json.loads(capsys.readouterr().out)


def test_a_pretrained_network_goes_on_pretraining(pretrained: Path) -> None:
    config = ModelSection(variant="timm/test_resnet", decoder_dim=16)
    model = FCMAE(**config.model_dump())
    assert "with its decoder" in pretrain.start_from(model, config, str(pretrained))
    assert "new decoder" in pretrain.start_from(model, config, str(pretrained / "encoder"))


def test_a_timm_network_is_exported_as_it_can_be(pretrained: Path, tmp_path: Path) -> None:
    weights = load_weights(pretrained)
    for form in ("timm", "plain"):
        assert export(weights, form, tmp_path / form).difference <= 1e-10
    assert load_weights(tmp_path / "plain").network["variant"] == "timm/test_resnet"
    with pytest.raises(UserError, match="take timm, plain, onnx, torch-export"):
        export(weights, "official", tmp_path / "official")


def test_a_folder_says_when_timms_convnext_is_meant(tmp_path: Path) -> None:
    network = TimmNetwork("test_convnext", num_classes=3).eval()
    write_folder(network, Preprocessing(), tmp_path)
    assert load_encoder(tmp_path).variant == "timm/test_convnext"
