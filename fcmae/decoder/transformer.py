"""The Transformer decoder (V2 paper, section 3.1; MAE, arXiv 2111.06377): timm's blocks over all patches.

The one module of decoder and model that knows timm, and imports it only when such a decoder is built.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fcmae.encoder.convnext import Block, init_weights
from fcmae.encoder.packed import gather_patches
from fcmae.masking import ids_to_booleans

HEAD_DIM = 32
"""Channels of an attention head; MAE's decoder has 16 heads of 512 channels."""


class TransformerDecoder(nn.Module):
    """Linear projection, mask token, fixed sine-cosine positions, `depth` blocks of a ViT, LayerNorm, prediction.

    Args:
        in_dims: widths of the encoder's stages; only the last is read.
        out_dim: values per patch.
        out_side: not read, as a linear prediction knows no order of its values.
        dim: width of the decoder.
        depth: number of blocks; the paper's has 8.
        block: not read, as the blocks are timm's.

    Raises:
        ValueError: if `dim` is no multiple of 32, the width of a head.
    """

    reads_pyramid = False

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dim: int,
        *,
        out_side: int,
        dim: int = 512,
        depth: int = 8,
        block: Callable[[int], Block] = Block,
    ) -> None:
        if dim % HEAD_DIM:
            raise ValueError(
                f"decoder_dim={dim}: a Transformer decoder takes a multiple of {HEAD_DIM}, its heads' width"
            )
        from timm.layers.norm import LayerNorm
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
        from timm.models.vision_transformer import Block as ViTBlock

        super().__init__()
        self.proj = nn.Linear(in_dims[-1], dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = build_sincos2d_pos_embed
        self.blocks = nn.ModuleList(
            ViTBlock(dim, dim // HEAD_DIM, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, maps: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """Predict the patches `hidden` (b, m), int64 without repeats, from the encoder's last map (b, h, w, c).

        Returns (b, m, out_dim).
        """
        b, h, w, _ = maps[-1].shape
        x = self.proj(maps[-1].flatten(1, 2))  # (b, L, c)
        x = torch.where(ids_to_booleans(hidden, h * w)[..., None], self.mask_token.to(x.dtype), x)
        dim, device, dtype = x.shape[-1], x.device, self.mask_token.dtype
        x = x + self.positions([h, w], dim, device=device, dtype=dtype)
        for block in self.blocks:
            x = block(x)
        x = gather_patches(x.view(b, h, w, -1), hidden, (h, w)).flatten(1, 3)  # (b, m, c)
        return self.pred(self.norm(x))
