"""ConvNeXt encoders, the networks beside them, and the layouts they run on."""

from fcmae.encoder.convnext import VARIANTS, ConvNeXt, ConvNeXtV2, set_fused

__all__ = ["VARIANTS", "ConvNeXt", "ConvNeXtV2", "set_fused"]
