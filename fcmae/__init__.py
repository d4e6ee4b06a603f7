"""fcmae: pretrain ConvNets on your own images without labels (FCMAE and ConvNeXt V2, arXiv 2301.00808)."""

from fcmae.encoder import VARIANTS, ConvNeXtV2
from fcmae.load import load_encoder
from fcmae.masking import sample_visible_ids
from fcmae.model import FCMAE, FCMAEOutput
from fcmae.patches import patchify, unpatchify

__version__ = "0.1.0"

__all__ = [
    "FCMAE",
    "VARIANTS",
    "ConvNeXtV2",
    "FCMAEOutput",
    "load_encoder",
    "patchify",
    "sample_visible_ids",
    "unpatchify",
]
