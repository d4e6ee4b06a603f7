"""Heads over the pyramid: sizes, published parameter counts, gradients; sliding windows against a plain loop."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.encoder.base import Network, Variant
from fcmae.encoder.networks import build_network
from fcmae.heads.segmentation import (
    HEADS,
    POOLED_SIDES,
    FCNHead,
    FPNHead,
    HeadName,
    Segmenter,
    UPerNetHead,
    pool_maps,
)
from fcmae.heads.windows import Strip, Windows, pixel_logits, resize_rows, slide, window_starts

DIMS = (8, 16, 24, 32)


def small(head: HeadName = "fpn", *, in_chans: int = 3, stem_stride: int = 2, auxiliary: bool = False) -> Segmenter:
    torch.manual_seed(0)
    encoder = build_network(((1, 1, 1, 1), DIMS), in_chans=in_chans, stem_stride=stem_stride)
    return Segmenter(encoder, 5, head=head, dim=16, auxiliary=auxiliary)


@pytest.mark.parametrize(
    ("variant", "version", "millions"),
    [
        *[("tiny", 1, 60), ("small", 1, 82), ("base", 1, 122), ("large", 1, 235), ("xlarge", 1, 391)],
        *[("base", 2, 122), ("large", 2, 235), ("huge", 2, 707)],
    ],
)
def test_upernet_has_as_many_parameters_as_were_published(variant: str, version: int, millions: int) -> None:
    """ADE20K tables of the papers of ConvNeXt and ConvNeXt V2, the second head included."""
    with torch.device("meta"):
        encoder = build_network(variant, version=1 if version == 1 else 2)
        model = Segmenter(encoder, 150, head="upernet", auxiliary=True)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 50), (16, 16), (5, 9)])
def test_every_pixel_of_an_image_of_any_size_gets_logits(head: HeadName, size: tuple[int, int]) -> None:
    model = small(head).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "variant", [((1, 1, 1, 1), DIMS), "timm/resnet10t", "roadmap/layernorm"], ids=["ours", "timm", "roadmap"]
)
def test_every_kind_of_network_has_a_pyramid(variant: str) -> None:
    encoder = build_network(variant).eval()
    maps = encoder.pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (dim, 64 // stride, 96 // stride) for dim, stride in zip(encoder.dims, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("head", [FPNHead, UPerNetHead])
def test_a_head_gives_logits_at_the_finest_map(head: type[FPNHead] | type[UPerNetHead]) -> None:
    maps = [torch.randn(2, dim, 32 >> i, 24 >> i) for i, dim in enumerate(DIMS)]
    assert head(DIMS, 7, dim=16)(maps).shape == (2, 7, 32, 24)
    assert FCNHead(DIMS, 7)(maps).shape == (2, 7, 8, 6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("variant", "options", "idle"),
    [
        (((1, 1, 1, 1), DIMS), {}, ""),
        (((1, 1, 1, 1), DIMS), {"version": 1}, ""),
        ("roadmap/resnet50", {}, ""),
        ("roadmap/convnext-tiny", {}, "norm"),
        ("timm/test_convnext", {}, "head.norm"),
        ("timm/test_efficientnet", {}, ""),
        ("timm/test_resnet", {}, ""),
        ("timm/mobilenetv3_small_050", {}, "conv_head"),
    ],
    ids=str,
)
def test_all_that_is_trained_gets_a_gradient_and_nothing_else_is(
    head: HeadName, variant: Variant, options: dict[str, Any], idle: str
) -> None:
    """As data-parallel training asks for; a norm or layer after the pooling is no part of a pyramid."""
    torch.manual_seed(0)
    model = Segmenter(build_network(variant, **options), 5, head=head, dim=16, auxiliary=True).train()
    logits, auxiliary = model(torch.randn(2, 3, 64, 96))
    (logits.square().mean() + auxiliary.square().mean()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    left = {name.replace(".model.", ".") for name, _ in model.named_parameters() if name not in trained}
    assert left == {f"encoder.{idle}.{part}" for part in ("weight", "bias") if idle}


def test_the_norm_of_a_classifier_stays_and_is_not_trained() -> None:
    encoder = small().encoder
    encoder.norm = nn.LayerNorm(DIMS[-1])  # as `build_encoder` leaves it where there was a classifier
    model = Segmenter(encoder, 5)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "encoder.norm.weight",
        "encoder.norm.bias",
    ]


def test_a_segmenter_is_a_network_like_its_encoder() -> None:
    model = small(in_chans=5, auxiliary=True)
    encoder = model.encoder
    assert isinstance(model, Network)
    for name in ("family", "variant", "in_chans", "patch_size", "dims", "arguments", "layer_depths"):
        assert getattr(model, name) == getattr(encoder, name)
    images = torch.randn(1, 5, 32, 48)
    assert all(map(torch.equal, model.pyramid(images), encoder.pyramid(images)))
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {"encoder", *(name.rstrip(".") for name in model.head_names)}
    assert f"{model.classifier}.weight" in model.state_dict()
    assert model.classifier_layer is model.get_submodule(model.classifier)
    model.gradient_checkpointing = True
    assert encoder.gradient_checkpointing
    assert model.gradient_checkpointing


def test_gradient_checkpointing_changes_no_gradient() -> None:
    images, found = torch.randn(2, 3, 32, 48), []
    for again in (False, True):
        model = small().train()
        model.gradient_checkpointing = again
        torch.manual_seed(1)
        model(images).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for once, twice in zip(*found, strict=True):
        assert torch.allclose(once, twice, atol=1e-6)


def test_a_frozen_encoder_stays_as_it_is_while_the_heads_are_trained() -> None:
    torch.manual_seed(0)
    model = Segmenter(build_network("timm/test_resnet", drop_path=0.5), 5, dim=16, auxiliary=True)
    model.train().freeze()
    before = {name: x.clone() for name, x in model.encoder.state_dict().items()}
    for training in (True, False, True):  # as around an evaluation
        model.train(training)
        assert model.head.training is training
        assert not model.encoder.training
    logits, auxiliary = model(torch.randn(2, 3, 64, 64))
    (logits.mean() + auxiliary.mean()).backward()
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "head",
        "auxiliary",
    }
    assert all(torch.equal(x, before[name]) for name, x in model.encoder.state_dict().items())  # running statistics
    assert model.train(True).training


def test_a_frozen_classifier_trains_its_last_layer_alone() -> None:
    model = build_network(((1, 1, 1, 1), DIMS), num_classes=3).train()
    model.freeze()
    assert not model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_second_head_works_in_training_alone() -> None:
    model = small(auxiliary=True)
    logits, auxiliary = model.train()(torch.randn(1, 3, 40, 64))
    assert logits.shape == auxiliary.shape == (1, 5, 40, 64)
    assert isinstance(model.eval()(torch.randn(1, 3, 40, 64)), Tensor)


@pytest.mark.parametrize("head", HEADS)
def test_an_image_has_the_same_logits_whatever_its_batch(head: HeadName) -> None:
    model, images = small(head).eval(), torch.randn(3, 3, 64, 64)
    assert torch.allclose(model(images)[1:2], model(images[1:2]), atol=1e-5)


def test_an_unknown_head_is_refused() -> None:
    encoder = build_network(((1, 1, 1, 1), DIMS))
    with pytest.raises(ValueError, match="no head 'deeplab': choose from fpn, upernet"):
        Segmenter(encoder, 5, head="deeplab")  # pyright: ignore
    with pytest.raises(ValueError, match="no classifier: build it with num_classes=0"):
        Segmenter(build_network(((1, 1, 1, 1), DIMS), num_classes=3), 5)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 7), (6, 12), (13, 8)])
@pytest.mark.parametrize("side", POOLED_SIDES)
def test_maps_are_pooled_as_torch_pools_them(side: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, side, side, dtype=torch.float64)
    found, wanted = pool_maps(x, side), F.adaptive_avg_pool2d(x, side)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((found * weight).sum(), x)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), x)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)


# Sliding windows


class Local(nn.Module):
    """Logits of a window that depend on where in it a pixel lies, as those of a network with borders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, padding=2)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape))
        ramp = torch.linspace(0, 1, images.shape[-1]) + torch.linspace(0, 2, images.shape[-2])[:, None]
        return self.conv(images) * (1 + ramp)


