"""The ConvNeXt decoder (V2 paper, section 3.1): fills hidden cells with a mask token and predicts their patches."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.encoder.convnext import Block, init_weights
from fcmae.encoder.packed import PackedSites, gather_patches
from fcmae.masking import ids_to_booleans


def conv1x1(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a 1x1 convolution to the last axis of x (b, h, w, c)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class ConvNeXtDecoder(nn.Module):
    """1x1 projection, mask token, `depth` dense ConvNeXt blocks, 1x1 prediction; official parameter names.

    Args:
        in_dims: widths of the encoder's stages; only the last is read.
        out_dim: values per patch.
        out_side: not read, as a 1x1 prediction knows no order of its values.
        dim: width of the decoder.
        depth: number of blocks.
        block: builds a block of so many channels.
    """

    reads_pyramid = False

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dim: int,
        *,
        out_side: int,
        dim: int = 512,
        depth: int = 1,
        block: Callable[[int], Block] = Block,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dims[-1], dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.decoder = nn.ModuleList(block(dim) for _ in range(depth))
        self.pred = nn.Conv2d(dim, out_dim, kernel_size=1)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, maps: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """Predict the patches `hidden` (b, m), int64 without repeats, from the encoder's last map (b, h, w, c).

        Returns (b, m, out_dim). Predictions of visible patches have no part in the loss and are not made.
        """
        b, h, w, _ = maps[-1].shape
        x = conv1x1(maps[-1], self.proj)
        is_hidden = ids_to_booleans(hidden, h * w).view(b, h, w, 1)
        x = torch.where(is_hidden, self.mask_token.flatten().to(x.dtype), x)
        everywhere = torch.arange(h * w, device=x.device).repeat(b, 1)
        sites = PackedSites.of_patches((h, w), everywhere, sites_per_patch=1)  # DenseSites' numbers, by our kernels
        x = x.view(b, h * w, 1, 1, -1)
        for block in self.decoder:
            x = block(x, sites)
        x = gather_patches(x.view(b, h, w, -1), hidden, (h, w))  # (b, m, 1, 1, dim)
        return conv1x1(x, self.pred).flatten(1, 3)
