"""The UNet decoder (V2 paper, section 3.1; SparK, arXiv 2301.03580): from patches up to the finest sites."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fcmae.encoder.convnext import Block, init_weights
from fcmae.encoder.packed import PackedSites, gather_patches
from fcmae.masking import ids_to_booleans
from fcmae.patches import as_cells

NARROWEST = 8
"""Channels of the finest scale, at the least."""


class Fill(nn.Module):
    """Project the encoder's map of a scale and put a mask token at hidden sites (SparK's "densifying")."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, is_hidden: Tensor) -> Tensor:
        x = self.proj(x)
        return torch.where(is_hidden, self.mask_token.to(x.dtype), x)


class Upsample(nn.Module):
    """LayerNorm and a transposed 2x2 convolution of stride 2, the encoder's downsampling turned round.

    Of patches (b, p, k, k, c), whose borders such a convolution does not cross: (b, p, 2k, 2k, c').
    """

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(coarse, eps=1e-6)
        self.expand = nn.Linear(coarse, 4 * fine)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.expand(self.norm(x)).unflatten(4, (2, 2, -1))  # (b, p, k, k, 2, 2, c')
        return windows.transpose(3, 4).flatten(4, 5).flatten(2, 3)


class UNetDecoder(nn.Module):
    """UNet: a scale for each stage of the encoder, `depth` blocks in each, from one site per patch to the finest.

    The paper names it and says no more. Ours: blocks like the encoder's; between scales twice the sites and half
    the width; with skips the encoder's map of each scale is projected and added, a mask token of that scale in its
    place where hidden, as SparK does. Predicted is from the finest sites of hidden patches: each predicts what lies
    at its place, such as 4 x 4 pixels; where a target is coarser, such as HOG's cells, several do so together.

    Args:
        in_dims: widths of the encoder's stages, finest first, each with half the sites a side of the one before it.
        out_dim: values per patch, out_side * out_side vectors row by row.
        out_side: vectors per patch side: for pixels the patch size.
        dim: width of the coarsest scale, halved at each finer one.
        depth: number of blocks of each scale.
        block: builds a block of so many channels.
        skips: read the maps of all stages; without, of the last alone.

    Raises:
        ValueError: if there is one stage only, or `dim` is too small to be halved so often.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dim: int,
        *,
        out_side: int,
        dim: int = 512,
        depth: int = 1,
        block: Callable[[int], Block] = Block,
        skips: bool = True,
    ) -> None:
        super().__init__()
        if len(in_dims) < 2:
            raise ValueError(
                "a UNet decoder goes up through the scales of a network, and this network has one only: "
                "choose decoder convnext or transformer"
            )
        assert out_dim % out_side**2 == 0
        self.reads_pyramid = skips
        self.sites_per_patch = 2 ** (len(in_dims) - 1)
        dims = [dim >> i for i in range(len(in_dims))]
        if dims[-1] < NARROWEST:
            raise ValueError(
                f"decoder_dim={dim} is too narrow for a UNet, which halves it {len(in_dims) - 1} times: "
                f"at least {NARROWEST * self.sites_per_patch}"
            )
        filled = [*zip(reversed(in_dims), dims, strict=True)]
        self.fills = nn.ModuleList(Fill(*widths) for widths in (filled if skips else filled[:1]))
        self.ups = nn.ModuleList(Upsample(*widths) for widths in itertools.pairwise(dims))
        self.scales = nn.ModuleList(nn.ModuleList(block(width) for _ in range(depth)) for width in dims)
        # a patch's finest sites and the target's vectors, both divided into cells x cells, as fine as can be
        self.cells, self.out_side = math.gcd(self.sites_per_patch, out_side), out_side
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        sites = (self.sites_per_patch // self.cells) ** 2
        self.pred = nn.Linear(sites * dims[-1], out_dim // self.cells**2)
        self.apply(init_weights)
        for fill in self.fills:
            nn.init.normal_(fill.get_parameter("mask_token"), std=0.02)

    def forward(self, maps: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """Predict the patches `hidden` (b, m), int64 without repeats, from the encoder's maps, finest first.

        Returns (b, m, out_dim). Without skips the last map is enough.

        Raises:
            ValueError: if a map has not twice the sites a side of the next.
        """
        b, h, w, _ = maps[-1].shape
        for i, x in enumerate(reversed(maps[-len(self.fills) :])):
            if x.shape[1:3] != (h << i, w << i):
                sizes = ", ".join(f"{x.shape[1]} x {x.shape[2]}" for x in maps)
                raise ValueError(f"a UNet decoder takes maps of half the size each, got {sizes}")
        is_hidden = ids_to_booleans(hidden, h * w)[:, :, None, None, None]
        everywhere = torch.arange(h * w, device=hidden.device).repeat(b, 1)
        sites = PackedSites.of_patches((h, w), everywhere, sites_per_patch=1)  # DenseSites' numbers, by our kernels
        x = self.fills[0](as_cells(maps[-1], (h, w)).flatten(1, 2), is_hidden)
        for i, blocks in enumerate(self.scales):
            if i > 0:
                x, sites = self.ups[i - 1](x), replace(sites, sites_per_patch=2**i)
            if 0 < i < len(self.fills):
                x = x + self.fills[i](as_cells(maps[-1 - i], (h, w)).flatten(1, 2), is_hidden)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, sites)
        return self._predict(gather_patches(x.reshape(b, h, w, -1), hidden, (h, w)).view(b, -1, *x.shape[2:]))

    def _predict(self, x: Tensor) -> Tensor:
        """(b, m, k, k, c) -> (b, m, out_dim)."""
        n, k, side = self.cells, self.sites_per_patch // self.cells, self.out_side // self.cells
        x = self.norm(x).unflatten(3, (n, k)).unflatten(2, (n, k)).transpose(3, 4).flatten(4)  # (b, m, n, n, kkc)
        out = self.pred(x).unflatten(4, (side, side, -1))  # (b, m, n, n, side, side, values)
        return out.transpose(3, 4).flatten(2)
