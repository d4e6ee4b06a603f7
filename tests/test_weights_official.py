"""The official code's formats, dense and over MinkowskiEngine: it computes the same from converted weights."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise, relative_error, small_encoder, some_ids
from torch import Tensor, nn
from weight_files import classifier, same

from fcmae import load_encoder
from fcmae.encoder.convnext import ConvNeXt
from fcmae.encoder.minkowski import import_engine
from fcmae.weights.export import export
from fcmae.weights.official import dense_to_official_sparse, from_official_dense, official_sparse_to_dense


def test_v1_has_the_official_names_and_shapes_and_its_classifier_is_read_from_under_model(tmp_path: Path) -> None:
    encoder = small_encoder(version=1, num_classes=3).float()
    state = encoder.state_dict()
    block = ("gamma", "dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias")
    block += ("pwconv1.weight", "pwconv1.bias", "pwconv2.weight", "pwconv2.bias")
    assert {name.removeprefix("stages.2.1.") for name in state if name.startswith("stages.2.1.")} == set(block)
    assert state["stages.2.1.gamma"].shape == (24,)
    torch.save({"model": state}, tmp_path / "convnext.pth")
    found = load_encoder(tmp_path / "convnext.pth")
    assert (found.version, found.response, found.num_classes) == (1, "none", 3)
    assert same(found.state_dict(), state)


def test_official_names_there_and_back_are_the_identity() -> None:
    encoder, dense = small_encoder().state_dict(), small_encoder(num_classes=7).state_dict()
    assert same(official_sparse_to_dense(dense_to_official_sparse(encoder)), encoder)
    assert same(from_official_dense(dense), dense)


def test_the_official_code_finds_its_state_under_model(tmp_path: Path) -> None:
    weights = classifier()
    export(weights, "official", tmp_path / "out")
    assert same(torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"], weights.tensors)


@pytest.mark.parametrize("variant", ["atto", TINY])
def test_sparse_and_dense_there_and_back_is_the_identity(variant: Any) -> None:
    dense = dict(randomise(ConvNeXt(variant)).state_dict())
    sparse = dense_to_official_sparse(dense)
    assert sparse.keys() != dense.keys()
    for result in (official_sparse_to_dense(sparse), official_sparse_to_dense(dense)):
        assert result.keys() == dense.keys()
        assert all(torch.equal(result[name], dense[name]) for name in dense)  # shapes too: twice is once
    again = dense_to_official_sparse(official_sparse_to_dense(sparse))
    assert again.keys() == sparse.keys()
    assert all(torch.equal(again[name], sparse[name]) for name in sparse)


def test_kernels_lie_as_the_engine_counts_columns_before_rows() -> None:
    kernel = torch.arange(49 * 3.0).view(49, 3)
    weight = official_sparse_to_dense({"stages.0.0.dwconv.kernel": kernel})["stages.0.0.dwconv.weight"]
    assert weight.shape == (3, 1, 7, 7)
    assert weight[2, 0, 1, 5] == kernel[5 * 7 + 1, 2]
    kernel = torch.arange(4 * 3 * 5.0).view(4, 3, 5)
    weight = official_sparse_to_dense({"downsample_layers.1.1.kernel": kernel})["downsample_layers.1.1.weight"]
    assert weight.shape == (5, 3, 2, 2)
    assert weight[4, 2, 0, 1] == kernel[1 * 2 + 0, 2, 4]


def test_a_decoder_beside_the_sparse_encoder_is_left_out_and_nothing_else() -> None:
    encoder = dense_to_official_sparse(ConvNeXt(TINY).state_dict())
    state = {f"encoder.{name}": value for name, value in encoder.items()}
    decoder = ("proj.weight", "mask_token", "decoder.0.dwconv.weight", "pred.bias")
    assert (
        official_sparse_to_dense(state | dict.fromkeys(decoder, torch.zeros(1))).keys()
        == ConvNeXt(TINY).state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"unknown keys 'stages\.0\.0\.projection\.weight'"):
        official_sparse_to_dense(state | {"encoder.stages.0.0.projection.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("stages.0.0.dwconv.kernel", (48, 8)),
        ("stages.0.0.grn.gamma", (1, 1, 32)),
        ("stages.0.0.grn.gamma", (2, 32)),
        ("stages.0.0.dwconv.bias", (2, 8)),
    ],
)
def test_shapes_that_are_not_the_official_codes_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}: a shape of \({', '.join(map(str, shape))}\) is not the official"
    ):
        official_sparse_to_dense({name: torch.zeros(shape)})


def test_the_official_sparse_encoder_has_no_norm_and_no_classifier() -> None:
    state = ConvNeXt(TINY, num_classes=3).state_dict()
    with pytest.raises(ValueError, match="the official sparse code has no classifier"):
        dense_to_official_sparse(state)
    del state["head.weight"], state["head.bias"]
    with pytest.raises(ValueError, match=r"without norm and head: unknown keys 'norm\.weight', 'norm\.bias'$"):
        dense_to_official_sparse(state)


# The official code's sparse encoder, of the engine's own modules


class OfficialBlock(nn.Module):
    """A block as the official code has it over MinkowskiEngine, of the engine's modules where it has them."""

    def __init__(self, engine: Any, dim: int) -> None:
        super().__init__()
        self.dwconv = engine.MinkowskiChannelwiseConvolution(dim, kernel_size=7, bias=True, dimension=2)
        self.norm = Rowwise("ln", nn.LayerNorm(dim, eps=1e-6))
        self.pwconv1 = engine.MinkowskiLinear(dim, 4 * dim)
        self.grn = RowwiseGRN(4 * dim)
        self.pwconv2 = engine.MinkowskiLinear(4 * dim, dim)
        self.engine = [engine]

    def forward(self, x: Any) -> Any:
        h = self.pwconv1(self.norm(self.dwconv(x)))
        h = self.grn(self.engine[0].MinkowskiFunctional.gelu(h))
        return x + self.pwconv2(h)


