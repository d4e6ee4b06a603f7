"""The official FCMAE (facebookresearch/ConvNeXt-V2), from a folder that its user has; nothing of it is here."""

import importlib
import sys
import types
from pathlib import Path

import timm.layers
from torch import Tensor, nn

from fcmae import FCMAEOutput
from fcmae.encoder.minkowski import import_engine


class Official(nn.Module):
    """The model of `models/fcmae.py` behind the signature of ours; it draws its masks itself."""

    def __init__(self, folder: Path, variant: str, image_size: int, mask_ratio: float) -> None:
        """Build the model.

        Raises:
            ValueError: if the folder is not that repository, or MinkowskiEngine is missing.
        """
        super().__init__()
        if not (folder / "models" / "fcmae.py").is_file():
            raise ValueError(f"--official {folder}: holds no models/fcmae.py; clone facebookresearch/ConvNeXt-V2")
        engine = import_engine()
        if not hasattr(engine, "MinkowskiDepthwiseConvolution"):  # of its authors' own fork of the engine
            engine.MinkowskiDepthwiseConvolution = engine.MinkowskiChannelwiseConvolution
        for name in ("timm.models.layers", "MinkowskiOps"):  # where it looks for what has moved since
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["timm.models.layers"].__dict__.update(vars(timm.layers))
        sys.modules["MinkowskiOps"].__dict__.update(to_sparse=engine.to_sparse)
        sys.path.insert(0, str(folder))
        try:
            module = importlib.import_module("models.fcmae")
        finally:
            sys.path.remove(str(folder))
        build = getattr(module, f"convnextv2_{variant}")
        self.model = build(img_size=image_size, mask_ratio=mask_ratio, norm_pix_loss=True)
        self.mask_ratio = mask_ratio

    def forward(self, images: Tensor, visible_ids: Tensor) -> FCMAEOutput:
        """Return the loss of masks of its own; `visible_ids` are not used."""
        loss, pred, _ = self.model(images, mask_ratio=self.mask_ratio)
        return FCMAEOutput(loss, pred, visible_ids, visible_ids)
