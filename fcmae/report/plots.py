"""Curves of a run as SVG by matplotlib, in the colours of the page, light or dark; knows no run folder."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fcmae.report.run import Curve

INK, GRID, OTHER = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404")
VARIABLES = {INK: "ink", GRID: "grid", OTHER: "other"} | {name: f"series-{i}" for i, name in enumerate(SERIES, 1)}
"""Placeholders, which become the page's variables, as those change with the theme and colours in a file do not."""
FEW = 15
"""Points that are marked, up to so many."""
WIDTH, HEIGHT = 4.6, 2.6
"""Inches: on a phone's width the text is still readable."""

SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fcmae",  # the same file of the same run
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_curves(
    title: str, curves: Mapping[str, Curve], *, reference: Curve | None = None, percent: bool = False
) -> Markup:
    """Draw curves by step as an SVG element, those that have points; the reference dashed.

    Args:
        curves: by what the legend calls them.
        reference: the same figure in the reference log.
        percent: write the values in per cent.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        if reference:
            axes.plot(*reference, color=OTHER, lw=1.2, ls="--", label="reference")
        for number, (name, points) in enumerate(curves.items()):
            marker = "o" if len(points.steps) <= FEW else None
            axes.plot(*points, color=SERIES[number % len(SERIES)], lw=1.6, marker=marker, ms=3, label=name)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(title, loc="left")
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", lw=0.5)
        axes.set_axisbelow(True)
        if len(curves) + bool(reference) > 1:
            figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
        return to_svg(figure, title)


def draw_calibration(found: Mapping[str, Any]) -> Markup:
    """Draw accuracy by confidence, as `fcmae.metrics.calibration` found it, and the images of each bin."""
    title = f"calibration, error {found['ece']:.1%}"
    number = len(found["images"])
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 1.3 * HEIGHT), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        bins = [i for i in range(number) if found["images"][i]]
        above.plot([0, 1], [0, 1], color=OTHER, lw=1.2, ls="--")
        sure, right = ([found[key][i] for i in bins] for key in ("confidence", "accuracy"))
        above.plot(sure, right, color=SERIES[0], lw=1.6, marker="o", ms=3)
        shares = [images / sum(found["images"]) for images in found["images"]]
        below.bar([(i + 0.5) / number for i in range(number)], shares, 0.9 / number, color=OTHER)
        above.set(title="", ylabel="accuracy", ylim=(0, 1))
        above.set_title(title, loc="left")
        below.set(xlabel="confidence of the top class", ylabel="images", xlim=(0, 1))
        for axes in (above, below):
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(axis="y", lw=0.5)
            axes.set_axisbelow(True)
        return to_svg(figure, title)


def to_svg(figure: Figure, title: str) -> Markup:
    """Return a figure as an SVG element of a page: `VARIABLES` for its colours, a title for who cannot see it."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a dollar in a name is a dollar
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    file = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    _, start, drawn = file.getvalue().partition("<svg ")
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    return Markup(f'{start}role="img" aria-label="{Markup.escape(title)}" {drawn}')
