"""Masks of every shape: exact in number, sorted, drawn by the generator alone; regular or contiguous as named."""

import itertools
import math
import pickle
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import TINY
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from fcmae import FCMAE, sample_visible_ids
from fcmae.config import ModelSection
from fcmae.data import IndexStream, PretrainDataset, RandomView, load_batches, open_source
from fcmae.masking import SHAPES, MaskSampler, count_visible, ids_to_booleans

GRIDS = [(7, 7), (14, 14), (4, 4), (1, 2), (5, 3), (2, 9), (12, 20)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def visible(sampler: MaskSampler, batch: int, seed: int = 0) -> Tensor:
    """Booleans (b, gh, gw)."""
    return ids_to_booleans(sampler(batch, generator(seed)), math.prod(sampler.grid)).view(batch, *sampler.grid)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_shape_shows_the_exact_number_of_patches_sorted_and_once(grid: tuple[int, int], shape: str) -> None:
    for ratio in (0.01, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99):
        sampler = MaskSampler(grid, ratio, shape)
        ids = sampler(20, generator())
        assert ids.dtype == torch.int64
        assert ids.shape == (20, sampler.num_visible) == (20, count_visible(math.prod(grid), ratio))
        assert (ids.diff(dim=1) > 0).all()
        assert ids.min() >= 0
        assert ids.max() < math.prod(grid)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [2, 4])
def test_groups_are_hidden_or_shown_as_one(group: int, shape: str) -> None:
    grid = (3 * group, 4 * group)
    sampler, small = MaskSampler(grid, 0.6, shape, group), MaskSampler((3, 4), 0.6, shape)
    assert sampler.num_visible == 4 * group**2
    ids = sampler(10, generator())
    assert ids.shape == (10, 4 * group**2)
    assert (ids.diff(dim=1) > 0).all()
    enlarged = visible(small, 10).repeat_interleave(group, 1).repeat_interleave(group, 2)
    assert torch.equal(visible(sampler, 10), enlarged)


def test_random_masks_are_those_of_sample_visible_ids() -> None:
    ids = MaskSampler((7, 7), 0.6)(5, generator(3))
    assert torch.equal(ids, sample_visible_ids(5, 49, 0.6, generator(3)))
    assert ids[0].tolist()[:6] == [0, 1, 3, 5, 12, 14]  # of every release: a resumed run sees the same masks
    torch.manual_seed(3)
    assert torch.equal(MaskSampler((7, 7), 0.6)(5), ids)  # the default generator, as in data workers


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_determined_by_the_generator_and_differ_between_images(shape: str) -> None:
    sampler = MaskSampler((8, 8), 0.6, shape)
    first, again, other = (sampler(16, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(ids) for ids in first.tolist()}) > 4
    assert pickle.loads(pickle.dumps(sampler)) == sampler


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_visible_at_a_high_ratio_is_so_at_every_lower_one(shape: str) -> None:
    high, low = (visible(MaskSampler((7, 9), ratio, shape), 20) for ratio in (0.8, 0.5))
    assert (high <= low).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_patch_is_visible_equally_often(shape: str) -> None:
    n, sampler = 5_000, MaskSampler((4, 8), 0.6, shape)
    p = sampler.num_visible / 32
    frequency = visible(sampler, n).double().mean(0)
    assert (frequency - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)


def test_grid_masks_at_three_quarters_show_one_patch_in_each_two_by_two() -> None:
    shown = visible(MaskSampler((16, 16), 0.75, "grid"), 40)
    windows = shown.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert (windows.sum(-1) == 1).all()
    assert (windows == windows[:, :1, :1]).all()  # the same one everywhere
    assert len(windows[:, 0, 0].unique(dim=0)) == 4  # shifted from image to image


def test_grid_masks_at_a_half_are_a_chessboard() -> None:
    shown = visible(MaskSampler((8, 8), 0.5, "grid"), 5)
    assert (shown[:, 1:] != shown[:, :-1]).all()
    assert (shown[:, :, 1:] != shown[:, :, :-1]).all()


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.7])
def test_grid_masks_are_spread_evenly_at_any_ratio(ratio: float) -> None:
    windows = visible(MaskSampler((16, 16), ratio, "grid"), 20).unfold(1, 4, 1).unfold(2, 4, 1).flatten(3).sum(-1)
    assert (windows.amax() - windows.amin()) <= 3


