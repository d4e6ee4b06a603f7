"""The picture of `fcmae stats`: how often which values occur, channel by channel; computes no statistics."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fcmae.data.pixels import FULL
from fcmae.data.stats import Histogram, Statistics, values_of
from fcmae.visualize import write_figure

BARS = 128
"""Of a histogram, at most about so many."""
SHOWN_PERCENTILES = ("0.1", "99.9")
"""Between which values are shown."""
COLUMNS, SHOWN = 4, 64
"""Channels side by side, and altogether at most."""


def bars(histogram: Histogram, dtype: torch.dtype, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of pixels in equal bins from `low` to `high`, and the edges of these, in full ranges.

    Of uint8 and uint16 each bin holds as many values as any other.
    """
    step = (high - low) / BARS or 1.0
    if dtype != torch.float32:
        step = math.ceil(step * FULL[dtype] - 1e-6) / FULL[dtype]
    number = round((high - low) / step) + 1
    edges = low + step * (np.arange(number + 1) - 0.5)
    shares, _ = np.histogram(values_of(histogram, dtype), edges, weights=histogram.counts / histogram.counts.sum())
    return shares, edges


def draw_histograms(histograms: list[Histogram], found: Statistics, path: Path) -> None:
    """Draw each channel's histogram, with its mean and one standard deviation on both sides."""
    shown = histograms[:SHOWN]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.9 + 2.3 * rows), layout="constrained")
    all_axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    lows, highs = (found.percentiles[percent] for percent in SHOWN_PERCENTILES)
    for channel, (axes, histogram) in enumerate(zip(all_axes, shown, strict=False)):
        shares, edges = bars(histogram, getattr(torch, found.dtype), lows[channel], highs[channel])
        axes.stairs(100 * shares, edges, fill=True, color="#2a6f97")
        mean, std = found.mean[channel], found.std[channel]
        axes.axvspan(mean - std, mean + std, color="#f2b134", alpha=0.3, lw=0, zorder=0)
        axes.axvline(mean, color="#c8553d", lw=1.2)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_title(f"channel {channel}: mean {mean:.4g}, std {std:.4g}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in all_axes[len(shown) :]:
        axes.axis("off")
    more = f", the first {SHOWN} of {len(histograms)} channels" if len(histograms) > SHOWN else ""
    decoded = found.looked_at - len(found.broken)
    figure.suptitle(
        f"{decoded:,} images of {found.root}, {' to '.join(SHOWN_PERCENTILES)} % of pixels{more}\n"
        "line: mean, band: standard deviation",
        fontsize=9,
    )
    figure.supxlabel(f"value ({found.unit})", fontsize=8)
    figure.supylabel("% of pixels in each bin", fontsize=8)
    write_figure(figure, path)
