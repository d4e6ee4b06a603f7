"""FCMAE: encoder plus decoder, from images to a loss; knows nothing of optimizers, devices or files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.decoder import DECODERS
from fcmae.encoder.base import Layout, MaskedNetwork, Variant, Version
from fcmae.encoder.layouts import MaskedSites
from fcmae.encoder.networks import build_network
from fcmae.loss import TARGETS, Target
from fcmae.masking import MaskSampler, hidden_ids
from fcmae.patches import grid_shape


@dataclass
class FCMAEOutput:
    """What `FCMAE` returns."""

    loss: Tensor
    """Scalar, at least float32."""
    pred: Tensor
    """(b, L - p, patch * patch * in_chans): hidden patches, values in (p, q, c) order; patch-normalised with
    `norm_pix_loss`. Of the target HOG (b, L - p, its `num_values`)."""
    visible_ids: Tensor
    """int64 (b, p)."""
    hidden_ids: Tensor
    """int64 (b, L - p), sorted."""


class FCMAE(nn.Module):
    """Fully convolutional masked autoencoder (arXiv 2301.00808, section 3).

    `set_fused(model, False)` runs the blocks of encoder and decoder module by module, see `ConvNeXt`.

    Args:
        variant: a name of `fcmae.VARIANTS`, an explicit (depths, dims), or timm/NAME for a network of timm.
        version: 1 for ConvNeXt V1 (LayerScale), 2 for V2 (GRN).
        response: what stands at GRN's place; "auto" is the version's own, see `ConvNeXt`.
        grn: arguments of `GRN` other than its own.
        in_chans: channels of the images.
        stem_stride: 4, 2 or 1; a patch has 8 * stem_stride pixels per side.
        decoder: a name of `fcmae.decoder.DECODERS`.
        decoder_depth: number of decoder blocks.
        decoder_dim: width of the decoder.
        sparse: hidden patches are as if they were not there. Without, they are patches of zeros to an encoder that
            is dense: the V2 paper's comparison (section 3.1), where masking is not worth much.
        mask_ratio: share of patches hidden, inside (0, 1).
        mask_shape: a name of `fcmae.masking.SHAPES`: random, block or grid masking.
        mask_group: side of the squares of patches that are hidden or shown together.
        norm_pix_loss: reconstruct patch-normalised pixels; of the target pixels alone.
        target: a name of `fcmae.loss.TARGETS`: what is predicted of hidden patches, pixels or hog.
        nodata: whether images may have pixels that are not known, NaN: zeros to the encoder, left out of the loss.
        layout: how the encoder computes; all layouts give the same numbers. "auto" is packed.
        drop_path: stochastic depth of the encoder's last block.

    Raises:
        ValueError: if an argument is out of range, or the layout needs a package that is missing.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        version: Version = 2,
        response: str = "auto",
        grn: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        stem_stride: int = 4,
        sparse: bool = True,
        decoder: str = "convnext",
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        mask_ratio: float = 0.6,
        mask_shape: str = "random",
        mask_group: int = 1,
        norm_pix_loss: bool = True,
        target: str = "pixels",
        nodata: bool = False,
        layout: Layout = "auto",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask_shape = mask_shape
        self.mask_group = mask_group
        self.mask_sampler((mask_group, 2 * mask_group))  # refuses what is out of range on any grid
        if decoder_depth < 1 or decoder_dim < 1:
            raise ValueError(f"got decoder_depth={decoder_depth}, decoder_dim={decoder_dim}: both at least 1")
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: choose from {', '.join(DECODERS)}")
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
        self.target: Target = TARGETS[target](norm_pix_loss, nodata)
        self.nodata = nodata
        encoder = build_network(
            variant,
            version=version,
            response=response,
            grn=grn,
            in_chans=in_chans,
            stem_stride=stem_stride,
            drop_path=drop_path,
        )
        if not isinstance(encoder, MaskedNetwork):
            raise ValueError(
                f"variant {variant} is dense alone and cannot be pretrained: train it by fcmae finetune"
            )
        encoder.require_layout(layout)
        self.encoder = encoder
        self.patch_size = self.encoder.patch_size
        self.decoder = DECODERS[decoder](
            self.encoder.dims,
            self.target.num_values(self.patch_size, in_chans),
            out_side=self.target.side(self.patch_size),
            dim=decoder_dim,
            depth=decoder_depth,
            block=self.encoder.block,
        )
        self.sparse = sparse
        self.layout: Layout = layout

    def mask_sampler(self, grid: tuple[int, int], mask_ratio: float | None = None) -> MaskSampler:
        """Return what draws this model's masks on a grid of patches (gh, gw), or such masks of another ratio.

        Raises:
            ValueError: if the grid or the ratio does not fit.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        return MaskSampler(grid, ratio, self.mask_shape, self.mask_group)

    def _encode(self, images: Tensor, visible_ids: Tensor) -> list[Tensor]:
        if self.nodata:
            images = images.masked_fill(images.isnan(), 0)
        layout, ids = self.layout, visible_ids
        if not self.sparse:
            layout, ids = "dense", None
            size = (images.shape[-2], images.shape[-1])
            grid_shape(size, self.patch_size)  # refuses what does not fit
            pixels = MaskedSites(size, visible_ids, sites_per_patch=self.patch_size)
            images = pixels.scatter(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.decoder.reads_pyramid:
            return self.encoder.feature_maps(images, ids, layout)
        return [self.encoder.features(images, ids, layout)]

    def forward(
        self,
        images: Tensor,
        visible_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FCMAEOutput:
        """Hide patches, reconstruct them, and measure the error on them.

        Args:
            images: (b, in_chans, H, W), normalised, sides multiples of the patch size; with `nodata` NaN where
                not known.
            visible_ids: int64 (b, p), without repeats, 1 <= p < L; drawn by `mask_sampler` when None.
            generator: source of the sampling when `visible_ids` is None.

        Raises:
            ValueError: if shapes do not fit.
        """
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        num_patches = grid[0] * grid[1]
        if visible_ids is None:
            visible_ids = self.mask_sampler(grid)(len(images), generator, images.device).to(images.device)
        maps = self._encode(images, visible_ids)  # refuses what does not fit
        hidden = hidden_ids(visible_ids, num_patches)
        if hidden.shape[1] == 0:
            raise ValueError(f"all {num_patches} patches are visible: nothing is left to reconstruct")
        pred = self.decoder(maps, hidden)
        loss = self.target.loss(pred, images, hidden, self.patch_size)
        return FCMAEOutput(loss, pred, visible_ids, hidden)
