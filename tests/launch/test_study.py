"""launch.study: pages of clips that launch.evaluate measured, filled in by three raters, and what is made of their answers.

A driven browser fills the pages in; it needs Debian's chromium-driver, and half a minute:

    python -m pytest -n 0 -m slow tests/launch/test_study.py
"""

import json
import re
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from configs import stage1
from evaluation import videos
from evaluation.study import answers
from launch import evaluate, study
from launch.command import execute
from tests.browser import browsers

SIZE = stage1.get_config("smoke").video
PROMPT = "a <b>fox</b> & </script><script>document.title = 'broken'</script>"
SYSTEMS = ("ours", "other")
TASK = {"s1": "style", "s2": "style", "m1": "motion", "m2": "motion"}

# What rater 1, 2 and 3 think of each case; of ours, then of the other system.
FIDELITY = {"s1": ((5, 4, 5), (2, 1, 2)), "s2": ((4, 4, 5), (3, 2, 2)), "m1": ((5, 5, 5), (1, 1, 1)), "m2": ((3, 3, 3), (3, 2, 1))}
CONSISTENCY = {"m1": ((2, 2, 2), (1, 1, 1)), "m2": ((2, 2, 1), (1, 1, 1))}
QUALITY = {case: ((4, 4, 4), (3, 3, 3)) for case in TASK}
PREFERRED = {"s1": ("ours",) * 3, "s2": ("ours", "ours", "neither"), "m1": ("ours",) * 3, "m2": ("ours", "other", "neither")}


