"""What can stand at GRN's place: exact under masking in every layout, and as libraries compute it."""

from typing import Any

import pytest
import timm.layers.squeeze_excite
import torch
import torch.nn.functional as F
from conftest import (
    assert_same,
    features_and_gradients,
    gradients,
    randomise,
    relative_error,
    small_encoder,
    some_ids,
)
from test_layouts import MINKOWSKI, pixels_of
from torch import Tensor, nn

from fcmae.encoder.convnext import ConvNeXt, Layout
from fcmae.encoder.layouts import DenseSites, MaskedSites
from fcmae.encoder.packed import PackedSites
from fcmae.encoder.responses import (
    AGGREGATIONS,
    CBAM,
    GRN,
    NORMALIZATIONS,
    RESPONSES,
    BatchNorm,
    LayerNorm,
    SqueezeExcite,
    make_response,
)
from fcmae.model import FCMAE

NAMES = tuple(RESPONSES)
PARTS: tuple[dict[str, Any], ...] = (
    {"aggregation": "l1"},
    {"aggregation": "average", "normalization": "standardize"},
    {"normalization": "sum"},
    {"normalization": "none"},
    {"residual": False},
)
KINDS = [{"response": name} for name in NAMES] + [{"grn": parts} for parts in PARTS] + [{"version": 1}]
IDS = ["-".join(map(str, kind.values())) for kind in KINDS]

TRACED = [{"response": name} for name in ("lrn", "batch_norm", "squeeze_excite", "cbam")] + [{"grn": PARTS[1]}]


def x_and_sites() -> tuple[Tensor, DenseSites]:
    return torch.randn(3, 6, 5, 32, dtype=torch.float64), DenseSites((6, 5))


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("layout", ["packed", MINKOWSKI])
def test_every_response_agrees_with_masked_in_every_layout(layout: Layout, kind: dict[str, Any]) -> None:
    encoder = small_encoder(stem_stride=2, **kind)
    images, ids = torch.randn(3, 3, 64, 80, dtype=torch.float64), some_ids(3, 20, 8)
    masked = features_and_gradients(encoder, images, ids, "masked")
    assert_same(features_and_gradients(encoder, images, ids, layout), masked)
    with_gradient = [name for name, grad in masked.items() if grad.abs().max() > 0]
    assert len(with_gradient) >= len(masked) - 2  # a rectifier of few channels may be off


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_hidden_pixels_never_reach_a_response(layout: Layout, kind: dict[str, Any]) -> None:
    encoder = small_encoder(stem_stride=1, **kind)
    images, ids = torch.randn(2, 3, 32, 40, dtype=torch.float64), some_ids(2, 20, 7)
    clean = features_and_gradients(encoder, images, ids, layout)
    noisy = torch.where(pixels_of(ids, (4, 5), 8), images, torch.nan)
    assert_same(features_and_gradients(encoder, noisy, ids, layout), clean, tolerance=0.0)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_masked_with_all_visible_is_dense(kind: dict[str, Any]) -> None:
    encoder = small_encoder(stem_stride=1, **kind)
    images, ids = torch.randn(2, 3, 24, 32, dtype=torch.float64), torch.arange(12).repeat(2, 1)
    dense = features_and_gradients(encoder, images, None, "dense")
    assert_same(features_and_gradients(encoder, images, ids, "masked"), dense)


@pytest.mark.any_cpu
@pytest.mark.parametrize("kind", TRACED, ids=lambda kind: "-".join(map(str, kind.values())))
def test_pretraining_with_any_response_traces_as_one_graph(kind: dict[str, Any]) -> None:
    model = FCMAE(((1, 1, 1, 1), (4, 6, 8, 12)), stem_stride=1, decoder_dim=8, **kind)
    images, ids = torch.randn(2, 3, 32, 32), some_ids(2, 16, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(images, ids).loss, model(images, ids).loss) < 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_pretraining_with_any_response_runs_under_autocast(kind: dict[str, Any]) -> None:
    model = FCMAE(((1, 1, 1, 1), (4, 6, 8, 12)), stem_stride=1, decoder_dim=8, **kind)
    images, ids = torch.randn(2, 3, 32, 32), some_ids(2, 16, 6)
    exact = model(images, ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, ids).loss
    loss.backward()
    assert relative_error(loss, exact) < 0.05
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


# Against what libraries compute, all sites visible


def test_batch_norm_is_torchs_in_training_and_in_evaluation() -> None:
    x, sites = x_and_sites()
    ours = randomise(BatchNorm(32).double())
    theirs = nn.BatchNorm2d(32).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert relative_error(ours(x, sites), expected) < 1e-10
    assert_same(dict(ours.named_buffers()), {k: v for k, v in theirs.named_buffers() if v.ndim})


def test_batch_norm_counts_visible_sites_only() -> None:
    ours, theirs = BatchNorm(4).double(), nn.BatchNorm1d(4).double()
    ids = some_ids(3, 6, 2)
    dense = torch.randn(3, 4, 6, 4, dtype=torch.float64)
    masked = MaskedSites((4, 6), ids, sites_per_patch=2)
    ours(dense, masked)
    theirs(dense[masked.active(2).squeeze(-1)])
    assert_same(dict(ours.named_buffers()), {k: v for k, v in theirs.named_buffers() if v.ndim})


