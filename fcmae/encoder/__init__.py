"""The ConvNeXt V2 encoder and the layouts it runs on."""

from fcmae.encoder.convnext import VARIANTS, ConvNeXtV2, set_fused

__all__ = ["VARIANTS", "ConvNeXtV2", "set_fused"]
