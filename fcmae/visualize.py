"""Pictures of what the model sees and makes: original | masked | reconstruction; knows no files of a run."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from fcmae.data.transforms import PixelNormalizer
from fcmae.loss import patch_statistics
from fcmae.masking import ids_to_visible
from fcmae.model import FCMAE
from fcmae.patches import patchify, unpatchify

HIDDEN_GRAY = 0.5
"""Of hidden patches in the masked picture, in [0, 1]."""
SMALLEST_SHOWN = 128
"""Pixels; smaller images are enlarged by a whole factor to at least this side."""


def reconstruct(
    images: Tensor, pred: Tensor, visible_ids: Tensor, patch: int, *, norm_pix_loss: bool
) -> tuple[Tensor, Tensor]:
    """Return (reconstruction, visible): images (b, c, H, W) with predicted hidden patches, booleans (b, 1, H, W).

    The visible patches are pasted in. With `norm_pix_loss` the model predicts patches without mean and variance;
    each hidden patch is given back its own from the original.

    Args:
        images: (b, c, H, W), normalised as the model saw them.
        pred: (b, L, patch * patch * c).
        visible_ids: int64 (b, p).
    """
    target = patchify(images.float(), patch)
    pred = pred.float()
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        pred = pred * std + mean
    visible = ids_to_visible(visible_ids, target.shape[1])[..., None]  # (b, L, 1)
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    pixels = visible.expand(-1, -1, patch * patch)
    return (
        unpatchify(torch.where(visible, target, pred), patch, grid),
        unpatchify(pixels, patch, grid),
    )


def as_rgb(images: Tensor) -> Tensor:
    """Show images (b, c, H, W) as (b, 3, H, W): RGB as it is, the first three of more, one or two as gray."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def draw_panels(originals: Tensor, reconstructions: Tensor, visible: Tensor) -> np.ndarray:
    """Draw one row per image, original | masked | reconstruction, under a line of titles: uint8 (h, w, 3).

    Args:
        originals: (b, c, H, W) in [0, 1].
        reconstructions: likewise.
        visible: booleans (b, 1, H, W).
    """
    masked = torch.where(visible, originals, HIDDEN_GRAY)
    columns = [as_rgb(images) for images in (originals, masked, reconstructions)]
    factor = max(1, -(-SMALLEST_SHOWN // min(originals.shape[-2:])))
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (3 b, 3, H, W), row by row
    rows = rows.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    padding = 4
    grid = make_grid(rows, nrow=3, padding=padding, pad_value=1.0)
    body = rearrange((grid * 255).round().to(torch.uint8), "c h w -> h w c").cpu().numpy()

    size = 15
    title = Image.new("RGB", (body.shape[1], size + 2 * padding), "white")
    pen = ImageDraw.Draw(title)
    width = rows.shape[-1] + padding
    for column, text in enumerate(("original", "masked", "reconstruction")):
        pen.text((padding + column * width, padding // 2), text, fill="black", font=ImageFont.load_default(size))
    return np.concatenate([np.asarray(title), body])


@torch.no_grad()
def draw_reconstructions(
    model: FCMAE, normalize: PixelNormalizer, pixels: Tensor, visible_ids: Tensor
) -> np.ndarray:
    """Draw what the model makes of images with these patches visible: uint8 (h, w, 3), see `draw_panels`.

    Args:
        pixels: uint8 (b, c, H, W).
        visible_ids: int64 (b, p).
    """
    device = model.decoder.mask_token.device
    images, visible_ids = normalize(pixels.to(device)), visible_ids.to(device)
    training = model.training
    model.eval()
    pred = model.forward(images, visible_ids).pred  # forward: a compiled model is compiled for training's shapes
    model.train(training)
    reconstruction, visible = reconstruct(
        images, pred, visible_ids, model.patch_size, norm_pix_loss=model.norm_pix_loss
    )
    return draw_panels(normalize.invert(images).cpu(), normalize.invert(reconstruction).cpu(), visible.cpu())
