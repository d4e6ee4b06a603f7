"""Which patches are visible, as sorted ids or as booleans; knows nothing of images or models."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return p, the number of visible patches: int(L * (1 - mask_ratio)), at least 1, at most L - 1.

    The rounding is the official code's: 19 of 49 at ratio 0.6.

    Raises:
        ValueError: if `mask_ratio` is not inside (0, 1), or there are fewer than two patches to choose from.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must lie inside (0, 1), got {mask_ratio}")
    if num_patches < 2:
        raise ValueError(
            f"masking needs at least two patches per image, got {num_patches}: "
            "use larger images, or a smaller stem_stride or mask_group"
        )
    return min(max(int(num_patches * (1 - mask_ratio)), 1), num_patches - 1)


def _uniform(*shape: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    """Draw uniformly from [0, 1), on the device of the `generator` where there is one."""
    return torch.rand(shape, generator=generator, device=device if generator is None else generator.device)


def _lowest(keys: Tensor, p: int) -> Tensor:
    """Return the sorted places (b, p) of the lowest of keys (b, L)."""
    return keys.argsort(dim=1)[:, :p].sort(dim=1).values


def sample_visible_ids(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniformly random visible patches for each image: int64 ids (batch, p), sorted, without repeats.

    With a `generator` the ids lie on its device, else on `device`.

    Raises:
        ValueError: as `count_visible`.
    """
    p = count_visible(num_patches, mask_ratio)
    return _lowest(_uniform(batch, num_patches, generator=generator, device=device), p)


# Mask shapes: functions of a batch size b, a grid and `_uniform`, which return keys (b, L) of the grid's cells. The
# lowest keys will be visible; how many these are has no part in the keys, so that masks lie within masks.

Uniform = Callable[..., Tensor]


def _random_keys(batch: int, grid: tuple[int, int], uniform: Uniform) -> Tensor:
    return uniform(batch, grid[0] * grid[1])


def _grid_keys(batch: int, grid: tuple[int, int], uniform: Uniform) -> Tensor:
    """Bayer's order of a square of 2^k cells per side, shifted cyclically by any offset.

    Its first quarter is one cell in each 2x2, its first half a chessboard, and so on in each 4x4, 8x8, ...
    """
    levels = max(1, (max(grid) - 1).bit_length())
    shifts = (uniform(batch, 2) * 2**levels).long()
    y = (torch.arange(grid[0], device=shifts.device) + shifts[:, :1])[:, :, None]
    x = (torch.arange(grid[1], device=shifts.device) + shifts[:, 1:])[:, None, :]
    key = torch.zeros_like(y ^ x)
    for level in range(levels):  # the lowest bits of a place count most
        key = 4 * key + 2 * ((y ^ x) >> level & 1) + (y >> level & 1)
    return key.flatten(1)


BLOCKS = 48
"""Rectangles drawn for an image: in nearly all images, these cover the share that is hidden."""
BLOCK_AREA = (16 / 196, 75 / 196)
"""Of a rectangle, as a share of the image's, least and most: BEiT's 16 and 75 of 196 patches."""
BLOCK_ASPECT = 0.3
"""Least ratio of a rectangle's sides (BEiT)."""


