"""Pictures of what a model sees and makes: reconstructions, confusion matrices; knows no files of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from fcmae.data.pixels import FULL
from fcmae.data.views import PixelNormalizer
from fcmae.files import atomic_path
from fcmae.hog import ORIENTATIONS, hog
from fcmae.loss import HOGTarget, PixelTarget, Target, patch_statistics
from fcmae.masking import ids_to_booleans
from fcmae.model import FCMAE, FCMAEOutput
from fcmae.patches import grid_shape, patchify, pick_patches, unpatchify

PERCENTILES = (0.02, 0.98)
"""Shown as black and white of pixels that are not of 8 bits."""

HIDDEN_GRAY = 0.5
"""Of hidden patches in the masked picture, in [0, 1]."""
HATCH, HATCH_WIDTH = (0.65, 0.85), 3
"""Grays of the stripes, so many pixels wide, where pixels are not known."""
SMALLEST_SHOWN = 128
"""Pixels; smaller images are enlarged by a whole factor to at least this side."""
CELL_SHOWN = 16
"""Pixels per side of a drawn cell of HOG, at least."""


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an uint8 picture (h, w, 3) as PNG, so that under its name there is never a part of it."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")


def write_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, like `write_picture`; a dollar in its texts is a dollar."""
    from matplotlib.text import Text  # here: it takes a second to import

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def paste(maps: Tensor, pred: Tensor, hidden_ids: Tensor, patch: int) -> Tensor:
    """Return maps (b, c, H, W) with the patches `hidden_ids` (b, m) replaced by pred (b, m, patch * patch * c)."""
    grid = (maps.shape[2] // patch, maps.shape[3] // patch)
    patches = patchify(maps, patch).scatter(1, hidden_ids[..., None].expand_as(pred), pred)
    return unpatchify(patches, patch, grid)


def reconstruct(
    images: Tensor, pred: Tensor, hidden_ids: Tensor, patch: int, *, norm_pix_loss: bool
) -> tuple[Tensor, Tensor]:
    """Return (reconstruction, visible): images (b, c, H, W) with predicted hidden patches, booleans (b, 1, H, W).

    The visible patches are pasted in. With `norm_pix_loss` the model predicts patches without mean and variance;
    each hidden patch gets back its own from the original.

    Args:
        images: (b, c, H, W), normalised as the model saw them, NaN where they are not known.
        pred: of the hidden patches (b, m, patch * patch * c).
        hidden_ids: int64 (b, m).
    """
    images, pred = images.float(), pred.float()
    if norm_pix_loss:
        mean, std = patch_statistics(pick_patches(images, hidden_ids, patch))
        pred = pred * std + mean
    return paste(images, pred, hidden_ids, patch), visible_pixels(hidden_ids, images, patch)


def visible_pixels(hidden_ids: Tensor, images: Tensor, patch: int) -> Tensor:
    """Return which pixels of images (b, c, H, W) are not in patches `hidden_ids` (b, m): booleans (b, 1, H, W)."""
    grid = grid_shape((images.shape[2], images.shape[3]), patch)
    visible = ~ids_to_booleans(hidden_ids, grid[0] * grid[1])[..., None]  # (b, L, 1)
    return unpatchify(visible.expand(-1, -1, patch * patch), patch, grid)


def draw_segments(histograms: Tensor, size: int) -> Tensor:
    """Draw `hog` (b, c * 9, h, w) as line segments, brighter the larger a bin: (b, c, h * size, w * size).

    A cell gets `size` x `size` pixels, in [0, 1].
    """
    angles = torch.arange(ORIENTATIONS, device=histograms.device)[:, None, None] * (math.pi / ORIENTATIONS)
    place = torch.arange(size, device=histograms.device) - (size - 1) / 2
    across = (place[:, None] * angles.sin() + place * angles.cos()).abs()  # (9, size, size): from the edge's line
    disc = place[:, None].square() + place.square() <= (size / 2) ** 2
    segments = (1.25 - across).clamp(0, 1) * disc
    bins = histograms.float().clamp(0, 1).unflatten(1, (-1, ORIENTATIONS))
    shown = (bins[..., None, None] * segments[:, None, None]).amax(2)  # (b, c, h, w, size, size)
    return rearrange(shown, "b c h w i j -> b c (h i) (w j)")


def as_rgb(images: Tensor, bands: Sequence[int] | None = None) -> Tensor:
    """Show images (b, c, H, W) as (b, 3, H, W): `bands`, from 0, as red, green and blue.

    Without them one is gray, two are magenta and green, of more the first three are taken.
    """
    chosen = bands or {1: (0, 0, 0), 2: (0, 1, 0)}.get(images.shape[1], (0, 1, 2))
    return images[:, list(chosen)]


def display_range(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is shown as black and as white of pixels (b, c, H, W), each (b, c, 1, 1), in full ranges.

    Those of 8 bits are shown as they are; of others the 2nd and 98th percentiles of what is known, not NaN, of each
    image and band. Where these are the same, it is shown as gray.
    """
    values = pixels.flatten(2).float() / FULL[pixels.dtype]
    if pixels.dtype == torch.uint8:
        low, high = torch.zeros_like(values[..., 0]), torch.ones_like(values[..., 0])
    else:
        low, high = (values.nanquantile(share, -1).nan_to_num(nan=0.0) for share in PERCENTILES)
        magnitude = torch.maximum(low.abs(), high.abs()).clamp(min=1e-12)
        around = torch.where(high - low > 1e-6 * magnitude, 0, magnitude)
        low, high = low - around, high + around
    return low[..., None, None], high[..., None, None]


def stretch(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return values with `low` as 0, black, and `high` as 1, white; see `display_range`."""
    return ((values - low) / (high - low)).clamp(0, 1)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Repeat each pixel of images (b, c, H, W) `factor` times along both sides."""
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def hatch(images: Tensor) -> Tensor:
    """Draw stripes in two grays, from the lower left to the upper right, where images (b, c, H, W) are NaN."""
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    stripes = torch.where((y[:, None] + x) // HATCH_WIDTH % 2 == 0, *HATCH)
    return torch.where(images.isnan(), stripes, images)


def draw_panels(
    columns: Mapping[str, Tensor], labels: Sequence[str] = (), bands: Sequence[int] | None = None
) -> np.ndarray:
    """Draw one row per image, its columns side by side under a line of titles: uint8 (h, w, 3).

    Args:
        columns: by title, images (b, c, H, W) in [0, 1], NaN to be hatched; the largest is a multiple of each other
            in size.
        labels: of the rows, drawn on their left; none for no labels.
        bands: see `as_rgb`.
    """
    largest = max(images.shape[-1] for images in columns.values())
    smallest_side = min(min(images.shape[-2:]) * largest // images.shape[-1] for images in columns.values())
    factor = max(1, -(-SMALLEST_SHOWN // smallest_side))
    panels = [enlarge(as_rgb(x, bands), largest // x.shape[-1] * factor) for x in columns.values()]
    rows = hatch(torch.stack(panels, dim=1).flatten(0, 1))  # row by row
    padding = 4
    grid = make_grid(rows, nrow=len(columns), padding=padding, pad_value=1.0)
    body = rearrange((grid * 255).round().to(torch.uint8), "c h w -> h w c").cpu().numpy()

    size = 15
    font = ImageFont.load_default(size)
    left = max((round(font.getlength(label)) + 2 * padding for label in labels), default=0)
    top = size + 2 * padding
    picture = Image.new("RGB", (left + body.shape[1], top + body.shape[0]), "white")
    picture.paste(Image.fromarray(body), (left, top))
    pen = ImageDraw.Draw(picture)
    height, width = rows.shape[-2] + padding, rows.shape[-1] + padding
    for column, text in enumerate(columns):
        pen.text((left + padding + column * width, padding // 2), text, fill="black", font=font)
    for row, text in enumerate(labels):
        pen.text((padding, top + row * height + height // 2 - size), text, fill="black", font=font)
    return np.asarray(picture)


def _prediction_columns(
    target: Target, images: Tensor, out: FCMAEOutput, patch: int, show: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the columns that show what was predicted, by title; NaN where the truth is not known."""
    match target:
        case PixelTarget(norm_pix_loss=norm_pix_loss):
            whole, _ = reconstruct(images, out.pred, out.hidden_ids, patch, norm_pix_loss=norm_pix_loss)
            return {"reconstruction": show(whole.masked_fill(images.isnan(), torch.nan))}
        case HOGTarget():
            cell = target.cell(patch)
            histograms = hog(images, cell)
            whole = paste(histograms, out.pred.float(), out.hidden_ids, patch // cell)
            whole = whole.masked_fill(histograms.isnan(), torch.nan)
            size = max(cell, CELL_SHOWN)
            return {"HOG": draw_segments(histograms, size), "HOG predicted": draw_segments(whole, size)}
        case _:
            raise TypeError(f"no picture of {target}")


def _columns(model: FCMAE, normalize: PixelNormalizer, pixels: Tensor, visible_ids: Tensor) -> dict[str, Tensor]:
    """Return original | masked | what is predicted of pixels (b, c, H, W), by title, on the CPU."""
    images = normalize(pixels, unknown=torch.nan)
    low, high = display_range(pixels)

    def show(images: Tensor) -> Tensor:
        return stretch(normalize.invert(images), low, high)

    out = model.forward(images, visible_ids)  # forward: a compiled model is compiled for training's shapes
    originals = show(images)
    masked = torch.where(visible_pixels(out.hidden_ids, images, model.patch_size), originals, HIDDEN_GRAY)
    columns = {"original": originals, "masked": masked}
    columns |= _prediction_columns(model.target, images, out, model.patch_size, show)
    return {title: column.cpu() for title, column in columns.items()}


@torch.no_grad()
def draw_reconstructions(
    model: FCMAE,
    normalize: PixelNormalizer,
    pixels: Tensor,
    visible_ids: Tensor,
    bands: Sequence[int] | None = None,
) -> np.ndarray:
    """Draw what the model makes of images with these patches visible: uint8 (h, w, 3), see `draw_panels`.

    HOG is drawn as line segments along edges: the image's own, and that with the hidden patches predicted.

    Args:
        pixels: (b, c, H, W), see `display_range`.
        visible_ids: int64 (b, p).
        bands: see `as_rgb`.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    columns = _columns(model, normalize, pixels.to(device), visible_ids.to(device))
    model.train(training)
    return draw_panels(columns, bands=bands)


@torch.no_grad()
def draw_mask_ratios(
    model: FCMAE,
    normalize: PixelNormalizer,
    pixels: Tensor,
    mask_ratios: Sequence[float],
    *,
    bands: Sequence[int] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draw what the model makes of one image at several mask ratios, a row for each: uint8 (h, w, 3).

    What is visible at a high ratio is visible at every lower one. As `draw_reconstructions`.

    Args:
        pixels: (c, H, W), sides multiples of the patch size.
        mask_ratios: shares of hidden patches, inside (0, 1).
        bands: see `as_rgb`.
        seed: of the random masks.

    Raises:
        ValueError: if a ratio or the image's size does not fit.
    """
    grid = grid_shape((pixels.shape[1], pixels.shape[2]), model.patch_size)
    batch = pixels[None].to(next(model.parameters()).device)
    model.eval()
    rows = []
    for ratio in mask_ratios:
        generator = torch.Generator().manual_seed(seed)  # the same noise: masks within masks
        ids = model.mask_sampler(grid, ratio)(1, generator).to(batch.device)
        rows.append(_columns(model, normalize, batch, ids))
    columns = {title: torch.cat([row[title] for row in rows]) for title in rows[0]}
    return draw_panels(columns, [f"{ratio:.0%} hidden" for ratio in mask_ratios], bands)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def draw_captioned(pixels: Tensor, captions: Sequence[tuple[str, str]], columns: int = 4) -> np.ndarray:
    """Draw images (b, c, H, W) in rows, with two lines below each: uint8 (h, w, 3)."""
    factor = max(1, -(-SMALLEST_SHOWN // min(pixels.shape[-2:])))
    values = pixels.float() / FULL[pixels.dtype]
    shown = hatch(enlarge(as_rgb(stretch(values, *display_range(pixels))), factor))
    cells = rearrange((shown * 255).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    padding, size = 6, 14
    font = ImageFont.load_default(size)
    height, width = cells.shape[1] + 2 * size + 3 * padding, cells.shape[2] + 2 * padding
    rows, columns = -(-len(cells) // columns), min(columns, len(cells))
    picture = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(picture)
    for number, (cell, lines) in enumerate(zip(cells, captions, strict=True)):
        left, top = number % columns * width + padding, number // columns * height + padding
        picture.paste(Image.fromarray(cell), (left, top))
        for line, text in enumerate(lines):
            place = left, top + cells.shape[1] + 2 + line * (size + 2)
            pen.text(place, _shorten(text, font, width - 2 * padding), fill="black", font=font)
    return np.asarray(picture)


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix: uint8 (h, w, 3); darker cells hold a larger share of their row, the true class.

    Up to 50 classes are named; up to 30 have their shares in percent written into the cells.

    Args:
        confusion: (true class, predicted class): number of images.
    """
    number = len(confusion)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    named = number <= 50
    cell = (36 if number <= 30 else 20) if named else max(1, 1000 // number)
    font = ImageFont.load_default(14)
    longest = max(font.getlength(name) for name in class_names) if named else 0
    margin, room = 12, math.ceil(min(200, longest)) + 8
    left = top = margin + 20 + room
    size = number * cell
    picture = Image.new("RGB", (left + size + margin, top + size + margin), "white")
    pen = ImageDraw.Draw(picture)

    white, blue = np.array([255, 255, 255]), np.array([8, 48, 107])
    colours = (white + shares[..., None] * (blue - white)).round().astype(np.uint8)
    picture.paste(Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST), (left, top))
    pen.rectangle((left - 1, top - 1, left + size, top + size), outline="gray")

    def upright(text: str, width: int, x: int, bottom: int) -> None:
        """Write text upwards, in a strip of `width` pixels around x that begins at `bottom`."""
        strip = Image.new("RGB", (width, 20), "white")
        ImageDraw.Draw(strip).text((0, 10), text, fill="black", font=font, anchor="lm")
        picture.paste(strip.rotate(90, expand=True), (x - 10, bottom - width))

    pen.text((left + size // 2, margin), "predicted class", fill="black", font=font, anchor="mm")
    upright("true class", 80, margin, top + size // 2 + 40)
    if named:
        for i, name in enumerate(class_names):
            middle = i * cell + cell // 2
            text = _shorten(name, font, room - 8)
            pen.text((left - 8, top + middle), text, fill="black", font=font, anchor="rm")
            upright(text, room - 8, left + middle, top - 4)
    if number <= 30:
        for i, j in np.argwhere(confusion > 0).tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            where = (left + j * cell + cell // 2, top + i * cell + cell // 2)
            pen.text(where, f"{100 * shares[i, j]:.0f}", fill=colour, font=font, anchor="mm")
    return np.asarray(picture)
