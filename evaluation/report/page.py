"""One page of HTML that shows what was run and what came of it: scores beside their controls, moving pictures, losses, commands.

The page holds everything it shows and asks nothing of the network. Clips are sheets of frames moved by one CSS rule, so that all play
in step; they are kept at their own size, every pixel as generated, and scaled by the browser.
"""

import base64
import io
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from configs.errors import require
from evaluation.report.curve import Curve, figure
from evaluation.report.look import SCRIPT, STYLE
from evaluation.report.markup import Markup, element

MOST_BYTES = 15_000_000
GUTTER = 2
"""Rows between frames of a sheet that repeat the edge, so that smooth scaling never mixes two frames."""
HOLD = 4
"""Frames for which the last one stays before a clip starts over."""


class Picture(NamedTuple):
    """A clip or an image, and what it is to the reader."""

    label: str
    pixels: UInt8[np.ndarray, "T H W 3"] | UInt8[np.ndarray, "H W 3"]
    kind: Literal["given", "truth", "generated", "control"] = "given"
    """Given to the model, what it should make, what it made, or what it made when asked wrongly on purpose."""


class Row(NamedTuple):
    """One held-out pair."""

    title: str
    pictures: tuple[Picture, ...]
    note: str = ""
    """E.g. the prompt."""


