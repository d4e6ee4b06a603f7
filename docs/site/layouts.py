"""The figure of docs/how-it-works.md: what each layout stores of one photograph; knows nothing of networks.

`python docs/site/layouts.py` writes docs/layouts.png.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from fcmae.encoder.layouts import DenseSites, MaskedSites
from fcmae.encoder.packed import PackedSites
from fcmae.masking import MaskSampler

DOCS = Path(__file__).parents[1]
PICTURE = DOCS / "layouts.png"
PATCHES, SITES = 4, 2
"""Patches per side of the photograph, sites per side of a patch."""


def photograph() -> Tensor:
    """Return a photograph as a feature map: (1, 8, 8, 3), a site its mean colour."""
    photo = Image.open(DOCS / "photos" / "picos-de-europa.jpg").convert("RGB")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    square = photo.crop((left, top, left + side, top + side))
    sites = square.resize((PATCHES * SITES, PATCHES * SITES), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(sites) / 255)[None]


def draw_sites(axes: Axes, colors: Tensor, x: float, y: float) -> None:
    """Draw a map (h, w, 3) with its upper left corner at (x, y), a square a site."""
    for row, line in enumerate(colors):
        for column, color in enumerate(line):
            square = Rectangle((x + column + 0.04, y + row + 0.04), 0.92, 0.92, facecolor=color.tolist())
            axes.add_patch(square)


def draw_patch_border(axes: Axes, x: float, y: float) -> None:
    """Draw the border of a patch."""
    axes.add_patch(Rectangle((x, y), SITES, SITES, fill=False, edgecolor="0.25", linewidth=1.2))


def draw_layouts() -> Figure:
    """Draw what dense, masked, packed and minkowski store."""
    features = photograph()
    side = PATCHES * SITES
    ids = MaskSampler((PATCHES, PATCHES), 0.6)(1, torch.Generator().manual_seed(20))
    masked = MaskedSites((side, side), ids, SITES)
    packed = PackedSites.of_patches((PATCHES, PATCHES), ids, SITES)
    active = masked.active(SITES)[0, ..., 0]

    figure = Figure(figsize=(8, 9), dpi=120)
    grid = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.92, wspace=0.08, hspace=0.18)
    titles = {
        "dense": f"(b, h, w, c): all {side * side} sites",
        "masked": f"(b, h, w, c) and which of the {PATCHES**2} patches are visible",
        "packed": f"(b, p, k, k, c): {ids.shape[1]} patches of {SITES} x {SITES} sites",
        "minkowski": f"(n, c) and coordinates: {int(active.sum())} sites",
    }
    for axes, (name, what) in zip(grid.flat, titles.items(), strict=True):
        axes.set_title(name, fontsize=13, fontweight="bold", pad=22)
        axes.text(0.5, 1.01, what, transform=axes.transAxes, ha="center", va="bottom", fontsize=10)
        axes.set(xlim=(-0.2, side + 0.2), ylim=(side + 0.2, -0.2), aspect="equal")
        axes.axis("off")

    dense, hidden, patches, listed = grid.flat
    draw_sites(dense, DenseSites((side, side)).gather(features)[0], 0, 0)
    draw_sites(hidden, torch.where(active[..., None], masked.gather(features)[0], 0.93), 0, 0)
    for patch in range(PATCHES**2):
        corner = (patch % PATCHES * SITES, patch // PATCHES * SITES)
        if patch in ids:
            draw_patch_border(hidden, *corner)

    for place, (patch, colors) in enumerate(zip(ids[0].tolist(), packed.gather(features)[0], strict=True)):
        x, y = place % 3 * 2.9 + 0.1, place // 3 * 3.4 + 0.9
        draw_sites(patches, colors, x, y)
        draw_patch_border(patches, x, y)
        patches.text(x + 1, y + 2.2, f"patch {patch}", ha="center", va="top", fontsize=10)

    for place, (row, column) in enumerate(active.nonzero().tolist()):
        x, y = place // side * 2.9 + 0.2, place % side
        draw_sites(listed, features[0, row : row + 1, column : column + 1], x + 1.2, y)
        listed.text(x + 1, y + 0.5, f"{row}, {column}", ha="right", va="center", fontsize=10, family="monospace")
    return figure


if __name__ == "__main__":
    draw_layouts().savefig(PICTURE)
