"""The page in a real browser: clips play in step and show one whole frame at a time, the buttons work, and there is no error."""

import base64
import fcntl
import io
import itertools
import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from evaluation.report import page as report
from evaluation.report.page import Picture, Report, Row, Section, Table

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

FRAMES = 9
# One colour for each frame of each clip; no other part of the page has these colours.
COLOURS = {name: [(base, 20 * k + 7, 250 - 20 * k) for k in range(FRAMES)] for name, base in (("a", 101), ("b", 203), ("c", 151))}
SIZES = {"a": (32, 32), "b": (64, 64), "c": (24, 40)}


def pipe():
    """Two ends with high numbers."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in ends]
    for end in ends:
        os.close(end)
    return moved


class Browser:
    """A page in headless Chromium, controlled through the pipe of its DevTools protocol."""

    def __init__(self, profile):
        # Chromium reads commands from descriptor 3 and answers on 4; the pipes themselves lie far from both.
        (reads, self.out), (self.inward, writes) = pipe(), pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--window-size=1000,900",
        ]
        command = [str(CHROMIUM), *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        moved = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-', "bash"]
        self.process = subprocess.Popen([*moved, *command], pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.ids, self.rest, self.events, self.session = itertools.count(1), b"", [], {}

    def receive(self):
        while b"\0" not in self.rest:
            more = os.read(self.inward, 1 << 20)
            assert more, "the browser ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def do(self, method, **parameters):
        number = next(self.ids)
        os.write(self.out, json.dumps({"id": number, "method": method, "params": parameters, **self.session}).encode() + b"\0")
        while (message := self.receive()).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path):
        """Opens a new tab; all later commands go to it."""
        self.session = {}
        target = self.do("Target.createTarget", url="about:blank")
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]}
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.do(f"{domain}.enable")
        self.events = []
        self.do("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script):
        result = self.do("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def counts(self):
        """The number of pixels on the screen that have each frame's colour, by clip."""
        png = base64.b64decode(self.do("Page.captureScreenshot")["data"])
        packed = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).view(np.uint32)
        return {
            name: [int((packed == np.array([*colour, 255], np.uint8).view(np.uint32)).sum()) for colour in colours]
            for name, colours in COLOURS.items()
        }

    def frame(self):
        """The frame that is on the screen, the same for all clips."""
        visible = {tuple(k for k, count in enumerate(found) if count) for found in self.counts().values()}
        assert len(visible) == 1, visible
        (frame,) = visible.pop()
        return frame

    def errors(self):
        """Messages on the console, exceptions, and requests to a network."""
        bad = [e for e in self.events if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return bad + [url[:60] for url in asked if not url.startswith(("file:", "data:", "about:"))]

    def close(self):
        self.do("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.inward)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
        browser.close()
    finally:
        browser.process.kill()
        browser.process.wait()


@pytest.fixture
def browser(chromium, tmp_path):
    """The browser with a page of three clips."""
    clips = {name: np.array(COLOURS[name], np.uint8)[:, None, None] + np.zeros((1, *size, 1), np.uint8) for name, size in SIZES.items()}
    rows = (Row("row", tuple(Picture(name, clip) for name, clip in clips.items())),)
    wide = Table(tuple("abcdefgh"), (("w" * 300, *("word " * 3 for _ in range(7))),))
    page = Report("A title", "", (), (), (Section("One", "w" * 100, rows),), (), wide, (("x", "y" * 300),))
    report.write(page, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    return chromium


def click(browser, query):
    browser.run(f"document.querySelector({query!r}).click()")


def moves(browser, deadline=10.0):
    """Whether three different frames appear before the deadline; all clips are in step in every screenshot."""
    seen, ends = {browser.frame()}, time.monotonic() + deadline
    while len(seen) < 3 and time.monotonic() < ends:
        seen.add(browser.frame())
    return len(seen) == 3


def test_clips_move_in_step_stop_and_step(browser):
    assert moves(browser)
    click(browser, "#play")
    paused = browser.frame()
    assert not moves(browser, 0.5)
    # 160 pixels wide: one frame everywhere except at the outline and the round corners
    for name, found in browser.counts().items():
        height, width = SIZES[name]
        assert 0.94 < found[paused] / (160 * 160 * height / width) <= 1, name
    for clicks, moved in ((["#on"], 1), (["#on"] * FRAMES, 0), (["#back"] * 4, -4)):
        for button in clicks:
            click(browser, button)
        paused = (paused + moved) % FRAMES
        assert browser.frame() == paused
    click(browser, ".picture img")
    assert moves(browser)
    assert not browser.errors()


def test_the_page_is_no_wider_than_a_phone(browser):
    browser.do("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=False)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert not browser.errors()


def test_errors_are_found(browser):
    browser.run("setTimeout(() => { throw new Error('on purpose') }); new Image().src = 'https://example.invalid/a.png'; 0")
    time.sleep(0.3)
    browser.run("0")
    methods = {event["method"] for event in browser.errors() if isinstance(event, dict)}
    assert methods == {"Runtime.exceptionThrown", "Log.entryAdded"}  # thrown, and refused by the page's policy
