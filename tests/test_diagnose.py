"""Feature collapse: figures against a slow reference and on maps made by hand, networks left as they were."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, error_line, randomise, records, run_main, small_encoder
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fcmae import FCMAE, ConvNeXt
from fcmae import pretrain as story
from fcmae.__main__ import run
from fcmae.commands.diagnose import TAPS as OFFERED
from fcmae.commands.diagnose import name_models
from fcmae.data import save_arrays
from fcmae.encoder.convnext import Block, set_fused
from fcmae.errors import UserError
from fcmae.evaluation import diagnose as module
from fcmae.evaluation.diagnose import (
    TAPS,
    LayerFigures,
    LayerStatistics,
    block_taps,
    cosine_distance,
    diagnose,
    effective_rank,
    maps_of,
    stage_distances,
    watching,
)
from fcmae.evaluation.diagnose_pictures import draw_channels, draw_collapse, montage
from fcmae.evaluation.subjects import open_images, open_subject
from fcmae.masking import sample_visible_ids
from fcmae.weights.base import Preprocessing
from fcmae.weights.timm import write_timm_folder

PHOTOS = str(ROOT / "docs" / "photos")


def slow_cosine_distance(maps: Tensor) -> float:
    """The paper's mean over all pairs of channels of one image's maps (n, c), pair by pair."""
    total = 0.0
    for a, b in itertools.product(maps.T, repeat=2):
        zeros = int(not a.any()) + int(not b.any())
        cos = {0: float(F.cosine_similarity(a, b, dim=0)), 1: 0.0, 2: 1.0}[zeros]
        total += (1 - cos) / 2
    return total / maps.shape[1] ** 2


def figures_of(*batches: Tensor) -> LayerFigures:
    """The figures of maps (b, n, c)."""
    statistics = LayerStatistics(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        statistics.update(batch)
    return statistics.figures()


# Statistics


@pytest.mark.parametrize("shape", [(2, 12, 7), (3, 1, 5), (1, 4, 1)])
def test_the_cosine_distance_is_the_slow_one(shape: tuple[int, int, int]) -> None:
    maps = torch.randn(shape, dtype=torch.float64) + 0.5
    maps[0, :, 0] = 0
    wanted = [slow_cosine_distance(image) for image in maps]
    assert cosine_distance(maps).tolist() == pytest.approx(wanted, abs=1e-12)
    assert cosine_distance(maps.float()).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_cosine_distance_of_maps_made_by_hand() -> None:
    one = torch.rand(1, 16, 1) + 0.1
    scales = torch.tensor([1.0, 2.0, 1e-6, 1e6])
    assert float(cosine_distance(one * scales)) == pytest.approx(0, abs=1e-6), "one map at several scales"
    assert float(cosine_distance(one * torch.tensor([1.0, -1.0, 3.0, -2.0]))) == pytest.approx(0.5), "opposite"
    assert float(cosine_distance(torch.eye(8)[None])) == pytest.approx(0.5 * 7 / 8), "orthogonal"
    assert float(cosine_distance(torch.zeros(1, 16, 4))) == 0, "all of them zero: the worst collapse"
    half = torch.cat([torch.eye(4), torch.zeros(4, 4)], 1)[None]  # 4 orthogonal channels, 4 zero ones
    assert float(cosine_distance(half)) == pytest.approx((64 - 4 - 16) / 64 / 2)


def test_dead_saturated_and_duplicate_channels_are_counted() -> None:
    torch.manual_seed(1)
    maps = torch.randn(6, 50, 10)
    maps[..., 0] = 0
    maps[..., 1] *= 1e-3  # never above 1 % of the rest
    maps[..., 2] = 3 + 0.1 * torch.randn(6, 50)
    maps[..., 3] = -3
    maps[..., 4] = 0.3  # flat, but not high
    maps[..., 5] = -2 * maps[..., 6] + 0.01 * torch.randn(6, 50)
    found = figures_of(*maps.split(4))
    assert (found.channels, found.compared) == (10, 10)
    assert found.dead == 2
    assert found.saturated == 2
    assert found.duplicates == 5, "the pair 5 and 6, and the three that are flat"
    assert found.shares["duplicates"] == 0.5
    dead = figures_of(torch.zeros(2, 4, 3))
    assert (dead.dead, dead.saturated, dead.duplicates, dead.effective_rank) == (3, 0, 0, 0.0)


def test_a_channel_alive_in_one_image_is_not_dead() -> None:
    maps = torch.randn(4, 9, 3)
    maps[:3, :, 0] = 0
    assert figures_of(*maps.split(1)).dead == 0


def test_the_effective_rank_counts_directions() -> None:
    signal = torch.randn(1, 4000, 3, dtype=torch.float64)
    assert figures_of(signal[..., :1] * torch.arange(1.0, 6.0) + 7).effective_rank == pytest.approx(1, abs=1e-3)
    mixed = signal @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:3]
    assert figures_of(mixed).effective_rank == pytest.approx(3, rel=0.01)
    values = torch.tensor([4.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.25))
    assert effective_rank(values.diag()) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_images_may_come_in_any_batches(mean: float) -> None:
    maps = torch.randn(7, 20, 12) * torch.rand(12) + mean
    whole, parts = figures_of(maps), figures_of(*maps.split(2))
    assert tuple(parts) == pytest.approx(tuple(whole), rel=1e-4)
    flat = maps.double().flatten(0, 1)
    assert parts.effective_rank == pytest.approx(effective_rank(flat.T.cov(correction=0)), rel=1e-4)
    assert parts.cosine_distance == pytest.approx(sum(map(slow_cosine_distance, maps)) / 7, abs=1e-5)


def test_wide_layers_are_compared_by_some_of_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPARED", 4)
    maps = torch.randn(2, 30, 10)
    maps[..., 5] = maps[..., 0]  # 0, 2, 5 and 7 are compared
    found = figures_of(maps)
    assert (found.channels, found.compared, found.duplicates) == (10, 4, 2)
    assert found.effective_rank <= 4
    assert found.cosine_distance == pytest.approx(sum(map(slow_cosine_distance, maps)) / 2, abs=1e-6), "of all"


def test_half_precision_is_summed_up_in_single() -> None:
    maps = torch.randn(2, 200, 6) + 2
    assert tuple(figures_of(maps.bfloat16())) == pytest.approx(tuple(figures_of(maps.bfloat16().float())))


# Where maps are taken


def by_hand(encoder: ConvNeXt, images: Tensor, tap: str) -> list[Tensor]:
    """The maps of all blocks (b, h, w, c), from the network's parts."""
    found: list[Tensor] = []
    sites: Any = encoder.sites(images, None, "dense")
    x = images
    for i, (layers, stage) in enumerate(zip(encoder.downsample_layers, encoder.stages, strict=True)):
        first, second = layers  # pyright: ignore
        x, sites = (second(sites.stem(x, first)), sites) if i == 0 else sites.downsample(first(x), second)
        for block in stage:  # pyright: ignore
            act = F.gelu(block.pwconv1(block.norm(block.dwconv(x, sites))))
            response = block.grn(act, sites)
            branch = block.pwconv2(response)
            x = x + (branch if block.gamma is None else block.gamma * branch)
            found.append({"act": act, "response": response, "block": x}[tap])
    return found


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("version", [1, 2])
def test_taps_are_the_maps_that_they_are_called(version: Any, tap: str) -> None:
    encoder = small_encoder(version=version, stem_stride=1)
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    with watching(encoder, block_taps(encoder, tap), seen.__setitem__):
        encoder.features(images)
    with torch.no_grad():
        wanted = by_hand(encoder, images, tap)
    assert list(seen) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    for x, y in zip(seen.values(), wanted, strict=True):
        assert torch.allclose(x, y, atol=1e-10)


