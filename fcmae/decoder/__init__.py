"""The FCMAE decoder."""

from fcmae.decoder.decoder import Decoder

__all__ = ["Decoder"]
