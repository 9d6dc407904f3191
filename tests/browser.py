"""A headless browser that tests drive by WebDriver (W3C), through Debian's chromium-driver; no package is needed for it."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One window of a browser with a profile of its own."""

    def __init__(self, address: str, downloads: Path):
        preferences = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
        args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]
        wanted = {"goog:chromeOptions": {"args": args, "prefs": preferences}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address = address
        self.address += f"/session/{self.send('/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def send(self, path: str, content: Any = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(content or {}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        self.send("/url", {"url": address})

    def run(self, script: str, *args: Any) -> Any:
        """What a script of the page returns."""
        return self.send("/execute/sync", {"script": script, "args": args})

    def click(self, selector: str) -> None:
        """Clicks as a person does: an element that is hidden or covered is an error."""
        found = self.send("/element", {"using": "css selector", "value": selector})
        self.send(f"/element/{next(iter(found.values()))}/click")

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [each["message"] for each in self.send("/se/log", {"type": "browser"}) if each["level"] in ("SEVERE", "WARNING")]

    def until(self, script: str, seconds: float = 20) -> Any:
        """Waits until a script of the page returns something true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not in {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def wait_for_file(self, folder: Path, count: int, seconds: float = 20) -> None:
        """Waits until so many downloads are finished."""
        end = time.monotonic() + seconds
        while len(list(folder.glob("*.json"))) < count:
            assert time.monotonic() < end, f"{list(folder.iterdir())}"
            time.sleep(0.05)

    def close(self) -> None:
        self.send("", method="DELETE")


@contextmanager
def browsers() -> Iterator[Callable[[Path], Browser]]:
    """A function that opens a browser, given the folder of its downloads; skips where there is no chromedriver."""
    program = shutil.which("chromedriver")
    if program is None:
        pytest.skip("no chromedriver on the path (Debian: apt-get install chromium-driver)")
    opened: list[Browser] = []
    with subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        port = line.strip().rstrip(".").rpartition(" ")[2]

        def open_browser(downloads: Path) -> Browser:
            opened.append(Browser(f"http://127.0.0.1:{port}", downloads))
            return opened[-1]

        try:
            yield open_browser
        finally:
            for each in opened:
                each.close()
            driver.terminate()