@pytest.mark.parametrize("tap", TAPS)
def test_a_networks_figures_are_those_of_timms_with_its_weights(tap: str, tmp_path: Path) -> None:
    encoder = randomise(ConvNeXt(TINY), std=0.1)
    write_timm_folder(encoder, Preprocessing((0.5,) * 3, (0.2,) * 3, (64, 64)), tmp_path / "timm")
    ours, theirs = (open_subject(source) for source in (str(tmp_path / "timm"), f"timm:{tmp_path / 'timm'}"))
    assert ours.preprocessing[:4] == theirs.preprocessing[:4]
    images = torch.randn(2, 3, 64, 64)
    found = [
        list(
            diagnose(
                subject.network, block_taps(subject.network, tap), [lambda s=subject: s.encode(images)]
            ).values()
        )
        for subject in (ours, theirs)
    ]
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        assert a.cosine_distance == pytest.approx(b.cosine_distance, abs=1e-5)
        assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-3)
        assert a[:2] == b[:2]


@pytest.mark.parametrize(
    ("name", "kwargs", "channels"),
    [
        ("test_convnext", {}, 96),
        ("test_convnext", {"conv_mlp": True}, 96),
        ("test_resnet", {}, 32),
        ("test_efficientnet", {}, 24),
        ("test_vit", {"img_size": 64}, 192),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 24}, 96),
    ],
)
def test_timms_families_are_tapped_with_their_channels_last(
    name: str, kwargs: dict[str, Any], channels: int
) -> None:
    network = timm.create_model(name, **kwargs).eval()
    taps = block_taps(network, "act")
    seen: dict[str, Tensor] = {}
    with watching(network, taps, seen.__setitem__):
        network(torch.randn(1, 3, 64, 64))
    assert list(seen) == list(taps)
    assert next(iter(seen.values())).shape[-1] == channels


