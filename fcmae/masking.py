"""Which patches are visible, as sorted ids or as booleans; knows nothing of images or models."""

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
            "use larger images or a smaller stem_stride"
        )
    return min(max(int(num_patches * (1 - mask_ratio)), 1), num_patches - 1)


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
    if generator is not None:
        device = generator.device
    noise = torch.rand(batch, num_patches, generator=generator, device=device)
    return noise.argsort(dim=1)[:, :p].sort(dim=1).values


def ids_to_booleans(ids: Tensor, num_patches: int) -> Tensor:
    """Turn ids (b, p), of visible patches or of hidden ones, into booleans (b, L), True at these."""
    return torch.zeros(len(ids), num_patches, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def hidden_ids(visible_ids: Tensor, num_patches: int) -> Tensor:
    """Return the ids (b, L - p) of the patches that are not visible, sorted."""
    visible = ids_to_booleans(visible_ids, num_patches)
    hidden_first = visible.to(torch.uint8).argsort(dim=1, stable=True)
    return hidden_first[:, : num_patches - visible_ids.shape[1]]
