"""The charts of a sweep's page as inline SVG: curves of all trials, parallel coordinates, a power law."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from evaluation.report.curve import LINE, SERIES, STYLE, TEXT, moving_average, svg
from launch.sweeping.findings import PowerLaw
from launch.sweeping.rows import Row
from launch.sweeping.space import Dimension
from launch.sweeping.trials import Objective

BEST, BAD, GOOD = SERIES[0], SERIES[1], SERIES[2]
QUARTER = 4  # the best 1/4 of the trials stand out
MOST_LABELS = 8  # of listed values at an axis
FEW = 30  # trials whose lines are drawn strongly
CARD = "#ffffff"  # behind labels, so that no line crosses them; in the page the colour of its cards


def colour_of(row: Row, is_best: bool, count: int) -> tuple[str, float, float]:
    """Colour, opacity and width of a trial's line, one of so many."""
    if is_best:
        return BEST, 1.0, 2.4
    alpha, width = (0.9, 1.5) if count <= FEW else (0.45, 1.1)
    if row.state.status in ("diverged", "failed"):
        return BAD, alpha, width
    return GOOD if row.state.status == "finished" else TEXT, alpha, width


@mpl.rc_context(STYLE)
def curves(rows: Sequence[Row], metric: str, kind: str) -> Markup:
    """The metric of each trial over its steps, tokens or FLOPs; empty if these are not counted."""
    scale = {"step": lambda row: 1, "tokens": lambda row: row.shape.tokens, "FLOPs": lambda row: row.shape.flops}[kind]
    drawn = [row for row in rows if row.curve and scale(row)]
    if not drawn:
        return Markup()
    figure = Figure((620 / 72, 360 / 72))
    axes = figure.add_axes((0.12, 0.15, 0.86, 0.82))
    sound = []
    for row in reversed(drawn):
        x, y = np.array(row.curve, float).T
        y = moving_average(y, len(y) // 20, log=False)
        colour, alpha, width = colour_of(row, row is drawn[0] and row.state.status == "finished", len(drawn))
        axes.plot(x * scale(row), y, color=colour, alpha=alpha, linewidth=width, marker="o" if len(y) == 1 else "", markersize=3)
        sound += [] if row.state.status in ("diverged", "failed") else [y]
    if sound:  # what diverges leaves the frame
        values = np.concatenate(sound)
        low, high = float(values.min()), float(values.max())
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
        if low > 0 and high / low > 5:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.1, high * 1.1)
            plain_logarithm(axes.yaxis)
    axes.grid(axis="y")
    axes.margins(x=0)
    axes.set(xlabel=kind, ylabel=metric)
    return svg(figure, f"{metric} by {kind}")


def plain_logarithm(axis: Any) -> None:
    """Labels of a logarithmic axis as numbers, for the style draws no formulas."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    axis.set_minor_locator(NullLocator())


@mpl.rc_context(STYLE)
def parallel(rows: Sequence[Row], dimensions: Sequence[Dimension], objective: Objective) -> Markup:
    """A line for each trial through its value of every field, and at the right `Row.compared`, the best at the top."""
    columns = len(dimensions) + 1
    figure = Figure((max(1000, 150 * columns) / 72, 380 / 72))
    axes = figure.add_axes((0.1, 0.08, 0.84, 0.8))

    def label(column: int, height: float, text: str) -> None:
        side, align = (-8, "right") if column == 0 else (8, "left")
        box = {"facecolor": CARD, "edgecolor": "none", "pad": 1.5}
        axes.annotate(
            text, (column, height), (side, 0), textcoords="offset points", va="center", ha=align, fontsize=13, color=TEXT, bbox=box
        )

    values = [row.compared for row in rows if row.compared is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = (low, high) if objective.goal == "max" else (high, low)
    for column, dimension in enumerate(dimensions):
        axes.axvline(column, color=LINE, linewidth=1)
        for height, text in ticks(dimension):
            label(column, height, text)
    axes.axvline(columns - 1, color=LINE, linewidth=1)
    for height, text in ((0.0, low), (1.0, high)):
        label(columns - 1, height, f"{text:.4g}")
    for place, row in reversed(list(enumerate(rows))):
        heights = [place_of(dimension, row.point[dimension.name]) for dimension in dimensions]
        if row.compared is not None:
            heights.append((row.compared - low) / ((high - low) or 1))
        first = row.state.status == "finished" and place < math.ceil(len(rows) / QUARTER)
        colour, alpha, width = colour_of(row, False, len(rows))
        colour, alpha, width = (BEST, 0.9, 2.2 if place == 0 else 1.5) if first else (TEXT if colour == GOOD else colour, alpha, width)
        axes.plot(range(len(heights)), heights, color=colour, alpha=alpha, linewidth=width)
    axes.set_xticks(range(columns), [*(each.name for each in dimensions), objective.metric])
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.set_xlim(-0.05, columns - 0.9)
    axes.set_ylim(-0.06, 1.06)
    return Markup(svg(figure, "parallel coordinates").replace(f": {CARD}", ": var(--card)"))


def place_of(dimension: Dimension, value: Any) -> float:
    """Where a value lies on its axis, from 0 to 1."""
    if dimension.values:
        return dimension.values.index(value) / max(len(dimension.values) - 1, 1)
    if dimension.log:
        return math.log(value / dimension.low) / math.log(dimension.high / dimension.low)
    return (value - dimension.low) / (dimension.high - dimension.low)


def ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Heights and texts at an axis."""
    shown = [*dimension.values[:MOST_LABELS]] if dimension.values else [dimension.at(share) for share in (0.0, 0.5, 1.0)]
    return [(place_of(dimension, value), str(value)) for value in shown]


@mpl.rc_context(STYLE)
def power_law(rows: Sequence[Row], law: PowerLaw, metric: str) -> Markup:
    """Every finished trial by its total FLOPs, those that the law is fitted to filled, and the law."""
    figure = Figure((620 / 72, 360 / 72))
    axes = figure.add_axes((0.12, 0.15, 0.86, 0.82))
    axes.plot([row.flops for row in rows], [float(row.value or 0) for row in rows], "o", color=TEXT, fillstyle="none", markersize=5)
    x, y = zip(*law.points, strict=True)
    axes.plot(x, y, "o", color=BEST, markersize=7)
    ends = np.geomspace(min(x), max(x), 20)
    axes.plot(ends, [law.at(cost) for cost in ends], color=BEST, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_logarithm(axes.xaxis)
    plain_logarithm(axes.yaxis)
    axes.grid(axis="y")
    axes.set(xlabel="FLOPs of the trial", ylabel=metric)
    return svg(figure, "power law")
