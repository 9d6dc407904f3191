"""One page of HTML that shows a run: scores beside their controls, moving pictures, losses and commands. Its form is page.html.j2.

The page is one file and loads nothing else. A clip is one image with all frames below each other, at their own size and with
every pixel as generated up to `EXACT` pixels a side; a CSS animation moves it, so that all clips play in step, and the browser scales it.
"""

import base64
import io
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from configs.errors import require
from evaluation.report.curve import Curve, draw

MOST_BYTES = 15_000_000
EXACT, WEBP_MOST = 128, 16383
"""Pixels a side of a frame up to which a page has every pixel as generated; and of a sheet as WebP has it."""
GUTTER = 2
"""Rows above and below each frame of a sheet that repeat its edge, so that smooth scaling never mixes two frames."""
HOLD = 4
"""For how many frames the last frame of the longest clip stays before all clips start again."""


class Picture(NamedTuple):
    """A clip or an image, and its role."""

    label: str
    pixels: UInt8[np.ndarray, "T H W 3"] | UInt8[np.ndarray, "H W 3"]
    kind: Literal["given", "truth", "generated", "control"] = "given"
    """An input of the model, the true answer, the model's output, or its output for a wrong input given on purpose."""

    @property
    def is_clip(self) -> bool:
        return self.pixels.ndim == 4

    @property
    def css_class(self) -> str:
        """The class that plays the clip (see `animations`); `still` for an image."""
        return f"c{len(self.pixels)}x{self.pixels.shape[1]}" if self.is_clip else "still"

    @property
    def description(self) -> str:
        return f"a clip of {len(self.pixels)} frames" if self.is_clip and len(self.pixels) > 1 else "an image"

    @property
    def data_url(self) -> str:
        """The image, or the sheet of the clip's frames: a PNG, or above `EXACT` pixels a side a WebP, a twentieth of its size."""
        file, sheet = io.BytesIO(), Image.fromarray(frames_sheet(self.pixels) if self.is_clip else self.pixels)
        exact = max(self.pixels.shape[-3:-1]) <= EXACT or max(sheet.size) > WEBP_MOST
        sheet.save(file, "png", optimize=True) if exact else sheet.save(file, "webp", quality=80)
        return f"data:image/{'png' if exact else 'webp'};base64," + base64.b64encode(file.getvalue()).decode()


class Row(NamedTuple):
    """One held-out pair."""

    title: str
    pictures: tuple[Picture, ...]
    note: str = ""
    """E.g. the prompt."""


class Table(NamedTuple):
    """Text in cells. The first cell of a row is its header; a cell that starts with a percentage has a bar of that length."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


class Score(NamedTuple):
    """A headline number and its target. Whether the target is reached is computed here, so the page cannot claim otherwise."""

    name: str
    value: float
    """NaN if it was not measured; the target is then not reached."""
    target: float
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"
    controls: tuple[tuple[str, float], ...] = ()
    """The same number by chance or with a wrong input, e.g. (("swapped reference", 12.1),)."""

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    @property
    def verdict(self) -> str:
        aim, done = ("target", "reached") if self.better == "higher" else ("limit", "kept")
        return f"{aim} of {number(self.target, self.unit)} {'' if self.reached else 'not '}{done}"

    @property
    def text(self) -> str:
        """The value, rounded unless rounding would move it across the target."""
        crosses = self._replace(value=float(rounded(self.value))).reached != self.reached
        return f"{self.value:.8g}\N{NO-BREAK SPACE}{self.unit}" if crosses else number(self.value, self.unit)

    def position(self, value: float) -> str:
        """Where a value lies on the card's track, which ends at 100% or a little above the greatest value, in percent of its length."""
        known = [each for each in (self.value, self.target, *(each for _, each in self.controls)) if math.isfinite(each)]
        end = 100.0 if self.unit == "%" else 1.15 * max(known) or 1.0
        share = min(max(value / end, 0.0), 1.0) if math.isfinite(value) else 0.0
        return f"{100 * share:.2f}%"


