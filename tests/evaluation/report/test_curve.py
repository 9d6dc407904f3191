"""The charts draw the values they are given, the spikes of long series included, and the SVG can stand in any page."""

import math
import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from evaluation.report.curve import DARK, Curve, chart, draw

NASTY = '$x$ <b>&amp;</b> "quoted" _'


def curve(y, log_y=True, x=None):
    return Curve("c", "x", "y", {"a": (range(len(y)) if x is None else x, y)}, log_y)


def lines(y, log_y=True):
    """The values and their moving average, as drawn."""
    return [line.get_xydata() for line in chart(curve(y, log_y)).axes[0].lines]


def tick_labels(y, log_y):
    axes = chart(curve(y, log_y)).axes[0]
    low, high = axes.get_ylim()
    texts = [tick.get_text().replace("\N{MINUS SIGN}", "-") for tick in axes.get_yticklabels()]
    return [float(text) for text, place in zip(texts, axes.get_yticks(), strict=True) if low <= place <= high], (low, high)


def test_what_cannot_be_drawn_is_left_out():
    values = [1.0, None, math.nan, math.inf, -1.0, 2.0]
    assert lines(values)[0].tolist() == [[0, 1], [5, 2]]
    assert lines(values, log_y=False)[0].tolist() == [[0, 1], [4, -1], [5, 2]]
    assert draw(curve([None])) == ""


def test_a_single_value_is_a_dot():
    assert "<use" in draw(curve([0.5]))
    assert "<use" not in draw(curve([0.5, 0.4]))


def test_smoothing_keeps_a_level_and_few_values():
    for values in ([0.25] * 100, [3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3]):
        raw, smooth = lines(values)
        np.testing.assert_allclose(smooth, raw)


@pytest.mark.parametrize("log", [True, False])
def test_smoothing_is_the_mean_of_a_window_that_ends_with_the_series(log):
    values = np.random.default_rng(0).uniform(0.1, 1, 60)
    (_, smooth), near = lines(values, log), 60 // 20
    for place in (0, 2, 30, 59):
        window = values[max(place - near, 0) : place + near + 1]
        assert smooth[place, 1] == pytest.approx(math.exp(np.log(window).mean()) if log else window.mean())


def test_a_long_series_keeps_its_spike_and_is_short():
    values = 1 + np.random.default_rng(0).normal(0, 0.01, 50_000)
    values[31_234] = 1000.0
    path = max(re.findall(r'<path d="([^"]*)" clip-path', draw(curve(values))), key=len)
    points = np.array([[float(n) for n in point] for point in re.findall(r"[ML] (\S+) (\S+)", path)])
    assert len(points) < 10_000
    assert points[:, 1].min() < points[:, 1].max() - 100  # up is less


@pytest.mark.parametrize("y", [(0.08, 1.3), (1e-6, 1e3), (1, 1), (0.3, 0.31), (2e-5, 3e-5)])
def test_a_log_axis_has_a_few_labels_that_say_where_they_are(y):
    ticks, (low, high) = tick_labels(y, log_y=True)
    assert low <= min(y) <= max(y) <= high
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("y", [(0.0, 1.0), (1, 1200), (0.3, 0.30001), (-5, 12.5), (7, 7), (0, 1e6)])
def test_a_linear_axis_too(y):
    ticks, (low, high) = tick_labels(y, log_y=False)
    assert low <= min(y) <= max(y) <= high
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))


def test_the_svg_is_well_formed_and_its_text_is_as_given():
    text = draw(Curve(NASTY, NASTY, NASTY, {NASTY: ([1, 2], [1.0, 2.0])}))
    found = [element.text for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert found.count(NASTY) == 2
    assert f"{NASTY}  2" in found
    assert "light-dark" not in re.sub(r'style="[^"]*"', "", text)


def test_every_colour_has_one_for_the_dark():
    text = draw(Curve("c", "x", "y", {str(k): (range(3), range(3)) for k in range(len(DARK))}, log_y=False))
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]*)", text))
    assert colours == {"none", *(f"light-dark({light}, {dark})" for light, dark in DARK.items())}


def test_two_charts_share_no_id():
    first, second = (
        set(re.findall(r'\bid="([^"]*)"', draw(Curve(title, "x", "y", {"a": ([1], [2.0])})))) for title in ("one chart", "another")
    )
    assert first
    assert not first & second


def test_the_same_curve_gives_the_same_text_and_leaves_the_settings_alone():
    before = dict(mpl.rcParams)
    assert draw(curve([1.0, 2.0])) == draw(curve([1.0, 2.0]))
    assert dict(mpl.rcParams) == before
