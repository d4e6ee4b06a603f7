"""Decoders: each against a slow, obvious one, exact in every layout, blind to what is hidden, run end to end."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    assert_same,
    error_line,
    gradients,
    randomise,
    relative_error,
    run_main,
    smooth_images,
    some_ids,
)
from einops import rearrange
from test_layouts import MINKOWSKI
from torch import Tensor, nn
from weight_files import save_run

from fcmae import pretrain
from fcmae.config import ModelSection, PretrainConfig, parse_config
from fcmae.data import PixelNormalizer, save_arrays
from fcmae.decoder import DECODERS, ConvNeXtDecoder, TransformerDecoder, UNetDecoder
from fcmae.encoder.convnext import Layout
from fcmae.encoder.layouts import DenseSites
from fcmae.errors import UserError
from fcmae.load import load_fcmae
from fcmae.masking import ids_to_booleans
from fcmae.model import FCMAE
from fcmae.patches import pick_patches
from fcmae.training.optim import exempt_from_decay
from fcmae.visualize import draw_reconstructions

NAMES = tuple(DECODERS)
EACH = pytest.mark.parametrize("decoder", NAMES)
GRID = (3, 4)
IN_DIMS = TINY[1]


def small_model(decoder: str, **kwargs: Any) -> FCMAE:
    """A randomised FCMAE of patch 16 with a small decoder."""
    defaults: dict[str, Any] = {"variant": TINY, "stem_stride": 2, "decoder_dim": 64}
    return randomise(FCMAE(decoder=decoder, **defaults | kwargs), std=0.2)


def maps_and_hidden(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Maps of four stages with zeros where hidden, and the hidden ids."""
    hidden = some_ids(2, 12, 7)
    maps = [
        torch.randn(2, GRID[0] * k, GRID[1] * k, c, dtype=dtype) for k, c in zip((8, 4, 2, 1), IN_DIMS, strict=True)
    ]
    return [x.masked_fill(is_hidden(hidden, x), 0) for x in maps], hidden


def is_hidden(hidden: Tensor, x: Tensor) -> Tensor:
    """Booleans (b, h, w, 1) at the sites of a map x (b, h, w, c)."""
    k = x.shape[1] // GRID[0]
    return ids_to_booleans(hidden, 12).view(-1, *GRID, 1).repeat_interleave(k, 1).repeat_interleave(k, 2)


# What the papers say


def test_the_convnext_decoder_has_the_depths_and_widths_of_the_paper() -> None:
    for depth, dim in itertools.product((1, 2, 4, 8, 12), (128, 256, 512, 768, 1024)):
        with torch.device("meta"):
            decoder = ConvNeXtDecoder((40, 80, 160, 320), 3072, out_side=32, dim=dim, depth=depth)
        block = 49 * dim + dim + 2 * dim + (8 * dim * dim + 5 * dim) + 8 * dim
        sides = 320 * dim + dim + dim + dim * 3072 + 3072
        assert sum(p.numel() for p in decoder.parameters()) == depth * block + sides
        assert len(decoder.decoder) == depth


@pytest.mark.parametrize(("depth", "dim"), [(12, 16), (2, 128)])
def test_a_deep_or_wide_convnext_decoder_trains(depth: int, dim: int) -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_depth=depth, decoder_dim=dim)
    images = smooth_images(4, 3, 32, 32, torch.float32)
    out = model(images)
    assert out.loss.item() == pytest.approx(1, abs=0.3)
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


@pytest.mark.parametrize(
    ("decoder", "depth", "count"),
    [
        ("convnext", 1, 3_871_232),
        ("unet", 1, 3_762_160),
        ("unet_no_skips", 1, 3_707_504),
        ("transformer", 8, 26_960_896),
    ],
)
def test_the_sizes_of_decoders_of_width_512_for_atto(decoder: str, depth: int, count: int) -> None:
    with torch.device("meta"):
        model = FCMAE("atto", decoder=decoder, decoder_depth=depth)
    assert sum(p.numel() for p in model.decoder.parameters()) == count


