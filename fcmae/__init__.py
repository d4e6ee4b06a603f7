"""fcmae: pretrain ConvNets on your own images without labels (FCMAE and ConvNeXt V2, arXiv 2301.00808)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcmae.encoder import VARIANTS, ConvNeXt, ConvNeXtV2
    from fcmae.load import load_encoder
    from fcmae.masking import sample_visible_ids
    from fcmae.model import FCMAE, FCMAEOutput
    from fcmae.patches import patchify, unpatchify

__version__ = "0.1.0"

__all__ = [
    "FCMAE",
    "VARIANTS",
    "ConvNeXt",
    "ConvNeXtV2",
    "FCMAEOutput",
    "load_encoder",
    "patchify",
    "sample_visible_ids",
    "unpatchify",
]

HOMES = {
    "FCMAE": "model",
    "VARIANTS": "encoder",
    "ConvNeXt": "encoder",
    "ConvNeXtV2": "encoder",
    "FCMAEOutput": "model",
    "load_encoder": "load",
    "patchify": "patches",
    "sample_visible_ids": "masking",
    "unpatchify": "patches",
}
"""Where each public name lives: that is imported, and torch with it, when the name is first used (PEP 562)."""

if not TYPE_CHECKING:  # type checkers know the names, and that there are no others

    def __getattr__(name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *HOMES})
