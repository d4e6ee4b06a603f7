"""Curves of a run by matplotlib, as SVG in the colours of the page or on white; knows no run folder."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fcmae.report.panels import Panel


class Colors(NamedTuple):
    """What is drawn in which colour."""

    ink: str
    grid: str
    other: str
    """The reference."""
    series: tuple[str, ...]


LIGHT = Colors("#1d2126", "#d9dde1", "#8b949e", ("#1f6fb5", "#b85a00", "#2b7d4f", "#8448a8"))
DARK = Colors("#e6e8ea", "#3a4148", "#8b949e", ("#6cb2f2", "#f0a050", "#6fcf97", "#c79be8"))
PAGE = Colors("#010101", "#020202", "#030303", ("#040401", "#040402", "#040403", "#040404"))
"""Placeholders, which become the page's variables, as those change with the theme and colours in a file do not."""
VARIABLES = {PAGE.ink: "ink", PAGE.grid: "grid", PAGE.other: "other"} | {
    colour: f"series-{i}" for i, colour in enumerate(PAGE.series, 1)
}
FEW = 15
"""Points that are marked, up to so many."""
WIDTH, HEIGHT = 4.6, 2.6
"""Inches: on a phone's width the text is still readable."""


def settings(colors: Colors) -> Any:
    """Return matplotlib's settings for such a picture."""
    return {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "fcmae",  # the same file of the same run
        "text.color": colors.ink,
        "axes.labelcolor": colors.ink,
        "axes.titlecolor": colors.ink,
        "xtick.color": colors.grid,
        "ytick.color": colors.grid,
        "xtick.labelcolor": colors.ink,
        "ytick.labelcolor": colors.ink,
        "axes.edgecolor": colors.grid,
        "grid.color": colors.grid,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def plot(axes: Axes, panel: Panel, colors: Colors) -> None:
    """Draw the curves of a panel by update, the reference dashed."""
    if panel.reference:
        axes.plot(*panel.reference, color=colors.other, lw=1.2, ls="--", label="reference")
    for number, (name, points) in enumerate(panel.curves.items()):
        marker = "o" if len(points.steps) <= FEW else None
        color = colors.series[number % len(colors.series)]
        axes.plot(*points, color=color, lw=1.6, marker=marker, ms=3, label=name)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", lw=0.5)
    axes.set_axisbelow(True)


def draw_panel(panel: Panel) -> Markup:
    """Draw a panel as an SVG element."""
    with matplotlib.rc_context(settings(PAGE)):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        plot(figure.subplots(), panel, PAGE)
        if len(panel.curves) + bool(panel.reference) > 1:
            figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
        return to_svg(figure, panel.title)


def draw_together(panels: Sequence[Panel]) -> Figure:
    """Draw panels, two in a row, into a figure on white."""
    with matplotlib.rc_context(settings(LIGHT)):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(2 * WIDTH, rows * HEIGHT), layout="constrained", dpi=120)
        places = figure.subplots(rows, 2, squeeze=False).flat
        for panel, axes in zip(panels, places, strict=False):
            plot(axes, panel, LIGHT)
            if len(panel.curves) > 1:
                axes.legend(frameon=False, fontsize=8)
        for axes in places:  # what is left of the last row
            axes.set_axis_off()
        return figure


def draw_calibration(found: Mapping[str, Any]) -> Markup:
    """Draw accuracy by confidence, as `fcmae.metrics.calibration` found it, and the images of each bin."""
    title = f"calibration, error {found['ece']:.1%}"
    number = len(found["images"])
    with matplotlib.rc_context(settings(PAGE)):
        figure = Figure(figsize=(WIDTH, 1.3 * HEIGHT), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        bins = [i for i in range(number) if found["images"][i]]
        above.plot([0, 1], [0, 1], color=PAGE.other, lw=1.2, ls="--")
        sure, right = ([found[key][i] for i in bins] for key in ("confidence", "accuracy"))
        above.plot(sure, right, color=PAGE.series[0], lw=1.6, marker="o", ms=3)
        shares = [images / sum(found["images"]) for images in found["images"]]
        below.bar([(i + 0.5) / number for i in range(number)], shares, 0.9 / number, color=PAGE.other)
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
