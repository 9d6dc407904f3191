"""The page is one well-formed file with every pixel of its clips, loads no other file, and its verdicts follow from its numbers."""

import base64
import io
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from configs.errors import RequestError
from evaluation.report import page as report
from evaluation.report.curve import Curve
from evaluation.report.page import Picture, Report, Row, Score, Section, Table

VOID = {"meta", "link", "img", "br"}
NASTY = '<script>alert("x")</script> & \'quoted\' "too"'


class Reader(HTMLParser):
    """All elements as (tag, attributes, text inside), in the order in which they end; fails if a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        opened, attributes, text = self.open.pop()
        assert opened == tag
        self.elements.append((tag, attributes, "".join(text)))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get("class", "").split())]


def clip(frames, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def small(**fields):
    pictures = (
        Picture("reference", clip(9)),
        Picture("first frame", clip(1, seed=1)[0]),
        Picture("generated", clip(17, 24, 40, 2), "generated"),
    )
    row = Row("motion-1", pictures, "a note")
    scores = Table(("", "transferred", "swapped reference"), (("right of 8", "81.2 %", "12.5 %"), ("PSNR", "24 dB", "17 dB")))
    curve = Curve("Losses", "step", "loss", {"stage 1": (range(1, 100), [1 / k for k in range(1, 100)])})
    parts = {
        "title": "A title",
        "subtitle": "What it is",
        "opening": (Row("Motion", pictures[:1]),),
        "summary": (Score("Motion", 81.2, 80, controls=(("swapped reference", 12.5),)),),
        "sections": (Section("Motion", "One.\n\nTwo.", (row,), scores),),
        "curves": (curve,),
        "facts": Table(("what", "value"), (("steps", "1200"),)),
        "next_steps": (("Go on", "make demo"),),
    }
    return Report(**(parts | fields))


def read(**fields):
    return Reader(report.page(small(**fields)))


def test_the_page_is_well_formed_and_loads_no_other_file():
    found = read()
    names = {attributes["id"] for _, attributes, _ in found.elements if "id" in attributes}
    for tag, attributes, _ in found.elements:
        assert not {"srcset", "action", "poster", "srcdoc"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "href"} & attributes.keys():
            value = attributes[name]
            assert value.startswith("data:") or (tag == "a" and value[0] == "#" and value[1:] in names), (tag, value[:40])
    (style,) = found.all("style")
    (script,) = found.all("script")
    assert "url(" not in style[2]
    assert "@import" not in style[2]
    assert not re.search(r"\bfetch\b|XMLHttpRequest|import\(|https?:", script[2])
    assert style[2].count("{") == style[2].count("}")


def pictures(found):
    """Class, sheet and the rest of each picture."""
    for _, attributes, _ in found.all("img"):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
        yield attributes, np.asarray(Image.open(io.BytesIO(data)))


def test_every_pixel_of_every_frame_is_there():
    given = [clip(9), clip(9), clip(1, seed=1), clip(17, 24, 40, 2)]  # one of the opening, three of the section
    found = list(pictures(read()))
    assert len(found) == len(given)
    for (attributes, sheet), frames in zip(found, given, strict=True):
        count, height = frames.shape[:2]
        if count == 1:
            np.testing.assert_array_equal(sheet, frames[0])
            assert attributes["class"] == "still"
            continue
        cells = sheet.reshape(count, height + 4, *frames.shape[2:])
        np.testing.assert_array_equal(cells[:, 2:-2], frames)
        for row in (0, 1):  # beyond an edge, smooth scaling reads the edge itself
            np.testing.assert_array_equal(cells[:, row], frames[:, 0])
            np.testing.assert_array_equal(cells[:, -1 - row], frames[:, -1])
        assert f"{count} frames" in attributes["alt"]
        assert attributes["style"] == f"aspect-ratio:{frames.shape[2]}/{height}"


@pytest.mark.parametrize("fps", [8.0, 16.0])
def test_the_animation_shows_each_frame_for_its_time(fps):
    style = read(fps=fps).all("style")[0][2]
    for frames, height in ((9, 32), (17, 24)):
        name, sheet = f"c{frames}x{height}", frames * (height + 4)
        ends = re.search(rf"@keyframes {name}{{0%{{object-position:0 (\S+)%}}(\S+)%,to{{object-position:0 (\S+)%}}}}", style)
        rule = re.search(rf"\.{name}{{object-position:0 (\S+)%;animation:{name} (\S+)s steps\({frames},jump-none\) infinite}}", style)
        first, moving, last = map(float, ends.groups())
        # CSS: a percentage p puts the sheet's top at p (window - sheet); frame k starts k cells and a gutter down.
        assert first / 100 * (height - sheet) == pytest.approx(-2, abs=1e-2)
        assert last / 100 * (height - sheet) == pytest.approx(-((frames - 1) * (height + 4) + 2), abs=1e-2)
        assert float(rule[1]) == first
        period = float(rule[2])
        assert period == pytest.approx((17 + 4) / fps)  # the longest clip and its pause, for all
        assert moving / 100 * period == pytest.approx(frames / fps, abs=1e-4)


def test_a_clip_of_one_frame_is_a_picture_too():
    lone = Row("one", (Picture("clip", clip(1)),))
    found = read(opening=(), sections=(Section("one", "", (lone,)),))
    assert "steps(1" not in found.all("style")[0][2]
    assert len(list(pictures(found))) == 1


def test_all_text_is_escaped():
    row = Row(NASTY, (Picture(NASTY, clip(2)),), NASTY)
    tables = Table((NASTY, NASTY), ((NASTY, NASTY),), NASTY)
    plain, nasty = (
        Reader(
            report.page(
                small(
                    title=text,
                    subtitle=text,
                    opening=(row if text == NASTY else Row(text, (Picture(text, clip(2)),), text),),
                    summary=(Score(text, 1, 2, text, controls=((text, 1.0),)),),
                    sections=(Section(text, text, (row,) if text == NASTY else (Row(text, (Picture(text, clip(2)),), text),), tables),),
                    curves=(Curve(text, text, text, {text: ([1, 2], [1.0, 2.0])}),),
                    facts=tables,
                    next_steps=((text, text),),
                )
            )
        )
        for text in ("plain", NASTY)
    )
    assert [(tag, attributes.keys()) for tag, attributes, _ in nasty.elements] == [(tag, a.keys()) for tag, a, _ in plain.elements]
    everything = nasty.all("html")[0][2]
    assert everything.count(NASTY) >= 18
    assert f"{NASTY}, {NASTY}: a clip of 2 frames" in [attributes["alt"] for _, attributes, _ in nasty.all("img")]


@pytest.mark.parametrize(
    ("value", "better", "verdict"),
    [
        (80.0, "higher", "✓ target of 80 % reached"),
        (79.99, "higher", "✕ target of 80 % not reached"),
        (80.0, "lower", "✓ limit of 80 % kept"),
        (80.01, "lower", "✕ limit of 80 % not kept"),
        (math.nan, "higher", "✕ target of 80 % not reached"),
        (math.nan, "lower", "✕ limit of 80 % not kept"),
    ],
)
def test_a_verdict_follows_from_the_number(value, better, verdict):
    found = read(summary=(Score("name", value, 80.0, better=better),))
    texts = [text.replace("\N{NO-BREAK SPACE}", " ") for _, _, text in found.all("p")]
    assert verdict in texts
    assert ("not measured" in texts) == math.isnan(value)


@pytest.mark.parametrize(("value", "text"), [(79.999, "79.999"), (80.04, "80"), (0.03417, "0.0342"), (1234.56, "1234.6"), (0, "0")])
def test_a_number_is_short_but_never_rounded_over_its_target(value, text):
    found = read(summary=(Score("name", value, 80.0),))
    assert [value for _, _, value in found.all("p", "value")] == [f"{text}\N{NO-BREAK SPACE}%"]


def test_a_target_of_zero():
    found = read(summary=(Score("failures", 0, 0, "", "lower"),))
    assert "✓ limit of 0 kept" in [text for _, _, text in found.all("p")]


def test_controls_stand_beside_the_score():
    found = read()
    card = next(text for _, attributes, text in found.all("li") if "Motion" in text and "target" in text)
    assert "swapped reference 12.5" in card
    (table,) = found.all("table", "scores")
    assert table[2].index("81.2 %") < table[2].index("12.5 %")
    shares = [attributes["style"] for _, attributes, _ in found.all("td", "bar")]
    assert shares == ["--share:81.20%", "--share:12.50%"]


def test_every_header_cell_says_what_it_heads():
    found = read()
    assert {attributes["scope"] for _, attributes, _ in found.all("th")} == {"row", "col"}


def test_a_misspelt_name_in_the_template_is_an_error():
    with pytest.raises(UndefinedError):
        report.environment().from_string("{{ report.titel }}").render(report=small())


def test_every_file_of_the_page_is_in_the_package():
    folder = Path(report.__file__).parent
    project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["evaluation.report"]
    packaged = {path.name for pattern in patterns for path in folder.glob(pattern)}
    assert packaged >= {path.name for path in folder.iterdir() if path.is_file()} - {path.name for path in folder.glob("*.py")}


def test_the_same_report_gives_the_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        report.write(small(), tmp_path / "new" / name)
    a, b = ((tmp_path / "new" / name).read_bytes() for name in ("a.html", "b.html"))
    assert a == b
    assert a.startswith(b"<!doctype html>\n<html")


def test_a_page_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", 20_000)
    with pytest.raises(RequestError, match=r"expected less than .*; show fewer than its 1 rows"):
        report.write(small(), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
