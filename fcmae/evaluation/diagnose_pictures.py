"""Pictures of feature collapse: distances by depth, channels by layer, feature maps; computes no statistics."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.evaluation.diagnose import LayerFigures
from fcmae.visualize import write_figure

CHANNELS_SHOWN = 64
"""Of each layer's feature maps: its first ones, in a square."""

Models = Mapping[str, Mapping[str, LayerFigures]]
"""Model -> layer -> figures."""

SHARES = {"dead": "#444444", "saturated": "#f2b134", "duplicates": "#c8553d"}
"""Colours of what is drawn as bars."""


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here: it takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def _wrapped(title: str, width: float) -> str:
    """Break a title's lines to fit into `width` inches at 9 points."""
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, round(13 * width)))


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def draw_collapse(models: Models, title: str, path: Path) -> None:
    """Draw the cosine distance of each layer over its depth, a line for each model (V2 paper, figure 4)."""
    figure = _figure(7.5, 4.5)
    axes = figure.subplots()
    for name, layers in models.items():
        depth = [i / max(len(layers) - 1, 1) for i in range(len(layers))]
        axes.plot(depth, [layer.cosine_distance for layer in layers.values()], marker="o", ms=4, label=_short(name))
    axes.set(xlabel="depth (0: first layer, 1: last)", ylabel="cosine distance of channels", ylim=(0, 0.52))
    axes.set_title(_wrapped(title, 7.5), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    write_figure(figure, path)


def draw_channels(models: Models, title: str, path: Path) -> None:
    """Draw shares of dead, saturated and duplicate channels as bars, the effective rank as dots, a row a model."""
    longest = max(map(len, models.values()))
    width = max(6.0, 2.5 + 0.3 * longest)
    figure = _figure(width, 1.2 + 2.3 * len(models))
    figure.suptitle(_wrapped(title, width), fontsize=9)
    bar = 0.8 / len(SHARES)
    largest = max(
        share for layers in models.values() for layer in layers.values() for share in layer.shares.values()
    )
    top = max(10.0, 105 * largest)
    all_axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axes, (name, layers) in zip(all_axes, models.items(), strict=True):
        shares = [layer.shares for layer in layers.values()]
        for i, (kind, colour) in enumerate(SHARES.items()):
            where = [x + (i - (len(SHARES) - 1) / 2) * bar for x in range(len(shares))]
            axes.bar(where, [100 * share[kind] for share in shares], bar, color=colour, label=kind)
        ranks = [100 * share["effective_rank"] for share in shares]
        axes.plot(ranks, "o", ms=4, color="#2a6f97", label="effective rank")
        axes.set(ylim=(0, top), xlim=(-0.6, longest - 0.4), ylabel="% of channels")
        axes.set_xticks(range(len(layers)), [_short(layer, 20) for layer in layers], fontsize=7, rotation=60)
        axes.set_title(_short(name, 70), fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    write_figure(figure, path)


def montage(maps: Tensor) -> Tensor:
    """Lay maps (h, w, c) out as a nearly square mosaic (rows * (h + 1), columns * (w + 1)), NaN between them."""
    height, width, number = maps.shape
    columns = max(1, round((number * height / width) ** 0.5))
    rows = -(-number // columns)
    canvas = maps.new_full((rows * columns, height + 1, width + 1), torch.nan)
    canvas[:number, :-1, :-1] = maps.permute(2, 0, 1)
    return canvas.unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def draw_maps(
    image: Tensor, maps: Mapping[str, Tensor], models_layers: Mapping[str, LayerFigures], title: str, path: Path
) -> None:
    """Draw an image (3, H, W), in [0, 1], and the first channels' maps (h, w, c) of layers (V2 paper, figure 3).

    Of a layer all maps have one scale, from the 1st to the 99th percentile: a dead one is flat and in the colour of
    zero, a saturated one flat and bright.
    """
    figure = _figure(3.3 * (1 + len(maps)), 4.0)
    figure.suptitle(f"{title}\n", fontsize=9)
    first, *others = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    first.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
    first.set_title("image", fontsize=9)
    for axes, (name, values) in zip(others, maps.items(), strict=True):
        shown = values[..., :CHANNELS_SHOWN]
        low, high = shown.flatten().quantile(torch.tensor([0.01, 0.99])).tolist()
        axes.imshow(montage(shown).numpy(), cmap="viridis", vmin=low, vmax=max(high, low + 1e-12))
        axes.set_title(
            f"{_short(name, 30)}: {shown.shape[2]} of {values.shape[2]} channels, {values.shape[0]} x "
            f"{values.shape[1]}\ncosine distance {models_layers[name].cosine_distance:.3f}, "
            f"scale {low:.2g} to {high:.2g}",
            fontsize=8,
        )
    for axes in (first, *others):
        axes.axis("off")
    write_figure(figure, path)