def run(*args):
    return execute(study.main, study.FLAGS, list(map(str, args)))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two systems of one suite, as launch.evaluate leaves them."""
    folder, random = tmp_path_factory.mktemp("evaluated"), np.random.default_rng(0)
    clip = lambda: random.integers(0, 256, (SIZE.frames, SIZE.height, SIZE.width, 3), dtype=np.uint8)  # noqa: E731
    rows = []
    for name, task in TASK.items():
        videos.write(folder / f"{name}_reference.mp4", clip(), SIZE.fps)
        rows.append({"id": f"case-{name}", "task": task, "reference": f"{name}_reference.mp4", "prompt": PROMPT})
        if task == "motion":
            videos.write(folder / f"{name}_target.mp4", clip(), SIZE.fps)
            rows[-1]["target"] = f"{name}_target.mp4"
        for system in SYSTEMS:
            videos.write(folder / f"videos_{system}" / f"case-{name}.mp4", clip(), SIZE.fps)
    (folder / "suite.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for system in SYSTEMS:
        args = [f"--suite={folder}/suite.jsonl", f"--videos={folder}/videos_{system}", "--controls=copied", f"--out={folder / system}"]
        assert execute(evaluate.main, evaluate.FLAGS, ["--config=stage1:smoke", *args]) == 0
    return folder


@pytest.fixture(scope="module")
def made(evaluated, tmp_path_factory):
    """A study of three raters."""
    out = tmp_path_factory.mktemp("study") / "study"
    assert run(*(f"--scores={evaluated / system}" for system in SYSTEMS), f"--out={out}", "--raters=3") == 0
    return out


def key_of(out):
    return answers.read_key(out / "key.json")


def opinion(question, rater):
    """What a rater answers to a question of the key."""
    case, names = question.case.removeprefix("case-"), [system.rpartition("/")[2] for system in question.systems]
    if len(names) == 2:
        preferred = PREFERRED[case][rater]
        return {"preference": "neither" if preferred == "neither" else "AB"[names.index(preferred)]}
    grades = {"fidelity": FIDELITY, "image consistency": CONSISTENCY, "quality": QUALITY}
    return {scale: grades[scale][case][SYSTEMS.index(names[0])][rater] for scale in question.scales}


def file_of(key, rater, **changed):
    """The file that a rater saves."""
    page = f"rater-0{rater + 1}"
    given = [opinion(question, rater) for question in key.pages[page]]
    return {"study": key.study, "page": page, "session": f"{rater}" * 16, "saved": "2026-01-01T00:00:00.000Z", "answers": given} | changed


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_pages_say_nothing_of_systems_and_hold_everything(made, evaluated):
    pages = sorted((made / "pages").iterdir())
    assert [path.name for path in pages] == ["rater-01.html", "rater-02.html", "rater-03.html"]
    for path in pages:
        text = re.sub(r'<script type="text/plain".*?</script>', "", path.read_text(), flags=re.DOTALL)
        for secret in (*SYSTEMS, "case-", str(evaluated), ".mp4", "suite"):
            assert not re.search(rf"\b{re.escape(secret)}", text), secret
        assert not re.search(r'<[^>]*(src|href)="(?!data:,)', text)
        assert PROMPT not in text
        about = json.loads(re.search(r'id="about">(.*?)</script>', text).group(1))
        assert {each["prompt"] for each in about["questions"]} == {PROMPT}
        used = {number for each in about["questions"] for number in (each["reference"], each["first"], *each["clips"])} - {None}
        assert used == {int(number) for number in re.findall(r'id="content-(\d+)"', path.read_text())}


def test_all_raters_answer_the_same_in_another_order(made):
    pages = list(key_of(made).pages.values())
    alike = [sorted((q.case, q.scales, tuple(sorted(q.systems))) for q in page) for page in pages]
    assert alike[0] == alike[1] == alike[2]
    assert len(pages[0]) == 4 * 2 + 4
    assert len({tuple(q.case for q in page) for page in pages}) == 3
    assert all([len(q.systems) for q in page] == [1] * 8 + [2] * 4 for page in pages)
    assert len({q.systems for page in pages for q in page if len(q.systems) == 2}) == 2  # both are A now and then


def check_by_hand(out):
    """What results.md says, counted by hand from the tables above."""
    text = (out / "results.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith("|")}
    means = {
        name: [float(cell.split(" ")[0]) for cell in cells[:2]] for name, cells in rows.items() if "," in name and " over " not in name
    }
    assert means == {
        "style, fidelity": [4.5, 2],  # (5+4+5 + 4+4+5) / 6, (2+1+2 + 3+2+2) / 6
        "style, quality": [4, 3],
        "motion, fidelity": [4, 1.5],  # (15 + 9) / 6, (3 + 6) / 6
        "motion, image consistency": [1.83, 1],  # 11 / 6
        "motion, quality": [4, 3],
        "all, fidelity": [4.25, 1.75],  # 51 / 12, 21 / 12
        "all, image consistency": [1.83, 1],
        "all, quality": [4, 3],
    }
    preferred = {name: (float(cells[0].split(" ")[0]), cells[1:]) for name, cells in rows.items() if " over " in name}
    ours, other = key_of(out).systems
    assert preferred == {
        f"style, {ours} over {other}": (0.917, ["5", "1", "0"]),  # (5 + 1/2) / 6
        f"motion, {ours} over {other}": (0.75, ["4", "1", "1"]),
        f"all, {ours} over {other}": (0.833, ["9", "2", "1"]),
    }
    # Of 12 values of image consistency, 7 are 1 and 5 are 2; one of a unit differs from the other two: 1 - 1 / (7 * 5 / 11) = 24 / 35.
    assert rows["image consistency"] == ["0.686", "3", "4"]
    assert rows["quality"] == ["1", "3", "8"]


def test_means_and_agreement_are_those_counted_by_hand(made, tmp_path, capsys):
    key = key_of(made)
    folder = write(tmp_path / "answers", **{f"r{rater}": file_of(key, rater) for rater in range(3)})
    assert run(f"--answers={folder}", f"--out={made}") == 0
    check_by_hand(made)
    assert "3 raters" in capsys.readouterr().out
    assert len((made / "answers.csv").read_text().splitlines()) == 1 + 3 * (4 * 2 * 2 + 2 * 2 + 4)


def test_files_that_cannot_be_used_cost_themselves_alone(made, tmp_path):
    key = key_of(made)
    good = file_of(key, 0)
    wrong = [{"fidelity": 6, "quality": 1}, *good["answers"][1:]]
    late = file_of(key, 0, session="late", answers=[{}, *good["answers"][1:]])
    files = {
        "good": good,
        "older": good | {"answers": [{}] * 12, "saved": "2025"},
        "late": late,
        "other": good | {"study": "x"},
        "page": good | {"page": "rater-99"},
        "short": good | {"answers": []},
        "wrong": good | {"answers": wrong},
        "yes": good | {"answers": [{"quality": True}, *good["answers"][1:]]},
        "text": good | {"session": 3},
    }
    folder = write(tmp_path / "answers", **files)
    (folder / "cut.json").write_text("{")
    found, problems = answers.read(folder, key)
    asked = sum(len(question.scales) for question in key.pages["rater-01"])
    assert len(found) == 2 * asked - len(key.pages["rater-01"][0].scales)  # one page, two persons; what was saved earlier does not count
    assert {each.rater for each in found} == {"rater-01 (000000)", "rater-01 (late)"}
    said = {line.split("/")[-1].split(".json")[0]: line for line in problems if line.startswith("left out")}
    assert set(said) == {"other", "page", "short", "wrong", "yes", "text", "cut"}
    assert "fidelity 6, expected one of 1, 2, 3, 4, 5" in said["wrong"]
    assert any("answers are absent" in line for line in problems)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no answers", "no answers of this study"),
        ("no key", "key.json: no such file"),
        ("both", "give the first to write pages"),
        ("neither", "give the first to write pages"),
        ("twice", "given twice"),
        ("no evaluation", "no settings.json in it"),
        ("there already", "not empty"),
        ("suite gone", "no such file, and"),
        ("suite changed", "it has changed since"),
    ],
)
def test_a_wrong_request_is_one_line(what, message, made, evaluated, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "changed.jsonl").write_text("{}")
    scores, out = f"--scores={evaluated / 'ours'}", f"--out={tmp_path / 'new'}"
    args = {
        "no answers": [f"--answers={tmp_path / 'empty'}", f"--out={made}"],
        "no key": [f"--answers={tmp_path / 'empty'}", out],
        "both": [scores, f"--answers={tmp_path}", out],
        "neither": [out],
        "twice": [scores, f"--scores={evaluated}/../{evaluated.name}/ours", out],
        "no evaluation": [f"--scores={tmp_path / 'empty'}", out],
        "there already": [scores, f"--out={made}"],
        "suite gone": [scores, out, f"--suite={tmp_path}/absent.jsonl"],
        "suite changed": [scores, out, f"--suite={tmp_path}/changed.jsonl"],
    }[what]
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_clip_that_is_damaged_costs_its_case_alone(evaluated, tmp_path, capsys):
    clip = evaluated / "videos_other" / "case-s1.mp4"
    whole = clip.read_bytes()
    clip.write_bytes(b"no video")
    try:
        assert run(*(f"--scores={evaluated / system}" for system in SYSTEMS), f"--out={tmp_path / 'new'}", "--raters=1") == 0
    finally:
        clip.write_bytes(whole)
    assert "left out: case-s1: " in capsys.readouterr().out
    assert {each.case for each in key_of(tmp_path / "new").pages["rater-01"]} == {"case-s2", "case-m1", "case-m2"}


def test_a_page_that_is_too_large_is_refused(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "MOST_BYTES", 100_000)
    assert run(f"--scores={evaluated / 'ours'}", f"--out={tmp_path / 'new'}") == 2
    assert "--cases=5: 1 of all cases fill a page with " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@contextmanager
def served(folder):
    """The address of a static server of a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
