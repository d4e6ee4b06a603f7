"""A picture of time against GPUs, what limits each drawn in its colour; forecasts nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fcmae.plan.forecast import Forecast
from fcmae.visualize import write_figure

DAY_S = 86_400
COLOURS = {
    "arithmetic": "#0072b2",
    "computing": "#0072b2",
    "memory bandwidth": "#56b4e9",
    "small kernels": "#009e73",
    "starting kernels": "#117733",
    "optimizer": "#999999",
    "exchange": "#d55e00",
    "loading": "#cc79a7",
    "cores": "#e69f00",
}
"""By what limits a run; those of Okabe and Ito, which people who see few colours can tell apart."""
MARKERS = "osD^v"
"""One for each kind of machine."""


def draw_time(title: str, curves: Mapping[str, Sequence[Forecast]], asked: int, unit: str, path: Path) -> None:
    """Draw the time of a run against GPUs or processes for each kind of machine, into a new PNG.

    Args:
        asked: the number that a band marks.
        unit: what is counted.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    counts = sorted({one.processes for curve in curves.values() for one in curve})
    axes.axvline(asked, color="#dddddd", lw=6, zorder=0)
    for number, (name, curve) in enumerate(curves.items()):
        days = [one.seconds / DAY_S for one in curve]
        ideal = [curve[0].processes * days[0] / one.processes for one in curve]
        label = f"if n {unit} were n times as fast as the first" if number == 0 else None
        axes.plot([one.processes for one in curve], ideal, color="#bbbbbb", ls=":", lw=1.2, zorder=1, label=label)
        axes.plot([one.processes for one in curve], days, color="#555555", lw=1.2, zorder=2)
        axes.annotate(
            name, (curve[0].processes, days[0]), (-8, 0), textcoords="offset points", ha="right", va="center"
        )
        for one, y in zip(curve, days, strict=True):
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(one.processes, y, marker, color=COLOURS[one.limit], ms=7, zorder=3)
    for limit in COLOURS:
        if any(one.limit == limit for curve in curves.values() for one in curve):
            axes.plot([], [], "o", color=COLOURS[limit], label=f"limited by {limit}")
    axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="days", title=title)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "125" else "")
    axes.margins(x=0.16)
    axes.grid(axis="y", which="both", color="#eeeeee", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)