def plain_slide(network: nn.Module, images: Tensor, windows: Windows) -> Tensor:
    """Average the logits of all windows, pixel by pixel, in all of the memory that takes."""
    (tall, wide), (down, across), _ = windows
    height, width = images.shape[-2:]
    images = F.pad(images, (0, max(0, wide - width), 0, max(0, tall - height)))
    total, count = torch.zeros(len(images), 4, *images.shape[-2:]), torch.zeros(images.shape[-2:])
    for i, j in product(range(0, height, down), range(0, width, across)):
        top, left = min(i, images.shape[-2] - tall), min(j, images.shape[-1] - wide)
        if (i and i - down + tall >= images.shape[-2]) or (j and j - across + wide >= images.shape[-1]):
            continue  # the window before reached the end
        total[..., top : top + tall, left : left + wide] += network(
            images[..., top : top + tall, left : left + wide]
        )
        count[top : top + tall, left : left + wide] += 1
    assert count.min() > 0
    return (total / count)[..., :height, :width]


def stacked(strips: Iterator[Strip]) -> Tensor:
    found, row = [], 0
    for strip in strips:
        assert strip.top == row
        row += strip.logits.shape[2]
        found.append(strip.logits)
    return torch.cat(found, 2)


@pytest.mark.parametrize(
    ("size", "windows"),
    [
        ((40, 60), Windows((16, 16), (8, 8))),
        ((41, 59), Windows((16, 24), (11, 7), batch_size=3)),
        ((32, 32), Windows((32, 32), (16, 16))),
        ((33, 17), Windows((16, 16), (16, 16))),
        ((10, 50), Windows((16, 16), (9, 9))),
        ((5, 7), Windows((16, 16), (8, 8))),
        ((30, 30), Windows((7, 9), (1, 2), batch_size=100)),
    ],
)
@torch.no_grad()
def test_windows_are_averaged_as_a_plain_loop_averages_them(size: tuple[int, int], windows: Windows) -> None:
    network, images = Local(), torch.randn(2, 3, *size)
    found = stacked(slide(network, images, windows))
    assert found.shape == (2, 4, *size)
    assert all(shape[2:] == windows.window and shape[0] <= windows.batch_size for shape in network.sizes)
    assert torch.allclose(found, plain_slide(network, images, windows), atol=1e-5)