@EACH
def test_decoders_start_small_and_their_mask_tokens_do_not_decay(decoder: str) -> None:
    model = FCMAE(TINY, stem_stride=2, decoder=decoder, decoder_dim=256)
    tokens = {name: p for name, p in model.decoder.named_parameters() if name.endswith("mask_token")}
    assert len(tokens) == (4 if decoder == "unet" else 1)
    for name, token in tokens.items():
        assert exempt_from_decay(name, token)
        assert token.std().item() == pytest.approx(0.02, rel=0.4)
    for name, p in model.decoder.named_parameters():
        if name.endswith("weight") and p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
            assert not exempt_from_decay(name, p)
    images = smooth_images(16, 3, 96, 96, torch.float32)
    images = (images - images.mean()) / images.std()
    assert model(images).loss.item() == pytest.approx(1.0, abs=0.15)


# The same numbers as a slow, obvious way


def unet_of_convolutions(decoder: UNetDecoder, maps: list[Tensor], hidden: Tensor) -> Tensor:
    """The UNet over whole maps: transposed convolutions, and convolutions that predict a map of the target."""
    fills: list[Any] = list(decoder.fills)
    ups: list[Any] = list(decoder.ups)
    x = torch.zeros(())
    for i, blocks in enumerate(decoder.scales):
        fine = maps[3 - i]
        if i:
            norm, expand = ups[i - 1].norm, ups[i - 1].expand
            weight = rearrange(expand.weight, "(p q o) c -> c o p q", p=2, q=2)
            y = F.conv_transpose2d(norm(x).permute(0, 3, 1, 2), weight, stride=2)
            bias = rearrange(expand.bias, "(p q o) -> o p q", p=2, q=2)
            x = (y + bias.repeat(1, *fine.shape[1:3])[:, : y.shape[2], : y.shape[3]]).permute(0, 2, 3, 1)
        if i == 0 or decoder.reads_pyramid:
            seen = torch.where(is_hidden(hidden, fine), fills[i].mask_token, fills[i].proj(fine))
            x = seen if i == 0 else x + seen
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x, DenseSites((x.shape[1], x.shape[2])))
    r, s = 8 // decoder.cells, decoder.out_side // decoder.cells
    weight = rearrange(decoder.pred.weight, "o (p q c) -> o c p q", p=r, q=r)
    y = F.conv2d(decoder.norm(x).permute(0, 3, 1, 2), weight, decoder.pred.bias, stride=r)
    return pick_patches(rearrange(y, "b (p q v) h w -> b v (h p) (w q)", p=s, q=s), hidden, decoder.out_side)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(
    ("out_side", "values"),
    [(16, 3), (8, 1), (32, 2), (4, 27), (2, 9), (1, 5), (6, 4)],
    ids=lambda number: str(number),
)
def test_the_unet_is_the_one_of_transposed_convolutions(out_side: int, values: int, skips: bool) -> None:
    decoder = UNetDecoder(IN_DIMS, out_side**2 * values, out_side=out_side, dim=72, depth=2, skips=skips)
    randomise(decoder, std=0.3).double()
    maps, hidden = maps_and_hidden()
    read = maps if skips else maps[-1:]
    inputs = {f"map {i}": x.requires_grad_() for i, x in enumerate(read)}
    results = []
    for out in (decoder(read, hidden), unet_of_convolutions(decoder, maps, hidden)):
        results.append({"out": out} | gradients(out, decoder, **inputs))
    assert results[0]["out"].shape == (2, 7, out_side**2 * values)
    assert_same(results[0], results[1])
    assert all(tensor.abs().max() > 0 for tensor in results[0].values())


