"""The paper's five test sets by number (suites.PROTOCOLS) on films, with a tiny network: a whole report, looked at in a browser.

    python -m pytest -n 0 -s -o faulthandler_timeout=0 -m slow tests/launch/test_five_protocols.py

Films are those of tests that are beside the project, if they are there, else drawn ones. Many windows of few films stand for 50 films, so
the figures mean nothing. `OMNITRANSFER_KEEP=DIR` keeps the report and a screenshot of it.
"""

import json
import os
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import stage1
from data_pipelines import clips, example
from evaluation import results, suites, videos
from launch import evaluate
from launch.command import execute
from tests.browser import browsers

CONFIG = stage1.get_config("smoke")
SIZE = CONFIG.video
FILMS = Path(__file__).parents[3] / "shared" / "clips"
SECONDS, FPS, SIDE = 2.3, 8, (64, 96)
PROMPTS = ("a red disc in the snow", "a dog at night")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Films of 2 s, small, so that a case is read in no time."""
    folder, frames = tmp_path_factory.mktemp("films"), int(SECONDS * FPS)
    for path in sorted(FILMS.rglob("*.mp4")):
        clip = clips.read_clip(path, frames=frames, fps=FPS, height=SIDE[0], width=SIDE[1])
        videos.write(folder / path.name, clip, FPS)
    if not list(folder.iterdir()):
        for name, (_, draw) in example.SCENES.items():
            times = np.linspace(0, 1, frames)
            picture = np.stack([np.asarray(Image.fromarray(draw(t)).resize(SIDE[::-1])) for t in times])
            videos.write(folder / f"{name}.mp4", picture, FPS)
    return sorted(folder.iterdir())


def suite(folder, films):
    """As many references and prompts of each task as the paper has; a reference is a window of a film."""
    lines = []
    for task, (count, prompts) in suites.PROTOCOLS.items():
        for i in range(count):
            film, start = films[i % len(films)], i // len(films) / FPS
            row = {"id": f"{task}-{i:02d}", "task": task, "reference": str(film), "start": start, "kind": film.stem}
            row |= {"prompts": list(PROMPTS[:prompts])} if prompts > 1 else {"prompt": PROMPTS[i % 2]}
            if task in ("motion", "camera", "effect"):
                other = films[(i + 1) % len(films)]
                frame = folder / f"{other.stem}.png"
                if not frame.exists():
                    Image.fromarray(clips.read_clip(other, frames=1, fps=FPS, height=SIDE[0], width=SIDE[1])[0]).save(frame)
                row["first_frame"] = frame.name
            lines.append(json.dumps(row))
    (folder / "suite.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "suite.jsonl"


@pytest.mark.slow  # ten minutes
def test_a_whole_report(films, tmp_path):
    out = Path(os.environ.get("OMNITRANSFER_KEEP") or tmp_path / "report")
    flags = ["--config=stage1:smoke", f"--suite={suite(tmp_path, films)}", f"--out={out}", "--sampler.steps=1", "--controls=still,copied"]
    assert execute(evaluate.main, evaluate.FLAGS, flags) == 0
    lines = results.read(out / "scores.csv")
    assert not [line for line in lines if line.metric == results.CLIP]
    tables = (out / "tables.md").read_text()
    for task, (count, prompts) in suites.PROTOCOLS.items():
        assert f"## {task}\n\ncomplete: {count} of {count} clips, {prompts} of {prompts} prompts a clip" in tables
        own = {line.case for line in lines if (line.task, line.row) == (task, "transfer")}
        assert len(own) == count * prompts
    for task in ("motion", "camera"):
        still, copied = (results.mean(lines, row, task, "MF-LK").value for row in ("still", "copied"))
        assert still < copied == pytest.approx(1)  # where nothing moves in a film, a held frame has 1 too
    assert results.mean(lines, "copied", "id", "copies").value == 1
    with browsers() as open_browser:
        browser = open_browser(tmp_path)
        browser.open((out / "report.html").resolve().as_uri())
        assert browser.run("return document.querySelectorAll('img').length") >= 5 * 8  # worst and best of each task, each with its rows
        assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert "complete: 50 of 50 clips" in browser.run("return document.body.textContent")
        assert browser.console() == []
        (out / "screenshot.png").write_bytes(b64decode(browser.send("/screenshot", method="GET")))
