"""Line charts as inline SVG, drawn by matplotlib: the values faint, their moving average on top."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

DARK = {
    "#59616b": "#a2abb3", "#e3e4e0": "#2c3237",
    "#0b7468": "#55d0bd", "#c2571a": "#ff9d63", "#3a55b4": "#9db1ff", "#97307c": "#e990d0", "#6b7a12": "#c5d35c",
}  # fmt: skip
"""Each colour of the charts, and the one that replaces it on a dark page."""
TEXT, LINE, *SERIES = DARK
WIDTH, HEIGHT = 560, 330  # in points
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT,
    "font.size": 13, "axes.titlesize": 13, "axes.labelsize": 13, "xtick.labelsize": 13, "ytick.labelsize": 13,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "xtick.bottom": False, "ytick.left": False, "grid.color": LINE,
    "lines.solid_joinstyle": "round", "lines.solid_capstyle": "round", "path.simplify_threshold": 0.5,
    "legend.frameon": False, "legend.fontsize": 14,
}  # fmt: skip
"""The settings of matplotlib for every figure of this project."""


class Curve(NamedTuple):
    """Series over a common x axis, e.g. the losses of the stages over their steps."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    """The x and y values of each series. A y that is None or not finite is left out."""
    log_y: bool = True
    """Whether the y axis is logarithmic; values that are not positive are then left out."""


Values = Float[np.ndarray, " N"]


@mpl.rc_context(STYLE)
def draw(curve: Curve) -> Markup:
    """The chart as an SVG element; empty if there is no value to draw."""
    figure = chart(curve)
    return svg(figure, curve.title) if figure.axes[0].lines else Markup()


def chart(curve: Curve) -> Figure:
    """The chart; each series has two lines, its values and their moving average."""
    figure = Figure((WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes((0.11, 0.14, 0.87, 0.75))
    for (name, (x, y)), colour in zip(curve.series.items(), cycle(SERIES)):
        x, y = drawable(x, y, curve.log_y)
        if not len(y):
            continue
        smooth = moving_average(y, len(y) // 20 if len(y) >= 40 else 0, curve.log_y)
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.3)
        label = f"{name}  {smooth[-1]:.3g}"
        axes.plot(x, smooth, color=colour, linewidth=2.2, marker="o" if len(y) == 1 else "", label=label)
    if curve.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low < 1e4 else (1,)))
        axes.minorticks_off()
    axes.margins(x=0)
    axes.grid(axis="y")
    axes.set(xlabel=curve.x_label, ylabel=curve.y_label)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    if axes.lines:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, borderpad=0, ncols=3)
    return figure


def svg(figure: Figure, title: str) -> Markup:
    """The figure as one SVG element that can stand in a page or in a file of its own.

    The background is transparent and colours follow the reader's light or dark mode. The same figure gives the same text.
    """
    file, left_out = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context(STYLE), mpl.rc_context({"svg.hashsalt": title}):  # ids follow from the title and the figure
        figure.savefig(file, format="svg", transparent=True, metadata={"Title": title} | left_out)
    text = file.getvalue().partition("<svg")[2]
    # In a page, matplotlib's style would hold outside the figure as well, and its groups have the same ids in all figures.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    for light, dark in DARK.items():
        text = text.replace(f": {light}", f": light-dark({light}, {dark})")
    return Markup('<svg style="color-scheme: light dark"' + text)


def drawable(x: Sequence[float], y: Sequence[float | None], log: bool) -> tuple[Values, Values]:
    """The points that can be drawn, as float64."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not log))
    return xs[kept], ys[kept]


def moving_average(y: Values, reach: int, log: bool) -> Values:
    """The mean of the values up to `reach` places away; on a logarithmic axis the geometric mean."""
    window = np.ones(2 * reach + 1)
    mean = np.convolve(np.log(y) if log else y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    return np.exp(mean) if log else mean