def transformer_of_sums(decoder: TransformerDecoder, x: Tensor, hidden: Tensor) -> Tensor:
    """The Transformer decoder by MAE's formulas, an image and a head at a time."""
    dim = decoder.mask_token.shape[-1]
    bands = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    predictions = []
    for image, its_hidden in zip(x, hidden, strict=True):
        cells = []
        for i, j in np.ndindex(*GRID):
            cell = decoder.mask_token[0, 0] if i * GRID[1] + j in its_hidden else decoder.proj(image[i, j])
            cells.append(cell + torch.cat([f(n * bands) for f in (torch.sin, torch.cos) for n in (i, j)]))
        y = torch.stack(cells)  # (L, c)
        for block in decoder.blocks:
            layer: Any = block
            q, k, v = layer.attn.qkv(layer.norm1(y)).chunk(3, -1)
            heads = []
            for head in range(dim // 32):
                part = slice(32 * head, 32 * (head + 1))
                scores = q[:, part] @ k[:, part].T / 32**0.5
                heads.append(scores.softmax(-1) @ v[:, part])
            y = y + layer.attn.proj(torch.cat(heads, -1))
            y = y + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(y))))
        predictions.append(decoder.pred(decoder.norm(y))[its_hidden])
    return torch.stack(predictions)


def test_the_transformer_is_the_one_of_maes_formulas() -> None:
    decoder = randomise(TransformerDecoder(IN_DIMS, 10, out_side=1, dim=64, depth=2), std=0.1).double()
    maps, hidden = maps_and_hidden()
    x = maps[-1].requires_grad_()
    results = []
    for out in (decoder([x], hidden), transformer_of_sums(decoder, x, hidden)):
        results.append({"out": out} | gradients(out, decoder, x=x))
    assert_same(results[0], results[1], tolerance=1e-6)  # timm computes positions in float32


# What they may see


