"""Decoders of FCMAE, one a file: each predicts hidden patches from the encoder's map; none knows images or losses.

All have one signature: `Decoder(in_dim, out_dim, *, dim, depth)`, called with features (b, h, w, in_dim), one site
per patch, and the ids of hidden patches (b, m), returns (b, m, out_dim).
"""

from fcmae.decoder.convnext import ConvNeXtDecoder

__all__ = ["ConvNeXtDecoder"]