def with_rows(x: Any, rows: Tensor) -> Any:
    """A sparse tensor of other rows at the coordinates of x."""
    return type(x)(rows, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


class Rowwise(nn.Module):
    """A dense module on the rows of a sparse tensor, under the name the official code gives it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        (module,) = self.children()
        return with_rows(x, module(x.F))


class RowwiseGRN(nn.Module):
    """The official sparse GRN, whose norms are over all rows: of the whole batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))

    def forward(self, x: Any) -> Any:
        norm = x.F.norm(dim=0, keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return with_rows(x, self.gamma * (x.F * response) + self.beta + x.F)


class OfficialSparseEncoder(nn.Module):
    """The official pretraining encoder: a dense stem, then sparse tensors."""

    def __init__(self, engine: Any, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.engine = [engine]
        stem = nn.Conv2d(3, dims[0], kernel_size=4, stride=4)
        layers = [nn.Sequential(stem, nn.LayerNorm(dims[0], eps=1e-6))]
        for fine, coarse in itertools.pairwise(dims):
            conv = engine.MinkowskiConvolution(fine, coarse, kernel_size=2, stride=2, bias=True, dimension=2)
            layers.append(nn.Sequential(Rowwise("ln", nn.LayerNorm(fine, eps=1e-6)), conv))
        self.downsample_layers = nn.ModuleList(layers)
        self.stages = nn.ModuleList(
            nn.Sequential(*(OfficialBlock(engine, dim) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """Features (b, h, w, c) of images whose sites (b, h, w) are active after the stem, where hidden zero."""
        stem, norm = self.downsample_layers[0].children()
        dense = norm(stem(images).permute(0, 2, 3, 1))
        x = self.engine[0].SparseTensor(dense[active], coordinates=active.nonzero().int().contiguous())
        for i in range(4):
            if i:
                x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        image, row, col = x.C.long().unbind(1)
        out = dense.new_zeros(len(images), active.shape[1] // 8, active.shape[2] // 8, x.F.shape[1])
        out[image, row // 8, col // 8] = x.F
        return out


@pytest.mark.minkowski
def test_the_official_sparse_encoder_computes_the_same_after_conversion() -> None:
    depths, dims = TINY
    official = randomise(OfficialSparseEncoder(import_engine(), depths, dims)).double()
    state = {f"encoder.{name}": value for name, value in official.state_dict().items()}
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, dims[0])
    assert state["encoder.downsample_layers.1.1.kernel"].shape == (4, dims[0], dims[1])
    assert state["encoder.stages.0.0.pwconv1.linear.weight"].shape == (4 * dims[0], dims[0])

    ours = ConvNeXt(TINY).double()
    ours.load_state_dict(official_sparse_to_dense(state), strict=True)
    images, ids = torch.randn(2, 3, 96, 128, dtype=torch.float64), some_ids(2, 12, 5)
    sites = ours.sites(images, ids, "masked")
    active = sites.scatter(torch.ones(2, 24, 32, 1))[..., 0] > 0
    with torch.no_grad():
        # one image at a time: the official GRN norms over the whole batch
        expected = torch.cat([official(images[i : i + 1], active[i : i + 1]) for i in range(2)])
        for layout in ("masked", "packed", "minkowski"):
            assert relative_error(ours.features(images, ids, layout), expected) <= 1e-10

    back = dense_to_official_sparse(ours.state_dict())
    official.load_state_dict(back, strict=True)
    with torch.no_grad():
        again = torch.cat([official(images[i : i + 1], active[i : i + 1]) for i in range(2)])
        assert relative_error(again, expected) <= 1e-12  # its kernel maps vary in order
