"""Images to patches and back, in the official (p, q, c) order; knows nothing of masks or models."""

import torch
from einops import rearrange
from torch import Tensor


def grid_shape(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the patch grid (gh, gw) of an image of `image_size` (height, width) in pixels.

    Raises:
        ValueError: if a side is not a positive multiple of `patch`; the message names the nearest sizes.
    """
    for side, name in zip(image_size, ("height", "width"), strict=True):
        if side < patch or side % patch:
            below = side // patch * patch
            nearest = f"{below} and {below + patch}" if below else f"{patch} and {2 * patch}"
            raise ValueError(
                f"image {name} {side} is not a multiple of the patch size {patch}: "
                f"the nearest sizes that are: {nearest}"
            )
    return image_size[0] // patch, image_size[1] // patch


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (b, c, h, w) into patches (b, L, patch * patch * c), values in (p, q, c) order.

    L counts the grid row by row. Same dtype as the input. Inverse of `unpatchify`.

    Raises:
        ValueError: if height or width is not a multiple of `patch`.
    """
    grid_shape((images.shape[-2], images.shape[-1]), patch)
    return rearrange(images, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=patch, q=patch)


def pick_patches(images: Tensor, ids: Tensor, patch: int) -> Tensor:
    """Cut only the patches `ids`, int64 (b, m), out of images (b, c, h, w): (b, m, patch * patch * c).

    h and w are multiples of `patch`.
    """
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    return pick_cells(images.permute(0, 2, 3, 1), ids, grid).flatten(2)


def as_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """View maps (b, h, w, c), however they lie in memory, as cells (b, gh, gw, h / gh, w / gw, c)."""
    return maps.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)


def pick_cells(maps: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Take the cells `ids`, int64 (b, m), of maps (b, h, w, c): (b, m, h / gh, w / gw, c)."""
    image = torch.arange(len(maps), device=ids.device)[:, None]
    return as_cells(maps, grid)[image, ids // grid[1], ids % grid[1]]


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Put patches (b, L, patch * patch * c) back together into images (b, c, gh * patch, gw * patch).

    Raises:
        ValueError: if L is not gh * gw, or the last axis is not a multiple of patch * patch.
    """
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{patches.shape[1]} patches do not fill a grid of {grid[0]} x {grid[1]}")
    if patches.shape[2] % (patch * patch):
        raise ValueError(f"{patches.shape[2]} values per patch are no whole channels of {patch} x {patch}")
    return rearrange(patches, "b (gh gw) (p q c) -> b c (gh p) (gw q)", gh=grid[0], gw=grid[1], p=patch, q=patch)