def test_only_visible_sites_count_where_patches_are_hidden() -> None:
    encoder = small_encoder(stem_stride=1)
    taps = block_taps(encoder, "act")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = sample_visible_ids(2, 16, 0.6)
    packed = diagnose(encoder, taps, [lambda: encoder.features(images, ids)])
    hidden = ~torch.zeros(2, 16, dtype=torch.bool).scatter(1, ids, True)
    hidden = hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(images), images)
    assert diagnose(encoder, taps, [lambda: encoder.features(other, ids)]) == packed
    assert next(iter(packed.values())).channels == 32


def state_of(network: nn.Module) -> list[object]:
    modes = [(module.training, getattr(module, "fused", None)) for module in network.modules()]
    return [modes, [len(m._forward_hooks) for m in network.modules()], [p.clone() for p in network.parameters()]]


@pytest.mark.parametrize("fails", [False, True])
def test_a_network_is_left_as_it_was(fails: bool) -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_dim=16, drop_path=0.5)
    set_fused(model.encoder.get_submodule("stages.0"), False)
    model.encoder.get_submodule("stages.1").eval()
    before, generator = state_of(model), torch.get_rng_state()
    size = 3 if fails else 32
    encoder = model.encoder
    taps = block_taps(encoder, "act")
    run = lambda: stage_distances(encoder.features, encoder, taps, [torch.ones(1, 3, size, size)])  # noqa: E731
    if fails:
        with pytest.raises(ValueError, match="smaller than a patch"):
            run()
    else:
        assert len(run()) == 4
    after = state_of(model)
    assert after[:2] == before[:2]
    assert all(map(torch.equal, after[2], before[2]))  # pyright: ignore
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_stages_distance_is_the_mean_of_its_blocks() -> None:
    encoder = small_encoder(stem_stride=1, version=1)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    taps = block_taps(encoder, "act")
    layers = diagnose(encoder, taps, [lambda: encoder.features(images)])
    distances = stage_distances(encoder.features, encoder, taps, images.split(2))
    assert distances[2] == pytest.approx(
        (layers["stages.2.0"].cosine_distance + layers["stages.2.1"].cosine_distance) / 2, rel=1e-6
    )


def test_a_collapsed_layer_is_told_from_a_healthy_one() -> None:
    encoder = ConvNeXt(TINY, stem_stride=1)
    sick = encoder.stages[2][1]  # pyright: ignore
    assert isinstance(sick, Block)
    nn.init.zeros_(sick.pwconv1.weight)
    nn.init.constant_(sick.pwconv1.bias, 2.0)
    images = torch.randn(2, 3, 32, 32)
    found = diagnose(encoder, block_taps(encoder, "act"), [lambda: encoder.features(images)])
    healthy, collapsed = found["stages.2.0"], found["stages.2.1"]
    assert healthy.cosine_distance > 0.4
    assert collapsed.cosine_distance == pytest.approx(0, abs=1e-5)
    assert collapsed.saturated == collapsed.duplicates == collapsed.channels == 96
    assert collapsed.effective_rank == 0
    assert healthy.saturated == healthy.duplicates == 0


# Pictures


def test_a_mosaic_shows_each_map_once() -> None:
    maps = torch.arange(3 * 4 * 7.0).view(3, 4, 7)
    mosaic = montage(maps)
    assert mosaic.shape == (4 * 4, 2 * 5)
    assert torch.equal(mosaic[:3, 5:9], maps[..., 1])
    assert sorted(mosaic[~mosaic.isnan()].tolist()) == sorted(maps.flatten().tolist())


@pytest.mark.parametrize("layers", [1, 5])
def test_pictures_are_drawn_for_any_number_of_layers(layers: int, tmp_path: Path) -> None:
    found = {f"layer{i}": LayerFigures(8, 8, 0.4, 1, 0, 0, 3.0) for i in range(layers)}
    models = {"one": found, "another of a long " + "name " * 20: dict(list(found.items())[:1])}
    for draw in (draw_collapse, draw_channels):
        path = tmp_path / f"{draw.__name__}.png"
        draw(models, "a title", path)
        assert Image.open(path).format == "PNG"