@EACH
@pytest.mark.parametrize("layout", ["packed", MINKOWSKI])
def test_layouts_give_the_same_loss_and_gradients_whatever_the_decoder(layout: Layout, decoder: str) -> None:
    model = small_model(decoder, decoder_depth=2).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    results = []
    for way in ("masked", layout):
        model.layout = way
        out = model(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    assert results[0]["pred"].shape == (2, 7, 768)
    assert_same(results[1], results[0])
    assert all(tensor.abs().max() > 0 for tensor in results[0].values())


@EACH
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_hidden_pixels_never_reach_the_prediction_of_any_decoder(layout: Layout, decoder: str) -> None:
    model = small_model(decoder, layout=layout)
    images, ids = torch.randn(2, 3, 48, 64), some_ids(2, 12, 4)
    pixels = ids_to_booleans(ids, 12).view(2, 1, 3, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    clean, changed = model(images, ids), model(torch.where(pixels, images, torch.nan), ids)
    assert torch.equal(clean.pred, changed.pred)


@EACH
def test_hidden_sites_of_the_maps_are_never_read(decoder: str) -> None:
    model = small_model(decoder).decoder
    maps, hidden = maps_and_hidden(torch.float32)
    changed = [x.masked_fill(is_hidden(hidden, x), torch.nan) for x in maps]
    assert torch.equal(model(maps, hidden), model(changed, hidden))


@EACH
def test_a_decoder_reads_the_maps_that_it_says_it_reads(decoder: str) -> None:
    model = small_model(decoder).decoder
    maps, hidden = maps_and_hidden(torch.float32)
    before = model(maps, hidden)
    for i, x in enumerate(maps):
        changed = [*maps[:i], torch.where(is_hidden(hidden, x), x, x + 1), *maps[i + 1 :]]
        assert torch.equal(model(changed, hidden), before) is not (model.reads_pyramid or i == 3)
    if not model.reads_pyramid:
        assert torch.equal(model(maps[-1:], hidden), before)


@EACH
def test_predictions_come_in_the_order_of_the_hidden_ids_and_images_do_not_mix(decoder: str) -> None:
    model = small_model(decoder).double().decoder
    maps, hidden = maps_and_hidden()
    order = torch.randperm(7)
    pred = model(maps, hidden)
    assert relative_error(model(maps, hidden[:, order]), pred[:, order]) < 1e-12
    assert relative_error(model([x[1:] for x in maps], hidden[1:]), pred[1:]) < 1e-12


@EACH
@pytest.mark.parametrize("stem_stride", [1, 4])
def test_every_decoder_predicts_hog(decoder: str, stem_stride: int) -> None:
    model = small_model(decoder, target="hog", stem_stride=stem_stride)
    images = smooth_images(2, 3, 24 * stem_stride, 32 * stem_stride, torch.float32)
    out = model(images, some_ids(2, 12, 5))
    assert out.pred.shape == (2, 7, {1: 2, 4: 4}[stem_stride] ** 2 * 3 * 9)
    assert all(grad.abs().max() > 0 for grad in gradients(out.loss, model.decoder).values())


@EACH
def test_every_decoder_works_over_a_network_of_timms(decoder: str) -> None:
    model = FCMAE("timm/test_resnet", decoder=decoder, decoder_dim=64)
    images, ids = smooth_images(2, 3, 64, 96, torch.float32), some_ids(2, 6, 2)
    out = model(images, ids)
    assert out.pred.shape == (2, 4, 3072)
    assert all(grad.abs().max() > 0 for grad in gradients(out.loss, model.decoder).values())
    pixels = ids_to_booleans(ids, 6).view(2, 1, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    with torch.no_grad():
        model.eval()
        clean, changed = model(images, ids), model(torch.where(pixels, images, 9.0), ids)
    assert relative_error(changed.pred, clean.pred) < 1e-5


# Ways of running


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_every_decoder(decoder: str, dtype: torch.dtype) -> None:
    model = small_model(decoder)
    images, ids = smooth_images(2, 3, 48, 64, torch.float32), some_ids(2, 12, 5)
    expected = model(images, ids).loss
    with torch.autocast("cpu", dtype=dtype):
        out = model(images, ids)
    assert (out.loss.dtype, out.pred.dtype) == (torch.float32, dtype)
    assert relative_error(out.loss, expected) < 0.05
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())


@pytest.mark.any_cpu
@pytest.mark.parametrize("decoder", ["unet", "transformer"])
def test_compile_traces_other_decoders_and_changes_nothing(decoder: str) -> None:
    torch.compiler.reset()
    model = small_model(decoder, variant=((1, 1, 1, 1), (8, 16, 24, 32))).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        out = run(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    assert_same(results[1], results[0])


@EACH
def test_gradient_checkpointing_changes_nothing_under_any_decoder(decoder: str) -> None:
    model = small_model(decoder).double()
    images, ids = smooth_images(2, 3, 48, 64), some_ids(2, 12, 5)
    results = []
    for model.encoder.gradient_checkpointing in (False, True):
        out = model(images, ids)
        results.append({"pred": out.pred} | gradients(out.loss, model))
    assert_same(results[1], results[0])


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decoder": "vit"}, "unknown decoder 'vit': choose from convnext, unet, unet_no_skips, transformer"),
        ({"decoder": "unet", "decoder_dim": 63}, "decoder_dim=63 is too narrow for a UNet.*3 times: at least 64"),
        ({"decoder": "unet_no_skips", "decoder_dim": 8}, "decoder_dim=8 is too narrow"),
        ({"decoder": "transformer", "decoder_dim": 48}, "decoder_dim=48: .* takes a multiple of 32"),
    ],
)
def test_a_decoder_out_of_range_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FCMAE(TINY, **kwargs)


@pytest.mark.parametrize("skips", [True, False])
def test_a_unet_over_a_network_without_a_pyramid_is_refused(skips: bool) -> None:
    with pytest.raises(ValueError, match="this network has one only: choose decoder convnext or transformer"):
        UNetDecoder((32,), 768, out_side=16, dim=64, skips=skips)


def test_a_unet_refuses_maps_that_are_not_of_half_the_size_each() -> None:
    maps, hidden = maps_and_hidden(torch.float32)
    maps[1] = maps[1][:, :, :-1]
    with pytest.raises(ValueError, match="half the size each, got 24 x 32, 12 x 15, 6 x 8, 3 x 4"):
        small_model("unet").decoder(maps, hidden)


# End to end


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run of two steps of two smooth random images on a tiny network with a decoder of width 64."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    save_arrays(tmp_path / "data", pixels)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 64}}
data: {{name: arrays, root: {tmp_path / "data"}, image_size: [32, 48], batch_size: 2, num_workers: 0}}
train: {{max_steps: 2}}
visualize: {{num_images: 1}}
"""
    )
    return ["--config", str(config)]


@pytest.mark.parametrize("decoder", ["unet", "transformer"])
def test_a_run_with_another_decoder_trains_and_comes_back(
    arguments: list[str], tmp_path: Path, decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(pretrain.main, *arguments, f"model.decoder={decoder}", "--dry-run") == 0
    assert "first loss" in capsys.readouterr().out
    assert run_main(pretrain.main, *arguments, f"model.decoder={decoder}") == 0
    assert len([*(tmp_path / "run" / "reconstructions").glob("step-*.png")]) == 2
    model, config = load_fcmae(tmp_path / "run")
    assert config.model.decoder == decoder
    normalize, pixels = (
        PixelNormalizer(config.data.mean, config.data.std),
        torch.zeros(1, 3, 32, 48, dtype=torch.uint8),
    )
    assert draw_reconstructions(model, normalize, pixels, some_ids(1, 24, 5)).ndim == 3


def test_bad_decoders_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(pretrain.main, capsys, *arguments, "model.decoder=vit")
    assert "model.decoder: input should be 'convnext', 'unet', 'unet_no_skips' or 'transformer', got 'vit'" in line
    line = error_line(pretrain.main, capsys, *arguments, "model.decoder=unet", "model.decoder_dim=32")
    assert line.startswith("error: model: decoder_dim=32 is too narrow for a UNet")


def section(**values: Any) -> ModelSection:
    defaults: dict[str, Any] = {"variant": TINY, "stem_stride": 1, "decoder_dim": 64}
    return ModelSection(**defaults | values)


@EACH
def test_a_decoder_is_taken_over_if_it_is_the_same(decoder: str, tmp_path: Path) -> None:
    model = randomise(FCMAE(**section(decoder=decoder).model_dump()))
    values = {
        "output": "x",
        "model": section(decoder=decoder).model_dump(),
        "data": {"root": "x", "image_size": 32},
    }
    config = parse_config(PretrainConfig, values, "a test").model_dump(mode="json")
    save_run(tmp_path / "run", model, config=config)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    for source in ("run", "bare.pth"):
        again = FCMAE(**section(decoder=decoder).model_dump())
        assert pretrain.start_from(again, section(decoder=decoder), str(tmp_path / source)).endswith("its decoder")
        assert_same(dict(again.named_parameters()), dict(model.named_parameters()), tolerance=0)
    others = {"decoder_depth": 3, "decoder_dim": 96, "target": "hog", "decoder": NAMES[NAMES.index(decoder) - 1]}
    for key, value in others.items():
        other = section(**{"decoder": decoder} | {key: value})
        its = getattr(section(decoder=decoder), key)
        with pytest.raises(
            UserError, match=f"FCMAE run weights with {key} {its}; set model.{key} to that, or name"
        ):
            pretrain.start_from(FCMAE(**other.model_dump()), other, str(tmp_path / "run"))
        with pytest.raises(UserError, match=r"bare.pth: .* weights with another decoder \(.*; set model.decoder, "):
            pretrain.start_from(FCMAE(**other.model_dump()), other, str(tmp_path / "bare.pth"))


def test_a_run_of_a_version_without_other_decoders_had_the_convnext_one(tmp_path: Path) -> None:
    model = randomise(FCMAE(**section().model_dump()))
    values = {"variant": TINY, "stem_stride": 1, "decoder_dim": 64}
    save_run(tmp_path, model, config={"output": "x", "model": values, "data": {"root": "x", "image_size": 32}})
    assert pretrain.start_from(FCMAE(**section().model_dump()), section(), str(tmp_path)).endswith("its decoder")
    other = section(decoder="unet")
    with pytest.raises(UserError, match=r"weights with decoder convnext; set model\.decoder to that"):
        pretrain.start_from(FCMAE(**other.model_dump()), other, str(tmp_path))
