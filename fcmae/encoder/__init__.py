"""The ConvNeXt V2 encoder and the layouts it runs on."""

from fcmae.encoder.convnextv2 import VARIANTS, ConvNeXtV2

__all__ = ["VARIANTS", "ConvNeXtV2"]