# The command


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    encoder = randomise(ConvNeXt(TINY, stem_stride=1), std=0.1)
    write_timm_folder(encoder, Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (32, 32)), folder)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_it(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(run, "diagnose", *map(str, arguments), "--num-workers", "0")
        out, err = capsys.readouterr()
        return code, out, err

    return run_it


def test_several_models_side_by_side(encoder_folder: Path, tmp_path: Path, call: Any) -> None:
    out = tmp_path / "out"
    model = f"mine={encoder_folder}"
    code, printed, err = call(model, "timm:test_resnet", "--data", PHOTOS, "--size", 32, "--output", out)
    assert code == 0, err
    written = ["channels.png", "collapse.png", "diagnosis.json", "maps-mine.png", "maps-timm-test_resnet.png"]
    assert sorted(path.name for path in out.iterdir()) == written
    report = json.loads((out / "diagnosis.json").read_text())
    mine, other = report["models"]["mine"], report["models"]["timm:test_resnet"]
    assert mine["images"] == other["images"] == 13
    assert mine["tap"] == TAPS["act"]
    assert other["tap"] == TAPS["block"]
    assert "untrained" in other["description"]
    assert list(mine["layers"]) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    assert set(mine["layers"]["stages.0.0"]) == set(LayerFigures._fields)
    assert f"{mine['layers']['stages.2.1']['cosine_distance']:.3f}" in printed
    assert "before GRN" in printed

    subject = open_subject(str(encoder_folder))
    images = open_images(PHOTOS, None, 1000, subject, torch.device("cpu"))
    taps = block_taps(subject.network, "act")
    found = diagnose(subject.network, taps, [lambda b=batch: subject.encode(b) for batch in images.batches(4, 0)])
    for name, layer in found.items():
        assert layer.cosine_distance == pytest.approx(mine["layers"][name]["cosine_distance"], abs=1e-5)
    assert {
        m.shape[-1] for m in maps_of(subject.network, taps, lambda: subject.encode(images.first())).values()
    } == {
        32,
        64,
        96,
        128,
    }


def test_a_folder_with_files_is_written_into_only_if_told(encoder_folder: Path, tmp_path: Path, call: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "collapse.png").write_text("mine")
    arguments = (encoder_folder, "--data", PHOTOS, "--images", 2, "--output", out)
    code, _, err = call(*arguments)
    assert code == 2
    assert err == f"error: --output {out}: not empty; name another folder, or add --overwrite\n"
    assert (out / "collapse.png").read_text() == "mine"
    assert call(*arguments, "--overwrite")[0] == 0
    assert Image.open(out / "collapse.png").format == "PNG"


def test_arrays_masks_and_named_layers(encoder_folder: Path, tmp_path: Path, call: Any) -> None:
    save_arrays(tmp_path / "arrays", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    arguments = (encoder_folder, "--data", tmp_path / "arrays", "--batch", 2, "--output", tmp_path / "out")
    code, printed, err = call(*arguments, "--masked", 0.6, "--layers", r"stages\.\d\.0\.pwconv1$")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    (model,) = report["models"].values()
    assert (report["masked"], model["images"]) == (0.6, 5)
    assert list(model["layers"]) == [f"stages.{i}.0.pwconv1" for i in range(4)]
    assert "60% of patches hidden" in printed


def test_deep_images_are_shown_between_their_percentiles(
    encoder_folder: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr("fcmae.evaluation.diagnose_pictures.draw_maps", lambda image, *_: shown.append(image))
    save_arrays(tmp_path / "arrays", np.random.default_rng(0).integers(1000, 2000, (2, 32, 32, 3), dtype=np.uint16))
    code, _, err = call(encoder_folder, "--data", tmp_path / "arrays", "--output", tmp_path / "out")
    assert code == 0, err
    assert (shown[0].amin().item(), shown[0].amax().item()) == (0, 1)
    assert 0.4 < shown[0].mean() < 0.6


def test_images_that_do_not_decode_are_left_out_and_counted(
    encoder_folder: Path, tmp_path: Path, call: Any
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 10, 200)).save(data / f"{i}.png")
    (data / "0.png").write_bytes(b"broken")
    code, _, err = call(encoder_folder, "--data", data, "--output", tmp_path / "out")
    assert code == 0
    assert f"{encoder_folder}: 1 images do not decode and are left out" in err
    (model,) = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["models"].values()
    assert (model["images"], model["unreadable_images"]) == (2, 1)


def test_timms_weights_come_from_a_file(tmp_path: Path) -> None:
    network: Any = timm.create_model("test_resnet", num_classes=5)
    nn.init.constant_(network.layer1[0].conv1.weight, 0.25)
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    opened = open_subject(f"timm:test_resnet@{tmp_path / 'resnet.safetensors'}")
    assert torch.equal(opened.network.state_dict()["layer1.0.conv1.weight"], network.layer1[0].conv1.weight)
    assert opened.preprocessing.image_size == (160, 160)
    with pytest.raises(UserError, match=r"resnet.safetensors: does not fit the model: \d+ tensors differ"):
        open_subject(f"timm:test_efficientnet@{tmp_path / 'resnet.safetensors'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["timm:resnet5000"], "timm:resnet5000: timm cannot build it"),
        (["timm:test_resnet", "--images", "0"], "--images 0: must be at least 1"),
        (["timm:test_resnet", "--size", "1", "2", "3"], "--size 1 2 3: give a side"),
        (["timm:test_resnet", "timm:test_resnet"], "timm:test_resnet: two models of this name"),
        (["timm:test_resnet", "--layers", "("], "--layers (: not a regular expression"),
        (["timm:test_resnet", "--layers", "nothing"], "matches --layers nothing; some of its"),
        (["timm:test_resnet", "--layers", "^layer4$", "--masked", "0.5"], "cannot leave out patches"),
        (["timm:test_mambaout", "--size", "64"], "none of its blocks is known: name layers with --layers"),
        (["timm:test_vit", "--size", "40"], "images of 40 x 40 px: Input height (40)"),
        (["timm:test_resnet", "--layers", "global_pool|^fc$"], "no layer ran"),
        (["ENCODER", "--masked", "1.5"], "--masked 1.5: mask_ratio must lie inside (0, 1)"),
        (["ENCODER", "--size", "20", "--masked", "0.5"], "not a multiple of the patch size 8"),
        (["ENCODER", "--size", "7"], "smaller than a patch"),
        (["ENCODER", "--split", "moon"], "--data="),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str],
    message: str,
    encoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(encoder_folder) if word == "ENCODER" else word for word in arguments]
    words = ["diagnose", *words, "--data", PHOTOS, "--output", str(tmp_path / "out"), "--num-workers", "0"]
    capsys.readouterr()
    assert run_main(run, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_names_are_given_before_an_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    named = name_models(["V1=runs/a", str(odd), "timm:test_resnet@x=y"])
    assert named == {"V1": "runs/a", str(odd): str(odd), "timm:test_resnet@x=y": "timm:test_resnet@x=y"}


def test_the_command_offers_the_taps_there_are() -> None:
    assert tuple(TAPS) == OFFERED


# Pretraining


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run of 6 steps of 4 images on a tiny network with everything random switched on."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    save_arrays(tmp_path / "data", images)
    return [
        *("--config", "small-folder-cpu", f"data.root={tmp_path / 'data'}", "data.name=arrays", "resume=never"),
        *("model.variant=[[1,1,1,1],[8,8,16,16]]", "model.stem_stride=1", "model.decoder_dim=16"),
        *("model.drop_path=0.3", "data.image_size=32", "data.batch_size=4", "data.num_workers=0"),
        *("optim.accumulate=1", "optim.warmup_epochs=1", "train.max_steps=6", "train.precision=no"),
        *("log.every_steps=1", "visualize.num_images=0"),
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def test_pretraining_logs_collapse_and_is_not_changed_by_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert run_main(story.main, *arguments, f"output={plain}") == 0
    assert run_main(story.main, *arguments, f"output={watched}", "eval.collapse_every_epochs=1") == 0
    assert losses(watched) == losses(plain)
    assert weights(watched) == weights(plain)
    logged = [record for record in records(watched) if "cosine_distance/stage_1" in record]
    assert [record["step"] for record in logged] == [0, 3, 6]
    assert all(set(record) == {"step", *(f"cosine_distance/stage_{i}" for i in range(1, 5))} for record in logged)
    assert all(0 < record["cosine_distance/stage_4"] < 0.5 for record in logged)
    assert not any("cosine" in key for record in records(plain) for key in record)


def test_an_interval_of_no_length_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(story.main, capsys, *arguments, "eval.collapse_every_epochs=0")
    assert "eval.collapse_every_epochs" in line