def test_three_raters_fill_the_pages_in(made, tmp_path):
    """From the disk, and the last of them from a server; one closes the page halfway and goes on."""
    key, downloads = key_of(made), tmp_path / "answers"
    downloads.mkdir()
    with browsers() as open_browser, served(made / "pages") as address:
        for rater, (name, questions) in enumerate(key.pages.items()):
            browser = open_browser(downloads)
            page = f"{address if rater == 2 else (made / 'pages').as_uri()}/{name}.html"
            browser.open(page)
            browser.click("#begin")
            for number, question in enumerate(questions):
                if rater == 1 and number == 5:  # comes back later
                    browser.open("about:blank")
                    browser.open(page)
                    assert browser.run("return document.querySelector('#begin').textContent") == "Go on"
                    browser.click("#begin")
                assert browser.run("return document.querySelector('#progress').textContent") == f"{number + 1} of {len(questions)}"
                assert browser.run("return document.querySelector('#prompt').textContent") == f"Text: {PROMPT}"
                browser.until("return [...document.querySelectorAll('video')].every(each => each.readyState > 1 && each.currentTime > 0)")
                assert browser.run("return document.querySelectorAll('video').length") == 1 + len(question.systems)
                for scale, value in opinion(question, rater).items():
                    browser.click(f'input[name="{scale}"][value="{value}"]')
                browser.click("#next")
            assert browser.run("return document.querySelector('#left').textContent") == "Every question is answered."
            assert browser.run("return document.title") == f"Rating of clips, {name}"
            browser.click("#save")
            browser.until("return !document.querySelector('#saved').hidden")
            browser.wait_for_file(downloads, rater + 1)
            assert browser.console() == []
    assert run(f"--answers={downloads}", f"--out={made}") == 0
    check_by_hand(made)