@torch.no_grad()
def test_one_row_of_windows_is_in_memory_at_a_time() -> None:
    rows = [
        strip.logits.shape[2] for strip in slide(Local(), torch.randn(1, 3, 400, 20), Windows((16, 16), (8, 8)))
    ]
    assert sum(rows) == 400
    assert max(rows) <= 16
    assert len(rows) == 49


def test_windows_cover_a_length_and_end_where_it_ends() -> None:
    for length, window, stride in product(range(1, 40), (1, 4, 7), (1, 2, 3, 4, 7)):
        if stride <= window:
            starts = window_starts(length, window, stride)
            assert starts == sorted(set(starts))
            covered = {i for start in starts for i in range(start, start + window)}
            assert covered == set(range(max(length, window)))


def test_windows_with_gaps_are_refused() -> None:
    for stride in ((17, 8), (8, 0)):
        with pytest.raises(ValueError, match="leaves gaps between windows"):
            next(slide(Local(), torch.randn(1, 3, 40, 40), Windows((16, 16), stride)))


@pytest.mark.parametrize(("size", "wanted"), [((30, 40), (200, 90)), ((30, 40), (7, 130)), ((1, 1), (70, 3))])
def test_rows_are_resized_as_all_at_once(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    logits = torch.randn(2, 3, *size)
    found = stacked(resize_rows(logits, wanted))
    assert torch.allclose(found, F.interpolate(logits, wanted, mode="bilinear"), atol=1e-5)


@torch.no_grad()
def test_whole_images_are_one_strip_and_resized_ones_come_back_in_their_own_size() -> None:
    network, images = Local(), torch.randn(1, 3, 30, 40)
    assert torch.equal(stacked(pixel_logits(network, images)), network(images))
    for windows in (None, Windows((16, 16), (8, 8))):
        assert stacked(pixel_logits(network, images, windows, short_side=60)).shape == (1, 4, 30, 40)
    assert network.sizes[2][2:] == (60, 80)
