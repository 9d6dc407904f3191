"""The demonstration: a page that says what the numbers say, the time that is left, and the whole road at its least size."""

import json
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser

import numpy as np
import pytest

from configs import stage3
from evaluation import transfer
from evaluation.report import page as report
from evaluation.report.page import Picture, Row
from evaluation.transfer import CONTROLS, Results
from launch import command, demo, encode_world
from omnitransfer_jax import tasks
from omnitransfer_jax.train.log import METRICS_FILE
from world import pixels

TINY = stage3.get_config("tiny")
OTHERS = {"id": ("colour", "texture"), "style": ("colour", "texture"), "motion": ("path",), "camera": ("camera",), "effect": ()}
COUNT = 8


class Reader(HTMLParser):
    """Fails on a tag that is not closed in order; counts tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@lru_cache
def truths():
    """Pairs of every task, and their true clips under every control."""
    pairs = {task: transfer.held_out(TINY, task, COUNT) for task in tasks.NAMES}
    clips = {task: np.stack([pixels.render(pair.target, TINY.video) for pair in of_task]) for task, of_task in pairs.items()}
    return pairs, {task: dict.fromkeys(CONTROLS, truth) for task, truth in clips.items()}


def results(retrieval=0.5, swapped=0.0, **special):
    """Results whose retrieval is `retrieval`, or what `special` says of a task, and `swapped` with another reference."""
    pairs, clips = truths()
    scores = {}
    for task in pairs:
        names = ("psnr", "psnr gain", "leak", *OTHERS[task])
        scores[task] = {}
        for control in CONTROLS:
            share = swapped if control == "swapped" else special.get(task, retrieval)
            right = (np.arange(COUNT) < round(share * COUNT)).astype(float)
            scores[task][control] = {"retrieval": right} | {name: np.linspace(1, 2, COUNT) for name in names}
    return Results(pairs, clips, scores)


def parse(*flags):
    demo.FLAGS.unparse_flags()
    demo.FLAGS(["demo", *flags])


@pytest.fixture
def page(tmp_path):
    """A function of results to the report about them."""
    parse(f"--out={tmp_path}")
    for stage in demo.STAGES:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    configs = {stage: demo.stage_config(stage, tmp_path) for stage in demo.STAGES}
    both = [Row("Pair 1", (Picture("truth", np.zeros((9, 32, 32, 3), np.uint8), "truth"),))]
    return lambda found: demo.page(configs, tmp_path, found, both, demo.Clock(demo.SHARE))


def test_the_page_is_whole(page, tmp_path):
    made = page(results())
    report.write(made, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    found = Reader(text)
    rows = 5 * min(demo.SHOWN, COUNT)
    given = 2 * 5 + 4 * rows + 3 * min(demo.SHOWN, COUNT) + 1  # the opening; four clips a pair, a first frame in three tasks; one of both
    assert found.tags.count("img") == given
    assert [section.title for section in made.sections] == [
        *(demo.PARTS[task].capitalize() for task in tasks.NAMES),
        "Two references at once",
    ]
    (curve,) = made.curves
    assert curve.series["stage2"] == ([1, 2], [2.0, 1.0])


@pytest.mark.parametrize("share", [0.0, 0.625, 0.75, 0.875, 1.0])  # of eight pairs
def test_a_target_is_reached_if_its_number_is(page, share):
    """One task at a time has that number, the others .5."""
    for place, (task, target) in enumerate(demo.TARGETS.items()):
        cards = page(results(**{task: share})).summary
        assert (cards[place].value, cards[place].target, cards[place].reached) == (
            100 * share,
            pytest.approx(100 * target),
            share >= target,
        )
        assert not any(card.reached for card in cards[: len(demo.TARGETS)] if card != cards[place])
        assert "chance" in dict(cards[place].controls)


def test_the_limit_of_swapped_references_is_that_of_the_worst_task(page):
    for share, kept in ((0.0, True), (0.25, True), (0.375, False)):
        found = results(swapped=0.0)
        found.scores["camera"]["swapped"]["retrieval"] = (np.arange(COUNT) < share * COUNT).astype(float)
        card = page(found).summary[-1]
        assert (card.value, card.reached) == (100 * share, kept)


def test_tables_have_every_control_and_score(page):
    found = results(retrieval=0.5, swapped=0.25)
    for task, section in zip(tasks.NAMES, page(found).sections, strict=False):
        assert section.scores is not None
        known = [name for name in demo.SCORE_NAMES if name in found.scores[task]["transfer"]]
        assert set(known) == found.scores[task]["transfer"].keys()
        assert section.scores.columns == ("", *(demo.SCORE_NAMES[name] for name in known))
        assert [row[0] for row in section.scores.rows] == [demo.NAMES[control] for control in CONTROLS]
        cells = [row[1 + known.index("retrieval")] for row in section.scores.rows]
        assert [cell.split()[0] for cell in cells] == ["50%", "25%", "50%", "50%", "50%"]
    lines = demo.summary(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(tasks.NAMES)
    assert lines[1].split()[1:] == ["0.50", "0.25", "0.50", "0.50", "0.50", "1.5", "dB"]


def test_scores_are_written_with_their_intervals():
    values = np.array([0.0, 1.0])
    assert demo.score_text("retrieval", values) == "50% (0 to 100)"
    assert demo.score_text("psnr gain", values) == "0.5 dB (0.0 to 1.0)"
    assert demo.score_text("path", values) == "0.5 px (0.0 to 1.0)"
    assert demo.score_text("colour", values) == "0.500 (0.000 to 1.000)"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ((52, 120, 60), ("0:00:08 so far", "0:01:00 so far, about 0:02:36 to go in all", "0:03:00 so far, about 0:00:57 to go in all")),
        # The first part was there already, so it tells nothing.
        ((1, 120, 60), ("0:00:08 so far", "0:00:09 so far", "0:02:09 so far, about 0:01:00 to go in all")),
    ],
)
def test_the_time_that_is_left(monkeypatch, capsys, seconds, told):
    now = [100.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    clock = demo.Clock({"a": 0.25, "b": 0.5, "c": 0.25})
    now[0] += 8  # nothing is done yet, so nothing is known
    for name, each in zip("abc", seconds, strict=True):
        with clock.part(name, "work"):
            now[0] += each
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [f"[{n}/3] {name}: work ({words})" for n, name, words in zip((1, 2, 3), "abc", told, strict=True)]
    assert clock.seconds == dict(zip("abc", seconds, strict=True))
    assert clock.elapsed() == f"0:0{(8 + sum(seconds)) // 60}:{(8 + sum(seconds)) % 60:02}"


def test_the_shares_of_the_time_are_of_every_part():
    assert sum(demo.SHARE.values()) == pytest.approx(1)
    assert tuple(demo.SHARE) == ("records", *demo.STAGES, "transfers")


def test_a_stage_starts_where_the_one_before_ended(tmp_path):
    parse("--length=0.1")
    found = {stage: demo.stage_config(stage, tmp_path) for stage in demo.STAGES}
    assert [config.train.init_from for config in found.values()] == ["embedded", str(tmp_path / "stage1"), str(tmp_path / "stage2")]
    for stage, config in found.items():
        config.validate()
        assert config.train.steps == round(0.1 * command.load_config(f"{stage}:tiny").train.steps)
        assert config.data.path == str(tmp_path / "records")


def test_next_steps_are_commands_that_exist():
    for _, line in demo.NEXT:
        module = line.split()[2]
        assert line.startswith("python -m launch.")
        imported = __import__(module, fromlist=["FLAGS"])
        given = [word[2:].partition("=")[0] for word in line.split()[3:]]
        assert all(name in imported.FLAGS or name == "config" or "." in name for name in given), line


@pytest.mark.slow
def test_the_whole_road(tmp_path, monkeypatch, capsys):
    """Records, three stages, transfers and the page; a second call does nothing of it again but the page."""
    monkeypatch.setattr(transfer, "BATCH", 8)
    monkeypatch.setattr(demo, "stage_config", lambda stage, out, plain=demo.stage_config: quick(plain(stage, out)))
    args = [f"--out={tmp_path}", "--pairs=40", "--scored=8", "--length=0.002"]
    assert command.execute(demo.main, demo.FLAGS, args) == 0
    output = capsys.readouterr().out
    assert [f"[{k}/5] {name}" in output for k, name in enumerate(demo.SHARE, start=1)] == [True] * 5
    table = json.loads((tmp_path / "scores.json").read_text())
    assert table.keys() == set(tasks.NAMES)
    assert all(tuple(controls) == CONTROLS for controls in table.values())
    assert table["id"]["copied"]["leak"] == {"mean": 1.0, "interval": [1.0, 1.0], "pairs": 8}
    Reader((tmp_path / "report.html").read_text())
    losses = {stage: (tmp_path / stage / METRICS_FILE).read_bytes() for stage in demo.STAGES}
    found = results(), [Row("Pair 1", (Picture("truth", np.zeros((9, 32, 32, 3), np.uint8), "truth"),))]

    def refuse(*_):
        raise AssertionError("records are encoded again")

    monkeypatch.setattr(encode_world, "Encoders", refuse)
    monkeypatch.setattr(demo, "transfers", lambda config, folder: found)
    assert command.execute(demo.main, demo.FLAGS, args) == 0
    assert capsys.readouterr().out.count("steps are done") == 3
    assert {stage: (tmp_path / stage / METRICS_FILE).read_bytes() for stage in demo.STAGES} == losses


def quick(config):
    """Two denoising steps, batches of two."""
    return replace(config, sampler=replace(config.sampler, steps=2), train=replace(config.train, batch_size=2))
