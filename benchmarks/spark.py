"""The baseline of the benchmarks: sparse convolution as SparK (arXiv 2301.03580, section 3.1) emulates it.

Written from the paper's description. Every convolution is an ordinary dense one whose output is multiplied by
the mask; LayerNorm takes the active sites out as rows of channels, normalises them and puts them back among
zeros; linear layers and GELU run on all sites, and a block's output is multiplied by the mask.
GRN, which SparK's networks do not have, is that of a masked dense block: norms over active sites.

Where the paper leaves a choice, the faster one is taken: channels last throughout, one mask per stage instead of
one per layer, multiplication in place, and our own gather and scatter with their cheap backward.
"""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from fcmae.encoder.convnext import Block, ConvNeXt, Variant
from fcmae.encoder.layouts import DenseSites, MaskedSites, Sites, conv2d_channels_last
from fcmae.encoder.packed import PackedSites
from fcmae.patches import grid_shape


@dataclass(frozen=True)
class SparkSites(DenseSites):
    """Dense storage (b, h, w, c); features at hidden sites are zero between blocks."""

    all_active = False
    mask: Tensor
    """float32 (b, h, w, 1), one at active sites."""
    patches: PackedSites
    """The same visible patches, to gather and scatter rows with."""

    @classmethod
    def of(cls, patches: PackedSites) -> Self:
        """Return the first stage's layout for these visible patches."""
        k = patches.sites_per_patch
        grid = (patches.grid[0] * k, patches.grid[1] * k)
        mask = MaskedSites(grid, patches.visible_ids, k).active(k).float()
        return cls(grid, mask, patches)

    def stem(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        s = conv.weight.shape[-1]
        pixels = self.mask.repeat_interleave(s, 1).repeat_interleave(s, 2).permute(0, 3, 1, 2)
        return self.hide(super().stem(images * pixels, conv))

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self.hide(conv2d_channels_last(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups))

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Self]:
        x, coarser = super().downsample(x, conv)
        patches = replace(self.patches, sites_per_patch=self.patches.sites_per_patch // 2)
        coarser = replace(coarser, mask=self.mask[:, ::2, ::2].contiguous(), patches=patches)
        return coarser.hide(x), coarser

    def sum(self, x: Tensor) -> Tensor:
        return super().sum(x * self.mask.to(x.dtype))

    def norm(self, x: Tensor) -> Tensor:
        return super().norm(self.hide(x))  # in place: hidden features are never read, and a copy takes memory

    def hide(self, x: Tensor) -> Tensor:
        """Multiply x by the mask, in place."""
        return x.mul_(self.mask.to(x.dtype))

    @property
    def num_active(self) -> int:
        return self.patches.num_active


class Visibility:
    """The visible patches of the current batch, shared by a network's LayerNorms, which do not see the sites."""

    patches: PackedSites


class SparkLayerNorm(nn.LayerNorm):
    """LayerNorm of active sites only: gathered as rows of channels, normalised, scattered among zeros."""

    def __init__(self, norm: nn.LayerNorm, visibility: Visibility) -> None:
        super().__init__(list(norm.normalized_shape), norm.eps, norm.elementwise_affine)
        self.visibility = visibility

    def forward(self, input: Tensor) -> Tensor:
        patches = self.visibility.patches
        patches = replace(patches, sites_per_patch=input.shape[1] // patches.grid[0])
        return patches.scatter(super().forward(patches.gather(input)))


class SparkEncoder(ConvNeXt):
    """`ConvNeXt` with the same parameters by the same names, computed over `SparkSites` whatever the layout."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant)
        self.visibility = Visibility()
        for module in [*self.downsample_layers.modules(), *self.stages.modules()]:
            if isinstance(module, Block):
                module.register_forward_hook(lambda block, inputs, out: inputs[1].hide(out))
            for name, child in list(module.named_children()):
                if type(child) is nn.LayerNorm:
                    module.add_module(name, SparkLayerNorm(child, self.visibility))

    def sites(self, images: Tensor, visible_ids: Tensor | None, layout: str) -> Sites:
        assert visible_ids is not None
        grid = grid_shape((images.shape[2], images.shape[3]), self.patch_size)
        self.visibility.patches = PackedSites.of_patches(grid, visible_ids)
        return SparkSites.of(self.visibility.patches)
