"""Pictures of segmentations: classes in colours, overlays, image | truth | prediction, PNG; knows no model."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fcmae.data.batches import NOT_COUNTED
from fcmae.data.masks import as_values
from fcmae.data.pixels import FULL
from fcmae.files import atomic_path
from fcmae.visualize import as_rgb, display_range, draw_panels, enlarge, stretch

COLOURS = 256
"""Different ones; more classes begin again."""

NOTHING = 1.0
"""Brightness of pixels without a class, in [0, 1]: white."""

OPACITY = 0.5
"""Of classes over an image."""

LEAST_WIDTH = 256
"""Pixels of an overlay, so that names fit below it."""

ROWS, ENOUGH = 256, 1 << 20
"""Rows of an overlay that are drawn at a time, and about the most pixels by which black and white are chosen."""


@functools.cache
def class_colours() -> np.ndarray:
    """Return the colours of classes, the same everywhere: uint8 (`COLOURS`, 3), all of them different.

    The first, often the background's, is dark gray. Each other is the one, of a grid, that is farthest from white,
    which stands for no class, and from all before it; green counts most in that, then blue, as they do to the eye.
    """
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 32)] * 3, indexing="ij"), -1).reshape(-1, 3) + 16

    def from_all(colour: np.ndarray) -> np.ndarray:
        return (np.square(grid - colour) * (2, 4, 3)).sum(1)

    colours = [np.array((64, 64, 64))]
    nearest = np.minimum(from_all(colours[0]), from_all(np.array((255, 255, 255))))
    while len(colours) < COLOURS:
        colours.append(grid[nearest.argmax()])
        nearest = np.minimum(nearest, from_all(colours[-1]))
    return np.array(colours, np.uint8)


def paint(classes: Tensor) -> Tensor:
    """Return classes (b, h, w) in their colours, those of no class in white: float32 (b, 3, h, w) in [0, 1]."""
    colours = torch.from_numpy(class_colours()).float() / 255
    painted = colours[classes.long().clamp(min=0) % COLOURS].permute(0, 3, 1, 2)
    return torch.where(classes[:, None] < 0, NOTHING, painted)


def shown(pixels: Tensor, bands: Sequence[int] | None, low: Tensor, high: Tensor) -> Tensor:
    """Return pixels (b, c, h, w) as they are shown, see `display_range`: float32 (b, 3, h, w) in [0, 1]."""
    return as_rgb(stretch(pixels.float() / FULL[pixels.dtype], low, high).nan_to_num(), bands)


def overlay(images: Tensor, classes: Tensor) -> Tensor:
    """Lay classes (b, h, w) in their colours over images (b, 3, h, w) in [0, 1]; those of no class leave them."""
    mixed = (1 - OPACITY) * images + OPACITY * paint(classes)
    return torch.where(classes[:, None] < 0, images, mixed)


def draw_legend(class_names: Sequence[str], classes: Sequence[int], width: int) -> np.ndarray:
    """Draw the colours and names of some classes in lines of `width` pixels: uint8 (h, width, 3)."""
    size, gap = 15, 6
    font = ImageFont.load_default(size)
    places: list[tuple[int, int, int]] = []
    x, y = gap, gap
    for label in classes:
        wide = size + gap + round(font.getlength(class_names[label])) + 2 * gap
        if x + wide > width and x > gap:
            x, y = gap, y + size + gap
        places.append((x, y, label))
        x += wide
    picture = Image.new("RGB", (width, y + size + gap), "white")
    pen = ImageDraw.Draw(picture)
    for x, y, label in places:
        r, g, b = class_colours()[label % COLOURS].tolist()
        pen.rectangle((x, y, x + size - 1, y + size - 1), fill=(r, g, b))
        pen.text((x + size + gap, y + size // 2), class_names[label], fill="black", font=font, anchor="lm")
    return np.asarray(picture)


def draw_segmentations(
    pixels: Tensor,
    *,
    truth: Tensor | None = None,
    predicted: Tensor | None = None,
    class_names: Sequence[str],
    bands: Sequence[int] | None = None,
) -> np.ndarray:
    """Draw image | truth | prediction | the last of them over the image, a row each, with names: uint8 (h, w, 3).

    Args:
        pixels: (b, c, h, w), see `display_range`.
        truth: classes (b, h, w), -1 where there is none; None where nothing is known.
        predicted: classes (b, h, w); None for pictures of the truth alone.
        class_names: by class; those that occur are named below.
        bands: see `as_rgb`.
    """
    pixels = pixels.cpu()
    images = shown(pixels, bands, *display_range(pixels))
    maps = {"truth": truth, "prediction": predicted}
    known = {title: classes.cpu() for title, classes in maps.items() if classes is not None}
    columns = {"image": images} | {title: paint(classes) for title, classes in known.items()}
    panels = draw_panels(columns | {"overlay": overlay(images, list(known.values())[-1])})
    occurring = torch.cat([classes.flatten() for classes in known.values()]).unique().tolist()
    legend = draw_legend(class_names, [label for label in occurring if label >= 0], panels.shape[1])
    return np.concatenate([panels, legend])


def draw_overlay(
    pixels: Tensor, classes: Tensor, class_names: Sequence[str], bands: Sequence[int] | None = None
) -> np.ndarray:
    """Draw an image with its classes laid over, and below it the names of those that occur: uint8 (h, w, 3).

    Images of less than `LEAST_WIDTH` pixels across are enlarged by a whole factor. Of large ones little memory is
    taken beside the picture.

    Args:
        pixels: (c, h, w), see `display_range`.
        classes: whole numbers (h, w), -1 where there is none.
        class_names: by class.
        bands: see `as_rgb`.
    """
    height, width = classes.shape
    step = max(1, math.isqrt(height * width // ENOUGH))
    limits = display_range(pixels[None, :, ::step, ::step])
    factor = -(-LEAST_WIDTH // width)
    picture = np.empty((height * factor, width * factor, 3), np.uint8)
    occurring: set[int] = set()
    for top in range(0, height, ROWS):
        rows = slice(top, top + ROWS)
        occurring.update(classes[rows].unique().tolist())
        laid = overlay(shown(pixels[None, :, rows], bands, *limits), classes[None, rows])
        drawn = enlarge((laid * 255).round().to(torch.uint8), factor)[0].permute(1, 2, 0)
        picture[top * factor : (top + ROWS) * factor] = drawn.numpy()
    legend = draw_legend(class_names, sorted(occurring - {NOT_COUNTED}), picture.shape[1])
    return np.concatenate([picture, legend])


def write_mask(path: Path, classes: np.ndarray, ignored: int | None = None) -> None:
    """Write classes (h, w) as PNG, with the values that training's masks have; never a part of it under its name.

    With values below 256 it has the classes' colours as palette, else it is gray of 16 bits.

    Args:
        path: the file.
        classes: whole numbers; negative where there is none.
        ignored: the value of training's masks that is no class, see `fcmae.data.masks`.

    Raises:
        ValueError: if there are pixels without a class, and no value for them.
    """
    values = as_values(classes, ignored)
    image = Image.fromarray(values)
    if values.dtype == np.uint8:
        known = np.delete(np.arange(256), ignored) if ignored is not None and 0 <= ignored < 256 else np.arange(256)
        palette = np.full((256, 3), 255, np.uint8)
        palette[known] = class_colours()[: len(known)]
        image = Image.fromarray(values, "L")
        image.putpalette(palette.tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="png")
