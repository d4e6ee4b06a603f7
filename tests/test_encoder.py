"""The encoder is the official ConvNeXt, V1 and V2: sizes, names, LayerScale, GRN, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, gradients, randomise, relative_error, small_encoder, smooth_images, some_ids
from torch import nn

from fcmae.encoder.convnext import VARIANTS, ConvNeXt, Layout, Variant, Version
from fcmae.encoder.layouts import DenseSites
from fcmae.encoder.responses import GRN
from fcmae.model import FCMAE
from fcmae.training.optim import build_adamw, layer_scales

COUNTS = {
    # variant: classifier of 1000 classes, encoder, decoder side (official code, 224 px, decoder of 512 x 1)
    "atto": (3_708_400, 3_386_760, 3_871_232),
    "femto": (5_233_240, 4_847_472, 3_904_000),
    "pico": (9_066_280, 8_552_256, 3_969_536),
    "nano": (15_623_800, 14_981_520, 4_035_072),
    "tiny": (28_635_496, 27_864_960, 4_100_608),
    "base": (88_717_800, 87_690_752, 4_231_680),
    "large": (197_956_840, 196_416_768, 4_493_824),
    "huge": (660_289_640, 657_467_008, 5_149_184),
}


COUNTS_V1 = {
    # variant: classifier of 1000 classes (timm and the official code)
    "atto": 3_695_520,
    "femto": 5_217_784,
    "pico": 9_045_672,
    "nano": 15_593_560,
    "tiny": 28_589_128,
    "small": 50_223_688,
    "base": 88_591_464,
    "large": 197_767_336,
    "xlarge": 350_196_968,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def official_block(prefix: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.dwconv.weight": (dim, 1, 7, 7),
        f"{prefix}.dwconv.bias": (dim,),
        f"{prefix}.norm.weight": (dim,),
        f"{prefix}.norm.bias": (dim,),
        f"{prefix}.pwconv1.weight": (4 * dim, dim),
        f"{prefix}.pwconv1.bias": (4 * dim,),
        f"{prefix}.grn.gamma": (1, 1, 1, 4 * dim),
        f"{prefix}.grn.beta": (1, 1, 1, 4 * dim),
        f"{prefix}.pwconv2.weight": (dim, 4 * dim),
        f"{prefix}.pwconv2.bias": (dim,),
    }


def official_encoder(
    depths: tuple[int, ...], dims: tuple[int, ...], in_chans: int, stem: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "downsample_layers.0.0.weight": (dims[0], in_chans, stem, stem),
        "downsample_layers.0.0.bias": (dims[0],),
        "downsample_layers.0.1.weight": (dims[0],),
        "downsample_layers.0.1.bias": (dims[0],),
    }
    for i in (1, 2, 3):
        shapes |= {
            f"downsample_layers.{i}.0.weight": (dims[i - 1],),
            f"downsample_layers.{i}.0.bias": (dims[i - 1],),
            f"downsample_layers.{i}.1.weight": (dims[i], dims[i - 1], 2, 2),
            f"downsample_layers.{i}.1.bias": (dims[i],),
        }
    for i in range(4):
        for j in range(depths[i]):
            shapes |= official_block(f"stages.{i}.{j}", dims[i])
    return shapes


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts_are_the_official_ones(variant: str) -> None:
    with torch.device("meta"):
        model = FCMAE(variant)
        classifier = ConvNeXt(variant, num_classes=1000)
    assert (count(classifier), count(model.encoder), count(model.decoder)) == COUNTS[variant]


@pytest.mark.parametrize("variant", COUNTS_V1)
def test_parameter_counts_of_version_1_are_the_official_ones(variant: str) -> None:
    with torch.device("meta"):
        assert count(ConvNeXt(variant, version=1, num_classes=1000)) == COUNTS_V1[variant]


def test_the_variants_are_those_of_both_papers_and_timms_small_ones() -> None:
    assert VARIANTS.keys() == COUNTS.keys() | COUNTS_V1.keys()


def test_a_block_of_version_1_is_the_papers_formula() -> None:
    encoder = small_encoder(version=1)
    block, sites = encoder.stages[1][0], DenseSites((5, 4))  # pyright: ignore[reportIndexIssue]
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    conv = block.dwconv
    h = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=16).permute(0, 2, 3, 1)
    h = F.layer_norm(h, (16,), block.norm.weight, block.norm.bias, 1e-6)
    h = F.gelu(h @ block.pwconv1.weight.T + block.pwconv1.bias) @ block.pwconv2.weight.T + block.pwconv2.bias
    assert relative_error(block(x, sites), x + block.gamma * h) <= 1e-12
    fresh = ConvNeXt(TINY, version=1)
    assert all(torch.equal(p, torch.full_like(p, 1e-6)) for n, p in fresh.named_parameters() if "gamma" in n)
    assert not any("grn" in name for name in fresh.state_dict())


def test_layer_scale_takes_no_weight_decay_and_the_rate_of_its_block() -> None:
    encoder = ConvNeXt(TINY, version=1, num_classes=3)
    scales = layer_scales((name for name, _ in encoder.named_parameters()), TINY[0], decay=0.5, decay_type="single")
    optimizer = build_adamw(encoder, weight_decay=0.1, betas=(0.9, 0.95), scales=scales)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0)):
        block = encoder.stages[i][j]  # pyright: ignore[reportIndexIssue]
        gamma, weight = groups[id(block.gamma)], groups[id(block.pwconv1.weight)]
        assert (gamma["weight_decay"], weight["weight_decay"]) == (0, 0.1)
        assert gamma["lr_scale"] == weight["lr_scale"]


@pytest.mark.parametrize(
    ("variant", "in_chans", "stem_stride"), [("atto", 3, 4), ("tiny", 3, 4), (TINY, 5, 2), (TINY, 1, 1)]
)
def test_state_dict_has_the_official_names_and_shapes(variant: Variant, in_chans: int, stem_stride: int) -> None:
    depths, dims = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device("meta"):
        encoder = ConvNeXt(variant, in_chans=in_chans, stem_stride=stem_stride)
        classifier = ConvNeXt(variant, in_chans=in_chans, stem_stride=stem_stride, num_classes=7)
    official = official_encoder(depths, dims, in_chans, stem_stride)
    head = {"norm.weight": dims[-1:], "norm.bias": dims[-1:], "head.weight": (7, dims[-1]), "head.bias": (7,)}
    assert shapes_of(encoder) == official
    assert shapes_of(classifier) == official | head


def test_decoder_has_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        model = FCMAE("atto", decoder_depth=2)
    shapes: dict[str, tuple[int, ...]] = {
        "proj.weight": (512, 320, 1, 1),
        "proj.bias": (512,),
        "mask_token": (1, 512, 1, 1),
        "pred.weight": (3072, 512, 1, 1),
        "pred.bias": (3072,),
    }
    assert shapes_of(model.decoder) == shapes | official_block("decoder.0", 512) | official_block("decoder.1", 512)


def test_grn_is_algorithm_1_of_the_paper() -> None:
    def algorithm_1(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        gx = np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))
        nx = gx / (gx.mean(axis=-1, keepdims=True) + 1e-6)
        return gamma * (x * nx) + beta + x

    grn = randomise(GRN(6).double())
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    expected = algorithm_1(x.numpy(), grn.gamma.detach().numpy(), grn.beta.detach().numpy())
    assert relative_error(grn(x, DenseSites((4, 5))), torch.from_numpy(expected)) <= 1e-14


def test_grn_is_the_identity_at_initialisation() -> None:
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(GRN(6)(x, DenseSites((4, 5))), x)


def test_linear_and_convolution_weights_start_at_std_0_02_and_biases_at_zero() -> None:
    encoder = ConvNeXt("atto", num_classes=10)
    for name, p in encoder.named_parameters():
        if name.endswith(("bias", "gamma", "beta")):
            assert not p.any(), name
        elif p.ndim > 1 and p.numel() > 2000:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_pyramid_has_four_maps_each_half_as_fine() -> None:
    encoder = small_encoder()
    images = smooth_images(2, 3, 96, 160)
    maps = encoder.pyramid(images)
    assert [tuple(x.shape) for x in maps] == [
        (2, 8, 24, 40),
        (2, 16, 12, 20),
        (2, 24, 6, 10),
        (2, 32, 3, 5),
    ]
    assert torch.equal(maps[-1].permute(0, 2, 3, 1), encoder.features(images))


def test_without_classes_the_output_is_pooled_and_normalised() -> None:
    encoder = small_encoder()
    images = smooth_images(2, 3, 96, 160)
    pooled = encoder.features(images).mean((1, 2))
    expected = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert relative_error(encoder(images), expected) <= 1e-12


def test_with_classes_the_output_is_the_head_over_the_norm_over_the_mean() -> None:
    encoder = small_encoder(num_classes=5)
    images = smooth_images(2, 3, 64, 64)
    pooled = encoder.features(images).mean((1, 2))
    normed = F.layer_norm(pooled, (32,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    assert isinstance(encoder.head, nn.Linear)
    expected = normed @ encoder.head.weight.T + encoder.head.bias
    assert relative_error(encoder(images), expected) <= 1e-12
    assert all(grad.abs().max() > 0 for grad in gradients(encoder(images), encoder).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("version", "layout"), [(2, "dense"), (2, "masked"), (2, "packed"), (1, "dense"), (1, "packed")]
)
def test_autocast_is_close_to_float32_and_its_gradients_are_finite(
    version: Version, layout: Layout, dtype: torch.dtype
) -> None:
    encoder = small_encoder(stem_stride=2, version=version).float()
    images = smooth_images(2, 3, 64, 64, torch.float32)
    ids = None if layout == "dense" else some_ids(2, 16, 6)
    expected = encoder.features(images, ids, layout)
    with torch.autocast("cpu", dtype=dtype):
        features = encoder.features(images, ids, layout)
    assert relative_error(features.float(), expected) < 0.1
    grads = gradients(features.float() / features.numel(), encoder)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "nona"}, "unknown variant 'nona': choose from atto, femto"),
        ({"variant": ((1, 1, 1), (8, 16, 24))}, "four positive depths"),
        ({"variant": ((1, 1, 1, 0), (8, 16, 24, 32))}, "four positive depths"),
        ({"stem_stride": 3}, "stem_stride must be 4, 2 or 1, got 3"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": -0.1}, "drop_path"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNeXt(kwargs.pop("variant", TINY), **kwargs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"\(b, 3, height, width\), got \(2, 1, 64, 64\)"),
        ((3, 64, 64), r"\(b, 3, height, width\)"),
        ((2, 3, 31, 64), "31 x 64 pixels are smaller than a patch, 32"),
        ((2, 3, 64, 16), "64 x 16 pixels are smaller than a patch, 32"),
        ((2, 3, 0, 64), "0 x 64 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    encoder = ConvNeXt(TINY)
    for call in (encoder, encoder.features, encoder.pyramid):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((70, 64), "height 70 .* 32: the nearest sizes that are: 64 and 96"),
        ((64, 100), "width 100 .* 32: the nearest sizes that are: 96 and 128"),
        ((16, 64), "height 16 .* 32: the nearest sizes that are: 32 and 64"),
    ],
)
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_masked_images_are_whole_patches(layout: Layout, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNeXt(TINY).features(torch.zeros(2, 3, *size), torch.zeros(2, 1, dtype=torch.int64), layout)


@pytest.mark.parametrize(
    ("ids", "layout", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), "dense", "dense.* drop visible_ids"),
        (None, "packed", "'packed' needs visible_ids"),
        (None, "masked", "'masked' needs visible_ids"),
        (None, "sparse", "unknown layout 'sparse': choose from auto, dense, masked, packed"),
        (torch.zeros(2, 1, dtype=torch.int32), "packed", "int64"),
        (torch.zeros(2, 4, dtype=torch.bool), "packed", "int64"),
        (torch.zeros(4, dtype=torch.int64), "masked", "int64"),
        (torch.zeros(3, 1, dtype=torch.int64), "packed", "b = 2"),
        (torch.zeros(2, 0, dtype=torch.int64), "packed", "0 visible patches do not fit a grid of 2 x 2"),
        (torch.zeros(2, 5, dtype=torch.int64), "packed", "5 visible patches do not fit a grid of 2 x 2"),
    ],
)
def test_ids_and_layouts_that_do_not_fit_are_refused(
    ids: torch.Tensor | None, layout: Layout, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNeXt(TINY).features(torch.zeros(2, 3, 64, 64), ids, layout)