class Section(NamedTuple):
    """One task, or a combination of tasks."""

    title: str
    text: str
    """Paragraphs, with an empty line between them."""
    rows: tuple[Row, ...]
    scores: Table | None = None
    """The scores beside their controls; the first column after the header is the transfer's own."""


class Report(NamedTuple):
    """The content of the page, from top to bottom."""

    title: str
    subtitle: str
    opening: tuple[Row, ...]
    """Columns under the title, each with the same few pictures below each other, e.g. reference and generated."""
    summary: tuple[Score, ...]
    sections: tuple[Section, ...]
    curves: tuple[Curve, ...]
    facts: Table
    """What was run: commands, steps, seconds, machine, versions, seeds, sizes."""
    next_steps: tuple[tuple[str, str], ...]
    """What a reader may do now, and the command that does it."""
    fps: float = 8.0
    """Frames a second at which clips play."""


def write(report: Report, path: Path) -> None:
    """Writes the page; the same report gives the same bytes. A page of `MOST_BYTES` or more is a `RequestError`."""
    data = page(report).encode()
    count = sum(len(section.rows) for section in report.sections)
    remedy = f"show fewer than its {count} rows, or smaller clips"
    require(len(data) < MOST_BYTES, f"{path}: the page has {len(data) / 1e6:.1f} MB, expected less than {MOST_BYTES / 1e6:.0f}; {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def page(report: Report) -> str:
    """The whole document."""
    rows = [*report.opening, *(row for section in report.sections for row in section.rows)]
    clips = sorted({picture.pixels.shape[:2] for row in rows for picture in row.pictures if picture.is_clip})
    template = environment().get_template("page.html.j2")
    frames = max((frames for frames, _ in clips), default=1)
    return template.render(report=report, frames=frames, animations=Markup(animations(clips, report.fps)))


def environment() -> Environment:
    """Jinja with the files beside this one as templates. All text is escaped, and a name that the template misspells is an error."""
    loader = PackageLoader("evaluation.report", ".")
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    made.globals |= {"draw": draw, "leading_percentage": leading_percentage, "number": number}
    return made


def frames_sheet(clip: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "rows W 3"]:
    """The frames below each other, each between `GUTTER` repeats of its first and last row."""
    return np.pad(clip, ((0, 0), (GUTTER, GUTTER), (0, 0), (0, 0)), mode="edge").reshape(-1, *clip.shape[2:])


def animations(clips: list[tuple[int, int]], fps: float) -> str:
    """The CSS that plays sheets of (frames, height). All have the period of the longest, so that they stay in step."""
    period = max((frames for frames, _ in clips), default=1) + HOLD
    rules = []
    for frames, height in clips:
        name, cell = f"c{frames}x{height}", height + 2 * GUTTER
        # object-position: 100% puts the end of the sheet at the end of the window. The place of a frame is therefore a share of
        # the sheet's length minus the window's.
        first, last = (100 * (number * cell + GUTTER) / (frames * cell - height) for number in (0, frames - 1))
        ends = f"0%{{object-position:0 {first:.5f}%}}{100 * frames / period:.5f}%,to{{object-position:0 {last:.5f}%}}"
        steps = f"steps({frames},jump-none)" if frames > 1 else "step-end"  # jump-none needs two steps
        rule = f"object-position:0 {first:.5f}%;animation:{name} {period / fps:.5f}s {steps} infinite"
        rules.append(f"@keyframes {name}{{{ends}}}\n.{name}{{{rule}}}")
    return "\n".join(rules)


def number(value: float, unit: str) -> str:
    """A value with its unit; NaN is "not measured"."""
    return f"{rounded(value)}\N{NO-BREAK SPACE}{unit}".rstrip() if math.isfinite(value) else "not measured"


def rounded(value: float) -> str:
    """One decimal from 10 on, three digits below."""
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 10 else f"{value:.3g}"


def leading_percentage(text: str) -> float | None:
    """The percentage with which a cell starts, at most 100."""
    found = re.match(r"(\d+(?:\.\d+)?)\s?%", text)
    return min(float(found[1]), 100.0) if found else None
