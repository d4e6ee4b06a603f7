"""AdamW's groups: which parameters take weight decay, and at which share of the learning rate."""

import math
from typing import Literal

import pytest
import torch

from fcmae import FCMAE, VARIANTS, ConvNeXt
from fcmae.config import PretrainOptimSection
from fcmae.heads.segmentation import Segmenter
from fcmae.story import layer_rates
from fcmae.training.optim import build_adamw, exempt_from_decay, layer_scales


def test_only_matrices_and_kernels_take_weight_decay() -> None:
    model = FCMAE(((1, 1, 1, 1), (8, 8, 16, 16)), decoder_dim=16)
    exempt = {name for name, parameter in model.named_parameters() if exempt_from_decay(name, parameter)}
    decayed = {name for name, _ in model.named_parameters()} - exempt
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert "decoder.mask_token" in exempt
    assert "encoder.stages.0.0.grn.gamma" in exempt
    assert "encoder.downsample_layers.0.0.weight" in decayed
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {named[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {0.05: decayed, 0.0: exempt}
    assert isinstance(optimizer, torch.optim.AdamW)


def exponents(variant: str, decay_type: Literal["single", "group"]) -> dict[str, int]:
    """The power of the decay that scales the rate of each block, downsampling or other module."""
    with torch.device("meta"):
        model = ConvNeXt(variant, num_classes=10)
    names = [name for name, _ in model.named_parameters()]
    scales = layer_scales(names, model.depths, decay=0.5, decay_type=decay_type)
    powers: dict[str, int] = {}
    for name, scale in scales.items():
        parts = name.split(".")
        module = ".".join(parts[: {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)])
        power = round(-math.log2(scale))
        assert powers.setdefault(module, power) == power, f"{module} has parameters of several rates"
        assert scale == 0.5**power
    return powers


def test_the_rates_of_atto_fall_block_by_block() -> None:
    assert exponents("atto", "single") == {
        "downsample_layers.0": 12,
        "stages.0.0": 12,
        "stages.0.1": 11,
        "downsample_layers.1": 10,
        "stages.1.0": 10,
        "stages.1.1": 9,
        "downsample_layers.2": 8,
        "stages.2.0": 8,
        "stages.2.1": 7,
        "stages.2.2": 6,
        "stages.2.3": 5,
        "stages.2.4": 4,
        "stages.2.5": 3,
        "downsample_layers.3": 2,
        "stages.3.0": 2,
        "stages.3.1": 1,
        "norm": 0,
        "head": 0,
    }


def test_the_rates_of_base_in_groups_are_the_official_ones() -> None:
    powers = exponents("base", "group")
    expected = {f"stages.0.{i}": 12 for i in range(3)} | {f"stages.1.{i}": 11 for i in range(3)}
    expected |= {f"stages.2.{i}": 13 - (3 + i // 3) for i in range(27)} | {f"stages.3.{i}": 1 for i in range(3)}
    expected |= {f"downsample_layers.{i}": power for i, power in enumerate((13, 11, 10, 1))}
    assert powers == expected | {"norm": 0, "head": 0}
    assert layer_scales(["downsample_layers.0.0.weight"], (3, 3, 27, 3), decay=0.6, decay_type="group") == {
        "downsample_layers.0.0.weight": pytest.approx(0.6**13)
    }


def test_the_rates_of_atto_in_groups_need_six_layers() -> None:
    powers = exponents("atto", "group")
    assert {powers[f"stages.2.{i}"] for i in range(3)} == {3}
    assert {powers[f"stages.2.{i}"] for i in range(3, 6)} == {2}
    assert [powers[f"downsample_layers.{i}"] for i in range(4)] == [6, 4, 3, 1]
    assert [powers[f"stages.{i}.1"] for i in (0, 1, 3)] == [5, 4, 1]


@pytest.mark.parametrize("decay_type", ["single", "group"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rates_never_fall_towards_the_classifier(variant: str, decay_type: Literal["single", "group"]) -> None:
    powers = exponents(variant, decay_type)
    order: list[str] = []
    for i, depth in enumerate(VARIANTS[variant][0]):
        order += [f"downsample_layers.{i}", *(f"stages.{i}.{j}" for j in range(depth))]
    in_order = [powers[name] for name in order]
    assert in_order == sorted(in_order, reverse=True)
    assert set(in_order) == set(range(1, max(in_order) + 1))


def test_adamw_takes_each_scale_with_and_without_decay_and_leaves_out_what_is_frozen() -> None:
    model = ConvNeXt(((1, 1, 1, 1), (8, 8, 8, 8)), num_classes=3)
    scales = layer_scales((n for n, _ in model.named_parameters()), model.depths, decay=0.5, decay_type="single")
    model.stages[0].requires_grad_(False)
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.999), scales=scales)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {
        named[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(seen) == {name for name in scales if not name.startswith("stages.0.")}
    for name, (scale, decay) in seen.items():
        assert scale == scales[name]
        assert decay == (0.0 if exempt_from_decay(name, model.get_parameter(name)) else 0.1)


def test_in_pretraining_the_encoder_may_wait_and_its_lower_layers_learn_more_slowly() -> None:
    model = FCMAE(((1, 1, 2, 1), (8, 8, 16, 16)), decoder_dim=16)
    rates = layer_rates(model.encoder, PretrainOptimSection(layer_decay=0.5))
    scales = {f"encoder.{name}": rate for name, rate in rates.items()}
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95), scales=scales, waiting=("encoder.", 7))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for name in (named[id(p)] for p in group["params"]):
            assert group["first_step"] == (7 if name.startswith("encoder.") else 0)
            assert group["lr_scale"] == (scales[name] if name.startswith("encoder.") else 1.0)
    assert scales["encoder.stages.3.0.dwconv.weight"] == 0.5
    assert scales["encoder.downsample_layers.0.0.weight"] == 0.5**5


def test_a_segmenters_encoder_has_the_rates_of_a_classifiers_and_its_heads_the_full_one() -> None:
    with torch.device("meta"):
        encoder = ConvNeXt("base")
        model = Segmenter(encoder, 150, head="upernet", auxiliary=True)
    depths = model.layer_depths
    assert depths is not None
    for decay_type in ("single", "group"):
        alone = layer_scales(encoder.state_dict(), depths, decay=0.5, decay_type=decay_type)
        scales = layer_scales(model.state_dict(), depths, decay=0.5, decay_type=decay_type)
        heads = {name for name in scales if name.startswith(model.head_names)}
        assert {name: scales[name] for name in scales.keys() - heads} == {
            f"encoder.{name}": scale for name, scale in alone.items()
        }
        assert heads
        assert {scales[name] for name in heads} == {1.0}