def hidden_neighbours(shape: str, ratio: float) -> float:
    """Mean share of hidden patches among the right and lower neighbours of hidden patches."""
    hidden = ~visible(MaskSampler((14, 14), ratio, shape), 200)
    pairs = [(hidden[:, 1:], hidden[:, :-1]), (hidden[:, :, 1:], hidden[:, :, :-1])]
    both = sum(int((a & b).sum()) for a, b in pairs)
    return both / sum(int(b.sum()) for _, b in pairs)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 0.75])
def test_block_masks_are_contiguous_and_grid_masks_the_opposite(ratio: float) -> None:
    assert hidden_neighbours("random", ratio) == pytest.approx(ratio, abs=0.02)
    assert 1 - hidden_neighbours("block", ratio) < 0.45 * (1 - ratio)
    assert hidden_neighbours("grid", ratio) < ratio - 0.05


def test_block_masks_of_a_small_share_are_one_rectangle_or_what_of_it_goes_over_an_edge() -> None:
    hidden = ~visible(MaskSampler((14, 14), 0.07, "block"), 50)  # 14 patches, of 16 at least
    for image in hidden:
        shifts = (image.roll((y, x), (0, 1)).nonzero() for y in range(14) for x in range(14))
        box = min(int(((at.amax(0) - at.amin(0)) + 1).prod()) for at in shifts)
        assert box <= 2 * int(image.sum())  # nearly full: its outermost row may be half hidden


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_depend_on_seed_epoch_and_index_whatever_the_workers(shape: str, tmp_path: Path) -> None:
    for i in range(6):
        to_pil_image(torch.full((3, 40, 40), 40 * i, dtype=torch.uint8)).save(tmp_path / f"{i}.png")
    dataset = PretrainDataset(
        open_source("folder", str(tmp_path), "train", 3),
        view=RandomView((32, 32), (0.5, 1.0), 0.5),
        draw_ids=MaskSampler((8, 8), 0.6, shape, 2),
        seed=1,
    )
    alone, parallel = (
        load_batches(dataset, IndexStream(6, batch_size=3, seed=1), num_workers=n, pin_memory=False) for n in (0, 2)
    )
    for first, second in itertools.islice(zip(alone, parallel, strict=True), 6):
        assert first.indices == second.indices
        assert torch.equal(first.visible_ids, second.visible_ids)
    assert not torch.equal(dataset[0, 0].visible_ids, dataset[1, 0].visible_ids)


def test_the_model_draws_masks_of_its_shape_and_group() -> None:
    model = FCMAE(TINY, stem_stride=1, decoder_dim=8, mask_ratio=0.75, mask_shape="grid", mask_group=2)
    with torch.no_grad():
        ids = model(torch.randn(4, 3, 64, 64), generator=generator(5)).visible_ids
    assert torch.equal(ids, MaskSampler((8, 8), 0.75, "grid", 2)(4, generator(5)))
    assert torch.equal(ids, model.mask_sampler((8, 8))(4, generator(5)))
    assert model.mask_sampler((8, 8), 0.5).num_visible == 32


def test_the_shapes_of_the_configuration_are_those_there_are() -> None:
    assert set(get_args(ModelSection.model_fields["mask_shape"].annotation)) == set(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"shape": "blocks"}, "unknown mask_shape 'blocks': choose from random, block, grid"),
        ({"group": 0}, "mask_group must be at least 1, got 0"),
        ({"group": 2}, "mask_group=2 does not divide a grid of 7 x 7 patches: .* multiples of 2 patches"),
        ({"group": 7}, "at least two patches per image, got 1: .* smaller stem_stride or mask_group"),
        ({"ratio": 1.0}, r"mask_ratio must lie inside \(0, 1\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object], complaint: str) -> None:
    values: dict[str, object] = {"grid": (7, 7), "ratio": 0.6} | arguments
    with pytest.raises(ValueError, match=complaint):
        MaskSampler(**values)  # pyright: ignore[reportArgumentType]