class Table(NamedTuple):
    """Text in cells. A row's first cell is its header; a cell that starts with a percentage has a bar of that length."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


class Score(NamedTuple):
    """A headline number. Whether it reached its target is computed here, never told."""

    name: str
    value: float
    """NaN: it was not measured, and so its target is not reached."""
    target: float
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"
    controls: tuple[tuple[str, float], ...] = ()
    """What the same number is by chance or when asked wrongly, e.g. (("swapped reference", 12.1),)."""

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


class Section(NamedTuple):
    """One task, or a combination of tasks."""

    title: str
    text: str
    """Paragraphs, with an empty line between them."""
    rows: tuple[Row, ...]
    scores: Table | None = None
    """The score beside its controls: its own column first."""


class Report(NamedTuple):
    """What the page shows, from top to bottom."""

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


def page(report: Report) -> Markup:
    """The whole document."""
    rows = [*report.opening, *(row for section in report.sections for row in section.rows)]
    clips = sorted({picture.pixels.shape[:2] for row in rows for picture in row.pictures if picture.pixels.ndim == 4})
    parts = [(f"part-{place}", section.title) for place, section in enumerate(report.sections)]
    links = [element("a", title, href=f"#{name}") for name, title in (*parts, ("losses", "Losses"), ("run", "The run"), ("next", "Next"))]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # The browser itself holds the page to what it promises: nothing is fetched.
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", report.title),
        element("style", Markup(STYLE + motion(clips, report.fps))),
    )
    header = element(
        "header",
        element("h1", report.title),
        element("p", report.subtitle, _class="subtitle"),
        element("nav", *links, aria_label="Parts of this page"),
    )
    opening = element("div", *map(row_block, report.opening), _class="opening")
    scores = element("ul", *map(score_card, report.summary), _class="cards")
    curves = element("section", element("h2", "Losses"), element("div", *map(figure, report.curves), _class="curves"), id="losses")
    facts = element("section", element("h2", "The run"), table(report.facts, "facts"), id="run")
    steps = [element("li", element("p", text), element("pre", element("code", command), tabindex=0)) for text, command in report.next_steps]
    next_steps = element("section", element("h2", "Next"), element("ol", *steps, _class="steps"), id="next")
    sections = [section_block(section, name) for section, (name, _) in zip(report.sections, parts, strict=True)]
    main = element("main", opening, scores, LEGEND, *sections, curves, facts, next_steps)
    frames = max((frames for frames, _ in clips), default=1)
    body = element("body", header, main, player(frames, report.fps), element("script", Markup(SCRIPT)))
    return Markup("<!doctype html>\n" + element("html", head, body, lang="en") + "\n")


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

LEGEND = element(
    "ul",
    *(
        element("li", element("b", name, _class=f"kind {kind}"), " ", text)
        for kind, name, text in (
            ("given", "given", "what the model gets"),
            ("generated", "generated", "what it makes"),
            ("truth", "truth", "the held-out answer, which it never sees"),
            ("control", "control", "what it makes when the reference is wrong or missing"),
        )
    ),
    _class="kinds",
)


def section_block(section: Section, name: str) -> Markup:
    text = [element("p", paragraph, _class="text") for paragraph in section.text.split("\n\n") if paragraph]
    scores = [table(section.scores, "scores")] if section.scores else []
    return element("section", element("h2", section.title), *text, *scores, *map(row_block, section.rows), id=name)


def row_block(row: Row) -> Markup:
    note = [element("p", row.note, _class="note")] if row.note else []
    pictures = element("div", *(picture_block(picture, row.title) for picture in row.pictures), _class="pictures")
    return element("article", element("div", element("h3", row.title), *note, _class="about"), pictures, _class="row")


def picture_block(picture: Picture, of: str) -> Markup:
    sheet, count = frames_sheet(picture.pixels), len(picture.pixels) if picture.pixels.ndim == 4 else 1
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "png", optimize=True)
    height, width = picture.pixels.shape[-3:-1]
    image = element(
        "img",
        src="data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        alt=f"{of}, {picture.label}: " + (f"a clip of {count} frames" if count > 1 else "an image"),
        _class=f"c{count}x{height}" if picture.pixels.ndim == 4 else "still",
        style=f"aspect-ratio:{width}/{height}",
    )
    return element("figure", image, element("figcaption", picture.label, _class=f"kind {picture.kind}"), _class="picture")


def frames_sheet(pixels: UInt8[np.ndarray, "T H W 3"] | UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "rows W 3"]:
    """The frames of a clip below each other, each between `GUTTER` repeats of its first and last row; an image as it is."""
    if pixels.ndim == 3:
        return pixels
    return np.pad(pixels, ((0, 0), (GUTTER, GUTTER), (0, 0), (0, 0)), mode="edge").reshape(-1, *pixels.shape[2:])


def motion(clips: list[tuple[int, int]], fps: float) -> str:
    """The CSS that plays sheets of (frames, height): all of one period, that of the longest, so that they stay in step."""
    period = max((frames for frames, _ in clips), default=1) + HOLD
    rules = []
    for frames, height in clips:
        name, cell = f"c{frames}x{height}", height + 2 * GUTTER
        # object-position: 100% puts the sheet's end at the window's end, so a frame's place is a share of what sticks out.
        first, last = (100 * (number * cell + GUTTER) / (frames * cell - height) for number in (0, frames - 1))
        ends = f"0%{{object-position:0 {first:.5f}%}}{100 * frames / period:.5f}%,to{{object-position:0 {last:.5f}%}}"
        steps = f"steps({frames},jump-none)" if frames > 1 else "step-end"  # jump-none needs two steps
        rule = f"object-position:0 {first:.5f}%;animation:{name} {period / fps:.5f}s {steps} infinite"
        rules.append(f"@keyframes {name}{{{ends}}}\n.{name}{{{rule}}}")
    return "\n".join(rules)


def score_card(score: Score) -> Markup:
    known = [value for value in (score.value, score.target, *(value for _, value in score.controls)) if math.isfinite(value)]
    full = 100.0 if score.unit == "%" else 1.15 * max(known) or 1.0

    def mark(kind: str, edge: str, value: float) -> Markup:
        share = min(max(value / full, 0.0), 1.0) if math.isfinite(value) else 0.0
        return element("i", _class=kind, style=f"{edge}:{100 * share:.2f}%")

    chances = [mark("chance", "left", value) for _, value in score.controls]
    track = [mark("fill", "width", score.value), *chances, mark("target", "left", score.target)]
    aim = "target" if score.better == "higher" else "limit"
    sign, verdict, kind = ("✓", "reached", "reached") if score.reached else ("✕", "not reached", "missed")
    if score.better == "lower":
        verdict = verdict.replace("reached", "kept")
    # A number that would be rounded over its target is given in full.
    crosses = score._replace(value=float(rounded(score.value))).reached != score.reached
    value = f"{score.value:.8g}\N{NO-BREAK SPACE}{score.unit}" if crosses else number(score.value, score.unit)
    controls = [element("li", name, " ", element("b", number(value, score.unit))) for name, value in score.controls]
    return element(
        "li",
        element("h3", score.name),
        element("p", value, _class="value"),
        element("div", *track, _class="track", aria_hidden="true"),
        element("p", element("b", sign, aria_hidden="true"), f" {aim} of {number(score.target, score.unit)} {verdict}", _class=kind),
        element("ul", *controls),
    )


def number(value: float, unit: str) -> str:
    """As a reader wants it; NaN is "not measured"."""
    return f"{rounded(value)}\N{NO-BREAK SPACE}{unit}".rstrip() if math.isfinite(value) else "not measured"


def rounded(value: float) -> str:
    """One decimal, or three digits of what is small."""
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 10 else f"{value:.3g}"


def table(content: Table, kind: str) -> Markup:
    caption = [element("caption", content.caption)] if content.caption else []
    head = element("thead", element("tr", *(element("th", column, scope="col") for column in content.columns)))
    rows = [element("tr", element("th", row[0], scope="row"), *map(cell, row[1:])) for row in content.rows]
    return element("div", element("table", *caption, head, element("tbody", *rows), _class=kind), _class="scroll")


def cell(text: str) -> Markup:
    percent = re.match(r"(\d+(?:\.\d+)?)\s?%", text)
    if percent is None:
        return element("td", text)
    return element("td", text, _class="bar", style=f"--share:{min(float(percent[1]), 100):.2f}%")


def player(frames: int, fps: float) -> Markup:
    """The buttons, which the script shows once it runs."""
    buttons = (("play", "Pause", "Play or pause all clips"), ("back", "\N{MINUS SIGN}1", "One frame back"), ("on", "+1", "One frame on"))
    made = [element("button", text, id=name, type="button", aria_label=told) for name, text, told in buttons]
    counter = element("output", f"1 / {frames}", id="frame", aria_label="Frame")
    pixels = element("button", "Pixels", id="pixels", type="button", aria_pressed="false", aria_label="Show the single pixels")
    return element("div", *made, counter, pixels, _class="player", id="player", hidden="", data_frames=frames, data_fps=fps)