def test_squeeze_and_excite_is_timms() -> None:
    x, sites = x_and_sites()
    ours = randomise(SqueezeExcite(32).double())
    theirs = timm.layers.squeeze_excite.SEModule(32, rd_channels=2).double()
    state = {name.split(".", 1)[1]: value for name, value in ours.state_dict().items()}
    names = {"0": "fc1", "2": "fc2"}
    theirs.load_state_dict(
        {
            f"{names[name[0]]}{name[1:]}": value[:, :, None, None] if value.ndim == 2 else value
            for name, value in state.items()
        }
    )
    expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(ours(x, sites), expected) < 1e-10


def test_cbam_gates_channels_by_means_and_maxima_then_sites_by_a_convolution() -> None:
    x, sites = x_and_sites()
    ours = randomise(CBAM(32).double())
    mlp, conv = ours.channel_mlp, ours.spatial
    gate = (mlp(x.mean((1, 2))) + mlp(x.amax((1, 2)))).sigmoid()
    gated = x * gate[:, None, None]
    two = torch.stack([gated.mean(-1), gated.amax(-1)], 1)
    assert conv.bias is not None
    weight = conv.weight.transpose(0, 1)  # two channels in, one out
    spatial = F.conv2d(two, weight, conv.bias.sum()[None], padding=3).sigmoid()
    assert relative_error(ours(x, sites), gated * spatial.permute(0, 2, 3, 1)) < 1e-10


def test_local_response_norm_is_torchs() -> None:
    x, sites = x_and_sites()
    expected = nn.LocalResponseNorm(5)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(make_response("lrn", {})(32)(x, sites), expected) < 1e-10


def test_layer_norm_is_torchs() -> None:
    x, sites = x_and_sites()
    ours, theirs = randomise(LayerNorm(32).double()), nn.LayerNorm(32, eps=1e-6).double()
    theirs.load_state_dict(ours.state_dict())
    assert relative_error(ours(x, sites), theirs(x)) < 1e-12


# GRN's parts


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grns_parts_are_the_papers_formulas(aggregation: str, normalization: str, residual: bool) -> None:
    x, sites = x_and_sites()
    x.requires_grad_()
    grn = randomise(GRN(32, aggregation=aggregation, normalization=normalization, residual=residual).double())
    for image in range(3):
        channels = x[image].reshape(-1, 32).T  # X_i, i = 1..C
        g = {
            "l2": lambda c: c.square().sum(1).sqrt(),
            "l1": lambda c: c.abs().sum(1),
            "average": lambda c: c.mean(1),
        }[aggregation](channels)
        n = {
            "mean": lambda g: g / (g.mean() + 1e-6),
            "sum": lambda g: g / (g.sum() + 1e-6),
            "none": lambda g: g,
            "standardize": lambda g: (g - g.mean()) / (g.var(correction=0) + 1e-6).sqrt(),
        }[normalization](g)
        expected = channels * n[:, None] * grn.gamma.view(-1, 1) + grn.beta.view(-1, 1) + residual * channels
        expected = expected.T.view(6, 5, 32)
        ours = grn(x, sites)[image]
        assert relative_error(ours, expected) < 1e-10
        assert_same(gradients(ours, grn, x=x), gradients(expected, grn, x=x))


@pytest.mark.parametrize("parts", [{}, *PARTS])
def test_grn_begins_as_the_identity_unless_it_lacks_the_residual(parts: dict[str, Any]) -> None:
    x, sites = x_and_sites()
    assert torch.equal(GRN(32, **parts).double()(x, sites), x) == parts.get("residual", True)


@pytest.mark.parametrize("kind", [{}, {"grn": {"aggregation": "l2"}}])
def test_grns_own_parts_run_fused(kind: dict[str, Any]) -> None:
    assert make_response("grn", kind.get("grn", {}))(8).mlp is not None
    assert all(make_response("grn", parts)(8).mlp is None for parts in PARTS)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown response 'gnr': choose from none, grn, lrn"):
        ConvNeXt("atto", response="gnr")
    with pytest.raises(ValueError, match="unknown aggregation 'l3' of GRN: choose from l2, l1, average"):
        ConvNeXt("atto", grn={"aggregation": "l3"})
    with pytest.raises(ValueError, match="no parts of GRN, but aggregation is given"):
        ConvNeXt("atto", version=1, grn={"aggregation": "l1"})
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        ConvNeXt("atto", version=3)  # pyright: ignore[reportArgumentType]


def test_packed_maxima_are_over_visible_sites() -> None:
    ids = some_ids(2, 6, 2)
    dense = torch.randn(2, 4, 6, 3) - 5
    masked, packed = MaskedSites((4, 6), ids, sites_per_patch=2), PackedSites.of_patches((2, 3), ids, 2)
    assert torch.equal(masked.max(dense), packed.max(packed.gather(dense)))


def test_batch_norm_refuses_gradient_checkpointing_which_would_count_each_batch_twice() -> None:
    with pytest.raises(ValueError, match="response batch_norm would count each batch twice; set it to false"):
        small_encoder(response="batch_norm").gradient_checkpointing = True
    small_encoder(response="layer_norm").gradient_checkpointing = True
