"""Decoders of FCMAE, one a file: each predicts hidden patches from the encoder's maps; none knows images or losses.

All have this signature: `Decoder(in_dims, out_dim, *, dim, depth, block)`, called with maps (b, h, w, in_dims[i])
of the encoder's stages, finest first, the last with one site per patch, and the ids of hidden patches (b, m),
returns (b, m, out_dim). One with `reads_pyramid=False` looks at the last map only, and may be given that alone.
"""

from collections.abc import Callable
from typing import Any

from fcmae.decoder.convnext import ConvNeXtDecoder

DECODERS: dict[str, Callable[..., Any]] = {"convnext": ConvNeXtDecoder}
"""By name, as `FCMAE` takes it."""

__all__ = ["DECODERS", "ConvNeXtDecoder"]
