"""Decoders of FCMAE, one a file: each predicts hidden patches from the encoder's maps; none knows images or losses.

All have this signature: `Decoder(in_dims, out_dim, *, out_side, dim, depth, block)`, called with maps
(b, h, w, in_dims[i]) of the encoder's stages, finest first, the last with one site per patch, and the ids of hidden
patches (b, m), returns (b, m, out_dim). One with `reads_pyramid=False` looks at the last map only, and may be given
that alone. A patch's values are out_side x out_side vectors row by row, which tells a decoder where each belongs.
"""

import functools
from collections.abc import Callable
from typing import Any

from fcmae.decoder.convnext import ConvNeXtDecoder
from fcmae.decoder.transformer import TransformerDecoder
from fcmae.decoder.unet import UNetDecoder

DECODERS: dict[str, Callable[..., Any]] = {
    "convnext": ConvNeXtDecoder,
    "unet": UNetDecoder,
    "unet_no_skips": functools.partial(UNetDecoder, skips=False),
    "transformer": TransformerDecoder,
}
"""By name, as `FCMAE` takes it."""

__all__ = ["DECODERS", "ConvNeXtDecoder", "TransformerDecoder", "UNetDecoder"]
