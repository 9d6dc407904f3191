"""A line chart as inline SVG: raw values faint, their moving average on top; a series of few values as it is."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.report.markup import Markup, element

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 46
COLOURS = 6
"""How many colours the page has for series."""
MOST_POINTS = 600
"""Longer series are drawn as the least and the greatest value of this many stretches, so that no spike is lost."""


class Curve(NamedTuple):
    """Series over a common x axis, e.g. the losses of the stages over their steps."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    """By name, x and y values; a y that is None or not finite leaves a gap."""
    log_y: bool = True
    """Logarithmic y axis; values that are not positive leave a gap."""


Values = Float[np.ndarray, " N"]


def figure(curve: Curve) -> Markup:
    """The chart with its title and legend; a curve without any value says so."""
    series = {name: drawable(x, y, curve.log_y) for name, (x, y) in curve.series.items()}
    series = {name: points for name, points in series.items() if len(points[0])}
    title = element("figcaption", element("strong", curve.title))
    if not series:
        return element("figure", title, element("p", "No value was recorded.", _class="quiet"), _class="curve")
    xs = np.concatenate([x for x, _ in series.values()])
    ys = np.concatenate([y for _, y in series.values()])
    x_ticks, y_ticks = linear_ticks(xs.min(), xs.max()), (log_ticks if curve.log_y else linear_ticks)(ys.min(), ys.max())
    x_range = (float(xs.min()), float(xs.max()))
    y_range = (min(y_ticks[0], float(ys.min())), max(y_ticks[-1], float(ys.max())))
    across, up = scale(x_range, (LEFT, WIDTH - RIGHT), False), scale(y_range, (HEIGHT - BOTTOM, TOP), curve.log_y)

    parts = [grid_line(float(up(y))) for y in y_ticks]
    parts += [label(LEFT - 8, float(up(y)) + 4, f"{y:.6g}", "end") for y in y_ticks]
    parts += [label(float(across(x)), HEIGHT - BOTTOM + 18, f"{x:,.6g}", "middle") for x in x_ticks if x_range[0] <= x <= x_range[1]]
    parts += [label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, curve.x_label, "middle")]
    turned = f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    parts += [element("text", curve.y_label, transform=turned, text_anchor="middle")]
    legend = []
    for number, (name, (x, y)) in enumerate(series.items()):
        colour, smooth = f"s{number % COLOURS}", moving_average(y, len(y) // 20 if len(y) >= 40 else 0, curve.log_y)
        if len(y) > 1:
            parts += [path(across(px), up(py), f"raw {colour}") for px, py in [thinned(x, y)]]
            parts += [path(across(x), up(smooth), f"smooth {colour}")]
        else:
            parts += [element("circle", cx=f"{across(x)[0]:.1f}", cy=f"{up(y)[0]:.1f}", r=3, _class=colour)]
        legend.append(element("li", element("i", _class=colour), name, " ", element("b", f"{smooth[-1]:.3g}")))
    names = ", ".join(f"{name} ends at {y[-1]:.3g}" for name, (_, y) in series.items())
    chart = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{curve.title}: {names}")
    return element("figure", title, element("ul", *legend, _class="legend"), chart, _class="curve")


def drawable(x: Sequence[float], y: Sequence[float | None], log: bool) -> tuple[Values, Values]:
    """The points that can be drawn, as float64."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not log))
    return xs[kept], ys[kept]


def moving_average(y: Values, reach: int, log: bool) -> Values:
    """The mean of the values up to `reach` places away; on a logarithmic axis the geometric mean."""
    total = np.concatenate([[0.0], np.cumsum(np.log(y) if log else y)])
    places = np.arange(len(y))
    first, past = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(y))
    mean = (total[past] - total[first]) / (past - first)
    return np.exp(mean) if log else mean


def thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """At most 2 `MOST_POINTS` points that keep every stretch's least and greatest value."""
    if len(y) <= MOST_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(y)), MOST_POINTS)
    kept = np.array([np.sort([part[y[part].argmin()], part[y[part].argmax()]]) for part in stretches]).ravel()
    return x[kept], y[kept]


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the outer ones at or past `low` and `high`."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= (high - low) * 0.999)
    return [round(place * step, 12) for place in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them when there are few, around `low` and `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((tick for tick in ticks if tick <= low), default=ticks[0])
    last = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last]


def scale(values: tuple[float, float], places: tuple[float, float], log: bool):
    """The map from `values` to `places`; equal ends map to the middle."""

    def place(value):
        low, high, at = (np.log(np.asarray(v, np.float64)) if log else np.asarray(v, np.float64) for v in (*values, value))
        share = (at - low) / (high - low) if high > low else np.full_like(at, 0.5)
        return places[0] + share * (places[1] - places[0])

    return place


def path(x: Values, y: Values, kind: str) -> Markup:
    return element("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)), _class=kind)


def grid_line(y: float) -> Markup:
    return element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", _class="grid")


def label(x: float, y: float, text: str, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