def _block_keys(batch: int, grid: tuple[int, int], uniform: Uniform) -> Tensor:
    """Random rectangles, hidden one after the other, each from its centre outwards (BEiT, 2106.08254, algorithm 1).

    The last one thus ends as a smaller rectangle, where BEiT would draw a smaller one. What goes over an edge comes
    in at the other side, so that all patches are hidden equally often: of BEiT's, which lie inside, 75 % hidden
    would leave visible little but the image's border. What no rectangle covers is hidden last.
    """
    area, aspect, *places = uniform(batch, 4, BLOCKS, 1).unbind(1)  # each (b, k, 1)
    area = (BLOCK_AREA[0] + (BLOCK_AREA[1] - BLOCK_AREA[0]) * area) * grid[0] * grid[1]
    aspect = BLOCK_ASPECT ** (2 * aspect - 1)
    lengths = (area * aspect).sqrt(), (area / aspect).sqrt()
    far: list[Tensor] = []  # rows, then columns from a rectangle's centre, 1 at its edge: (b, k, side)
    for side, length, place in zip(grid, lengths, places, strict=True):
        away = (torch.arange(side, device=place.device) / side + place + 0.5) % 1 - 0.5
        far.append(2 * side * away.abs() / length.clamp(1, side))
    distance = torch.maximum(far[0][..., :, None], far[1][..., None, :])  # (b, k, gh, gw)
    order = torch.arange(BLOCKS, device=distance.device)[:, None, None]
    hidden_at = torch.where(distance < 1, order + distance, BLOCKS).amin(1).flatten(1)
    return -hidden_at - 0.01 * uniform(batch, grid[0] * grid[1])  # ties at random, such as within a row


SHAPES: dict[str, Callable[[int, tuple[int, int], Uniform], Tensor]] = {
    "random": _random_keys,
    "block": _block_keys,
    "grid": _grid_keys,
}
"""By name, as `model.mask_shape`."""


@dataclass(frozen=True)
class MaskSampler:
    """Draw visible patches: random, block-wise (BEiT) or grid masking, patch by patch or in squares of patches.

    Args:
        grid: (gh, gw), patches along height and width.
        ratio: share of patches hidden, inside (0, 1).
        shape: a name of `SHAPES`.
        group: side of the squares of patches that are hidden or shown together; divides the grid.

    Raises:
        ValueError: if an argument is out of range, or nothing is left to choose from.
    """

    grid: tuple[int, int]
    ratio: float
    shape: str = "random"
    group: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown mask_shape {self.shape!r}: choose from {', '.join(SHAPES)}")
        if self.group < 1:
            raise ValueError(f"mask_group must be at least 1, got {self.group}")
        if any(side % self.group for side in self.grid):
            raise ValueError(
                f"mask_group={self.group} does not divide a grid of {self.grid[0]} x {self.grid[1]} patches: take "
                f"images whose sides are multiples of {self.group} patches, or a smaller mask_group"
            )
        count_visible(math.prod(self.groups), self.ratio)

    @property
    def groups(self) -> tuple[int, int]:
        """The grid of groups, along height and width."""
        return self.grid[0] // self.group, self.grid[1] // self.group

    @property
    def num_visible(self) -> int:
        """p, the number of visible patches of each image: `count_visible` of the groups, times group^2."""
        return count_visible(math.prod(self.groups), self.ratio) * self.group**2

    def __call__(
        self,
        batch: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the visible patches of each image: int64 ids (batch, p), sorted, without repeats.

        With a `generator` the ids lie on its device, else on `device`.
        """
        uniform = functools.partial(_uniform, generator=generator, device=device)
        keys = SHAPES[self.shape](batch, self.groups, uniform)
        ids = _lowest(keys, count_visible(math.prod(self.groups), self.ratio))
        if self.group == 1:
            return ids
        within = torch.arange(self.group, device=ids.device)
        rows = (ids // self.groups[1] * self.group)[..., None, None] + within[:, None]  # (b, p / group^2, group, 1)
        columns = (ids % self.groups[1] * self.group)[..., None, None] + within
        return (rows * self.grid[1] + columns).flatten(1).sort(dim=1).values


def ids_to_booleans(ids: Tensor, num_patches: int) -> Tensor:
    """Turn ids (b, p), of visible patches or of hidden ones, into booleans (b, L), True at these."""
    return torch.zeros(len(ids), num_patches, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def hidden_ids(visible_ids: Tensor, num_patches: int) -> Tensor:
    """Return the ids (b, L - p) of the patches that are not visible, sorted."""
    visible = ids_to_booleans(visible_ids, num_patches)
    hidden_first = visible.to(torch.uint8).argsort(dim=1, stable=True)
    return hidden_first[:, : num_patches - visible_ids.shape[1]]
