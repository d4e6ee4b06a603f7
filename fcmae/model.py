"""FCMAE: encoder plus decoder, from images to a loss; knows nothing of optimizers, devices or files."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.decoder import ConvNeXtDecoder
from fcmae.encoder.convnext import ConvNeXtV2, Layout, Variant, require_layout
from fcmae.loss import hidden_patch_loss
from fcmae.masking import count_visible, hidden_ids, sample_visible_ids


@dataclass
class FCMAEOutput:
    """What `FCMAE` returns."""

    loss: Tensor
    """Scalar, at least float32."""
    pred: Tensor
    """(b, L - p, patch * patch * in_chans): hidden patches, values in (p, q, c) order; patch-normalised with
    `norm_pix_loss`."""
    visible_ids: Tensor
    """int64 (b, p)."""
    hidden_ids: Tensor
    """int64 (b, L - p), sorted."""


class FCMAE(nn.Module):
    """Fully convolutional masked autoencoder (arXiv 2301.00808, section 3).

    `set_fused(model, False)` runs the blocks of encoder and decoder module by module, see `ConvNeXtV2`.

    Args:
        variant: a name of `fcmae.VARIANTS` or an explicit (depths, dims).
        in_chans: channels of the images.
        stem_stride: 4, 2 or 1; a patch has 8 * stem_stride pixels per side.
        decoder_depth: number of decoder blocks.
        decoder_dim: width of the decoder.
        mask_ratio: share of patches hidden, inside (0, 1).
        norm_pix_loss: reconstruct patch-normalised pixels.
        layout: how the encoder computes; all layouts give the same numbers. "auto" is packed.
        drop_path: stochastic depth of the encoder's last block.

    Raises:
        ValueError: if an argument is out of range, or the layout needs a package that is missing.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        in_chans: int = 3,
        stem_stride: int = 4,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = True,
        layout: Layout = "auto",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        count_visible(2, mask_ratio)
        require_layout(layout)
        if decoder_depth < 1 or decoder_dim < 1:
            raise ValueError(f"got decoder_depth={decoder_depth}, decoder_dim={decoder_dim}: both at least 1")
        self.encoder = ConvNeXtV2(variant, in_chans=in_chans, stem_stride=stem_stride, drop_path=drop_path)
        self.patch_size = self.encoder.patch_size
        self.decoder = ConvNeXtDecoder(
            self.encoder.dims[-1], self.patch_size**2 * in_chans, dim=decoder_dim, depth=decoder_depth
        )
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.layout: Layout = layout

    def forward(
        self,
        images: Tensor,
        visible_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FCMAEOutput:
        """Hide patches, reconstruct them, and measure the error on them.

        Args:
            images: (b, in_chans, H, W), normalised, sides multiples of the patch size.
            visible_ids: int64 (b, p), without repeats, 1 <= p < L; sampled with `mask_ratio` when None.
            generator: source of the sampling when `visible_ids` is None.

        Raises:
            ValueError: if shapes do not fit.
        """
        num_patches = images.shape[-2] // self.patch_size * (images.shape[-1] // self.patch_size)
        if visible_ids is None:
            ids = sample_visible_ids(len(images), num_patches, self.mask_ratio, generator, images.device)
            visible_ids = ids.to(images.device)
        features = self.encoder.features(images, visible_ids, self.layout)  # refuses what does not fit
        hidden = hidden_ids(visible_ids, num_patches)
        if hidden.shape[1] == 0:
            raise ValueError(f"all {num_patches} patches are visible: nothing is left to reconstruct")
        pred = self.decoder(features, hidden)
        loss = hidden_patch_loss(pred, images, hidden, self.patch_size, norm_pix_loss=self.norm_pix_loss)
        return FCMAEOutput(loss, pred, visible_ids, hidden)
