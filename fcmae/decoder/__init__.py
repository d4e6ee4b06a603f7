"""The FCMAE decoder."""

from fcmae.decoder.convnext import Decoder

__all__ = ["Decoder"]
