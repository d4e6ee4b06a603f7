"""Pictures of scores: bars by class, predicted against true numbers; computes no scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BARS_SHOWN = 60
"""The lowest of more."""


def _render(figure: Any) -> np.ndarray:
    """Return a figure as pixels, uint8 (h, w, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here: it takes a second to import

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_bars(shares: Mapping[str, float], title: str) -> np.ndarray:
    """Draw a bar for each name, lowest first: uint8 (h, w, 3); NaN is left out."""
    known = sorted((share, name) for name, share in shares.items() if not math.isnan(share))
    if len(known) > BARS_SHOWN:
        title, known = f"{title}, the lowest {BARS_SHOWN}", known[:BARS_SHOWN]
    figure = _figure(6, 1 + 0.2 * len(known))
    axes = figure.subplots()
    values = [share for share, _ in known]
    bars = axes.barh(range(len(known)), values, color="#4477aa")
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(known)), [_short(name) for _, name in known], fontsize=8)
    axes.set(xlim=(0, 1.1), title=title)
    axes.invert_yaxis()
    return _render(figure)


def draw_scatter(true: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw predicted against true numbers (n, targets), a panel for each target: uint8 (h, w, 3)."""
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = _figure(4 * columns, 4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.remove()
    for axes, name, x, y in zip(panels, names, true.T, predicted.T, strict=False):
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color="gray", lw=1)
        axes.scatter(x, y, s=8, alpha=0.5, color="#4477aa", linewidths=0)
        axes.set(xlabel="true", ylabel="predicted", title=_short(name))
        axes.set_aspect("equal", adjustable="datalim")
    return _render(figure)
